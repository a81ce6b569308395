"""Operator feedback on a model: a false alarm is taken in as a small delta that can be undone, an alert that was missed
tightens a limit. The model is immutable; every function gives a new one, and none does I/O.

    policy       what is said, how far it may go, what became of it
    give         the way in: `give_feedback`
    false_alarm  the delta that excuses a situation: evidence (what was off), situation (where, in what direction and by
                 how much), refusals and ranges (how far it may go), words;  of_parts: the same for monitors of parts
    missed       a limit is lowered within the alarm budget
    deltas       assemble, confirm, undo, expire;  fold: bounded size
    bench        stored rows judged again, as the running monitor sees them; the forecast
    desk         entries of the store -> model file and audit;  live, recent, hmi: in a running service

This front room holds what needs neither store nor client; `desk` and `live` are imported by their own names.
"""

from .bench import FORECAST_ROWS, MAX_ROWS, forecast, lead_rows
from .deltas import FOLDED, confirm, expire, journal, undo
from .give import give_feedback
from .policy import DAY_NS, LABELS, Feedback, Forecast, Outcome, Policy

__all__ = [
    "DAY_NS", "FOLDED", "FORECAST_ROWS", "LABELS", "MAX_ROWS", "Feedback", "Forecast", "Outcome", "Policy", "confirm",
    "expire", "forecast", "give_feedback", "journal", "lead_rows", "undo",
]
