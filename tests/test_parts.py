"""Parts of cyclic processes: the trigger cuts where it says, features and corridor are those of a plain calculation,
and a record that cannot support a fit is refused with what is missing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from opcua_detector import config as configuration
from opcua_detector.api import Cause, Record, Tag, TagKind
from opcua_detector.app import open_monitor, registry_of, setup_of
from opcua_detector.errors import ConfigError, ModelFileError, ModelTagsError, RecordError
from opcua_detector.kernels import parts as kernels
from opcua_detector.model import load
from opcua_detector.nodes import EXPLANATION_CHARS
from opcua_detector.parts import (
    KINDS,
    MIN_PARTS,
    Cycle,
    PartCause,
    PartJudge,
    PartModel,
    PartMonitor,
    cut_record,
    feature_kinds,
    fit_parts,
    is_part_model,
    part_scores,
    part_sentence,
)

PERIOD_NS = 100_000_000
COUNTER = Cycle("count")
TAGS = (Tag("x", unit="bar"), Tag("y", unit="mm"), Tag("count", kind=TagKind.COUNTER),
        Tag("busy", kind=TagKind.STATE))


def made(lengths, seed=0, pause=3, noise=0.05, edit=None):
    """A record of parts of these lengths with pauses: x a half sine, y a ramp, both with noise; 100 ms a row."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, length in enumerate(lengths):
        phase = np.arange(length) / length
        part = np.column_stack([10 * np.sin(np.pi * phase), 50 * phase, np.full(length, number + 1.0), np.ones(length)])
        rest = np.column_stack([np.zeros(pause), np.full(pause, 50.0), np.full(pause, number + 1.0), np.zeros(pause)])
        whole = np.concatenate([part, rest])
        whole[:, :2] += noise * rng.standard_normal((len(whole), 2))
        rows.append(whole if edit is None else edit(number, whole))
    return Record.from_rows(np.concatenate(rows), TAGS, PERIOD_NS)


def lengths_of(n, seed=1):
    return np.random.default_rng(seed).integers(38, 43, n)


# -- the trigger --------------------------------------------------------------------------------------------------


def watched(values, mode, back=False, tolerance=1, valid=None):
    """Bits of each row."""
    values = np.array(values, float)
    valid = np.ones(len(values), np.uint8) if valid is None else np.array(valid, np.uint8)
    codes, silent = np.zeros(len(values), np.int64), np.zeros(len(values), np.uint8)
    kernels.watch_rows(values, valid, np.zeros(len(values), np.uint8), mode, back, tolerance, codes, silent)
    return codes.tolist(), silent.tolist()


BOTH = kernels.END | kernels.BEGIN


@pytest.mark.parametrize(("values", "mode", "back", "codes"), [
    ([5, 5, 6, 6, 6, 7, 0, 0], kernels.CHANGE, False, [0, 0, BOTH, 0, 0, BOTH, BOTH, 0]),
    ([0, 1, 1, 0, 1, 0], kernels.RISING, False, [0, BOTH, 0, 0, BOTH, 0]),
    ([0, 1, 1, 0, 1, 0], kernels.RISING, True, [0, kernels.BEGIN, 0, kernels.END, kernels.BEGIN, kernels.END]),
    ([1, 0, 0, 1, 0, 0], kernels.FALLING, False, [0, BOTH, 0, 0, BOTH, 0]),
    ([1, 0, 0, 1, 0, 0], kernels.FALLING, True, [0, kernels.BEGIN, 0, kernels.END, kernels.BEGIN, 0]),
    ([0.2, 24.0, 3.3, 0.4], kernels.RISING, False, [0, BOTH, 0, 0]),
    ([1, 1, 0], kernels.RISING, True, [0, 0, kernels.END]),  # a part whose begin was not seen ends, nobody minds
])
def test_the_trigger_cuts_where_it_says(values, mode, back, codes):
    assert watched(values, mode, back)[0] == codes


def test_a_short_silence_of_the_trigger_is_bridged_and_a_long_one_breaks_what_it_may_hide():
    nan = math.nan
    assert watched([1, nan, 2, 2], kernels.CHANGE)[0] == [0, 0, BOTH, 0]
    assert watched([1, nan, nan, 1, 2], kernels.CHANGE) == ([0, 0, 0, 0, BOTH], [0, 0, 1, 0, 0])  # it has not moved
    assert watched([1, nan, nan, 2, 3], kernels.CHANGE)[0] == [0, 0, 0, kernels.BROKEN, BOTH]  # it moved, but when
    assert watched([0, nan, 1], kernels.RISING)[0] == [0, 0, BOTH]
    assert watched([0, 1, nan, nan, 1, 0, 1], kernels.RISING)[0] == [0, BOTH, 0, kernels.BROKEN, 0, 0, BOTH]
    assert watched([1, 7, 7, 1, 2], kernels.CHANGE, valid=[1, 0, 0, 1, 1]) == ([0, 0, 0, 0, BOTH], [0, 0, 1, 0, 0])


def test_a_record_is_cut_into_whole_parts_and_what_its_ends_and_gaps_leave():
    record = made([40] * 6, pause=2)
    cut = cut_record(record, COUNTER, 2)
    assert_array_equal(cut.number, [2, 3, 4, 5, 6])
    assert_array_equal(cut.whole, [1, 1, 1, 1, 0])
    assert_array_equal(cut.end - cut.begin, 42)
    busy = cut_record(record, Cycle("busy", "rising", "back"), 2)
    assert_array_equal(busy.end - busy.begin, 40)
    assert_array_equal(busy.number, np.arange(len(busy.number)) + 1)
    holed = record.take(np.r_[0:100, 110:len(record)])
    cut = cut_record(holed, COUNTER, 2)
    assert_array_equal(cut.whole, [1, 0, 1, 1, 0])
    assert_array_equal(cut.number, [2, 3, 4, 5, 6])
    assert cut.end[1] == 100  # a part that a gap breaks ends there


# -- features and corridor, against plain calculations ----------------------------------------------------------


def plain_features(values, valid, n_bins, n_phases):
    """What `part_features` writes, slowly."""
    n, columns = values.shape
    out = np.full((n_bins + 2 * n_phases + 3, columns), np.nan)
    for c in range(columns):
        ok = valid[:, c] != 0
        for pieces, share, first in ((n_bins, 0.5, 0), (n_phases, 0.8, n_bins)):
            piece = np.array([t * pieces // n for t in range(n)])
            for k in range(pieces):
                here = piece == k
                if here.any() and ok[here].sum() > 0 and ok[here].sum() >= share * here.sum():
                    out[first + k, c] = values[here & ok, c].mean()
        if ok.sum() < 0.9 * n or ok.sum() < 2:
            continue
        mean = values[ok, c].mean()
        out[n_bins + n_phases:n_bins + 2 * n_phases, c] = out[n_bins:n_bins + n_phases, c] - mean
        steps = [values[t, c] - values[t - 1, c] for t in range(1, n) if ok[t] and ok[t - 1]]
        out[-3:, c] = mean, values[ok, c].std(), np.sqrt(np.mean(np.square(steps))) if steps else np.nan
    return out


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 90), seed=st.integers(0, 10_000), missing=st.sampled_from([0.0, 0.05, 0.4, 1.0]))
def test_features_are_those_of_a_plain_calculation(n, seed, missing):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((n, 3)) * [1.0, 100.0, 1e-3]
    valid = (rng.random((n, 3)) >= missing).astype(np.uint8)
    values[valid == 0] = np.nan
    got = np.full((4 + 12 + 2 * 5 + 3, 3), np.nan)
    kernels.part_features(values, valid, n, 4, 12, 5, got)
    assert np.isnan(got[:4]).all()
    assert_allclose(got[4:], plain_features(values, valid, 12, 5), rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 80), width=st.floats(1.0, 9.0), seed=st.integers(0, 10_000))
def test_bins_of_absolute_time_are_means_of_whole_stretches_of_rows(n, width, seed):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((n, 2))
    valid = (rng.random((n, 2)) > 0.3).astype(np.uint8)
    got = np.full((int(80 / width) + 1, 2), np.nan)
    kernels.run_rows(values, valid, width, got)
    piece = (np.arange(n + 1) / width).astype(int)
    for k in range(len(got)):
        here = np.flatnonzero(piece[:-1] == k)
        whole = len(here) > 0 and piece[here[-1] + 1] != k
        for c in range(2):
            ok = here[valid[here, c] != 0]
            if whole and len(ok) > 0 and len(ok) >= 0.5 * len(here):
                assert got[k, c] == pytest.approx(values[ok, c].mean(), abs=1e-12)
            else:
                assert np.isnan(got[k, c])


def test_the_corridor_is_the_median_and_a_spread_that_a_few_odd_parts_do_not_move():
    rng = np.random.default_rng(3)
    features = 5.0 + 2.0 * rng.standard_normal((4000, 2, 1))
    features[:150, 0] = 1e6  # 4 % of the parts
    features[:, 1] = np.where(rng.random((4000, 1)) < 0.04, np.nan, features[:, 1])
    center, spread = np.empty((2, 1)), np.empty((2, 1))
    kernels.corridor(features, 10, center, spread)
    assert_allclose(center[:, 0], [5.0, 5.0], atol=0.25)
    assert 1.8 < spread[1, 0] < 2.2 and 1.8 < spread[0, 0] < 3.5
    few = np.full((20, 1, 1), np.nan)
    few[:9] = 1.0
    kernels.corridor(few, 10, center[:1], spread[:1])
    assert np.isnan(center[0, 0]) and np.isnan(spread[0, 0])
    bulk = np.where(np.arange(100) % 10 < 2, 1.0, 0.0).reshape(100, 1, 1)  # the inner 68 % alone sees nothing
    kernels.corridor(bulk, 10, center[:1], spread[:1])
    assert spread[0, 0] > 0.3


def test_the_speed_of_a_part_is_found_where_it_alone_explains_the_rows():
    model, _ = fit_parts("p", made(lengths_of(200), pause=0), COUNTER)
    parts = PartModel.from_method(model.methods[0])
    for factor, column, found in ((1.4, None, 1 / 1.4), (1.4, 0, None), (1 / 1.4, None, 1.4)):
        length = round(40 * factor)
        phase = np.arange(length) / length
        rows = np.column_stack([10 * np.sin(np.pi * phase), 50 * phase])
        if column is not None:  # one tag alone goes slow
            usual = np.arange(length) / 40
            rows[:, 1] = 50 * usual
        judge = PartJudge(parts)
        judge.begin()
        for row in rows[:int(0.7 * length)]:
            judge.row(np.ascontiguousarray(row), np.ones(2, np.uint8))
        assert judge.running >= 1.0
        if found is None:
            assert math.isnan(judge.speed())
        else:
            assert judge.speed() == pytest.approx(found, rel=0.04)


# -- the fit ------------------------------------------------------------------------------------------------------


def test_a_fit_learns_the_corridor_and_leaves_out_and_counts_odd_parts():
    lengths = lengths_of(120)
    lengths[30], lengths[60] = 8, 300
    record = made(lengths)
    valid = record.valid.copy()
    start = int(np.flatnonzero(record.values[:, 2] == 90)[0])
    valid[start:start + 45, :2] = 0
    holed = replace(record, valid=valid).take(np.r_[0:1000, 1004:len(record)])
    model, report = fit_parts("p", holed, COUNTER, false_alarms_per_day=1.0)
    assert model.facts["parts_left_out"] == {
        "cut by the ends of the record, a gap or a missing trigger": 2, "far too short or too long": 2,
        "mostly masked": 1}
    assert model.facts["parts"] == 119 - 5
    assert report.notes[0] == ("114 parts learnt, 4.1 to 4.5 s each; left out: 2 cut by the ends of the record, a gap "
                               "or a missing trigger, 2 far too short or too long, 1 mostly masked")
    assert report.excluded == {"busy": "an input: parts are judged by measured tags"}
    parts = PartModel.from_method(model.methods[0])
    assert parts.columns == ("x", "y") and parts.rows[1] == 43
    bins = parts.kind == KINDS.index("bin")
    assert bins.sum() == parts.n_bins == 21
    usual = parts.center[bins]
    assert usual[:, 0].max() == pytest.approx(10.0, abs=0.2) and usual[-1, 1] == pytest.approx(50.0, abs=1.0)
    assert (np.diff(usual[:19, 1]) > 1.5).all()
    assert parts.rows[0] < 41 and parts.rows[2] > 45
    assert [c.kind for c in model.calibration.channels[:3]] == ["run", "run", "bin"]
    assert (model.calibration.channels[-1].tag, model.calibration.channels[-1].kind) == ("count", "time")


def test_too_few_parts_are_refused_with_how_many_there_are():
    with pytest.raises(RecordError, match=f"holds 20 whole parts, {MIN_PARTS} needed") as caught:
        fit_parts("p", made(lengths_of(22)), COUNTER)
    assert "trigger count" in str(caught.value) and "next step" in str(caught.value)
    assert fit_parts("p", made(lengths_of(MIN_PARTS + 2)), COUNTER)[0].facts["parts"] == MIN_PARTS


@pytest.mark.parametrize(("cycle", "error", "words"), [
    (Cycle("nothing"), ConfigError, "none of the monitor's tags"),
    (Cycle("busy", "rising"), RecordError, "fired 0 times"),
    (Cycle("x"), RecordError, "a part has 1 rows"),
])
def test_a_trigger_that_cuts_nothing_is_told(cycle, error, words):
    record = made(lengths_of(60))
    values = record.values.copy()
    values[:, 3] = 1.0
    with pytest.raises(error, match=words):
        fit_parts("p", replace(record, values=values), cycle)


def test_a_record_with_no_tag_to_judge_or_times_that_stand_still_is_refused():
    record = made(lengths_of(60))
    with pytest.raises(RecordError, match="no tag is left to judge"):
        fit_parts("p", record.select(["count", "busy"]), COUNTER)
    times = record.source_ns.copy()
    times[7] = times[6]
    with pytest.raises(RecordError, match="row 7"):
        fit_parts("p", replace(record, source_ns=times), COUNTER)


def test_the_note_says_when_the_parts_are_too_few_for_the_budget():
    record = made(lengths_of(100))
    small, _ = fit_parts("p", record, COUNTER, false_alarms_per_day=0.1)
    large, _ = fit_parts("p", record, COUNTER, false_alarms_per_day=50.0)
    assert any("too few to support 0.1 false alarms a day" in note for note in small.calibration.notes)
    assert len(large.calibration.notes) == 1
    wide, narrow = (PartModel.from_method(m.methods[0]) for m in (small, large))
    assert (wide.limit >= narrow.limit).all() and (wide.limit > narrow.limit).any()


def test_a_healthy_record_with_faulty_parts_inside_is_noticed():
    def spoiled(number, rows):
        return rows + (np.array([4.0, 0, 0, 0]) if 100 <= number < 105 else 0.0)

    record = made(lengths_of(200), edit=spoiled)
    _, report = fit_parts("p", record, COUNTER)
    (first, last, times, where), *more = report.suspicious
    inside = np.flatnonzero((record.values[:, 2] >= 101) & (record.values[:, 2] < 106))
    assert (first, last) == (record.source_ns[inside[0]], record.source_ns[inside[-1]])
    assert times > 3 and where == "parts/x" and not more
    assert fit_parts("p", made(lengths_of(200)), COUNTER)[1].suspicious == ()


def test_configured_times_bound_what_is_healthy():
    record = made(np.where(np.arange(100) % 10 == 0, 46, 40))
    free = PartModel.from_method(fit_parts("p", record, COUNTER)[0].methods[0])
    bound = Cycle("count", longest_ns=int(4.5e9), shortest_ns=int(4.25e9))
    model, _ = fit_parts("p", record, bound)
    parts = PartModel.from_method(model.methods[0])
    assert free.rows[2] > 49 and parts.rows.tolist() == [42.0, 43.0, 44.5]
    assert model.facts["parts_left_out"]["far too short or too long"] == 9


def test_rounded_values_do_not_make_a_corridor_narrower_than_a_tag_can_show():
    def rounded(number, rows):
        rows[:, 0] = np.round(rows[:, 0] * 2) / 2
        return rows

    model, _ = fit_parts("p", made([40] * 80, noise=0.0, edit=rounded), COUNTER)
    parts = PartModel.from_method(model.methods[0])
    assert (parts.spread[:, 0] >= 0.3 * 0.5 - 1e-12).all()
    assert (parts.spread[:, 1] >= 0.002 * 50 - 1e-9).all()  # noise-free: still a share of the span


def test_a_model_survives_its_file_and_scores_alike(tmp_path: Path):
    record = made(lengths_of(80))
    model, _ = fit_parts("p", record, COUNTER)
    file = tmp_path / "p.npz"
    assert model.save(file) == model.model_id
    again = load(file)
    assert again.model_id == model.model_id and is_part_model(again)
    fresh = made(lengths_of(50, 9), seed=4)
    assert_array_equal(part_scores(model, fresh)[1], part_scores(again, fresh)[1])
    spoiled = replace(model.methods[0], params={})
    with pytest.raises(ModelFileError, match="describes no parts"):
        PartModel.from_method(spoiled)
    with pytest.raises(ModelFileError, match="made by other"):
        PartModel.from_method(replace(model.methods[0], plugin="other"))


def test_frames_without_the_trigger_or_with_another_period_are_refused():
    model, _ = fit_parts("p", made(lengths_of(60)), COUNTER)
    with pytest.raises(ModelTagsError, match="count is not among"):
        PartMonitor("p", model, TAGS[:2])
    odd = (*TAGS[:2], replace(TAGS[2], kind=TagKind.MEASURED))
    with pytest.raises(ModelTagsError, match="fitted as counter"):
        PartMonitor("p", model, odd)


# -- sentences ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cause", "sentence"), [
    (PartCause("force", "bin", 1.0, 61.2, 48.0, 55.5, part=17, phase=(40.0, 55.0)),
     "part 17 left its normal corridor at 40 to 55 % of the cycle: force was 61.2 kN, normal there 48.0 to 55.5 kN"),
    (PartCause("cycle", "time", 1.0, 5.1, 3.9, 4.3, part=17, usual=4.1),
     "part 17 took 5.10 s; normal is 3.90 to 4.30 s"),
    (PartCause("cycle", "time", 1.0, 1.2, 3.9, 4.3, part=17, usual=4.1),
     "part 17 ended too soon, after 1.20 s; normal is 3.90 to 4.30 s"),
    (PartCause("cycle", "time", 1.0, 5.1, 3.9, 4.3, part=17, usual=4.1, whole=False),
     "part 17 has not ended after 5.10 s; normal is 3.90 to 4.30 s"),
    (PartCause("cycle", "time", 1.0, 4.3004, 3.9, 4.3, part=2, usual=4.1),
     "part 2 took 4.3004 s; normal is 3.9000 to 4.3000 s"),
    (PartCause("cycle", "speed", 1.0, 87.0, part=17, usual=100.0, whole=False),
     "part 17 runs slower than any healthy one, at 87 % of the usual speed"),
    (PartCause("force", "swing", 1.0, 0.0, 14.0, 16.0, part=3, usual=15.0),
     "force is stuck: it did not move during part 3; it usually varies by 14.0 to 16.0 kN (standard deviation)"),
    (PartCause("force", "swing", 1.0, 19.0, 14.0, 16.0, part=3, usual=15.0),
     "force varied by 19.0 kN (standard deviation) during part 3; normal is 14.0 to 16.0 kN"),
    (PartCause("force", "mean", 1.0, 19.0, 14.0, 16.0, part=3, usual=15.0),
     "force was 19.0 kN on average over part 3; normal is 14.0 to 16.0 kN"),
])
def test_sentences_say_part_phase_observed_and_normal(cause, sentence):
    assert part_sentence(cause, {"force": Tag("force", unit="kN")}, {"force": 60.0}) == sentence


def test_a_sentence_is_never_too_long_and_a_cause_of_rows_is_told_as_ever():
    long = PartCause("a_very_long_tag_name_" * 9, "bin", 1.0, 61.2, 48.0, 55.5, part=17, phase=(40.0, 55.0))
    assert len(part_sentence(long, {}, {})) == EXPLANATION_CHARS
    assert part_sentence(Cause("x", "bound", 1.0, 3.0, 1.0, 2.0), {}, {"x": 10.0}) == (
        "x is 3.0, too high; normal is 1.0 to 2.0")


# -- configuration and models -----------------------------------------------------------------------------------

YAML = """
version: 1
servers: [{name: plant, endpoint: "opc.tcp://127.0.0.1:4840/", policy: None, insecure: true}]
groups:
  - name: g
    server: plant
    period: 100 ms
    tags:
      - {name: x, node: "ns=1;s=x", unit: bar}
      - {name: y, node: "ns=1;s=y", unit: mm}
      - {name: count, node: "ns=1;s=count", kind: counter}
      - {name: busy, node: "ns=1;s=busy", kind: state}
monitors:
  - {name: p, group: g, tags: [x, y]CYCLE}
"""


def configured(cycle: str):
    return configuration.parse(YAML.replace("CYCLE", f", cycle: {cycle}" if cycle else ""))


def test_a_cycle_is_read_also_where_yaml_takes_its_key_for_true():
    plain = configured("{tag: busy, on: rising, until: back, longest: 8 s}").monitors[0].cycle
    quoted = configured('{tag: busy, "on": rising, until: back, longest: 8 s}').monitors[0].cycle
    assert plain == quoted and (plain.on, plain.longest) == ("rising", 8 * 10**9)
    assert configured("{tag: count}").monitors[0].cycle.on == "change"
    assert configured("").monitors[0].cycle is None


@pytest.mark.parametrize(("cycle", "key", "expected"), [
    ("{tag: pieces}", "monitors[0].cycle.tag", "one of x, y, count, busy"),
    ("{tag: count, until: back}", "monitors[0].cycle.until", "'next'"),
    ("{tag: count, on: up}", "monitors[0].cycle.on", "'change', 'rising' or 'falling'"),
    ("{tag: count, shortest: 3 s, longest: 2 s}", "monitors[0].cycle.longest", "more than the shortest"),
    ("{tag: count, min: 3 s}", "monitors[0].cycle.min", "one of tag, on, until, shortest, longest"),
    ("{tag: count}, methods: [transition]", "monitors[0].methods", "no key 'methods' beside 'cycle'"),
    ("{tag: count}, state_tag: busy", "monitors[0].state_tag", "no key 'state_tag' beside 'cycle'"),
])
def test_a_wrong_cycle_is_refused_with_its_key_and_what_was_expected(cycle, key, expected):
    with pytest.raises(ConfigError) as caught:
        configured(cycle)
    assert caught.value.key == key and expected in str(caught.value)


def test_a_model_belongs_to_its_cycle():
    config = configured("{tag: count}")
    item, group = config.monitors[0], config.groups[0]
    registry = registry_of(config)
    record = made(lengths_of(60)).select(["x", "y", "count"])
    model, _ = fit_parts("p", record, COUNTER, setup=setup_of(item, group))
    assert isinstance(open_monitor(item, group, model, registry), PartMonitor)
    for other, words in (("{tag: busy, on: rising}", "fitted for the tags x, y, count"),
                         ("{tag: count, longest: 9 s}", "fitted with cycle"),
                         ("", "the model judges parts, the config asks for rows")):
        with pytest.raises(ModelTagsError, match=words):
            open_monitor(configured(other).monitors[0], group, model, registry)


def test_feature_kinds_stand_in_the_order_of_the_features():
    assert_array_equal(feature_kinds(2, 3, 1), [0, 0, 1, 1, 1, 2, 3, 4, 5, 6])
