"""What adapting a transition model promises: the paper's rules, nothing forgotten, nothing twice, any batches."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from opcua_detector.api import MethodModel, Record, Tag, TagKind
from opcua_detector.detectors.transition import TransitionParams, TransitionPlugin
from opcua_detector.detectors.transition_adapt import adapt
from opcua_detector.errors import ModelTagsError, RecordError
from opcua_detector.kernels.bounds import adapt_map
from sim_server.processes import make
from tests import oracle

PERIOD_NS = 10_000_000
PLUGIN = TransitionPlugin()


def fit(record, **params):
    return PLUGIN.fit(record, TransitionParams(**params))


def residuals(model, record, kind=None):
    method = PLUGIN.open(model, record.tags)
    found = method.residuals(record)
    return found if kind is None else found[:, [k for k, c in enumerate(method.channels) if c.kind == kind]]


def record_of(values, tags=None, **kwargs):
    return Record.from_rows(values, tags or [f"t{k}" for k in range(values.shape[1])], PERIOD_NS, **kwargs)


def joined(*records):
    """The rows of several records as one, with a gap between them."""
    return dataclasses.replace(
        records[0], source_ns=np.arange(sum(map(len, records)), dtype=np.int64) * PERIOD_NS,
        values=np.concatenate([r.values for r in records]), valid=np.concatenate([r.valid for r in records]),
        gap=np.concatenate([r.gap for r in records]),
    )


def assert_same(one, two, but=()):
    assert one.params == two.params and one.arrays.keys() == two.arrays.keys()
    for name in one.arrays.keys() - set(but):
        assert one.arrays[name].dtype == two.arrays[name].dtype, name
        assert_array_equal(one.arrays[name], two.arrays[name], err_msg=name)


def waves(n, n_columns, seed, amplitude=1.0):
    rng = np.random.default_rng(seed)
    speed, phase = rng.uniform(0.05, 0.3, n_columns), rng.uniform(0, 6, n_columns)
    x = np.sin(speed * np.arange(n)[:, None] + phase) * (1 + np.arange(n_columns))
    return amplitude * x + 0.05 * rng.standard_normal((n, n_columns))


@st.composite
def situations(draw):
    """A healthy record, rows to adapt to (wider, with gaps, masks, NaN), and parameters."""
    seed = draw(st.integers(0, 10**6))
    rng = np.random.default_rng(seed)
    n_columns = draw(st.integers(1, 3))
    decimals = draw(st.sampled_from([0, 1, 6]))  # few decimals: ties, plateaus, constant vectors
    kinds = [TagKind.MEASURED, TagKind.SETPOINT, draw(st.sampled_from([TagKind.MEASURED, TagKind.SETPOINT]))]
    tags = [Tag(f"t{k}", kind=kinds[k]) for k in range(n_columns)]

    def record(n, amplitude, damage):
        values = waves(n, n_columns, int(rng.integers(100)), amplitude).round(decimals)
        valid = (rng.random(values.shape) > damage).astype(np.uint8)
        values[rng.random(values.shape) < 0.1 * damage] = np.nan
        gap = np.zeros(n, np.uint8)
        gap[rng.integers(0, n, draw(st.integers(0, 3)))] = 1
        return dataclasses.replace(Record.from_rows(values, tags, PERIOD_NS, gap=gap), valid=valid)

    params = TransitionParams(
        levels=draw(st.integers(2, 6)), step=draw(st.integers(1, 5)), eta=draw(st.sampled_from([0.8, 0.99])),
        max_vectors=draw(st.sampled_from([0, 2, 5])), partners=draw(st.sampled_from([0, 1])),
        faithful=draw(st.booleans()), affine=draw(st.booleans()), affine_ridge=1e-2,
    )
    healthy = record(200, 1.0, 0.0)
    try:
        model = PLUGIN.fit(healthy, params)
    except RecordError:
        model = None
    normal = record(draw(st.sampled_from([3, 40, 120])), draw(st.sampled_from([1.0, 1.5, 4.0])),
                    draw(st.sampled_from([0.0, 0.05, 0.3])))
    return model, healthy, normal, draw(st.booleans())


@settings(max_examples=80, deadline=None, derandomize=True)
@given(situations())
def test_transitions_bounds_and_maps_equal_the_twin(situation):
    model, _, normal, borrow = situation
    if model is None:
        return
    after, journal = adapt(model, normal, borrow_widths=borrow)
    a = after.arrays
    expected, n_new = oracle.adapt(model, normal.values, normal.valid, normal.gap, borrow), 0
    for i, rows in enumerate(expected):
        assert np.flatnonzero(a["table"][i] >= 0).tolist() == sorted(rows)
        n_new += len(rows) - int((model.arrays["table"][i] >= 0).sum())
        for code, twin in rows.items():
            row = a["table"][i, code]
            assert_allclose(a["lo"][row], twin["lo"], rtol=1e-12, atol=1e-12)
            assert_allclose(a["hi"][row], twin["hi"], rtol=1e-12, atol=1e-12)
            if "maps" in a:
                assert_allclose(a["maps"][row], twin["map"], atol=1e-9)
                assert_allclose(a["spread"][row], twin["spread"], atol=1e-7)
                assert a["slack"][row] == pytest.approx(twin["slack"], abs=1e-7)
                assert a["limit"][row] == pytest.approx(twin["limit"], abs=1e-12)
    assert sum(one["transitions"] for one in journal["tags"].values()) == n_new


@settings(max_examples=80, deadline=None, derandomize=True)
@given(situations())
def test_nothing_is_forgotten_what_is_fed_back_is_normal_and_twice_changes_nothing(situation):
    model, healthy, normal, borrow = situation
    if model is None:
        return
    untouched = {name: array.copy() for name, array in model.arrays.items()}
    after, journal = adapt(model, normal, borrow_widths=borrow)
    for name, array in model.arrays.items():
        assert_array_equal(array, untouched[name])
    for kind in ("trans", "bound"):
        before, now = residuals(model, healthy, kind), residuals(after, healthy, kind)
        assert (now[np.isfinite(before)] <= before[np.isfinite(before)]).all()
        fed_back = residuals(after, normal, kind)
        assert np.nanmax(fed_back, initial=0.0) == 0.0
    if "maps" in model.arrays:
        assert_excused(model, after, normal)
    again, nothing = adapt(after, normal, borrow_widths=borrow)
    assert_same(again, after)
    assert not nothing["changed"] and nothing["tags"] == nothing["low"] == nothing["high"] == {}
    assert nothing["instants"] == journal["instants"]
    changed = any(not np.array_equal(after.arrays[k], untouched[k]) for k in ("table", "lo", "hi", "vectors"))
    assert journal["changed"] or not changed


def assert_excused(model, after, normal):
    """No whole vector that was fed back has an affine error above the limit of its transition."""
    z, valid = oracle.scaled_rows(after, normal.values, normal.valid)
    whole = residuals(after, dataclasses.replace(normal, valid=valid.astype(np.uint8)), "affine")
    a, step = after.arrays, after.params["step"]
    for n in range(len(normal)):
        t = n - step
        for i, own in enumerate(np.flatnonzero(a["judged"])):
            if np.isfinite(whole[n, i]) and oracle.extend(z, valid, t, own, a["partners"][i], step)[1].all():
                level = [oracle.level_of(normal.values[s, own], a["edges"][i]) for s in (t, n)]
                row = a["table"][i, level[0] * after.params["levels"] + level[1]]
                assert whole[n, i] <= a["limit"][row] + 1e-8


@settings(max_examples=60, deadline=None, derandomize=True)
@given(situations())
def test_the_kept_vectors_cover_all_that_was_normal(situation):
    model, healthy, normal, borrow = situation
    if model is None:
        return
    after, _ = adapt(model, normal, borrow_widths=borrow)
    a, p = after.arrays, after.params
    sign = np.abs if p["faithful"] else np.asarray
    z, valid = oracle.scaled_rows(after, normal.values, normal.valid)
    for i, own in enumerate(np.flatnonzero(a["judged"])):
        learnt = oracle.whole_vectors(after, i, own, z, valid, normal)
        of_old = oracle.learn_sensor(
            healthy, own, oracle.scaled_rows(after, healthy.values, healthy.valid)[0], a["edges"][i], a["partners"][i],
            TransitionParams(**p))
        of_old = {code: np.array(unit).reshape(-1, a["lo"].shape[1]) for code, _, _, _, unit in of_old}
        for code in np.flatnonzero(a["table"][i] >= 0):
            row = a["table"][i, code]
            v = a["vectors"][a["pointers"][row] : a["pointers"][row + 1]].astype(float)
            none = np.zeros((0, v.shape[1]))
            unit = np.concatenate([of_old.get(code, none), learnt.get(code, none)])
            if not len(unit):
                assert not len(v)
                continue
            assert np.max(sign(v @ v.T) - 2 * np.eye(len(v)), initial=-1.0) < p["eta"] + 1e-6
            best = sign(unit @ v.T).max(axis=1).min()
            if p["faithful"] or not p["max_vectors"] or len(v) < p["max_vectors"]:
                assert best >= p["eta"] - 1e-6
            assert len(v) <= (p["max_vectors"] if p["max_vectors"] and not p["faithful"] else len(unit))
            assert (unit @ v.T).max(axis=1).min() >= 1 - a["cover"][row] - 1e-5


@pytest.mark.parametrize("params", [{}, {"faithful": True}, {"max_vectors": 0, "affine": False}])
@pytest.mark.parametrize("borrow", [True, False])
def test_a_record_in_four_batches_gives_the_same_as_in_one_go(params, borrow):
    rows = make("lorenz", seed=5).simulate(13_000)[1000:]
    model = fit(record_of(rows[:4000]), levels=24, **params)
    batches = [record_of(rows[a : a + 2000]) for a in range(4000, 12_000, 2000)]
    one_go, journal = adapt(model, joined(*batches), borrow_widths=borrow)
    in_parts = model
    for batch in batches:
        in_parts, _ = adapt(in_parts, batch, borrow_widths=borrow)
    assert_same(in_parts, one_go, but=("vectors", "pointers", "cover", "instants"))
    assert all(sum(one[what] for one in journal["tags"].values()) > 10 for what in ("transitions", "bounds"))
    if not params.get("faithful"):
        for learnt in (one_go, in_parts):
            worst = max(0.01, float(learnt.arrays["cover"].max()))
            assert np.nanmax(residuals(learnt, joined(*batches), "conf")) <= worst + 1e-6
    for record in batches:
        assert np.nanmax(residuals(in_parts, record, "bound")) == 0.0


@pytest.mark.parametrize("faithful", [False, True])
def test_healthy_batches_give_what_a_fit_of_all_would_give_with_these_levels_and_scales(faithful):
    rows = make("lorenz", seed=6).simulate(9000)[1000:]
    batches = [record_of(rows[a : a + 2000]) for a in range(0, 8000, 2000)]
    model = first = fit(batches[0], levels=12, faithful=faithful)
    for batch in batches[1:]:
        model, _ = adapt(model, batch, borrow_widths=False)
    a, everything = model.arrays, joined(*batches)
    z, _ = oracle.scaled_rows(first, everything.values, everything.valid)
    for i in range(2):
        params = TransitionParams(**model.params)
        learnt = oracle.learn_sensor(everything, i, z, a["edges"][i], a["partners"][i], params)
        assert np.flatnonzero(a["table"][i] >= 0).tolist() == [one[0] for one in learnt]
        for code, _, lo, hi, unit in learnt:
            row = a["table"][i, code]
            assert_array_equal(a["lo"][row], lo)
            assert_array_equal(a["hi"][row], hi)
            v = a["vectors"][a["pointers"][row] : a["pointers"][row + 1]].astype(float)
            sign = np.abs if faithful else np.asarray
            if len(v) < 32:
                assert sign(np.array(unit) @ v.T).max(axis=1).min() >= 0.99 - 1e-6
    assert_array_equal(a["edges"], first.arrays["edges"])
    assert_array_equal(a["low"], everything.values.min(axis=0))


def test_a_new_transition_starts_centred_with_the_widths_of_the_nearest_one():
    ramp = np.concatenate([np.arange(0, 100), np.arange(100, 0, -1)]).astype(float)
    model = fit(record_of(np.tile(ramp, 20)[:, None]), levels=10, step=4)
    jump = record_of(np.array([[12.0], [13.0], [14.0], [15.0], [75.0], [76.0], [77.0], [78.0]]))
    after, journal = adapt(model, jump)
    assert journal == {
        "instants": 1, "changed": True, "low": {}, "high": {},
        "tags": {"t0": {"transitions": 1, "bounds": 0, "vectors": 1, "offsets": 0, "slacks": 0}}}
    a, b = model.arrays, after.arrays
    q = [oracle.level_of(x, a["edges"][0]) for x in (15.0, 78.0)]  # judged: t = row 3
    code = q[0] * 10 + q[1]
    assert a["table"][0, code] < 0 <= b["table"][0, code]
    seen = np.flatnonzero(a["table"][0] >= 0)
    nearest = min(seen, key=lambda c: (abs(c // 10 - q[0]) + abs(c % 10 - q[1]), c))
    old, new = a["table"][0, nearest], b["table"][0, code]
    z = (jump.values[:, 0] - a["mean"][0]) * a["inverse"][0]
    w = np.array([z[3], z[0], z[1], z[2]])
    assert_allclose(0.5 * (b["lo"][new] + b["hi"][new]), w, atol=1e-12)
    assert_allclose(b["hi"][new] - b["lo"][new], a["hi"][old] - a["lo"][old], atol=1e-12)
    assert b["instants"][new] == 1
    assert residuals(after, jump)[-1].max() < 1e-6  # all four channels
    assert residuals(model, jump)[-1, 0] == 1.0


def test_a_small_lasting_offset_moves_maps_within_what_healthy_errors_allow_and_a_large_one_is_excused():
    rng = np.random.default_rng(0)
    x = np.sin(0.03 * np.arange(9000)) + 0.5 * np.sin(0.071 * np.arange(9000))
    rows = np.column_stack([x, 2.0 * x]) + 0.01 * rng.standard_normal((9000, 2))
    healthy = record_of(rows[:8000])
    model = fit(healthy, levels=8)
    moved = slacked = 0
    for offset in (0.1, 1.0):
        normal = record_of(rows[8000:] + np.array([0.0, offset]))
        after, journal = adapt(model, normal)
        a, b = model.arrays, after.arrays
        old = np.flatnonzero(np.concatenate([t[t >= 0] * 0 + 1 for t in a["table"]]))
        # where an old transition stands now
        now = np.concatenate([b["table"][i][np.flatnonzero(a["table"][i] >= 0)] for i in range(2)])
        shift = np.abs(b["maps"][now, -1] - a["maps"][old, -1])
        assert (b["spread"][:, 0] >= -b["limit"] - 1e-9).all() and (b["spread"][:, 1] <= b["limit"] + 1e-9).all()
        # healthy errors, of either sign, still fit into the limit
        assert (shift <= a["limit"] + 1e-9 + np.minimum(-a["spread"][:, 0], a["spread"][:, 1])).all()
        assert_array_equal(b["maps"][now, :-1], a["maps"][old, :-1])
        moved += sum(one["offsets"] for one in journal["tags"].values())
        slacked += sum(one["slacks"] for one in journal["tags"].values())
        before, fed_back = (np.nanmean(residuals(m, normal, "affine")[:, 1]) for m in (model, after))
        assert fed_back < before
        # healthy rows stay within what is normal
        errors = residuals(after, healthy, "affine")
        assert np.nanmax(errors) <= b["limit"].max() + 1e-9
    assert moved > 0 and slacked > 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(-3.0, 3.0), min_size=1, max_size=8), st.floats(-1.0, 0.0), st.floats(0.0, 1.0))
@example([1.3, -1.35], -0.8, 0.2)  # the second moves away from the first, which only the slack covers
def test_whatever_is_declared_normal_in_whatever_order_a_map_stays_within_its_healthy_errors(values, low, high):
    w, one_map = np.zeros(2), np.zeros(3)  # the error is the value less the offset
    spread, limit, slack = np.array([[low, high]]), np.ones(1), np.zeros(1)
    changed = np.zeros((1, 4), np.uint8)
    for x in values:
        adapt_map(w, x, one_map, spread, limit, slack, 0, changed)
        assert abs(x - one_map[2]) - slack[0] <= 1.0 + 1e-8
        assert abs(low - one_map[2]) <= 1.0 + 1e-8 and abs(high - one_map[2]) <= 1.0 + 1e-8
    state = one_map.copy(), spread.copy(), slack.copy()
    for x in values:
        assert abs(x - one_map[2]) - slack[0] <= 1.0 + 1e-8
        adapt_map(w, x, one_map, spread, limit, slack, 0, changed)
    for before, after in zip(state, (one_map, spread, slack), strict=True):
        assert_array_equal(before, after)


def test_other_faults_are_still_found_after_feedback():
    healthy = record_of(make("lorenz", seed=3).simulate(13_000)[1000:])
    model = fit(healthy)

    def faulty(name, factor, seed, rows=4000):
        plant = make("lorenz", seed=seed)
        plant.simulate(500)
        plant.set_factor(name, factor)
        return record_of(plant.simulate(rows))

    after, journal = adapt(model, faulty("beta", 1.25, 21).rows(1000, 1300))
    assert journal["changed"]
    other = faulty("sigma", 2 / 3, 22)
    for kind in ("bound", "affine"):
        before, now = (np.nanmean(residuals(m, other, kind)) for m in (model, after))
        assert now > 0.9 * before


def test_a_thousand_feedbacks_do_not_bloat_the_model():
    rng = np.random.default_rng(0)
    model = fit(record_of(waves(3000, 2, 1)), levels=8, max_vectors=8)
    sizes = []
    for k in range(1000):
        model, _ = adapt(model, record_of(waves(24, 2, k % 50, 1.2) + 0.1 * rng.standard_normal((24, 2))))
        sizes.append(sum(array.nbytes for array in model.arrays.values()))
    assert sizes[-1] < 1.02 * sizes[499]
    assert len(model.arrays["vectors"]) <= 8 * len(model.arrays["lo"])


def test_columns_may_come_in_another_order_the_journal_is_json_and_read_only_arrays_will_do():
    healthy = record_of(waves(800, 3, 0))
    model = fit(healthy, levels=6)
    frozen = {name: array.copy() for name, array in model.arrays.items()}
    for array in frozen.values():
        array.flags.writeable = False
    normal = record_of(waves(200, 3, 0, 1.4))
    after, journal = adapt(MethodModel(model.plugin, model.columns, model.period_ns, model.params, frozen), normal)
    assert json.loads(json.dumps(journal)) == journal
    assert journal["high"]["t2"] == normal.values[:, 2].max() > model.arrays["high"][2]
    moved = Record.from_rows(
        np.column_stack([np.zeros(200), normal.values[:, [2, 0, 1]]]), ["other", "t2", "t0", "t1"], PERIOD_NS)
    assert_same(adapt(model, moved)[0], after)


def test_a_column_that_never_moved_stays_inert_and_too_few_rows_change_nothing():
    values = waves(800, 2, 0)
    values[:, 1] = 4.2
    model = fit(record_of(values), levels=6)
    live = values[:60].copy()
    live[:, 1] = 1000.0
    after, journal = adapt(model, record_of(live))
    assert not journal["changed"] and journal["instants"] > 0
    assert_same(after, model)
    for n in (0, 1, 19):
        after, journal = adapt(model, record_of(values[:n]))
        assert not journal["changed"] and journal["instants"] == 0
        assert_same(after, model)


def test_rows_of_another_monitor_are_refused():
    model = fit(record_of(waves(300, 2, 0)), levels=6)
    with pytest.raises(ModelTagsError, match="lack t1"):
        adapt(model, record_of(waves(100, 2, 0), ["t0", "t2"]))
    with pytest.raises(ModelTagsError, match="20 ms apart"):
        adapt(model, Record.from_rows(waves(100, 2, 0), ["t0", "t1"], 2 * PERIOD_NS))
