"""From tags to columns: which tags are usable, and what a method sees of each.

A counter becomes its difference per row, an angle its sine and cosine, everything else stays. Constants,
clocks, undeclared totalisers and duplicates are left out, each with a reason that is shown to the user.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .api import Float64, Int64, Record, Tag, TagKind, UInt8
from .errors import RecordError
from .kernels.columns import COSINE, DIFFERENCE, SAME, SINE, prepare, prepare_rows

_STEPPED_VALUES = 200  # as many values with few levels and rare steps are a setpoint
_MONOTONE_SHARE = 0.999  # of the steps that move, so many go up: a totaliser, also with a few roll-overs
_MIN_STEPS = 10  # all one way by chance: 1 in 1000
_CHUNK = 8192  # rows at a time
_ROOM = 1e-6  # below 1 of a correlation, and
_NO_SPREAD = 1e-6  # of a tag's spread: far above rounding


@dataclass(frozen=True)
class ColumnPlan:
    """How a row of tags becomes a row of columns.

    tags : names of the tags a row holds, in order
    columns : the columns, in order
    index : int64[n_columns]; tag of each column
    op : int64[n_columns]; operation of `kernels.columns`
    scale : float64[n_columns]; radians per unit for angles, else 1
    """

    tags: tuple[str, ...]
    columns: tuple[Tag, ...]
    index: Int64
    op: Int64
    scale: Float64

    def owner(self, column: str) -> str:
        """Return the tag that a column was made of."""
        at = [c.name for c in self.columns].index(column)
        return self.tags[int(self.index[at])]

    def prepare(self, record: Record) -> Record:
        """Return the record of columns for a record of these tags."""
        rows = record if tuple(t.name for t in record.tags) == self.tags else record.select(self.tags)
        out = np.empty((len(rows), len(self.columns)))
        out_valid = np.empty((len(rows), len(self.columns)), np.uint8)
        prepare_rows(rows.values, rows.valid, rows.gap, self.index, self.op, self.scale, out, out_valid)
        return replace(rows, tags=self.columns, values=out, valid=out_valid)

    def stepper(self) -> ColumnStepper:
        """Return the streaming form."""
        return ColumnStepper(self)


class ColumnStepper:
    """Streaming form of a `ColumnPlan`: the same kernel, one row at a time."""

    def __init__(self, plan: ColumnPlan) -> None:
        n = len(plan.columns)
        self._plan = plan
        self._last, self._last_valid = np.full(n, np.nan), np.zeros(n, np.uint8)

    def step(self, values: Float64, valid: UInt8, gap: bool, out: Float64, out_valid: UInt8) -> None:
        """Write one row of columns: float64[n_tags] -> float64[n_columns]."""
        plan = self._plan
        prepare(values, valid, plan.index, plan.op, plan.scale, gap, self._last, self._last_valid, out, out_valid)


def make_plan(tags: Sequence[Tag]) -> ColumnPlan:
    """Return the plan that uses every one of these tags."""
    columns: list[Tag] = []
    index, op, scale = [], [], []
    for i, tag in enumerate(tags):
        if tag.kind is TagKind.COUNTER:
            made = [(replace(tag, name=f"step of {tag.name}", unit=f"{tag.unit}/row".lstrip("/")), DIFFERENCE, 1.0)]
        elif tag.kind is TagKind.ANGLE:
            turn = 2 * math.pi / tag.turn
            made = [(replace(tag, name=f"sin({tag.name})", unit=""), SINE, turn),
                    (replace(tag, name=f"cos({tag.name})", unit=""), COSINE, turn)]
        else:
            made = [(tag, SAME, 1.0)]
        for column, operation, factor in made:
            columns.append(column)
            index.append(i)
            op.append(operation)
            scale.append(factor)
    return ColumnPlan(
        tuple(t.name for t in tags), tuple(columns), np.array(index, np.int64), np.array(op, np.int64),
        np.array(scale, np.float64),
    )


def usable_tags(record: Record) -> tuple[tuple[Tag, ...], dict[str, str]]:
    """Return the tags worth using and, for each other one, the reason why not.

    Raises
    ------
    RecordError
        A tag has no valid value at all, or no tag is left to judge.
    """
    used: list[int] = []
    reasons: dict[str, str] = {}
    alike = _alike(record)
    for i, tag in enumerate(record.tags):
        reason = _reason_against(record, i)
        if reason is None:
            reason = next((f"duplicate of {record.tags[j].name}" for j in used
                           if alike[i, j] and _same(record, i, j)), None)
        if reason is None:
            used.append(i)
        else:
            reasons[tag.name] = reason
    if not any(record.tags[i].judged for i in used):
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "only setpoints and states"
        raise RecordError("no tag is left to judge", where=listed,
                          next_step="add measured tags that move, or take a record in which they move")
    return tuple(record.tags[i] for i in used), reasons


def suggest_kind(data_type: str, writable: bool, values: Float64) -> tuple[str, str]:
    """Propose the kind of a tag from its data type, rights and some recent values.

    Returns (kind, reason against using it, empty if there is none).
    """
    known = values[np.isfinite(values)]
    if data_type in ("DateTime", "UtcTime"):
        return TagKind.MEASURED.value, "a clock"
    if len(known) >= 3 and float(known.max() - known.min()) <= 1e-12 * max(1.0, float(np.abs(known).max())):
        return TagKind.MEASURED.value, f"constant at {known[0]:g} in the values looked at"
    steps = np.diff(known)
    moving = steps[steps != 0]
    whole = data_type not in ("Float", "Double", "Boolean")
    up = float(np.mean(moving > 0)) if len(moving) else 0.0
    if (len(moving) >= 3 and up >= _MONOTONE_SHARE and len(moving) >= 0.5 * len(steps)) or (
            whole and len(moving) >= 2 and up == 1.0):  # counted now and then
        return TagKind.COUNTER.value, "only moves one way: a totaliser or clock; `kind: counter` judges its rate"
    few = len(np.unique(known)) <= 8 and len(known) >= 20
    if data_type == "Boolean" or (few and data_type not in ("Float", "Double")):
        return TagKind.STATE.value, ""
    stepped = few and len(known) >= _STEPPED_VALUES and len(moving) <= 0.02 * len(steps)
    if writable or stepped:
        return TagKind.SETPOINT.value, ""
    return TagKind.MEASURED.value, ""


def _reason_against(record: Record, i: int) -> str | None:
    tag = record.tags[i]
    ok = record.valid[:, i] != 0
    x = record.values[ok, i]
    if len(x) == 0:
        raise RecordError("the tag has no valid value in the whole record", where=f"tag {tag.name}",
                          next_step="check its node and its StatusCode with `opcua-detector check`, or remove the tag")
    span = float(x.max() - x.min())
    if span <= 1e-12 * max(1.0, float(np.abs(x).max())):
        return f"constant at {x[0]:g}" + (f" {tag.unit}" if tag.unit else "")
    if tag.kind is TagKind.STATE:
        return None
    both = ok[1:] & ok[:-1] & (record.gap[1:] == 0)
    steps = np.diff(record.values[:, i])[both]
    if tag.kind is TagKind.COUNTER:
        up = steps[steps >= 0]
        if len(up) and _regular(up, x):
            return "counts at a constant rate, like a clock"
        return None
    moving = steps[steps != 0]
    if tag.kind is TagKind.MEASURED and len(moving) >= _MIN_STEPS:
        up_share = float(np.mean(moving > 0))
        if max(up_share, 1 - up_share) >= _MONOTONE_SHARE:
            return ("a clock: it moves at a constant rate" if _regular(moving, x)
                    else "a totaliser: it only moves one way; declare `kind: counter` to judge its rate")
    return None


def _regular(steps: Float64, x: Float64) -> bool:
    """Whether all steps are equal, to the rounding of the values x that they lie between (seconds since 1970)."""
    rounding = 2 * float(np.spacing(np.abs(x).max()))
    return float(steps.std()) <= 1e-6 * abs(float(steps.mean())) + rounding


def _alike(record: Record) -> NDArray[np.bool_]:
    """Return bool[n_tags, n_tags]: pairs that may be duplicates; all others `_same` refuses for sure.

    Products of all columns at once replace a look at each pair (200 tags: 20 000). Where rounding could hide a
    duplicate (no spread is left on the rows that both have, or a value has no finite square), the pair stays.
    """
    ok = record.valid != 0
    n, n_tags = ok.shape
    mean, size = np.zeros(n_tags), np.ones(n_tags)
    for i in range(n_tags):
        x = record.values[ok[:, i], i]
        if len(x):
            with np.errstate(all="ignore"):
                mean[i] = x.mean()
                size[i] = np.abs(x - mean[i]).max()
    strange = ~(np.isfinite(mean) & np.isfinite(size) & (size > 0))
    mean[strange], size[strange] = 0.0, 1.0
    count, first, second, product = np.zeros((4, n_tags, n_tags))
    for k in range(0, n, _CHUNK):
        known = ok[k : k + _CHUNK] & ~strange
        x = np.where(known, record.values[k : k + _CHUNK], mean)
        x = (x - mean) / size
        product += x.T @ x
        mask = known.astype(np.float64)
        count += mask.T @ mask
        first += x.T @ mask
        second += (x * x).T @ mask
    rows = np.maximum(count, 1.0)
    spread = second / rows - (first / rows) ** 2
    together = product / rows - first * first.T / rows**2
    doubtful = (spread < _NO_SPREAD * np.diag(second / rows)[:, None]) | strange[:, None]
    close = np.abs(together) > (1.0 - _ROOM) * np.sqrt(np.maximum(spread * spread.T, 0.0))
    return close | doubtful | doubtful.T


def _same(record: Record, i: int, j: int) -> bool:
    """Whether two tags carry the same signal, also in another unit: |correlation| = 1 to rounding."""
    both = (record.valid[:, i] & record.valid[:, j]) != 0
    if both.sum() < 3:
        return False
    a, b = record.values[both, i], record.values[both, j]
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return norm > 0 and abs(float((a * b).sum())) / norm > 1 - 1e-10
