"""What is said of an alert, how far it may change a model, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal

from ..api import Method, MethodModel, Tag
from ..errors import ConfigError
from ..model import NormalityModel

LABELS: Final = ("false alarm", "true", "unsure", "missed")
Action = Literal["adapted", "tightened", "unchanged", "refused", "noted"]
Opener = Callable[[MethodModel, Sequence[Tag]], Method]
DAY_NS: Final = 86_400_000_000_000


@dataclass(frozen=True)
class Feedback:
    """What an operator says of an alert or an interval.

    label : one of `LABELS`; start_ns, end_ns : the interval, SourceTimestamps; at_ns : when it was said (0: now)
    """

    label: str
    start_ns: int
    end_ns: int
    who: str
    at_ns: int = 0
    event_no: int = 0
    comment: str = ""


@dataclass(frozen=True)
class Policy:
    """How far feedback may go.

    mode : "bounded": an adaptation is provisional and reverts after `expires_days` unless an engineer confirms it;
        "paper": it holds at once and for good, as in the paper; "off": what is said is kept and changes nothing
    beyond : no value may be taken in that lies further than this beyond the healthy range of its tag (or outside
        its EURange), and no distance from what the other tags say that is larger; in parts of the tag's healthy span.
        Holds in all modes; that a tag which keeps trending is refused, in "bounded" alone
    protected : tag -> (low, high) in its unit; no value outside is taken in, whatever the healthy range is
    budget_factor : a missed alert may tighten a limit only while the healthy recording is forecast to give at most so
        many times the alarm budget
    """

    mode: Literal["bounded", "paper", "off"] = "bounded"
    expires_days: float = 7.0
    beyond: float = 0.2
    protected: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    budget_factor: float = 3.0

    def __post_init__(self) -> None:
        for key, ok, expected in (
            ("mode", self.mode in ("bounded", "paper", "off"), "bounded, paper or off"),
            ("expires_days", 0.0 < self.expires_days <= 3650.0, "days, above 0"),
            ("beyond", 0.0 <= self.beyond <= 0.3, "a part of the healthy span, 0 to 0.3"),
            ("protected", all(low < high for low, high in self.protected.values()), "(low, high) with low < high"),
            ("budget_factor", 1.0 <= self.budget_factor <= 100.0, "1 to 100"),
        ):
            if not ok:
                raise ConfigError("feedback cannot use this", key=key, value=getattr(self, key), expected=expected)


@dataclass(frozen=True)
class Forecast:
    """Alerts of a replay of stored rows, with the model before and after.

    before, after : alerts; days : of rows that were judged
    """

    before: int
    after: int
    days: float

    @property
    def per_day(self) -> tuple[float, float]:
        """Alerts per day (before, after)."""
        return self.before / self.days, self.after / self.days

    def __str__(self) -> str:
        if self.days <= 0.0:
            return "no stored rows to forecast alerts from"
        span = f"{self.days:.1f} days" if self.days >= 1.0 else f"{24 * self.days:.2g} h"
        before, after = self.per_day
        return f"alerts per day {before:.3g} -> {after:.3g} (replay of {span}: {self.before} -> {self.after})"


@dataclass(frozen=True)
class Outcome:
    """What became of a feedback.

    action : "adapted", "tightened", "unchanged" (nothing had to change), "refused" (with the reason), "noted" (true,
        unsure, or missed and nothing can be done: it counts for evaluation)
    model : the model to use from now on; the very same one where nothing changed
    """

    action: Action
    model: NormalityModel
    text: str
    delta_id: str = ""
    forecast: Forecast | None = None

    @property
    def changed(self) -> bool:
        """Whether the model is another one."""
        return self.action in ("adapted", "tightened")


class Refused(Exception):
    """A feedback is not taken in; its text says why."""


def span_text(start_ns: int, end_ns: int) -> str:
    """Return an interval as text."""
    return " to ".join(datetime.fromtimestamp(t / 1e9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") for t in (start_ns, end_ns))
