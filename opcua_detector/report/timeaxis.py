"""The time axis of the plots: UTC, long holes squeezed, and rows drawn as the lowest and highest of each stretch."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import numpy as np

from ..api import Float64, Int64, Record, UInt8

NS: Final = 1_000_000_000
SQUEEZE_FROM: Final = 0.05  # of the recorded time: a hole longer than this is drawn short
HOLES_SHARE: Final = 0.2  # of the recorded time: all squeezed holes together take at most so much of the axis
HOLE_SHARE: Final = 0.02  # and each of them at most so much
MOST_TICKS: Final = 9
TICK_DISTANCE: Final = 0.075  # of the axis: two labels never stand closer
STEPS_S: Final = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600,
    7200, 10800, 21600, 43200, 86400, 172800, 604800, 1209600, 2592000, 7776000, 31536000)


@dataclass(frozen=True)
class TimeAxis:
    """Maps SourceTimestamps to places on the axis: seconds since the first row, squeezed holes taken out.

    knots_ns : int64[m]; knots_x : float64[m], seconds; both increasing, linear in between
    holes : (place, length in seconds) of the holes that are drawn short; period_s : distance of two rows
    """

    knots_ns: Int64
    knots_x: Float64
    holes: tuple[tuple[float, float], ...]
    period_s: float

    @classmethod
    def of(cls, record: Record) -> TimeAxis:
        """Return the axis of a record of at least one row."""
        at, period = record.source_ns, record.period_ns
        recorded = max(len(at) * period, 1)
        cuts = np.flatnonzero(np.diff(at) > max(SQUEEZE_FROM * recorded, 2 * period))
        width = min(HOLE_SHARE, HOLES_SHARE / max(len(cuts), 1)) * recorded / NS
        knots, place, holes = [int(at[0])], [0.0], []
        for cut in cuts.tolist():
            end = int(at[cut]) + period
            place.append(place[-1] + (end - knots[-1]) / NS)
            holes.append((place[-1] + width / 2, (int(at[cut + 1]) - end) / NS))
            knots += [end, int(at[cut + 1])]
            place.append(place[-1] + width)
        end = int(at[-1]) + period
        place.append(place[-1] + (end - knots[-1]) / NS)
        knots.append(end)
        return cls(np.array(knots, np.int64), np.array(place), tuple(holes), period / NS)

    @property
    def length(self) -> float:
        """Length of the axis in seconds."""
        return float(self.knots_x[-1])

    def place(self, ns: Int64) -> Float64:
        """Return the places of SourceTimestamps, float64 of the same shape."""
        first = self.knots_ns[0]
        return np.interp((np.asarray(ns) - first) / NS, (self.knots_ns - first) / NS, self.knots_x)

    def borders(self, bins: int) -> Int64:
        """Return int64[m + 1], strictly increasing: SourceTimestamps that cut the axis into at most `bins` equal
        stretches, none shorter than a row."""
        first = self.knots_ns[0]
        bins = max(1, min(bins, round(self.length / self.period_s)))
        x = np.linspace(0.0, self.length, bins + 1)
        ns = first + np.round(np.interp(x, self.knots_x, (self.knots_ns - first).astype(np.float64))).astype(np.int64)
        return np.unique(ns)

    def ticks(self) -> tuple[Float64, list[str]]:
        """Return (places, labels) of the ticks: round times in UTC, the date where it is the first or changes."""
        span = self.length
        step = next((s for s in STEPS_S if span / s <= MOST_TICKS), STEPS_S[-1])
        wanted: list[int] = []
        for a, b in zip(self.knots_ns[::2].tolist(), self.knots_ns[1::2].tolist(), strict=True):
            step_ns = round(step * NS)
            inside = list(range(-(-a // step_ns) * step_ns, b + 1, step_ns))
            wanted += inside or [a]
        places: list[float] = []
        labels: list[str] = []
        day = ""
        for ns in wanted:
            x = float(self.place(np.array([ns]))[0])
            if places and x - places[-1] < TICK_DISTANCE * span:
                continue
            when = datetime.fromtimestamp(ns // NS, UTC)
            text, date = _clock(when, ns % NS, step), when.strftime("%Y-%m-%d")
            places.append(x)
            labels.append(f"{text}\n{date}" if date != day and text != date else text)
            day = date
        return np.array(places), labels


def _clock(when: datetime, rest_ns: int, step_s: float) -> str:
    if step_s >= 86400:
        return when.strftime("%Y-%m-%d")
    if step_s >= 60:
        return when.strftime("%H:%M")
    if step_s >= 1:
        return when.strftime("%H:%M:%S")
    return when.strftime("%H:%M:%S") + f".{rest_ns // 1_000_000:03d}"


@dataclass(frozen=True)
class Stretches:
    """The rows of a record, cut along a time axis.

    axis : the time axis; borders : int64[m + 1], SourceTimestamps; x : float64[m], middle of each stretch on the axis
    filled : int64[k], the stretches that hold rows; first : int64[k], first row of each of them; rows : number of rows
    breaks : int64; rows before which a line is broken, where rows are drawn one by one
    """

    axis: TimeAxis
    borders: Int64
    x: Float64
    filled: Int64
    first: Int64
    rows: int
    breaks: Int64
    row_x: Float64 | None

    @classmethod
    def of(cls, record: Record, axis: TimeAxis, bins: int) -> Stretches:
        """Cut a record into at most `bins` stretches of equal length on the axis."""
        borders = axis.borders(bins)
        at = np.searchsorted(record.source_ns, borders)
        at[-1] = len(record)
        filled = np.flatnonzero(np.diff(at) > 0)
        edges = axis.place(borders)
        few = len(record) <= 2 * bins
        return cls(axis, borders, (edges[1:] + edges[:-1]) / 2, filled, at[filled], len(record),
                   np.flatnonzero(record.gap[1:]) + 1, axis.place(record.source_ns) if few else None)

    def line(self, values: Float64, valid: UInt8 | None = None) -> tuple[Float64, Float64]:
        """Return (x, y) of a line through float64[n]: row by row where they are few, else lowest and highest of each
        stretch, so that no peak is lost; NaN breaks it."""
        y = np.asarray(values, np.float64)
        if valid is not None:
            y = np.where(valid != 0, y, np.nan)
        if self.row_x is not None:
            return np.insert(self.row_x, self.breaks, np.nan), np.insert(y, self.breaks, np.nan)
        low, high = np.fmin.reduceat(y, self.first), np.fmax.reduceat(y, self.first)
        both = np.full((len(self.x), 2), np.nan)
        # Every second stretch the other way round: the line then runs along the band instead of zigzagging.
        up = self.filled % 2 == 0
        both[self.filled, 0] = np.where(up, low, high)
        both[self.filled, 1] = np.where(up, high, low)
        return np.repeat(self.x, 2), both.ravel()

    def spans(self, flags: UInt8) -> list[tuple[float, float]]:
        """Return (x, width) of the runs of stretches in which any row of uint8[n] is set; none is invisible."""
        on = np.zeros(len(self.x), np.int8)
        on[self.filled] = np.maximum.reduceat(flags, self.first)
        edges = self.axis.place(self.borders)
        steps = np.diff(np.concatenate([[0], on, [0]]))
        starts, stops = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
        return [(float(edges[a]), float(edges[b] - edges[a])) for a, b in zip(starts, stops, strict=True)]

    def share(self, flags: UInt8) -> Float64:
        """Return float64[m]: share of the rows of each stretch that are set, NaN where it holds none."""
        out = np.full(len(self.x), np.nan)
        counts = np.diff(np.append(self.first, self.rows))
        out[self.filled] = np.add.reduceat(flags.astype(np.int64), self.first) / counts
        return out
