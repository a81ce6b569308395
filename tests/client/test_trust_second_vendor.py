"""Security against a server that is not asyncua: what its stack sends and demands is another program's word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plant.node_server import NodeServer

from opcua_detector.client import Session, secure
from opcua_detector.client.pki import load_chain
from opcua_detector.client.trust import Folder, TrustList
from opcua_detector.config import ServerConfig
from opcua_detector.errors import AccessRefused

from .certificates import MODES, PASSWORD, POLICIES, USER, make

pytestmark = pytest.mark.plant


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeServer]:
    """node-opcua with every policy, a user, and certificates of its own making."""
    folder = tmp_path_factory.mktemp("node")
    server = NodeServer({"port": 0, "process": "lorenz", "columns": [], "pki": str(folder / "pki"),
                         "scratch": str(folder / "scratch"), "users": {USER: PASSWORD}})
    yield server
    server.kill()


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
