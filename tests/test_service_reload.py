"""A model file that was replaced while the service runs: taken where it is good, refused where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from running import write
from serving import SEED, configuration, running, scoring, stored

from opcua_detector.model import NormalityModel
from opcua_detector.model import load as load_model
from sim_server.testing import RunningPlant, running_plant


@pytest.fixture(scope="module")
def plant() -> Iterator[RunningPlant]:
    """A plant that the tests here share."""
    with running_plant("lorenz", history_rows=100, seed=SEED) as running:
        yield running


async def test_a_damaged_or_foreign_model_at_a_reload_leaves_the_last_good_one_in_force(
    plant: RunningPlant, folder: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    file, path = write(folder, configuration(plant.endpoint)), folder / "models" / "lorenz.npz"
    good = path.read_bytes()
    async with running(file) as service:
        run = service.runs["lorenz"]
        await scoring(run)
        model_id = run.monitor.model.model_id
        assert await service.reload() == {"lorenz": f"unchanged {model_id}"}
        foreign = replace(load_model(path), monitor="another")
        for k, content in enumerate((good[: len(good) // 2], b"", good[:-200] + bytes(200), None)):
            if content is None:
                foreign.save(path)
            else:
                path.write_bytes(content)
            told = await service.reload()
            assert told["lorenz"].startswith(f"kept {model_id}") and run.monitor.model.model_id == model_id
            assert service.counters["models_refused"] == k + 1
            await scoring(run, 50)
        path.unlink()
        assert (await service.reload())["lorenz"].startswith(f"kept {model_id}")
        changed = replace(load_model_of(good, folder), facts={**load_model_of(good, folder).facts, "note": "new"})
        changed.save(path)
        assert await service.reload() == {"lorenz": f"took {changed.model_id}"}
        assert service.runs["lorenz"].monitor.model.model_id == changed.model_id != model_id
        await scoring(run, 50)
        assert run.alerts == []
    assert sum("the one before stays in force" in one.getMessage() for one in caplog.records) == 5
    with stored(file) as store:
        assert store.audit("model reloaded")[0].detail["before"] == model_id
        assert {one.model_id for one in store.models("lorenz")} == {model_id, changed.model_id}


def load_model_of(content: bytes, folder: Path) -> NormalityModel:
    """The model in these bytes."""
    file = folder / "copy.npz"
    file.write_bytes(content)
    return load_model(file)
