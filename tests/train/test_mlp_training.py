"""Training the forecaster anew reaches the committed graphs, and the exported graph is what torch computed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml

import opcua_detector.plugins.detectors.mlp as package
from opcua_detector.api import Record, Tag, TagKind
from opcua_detector.detectors.onnx_model import OnnxParams, OnnxPlugin, load
from opcua_detector.errors import ModelTagsError, PluginError, RecordError
from opcua_detector.plugins.detectors.mlp import MlpParams, plugin
from opcua_detector.plugins.detectors.mlp.__main__ import main, read_rows
from opcua_detector.registry import Registry
from opcua_detector.testing import check_plugin
from sim_server.processes import Fault, make

pytestmark = pytest.mark.train

FAULTS = {
    "lorenz": (("sigma", 2 / 3), ("rho", 26 / 28), ("beta", 1.25)),
    "throttle": (("Kb", 1.3), ("Kt", 1.3), ("La", 1.3)),
}
NOISE = {"lorenz": 0.01, "throttle": 0.003}  # as in the plugin's README
WINDOW = 100


def rows_of(name, seed, n, fault=None):
    plant = make(name, seed=seed)
    values = plant.simulate(n, [Fault(*fault, 0, n)] if fault else [])
    return Record.from_rows(values, [tag.name for tag in plant.model.measured], plant.period_ns)


def several(name, seeds, n):
    """Healthy rows of several seeds, a gap before each."""
    parts = [rows_of(name, seed, n) for seed in seeds]
    gap = np.concatenate([part.gap for part in parts])
    return Record.from_rows(np.concatenate([p.values for p in parts]), parts[0].tags, parts[0].period_ns, gap=gap)


def level(method, record):
    """Mean logarithm of the residual over the last rows and all channels."""
    log = np.log(method.residuals(record)[method.memory:] + 1e-3).mean(axis=1)
    return np.convolve(log, np.full(WINDOW, 1 / WINDOW), "valid")


def auc(method, name, fault):
    from sklearn.metrics import roc_auc_score

    healthy = level(method, rows_of(name, 501, 20_000))
    faulty = level(method, rows_of(name, 502, 20_000, fault))
    return roc_auc_score(np.r_[np.zeros(len(healthy)), np.ones(len(faulty))], np.r_[healthy, faulty])


@cache
def trained(name):
    record = several(name, (11, 12, 13), 30_000)
    model = plugin.fit(record, MlpParams(steps=STEPS[name], noise=NOISE[name], seed=5))
    return plugin.open(model, record.tags)


STEPS = {"lorenz": 6000, "throttle": 12_000}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["lorenz", "throttle"])
def test_training_anew_reaches_the_committed_graph(name):
    committed = OnnxPlugin().open(OnnxPlugin().fit(rows_of(name, 1, 50), OnnxParams(f"bundled:{name}")),
                                  rows_of(name, 1, 50).tags)
    for fault in FAULTS[name]:
        want, got = auc(committed, name, fault), auc(trained(name), name, fault)
        print(f"{name} {fault[0]}: committed {want:.4f}, trained anew {got:.4f}")
        assert got >= want - 0.01, f"{name} {fault}: committed {want:.4f}, trained anew {got:.4f}"


def test_the_plugin_passes_the_conformance_suite():
    rng = np.random.default_rng(0)
    rows = rows_of("lorenz", 3, 4000)
    values = np.column_stack([rows.values, np.repeat(rng.uniform(0, 1, 40), 100)])
    record = Record.from_rows(values, [*rows.tags, Tag("demand", kind=TagKind.SETPOINT)], rows.period_ns)
    check_plugin(plugin, record, MlpParams(window=6, hidden=8, steps=50))


def driven(n=6000, seed=0):
    """A column that follows a setpoint in the very row in which that changes, and the setpoint."""
    rng = np.random.default_rng(seed)
    r = np.repeat(rng.uniform(-1, 1, n // 20), 20)
    x = np.zeros(n)
    for t in range(1, n):
        x[t] = 0.8 * x[t - 1] + 0.2 * r[t]
    return np.column_stack([x, r])


def test_a_setpoint_of_the_same_row_is_used_but_not_judged():
    tags = [Tag("x"), Tag("r", kind=TagKind.SETPOINT)]
    record = Record.from_rows(driven(), tags, 10_000_000)
    method = plugin.open(plugin.fit(record, MlpParams(window=3, hidden=4, steps=300)), record.tags)
    assert [channel.column for channel in method.channels] == ["x"]
    other = Record.from_rows(driven(seed=1), tags, 10_000_000)
    at_jump = np.flatnonzero(np.diff(other.values[:, 1]) != 0) + 1
    scale = method.contract.scale[0]
    error = method.residuals(other)[at_jump, 0] * scale
    # Without r of the same row the error at a jump would be 0.2 times the jump, about 0.13 in the median.
    assert np.nanmedian(error) < 0.01


def test_torch_and_onnxruntime_compute_the_same():
    import torch

    from opcua_detector.plugins.detectors.mlp import trainer

    record = rows_of("throttle", 2, 3000)
    judged = np.array([True, True])
    ends = trainer.whole_windows(record, 13)
    params = MlpParams(steps=30)
    weights = trainer._Training(torch, record, judged, ends, params).run()
    graph = trainer.torch_graph(torch, trainer.fold(torch, weights, judged, params.window))
    content = trainer._export(torch, record, judged, weights, params)
    session, _ = load(content, "test")
    rows = np.stack([record.values[t - 12:t + 1] for t in ends[:500]]).astype(np.float32)
    for got, want in zip(session.run(None, {"rows": rows}), graph(torch.from_numpy(rows)), strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-5)
    # The folded graph is the forecaster that was trained.
    f = trainer.features(torch, torch.from_numpy(rows).double(), torch.from_numpy(weights["centre"]), judged).numpy()
    step = f @ weights["S"] + np.tanh(f @ weights["A"] + weights["a"]) @ weights["B"] + weights["b"]
    prediction = rows[:, -2].astype(np.float64) + step
    np.testing.assert_allclose(session.run(["prediction"], {"rows": rows})[0], prediction, rtol=1e-5, atol=1e-5)
    residual = np.abs(rows[:, -1] - prediction) / weights["scale"]
    np.testing.assert_allclose(session.run(["residual"], {"rows": rows})[0], residual, rtol=1e-5, atol=1e-4)


def test_the_next_exporter_of_torch_gives_the_same_graph(tmp_path):
    pytest.importorskip("onnxscript", reason="the dynamo exporter needs onnxscript")
    import onnxruntime
    import torch

    from opcua_detector.plugins.detectors.mlp import trainer

    record = rows_of("lorenz", 2, 3000)
    judged = np.array([True, True])
    params = MlpParams(steps=30)
    weights = trainer._Training(torch, record, judged, trainer.whole_windows(record, 13), params).run()
    graph = trainer.torch_graph(torch, trainer.fold(torch, weights, judged, params.window))
    path = tmp_path / "next.onnx"
    torch.onnx.export(graph, (torch.zeros(2, 13, 2),), path, dynamo=True, external_data=False,
                      input_names=["rows"], output_names=["residual", "prediction"])
    rows = np.stack([record.values[t - 12:t + 1] for t in (12, 500)]).astype(np.float32)
    session, _ = load(trainer._export(torch, record, judged, weights, params), "test")
    following = onnxruntime.InferenceSession(path.read_bytes())
    for a, b in zip(session.run(None, {"rows": rows}), following.run(None, {"rows": rows}), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_masked_rows_and_gaps_are_left_out_of_the_training():
    from opcua_detector.plugins.detectors.mlp.trainer import whole_windows

    record = rows_of("lorenz", 1, 100)
    record.valid[40, 1] = 0
    record.gap[70] = 1
    ends = whole_windows(record, 5)
    want = [t for t in range(4, 100) if not (40 <= t <= 44 or 70 <= t <= 73)]
    assert ends.tolist() == want


def test_the_same_seed_gives_the_same_graph():
    record = rows_of("lorenz", 1, 3000)
    first, second, other = (plugin.fit(record, MlpParams(steps=20, seed=s)).arrays["onnx"].tobytes() for s in (1, 1, 2))
    assert first == second != other


def test_a_column_that_never_moved_in_training_does_not_speak_later():
    rows = rows_of("lorenz", 1, 3000)
    tags = [*rows.tags, Tag("mode", kind=TagKind.STATE)]
    record = Record.from_rows(np.column_stack([rows.values, np.full(3000, 2.0)]), tags, rows.period_ns)
    method = plugin.open(plugin.fit(record, MlpParams(steps=50)), record.tags)
    moved = Record.from_rows(np.column_stack([rows.values, np.full(3000, 3.0)]), tags, rows.period_ns)
    np.testing.assert_allclose(method.residuals(moved), method.residuals(record), rtol=1e-6)


def test_a_record_that_is_too_short_or_has_nothing_to_judge_is_refused():
    with pytest.raises(RecordError, match="only 88 windows of 13"):
        plugin.fit(rows_of("lorenz", 1, 100), MlpParams())
    record = rows_of("lorenz", 1, 1000)
    inputs = Record.from_rows(record.values, [Tag(t.name, kind=TagKind.SETPOINT) for t in record.tags], 10_000_000)
    with pytest.raises(RecordError, match="no tag is judged"):
        plugin.fit(inputs, MlpParams())


def test_the_scale_is_never_below_what_the_tag_can_show():
    rng = np.random.default_rng(0)
    values = np.column_stack([np.round(np.cumsum(rng.standard_normal(3000)) * 0.001, 2), rng.standard_normal(3000)])
    record = Record.from_rows(values, [Tag("a"), Tag("b", decimals=1)], 10_000_000)
    method = plugin.open(plugin.fit(record, MlpParams(steps=20)), record.tags)
    assert method.contract.scale[0] >= 0.01 * (1 - 1e-6) and method.contract.scale[1] >= 0.1


def test_without_torch_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(PluginError, match=r"needs torch[\s\S]*opcua-detector\[train\]"):
        plugin.fit(rows_of("lorenz", 1, 1000), MlpParams())


@pytest.mark.parametrize("wrong", [{"window": 1}, {"noise": 1.0}, {"rate": 0.0}, {"steps": 0}])
def test_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        MlpParams(**wrong)


def test_the_command_of_the_readme_makes_a_graph_that_runs(tmp_path, capsys):
    files = []
    for seed in (7, 8):
        files.append(str(tmp_path / f"throttle-{seed}.csv"))
        subprocess.run([sys.executable, "-m", "sim_server", "csv", "--process", "throttle", "--rows", "1500", "--seed",
                        str(seed), "--out", files[-1]], check=True, capture_output=True)
    out = tmp_path / "made" / "throttle.onnx"
    assert main(["train", "--csv", *files, "--tags", "theta,u", "--steps", "20", "--out", str(out)]) == 0
    assert "trained on 3000 rows of theta, u" in capsys.readouterr().out
    record = read_rows([tmp_path / "throttle-7.csv"], [Tag("theta"), Tag("u")])
    assert record.period_ns == 20_000_000 and record.gap.tolist() == [1] + [0] * 1499
    method = OnnxPlugin().open(OnnxPlugin().fit(record, OnnxParams(str(out))), record.tags)
    assert np.isfinite(method.residuals(record)[method.memory:]).all()
    with pytest.raises(ModelTagsError):
        OnnxPlugin().fit(rows_of("lorenz", 1, 20), OnnxParams(str(out)))


@pytest.mark.parametrize(("lines", "text"), [
    (["source_ns,a", "1,2.0", "2,3.0"], "b"),
    (["source_ns,a,b", "1,2,x", "2,3,4"], "x"),
    (["source_ns,a,b", "2,2,2", "1,3,4"], "increase"),
    (["source_ns,a,b", "2,2,2"], "only one row"),
])
def test_a_csv_file_that_is_wrong_is_named(tmp_path, capsys, lines, text):
    path = tmp_path / "wrong.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert main(["train", "--csv", str(path), "--tags", "a,b", "--out", str(tmp_path / "x.onnx")]) == 3
    said = capsys.readouterr().err
    assert "wrong.csv" in said and text in said and not (tmp_path / "x.onnx").exists()


def test_rows_that_are_missing_in_a_csv_file_begin_a_gap(tmp_path):
    path = tmp_path / "holes.csv"
    rows = [f"{t * 10_000_000},{t},1" for t in range(20) if t not in (7, 8)]
    path.write_text("\n".join(["source_ns,a,b", *rows]) + "\n", encoding="utf-8")
    record = read_rows([path, path], [Tag("b"), Tag("a")])
    assert np.flatnonzero(record.gap).tolist() == [0, 7, 18, 25]
    assert record.values[:3].tolist() == [[1, 0], [1, 1], [1, 2]] and record.period_ns == 10_000_000


def test_the_sample_of_the_plugin_states_its_defaults():
    text = (Path(package.__file__).parent / "sample.yaml").read_text(encoding="utf-8")
    methods = yaml.safe_load(text)["methods"]
    registry = Registry()
    for method in methods:
        given = {key: value for key, value in method.items() if key != "name"}
        made = registry.params(method["name"], given)
        assert set(given) == {field.name for field in dataclasses.fields(made)}, "the sample states every key"
        if method["name"] == "mlp":
            assert made == MlpParams()
