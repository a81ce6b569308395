"""Plugin `onnx`: runs a graph that was trained elsewhere, one row at a time, in a few microseconds.

The graph says of itself what it needs (`onnx_format`). The whole score is in the graph (scaling, model, residual);
the runtime keeps the window or the states, and it keeps out what the graph cannot judge: **a NaN that reaches a graph
may come out as a healthy number**, so no row with a masked or not finite value is ever shown to one.

Masks
    A window graph is silent (NaN) while a masked value lies in its window, and speaks again `window` rows later. In
    the newest row a *forecast* graph only compares: a judged column masked there silences its own residual alone.
    A step graph forgets its states at a masked value and warms up again (`memory` rows).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..api import Cause, Channel, Float64, Int64, MethodModel, Record, Tag, UInt8
from ..errors import ModelFileError, ModelTagsError, RecordError
from .onnx_explain import Judged, causes
from .onnx_format import PREDICTION, RESIDUAL, GraphContract
from .onnx_graph import check_hash, load, read_graph, rows_shape

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]

_LARGEST = float(np.finfo(np.float32).max)
_BATCH = 8192  # windows in one run of the graph: bounds the memory of a long record
_PERIOD_TOLERANCE = 1e-3


@dataclass(frozen=True)
class OnnxParams:
    """Parameters of `onnx`, with their defaults.

    model : file of the graph, or bundled:lorenz, bundled:throttle for those that ship with the plugin `mlp`
    sha256 : what the file must hash to (hexadecimal); empty: not checked
    stride : rows from one run of a window graph to the next; in between the last residual holds
    """

    model: str = ""
    sha256: str = ""
    stride: int = 1

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f"stride is {self.stride}; expected at least 1")


class OnnxPlugin:
    """Checks a graph against the tags and opens it; it learns nothing."""

    name = "onnx"
    Params = OnnxParams
    learns = False

    def fit(self, record: Record, params: OnnxParams) -> MethodModel:
        """Check that the graph runs and suits these columns and this period.

        Raises
        ------
        ModelFileError
            The file is missing, truncated, altered, or does not say what it needs.
        ModelTagsError
            The graph was trained for other columns or another period.
        """
        where = params.model
        model = graph_model(read_graph(where, params.sha256), where, {"stride": params.stride})
        method = self.open(model, record.tags)
        require_period(method.contract, record.period_ns, where)
        return model

    def open(self, model: MethodModel, columns: Sequence[Tag]) -> WindowMethod | StepMethod:
        """Make the method for rows of these columns, in any order; more than needed are passed over.

        Raises
        ------
        ModelFileError
            The graph in the model is not the one that was stored, or does not run.
        ModelTagsError
            A column that the graph needs is missing, or none that it judges is judged here.
        """
        array = model.arrays.get("onnx")
        where = str(model.params.get("source", "model"))
        if array is None:
            raise ModelFileError("the model holds no graph (array `onnx`)", where=where,
                                 next_step="fit the monitor again")
        content = np.asarray(array, np.uint8).tobytes()
        check_hash(content, str(model.params.get("sha256", "")), where)
        session, contract = load(content, where)
        kind = StepMethod if contract.kind == "step" else WindowMethod
        return kind(session, contract, columns, int(model.params.get("stride", 1)), where)


def graph_model(content: bytes, where: str, params: Mapping[str, Any]) -> MethodModel:
    """Return a graph as a model that the plugin `onnx` opens; trainers use it.

    Raises
    ------
    ModelFileError
        The graph does not run or does not say what it needs.
    """
    _, contract = load(content, where)
    header = {
        "source": where, "sha256": hashlib.sha256(content).hexdigest(), "kind": contract.kind,
        "window": contract.window, "memory": contract.memory, "judged": list(contract.judged),
        "training": dict(contract.training), "stride": 1,
    } | dict(params)
    return MethodModel(plugin=OnnxPlugin.name, columns=contract.columns, period_ns=contract.period_ns, params=header,
                       arrays={"onnx": np.frombuffer(content, np.uint8).copy()})


def require_period(contract: GraphContract, period_ns: int, where: str) -> None:
    """Raise ModelTagsError where rows come at another period than the graph was trained for."""
    if abs(period_ns - contract.period_ns) > _PERIOD_TOLERANCE * contract.period_ns:
        raise ModelTagsError(
            f"the graph was trained for a row each {contract.period_ns / 1e6:g} ms, these come each "
            f"{period_ns / 1e6:g} ms", where=where,
            next_step=f"set the group's period to {contract.period_ns / 1e6:g} ms, or train the graph for this one")


class OnnxMethod:
    """What window and step graphs share: columns, channels, the gate.

    Buffers are bound once; `update` copies into them and runs. `residuals` and `explain` use buffers of their own and
    may run on another thread (onnxruntime sessions allow that).
    """

    name = OnnxPlugin.name

    def __init__(self, session: ort.InferenceSession, contract: GraphContract, columns: Sequence[Tag], stride: int,
                 where: str) -> None:
        at = {tag.name: i for i, tag in enumerate(columns)}
        if missing := [name for name in contract.columns if name not in at]:
            raise ModelTagsError(f"the graph needs {', '.join(missing)}, not among {', '.join(at) or 'no column'}",
                                 where=where, next_step="give the monitor these tags, or train a graph for its own")
        judged_here = [k for k, name in enumerate(contract.judged) if columns[at[name]].judged]
        if not judged_here:
            raise ModelTagsError(f"none of {', '.join(contract.judged)}, which the graph judges, is judged here",
                                 where=where, next_step="set the kind of one of them to measured")
        if contract.kind == "step" and stride != 1:
            raise ModelTagsError(f"a step graph takes every row; stride is {stride}", where=where,
                                 next_step="remove `stride`")
        self.contract, self._session, self._stride, self._where = contract, session, stride, where
        self.channels = tuple(Channel(contract.judged[k], contract.judged[k], contract.residual) for k in judged_here)
        self.lag = 0
        self.failures = 0  # runs that onnxruntime refused; the row then has no residual
        self.residual: Float64 = np.full(len(self.channels), np.nan)
        self._n_columns = len(columns)
        self._cols = np.array([at[name] for name in contract.columns], np.intp)
        self._outs = np.array(judged_here, np.intp)
        self._own = np.array([contract.columns.index(contract.judged[k]) for k in judged_here], np.intp)
        # Columns whose newest value enters the residual of every judged column.
        own_only = set(contract.judged) if contract.residual == "forecast" else set()
        self._shared = np.array([name not in own_only for name in contract.columns])
        rows = next(i for i in session.get_inputs() if i.name not in contract.states)
        self._rows_name, self._rows_shape = rows.name, rows_shape(rows, contract)
        self._batch = 1 if rows.shape[0] == 1 else _BATCH
        self._row = np.zeros(len(self._cols))
        self._absolute = np.zeros(len(self._cols))
        self._ok = np.zeros(len(self._cols), np.bool_)
        self._mask = np.zeros(len(self._cols), np.uint8)
        self._out = np.zeros((1, len(contract.judged)), np.float32)

    def _take(self, values: Float64, valid: UInt8) -> None:
        """Fill `_row` and `_ok` with the graph's columns of one row; what is not ok is 0 there."""
        values.take(self._cols, out=self._row, mode="clip")
        valid.take(self._cols, out=self._mask, mode="clip")
        np.abs(self._row, out=self._absolute)
        np.less_equal(self._absolute, _LARGEST, out=self._ok)  # False for NaN as well
        np.logical_and(self._ok, self._mask, out=self._ok)

    def _gate(self, values: Float64, valid: UInt8) -> tuple[Float32, Bool]:
        """Return (float32[n, n_in] with 0 where not ok, bool[n, n_in]) of the graph's columns of rows."""
        if values.ndim != 2 or values.shape[1] != self._n_columns:
            raise RecordError(f"rows have shape {values.shape}, the method was opened for {self._n_columns} columns",
                              where=self._where, next_step="select the monitor's columns first")
        x = values[:, self._cols]
        with np.errstate(invalid="ignore"):
            ok = (np.abs(x) <= _LARGEST) & (valid[:, self._cols] != 0)
        return np.where(ok, x, 0.0).astype(np.float32), ok

    def residuals(self, record: Record) -> Float64:
        """Return float64[n, n_channels]: what `update` gives row by row; the stream's memory is not touched.

        Raises
        ------
        ModelFileError
            The graph fails on these rows (in the stream such a row has no residual, and `failures` counts it).
        """
        return self._judge(record.values, record.valid, record.gap, [RESIDUAL])[0]

    def explain(self, values: Float64, valid: UInt8, source_ns: Int64, window: int) -> list[Cause]:
        """Return ranked causes over the last `window` judged rows; pure (see `onnx_explain`)."""
        gap = np.zeros(len(values), np.uint8)
        has_prediction = any(node.name == PREDICTION for node in self._session.get_outputs())
        names = [RESIDUAL, PREDICTION] if has_prediction else [RESIDUAL]
        found = self._judge(values, valid, gap, names)
        prediction = found[1] if has_prediction else np.full_like(found[0], np.nan)
        judged = []
        for j, (channel, out) in enumerate(zip(self.channels, self._outs, strict=True)):
            observed = values[:, self._cols[self._own[j]]]
            judged.append(Judged(channel, observed, found[0][:, j], prediction[:, j],
                                 self.contract.scale[out] if self.contract.scale else float("nan"),
                                 self.contract.levels, self.contract.quantiles[out] if self.contract.quantiles else ()))
        return causes(judged, np.asarray(source_ns), window)

    def _call(self, names: list[str], feed: dict[str, Float32]) -> list[Float32]:
        try:
            return list(self._session.run(names, feed))
        except Exception as error:  # onnxruntime has a type of its own for each way to fail
            raise ModelFileError(f"the graph fails on these rows: {error}", where=self._where,
                                 next_step="try the exported graph with onnxruntime where it was made") from error

    def _judge(self, values: Float64, valid: UInt8, gap: UInt8, names: list[str]) -> list[Float64]:
        raise NotImplementedError


class WindowMethod(OnnxMethod):
    """A graph over the last `window` rows."""

    def __init__(self, session: ort.InferenceSession, contract: GraphContract, columns: Sequence[Tag], stride: int,
                 where: str) -> None:
        super().__init__(session, contract, columns, stride, where)
        length, n_in = contract.window, len(contract.columns)
        self.memory = length - 1
        # The window shifts in place, so that the address onnxruntime was given stays.
        self._window = np.zeros(self._rows_shape, np.float32)
        self._rows = self._window.reshape(length, n_in)
        flat = self._window.reshape(-1)
        self._later, self._earlier, self._newest = flat[n_in:], flat[:-n_in], self._rows[-1]
        self._binding, self._input = session.io_binding(), ort.OrtValue.ortvalue_from_numpy(self._window)
        self._binding.bind_ortvalue_input(self._rows_name, self._input)
        self._binding.bind_output(RESIDUAL, "cpu", 0, np.float32, self._out.shape, self._out.ctypes.data)
        self._good = 0  # whole rows before this one, in a run
        self._all_judged = len(self._outs) == len(contract.judged)

    def reset(self) -> None:
        """Forget all rows (after a gap)."""
        self._good = 0
        self.residual.fill(np.nan)

    def update(self, values: Float64, valid: UInt8) -> None:
        """Take one row, float64[n_columns] and uint8[n_columns]; write `residual`."""
        self._take(values, valid)
        ok = self._ok
        whole = bool(ok.all())
        if not whole:
            self._row[~ok] = 0.0
        self._earlier[:] = self._later
        self._newest[:] = self._row
        spoken = self._good - self.memory
        if spoken < 0 or not (whole or ok[self._shared].all()):
            self.residual.fill(np.nan)
        elif spoken % self._stride == 0:
            try:
                self._session.run_with_iobinding(self._binding)
            except Exception:  # the loop never raises: no verdict, and a count
                self.failures += 1
                self._out.fill(np.nan)
            self.residual[:] = self._out[0] if self._all_judged else self._out[0, self._outs]
        if not whole:
            self.residual[~ok[self._own]] = np.nan
        self._good = self._good + 1 if whole else 0

    def _judge(self, values: Float64, valid: UInt8, gap: UInt8, names: list[str]) -> list[Float64]:
        x, ok = self._gate(values, valid)
        n, length = len(x), self.contract.window
        out = [np.full((n, len(self._outs)), np.nan) for _ in names]
        whole: Bool = np.asarray(ok.all(axis=1))
        good = _run_before(whole, np.asarray(gap) != 0)
        spoken = good - self.memory
        rows = np.flatnonzero((spoken >= 0) & ok[:, self._shared].all(axis=1))
        # A row that is not whole ends its run, so what is held was computed on whole rows of the same run.
        anchors, place = np.unique(rows - spoken[rows] % self._stride, return_inverse=True)
        if len(anchors):
            windows = np.lib.stride_tricks.sliding_window_view(x, length, axis=0)
            for source, target in zip(self._run(windows, anchors - length + 1, names), out, strict=True):
                target[rows] = source[place]
        for target in out:
            target[~ok[:, self._own]] = np.nan
        return out

    def _run(self, windows: NDArray[np.float32], first: Int64, names: list[str]) -> list[Float64]:
        """Return one float64[k, n_channels] per name for windows[first], each float32[n_in, window]."""
        batch = self._batch
        parts: list[list[Float64]] = [[] for _ in names]
        for start in range(0, len(first), batch):
            block = np.ascontiguousarray(windows[first[start:start + batch]].transpose(0, 2, 1))
            block = block.reshape(len(block), *self._rows_shape[1:])
            for part, got in zip(parts, self._call(names, {self._rows_name: block}), strict=True):
                part.append(got[:, self._outs].astype(np.float64))
        return [np.concatenate(part) for part in parts]


class StepMethod(OnnxMethod):
    """A graph that takes one row and carries states; they change places between two bindings."""

    def __init__(self, session: ort.InferenceSession, contract: GraphContract, columns: Sequence[Tag], stride: int,
                 where: str) -> None:
        super().__init__(session, contract, columns, stride, where)
        self.memory = contract.memory
        self._input_row = np.zeros((1, len(contract.columns)), np.float32)
        shapes = {node.name: node.shape for node in session.get_inputs()}
        self._states = [{name: np.zeros(shapes[name], np.float32) for name in contract.states} for _ in range(2)]
        self._values = [{name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in s.items()} for s in self._states]
        self._row_value = ort.OrtValue.ortvalue_from_numpy(self._input_row)
        self._bindings = [self._bind(0), self._bind(1)]
        self._now = 0  # which of the two states is the input
        self._good = 0

    def _bind(self, now: int) -> ort.IOBinding:
        """Return the binding that reads states `now` and writes the other ones."""
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._rows_name, self._row_value)
        binding.bind_output(RESIDUAL, "cpu", 0, np.float32, self._out.shape, self._out.ctypes.data)
        for source, target in self.contract.states.items():
            binding.bind_ortvalue_input(source, self._values[now][source])
            binding.bind_ortvalue_output(target, self._values[1 - now][source])
        return binding

    def reset(self) -> None:
        """Forget the states (after a gap)."""
        self._forget()
        self.residual.fill(np.nan)

    def _forget(self) -> None:
        for state in self._states[self._now].values():
            state.fill(0.0)
        self._good = 0

    def update(self, values: Float64, valid: UInt8) -> None:
        """Take one row, float64[n_columns] and uint8[n_columns]; write `residual`."""
        self._take(values, valid)
        if not self._ok.all():
            self.reset()
            return
        self._input_row[0] = self._row
        try:
            self._session.run_with_iobinding(self._bindings[self._now])
        except Exception:  # the loop never raises: no verdict, and a count
            self.failures += 1
            self._out.fill(np.nan)
        self._now = 1 - self._now
        if not np.isfinite(self._out).all():  # one NaN in a state would stay for ever
            self.reset()
            return
        if self._good >= self.memory:
            self.residual[:] = self._out[0, self._outs]
        else:
            self.residual.fill(np.nan)
        self._good += 1

    def _judge(self, values: Float64, valid: UInt8, gap: UInt8, names: list[str]) -> list[Float64]:
        x, ok = self._gate(values, valid)
        out = [np.full((len(x), len(self._outs)), np.nan) for _ in names]
        starts, whole = np.asarray(gap) != 0, np.asarray(ok.all(axis=1))
        wanted = [*names, *self.contract.states.values()]
        fresh = {name: np.zeros(a.shape, np.float32) for name, a in self._states[0].items()}
        states, good = fresh, 0
        for t in range(len(x)):
            if starts[t] or not whole[t]:
                states, good = fresh, 0
            if not whole[t]:
                continue
            got = self._call(wanted, {self._rows_name: x[t:t + 1], **states})
            if not np.isfinite(got[0]).all():
                states, good = fresh, 0
                continue
            states = dict(zip(self.contract.states, got[len(names):], strict=True))
            if good >= self.memory:
                for target, one in zip(out, got, strict=False):
                    target[t] = one[0, self._outs]
            good += 1
        return out


def _run_before(whole: Bool, starts: Bool) -> Int64:
    """Return int64[n]: how many whole rows stand right before each row, in its segment."""
    n = len(whole)
    index = np.arange(n, dtype=np.int64)
    # A row that is not whole ends a run for the rows after it, a start of a segment for itself.
    broken = np.concatenate([[0], np.where(whole, -1, index)[:-1] + 1]) if n else index
    begun = np.where(starts, index, 0)
    return index - np.maximum.accumulate(np.maximum(broken, begun)) if n else index
