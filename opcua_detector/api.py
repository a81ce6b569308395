"""What a plugin imports: the words of the product as types, and the protocols of a method and of a plugin.

Rows are on a regular grid (see `opcua_detector.frames`), times are SourceTimestamps in nanoseconds since
1970-01-01 UTC, values are float64 in engineering units. A *column* is what a method sees: most tags are one
column each, a counter becomes its difference, an angle becomes two (see `opcua_detector.columns`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]
UInt32 = NDArray[np.uint32]

GOOD = 0x00000000
UNCERTAIN_SUB_NORMAL = 0x40950000  # Part 8, 6.3.2: derived from fewer Good sources than required
BAD_WAITING_FOR_INITIAL_DATA = 0x80320000  # Part 8, 6.3.2
BAD_DATA_UNAVAILABLE = 0x809E0000  # Part 11, 6.5.2; here: the operating state was not learnt
BAD_NO_COMMUNICATION = 0x80310000  # Part 8, 6.3.2
SEVERITY_MASK = 0xC0000000  # Part 4, 7.39: top two bits: 00 Good, 01 Uncertain, 10 Bad


class TagKind(StrEnum):
    """What a tag is, which decides how it is prepared and whether it is judged."""

    MEASURED = "measured"  # judged as it is
    COUNTER = "counter"  # totaliser: judged as difference per row
    ANGLE = "angle"  # wraps: judged as sine and cosine
    SETPOINT = "setpoint"  # input to the methods, not judged
    COMMAND = "command"  # input to the methods, not judged
    STATE = "state"  # input to the methods, not judged; may choose the calibration


JUDGED_KINDS = frozenset({TagKind.MEASURED, TagKind.COUNTER, TagKind.ANGLE})


@dataclass(frozen=True, slots=True)
class Tag:
    """One variable of a server, or one column made of it.

    `node` is a NodeId (`nsu=...;s=...`) or a browse path (`/Objects/2:Plant/...`); `unit` is the engineering
    unit as displayed; `eu_range` is (low, high) in that unit; `turn` is a full turn of an angle in that unit;
    `quality` says what a Bad sample does: hold the last value, mask the tag, or stop the row; `uncertain` says the same
    of an Uncertain one, `use` takes it like a Good one (Part 8, 6.3); `stale_after_ns` is the age at which a held value
    ends, None: max_hold periods, and never for set-points, commands and states.
    """

    name: str
    node: str = ""
    kind: TagKind = TagKind.MEASURED
    unit: str = ""
    eu_range: tuple[float, float] | None = None
    decimals: int | None = None
    description: str = ""
    path: str = ""
    quality: Literal["hold", "mask", "stop"] = "mask"
    turn: float = 360.0
    uncertain: Literal["use", "hold", "mask", "stop"] = "use"
    stale_after_ns: int | None = None

    @property
    def judged(self) -> bool:
        """Whether residuals are formed for this tag."""
        return self.kind in JUDGED_KINDS


@dataclass(slots=True)
class Frame:
    """One row of a group on its time grid; reused, so whoever keeps it copies it.

    values : float64[n_tags], engineering units; NaN where no value is known
    valid : uint8[n_tags]; 0 = do not use (Bad, stale, NaN, never received)
    status : uint32[n_tags]; OPC UA StatusCode of the sample in use
    source_ns : int; time of the row, SourceTimestamp clock, UTC
    gap : bool; True on the first row after a hole longer than max_hold (methods reset)
    seq : int; number of the row since the start, counts on over gaps
    """

    values: Float64
    valid: UInt8
    status: UInt32
    source_ns: int = 0
    gap: bool = False
    seq: int = -1

    @classmethod
    def empty(cls, n_tags: int) -> Frame:
        """Return a frame of `n_tags` tags, all NaN and not valid."""
        return cls(np.full(n_tags, np.nan), np.zeros(n_tags, np.uint8), np.zeros(n_tags, np.uint32))


@dataclass(frozen=True)
class Record:
    """Rows of a group on its time grid, as history, a recording or a CSV gives them.

    tags : the columns, in order
    period_ns : int; distance of two rows
    source_ns : int64[n]; strictly increasing
    values : float64[n, n_tags]
    valid : uint8[n, n_tags]
    gap : uint8[n]; 1 = this row does not continue the row before (row 0 always is 1)
    truth : uint8[n] or None; ground truth where known (simulated plant, labelled files)
    """

    tags: tuple[Tag, ...]
    period_ns: int
    source_ns: Int64
    values: Float64
    valid: UInt8
    gap: UInt8
    truth: UInt8 | None = None

    def __len__(self) -> int:
        return int(self.values.shape[0])

    @classmethod
    def from_rows(
        cls, values: Float64, tags: Sequence[Tag | str], period_ns: int, *, start_ns: int = 0,
        valid: UInt8 | None = None, gap: UInt8 | None = None, truth: UInt8 | None = None,
    ) -> Record:
        """Make a record of rows that already stand on the grid; NaN and infinity are masked.

        values : float64[n, n_tags]
        """
        rows = np.ascontiguousarray(values, dtype=np.float64)
        n = rows.shape[0]
        mask = np.isfinite(rows).astype(np.uint8)
        if valid is not None:
            mask &= (np.asarray(valid) != 0).astype(np.uint8)
        starts = np.zeros(n, np.uint8) if gap is None else np.array(gap, dtype=np.uint8)
        if n:
            starts[0] = 1
        named = tuple(tag if isinstance(tag, Tag) else Tag(tag) for tag in tags)
        source_ns = start_ns + np.arange(n, dtype=np.int64) * period_ns
        return cls(named, int(period_ns), source_ns, rows, mask, starts, truth)

    def segments(self) -> Int64:
        """Return int64[k, 2]: half-open row ranges without a gap inside."""
        starts = np.flatnonzero(self.gap)
        return np.column_stack([starts, np.append(starts[1:], len(self))]).astype(np.int64)

    def rows(self, start: int, stop: int) -> Record:
        """Return the rows [start, stop) as a record of its own."""
        return self.take(np.arange(start, stop))

    def take(self, index: Int64) -> Record:
        """Return the rows of `index` (increasing); where neighbours are left out a gap begins."""
        index = np.asarray(index, dtype=np.int64)
        gap = self.gap[index].copy()
        if len(index):
            gap[0] = 1
            gap[1:] |= (np.diff(index) != 1).astype(np.uint8)
        return replace(
            self, source_ns=self.source_ns[index], values=np.ascontiguousarray(self.values[index]),
            valid=np.ascontiguousarray(self.valid[index]), gap=gap,
            truth=None if self.truth is None else self.truth[index],
        )

    def select(self, names: Sequence[str]) -> Record:
        """Return the record with these tags alone, in this order; KeyError names a tag that is missing."""
        at = {tag.name: i for i, tag in enumerate(self.tags)}
        cols = [at[name] for name in names]
        return replace(
            self, tags=tuple(self.tags[c] for c in cols), values=np.ascontiguousarray(self.values[:, cols]),
            valid=np.ascontiguousarray(self.valid[:, cols]),
        )


@dataclass(frozen=True, slots=True)
class Channel:
    """One residual stream: column x kind (`trans`, `bound`, `conf`, `forecast`, ...)."""

    column: str
    tag: str
    kind: str


@dataclass(frozen=True, slots=True)
class Cause:
    """One reason for an alert, as facts; `opcua_detector.explain` makes the sentence.

    tag : the tag that is off
    kind : kind of residual
    share : float in 0..1; part of the method's residual in the window that this cause carries
    observed, normal_low, normal_high : in the tag's unit; NaN where the kind has no such figure
    other : the tag whose transition sets the situation (may be `tag` itself; empty: no situation)
    from_range, to_range : (low, high) of `other` at the start and end of the transition, in its unit;
        infinite where the outermost level is open
    step_s : float; duration of the transition in seconds
    source_ns : int; when it was worst
    seen : bool; False: this transition was never seen in healthy data
    without : score of the monitor had this tag followed the others; NaN where that was not asked or cannot be said
    """

    tag: str
    kind: str
    share: float
    observed: float = float("nan")
    normal_low: float = float("nan")
    normal_high: float = float("nan")
    other: str = ""
    from_range: tuple[float, float] = (float("nan"), float("nan"))
    to_range: tuple[float, float] = (float("nan"), float("nan"))
    step_s: float = float("nan")
    source_ns: int = 0
    seen: bool = True
    without: float = float("nan")


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why an alert was raised: one sentence for the operator, ranked causes for the engineer.

    shares : (tag, share) of the tags to blame, the largest first; they sum to 1
    counterfactual : (tag, score of the monitor had this tag followed the others)
    """

    event_no: int
    source_ns: int
    sentence: str
    causes: tuple[Cause, ...]
    shares: tuple[tuple[str, float], ...] = ()
    counterfactual: tuple[tuple[str, float], ...] = ()


@dataclass(slots=True)
class Verdict:
    """What a monitor says of one row; reused, so whoever keeps it copies it.

    score : float; 1.0 = the limit; NaN while there is no verdict
    slow_score : float; the second lamp, over a long window: what is weak but lasts; NaN where there is none
    alert : bool; after delays
    status : int; OPC UA StatusCode: Good, Uncertain (some tags masked), Bad (warming up, gap, state not learnt)
    source_ns : int; SourceTimestamp of the newest row used
    residual : float64[n_channels]; mean over the window, raw units of each channel
    contribution : float64[n_tags]; share of each tag of the monitor, sums to 1 (0 while healthy)
    r_trans, r_bound, r_conf : float; the paper's residuals over the window, NaN where the method is absent
    model_id : str
    """

    monitor: str
    model_id: str
    tags: tuple[str, ...]
    residual: Float64
    contribution: Float64
    score: float = float("nan")
    slow_score: float = float("nan")
    alert: bool = False
    severity: int = 0
    event_no: int = 0
    status: int = BAD_WAITING_FOR_INITIAL_DATA
    quality: str = "warming up"
    source_ns: int = 0
    seq: int = -1
    r_trans: float = float("nan")
    r_bound: float = float("nan")
    r_conf: float = float("nan")
    raised: bool = False  # the alert began with this row
    cleared: bool = False  # the alert ended with this row


@dataclass(frozen=True, slots=True)
class PartVerdict:
    """What a monitor of a cyclic process says of one whole part.

    number : of the part; begin_ns, end_ns : SourceTimestamps of its first and last row
    score : 1.0 = the limit; NaN where it could not be judged, and `unjudged` says why
    top_tag, phase, sentence : of a bad part: the tag, from where to where in % of the cycle (NaN: all of it), and why
    """

    number: int
    begin_ns: int
    end_ns: int
    score: float
    top_tag: str = ""
    phase: tuple[float, float] = (float("nan"), float("nan"))
    sentence: str = ""
    unjudged: str = ""


@dataclass(frozen=True)
class MethodModel:
    """What a plugin has learnt: plain arrays and a JSON-able header, nothing executable.

    plugin : name of the plugin that opens it
    columns : names of the columns it needs, in its own order
    period_ns : int; distance of rows it was fitted for
    params : JSON-able parameters in force
    arrays : name -> array; an ONNX graph travels as uint8 array `onnx`
    """

    plugin: str
    columns: tuple[str, ...]
    period_ns: int
    params: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@runtime_checkable
class Method(Protocol):
    """A way to look at rows, opened on a model and a list of columns.

    `update` does no I/O, never waits, logs or raises and does not grow memory. `residuals` gives for a whole
    record what `update` gives row by row (1e-10 in float64, 1e-5 in ONNX float32).

    lag : rows by which the verdict trails (the paper's Delta); residual of row n uses rows <= n only
    memory : rows needed before the first residual after a reset
    residual : float64[n_channels]; written by `update`; NaN = no verdict (warming up, masked)
    """

    name: str
    channels: tuple[Channel, ...]
    lag: int
    memory: int
    residual: Float64

    def update(self, values: Float64, valid: UInt8) -> None:
        """Take one row: float64[n_columns], uint8[n_columns]; write `residual`."""
        ...

    def reset(self) -> None:
        """Forget all rows (after a gap)."""
        ...

    def residuals(self, record: Record) -> Float64:
        """Return float64[n, n_channels] for the columns of a whole record."""
        ...

    def explain(self, values: Float64, valid: UInt8, source_ns: Int64, window: int) -> list[Cause]:
        """Return ranked causes over the last `window` judged rows; pure: may run on another thread.

        values float64[m, n_columns], valid uint8[m, n_columns], source_ns int64[m]; no gap inside.
        """
        ...


@runtime_checkable
class Plugin(Protocol):
    """A detector plugin: fits a model on healthy rows and opens it as a method.

    name : as in the config
    Params : frozen dataclass of JSON-able fields with defaults; the config checks against it
    learns : False where `fit` only checks a model that was trained elsewhere, so that its residuals on the
        healthy record are held out by themselves
    """

    name: str
    Params: type
    learns: bool

    def fit(self, record: Record, params: Any) -> MethodModel:
        """Learn from healthy rows (columns, gaps marked); may take long, may import torch."""
        ...

    def open(self, model: MethodModel, columns: Sequence[Tag]) -> Method:
        """Make the method for rows of these columns; ModelTagsError where one it needs is missing."""
        ...
