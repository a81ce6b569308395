"""Fitting: the report says what a record covers and what it cannot support; a bad record is refused with its place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from opcua_detector.api import Tag, TagKind
from opcua_detector.calibration import MIN_HELD_OUT
from opcua_detector.detectors.transition import TransitionParams, TransitionPlugin
from opcua_detector.errors import ConfigError, RecordError
from opcua_detector.fitting import MIN_ROWS, fit_monitor
from opcua_detector.model import load
from sim_server.processes import Fault
from tests.plants import PERIOD_NS, DeviationParams, DeviationPlugin, lorenz_fit, lorenz_rows, noise_record

MODE = Tag("mode", kind=TagKind.STATE)


def fit(record, *, name="deviation", **more):
    return fit_monitor("plain", record, [(name, DeviationPlugin(), DeviationParams())], **more)


def with_states(*counts, seed=0):
    """Noise on tag a, with so many rows of state 0, 1, 2 ..."""
    record = noise_record(sum(counts), ["a", MODE], seed)
    record.values[:, 1] = np.repeat(np.arange(len(counts)), counts)
    return record


# -- the report -------------------------------------------------------------------------------------------------


def test_the_report_says_how_long_the_record_is_and_where_it_has_gaps():
    record = noise_record(6000, ["a", "b"]).take(np.r_[0:2000, 2500:4000, 4100:6000])
    _, report = fit(record)
    assert (report.rows, report.gaps, report.seconds) == (5400, 2, pytest.approx(54.0))
    assert report.span_ns == (0, 5999 * PERIOD_NS)
    assert report.coverage == {0: 1.0} and report.excluded == {}


def test_the_report_gives_the_share_of_each_state_and_of_rows_in_none():
    record = with_states(3000, 1500, 300)
    record.valid[:100, 1] = 0
    model, report = fit(record, state_tag="mode")
    assert report.coverage == pytest.approx({0: 2900 / 4800, 1: 1500 / 4800})
    assert report.not_learnt == pytest.approx(400 / 4800)
    assert model.calibration.states == (0, 1) and model.state_tag == "mode"


def test_the_report_names_each_tag_that_is_left_out_with_its_reason():
    record = noise_record(3000, ["a", "idle", "clock", "again"])
    record.values[:, 1], record.values[:, 2] = 7.0, np.arange(3000) * 0.01
    record.values[:, 3] = 2 * record.values[:, 0] + 1
    model, report = fit(record)
    assert report.excluded == dict(model.excluded)
    assert report.excluded["idle"] == "constant at 7" and report.excluded["again"] == "duplicate of a"
    assert "clock" in report.excluded["clock"] and [tag.name for tag in model.tags] == ["a"]


def test_a_totaliser_a_clock_and_a_constant_beside_the_plant_change_nothing_but_the_report():
    plain = lorenz_rows(6000, 1)
    t = np.arange(6000.0)
    beside = np.column_stack([np.cumsum(1 + np.sin(t / 50)), t * 0.01, np.full(6000, 3.0)])
    record = replace(plain, tags=(*plain.tags, Tag("total"), Tag("clock"), Tag("constant")),
                     values=np.hstack([plain.values, beside]), valid=np.ones((6000, 5), np.uint8))
    method = [("transition", TransitionPlugin(), TransitionParams())]
    with_them, report = fit_monitor("m", record, method)
    without, _ = fit_monitor("m", plain, method)
    assert set(report.excluded) == {"total", "clock", "constant"}
    assert with_them.facts["given"] == [tag.name for tag in record.tags]
    facts = {**with_them.facts, "given": without.facts["given"]}
    assert replace(with_them, excluded={}, facts=facts).model_id == without.model_id


def test_a_faulty_stretch_of_5_percent_inside_the_healthy_record_is_named_first():
    n, start, stop = 12_000, 6000, 6600
    record = lorenz_rows(n, 1, Fault("beta", 1.25, start, stop))
    model, report = fit_monitor("m", record, [("transition", TransitionPlugin(), TransitionParams())])
    from_ns, to_ns, times_usual, group = report.suspicious[0]
    assert from_ns < stop * PERIOD_NS and to_ns > start * PERIOD_NS
    assert times_usual > 2 and group in {view.name for view in model.calibration.views}


def test_a_stretch_far_off_is_named_with_its_interval_and_an_even_record_names_none():
    even = noise_record(10_000, ["a", "b"])
    assert fit(even)[1].suspicious == ()
    values = even.values.copy()
    values[4000:4300, 0] += 8
    stretches = fit(replace(even, values=values))[1].suspicious
    assert len(stretches) == 1
    assert abs(stretches[0][0] / PERIOD_NS - 4000) <= 150 and abs(stretches[0][1] / PERIOD_NS - 4300) <= 150


def test_a_wish_that_the_record_cannot_support_is_noted():
    _, report = fit(noise_record(2000, ["a"]), windows_ns=[300 * PERIOD_NS], false_alarms_per_day=0.01)
    assert any("0.01 false alarms a day" in note for note in report.notes)


def test_the_report_gives_a_limit_for_each_group_and_window():
    model, report = fit(noise_record(3000, ["a"]), windows_ns=[20 * PERIOD_NS, 50 * PERIOD_NS])
    assert len(report.limits) == model.calibration.limit[0].size == 2
    assert sorted(report.limits.values()) == sorted(model.calibration.limit[0].ravel().tolist())
    assert model.calibration.windows.tolist() == [20, 50]


def test_without_windows_those_of_a_nonlinear_plant_are_taken_where_no_method_can_tell():
    assert fit(noise_record(5000, ["a"]))[0].calibration.windows.tolist() == [10, 100, 1000]
    assert fit(noise_record(3000, ["a"]))[0].calibration.windows.tolist() == [10, 100]


# -- the model --------------------------------------------------------------------------------------------------


def test_the_same_record_gives_the_same_model():
    record = lorenz_rows(4000, 3)
    method = [("transition", TransitionPlugin(), TransitionParams())]
    assert fit_monitor("m", record, method)[0].model_id == fit_monitor("m", record, method)[0].model_id
    assert fit_monitor("m", record.rows(0, 3999), method)[0].model_id != fit_monitor("m", record, method)[0].model_id


def test_a_fitted_model_can_be_saved_whatever_its_report_says(tmp_path):
    record = with_states(3000, 1500)
    model, _ = fit(record, state_tag="mode")
    assert load_of(model, tmp_path) == model.model_id
    assert load_of(lorenz_fit()[0], tmp_path) == lorenz_fit()[0].model_id


def load_of(model, folder):
    model.save(folder / "m.npz")
    return load(folder / "m.npz").model_id


def test_a_method_used_twice_gets_a_name_of_its_own():
    plugin, params = DeviationPlugin(), DeviationParams()
    model, _ = fit_monitor("m", noise_record(3000, ["a", "b"]), [("deviation", plugin, params)] * 2)
    assert model.names == ("deviation", "deviation2") and len(model.calibration.channels) == 4


def test_progress_names_each_method_while_it_is_fitted_and_calibrated():
    said = []
    fit(noise_record(3000, ["a", "b"]), progress=said.append)
    assert said == ["fitting deviation", "calibrating deviation", "hiding each tag in turn"]


# -- bad records ------------------------------------------------------------------------------------------------


def refused(record, **more):
    with pytest.raises(RecordError) as caught:
        fit(record, **more)
    assert caught.value.where and caught.value.next_step
    return str(caught.value)


def test_a_record_too_short_is_told_with_its_length_and_what_is_needed():
    text = refused(noise_record(MIN_ROWS - 1, ["a"]))
    assert f"{MIN_ROWS - 1} rows, {MIN_ROWS} needed" in text and "longer" in text
    assert f"{(MIN_ROWS - 1) * 0.01:.1f} s at 10 ms" in text


def test_a_channel_with_too_few_judged_rows_is_named():
    record = noise_record(3000, ["a", "b"])
    record.valid[:, 1] = np.arange(3000) % (4000 // MIN_HELD_OUT) == 0
    assert "channel bound of b: " in refused(record) and f"{MIN_HELD_OUT} needed" in refused(record)


@pytest.mark.parametrize("move", [0, -5, -2000])
def test_stamps_that_do_not_increase_are_told_with_row_and_time(move):
    record = noise_record(3000, ["a"])
    record.source_ns[1234] = record.source_ns[1233] + move * PERIOD_NS
    text = refused(record)
    assert f"row 1234, {record.source_ns[1234]} ns" in text and "sort the record" in text


def test_a_tag_without_any_valid_value_is_named():
    record = noise_record(3000, ["a", "dead"])
    record.values[:, 1], record.valid[:, 1] = np.nan, 0
    assert "tag dead" in refused(record)


def test_a_record_in_which_nothing_moves_is_told_with_the_reasons():
    record = noise_record(3000, ["a", "b"])
    record.values[:] = 5.0
    assert "a: constant at 5; b: constant at 5" in refused(record)


@pytest.mark.parametrize("tag", ["a", "nowhere"])
def test_a_state_tag_that_is_none_is_a_mistake_of_the_config(tag):
    with pytest.raises(ConfigError, match="kind state") as caught:
        fit(with_states(3000), state_tag=tag)
    assert caught.value.key == "state_tag" and caught.value.value == tag


def test_states_too_short_to_learn_are_told_with_their_number():
    assert "takes 4 values, 0 of them long enough" in refused(with_states(300, 300, 300, 300), state_tag="mode")
