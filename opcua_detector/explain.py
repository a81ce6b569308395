"""From causes to words: ranks what the methods say and makes one sentence an operator can act on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .api import Cause, Tag
from .nodes import EXPLANATION_CHARS


def number(value: float, tag: Tag | None = None, span: float = float("nan")) -> str:
    """Format a value with the decimals that its tag, or else its usual span, makes meaningful."""
    if not math.isfinite(value):
        return "?"
    if tag is not None and tag.decimals is not None:
        return f"{value:.{tag.decimals}f}"
    if math.isfinite(span) and span > 0:
        decimals = min(9, max(0, 2 - math.floor(math.log10(span))))
        return f"{value:.{decimals}f}"
    return f"{value:.4g}"


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
    span = spans.get(cause.tag, float("nan"))
    unit = f" {tag.unit}" if tag is not None and tag.unit else ""
    is_now = f"{cause.tag} is {number(cause.observed, tag, span)}{unit}"
    low, high = number(cause.normal_low, tag, span), number(cause.normal_high, tag, span)
    normal = f"{low} to {high}{unit}"
    has_range = math.isfinite(cause.normal_low) and math.isfinite(cause.normal_high)
    if cause.kind == "trans":
        step = f"within {cause.step_s:.3g} s"
        text = f"{cause.tag} went {step} to {number(cause.observed, tag, span)}{unit}, a movement never seen"
        text += f"; normal from there is {normal}" if has_range else " in healthy operation"
    elif cause.kind == "bound" and has_range:
        who = f"while {cause.other} {motion(cause, spans)}" if cause.other != cause.tag else f"while it {motion(cause, spans)}"
        text = f"{is_now} {who}; normal there is {normal}"
    elif cause.kind == "conf":
        text = f"{cause.tag} {motion(cause, spans)} together with the other tags in a way never seen in healthy operation"
    elif cause.kind == "forecast" and has_range:
        text = f"{is_now}; expected from the last rows is {normal}"
    else:
        text = f"something is wrong with {cause.tag}"
        if math.isfinite(cause.observed):
            text += f", it is {number(cause.observed, tag, span)}{unit}"
    return text if len(text) <= EXPLANATION_CHARS else text[: EXPLANATION_CHARS - 3] + "..."


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
