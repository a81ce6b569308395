"""Security against a server that is not asyncua: what its stack sends and demands is another program's word."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from plant.node_server import NodeServer
from running import until

from opcua_detector.client import LinkState, Session, secure, session
from opcua_detector.client.pki import load_chain
from opcua_detector.client.trust import Folder, TrustList
from opcua_detector.config import ServerConfig
from opcua_detector.errors import AccessRefused

from .certificates import MODES, NOW, PASSWORD, POLICIES, USER, Made, make

pytestmark = pytest.mark.plant


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeServer]:
    """node-opcua with every policy, a user, and certificates of its own making."""
    folder = tmp_path_factory.mktemp("node")
    server = NodeServer({"port": 0, "process": "lorenz", "columns": [], "pki": str(folder / "pki"),
                         "scratch": str(folder / "scratch"), "users": {USER: PASSWORD}})
    yield server
    server.close()


URI = "urn:opcua-detector:second-vendor"


@contextmanager
def showing(shown: Made, folder: Path) -> Iterator[NodeServer]:
    """Run node-opcua with a certificate of ours, whatever is wrong with it."""
    certificate, key = folder / "shown.pem", folder / "shown.key.pem"
    certificate.write_bytes(shown.certificate.public_bytes(Encoding.PEM))
    key.write_bytes(shown.pem_key())
    server = NodeServer({"port": 0, "process": "lorenz", "columns": [], "pki": str(folder / "server-pki"),
                         "scratch": str(folder / "scratch"), "users": {USER: PASSWORD},
                         "certificate": str(certificate), "private_key": str(key)})
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `pki` folder, made once."""
    return tmp_path_factory.mktemp("client") / "pki"


def to(node: NodeServer, place: Path, **changes: Any) -> Session:
    given: dict[str, Any] = {"name": "node", "endpoint": node.endpoint, "pki": place, "user": USER,
                             "password_env": "PLANT_PASSWORD"}
    return Session(ServerConfig(**(given | changes)))


@pytest.fixture(autouse=True)
def password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANT_PASSWORD", PASSWORD)
    monkeypatch.setenv("WRONG", "wrong-staple")


async def trusted(node: NodeServer, place: Path) -> None:
    found = await to(node, place).discover()
    raw = next(bytes(one.ServerCertificate) for one in found.endpoints if one.ServerCertificate)
    TrustList(place).put(load_chain(raw)[0], Folder.TRUSTED)


async def test_an_untrusted_server_is_refused_with_the_command(node: NodeServer, tmp_path: Path) -> None:
    with pytest.raises(AccessRefused, match="not trusted") as caught:
        await to(node, tmp_path).open()
    assert "opcua-detector cert trust " in caught.value.next_step
    (entry,) = TrustList(tmp_path).entries(Folder.REJECTED)
    assert entry.about is not None and entry.about.application_uri


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", MODES)
async def test_each_policy_and_mode_logs_in_renews_and_goes_on(
    node: NodeServer, place: Path, policy: str, mode: str,
) -> None:
    await trusted(node, place)
    one = to(node, place, policy=policy, mode=mode)
    await one.open()
    assert one.client.security_policy.URI == secure.POLICIES[policy].URI
    for _ in range(2):
        await one.call(one.client.open_secure_channel(renew=True), "renew")
        assert (await one.call(one.client.get_namespace_array(), "read"))[0] == "http://opcfoundation.org/UA/"
    await one.close()
    with pytest.raises(AccessRefused) as caught:
        await to(node, place, policy=policy, mode=mode, password_env="WRONG").open()
    assert "wrong-staple" not in str(caught.value) and USER in caught.value.next_step


async def test_another_certificate_of_the_same_name_is_refused(node: NodeServer, tmp_path: Path) -> None:
    pinned = tmp_path / "pinned.der"
    pinned.write_bytes(make(name="NodeOPCUA").der)
    with pytest.raises(AccessRefused, match="shows another certificate"):
        await to(node, tmp_path, server_certificate=pinned).open()


@pytest.mark.parametrize(("changes", "text", "step"), [
    ({"days": (-20, -1)}, "expired on", "renew the certificate"),
    ({"days": (1, 20)}, "not valid before", "set the clocks"),
    ({"uris": ("urn:another",)}, "its certificate names 'urn:another'", "ApplicationUri"),
    ({"hosts": ("plc-7",)}, "not for host 127.0.0.1, but for plc-7", "servers.node.expected_host"),
], ids=["expired", "not yet valid", "wrong URI", "wrong host"])
async def test_a_trusted_server_is_refused_for_what_its_certificate_says(
    place: Path, tmp_path: Path, changes: dict[str, Any], text: str, step: str,
) -> None:
    shown = make(**{"uris": (URI,)} | changes)
    TrustList(place).put(shown.certificate, Folder.TRUSTED)
    with showing(shown, tmp_path) as node:
        one = to(node, place)
        with pytest.raises(AccessRefused) as caught:
            await one.open()
        await one.close()
        assert text in caught.value.what and step in caught.value.next_step
        # it is the certificate alone that was wrong
        other = to(node, place, insecure=True)
        await other.open()
        assert any(text in told for told in other.security.facts()["warnings"])
        await other.close()


async def test_a_certificate_that_expires_while_connected_warns_and_the_next_connection_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(session, "PROBE_S", 0.05)
    left = datetime.now(UTC) - NOW + timedelta(seconds=15)  # enough to start the server and to connect
    shown = make(uris=(URI,), days=(-1, left / timedelta(days=1)))
    TrustList(place).put(shown.certificate, Folder.TRUSTED)
    with showing(shown, tmp_path) as node:
        one = to(node, place)
        with caplog.at_level(logging.WARNING, "opcua_detector"):
            await one.open()
            await until(lambda: one.security.counters["certificates_expired"] == 1, "the warning")
        assert caplog.text.count("the connection stays, the next one is refused") == 1
        assert one.state is LinkState.CONNECTED and one.counters["lost"] == 0
        # Part 4, 6.1.7 has certificates verified at each renewal of the keys. Age alone does not end a connection here
        # (expiry may be suppressed: Part 12, 7.8.2.10); trust and revocation do, and are looked at more often.
        await one.call(one.client.open_secure_channel(renew=True), "renew")
        assert (await one.call(one.client.get_namespace_array(), "read"))[0]
        one.fail("a test wants it anew")
        await until(lambda: one.counters["failed_attempts"] >= 1, "the refusal")
        assert "expired on" in one.reason and one.state is not LinkState.CONNECTED
        await one.close()
