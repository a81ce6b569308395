"""History: complete, over several pages, equal to what the plant did."""

from __future__ import annotations

import numpy as np
import pytest

from opcua_detector.api import Tag, TagKind
from opcua_detector.client import Session, oldest_ns, read_history
from opcua_detector.client.history import read_samples
from opcua_detector.errors import NodeProblem, RecordError
from sim_server.plant import Plant
from sim_server.processes import Process, model
from sim_server.testing import RunningPlant

from .conftest import HISTORY_ROWS, PLANT

PERIOD = 10_000_000
TAGS = [
    Tag("x1", f"{PLANT}lorenz.x1"),
    Tag("x3", f"{PLANT}lorenz.x3"),
    Tag("total", f"{PLANT}lorenz.total", TagKind.COUNTER),
    Tag("state", f"{PLANT}lorenz.state", TagKind.STATE),
]


def truth(rows: int) -> np.ndarray:
    """The plant once more, without a server: float64[rows, n_tags] after the warm-up."""
    plant = Plant(Process(model("lorenz"), seed=0, noise=0.0))
    plant.rows(2000)
    names = [tag.name for tag in plant.tags]
    values = plant.rows(rows).values
    return np.column_stack([values[:, names.index(tag.name)] for tag in TAGS])


async def test_the_whole_history_is_the_plants_own_values_with_progress(
    session: Session, plant: RunningPlant
) -> None:
    start = plant.start_ns - HISTORY_ROWS * PERIOD
    assert await oldest_ns(session, TAGS[0].node) == start
    steps: list[tuple[int, int]] = []
    counts: dict[str, int] = {}
    record = await read_history(
        session,
        TAGS,
        start,
        plant.start_ns,
        PERIOD,
        progress=lambda done, total: steps.append((done, total)),
        counts=counts,
    )
    assert len(record) == HISTORY_ROWS >= 20_000
    assert np.array_equal(record.source_ns, start + np.arange(HISTORY_ROWS) * PERIOD)
    assert np.array_equal(record.values, truth(HISTORY_ROWS))
    assert record.valid.all() and record.gap.sum() == 1
    assert counts["delivered"] == counts["used"] == 4 * HISTORY_ROWS
    done = [step[0] for step in steps]
    assert len(steps) > 5 and done == sorted(done) and steps[-1] == (HISTORY_ROWS, HISTORY_ROWS)


async def test_a_part_of_the_history_has_no_row_twice_at_page_borders(
    session: Session, plant: RunningPlant
) -> None:
    start = plant.start_ns - 15_000 * PERIOD
    (samples,) = await read_samples(session, [TAGS[0].node], start, start + 12_345 * PERIOD)
    assert np.array_equal(samples.source_ns, start + np.arange(12_345) * PERIOD)


async def test_a_server_without_continuation_points_is_read_on_by_time(
    session: Session,
    plant: RunningPlant,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plant counts NumValuesPerNode over all pages: a small page ends without a continuation point."""
    monkeypatch.setattr("opcua_detector.client.history.PAGE_VALUES", 4000)
    start = plant.start_ns - HISTORY_ROWS * PERIOD
    record = await read_history(session, TAGS[:2], start, plant.start_ns, PERIOD)
    assert np.array_equal(record.values, truth(HISTORY_ROWS)[:, :2])


async def test_a_tag_without_history_says_what_to_do(session: Session) -> None:
    with pytest.raises(NodeProblem, match="BadHistoryOperationUnsupported") as caught:
        await read_history(session, [Tag("s", f"{PLANT}lorenz.faults.sigma")], 0, 10**18, PERIOD)
    assert "record" in caught.value.next_step


async def test_an_unknown_tag_and_an_empty_range_are_told(session: Session, plant: RunningPlant) -> None:
    with pytest.raises(NodeProblem, match="BadNodeIdUnknown"):
        await read_history(session, [Tag("s", f"{PLANT}lorenz.x9")], 0, 10**18, PERIOD)
    with pytest.raises(RecordError, match=r"no history of x1 .*1970"):
        await read_history(session, TAGS[:1], 0, 10**9, PERIOD)
