"""Figures as a person says them."""

from __future__ import annotations

import math


def in_words(seconds: float) -> str:
    """Return a length of time as a person says it."""
    if not math.isfinite(seconds):
        return "-"
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 0.001 or seconds == 0 else f"{seconds * 1000:.2g} ms"


def in_budget(per_day: float) -> str:
    """Return a budget of false alarms in words."""
    return f"{per_day:g} false alarm{'' if per_day == 1 else 's'} a day"


def at_most(count: float) -> str:
    """Return an expected number of alerts in words."""
    return "under 0.01" if 0 <= count < 0.01 else f"{count:.2g}" if count < 10 else f"{count:.0f}"
