"""The corridor of healthy parts: what cuts the stream, what a part is compared with, and how a model file keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ..api import Float64, Int64, MethodModel
from ..columns import ColumnPlan, make_plan
from ..errors import ModelFileError, ModelTagsError
from ..kernels.parts import CHANGE, FALLING, RISING
from ..model import NormalityModel

PLUGIN = "parts"
KINDS = ("run", "bin", "phase", "shape", "mean", "swing", "noise")
RUN, BIN, PHASE, SHAPE, MEAN, SWING, NOISE = range(len(KINDS))
MODES = {"change": CHANGE, "rising": RISING, "falling": FALLING}
SCORE_CAP = 99.0


@dataclass(frozen=True)
class Cycle:
    """What cuts the stream into parts.

    tag : the trigger
    on : what of it begins a part: any change of value (a counter), or rising or falling over 0.5 (a signal)
    until : a part lasts until the `next` begins, or until the trigger goes `back`: what lies between is no part
    shortest_ns, longest_ns : no part takes less or more, whatever the healthy record holds; 0 for none
    """

    tag: str
    on: Literal["change", "rising", "falling"] = "change"
    until: Literal["next", "back"] = "next"
    shortest_ns: int = 0
    longest_ns: int = 0


@dataclass(frozen=True, slots=True)
class Stretch:
    """Where a feature lies: its kind, and the part of the cycle it stands for, in %."""

    kind: str
    start: float
    stop: float


@dataclass(frozen=True)
class PartModel:
    """The corridor of healthy parts, as `parts.fit` makes it and a model file keeps it.

    columns : names of the judged columns; period_ns : distance of rows; tolerance : rows without a valid trigger
        that are bridged
    width : rows of a bin of absolute time; n_run, n_bins, n_phases : numbers of feature rows of these kinds
    center, spread : float64[r, c]; healthy median and spread of each feature row (run, bin, phase, shape, then one
        row each of mean, swing, noise); NaN is not judged
    limit : float64[k, c]; spreads that count as 1.0, by kind
    rows : float64[3]; shortest, usual and longest number of rows of a part
    """

    cycle: Cycle
    columns: tuple[str, ...]
    period_ns: int
    tolerance: int
    width: float
    n_run: int
    n_bins: int
    n_phases: int
    center: Float64
    spread: Float64
    limit: Float64
    rows: Float64

    @property
    def kind(self) -> Int64:
        """Kind of each feature row, int64[r]."""
        return feature_kinds(self.n_run, self.n_bins, self.n_phases)

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """Where each feature row lies in a part, one of each."""
        usual = self.rows[1]
        found = [Stretch(KINDS[RUN], 100 * k * self.width / usual, 100 * (k + 1) * self.width / usual)
                 for k in range(self.n_run)]
        found += [Stretch(KINDS[BIN], 100 * k / self.n_bins, 100 * (k + 1) / self.n_bins) for k in range(self.n_bins)]
        for kind in (PHASE, SHAPE):
            found += [Stretch(KINDS[kind], 100 * k / self.n_phases, 100 * (k + 1) / self.n_phases)
                      for k in range(self.n_phases)]
        return (*found, *(Stretch(KINDS[kind], 0.0, 100.0) for kind in (MEAN, SWING, NOISE)))

    @property
    def capacity(self) -> int:
        """Rows of a part that are kept; a longer one has an alert anyway."""
        return math.ceil(self.rows[2]) + 1

    def late(self, rows: int) -> float:
        """Return how far a number of rows is from the usual one; 1.0 is the shortest or the longest."""
        low, usual, high = self.rows
        away = (rows - usual) / (high - usual) if rows >= usual else (usual - rows) / (usual - low)
        return min(float(away), SCORE_CAP)

    def to_method(self) -> MethodModel:
        """Return what a model file keeps."""
        c = self.cycle
        params = {"tag": c.tag, "on": c.on, "until": c.until, "shortest_ns": c.shortest_ns,
                  "longest_ns": c.longest_ns, "tolerance": self.tolerance, "width": self.width, "n_run": self.n_run,
                  "n_bins": self.n_bins, "n_phases": self.n_phases}
        arrays = {"center": self.center, "spread": self.spread, "limit": self.limit, "rows": self.rows}
        return MethodModel(PLUGIN, self.columns, self.period_ns, params, arrays)

    @classmethod
    def from_method(cls, model: MethodModel) -> PartModel:
        """Return the corridor of a model file.

        Raises
        ------
        ModelFileError
            The model is not of this kind.
        """
        if model.plugin != PLUGIN:
            raise ModelFileError(f"the model was made by {model.plugin}, not by parts", next_step="fit again")
        try:
            p: Mapping[str, Any] = model.params
            cycle = Cycle(p["tag"], p["on"], p["until"], p["shortest_ns"], p["longest_ns"])
            arrays = {name: np.ascontiguousarray(model.arrays[name], np.float64)
                      for name in ("center", "spread", "limit", "rows")}
            return cls(cycle, model.columns, model.period_ns, p["tolerance"], p["width"], p["n_run"], p["n_bins"],
                       p["n_phases"], **arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFileError(f"the model describes no parts: {error!r}", next_step="fit again") from error


def is_part_model(model: NormalityModel) -> bool:
    """Whether a model judges parts."""
    return bool(model.methods) and model.methods[0].plugin == PLUGIN


def feature_kinds(n_run: int, n_bins: int, n_phases: int) -> Int64:
    """Return the kind of each feature row, int64[r]."""
    return np.repeat(np.arange(len(KINDS)), [n_run, n_bins, n_phases, n_phases, 1, 1, 1]).astype(np.int64)


def judged_plan(model: NormalityModel, names: Sequence[str]) -> tuple[ColumnPlan, Int64]:
    """Return the plan of the judged columns of a part model, and for each column its tag among `names`, int64[c].

    Raises
    ------
    ModelTagsError
        The plan does not give the columns that the model was fitted on.
    """
    trigger = model.methods[0].params["tag"]
    judged = [tag for tag in model.tags if tag.name != trigger]
    plan = make_plan(judged)
    if tuple(c.name for c in plan.columns) != model.methods[0].columns:
        raise ModelTagsError("the columns are not those of the fit", where=f"monitor {model.monitor}",
                             next_step="fit the monitor again")
    at = np.array([names.index(plan.tags[i]) for i in plan.index], np.int64)
    return plan, at
