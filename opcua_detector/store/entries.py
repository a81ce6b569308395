"""What the store keeps besides rows, as frozen dataclasses, and their JSON.

Times are int nanoseconds since 1970-01-01 UTC. JSON columns are plain JSON: NaN becomes null and infinities
become the strings "Infinity" and "-Infinity", so that every JSON reader (SQLite's too) takes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..api import Cause, Float64, Int64, Tag, TagKind, UInt8, UInt32


@dataclass(frozen=True, slots=True)
class Event:
    """One alert of a monitor, from raised to cleared.

    event_no : int; number of the alert within its monitor, as in `api.Verdict`
    cleared_ns : int or None; None while the alert stands (or when the process was killed while it stood)
    peak_score : float; NaN where not known yet
    run_id : int; 0 = outside a run; filled in by the store
    """

    monitor: str
    event_no: int
    raised_ns: int
    cleared_ns: int | None = None
    peak_score: float = math.nan
    severity: int = 0
    model_id: str = ""
    sentence: str = ""
    causes: tuple[Cause, ...] = ()
    run_id: int = 0


@dataclass(frozen=True, slots=True)
class FeedbackEntry:
    """What an operator said about an alert or an interval.

    label : str; false alarm, true, missed, unsure
    start_ns, end_ns : int or None; the interval meant, SourceTimestamps
    """

    who: str
    label: str
    monitor: str = ""
    event_no: int | None = None
    start_ns: int | None = None
    end_ns: int | None = None
    tags: tuple[str, ...] = ()
    comment: str = ""
    model_id: str = ""
    at_ns: int = 0
    id: int = 0


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Who did what, and when; never changed or deleted (triggers of the database refuse it)."""

    who: str
    action: str
    detail: Mapping[str, Any] = field(default_factory=dict)
    at_ns: int = 0
    id: int = 0


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model file that was registered: where it lies, its hash and its header."""

    model_id: str
    monitor: str
    path: str
    sha256: str
    created_ns: int
    header: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoredRun:
    """One life of the process; `ended_ns` is None where it runs or was killed (see `end_reason`)."""

    id: int
    started_ns: int
    ended_ns: int | None
    version: str
    config_hash: str
    end_reason: str


@dataclass(frozen=True, slots=True)
class StoredRecording:
    """What is known of a recording without reading its rows.

    rows : int; rows stored now
    first_ns, last_ns : int or None; SourceTimestamps of the first and last of them
    thinned : bool; retention has left only every nth row somewhere
    """

    id: int
    name: str
    group: str
    server: str
    tags: tuple[Tag, ...]
    period_ns: int
    started_ns: int
    ended_ns: int | None
    note: str
    truth: bool
    keep: bool
    rows: int
    first_ns: int | None
    last_ns: int | None
    thinned: bool


@dataclass(frozen=True, slots=True)
class Trend:
    """Scores of one monitor over time, one entry per bucket (or per row, for `Store.trend_detail`).

    source_ns : int64[n]; start of the bucket
    score_min, score_max, score_last : float64[n]; NaN = no verdict in the bucket
    status : uint32[n]; worst OPC UA StatusCode of the bucket
    alert : uint8[n]; 1 = an alert stood at some row of the bucket
    rows : int64[n]; verdicts in the bucket
    """

    source_ns: Int64
    score_min: Float64
    score_max: Float64
    score_last: Float64
    status: UInt32
    alert: UInt8
    rows: Int64

    def __len__(self) -> int:
        return len(self.source_ns)


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes in use, by class of table.

    `raw` and `trend` are what retention may take away; `protected` are events, feedback, audit, models and
    runs; `other` is the rest (indexes, page slack, schema). They sum to `total`. `free` pages are inside the
    file and are being given back; `wal` is the write-ahead log beside it. raw, trend and protected are
    counted from the content, so page slack appears under `other`.
    """

    total_bytes: int
    raw_bytes: int
    trend_bytes: int
    protected_bytes: int
    other_bytes: int
    free_bytes: int
    wal_bytes: int
    quota_bytes: int | None
    quota_unmet: bool


@dataclass(frozen=True, slots=True)
class StoreCounters:
    """What was written, dropped and refused since the store was opened.

    dropped_rows, dropped_verdicts : offered while the ring was full
    out_of_order_rows : not later than the row before, and no gap flag to excuse it
    rejected : offers of a wrong shape, and entries that the database refused for their content
    write_errors : failed attempts to commit (each is tried again)
    """

    rows: int = 0
    verdicts: int = 0
    entries: int = 0
    commits: int = 0
    dropped_rows: int = 0
    dropped_verdicts: int = 0
    out_of_order_rows: int = 0
    rejected: int = 0
    write_errors: int = 0
    thinned_rows: int = 0
    deleted_rows: int = 0
    decimated_trend: int = 0


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalar or array
        return _plain(value.tolist())
    return value


def to_json(value: Any) -> str:
    """Return strict JSON text; what JSON has no word for becomes its `str`."""
    return json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"), default=str, allow_nan=False)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def tags_to_json(tags: Iterable[Tag]) -> str:
    """Return the tags as a JSON list of objects."""
    return to_json([asdict(tag) for tag in tags])


def tags_from_json(text: str) -> tuple[Tag, ...]:
    """Return the tags of `tags_to_json`; fields that this version does not know are left out."""
    known = {item.name for item in fields(Tag)}
    tags = []
    for stored in json.loads(text):
        named = {key: value for key, value in stored.items() if key in known}
        named["kind"] = TagKind(named.get("kind", TagKind.MEASURED))
        if named.get("eu_range") is not None:
            low, high = named["eu_range"]
            named["eu_range"] = (_number(low), _number(high))
        if "turn" in named:
            named["turn"] = _number(named["turn"])
        tags.append(Tag(**named))
    return tuple(tags)


def causes_to_json(causes: Iterable[Cause]) -> str:
    """Return the causes as a JSON list of objects."""
    return to_json([asdict(cause) for cause in causes])


def causes_from_json(text: str) -> tuple[Cause, ...]:
    """Return the causes of `causes_to_json`."""
    known = {item.name for item in fields(Cause)}
    causes = []
    for stored in json.loads(text):
        named = {key: value for key, value in stored.items() if key in known}
        if named.get("without") is None:  # not asked: the default, as in causes of older stores
            named.pop("without", None)
        for key in ("share", "observed", "normal_low", "normal_high", "step_s", "without"):
            if key in named:
                named[key] = _number(named[key])
        for key in ("from_range", "to_range"):
            if key in named:
                named[key] = (_number(named[key][0]), _number(named[key][1]))
        causes.append(Cause(**named))
    return tuple(causes)
