"""Figures of a replay are those of the metrics on the same rows, and events, alerts and days are told one by one."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import numpy as np
import pytest

from opcua_detector.api import Record, Tag, TagKind
from opcua_detector.engine import AlertSettings, RowMonitor
from opcua_detector.errors import RecordError
from opcua_detector.evaluation import (
    VUS_WINDOW,
    Evaluation,
    Replay,
    as_dict,
    evaluate,
    held_truth,
    in_words,
    replay,
    runs,
    top_tags,
)
from opcua_detector.metrics import auc, operating_point, partial_auc, vus_pr
from opcua_detector.parts import Cycle, PartMonitor, fit_parts
from sim_server.processes import Fault, make
from tests.plants import deviation_monitor, noise_record, record_of, scores

TAGS = ("a", "b", "c")
FAULTS = ((2000, 2300, "b"), (4000, 4100, "c"), (5990, 6000, "a"))
QUICK = AlertSettings(off_delay_ns=50_000_000)


@cache
def healthy() -> Record:
    return noise_record(5000, TAGS, seed=1)


def monitor() -> RowMonitor:
    return deviation_monitor(healthy(), alert=QUICK)


@cache
def faulty() -> Record:
    """Noise with two shifts that are far off and one that is too short and weak to be seen."""
    record = noise_record(6000, TAGS, seed=2)
    values, truth = record.values.copy(), np.zeros(6000, np.uint8)
    for (begin, end, tag), size in zip(FAULTS, (8.0, 8.0, 0.2), strict=True):
        values[begin:end, TAGS.index(tag)] += size
        truth[begin:end] = 1
    return record_of(values, TAGS, truth=truth)


@cache
def judged() -> tuple[Replay, Evaluation]:
    said = replay(faulty(), monitor(), edges=np.linspace(0, 6000, 61).astype(np.int64) * 10_000_000)
    return said, evaluate(faulty(), said, budget_per_day=100.0)


def test_a_replay_says_what_the_engine_says_row_by_row() -> None:
    said, _ = judged()
    np.testing.assert_array_equal(said.score, scores(monitor(), faulty()))
    standing = np.zeros(6000, np.bool_)
    for alert in said.alerts:
        standing[alert.begin:alert.end] = True
        assert alert.peak_score == np.nanmax(said.score[alert.begin:alert.end])
        assert alert.raised_ns == faulty().source_ns[alert.begin]
        assert alert.cleared_ns == (faulty().source_ns[alert.end] if alert.end < 6000 else None)
    np.testing.assert_array_equal(standing, said.alert)


def test_figures_are_those_of_the_metrics_on_the_same_rows() -> None:
    said, found = judged()
    truth = faulty().truth
    assert truth is not None and found.ranking is not None and found.random is not None
    assert found.ranking.auc == auc(said.score, truth)
    assert found.ranking.pauc == partial_auc(said.score, truth, 0.1)
    assert found.ranking.vus_pr == vus_pr(said.score, truth, VUS_WINDOW)
    assert found.point == operating_point(said.alert, truth, 0.01)
    assert found.random.auc == pytest.approx(0.5, abs=0.03) and found.random.vus_pr < found.ranking.vus_pr
    wide = evaluate(faulty(), said, budget_per_day=100.0, vus_window=400)
    assert wide.ranking is not None and wide.ranking.vus_pr == vus_pr(said.score, truth, 400)
    assert wide.ranking.auc == found.ranking.auc


def test_events_are_told_one_by_one_with_delay_and_tag_and_nothing_is_adjusted() -> None:
    said, found = judged()
    assert [(e.begin, e.end) for e in found.events] == [(a, b) for a, b, _ in FAULTS]
    assert [e.found for e in found.events] == [True, True, False]
    for event, (begin, end, tag) in zip(found.events[:2], FAULTS, strict=False):
        first = int(np.flatnonzero(said.alert[begin:end])[0])
        assert event.delay_s == pytest.approx(first * 0.01) and 0 < event.delay_s < 1
        assert event.top_tag == tag and tag in event.sentence and not event.standing
        assert said.alerts[event.alert - 1].begin == begin + first
    missed = found.events[2]
    assert missed.alert == 0 and math.isnan(missed.delay_s) and missed.sentence == "" and missed.peak_score < 1
    assert found.point is not None
    assert (found.point.onsets, found.point.detected) == (3, 2)
    assert found.point.delay_s == pytest.approx(float(np.median([e.delay_s for e in found.events if e.found])))
    assert len(found.false_alerts) == found.point.false_alarms == found.raised - 2


def test_an_alert_that_stood_before_the_event_is_no_new_one() -> None:
    record = faulty()
    truth = np.zeros(6000, np.uint8)
    truth[2150:2300] = 1  # the ground truth begins late
    record = dataclasses.replace(record, truth=truth)
    found = evaluate(record, judged()[0], budget_per_day=100.0)
    (event,) = found.events
    assert event.found and event.standing and event.delay_s == 0.0 and event.top_tag == "b"
    assert event.alert in found.false_alerts


def test_without_ground_truth_alerts_stand_against_the_budget() -> None:
    said, with_truth = judged()
    found = evaluate(dataclasses.replace(faulty(), truth=None), said, budget_per_day=100.0)
    assert found.ranking is None and found.point is None and found.events == () and found.false_alerts == ()
    assert found.raised == len(said.alerts) == with_truth.raised
    days = found.scored * 0.01 / 86400
    assert found.alerts_per_day == pytest.approx(found.raised / days) and found.allowed == pytest.approx(100 * days)
    known = said.score[~np.isnan(said.score)]
    assert found.quantiles[0.5] == np.median(known) and found.quantiles[1.0] == known.max()
    assert found.above[1.0] == np.mean(known >= 1)
    assert any("too short to check a budget of 100 false alarms a day" in note for note in found.notes)


def test_days_count_in_utc_with_their_hours() -> None:
    record = faulty()
    midnight = 1_767_312_000_000_000_000  # 2026-01-02T00:00:00Z
    moved = dataclasses.replace(record, source_ns=record.source_ns + midnight - 30_000_000_000)
    said = replay(moved, monitor())
    found = evaluate(moved, said, budget_per_day=1.0)
    assert [day.day for day in found.days] == ["2026-01-01", "2026-01-02"]
    assert [day.hours for day in found.days] == pytest.approx([30 / 3600, 30 / 3600])
    before = [a for a in said.alerts if a.begin < 3000]
    assert [day.raised for day in found.days] == [len(before), len(said.alerts) - len(before)]
    assert sum(day.false_alarms for day in found.days) == len(found.false_alerts)


@pytest.mark.parametrize(("value", "word"), [(0, "healthy"), (1, "faulty")])
def test_one_class_alone_cannot_be_ranked_and_says_so(value: int, word: str) -> None:
    record = dataclasses.replace(faulty(), truth=np.full(6000, value, np.uint8))
    found = evaluate(record, judged()[0], budget_per_day=100.0)
    assert found.ranking is None and found.random is None and found.point is not None
    assert any(f"every one of the rows {word}" in note for note in found.notes)
    assert math.isnan(found.point.onset_recall if value == 0 else found.point.false_alarm_share)


def test_a_recording_without_any_verdict_is_refused() -> None:
    record = faulty().rows(0, 3)
    said = replay(record, monitor())
    with pytest.raises(RecordError, match="not one of 3 rows got a verdict") as caught:
        evaluate(record, said, budget_per_day=1.0)
    assert "longer recording" in caught.value.next_step


def test_leads_are_the_contributions_at_the_highest_score_of_each_stretch() -> None:
    said, _ = judged()
    assert said.lead.shape == (60, 3) and said.peak.shape == (60,)
    for b in range(60):
        own = said.score[b * 100:(b + 1) * 100]
        assert said.peak[b] == pytest.approx(np.nanmax(own), rel=1e-6)
    np.testing.assert_allclose(said.lead[said.peak >= 0.5].sum(axis=1), 1.0, rtol=1e-5)
    assert (said.lead[said.peak < 0.5] == 0).all()
    assert said.lead[20:23].argmax(axis=1).tolist() == [1, 1, 1]
    assert top_tags(said)[:2] == ["b", "c"]


def test_errors_of_quiet_rows_are_one_as_learnt_and_more_where_the_plant_changed() -> None:
    record = faulty()
    usual = judged()[0].error
    assert usual == pytest.approx(np.ones(3), abs=0.1)
    values = record.values.copy()
    values[:, 2] *= 1.5
    changed = replay(record_of(values, TAGS, truth=record.truth), monitor()).error
    assert changed[:2] == pytest.approx(usual[:2]) and changed[2] > 1.3


def test_masked_rows_holes_and_unlearnt_states_are_counted_not_guessed() -> None:
    tags = [Tag("a"), Tag("b"), Tag("mode", kind=TagKind.STATE)]
    rng = np.random.default_rng(4)
    fit = record_of(np.column_stack([rng.standard_normal((4000, 2)), np.repeat([1, 2], 2000)]), tags)
    values = np.column_stack([rng.standard_normal((3000, 2)), np.repeat([1, 7, 2], 1000)])
    valid = np.ones((3000, 3), np.uint8)
    valid[2000:2600, :2] = 0
    gap = np.zeros(3000, np.uint8)
    gap[500] = 1
    record = record_of(values, tags, valid=valid, gap=gap)
    said = replay(record, deviation_monitor(fit, state_tag="mode"))
    found = evaluate(record, said, budget_per_day=1.0)
    assert np.isnan(said.score[1000:2000]).all() and found.scored < 2000 and found.gaps == 1
    assert found.masked == pytest.approx(1200 / 6000 if len(said.tags) == 2 else 1200 / 9000)
    assert any("got no verdict" in note for note in found.notes)
    assert np.isfinite(said.error[:2]).all()


def test_a_cyclic_monitor_is_judged_part_by_part() -> None:
    press = make("press", seed=5)
    fit, fresh = press.simulate_block(40_000), make("press", seed=6)
    tags = (Tag("position"), Tag("force"), Tag("temperature"), Tag("cycle", kind=TagKind.COUNTER))
    cycle = Cycle("cycle")
    healthy_record = Record.from_rows(fit.measured[:, :4], tags, 10_000_000)
    model, _ = fit_parts("press", healthy_record, cycle, false_alarms_per_day=1.0)
    block = fresh.simulate_block(12_000, faults=[Fault("wear", 1.3, 4000, 6000)])
    record = Record.from_rows(block.measured[:, :4], tags, 10_000_000, truth=block.labels)
    said = replay(record, PartMonitor("press", model, tags, QUICK))
    found = evaluate(record, said, budget_per_day=1.0)
    assert found.unit == "parts" and len(said.parts) > 50
    (event,) = found.events
    assert event.begin == 4000 and 6000 <= event.end < 6400
    assert event.found and event.top_tag == "force" and 0 <= event.delay_s < 3
    assert found.ranking is not None and found.ranking.auc > 0.95
    assert found.point is not None and found.point.onset_recall == 1.0 and found.point.false_alarms == 0
    assert found.point.healthy_h * 3600 == pytest.approx(120 - 20, abs=5)


def test_ground_truth_of_a_tag_is_held_over_missing_values() -> None:
    values = np.array([9.0, 0.0, 1.0, np.nan, 5.0, 0.0])
    truth, unknown = held_truth(values, np.array([0, 1, 1, 1, 0, 1], np.uint8))
    assert truth.tolist() == [0, 0, 1, 1, 1, 0] and unknown == 3


def test_runs_and_words() -> None:
    assert runs(np.array([1, 1, 0, 1])) == [(0, 2), (3, 4)] and runs(np.zeros(3)) == []
    assert [in_words(s) for s in (0.0, 0.0004, 1.5, 119, 120, 7200, 86400 * 3, math.nan)] == [
        "0 s", "0.4 ms", "1.5 s", "119 s", "2 min", "2 h", "3 d", "-"]


def test_as_dict_is_plain_and_whole() -> None:
    said, found = judged()
    out = as_dict(found, said)
    assert out["raised"] == len(out["alerts"]) and out["ranking"]["auc"] == found.ranking.auc  # type: ignore[union-attr]
    assert out["quantiles"]["0.5"] == found.quantiles[0.5] and out["days"][0]["day"] == "1970-01-01"
