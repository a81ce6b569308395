"""Guards and pauses of a monitor of parts, on the simulated press: a tag that is not as learnt is masked with a reason
and does not hold an alarm on; a part during which alerts are kept back has no verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from presses import CYCLE, FORCE, POSITION, TAGS, TEMPERATURE, configuration, fitted, press

from opcua_detector import config as config_files
from opcua_detector.api import (
    BAD_WAITING_FOR_INITIAL_DATA,
    GOOD,
    UNCERTAIN_SUB_NORMAL,
    Float64,
    PartVerdict,
    Record,
    Tag,
    TagKind,
)
from opcua_detector.app import changed_since_fit, fit_config, open_monitor, registry_of
from opcua_detector.engine import AlertSettings, Engine, Monitor, frames_of
from opcua_detector.errors import ModelTagsError
from opcua_detector.parts import PartMonitor, part_scores
from sim_server.processes import Fault

SETUP = Tag("setup", kind=TagKind.STATE)


@dataclass
class Said:
    """What a monitor says row by row."""

    alert: list[bool] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    quality: list[str] = field(default_factory=list)
    parts: list[tuple[int, PartVerdict]] = field(default_factory=list)


def run(one: Monitor, record: Record) -> Said:
    """Step through a record."""
    said, engine = Said(), Engine([one])
    for i, frame in enumerate(frames_of(record)):
        verdict = engine.step(frame)[0]
        said.alert.append(verdict.alert)
        said.score.append(verdict.score)
        said.status.append(verdict.status)
        said.quality.append(verdict.quality)
        part = one.ended_part()
        if part is not None:
            said.parts.append((i, part))
    return said


def monitor(**alert: object) -> PartMonitor:
    """A fresh monitor of the press; an alert ends where a good part ends."""
    return PartMonitor("press", fitted(), TAGS, AlertSettings(**{"off_delay_ns": 0} | alert))  # type: ignore[arg-type]


def changed(
    record: Record, column: int, first: int, how: Callable[[Float64], Float64], last: int | None = None,
) -> Record:
    """The record with one tag delivered in another way from a row on."""
    values = record.values.copy()
    values[first:last, column] = how(values[first:last, column])
    return replace(record, values=values)


CHANGES = {
    "resolution": (FORCE, lambda x: np.round(x / 4.0) * 4.0, "force now comes with 0 decimals"),
    "scale": (FORCE, lambda x: 1000.0 * x, "force is now 1000 times as large as learnt"),
    "unit": (TEMPERATURE, lambda x: 1.8 * x + 32.0, "temperature is now in °F, learnt in °C"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_tag_of_another_resolution_or_scale_is_masked_and_the_alarm_ends(what: str) -> None:
    column, how, words = CHANGES[what]
    record = changed(press(20_000), column, 4000, how)
    said = run(monitor(), record)
    masked = next(i for i, text in enumerate(said.quality) if "masked; fit again" in text)
    assert words in said.quality[masked]
    assert masked < 13_000 and not any(said.alert[:4000])
    assert not any(said.alert[masked:]), "a masked tag holds no alarm on"
    after = [part for i, part in said.parts if i > masked + 400]
    assert len(after) > 30 and all(part.score < 1.0 for part in after)  # the other tags are judged on
    assert set(said.status[masked + 400:]) == {UNCERTAIN_SUB_NORMAL}


def test_a_fault_of_another_tag_is_found_while_one_is_masked_and_the_mask_ends_with_its_reason() -> None:
    column, how, _ = CHANGES["resolution"]
    record = changed(press(20_000, faults=(Fault("hold_position", 2.0, 9000, 10_000),)), column, 2000, how, 14_000)
    said = run(monitor(), record)
    assert "force now comes" in said.quality[8999] and not said.alert[8999]
    bad = [part for i, part in said.parts if 9300 < i < 10_000]
    assert bad and all(part.score >= 1.0 and part.top_tag == "position" for part in bad)
    assert not any("force now" in text for text in said.quality[18_000:]) and said.status[-1] == GOOD
    last = [part for i, part in said.parts if i > 18_500]
    assert last and all(part.score < 1.0 for part in last)


@pytest.mark.parametrize("what", CHANGES)
def test_streaming_equals_batch_with_masks_and_holes(what: str) -> None:
    column, how, _ = CHANGES[what]
    record = changed(press(20_000, faults=(Fault("wear", 1.3, 15_000, 16_000),)), column, 4000, how, 12_000)
    rng = np.random.default_rng(3)
    valid = record.valid.copy()
    valid[:, :3][rng.random((len(record), 3)) < 0.02] = 0
    valid[9000:9700, POSITION] = 0
    gap = record.gap.copy()
    gap[6000] = 1
    record = replace(record, valid=valid, gap=gap)
    one = monitor()
    said = run(one, record)
    cut, scores = part_scores(one.model, record)
    whole = np.flatnonzero(cut.whole)
    assert any("masked; fit again" in text for text in said.quality)
    assert_array_equal([part.number for _, part in said.parts], cut.number[whole])
    assert_array_equal([part.score for _, part in said.parts], scores[whole])


def test_a_part_of_masked_tags_alone_has_no_verdict() -> None:
    record = press(12_000)
    for column in (POSITION, FORCE, TEMPERATURE):
        record = changed(record, column, 2000, lambda x: 1000.0 * x)
    said = run(monitor(), record)
    late = [part for i, part in said.parts if i > 10_000]
    assert late and all(np.isnan(part.score) and part.unjudged for part in late)
    assert not said.alert[-1]


# -- pauses -------------------------------------------------------------------------------------------------------


def with_setup(record: Record, *spans: tuple[int, int], bad: tuple[int, int] = (0, 0)) -> Record:
    """The record with the tag `setup`, 1 in the spans, not valid in `bad`."""
    column = np.zeros((len(record), 1))
    known = np.ones((len(record), 1), np.uint8)
    for first, last in spans:
        column[first:last] = 1.0
    known[bad[0]:bad[1]] = 0
    return replace(record, tags=(*record.tags, SETUP), values=np.hstack([record.values, column]),
                   valid=np.hstack([record.valid, known]))


def paused(**keys: object) -> PartMonitor:
    """A monitor that `setup` keeps from alarming."""
    settings = AlertSettings(off_delay_ns=0, **keys)  # type: ignore[arg-type]
    return PartMonitor("press", fitted(), (*TAGS, SETUP), settings)


def begins_of(record: Record) -> list[int]:
    """First row of each part but the first."""
    return [int(i) + 1 for i in np.flatnonzero(np.diff(record.values[:, CYCLE]))]


@pytest.mark.parametrize(("keys", "words"), [
    ({"inhibit": ("setup",)}, "inhibited by setup"), ({"maintenance": "setup"}, "maintenance: setup")])
def test_a_part_that_was_kept_back_has_no_verdict_and_a_standing_alert_ends(
    keys: dict[str, object], words: str,
) -> None:
    record = press(6000, faults=(Fault("wear", 1.4, 1000, 4000),))
    begins = begins_of(record)
    on, off = begins[15] + 30, begins[17] + 10  # parts 15, 16 and 17 from the first whole one
    assert on > 1500 and off < 3500
    said = run(paused(**keys), with_setup(record, (on, off)))
    numbers = record.values[:, CYCLE].astype(int)
    held = {numbers[begins[k]] for k in (15, 16, 17)}
    assert said.alert[on - 1] and not any(said.alert[on:begins[18]])
    for _, part in said.parts:
        if part.number in held:
            assert np.isnan(part.score) and part.unjudged == words and not part.sentence
        elif 1500 < np.flatnonzero(numbers == part.number)[0] < 3700:
            assert part.score >= 1.0
    assert words in said.quality[on] and words not in said.quality[begins[19] + 1]
    assert f"part {numbers[begins[16]]} not judged: {words}" in said.quality[begins[17]]
    assert said.status[begins[17]] == BAD_WAITING_FOR_INITIAL_DATA and np.isnan(said.score[begins[17]])
    assert any(said.alert[begins[18]:begins[19] + 1])  # the next part that is judged alarms again


def test_a_silent_switch_does_not_keep_alerts_back_and_is_told() -> None:
    record = press(4000, faults=(Fault("wear", 1.4, 1500, 3000),))
    said = run(paused(inhibit=("setup",)), with_setup(record, (0, 4000), bad=(0, 4000)))
    assert any(said.alert) and said.quality[-1] == "setup is Bad: it does not inhibit"
    assert all(part.score >= 0.0 for _, part in said.parts)


def test_a_running_part_that_alarms_is_let_go_when_it_is_inhibited() -> None:
    record = press(4000, faults=(Fault("stroke", 1000.0, 1500, 3500),))
    free = run(paused(), with_setup(record))
    at = free.alert.index(True)
    said = run(paused(inhibit=("setup",)), with_setup(record, (at + 50, at + 60)))
    assert said.alert[at:at + 50] == [True] * 50 and not any(said.alert[at + 50:3500])
    assert said.score[at + 49] >= 1.0 > said.score[at + 51]


def test_a_switch_that_is_no_tag_of_the_group_is_refused() -> None:
    with pytest.raises(ModelTagsError, match="nothing is to keep alarms back"):
        monitor(inhibit=("nothing",))


# -- as configured ------------------------------------------------------------------------------------------------


def test_a_configured_switch_keeps_parts_back_and_rows_in_maintenance_are_not_learnt(tmp_path: Path) -> None:
    keys = {"tags": ["position", "force", "temperature"], "maintenance": "setup"}
    file = configuration(tmp_path, {"tag": "cycle"}, (SETUP,), **keys)
    config = config_files.load(file)
    worn = press(12_000, 0, (Fault("wear", 1.5, 6000, 9000),))
    models = []
    for spans in ([(5990, 9100)], []):
        (made,) = fit_config(config, file, lambda group, spans=spans: with_setup(worn, *spans))  # type: ignore[misc]
        assert made.report.rows == 12_000 - sum(last - first for first, last in spans)
        models.append(made.model)
    model = models[0]
    again = with_setup(press(4000, faults=(Fault("wear", 1.5, 1000, 3000),)), (900, 3200))
    cut, score = part_scores(model, again)
    bad = (cut.whole != 0) & (cut.begin >= 1000) & (cut.end <= 3000)
    assert (score[bad] >= 1.0).all() and (part_scores(models[1], again)[1][bad] < 1.0).all()
    one = open_monitor(config.monitors[0], config.groups[0], model, registry_of(config))
    said = run(one, again)
    assert not any(said.alert)
    assert sum(part.unjudged == "maintenance: setup" for _, part in said.parts) > 10
    assert changed_since_fit(config.monitors[0], config.groups[0], model) == []
