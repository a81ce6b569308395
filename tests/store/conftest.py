from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a store is to come; a name that needs quoting in a URI."""
    return tmp_path / "Anlage 1 #ü%20.db"
