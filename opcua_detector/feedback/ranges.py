"""What counts as far: healthy ranges of columns, and residuals in engineering units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from ..api import Float64
from ..calibration import Calibration
from ..model import NormalityModel
from .deltas import TRANSITION, fitted_methods

IN_DEVIATIONS: Final[Mapping[str, Sequence[str]]] = {TRANSITION: ("affine",), "regression": ("forecast", "relation")}
"""Plugin -> kinds whose residuals are in healthy standard deviations of their column."""
MEDIAN_TO_SIGMA: Final = 1.4826  # of a normal error
FURTHER: Final = 1.15  # so much more than ever before is further
TREND: Final = 3  # a tag may go further than ever so often, then it is a trend


def healthy_range(model: NormalityModel) -> tuple[Float64, Float64]:
    """Return (low, high), float64[n_columns]: the values of the healthy record, in engineering units.

    As far as a method knows them; otherwise the 1 % and 99 % quantiles.
    """
    if "range" in model.adapted:
        return model.adapted["range"][0], model.adapted["range"][1]
    low, high = model.span[:, 0].copy(), model.span[:, 1].copy()
    at = {c.name: i for i, c in enumerate(model.plan.columns)}
    for m in fitted_methods(model):
        if not {"low", "high", "mean", "inverse"} <= set(m.arrays):
            continue
        for k, name in enumerate(m.columns):
            inverse = float(m.arrays["inverse"][k])
            least, most = float(m.arrays["low"][k]), float(m.arrays["high"][k])
            if m.plugin != TRANSITION:  # kept scaled
                if inverse == 0.0:
                    continue
                least, most = (float(m.arrays["mean"][k]) + x / inverse for x in (least, most))
            low[at[name]], high[at[name]] = min(low[at[name]], least), max(high[at[name]], most)
    return low, high


def channel_units(model: NormalityModel, plugins: Sequence[str]) -> Float64:
    """Return float64[n_channels]: engineering units per unit of residual, 0 where a residual has none.

    plugins : name of the plugin of each channel
    """
    units = np.zeros(len(model.calibration.channels))
    for c, (channel, plugin) in enumerate(zip(model.calibration.channels, plugins, strict=True)):
        if channel.kind not in IN_DEVIATIONS.get(plugin, ()):
            continue
        for m in model.methods:
            if m.plugin == plugin and channel.column in m.columns:
                inverse = float(m.arrays["inverse"][m.columns.index(channel.column)])
                units[c] = 1.0 / inverse if inverse > 0.0 else 0.0
    return units


def largest_healthy(calibration: Calibration) -> Float64:
    """Return float64[n_channels]: the largest residual of the healthy record, as far as the calibration tells."""
    c = calibration
    top = 4.0 * c.scale.max(axis=0)
    for channel, slot in enumerate(c.slot):
        if slot >= 0:
            top[channel] = max(float(c.grid[s, slot, c.used[s, slot] - 1]) for s in range(len(c.states)))
    return np.asarray(top)


def usual_residual(calibration: Calibration) -> Float64:
    """Return float64[n_channels]: the usual size of a healthy residual, as a standard deviation.

    Where the distribution is kept its median tells, so that the rare jumps that nobody can foresee do not count.
    """
    c = calibration
    usual = c.scale[0].copy()
    for channel, slot in enumerate(c.slot):
        n = int(c.used[0, slot]) if slot >= 0 else 0
        if n:
            below = int(np.searchsorted(c.level[0, slot, :n], math.log(2.0)))  # -ln p of the median
            usual[channel] = min(usual[channel], MEDIAN_TO_SIGMA * float(c.grid[0, slot, min(below, n - 1)]))
    return usual
