"""Models and the deltas of feedback: put together, confirmed, undone, expired.

A delta holds what one feedback adds, made from the model as it was fitted and the rows of the alert alone, so that
the order of feedback does not matter and any delta can be dropped:

    rows     rows that were normal: the method `transition` adapts to them by the paper's own rules
             (`detectors.transition_adapt`; Alamir and Dion 2024, eqs. 14, 17, 20, 21)
    balls    situations, and how far each residual may go in them (`kernels.allowance`): every other channel, and what
             the paper's rules leave over
    limits   lower limits of views, from alerts that were missed
    wider    bounds of the features of parts that were normal (`parts.adapt`)

Methods and limits of the model are those in force; what the deltas replaced lies beside them (`adapted`), which makes
undo exact to the bit.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..api import Float64, MethodModel, Record
from ..detectors.transition_adapt import adapt
from ..errors import ConfigError
from ..model import NormalityModel
from ..parts import PLUGIN as PARTS
from ..parts import WIDER, widened

TRANSITION: Final = "transition"
PERMANENT: Final = ("confirmed", "paper")
FOLDED: Final = "folded"


@dataclass(frozen=True)
class Delta:
    """A delta with its arrays, apart from a model."""

    about: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return str(self.about["id"])

    @property
    def permanent(self) -> bool:
        return self.about["state"] in PERMANENT


def confirm(model: NormalityModel, delta_id: str, who: str, at_ns: int = 0) -> NormalityModel:
    """Return the model with a provisional delta made permanent.

    Raises
    ------
    ConfigError
        There is no such delta.
    """
    found = find(model, delta_id)
    about = {**found, "state": "confirmed", "confirmed_by": who, "confirmed_ns": at_ns or time.time_ns()}
    about.pop("expires_ns", None)
    return replace(model, deltas=tuple(about if d["id"] == found["id"] else d for d in model.deltas))


def undo(model: NormalityModel, delta_id: str) -> NormalityModel:
    """Return the model without a delta: the same, to the bit, as if it had never been given.

    Raises
    ------
    ConfigError
        There is no such delta, or it was folded into the model.
    """
    found = find(model, delta_id)
    return without_deltas(model, {str(found["id"])})


def expire(model: NormalityModel, now_ns: int) -> tuple[NormalityModel, tuple[Mapping[str, Any], ...]]:
    """Return the model without the provisional deltas whose time is over, and those deltas."""
    over = tuple(d for d in model.deltas if d.get("state") == "provisional" and d.get("expires_ns", now_ns) <= now_ns)
    return (without_deltas(model, {str(d["id"]) for d in over}) if over else model), over


def journal(model: NormalityModel) -> tuple[Mapping[str, Any], ...]:
    """Return what of a model came from feedback, oldest first."""
    return tuple(d for d in model.deltas if "label" in d)


def find(model: NormalityModel, delta_id: str) -> Mapping[str, Any]:
    known = [d for d in journal(model) if d["label"] != FOLDED]
    found = [d for d in known if str(d["id"]).startswith(delta_id)] if delta_id else []
    if len(found) != 1:
        folded = sum(d.get("count", 0) for d in journal(model) if d["label"] == FOLDED)
        raise ConfigError(
            "there is no such adaptation" if not found else "more than one adaptation begins like this",
            key=f"monitor {model.monitor}", value=delta_id,
            expected=("one of " + ", ".join(str(d["id"]) for d in known)) if known else "none is there",
            next_step=f"{folded} older ones were folded into the model for good; fit again to be rid of them"
            if folded else "see `opcua-detector feedback list`")
    return found[0]


def delta_id_of(about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(repr(sorted((k, v) for k, v in about.items() if k != "id")).encode())
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()[:8]


def fitted_methods(model: NormalityModel) -> tuple[MethodModel, ...]:
    """Return the methods as they were fitted, without any feedback (but for what was folded)."""
    methods = []
    for i, method in enumerate(model.methods):
        prefix = f"fitted/{i}/"
        own = {name.removeprefix(prefix): a for name, a in model.adapted.items() if name.startswith(prefix)}
        methods.append(replace(method, arrays={**method.arrays, **own}) if own else method)
    return tuple(methods)


def fitted_limit(model: NormalityModel) -> Float64:
    return model.adapted.get("fitted/limit", model.calibration.limit)


def deltas_of(model: NormalityModel) -> list[Delta]:
    return [Delta(d, {name.removeprefix(f"{d['id']}/"): a for name, a in model.adapted.items()
                       if name.startswith(f"{d['id']}/")}) for d in model.deltas]


def with_delta(model: NormalityModel, delta: Delta) -> NormalityModel:
    """Return the model with one delta more."""
    return assemble(model, fitted_methods(model), fitted_limit(model), [*deltas_of(model), delta],
                     model.methods, [delta])


def without_deltas(model: NormalityModel, gone: set[str]) -> NormalityModel:
    """Return the model without some deltas."""
    fitted = fitted_methods(model)
    left = [d for d in deltas_of(model) if d.id not in gone]
    return assemble(model, fitted, fitted_limit(model), left, fitted, left)


def assemble(
    model: NormalityModel, fitted: Sequence[MethodModel], limit: Float64, deltas: Sequence[Delta],
    methods: Sequence[MethodModel], more: Sequence[Delta],
) -> NormalityModel:
    """Return the model of these deltas; `more` are those that `methods` have not adapted to yet."""
    now = list(methods)
    for delta in more:
        if "rows" in delta.about:
            rows = stored_rows(model, delta)
            now = [adapt(m, rows)[0] if m.plugin == TRANSITION else m for m in now]
    now = [widened(old, wider_of(deltas)) if old.plugin == PARTS else new for old, new in zip(fitted, now, strict=True)]
    lowered = np.array(limit)
    for delta in deltas:
        for s, v, value in delta.about.get("limits", ()):
            lowered[s, v] = min(lowered[s, v], value)
    adapted: dict[str, NDArray[Any]] = {}
    for i, (old, new) in enumerate(zip(fitted, now, strict=True)):
        adapted |= {f"fitted/{i}/{name}": array for name, array in old.arrays.items()
                    if new.arrays[name] is not array and not _equal(new.arrays[name], array)}
    if not _equal(lowered, limit):
        adapted["fitted/limit"] = limit
    if "range" in model.adapted:
        adapted["range"] = model.adapted["range"]
    for delta in deltas:
        adapted |= {f"{delta.id}/{name}": array for name, array in delta.arrays.items()}
    return replace(model, methods=tuple(now), calibration=replace(model.calibration, limit=lowered),
                   deltas=tuple(d.about for d in deltas), adapted=adapted)


def wider_of(deltas: Sequence[Delta]) -> list[Float64]:
    """Return by what deltas widen the corridor of parts."""
    return [delta.arrays[WIDER] for delta in deltas if WIDER in delta.arrays]


def _equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def stored_rows(model: NormalityModel, delta: Delta) -> Record:
    by_name = {c.name: c for c in model.plan.columns}
    tags = [by_name[name] for name in delta.about["rows"]]
    return Record.from_rows(delta.arrays["values"], tags, model.period_ns, valid=delta.arrays["valid"],
                            gap=delta.arrays["gap"])
