"""A cyclic monitor in the engine: healthy hours are silent, each fault is told in its part, with its phase and tag.

The plant is the simulated press; its record of 10 minutes is what a user would fit on, the budget is the default.
"""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from presses import CYCLES, FIT_ROWS, HOUR_ROWS, PERIOD_NS, TAGS, configuration, fitted, press
from running import cli, wait_for

from opcua_detector.api import (
    BAD_NO_COMMUNICATION,
    BAD_WAITING_FOR_INITIAL_DATA,
    GOOD,
    UNCERTAIN_SUB_NORMAL,
)
from opcua_detector.csv_rows import write_csv
from opcua_detector.engine import AlertSettings, Engine, frames_of
from opcua_detector.parts import PartCause, PartMonitor, fit_parts, part_scores
from opcua_detector.store import Store
from sim_server.processes import Fault


def monitor(cycle="counter", seed=1, **alert):
    """A fresh monitor; an alert ends where a good part ends."""
    return PartMonitor("press", fitted(cycle, seed), TAGS, AlertSettings(**{"off_delay_ns": 0} | alert))


class Streamed:
    """What a record gives row by row: score, status, alert flags, and what is said of each part and each alert."""

    def __init__(self, one, record):
        self.score = np.full(len(record), np.nan)
        self.status = np.zeros(len(record), np.int64)
        self.alert = np.zeros(len(record), bool)
        self.raised, self.cleared, self.parts, self.told, self.quality = [], [], [], [], []
        engine = Engine([one])
        for i, frame in enumerate(frames_of(record)):
            verdict = engine.step(frame)[0]
            self.score[i], self.status[i], self.alert[i] = verdict.score, verdict.status, verdict.alert
            self.quality.append(verdict.quality)
            part = one.ended_part()
            if part is not None:
                self.parts.append((i, part))
            if verdict.raised:
                self.raised.append(i)
                self.told.append(one.explain(one.snapshot()))
            if verdict.cleared:
                self.cleared.append(i)


def numbers_of(record, first, last):
    """Numbers of the parts that lie between rows."""
    return set(np.unique(record.values[first:last, 3]).astype(int))


# -- healthy ------------------------------------------------------------------------------------------------------


def test_a_healthy_hour_is_silent_and_every_part_gets_its_verdict():
    record = press(HOUR_ROWS, FIT_ROWS)
    seen = Streamed(monitor(), record)
    assert not seen.alert.any()
    numbers = [part.number for _, part in seen.parts]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) > 2350
    first = seen.parts[0][0]
    assert np.isnan(seen.score[:first]).all() and (seen.status[:first] == BAD_WAITING_FOR_INITIAL_DATA).all()
    assert not np.isnan(seen.score[first:]).any() and (seen.status[first:] == GOOD).all()
    ends = {i for i, _ in seen.parts}
    changes = np.flatnonzero(np.diff(seen.score[first:])) + first + 1
    assert set(changes) <= ends  # one verdict per part, it stands until the next


@pytest.mark.parametrize(("cycle", "seed", "noise"), [
    ("counter", 2, 0.0), ("counter", 3, 0.05), ("signal", 4, 0.01), ("stroke", 5, 0.05)])
def test_six_healthy_hours_of_other_presses_keep_the_alarm_budget(cycle, seed, noise):
    model, _ = fit_parts("press", press(FIT_ROWS, 0, seed=seed, noise=noise), CYCLES[cycle])
    _, scores = part_scores(model, press(6 * HOUR_ROWS, FIT_ROWS, seed=seed, noise=noise))
    assert len(scores) > 14_000
    assert (np.nan_to_num(scores) >= 1.0).sum() <= 1  # the budget is one a day
    assert np.nanmedian(scores) > 0.1  # and not because the limit is out of reach


def test_the_limit_from_few_parts_is_wider_but_no_wall():
    few, _ = fit_parts("press", press(6000, 0), CYCLES["counter"])
    assert any("too few to support" in note for note in few.calibration.notes)
    faulty = press(3000, FIT_ROWS, (Fault("wear", 1.5, 1000, 3000),))
    cut, scores = part_scores(few, faulty)
    inside = cut.begin >= 1000
    assert (scores[inside & (cut.whole != 0)] >= 1.0).all()
    assert (np.nan_to_num(part_scores(few, press(HOUR_ROWS, FIT_ROWS))[1]) < 1.0).all()


# -- faults -------------------------------------------------------------------------------------------------------

# What is wrong, where in the stroke it can be seen at all (phase of the press cycle, in % of a part cut by the
# counter, with its pause), and the tag.
FAULTS = {
    "wear": (1.3, (20, 60), "force"), "blank": (0.01, (20, 60), "force"), "friction": (4.0, (0, 85), "force"),
    "cooling": (0.6, (0, 100), "temperature"), "hold_position": (2.0, (0, 100), "position"),
    "hold_force": (2.0, (0, 100), "force"), "hold_temperature": (2.0, (0, 100), "temperature"),
}


@pytest.mark.parametrize("cycle", CYCLES)
@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_told_in_its_part_with_its_phase_and_tag(name, cycle):
    factor, (low, high), tag = FAULTS[name]
    record = press(6000, FIT_ROWS, (Fault(name, factor, 3000, 4500),))
    seen = Streamed(monitor(cycle), record)
    assert seen.raised and seen.raised[0] >= 3000
    begins = np.flatnonzero(np.diff(record.values[:, 3])) + 1
    first_whole_end = begins[begins > 3000][1]
    slow_to_show = name == "cooling"  # the tool warms up in half a minute
    assert seen.raised[0] <= first_whole_end or slow_to_show
    bad = [part for i, part in seen.parts if 3300 < i < 4500 and part.score >= 1.0]
    whole = [part for i, part in seen.parts if 3300 < i < 4500]
    assert len(bad) >= (1 if slow_to_show else len(whole))
    for part in bad:
        assert part.top_tag == tag, part
        assert tag in part.sentence and f"part {part.number}" in part.sentence
        if not np.isnan(part.phase[0]):
            scale = 1.0 if cycle != "stroke" else 1.25  # without the pause the stroke is the whole part
            assert low <= part.phase[0] < part.phase[1] <= min(100.0, high * scale) + 1e-9, part
    if name == "wear":
        assert any(part.phase[1] - part.phase[0] > 8 for part in bad)
        assert all("force was" in part.sentence and "normal there" in part.sentence for part in bad)
    if name in ("hold_force", "hold_temperature"):
        assert any("is stuck: it did not move during part" in part.sentence for part in bad)


@pytest.mark.parametrize("cycle", CYCLES)
def test_a_slow_stroke_is_told_as_slow_and_a_fast_one_as_fast(cycle):
    for factor, words in ((1.25, ("slower", "took", "has not ended")), (0.6, ("faster", "too soon"))):
        record = press(5000, FIT_ROWS, (Fault("stroke", factor, 2000, 3500),))
        seen = Streamed(monitor(cycle), record)
        bad = [part for i, part in seen.parts if 2400 < i < 3500]
        assert len(bad) >= 5 and all(part.score >= 1.0 for part in bad)
        told = [part for part in bad if any(word in part.sentence for word in words)]
        assert len(told) >= 0.8 * len(bad), [part.sentence for part in bad]
        trigger = CYCLES[cycle].tag
        assert all(part.top_tag == trigger for part in told)


def test_an_alert_tells_the_running_part_and_then_the_whole_one():
    record = press(4000, FIT_ROWS, (Fault("wear", 1.4, 1500, 1700),))
    one = monitor()
    seen = Streamed(one, record)
    assert len(seen.raised) == 1
    running, = seen.told
    assert isinstance(running.causes[0], PartCause) and not running.causes[0].whole
    assert 1500 <= seen.raised[0] < 1700 and running.event_no == 1
    number = running.causes[0].part
    assert number == record.values[seen.raised[0], 3]
    whole = next(part for _, part in seen.parts if part.number == number)
    assert whole.phase[0] <= running.causes[0].phase[1] + 5 and whole.score >= seen.score[seen.raised[0]]
    good = next(i for i, part in seen.parts if part.number > number and part.score < 1.0)
    assert seen.cleared == [good]  # the alert ends where a good part ends


def test_bad_parts_apart_are_one_alert_each_and_the_numbers_go_on():
    faults = tuple(Fault("blank", 0.01, at, at + 170) for at in (1500, 2500, 3500))
    one = monitor()
    one.continue_events(41)
    seen = Streamed(one, press(5000, FIT_ROWS, faults))
    assert len(seen.raised) == 3 and [told.event_no for told in seen.told] == [42, 43, 44]
    bad = [part.number for _, part in seen.parts if part.score >= 1.0]
    assert 3 <= len(bad) <= 6


def test_a_part_that_does_not_end_is_told_while_it_runs_and_once():
    record = press(8000, FIT_ROWS, (Fault("stroke", 1000.0, 2000, 6000),))
    one = monitor()
    seen = Streamed(one, record)
    assert len(seen.raised) == 1 and 2000 < seen.raised[0] < 2250
    usual = int(one.parts.rows[1])
    assert (seen.score[2000 + 2 * usual:6000] >= 1.0).all() and (np.diff(seen.score[2400:6000]) >= 0).all()
    again = monitor()
    engine = Engine([again])
    for frame in frames_of(record.rows(0, 5000)):
        engine.step(frame)
    told = again.explain(again.snapshot())
    assert "has not ended after" in told.sentence and told.causes[0].tag == "cycle"
    assert again.judge.rows > 2900 and again.judge.kept == len(again.judge.values) < 250  # collecting has stopped
    long = next(part for _, part in seen.parts if part.end_ns - part.begin_ns > 30e9)
    assert "took" in long.sentence and long.top_tag == "cycle"


def test_a_part_that_ends_too_soon_is_told_as_such():
    record = press(4000, FIT_ROWS)
    values = record.values.copy()
    begins = np.flatnonzero(np.diff(values[:, 3])) + 1
    cut_at = begins[5] + 40
    values[cut_at:, 3] += 1
    seen = Streamed(monitor(), replace(record, values=values))
    parts = {part.number: part for _, part in seen.parts}
    short = parts[int(values[begins[5], 3])]
    assert short.score >= 1.0 and short.top_tag == "cycle"
    assert short.sentence.startswith(f"part {short.number} ended too soon, after 0.40 s; normal is ")


# -- streams with holes ---------------------------------------------------------------------------------------------


def holed(record, seed):
    """Gaps, masked cells, a masked part, and silences of both triggers."""
    rng = np.random.default_rng(seed)
    n = len(record)
    gap, valid = record.gap.copy(), record.valid.copy()
    gap[rng.choice(n, 4, replace=False)] = 1
    valid[:, :3][rng.random((n, 3)) < 0.01] = 0
    for start in rng.choice(n - 500, 3, replace=False):
        valid[start:start + 300, rng.integers(0, 3)] = 0
        valid[start + 350:start + 350 + rng.integers(1, 200), 3:] = 0
    start = int(rng.integers(0, n - 500))
    valid[start:start + 400, :3] = 0
    values = np.where(valid != 0, record.values, np.nan)
    return replace(record, gap=gap, valid=valid, values=values)


@pytest.mark.parametrize("cycle", CYCLES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_streaming_equals_batch_bit_for_bit_also_with_holes(cycle, seed):
    record = holed(press(12_000, FIT_ROWS, (Fault("wear", 1.3, 5000, 6000), Fault("stroke", 1.2, 8000, 9000))), seed)
    one = monitor(cycle)
    seen = Streamed(one, record)
    cut, scores = part_scores(one.model, record)
    whole = np.flatnonzero(cut.whole)
    assert_array_equal([part.number for _, part in seen.parts], cut.number[whole])
    assert_array_equal([part.score for _, part in seen.parts], scores[whole])
    assert_array_equal([i for i, _ in seen.parts], cut.end[whole])
    assert_array_equal([part.begin_ns for _, part in seen.parts], record.source_ns[cut.begin[whole]])
    assert_array_equal([part.end_ns for _, part in seen.parts], record.source_ns[cut.end[whole] - 1])
    assert 20 < len(whole) < len(cut.begin) and np.isnan(scores[whole]).any()
    in_two = PartMonitor("press", one.model, TAGS[::-1], AlertSettings(off_delay_ns=0))  # tags in another order
    assert_array_equal(Streamed(in_two, record.select([t.name for t in TAGS[::-1]])).score, seen.score)


def test_a_gap_takes_the_verdict_but_not_the_alert():
    record = press(4000, FIT_ROWS, (Fault("blank", 0.01, 1000, 2000),))
    gap = record.gap.copy()
    gap[1800] = 1
    seen = Streamed(monitor(), replace(record, gap=gap))
    assert seen.alert[1799] and seen.alert[1800] and np.isnan(seen.score[1800])
    after = next(i for i, _ in seen.parts if i > 1800)
    assert np.isnan(seen.score[1800:after]).all() and (seen.status[1800:after] == BAD_WAITING_FOR_INITIAL_DATA).all()
    assert len(seen.raised) == 1 and len(seen.cleared) == 1
    begins = np.flatnonzero(np.diff(record.values[:, 3])) + 1
    assert after == begins[begins > 1800][1]  # the part that the gap broke is not judged


def test_while_the_trigger_is_silent_there_is_no_verdict_and_a_counter_comes_back_by_itself():
    record = press(4000, FIT_ROWS)
    begins = np.flatnonzero(np.diff(record.values[:, 3])) + 1
    valid = record.valid.copy()
    start = begins[6] + 20
    valid[start:start + 50, 3] = 0  # inside one part
    seen = Streamed(monitor(), replace(record, valid=valid))
    tolerance = monitor().parts.tolerance
    silent = slice(start + tolerance, start + 50)
    assert np.isnan(seen.score[silent]).all() and (seen.status[silent] == BAD_NO_COMMUNICATION).all()
    assert set(seen.quality[silent]) == {"the trigger has no valid value"}
    assert not np.isnan(seen.score[start + 50:]).any() and not seen.alert.any()
    assert {int(record.values[start, 3])} <= {part.number for _, part in seen.parts}
    valid[start:begins[7] + 30, 3] = 0  # over the begin of the next
    seen = Streamed(monitor(), replace(record, valid=valid))
    lost = numbers_of(record, start, begins[7] + 30)
    assert len(lost) == 2 and not lost & {part.number for _, part in seen.parts} and not seen.alert.any()


def test_a_part_with_masked_rows_is_uncertain_and_one_with_too_few_has_no_verdict():
    record = press(4000, FIT_ROWS)
    begins = np.flatnonzero(np.diff(record.values[:, 3])) + 1
    valid = record.valid.copy()
    valid[begins[4]:begins[5], 1] = 0
    valid[begins[7]:begins[8] - 10, :3] = 0
    seen = Streamed(monitor(), replace(record, valid=valid))
    uncertain, bad = slice(begins[5], begins[6]), slice(begins[8], begins[9])
    assert (seen.status[uncertain] == UNCERTAIN_SUB_NORMAL).all() and not np.isnan(seen.score[uncertain]).any()
    assert set(seen.quality[uncertain]) == {f"part {int(record.values[begins[4], 3])} masked: force 100%"}
    assert np.isnan(seen.score[bad]).all() and (seen.status[bad] == BAD_WAITING_FOR_INITIAL_DATA).all()
    assert all(text.startswith(f"part {int(record.values[begins[7], 3])} has too few valid rows") for text in
               seen.quality[bad])
    assert (seen.status[begins[9]:] == GOOD).all() and not seen.alert.any()


def test_restart_and_reset_leave_what_they_should():
    faulty = press(2500, FIT_ROWS, (Fault("blank", 0.01, 1000, 2500),))
    one = monitor()
    Streamed(one, faulty)
    assert one.verdict.alert and one.verdict.event_no == 1
    one.restart()
    assert not one.verdict.alert and np.isnan(one.verdict.score)
    seen = Streamed(one, faulty)
    assert len(seen.raised) == 1 and seen.told[0].event_no == 2
    assert_array_equal(seen.score, Streamed(monitor(), faulty).score)
    one.reset()
    assert one.verdict.alert and not one.verdict.contribution.any()


def test_nothing_grows_from_row_to_row():
    one = monitor()
    engine = Engine([one])
    frames = [replace_frame(frame) for frame in frames_of(press(4000, FIT_ROWS))]
    for frame in frames:
        engine.step(frame)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(3):
        for frame in frames[1:]:
            engine.step(frame)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 4096


def replace_frame(frame):
    """A copy of a reused frame."""
    return replace(frame, values=frame.values.copy(), valid=frame.valid.copy(), status=frame.status.copy())


# -- from the command line ------------------------------------------------------------------------------------------


def test_fit_replay_and_models_from_csv(tmp_path: Path):
    file = configuration(tmp_path, {"tag": "in_cycle", "on": "rising", "until": "back"},
                         tags=["position", "force", "temperature"])
    healthy, faulty = press(FIT_ROWS, 0), press(6000, FIT_ROWS, (Fault("wear", 1.3, 3000, 4000),))
    write_csv(tmp_path / "healthy.csv", healthy)
    write_csv(tmp_path / "faulty.csv", faulty)
    learnt = cli("fit", file, "--csv", tmp_path / "healthy.csv", "--json")
    assert learnt.code == 0, learnt.err
    assert "parts learnt" in learnt.err and "too few to support" in learnt.err
    (model,) = cli("models", file, "--json").json["models"]
    assert model["state"] == "ok" and model["methods"] == ["parts"] and model["facts"]["parts"] == 398
    assert model["tags"] == ["position", "force", "temperature", "in_cycle"]
    ran = cli("replay", file, "--csv", tmp_path / "faulty.csv", "--json", "--scores", tmp_path / "scores.csv")
    assert ran.code == 0, ran.err
    (result,) = ran.json["monitors"]
    (alert,) = result["alerts"]
    assert alert["top_tag"] == "force" and alert["explanation"].startswith(f"part {alert['part']} left its normal")
    assert alert["causes"][0]["kind"] in ("bin", "run") and alert["causes"][0]["phase"][0] > 20
    bad = [part for part in result["parts"] if part["score"] >= 1.0]
    assert 5 <= len(bad) <= 8 and all(part["top_tag"] == "force" for part in bad)
    assert len(result["parts"]) > 35 and "whole parts" in ran.err
    assert (tmp_path / "scores.csv").read_text(encoding="utf-8").count("\n") == 6001
    again = configuration(tmp_path, {"tag": "cycle"}, tags=["position", "force", "temperature"])
    refused = cli("replay", again, "--csv", tmp_path / "faulty.csv")
    assert refused.code == 4 and "in_cycle is not among" in refused.err


def test_fit_from_a_recording_and_a_record_with_too_few_parts(tmp_path: Path):
    file = configuration(tmp_path, {"tag": "cycle"}, tags=["position", "force", "temperature"])
    with Store.open(tmp_path / "opcua-detector.db") as store:
        for name, record in (("short", press(3000, 0)), ("long", press(20_000, 0))):
            recording = store.start_recording(name, TAGS, PERIOD_NS)
            for frame in frames_of(record):
                offered = store.offer_row(recording, frame)
                if frame.seq % 4000 == 0:
                    wait_for(lambda at=offered: store.committed_seq >= at, "the recorder thread")
            store.end_recording(recording)
    refused = cli("fit", file, "--recording", "short", "--json")
    assert refused.code == 3 and "whole parts, 30 needed" in refused.err
    learnt = cli("fit", file, "--recording", "long", "--json")
    assert learnt.code == 0, learnt.err
    (model,) = learnt.json["monitors"]
    assert model["rows"] == 20_000 and json.dumps(model["notes"]).count("parts learnt") == 1
    ran = cli("replay", file, "--recording", "long", "--json")
    (result,) = ran.json["monitors"]
    assert ran.code == 0 and result["alerts"] == [] and len(result["parts"]) > 125
