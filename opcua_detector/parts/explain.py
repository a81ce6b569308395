"""Why a part is not a healthy one: where it left its corridor, in which tag, or that it took too long."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..api import Cause, Explanation, Float64, Int64, Tag
from ..columns import ColumnPlan
from ..explain import number, sentence
from ..model import NormalityModel
from ..nodes import EXPLANATION_CHARS
from .model import PartModel

PLAIN = {"bin": 1.0, "run": 1.0, "phase": 0.95, "mean": 0.9, "shape": 0.8, "swing": 0.8, "noise": 0.7}
STUCK_SWING = 0.02  # of the usual swing: less is no movement
STUCK_FIRST = 100.0
TELL_FROM = 1.0  # ratio from which a cause is told beside the largest
_MORE_DECIMALS = 3


@dataclass(frozen=True, slots=True)
class PartFacts:
    """One part as the judge saw it, copied.

    number : of the part; whole : False while it still runs; rows : so far
    features float64[r, c], ratio float64[k, c], where int64[k, c] : see `parts.judge.PartJudge`
    late : departure of its time, 1.0 is the limit; speed : 1 is usual, NaN where that alone does not explain it
    """

    number: int
    whole: bool
    rows: int
    features: Float64
    ratio: Float64
    where: Int64
    late: float
    speed: float


@dataclass(frozen=True, slots=True)
class PartCause(Cause):
    """A cause with the part and the phase it belongs to.

    kind : time (observed and normal range in s), speed (in % of the usual), run, bin, phase, shape, mean, swing, noise
    part : number of the part; whole : False while it still runs
    phase : (from, to) in % of the cycle; NaN for what is said of the part as a whole
    usual : healthy median of what was observed, same unit
    """

    part: int = 0
    whole: bool = True
    phase: tuple[float, float] = (math.nan, math.nan)
    usual: float = math.nan


@dataclass(frozen=True)
class PartSnapshot:
    """What `explain` needs of the part that sets the score, copied."""

    facts: PartFacts
    contribution: Float64
    event_no: int
    source_ns: int


class PartReasons:
    """Says why a part is bad, from copies alone; any thread.

    Parameters
    ----------
    model : of the monitor; parts : its corridor; plan : of its judged columns
    """

    def __init__(self, model: NormalityModel, parts: PartModel, plan: ColumnPlan) -> None:
        self._tags = [tag.name for tag in model.tags]
        self._parts = parts
        self._owner = {c.name: plan.owner(c.name) for c in plan.columns}
        self._columns = {c.name: c for c in plan.columns}
        self._spans = {c.name: float(hi - lo) for c, (lo, hi) in zip(plan.columns, model.span, strict=False)}

    def explain(self, taken: PartSnapshot) -> Explanation:
        """Return the sentence and the causes, those of the tags that carry the score first."""
        order = np.argsort(-taken.contribution, kind="stable")
        top = [self._tags[i] for i in order if taken.contribution[i] > 0]
        place = {name: i for i, name in enumerate(top)}
        causes = explain_part(self._parts, taken.facts, taken.source_ns)
        ranked = tuple(sorted(causes, key=lambda cause: (
            place.get(self._owner.get(cause.tag, cause.tag), len(place)), -cause.share)))
        text = self.text(ranked[0]) if ranked else f"part {taken.facts.number} has no cause that stands out"
        return Explanation(taken.event_no, taken.source_ns, text, ranked)

    def text(self, cause: Cause) -> str:
        """Return the sentence of one cause."""
        return part_sentence(cause, self._columns, self._spans)


def explain_part(model: PartModel, facts: PartFacts, source_ns: int) -> list[PartCause]:
    """Return the causes of a part, the weightiest first; shares sum to 1."""
    found: list[tuple[float, PartCause]] = []
    period_s = model.period_ns / 1e9
    limits_s = [float(rows) * period_s for rows in model.rows]
    if facts.late >= TELL_FROM:
        found.append((2.0 * facts.late, PartCause(
            model.cycle.tag, "time", 0.0, facts.rows * period_s, limits_s[0], limits_s[2], source_ns=source_ns,
            part=facts.number, whole=facts.whole, usual=limits_s[1])))
    elif not math.isnan(facts.speed):
        found.append((1.0, PartCause(model.cycle.tag, "speed", 0.0, 100 * facts.speed, source_ns=source_ns,
                                     part=facts.number, whole=facts.whole, usual=100.0)))
    for c in range(facts.ratio.shape[1]):
        found += _of_column(model, facts, c, source_ns, told=bool(found))
    found.sort(key=lambda item: -item[0])
    total = sum(weight for weight, _ in found)
    return [_with_share(cause, weight / total) for weight, cause in found]


def _with_share(cause: PartCause, share: float) -> PartCause:
    return PartCause(cause.tag, cause.kind, share, cause.observed, cause.normal_low, cause.normal_high,
                     source_ns=cause.source_ns, part=cause.part, whole=cause.whole, phase=cause.phase,
                     usual=cause.usual)


def _of_column(
    model: PartModel, facts: PartFacts, c: int, source_ns: int, *, told: bool,
) -> list[tuple[float, PartCause]]:
    """Return (weight, cause) of one column: each kind above the limit; the largest where nothing else is told."""
    found: list[tuple[float, PartCause]] = []
    for k in range(facts.ratio.shape[0]):
        ratio, r = float(facts.ratio[k, c]), int(facts.where[k, c])
        if math.isnan(ratio) or (ratio < TELL_FROM and (told or ratio < 0.5)):
            continue
        center, half = float(model.center[r, c]), float(model.spread[r, c] * model.limit[k, c])
        seen = float(facts.features[r, c])
        low = center - half
        kind = model.stretches[r].kind
        weight = ratio * PLAIN[kind]
        if kind in ("swing", "noise"):
            low = max(low, 0.0)
            if kind == "swing" and ratio >= TELL_FROM and seen < STUCK_SWING * center:
                weight *= STUCK_FIRST
        phase = (math.nan, math.nan)
        if kind not in ("mean", "swing", "noise"):
            phase = _phase(model, facts, k, r, c)
        found.append((weight, PartCause(model.columns[c], kind, 0.0, seen, low, center + half, source_ns=source_ns,
                                        part=facts.number, whole=facts.whole, phase=phase, usual=center)))
    return found


def _phase(model: PartModel, facts: PartFacts, k: int, r: int, c: int) -> tuple[float, float]:
    """Return from where to where, around feature row r, the column is outside its corridor, in % of the cycle."""
    stretches = model.stretches
    kind = stretches[r].kind

    def outside(row: int) -> bool:
        if not 0 <= row < len(stretches) or stretches[row].kind != kind:
            return False
        away = abs(facts.features[row, c] - model.center[row, c])
        return bool(away >= model.spread[row, c] * model.limit[k, c])

    first = last = r
    while outside(first - 1):
        first -= 1
    while outside(last + 1):
        last += 1
    return stretches[first].start, stretches[last].stop


def part_sentence(cause: Cause, columns: Mapping[str, Tag], spans: Mapping[str, float]) -> str:
    """Return one sentence, at most 200 characters, for one cause; `columns` and `spans` by column name."""
    if not isinstance(cause, PartCause):
        return sentence(cause, columns, spans)
    text = _time_text(cause) if cause.kind in ("time", "speed") else _column_text(cause, columns, spans)
    return text if len(text) <= EXPLANATION_CHARS else text[: EXPLANATION_CHARS - 3] + "..."


def _time_text(cause: PartCause) -> str:
    if cause.kind == "speed":
        slow = "slower" if cause.observed < cause.usual else "faster"
        runs = "ran" if cause.whole else "runs"
        return f"part {cause.part} {runs} {slow} than any healthy one, at {cause.observed:.0f} % of the usual speed"
    took, low, high = _same_digits(cause.observed, cause.normal_low, cause.normal_high)
    normal = f"normal is {low} to {high} s"
    if not cause.whole:
        return f"part {cause.part} has not ended after {took} s; {normal}"
    if cause.observed < cause.usual:
        return f"part {cause.part} ended too soon, after {took} s; {normal}"
    return f"part {cause.part} took {took} s; {normal}"


def _same_digits(value: float, *others: float) -> tuple[str, ...]:
    """Return numbers of seconds with as many decimals as tell them apart, two at least below 100 s."""
    numbers = (value, *others)
    decimals = 0 if min(numbers) >= 100 else 2
    for more in range(_MORE_DECIMALS):
        texts = tuple(f"{x:.{decimals + more}f}" for x in numbers)
        if len(set(texts)) == len(set(numbers)):
            break
    return texts


def _column_text(cause: PartCause, columns: Mapping[str, Tag], spans: Mapping[str, float]) -> str:
    tag = columns.get(cause.tag)
    span = spans.get(cause.tag, math.nan)
    unit = f" {tag.unit}" if tag is not None and tag.unit else ""
    for more in range(_MORE_DECIMALS + 1):
        now, low, high = (number(x, tag, span, more=more)
                          for x in (cause.observed, cause.normal_low, cause.normal_high))
        if now not in (low, high):
            break
    name, part = cause.tag, f"part {cause.part}"
    normal = f"{low} to {high}{unit}"
    if cause.kind == "swing":
        if cause.observed < STUCK_SWING * cause.usual:
            return f"{name} is stuck: it did not move during {part}; it usually varies by {normal} (standard deviation)"
        return f"{name} varied by {now}{unit} (standard deviation) during {part}; normal is {normal}"
    if cause.kind == "noise":
        return f"{name} changed by {now}{unit} from row to row (root mean square) during {part}; normal is {normal}"
    if cause.kind == "mean":
        return f"{name} was {now}{unit} on average over {part}; normal is {normal}"
    start, stop = (round(x) for x in cause.phase)
    where = f"at {start} %" if start == stop else f"at {start} to {stop} %"
    left = f"{part} left its normal corridor {where} of the cycle: {name} was {now}{unit}"
    if cause.kind == "shape":
        return f"{left} off its own mean, normal there {normal}"
    return f"{left}, normal there {normal}"
