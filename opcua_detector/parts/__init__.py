"""Monitors of cyclic processes: a trigger cuts the stream into parts, and each part gets one verdict.

A part is compared with a corridor that was learnt from whole healthy parts (`parts.fit`): bin by bin of absolute time
while it runs, bin by bin of its own length at its end, and as a whole (time it took, mean, swing and noise of each
column). A departure is counted in spreads of the healthy parts; divided by its limit it is a ratio, and the score of a
part is its largest ratio.
"""

from .adapt import TIME, WIDER, BadPart, Departure, bad_parts, widened
from .cut import Cut, count_part_alerts, cut_record, part_scores
from .explain import PartCause, part_sentence
from .fit import MIN_PARTS, fit_parts
from .judge import PartJudge
from .model import KINDS, PLUGIN, Cycle, PartModel, feature_kinds, is_part_model
from .monitor import PartMonitor

__all__ = [
    "KINDS",
    "MIN_PARTS",
    "PLUGIN",
    "TIME",
    "WIDER",
    "BadPart",
    "Cut",
    "Cycle",
    "Departure",
    "PartCause",
    "PartJudge",
    "PartModel",
    "PartMonitor",
    "bad_parts",
    "count_part_alerts",
    "cut_record",
    "feature_kinds",
    "fit_parts",
    "is_part_model",
    "part_scores",
    "part_sentence",
    "widened",
]
