"""Servers that stamp with skew, report on change or at mixed rates: as many rows and as good verdicts as aligned ones.

A slow plant: each step of a simulated process is one row of 100 ms. Its rows go through the simulator's bad manners as
samples, through the rule of time back to rows, and through fit and score; the same rows aligned are the yardstick.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from sklearn.metrics import roc_auc_score

from opcua_detector.api import Record, Tag, TagKind
from opcua_detector.detectors.onnx_model import OnnxParams, OnnxPlugin
from opcua_detector.detectors.transition import TransitionParams, TransitionPlugin
from opcua_detector.fitting import fit_monitor
from opcua_detector.frames import rows_from_samples
from sim_server.plant import Plant, PlantRows
from sim_server.processes import Fault, TagSpec, make
from sim_server.quirks import Reporter
from tests.benchmarks import FAULTS, SETTLING_ROWS, START_NS

PERIOD_NS = 100_000_000
ROWS, BLOCK, WINDOW = 20_000, 1000, 100
WITHIN = 0.01
# Tags of the plants; the coarse one is the first measured tag as a display shows it, so it rarely changes.
TAGS = {"lorenz": ("x1", "x3", "setpoint", "total", "state", "duplicate"),
        "throttle": ("theta", "u", "r", "total", "state", "duplicate")}
JUDGED = {"lorenz": ("x1", "x3"), "throttle": ("theta", "u")}
KINDS = {"setpoint": TagKind.SETPOINT, "state": TagKind.STATE, "counter": TagKind.COUNTER}
SLOW = {"lorenz": ("setpoint", "total", "state"), "throttle": ("r", "total", "state")}
STEPS = {"measured": 4096, "duplicate": 32}  # of the range: a 12-bit input card, a coarse display
EACH_FAULT = [(process, name) for process in FAULTS for name in FAULTS[process]]

Quirks = tuple[tuple[str, str, float], ...]


@dataclass(frozen=True)
class Source:
    """Rows of a plant before anything is reported: healthy ones, then as many with faults in every other block."""

    process: str
    period_ns: int
    tags: tuple[TagSpec, ...]
    healthy: PlantRows
    tested: PlantRows


@cache
def source(process: str, fault: str, *, seed: int = 11, period_ns: int = PERIOD_NS, digital: bool = False) -> Source:
    """`digital`: values in the steps of an input card instead of to the last bit."""
    plant = Plant(make(process, seed=seed))
    plant.rows(SETTLING_ROWS)
    names = [tag.name for tag in plant.tags]
    columns = [names.index(name) for name in TAGS[process]]
    tags = tuple(plant.tags[c] for c in columns)
    faults = [Fault(fault, FAULTS[process][fault], k, k + BLOCK) for k in range(BLOCK, ROWS, 2 * BLOCK)]
    parts = []
    for rows in (plant.rows(ROWS), plant.rows(ROWS, faults)):
        values = rows.values[:, columns]
        for i, tag in enumerate(tags):
            if digital and tag.kind in STEPS:
                step = (tag.eu_high - tag.eu_low) / STEPS[tag.kind]
                values[:, i] = np.round(values[:, i] / step) * step
        parts.append(PlantRows(values, rows.labels, rows.first_row))
    return Source(process, period_ns, tags, *parts)


def reported(one: Source, rows: PlantRows, first: int, quirks: Quirks, max_hold: int = 20) -> Record:
    """Rows as they come out of the rule of time, with the ground truth of the plant's row nearest to each."""
    reporter = Reporter(one.tags, one.period_ns, seed=3)
    for tag, quirk, value in quirks:
        reporter.set_quirk(tag, quirk, value)
    start = START_NS + first * one.period_ns
    samples = reporter.report_block(first, start, rows.values)
    tags = [Tag(tag.name, kind=KINDS.get(tag.kind, TagKind.MEASURED)) for tag in one.tags]
    record = rows_from_samples(tags, one.period_ns, samples.tag, samples.source_ns, samples.value, samples.status,
                               lateness_ns=one.period_ns, max_hold=max_hold)
    row = np.rint((record.source_ns - start) / one.period_ns).astype(int)
    return replace(record, truth=rows.labels[np.clip(row, 0, len(rows.labels) - 1)])


def auc(one: Source, healthy: Record, tested: Record, seen: tuple[str, ...], *, with_onnx: bool = False) -> float:
    """AUC of the score of a monitor that sees these tags, fitted on the healthy rows, against the ground truth."""
    methods = [("transition", TransitionPlugin(), TransitionParams())]
    if with_onnx:
        methods.append(("onnx", OnnxPlugin(), OnnxParams(f"bundled:{one.process}")))
    model, _ = fit_monitor("m", healthy.select(seen), methods, windows_ns=[WINDOW * one.period_ns])
    columns = model.plan.prepare(tested.select([tag.name for tag in model.tags]))
    opened = [plugin.open(fitted, model.plan.columns)
              for (_, plugin, _), fitted in zip(methods, model.methods, strict=True)]
    residual = np.concatenate([method.residuals(columns) for method in opened], axis=1)
    out = model.calibration.score_rows(residual, columns.gap, np.zeros(len(columns), np.int64))
    known = np.isfinite(out[:, 0])
    assert known.mean() > 0.7
    return roc_auc_score(tested.truth[known], out[known, 0])


@cache
def aligned_auc(process: str, fault: str, seen: tuple[str, ...], **more: bool) -> float:
    """The yardstick: every tag reported for every row with the row's own stamp."""
    with_onnx = more.pop("with_onnx", False)
    one = source(process, fault, **more)
    healthy, tested = reported(one, one.healthy, 0, ()), reported(one, one.tested, ROWS, ())
    assert_array_equal(healthy.values, one.healthy.values)
    assert len(tested) == ROWS and tested.gap.sum() == 1
    return auc(one, healthy, tested, seen, with_onnx=with_onnx)


def skewed(process: str, skew_ms: float, jitter_ms: float = 0.0) -> Quirks:
    """One measured tag late, the other early; each by its own constant, and all by chance."""
    late, early = JUDGED[process]
    return ((late, "skew_ms", skew_ms), (early, "skew_ms", -skew_ms), ("*", "jitter_ms", jitter_ms))


def slow_inputs(process: str) -> Quirks:
    """Setpoint, totaliser and state once a second."""
    return tuple((name, "rate_ms", 1000.0) for name in SLOW[process])


ON_CHANGE: Quirks = (("*", "on_change", 1.0),)


def both(one: Source, quirks: Quirks, max_hold: int = 20) -> tuple[Record, Record]:
    """Healthy and tested rows under these quirks; both have one row a period."""
    made = (reported(one, one.healthy, 0, quirks, max_hold), reported(one, one.tested, ROWS, quirks, max_hold))
    for record in made:
        assert abs(len(record) - ROWS) <= 1 and record.gap.sum() == 1
        assert (np.diff(record.source_ns) == one.period_ns).all()
    return made


@pytest.mark.parametrize("process, fault", EACH_FAULT)
def test_stamps_40_ms_late_and_40_ms_early(process, fault):
    one = source(process, fault)
    healthy, tested = both(one, skewed(process, 40.0))
    assert auc(one, healthy, tested, JUDGED[process]) == pytest.approx(
        aligned_auc(process, fault, JUDGED[process]), abs=WITHIN)


@pytest.mark.parametrize("jitter", [((("*", "jitter_ms", 40.0),)), None], ids=["40 ms of jitter", "25 ms and 15 ms"])
@pytest.mark.parametrize("process", list(FAULTS))
def test_stamps_off_by_up_to_40_ms_at_random_give_the_aligned_rows_exactly(process, jitter):
    one = source(process, next(iter(FAULTS[process])))
    healthy, tested = both(one, jitter or skewed(process, 25.0, 15.0))
    for record, rows in ((healthy, one.healthy), (tested, one.tested)):
        assert_array_equal(record.values, rows.values)
        assert record.valid.all()


@pytest.mark.parametrize("process, fault", EACH_FAULT)
def test_everything_reported_on_change_only_with_a_tag_that_rarely_changes(process, fault):
    one = source(process, fault, digital=True)
    seen = (*JUDGED[process], "duplicate")
    wanted = aligned_auc(process, fault, seen, digital=True)
    # A judged tag at rest longer than max_hold is masked: it costs little, up to .037 seen for throttle Kt.
    assert auc(one, *both(one, ON_CHANGE), seen) > wanted - 4 * WITHIN
    # With max_hold above the longest rest the rows are those of the aligned stream, but for the odd sample that comes
    # sooner than its tag's last even intervals promised: nothing waits for it, so it is held into the next row.
    healthy, tested = both(one, ON_CHANGE, max_hold=600)
    for record, rows in ((healthy, one.healthy), (tested, one.tested)):
        assert record.valid.all() and (record.values != rows.values).mean() < 1e-4
    assert auc(one, healthy, tested, seen) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("process", list(FAULTS))
def test_a_state_that_never_changes_is_held_for_as_long_as_the_plant_runs(process):
    one = source(process, next(iter(FAULTS[process])))
    record = reported(one, one.healthy, 0, ON_CHANGE)
    at = TAGS[process].index("state")
    assert record.valid[:, at].all() and (record.values[:, at] == 1).all()


@pytest.mark.parametrize("process, fault", EACH_FAULT)
def test_measured_tags_at_100_ms_with_setpoint_totaliser_and_state_at_1_s(process, fault):
    one = source(process, fault)
    seen = (*JUDGED[process], SLOW[process][0])
    healthy, tested = both(one, slow_inputs(process))
    assert auc(one, healthy, tested, seen) == pytest.approx(aligned_auc(process, fault, seen), abs=WITHIN)


@pytest.mark.parametrize("process, fault", EACH_FAULT)
def test_all_of_it_at_once(process, fault):
    one = source(process, fault)
    seen = (*JUDGED[process], SLOW[process][0])
    healthy, tested = both(one, skewed(process, 25.0, 15.0) + ON_CHANGE + slow_inputs(process))
    assert auc(one, healthy, tested, seen) == pytest.approx(aligned_auc(process, fault, seen), abs=WITHIN)


@pytest.mark.parametrize("process, period_ns", [("lorenz", 10_000_000), ("throttle", 20_000_000)])
def test_both_methods_at_the_plants_own_period_with_skew_jitter_and_change_only_reporting(process, period_ns):
    fault = list(FAULTS[process])[-1]
    one = source(process, fault, period_ns=period_ns)
    part = period_ns / 1e6
    quirks = skewed(process, 0.25 * part, 0.15 * part) + ON_CHANGE + slow_inputs(process)
    healthy, tested = both(one, quirks)
    wanted = aligned_auc(process, fault, JUDGED[process], period_ns=period_ns, with_onnx=True)
    assert wanted > 0.9
    assert auc(one, healthy, tested, JUDGED[process], with_onnx=True) == pytest.approx(wanted, abs=WITHIN)
