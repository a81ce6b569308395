"""The way in: what an operator says of an interval, and the model it leads to."""

from __future__ import annotations

import time
from dataclasses import replace

from ..api import Record
from ..engine import AlertSettings
from ..errors import ConfigError, RecordError
from ..model import NormalityModel
from ..parts import is_part_model
from .bench import NOTHING_KEPT_BACK, Bench, paused_rows
from .false_alarm import false_alarm
from .missed import missed
from .of_parts import part_feedback
from .policy import LABELS, Feedback, Opener, Outcome, Policy, Refused


def give_feedback(
    model: NormalityModel, record: Record, feedback: Feedback, opener: Opener, *, policy: Policy | None = None,
    healthy: Record | None = None, alert: AlertSettings = NOTHING_KEPT_BACK,
) -> Outcome:
    """Take in what an operator says.

    Parameters
    ----------
    record : rows of the model's tags around the interval; `lead_rows` of them before it make the judgement exact
    opener : opens a method model, (model, columns) -> method
    healthy : healthy rows of the same tags; a missed alert can tighten a limit only where there are some
    alert : what keeps alarms back; rows in maintenance, inhibited or settling are neither alerts nor adapted to, and
        `record` and `healthy` have those tags too

    Raises
    ------
    ConfigError
        An unknown label.
    RecordError
        No row of the interval is there, or it ends before it begins.
    """
    if feedback.label not in LABELS:
        raise ConfigError("there is no such feedback", key="label", value=feedback.label,
                          expected=", ".join(LABELS), next_step="choose one of them")
    policy = policy or Policy()
    feedback = replace(feedback, at_ns=feedback.at_ns or time.time_ns())
    if feedback.label in ("true", "unsure"):
        return Outcome("noted", model, f"noted: {feedback.label}; the model stays as it is")
    if feedback.end_ns < feedback.start_ns:
        raise RecordError("the interval ends before it begins", next_step="give its first and last time")
    if policy.mode == "off":
        return Outcome("refused", model, "refused: feedback does not change this monitor (mode off); what was said is "
                                         "kept, set `feedback: {mode: bounded}` in the config or fit again")
    try:
        if is_part_model(model):
            return part_feedback(model, record, feedback, policy, paused_rows(record, "", alert)[0])
        bench = Bench(model, record, opener, alert=alert)
        if feedback.label == "missed":
            return missed(bench, feedback, policy, healthy, alert)
        return false_alarm(bench, feedback, policy)
    except Refused as reason:
        return Outcome("refused", model, f"refused: {reason}")
