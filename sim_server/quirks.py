"""What real servers do to clean samples: skew, holes, bad quality, silence; a pure function of the seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from sim_server.errors import QuirkError
from sim_server.processes import TagSpec

GOOD: Final = 0x0000_0000
UNCERTAIN: Final = 0x4093_0000
"""UncertainSensorNotAccurate, OPC UA Part 8 table of status codes."""
BAD: Final = 0x808C_0000
"""BadSensorFailure."""
OVERLOAD: Final = 0x002F_0000
"""GoodOverload: sampling has slowed down for lack of resources, OPC UA Part 4, clause 7.38.2."""
OVERFLOW_BITS: Final = 0x0000_0480
"""InfoType DataValue with the Overflow bit, OPC UA Part 4, clause 7.39."""

NO_STAMP: Final = -1
"""Stands for a null SourceTimestamp in `Samples.source_ns`."""

QUIRKS: Final = MappingProxyType(
    {
        "skew_ms": ("SourceTimestamp is this much late (negative: early), ms", -7_200_000.0, 7_200_000.0),
        "jitter_ms": ("SourceTimestamp is off by up to this much, evenly both ways, ms", 0.0, 10_000.0),
        "on_change": ("1: reported only when value or status changes", 0.0, 1.0),
        "rate_ms": ("reported once in so many ms", 0.0, 3_600_000.0),
        "null_source": ("1: no SourceTimestamp", 0.0, 1.0),
        "bad": ("probability of status BadSensorFailure", 0.0, 1.0),
        "uncertain": ("probability of status UncertainSensorNotAccurate", 0.0, 1.0),
        "nan": ("probability of the value NaN with Good status", 0.0, 1.0),
        "stuck": ("1: the value stays what it was", 0.0, 1.0),
        "drop": ("probability that a sample is never reported", 0.0, 1.0),
        "overflow": ("probability of the overflow info bits on a sample", 0.0, 1.0),
        "burst": ("samples are held back and reported so many at once", 0.0, 10_000.0),
        "swap": ("probability that a sample arrives after its successor", 0.0, 1.0),
        "duplicate": ("probability of a second sample of the same stamp, off by the last bit", 0.0, 1.0),
        "overload": ("probability of status GoodOverload", 0.0, 1.0),
        "inf": ("probability of the value infinity with Good status", 0.0, 1.0),
    }
)
"""Name -> (meaning, lowest value, highest value); 0 switches a quirk off."""

ALL_TAGS: Final = "*"
MEASURED_TAGS: Final = "measured"

_US: Final = 1000


class Sample(NamedTuple):
    """One value as a server reports it.

    Attributes
    ----------
    tag
        Index in the tag table.
    value
        In the tag's unit.
    status
        OPC UA StatusCode.
    source_ns
        SourceTimestamp, ns since the epoch (UTC), a multiple of 1000; None is null.
    arrival_ns
        Simulated time of the row with which it is reported, ns since the epoch.
    """

    tag: int
    value: float
    status: int
    source_ns: int | None
    arrival_ns: int


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples in the order of arrival, as columns.

    Attributes
    ----------
    tag
        int64[n], index in the tag table.
    source_ns
        int64[n], ns since the epoch; `NO_STAMP` where the SourceTimestamp is null.
    value
        float64[n], in the tag's unit.
    status
        uint32[n], OPC UA StatusCode.
    arrival_ns
        int64[n], simulated time of arrival, ns since the epoch; never decreases.
    """

    tag: npt.NDArray[np.int64]
    source_ns: npt.NDArray[np.int64]
    value: npt.NDArray[np.float64]
    status: npt.NDArray[np.uint32]
    arrival_ns: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.tag.size)


def uniform(seed: int, tag: int, quirk: int, row: int) -> float:
    """Return the number in [0, 1) that belongs to this seed, tag, quirk and row (splitmix64).

    A draw that depends on nothing else keeps each quirk reproducible whenever another one is set.
    """
    x = (seed * 0x9E3779B97F4A7C15 + tag * 0xBF58476D1CE4E5B9 + quirk * 0x94D049BB133111EB + row) & _MASK
    for _ in range(2):
        x = (x + 0x9E3779B97F4A7C15) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return (x >> 11) * 2.0**-53


_MASK: Final = (1 << 64) - 1
_NUMBER: Final = MappingProxyType({name: i for i, name in enumerate(QUIRKS)})


@dataclass(frozen=True, slots=True)
class QuirkRule:
    """One quirk of one tag on the rows ``start_row <= row < stop_row``; None is no bound."""

    quirk: str
    value: float
    start_row: int | None
    stop_row: int | None

    def holds(self, row: int) -> bool:
        """Whether the rule is in force at a row."""
        return (self.start_row is None or self.start_row <= row) and (
            self.stop_row is None or row < self.stop_row
        )


class _TagReporter:
    """The quirks of one tag: a state machine fed one sample a row."""

    def __init__(self, index: int, period_ns: int, seed: int) -> None:
        self.rules: list[QuirkRule] = []
        self.dropped = 0
        self._index = index
        self._period_ns = period_ns
        self._seed = seed
        self._row: int | None = None
        self._last: tuple[float, int] | None = None
        self._frozen: float | None = None
        self._previous = math.nan
        self._burst: list[Sample] = []
        self._swapped: Sample | None = None

    @property
    def idle(self) -> bool:
        """Whether each row will give exactly one clean sample."""
        return not self.rules and not self._burst and self._swapped is None

    def add(self, rule: QuirkRule) -> None:
        """Add a rule; it replaces earlier ones of the same quirk wherever both are in force."""
        begun = rule.start_row is None or (self._row is not None and rule.start_row <= self._row + 1)
        if begun and rule.stop_row is None:
            # whatever it hides can never be in force again; forgetting it keeps the list short
            self.rules = [one for one in self.rules if one.quirk != rule.quirk]
        self.rules.append(rule)

    def report(self, row: int, stamp_ns: int, value: float) -> Iterator[Sample]:
        """Yield what the server reports with this row: none, one or several samples."""
        active = {rule.quirk: rule.value for rule in self.rules if rule.holds(row)}
        sample = self._sample(active, row, stamp_ns, value)
        self._row, self._previous = row, value
        ready: list[Sample] = []
        if sample is not None:
            if self._swapped is None and self._hit(active, "swap", row):
                self._swapped = sample
            else:
                ready.append(sample)
                if self._hit(active, "duplicate", row):
                    # a second one that is quite the same is no change, and no server would report it
                    ready.append(sample._replace(value=math.nextafter(sample.value, math.inf)))
                if self._swapped is not None:
                    ready.append(self._swapped)
                    self._swapped = None
        burst = int(active.get("burst", 0.0))
        if self._burst or burst > 1:
            self._burst.extend(ready)
            ready = []
            if burst <= 1 or row % burst == burst - 1:
                ready, self._burst = self._burst, []
        for one in ready:
            yield one if one.arrival_ns == stamp_ns else one._replace(arrival_ns=stamp_ns)

    def pass_clean(self, values: npt.NDArray[np.float64], last_row: int) -> None:
        """Take note of rows that were reported without any rule, without making samples of them."""
        if values.size:
            self._row, self._previous, self._frozen = last_row, float(values[-1]), None
            self._last = (self._previous, GOOD)

    def _hit(self, active: dict[str, float], quirk: str, row: int) -> bool:
        probability = active.get(quirk, 0.0)
        return probability > 0.0 and uniform(self._seed, self._index, _NUMBER[quirk], row) < probability

    def _sample(self, active: dict[str, float], row: int, stamp_ns: int, value: float) -> Sample | None:
        rate_rows = round(active.get("rate_ms", 0.0) * 1e6 / self._period_ns)
        if rate_rows > 1 and row % rate_rows:
            return None
        if active.get("stuck", 0.0) > 0.0:
            if self._frozen is None:
                self._frozen = value if math.isnan(self._previous) else self._previous
            value = self._frozen
        else:
            self._frozen = None
        status = GOOD
        if self._hit(active, "nan", row):
            value = math.nan
        if self._hit(active, "inf", row):
            value = math.inf
        if self._hit(active, "bad", row):
            status = BAD
        elif self._hit(active, "uncertain", row):
            status = UNCERTAIN
        elif self._hit(active, "overload", row):
            status = OVERLOAD
        if self._hit(active, "overflow", row):
            status |= OVERFLOW_BITS
        if active.get("on_change", 0.0) > 0.0 and self._last == (value, status):
            return None
        self._last = (value, status)
        if self._hit(active, "drop", row):
            self.dropped += 1
            return None
        return Sample(self._index, value, status, self._source(active, row, stamp_ns), stamp_ns)

    def _source(self, active: dict[str, float], row: int, stamp_ns: int) -> int | None:
        if active.get("null_source", 0.0) > 0.0:
            return None
        offset_ms = active.get("skew_ms", 0.0)
        jitter_ms = active.get("jitter_ms", 0.0)
        if jitter_ms > 0.0:
            draw = uniform(self._seed, self._index, _NUMBER["jitter_ms"], row)
            offset_ms += jitter_ms * (2.0 * draw - 1.0)
        # whole microseconds: the server library keeps stamps as datetime
        return stamp_ns + round(offset_ms * 1e6 / _US) * _US


class Reporter:
    """Turns rows into the samples a server would report, with the quirks that are set.

    Parameters
    ----------
    tags
        The tag table; columns of every row, in order.
    period_ns
        Time between two rows, ns.
    seed
        Seed of every random quirk.

    Notes
    -----
    Without a quirk each row gives one Good sample a tag, stamped with the row's nominal time.
    """

    def __init__(self, tags: Sequence[TagSpec], period_ns: int, seed: int = 0) -> None:
        self.tags = tuple(tags)
        self.period_ns = period_ns
        self._tags = [_TagReporter(i, period_ns, seed) for i in range(len(self.tags))]

    @property
    def dropped(self) -> int:
        """Samples that the ``drop`` quirk has swallowed so far."""
        return sum(tag.dropped for tag in self._tags)

    def set_quirk(
        self, tag: str, quirk: str, value: float, start_row: int | None = None, stop_row: int | None = None
    ) -> None:
        """Set a quirk on the rows ``start_row <= row < stop_row``.

        Parameters
        ----------
        tag
            Name of a tag, ``measured`` for all measured tags, or ``*`` for all tags.
        quirk, value
            See `QUIRKS`; 0 switches it off.
        start_row, stop_row
            None is no bound.

        Raises
        ------
        QuirkError
            Unknown tag or quirk, a value outside its range, or NaN or infinity for a tag of whole numbers.
        """
        if quirk not in QUIRKS:
            raise QuirkError(f"quirk {quirk!r} is not known", "quirk", quirk, f"one of {', '.join(QUIRKS)}")
        _, low, high = QUIRKS[quirk]
        if not (math.isfinite(value) and low <= value <= high):
            raise QuirkError(f"quirk {quirk}: value {value}", "value", value, f"{low:g} .. {high:g}")
        rule = QuirkRule(quirk, float(value), start_row, stop_row)
        for i in self._indices(tag):
            if quirk in ("nan", "inf") and self.tags[i].kind == "state":
                if tag == ALL_TAGS:
                    continue
                raise QuirkError(
                    f"tag {tag} holds whole numbers and cannot be NaN or infinity", "tag", tag, "a Double tag"
                )
            self._tags[i].add(rule)

    def clear(self) -> None:
        """Remove every quirk; samples that are held back are reported with the next row."""
        for tag in self._tags:
            tag.rules.clear()

    def report(self, row: int, stamp_ns: int, values: npt.NDArray[np.float64]) -> list[Sample]:
        """Return the samples reported with one row, in the order of the tag table.

        Parameters
        ----------
        row
            Number of the row; may be negative for rows before the first live one.
        stamp_ns
            Nominal time of the row, ns since the epoch, a multiple of 1000.
        values
            float64[n_tags], in the tags' units.
        """
        found: list[Sample] = []
        for i, tag in enumerate(self._tags):
            found.extend(tag.report(row, stamp_ns, float(values[i])))
        return found

    def report_block(self, first_row: int, stamp_ns: int, values: npt.NDArray[np.float64]) -> Samples:
        """Return the samples of many rows as columns, equal to `report` called row by row.

        Parameters
        ----------
        first_row
            Number of the first row.
        stamp_ns
            Nominal time of the first row, ns since the epoch, a multiple of 1000.
        values
            float64[n, n_tags], in the tags' units.
        """
        n = values.shape[0]
        parts = [self._block_of_tag(i, first_row, stamp_ns, values[:, i]) for i in range(len(self._tags))]
        if n == 0 or not parts:
            empty = np.empty(0, np.int64)
            return Samples(empty, empty, np.empty(0), np.empty(0, np.uint32), empty)
        tag, source, value, status, arrival = (
            np.concatenate(columns) for columns in zip(*parts, strict=True)
        )
        # stable: within a row by tag, within a tag in the order of the state machine
        order = np.lexsort((tag, arrival))
        return Samples(tag[order], source[order], value[order], status[order], arrival[order])

    def _block_of_tag(
        self, index: int, first_row: int, stamp_ns: int, values: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.generic], ...]:
        tag, n = self._tags[index], values.size
        if tag.idle:
            stamps = stamp_ns + np.arange(n, dtype=np.int64) * self.period_ns
            tag.pass_clean(values, first_row + n - 1)
            return np.full(n, index), stamps, values, np.zeros(n, np.uint32), stamps
        found: list[Sample] = []
        for k, value in enumerate(values.tolist()):
            found.extend(tag.report(first_row + k, stamp_ns + k * self.period_ns, value))
        return (
            np.full(len(found), index),
            np.array([NO_STAMP if one.source_ns is None else one.source_ns for one in found], np.int64),
            np.array([one.value for one in found], np.float64),
            np.array([one.status for one in found], np.uint32),
            np.array([one.arrival_ns for one in found], np.int64),
        )

    def _indices(self, tag: str) -> list[int]:
        if tag == ALL_TAGS:
            return list(range(len(self.tags)))
        if tag == MEASURED_TAGS:
            return [i for i, one in enumerate(self.tags) if one.kind == "measured"]
        for i, one in enumerate(self.tags):
            if one.name == tag:
                return [i]
        names = ", ".join(one.name for one in self.tags)
        raise QuirkError(
            f"tag {tag!r} is not known", "tag", tag, f"{ALL_TAGS}, {MEASURED_TAGS} or one of {names}"
        )
