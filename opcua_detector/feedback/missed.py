"""A missed alert: the limit that came closest is lowered, as far as the alarm budget allows."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from ..api import Int64, Record
from ..calibration import DAY_S
from ..engine import AlertSettings
from ..kernels.score import soft
from .bench import FORECAST_CHUNK, Bench, count_alerts
from .deltas import Delta, delta_id_of, with_delta
from .false_alarm import about_of
from .fold import make_room
from .policy import Feedback, Forecast, Outcome, Policy
from .words import until_text

TIGHTER: Final = 0.98  # a limit is set so far below what a missed alert reached
CANDIDATES: Final = 4  # views that are tried for a missed alert


def missed(bench: Bench, feedback: Feedback, policy: Policy, healthy: Record | None, alert: AlertSettings) -> Outcome:
    """Lower the limit of the view that came closest, as far as the alarm budget on healthy rows allows."""
    model = bench.model
    inside = bench.inside(feedback)
    score, views = bench.views(model)
    if np.nanmax(score[inside], initial=0.0) >= 1.0:
        return Outcome("unchanged", model, "nothing to change: the monitor alarms in this interval already; noted as "
                                           f"true for evaluation; model {model.model_id}")
    known = views[inside][~np.isnan(views[inside]).any(axis=1)]
    kept = "noted as true for evaluation"
    if len(known) == 0:
        return Outcome("noted", model, f"{kept}: there was no verdict in this interval, so no limit can be lowered")
    if healthy is None or len(healthy) == 0:
        return Outcome("noted", model, f"{kept}: the highest score was {known.max():.2g}; a limit is lowered only with "
                                       "a healthy recording to forecast from: record one, or give --healthy")
    calm = Bench(model, healthy, bench.opener, FORECAST_CHUNK, alert)
    budget = float(model.facts.get("false_alarms_per_day", 1.0))
    days = len(healthy) * healthy.period_ns / 1e9 / DAY_S
    before = count_alerts(calm.score(model), calm.record, alert.on_delay_ns, alert.off_delay_ns)
    best: tuple[int, Delta] | None = None
    for v in np.argsort(-known.max(axis=0), kind="stable")[:CANDIDATES]:
        view = model.calibration.views[v]
        if view.role in ("fixed", "lamp") or known[:, v].max() <= 0.0:
            continue
        delta = _tighter(bench, feedback, policy, int(v), inside)
        after = count_alerts(calm.score(with_delta(model, delta)), calm.record, alert.on_delay_ns, alert.off_delay_ns)
        if best is None or after < best[0]:
            best = (after, delta)
    if best is None:
        return Outcome("noted", model, f"{kept}: no limit that could be lowered came near")
    after, delta = best
    told = Forecast(before, after, days)
    # One alert in a short recording is no rate; the budget counts where the recording is long enough to tell.
    if after - before > policy.budget_factor * max(budget * days, 0.0) and after > before:
        return Outcome("noted", model, f"{kept}: finding it would cost too much, {told}; the budget is {budget:g} a "
                                       f"day, {policy.budget_factor:g} times that is the most", forecast=told)
    made = make_room(with_delta(model, delta))
    return Outcome("tightened", made, f"tightened: {delta.about['text']}; {told}; {until_text(delta.about)}; "
                                      f"model {made.model_id}", delta.id, told)


def _tighter(bench: Bench, feedback: Feedback, policy: Policy, v: int, inside: Int64) -> Delta:
    """Return the delta that makes one view alarm in an interval."""
    model = bench.model
    calibration = model.calibration
    _, _, values = calibration.scorer().rows(bench.allowed(model), bench.gap, bench.state, details=True)
    limits = []
    for s in range(len(calibration.states)):
        own = values[inside[bench.state[inside] == s], v]
        own = own[~np.isnan(own)]
        if len(own) and own.max() < calibration.limit[s, v]:
            # A score is soft(value) / soft(limit), so that is what is lowered.
            wanted = soft(float(own.max())) * TIGHTER
            limits.append([s, v, math.log(math.expm1(wanted)) if wanted < 30.0 else wanted])
    view = calibration.views[v]
    name = "all tags together" if view.name in ("all", "quick") else view.name.replace("predicted/", "")
    text = (f"the limit of {name} falls from {float(calibration.limit[0, v]):.3g} to "
            f"{limits[0][2] if limits else math.nan:.3g} healthy spreads")
    about = about_of(feedback, policy) | {"limits": limits, "text": text}
    about["id"] = delta_id_of(about, {})
    return Delta(about)
