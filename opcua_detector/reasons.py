"""Why a monitor's score is what it is: causes of all methods, in one order, with what would be had a tag followed.

Pure: works on copies of rows and on methods whose `explain` is pure, so it may run on another thread.

The guilty tag is found by the method that knows how tags follow each other, where there is one (`Follows`): a tag that
does not, disturbs the forecasts of many. Limits that a tag broke by itself (range, rate, stuck) count on top. Where the
tag that broke one is masked for that method, or was never learnt by it, the others are blamed only if they alarm
without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol, runtime_checkable

import numpy as np

from .absence import Absence
from .allowances import Allowances
from .api import Cause, Explanation, Float64, Int64, Method, Record, UInt8
from .explain import clarity, plain_name, rank, sentence
from .kernels.score import SCORE
from .model import NormalityModel
from .views import FIXED_KINDS

MOST_REPLACED: Final = 3  # tags of which it is told what would be had they followed
BROKEN: Final = {"stuck": 1.0, "rate": 0.5, "range": 0.5}  # share added for a limit that the tag broke by itself
OTHERS_WEIGHT: Final = 0.3  # of causes of methods that do not lead
BROKEN_WEIGHT: Final = 20.0  # of causes that speak of such a limit: nothing is plainer to an operator
# Power of the score without a tag that divides its share. Simulated faults, explanation at the alert and at the end:
# Lorenz 92 -> 94 of 96, throttle 72 -> 76 of 78, linear loop 156 -> 157 of 157; a power of 1 loses 3 of the latter, and
# to go by that score alone 25 of 96 on Lorenz.
TRUST: Final = 0.5
LEAST_WITHOUT: Final = 0.1  # such a score counts as this much at least
CALM_ROWS: Final = 300  # before an interval, to compare with


@runtime_checkable
class Follows(Protocol):
    """A method that can say what a column would be had it followed the others."""

    def reconstruct(self, values: Float64, valid: UInt8, column: str, gap: UInt8 | None = None) -> Float64:
        """Return float64[m], NaN where it cannot be said."""
        ...


@runtime_checkable
class Stands(Protocol):
    """A method that knows for how long a value stands still."""

    def stood_s(self, channel: int, residual: float) -> float:
        """Return seconds, by the number of a channel of kind `stuck` and its residual."""
        ...


@dataclass(frozen=True)
class Rows:
    """Rows of columns to explain, without a gap inside.

    values float64[m, n_columns]; valid uint8[m, n_columns]; source_ns int64[m]; state : index of the operating state
    """

    values: Float64
    valid: UInt8
    source_ns: Int64
    state: int = 0


class Reasons:
    """Explains the rows of one model.

    Parameters
    ----------
    model, methods : as the monitor has them
    """

    def __init__(self, model: NormalityModel, methods: Sequence[Method]) -> None:
        self.model, self.methods = model, tuple(methods)
        plan = model.plan
        self._columns = {c.name: c for c in plan.columns}
        self._owner = {c.name: plan.owner(c.name) for c in plan.columns}
        self._spans = {c.name: float(hi - lo) for c, (lo, hi) in zip(plan.columns, model.span, strict=True)}
        self._fixed = [any(c.kind in FIXED_KINDS for c in method.channels) for method in self.methods]

    def explain(
        self, rows: Rows, window: int, since: int, contribution: Float64, lead: frozenset[int], now: Float64,
        score: float, event_no: int,
    ) -> Explanation:
        """Return the explanation of the newest row.

        Parameters
        ----------
        window : rows that were averaged; since : rows back to the first ones that belong to the event, at least window
        contribution : float64[n_tags], as told with the verdict
        lead : indices of the methods that set the score
        now : float64[n_channels]; residuals of the newest row; score : of the newest row
        """
        m = len(rows.source_ns)
        window, since = min(window, m), min(since, m)
        broken = self._broken(rows, since, now)
        by_itself = {self._owner[column] for column, _ in broken}
        alone = any(not self._followed(tag, rows) for tag in by_itself)
        calm = alone and not self._learnt_score(rows) >= 1.0
        found: list[tuple[float, Cause]] = []
        guilt: dict[str, float] = {}
        for i, method in enumerate(self.methods):
            follows = isinstance(method, Follows)
            causes = method.explain(rows.values, rows.valid, rows.source_ns,
                                    since if follows or self._fixed[i] else window)
            for cause in causes:
                tag = self._owner.get(cause.tag, cause.tag)
                if calm and tag not in by_itself:
                    continue
                if follows and not calm:
                    guilt[tag] = guilt.get(tag, 0.0) + cause.share
                if cause.kind in FIXED_KINDS:
                    if (cause.tag, cause.kind) not in broken:
                        continue
                    cause = self._as_long_as(cause, i, now)
                    # A jump of a while ago says whom to blame; what is off now says more of what to do.
                    old = cause.kind == "rate" and cause.source_ns < int(rows.source_ns[-window])
                    found.append((OTHERS_WEIGHT if old else BROKEN_WEIGHT * BROKEN[cause.kind],
                                  replace(cause, share=1.0)))
                else:
                    found.append(((1.0 if i in lead else OTHERS_WEIGHT) * clarity(cause), cause))
        told = {tag.name: float(x) for tag, x in zip(self.model.tags, contribution, strict=True) if x > 0}
        following = {i for i, method in enumerate(self.methods) if isinstance(method, Follows)}
        if calm:
            told = {}
        shares = _added(guilt if guilt and (following & lead or not told or broken) else told,
                        {(self._owner[c], kind) for c, kind in broken})
        top = sorted(shares, key=lambda tag: -shares[tag])
        # What a tag is blamed for by itself would be left if another one followed.
        without = {} if alone else self._without(rows, top[:MOST_REPLACED], score)
        if guilt:
            shares = _weighed(shares, without)
            top = sorted(shares, key=lambda tag: -shares[tag])
        ranked = rank(found, top, self._owner)
        ranked = tuple(_with_score(cause, without.get(self._owner.get(cause.tag, cause.tag))) for cause in ranked)
        at_ns = int(rows.source_ns[-1]) if m else 0
        text = self.text(ranked[0], at_ns) if ranked else (
            f"something is wrong with {plain_name(top[0])}" if top else "no single cause stands out")
        return Explanation(event_no, at_ns, text, ranked, tuple((tag, shares[tag]) for tag in top),
                           tuple(without.items()))

    def _followed(self, tag: str, rows: Rows) -> bool:
        """Whether a method that knows how tags follow each other looks at a tag in the newest row."""
        for method in self.methods:
            if isinstance(method, Follows):
                known = method.model.columns if hasattr(method, "model") else tuple(self._columns)
                return any(self._owner[name] == tag and name in known and bool(rows.valid[-1, c])
                           for c, name in enumerate(self._columns))
        return True

    def _learnt_score(self, rows: Rows) -> float:
        """Return the score of the newest row without the limits that a tag breaks by itself."""
        return self._score(rows, fixed=False)

    def _as_long_as(self, cause: Cause, i: int, now: Float64) -> Cause:
        """Return a cause of method i, one of a value that stands still with its true duration.

        The rows at hand may begin when it stood already; the residual of the newest row knows.
        """
        method = self.methods[i]
        if cause.kind != "stuck" or not now.size or not isinstance(method, Stands):
            return cause
        first = sum(len(other.channels) for other in self.methods[:i])
        for k, channel in enumerate(method.channels):
            residual = float(now[first + k])
            if (channel.column, channel.kind) == (cause.tag, "stuck") and residual > 0.0:
                return replace(cause, step_s=max(cause.step_s, method.stood_s(k, residual)))
        return cause

    def text(self, cause: Cause, now_ns: int | None = None) -> str:
        """Return the sentence of one cause; `now_ns` tells how long ago it was worst."""
        age_s = (now_ns - cause.source_ns) / 1e9 if now_ns is not None and cause.source_ns else 0.0
        return sentence(cause, self._columns, self._spans, age_s)

    def shares(self, rows: Rows, window: int) -> dict[str, float]:
        """Return tag -> share over the last `window` rows, the largest first; they sum to 1, or there is none."""
        found: dict[str, float] = {}
        for method in self.methods:
            if isinstance(method, Follows):
                for cause in method.explain(rows.values, rows.valid, rows.source_ns, window):
                    tag = self._owner.get(cause.tag, cause.tag)
                    found[tag] = found.get(tag, 0.0) + cause.share
        residual = self._residual(rows)
        if not found:
            found = self._excess(self._without_absence(self._record(rows), residual), rows, window)
        peaks = self._peaks(residual[-window:])
        found = _added(found, {(self._owner[c], kind) for (c, kind), peak in peaks.items() if peak >= 1.0})
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def _excess(self, residual: Float64, rows: Rows, window: int) -> dict[str, float]:
        """Return tag -> part of the energy above the healthy one."""
        c, state = self.model.calibration, max(rows.state, 0)
        energy = c.scorer().energies(residual[-window:], np.full(len(residual[-window:]), state, np.int64))
        known = ~np.isnan(energy)
        mean = np.where(known, energy, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        excess = np.where(known.any(axis=0), np.maximum(mean - c.usual[state], 0.0), 0.0)
        found: dict[str, float] = {}
        for channel, x in zip(c.channels, excess, strict=True):
            if x > 0:
                tag = self._owner[channel.column]
                found[tag] = found.get(tag, 0.0) + float(x)
        total = sum(found.values())
        return {tag: x / total for tag, x in found.items()}

    def _record(self, rows: Rows) -> Record:
        gap = np.zeros(len(rows.source_ns), np.uint8)
        gap[:1] = 1
        return Record(tuple(self._columns.values()), self.model.period_ns, rows.source_ns, rows.values, rows.valid, gap)

    def _residual(self, rows: Rows) -> Float64:
        record = self._record(rows)
        return np.concatenate([method.residuals(record) for method in self.methods], axis=1)

    def _without_absence(self, record: Record, residual: Float64) -> Float64:
        absence = Absence.of(self.model.calibration, self.methods)
        return residual if absence is None else absence.rows(record, residual)

    def _broken(self, rows: Rows, since: int, now: Float64) -> set[tuple[str, str]]:
        """Return (column, kind) of the limits by itself that a column broke since the event began."""
        if not any(self._fixed) or not len(rows.source_ns):
            return set()
        record = self._record(rows)
        blocks = [method.residuals(record)[-since:] if fixed else np.full((1, len(method.channels)), np.nan)
                  for method, fixed in zip(self.methods, self._fixed, strict=True)]
        length = max(len(block) for block in blocks)
        seen = np.concatenate([np.vstack([np.full((length - len(b), b.shape[1]), np.nan), b]) for b in blocks], axis=1)
        # How long a value has stood is known to the stream alone, the rows may begin in the middle of it.
        peaks = self._peaks(np.vstack([seen, now[None]]) if now.size else seen)
        return {key for key, peak in peaks.items() if peak >= 1.0}

    def _peaks(self, residual: Float64) -> dict[tuple[str, str], float]:
        found = {}
        for k, channel in enumerate(self.model.calibration.channels):
            if channel.kind in FIXED_KINDS:
                x = residual[:, k][~np.isnan(residual[:, k])]
                found[channel.column, channel.kind] = float(x.max()) if x.size else 0.0
        return found

    def _without(self, rows: Rows, tags: Sequence[str], score: float) -> dict[str, float]:
        """Return tag -> score of the newest row had the tag followed the others; empty where that cannot be said.

        The rows at hand may be fewer than the longest window, so what they give is told only where they alone alarm
        already, in proportion to the score that stands.
        """
        method = next((one for one in self.methods if isinstance(one, Follows)), None)
        if method is None or not score >= 1.0 or rows.state < 0 or not tags:
            return {}
        observed = self._score(rows)
        if not observed >= 1.0:
            return {}
        out: dict[str, float] = {}
        known = set(next(m.model.columns for m in [method] if hasattr(m, "model")))
        for tag in tags:
            values, valid = rows.values.copy(), rows.valid.copy()
            replaced = False
            for c, name in enumerate(self._columns):
                if self._owner[name] == tag and name in known:
                    followed = method.reconstruct(rows.values, rows.valid, name)
                    at = np.isfinite(followed)
                    values[at, c] = followed[at]
                    replaced = replaced or bool(at.any())
            if replaced:
                would = self._score(Rows(values, valid, rows.source_ns, rows.state))
                if math.isfinite(would):
                    out[tag] = would * score / observed
        return out

    def _score(self, rows: Rows, *, fixed: bool = True) -> float:
        residual = self._residual(rows)
        if not fixed:
            residual[:, [c.kind in FIXED_KINDS for c in self.model.calibration.channels]] = np.nan
        state = np.full(len(residual), rows.state, np.int64)
        record = self._record(rows)
        allowances = Allowances.of(self.model)
        if allowances is not None:
            residual = allowances.rows(record, state, residual)
        residual = self._without_absence(record, residual)
        return float(self.model.calibration.score_rows(residual, record.gap, state)[-1, SCORE])


def _added(shares: Mapping[str, float], broken: set[tuple[str, str]]) -> dict[str, float]:
    """Return shares with those added that speak for a tag by itself; they sum to 1."""
    out = dict(shares)
    for tag in {tag for tag, _ in broken}:
        out[tag] = out.get(tag, 0.0) + max(BROKEN[kind] for other, kind in broken if other == tag)
    total = sum(out.values())
    return {tag: x / total for tag, x in out.items()} if total > 0 else {}


def _weighed(shares: Mapping[str, float], without: Mapping[str, float]) -> dict[str, float]:
    """Return shares with those larger whose tag alone explains the score; they sum to 1, the rest keep theirs."""
    total = sum(shares[tag] for tag in without)
    weight = {tag: shares[tag] / max(score, LEAST_WITHOUT) ** TRUST for tag, score in without.items()}
    every = sum(weight.values())
    return {tag: weight[tag] / every * total if tag in without and every > 0 else x for tag, x in shares.items()}


def _with_score(cause: Cause, without: float | None) -> Cause:
    return cause if without is None else replace(cause, without=without)
