"""Allowances of a model: what operator feedback lets residuals be in situations that were declared normal.

They stand between the residuals of the methods and the score, in the stream and in the batch alike; a model without
feedback has none and pays nothing (`Allowances.of` gives None).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .api import Float64, Int64, Record, UInt8
from .calibration import Calibration
from .detectors.regression_signed import SignedRegression
from .errors import ModelFileError
from .kernels.allowance import GROUP, HEADER, allow_rows
from .kernels.score import ENERGY_CAP, LEAST, SQUARE, SURPRISE, SURPRISE_CAP, soft
from .model import NormalityModel

CALM: Final = (0.45, 0.75)  # parts of the limit, between which what is excused stands
REGRESSION: Final = "regression"
BALLS: Final = "balls"
"""Key of a delta with allowances: {"columns", "ages", "channels"}; its array `<id>/balls`: float64[E, 1 + K + 2 M]."""


def calm_residual(calibration: Calibration, part: float) -> Float64:
    """Return float64[n_states, n_channels]: the residual that an excused one counts as.

    It is the largest with which no view of the channel stands above this part of its limit, were it there in all its
    windows; at least the usual one. So what is excused does not alarm, but still ranks above what is healthy.
    """
    c = calibration
    calm = np.zeros_like(c.usual)
    for s in range(calm.shape[0]):
        energy = np.full(calm.shape[1], np.inf)
        at = 0
        for v, view in enumerate(c.views):
            weight = float(c.weight[s, at:at + len(view.terms)].sum())
            at += len(view.terms)
            if view.role == "lamp":
                continue
            if view.role == "fixed":
                most = part
            else:
                mean = (_hard(part * soft(float(c.limit[s, v]))) + float(c.offset[s, v])) / weight
                most = mean if not c.in_logs(view) else math.exp(mean) - LEAST if mean < 50.0 else math.inf
            for group in view.groups:
                energy[list(group)] = np.minimum(energy[list(group)], most)
        for channel in range(calm.shape[1]):
            wanted = max(float(energy[channel]), float(c.usual[s, channel]))
            calm[s, channel] = residual_of(calibration, s, channel, wanted)
    return calm


def _hard(x: float) -> float:
    """Return the value whose `soft` is x, x > 0."""
    return x if x > 30.0 else math.log(math.expm1(x))


def residual_of(calibration: Calibration, state: int, channel: int, energy: float) -> float:
    """Return the largest residual of a channel with at most this energy (the inverse of `kernels.score.transform`)."""
    c = calibration
    how = int(c.transform[channel])
    if how == SQUARE:
        return float(c.scale[state, channel]) * math.sqrt(energy) if energy < ENERGY_CAP else math.inf
    if how != SURPRISE:
        return energy if energy < ENERGY_CAP else math.inf
    if energy >= SURPRISE_CAP:
        return math.inf
    slot = int(c.slot[channel])
    n = int(c.used[state, slot])
    grid, level = c.grid[state, slot], c.level[state, slot]
    knee, slope = (float(x) for x in c.tail[state, slot])
    if math.isfinite(knee) and energy >= level[n]:
        return knee * math.exp((energy - float(level[n])) * slope)
    below = int(np.searchsorted(level[:n], energy, side="right"))
    if below == 0:
        return 0.0
    if below == n and energy >= level[n]:  # nothing larger was held out: all above is of the same surprise
        return math.inf
    return max(min(float(grid[below - 1]), knee), 0.0)


class Scale:
    """Columns in parts of their healthy span: z = (value - middle) / span, from the 1 % and 99 % quantiles."""

    def __init__(self, model: NormalityModel) -> None:
        low, high = model.span[:, 0], model.span[:, 1]
        self.middle: Float64 = 0.5 * (low + high)
        self.span: Float64 = high - low
        # A column that never moved has no situation: it tells nothing, whatever it does.
        self.inverse: Float64 = np.where(self.span > 0.0, 1.0 / np.where(self.span > 0.0, self.span, 1.0), 0.0)

    def rows(self, record: Record) -> Float64:
        """Return float64[n, n_columns]; NaN where not valid."""
        known = (record.valid != 0) & np.isfinite(record.values)
        with np.errstate(invalid="ignore", over="ignore"):
            return np.where(known, (record.values - self.middle) * self.inverse, np.nan)


class Allowances:
    """The allowances of one model; holds the memory of a stream.

    groups : (about, balls), about as under `BALLS`, balls float64[E, 1 + K + 2 M]: radius, centre, least and most of
        each residual with its direction
    """

    def __init__(self, model: NormalityModel, groups: Sequence[tuple[Mapping[str, Any], Float64]]) -> None:
        n_columns, n_channels = len(model.plan.columns), len(model.calibration.channels)
        self._calm = np.stack([calm_residual(model.calibration, part) for part in CALM], axis=2).ravel()
        scale = Scale(model)
        ages = [age for about, _ in groups for age in about["ages"]]
        length = max(ages, default=0) + 1
        most_keys = max((len(about["columns"]) for about, _ in groups), default=0)
        ints: list[NDArray[Any]] = [np.array([n_columns, n_channels, len(groups), length, most_keys])]
        floats: list[Float64] = [scale.middle, scale.inverse]
        at = 2 * n_columns
        for about, balls in groups:
            keys, own = len(about["columns"]), len(about["channels"])
            head = np.array([balls.shape[0], keys, own, at])
            assert len(head) == GROUP
            ints += [head, np.array(about["columns"]), np.array(about["ages"]), np.array(about["channels"])]
            floats.append(balls.ravel())
            at += balls.size
        self._ints = np.concatenate(ints).astype(np.int64)
        self._floats = np.ascontiguousarray(np.concatenate(floats), dtype=np.float64)
        self.n_balls = sum(len(balls) for _, balls in groups)
        self._memory = np.full(n_channels + most_keys + length * n_columns, np.nan)
        self._cursor = np.zeros(2, np.int64)
        self._gap, self._state = np.zeros(1, np.uint8), np.zeros(1, np.int64)
        self._signed = np.empty(n_channels)
        excused = {channel for about, _ in groups for channel in about["channels"]}
        self._directed = [(own, method) for own, method in directed_methods(model)
                          if not excused.isdisjoint(range(own.start, own.stop))]
        assert len(ints[0]) == HEADER

    @classmethod
    def of(cls, model: NormalityModel) -> Allowances | None:
        """Return the allowances of a model, None where it has none.

        Raises
        ------
        ModelFileError
            The model holds feedback of an earlier version, which kept no directions.
        """
        groups = [(delta[BALLS], model.adapted[f"{delta['id']}/{BALLS}"]) for delta in model.deltas if BALLS in delta]
        for about, balls in groups:
            if balls.shape[1] != 1 + len(about["columns"]) + 2 * len(about["channels"]):
                raise ModelFileError("the model holds operator feedback of an earlier version",
                                     where=f"monitor {model.monitor}", next_step="fit the monitor again")
        return cls(model, groups) if groups else None

    def reset(self) -> None:
        """Forget all rows (after a gap)."""
        self._cursor[1] = 0
        for _, method in self._directed:
            method.reset()

    def step(self, values: Float64, valid: UInt8, gap: bool, state: int, residual: Float64) -> None:
        """Take one row of columns, float64[n_columns]; lower `residual` float64[n_channels] in place."""
        self._gap[0], self._state[0] = gap, state
        self._signed[:] = residual
        for own, method in self._directed:
            method.update(values, valid)
            self._signed[own] = method.residual
        allow_rows(values, valid, self._gap, self._state, self._signed, residual, self._ints, self._floats, self._calm,
                   self._memory, self._cursor)

    def rows(self, columns: Record, state: Int64, residual: Float64, signed: Float64 | None = None) -> Float64:
        """Return float64[n, n_channels]: what `step` makes of a whole record of columns; the stream is not touched.

        signed : float64[n, n_channels]; the residuals with their direction, where they are known already
        """
        out = np.array(residual, dtype=np.float64, order="C")
        if signed is None:
            signed = out.copy()
            for own, method in self._directed:
                signed[:, own] = method.residuals(columns)
        allow_rows(
            np.require(columns.values, np.float64, ["C", "W"]).ravel(),
            np.require(columns.valid, np.uint8, ["C", "W"]).ravel(), np.require(columns.gap, np.uint8, ["C", "W"]),
            np.require(state, np.int64, ["C", "W"]), np.require(signed, np.float64, ["C", "W"]).ravel(), out.ravel(),
            self._ints, self._floats, self._calm, np.full_like(self._memory, np.nan), np.zeros_like(self._cursor))
        return out


def directed_methods(model: NormalityModel) -> list[tuple[slice, SignedRegression]]:
    """Return (its channels, method) of each method of a model whose residuals have a direction."""
    found: list[tuple[slice, SignedRegression]] = []
    channels, first = model.calibration.channels, 0
    for one in model.methods:
        if one.plugin == REGRESSION:
            method = SignedRegression(one, model.plan.columns)
            n = len(method.channels)
            first = next(at for at in range(first, len(channels)) if channels[at:at + n] == method.channels)
            found.append((slice(first, first + n), method))
            first += n
    return found
