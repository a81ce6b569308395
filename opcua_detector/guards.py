"""What stands between a monitor's rows and a false alarm: guards that mask tags, and pauses.

A tag whose resolution or scale is no longer as learnt is masked, with the reason: a model fitted on 9 decimals finds
every value strange that comes with 2, and a sensor set to another unit is no fault of the plant. Such a tag would hold
the alarm on for ever. The monitor goes on with the other tags and says what it left out; when the tag is as learnt
again the mask ends. What counts as changed:

    resolution  the last changes of the tag share a step more than 5 times that of the healthy record, coarse enough
                to matter beside the usual error of its forecasts
    scale       two blocks of rows in which mean, spread, step and extremes are those of healthy blocks times a known
                factor (a power of ten, or of one unit to another), and not as they are

A gain of up to 2, a bias, noise, drift or a value that stands still is none of these and stays a fault.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from .api import Float64, Int64, Record, Tag, TagKind, UInt8
from .errors import ModelTagsError
from .kernels.guards import (
    COARSE_MASK,
    DOUBLE,
    LONGEST,
    SCALE_MASK,
    SINGLE,
    STATE,
    TABLE,
    TOLD_STEP,
    begin,
    guard_row,
    guard_rows,
    least_step,
)

COARSER: Final = 5.0  # times the learnt step
MATTERS: Final = 0.5  # of the usual error of the sharpest forecast: a coarser step matters
FEW_DIGITS: Final = 6  # significant ones: values of so few come in steps that grow with them
LEAST_CHANGES: Final = 10  # that share a step
SAFE_RUNS: Final = 4  # times the longest healthy run of such changes
BLOCKS: Final = (100, 200, 500, 1000, 2000, 5000)  # rows; the shortest whose blocks are alike is used
MIN_BLOCKS: Final = 10
ALIKE: Final = 3.0  # greatest spread and step of healthy blocks over the least
# Units by what one can be taken for another; the learnt unit must be known where there is an offset.
_CELSIUS, _FAHRENHEIT, _KELVIN = 1, 2, 4
_UNITS: Final = {"°c": _CELSIUS, "degc": _CELSIUS, "c": _CELSIUS, "cel": _CELSIUS, "°f": _FAHRENHEIT,
                 "degf": _FAHRENHEIT, "f": _FAHRENHEIT, "k": _KELVIN}
_POWERS: Final = (10.0, 100.0, 1e3, 1e4, 1e5, 1e6)
_FACTORS: Final = (14.5038, 25.4, 57.29578, 60.0, 276.48, 327.67, 3600.0)
_SCALES: Final = (  # the likelier ones first: the first group that explains a block is told
    *((f, 0.0, 0, f"{f:g} times as large as learnt") for f in _POWERS),
    *((1 / f, 0.0, 0, f"{f:g} times as small as learnt") for f in _POWERS),
    *((f, 0.0, 0, f"{f:g} times as large as learnt") for f in _FACTORS),
    *((1 / f, 0.0, 0, f"{f:g} times as small as learnt") for f in _FACTORS),
    (1.8, 32.0, _CELSIUS, "in °F, learnt in °C"),
    (1 / 1.8, -32 / 1.8, _FAHRENHEIT, "in °C, learnt in °F"),
    (1.0, 273.15, _CELSIUS, "in K, learnt in °C"),
    (1.0, -273.15, _KELVIN, "in °C, learnt in K"),
)
_DECIMALS: Final = 15
MOST_TIMES: Final = 1000.0  # a step of more digits is told as it is


def learn_guards(record: Record, usual_error: Float64) -> dict[str, Any]:
    """Learn what the guards compare with; JSON-able, kept in the facts of the model.

    Parameters
    ----------
    record : healthy rows of the tags in use
    usual_error : float64[n_tags]; of the sharpest forecast of a tag, in its unit; 0 where there is none

    Returns
    -------
    dict
        tags: names of those watched; step: learnt resolution of each, in its unit; table: their rows of
        `kernels.guards`, -1 for infinity.
    """
    names, steps, table = [], [], []
    for i, tag in enumerate(record.tags):
        x = np.where(record.valid[:, i] != 0, record.values[:, i], np.nan)
        known = x[np.isfinite(x)]
        if not tag.judged or len(known) < 2 or not np.ptp(known) > 0:
            continue
        step = resolution(known)
        least = _least_that_matters(tag, known, float(usual_error[i]))
        row = np.zeros(TABLE)
        row[0], row[1] = max(COARSER * step, least), math.inf
        row[2:-1] = _blocks(tag, x, record.gap)
        digits = significant(known)
        row[-1] = COARSER * 10.0**(1 - digits) if digits <= FEW_DIGITS else 0.0
        longest, changes = _longest_run(x, record.gap, row), int(np.count_nonzero(np.diff(known)))
        row[1] = max(LEAST_CHANGES, SAFE_RUNS * longest)
        if longest > changes / 4:
            row[0] = math.inf
        names.append(tag.name)
        steps.append(step)
        table.append([float(v) if math.isfinite(v) else -1.0 for v in row])
    return {"tags": names, "step": steps, "table": table}


def resolution(x: Float64) -> float:
    """Return the step of the grid that float64[n] lies on: decimal, or whatever all changes have in common; the
    rounding of the values where there is none.
    """
    rounding = _rounding(x)
    decimal = 0.0
    for k in range(-3, _DECIMALS):
        scaled = x * 10.0**k
        if 10.0 * rounding * 10.0**k > 1.0:
            break
        if (np.abs(scaled - np.round(scaled)) <= 4.0 * rounding * 10.0**k).all():
            decimal = 10.0**-k
            break
    return max(float(least_step(np.ascontiguousarray(x))), decimal, rounding)


def significant(x: Float64) -> int:
    """Return how many significant digits the values of float64[n] have, `FEW_DIGITS` + 1 where they have more."""
    size = np.abs(x[x != 0])
    if len(size) == 0:
        return 1
    grid = 10.0**np.floor(np.log10(size))
    for digits in range(1, FEW_DIGITS + 1):
        scaled = size / grid * 10.0**(digits - 1)
        if (np.abs(scaled - np.round(scaled)) <= 1e-4).all():
            return digits
    return FEW_DIGITS + 1


def _rounding(x: Float64) -> float:
    single = bool((x.astype(np.float32).astype(np.float64) == x).all())
    return (SINGLE if single else DOUBLE) * float(np.abs(x).max())


def _least_that_matters(tag: Tag, x: Float64, usual_error: float) -> float:
    """Return the step below which a coarser resolution does not matter."""
    least = 1e3 * _rounding(x)
    if tag.kind is TagKind.ANGLE:
        return max(least, 1e-3 * tag.turn)
    if tag.kind is TagKind.COUNTER:
        return max(least, 0.1 * float(np.std(np.diff(x))))
    return max(least, MATTERS * usual_error)


def _longest_run(x: Float64, gap: UInt8, row: Float64) -> int:
    """Return how many healthy changes in a row shared a coarse step."""
    state = np.empty(STATE)
    begin(state)
    quiet = row.copy()
    quiet[2] = 0.0
    n = len(x)
    guard_rows(np.ascontiguousarray(x[:, None]), np.isfinite(x).astype(np.uint8)[:, None], gap,
               np.array([1, 0, 0, 0], np.int64), quiet, state, np.empty((n, 1), np.uint8), np.empty(n, np.uint8))
    return int(state[LONGEST])


def _blocks(tag: Tag, x: Float64, gap: UInt8) -> Float64:
    """Return float64[TABLE - 3]: length of a block and what healthy blocks look like; length 0 = not watched."""
    out = np.zeros(TABLE - 3)
    known = np.flatnonzero(np.isfinite(x))
    if tag.kind is not TagKind.MEASURED:
        return out
    y = x[known]
    starts = np.cumsum(gap)[known]
    moved = np.abs(np.diff(y, prepend=np.nan))
    moved[1:][np.diff(starts) != 0] = np.nan
    centre, low, high = float(np.median(y)), float(y.min()), float(y.max())
    for length in BLOCKS:
        count = len(y) // length
        if count < MIN_BLOCKS:
            break
        blocks = (y[:count * length] - centre).reshape(count, length)
        mean, spread = blocks.mean(axis=1), blocks.std(axis=1)
        step = np.nanmean(moved[:count * length].reshape(count, length), axis=1)
        if spread.max() <= ALIKE * spread.min() and step.max() <= ALIKE * step.min() and step.min() > 0:
            out[:] = (length, centre, low, high, mean.min() + centre, mean.max() + centre, spread.min(), spread.max(),
                      step.min(), step.max(), _UNITS.get(tag.unit.lower(), 0))
            break
    return out


class Guards:
    """Watches the tags of a monitor row by row.

    Parameters
    ----------
    facts : what `learn_guards` returned; empty: nothing is watched
    names : the tags of the rows that will come, in order

    Attributes
    ----------
    valid : uint8[n_tags]; the valid values of the last row less the masked tags
    masked_rows : rows on which a tag was masked, since the start
    """

    def __init__(self, facts: Mapping[str, Any], names: Sequence[str]) -> None:
        at = {name: i for i, name in enumerate(names)}
        self._learnt = {name: (float(step), k) for k, (name, step) in
                        enumerate(zip(facts.get("tags", ()), facts.get("step", ()), strict=True)) if name in at}
        self._names = [name for name in facts.get("tags", ()) if name in at]
        chosen = [self._learnt[name][1] for name in self._names]
        rows = np.array(facts.get("table", ()), np.float64).reshape(-1, TABLE)[chosen]
        rows[:, :2][rows[:, :2] < 0] = np.inf
        places = [at[name] for name in self._names]
        self._ints = np.array([len(rows), len(_SCALES), 2 * len(_POWERS), *places], np.int64)
        self._tables = np.concatenate([rows.ravel(), np.array([s[:3] for s in _SCALES], np.float64).ravel()])
        self._state = np.empty(len(rows) * STATE)
        self.valid: UInt8 = np.zeros(len(names), np.uint8)
        self.masked_rows = 0
        self.reasons: Mapping[str, str] = {}
        self._facts = dict(facts)
        begin(self._state)

    def same_as(self, other: Guards) -> bool:
        """Whether both compare with the same, so that one can go on for the other."""
        return self._facts == other._facts and len(self.valid) == len(other.valid)

    def restart(self) -> None:
        """Forget everything, masks too."""
        begin(self._state)
        self.reasons = {}

    def step(self, values: Float64, valid: UInt8, gap: bool) -> bool:
        """Take one row of float64[n_tags], write `valid`; return whether a tag was masked just now.

        What the methods remember of that tag is wrong from then on, so they are to start anew, as after a gap.
        """
        told = guard_row(values, valid, gap, self._ints, self._tables, self._state, self.valid)
        if told:
            self.reasons = self._tell()
        if self.reasons:
            self.masked_rows += 1
        return bool(told & 1)

    def _tell(self) -> dict[str, str]:
        """Return why each masked tag is masked."""
        found = {}
        for i, name in enumerate(self._names):
            state = self._state[i * STATE:(i + 1) * STATE]
            if state[SCALE_MASK]:
                found[name] = f"{name} is now {_SCALES[int(state[SCALE_MASK]) - 1][3]}: masked; fit again"
            elif state[COARSE_MASK]:
                now, learnt = float(state[TOLD_STEP]), self._learnt[name][0]
                found[name] = f"{name} now comes {_in_words(now, learnt)}: masked; fit again"
        return found

    def rows(self, record: Record) -> Record:
        """Return a record of these tags with what the guards mask masked, and a gap where a mask begins.

        As `step` row by row from a fresh start; the stream's own memory is not touched.
        """
        n = len(record)
        state = np.empty_like(self._state)
        begin(state)
        valid, told = np.empty_like(record.valid), np.empty(n, np.uint8)
        guard_rows(np.require(record.values, np.float64, ["C"]), np.require(record.valid, np.uint8, ["C"]),
                   record.gap, self._ints, self._tables, state, valid, told)
        return replace(record, valid=valid, gap=np.bitwise_or(record.gap, told & 1, dtype=np.uint8))


class Pauses:
    """What keeps a monitor from alarming although it goes on scoring: maintenance, an inhibit tag, settling.

    A tag inhibits while its value is Good and not 0. Fail-safe: one that is Bad, stale or missing does not inhibit, so
    that a broken wire cannot silence a monitor; `reason` says so.

    Parameters
    ----------
    names : the tags of the rows that will come, in order; inhibit, maintenance, state_tag : some of them
    settling_ns : time after each change of the state tag, SourceTimestamp clock

    Attributes
    ----------
    reason : why there is no alert at this row, empty where there may be one
    settling : the reason while settling
    warning : what is wrong with an inhibit or maintenance tag, empty where nothing is
    settled : this row is the first after settling, so what was seen while settling should not count any more
    """

    def __init__(
        self, names: Sequence[str], *, inhibit: Sequence[str] = (), maintenance: str = "", state_tag: str = "",
        settling_ns: int = 0,
    ) -> None:
        at = {name: i for i, name in enumerate(names)}
        missing = [name for name in (*inhibit, maintenance) if name and name not in at]
        if missing:
            raise ModelTagsError(f"{', '.join(missing)} is to keep alarms back, but is not among the tags",
                                 next_step="add the tag to the group")
        self._switches = [(at[maintenance], f"maintenance: {maintenance}",
                           f"{maintenance} is Bad: no maintenance")] if maintenance else []
        self._switches += [(at[name], f"inhibited by {name}", f"{name} is Bad: it does not inhibit")
                           for name in inhibit]
        self._state_at = at[state_tag] if state_tag and settling_ns > 0 else -1
        self._settling_ns = settling_ns
        self.settling = f"settling after a change of {state_tag}"
        self.reason = self.warning = ""
        self.settled = False
        self.restart()

    def restart(self) -> None:
        """Forget the state that was and any settling."""
        self._state, self._until_ns = math.nan, -1
        self.reason = self.warning = ""
        self.settled = False

    def step(self, values: Float64, valid: UInt8, source_ns: int) -> None:
        """Take one row of float64[n_tags]."""
        self.reason = self.warning = ""
        self.settled = False
        if self._state_at >= 0 and valid[self._state_at]:
            state = values[self._state_at]
            if state != self._state:
                if self._state == self._state:
                    self._until_ns = source_ns + self._settling_ns
                self._state = state
        if self._until_ns >= 0:
            if source_ns < self._until_ns:
                self.reason = self.settling
            else:
                self._until_ns = -1
                self.settled = True
        for at, reason, warning in self._switches:
            if not valid[at]:
                self.warning = warning
            elif values[at] != 0:
                self.reason = reason
                break


def settling_rows(values: Float64, valid: UInt8, source_ns: Int64, settling_ns: int) -> UInt8:
    """Return uint8[n], 1 while a state tag's change is settling, as `Pauses` sees it row by row.

    values float64[n], valid uint8[n]: the state tag; source_ns int64[n]
    """
    pauses = Pauses(["state"], state_tag="state", settling_ns=settling_ns)
    out = np.zeros(len(values), np.uint8)
    for t in range(len(values)):
        pauses.step(values[t:t + 1], valid[t:t + 1], int(source_ns[t]))
        out[t] = bool(pauses.reason)
    return out


def _in_words(now: float, learnt: float) -> str:
    """Return "with 2 decimals, learnt with 9", or the steps where they are not decimal."""
    ours, theirs = decimals(now), decimals(learnt)
    if ours is not None and theirs is not None:
        return f"with {ours} decimals, learnt with {theirs}"
    told = f"with {ours} decimals" if ours is not None else f"in steps of {now:.3g}"
    return f"{told}, learnt " + (f"with {theirs}" if theirs is not None else f"in steps of {learnt:.3g}")


def decimals(step: float) -> int | None:
    """Return how many decimals values of this step have; None where it is no decimal one."""
    if step < 10.0**-_DECIMALS:
        return _DECIMALS
    for k in range(_DECIMALS + 1):
        times = step * 10.0**k
        if 0.5 <= times <= MOST_TIMES and abs(times - round(times)) <= 1e-4:
            return k
    return None
