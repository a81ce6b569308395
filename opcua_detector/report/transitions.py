"""Which transitions of a column the healthy record holds, and which a recording makes (method `transition`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..api import Float64, Int64, Record
from ..model import NormalityModel

CHUNK: Final = 500_000  # rows at once, which bounds the memory of the columns


@dataclass(frozen=True)
class TransitionMap:
    """The transitions of one judged column.

    column, tag, unit : its names; edges : float64[levels - 1], borders of the levels in its unit
    step_s : seconds between the two levels of a transition
    learnt : bool[levels, levels], from x to: in the healthy record
    made : int64[levels, levels]; how often in this recording
    """

    column: str
    tag: str
    unit: str
    edges: Float64
    step_s: float
    learnt: NDArray[np.bool_]
    made: Int64

    @property
    def unseen(self) -> int:
        """Rows of this recording with a transition that the healthy record does not hold."""
        return int(self.made[~self.learnt].sum())

    @property
    def total(self) -> int:
        """Rows of this recording with a transition."""
        return int(self.made.sum())


def transition_maps(model: NormalityModel, record: Record) -> list[TransitionMap]:
    """Return the map of each judged column, those with the most unseen transitions first.

    Empty where the model has no method `transition`. `record` holds the model's tags. Counted is what the method
    judges (channel `trans`): both ends valid, no hole in the rows that it looks at.
    """
    method = next((m for m in model.methods if m.plugin == "transition"), None)
    if method is None:
        return []
    arrays: dict[str, NDArray[Any]] = dict(method.arrays)
    step, levels = int(method.params["step"]), int(method.params["levels"])
    plan = model.plan
    names = [column.name for column in plan.columns]
    judged = [name for name, one in zip(method.columns, arrays["judged"], strict=True) if one]
    cols = [names.index(name) for name in judged]
    made = np.zeros((len(judged), levels * levels), np.int64)
    for rows, fresh in _chunks(record, [tag.name for tag in model.tags], 2 * step + 1):
        columns = plan.prepare(rows)
        segment = np.cumsum(rows.gap)
        newest = np.arange(max(2 * step - 1, fresh), len(rows))
        newest = newest[segment[newest - 2 * step + 1] == segment[newest]]
        for i, c in enumerate(cols):
            ok = (columns.valid[newest, c] != 0) & (columns.valid[newest - step, c] != 0)
            after = np.searchsorted(arrays["edges"][i], columns.values[newest[ok], c], side="left")
            before = np.searchsorted(arrays["edges"][i], columns.values[newest[ok] - step, c], side="left")
            made[i] += np.bincount(before * levels + after, minlength=levels * levels)
    found = [
        TransitionMap(name, plan.owner(name), plan.columns[c].unit, np.asarray(arrays["edges"][i], np.float64),
                      step * method.period_ns / 1e9, (arrays["table"][i] >= 0).reshape(levels, levels),
                      made[i].reshape(levels, levels))
        for i, (name, c) in enumerate(zip(judged, cols, strict=True))]
    return sorted(found, key=lambda one: -one.unseen / max(one.total, 1))


def _chunks(record: Record, names: Sequence[str], overlap: int) -> Iterator[tuple[Record, int]]:
    """Yield (rows, first fresh row): pieces of a record, each with some rows of the one before."""
    for start in range(0, len(record), CHUNK):
        early = max(0, start - overlap)
        yield record.rows(early, min(start + CHUNK, len(record))).select(names), start - early
