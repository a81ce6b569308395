"""What a monitor's alarms on a recording are worth: against ground truth, or against the alarm budget.

`replay` runs the recording through the same engine that runs live and keeps what it said; `evaluate` turns that into
the figures of section 6 of the design (`opcua_detector.metrics`). No limit is chosen here and no point is adjusted: an
event counts as found only by an alert that stands on one of its own rows.
"""

from .figures import (
    MAX_FPR,
    VUS_PARTS,
    VUS_WINDOW,
    Day,
    Evaluation,
    Event,
    Ranking,
    as_dict,
    evaluate,
    held_truth,
    rank,
    runs,
)
from .replay import MOST_EXPLAINED, Alert, Replay, replay, top_tags
from .words import at_most, in_budget, in_words

__all__ = [
    "MAX_FPR",
    "MOST_EXPLAINED",
    "VUS_PARTS",
    "VUS_WINDOW",
    "Alert",
    "Day",
    "Evaluation",
    "Event",
    "Ranking",
    "Replay",
    "as_dict",
    "at_most",
    "evaluate",
    "held_truth",
    "in_budget",
    "in_words",
    "rank",
    "replay",
    "runs",
    "top_tags",
]
