"""The method `transition`: quantised transitions, their bounds and shapes, learnt from healthy rows alone.

Source: M. Alamir, R. Dion, "Model-Free Unsupervised Anomaly detection framework in multivariate
time-series of industrial dynamical systems" (2024).

A sensor i is a judged column. Its transition at t is the pair of levels (q_t, q_{t+step}); each transition
has bounds on the extended vector w_t and a reduced set of its shapes. Row n judges the instant t = n - step.
Four channels per sensor:

    trans   1 where the transition was never seen (eq. 22)
    bound   mean excess of the components of w_t over their bounds, in widths (eq. 23, 24)
    conf    1 - largest correlation of w_t with the kept vectors (eq. 25)
    affine  distance of s_t from what the affine map of this transition predicts from the rest of w_t, in
            healthy standard deviations of the sensor (ours: section 3.4 of the design; not in `faithful`)

Masks: a sensor that is not valid at t or t + step gets NaN on all its channels; any other value that is not
valid is left out of bound and conf, and counts as its healthy mean in affine; these are NaN where fewer than half of
the components are left, and affine where its own past is not whole. So a Bad tag changes `trans` of no other sensor,
and the other channels of the others by its own components alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from opcua_detector.api import Cause, Channel, Float64, Int64, MethodModel, Record, Tag, UInt8
from opcua_detector.detectors.common import number, places, require, whole
from opcua_detector.detectors.transition_explain import explain_rows
from opcua_detector.detectors.transition_fit import configure, describe_columns, learn
from opcua_detector.errors import RecordError
from opcua_detector.kernels.transition import MEMORY_HEADER, forget, score_rows

KINDS: Final = ("trans", "bound", "conf")
"""The paper's residuals, in the order of the channels; `AFFINE` comes after them where the model has maps."""
AFFINE: Final = "affine"
_ONE_ROW: Final = 1


@dataclasses.dataclass(frozen=True)
class TransitionParams:
    """Parameters of the method `transition`.

    levels : int; levels of the quantiser (the paper's n_q); 0 = automatic: of 8 .. 60 those with the lowest
        held-out affine residual among those with few unseen transitions (`configure`; faithful: 20)
    step : int, rows; duration of a transition (the paper's Delta); verdicts trail by as many rows
    eta : float in 0..1; kept vectors of a transition are pairwise less correlated than this
    nu : float; exponent of the excess over a bound
    eps : float, scaled units; added to the width of every bound
    max_vectors : int; vectors kept per transition at most, the least covered first; 0 = no cap
    partners : int; other columns that a sensor sees; 0 = all up to 16 columns, else the 6 most correlated
    affine : bool; also predict each sensor by an affine map per transition
    affine_ridge : float, scaled units; how strongly those maps are drawn to the sensor's general one; 0 =
        automatic: of 1e-8 .. 1e2 the one with the lowest held-out residual
    faithful : bool; the paper's variants: raw values, remover by absolute correlation in order of time, no
        cap, all columns (unless `partners` says otherwise), no affine maps

    Notes
    -----
    The parameters of a fitted model hold what was chosen, so that TransitionParams(**model.params) repeats it.
    eta, nu, eps: section 2 of the design. step 10 and 20 tie on healthy rows of the two simulated
    processes (`tests/benchmarks/bench_transition.py --steps`: held-out unseen transitions .21 % / .16 % on
    lorenz, .08 % / .10 % on the throttle), so the shorter lag is the default.
    """

    levels: int = 0
    step: int = 10
    eta: float = 0.99
    nu: float = 1.0
    eps: float = 1e-2
    max_vectors: int = 32
    partners: int = 0
    affine: bool = True
    affine_ridge: float = 0.0
    faithful: bool = False

    def __post_init__(self) -> None:
        require("transition", self, (
            ("levels", whole(self.levels) and (self.levels == 0 or 2 <= self.levels <= 256),
             "a whole number of 2 .. 256, 0 = automatic"),
            ("step", whole(self.step) and 1 <= self.step <= 10_000, "a whole number of rows, 1 .. 10000"),
            ("eta", number(self.eta) and 0.0 < self.eta <= 1.0, "a number above 0, at most 1"),
            ("nu", number(self.nu) and 0.0 < self.nu <= 4.0, "a number above 0, at most 4"),
            ("eps", number(self.eps) and 0.0 < self.eps <= 1e6, "a number above 0 (scaled units)"),
            ("max_vectors", whole(self.max_vectors) and self.max_vectors >= 0, "a whole number, 0 = no cap"),
            ("partners", whole(self.partners) and self.partners >= 0, "a whole number, 0 = automatic"),
            ("affine", isinstance(self.affine, bool), "true or false"),
            ("affine_ridge", number(self.affine_ridge) and (self.affine_ridge == 0.0 or
                                                             1e-9 <= self.affine_ridge <= 1e9),
             "a number of 1e-9 .. 1e9, 0 = automatic"),
            ("faithful", isinstance(self.faithful, bool), "true or false"),
        ))


class TransitionPlugin:
    """Fits and opens the method `transition`."""

    name = "transition"
    Params = TransitionParams
    learns = True

    def fit(self, record: Record, params: TransitionParams) -> MethodModel:
        """Learn transitions, bounds, vectors and maps from healthy rows; choose what is automatic.

        Raises
        ------
        RecordError
            No judged tag, a tag without a valid value, or no stretch of rows that is long enough.

        Notes
        -----
        Arrays of the model (n_columns, n_sensors judged ones, n_rows transitions, n_e components):
        judged uint8[n_columns]; mean, inverse, tolerance, resolution, low, high float64[n_columns];
        edges float64[n_sensors, levels - 1], engineering units; partners int32[n_sensors, n_seen];
        table int32[n_sensors, levels**2] -> row or -1; lo, hi float64[n_rows, n_e], scaled;
        vectors float32[n_v, n_e], centred, unit norm; pointers int32[n_rows + 1] into them;
        cover float32[n_rows], largest distance (1 - correlation) of a training vector from the kept ones;
        instants int64[n_rows], how many there were. With affine, scaled units:
        maps float64[n_rows, n_e + 1], coefficients (0 for s_t itself) and constant; general
        float64[n_sensors, n_e + 1], the map for unseen transitions; spread float64[n_rows, 2], smallest and
        largest healthy error; limit float64[n_rows], how far an error may go in healthy operation; slack
        float64[n_rows], what feedback takes off the error (0); usual float64[n_sensors], held-out root mean
        square error (the largest 1 % clipped).
        """
        judged = np.array([tag.judged for tag in record.tags], dtype=np.uint8)
        if not judged.any():
            raise RecordError(
                "no tag is judged", where=", ".join(tag.name for tag in record.tags),
                next_step="give the monitor at least one tag of kind measured, counter or angle",
            )
        columns = describe_columns(record, params.eps, params.faithful)
        params = dataclasses.replace(params, **configure(record, params, judged, columns))
        arrays = learn(record, params, judged, columns)
        return MethodModel(
            plugin=self.name, columns=tuple(tag.name for tag in record.tags), period_ns=record.period_ns,
            params=dataclasses.asdict(params), arrays={"judged": judged, **columns._asdict(), **arrays},
        )

    def open(self, model: MethodModel, columns: Sequence[Tag]) -> TransitionMethod:
        """Make the method for rows of these columns (in any order, more than needed are passed over).

        Raises
        ------
        ModelTagsError
            A column that the model needs is missing.
        """
        return TransitionMethod(model, columns)


class TransitionMethod:
    """The method `transition`, opened on a model; see the module's docstring and `api.Method`."""

    name = TransitionPlugin.name

    def __init__(self, model: MethodModel, columns: Sequence[Tag]) -> None:
        at = places(self.name, model, columns)
        self.model = model
        self.params = TransitionParams(**model.params)
        self._cols = np.array([at[name] for name in model.columns], dtype=np.int32)
        self._width = len(columns)
        judged = [name for name, one in zip(model.columns, model.arrays["judged"], strict=True) if one]
        # by the arrays, not the parameters: a model of a version without maps stays what it was
        kinds = (*KINDS, AFFINE) if "maps" in model.arrays else KINDS
        self.channels = tuple(Channel(name, name, kind) for kind in kinds for name in judged)
        self.lag = self.params.step
        self.memory = 2 * self.params.step
        self.residual: Float64 = np.full(len(self.channels), np.nan)
        self._ints, self._floats, self._vectors = self._pack()
        self._memory, self._ring = self._fresh()
        self._no_gap = np.zeros(_ONE_ROW, np.uint8)

    def _pack(self) -> tuple[NDArray[np.int32], Float64, NDArray[np.float32]]:
        """Return the model as the kernel wants it: ints, floats, vectors (layout: `kernels.transition`)."""
        a = self.model.arrays
        n_sensors, n_seen = a["partners"].shape
        p = self.params
        affine = "maps" in a
        head = np.array([len(self._cols), n_sensors, n_seen, p.step, p.levels, a["lo"].shape[0], affine])
        own = np.flatnonzero(a["judged"])
        rows = np.hstack([a["lo"], a["hi"], a["maps"], a["slack"][:, None]] if affine else [a["lo"], a["hi"]])
        ints: list[NDArray[Any]] = [
            head, self._cols, own, a["partners"].ravel(), a["table"].ravel(), a["pointers"],
        ]
        floats: list[NDArray[Any]] = [
            np.array([p.nu]), a["mean"], a["inverse"], a["tolerance"], a["edges"].ravel(), rows.ravel(),
        ]
        if affine:
            floats.append(a["general"].ravel())
        return (
            np.concatenate(ints).astype(np.int32), np.concatenate(floats).astype(np.float64),
            np.require(a["vectors"].ravel(), np.float32, ["C", "W"]),
        )

    def _fresh(self) -> tuple[NDArray[np.int32], Float64]:
        """Return an empty memory and ring (layout: `kernels.transition`)."""
        n_columns, n_sensors, n_seen, step = (int(x) for x in self._ints[:4])
        n_e = n_seen + step - 1
        memory = np.zeros(MEMORY_HEADER + n_sensors * 2 * step + n_columns * 4 * step + n_e, np.int32)
        forget(self._ints, memory)
        return memory, np.zeros(n_columns * 4 * step + n_e)

    def update(self, values: Float64, valid: UInt8) -> None:
        """Take one row, float64[n_columns] and uint8[n_columns]; write `residual`."""
        score_rows(
            values, valid, self._no_gap, self._ints, self._floats, self._vectors, self._memory, self._ring,
            self.residual,
        )

    def reset(self) -> None:
        """Forget all rows (after a gap)."""
        forget(self._ints, self._memory)
        self.residual.fill(np.nan)

    def residuals(self, record: Record) -> Float64:
        """Return float64[n, n_channels]: what `update` gives row by row, bit for bit.

        The record has the columns the method was opened with; the stream's own memory is not touched.
        """
        return self._score(record.values, record.valid, record.gap)

    def _score(self, values: Float64, valid: UInt8, gap: UInt8) -> Float64:
        if values.shape[1] != self._width:
            raise RecordError(
                f"rows have {values.shape[1]} columns, the method was opened for {self._width}",
                where=self.name, next_step="select the monitor's columns first",
            )
        out = np.full((values.shape[0], len(self.channels)), np.nan)
        memory, ring = self._fresh()
        score_rows(
            np.require(values, np.float64, ["C", "W"]).ravel(),
            np.require(valid, np.uint8, ["C", "W"]).ravel(), np.require(gap, np.uint8, ["C", "W"]),
            self._ints, self._floats, self._vectors, memory, ring, out.ravel(),
        )
        return out

    def paper_residuals(self, record: Record, window: int) -> tuple[Float64, Float64, Float64]:
        """Return r_trans, r_bound, r_conf, each float64[n]: means over sensors and the last `window` rows.

        Entries that are NaN are left out; a row whose window holds none that is not, is NaN.

        Notes
        -----
        Source: eq. 22, 23, 24, 25.
        """
        n_sensors = int(self._ints[1])
        residuals = self.residuals(record)[:, : len(KINDS) * n_sensors]
        known = np.isfinite(residuals)
        total = np.where(known, residuals, 0.0).reshape(-1, len(KINDS), n_sensors).sum(axis=2)
        count = known.reshape(-1, len(KINDS), n_sensors).sum(axis=2)
        means = np.full(total.shape, np.nan)
        for kind in range(len(KINDS)):
            sums = _window_sums(total[:, kind], window)
            counts = _window_sums(count[:, kind].astype(np.float64), window)
            np.divide(sums, counts, out=means[:, kind], where=counts > 0.5)
        return means[:, 0], means[:, 1], means[:, 2]

    def explain(self, values: Float64, valid: UInt8, source_ns: Int64, window: int) -> list[Cause]:
        """Return ranked causes over the last `window` judged rows; pure (see `transition_explain`)."""
        gap = np.zeros(values.shape[0], np.uint8)
        gap[:1] = 1
        residuals = self._score(values, valid, gap)
        rows = np.ascontiguousarray(values[:, self._cols])
        mask = (valid[:, self._cols] != 0) & np.isfinite(rows)
        return explain_rows(self.model, rows, mask, np.asarray(source_ns), residuals, window)


def _window_sums(x: Float64, window: int) -> Float64:
    """Return float64[n]: trailing sums over at most `window` entries; windows are summed anew, not slid."""
    padded = np.concatenate([np.zeros(window - 1), x])
    return np.lib.stride_tricks.sliding_window_view(padded, window).sum(axis=1)


def paper_score(healthy: tuple[Float64, ...], tested: tuple[Float64, ...]) -> Float64:
    """Return float64[n]: the paper's aggregation, the maximum of the residuals over their healthy maxima.

    A residual whose healthy maximum is 0 has no scale and is left out: on its own training rows that is
    r_bound and r_trans.

    healthy, tested : r_trans, r_bound, r_conf, each float64[m] and float64[n] (`paper_residuals`)

    Notes
    -----
    Source: section 2 of the design, "max of normalised residuals"; for comparisons with the paper only.
    """
    tops = [float(np.nanmax(h, initial=0.0)) for h in healthy]
    scaled = [x / top for x, top in zip(tested, tops, strict=True) if top > 0.0]
    return np.max(scaled, axis=0) if scaled else np.zeros(tested[0].shape)
