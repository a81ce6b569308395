"""What stands between a monitor's rows and a false alarm: guards that mask tags, and pauses.

A tag whose resolution or scale is no longer as learnt is masked, with the reason: a model fitted on 9 decimals finds
every value strange that comes with 2, and a sensor set to another unit is no fault of the plant. Such a tag would hold
the alarm on for ever. The monitor goes on with the other tags and says what it left out; when the tag is as learnt
again the mask ends. What counts as changed:

    resolution  the last changes of the tag share a step more than 5 times that of the healthy record, coarse enough
                to matter beside the usual error of its forecasts
    scale       two blocks of rows in which mean, spread, step and extremes are those of healthy blocks times a known
                factor (a power of ten, or of one unit to another), and not as they are

A gain of up to 2, a bias, noise or drift is none of these and stays a fault.

A tag that stands still longer than ever learnt is a fault as well, and the method `checks` tells it. From then on it is
masked for the other methods: what it says is no longer what its partners follow, so they would be blamed for it, and a
fault of another tag would be lost beside it. The alert stands (the checks go on counting, see `kernels.checks`), and
the mask ends with the first value that is another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from .api import Float64, Frame, Int64, Record, Tag, TagKind, UInt8
from .errors import ModelTagsError
from .kernels.guards import (
    CHANGED,
    COARSE_MASK,
    DOUBLE,
    LAST,
    LONGEST,
    RUN,
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
               np.array([1, 0, 0, 0, 0], np.int64), quiet, state, np.empty((n, 1), np.uint8), np.empty(n, np.uint8))
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
    changed : tag -> why it is masked: its resolution or scale is not as learnt
    standing : tag -> why it is masked for all methods but the checks: it stands still
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
        still = facts.get("still", {})
        self._longest = {name: (int(after), int(longest)) for name, after, longest in
                         zip(still.get("tags", ()), still.get("after", ()), still.get("longest", ()), strict=True)}
        self._period_s = float(still.get("period_s", 1.0))
        masked_from = [self._longest.get(name, (0, 0))[0] for name in self._names]
        self._ints = np.array([len(rows), len(_SCALES), 2 * len(_POWERS), *places, *masked_from], np.int64)
        self._tables = np.concatenate([rows.ravel(), np.array([s[:3] for s in _SCALES], np.float64).ravel()])
        self._state = np.empty(len(rows) * STATE)
        self.valid: UInt8 = np.zeros(len(names), np.uint8)
        self.masked_rows = 0
        self.changed: Mapping[str, str] = {}
        self.standing: Mapping[str, str] = {}
        self._older = 0  # rows until the words of `standing` are made anew
        self._facts = dict(facts)
        begin(self._state)

    @property
    def reasons(self) -> Mapping[str, str]:
        """Tag -> why it is masked."""
        return {**self.changed, **self.standing} if self.standing else self.changed

    def same_as(self, other: Guards) -> bool:
        """Whether both compare with the same, so that this one can be given up and the other go on in its place.

        Not while a tag stands still: how long, the methods beside these guards must have seen as well.
        """
        alike = self._facts == other._facts and len(self.valid) == len(other.valid)
        return alike and not self.standing and not other.standing

    def restart(self) -> None:
        """Forget everything, masks too."""
        begin(self._state)
        self.changed, self.standing = {}, {}

    def step(self, values: Float64, valid: UInt8, gap: bool) -> bool:
        """Take one row of float64[n_tags], write `valid`; return whether the methods are to start anew, as after a gap.

        They are where the mask of a tag of another resolution or scale begins: what they remember of it is wrong. A
        tag that begins to stand still is no reason: its past was as it was, and the alert on it must not fall.
        """
        told = guard_row(values, valid, gap, self._ints, self._tables, self._state, self.valid)
        if told:
            self._tell()
        elif self.standing:
            self._older -= 1
            if self._older <= 0:
                self._tell()
        if self.changed or self.standing:
            self.masked_rows += 1
        return bool(told & CHANGED)

    def _tell(self) -> None:
        """Say why each masked tag is masked."""
        changed, standing, soonest = {}, {}, 10**9
        for i, name in enumerate(self._names):
            state = self._state[i * STATE:(i + 1) * STATE]
            after, longest = self._longest.get(name, (0, 0))
            if state[SCALE_MASK]:
                changed[name] = f"{name} is now {_SCALES[int(state[SCALE_MASK]) - 1][3]}: masked; fit again"
            elif state[COARSE_MASK]:
                now, learnt = float(state[TOLD_STEP]), self._learnt[name][0]
                changed[name] = f"{name} now comes {_in_words(now, learnt)}: masked; fit again"
            elif after > 0 and state[RUN] >= after:
                value = _value(float(state[LAST]), self._learnt[name][0])
                learnt_s = lasted(longest * self._period_s) if longest else "no two rows"
                standing[name] = (f"{name} masked: stands still at {value} for {lasted(state[RUN] * self._period_s)}, "
                                  f"longest learnt {learnt_s}")
                soonest = min(soonest, int(state[RUN]))
        self.changed, self.standing = changed, standing
        # Often enough to be true, seldom enough not to be written to the server at every row.
        self._older = max(1, round(1.0 / self._period_s), soonest // 10)

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
        return replace(record, valid=valid, gap=np.bitwise_or(record.gap, told & CHANGED, dtype=np.uint8))


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


_CODES: Final = {  # StatusCodes of values, Part 4, 7.39.2 and Part 8, 6.3.2
    0x80000000: "Bad", 0x80010000: "BadUnexpectedError", 0x80020000: "BadInternalError", 0x80030000: "BadOutOfMemory",
    0x80050000: "BadCommunicationError", 0x800A0000: "BadTimeout", 0x800D0000: "BadServerNotConnected",
    0x801F0000: "BadUserAccessDenied", 0x80310000: "BadNoCommunication", 0x80320000: "BadWaitingForInitialData",
    0x80330000: "BadNodeIdInvalid", 0x80340000: "BadNodeIdUnknown", 0x803A0000: "BadNotReadable",
    0x803C0000: "BadOutOfRange", 0x803D0000: "BadNotSupported", 0x803E0000: "BadNotFound",
    0x80740000: "BadTypeMismatch", 0x80890000: "BadConfigurationError", 0x808A0000: "BadNotConnected",
    0x808B0000: "BadDeviceFailure", 0x808C0000: "BadSensorFailure", 0x808D0000: "BadOutOfService",
    0x808E0000: "BadDeadbandFilterInvalid", 0x809B0000: "BadNoData", 0x809E0000: "BadDataUnavailable",
    0x80AE0000: "BadConnectionClosed", 0x80AF0000: "BadInvalidState",
    0x408F0000: "UncertainNoCommunicationLastUsableValue", 0x40900000: "UncertainLastUsableValue",
    0x40910000: "UncertainSubstituteValue", 0x40920000: "UncertainInitialValue",
    0x40930000: "UncertainSensorNotAccurate", 0x40940000: "UncertainEngineeringUnitsExceeded",
    0x40950000: "UncertainSubNormal",
}
_MISSING: Final = {  # what the rule of time says of a tag (`frames`)
    0x80310000: "missing, no sample in time: BadNoCommunication",
    0x80320000: "missing, no sample yet: BadWaitingForInitialData",
}
_CODE_PART: Final = 0xFFFF0000  # of a StatusCode: the rest are flags and limit bits


def why_not_valid(status: int, value: float) -> str:
    """Return why a value is not used: "missing", or its StatusCode by name; empty where nothing is known.

    status : uint32, OPC UA StatusCode; value : NaN where there is none
    """
    code = status & _CODE_PART
    if code:
        return _MISSING.get(code) or _CODES.get(code) or f"StatusCode 0x{status & 0xFFFFFFFF:08X}"
    return "missing" if not math.isfinite(value) else ""


def masked_words(tags: Sequence[Tag], places: Int64, frame: Frame) -> str:
    """Return "masked: a, b (BadSensorFailure), c (missing)" for the tags of a row that are not valid; empty for none.

    places : int64[n_tags]; where each tag stands in the frame
    """
    text = ""
    for tag, i in zip(tags, places, strict=True):
        if not frame.valid[i]:
            why = why_not_valid(int(frame.status[i]), float(frame.values[i]))
            text += f"{', ' if text else 'masked: '}{tag.name}{f' ({why})' if why else ''}"
    return text


def lasted(seconds: float) -> str:
    """Format how long something stood: "0.2 s", "45 s", "3 min", "2.5 h"."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _value(x: float, step: float) -> str:
    """Format a value with the decimals of its learnt step, six significant digits where that has no or many."""
    shown = decimals(step)
    return f"{x:.{shown}f}" if shown is not None and shown <= FEW_DIGITS else f"{x:.6g}"


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
