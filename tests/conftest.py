"""What tests of several folders share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from serving import fit_models


@pytest.fixture(scope="session")
def lorenz_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the fitted Lorenz monitor; whoever changes it takes `folder`."""
    return fit_models(tmp_path_factory.mktemp("lorenz-models"))


@pytest.fixture
def folder(lorenz_models: Path, tmp_path: Path) -> Path:
    """A folder of the test's own with the fitted model."""
    shutil.copytree(lorenz_models, tmp_path / "models")
    return tmp_path
