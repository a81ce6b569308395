"""Trains the forecaster: rows in, bytes of an ONNX graph out; the only module of the plugin that needs torch.

The graph, in float64 inside and float32 outside (so that a batch gives what single rows give):

    f = [last row - centre, steps between the rows before, the same of the inputs that are not judged now]
    prediction = last row + f S + tanh(f A + a) B + b
    residual = |newest row - prediction| / scale

S starts as a robust linear forecaster; everything is then trained together on log(1 + (e / c)^2), which goes on
improving the small errors and does not let rare jumps (a new setpoint that nobody can foresee) dominate. The
features are whitened for the training; at the export all of it is folded into two affine maps of the window.
"""

from __future__ import annotations

import importlib
import io
import math
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from opcua_detector.api import Float64, Int64, Record
from opcua_detector.detectors.onnx_format import PREDICTION, RESIDUAL, GraphContract
from opcua_detector.errors import PluginError, RecordError

if TYPE_CHECKING:
    from . import MlpParams

LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
HELD_OUT = 0.1  # share of the windows, the last ones, that only measure the healthy residual
MIN_WINDOWS = 500
LINEAR_WINDOWS = 30_000  # more do not change the linear start, but cost time
REWEIGHTINGS = 12
CAUCHY = 3.0  # c in units of the median error
EIGENVALUE_FLOOR = 1e-12


def train(record: Record, params: MlpParams, source: str = "") -> bytes:
    """Train a forecaster on healthy rows and return it as an ONNX file; `source` says in it where the rows are from.

    Raises
    ------
    PluginError
        torch or onnx is not installed.
    RecordError
        No judged column, or too few whole windows.
    """
    torch = _need("torch")
    _need("onnx")
    judged = np.array([tag.judged for tag in record.tags])
    if not judged.any():
        raise RecordError("no tag is judged", where=", ".join(tag.name for tag in record.tags),
                          next_step="give the monitor at least one tag of kind measured, counter or angle")
    ends = whole_windows(record, params.window + 1)
    if len(ends) < MIN_WINDOWS:
        raise RecordError(
            f"only {len(ends)} windows of {params.window + 1} valid rows without a gap; {MIN_WINDOWS} needed",
            where=f"{len(record)} rows", next_step="take a longer healthy record, or a smaller window")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        weights = _Training(torch, record, judged, ends, params).run()
        return _export(torch, record, judged, weights, params, source)
    finally:
        torch.set_num_threads(threads)


def whole_windows(record: Record, length: int) -> Int64:
    """Return int64[k]: last rows of the windows of `length` rows that are all valid and have no gap inside."""
    bad = np.concatenate([[0], np.cumsum(~(record.valid != 0).all(axis=1))])
    cuts = np.concatenate([[0], np.cumsum(record.gap != 0)])
    ends = np.arange(length - 1, len(record), dtype=np.int64)
    first = ends - length + 1
    whole = (bad[ends + 1] == bad[first]) & (cuts[ends + 1] == cuts[first + 1])
    return np.asarray(ends[whole])


def features(torch: Any, rows: Any, centre: Any, judged: Any) -> Any:
    """Return float64[batch, n_features] of float64[batch, window + 1, n_columns] (tensors).

    Steps of neighbours rather than values, since that is what differs between the rows of a slow plant.
    """
    past = rows[:, :-1]
    parts = [past[:, -1] - centre, (past[:, 1:] - past[:, :-1]).flatten(1)]
    if not judged.all():
        now = torch.from_numpy(np.flatnonzero(~judged))
        parts.append(rows[:, -1, now] - rows[:, -2, now])
    return torch.cat(parts, 1)


class _Training:
    """One training run; all tensors are float64."""

    def __init__(self, torch: Any, record: Record, judged: Any, ends: Int64, params: MlpParams) -> None:
        self.torch, self.params, self.judged = torch, params, judged
        self.generator = torch.Generator().manual_seed(params.seed)
        held = max(1, int(len(ends) * HELD_OUT))
        self.values = torch.from_numpy(np.ascontiguousarray(record.values, dtype=np.float32)).double()
        self.ends, self.held = torch.from_numpy(ends[:-held]), torch.from_numpy(ends[-held:])
        self.back = torch.arange(-params.window, 1)
        used = record.values[ends[:-held]]
        self.centre = torch.from_numpy(used.mean(axis=0))
        self.noise = torch.from_numpy(used.std(axis=0) * judged * params.noise)
        self.resolution = _resolution(record)[judged]

    def batch(self, ends: Any, noisy: bool = True) -> tuple[Any, Any]:
        """Return features and increments of the windows that end at these rows."""
        torch = self.torch
        rows = self.values[ends[:, None] + self.back]
        if noisy and self.params.noise:
            rows = rows + self.noise * torch.randn(rows.shape, generator=self.generator, dtype=torch.float64)
        return features(torch, rows, self.centre, self.judged), (rows[:, -1] - rows[:, -2])[:, self.judged]

    def draw(self, n: int) -> Any:
        """Return the ends of n windows, at random."""
        return self.ends[self.torch.randint(len(self.ends), (n,), generator=self.generator)]

    def run(self) -> dict[str, Any]:
        """Train; return the folded weights, scales and healthy quantiles as arrays."""
        torch, params = self.torch, self.params
        f, y = (t.numpy() for t in self.batch(self.draw(min(LINEAR_WINDOWS, 4 * len(self.ends)))))
        mean, whiten = _whitening(f)
        start, unit = _robust_linear((f - mean) @ whiten, y)
        unit = np.maximum(unit, 1e-3 * self.resolution)
        n_in, n_out = start.shape[0] - 1, start.shape[1]

        def normal(*shape: int, size: float) -> Any:
            return (torch.randn(shape, generator=self.generator, dtype=torch.float64) * size).requires_grad_()

        A, a = normal(n_in, params.hidden, size=0.6 / math.sqrt(n_in)), normal(params.hidden, size=0.6)
        B, b = normal(params.hidden, n_out, size=0.05 / math.sqrt(params.hidden)), normal(n_out, size=0.0)
        D = normal(n_in, n_out, size=0.0)
        mean_t, whiten_t, unit_t = (torch.from_numpy(x) for x in (mean, whiten, unit))
        start_t, start_b = torch.from_numpy(start[:-1]), torch.from_numpy(start[-1])
        optimiser = torch.optim.Adam([A, a, B, b, D], lr=params.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, params.steps, eta_min=params.rate * 1e-3)
        width = torch.full((n_out,), CAUCHY, dtype=torch.float64)
        for step in range(params.steps):
            f_t, y_t = self.batch(self.draw(params.batch))
            z = (f_t - mean_t) @ whiten_t
            error = (y_t - start_b - z @ start_t) / unit_t - (z @ D + torch.tanh(z @ A + a) @ B + b)
            loss = torch.log1p((error / width) ** 2).sum(1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if step % 50 == 0:
                with torch.no_grad():
                    width = 0.5 * width + 0.5 * CAUCHY * error.abs().median(0).values.clamp_min(1e-9)
        A, a, B, b, D = (t.detach().numpy() for t in (A, a, B, b, D))
        folded, folded_S = whiten @ A, whiten @ (start[:-1] + D * unit)
        weights = {
            "A": folded, "a": a - mean @ folded, "B": B * unit, "S": folded_S,
            "b": b * unit + start[-1] - mean @ folded_S, "centre": self.centre.numpy(),
        }
        return weights | self._healthy(weights)

    def _healthy(self, w: dict[str, Any]) -> dict[str, Any]:
        """Measure the healthy error on the held-out windows, as they are."""
        f, y = (t.numpy() for t in self.batch(self.held, noisy=False))
        error = np.abs(y - (f @ w["S"] + np.tanh(f @ w["A"] + w["a"]) @ w["B"] + w["b"]))
        scale = np.maximum(1.4826 * np.median(error, axis=0), self.resolution)
        return {"scale": scale, "quantiles": np.quantile(error / scale, LEVELS, axis=0).T}


def _resolution(record: Record) -> Float64:
    """Return float64[n_columns]: the smallest difference each column can show, in its unit.

    The last decimal where the tag says so, the smallest step that occurs, and never below float32.
    """
    out = np.empty(len(record.tags))
    for i, tag in enumerate(record.tags):
        x = record.values[record.valid[:, i] != 0, i]
        single = float(np.spacing(np.float32(np.abs(x).max())))
        steps = np.diff(np.unique(x))
        grid = float(steps.min()) if len(steps) else 0.0
        out[i] = max(single, grid, 0.0 if tag.decimals is None else 10.0 ** -tag.decimals)
    return out


def _whitening(f: Float64) -> tuple[Float64, Float64]:
    """Return (mean float64[n], matrix float64[n, n]) so that (f - mean) @ matrix has unit covariance."""
    mean, std = f.mean(axis=0), f.std(axis=0)
    constant = std <= 1e-9 * np.abs(f).max(axis=0)  # what never moved in training must not speak later
    inverse = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, std))
    values, vectors = np.linalg.eigh(np.cov((f - mean) * inverse, rowvar=False))
    values = np.maximum(values, EIGENVALUE_FLOOR * values.max())
    return mean, (inverse[:, None] * vectors) / np.sqrt(values)


def _robust_linear(z: Float64, y: Float64) -> tuple[Float64, Float64]:
    """Return (float64[n_features + 1, n_out], median error float64[n_out]) of a Cauchy regression.

    Notes
    -----
    Source: iteratively reweighted least squares, Holland and Welsch, Comm. Stat. A6 (1977), 813-827, section 2.
    One weight per row serves all outputs: a row with a jump in one of them tells little of the others.
    """
    z = np.hstack([z, np.ones((len(z), 1))])
    weight = np.ones(len(z))
    for _ in range(REWEIGHTINGS):
        root = np.sqrt(weight)[:, None]
        beta = np.linalg.lstsq(z * root, y * root, rcond=1e-13)[0]
        error = np.abs(y - z @ beta)
        unit = np.median(error, axis=0) + 1e-300
        weight = 1.0 / (1.0 + ((error / (CAUCHY * unit)) ** 2).mean(axis=1))
    return np.asarray(beta, np.float64), np.asarray(unit, np.float64)


def _export(
    torch: Any, record: Record, judged: Any, weights: dict[str, Any], params: MlpParams, source: str = "",
) -> bytes:
    """Return the bytes of the ONNX file with its metadata."""
    onnx = _need("onnx")
    graph = torch_graph(torch, fold(torch, weights, judged, params.window))
    buffer = io.BytesIO()
    example = torch.zeros(1, params.window + 1, len(record.tags))
    batch = {name: {0: "batch"} for name in ("rows", RESIDUAL, PREDICTION)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter announces its successor; parity with that is under test
        torch.onnx.export(graph, (example,), buffer, dynamo=False, opset_version=17, input_names=["rows"],
                          output_names=[RESIDUAL, PREDICTION], dynamic_axes=batch)
    model = onnx.load_from_string(buffer.getvalue())
    names = [tag.name for tag in record.tags]
    contract = GraphContract(
        kind="window", columns=tuple(names), judged=tuple(n for n, j in zip(names, judged, strict=True) if j),
        period_ns=record.period_ns, window=params.window + 1, residual="forecast",
        scale=tuple(float(x) for x in weights["scale"]), levels=LEVELS,
        quantiles=tuple(tuple(float(q) for q in row) for row in weights["quantiles"]),
        training={"plugin": "mlp", "source": source, "rows": len(record), "torch": str(torch.__version__),
                  **asdict(params)},
    )
    onnx.helper.set_model_props(model, contract.to_props())
    return bytes(model.SerializeToString())


def fold(torch: Any, weights: dict[str, Any], judged: Any, window: int) -> dict[str, Float64]:
    """Return the same forecaster as two affine maps of the flat window, which take the fewest kernels to run.

    hidden float64[n_flat, n_hidden], hidden_bias float64[n_hidden]: into the tanh;
    out float64[n_hidden + n_flat, 2 n_judged], out_bias: from (tanh, flat window) to (error in scales, prediction).
    """
    n = len(judged)
    unit_rows = torch.eye((window + 1) * n, dtype=torch.float64).reshape(-1, window + 1, n)
    steps = features(torch, unit_rows, torch.zeros(n, dtype=torch.float64), judged).numpy()
    last, now = (unit_rows[:, row].numpy()[:, judged] for row in (-2, -1))
    centre = weights["centre"]
    A, S = weights["A"], weights["S"]
    predict = np.vstack([weights["B"], last + steps @ S])
    bias = weights["b"] - centre @ S[:n]
    observe = np.vstack([np.zeros_like(weights["B"]), now])
    return {
        "hidden": steps @ A, "hidden_bias": weights["a"] - centre @ A[:n],
        "out": np.hstack([(observe - predict) / weights["scale"], predict]),
        "out_bias": np.concatenate([-bias / weights["scale"], bias]),
    }


def torch_graph(torch: Any, folded: dict[str, Float64]) -> Any:
    """Return the torch module that is exported: float32[batch, window + 1, n] -> (residual, prediction)."""

    class Forecaster(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, array in folded.items():
                self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array)))

        def forward(self, rows: Any) -> tuple[Any, Any]:
            flat = rows.double().flatten(1)
            hidden = torch.tanh(torch.addmm(self.hidden_bias, flat, self.hidden))
            both = torch.addmm(self.out_bias, torch.cat([hidden, flat], 1), self.out)
            error, prediction = both.split(self.out.shape[1] // 2, 1)
            return error.abs().float(), prediction.float()

    return Forecaster().eval()


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PluginError(
            f"training needs {module}, which is not installed", where="plugin mlp",
            next_step="pip install opcua-detector[train]; running a trained model does not need it") from error
