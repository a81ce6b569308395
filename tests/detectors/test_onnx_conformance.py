"""The conformance suite finds each way in which a plugin can break its promises, and passes the ones that keep them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from opcua_detector.api import Cause, Channel, MethodModel, Record, Tag
from opcua_detector.detectors.transition import TransitionParams, TransitionPlugin
from opcua_detector.errors import ModelTagsError
from opcua_detector.testing import check_plugin


@dataclass(frozen=True)
class Params:
    memory: int = 3


class Honest:
    """Residual: distance of each judged column from its mean of the last `memory` rows before."""

    name, Params, learns = "honest", Params, True

    def fit(self, record, params):
        return MethodModel(self.name, tuple(t.name for t in record.tags), record.period_ns, {"memory": params.memory},
                           {"mean": record.values.mean(axis=0)})

    def open(self, model, columns):
        return HonestMethod(model, columns)


class HonestMethod:
    name, lag = "honest", 0

    def __init__(self, model, columns):
        names = [tag.name for tag in columns]
        if missing := [name for name in model.columns if name not in names]:
            raise ModelTagsError(f"needs {', '.join(missing)}")
        self.at = np.array([names.index(name) for name in model.columns])
        self.channels = tuple(Channel(name, name, "far") for name in model.columns)
        self.memory = model.params["memory"]
        self.residual = np.full(len(self.at), np.nan)
        self.ring = np.full((self.memory + 1, len(self.at)), np.nan)

    def update(self, values, valid):
        self.ring[:-1] = self.ring[1:]
        self.ring[-1] = np.where((valid[self.at] != 0) & np.isfinite(values[self.at]), values[self.at], np.nan)
        self.residual[:] = np.abs(self.ring[-1] - self.ring[:-1].mean(axis=0))

    def reset(self):
        self.ring[:] = np.nan
        self.residual[:] = np.nan

    def residuals(self, record):
        x = np.where((record.valid != 0) & np.isfinite(record.values), record.values, np.nan)[:, self.at]
        out = np.full(x.shape, np.nan)
        for start, stop in record.segments():
            for t in range(start + self.memory, stop):
                out[t] = np.abs(x[t] - x[t - self.memory:t].mean(axis=0))
        return out

    def explain(self, values, valid, source_ns, window):
        n = len(self.channels)
        return [Cause(c.column, c.kind, 1 / n, source_ns=int(source_ns[-1])) for c in self.channels]


def rows(n=1500):
    rng = np.random.default_rng(0)
    return Record.from_rows(rng.standard_normal((n, 2)), [Tag("a"), Tag("b")], 10_000_000)


def broken(**changed):
    """A plugin whose method has these attributes replaced."""
    method = type("Broken", (HonestMethod,), changed)
    return type("BrokenPlugin", (Honest,), {"open": lambda self, model, columns: method(model, columns)})()


def fits(fit):
    return type("BrokenFit", (Honest,), {"fit": fit})()


def test_an_honest_plugin_passes():
    check_plugin(Honest(), rows(), Params())


def test_the_method_transition_passes():
    rng = np.random.default_rng(1)
    t = np.arange(4000)
    values = np.stack([np.sin(t / 9), np.cos(t / 9) ** 2], 1) + 0.02 * rng.standard_normal((4000, 2))
    record = Record.from_rows(values, ["a", "b"], 10_000_000)
    check_plugin(TransitionPlugin(), record, TransitionParams())


def forgets_masks(self, values, valid):
    self.ring[:-1] = self.ring[1:]
    self.ring[-1] = np.nan_to_num(values[self.at])
    self.residual[:] = np.abs(self.ring[-1] - self.ring[:-1].mean(axis=0))


def remembers_for_ever(self, values, valid):
    HonestMethod.update(self, values, valid)
    self.poisoned = getattr(self, "poisoned", False) or bool(np.isnan(values).all())
    if self.poisoned:
        self.residual[:] = np.nan


def replaces_residual(self, values, valid):
    HonestMethod.update(self, values, valid)
    self.residual = self.residual.copy()


def keeps_rows(self, values, valid):
    HonestMethod.update(self, values, valid)
    self.kept = getattr(self, "kept", [])
    self.kept.append(values.copy())


def warns(self, values, valid):
    HonestMethod.update(self, values, valid)
    if not valid.all():
        warnings.warn("a masked value", stacklevel=1)


def disturbing_residuals(self, record):
    out = HonestMethod.residuals(self, record)
    self.ring[:] = 0.0
    return out


def other_batch(self, record):
    return HonestMethod.residuals(self, record) * (1 + 1e-6)


def ignores_gaps(self, record):
    gap = np.zeros_like(record.gap)
    gap[0] = 1
    return HonestMethod.residuals(self, replace(record, gap=gap))


def disturbing_explain(self, values, valid, source_ns, window):
    self.ring[:] = 0.0
    return HonestMethod.explain(self, values, valid, source_ns, window)


def spoiling_explain(self, values, valid, source_ns, window):
    values[:] = 0.0
    return HonestMethod.explain(self, values, valid, source_ns, window)


def moody_explain(self, values, valid, source_ns, window):
    self.mood = getattr(self, "mood", 0.0) + 0.01
    return [Cause("a", "far", self.mood, source_ns=int(source_ns[-1]))]


def greedy_explain(self, values, valid, source_ns, window):
    return [Cause(name, "far", 0.8, source_ns=int(source_ns[-1])) for name in ("a", "b")]


@pytest.mark.parametrize(("changed", "text"), [
    ({"update": forgets_masks}, "NaN on one side"),
    ({"update": remembers_for_ever}, "differ|felt"),
    ({"update": replaces_residual}, "does not replace"),
    ({"update": keeps_rows}, "bytes"),
    ({"at": property(lambda self: np.array([0, 1]), lambda self, value: None)}, "in another order"),
    ({"update": warns}, "a masked value"),
    ({"reset": lambda self: None}, "differ|reset"),
    ({"residuals": disturbing_residuals}, "disturbs the stream"),
    ({"residuals": other_batch}, "apart"),
    ({"residuals": ignores_gaps}, "streaming and batch differ"),
    ({"explain": disturbing_explain}, "explain on another thread disturbs"),
    ({"explain": spoiling_explain}, "explain changes|explain gives"),
    ({"explain": moody_explain}, "different answers"),
    ({"explain": greedy_explain}, "sum to more than 1"),
    ({"lag": 1.5}, "lag is a whole number"),
    ({"channels": property(lambda self: (Channel("z", "z", "far"),) * 2, lambda self, value: None)}, "channel"),
], ids=lambda value: "" if isinstance(value, str) else next(iter(value)))
def test_a_method_that_breaks_a_promise_is_found(changed, text):
    with pytest.raises((AssertionError, UserWarning, IndexError), match=text):
        check_plugin(broken(**changed), rows(), Params())


def test_a_method_that_warms_up_later_than_it_says_is_found():
    class Late(HonestMethod):
        def __init__(self, model, columns):
            super().__init__(model, columns)
            self.memory = 0  # while the ring still needs three rows

        def residuals(self, record):
            raise AssertionError("not reached")

    plugin = type("LatePlugin", (Honest,), {"open": lambda self, model, columns: Late(model, columns)})()
    with pytest.raises(AssertionError, match="first residual comes at row 3"):
        check_plugin(plugin, rows(), Params())


def test_a_missing_column_has_to_be_refused_by_name():
    class Lenient(HonestMethod):
        def __init__(self, model, columns):
            names = [tag.name for tag in columns]
            here = replace(model, columns=tuple(n for n in model.columns if n in names))
            super().__init__(here, columns)

    plugin = type("LenientPlugin", (Honest,), {"open": lambda self, model, columns: Lenient(model, columns)})()
    with pytest.raises(AssertionError, match="open accepts columns without a"):
        check_plugin(plugin, rows(), Params())


def fit_with(**changes):
    return fits(lambda self, record, params: replace(Honest.fit(self, record, params), **changes))


def spoils_the_record(self, record, params):
    record.values[0] = 0.0
    return Honest.fit(self, record, params)


@pytest.mark.parametrize(("plugin", "text"), [
    (fit_with(arrays={"net": np.array([object()])}), "plain numbers"),
    (fit_with(arrays={"net": [1.0]}), "plain numbers"),
    (fit_with(params={"memory": 3, "limit": float("nan")}), "JSON-able"),
    (fit_with(params={"memory": 3, "net": object()}), "JSON-able"),
    (fit_with(period_ns=5), "5 ns"),
    (fit_with(columns=("a", "c")), "needs"),
    (fits(spoils_the_record), "fit changes the record"),
])
def test_a_fit_that_breaks_a_promise_is_found(plugin, text):
    with pytest.raises(AssertionError, match=text):
        check_plugin(plugin, rows(), Params())


@dataclass
class Open:
    memory: int = 3


@dataclass(frozen=True)
class NotJson:
    memory: object = field(default_factory=object)


@pytest.mark.parametrize(("changes", "params", "text"), [
    ({"name": "no name"}, Params(), "no name for a config"),
    ({"learns": None}, Params(), "learns"),
    ({"Params": Open}, Open(), "frozen"),
    ({"Params": NotJson}, NotJson(), "JSON-able"),
    ({}, NotJson(), "not the plugin's Params"),
])
def test_a_declaration_that_is_wrong_is_found(changes, params, text):
    with pytest.raises(AssertionError, match=text):
        check_plugin(type("Declared", (Honest,), changes)(), rows(), params)


def test_a_record_that_is_too_short_or_masked_is_refused():
    masked = rows()
    masked.valid[5, 0] = 0
    for record in (rows(500), masked):
        with pytest.raises(AssertionError, match="record of at least"):
            check_plugin(Honest(), record, Params())
