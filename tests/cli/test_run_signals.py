"""Signals to `run` that concern a connection: SIGHUP tries a login again that the server has refused."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from asyncua import ua
from client.certificates import USER, make, secure_server
from client.test_refusals import NEW, OLD, Accounts, held_back, lose
from running import content, until, write

from opcua_detector.cli import online
from opcua_detector.client import LinkState, refusals, session
from opcua_detector.client.trust import Folder, TrustList
from opcua_detector.config import load
from opcua_detector.service import Service


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="SIGHUP")
async def test_sighup_tries_a_refused_login_again_at_once(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "LAST_DELAY_S", 0.1)
    monkeypatch.setattr(session, "LOOK_S", 0.05)
    monkeypatch.setattr(refusals, "PAUSES_S", (0.1, 0.1, 1000.0))
    monkeypatch.setattr(online, "set_apart_what_stays", lambda: None)  # it is for a process of its own
    monkeypatch.setenv("PLANT_PASSWORD", OLD)
    started: list[Service] = []

    class Watched(Service):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            started.append(self)

    monkeypatch.setattr(online, "Service", Watched)
    shown, accounts = make(), Accounts()
    TrustList(folder / "pki").put(shown.certificate, Folder.TRUSTED)
    async with secure_server(tmp_path_factory.mktemp("cache") / "address-space", shown, users=accounts) as server:
        index = await server.register_namespace("urn:plant")
        for name in ("x1", "x3"):
            await server.nodes.objects.add_variable(ua.NodeId(name, index), f"{index}:{name}", 1.0)
        given = content(server.url, outputs=False, tags=[
            {"name": name, "node": f"nsu=urn:plant;s={name}"} for name in ("x1", "x3")])
        given["servers"][0] |= {"policy": "Basic256Sha256", "insecure": False, "pki": str(folder / "pki"),
                                "user": USER, "password_env": "PLANT_PASSWORD"}
        file = write(folder, given)
        run = asyncio.create_task(online._run(load(file), file, (), 0.0, True))
        try:
            await until(lambda: run.done() or signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL, "it to run")
            assert not run.done(), run.exception()
            one = started[0].sessions["plant"]
            await lose(one, accounts, NEW)
            await held_back(one, accounts)
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: accounts.refused == 4, "the try")
            accounts.password = OLD  # the server has changed its mind
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: one.state is LinkState.CONNECTED, "the connection")
            assert accounts.refused == 4
        finally:
            if not run.done():
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.wait({run}, timeout=30.0)
        assert (await run)["sessions"]["plant"]["reconnects"] == 1
