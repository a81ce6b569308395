"""One simulated plant for the tests of the command line, and a monitor of it that is fitted once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from running import cli, content, write

import sim_server
from sim_server.testing import RunningPlant, running_plant

USER, PASSWORD = "engineer", "correct-horse"
UNREADABLE = "nsu=urn:tests:odd;s=unreadable"
HISTORY_ROWS = 8000
_ODD_NODES = """<?xml version="1.0" encoding="utf-8"?>
<UANodeSet xmlns="http://opcfoundation.org/UA/2011/03/UANodeSet.xsd">
  <NamespaceUris><Uri>urn:tests:odd</Uri></NamespaceUris>
  <Models><Model ModelUri="urn:tests:odd" Version="1.0.0" PublicationDate="2026-01-01T00:00:00Z"/></Models>
  <UAVariable NodeId="ns=1;s=unreadable" BrowseName="1:unreadable" DataType="i=11" AccessLevel="2" UserAccessLevel="2">
    <DisplayName>unreadable</DisplayName>
    <References>
      <Reference ReferenceType="i=40">i=63</Reference>
      <Reference ReferenceType="i=35" IsForward="false">i=85</Reference>
    </References>
  </UAVariable>
</UANodeSet>
"""


@pytest.fixture(scope="session")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPlant]:
    """Lorenz with history, a named user beside anonymous ones, and a node that nobody may read."""
    folder = tmp_path_factory.mktemp("cli-plant")
    odd = folder / "odd.NodeSet2.xml"
    odd.write_text(_ODD_NODES, encoding="utf-8")
    results = Path(sim_server.__file__).parent / "results.NodeSet2.xml"
    with running_plant("lorenz", history_rows=HISTORY_ROWS, user=f"{USER}:{PASSWORD}", pki=folder / "pki",
                       nodeset=[results, odd]) as running:
        yield running


@dataclass
class Fitted:
    """A folder with plant.yaml and its fitted model."""

    folder: Path
    file: Path
    model: Path


@pytest.fixture(scope="session")
def _fitted_once(plant: RunningPlant, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    ran = cli("fit", write(folder, content(plant.endpoint)), "--json")
    assert ran.code == 0, ran.err
    return folder


@pytest.fixture
def fitted(_fitted_once: Path, tmp_path: Path) -> Fitted:
    """A copy of the fitted monitor that a test may spoil."""
    folder = tmp_path / "fitted"
    shutil.copytree(_fitted_once, folder, ignore=shutil.ignore_patterns("*.lock", "*-wal", "*-shm"))
    return Fitted(folder, folder / "plant.yaml", folder / "models" / "lorenz.npz")
