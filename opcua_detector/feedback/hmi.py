"""Words of the HMI: the text of a `Feedback` node, and who says so."""

from __future__ import annotations

import re
from typing import Final

from ..store import FeedbackEntry

_SAID: Final = re.compile(r"(?P<label>false alarm|true|unsure|missed)(?:\s+(?P<number>\d{1,9}))?", re.IGNORECASE)
NAME: Final = re.compile(r"[^\x00-\x1f]{1,64}")


def parse(text: str, at_ns: int) -> FeedbackEntry | None:
    """Return what the text of a `Feedback` node asks for, None where it is none (see `nodes.INPUT_NODES`)."""
    match = _SAID.fullmatch(text.strip())
    if match is None:
        return None
    label, number = match["label"].lower(), match["number"]
    if label == "missed":
        if number is not None and not 1 <= int(number) <= 86_400:
            return None
        start = at_ns - int(number or 60) * 1_000_000_000
        return FeedbackEntry("", label, start_ns=start, end_ns=at_ns, at_ns=at_ns)
    return FeedbackEntry("", label, event_no=int(number) if number else None, at_ns=at_ns)
