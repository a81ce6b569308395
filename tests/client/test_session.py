"""Connecting: what is told when it fails, and what survives."""

from __future__ import annotations

import asyncio
import socket
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from opcua_detector.client import GroupFeed, LinkState, Session, session, subscription
from opcua_detector.errors import AccessRefused, ConfigError, ServerUnreachable
from sim_server.testing import RunningPlant, running_plant

from .conftest import PASSWORD, USER, WAIT_S, OddServer, Rows, group_config, server_config


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_nobody_there_names_endpoint_policy_and_next_step() -> None:
    endpoint = f"opc.tcp://127.0.0.1:{free_port()}/"
    with pytest.raises(ServerUnreachable) as caught:
        await Session(server_config(endpoint)).open()
    text = str(caught.value)
    assert endpoint in text and "policy None" in text and "next step: check endpoint" in text


async def test_a_listener_that_never_answers_is_unreachable_within_the_timeout() -> None:
    server = await asyncio.start_server(lambda reader, writer: asyncio.sleep(0), "127.0.0.1", 0)
    endpoint = f"opc.tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    try:
        with pytest.raises(ServerUnreachable, match=r"within 0\.3 s|hello"):
            await asyncio.wait_for(Session(server_config(endpoint, timeout="300 ms")).open(), WAIT_S)
    finally:
        server.close()


def secure(plant: RunningPlant, pki: Path, **changes: Any) -> Session:
    return Session(server_config(plant.endpoint, policy="Basic256Sha256", pki=pki, **changes))


async def test_a_wrong_password_is_refused_and_never_shown(
    plant: RunningPlant,
    pki: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PLANT_PASSWORD", "wrong-horse")
    with pytest.raises(AccessRefused) as caught:
        await secure(plant, pki, user=USER, password_env="PLANT_PASSWORD").open()
    text = str(caught.value)
    assert (
        "BadUserAccessDenied" in text and "Basic256Sha256/SignAndEncrypt" in text and f"user '{USER}'" in text
    )
    assert "wrong-horse" not in text + repr(caught.value) + caplog.text


@pytest.mark.parametrize("mode", ["Sign", "SignAndEncrypt"])
async def test_the_right_password_connects_over_basic256sha256(
    plant: RunningPlant,
    pki: Path,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLANT_PASSWORD", PASSWORD)
    one = secure(plant, pki, mode=mode, user=USER, password_env="PLANT_PASSWORD")
    await one.open()
    assert one.state is LinkState.CONNECTED
    assert "urn:opcua-detector:simulated-plant" in one.namespaces
    await one.close()


async def test_the_own_certificate_is_made_once_and_kept(plant: RunningPlant, pki: Path) -> None:
    contents = []
    for _ in range(2):
        one = secure(plant, pki)
        await one.open()
        await one.close()
        contents.append((pki / "own" / "opcua-detector.der").read_bytes())
    assert contents[0] == contents[1]
    assert (pki / "own" / "opcua-detector.key.pem").stat().st_mode & 0o077 == 0
    # and nothing else is written, above all no certificate of the server
    assert sorted(str(file.relative_to(pki)) for file in pki.rglob("*") if file.is_file()) == [
        "own/opcua-detector.der",
        "own/opcua-detector.key.pem",
    ]


async def test_another_server_certificate_than_the_pinned_one_is_refused(
    plant: RunningPlant, pki: Path
) -> None:
    own = secure(plant, pki)
    await own.open()
    await own.close()
    pinned = pki / "own" / "opcua-detector.der"  # a certificate, but not the server's
    with pytest.raises(AccessRefused, match="shows another certificate"):
        await secure(plant, pki, insecure=False, server_certificate=pinned, timeout="1 s").open()


async def test_the_pinned_server_certificate_connects(plant: RunningPlant, pki: Path, tmp_path: Path) -> None:
    look = secure(plant, pki)
    shown = next(one.ServerCertificate for one in (await look.discover()).endpoints if one.ServerCertificate)
    pinned = tmp_path / "server.der"
    pinned.write_bytes(shown)
    one = secure(plant, pki, insecure=False, server_certificate=pinned)
    await one.open()
    assert one.state is LinkState.CONNECTED
    await one.close()


async def test_a_pinned_file_that_is_no_certificate_names_the_key(
    plant: RunningPlant,
    pki: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "server.der").write_bytes(b"no certificate")
    with pytest.raises(ConfigError, match=r"servers\.plant\.server_certificate.*no certificate"):
        await secure(plant, pki, server_certificate=tmp_path / "server.der").open()


async def test_a_policy_that_is_not_offered_names_what_is(odd: OddServer, pki: Path) -> None:
    one = Session(server_config(odd.endpoint, policy="Basic256Sha256", pki=pki))
    with pytest.raises(AccessRefused, match=r"does not offer this policy[\s\S]*None/None"):
        await one.open()


async def test_anonymous_is_refused_by_a_server_that_wants_a_user(cache: Path) -> None:
    strict = OddServer(cache, anonymous=False)
    await strict.start()
    with pytest.raises(AccessRefused) as caught:
        await Session(server_config(strict.endpoint)).open()
    await strict.server.stop()
    assert "BadUserAccessDenied" in str(caught.value) and "password_env" in caught.value.next_step


async def test_a_killed_and_restarted_server_gives_a_gap_and_rows_again_without_a_human(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "LAST_DELAY_S", 0.5)
    states: list[LinkState] = []
    with running_plant("lorenz", history_rows=0) as plant:
        one = Session(server_config(plant.endpoint), on_state=lambda state, reason: states.append(state))
        await one.open()
        rows = Rows()
        feed = GroupFeed(group_config("x1", "x3", "constant", "state"), {"plant": one}, rows.take)
        await feed.start()
        await rows.more(50)
        before = len(rows.rows)
        plant.kill()
        await asyncio.to_thread(plant.restart)
        await rows.until(lambda r: len(r.rows) > before + 50 and one.counters["reconnects"] == 1)
        gaps = [k for k, row in enumerate(rows.rows) if row[1]]
        assert gaps[0] == 0 and len(gaps) == 2
        after = rows.rows[gaps[1] :]
        assert all(row[3][:2].all() for row in after[1:])
        stamps = np_diff([row[0] for row in after])
        assert set(stamps) == {10_000_000}
        counts = feed.counters()
        assert counts["gaps"] == 1 and one.counters["lost"] == 1 and one.counters["failed_attempts"] >= 1
        assert states == [LinkState.CONNECTING, LinkState.CONNECTED, LinkState.WAITING, LinkState.CONNECTED]
        assert feed.tag_states() == {"x1": "", "x3": "", "constant": "", "state": ""}
        await feed.stop()
        await one.close()


def np_diff(stamps: list[int]) -> list[int]:
    return [b - a for a, b in pairwise(stamps)]


async def test_a_frozen_server_is_noticed_by_its_silence_and_taken_up_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subscription, "KEEP_ALIVE_S", 0.3)
    monkeypatch.setattr(subscription, "SILENCE_MARGIN_S", 0.3)
    monkeypatch.setattr(session, "LAST_DELAY_S", 0.3)
    waiting = asyncio.Event()
    with running_plant("lorenz", history_rows=0) as plant:
        one = Session(
            server_config(plant.endpoint, timeout="700 ms"),
            on_state=lambda state, reason: waiting.set() if state is LinkState.WAITING else None,
        )
        await one.open()
        rows = Rows()
        feed = GroupFeed(group_config("x1", "x3"), {"plant": one}, rows.take)
        await feed.start()
        await rows.more(20)
        plant.pause()
        try:
            await asyncio.wait_for(waiting.wait(), WAIT_S)
            assert "no value and no keep-alive" in one.reason
        finally:
            plant.resume()
        await rows.more(50)
        assert one.counters["reconnects"] >= 1 and sum(row[1] for row in rows.rows) >= 2
        await feed.stop()
        await one.close()
