"""The plugin `onnx` runs any graph that says what it is, and never calls a dead sensor healthy."""

from __future__ import annotations

import hashlib
import tracemalloc
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from opcua_detector.api import MethodModel, Record, Tag, TagKind
from opcua_detector.detectors.onnx_format import GraphContract, read_props
from opcua_detector.detectors.onnx_model import OnnxParams, OnnxPlugin, graph_model
from opcua_detector.errors import ModelFileError, ModelTagsError
from opcua_detector.testing import check_plugin, stream
from sim_server.processes import Fault, make

PERIOD_NS = 10_000_000
PLUGIN = OnnxPlugin()


def constant(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def tensor(name, *shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, list(shape))


def to_bytes(nodes, inputs, outputs, constants, contract):
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializer=constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if contract is not None:
        helper.set_model_props(model, contract if isinstance(contract, dict) else contract.to_props())
    return model.SerializeToString()


def mean_forecast(*, columns=("a", "b"), judged=None, window=4, flat=False, batch="batch", contract=None, **more):
    """Residual = |newest - mean of the rows before| / scale, for the judged columns."""
    judged = columns if judged is None else judged
    n = len(columns)
    pick = np.array([columns.index(name) for name in judged], np.int64)
    nodes = [
        helper.make_node("Reshape", ["rows", "shape"], ["x"]),
        helper.make_node("Slice", ["x", "zero", "last", "one"], ["past"]),
        helper.make_node("ReduceMean", ["past"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("Gather", ["x", "newest"], ["now"], axis=1),
        helper.make_node("Gather", ["now", "pick"], ["now_judged"], axis=1),
        helper.make_node("Gather", ["mean", "pick"], ["prediction"], axis=1),
        helper.make_node("Sub", ["now_judged", "prediction"], ["error"]),
        helper.make_node("Div", ["error", "scale"], ["scaled"]),
        helper.make_node("Abs", ["scaled"], ["residual"]),
    ]
    scale = np.arange(1, len(judged) + 1, dtype=np.float32)
    constants = [
        constant("shape", np.array([-1, window, n], np.int64)), constant("zero", np.array([0], np.int64)),
        constant("last", np.array([window - 1], np.int64)), constant("one", np.array([1], np.int64)),
        constant("newest", np.array(window - 1, np.int64)), constant("pick", pick), constant("scale", scale),
    ]
    rows = tensor("rows", batch, window * n) if flat else tensor("rows", batch, window, n)
    outputs = [tensor("residual", batch, len(judged)), tensor("prediction", batch, len(judged))]
    if contract is None:
        contract = GraphContract("window", tuple(columns), tuple(judged), PERIOD_NS, window=window,
                                 scale=tuple(scale.tolist()), **more)
    return to_bytes(nodes, [rows], outputs, constants, contract)


def mean_reference(values, columns, judged, window):
    """The same residual, written down plainly."""
    out = np.full((len(values), len(judged)), np.nan)
    for t in range(window - 1, len(values)):
        for k, name in enumerate(judged):
            x = values[t - window + 1:t + 1, columns.index(name)]
            out[t, k] = abs(x[-1] - x[:-1].mean()) / (k + 1)
    return out


def recurrent(*, memory=5, columns=("a", "b"), decay=0.5, contract=None):
    """A state h' = decay h + (1 - decay) x and the residual |x - h|: a step graph with one state."""
    n = len(columns)
    nodes = [
        helper.make_node("Sub", ["x", "h"], ["error"]),
        helper.make_node("Abs", ["error"], ["residual"]),
        helper.make_node("Mul", ["h", "decay"], ["old"]),
        helper.make_node("Mul", ["x", "rest"], ["new"]),
        helper.make_node("Add", ["old", "new"], ["h_out"]),
        helper.make_node("Identity", ["h"], ["prediction"]),
    ]
    constants = [constant("decay", np.float32(decay)), constant("rest", np.float32(1 - decay))]
    if contract is None:
        contract = GraphContract("step", tuple(columns), tuple(columns), PERIOD_NS, memory=memory,
                                 scale=(1.0,) * n, states={"h": "h_out"})
    return to_bytes(nodes, [tensor("x", 1, n), tensor("h", 1, n)],
                    [tensor("residual", 1, n), tensor("h_out", 1, n), tensor("prediction", 1, n)], constants, contract)


def waves(n=600, columns=("a", "b"), seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(n)
    values = np.stack([np.sin(t / (7 + 3 * k)) * (k + 1) for k in range(len(columns))], 1)
    return Record.from_rows(values + 0.05 * rng.standard_normal(values.shape), columns, PERIOD_NS)


def opened(content, tags, **params):
    return PLUGIN.open(graph_model(content, "test", params), tags)


# -- it computes what the graph says --------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True], ids=["cube", "flat"])
@pytest.mark.parametrize("batch", ["batch", 1], ids=["open batch", "batch of one"])
def test_a_window_graph_gives_the_residual_it_defines(flat, batch):
    record = waves()
    method = opened(mean_forecast(flat=flat, batch=batch), record.tags)
    want = mean_reference(record.values, ("a", "b"), ("a", "b"), 4)
    np.testing.assert_allclose(stream(method, record), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(method.residuals(record), want, rtol=1e-5, atol=1e-6)
    assert (method.memory, method.lag) == (3, 0)
    assert [(c.column, c.tag, c.kind) for c in method.channels] == [("a", "a", "forecast"), ("b", "b", "forecast")]


def test_a_step_graph_carries_its_state_from_row_to_row():
    record = waves()
    method = opened(recurrent(memory=5), record.tags)
    h, want = np.zeros(2), np.full(record.values.shape, np.nan)
    for t, x in enumerate(record.values):
        if t >= 5:
            want[t] = np.abs(x - h)
        h = 0.5 * h + 0.5 * x
    np.testing.assert_allclose(stream(method, record), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(method.residuals(record), want, rtol=1e-5, atol=1e-6)


def test_a_stride_holds_the_residual_in_between():
    record = waves()
    every, third = (stream(opened(mean_forecast(), record.tags, stride=k), record) for k in (1, 3))
    for t in range(3, len(record)):
        np.testing.assert_array_equal(third[t], every[t - (t - 3) % 3])


def test_a_batch_longer_than_one_run_of_the_graph_has_no_seam():
    record = waves(20_000)
    np.testing.assert_allclose(opened(mean_forecast(), record.tags).residuals(record),
                               mean_reference(record.values, ("a", "b"), ("a", "b"), 4), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("content", "stride"), [
    (mean_forecast(window=6), 1), (mean_forecast(window=6), 5), (mean_forecast(window=6, flat=True), 1),
    (mean_forecast(judged=("b",)), 1), (mean_forecast(judged=("b",)), 3),
    (mean_forecast(window=6, residual="reconstruction"), 1), (mean_forecast(window=6, residual="reconstruction"), 2),
    (recurrent(), 1), (recurrent(memory=0, decay=0.0), 1),
], ids=["window", "stride", "flat", "one judged", "one judged, stride", "reconstruction", "reconstruction, stride",
        "recurrent", "no memory"])
def test_every_kind_of_graph_passes_the_conformance_suite(content, stride, tmp_path):
    path = tmp_path / "g.onnx"
    path.write_bytes(content)
    check_plugin(PLUGIN, waves(1200), OnnxParams(str(path), stride=stride))


@pytest.mark.parametrize("name", ["lorenz", "throttle"])
def test_the_bundled_graphs_pass_the_conformance_suite(name):
    plant = make(name, seed=4)
    record = Record.from_rows(plant.simulate(2500), [t.name for t in plant.model.measured], plant.period_ns)
    check_plugin(PLUGIN, record, OnnxParams(f"bundled:{name}"))


# -- the NaN gate ---------------------------------------------------------------------------------------------------


def test_a_graph_that_turns_nan_into_a_healthy_number_is_never_shown_one():
    # Max(NaN, 0) = 0 in some kernels: here the residual of anything that is not a number would be 0.
    nodes = [
        helper.make_node("ReduceSum", ["rows", "axis"], ["sum"], keepdims=0),
        helper.make_node("IsNaN", ["sum"], ["bad"]),
        helper.make_node("Where", ["bad", "zero", "sum"], ["residual"]),
    ]
    content = to_bytes(nodes, [tensor("rows", "b", 2, 2)], [tensor("residual", "b", 2)],
                       [constant("axis", np.array([1], np.int64)), constant("zero", np.float32(0))],
                       GraphContract("window", ("a", "b"), ("a", "b"), PERIOD_NS, window=2))
    method = opened(content, [Tag("a"), Tag("b")])
    good = np.ones(2, np.uint8)
    for _ in range(3):
        method.update(np.array([1.0, 2.0]), good)
    assert method.residual.tolist() == [2.0, 4.0]
    for value, valid in ((np.nan, 1), (np.inf, 1), (1e300, 1), (5.0, 0)):
        method.update(np.array([value, 2.0]), np.array([valid, 1], np.uint8))
        assert np.isnan(method.residual[0])
        method.update(np.array([1.0, 2.0]), good)
        assert np.isnan(method.residual).all(), "the masked value is still in the window"
        method.update(np.array([1.0, 2.0]), good)
        assert method.residual.tolist() == [2.0, 4.0]


def test_a_forecast_still_judges_the_other_columns_of_the_row_in_which_one_is_masked():
    record = waves(40)
    record.valid[20, 0] = 0
    got = stream(opened(mean_forecast(), record.tags), record)
    want = mean_reference(record.values, ("a", "b"), ("a", "b"), 4)
    assert np.isnan(got[20, 0])
    assert got[20, 1] == pytest.approx(want[20, 1], rel=1e-5)
    assert np.isnan(got[21:24]).all()
    np.testing.assert_allclose(got[24:], want[24:], rtol=1e-5, atol=1e-6)


def test_a_masked_input_that_is_not_judged_silences_the_row():
    record = waves(40)
    record.valid[20, 0] = 0
    got = stream(opened(mean_forecast(judged=("b",)), record.tags), record)
    assert np.isnan(got[20:24]).all() and np.isfinite(got[24:]).all()


def test_a_reconstruction_is_silent_in_the_row_of_any_masked_column():
    record = waves(40)
    record.valid[20, 0] = 0
    got = stream(opened(mean_forecast(residual="reconstruction"), record.tags), record)
    assert np.isnan(got[20:24]).all() and np.isfinite(got[24:]).all()


def test_a_step_graph_starts_anew_after_a_masked_row():
    record = waves(60)
    record.values[30, 1], record.valid[30, 1] = np.nan, 0
    method = opened(recurrent(memory=5), record.tags)
    got = stream(method, record)
    assert np.isnan(got[30:36]).all() and np.isfinite(got[36:]).all()
    np.testing.assert_array_equal(got[31:], stream(opened(recurrent(memory=5), record.tags), record.rows(31, 60)))


def test_a_state_that_overflows_is_forgotten():
    # h' = 4 h + ... leaves float32 after some 60 rows; without a reset it would be infinite for ever.
    record = waves(300)
    got = stream(opened(recurrent(memory=2, decay=4.0), record.tags), record)
    late = got[200:]
    assert np.isfinite(late).any() and np.isnan(late).any()


@pytest.mark.parametrize("kind", ["window", "step"])
def test_a_run_that_onnxruntime_refuses_gives_no_residual_and_is_counted(kind):
    # The value is used as an index into a table of three: 7 is out of range.
    nodes = [
        helper.make_node("Cast", ["x"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["found"]),
        helper.make_node("Reshape", ["found", "shape"], ["residual"]),
    ]
    constants = [constant("table", np.array([5, 6, 7], np.float32)), constant("shape", np.array([1, 1], np.int64))]
    rows = tensor("x", 1, 1) if kind == "step" else tensor("x", 1, 1, 1)
    content = to_bytes(nodes, [rows], [tensor("residual", 1, 1)], constants,
                       GraphContract(kind, ("a",), ("a",), PERIOD_NS))
    method = opened(content, [Tag("a")])
    seen = []
    for value in (1.0, 7.0, 2.0):
        method.update(np.array([value]), np.ones(1, np.uint8))
        seen.append(method.residual[0])
    np.testing.assert_array_equal(seen, [6.0, np.nan, 7.0])
    assert method.failures == 1
    with pytest.raises(ModelFileError, match="fails on these rows"):
        method.residuals(Record.from_rows(np.array([[1.0], [7.0]]), ["a"], PERIOD_NS))


# -- tags and columns -----------------------------------------------------------------------------------------------


def test_a_column_of_kind_setpoint_is_an_input_but_has_no_channel():
    record = waves()
    tags = (Tag("a", kind=TagKind.SETPOINT), Tag("b"))
    method = opened(mean_forecast(), tags)
    assert [c.column for c in method.channels] == ["b"]
    both = opened(mean_forecast(), record.tags).residuals(record)
    np.testing.assert_array_equal(stream(method, replace(record, tags=tags))[:, 0], both[:, 1])


def test_a_graph_with_nothing_to_judge_here_is_refused():
    with pytest.raises(ModelTagsError, match="none of a, b"):
        opened(mean_forecast(), [Tag("a", kind=TagKind.STATE), Tag("b", kind=TagKind.SETPOINT)])


def test_a_missing_column_is_named():
    with pytest.raises(ModelTagsError, match=r"needs b.*c"):
        opened(mean_forecast(), [Tag("a"), Tag("c")])


def test_another_period_is_refused(tmp_path):
    path = tmp_path / "g.onnx"
    path.write_bytes(mean_forecast())
    record = waves()
    with pytest.raises(ModelTagsError, match="each 10 ms, these come each 20 ms"):
        PLUGIN.fit(replace(record, period_ns=2 * PERIOD_NS), OnnxParams(str(path)))


def test_a_stride_on_a_step_graph_is_refused():
    with pytest.raises(ModelTagsError, match="stride is 2"):
        opened(recurrent(), [Tag("a"), Tag("b")], stride=2)


# -- files that are wrong -------------------------------------------------------------------------------------------


def test_a_missing_file_is_named():
    with pytest.raises(ModelFileError, match=r"nowhere\.onnx"):
        PLUGIN.fit(waves(), OnnxParams("nowhere.onnx"))
    with pytest.raises(ModelFileError, match="bundled:lorenz"):
        PLUGIN.fit(waves(), OnnxParams("bundled:nothing"))
    with pytest.raises(ModelFileError, match="no such graph"):
        PLUGIN.fit(waves(), OnnxParams("bundled:../models/lorenz"))
    with pytest.raises(ModelFileError, match="no graph is named"):
        PLUGIN.fit(waves(), OnnxParams())


@pytest.mark.parametrize("keep", [0, 10, 200, 0.5, 0.99])
def test_a_truncated_file_is_refused(keep, tmp_path):
    whole = mean_forecast()
    path = tmp_path / "cut.onnx"
    path.write_bytes(whole[:int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(ModelFileError, match=r"cut\.onnx"):
        PLUGIN.fit(waves(), OnnxParams(str(path)))


def test_a_file_with_another_hash_is_refused(tmp_path):
    content = mean_forecast()
    path = tmp_path / "g.onnx"
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    assert PLUGIN.fit(waves(), OnnxParams(str(path), sha256=digest.upper())).params["sha256"] == digest
    path.write_bytes(mean_forecast(window=5))
    with pytest.raises(ModelFileError, match=f"altered.*{digest}"):
        PLUGIN.fit(waves(), OnnxParams(str(path), sha256=digest))


def test_a_stored_graph_that_was_altered_is_refused():
    model = graph_model(mean_forecast(), "test", {})
    array = model.arrays["onnx"].copy()
    array[len(array) // 2] ^= 1
    with pytest.raises(ModelFileError, match="altered"):
        PLUGIN.open(replace(model, arrays={"onnx": array}), waves().tags)
    with pytest.raises(ModelFileError, match="no graph"):
        PLUGIN.open(replace(model, arrays={}), waves().tags)


def props(**changes):
    base = GraphContract("window", ("a", "b"), ("a", "b"), PERIOD_NS, window=4, scale=(1.0, 2.0)).to_props()
    return {key: value for key, value in (base | changes).items() if value is not None}


@pytest.mark.parametrize(("changes", "text"), [
    ({"format": None}, "lacks format"),
    ({"format": "something else"}, "format = 'something else'"),
    ({"kind": "tree"}, "window or step"),
    ({"columns": "a,b"}, "JSON list"),
    ({"columns": '["a", "a"]'}, "different names"),
    ({"columns": '["a", 5]'}, "different names"),
    ({"judged": '["c"]'}, "judged = .'c'."),
    ({"window": "four"}, "whole number"),
    ({"window": "0"}, "at least 1"),
    ({"period_ns": None}, "lacks period_ns"),
    ({"residual": "difference"}, "forecast or reconstruction"),
    ({"scale": "[1.0, 0.0]"}, "above 0"),
    ({"scale": "[1.0]"}, "2 numbers"),
    ({"levels": "[0.5, 0.1]"}, "increasing"),
    ({"levels": "[0.1, 0.5]"}, "quantiles"),
    ({"levels": "[0.1, 0.5]", "quantiles": "[[1, 2], [2, 1]]"}, "increasing"),
    ({"states": '{"h": 1}'}, "names of outputs"),
    ({"training": "[]"}, "JSON object"),
])
def test_garbled_metadata_is_refused_by_key(changes, text):
    with pytest.raises(ModelFileError, match=text) as caught:
        graph_model(mean_forecast(contract=props(**changes)), "test", {})
    assert caught.value.next_step


def test_a_graph_without_metadata_is_refused():
    with pytest.raises(ModelFileError, match="no metadata at all"):
        graph_model(mean_forecast(contract={}), "test", {})


def test_the_contract_survives_its_way_through_the_file():
    contract = GraphContract("window", ("ä b", "c"), ("c",), 5, window=3, residual="reconstruction", scale=(0.1,),
                             levels=(0.0, 1.0), quantiles=((0.0, 9.5),), training={"rows": 7, "seed": 1})
    assert read_props(contract.to_props(), "here") == contract


@pytest.mark.parametrize(("contract", "text"), [
    (GraphContract("window", ("a", "b"), ("a", "b"), PERIOD_NS, window=5),
     r"input rows.*implies float32\[1 or batch, 5, 2"),
    (GraphContract("window", ("a", "b", "c"), ("a", "b"), PERIOD_NS, window=4), "input rows"),
    (GraphContract("window", ("a", "b"), ("a",), PERIOD_NS, window=4), "output residual"),
    (GraphContract("step", ("a", "b"), ("a", "b"), PERIOD_NS), "input rows"),
    (GraphContract("step", ("a", "b"), ("a", "b"), PERIOD_NS, states={"h": "h_out"}), "needs one input for rows"),
])
def test_a_graph_of_another_shape_than_it_says_is_refused(contract, text):
    with pytest.raises(ModelFileError, match=text):
        graph_model(mean_forecast(contract=contract), "test", {})


def test_a_graph_in_float64_is_refused():
    content = to_bytes([helper.make_node("Abs", ["x"], ["residual"])], [tensor("x", 1, 2, kind=TensorProto.DOUBLE)],
                       [tensor("residual", 1, 2, kind=TensorProto.DOUBLE)], [],
                       GraphContract("step", ("a", "b"), ("a", "b"), PERIOD_NS))
    with pytest.raises(ModelFileError, match=r"tensor\(double\)"):
        graph_model(content, "test", {})


def test_an_open_dimension_that_comes_out_wrong_is_refused():
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),
        helper.make_node("Transpose", ["places"], ["by_place"]),
        helper.make_node("Cast", ["by_place"], ["residual"], to=TensorProto.FLOAT),
    ]
    content = to_bytes(nodes, [tensor("x", 1, 2)], [tensor("residual", "open", 2)], [],
                       GraphContract("step", ("a", "b"), ("a", "b"), PERIOD_NS))
    with pytest.raises(ModelFileError, match=r"shape \[0, 2\] for one window"):
        graph_model(content, "test", {})


def test_states_that_do_not_match_are_refused():
    nodes = [helper.make_node("Abs", ["x"], ["residual"]), helper.make_node("Concat", ["h", "h"], ["h_out"], axis=1)]
    content = to_bytes(nodes, [tensor("x", 1, 2), tensor("h", 1, 3)], [tensor("residual", 1, 2), tensor("h_out", 1, 6)],
                       [], GraphContract("step", ("a", "b"), ("a", "b"), PERIOD_NS, states={"h": "h_out"}))
    with pytest.raises(ModelFileError, match="state h"):
        graph_model(content, "test", {})


# -- explanation ----------------------------------------------------------------------------------------------------


def test_the_column_that_left_its_forecast_is_named_first_with_what_was_expected():
    record = waves(300)
    record.values[250:, 1] += 6.0 * (-1.0) ** np.arange(50)
    method = opened(mean_forecast(), record.tags)
    found = method.explain(record.values, record.valid, record.source_ns, 60)
    assert [c.tag for c in found] == ["b", "a"]
    worst = found[0]
    assert worst.kind == "forecast" and worst.share > 0.6
    row = int(np.flatnonzero(record.source_ns == worst.source_ns)[0])
    assert row >= 250
    assert worst.observed == record.values[row, 1]
    assert not worst.normal_low < worst.observed < worst.normal_high
    centre = record.values[row - 3:row, 1].mean()
    assert (worst.normal_low + worst.normal_high) / 2 == pytest.approx(centre, rel=1e-5)


def test_large_residuals_that_healthy_windows_have_as_well_do_not_blame():
    # Column a jumps once in 50 rows, always did, and its quantiles say so; column b doubles its small residual.
    levels, jumpy, calm = (0.0, 0.5, 0.97, 1.0), (0.0, 0.1, 0.2, 50.0), (0.0, 0.1, 0.2, 0.3)
    content = mean_forecast(window=2, levels=levels, quantiles=(jumpy, calm))
    rng = np.random.default_rng(3)
    values = np.cumsum(rng.choice([-0.1, 0.1], (200, 2)), axis=0)
    values[::50, 0] += 20.0
    values[:, 1] *= 4 * 2
    found = opened(content, [Tag("a"), Tag("b")]).explain(
        values, np.ones(values.shape, np.uint8), np.arange(200, dtype=np.int64), 100)
    assert found[0].tag == "b" and found[0].share > 0.7


def test_without_any_judged_row_there_is_no_cause():
    record = waves(20)
    record.valid[:] = 0
    assert opened(mean_forecast(), record.tags).explain(record.values, record.valid, record.source_ns, 10) == []


# -- the bundled graphs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "fault", "least"), [
    ("lorenz", ("sigma", 2 / 3), 0.99), ("lorenz", ("rho", 26 / 28), 0.99), ("lorenz", ("beta", 1.25), 0.99),
    ("throttle", ("Kb", 1.3), 0.99), ("throttle", ("Kt", 1.3), 0.99), ("throttle", ("La", 1.3), 0.97),
])
def test_the_bundled_graphs_tell_each_fault_from_healthy(name, fault, least):
    from sklearn.metrics import roc_auc_score

    def levels(seed, faults):
        plant = make(name, seed=seed)
        rows = plant.simulate(8000, [Fault(*fault, 0, 8000)] if faults else [])
        record = Record.from_rows(rows, [t.name for t in plant.model.measured], plant.period_ns)
        method = PLUGIN.open(PLUGIN.fit(record, OnnxParams(f"bundled:{name}")), record.tags)
        log = np.log(method.residuals(record)[method.memory:] + 1e-3).mean(axis=1)
        return np.convolve(log, np.full(100, 0.01), "valid")

    healthy, faulty = levels(901, False), levels(902, True)
    labels = np.r_[np.zeros(len(healthy)), np.ones(len(faulty))]
    assert roc_auc_score(labels, np.r_[healthy, faulty]) >= least


@pytest.mark.parametrize("name", ["lorenz", "throttle"])
def test_the_bundled_graphs_are_small_and_say_where_they_come_from(name):
    plant = make(name)
    record = Record.from_rows(plant.simulate(50), [t.name for t in plant.model.measured], plant.period_ns)
    model = PLUGIN.fit(record, OnnxParams(f"bundled:{name}"))
    assert model.arrays["onnx"].nbytes < 100_000
    assert model.period_ns == plant.period_ns and set(model.columns) == {t.name for t in plant.model.measured}
    assert {"source", "rows", "seed", "steps", "noise", "window"} <= set(model.params["training"])
    graph = onnx.load_from_string(model.arrays["onnx"].tobytes())
    assert max(one.version for one in graph.opset_import if one.domain == "") <= 17


def test_ten_thousand_updates_take_no_memory():
    plant = make("lorenz", seed=1)
    rows = plant.simulate(500)
    record = Record.from_rows(rows, ["x1", "x3"], plant.period_ns)
    method = PLUGIN.open(PLUGIN.fit(record, OnnxParams("bundled:lorenz")), record.tags)
    pairs = list(zip(record.values, record.valid, strict=True))
    for pair in pairs:
        method.update(*pair)
    tracemalloc.start()
    try:
        method.update(*pairs[0])
        tracemalloc.reset_peak()
        start = tracemalloc.get_traced_memory()[0]
        for k in range(10_000):
            method.update(*pairs[k % 500])
        assert tracemalloc.get_traced_memory()[1] - start < 4096
    finally:
        tracemalloc.stop()


def test_a_model_is_plain_arrays_and_json():
    model = graph_model(mean_forecast(), "test", {"stride": 2})
    assert isinstance(model, MethodModel) and model.plugin == "onnx"
    assert model.arrays["onnx"].dtype == np.uint8
    assert model.params["sha256"] == hashlib.sha256(model.arrays["onnx"].tobytes()).hexdigest()
