"""Learns the arrays of a regression model from one or several healthy intervals.

The sums of products of the last fifth of the rows are kept apart from the others, so that held-out errors need no
second pass. Linear maps: `regression_linear`; what is nonlinear: `regression_correction`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcua_detector.api import Float64, Record
from opcua_detector.detectors.regression_correction import Correction
from opcua_detector.detectors.regression_linear import (
    HELD_OUT,
    MIN_ROWS,
    MOST_ROWS,
    Bool,
    blocks,
    describe_errors,
    gram,
    held,
    held_out_errors,
    make_layout,
    scaled_rows,
    solve,
    usable_rows,
)
from opcua_detector.detectors.transition_fit import Columns, describe_columns
from opcua_detector.errors import RecordError
from opcua_detector.kernels.regression import LARGEST


def learn(
    record: Record, params: Any, inert: int, *, described: bool = True, corrected: Bool | None = None,
) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
    """Return the arrays of the model and facts: how many of the judged columns that move at all are nonlinear.

    `nonlinear_share` of them keep the correction; for `feature_share` its features do better than a linear map of
    the same longer past. `plant_share`: as far as the plant is to be judged as a nonlinear one, see `Found`.

    Parameters
    ----------
    record : healthy rows; the columns that are not judged come first
    params : RegressionParams
    inert : int, how many those are
    described : whether the arrays that tell of errors (rms, inner, usual) are wanted; if not they are NaN, which saves
        half of the work where there is no correction
    corrected : bool[j]; the columns that keep the correction, where that is not to be chosen

    Raises
    ------
    RecordError
        A column has no valid value, or too few rows have all of theirs.
    """
    columns = describe_columns(record, 0.0, False)
    z, good = scaled_rows(record, columns)
    d = z.shape[1]
    rows = usable_rows(record, good, params.lags)
    needed = max(MIN_ROWS, 4 * params.lags)
    if rows.size < needed and not good.all():
        # A value here and there that is missing would leave no whole row: those inputs are held, as in the stream.
        z, good = held(z, good, record.gap)
        rows = usable_rows(record, good, params.lags)
    if rows.size < needed:
        share = (record.valid != 0).mean(axis=0)
        worst = record.tags[int(share.argmin())]
        raise RecordError(
            f"only {rows.size} rows have valid values of all columns now and {params.lags} rows before, {needed} "
            f"needed ({worst.name} is valid in {100 * float(share.min()):.0f} % of the rows)",
            where=", ".join(tag.name for tag in record.tags[:6]) + (" ..." if d > 6 else ""),
            next_step="fit on a longer healthy interval, or leave out the tags that are often missing")
    layout = make_layout(z, inert, params)
    first = int(rows.size * (1.0 - HELD_OUT))
    head, tail = gram(z, rows[:first], params.lags), gram(z, rows[first:], params.lags)
    linear = solve(head + tail, rows.size, layout, params)
    alone = params.nonlinear == "off" or (corrected is not None and not corrected.any())
    early = linear if alone and not described else solve(head, first, layout, params)
    arrays: dict[str, NDArray[Any]] = {
        "mean": columns.mean, "inverse": columns.inverse,
        "low": _scaled(columns.low, columns), "high": _scaled(columns.high, columns),
        "partners": layout.partners.astype(np.int32), "forecast": linear.forecast, "relation": linear.relation,
    }
    correction = Correction(z, good, record, layout, params, columns.inverse[inert:] > 0.0, corrected)
    nonlinear, found = correction.learn(early.forecast, linear.forecast)
    arrays |= nonlinear
    if described:
        told = describe_errors(held_out_errors(z, blocks(rows[first:], MOST_ROWS), layout, early))
        if found.errors.size:
            kept_at, told_sharper = arrays["corrected"] >= 0, describe_errors(found.errors[None])
            for name, figures in told.items():
                figures[0, kept_at] = told_sharper[name][0]
        arrays |= told
    else:
        arrays |= {name: np.full((2, d - inert), np.nan) for name in ("rms", "inner", "usual")}
    kept = float((arrays["corrected"] >= 0).sum() / max(1, correction.moving.sum()))
    return arrays, {"nonlinear_share": kept, "feature_share": found.curved, "plant_share": min(kept, found.nonlinear)}


def _scaled(x: Float64, columns: Columns) -> Float64:
    return np.clip((x - columns.mean) * columns.inverse, -LARGEST, LARGEST)
