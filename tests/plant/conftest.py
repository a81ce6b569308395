"""Servers, a fitted model, and delays short enough for tests that everybody runs."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from running import NOWHERE
from serving import fit_models

from opcua_detector.client import session, subscription

from .rig import configuration
from .vendors import SecondVendor, Simulator, second_vendor, simulator


@pytest.fixture(scope="session")
def _models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fitted on the rows that the servers of both vendors send live, so that none of them is news."""
    return fit_models(tmp_path_factory.mktemp("plant-models"), configuration(NOWHERE))


@pytest.fixture
def folder(_models: Path, tmp_path: Path) -> Path:
    """A folder with the fitted model."""
    shutil.copytree(_models, tmp_path / "models")
    return tmp_path


@pytest.fixture(scope="session")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with simulator(tmp_path_factory.mktemp("plant")) as running:
        yield running


@pytest.fixture
def plant(_shared: Simulator) -> Simulator:
    """A simulated plant that the tests share; those that kill one take `own_plant`."""
    return _shared


@pytest.fixture
def own_plant(tmp_path: Path) -> Iterator[Simulator]:
    """A simulated plant for one test."""
    with simulator(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def _shared_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecondVendor]:
    with second_vendor(tmp_path_factory.mktemp("node")) as running:
        yield running


@pytest.fixture
def own_node(tmp_path: Path) -> Iterator[SecondVendor]:
    """A node-opcua server for one test."""
    with second_vendor(tmp_path) as running:
        yield running


@pytest_asyncio.fixture
async def node(_shared_node: SecondVendor) -> SecondVendor:
    """A node-opcua server that the tests share, calm again whatever the test before did to it."""
    await _shared_node.calm()
    return _shared_node


@pytest_asyncio.fixture
async def disturbed(plant: Simulator) -> AsyncIterator[Simulator]:
    """The shared simulated plant, calm again whatever the test does to it."""
    await plant.calm()
    yield plant
    await plant.calm()
    await plant.let_go()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notice silence and try again within tenths of a second instead of seconds."""
    monkeypatch.setattr(subscription, "KEEP_ALIVE_S", 0.5)
    monkeypatch.setattr(subscription, "SILENCE_MARGIN_S", 0.5)
    monkeypatch.setattr(session, "LAST_DELAY_S", 0.5)
    monkeypatch.setattr(session, "PROBE_S", 1.0)
