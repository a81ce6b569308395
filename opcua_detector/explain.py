"""From causes to words: ranks what the methods say and makes one sentence an operator can act on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .api import Cause, Tag
from .nodes import EXPLANATION_CHARS

_LONGEST = 1e12  # values from here on are written with an exponent
_MORE_DECIMALS = 3


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


def sentence(cause: Cause, tags: Mapping[str, Tag], spans: Mapping[str, float]) -> str:
    """Return one sentence, at most 200 characters, for one cause.

    `tags` and `spans` (99 % less 1 % quantile, in the tag's unit) are looked up by column name.
    """
    tag = tags.get(cause.tag)
    unit = f" {tag.unit}" if tag is not None and tag.unit else ""
    now, low, high = _numbers(cause, tag, spans.get(cause.tag, float("nan")))
    now = f"{now}{unit}" if math.isfinite(cause.observed) else ""
    has_range = math.isfinite(cause.normal_low) and math.isfinite(cause.normal_high)
    normal = (low if low == high else f"{low} to {high}") + unit
    moves = motion(cause, spans)
    who = "it" if cause.other == cause.tag else cause.other
    situation = f" while {who} {moves}" if cause.other else ""
    text = f"something is wrong with {cause.tag}" + (f", it is {now}" if now else "")
    if cause.kind == "trans":
        within = f" within {cause.step_s:.3g} s" if math.isfinite(cause.step_s) else ""
        text = f"{cause.tag} " + (f"went{within} to {now}, " if now else "made ") + "a movement never seen"
        text += f"; normal from there is {normal}" if has_range else " in healthy operation"
    elif cause.kind == "bound" and has_range and now:
        text = f"{cause.tag} is {now}{situation}; normal{' there' if situation else ''} is {normal}"
    elif cause.kind == "conf" and cause.other in ("", cause.tag):
        text = f"{cause.tag} {moves} in a way never seen in healthy operation"
    elif cause.kind == "conf":
        state = f"is {now}" if now else "does not fit"
        text = f"{cause.tag} {state}{situation}, a pattern never seen in healthy operation"
    elif cause.kind in ("forecast", "affine") and has_range and now:
        text = f"{cause.tag} is {now}; its past and the other tags predict {normal}{_times(cause)}"
    elif cause.kind == "relation" and has_range and now:
        text = f"{cause.tag} is {now}; {cause.other or 'the other tags'} would make it {normal}{_times(cause)}"
    return text if len(text) <= EXPLANATION_CHARS else text[: EXPLANATION_CHARS - 3] + "..."


def _times(cause: Cause) -> str:
    """Say how far off a forecast is, in half widths of its usual range; empty where that says little."""
    half = (cause.normal_high - cause.normal_low) / 2
    times = abs(cause.observed - (cause.normal_high + cause.normal_low) / 2) / half if half > 0 else math.inf
    return f", {times:.0f} times the usual error" if 1.5 <= times < 1000 else ""


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
