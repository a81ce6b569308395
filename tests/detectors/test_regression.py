"""What the method `regression` promises: its maps, stream = batch = oracle, masks, gaps, sharp forecasts, causes."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from opcua_detector.api import Channel, Method, Plugin, Record, Tag, TagKind
from opcua_detector.detectors.regression import RegressionParams, RegressionPlugin
from opcua_detector.detectors.regression_linear import blocks
from opcua_detector.errors import ConfigError, ModelTagsError, RecordError
from opcua_detector.fitting import fit_monitor
from opcua_detector.model import load
from opcua_detector.registry import Registry
from opcua_detector.testing import check_plugin, damaged, stream
from sim_server.processes import make
from tests.benchmarks.bench_engine import linear_rows
from tests.detectors import oracle_regression as oracle
from tests.fault_plants import loop_rows

PERIOD_NS = 10_000_000
PLUGIN = RegressionPlugin()


def fit(record, **params):
    """Fit with three lags and a light ridge, in which the expectations of these tests are written."""
    return PLUGIN.fit(record, RegressionParams(**{"lags": 3, "ridge": 0.001} | params))


def opened(record, **params):
    return PLUGIN.open(fit(record, **params), record.tags)


def record_of(values, tags=None, **kwargs):
    return Record.from_rows(values, tags or [f"t{k}" for k in range(values.shape[1])], PERIOD_NS, **kwargs)


def factors(n, d=6, seed=0, noise=0.1, slow=0.98):
    """float64[n, d]: three slow factors seen by d sensors with noise; the same plant for every seed."""
    rng = np.random.default_rng(seed)
    loads = np.random.default_rng(1000).standard_normal((3, d)) * np.geomspace(0.1, 100.0, d)
    state = np.zeros((n, 3))
    for t in range(1, n):
        state[t] = slow * state[t - 1] + 0.2 * rng.standard_normal(3)
    return state @ loads + noise * np.abs(loads).max(axis=0) * rng.standard_normal((n, d)) + 7.0


def rms(x, axis=0):
    return np.sqrt(np.nanmean(x * x, axis=axis))


def plant_rows(name, n, seed, noise=0.0):
    return record_of(make(name, seed=seed, noise=noise).simulate(n + 1000)[1000:])


@pytest.fixture(scope="module")
def lorenz():
    """12 000 noise-free rows of the simulated Lorenz process, off the start."""
    return plant_rows("lorenz", 12_000, 3)


@pytest.fixture(scope="module")
def lorenz_method(lorenz):
    return opened(lorenz)


@pytest.fixture(scope="module")
def mixed():
    """Six judged sensors, a setpoint and a state in the middle, in three intervals, with a few values missing."""
    rng = np.random.default_rng(5)
    x = factors(2500, 6)
    wanted = np.repeat(rng.uniform(-1, 1, 50), 50)
    x[:, 2] += 3 * x[:, 2].std() * wanted
    values = np.column_stack([x[:, :3], wanted, x[:, 3:], np.round(wanted)])
    tags = [Tag("a"), Tag("b"), Tag("c"), Tag("wanted", kind=TagKind.SETPOINT), Tag("d"), Tag("e"), Tag("f"),
            Tag("mode", kind=TagKind.STATE)]
    valid = (rng.random(values.shape) > 0.004).astype(np.uint8)
    values[valid == 0] = np.nan
    gap = np.zeros(len(values), np.uint8)
    gap[[700, 1801]] = 1
    return record_of(values, tags, valid=valid, gap=gap)


def whole(record):
    """The record without masks and gaps."""
    return record_of(np.nan_to_num(record.values), record.tags)


# -- the maps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lags", "partners"), [(3, 0), (2, 0), (3, 3), (1, 2)])
def test_the_maps_are_the_ridge_regressions_of_the_design(mixed, lags, partners):
    model = fit(mixed, lags=lags, feature_lags=10, partners=partners, nonlinear="off", ridge=0.002, relation_ridge=0.07)
    ordered = mixed.select(model.columns)
    assert model.columns == ("wanted", "mode", "a", "b", "c", "d", "e", "f")
    for c in range(2, 8):
        seen = model.arrays["partners"][c].tolist()
        assert c in seen and len(seen) == (partners + 1 if partners else 8) and seen == sorted(seen)
        forecast = oracle.fit_forecast(ordered, c, lags=lags, weight=0.002, seen=seen)
        got = model.arrays["forecast"][c - 2]
        assert_allclose(got[: len(forecast)], list(forecast.values()), atol=1e-9)
        assert_array_equal(got[len(forecast) :], 0.0)
        relation = oracle.fit_relation(ordered, c, lags=lags, weight=0.07, seen=seen)
        got = dict(zip([(k, lag) for lag in range(lags, -1, -1) for k in seen], model.arrays["relation"][c],
                       strict=True))
        assert got.pop((c, 0)) == pytest.approx(1.0, abs=1e-12)
        assert_allclose([-got[key] for key in relation], list(relation.values()), atol=1e-9)


def test_a_column_sees_its_most_correlated_partners():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 6))
    x[:, 4] = x[:, 1] + 0.1 * x[:, 4]
    x[:, 5] = -x[:, 2] + 0.1 * x[:, 5]
    partners = fit(record_of(x), partners=1).arrays["partners"]
    assert partners[[1, 4, 2, 5]].tolist() == [[1, 4], [1, 4], [2, 5], [2, 5]]


@pytest.mark.parametrize(("d", "partners", "seen"), [(128, 0, 128), (129, 0, 65), (129, 200, 129), (20, 7, 8)])
def test_above_128_columns_each_sees_64_others(d, partners, seen):
    model = fit(record_of(factors(400, d)), partners=partners, nonlinear="off")
    assert model.arrays["partners"].shape == (d, seen)
    assert model.arrays["relation"].shape == (d, 4 * seen)


def test_what_is_held_out_is_told(mixed):
    """rms, inner and usual are those of maps fitted on the first four fifths, on the last fifth."""
    record = whole(mixed)
    model = fit(record, nonlinear="off")
    n = len(record) - 3
    z, _ = oracle.scaled(record.select(model.columns))
    c, seen = 4, list(range(8))
    rows = np.arange(3 + int(0.8 * n), len(record))
    inputs = [(k, lag) for lag in (3, 2, 1) for k in seen] + [(0, 0), (1, 0)]
    train = np.arange(3, rows[0])
    x = np.column_stack([z[train - lag, k] for k, lag in inputs])
    b = oracle.ridge(x, z[train, c], 0.001 * len(train))
    error = z[rows, c] - np.column_stack([z[rows - lag, k] for k, lag in inputs]) @ b
    assert model.arrays["rms"][0, c - 2] == pytest.approx(rms(error), rel=1e-6)
    inner = np.sqrt(np.sort(error**2)[: int(0.95 * len(error))].mean())
    assert model.arrays["inner"][0, c - 2] == pytest.approx(inner, rel=1e-6)
    assert model.arrays["usual"][0, c - 2] == pytest.approx(np.mean(error**2) / inner**2, rel=1e-6)


def test_a_setpoint_enters_with_its_present_value():
    rng = np.random.default_rng(0)
    u = rng.standard_normal(3000)
    y = 2.0 * u + 0.01 * rng.standard_normal(3000)
    judged = opened(record_of(np.column_stack([y, u]), ["y", "u"]), nonlinear="off")
    told = opened(record_of(np.column_stack([y, u]), ["y", Tag("u", kind=TagKind.COMMAND)]), nonlinear="off")
    assert judged.channels == tuple(Channel(n, n, k) for k in ("forecast", "relation") for n in ("y", "u"))
    assert told.channels == (Channel("y", "y", "forecast"), Channel("y", "y", "relation"))
    live = record_of(np.column_stack([y, u]), ["y", "u"])
    assert rms(judged.residuals(live))[0] > 0.9
    assert rms(told.residuals(live))[0] < 0.02


def test_rows_across_a_gap_are_not_learnt():
    """Two intervals whose values do not fit each other give the maps of the intervals, not of the step between."""
    x = factors(1200, 4)
    joined = np.vstack([x[:600], x[600:] + 1e3])
    gap = np.zeros(1200, np.uint8)
    gap[600] = 1
    record = record_of(joined, gap=gap)
    assert len(oracle.usable(record, np.ones(joined.shape, bool), 3)) == 1200 - 6
    got = fit(record, nonlinear="off").arrays["forecast"][1]
    assert_allclose(got, list(oracle.fit_forecast(record, 1, lags=3, weight=0.001, seen=range(4)).values()), atol=1e-9)
    across = fit(record_of(joined), nonlinear="off").arrays["forecast"][1]
    assert np.abs(got - across).max() > 1e-4


@pytest.mark.parametrize(("n", "d"), [(300, 8), (500, 52), (120, 40)])
def test_short_records_are_enough(n, d):
    fresh = factors(2000, d, seed=1)
    method = opened(record_of(factors(n, d)))
    assert method.nonlinear_share == 0.0
    residual = method.residuals(record_of(fresh))[method.memory :]
    spread = (fresh / factors(n, d).std(axis=0)).std(axis=0)
    assert np.isfinite(residual).all()
    assert (rms(residual)[:d] < 1.1 * spread).all()  # never much worse than knowing nothing


def test_a_record_with_a_value_missing_in_every_row_is_learnt_by_holding():
    x = factors(3000, 6)
    clean = fit(record_of(x), nonlinear="off")
    valid = np.ones(x.shape, np.uint8)
    valid[np.arange(3000), np.arange(3000) % 6] = 0
    model = fit(record_of(x, valid=valid), nonlinear="off")
    assert_allclose(model.arrays["rms"], clean.arrays["rms"], rtol=0.35)


@pytest.mark.parametrize(("share", "n"), [(0.99, 2000), (0.0, 40)])
def test_too_little_is_refused_and_the_worst_tag_named(share, n):
    x = factors(n, 3)
    valid = np.ones(x.shape, np.uint8)
    valid[: int(share * n), 1] = 0
    with pytest.raises(RecordError, match=r"t\d is valid in") as error:
        fit(record_of(x, ["t0", "t1", "t2"], valid=valid))
    assert error.value.next_step
    if share:
        assert "t1 is valid in 1 %" in str(error.value)


def test_a_record_without_a_judged_tag_or_value_is_refused():
    x = factors(300, 2)
    with pytest.raises(RecordError, match="no tag is judged"):
        fit(record_of(x, [Tag("a", kind=TagKind.SETPOINT), Tag("b", kind=TagKind.STATE)]))
    valid = np.ones(x.shape, np.uint8)
    valid[:, 1] = 0
    with pytest.raises(RecordError, match="t1"):
        fit(record_of(x, valid=valid))


def test_a_column_that_never_moved_is_silent():
    x = factors(1500, 3)
    x[:, 1] = 4.0
    method = opened(record_of(x), nonlinear="on")
    live = factors(100, 3, seed=1)
    residual = method.residuals(record_of(live))
    assert_array_equal(residual[method.memory :, [1, 4]], 0.0)
    assert (residual[method.memory :, [0, 2, 3, 5]] > 0).all()
    others = opened(record_of(x[:, [0, 2]]), nonlinear="off").residuals(record_of(live[:, [0, 2]]))
    with_it = opened(record_of(x), nonlinear="off").residuals(record_of(live))
    assert_allclose(with_it[:, [0, 2, 3, 5]], others, rtol=1e-7)


@pytest.mark.parametrize("change", [
    {"lags": 0}, {"lags": True}, {"lags": 2.0}, {"ridge": 0.0}, {"ridge": float("nan")}, {"relation_ridge": -1.0},
    {"features": 0}, {"features": 5000}, {"feature_lags": 2}, {"partners": -1}, {"seed": -1}, {"nonlinear": "yes"},
])
def test_wrong_parameters_are_named(change):
    with pytest.raises(ConfigError) as error:
        RegressionParams(**change)
    assert error.value.key == next(iter(change)) and error.value.expected and error.value.next_step


def test_the_config_makes_its_parameters():
    registry = Registry()
    assert isinstance(registry.get("regression"), Plugin)
    assert registry.params("regression", {"lags": 2, "nonlinear": "off", "ridge": 1}) == RegressionParams(
        lags=2, nonlinear="off", ridge=1.0)
    with pytest.raises(ConfigError):
        registry.params("regression", {"nonlinear": "maybe"})


# -- the nonlinear correction -------------------------------------------------------------------------------


def test_on_noise_free_lorenz_the_correction_forecasts_a_thousand_times_sharper(lorenz, lorenz_method):
    fresh = plant_rows("lorenz", 5000, 4)
    linear = rms(opened(lorenz, nonlinear="off").residuals(fresh))[:2]
    sharp = rms(lorenz_method.residuals(fresh))[:2]
    assert (linear > 1e-2).all() and (sharp < 1e-5).all()
    assert lorenz_method.nonlinear_share == 1.0 and lorenz_method.model.params["feature_share"] == 1.0
    assert lorenz_method.memory == 10
    assert (lorenz_method.model.arrays["rms"][0] < 2e-5).all()


def test_a_parameter_fault_of_lorenz_stands_far_above_healthy_rows(lorenz_method):
    plant = make("lorenz", seed=9)
    plant.simulate(1000)
    plant.set_factor("sigma", 0.95)
    faulty = rms(lorenz_method.residuals(record_of(plant.simulate(2000))))[:2]
    assert (faulty > 30 * lorenz_method.model.arrays["rms"][0]).any()


def test_jumps_that_nobody_can_foresee_do_not_drown_what_can_be_learnt():
    """The throttle's voltage jumps at each new setpoint: its typical error falls a thousandfold all the same."""
    record, fresh = plant_rows("throttle", 12_000, 3), plant_rows("throttle", 5000, 4)
    linear = opened(record, nonlinear="off").residuals(fresh)
    method = opened(record)
    sharp = method.residuals(fresh)
    assert method.nonlinear_share == 1.0
    assert np.nanmedian(sharp[:, 1]) < 1e-3 * np.nanmedian(linear[:, 1])
    assert rms(sharp)[1] < 1.05 * rms(linear)[1]  # the jumps themselves stay
    assert rms(sharp)[0] < 0.02 * rms(linear)[0]


@pytest.mark.parametrize("name", ["lorenz", "throttle"])
def test_rounding_and_small_noise_are_not_amplified(name):
    """What the maps read must not hang on digits that a transmitter does not send."""
    record, fresh = plant_rows(name, 12_000, 3), plant_rows(name, 3000, 4)
    method = opened(record)
    shake = 1e-5 * record.values.std(axis=0) * np.random.default_rng(0).standard_normal((3000, 2))
    shaken = method.residuals(record_of(fresh.values + shake))[:, :2]
    assert (np.nanmedian(shaken, axis=0) < 4e-5).all()


def test_noise_free_plants_count_as_nonlinear_and_linear_ones_do_not():
    assert opened(plant_rows("lorenz", 6000, 1, 0.01)).nonlinear_share == 1.0
    assert opened(plant_rows("throttle", 12_000, 1, 0.01)).nonlinear_share >= 0.5
    method = opened(record_of(factors(6000, 8)))
    assert method.nonlinear_share == 0.0 and method.memory == 3
    assert method.model.arrays["directions"].size == 0


def walk(n, d, seed):
    return np.cumsum(np.random.default_rng(seed).standard_normal((n, d)), axis=0)


def resonance(n, seed, radius=0.98, angle=0.1):
    """An AR(2) that rings."""
    rng = np.random.default_rng(seed)
    x = np.zeros((n, 1))
    for t in range(2, n):
        x[t] = 2 * radius * np.cos(angle) * x[t - 1] - radius**2 * x[t - 2] + rng.standard_normal()
    return x


def sines(n, seed, noise):
    """Two tags, each a sum of three sines, with noise."""
    rng = np.random.default_rng(seed)
    waves = np.sin(2 * np.pi * rng.uniform(0.002, 0.2, 6) * np.arange(n)[:, None] + rng.uniform(0, 6, 6))
    return waves.reshape(n, 2, 3).sum(axis=2) + noise * rng.standard_normal((n, 2))


LINEAR = {
    "random walk": lambda n, seed: walk(n, 1, seed), "three random walks": lambda n, seed: walk(n, 3, seed),
    "resonance": resonance, "slow resonance": lambda n, seed: resonance(n, seed, 0.999, 0.02),
    "sines": lambda n, seed: sines(n, seed, 0.0), "sines, 1 %": lambda n, seed: sines(n, seed, 0.01),
    "sines, 10 %": lambda n, seed: sines(n, seed, 0.1), "factors": lambda n, seed: factors(n, 8, seed),
    "pump and heater loop": loop_rows, "random linear process": lambda n, seed: linear_rows(n, 10, seed),
}


def shares(rows):
    params = PLUGIN.fit(record_of(rows), RegressionParams()).params
    return params["nonlinear_share"], params["plant_share"]


@pytest.mark.parametrize("n", [3000, 12_000])
@pytest.mark.parametrize("plant", list(LINEAR))
def test_a_longer_past_and_a_lighter_ridge_make_no_plant_nonlinear(plant, n):
    for seed in (1, 2):
        assert shares(LINEAR[plant](n, seed))[1] < 0.5


@pytest.mark.parametrize("plant", ["random walk", "resonance", "slow resonance", "sines, 1 %"])
def test_a_linear_plant_may_keep_the_correction_all_the_same(plant):
    assert shares(LINEAR[plant](12_000, 1)) == (1.0, 0.0)


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("name", ["lorenz", "throttle"])
def test_the_simulated_plants_are_nonlinear_with_and_without_noise(name, noise):
    for seed in range(5):
        assert shares(plant_rows(name, 12_000, seed, noise).values)[1] >= 0.5


def test_the_correction_can_be_forced_and_forbidden(lorenz):
    on, off = opened(record_of(factors(2000, 3)), nonlinear="on"), opened(lorenz, nonlinear="off")
    assert on.nonlinear_share == 1.0 and on.memory == 10 and on.model.params["plant_share"] == 1.0
    assert off.nonlinear_share == 0.0 and off.memory == 3
    residual = on.residuals(record_of(factors(1000, 3, seed=1)))
    assert (rms(residual)[:3] < 1.1 * rms(opened(record_of(factors(2000, 3)), nonlinear="off").residuals(
        record_of(factors(1000, 3, seed=1))))[:3]).all()
    assert_array_equal(np.isnan(residual[:12]).sum(axis=0), [10, 10, 10, 3, 3, 3])


def test_a_column_that_the_features_do_not_help_stays_linear():
    rng = np.random.default_rng(0)
    x = np.column_stack([plant_rows("lorenz", 6000, 1).values, rng.standard_normal((6000, 2))])
    model = fit(record_of(x))
    assert (model.arrays["corrected"] >= 0).tolist() == [True, True, False, False]
    assert model.params["nonlinear_share"] == 0.5


def test_blocks_are_contiguous_stretches_of_the_rows():
    rows = np.r_[0:5000, 7000:60_000]
    got = blocks(rows, 2000)
    assert len(got) == 2000 and np.isin(got, rows).all()
    assert got[0] == 0 and got[-1] == 59_999
    assert (np.diff(np.searchsorted(rows, got)) == 1).sum() == 2000 - 20
    assert_array_equal(blocks(rows[:100], 2000), rows[:100])


def test_the_fit_is_the_same_each_time_and_the_seed_chooses_the_features(lorenz):
    record = lorenz.rows(0, 3000)
    one, two, other = fit(record), fit(record), fit(record, seed=1)
    assert one.params == two.params
    for name, array in one.arrays.items():
        assert_array_equal(array, two.arrays[name])
    assert np.abs(one.arrays["directions"] - other.arrays["directions"]).max() > 0.1
    assert (other.arrays["rms"][0] < 1e-4).all()


# -- stream, batch, oracle ----------------------------------------------------------------------------------


def test_it_is_a_plugin_and_a_method_that_keeps_every_promise(lorenz, mixed):
    assert isinstance(PLUGIN, Plugin) and isinstance(opened(lorenz.rows(0, 2000)), Method)
    for record, params in (
        (lorenz, {}), (lorenz, {"nonlinear": "off"}), (whole(mixed), {}), (whole(mixed), {"nonlinear": "on"}),
        (whole(mixed), {"partners": 3, "lags": 2}),
    ):
        check_plugin(PLUGIN, record, RegressionParams(**params))


@pytest.mark.parametrize("params", [{"nonlinear": "off"}, {"nonlinear": "on", "features": 16}, {"partners": 3},
                                    {"partners": 2, "nonlinear": "on", "features": 8, "lags": 2, "feature_lags": 4}])
def test_stream_and_batch_are_one_and_agree_with_the_oracle(mixed, params):
    model = fit(mixed, **params)
    record = damaged(mixed.select(model.columns).rows(300, 900), 13, seed=2)
    valid = record.valid.copy()
    valid[100:125, 3] = 0  # longer than a forecast is trusted
    valid[130:131, :] = 0
    valid[200:213, 4:7] = 0
    record = dataclasses.replace(record, valid=valid)
    method = PLUGIN.open(model, record.tags)
    batch = method.residuals(record)
    assert_array_equal(stream(method, record), batch)
    want = oracle.residuals(model, record)
    assert_array_equal(np.isnan(batch), np.isnan(want))
    assert_allclose(np.nan_to_num(batch), np.nan_to_num(want), atol=1e-9)
    assert np.isfinite(batch).mean() > 0.4


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.data())
def test_any_masks_and_gaps_give_what_the_oracle_gives(data):
    models = _small_models()
    model, tags = models[data.draw(st.integers(0, len(models) - 1))]
    n = data.draw(st.integers(1, 60))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    values = factors(n, 4, seed=int(rng.integers(100)))
    bad = data.draw(st.sampled_from([0.0, 0.05, 0.3]))
    valid = (rng.random(values.shape) >= bad).astype(np.uint8)
    for _ in range(data.draw(st.integers(0, 2))):
        start, length = rng.integers(0, n), rng.integers(1, 25)
        valid[start : start + length, rng.integers(0, 4)] = 0
    values[rng.random(values.shape) < bad / 4] = data.draw(st.sampled_from([np.nan, np.inf, -1e300, 1e9]))
    gap = (rng.random(n) < data.draw(st.sampled_from([0.0, 0.08]))).astype(np.uint8)
    gap[0] = 1
    record = dataclasses.replace(record_of(values, tags), valid=valid, gap=gap)
    ordered = dataclasses.replace(record.select(model.columns))
    method = PLUGIN.open(model, tags)
    got, want = method.residuals(record), oracle.residuals(model, ordered)
    assert_array_equal(got, stream(method, record))
    assert_array_equal(np.isnan(got), np.isnan(want))
    assert_allclose(np.nan_to_num(got), np.nan_to_num(want), rtol=1e-9, atol=1e-9)
    known = got[np.isfinite(got)]
    assert known.size == 0 or known.max() < 1e5  # clipped inputs: no value, however wild, makes more


def _small_models():
    if not _CACHE:
        tags = [Tag("a"), Tag("u", kind=TagKind.SETPOINT), Tag("b"), Tag("c")]
        record = record_of(factors(1500, 4), tags)
        for params in ({"nonlinear": "off"}, {"nonlinear": "on", "features": 6, "feature_lags": 5}, {"partners": 1},
                       {"partners": 2, "nonlinear": "on", "features": 5, "lags": 2, "feature_lags": 3}):
            _CACHE.append((fit(record, **params), tags))
    return _CACHE


_CACHE: list = []


def test_columns_are_found_by_name_and_strangers_passed_over(mixed):
    model = fit(mixed, nonlinear="off")
    want = PLUGIN.open(model, mixed.tags).residuals(mixed)
    order = [6, 2, 7, 0, 3, 5, 1, 4]
    tags = (Tag("stranger"), *(mixed.tags[k] for k in order))
    values = np.column_stack([np.full(len(mixed), np.nan), mixed.values[:, order]])
    valid = np.column_stack([np.zeros(len(mixed), np.uint8), mixed.valid[:, order]])
    other = dataclasses.replace(mixed, tags=tags, values=values, valid=np.ascontiguousarray(valid))
    method = PLUGIN.open(model, tags)
    assert method.channels == PLUGIN.open(model, mixed.tags).channels
    assert_array_equal(method.residuals(other), want)
    with pytest.raises(ModelTagsError, match="wanted"):
        PLUGIN.open(model, [tag for tag in tags if tag.name != "wanted"])
    with pytest.raises(RecordError, match="columns"):
        method.residuals(mixed)


def test_the_model_is_plain_arrays_and_comes_back_out_of_a_file(tmp_path):
    record = plant_rows("lorenz", 6000, 1, 0.01)
    model, _ = fit_monitor("m", record, [("regression", PLUGIN, RegressionParams(features=32))])
    model.save(tmp_path / "m.npz")
    back = load(tmp_path / "m.npz")
    assert back.model_id == model.model_id and json.dumps(dict(back.methods[0].params))
    fresh = plant_rows("lorenz", 500, 2, 0.01)
    one, two = (PLUGIN.open(m.methods[0], fresh.tags) for m in (model, back))
    assert_array_equal(one.residuals(fresh), two.residuals(fresh))
    assert two.nonlinear_share == one.nonlinear_share == 1.0


def test_an_update_takes_no_memory(lorenz_method, lorenz):
    rows = [(lorenz.values[k], lorenz.valid[k]) for k in range(200)]
    for values, valid in rows:
        lorenz_method.update(values, valid)
    tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        for values, valid in rows:
            lorenz_method.update(values, valid)
        assert tracemalloc.get_traced_memory()[1] - before < 2048
    finally:
        tracemalloc.stop()
        lorenz_method.reset()


# -- masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [1, 5, 30, 300])
def test_a_bad_tag_does_not_raise_the_residuals_of_the_others(run):
    """However long it is away: with its healthy mean as input, as a check, they would rise several times."""
    record = record_of(factors(8000, 6, noise=0.03))
    live = record_of(factors(6000, 6, seed=7, noise=0.03))
    method = opened(record, nonlinear="off")
    base = method.residuals(live)
    starts = np.arange(200, 5400, 2 * max(run, 40))
    bad = (starts[:, None] + np.arange(run)).ravel()
    bad = bad[bad < 5990]
    after = np.setdiff1d((starts[:, None] + np.arange(run, run + 4)).ravel(), bad)
    after = after[after < 6000]
    valid = live.valid.copy()
    valid[bad, 2] = 0
    got = method.residuals(dataclasses.replace(live, valid=valid))
    others = [0, 1, 3, 4, 5, 6, 7, 9, 10, 11]
    assert np.isnan(got[np.ix_(bad, [2, 8])]).all()
    assert np.isfinite(got[np.ix_(bad, others)]).all()
    for rows in (bad, after):
        assert (rms(got[np.ix_(rows, others)]) < 1.6 * rms(base[:, others])).all()
    if run == 300:
        values = live.values.copy()
        values[bad, 2] = record.values[:, 2].mean()
        filled = method.residuals(dataclasses.replace(live, values=values))
        assert (rms(filled[np.ix_(bad, others)]) > 2.5 * rms(base[:, others])).any()


def test_a_column_that_was_away_for_long_speaks_again_when_its_past_is_known():
    record = record_of(factors(2000, 4))
    method = opened(record, nonlinear="off")
    for run, silent in ((10, 0), (11, 3), (200, 3)):
        valid = record.valid.copy()
        valid[500 : 500 + run, 1] = 0
        known = np.isfinite(method.residuals(dataclasses.replace(record, valid=valid)))[500:, [1, 5]]
        assert known[:, 0].argmax() == known[:, 1].argmax() == run + silent
        assert known[run + silent :].all()


def test_a_channel_needs_half_of_its_inputs():
    record = record_of(factors(2000, 8))
    method = opened(record, nonlinear="off")
    for n_bad, kept in ((4, True), (5, False)):
        valid = record.valid.copy()
        valid[1000:1030, :n_bad] = 0
        known = np.isfinite(method.residuals(dataclasses.replace(record, valid=valid))[1010:1030, [7, 15]])
        assert known[:, 0].all() == kept and known[:, 1].any() <= kept
    valid = record.valid.copy()
    valid[1000:1005] = 0
    known = np.isfinite(method.residuals(dataclasses.replace(record, valid=valid)))
    assert not known[1000:1005].any()
    assert not known[1005, :8].any()  # nothing but estimates behind it
    assert known[1008:].all()


def test_a_sharp_forecast_is_silent_rather_than_wrong(lorenz_method):
    live = plant_rows("lorenz", 3000, 6)
    base = rms(lorenz_method.residuals(live))
    for run in (1, 4, 9, 12, 300):
        valid = live.valid.copy()
        starts = np.arange(100, 2600, 2 * max(run, 30))
        for start in starts:
            valid[start : start + run, 1] = 0
        got = lorenz_method.residuals(dataclasses.replace(live, valid=valid))
        assert np.isfinite(got[:, 0]).sum() > 200
        assert np.nanmax(got[:, :2]) < 100 * base[:2].max(), f"{run} rows missing"
        first = np.arange(starts[0] + run, starts[0] + run + 10)
        assert np.isnan(got[first, 1]).all() and np.isfinite(got[first[-1] + 1, 1])


def test_the_first_rows_and_the_rows_after_a_gap_are_silent(lorenz, lorenz_method):
    gap = np.zeros(400, np.uint8)
    gap[[0, 5, 100, 104, 300]] = 1
    record = dataclasses.replace(lorenz.rows(0, 400), gap=gap)
    known = np.isfinite(lorenz_method.residuals(record))
    want = np.ones((400, 4), bool)
    for start in (0, 5, 100, 104, 300):
        want[start : start + 10, :2] = False
        want[start : start + 3, 2:] = False
    assert_array_equal(known, want)


# -- explain and reconstruct --------------------------------------------------------------------------------


def faulty(kind, k, seed, n=900, at=600):
    """Rows of the six sensors with a fault of sensor k from row `at` on."""
    x = factors(n, 6, seed=seed)
    healthy, std = x.copy(), factors(3000, 6).std(axis=0)
    rng = np.random.default_rng(seed)
    x[at:, k] = {
        "bias": x[at:, k] + std[k], "stuck": x[at, k], "noise": x[at:, k] + 0.5 * std[k] * rng.standard_normal(n - at),
        "gain": 7.0 + 1.6 * (x[at:, k] - 7.0), "lag": x[at - 20 : n - 20, k]}[kind]
    return x, healthy


@pytest.mark.parametrize("kind", ["bias", "stuck", "noise", "gain", "lag"])
def test_the_faulty_tag_is_named_first(kind):
    method = opened(record_of(factors(6000, 6)))
    right = []
    for k in range(6):
        for seed in (20, 21, 22):
            x, _ = faulty(kind, k, seed)
            rows = x[480:]
            causes = method.explain(rows, np.ones(rows.shape, np.uint8), np.arange(len(rows)) * PERIOD_NS, 300)
            right.append(bool(causes) and causes[0].tag == f"t{k}")
            assert sum(c.share for c in causes) <= 1 + 1e-9
            assert [c.share for c in causes] == sorted((c.share for c in causes), reverse=True)
    assert np.mean(right) >= 0.95


def test_causes_speak_in_engineering_units_of_the_worst_row():
    record = record_of(factors(6000, 6))
    method = opened(record)
    a = method.model.arrays
    x, healthy = faulty("bias", 4, 30)
    x[600:, 4] += 3 * record.values[:, 4].std()
    rows, times = x[480:], (np.arange(420) * PERIOD_NS)
    causes = method.explain(rows, np.ones(rows.shape, np.uint8), times, 300)
    std = record.values[:, 4].std()
    ahead = next(c for c in causes if c.tag == "t4" and c.kind == "forecast")
    aside = next(c for c in causes if c.tag == "t4" and c.kind == "relation")
    for k, cause in enumerate((ahead, aside)):
        at = int(cause.source_ns // PERIOD_NS)
        assert at >= 120 and cause.observed == rows[at, 4]
        assert cause.normal_high - cause.normal_low == pytest.approx(6 * a["rms"][k, 4] * std)
        assert cause.observed > cause.normal_high
        assert cause.normal_low < healthy[480 + at, 4] < cause.normal_high
        residual = method.residuals(record_of(rows))[120:, k * 6 + 4]
        assert at == 120 + int(np.argmax(residual))
        assert abs(cause.observed - (cause.normal_low + cause.normal_high) / 2) == pytest.approx(residual.max() * std)
    assert ahead.other == ""
    assert ahead.source_ns == 120 * PERIOD_NS  # a bias is unforeseen where it begins


def test_the_partner_that_a_tag_no_longer_follows_is_named():
    """Three groups of three sensors: the faulty one is told against one of its own group."""
    rng = np.random.default_rng(0)
    slow = np.zeros((6000, 3))
    for t in range(1, 6000):
        slow[t] = 0.98 * slow[t - 1] + 0.2 * rng.standard_normal(3)
    x = np.repeat(slow, 3, axis=1) * [1, -1, 5, 2, 1, -3, 1, 1, 1] + 0.05 * rng.standard_normal((6000, 9))
    names = ["a1", "a2", "a3", "b1", "b2", "b3", "c1", "c2", "c3"]
    method = opened(record_of(x, names), nonlinear="off")
    for k, name in enumerate(names):
        rows = x[1000:1300].copy()
        rows[150:, k] += 2 * x[:, k].std()
        causes = method.explain(rows, np.ones(rows.shape, np.uint8), np.arange(300), 100)
        worst = next(c for c in causes if c.kind == "relation")
        assert worst.tag == causes[0].tag == name
        assert worst.other[0] == name[0] and worst.other != name


def test_without_a_judged_row_there_is_no_cause(lorenz_method, lorenz):
    few = lorenz.values[:3]
    assert lorenz_method.explain(few, np.ones(few.shape, np.uint8), np.arange(3), 50) == []
    rows = lorenz.values[:60]
    assert lorenz_method.explain(rows, np.zeros(rows.shape, np.uint8), np.arange(60), 50) == []


def test_reconstruct_says_what_the_others_say():
    record = record_of(factors(6000, 6))
    method = opened(record, nonlinear="off")
    x, healthy = faulty("bias", 2, 40)
    std = record.values[:, 2].std()
    valid = np.ones(x.shape, np.uint8)
    given_x, given_valid = x.copy(), valid.copy()
    got = method.reconstruct(x, valid, "t2")
    assert_array_equal(x, given_x)
    assert_array_equal(valid, given_valid)
    assert np.isnan(got[:3]).all() and np.isfinite(got[3:]).all()
    assert rms(got[650:] - healthy[650:, 2]) < 0.35 * std < 0.9 * rms(x[650:, 2] - healthy[650:, 2])
    a = method.model.arrays
    want = oracle.follow(method.model, record_of(x), 2) / a["inverse"][2] + a["mean"][2]
    assert_allclose(got[3:], want[3:], rtol=1e-9)
    # put in place of what was observed it leaves the column nothing to answer for
    followed = x.copy()
    followed[3:, 2] = got[3:]
    assert np.nanmax(method.residuals(record_of(followed))[6:, 8]) < 1e-9
    # its own validity does not matter, that of the others does
    valid[:, 2] = 0
    valid[:3, 2] = 1
    assert_allclose(method.reconstruct(x, valid, "t2")[3:], got[3:], rtol=1e-9)
    valid[:, [0, 1, 3, 4, 5]] = 0
    assert np.isnan(method.reconstruct(x, valid, "t2")[20:]).all()


def test_reconstruct_starts_anew_after_a_gap_and_knows_its_columns(mixed):
    method = opened(mixed)
    record = whole(mixed)
    gap = np.zeros(len(record), np.uint8)
    gap[[0, 500]] = 1
    got = method.reconstruct(record.values, record.valid, "d", gap)
    assert_array_equal(np.flatnonzero(np.isnan(got)), [0, 1, 2, 500, 501, 502])
    assert_array_equal(got[500:], method.reconstruct(record.values[500:], record.valid[500:], "d"))
    with pytest.raises(ModelTagsError, match="no column 'x'"):
        method.reconstruct(record.values, record.valid, "x")
