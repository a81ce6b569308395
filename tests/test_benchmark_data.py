"""The benchmarks' loaders on small files of the same form, and their peers on rows with a known answer."""

from __future__ import annotations

import gzip
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from opcua_detector.errors import RecordError
from opcua_detector.metrics import auc
from tests.benchmarks.peers import (
    LAGS,
    RIDGE,
    CrossRidge,
    Forest,
    Lof,
    Mahalanobis,
    MlpForecaster,
    PcaT2Spe,
    RidgeVar,
    all_peers,
    delayed,
    judge,
    meets_reference,
    segments,
    trailing_mean,
)
from tests.benchmarks.public_data import (
    SKAB_RUNS,
    TEP_FAULTS,
    Case,
    asd_cases,
    data_folder,
    public_cases,
    simulated_cases,
    skab_cases,
    tep_cases,
)


def write_gz(file, head, rows):
    """Write a gzipped CSV file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wt", encoding="utf-8") as text:
        for row in [head, *rows]:
            text.write(",".join(str(one) for one in row) + "\n")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OPCUA_DETECTOR_DATA", str(tmp_path))
    return tmp_path


def test_skab_cases(folder):
    rows = [["anomaly-free/anomaly-free", "2020-02-08 13:30:47", 9, 9, 0, 0]]
    for run in range(SKAB_RUNS):
        onset = 30 if run == 3 else 450
        rows += [[f"valve1/{run}", f"2020-03-09 10:{t // 60:02d}:{t % 60:02d}", run, t, int(t >= onset), 0]
                 for t in range(500)]
    write_gz(folder / "skab_valve1" / "skab_valve1.csv.gz",
             ["run", "datetime", "a", "b", "anomaly", "changepoint"], rows)
    cases = list(skab_cases())
    assert [case.name for case in cases] == [f"valve1/{k}" for k in range(16)]
    assert [case.half for case in cases] == ["design"] * 8 + ["report"] * 8
    first, early = cases[0], cases[3]
    assert first.tags == ("a", "b") and first.period_s == 1.0
    assert (len(first.healthy), first.fit_rows, len(first.test), int(first.truth.sum())) == (400, 280, 100, 50)
    assert (len(early.healthy), early.fit_rows, int(early.truth.sum())) == (30, 21, 470)
    assert first.test[0].tolist() == [0.0, 400.0] and first.test_gap.sum() == 0
    assert first.test_times_s[0] - first.healthy_times_s[-1] == 1.0


def test_tep_cases(folder):
    names = ["d00"] * 5 + ["d00_te"] * 490
    fault = [0] * 495
    for number in TEP_FAULTS:
        names += [f"d{number:02d}"] * 2 + [f"d{number:02d}_te"] * 4
        fault += [number] * 2 + [0, 0, number, number]
    rows = [[name, 180 * t, t, -t, label] for t, (name, label) in enumerate(zip(names, fault, strict=True))]
    write_gz(folder / "tep" / "tep.csv.gz", ["run", "t_s", "XMEAS1", "XMV1", "fault"], rows)
    cases = list(tep_cases())
    assert [case.name for case in cases] == ["d00_te", *(f"d{n:02d}_te" for n in TEP_FAULTS)]
    assert [case.half for case in cases] == ["both"] + ["design"] * 6 + ["report"] * 7
    healthy, last = cases[0], cases[-1]
    assert len(healthy.test) == 10 and not healthy.truth.any() and healthy.test_gap[0] == 0
    assert (len(last.healthy), last.fit_rows) == (485, 5)
    assert np.flatnonzero(last.healthy_gap).tolist() == [0, 5]
    assert last.truth.tolist() == [0, 0, 1, 1] and last.test_gap.tolist() == [1, 0, 0, 0]
    assert all(case.healthy is healthy.healthy for case in cases)


def test_asd_cases_know_root_causes(folder):
    (folder / "asd").mkdir()
    for k in range(1, 7):
        label = np.zeros(20, np.uint8)
        label[4:7] = 1
        np.savez(folder / "asd" / f"omi-{k}.npz", train=np.zeros((10, 3), np.float32),
                 test=np.ones((20, 3), np.float32), label=label)
        (folder / "asd" / f"omi-{k}.interpretation.txt").write_text("4-6:1,3\n", encoding="utf-8")
    cases = list(asd_cases())
    assert [case.half for case in cases] == ["design"] * 3 + ["report"] * 3
    (cause,) = cases[5].causes
    assert cases[5].truth[cause.start:cause.stop].all() and cases[5].truth.sum() == cause.stop - cause.start
    assert cause.columns == (0, 2)


def test_missing_data_are_named(folder, monkeypatch):
    for data_set in ("skab", "tep", "asd"):
        with pytest.raises(RecordError, match="OPCUA_DETECTOR_DATA"):
            next(public_cases(data_set))
    with pytest.raises(RecordError, match="one of skab, tep, asd"):
        public_cases("smd")
    monkeypatch.setenv("OPCUA_DETECTOR_DATA", str(folder / "nowhere"))
    with pytest.raises(RecordError, match="nowhere"):
        data_folder()


def test_simulated_cases_and_their_clean_windows():
    (case,) = simulated_cases("lorenz", seeds=1, block_rows=300)
    assert len(case.healthy) == 300 and len(case.test) == 1500
    assert_array_equal(np.unique(case.block, return_counts=True)[1], [300] * 5)
    assert_array_equal(case.truth, np.repeat([0, 1, 0, 1, 1], 300))
    assert_array_equal(case.clean(100).reshape(5, 300), np.tile(np.arange(300) >= 140, (5, 1)))
    (noisy,) = simulated_cases("lorenz", seeds=1, block_rows=300, noise=0.01)
    assert_allclose((noisy.test - case.test).std(axis=0), [0.0795, 0.0852], rtol=0.1)


def plant(seed=0, n_test=600, fault_at=300):
    """Three tags: a slow wave with noise, its double delayed by one row, and noise; the second then loses its gain."""
    rng = np.random.default_rng(seed)
    n = 1500 + n_test
    a = np.convolve(rng.standard_normal(n + 9), np.ones(10) / 3, mode="valid")
    rows = np.column_stack([a, 2 * np.roll(a, 1) + 0.05 * rng.standard_normal(n), rng.standard_normal(n) * 40 + 500])
    rows[1500 + fault_at:, 1] *= 0.5
    truth = (np.arange(n_test) >= fault_at).astype(np.uint8)
    gap = np.zeros(1500, np.uint8)
    gap[0] = 1
    return Case("plant", "asd", "both", ("a", "b", "c"), 1.0, rows[:1500], 1000, gap, rows[1500:],
                np.zeros(n_test, np.uint8), truth, 6, 30)


def test_cross_ridge_is_the_regression_of_each_tag_on_the_others():
    rows = np.random.default_rng(1).standard_normal((200, 3)) @ [[1, 0.5, 0], [0, 1, 0.3], [0.2, 0, 1]]
    peer = CrossRidge()
    blocks = [block[LAGS:] for block in delayed(rows, peer.lags)]
    errors = peer.errors(peer.solve(blocks, blocks[0]), blocks, blocks[0])
    for i in range(3):
        own = [block[:, [i]] for block in blocks[1:]]
        others = [np.delete(block, i, axis=1) for block in blocks]
        x = np.column_stack([*own, *others, np.ones(len(blocks[0]))])
        weight = np.full(x.shape[1], RIDGE * len(x))
        weight[-1] = 0.0
        target = blocks[0][:, i]
        assert_allclose(errors[:, i], target - x @ np.linalg.solve(x.T @ x + np.diag(weight), x.T @ target), atol=1e-9)


def test_a_peer_finds_what_it_looks_at():
    case = plant()
    for peer in (CrossRidge(), CrossRidge(refitted=True), RidgeVar(), RidgeVar(refitted=True), MlpForecaster(3)):
        ((_, judged),) = judge(peer, [case])
        assert auc(judged.score, case.truth) > 0.97, peer.name
        assert judged.alert[case.truth == 0].mean() < 0.05, peer.name
        assert judged.alert[case.truth == 1].mean() > 0.5, peer.name
    jump = replace(case, test=case.healthy[-600:] + np.outer(case.truth, [30.0, -60.0, 400.0]))
    for point in (Mahalanobis(), PcaT2Spe(), Forest(), Lof()):
        ((_, judged),) = judge(point, [jump])
        assert auc(judged.score, jump.truth) > 0.97, point.name


def test_peers_are_causal_and_see_the_rows_before():
    case = plant()
    for peer in all_peers()[:-1]:  # the last one is random
        ((_, whole),) = judge(peer, [case])
        ((_, part),) = judge(peer, [replace(case, test=case.test[:200], truth=case.truth[:200],
                                            test_gap=case.test_gap[:200])])
        assert_allclose(part.score, whole.score[:200], rtol=1e-9, err_msg=peer.name)
        assert part.limit == whole.limit
    cold = replace(case, test_gap=np.r_[np.uint8(1), case.test_gap[1:]])
    ((_, warm),), ((_, fresh),) = judge(RidgeVar(), [case]), judge(RidgeVar(), [cold])
    assert fresh.score[0] != warm.score[0]
    assert_allclose(fresh.score[9:], warm.score[9:], rtol=1e-9)  # memory 3 and smoothing 6 are over


def test_the_calibration_rows_are_not_learnt():
    case = plant()
    changed = replace(case, healthy=np.concatenate([case.healthy[:1000], case.healthy[1000:] * 3]))
    ((_, one),), ((_, other),) = judge(RidgeVar(), [case]), judge(RidgeVar(), [changed])
    # Same weights, another scale of each tag: only tag-wise factors and the context rows differ.
    assert other.limit != one.limit
    cut = replace(case, test_gap=np.r_[np.uint8(1), case.test_gap[1:]])
    point = [next(iter(judge(Mahalanobis(), [replace(cut, healthy=c.healthy)])))[1] for c in (case, changed)]
    assert_array_equal(point[0].score, point[1].score)
    assert point[1].limit > point[0].limit


def test_a_constant_tag_is_left_out():
    case = plant()
    stuck = replace(case, healthy=case.healthy * [1, 1, 0] + [0, 0, 7], test=case.test * [1, 1, 0] + [0, 0, 8])
    two = replace(case, healthy=case.healthy[:, :2], test=case.test[:, :2], tags=("a", "b"))
    for peer in (CrossRidge(), Mahalanobis()):
        ((_, a),), ((_, b),) = judge(peer, [stuck]), judge(peer, [two])
        assert_allclose(a.score, b.score, rtol=1e-9)


def test_helpers():
    assert_allclose(trailing_mean(np.array([4.0, 2, 0, 1]), 2), [4, 3, 1, 0.5])
    assert segments(np.array([1, 0, 0, 1, 0], np.uint8)) == [(0, 3), (3, 5)]
    assert segments(np.array([0, 0, 1], np.uint8)) == [(0, 2), (2, 3)]
    assert meets_reference("skab", "Mahalanobis", 0.765, 0.799) is True
    assert meets_reference("skab", "Mahalanobis", 0.765, 0.800) is False
    assert meets_reference("skab", "LOF", 0.5, 0.5) is None
