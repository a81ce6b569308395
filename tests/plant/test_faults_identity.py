"""Certificates and logins that go wrong while the service runs, on both vendors; run by `make test-plant`."""

from __future__ import annotations

from pathlib import Path

import pytest

from .faults import hold
from .identities import PASSWORD, SEEN, VARIABLE, secured
from .vendors import Simulator

pytestmark = [pytest.mark.plant, pytest.mark.timeout(300), pytest.mark.usefixtures("quick")]


@pytest.mark.parametrize("vendor", ["asyncua", "node-opcua"])
@pytest.mark.parametrize("name", SEEN)
async def test_a_server_that_cannot_prove_who_it_is_gets_no_connection_until_it_can(
    folder: Path, tmp_path: Path, vendor: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, PASSWORD)
    with secured(tmp_path, vendor, short="expires" in name) as (identities, server):
        (fault,) = (one for one in identities.faults() if one.name == name)
        await hold(fault, server, folder)
        if isinstance(server, Simulator):
            await server.let_go()
