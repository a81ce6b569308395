"""A corridor that is widened for a part that was declared normal: at the features that were out, on their side alone.

What is added holds the bounds that are wanted, from the corridor as it was fitted and the part alone, and widening
takes the outermost of them: the order of what is added does not matter, and leaving one out gives the corridor without
it to the bit. This is the paper's rule for bounds (Alamir and Dion 2024, eq. 17) on the features of a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..api import Float64, Int64, MethodModel, Record
from ..errors import RecordError
from ..model import NormalityModel
from .cut import PartRows, cut_by, parts_of
from .judge import PartJudge
from .model import KINDS, PartModel

WIDER: Final = "wider"
"""Name of the array of a delta: float64[m, 4], a row each of (feature row, column, low, high); feature row -1 is the
time, with the bounds in rows."""
TIME: Final = -1
MARGIN: Final = 3.0  # spreads beyond what was seen: the next part of its like is not quite the same
TIME_MARGIN: Final = 0.1  # of its distance from the usual time


@dataclass(frozen=True)
class Departure:
    """One feature of a part outside the corridor as it was fitted.

    row : feature row, `TIME` for the time it took, in rows; column : index, 0 for the time
    kind : of the feature, "time" for the time
    seen, low, high : what it was, and the corridor as fitted, in the unit of the column
    spreads : how far it is from the usual, in healthy spreads (limits, for the time); its sign says which way
    """

    row: int
    column: int
    kind: str
    seen: float
    low: float
    high: float
    spreads: float

    @property
    def beyond(self) -> float:
        """How far it is outside."""
        return max(self.seen - self.high, self.low - self.seen)


@dataclass(frozen=True)
class BadPart:
    """A whole part that alarms, and what was out; `wanted` is its row of a delta, see `WIDER`."""

    part: PartRows
    departures: tuple[Departure, ...]
    wanted: Float64


def corridor_of(model: PartModel) -> tuple[Float64, Float64]:
    """Return (low, high), float64[r, c]: the corridor of each feature."""
    half = model.spread * model.limit[model.kind]
    return model.center - half, model.center + half


def widened(method: MethodModel, wanted: Sequence[Float64]) -> MethodModel:
    """Return a method model, as it was fitted, with its corridor widened by what deltas hold (see `WIDER`)."""
    if not wanted:
        return method
    model = PartModel.from_method(method)
    low, high = (edge.copy() for edge in corridor_of(model))
    rows = model.rows.copy()
    center, spread = model.center.copy(), model.spread.copy()
    for row, column, least, most in np.concatenate(wanted):
        if row == TIME:
            rows[0], rows[2] = min(rows[0], least), max(rows[2], most)
            continue
        r, c = int(row), int(column)
        low[r, c], high[r, c] = min(low[r, c], least), max(high[r, c], most)
        center[r, c] = 0.5 * (low[r, c] + high[r, c])
        spread[r, c] = 0.5 * (high[r, c] - low[r, c]) / model.limit[model.kind[r], c]
    return replace(method, arrays={**method.arrays, "center": center, "spread": spread, "rows": rows})


def bad_parts(
    model: NormalityModel, fitted: MethodModel, record: Record, start_ns: int, end_ns: int,
    kept_back: NDArray[np.bool_] | None = None,
) -> list[BadPart]:
    """Return the parts of an interval that alarm under a model, with what `fitted`, its method without feedback, says.

    A part belongs to the interval where it shares a row with it, or gave its verdict in it; kept_back : see
    `cut.parts_of`.

    Raises
    ------
    RecordError
        No whole part of the interval is there.
    """
    own = [part for part in parts_of(model, record, cut_by(model, record), kept_back)
           if part.begin_ns < end_ns and part.end_ns + record.period_ns >= start_ns]
    if not own:
        raise RecordError("no whole part of this interval is there", where=f"monitor {model.monitor}",
                          next_step="wait until the part has ended, then say so again; or give an interval that holds "
                                    "one, inside a recording")
    judge = PartJudge(PartModel.from_method(model.methods[0]))
    alarming = [part for part in own if part.judged_by(judge) >= 1.0]
    return [_looked_at(fitted, part) for part in alarming]


def _looked_at(fitted: MethodModel, part: PartRows) -> BadPart:
    """Return what of a part is outside the corridor as it was fitted, and what would take it in."""
    model = PartModel.from_method(fitted)
    found: list[Departure] = []
    wanted: list[tuple[float, float, float, float]] = []
    n = len(part.values)
    if model.late(n) >= 1.0:
        shortest, usual, longest = (float(x) for x in model.rows)
        sign = 1.0 if n > usual else -1.0
        found.append(Departure(TIME, 0, "time", float(n), shortest, longest, sign * model.late(n)))
        far = max(usual + (n - usual) * (1.0 + TIME_MARGIN), 0.0)
        wanted.append((TIME, 0.0, min(shortest, far), max(longest, far)))
        # A part of an unusual time has phases to compare only where such a time is normal.
        model = PartModel.from_method(widened(fitted, [np.array(wanted)]))
    judge = PartJudge(model)
    part.judged_by(judge)
    low, high = corridor_of(model)
    reach = MARGIN * model.spread
    with np.errstate(invalid="ignore"):
        out = (judge.features > high) | (judge.features < low)
        near = (judge.features + reach > high) | (judge.features - reach < low)
        away = (judge.features - model.center) / model.spread
    near &= out.any(axis=0)  # of a column that is out, what would be out with the next part of its like
    cells: Int64 = np.argwhere(near)
    for r, c in cells:
        seen = float(judge.features[r, c])
        wanted.append((float(r), float(c), min(float(low[r, c]), seen - float(reach[r, c])),
                       max(float(high[r, c]), seen + float(reach[r, c]))))
        if out[r, c]:
            found.append(Departure(int(r), int(c), KINDS[model.kind[r]], seen, float(low[r, c]), float(high[r, c]),
                                   float(away[r, c])))
    return BadPart(part, tuple(found), np.array(wanted, np.float64).reshape(-1, 4))
