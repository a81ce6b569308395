"""Words of the HMI: the text of a `Feedback` node, who says so, and how many of them are taken.

Whoever can write those nodes can write anything at any rate. What is no feedback is counted and told, of the rest a
few an hour are taken, and nothing that was written is kept beyond its first characters.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from ..nodes import INPUT_NODES
from ..store import FeedbackEntry

LEAST_APART_S: Final = 2.0  # two words on one monitor
PER_HOUR: Final = 60
MOST_WAITING: Final = 4  # words on one monitor that wait for their answer
MOST_CHARS: Final = 64
SHOWN_CHARS: Final = 200
FEEDBACK, FEEDBACK_BY = (node.signal for node in INPUT_NODES)
_SAID: Final = re.compile(r"(?P<label>false alarm|true|unsure|missed)(?:[ \t]+(?P<number>[0-9]{1,9}))?", re.IGNORECASE)


def parse(text: str, at_ns: int) -> FeedbackEntry | None:
    """Return what the text of a `Feedback` node asks for, None where it is none (see `nodes.INPUT_NODES`)."""
    match = _SAID.fullmatch(text.strip()) if len(text) <= MOST_CHARS else None
    if match is None:
        return None
    label, number = match["label"].lower(), match["number"]
    if label == "missed":
        if number is not None and not 1 <= int(number) <= 86_400:
            return None
        start = at_ns - int(number or 60) * 1_000_000_000
        return FeedbackEntry("", label, start_ns=start, end_ns=at_ns, at_ns=at_ns)
    return FeedbackEntry("", label, event_no=int(number) if number else None, at_ns=at_ns)


def is_name(text: str) -> bool:
    """Whether a text can stand in the journal as the name of a person: short, and without control characters."""
    return 0 < len(text) <= MOST_CHARS and text.isprintable()


def shown(text: str) -> str:
    """Return the first characters of a text that may be anything, what cannot be printed as `?`."""
    return "".join(c if c.isprintable() else "?" for c in text[:SHOWN_CHARS])


@dataclass
class Gate:
    """Lets feedback on one monitor through, now and then; any thread, one at a time.

    refused : words that were not taken, since the start; waiting : words taken that have no answer yet
    """

    monitor: str
    refused: int = 0
    waiting: int = 0
    _taken_s: deque[float] = field(default_factory=lambda: deque(maxlen=PER_HOUR))

    def take(self, server: str, texts: Mapping[str, str], stale: bool, source_ns: int, now_s: float,
             ) -> tuple[FeedbackEntry | None, str]:
        """Return (what is asked for, "") or (None, why it is not taken); what is taken is waited for.

        texts : signal -> text of the input nodes; stale : it stood there before anybody listened
        source_ns : of the newest row; now_s : seconds of a clock that never goes back
        """
        text, by = texts[FEEDBACK], texts[FEEDBACK_BY]
        entry = parse(text, source_ns)
        why = ""
        if stale:
            why = "it was written before the detector started; write it again"
        elif entry is None:
            why = f"write one of: {INPUT_NODES[0].meaning}"
        elif by and not is_name(by):
            why = f"FeedbackBy is a name of at most {MOST_CHARS} characters"
        elif self.waiting >= MOST_WAITING:
            why = f"{self.waiting} feedbacks wait for their answer"
        elif self._taken_s and now_s - self._taken_s[-1] < LEAST_APART_S:
            why = f"wait {LEAST_APART_S:g} s between two feedbacks"
        elif len(self._taken_s) == PER_HOUR and now_s - self._taken_s[0] < 3600.0:
            why = f"more than {PER_HOUR} feedbacks an hour"
        if why or entry is None:
            self.refused += 1
            return None, why
        self._taken_s.append(now_s)
        self.waiting += 1
        return replace(entry, who=by or f"operator at {server}", monitor=self.monitor,
                       comment=f"from server {server}"), ""
