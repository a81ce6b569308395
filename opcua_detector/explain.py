"""From causes to words: ranks what the methods say and makes one sentence an operator can act on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .api import Cause, Tag
from .nodes import EXPLANATION_CHARS

_LONGEST = 1e12  # values from here on are written with an exponent
_MORE_DECIMALS = 3
_LONGEST_NAME = 48
_TELL_AGE_S = 2.0


def number(value: float, tag: Tag | None = None, span: float = float("nan"), *, more: int = 0) -> str:
    """Format a value with the decimals that its tag, or else its usual span, makes meaningful, or a few more."""
    if not math.isfinite(value):
        return "?"
    if abs(value) >= _LONGEST:
        return f"{value:.4g}"
    if tag is not None and tag.decimals is not None:
        text = f"{value:.{tag.decimals}f}"
    elif math.isfinite(span) and span > 0:
        text = f"{value:.{min(9, max(0, 2 - math.floor(math.log10(span))) + more)}f}"
    else:
        text = f"{value:.{4 + more}g}"
    return text.removeprefix("-") if float(text) == 0 else text


def motion(cause: Cause, spans: Mapping[str, float]) -> str:
    """Say how the tag of the situation moves: "falls slowly", "rises fast", "is steady"."""
    start, end = _middle(cause.from_range), _middle(cause.to_range)
    span = spans.get(cause.other, float("nan"))
    if not (math.isfinite(start) and math.isfinite(end) and math.isfinite(span) and span > 0):
        return "moves"
    change = (end - start) / span
    if abs(change) < 0.04:
        return "is steady"
    return f"{'rises' if change > 0 else 'falls'} {'slowly' if abs(change) < 0.25 else 'fast'}"


def _middle(limits: tuple[float, float]) -> float:
    low, high = limits
    if math.isfinite(low) and math.isfinite(high):
        return (low + high) / 2
    return low if math.isfinite(low) else high


def sentence(cause: Cause, tags: Mapping[str, Tag], spans: Mapping[str, float], age_s: float = 0.0) -> str:
    """Return one sentence, at most 200 characters, for one cause.

    Parameters
    ----------
    tags, spans : by column name; a span is the 99 % less the 1 % quantile, in the tag's unit
    age_s : how long ago it was worst; told from 2 s on
    """
    say = _Words(cause, tags, spans, age_s)
    text = _of_kind(cause, say) or say.plain()
    return text if len(text) <= EXPLANATION_CHARS else text[: EXPLANATION_CHARS - 3] + "..."


def counterfactual_sentence(tag: str, without: float, score: float) -> str:
    """Return what the score would be had a tag followed the others; `score` is what it is, 1.0 the limit."""
    verdict = "no alarm" if without < 1.0 else "still an alarm"
    return (f"had {plain_name(tag)} followed the other tags, the score would be {_score(without)} instead of"
            f" {_score(score)}: {verdict}")


def _score(x: float) -> str:
    if x < 1.0 <= float(f"{x:.1f}"):  # never rounded up to the limit
        return f"{x:.3g}" if x < 0.9995 else "just below 1"
    return f"{x:.1f}" if x < 100 else f"{x:.0f}"


def plain_name(name: str) -> str:
    """Return a name without what would break a line or a terminal, and not too long for a sentence."""
    shown = "".join(c if c.isprintable() else "?" for c in name)
    return shown if len(shown) <= _LONGEST_NAME else shown[: _LONGEST_NAME - 2] + ".."


class _Words:
    """Numbers and phrases of one cause."""

    def __init__(self, cause: Cause, tags: Mapping[str, Tag], spans: Mapping[str, float], age_s: float) -> None:
        tag = tags.get(cause.tag)
        self.cause, self.tag, self.span = cause, tag, spans.get(cause.tag, float("nan"))
        self.name = plain_name(cause.tag)
        self.other = plain_name(cause.other) if cause.other != cause.tag else "it"
        self.unit = f" {plain_name(tag.unit)}" if tag is not None and tag.unit else ""
        now, self.low, self.high = _numbers(cause, tag, self.span)
        self.now = f"{now}{self.unit}" if math.isfinite(cause.observed) else ""
        self.has_range = math.isfinite(cause.normal_low) and math.isfinite(cause.normal_high)
        self.range = (self.low if self.low == self.high else f"{self.low} to {self.high}") + self.unit
        self.moves = motion(cause, spans)
        self.situation = f" while {self.other} {self.moves}" if cause.other else ""
        old = math.isfinite(age_s) and age_s >= _TELL_AGE_S
        self.verb = "was" if old else "is"
        self.ago = f" {duration(age_s)} ago" if old else ""
        self.side = self._side()

    def _side(self) -> int:
        """Return 1 where the observed lies above the normal range, -1 below, 0 inside or not known."""
        cause = self.cause
        if not (self.now and self.has_range):
            return 0
        return int(cause.observed > cause.normal_high) - int(cause.observed < cause.normal_low)

    def is_now(self) -> str:
        """Say what the tag is or was."""
        return f"{self.name} {self.verb} {self.now}{self.ago}"

    def plain(self) -> str:
        """Say no more than the tag and its value."""
        it = f", it {self.verb} {self.now}{self.ago}" if self.now else ""
        return f"something is wrong with {self.name}{it}"


def _of_kind(cause: Cause, say: _Words) -> str:
    """Return the sentence of the kind, empty where its figures are missing."""
    told = bool(say.now) and say.has_range
    if cause.kind == "trans":
        return _transition(cause, say)
    if cause.kind == "conf":
        if cause.other in ("", cause.tag):
            return f"{say.name} {say.moves} in a way never seen in healthy operation"
        state = f"{say.verb} {say.now}{say.ago}" if say.now else "does not fit"
        return f"{say.name} {state}{say.situation}, a pattern never seen in healthy operation"
    if cause.kind in ("bound", "affine") and told:
        off = {1: ", too high", -1: ", too low", 0: ""}[say.side]
        there = " there" if say.situation else ""
        return f"{say.is_now()}{off if say.situation or off else ''}{say.situation}; normal{there} is {say.range}"
    if cause.kind == "forecast" and told:
        off = {1: "higher than", -1: "lower than", 0: "steadily off what"}[say.side]
        return f"{say.is_now()}, {off} its own past predicts ({say.range})"
    if cause.kind == "relation" and told:
        off = {1: "too high", -1: "too low", 0: "steadily off"}[say.side]
        return f"{say.is_now()}, {off} for {say.other if cause.other else 'the other tags'}; normal there {say.range}"
    if cause.kind == "range" and told and say.side:
        beyond = "above" if say.side > 0 else "below"
        return f"{say.is_now()}, {beyond} all that was seen in healthy operation ({say.range})"
    if cause.kind == "rate" and told and say.side:
        way = "rose" if cause.observed > 0 else "fell"
        step, _, most = (text.removeprefix("-") for text in _numbers(cause, say.tag, say.span))
        return (f"{say.name} {way} faster than ever, by {step}{say.unit} at once{say.ago};"
                f" never more than {most}{say.unit} before")
    if cause.kind == "stuck" and say.now:
        lasted = f" for {duration(cause.step_s)}" if math.isfinite(cause.step_s) and cause.step_s > 0 else ""
        longest = cause.to_range[1]
        ever = f"longer than {duration(longest)}" if math.isfinite(longest) and longest > 0 else "so long"
        return f"{say.name} is stuck at {say.now}{lasted}; it never stood still {ever} in healthy operation"
    return ""


def _transition(cause: Cause, say: _Words) -> str:
    """Return the sentence of a movement that was never seen: slower or faster than ever, or another one."""
    start = _middle(cause.from_range)
    within = f" within {duration(cause.step_s)}" if math.isfinite(cause.step_s) and cause.step_s > 0 else ""
    normal = f"; normal from there is {say.range}" if say.has_range else " in healthy operation"
    if not say.now:
        return f"{say.name} made a movement never seen{normal}"
    moved = cause.observed - start
    way = "rose" if moved > 0 else "fell"
    if math.isfinite(moved) and moved != 0.0 and say.has_range and say.side:
        nearest = cause.normal_high if say.side > 0 else cause.normal_low
        if (nearest - start) * moved > 0:
            pace = "faster" if say.side * moved > 0 else "slower"
            return f"{say.name} {way} {pace} than ever:{within} to {say.now}{say.ago}{normal}"
    went = way if math.isfinite(moved) and moved != 0.0 else "went"
    return f"{say.name} {went}{within} to {say.now}{say.ago}, a movement never seen{normal}"


def duration(seconds: float) -> str:
    """Format a duration: "0.2 s", "12 s", "3 min", "2.5 h"."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"


def _numbers(cause: Cause, tag: Tag | None, span: float) -> tuple[str, str, str]:
    """Format observed, normal low and high alike, with as many decimals as tell the observed from the limits."""
    values = (cause.observed, cause.normal_low, cause.normal_high)
    for more in range(_MORE_DECIMALS + 1):
        now, low, high = (number(value, tag, span, more=more) for value in values)
        if now not in (low, high):
            break
    return now, low, high


def clarity(cause: Cause) -> float:
    """Return how plainly an operator can see a cause, 1 to 5: a value well outside its normal range leads.

    A bound that is left by half its width or more is told before a forecast that is missed by a little.
    """
    width = cause.normal_high - cause.normal_low
    if cause.kind != "bound" or not width > 0 or not math.isfinite(cause.observed):
        return 1.0
    outside = max(cause.normal_low - cause.observed, cause.observed - cause.normal_high, 0.0) / width
    return 1.0 + 8.0 * min(outside, 0.5)


def rank(
    causes: Sequence[tuple[float, Cause]], top_tags: Sequence[str], owner: Mapping[str, str],
) -> tuple[Cause, ...]:
    """Order causes: those of the tags that carry the score first, then by weight x share.

    causes : (weight of the method, cause); top_tags : tags by contribution, the largest first;
    owner : column -> tag.
    """
    place = {name: i for i, name in enumerate(top_tags)}
    ordered = sorted(causes, key=lambda item: (place.get(owner.get(item[1].tag, item[1].tag), len(place)),
                                               -item[0] * item[1].share))
    return tuple(cause for _, cause in ordered)
