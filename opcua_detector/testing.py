"""The conformance suite that every detector plugin passes, ours and yours: `check_plugin`.

>>> from opcua_detector.testing import check_plugin          # doctest: +SKIP
>>> check_plugin(my_plugin, healthy_record, MyParams())      # doctest: +SKIP

It needs nothing but the plugin and a healthy record without masks, and it raises AssertionError with a sentence that
says which promise of `api.Plugin` or `api.Method` is broken, and where.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import tracemalloc
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from .api import Channel, Float64, Method, MethodModel, Plugin, Record, Tag, UInt8
from .errors import ModelTagsError

MIN_ROWS = 1000
STREAM_ROWS = 1500  # rows compared row by row; enough for several gaps, masks and warm-ups
UPDATES = 10_000
MAX_GROWTH_BYTES = 4096
FLOAT64, FLOAT32 = 1e-10, 1e-5


def check_plugin(plugin: Plugin, record: Record, params: Any, *, tolerance: float | None = None) -> None:
    """Check that a plugin keeps every promise of `api.Plugin` and its method those of `api.Method`.

    Parameters
    ----------
    record : healthy rows, at least 1000, all valid; it should have one tag that is not needed, if the plugin allows
    params : the plugin's parameters
    tolerance : how far streaming may be from batch, relative where residuals exceed 1; by default 1e-5 for a model
        that holds an ONNX graph, else 1e-10

    Raises
    ------
    AssertionError
        A promise is broken; the text says which one.
    """
    _require(len(record) >= MIN_ROWS and bool((record.valid != 0).all()),
             f"give check_plugin a record of at least {MIN_ROWS} rows without masks")
    _check_declaration(plugin, params)
    before = (record.values.copy(), record.valid.copy(), record.gap.copy())
    model = plugin.fit(record, params)
    _require(_all_equal(before, (record.values, record.valid, record.gap)), "fit changes the record it is given")
    _check_model(model, record)
    if tolerance is None:
        tolerance = FLOAT32 if "onnx" in model.arrays else FLOAT64
    with warnings.catch_warnings(), np.errstate(all="warn"):
        warnings.simplefilter("error")  # a warning inside the loop is a log line for each row
        check_method(plugin, model, record, tolerance)


def check_method(plugin: Plugin, model: MethodModel, record: Record, tolerance: float) -> None:
    """Check the promises of an opened method; `check_plugin` says what they are."""
    case = _Case(plugin, model, record.rows(max(0, len(record) - STREAM_ROWS), len(record)), tolerance)
    case.channels()
    case.first_residual()
    case.streaming_equals_batch()
    case.reset_forgets()
    case.bad_values_pass()
    case.masked_column_is_not_judged()
    case.columns_by_name()
    case.explain_is_pure()
    case.memory_does_not_grow()


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise AssertionError(text)


def _all_equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def _check_declaration(plugin: Plugin, params: Any) -> None:
    _require(isinstance(plugin, Plugin), "a plugin has name, Params, learns, fit and open")
    _require(isinstance(plugin.name, str) and plugin.name.isidentifier(), f"{plugin.name!r} is no name for a config")
    _require(isinstance(plugin.learns, bool), "learns is True or False")
    made: Any = plugin.Params
    frozen = getattr(getattr(made, "__dataclass_params__", None), "frozen", False)
    _require(isinstance(made, type) and frozen, "Params is a frozen dataclass")
    _require(isinstance(params, made), f"params is a {type(params).__name__}, not the plugin's Params")
    _require(_plain_json(dataclasses.asdict(params)), "the parameters are JSON-able")


def _plain_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _check_model(model: MethodModel, record: Record) -> None:
    names = [tag.name for tag in record.tags]
    _require(isinstance(model, MethodModel), "fit returns a MethodModel")
    _require(set(model.columns) <= set(names), f"the model needs {model.columns}, the record has {names}")
    _require(len(set(model.columns)) == len(model.columns) > 0, "the model names each column once")
    _require(abs(model.period_ns - record.period_ns) <= 1e-3 * record.period_ns,
             f"the model is for {model.period_ns} ns, the record has {record.period_ns} ns")
    _require(_plain_json(dict(model.params)), "the model's params are JSON-able, without NaN")
    for name, array in model.arrays.items():
        _require(isinstance(array, np.ndarray) and array.dtype.kind in "biufc",
                 f"array {name} is plain numbers, not {getattr(array, 'dtype', type(array))}")


def stream(method: Method, record: Record) -> Float64:
    """Return float64[n, n_channels]: the residuals of a record given row by row, with a reset at each gap."""
    out = np.empty((len(record), len(method.channels)))
    for i in range(len(record)):
        if record.gap[i]:
            method.reset()
        method.update(record.values[i], record.valid[i])
        out[i] = method.residual
    return out


def damaged(record: Record, memory: int, seed: int = 0) -> Record:
    """Return the record with gaps and masks: single values, single rows, a long hole in one column, a short stretch."""
    rng = np.random.default_rng(seed)
    n, width = record.values.shape
    values, valid, gap = record.values.copy(), record.valid.copy(), record.gap.copy()
    # Half of the rows stay untouched in the middle, so that methods of a long memory speak as well.
    outside = np.concatenate([np.arange(1, n // 4), np.arange(3 * n // 4, n)])
    for row in rng.choice(outside, 6, replace=False):
        valid[row, rng.integers(width)] = 0
    valid[rng.choice(outside, 2, replace=False)] = 0
    valid[n // 8:n // 8 + 5, 0] = 0
    gap[rng.choice(outside, 3, replace=False)] = 1
    gap[n // 4 + max(1, memory // 2)] = 1  # the next gap comes before some methods have warmed up
    values[valid == 0] = np.nan
    return dataclasses.replace(record, values=values, valid=valid, gap=gap)


class _Case:
    """One opened method and the rows it is checked on."""

    def __init__(self, plugin: Plugin, model: MethodModel, rows: Record, tolerance: float) -> None:
        self.plugin, self.model, self.rows, self.tolerance = plugin, model, rows, tolerance
        self.method = self.open(rows.tags)
        self.reach = self.method.memory + self.method.lag
        _require(len(rows) > 4 * self.reach + 20, f"memory + lag is {self.reach}: give check_plugin more rows")

    def open(self, tags: Sequence[Tag]) -> Method:
        method = self.plugin.open(self.model, tags)
        _require(isinstance(method, Method), "open returns a Method: name, channels, lag, memory, residual, update, "
                                             "reset, residuals, explain")
        return method

    def same(self, a: Float64, b: Float64, what: str) -> None:
        _require(a.shape == b.shape, f"{what}: shapes {a.shape} and {b.shape}")
        silent = np.isnan(a) != np.isnan(b)
        if silent.any():
            row, channel = np.argwhere(silent)[0]
            raise AssertionError(f"{what}: row {row}, {self.method.channels[channel]}: {a[row, channel]} and "
                                 f"{b[row, channel]} (NaN on one side, {silent.sum()} such values)")
        far = np.nan_to_num(np.abs(a - b) / (1 + np.maximum(np.abs(a), np.abs(b))))
        if far.size and not far.max() <= self.tolerance:
            row, channel = np.unravel_index(int(far.argmax()), far.shape)
            raise AssertionError(f"{what}: row {row}, {self.method.channels[channel]}: {a[row, channel]} and "
                                 f"{b[row, channel]}, more than {self.tolerance:g} apart")

    def channels(self) -> None:
        judged = {tag.name for tag in self.rows.tags if tag.judged}
        method = self.method
        _require(len(method.channels) > 0, "a method has at least one channel")
        keys = {(c.column, c.kind) for c in method.channels}
        _require(len(keys) == len(method.channels), "two channels are the same")
        for channel in method.channels:
            _require(isinstance(channel, Channel) and channel.column in judged,
                     f"{channel} is no channel of a judged column out of {sorted(judged)}")
        for name, value in (("lag", method.lag), ("memory", method.memory)):
            _require(isinstance(value, int) and value >= 0, f"{name} is a whole number of rows, not {value!r}")
        _require(method.residual.dtype == np.float64 and method.residual.shape == (len(method.channels),),
                 "residual is float64[n_channels]")

    def first_residual(self) -> None:
        method = self.open(self.rows.tags)
        _require(bool(np.isnan(method.residual).all()), "residual is NaN before the first row")
        residual = method.residual
        spoken = np.isfinite(stream(method, self.rows)).any(axis=1)
        _require(method.residual is residual, "update writes into residual and does not replace it")
        first = int(np.argmax(spoken)) if spoken.any() else -1
        _require(0 <= first <= self.reach, f"memory + lag is {self.reach}, the first residual comes at row {first}")

    def streaming_equals_batch(self) -> None:
        record = damaged(self.rows, self.reach)
        batch = self.method.residuals(record)
        _require(batch.dtype == np.float64, "residuals gives float64")
        _require(bool(np.isfinite(batch).any()), "no residual at all on healthy rows with a few gaps and masks")
        self.same(stream(self.open(record.tags), record), batch, "streaming and batch differ")
        method, half = self.open(record.tags), len(record) // 2
        first = stream(method, record.rows(0, half))
        method.residuals(record)
        rest = dataclasses.replace(record.rows(half, len(record)), gap=record.gap[half:])
        self.same(np.vstack([first, stream(method, rest)]), batch, "residuals disturbs the stream")

    def reset_forgets(self) -> None:
        half = self.rows.rows(0, len(self.rows) // 2)
        fresh = stream(self.open(half.tags), half)
        method = self.open(half.tags)
        stream(method, self.rows)
        method.reset()
        _require(bool(np.isnan(method.residual).all()), "residual is NaN after reset")
        self.same(stream(method, half), fresh, "reset does not forget")

    def bad_values_pass(self) -> None:
        at = len(self.rows) // 3
        after = self.rows.rows(at + 1, len(self.rows))
        fresh = stream(self.open(after.tags), after)[self.reach:]
        going_on = dataclasses.replace(after, gap=np.zeros_like(after.gap))
        for value, mask in ((np.nan, 0), (np.nan, 1), (np.inf, 1), (-1e300, 0)):
            method = self.open(self.rows.tags)
            stream(method, self.rows.rows(0, at))
            width = self.rows.values.shape[1]
            method.update(np.full(width, value), np.full(width, mask, np.uint8))
            if mask == 0 or np.isnan(value):
                _require(bool(np.isnan(method.residual).all()), f"a row of {value}, valid = {mask}, gets a residual")
            late = stream(method, going_on)[self.reach:]
            self.same(late, fresh, f"a row of {value}, valid = {mask}, is felt {self.reach} rows later")

    def masked_column_is_not_judged(self) -> None:
        for i, tag in enumerate(self.rows.tags):
            values, valid = self.rows.values.copy(), self.rows.valid.copy()
            at = len(values) // 2
            valid[at, i], values[at, i] = 0, np.nan
            got = self.method.residuals(dataclasses.replace(self.rows, values=values, valid=valid))[at]
            for channel, one in zip(self.method.channels, got, strict=True):
                _require(channel.column != tag.name or bool(np.isnan(one)), f"{channel} judges a masked value ({one})")

    def columns_by_name(self) -> None:
        rows = self.rows
        stranger = np.random.default_rng(1).standard_normal(len(rows))
        backwards = slice(None, None, -1)
        other = dataclasses.replace(
            rows, tags=(Tag("not needed by anyone"), *rows.tags[backwards]),
            values=np.ascontiguousarray(np.column_stack([stranger, rows.values[:, backwards]])),
            valid=np.ascontiguousarray(np.column_stack([np.ones(len(rows), np.uint8), rows.valid[:, backwards]])))
        method = self.open(other.tags)
        place = {(c.column, c.kind): k for k, c in enumerate(method.channels)}
        here = [(c.column, c.kind) for c in self.method.channels]
        _require(set(place) == set(here), "other columns beside it change the channels")
        at = [place[key] for key in here]
        want = self.method.residuals(rows)
        self.same(method.residuals(other)[:, at], want, "columns in another order give other residuals")
        self.same(stream(method, other)[:, at], want, "columns in another order give other residuals in the stream")
        for name in self.model.columns:
            try:
                self.plugin.open(self.model, [tag for tag in rows.tags if tag.name != name])
            except ModelTagsError as error:
                _require(name in str(error), f"the error for the missing column {name} does not name it: {error}")
            else:
                raise AssertionError(f"open accepts columns without {name}, which the model needs")

    def explain_is_pure(self) -> None:
        rows, method = self.rows, self.open(self.rows.tags)
        half = len(rows) // 2
        want = stream(self.open(rows.tags), rows)
        first = stream(method, rows.rows(0, half))
        window = min(100, half - self.reach - 1)
        span = slice(half - window - self.reach - 1, half)
        given = (rows.values[span].copy(), rows.valid[span].copy(), rows.source_ns[span].copy())
        seen: list[Any] = []

        def explain() -> None:
            for _ in range(5):
                seen.append(method.explain(*given, window))

        thread = threading.Thread(target=explain)
        thread.start()
        rest = dataclasses.replace(rows.rows(half, len(rows)), gap=rows.gap[half:])
        second = stream(method, rest)
        thread.join()
        self.same(np.vstack([first, second]), want, "explain on another thread disturbs the stream")
        _require(len(seen) == 5, "explain raises")
        _require(all(repr(one) == repr(seen[0]) for one in seen), "explain gives different answers to the same rows")
        _require(_all_equal(given, (rows.values[span], rows.valid[span], rows.source_ns[span])),
                 "explain changes the rows it is given")
        self._check_causes(seen[0], given[2])

    def _check_causes(self, causes: list[Any], source_ns: Any) -> None:
        columns = {tag.name for tag in self.rows.tags}
        for cause in causes:
            _require(cause.tag in columns, f"{cause} names no column")
            _require(0 <= cause.share <= 1 + 1e-9, f"{cause}: share is not in 0..1")
            _require(cause.source_ns in source_ns, f"{cause}: source_ns is not that of a row")
        _require(sum(cause.share for cause in causes) <= 1 + 1e-6, "the shares of the causes sum to more than 1")

    def memory_does_not_grow(self) -> None:
        rows = self.rows
        method = self.open(rows.tags)
        pairs = [(rows.values[i], rows.valid[i]) for i in range(len(rows))]
        one_masked: UInt8 = np.ones(rows.values.shape[1], np.uint8)
        one_masked[0] = 0
        pairs.append((rows.values[0], one_masked))
        for values, valid in pairs:
            method.update(values, valid)
        tracing = tracemalloc.is_tracing()
        if not tracing:
            tracemalloc.start()
        try:
            for k in range(100):
                method.update(*pairs[k % len(pairs)])
            tracemalloc.reset_peak()
            start = tracemalloc.get_traced_memory()[0]
            for k in range(UPDATES):
                values, valid = pairs[k % len(pairs)]
                method.update(values, valid)
            peak = tracemalloc.get_traced_memory()[1] - start
        finally:
            if not tracing:
                tracemalloc.stop()
        _require(peak < MAX_GROWTH_BYTES, 
                 f"{UPDATES} updates take {peak} bytes; at most {MAX_GROWTH_BYTES} may be used")
