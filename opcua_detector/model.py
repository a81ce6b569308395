"""The model of a monitor as one file: arrays and a JSON header in an npz, checked by sha256, never pickle."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .api import Channel, Float64, MethodModel, Tag, TagKind
from .calibration import Calibration
from .columns import ColumnPlan, make_plan
from .errors import ModelFileError, ModelTagsError
from .views import View

FORMAT = 3
_CALIBRATION_ARRAYS = ("transform", "slot", "windows", "grid", "level", "used", "tail", "scale", "usual", "weight",
                       "offset", "limit", "floor", "absent")
_ADAPTED = "adapted/"


@dataclass(frozen=True)
class NormalityModel:
    """Everything a monitor has learnt; immutable.

    monitor : its name when it was fitted
    tags : the tags in use, in order; excluded : tag -> reason
    period_ns : int; distance of rows
    state_tag : tag that chooses the calibration, empty for none
    methods : one per method; names : their names in the config
    span : float64[n_columns, 2]; 1 % and 99 % quantile of each column, for words like "slowly"
    deltas : journal of small changes since the fit (feedback), oldest first
    facts : rows, times and the like, JSON-able
    adapted : name -> array; what the deltas need, and what they replaced (see `opcua_detector.feedback`)
    """

    monitor: str
    tags: tuple[Tag, ...]
    excluded: Mapping[str, str]
    period_ns: int
    state_tag: str
    names: tuple[str, ...]
    methods: tuple[MethodModel, ...]
    calibration: Calibration
    span: Float64
    deltas: tuple[Mapping[str, Any], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    adapted: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def plan(self) -> ColumnPlan:
        """How rows of the tags become rows of columns."""
        return make_plan(self.tags)

    @property
    def given(self) -> tuple[Tag, ...]:
        """The tags of the healthy record in its order, those left out included."""
        known = {tag.name: tag for tag in self.tags}
        return tuple(known.get(name) or Tag(name, kind=TagKind.STATE if name == self.state_tag else TagKind.MEASURED)
                     for name in self.facts.get("given", list(known)))

    @cached_property
    def sha256(self) -> str:
        """Hash over header and arrays, hexadecimal."""
        return _digest(*self._content())

    @property
    def model_id(self) -> str:
        """First 16 hex digits of the sha256."""
        return self.sha256[:16]

    def require(self, tags: Sequence[Tag], period_ns: int) -> None:
        """Check that rows of these tags at this period fit the model.

        Raises
        ------
        ModelTagsError
            A tag is missing, or of another kind or unit, or the period is another one.
        """
        known = {tag.name: tag for tag in tags}
        needed = dict.fromkeys([*(tag.name for tag in self.tags), *([self.state_tag] if self.state_tag else [])])
        missing = [name for name in needed if name not in known]
        if missing:
            raise ModelTagsError(
                f"the model was fitted for the tags {', '.join(needed)}; "
                f"{', '.join(missing)} is not among the monitor's tags", where=f"monitor {self.monitor}",
                next_step="add the tag to the config, or fit the monitor again")
        for tag in self.tags:
            if known[tag.name].kind is not tag.kind:
                raise ModelTagsError(
                    f"tag {tag.name} was fitted as {tag.kind.value}, the config says {known[tag.name].kind.value}",
                    where=f"monitor {self.monitor}", next_step="correct the kind, or fit the monitor again")
            ours, theirs = (f"{t.unit} (full turn {t.turn:g})" if t.kind is TagKind.ANGLE else t.unit
                            for t in (tag, known[tag.name]))
            if ours != theirs and tag.unit and known[tag.name].unit:
                raise ModelTagsError(
                    f"tag {tag.name} was fitted in {ours}, the config says {theirs}",
                    where=f"monitor {self.monitor}", next_step="correct the unit, or fit the monitor again")
        if period_ns != self.period_ns:
            raise ModelTagsError(
                f"the model was fitted for a period of {self.period_ns / 1e6:g} ms, the group has "
                f"{period_ns / 1e6:g} ms", where=f"monitor {self.monitor}",
                next_step="correct the group's period, or fit the monitor again")

    def _content(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        arrays: dict[str, NDArray[Any]] = {"span": self.span}
        for name in _CALIBRATION_ARRAYS:
            arrays[f"calibration/{name}"] = getattr(self.calibration, name)
        for i, method in enumerate(self.methods):
            for name, array in method.arrays.items():
                arrays[f"method{i}/{name}"] = array
        arrays |= {f"{_ADAPTED}{name}": array for name, array in self.adapted.items()}
        header = {
            "format": FORMAT, "monitor": self.monitor, "tags": [asdict(tag) for tag in self.tags],
            "excluded": dict(self.excluded), "period_ns": self.period_ns, "state_tag": self.state_tag,
            "names": list(self.names), "deltas": [dict(d) for d in self.deltas], "facts": dict(self.facts),
            "methods": [{"plugin": m.plugin, "columns": list(m.columns), "period_ns": m.period_ns,
                         "params": dict(m.params)} for m in self.methods],
            "calibration": {"channels": [asdict(c) for c in self.calibration.channels],
                            "views": [asdict(v) for v in self.calibration.views],
                            "states": list(self.calibration.states),
                            "notes": list(self.calibration.notes)},
        }
        return header, arrays

    def save(self, path: str | Path) -> str:
        """Write the file (all or nothing) and return the model_id.

        Raises
        ------
        ModelFileError
            No space, no right, or no folder; an older file stays as it was.
        """
        header, arrays = self._content()
        digest = _digest(header, arrays)
        buffer = io.BytesIO()
        texts = {"header": np.frombuffer(_json(header), np.uint8), "sha256": np.frombuffer(digest.encode(), np.uint8)}
        np.savez_compressed(buffer, allow_pickle=False, **texts, **arrays)
        target = Path(path)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(buffer.getvalue())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        except OSError as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise ModelFileError("the model cannot be written", where=str(target),
                                 next_step=f"check space and rights ({error.strerror})") from error
        return digest[:16]


def load(path: str | Path) -> NormalityModel:
    """Read a model file, checking its sha256.

    Raises
    ------
    ModelFileError
        Missing, truncated, altered, or of an unknown format.
    """
    file = Path(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ModelFileError("the model file cannot be read", where=str(file),
                             next_step=f"fit the monitor first: opcua-detector fit ({error.strerror})") from error
    again = "restore the file from a copy, or fit the monitor again"
    try:
        header, arrays, digest = _parts(content)
    except Exception as error:  # damaged bytes make zipfile, zlib, numpy and json raise nearly anything
        raise ModelFileError(f"the model file is truncated or no model: {error}", where=str(file),
                             next_step=again) from error
    if _digest(header, arrays) != digest:
        raise ModelFileError("the model file was altered: its sha256 does not fit its content", where=str(file),
                             next_step=again)
    if header.get("format") != FORMAT:
        raise ModelFileError(f"model format {header.get('format')} is not known, this version reads {FORMAT}",
                             where=str(file), next_step="use the version that wrote it, or fit the monitor again")
    try:
        return _from_content(header, arrays)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelFileError(f"the model file describes no model: {error!r}", where=str(file),
                             next_step=again) from error


def _parts(content: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]], str]:
    """Return (header, arrays, sha256) of a file's bytes; ValueError where it is no archive with a header."""
    with zipfile.ZipFile(io.BytesIO(content)):  # np.load would also take a plain array or a pickle
        pass
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    header = json.loads(arrays.pop("header").tobytes())
    if not isinstance(header, dict):
        raise ValueError("its header is no mapping")
    return header, arrays, arrays.pop("sha256").tobytes().decode("ascii")


def _from_content(header: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> NormalityModel:
    methods = []
    for i, item in enumerate(header["methods"]):
        prefix = f"method{i}/"
        own = {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
        methods.append(MethodModel(item["plugin"], tuple(item["columns"]), item["period_ns"], item["params"], own))
    about = header["calibration"]
    calibration = Calibration(
        channels=tuple(Channel(**c) for c in about["channels"]), views=tuple(_view(v) for v in about["views"]),
        states=tuple(about["states"]), notes=tuple(about["notes"]),
        **{name: np.ascontiguousarray(arrays[f"calibration/{name}"]) for name in _CALIBRATION_ARRAYS})
    return NormalityModel(
        header["monitor"], tuple(_tag(t) for t in header["tags"]), header["excluded"], header["period_ns"],
        header["state_tag"], tuple(header["names"]), tuple(methods), calibration, arrays["span"],
        tuple(header["deltas"]), header["facts"],
        {name.removeprefix(_ADAPTED): a for name, a in arrays.items() if name.startswith(_ADAPTED)})


def _tag(item: dict[str, Any]) -> Tag:
    limits = item.pop("eu_range")
    kind = TagKind(item.pop("kind"))
    return replace(Tag(**item), kind=kind, eu_range=None if limits is None else (limits[0], limits[1]))


def _view(item: dict[str, Any]) -> View:
    return View(item["name"], item["tag"], item["role"], tuple(tuple(g) for g in item["groups"]),
                tuple(item["windows"]))


def _json(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, ensure_ascii=False, allow_nan=False).encode("utf-8")


def _digest(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(_json(header))
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
