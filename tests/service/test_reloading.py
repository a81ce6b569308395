"""A model file that was replaced while the service runs: taken where it is good, refused where it is not."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from running import RESULTS, cli, until, write
from serving import SEED, configuration, nodes_say, running, scoring, stored

from opcua_detector.client.observer import Observer
from opcua_detector.model import NormalityModel
from opcua_detector.model import load as load_model
from opcua_detector.nodes import State
from sim_server.processes import make
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
            assert run.quality == f"Good; the new model file is not taken: {told['lorenz'].split(': ', 1)[1]}"
            await scoring(run, 50)
        path.unlink()
        assert (await service.reload())["lorenz"].startswith(f"kept {model_id}")
        changed = replace(load_model_of(good, folder), facts={**load_model_of(good, folder).facts, "note": "new"})
        changed.save(path)
        assert await service.reload() == {"lorenz": f"took {changed.model_id}"}
        assert service.runs["lorenz"].monitor.model.model_id == changed.model_id != model_id
        assert run.quality == "Good"
        await scoring(run, 50)
        assert not run.alerts
    assert sum("the one before stays in force" in one.getMessage() for one in caplog.records) == 5
    with stored(file) as store:
        assert store.audit("model reloaded")[0].detail["before"] == model_id
        assert {one.model_id for one in store.models("lorenz")} == {model_id, changed.model_id}


async def test_a_configuration_that_is_broken_at_a_reload_is_told_and_changes_nothing(
    plant: RunningPlant, folder: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    file = write(folder, configuration(plant.endpoint))
    good = file.read_text()
    async with running(file) as service:
        run = service.runs["lorenz"]
        await scoring(run)
        same = f"unchanged {run.monitor.model.model_id}"
        file.write_text(good.replace("period: 10 ms", "period: ten"))
        assert (await service.reload()).items() >= {("lorenz", same)}
        file.write_text("servers: [")
        told = await service.reload()
        assert told["lorenz"] == same and told[str(file)].startswith("kept: ")
        file.unlink()
        assert "cannot be read" in (await service.reload())[str(file)]
        assert service.counters["configs_refused"] == 3 and service.counters["models_refused"] == 0
        file.write_text(good + "operator_alarms_per_week: 70\n")
        assert (await service.reload())[str(file)] == "changed: it takes effect at the next start"
        file.write_text(good)
        assert await service.reload() == {"lorenz": same}
        await scoring(run, 50)
        assert service.counters["configs_refused"] == 3 and not run.alerts
    refused = [one.getMessage() for one in caplog.records if "would not start again" in one.getMessage()]
    assert len(refused) == 3 and all("next step: " in one for one in refused)
    assert "period" in refused[0]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="SIGHUP")
async def test_a_running_service_takes_what_fit_wrote_on_sighup_and_says_why_it_does_not(
    plant: RunningPlant, folder: Path, tmp_path: Path,
) -> None:
    file, path = write(folder, configuration(plant.endpoint)), folder / "models" / "lorenz.npz"
    good = path.read_bytes()
    said = tmp_path / "said.txt"
    with said.open("wb") as err:
        child = subprocess.Popen([sys.executable, "-m", "opcua_detector", "run", str(file)], stderr=err)
    async with Observer(plant.endpoint) as observer:
        try:
            await until(lambda: nodes_say(observer, State=State.NORMAL, Quality="Good"), "the service's results")
            before = await model_id(observer)
            path.write_bytes(good[: len(good) // 2])
            child.send_signal(signal.SIGHUP)
            await until(lambda: quality_has(observer, "Good; the new model file is not taken: "), "the refusal")
            assert await model_id(observer) == before and child.poll() is None
            recorded = write_healthy(tmp_path)
            fitted = await asyncio.to_thread(cli, "fit", file, "--csv", recorded, "--json")
            assert fitted.code == 0, fitted.err
            child.send_signal(signal.SIGHUP)
            await until(lambda: nodes_say(observer, ModelId=load_model(path).model_id, Quality="Good"), "the new model")
            assert await model_id(observer) != before
        finally:
            child.terminate()
            code = await asyncio.to_thread(child.wait)
        assert await nodes_say(observer, StateText="stopped")
    text = said.read_text()
    assert code == 0 and "Traceback" not in text
    assert "the model is not taken, the one before stays in force" in text and "next step: " in text


async def model_id(observer: Observer) -> str:
    """The model that the nodes name."""
    return str((await observer.read({"ModelId": f"{RESULTS}lorenz.ModelId"}))["ModelId"])


async def quality_has(observer: Observer, words: str) -> bool:
    """Whether the Quality node begins with these words."""
    return str((await observer.read({"Quality": f"{RESULTS}lorenz.Quality"}))["Quality"]).startswith(words)


def write_healthy(folder: Path) -> Path:
    """A CSV of the healthy plant: other rows than the first model learnt from, so that the second is another one."""
    rows = make("lorenz", seed=SEED).simulate(50_000)
    stamps = (1_700_000_000_000_000_000 + 10_000_000 * np.arange(len(rows))).astype("datetime64[ns]")
    file = folder / "healthy.csv"
    lines = ["time,x1,x3", *(f"{t}Z,{a!r},{b!r}" for t, (a, b) in zip(stamps, rows.tolist(), strict=True))]
    file.write_text("\n".join(lines) + "\n")
    return file


def load_model_of(content: bytes, folder: Path) -> NormalityModel:
    """The model in these bytes."""
    file = folder / "copy.npz"
    file.write_bytes(content)
    return load_model(file)
