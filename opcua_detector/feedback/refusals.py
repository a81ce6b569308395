"""What is not taken in: values and distances beyond the protected limits, and tags that keep trending."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..api import TagKind
from ..kernels.columns import SAME
from ..model import NormalityModel
from .evidence import Evidence
from .policy import Policy, Refused
from .ranges import FURTHER, TREND, channel_units, healthy_range, largest_healthy
from .words import value_text


def check_values(evidence: Evidence, policy: Policy) -> None:
    """Refuse values beyond EURange or a protected range, or too far beyond the healthy range.

    Raises
    ------
    Refused
        With the tag, its value and the limit.
    """
    plan, columns = evidence.model.plan, evidence.bench.columns
    rows = evidence.rows & evidence.off().any(axis=1)
    low, high = healthy_range(evidence.model)
    for c, column in enumerate(plan.columns):
        known = rows & (columns.valid[:, c] != 0)
        if column.kind is TagKind.STATE or not known.any():
            continue
        x = columns.values[known, c]
        margin = policy.beyond * float(high[c] - low[c])
        limits = [("what was learnt by more than it may be,", low[c] - margin, high[c] + margin)]
        if plan.op[c] == SAME:
            if column.name in policy.protected:
                limits.insert(0, ("its protected range", *policy.protected[column.name]))
            if column.eu_range is not None:
                limits.insert(0, ("its EURange", *column.eu_range))
        for name, least, most in limits:
            if x.min() < least or x.max() > most:
                worst = x.min() if x.min() < least else x.max()
                raise Refused(f"{column.name} went to {value_text(worst, column)}, outside {name} {least:.4g} to "
                              f"{value_text(most, column)}; correct the plant or the sensor, or fit again on a record "
                              "that holds it")


def check_residuals(evidence: Evidence, policy: Policy) -> None:
    """Refuse a distance from what the other tags say that is too large a part of the tag's span.

    Raises
    ------
    Refused
        With the tag, the distance and the limit.
    """
    off, base = evidence.off(), evidence.base
    units = channel_units(evidence.model, evidence.plugins)
    healthy = largest_healthy(evidence.model.calibration)
    scale = evidence.model.calibration.scale[0]
    for c in np.flatnonzero(off.any(axis=0) & (units > 0)):
        column = evidence.model.plan.columns[evidence.column[c]]
        span = float(evidence.scale.span[evidence.column[c]])
        # Less the plant's own noise. A jump that nobody can foresee is off by much in healthy operation too.
        far = (float(np.quantile(base[off[:, c], c], 0.9)) - 2 * scale[c]) * units[c]
        if far > max(policy.beyond * span, healthy[c] * units[c]):
            raise Refused(f"{column.name} is off by {value_text(far, column)} ({far / span:.0%} of its healthy span) "
                          f"from what the rest says, {policy.beyond:.0%} is the protected limit; fit again on a "
                          "record that holds it")


def check_trend(model: NormalityModel, reaches: Mapping[str, Sequence[float]], policy: Policy) -> None:
    """Refuse a tag that goes further the same way with every feedback.

    reaches : tag -> (how far it is off in healthy deviations, which way: -1, 0 or 1, 1)

    Raises
    ------
    Refused
        With the tag and how often it went further.
    """
    if policy.mode == "paper":
        return
    before = [d["reach"] for d in model.deltas if "reach" in d]
    for tag, (level, way, _) in reaches.items():
        highs, most = 0, 0.0
        for reach in before:
            if tag in reach and way * reach[tag][1] >= 0 and reach[tag][0] > FURTHER * most:
                highs, most = highs + int(reach[tag][2]), reach[tag][0]
        if highs >= TREND and level > FURTHER * most:
            raise Refused(f"{tag} keeps trending: {highs} adaptations have gone ever further the same way, and this "
                          f"is {level / most:.1f} times the last; look for drift or wear, or fit again if it is the "
                          "new normal")
