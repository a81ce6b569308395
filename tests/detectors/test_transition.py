"""What the method `transition` promises: the paper's counts, stream = batch = oracle, masks, gaps, no surprises."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from opcua_detector.api import Channel, Method, MethodModel, Plugin, Record, Tag, TagKind
from opcua_detector.detectors.transition import TransitionParams, TransitionPlugin, paper_score
from opcua_detector.detectors.transition_fit import choose_partners, quantile_edges
from opcua_detector.errors import ConfigError, ModelTagsError, RecordError
from opcua_detector.kernels.bounds import reduce_vectors
from opcua_detector.kernels.transition import level_of
from sim_server.processes import make, run_schedule
from tests import oracle

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("OPCUA_DETECTOR_DATA", ROOT.parent / "shared" / "data"))
PERIOD_NS = 10_000_000
PLUGIN = TransitionPlugin()


def fit(record, **params):
    return PLUGIN.fit(record, TransitionParams(**params))


def opened(record, **params):
    return PLUGIN.open(fit(record, **params), record.tags)


def streamed(method, record):
    """Residuals of a record given row by row, with a reset at each gap as the engine does."""
    out = np.full((len(record), len(method.channels)), np.nan)
    method.reset()
    for k in range(len(record)):
        if record.gap[k]:
            method.reset()
        method.update(record.values[k], record.valid[k])
        out[k] = method.residual
    return out


def of_kind(method, residuals, kind):
    return residuals[:, [k for k, channel in enumerate(method.channels) if channel.kind == kind]]


def waves(n, n_columns=3, seed=0, noise=0.05):
    """Coupled slow waves with noise: float64[n, n_columns]."""
    rng = np.random.default_rng(seed)
    t = np.arange(n)[:, None]
    speed, phase = rng.uniform(0.05, 0.3, n_columns), rng.uniform(0, 6, n_columns)
    return np.sin(speed * t + phase) * (1 + np.arange(n_columns)) + noise * rng.standard_normal((n, n_columns))


def record_of(values, tags=None, **kwargs):
    return Record.from_rows(values, tags or [f"t{k}" for k in range(values.shape[1])], PERIOD_NS, **kwargs)


@pytest.fixture(scope="module")
def lorenz():
    """20 000 healthy rows of the simulated Lorenz process, off the start."""
    return record_of(make("lorenz", seed=3).simulate(21_000)[1000:], ["x1", "x3"])


# -- the paper ----------------------------------------------------------------------------------------------


def test_the_authors_lorenz_file_gives_the_papers_281_and_311_transitions():
    path = DATA / "lorenz" / "df_train.csv.gz"
    if not path.exists():
        pytest.skip("needs the shared data folder")
    with gzip.open(path, "rt") as rows:
        values = np.array([[float(row["x1"]), float(row["x3"])] for row in csv.DictReader(rows)])
    table = fit(record_of(values, ["x1", "x3"]), levels=20, step=20).arrays["table"]
    assert (table >= 0).sum(axis=1).tolist() == [281, 311]


def test_on_the_papers_lorenz_blocks_the_three_residuals_separate_healthy_from_faulty():
    window, rows = 100, 20_001
    run = run_schedule("lorenz", seed=0)
    record = record_of(run.measured, ["x1", "x3"])
    training = record.rows(0, rows)
    held_out = [
        opened(training.take(np.r_[0:a, b:rows]), levels=20).paper_residuals(training.rows(a, b), window)
        for a, b in ((k * rows // 5, (k + 1) * rows // 5) for k in range(5))
    ]
    tested = opened(training, levels=20).paper_residuals(record, window)
    fused = np.zeros(len(record) - rows)
    for kind in range(3):
        healthy = np.concatenate([fold[kind][window:] for fold in held_out])
        fused += (tested[kind][rows:] - healthy.mean()) / healthy.std()
    assert area_under_roc(run.labels[rows:], fused) >= 0.93
    assert area_under_roc(run.labels[rows:], tested[1][rows:]) >= 0.93


def area_under_roc(labels, scores):
    """Probability that a faulty row scores above a healthy one."""
    order = np.argsort(scores, kind="stable")
    rank = np.empty(len(scores))
    rank[order] = np.arange(1, len(scores) + 1)
    positive = labels != 0
    n, m = positive.sum(), (~positive).sum()
    return (rank[positive].sum() - n * (n + 1) / 2) / (n * m)


def test_healthy_training_rows_have_no_unseen_transition_no_excess_and_are_covered(lorenz):
    method = opened(lorenz)
    residuals = method.residuals(lorenz)[method.memory - 1 :]
    assert np.isfinite(residuals).all()
    assert_array_equal(of_kind(method, residuals, "trans"), 0.0)
    assert_array_equal(of_kind(method, residuals, "bound"), 0.0)
    assert of_kind(method, residuals, "conf").max() <= max(0.01, method.model.arrays["cover"].max()) + 1e-6


def test_faithful_differs_from_the_default_as_decided(lorenz):
    corrected, faithful = fit(lorenz, levels=20, max_vectors=0), fit(lorenz, faithful=True)
    assert_array_equal(corrected.arrays["table"], faithful.arrays["table"])
    # raw values: bounds are those of the default in engineering units
    a, f = corrected.arrays, faithful.arrays
    assert_array_equal(f["mean"], 0.0)
    assert_array_equal(f["inverse"], 1.0)
    x1 = a["partners"][0].tolist().index(0)
    assert_allclose(a["lo"][:, x1] / a["inverse"][0] + a["mean"][0], f["lo"][:, x1], rtol=0, atol=1e-9)
    # remover: pairwise less than eta in absolute value, so a mirrored shape is dropped
    largest = np.zeros(2)
    for k, arrays in enumerate((a, f)):
        for first, last in zip(arrays["pointers"][:-1], arrays["pointers"][1:], strict=True):
            v = arrays["vectors"][first:last].astype(float)
            pairs = np.abs(v @ v.T) - np.eye(len(v))
            largest[k] = max(largest[k], pairs.max(initial=0.0))
    assert largest[0] > 0.99 > largest[1] - 1e-6


def test_the_default_does_not_depend_on_units_and_the_faithful_mode_does(lorenz):
    other = record_of(lorenz.values * [1000.0, 0.02] + [5.0, -300.0], ["x1", "x3"])
    faulty = make("lorenz", seed=9)
    faulty.set_factor("beta", 1.25)
    x = faulty.simulate(3000)
    y = x * [1000.0, 0.02] + [5.0, -300.0]
    for faithful in (False, True):
        one = opened(lorenz, faithful=faithful).residuals(record_of(x, ["x1", "x3"]))
        two = opened(other, faithful=faithful).residuals(record_of(y, ["x1", "x3"]))
        difference = np.nanmax(np.abs(one - two))
        assert difference > 0.1 if faithful else difference < 1e-5


def test_paper_residuals_are_window_means_over_sensors_and_rows():
    values = waves(400, 3)
    method = opened(record_of(values), step=3, levels=4)
    live = record_of(waves(120, 3, seed=5), valid=(np.random.default_rng(1).random((120, 3)) > 0.05).astype(np.uint8))
    residuals, window = method.residuals(live), 17
    for kind, found in zip(("trans", "bound", "conf"), method.paper_residuals(live, window), strict=True):
        for n in range(len(live)):
            part = of_kind(method, residuals, kind)[max(0, n - window + 1) : n + 1]
            expected = np.nanmean(part) if np.isfinite(part).any() else np.nan
            assert_allclose(found[n], expected, rtol=1e-12, atol=1e-15)


def test_the_papers_aggregation_leaves_out_a_residual_that_is_zero_on_healthy_rows():
    zero = np.zeros(3)
    tested = np.array([9.0, 9.0]), np.array([5.0, 5.0]), np.array([0.2, 0.8])
    assert_array_equal(paper_score((zero, zero, np.array([0.1, 0.2, 0.4])), tested), [0.5, 2.0])
    assert_array_equal(paper_score((zero, zero, zero), tested), [0.0, 0.0])


# -- quantiser ----------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(-3, 3).map(lambda x: round(x, 1)), min_size=1, max_size=12), st.floats(-4, 4))
def test_level_is_the_number_of_thresholds_below(edges, x):
    edges = np.sort(np.array(edges))
    for value in (x, round(x, 1), *edges):
        assert level_of(value, edges, 0, len(edges)) == oracle.level_of(value, edges)
        assert level_of(value, edges, 0, len(edges)) == np.searchsorted(edges, value, side="left")


def test_levels_are_filled_equally_and_a_threshold_belongs_to_the_level_below():
    x = np.random.default_rng(0).permutation(np.arange(1000.0))
    edges = quantile_edges(x, 20)
    assert_array_equal(np.bincount(np.searchsorted(edges, x, side="left")), 50)
    assert level_of(2.0, np.array([1.0, 2.0, 3.0]), 0, 3) == 1


def test_a_value_that_is_there_nine_times_in_ten_does_not_break_the_levels():
    rng = np.random.default_rng(0)
    x = np.where(rng.random(4000) < 0.9, 7.0, rng.uniform(0, 20, 4000))
    method = opened(record_of(np.column_stack([x, waves(4000, 1)[:, 0]])), step=2)
    residuals = method.residuals(record_of(np.column_stack([x, waves(4000, 1)[:, 0]])))
    assert np.nanmax(of_kind(method, residuals, "trans")) == 0.0
    assert np.nanmax(of_kind(method, residuals, "bound")) == 0.0


# -- reduced set of vectors ---------------------------------------------------------------------------------


def run_reduce(unit, eta, most, farthest, absolute):
    best, kept = np.empty(len(unit)), np.empty(most or len(unit), np.int32)
    n = reduce_vectors(unit, len(unit), 0, eta, most or len(unit), farthest, absolute, best, kept)
    return kept[:n].tolist(), best


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(2, 5), st.sampled_from([0.3, 0.9, 0.99]),
       st.sampled_from([0, 1, 3, 10]), st.booleans(), st.booleans())
def test_reduced_vectors_equal_the_twin_and_cover_all(seed, n, n_e, eta, most, farthest, absolute):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, n_e))[rng.integers(0, n, n)]  # some rows twice: ties
    unit = np.array([oracle.centre(row)[0] / oracle.centre(row)[1] for row in w], np.float32)
    kept, best = run_reduce(unit, eta, most, farthest, absolute)
    expected, expected_best = oracle.reduce_vectors(unit, eta, most, farthest, absolute)
    assert kept == expected
    v = unit[kept].astype(float)
    sign = np.abs if absolute else np.asarray
    assert np.max(sign(v @ v.T) - 2 * np.eye(len(kept)), initial=-1.0) < eta
    if not most:
        assert np.max(sign(unit.astype(float) @ v.T), axis=1).min() >= eta
    if farthest:
        assert_allclose(best, expected_best, atol=1e-6)
    else:  # a covered vector needs no exact distance: it must only know that it is covered
        assert_array_equal(best >= eta, np.array(expected_best) >= eta)


# -- fit, stream and batch against the oracle ---------------------------------------------------------------


@st.composite
def situations(draw):
    """A healthy record, a live record with gaps, masks, NaN and unseen values, and parameters."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    n_columns = draw(st.integers(1, 4))
    decimals = draw(st.sampled_from([0, 1, 6]))  # few decimals: ties, plateaus, constant vectors
    kinds = [TagKind.MEASURED] + [draw(st.sampled_from([TagKind.MEASURED, TagKind.SETPOINT]))
                                  for _ in range(n_columns - 1)]
    tags = [Tag(f"t{k}", kind=kind) for k, kind in enumerate(kinds)]

    def record(n, amplitude):
        values = (waves(n, n_columns, seed=int(rng.integers(100))) * amplitude).round(decimals)
        valid = (rng.random(values.shape) > draw(st.sampled_from([0.0, 0.0, 0.03, 0.2]))).astype(np.uint8)
        gap = np.zeros(n, np.uint8)
        gap[[k % n for k in draw(st.lists(st.integers(0, 10**4), max_size=4))]] = 1
        return Record.from_rows(values, tags, PERIOD_NS, valid=valid, gap=gap)

    params = TransitionParams(
        levels=draw(st.integers(2, 5)), step=draw(st.integers(1, 5)), eta=draw(st.sampled_from([0.8, 0.99])),
        nu=draw(st.sampled_from([1.0, 2.0])), max_vectors=draw(st.sampled_from([0, 2, 32])),
        partners=draw(st.sampled_from([0, 1])), faithful=draw(st.booleans()), affine=draw(st.booleans()),
        affine_ridge=draw(st.sampled_from([0.0, 1e-3, 10.0])),
    )
    return record(160, 1.0), record(80, draw(st.sampled_from([1.0, 1.5]))), params


@settings(max_examples=80, deadline=None, derandomize=True)
@given(situations())
def test_stream_equals_batch_equals_oracle_over_gaps_masks_and_several_intervals(situation):
    healthy, live, params = situation
    try:
        model = PLUGIN.fit(healthy, params)
    except RecordError as problem:
        assert "rows without a gap" in str(problem)
        return
    method = PLUGIN.open(model, healthy.tags)
    batch = method.residuals(live)
    assert_array_equal(streamed(method, live), batch)
    expected = oracle.score_rows(model, live.values, live.valid, live.gap)
    assert_array_equal(np.isnan(batch), np.isnan(expected))
    assert not np.isinf(batch).any()
    assert_allclose(batch, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(situations())
def test_what_is_learnt_equals_the_twin(situation):
    healthy, _, params = situation
    try:
        model = PLUGIN.fit(healthy, params)
    except RecordError:
        return
    a, first = model.arrays, 0
    z = np.where(healthy.valid != 0, (healthy.values - a["mean"]) * a["inverse"], 0.0)
    for i, own in enumerate(np.flatnonzero(a["judged"])):
        learnt = oracle.learn_sensor(healthy, own, z, a["edges"][i], a["partners"][i], params)
        assert np.flatnonzero(a["table"][i] >= 0).tolist() == [one[0] for one in learnt]
        for code, instants, lo, hi, unit in learnt:
            row = a["table"][i, code]
            assert row == first and a["instants"][row] == instants
            assert_array_equal(a["lo"][row], lo)
            assert_array_equal(a["hi"][row], hi)
            vectors = a["vectors"][a["pointers"][row] : a["pointers"][row + 1]]
            assert_reduced(vectors, np.array(unit), a["cover"][row], params)
            first += 1
    assert first == len(a["lo"])


def assert_reduced(vectors, unit, cover, params):
    """The kept vectors are some of `unit`, pairwise less than eta correlated, and cover all others."""
    assert bool(len(vectors)) == bool(len(unit))
    if not len(unit):
        return
    sign = np.abs if params.faithful else np.asarray
    correlation = sign(vectors.astype(float) @ unit.T.astype(float))
    assert correlation.max(axis=1).min() > 1 - 1e-6
    assert np.max(sign(vectors @ vectors.T) - 2 * np.eye(len(vectors))) < params.eta + 1e-6
    if params.faithful or len(vectors) < (params.max_vectors or 10**9):
        assert correlation.max(axis=0).min() >= params.eta - 1e-6
    else:
        assert len(vectors) == params.max_vectors
    if not params.faithful:
        assert_allclose(cover, 1 - min(1.0, correlation.max(axis=0).min()), atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(situations())
def test_the_affine_maps_equal_the_twin(situation):
    healthy, _, params = situation
    params = dataclasses.replace(params, faithful=False, affine=True, affine_ridge=params.affine_ridge or 1e-2)
    try:
        model = PLUGIN.fit(healthy, params)
    except RecordError:
        return
    a = model.arrays
    z, _ = oracle.scaled_rows(model, healthy.values, healthy.valid)
    for i, own in enumerate(np.flatnonzero(a["judged"])):
        by_code = oracle.instants_of(healthy, own, a["edges"][i], a["partners"][i], params)
        instants = [by_code[code] for code in sorted(by_code)]
        general, maps, spread = oracle.learn_maps(z, own, a["partners"][i], params.step, instants, params.affine_ridge)
        rows = a["table"][i][a["table"][i] >= 0]
        assert_allclose(a["general"][i], general, atol=1e-7)
        assert_allclose(a["maps"][rows], maps, atol=1e-7)
        assert_allclose(a["spread"][rows], spread, atol=1e-8)
        cut = int(0.8 * len(healthy))
        before, after, every = cut - params.step, cut + params.step - 1, np.concatenate(instants)
        if (every < before).any() and (every >= after).any():
            errors = oracle.hold_out(
                z, own, a["partners"][i], params.step, instants, before, after, params.affine_ridge, 1e-9)[1]
            clipped = np.minimum(np.abs(errors), np.quantile(np.abs(errors), 0.99))
            expected = max(np.sqrt(np.mean(clipped**2)), a["resolution"][own] / 12**0.5)
            assert a["usual"][i] == pytest.approx(expected, abs=1e-7)


def test_levels_and_ridge_are_those_with_the_lowest_held_out_error_by_the_slow_way():
    record = record_of(waves(1200, 2, seed=4, noise=0.02))
    model = fit(record, step=3)
    columns = {name: model.arrays[name] for name in ("mean", "inverse", "resolution")}
    z = (record.values - columns["mean"]) * columns["inverse"]
    errors, unseen = {}, {}
    for levels in (8, 12, 16, 20, 30, 40, 60):
        for ridge in [10.0**k for k in range(-8, 3)]:
            found = []
            for i in range(2):
                edges = quantile_edges(record.values[:960, i], levels)
                params = TransitionParams(levels=levels, step=3)
                by_code = oracle.instants_of(record, i, edges, [0, 1], params)
                floor = max(1e-9, columns["resolution"][i] / 12**0.5)
                found.append((oracle.hold_out(z, i, [0, 1], 3, list(by_code.values()), 957, 962, ridge, floor)[0],
                              oracle.unseen_share(by_code, 1200, 3)))
            errors[levels, ridge] = sum(one[0] for one in found)
            unseen[levels] = sum(one[1] for one in found) / 2
    lowest = max(0.005, 1.5 * min(unseen.values()))
    best = min((key for key in errors if unseen[key[0]] <= lowest), key=errors.get)
    assert 1 <= sum(one <= lowest for one in unseen.values()) < 7  # the rate of unseen transitions decides too
    assert (model.params["levels"], model.params["affine_ridge"]) == best


def test_what_was_chosen_is_in_the_models_parameters_and_repeats_the_model(lorenz):
    model = fit(lorenz)
    assert model.params["levels"] >= 12 and 0 < model.params["affine_ridge"] <= 1e-4  # free of noise
    again = PLUGIN.fit(lorenz, TransitionParams(**model.params))
    assert again.params == model.params
    assert again.arrays.keys() == model.arrays.keys()
    for name, array in model.arrays.items():
        assert_array_equal(again.arrays[name], array)


def test_without_the_affine_channel_the_other_channels_stay_what_they_are(lorenz):
    whole, without = opened(lorenz), opened(lorenz, affine=False)
    assert without.params.levels == whole.params.levels
    assert_array_equal(without.residuals(lorenz), whole.residuals(lorenz)[:, :6])
    assert not {"maps", "general", "usual", "spread"} & without.model.arrays.keys()
    assert fit(lorenz, faithful=True).params["levels"] == 20


def test_with_noise_the_maps_are_drawn_further_to_the_general_one():
    clean = make("lorenz", seed=3).simulate(13_000)[1000:]
    noisy = clean + 0.05 * clean.std(axis=0) * np.random.default_rng(0).standard_normal(clean.shape)
    ridges = [fit(record_of(rows)).params["affine_ridge"] for rows in (clean, noisy)]
    assert ridges[1] >= 1e3 * ridges[0]


def test_a_small_fault_inside_all_bounds_is_seen_by_the_affine_channel():
    rng = np.random.default_rng(1)
    k = np.arange(8000)
    x = np.sin(0.03 * k) + 0.5 * np.sin(0.071 * k)
    rows = np.column_stack([x, 2.0 * x]) + 0.01 * rng.standard_normal((8000, 2))
    method = opened(record_of(rows[:7000]), levels=8)
    live = rows[7000:].copy()
    live[500:, 1] += 0.1  # 5 % of its amplitude
    residuals = method.residuals(record_of(live))
    bound, affine = (of_kind(method, residuals, kind)[:, 1] for kind in ("bound", "affine"))
    healthy, faulty = slice(method.memory, 500), slice(550, None)
    assert np.mean(affine[faulty]) > 2.0 * np.mean(affine[healthy])
    assert np.median(bound[faulty]) == 0.0


def test_a_map_looks_back_32_rows_at_most():
    record = record_of(waves(900, 2))
    maps = fit(record, step=50, levels=4, affine_ridge=1e-2).arrays["maps"]
    assert maps.shape[1] == 2 + 49 + 1
    assert_array_equal(maps[:, 2 : 2 + 17], 0.0)
    assert np.abs(maps[:, 2 + 17 : -1]).min(axis=1).max() > 0.0


def test_many_sensors_are_configured_on_some_of_them_and_the_model_stays_small():
    rng = np.random.default_rng(0)
    record = record_of(waves(3000, 5) @ rng.standard_normal((5, 60)) + 0.05 * rng.standard_normal((3000, 60)))
    model = fit(record)
    assert model.params["levels"] in (8, 12, 16, 20) and model.params["affine_ridge"] > 1e-6
    assert sum(array.nbytes for array in model.arrays.values()) < 10 * record.values.nbytes


def test_no_transition_is_learnt_across_a_gap():
    low, high = waves(300, 1, seed=1), waves(300, 1, seed=2) + 50
    gap = np.zeros(600, np.uint8)
    gap[300] = 1
    apart, joined = (fit(record_of(np.vstack([low, high]), gap=g), levels=2, step=4) for g in (gap, 0 * gap))
    assert (apart.arrays["table"][0] >= 0).tolist() == [True, False, False, True]
    assert (joined.arrays["table"][0] >= 0).tolist() == [True, True, False, True]


def test_the_first_verdict_comes_after_memory_rows_and_again_after_a_reset():
    values = waves(500, 2)
    method = opened(record_of(values), step=6)
    assert (method.lag, method.memory) == (6, 12)
    gap = np.zeros(60, np.uint8)
    gap[25] = 1
    residuals = streamed(method, record_of(values[:60], gap=gap))
    known = np.isfinite(residuals).all(axis=1)
    assert_array_equal(known, [11 <= k < 25 or k >= 36 for k in range(60)])
    assert np.isnan(residuals[~known]).all()


def test_a_batch_leaves_the_stream_alone():
    values = waves(300, 2)
    record = record_of(values)
    one, two = opened(record, step=4), opened(record, step=4)
    for k in range(100):
        one.update(values[k], record.valid[k])
        two.update(values[k], record.valid[k])
        if k % 7 == 0:
            two.residuals(record.rows(0, 50))
            two.explain(values[:40], record.valid[:40], record.source_ns[:40], 20)
        assert_array_equal(one.residual, two.residual)


# -- masks and odd values -----------------------------------------------------------------------------------


def test_one_bad_tag_does_not_poison_the_others():
    healthy, live = record_of(waves(2000, 4)), record_of(waves(300, 4))
    method = opened(healthy, levels=20)
    clean = method.residuals(live)
    mask = live.valid.copy()
    mask[100:200, 2] = 0
    values = np.where(mask, live.values, 1e9)  # whatever stands under a mask must not matter
    masked = method.residuals(dataclasses.replace(live, values=values, valid=mask))
    others = [0, 1, 3]
    assert_array_equal(of_kind(method, masked, "trans")[:, others], of_kind(method, clean, "trans")[:, others])
    assert np.isfinite(masked[method.memory - 1 :][:, [k for k in range(16) if k % 4 != 2]]).all()
    # bound, conf and affine of the others hardly move: the missing component carried nothing here
    change = np.abs(masked - clean)[method.memory - 1 :].reshape(-1, 4, 4)[:, 1:][:, :, others]
    assert change[:, :2].max() < 0.05 and change[:, 2].max() < 0.3
    # its own map gives no verdict until its own past is whole again
    own = of_kind(method, masked, "affine")[:, 2]
    assert np.isnan(own[200 : 200 + 2 * method.lag - 2]).all() and np.isfinite(own[200 + 2 * method.lag :]).all()
    lost = np.isnan(masked[:, 2])
    rows = np.arange(300)
    at_t = (rows - method.lag >= 100) & (rows - method.lag < 200)
    assert_array_equal(lost, (rows < method.memory - 1) | at_t | ((rows >= 100) & (rows < 200)))


def test_bound_and_conf_are_silent_where_fewer_than_half_of_the_components_are_left():
    record = record_of(waves(600, 2))
    method = opened(record, step=10)  # 2 partners and 9 own past values
    mask = record.valid.copy()
    mask[40:46, 0] = 0
    residuals = method.residuals(dataclasses.replace(record, valid=mask))
    at = 46 + method.lag  # judges t = 46: 6 of the 9 past values are masked, 5 of 11 components are left
    assert residuals[at, 0] == 0.0
    assert np.isnan(residuals[at, [2, 4]]).all()
    assert np.isfinite(residuals[at + 4, [2, 4]]).all()  # t = 50: five are masked, six are left
    assert np.isfinite(residuals[at, [1, 3, 5]]).all()


def test_the_count_of_bad_values_in_the_memory_is_exact_so_that_clean_rows_take_the_short_way():
    record = record_of(waves(200, 3))
    method = opened(record, step=4)
    rng = np.random.default_rng(0)
    valid = (rng.random((200, 3)) > 0.2).astype(np.uint8)
    valid[150:] = 1
    since = 0
    for k in range(200):
        if k in (40, 43, 100):
            method.reset()
            since = k
        method.update(record.values[k], valid[k])
        window = valid[max(since, k + 1 - method.memory) : k + 1]
        assert method._memory[2] == (window == 0).sum()
    assert method._memory[2] == 0


def test_nan_and_infinity_that_claim_to_be_valid_are_treated_as_masked():
    record = record_of(waves(500, 2))
    method = opened(record, step=4)
    values = record.values[:80].copy()
    mask = np.ones(values.shape, np.uint8)
    hidden = mask.copy()
    for row, value in ((30, np.nan), (45, np.inf), (60, -np.inf)):
        values[row, 1] = value
        hidden[row, 1] = 0
    claimed, masked = (
        streamed(method, dataclasses.replace(record.rows(0, 80), values=values, valid=m)) for m in (mask, hidden)
    )
    assert_array_equal(claimed, masked)
    assert not np.isinf(claimed).any()


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("nu", [1.0, 4.0])
def test_the_largest_numbers_there_are_give_finite_residuals(faithful, nu):
    record = record_of(waves(400, 2))
    method = opened(record, step=4, faithful=faithful, nu=nu)
    values = record.values[:60].copy()
    values[20:22, 0] = 1.7e308
    values[30, 1] = -1.7e308
    values[40:, 0] = 5e-324
    residuals = streamed(method, dataclasses.replace(record.rows(0, 60), values=values))
    assert np.isfinite(residuals[method.memory - 1 :]).all()


def test_a_column_that_never_moved_in_healthy_data_is_inert():
    values = waves(1000, 3)
    values[:, 1] = 4.2
    method = opened(record_of(values))
    live = values[:200].copy()
    live[100:, 1] = 1000.0
    residuals = method.residuals(record_of(live))
    quiet = method.residuals(record_of(values[:200]))
    assert_array_equal(residuals, quiet)
    assert np.nanmax(residuals[:, [1, 4]]) == 0.0


def test_a_tag_recorded_with_fewer_decimals_than_before_does_not_hold_a_residual_up():
    rng = np.random.default_rng(2)
    wave = waves(4000, 1)[:, 0]
    nearly_constant = 20.0 + 2e-4 * rng.standard_normal(4000)
    tags = [Tag("a"), Tag("b", decimals=2)]
    method = opened(record_of(np.column_stack([wave, nearly_constant]), tags))
    coarse = np.column_stack([wave, nearly_constant.round(2)])[:1000]
    residuals = method.residuals(record_of(coarse, tags))
    assert np.nanmean(of_kind(method, residuals, "bound")) < 0.02


def test_the_resolution_is_taken_from_the_record_where_the_tag_does_not_say():
    values = waves(3000, 2)
    values[:, 1] = 0.0
    values[1500, 1] = 5.0  # moved once: the standard deviation alone would make any move 55 widths
    arrays = fit(record_of(values)).arrays
    assert arrays["inverse"][1] == pytest.approx(1 / 5.0)
    assert arrays["tolerance"][1] == pytest.approx(1.0)


# -- columns, partners, model -------------------------------------------------------------------------------


def test_only_judged_columns_have_channels_and_the_others_still_take_part():
    rng = np.random.default_rng(0)
    state = np.repeat(rng.integers(0, 2, 60), 50).astype(float)
    x = np.where(state > 0, 10.0, 0.0) + 0.1 * rng.standard_normal(3000)
    tags = [Tag("mode", kind=TagKind.STATE), Tag("x"), Tag("command", kind=TagKind.COMMAND)]
    values = np.column_stack([state, x, waves(3000, 1)[:, 0]])
    method = opened(record_of(values, tags), step=3)
    assert method.channels == tuple(Channel("x", "x", kind) for kind in ("trans", "bound", "conf", "affine"))
    wrong = values.copy()
    wrong[:, 0] = 1.0 - wrong[:, 0]
    assert np.nanmean(method.residuals(record_of(wrong, tags))[:, 1]) > 0.05
    assert np.nanmax(method.residuals(record_of(values, tags))[:, 1]) == 0.0


def test_channels_are_ordered_by_kind_then_column_and_the_protocols_hold():
    kinds = ("trans", "bound", "conf", "affine")
    for params, expected in (({}, kinds), ({"affine": False}, kinds[:3]), ({"faithful": True}, kinds[:3])):
        method = opened(record_of(waves(300, 2)), **params)
        assert [(c.kind, c.column) for c in method.channels] == [(k, name) for k in expected for name in ("t0", "t1")]
    assert isinstance(method, Method) and isinstance(PLUGIN, Plugin)


def test_columns_may_come_in_another_order_and_with_others_between():
    record = record_of(waves(800, 3))
    model = fit(record, step=5)
    live = record_of(waves(200, 3, seed=4))
    expected = PLUGIN.open(model, record.tags).residuals(live)
    tags = [Tag("other"), Tag("t2"), Tag("t0"), Tag("t1")]
    moved = record_of(np.column_stack([np.full(200, 9.0), live.values[:, [2, 0, 1]]]), tags)
    method = PLUGIN.open(model, tags)
    assert [c.column for c in method.channels[:3]] == ["t0", "t1", "t2"]
    assert_array_equal(method.residuals(moved), expected)
    assert_array_equal(streamed(method, moved), expected)


def test_a_missing_column_is_named():
    model = fit(record_of(waves(300, 3)))
    with pytest.raises(ModelTagsError, match="fitted with t1"):
        PLUGIN.open(model, [Tag("t0"), Tag("t2")])
    with pytest.raises(RecordError, match="2 columns"):
        PLUGIN.open(model, [Tag("t0"), Tag("t1"), Tag("t2")]).residuals(record_of(waves(50, 2)))


def test_with_many_columns_a_sensor_sees_itself_and_its_most_correlated_partners():
    rng = np.random.default_rng(0)
    hidden = waves(2000, 4, seed=7)
    values = hidden[:, np.arange(24) % 4] + 0.3 * rng.standard_normal((2000, 24))
    partners = fit(record_of(values), partners=5).arrays["partners"]
    for i in range(24):
        assert set(partners[i]) == {k for k in range(24) if k % 4 == i % 4}
    assert fit(record_of(values)).arrays["partners"].shape == (24, 7)
    assert fit(record_of(values[:, :16])).arrays["partners"].shape == (16, 16)
    assert fit(record_of(values), faithful=True).arrays["partners"].shape == (24, 24)
    assert_array_equal(choose_partners(values.T, np.array([3]), 99)[0], np.arange(24))


def test_a_model_is_plain_arrays_and_survives_npz_and_json():
    record, live = record_of(waves(500, 3)), record_of(waves(200, 3, seed=8))
    model = fit(record)
    buffer = io.BytesIO()
    np.savez(buffer, **model.arrays)
    buffer.seek(0)
    with np.load(buffer, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    for array in arrays.values():
        array.flags.writeable = False
    again = MethodModel(model.plugin, model.columns, model.period_ns, json.loads(json.dumps(model.params)), arrays)
    assert_array_equal(PLUGIN.open(again, record.tags).residuals(live), PLUGIN.open(model, record.tags).residuals(live))


def test_bounds_can_be_widened_and_vectors_appended_in_the_model():
    record = record_of(waves(1500, 2))
    model = fit(record, step=4, levels=20)
    live = record_of(waves(300, 2) * 1.3)
    before = PLUGIN.open(model, record.tags).residuals(live)
    a = model.arrays
    wide = {**a, "lo": a["lo"] - 10, "hi": a["hi"] + 10}
    widened = PLUGIN.open(dataclasses.replace(model, arrays=wide), record.tags).residuals(live)
    assert np.nanmax(before[:, 2:4]) > 0.0 and np.nanmax(widened[:, 2:4]) == 0.0
    assert_array_equal(before[:, [0, 1, 4, 5, 6, 7]], widened[:, [0, 1, 4, 5, 6, 7]])
    known = (before[:, 0] == 0.0) & (before[:, 4] > 0.02)
    n = int(np.flatnonzero(known)[0])
    z = (live.values - a["mean"]) * a["inverse"]
    t = n - 4
    code = oracle.level_of(live.values[t, 0], a["edges"][0]) * 20 + oracle.level_of(live.values[n, 0], a["edges"][0])
    row = a["table"][0, code]
    centred, norm = oracle.centre([z[t, 0], z[t, 1], *z[t - 3 : t, 0]])
    more = {
        **a, "vectors": np.insert(a["vectors"], a["pointers"][row + 1], centred / norm, axis=0),
        "pointers": a["pointers"] + (np.arange(len(a["pointers"])) > row).astype(np.int32),
    }
    appended = PLUGIN.open(dataclasses.replace(model, arrays=more), record.tags).residuals(live)
    assert appended[n, 4] < 1e-6
    assert (np.nan_to_num(appended) <= np.nan_to_num(before)).all()


def test_ten_thousand_updates_do_not_grow_memory(lorenz):
    method = opened(lorenz)
    rows = [(lorenz.values[k], lorenz.valid[k]) for k in range(1000)]
    for values, valid in rows:
        method.update(values, valid)
    tracemalloc.start()
    try:
        for _ in range(10):
            for values, valid in rows:
                method.update(values, valid)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.isfinite(method.residual).all()
    assert peak < 4096


# -- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("levels", 1), ("levels", 2.5), ("levels", 1000), ("step", 0), ("step", True), ("eta", 0.0), ("eta", 1.1),
     ("eta", float("nan")), ("nu", -1.0), ("nu", 9), ("eps", 0.0), ("eps", "x"), ("max_vectors", -1),
     ("partners", -2), ("faithful", 1), ("affine", 0), ("affine_ridge", -1.0), ("affine_ridge", 1e-30),
     ("affine_ridge", True)],
)
def test_a_parameter_that_cannot_work_is_refused_with_key_value_and_what_was_expected(key, value):
    with pytest.raises(ConfigError) as problem:
        TransitionParams(**{key: value})
    assert problem.value.key == key and problem.value.expected and problem.value.next_step
    assert repr(value) in str(problem.value)


def test_a_record_without_a_judged_tag_is_refused():
    with pytest.raises(RecordError, match="no tag is judged"):
        fit(record_of(waves(100, 2), [Tag("a", kind=TagKind.SETPOINT), Tag("b", kind=TagKind.STATE)]))


def test_a_tag_without_a_valid_value_is_refused_by_name():
    values = waves(100, 2)
    values[:, 1] = np.nan
    with pytest.raises(RecordError, match="t1: the tag has no valid value"):
        fit(record_of(values))


def test_a_record_that_is_too_short_or_too_broken_is_refused_by_name():
    with pytest.raises(RecordError, match="t0: no 20 rows without a gap"):
        fit(record_of(waves(19, 1)), step=10)
    assert fit(record_of(waves(20, 1)), step=10).arrays["instants"].sum() == 1
    gap = (np.arange(300) % 15 == 0).astype(np.uint8)
    with pytest.raises(RecordError, match="t0: no 20 rows without a gap"):
        fit(record_of(waves(300, 2), gap=gap), step=10)
