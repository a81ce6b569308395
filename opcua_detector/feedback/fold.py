"""Bounded size: the oldest deltas that are for good become part of what counts as fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..allowances import BALLS
from ..api import Float64
from ..detectors.transition_adapt import adapt
from ..model import NormalityModel
from ..parts import PLUGIN as PARTS
from ..parts import widened
from .deltas import FOLDED, TRANSITION, Delta, assemble, deltas_of, fitted_limit, fitted_methods, stored_rows, wider_of
from .policy import Refused
from .ranges import FURTHER, healthy_range
from .situation import MOST_RADIUS

MOST_DELTAS: Final = 64  # that can be undone; older ones that are for good are folded into the model
TOTAL_BALLS: Final = 3072
TOTAL_CELLS: Final = 1_000_000
FOLDED_BALLS: Final = 1024
MOST_GROUPS: Final = 8  # of folded balls, by the columns that tell their situation


def make_room(model: NormalityModel) -> NormalityModel:
    """Return the model within its bounds: the oldest deltas that are for good are folded into it.

    Raises
    ------
    Refused
        It is full of deltas that nobody has reviewed.
    """
    while _full(model):
        oldest = next((d for d in deltas_of(model) if d.permanent and d.about["label"] != FOLDED), None)
        if oldest is None:
            raise Refused("the model holds as many unreviewed adaptations as it may; confirm or undo some "
                           "(`opcua-detector feedback list`), or fit again")
        model = _fold(model, oldest)
    return model


def _full(model: NormalityModel) -> bool:
    own = [d for d in deltas_of(model) if d.about["label"] != FOLDED]
    return (len(own) > MOST_DELTAS
            or sum(len(d.arrays[BALLS]) for d in own if BALLS in d.arrays) > TOTAL_BALLS
            or sum(d.arrays["values"].size for d in own if "values" in d.arrays) > TOTAL_CELLS)


def _fold(model: NormalityModel, delta: Delta) -> NormalityModel:
    """Return the model with one delta made part of what counts as fitted; it cannot be undone any more."""
    fitted = list(fitted_methods(model))
    if "rows" in delta.about:
        rows = stored_rows(model, delta)
        fitted = [adapt(m, rows)[0] if m.plugin == TRANSITION else m for m in fitted]
    fitted = [widened(m, wider_of([delta])) if m.plugin == PARTS else m for m in fitted]
    limit = np.array(fitted_limit(model))
    for s, v, value in delta.about.get("limits", ()):
        limit[s, v] = min(limit[s, v], value)
    if "range" not in model.adapted:
        model = replace(model, adapted={**model.adapted, "range": np.array(healthy_range(model))})
    deltas = [d for d in deltas_of(model) if d.id != delta.id]
    folded = [d for d in deltas if d.about["label"] == FOLDED]
    rest = [d for d in deltas if d.about["label"] != FOLDED]
    return assemble(model, fitted, limit, [*_folded(folded, delta), *rest], fitted, rest)


def _folded(folded: Sequence[Delta], delta: Delta) -> list[Delta]:
    """Return the folded groups with one delta more: its balls go to the group of the same columns and ages."""
    about = delta.about.get(BALLS)
    key = [about["columns"], about["ages"]] if about else []
    at = next((i for i, d in enumerate(folded) if d.about["key"] == key), len(folded))
    if at == len(folded) == MOST_GROUPS:
        folded, old = _emptied(folded, key)
        at = len(folded)
    elif at == len(folded):
        old = Delta({"id": f"{FOLDED}-{at}", "label": FOLDED, "state": "confirmed", "key": key, "count": 0,
                     "forgotten": 0, "reach": {}, "text": "folded into the model"})
    else:
        old = folded[at]
    reach = {tag: list(value) for tag, value in old.about["reach"].items()}
    for tag, (level, way, highs) in delta.about.get("reach", {}).items():
        if tag not in reach:
            reach[tag] = [level, way, highs]
        elif way * reach[tag][1] >= 0 and level > FURTHER * reach[tag][0]:
            reach[tag] = [level, way or reach[tag][1], reach[tag][2] + highs]
    now = {**old.about, "count": old.about["count"] + 1, "reach": reach}
    arrays: dict[str, NDArray[Any]] = {}
    if about:
        channels = sorted({*old.about.get(BALLS, {}).get("channels", ()), *about["channels"]})
        keys = 1 + len(about["columns"])
        both = [(old.arrays[BALLS], old.about[BALLS]["channels"])] if BALLS in old.arrays else []
        both.append((delta.arrays[BALLS], about["channels"]))
        wide = np.full((sum(len(balls) for balls, _ in both), keys + 2 * len(channels)), np.nan)
        first = 0
        for balls, own in both:
            at_least = [keys + channels.index(c) for c in own]
            rows = slice(first, first + len(balls))
            wide[rows, :keys] = balls[:, :keys]
            wide[rows, at_least] = balls[:, keys:keys + len(own)]
            wide[rows, [len(channels) + i for i in at_least]] = balls[:, keys + len(own):]
            first += len(balls)
        others = sum(len(d.arrays[BALLS]) for i, d in enumerate(folded) if i != at and BALLS in d.arrays)
        arrays[BALLS], lost = _thinned(wide, keys, max(1, FOLDED_BALLS - others))
        now[BALLS] = {**about, "channels": channels}
        now["forgotten"] = old.about["forgotten"] + lost
    made = Delta(now, arrays)
    return [made if i == at else d for i, d in enumerate(folded)] if at < len(folded) else [*folded, made]


def _emptied(folded: Sequence[Delta], key: list[Any]) -> tuple[list[Delta], Delta]:
    """Return (the folded groups but the one that was begun first, that one without its balls, for another key)."""
    oldest = next(d for d in folded if BALLS in d.arrays)
    about = {name: value for name, value in oldest.about.items() if name != BALLS}
    about |= {"key": key, "forgotten": oldest.about["forgotten"] + len(oldest.arrays[BALLS])}
    return [d for d in folded if d is not oldest], Delta(about)


def _thinned(balls: Float64, keys: int, most: int) -> tuple[Float64, int]:
    """Return at most so many balls: those that lie together become one, then the oldest are forgotten.

    balls : float64[E, keys + 2 M], oldest first: radius, centre, least and most
    """
    if len(balls) <= most:
        return balls, 0
    kept = np.empty_like(balls)
    n, middle = 0, (keys + balls.shape[1]) // 2
    for ball in balls[::-1]:
        apart = np.abs(kept[:n, 1:keys] - ball[1:keys]).max(axis=1) if n else np.zeros(0)
        wide = np.maximum(kept[:n, 0], apart + ball[0])
        near = int(np.argmin(wide)) if n else -1
        if n and wide[near] <= 2 * max(ball[0], kept[near, 0]) and wide[near] <= MOST_RADIUS:
            kept[near, 0] = wide[near]
            kept[near, keys:middle] = np.fmin(kept[near, keys:middle], ball[keys:middle])
            kept[near, middle:] = np.fmax(kept[near, middle:], ball[middle:])
        else:
            kept[n] = ball
            n += 1
    lost = max(0, n - most)
    return np.ascontiguousarray(kept[:n - lost][::-1]), lost
