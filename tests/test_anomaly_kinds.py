"""Point, contextual and collective anomalies are found with the default configuration, on a linear plant and another.

Each is one change of fresh rows: the healthy rows before it stay silent, the alert begins within the change, blames the
tag that was changed and ends after it. What is contextual or collective keeps to values that are healthy by themselves.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from opcua_detector.engine import Engine, frames_of
from tests.plants import automatic_fit, lorenz_rows, monitor_of, noise_record, record_of

START = 3000
TAGS = {"followers": ("load", "a", "b", "c", "d", "e"), "lorenz": ("x1", "x3")}
WINDOWS_ROWS = 1100  # an alert is over when the longest window is


def followers(n, seed, settling=500):
    """A wandering load, and five tags that follow it, each with its own gain, lag and noise: a linear plant."""
    rng = np.random.default_rng(seed)
    gain, pole = np.linspace(1.0, -1.5, 5), np.linspace(0.7, 0.95, 5)
    load, rows = 0.0, np.zeros((n + settling, 6))
    for t, noise in enumerate(rng.standard_normal((n + settling, 6))):
        before = rows[t - 1] if t else np.zeros(6)
        load = 0.99 * before[0] + 0.141 * noise[5]
        rows[t, 0] = load
        rows[t, 1:] = pole * before[1:] + (1 - pole) * gain * before[0] + 0.05 * noise[:5]
    return rows[settling:]


@cache
def model_of(plant):
    record = record_of(followers(10_000, 1), TAGS[plant]) if plant == "followers" else lorenz_rows(60_000, 1)
    return automatic_fit(record)[0]


@cache
def fresh(plant):
    return followers(6000, 2) if plant == "followers" else lorenz_rows(6000, 2).values


def judged(plant, values):
    """(score, alert, tag with the largest contribution over the alert) of fresh rows, streamed."""
    record = record_of(values, TAGS[plant])
    monitor = monitor_of(model_of(plant), record.tags)
    engine = Engine([monitor])
    score, alert, blame = np.empty(len(record)), np.zeros(len(record), bool), np.zeros(len(record.tags))
    for k, frame in enumerate(frames_of(record)):
        verdict = engine.step(frame)[0]
        score[k], alert[k] = verdict.score, verdict.alert
        if verdict.alert:
            blame += verdict.contribution
    return score, alert, verdict.tags[int(np.argmax(blame))]


def found(plant, values, tag, rows, within):
    """Assert that a change of so many rows is found within so many rows, blamed on the tag, and over after it."""
    _, alert, blamed = judged(plant, values)
    assert not alert[:START].any()
    raised = np.flatnonzero(alert)
    assert len(raised) and raised[0] < START + within
    assert not alert[START + rows + WINDOWS_ROWS:].any()
    assert tag is None or blamed == tag


def changed(plant, tag, rows, change):
    """Fresh rows in which `rows` of one tag are replaced by change(all rows of the tag, first changed row)."""
    values = fresh(plant).copy()
    at = TAGS[plant].index(tag)
    values[START:START + rows, at] = change(fresh(plant)[:, at])
    return values


def within_healthy_range(plant, values):
    """Whether every value by itself is one that the tag takes in healthy operation."""
    return ((values >= fresh(plant).min(axis=0)) & (values <= fresh(plant).max(axis=0))).all()


@pytest.mark.parametrize("plant", list(TAGS))
def test_the_plants_are_what_they_are_taken_for_and_silent_while_healthy(plant):
    assert "regression" in model_of(plant).names
    assert ("transition" in model_of(plant).names) == (plant == "lorenz")
    score, alert, _ = judged(plant, fresh(plant))
    assert np.nanmax(score) < 1 and not alert.any()


# -- point --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plant", "tag", "height"), [
    ("followers", "b", 6.0), ("followers", "e", 3.0), ("followers", "load", 6.0), ("lorenz", "x1", 4.0),
    ("lorenz", "x3", 4.0)])
def test_an_outlier_of_one_row_of_one_tag(plant, tag, height):
    values = changed(plant, tag, 1, lambda x: x[START] + height * x.std())
    found(plant, values, tag, 1, within=12)


# -- contextual ---------------------------------------------------------------------------------------------------


def test_a_value_normal_by_itself_while_the_load_says_otherwise():
    plant, rows = "followers", 25
    at = TAGS[plant].index("d")
    other = np.argmax(np.abs(fresh(plant)[:START, at] - fresh(plant)[START, at]))  # it has been there before
    values = changed(plant, "d", rows, lambda x: x[other:other + rows])
    assert within_healthy_range(plant, values)
    found(plant, values, "d", rows, within=10)


def test_the_mirror_image_of_x1_while_x3_goes_its_way():
    plant, rows = "lorenz", 20  # the attractor is symmetric in x1: no value, and no movement of x1 alone, is unusual
    values = changed(plant, "x1", rows, lambda x: -x[START:START + rows])
    assert within_healthy_range(plant, values)
    found(plant, values, "x1", rows, within=rows + 10)


# -- collective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plant", "tag", "rows"), [
    ("followers", "a", 300), ("followers", "e", 300), ("lorenz", "x1", 100), ("lorenz", "x3", 100)])
def test_a_tag_that_is_frozen_at_a_healthy_value(plant, tag, rows):
    values = changed(plant, tag, rows, lambda x: x[START])
    assert within_healthy_range(plant, values)
    found(plant, values, tag, rows, within=rows + 10)


@pytest.mark.parametrize(("plant", "tag", "rows"), [
    ("followers", "b", 300), ("followers", "d", 300), ("lorenz", "x1", 200), ("lorenz", "x3", 200)])
def test_a_stretch_of_one_tag_played_again_while_the_others_go_on(plant, tag, rows):
    values = changed(plant, tag, rows, lambda x: x[1000:1000 + rows])
    assert within_healthy_range(plant, values)
    # Each of Lorenz' two tags is forecast by the other: which of them is the copy nothing but its seams can tell.
    found(plant, values, tag if plant == "followers" else None, rows, within=rows)


def test_a_stretch_of_the_whole_plant_played_backwards():
    rows = 300  # every row is one that was; only their order is wrong
    values = fresh("lorenz").copy()
    values[START:START + rows] = values[START:START + rows][::-1]
    found("lorenz", values, None, rows, within=rows)


# -- many tags, few rows ------------------------------------------------------------------------------------------


def test_a_record_of_300_rows_of_8_tags_of_noise_fits_and_says_that_it_cannot_support_the_budget():
    tags = [f"t{i}" for i in range(8)]
    model, report = automatic_fit(noise_record(300, tags))
    assert any("1 false alarms a day" in note and "too few peaks" in note for note in report.notes)
    assert model.calibration.windows.max() <= 75
    live = noise_record(5000, tags, seed=1)
    monitor = monitor_of(model, live.tags)
    engine = Engine([monitor])
    score = np.array([engine.step(frame)[0].score for frame in frames_of(live)])
    assert np.isfinite(score).mean() > 0.99 and (score >= 1).mean() < 0.01
    live.values[-50:, 3] += 20
    monitor.restart()
    assert [engine.step(frame)[0].score for frame in frames_of(live)][-1] > 1


def test_a_bias_of_one_tag_among_forty_is_not_averaged_away():
    tags = [f"t{i}" for i in range(40)]
    model, _ = automatic_fit(noise_record(20_000, tags, seed=3))
    live = noise_record(4000, tags, seed=4)
    live.values[START:, 17] += 3.0
    monitor = monitor_of(model, live.tags)
    engine = Engine([monitor])
    alert = np.array([engine.step(frame)[0].alert for frame in frames_of(live)])
    assert not alert[:START].any() and alert[START:START + 100].any() and alert[-1]
    share = dict(zip(monitor.verdict.tags, monitor.verdict.contribution, strict=True))
    assert share["t17"] == 1.0  # the view of this tag alone leads
    assert monitor.verdict.tags[int(np.argmax(monitor.verdict.contribution))] == "t17"


def test_what_is_weak_but_lasts_lights_the_slow_lamp_and_does_not_alarm():
    tags = ["a", "b", "c"]
    model, _ = automatic_fit(noise_record(60_000, tags, seed=5), false_alarms_per_day=100.0)
    live = noise_record(12_000, tags, seed=6)
    live.values[START:] *= 1.13  # each tag noisier by 13 %
    monitor = monitor_of(model, live.tags)
    engine = Engine([monitor])
    rows = [(v.score, v.slow_score, v.alert) for frame in frames_of(live) for v in engine.step(frame)]
    score, slow, alert = (np.array(column, float) for column in zip(*rows, strict=True))
    assert np.nanmax(slow[:START]) < 1 < np.nanmax(slow[START:])
    lit = slow >= 1
    assert (lit & ~(alert > 0)).sum() > 1000
    assert ((alert > 0) <= (score >= 0)).all() and not (alert[:START] > 0).any()
