"""Sessions to real servers with certificates of every kind: who is let in, what a refusal says, what never leaks."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from asyncua import ua
from cryptography.hazmat.primitives.serialization import Encoding
from running import until

from opcua_detector.client import LinkState, Session, pki, secure, session
from opcua_detector.client.trust import Folder, TrustList
from opcua_detector.config import ServerConfig
from opcua_detector.errors import AccessRefused, ConfigError, DetectorError

from .certificates import (
    MODES,
    NOW,
    PASSWORD,
    POLICIES,
    URI,
    USER,
    Made,
    Users,
    authority,
    crl,
    make,
    secure_server,
)


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with this client's pair, which takes a while to make."""
    folder = tmp_path_factory.mktemp("own-pki")
    pki.own_certificate(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, own: Path) -> Path:
    """A `pki` folder with this client's pair and an empty trust list."""
    return Path(shutil.copytree(own, tmp_path / "pki"))


def trusting(place: Path, *some: Made) -> Path:
    for one in some:
        TrustList(place).put(one.certificate, Folder.TRUSTED)
    return place


def to(endpoint: str, place: Path, **changes: Any) -> Session:
    given: dict[str, Any] = {"name": "plant", "endpoint": endpoint, "policy": "Basic256Sha256", "pki": place}
    return Session(ServerConfig(**(given | changes)))


async def connects(one: Session) -> None:
    await one.open()
    assert one.state is LinkState.CONNECTED
    assert (await one.call(one.client.get_namespace_array(), "read"))[0] == "http://opcfoundation.org/UA/"
    await one.close()


async def refusal(one: Session) -> AccessRefused:
    with pytest.raises(AccessRefused) as caught:
        await one.open()
    await one.close()
    assert caught.value.next_step and "server plant at opc.tcp://127.0.0.1:" in caught.value.where
    return caught.value


# --- policies and modes ---


async def test_each_policy_and_mode_connects_to_a_trusted_server(
    cache: Path, place: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLANT_PASSWORD", PASSWORD)
    shown = make()
    async with secure_server(cache, shown) as server:
        trusting(place, shown)
        for policy in POLICIES:
            for mode in MODES:
                one = to(server.url, place, policy=policy, mode=mode, user=USER, password_env="PLANT_PASSWORD")
                await one.open()
                channel = one.client.security_policy
                assert channel.URI == secure.POLICIES[policy].URI and channel.Mode.name == mode
                assert channel.peer_certificate == shown.der
                facts = one.security.facts()
                assert (facts["policy"], facts["mode"], facts["insecure"]) == (policy, mode, False)
                assert facts["server_certificate"]["fingerprint"] == pki.fingerprint(shown.der)
                assert facts["warnings"] == [] and abs(facts["clock_offset_s"]) < 60
                await one.close()


async def test_a_weaker_endpoint_than_the_configured_is_never_taken(cache: Path, place: Path) -> None:
    shown = make()
    weak = (ua.SecurityPolicyType.NoSecurity, ua.SecurityPolicyType.Basic256Sha256_Sign)
    async with secure_server(cache, shown, policies=weak) as server:
        trusting(place, shown)
        for changes in ({}, {"policy": "Aes256Sha256RsaPss"}, {"policy": "Aes128Sha256RsaOaep", "mode": "Sign"}):
            error = await refusal(to(server.url, place, **changes))
            assert "does not offer this policy and mode" in error.what
            assert "Basic256Sha256/Sign, None/None" in error.next_step
        await connects(to(server.url, place, mode="Sign"))


async def test_the_channel_must_show_the_certificate_that_was_checked(cache: Path, place: Path) -> None:
    """Whoever stands between can show the trusted certificate, but has not its key."""
    trusted, own = make(), make(name="in between")
    async with secure_server(cache, own) as server:
        for endpoint in server.iserver.endpoints:
            endpoint.ServerCertificate = trusted.der
        trusting(place, trusted)
        await refusal(to(server.url, place, timeout="1 s"))


async def test_the_session_must_be_of_the_application_that_was_discovered(
    cache: Path, place: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = make(uris=(URI, "urn:another"))
    async with secure_server(cache, shown) as server:
        trusting(place, shown)
        asked = secure.discover

        async def between(endpoint: str, timeout_s: float) -> secure.Discovery:
            found = await asked(endpoint, timeout_s)
            for one in found.endpoints:
                one.Server.ApplicationUri = "urn:another"
            return found

        monkeypatch.setattr(secure, "discover", between)
        assert "somebody may stand between" in (await refusal(to(server.url, place))).next_step


# --- whom it refuses ---


@pytest.mark.parametrize(("changes", "listed", "text", "step"), [
    ({}, False, "not trusted", "opcua-detector cert trust "),
    ({"days": (-20, -1)}, True, "expired on", "renew the certificate"),
    ({"days": (1, 20)}, True, "not valid before", "set the clocks"),
    ({"uris": ("urn:another",)}, True, "its certificate names 'urn:another'", "ApplicationUri"),
    ({"hosts": ("plc-7",)}, True, "not for host 127.0.0.1, but for plc-7", "servers.plant.expected_host"),
    ({"bits": 1024, "name": "weak"}, True, "1024 bits", "RSA 2048"),
], ids=["untrusted", "expired", "not yet valid", "wrong URI", "wrong host", "weak key"])
async def test_a_server_is_refused_with_the_cause_and_the_next_step(
    cache: Path, place: Path, changes: dict[str, Any], listed: bool, text: str, step: str,
) -> None:
    shown = make(**changes)
    async with secure_server(cache, shown) as server:
        if listed:
            trusting(place, shown)
        error = await refusal(to(server.url, place))
        assert text in error.what and step in error.next_step
        # and the word insecure is the only way around
        one = to(server.url, place, insecure=True)
        if "bits" in changes:
            return  # the library cannot use so short a key
        await one.open()
        assert any(text in told for told in one.security.facts()["warnings"])
        await one.close()


async def test_a_rejected_certificate_is_kept_and_trusted_from_there(cache: Path, place: Path) -> None:
    shown = make()
    async with secure_server(cache, shown) as server:
        error = await refusal(to(server.url, place))
        (entry,) = TrustList(place).entries(Folder.REJECTED)
        assert f"cert trust {pki.fingerprint(shown.der)[:16]} --pki {place}" in error.next_step
        TrustList(place).put(pki.load_certificate(entry.file.read_bytes()), Folder.TRUSTED)
        await connects(to(server.url, place))


async def test_a_ca_in_the_trust_list_lets_its_servers_in_until_they_are_revoked(cache: Path, place: Path) -> None:
    root = authority()
    line = authority(root, name="line CA")
    shown = make(line)
    async with secure_server(cache, shown, chain=(line,)) as server:
        error = await refusal(to(server.url, place))
        assert "not trusted" in error.what
        TrustList(place).put(root.certificate, Folder.TRUSTED)
        await connects(to(server.url, place))
        TrustList(place).put(line.certificate, Folder.ISSUERS)
        assert "revocation list" in (await refusal(to(server.url, place, require_crl=True))).what
        TrustList(place).put_crl(crl(line, shown))
        assert "was revoked on" in (await refusal(to(server.url, place))).what


async def test_a_gateway_is_named_by_expected_host(cache: Path, place: Path) -> None:
    shown = make(hosts=("plc-7", "192.0.2.7"))
    async with secure_server(cache, shown) as server:
        trusting(place, shown)
        for host in ("plc-7", "PLC-7", "192.0.2.7"):
            await connects(to(server.url, place, expected_host=host))
        assert "not for host plc-8" in (await refusal(to(server.url, place, expected_host="plc-8"))).what


async def test_insecure_is_in_every_text_of_the_connection(
    cache: Path, place: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    shown = make(days=(-20, -1))
    async with secure_server(cache, shown) as server:
        one = to(server.url, place, insecure=True)
        with caplog.at_level(logging.WARNING, "opcua_detector"):
            await one.open()
        lines = [record.getMessage() for record in caplog.records if record.name.startswith("opcua_detector")]
        assert lines and all("INSECURE" in line for line in lines)
        assert any("is not checked" in line and "expired on" in line for line in lines)
        assert "INSECURE" in one.where and one.security.facts()["insecure"]
        await one.close()
        assert TrustList(place).entries() == []


# --- logins ---


async def test_a_wrong_password_and_an_unknown_user_are_told_without_the_secret(
    cache: Path, place: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLANT_PASSWORD", "wrong-staple")
    shown = make()
    async with secure_server(cache, shown) as server:
        trusting(place, shown)
        for user in (USER, "nobody"):
            error = await refusal(to(server.url, place, user=user, password_env="PLANT_PASSWORD"))
            assert "BadUserAccessDenied" in error.what and user in error.next_step
            assert "wrong-staple" not in str(error)


async def test_no_login_travels_over_policy_none(cache: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANT_PASSWORD", PASSWORD)
    with pytest.raises(ValueError, match="never travels in clear"):
        ServerConfig(name="plant", endpoint="opc.tcp://127.0.0.1:4840/", policy="None", insecure=True, user=USER,
                     password_env="PLANT_PASSWORD")
    async with secure_server(cache, make()) as server:
        # whatever made the configuration, the session refuses by itself
        given = ServerConfig(name="plant", endpoint=server.url, policy="None", insecure=True)
        one = Session(given.model_copy(update={"user": USER, "password_env": "PLANT_PASSWORD"}))
        assert "policy None" in (await refusal(one)).what


async def test_a_server_that_wants_the_password_in_clear_does_not_get_it(
    cache: Path, place: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLANT_PASSWORD", PASSWORD)
    shown = make()
    login = {"user": USER, "password_env": "PLANT_PASSWORD"}
    async with secure_server(cache, shown) as server:
        trusting(place, shown)
        for endpoint in server.iserver.endpoints:
            for token in endpoint.UserIdentityTokens:
                token.SecurityPolicyUri = "http://opcfoundation.org/UA/SecurityPolicy#None"
        error = await refusal(to(server.url, place, mode="Sign", **login))
        assert "unencrypted in mode Sign" in error.what and error.next_step == "mode: SignAndEncrypt"
        # inside an encrypted channel nobody can read it
        await connects(to(server.url, place, **login))


async def test_a_login_that_the_server_does_not_take_is_told_before_it_is_sent(
    cache: Path, place: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLANT_PASSWORD", PASSWORD)
    shown = make()
    async with secure_server(cache, shown, tokens=(ua.AnonymousIdentityToken,)) as server:
        trusting(place, shown)
        error = await refusal(to(server.url, place, user=USER, password_env="PLANT_PASSWORD"))
        assert "does not take this login (user name)" in error.what and "it takes: anonymous" in error.next_step
    async with secure_server(cache, shown, tokens=(ua.UserNameIdentityToken,)) as server:
        error = await refusal(to(server.url, place))
        assert "(anonymous)" in error.what and "password_env" in error.next_step


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("passphrase", ["", "open-sesame"])
async def test_a_user_certificate_logs_in(
    cache: Path, place: Path, tmp_path: Path, policy: str, passphrase: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown, person = make(), make(name="a person", uris=(), hosts=())
    (tmp_path / "person.der").write_bytes(person.der)
    key = tmp_path / "person.key.pem"
    key.write_bytes(person.pem_key(passphrase))
    key.chmod(0o600)
    given: dict[str, Any] = {"policy": policy, "user_certificate": tmp_path / "person.der", "user_key": key}
    if passphrase:
        monkeypatch.setenv("PERSON_KEY", passphrase)
        given["user_key_password_env"] = "PERSON_KEY"
    async with secure_server(cache, shown, tokens=(ua.X509IdentityToken,), users=Users(person.der)) as server:
        trusting(place, shown)
        await connects(to(server.url, place, **given))
        stranger = make(name="a stranger", uris=(), hosts=())
        (tmp_path / "person.der").write_bytes(stranger.der)
        assert "do not belong together" in (await refusal(to(server.url, place, **given))).what
        key.write_bytes(stranger.pem_key(passphrase))
        error = await refusal(to(server.url, place, **given))
        assert "BadUserAccessDenied" in error.what or "BadIdentityToken" in error.what


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
async def test_secrets_that_others_can_read_are_refused(place: Path, tmp_path: Path, mode: int) -> None:
    endpoint = "opc.tcp://127.0.0.1:4840/"  # nobody is asked before
    secret = tmp_path / "secret"
    secret.write_text(PASSWORD)
    secret.chmod(mode)
    with pytest.raises(ConfigError, match="readable by others") as caught:
        await to(endpoint, place, user=USER, password_file=secret).open()
    assert PASSWORD not in str(caught.value) and f"chmod 600 {secret}" in caught.value.next_step
    person = make(name="a person", uris=(), hosts=())
    (tmp_path / "person.der").write_bytes(person.der)
    secret.write_bytes(person.pem_key())
    with pytest.raises(AccessRefused, match="can be read by others"):
        await to(endpoint, place, user_certificate=tmp_path / "person.der", user_key=secret).open()


async def test_no_secret_is_in_anything_that_a_failing_run_leaves_behind(
    cache: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everything is logged, asyncua's debug log too, and every error and object is printed with its causes."""
    secrets = ("wrong-staple-in-variable", "wrong-staple-in-file", PASSWORD)
    monkeypatch.setenv("WRONG", secrets[0])
    monkeypatch.setenv("RIGHT", PASSWORD)
    file = tmp_path / "password"
    file.write_text(secrets[1])
    file.chmod(0o600)
    told = io.StringIO()
    handler = logging.StreamHandler(told)
    root, library = logging.getLogger(), logging.getLogger("asyncua")
    level, library_level = root.level, library.level
    shown = make()
    trusting(place, shown)
    try:
        async with secure_server(cache, shown) as server:
            root.addHandler(handler)
            root.setLevel(logging.DEBUG)
            logging.getLogger("asyncua.client").setLevel(logging.DEBUG)
            for login in ({"password_env": "WRONG"}, {"password_file": file}, {"password_env": "RIGHT"}):
                for mode in MODES:
                    one = to(server.url, place, mode=mode, user=USER, **login)  # type: ignore[arg-type]
                    try:
                        await one.open()
                        print(vars(one.client), one.client, file=told)
                    except DetectorError as error:
                        cause: BaseException | None = error
                        while cause is not None:
                            print(repr(cause), str(cause), vars(cause), file=told)
                            cause = cause.__cause__ or cause.__context__
                    print(one.config, one.security, one.security.facts(), vars(one), file=told)
                    await one.close()
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        library.setLevel(library_level)
        logging.getLogger("asyncua.client").setLevel(logging.NOTSET)
    text = told.getvalue()
    assert "BadUserAccessDenied" in text and "Sending: " in text and "OpenSecureChannelRequest" in text
    for secret in secrets:
        assert secret not in text


# --- while connected ---


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(session, "PROBE_S", 0.05)
    monkeypatch.setattr(session, "LAST_DELAY_S", 0.3)
    monkeypatch.setattr(secure, "RECHECK_S", 0.05)
    return


@pytest.mark.usefixtures("quick")
async def test_a_certificate_that_expires_while_connected_warns_and_the_next_connection_is_refused(
    cache: Path, place: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    left = datetime.now(UTC) - NOW + timedelta(seconds=6)  # enough to start the server and to connect
    shown = make(days=(-1, left / timedelta(days=1)))
    async with secure_server(cache, shown) as server:
        one = to(server.url, trusting(place, shown))
        with caplog.at_level(logging.WARNING, "opcua_detector"):
            await one.open()
            assert "expires in 0 days" in caplog.text
            await until(lambda: one.security.counters["certificates_expired"] == 1, "the warning")
            assert caplog.text.count("the connection stays, the next one is refused") == 1
        assert one.state is LinkState.CONNECTED and one.counters["lost"] == 0
        assert (await one.call(one.client.get_namespace_array(), "read"))[0]
        assert any("expired on" in text for text in one.security.facts()["warnings"])
        await asyncio.sleep(0.3)  # several probes later it is still one warning
        assert one.security.counters["certificates_expired"] == 1
        one.fail("a test wants it anew")
        await until(lambda: one.counters["failed_attempts"] >= 1, "the refusal")
        assert one.state is not LinkState.CONNECTED
        await one.close()
        assert "expired on" in (await refusal(to(server.url, place))).what


@pytest.mark.usefixtures("quick")
async def test_trust_that_is_taken_back_ends_the_connection_and_given_again_restores_it(
    cache: Path, place: Path,
) -> None:
    shown = make()
    async with secure_server(cache, shown) as server:
        listed = TrustList(trusting(place, shown))
        one = to(server.url, place)
        await one.open()
        listed.put(shown.certificate, Folder.REJECTED)
        await until(lambda: one.counters["failed_attempts"] >= 1, "the end of the connection")
        assert one.security.counters["trust_withdrawn"] == 1 and "not trusted" in one.reason
        listed.put(shown.certificate, Folder.TRUSTED)
        await until(lambda: one.state is LinkState.CONNECTED, "the connection")
        await one.close()


async def test_a_renewed_channel_keeps_working(cache: Path, place: Path) -> None:
    """Keys are renewed at three quarters of their life; the messages before and after are understood."""
    shown = make()
    async with secure_server(cache, shown) as server:
        for policy in POLICIES:
            one = to(server.url, trusting(place, shown), policy=policy)
            await one.open()
            for _ in range(3):
                await one.call(one.client.open_secure_channel(renew=True), "renew")
                assert (await one.call(one.client.get_namespace_array(), "read"))[0]
            await one.close()


# --- discovery ---


async def test_the_offset_of_the_clocks_is_measured_and_told(
    cache: Path, place: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = make(days=(0.04, 9))  # by the server's clock, which is ahead, it is valid
    async with secure_server(cache, shown) as server:
        found = await to(server.url, place).discover()
        assert found.clock_offset_s is not None and abs(found.clock_offset_s) < found.round_trip_s / 2 + 0.05
        there = secure.struct_from_binary

        def ahead(kind: type, body: Any) -> Any:
            answer = there(kind, body)
            answer.ResponseHeader.Timestamp += timedelta(hours=3)
            return answer

        monkeypatch.setattr(secure, "struct_from_binary", ahead)
        error = await refusal(to(server.url, trusting(place, shown)))
        assert "not valid before" in error.what and "the server's clock is 3 h ahead of ours" in error.what


async def test_a_certificate_that_is_none_is_refused(cache: Path, place: Path) -> None:
    shown = make()
    async with secure_server(cache, shown) as server:
        trusting(place, shown)
        for raw in (b"", b"\x30\x03abc", shown.der[:-1], shown.der + b"\0", shown.der * 20,
                    b"\x30\x84\xff\xff\xff\xff"):
            for endpoint in server.iserver.endpoints:
                endpoint.ServerCertificate = raw
            assert "certificate that can be read" in (await refusal(to(server.url, place))).what


async def test_a_pinned_certificate_stands_for_the_trust_list(cache: Path, place: Path, tmp_path: Path) -> None:
    shown, other = make(), make(name="other")
    file = tmp_path / "server.pem"
    file.write_bytes(shown.certificate.public_bytes(Encoding.PEM))
    async with secure_server(cache, shown) as server:
        await connects(to(server.url, place, server_certificate=file))
        file.write_bytes(other.certificate.public_bytes(Encoding.PEM))
        for insecure in (False, True):  # who pins wants this one
            one = to(server.url, trusting(place, shown), server_certificate=file, insecure=insecure)
            assert "shows another certificate" in (await refusal(one)).what


def test_hidden_logins_leave_everything_else_in_the_log() -> None:
    secure.hide_logins()
    secure.hide_logins()
    logger = logging.getLogger("asyncua.client.ua_client.UASocketProtocol")
    assert sum(isinstance(one, secure.HideLogins) for one in logger.filters) == 1
    shown = [logger.makeRecord("x", 10, "f", 1, "Sending: %s", (request,), None)
             for request in (ua.ActivateSessionRequest(), ua.ReadRequest())]
    assert [logger.filter(record) is not False for record in shown] == [False, True]


def test_the_facts_of_an_unencrypted_connection_say_so() -> None:
    one = Session(ServerConfig(name="plant", endpoint="opc.tcp://127.0.0.1:4840/", policy="None", insecure=True))
    assert one.where.endswith("(policy None, INSECURE)")
    assert one.security.facts()["mode"] == "None" and one.security.warnings() == []
