"""The command `cert`, as an engineer uses it before the first secure connection."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import typer
from client.certificates import authority, crl, make
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from running import Ran, cli, content, tag, write

from opcua_detector.cli import cert
from opcua_detector.client import pki
from opcua_detector.client.trust import Folder, TrustList
from sim_server.testing import RunningPlant


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cert") / "pki"
    ran = cli("cert", "new", "--pki", folder, "--host", "edge-7", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["fingerprint"] == pki.fingerprint(pki.certificate_file(folder).read_bytes())
    assert "edge-7" in ran.json["hosts"] and ran.json["application_uri"].endswith(":opcua-detector")
    return folder


def file_of(folder: Path, raw: bytes, name: str = "server.der") -> Path:
    file = folder / name
    file.write_bytes(raw)
    return file


def shown_by(plant: RunningPlant, place: Path) -> dict[str, Any]:
    """What `trust` says of the plant's certificate when nobody has compared it."""
    ran = cli("cert", "trust", f"127.0.0.1:{plant.port}", "--pki", place)
    assert ran.code == 2 and "nobody has compared the fingerprint" in ran.err
    lines = dict(line.split(None, 1) for line in ran.out.splitlines() if line.split())
    return {"digits": lines["SHA-256"].replace(" ", "").lower(), "uri": lines["uri"], "text": ran.out}


def test_new_makes_a_pair_once(made: Path) -> None:
    before = pki.certificate_file(made).read_bytes()
    ran = cli("cert", "new", "--pki", made)
    assert ran.code == 2 and "--replace" in ran.err
    assert pki.certificate_file(made).read_bytes() == before
    if os.name == "posix":
        assert stat.S_IMODE(pki.key_file(made).stat().st_mode) == 0o600


def test_replacing_keeps_the_old_pair(made: Path, tmp_path: Path) -> None:
    place = tmp_path / "pki"
    first = cli("cert", "new", "--pki", place, "--days", "30", "--json").json
    second = cli("cert", "new", "--pki", place, "--replace", "--json").json
    assert first["fingerprint"] != second["fingerprint"]
    assert pki.fingerprint(Path(second["replaced"][0]).read_bytes()) == first["fingerprint"]


def test_export_gives_the_certificate_and_never_the_key(made: Path, tmp_path: Path) -> None:
    der, pem = tmp_path / "mine.der", tmp_path / "mine.pem"
    assert cli("cert", "export", "--pki", made, "--out", der).code == 0
    assert cli("cert", "export", "--pki", made, "--out", pem, "--pem", "--json").code == 0
    assert der.read_bytes() == pki.certificate_file(made).read_bytes()
    assert x509.load_pem_x509_certificate(pem.read_bytes()).public_bytes(Encoding.DER) == der.read_bytes()
    assert b"PRIVATE" not in pem.read_bytes()
    assert cli("cert", "export", "--pki", made, "--out", der).code == 0  # the same again is no matter
    other = file_of(tmp_path, b"something else", "other")
    assert cli("cert", "export", "--pki", made, "--out", other).code == 2 and other.read_bytes() == b"something else"


def test_trust_shows_a_file_first_and_untrust_takes_it_back(tmp_path: Path) -> None:
    place, server = tmp_path / "pki", make()
    file = file_of(tmp_path, server.certificate.public_bytes(Encoding.PEM), "server.pem")
    digits = pki.fingerprint(server.der)
    ran = cli("cert", "trust", file, "--pki", place)
    assert ran.code == 2 and "nobody has compared" in ran.err and pki.spaced(digits) in ran.out
    assert TrustList(place).entries() == []
    ran = cli("cert", "trust", file, "--pki", place, "--fingerprint", "0" * 16)
    assert ran.code == 6 and "is another one" in ran.err and TrustList(place).entries() == []
    assert cli("cert", "trust", file, "--pki", place, "--fingerprint", digits[:8]).code == 6  # too few
    ran = cli("cert", "trust", file, "--pki", place, "--fingerprint", pki.spaced(digits), "--json")
    assert ran.code == 0 and not ran.json["already"], ran.err
    assert cli("cert", "trust", file, "--pki", place, "--json").json["already"]
    assert [one.folder for one in TrustList(place).entries()] == [Folder.TRUSTED]
    ran = cli("cert", "untrust", digits[:8], "--pki", place)
    assert ran.code == 0 and "not trusted any more" in ran.err
    assert [one.folder for one in TrustList(place).entries()] == [Folder.REJECTED]
    assert cli("cert", "untrust", digits[:8], "--pki", place).code == 2
    assert cli("cert", "trust", digits[:16], "--pki", place, "--yes").code == 0  # a rejected one, by its fingerprint
    assert [one.folder for one in TrustList(place).entries()] == [Folder.TRUSTED]


def test_a_person_is_asked_and_no_is_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, file = tmp_path / "pki", file_of(tmp_path, make().der)
    monkeypatch.setattr(cert.sys.stdin, "isatty", lambda: True, raising=False)
    for answer, code, held in ((False, 130, 0), (True, 0, 1)):
        monkeypatch.setattr(typer, "confirm", lambda text, err, answer=answer: answer)
        assert cli("cert", "trust", file, "--pki", place).code == code
        assert len(TrustList(place).entries()) == held


def test_a_ca_is_told_to_be_one_and_its_revocations_are_taken(tmp_path: Path) -> None:
    place, root = tmp_path / "pki", authority()
    ca = file_of(tmp_path, root.der, "ca.der")
    revocations = file_of(tmp_path, crl(root, make(root)).public_bytes(Encoding.DER), "ca.crl")
    ran = cli("cert", "trust", revocations, "--pki", place)
    assert ran.code == 6 and "trust the CA's certificate first" in ran.err
    ran = cli("cert", "trust", ca, "--pki", place, "--yes")
    assert ran.code == 0 and "every certificate that it signs will be trusted" in ran.out
    assert cli("cert", "trust", revocations, "--pki", place).code == 0
    assert cli("cert", "trust", file_of(tmp_path, make().der), "--pki", place, "--issuer", "--yes").code == 2
    assert cli("cert", "trust", ca, "--pki", place, "--issuer", "--yes").code == 0
    assert [one.folder for one in TrustList(place).entries()] == [Folder.ISSUERS]


def test_show_tells_everything_that_lies_there(made: Path, tmp_path: Path) -> None:
    listed = TrustList(made)
    server, old, root = make(), make(name="old server", days=(-9, -1)), authority()
    listed.put(server.certificate, Folder.TRUSTED)
    listed.put(old.certificate, Folder.REJECTED)
    listed.put(root.certificate, Folder.ISSUERS)
    (made / "trusted" / "notes.txt").write_text("no certificate")
    ran = cli("cert", "show", "--pki", made)
    lines = ran.out.splitlines()
    assert ran.code == 0 and any(line.startswith("own") for line in lines)
    assert any("expired" in line and "old server" in line for line in lines)
    assert any("CA" in line and "plant CA" in line for line in lines)
    assert any("notes.txt" in line and "trusts nobody" in line for line in lines)
    kinds = [one["folder"] for one in cli("cert", "show", "--pki", made, "--json").json["certificates"]]
    assert sorted(kinds) == ["issuers", "own", "rejected", "trusted", "trusted"]
    one = cli("cert", "show", pki.fingerprint(server.der)[:8], "--pki", made)
    assert one.code == 0 and pki.spaced(pki.fingerprint(server.der)) in one.out and "urn:tests:secure-server" in one.out
    assert cli("cert", "show", "00000000", "--pki", made).code == 2
    assert cli("cert", "show", "--pki", tmp_path / "nowhere").code == 0


@pytest.mark.parametrize("arguments", [
    ("trust", "nowhere.der"), ("trust", "1234567"), ("trust", "http://plant/"), ("trust", "opc.tcp://"),
    ("untrust", "ffffffff"), ("export", "ffffffff"), ("new", "--bits", "1024"), ("new", "--days", "0"),
    ("show", "--config", "nowhere.yaml"),
])
def test_what_cannot_be_done_is_told_with_the_next_step(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ran = cli("cert", *arguments, "--pki", tmp_path, "--json")
    assert ran.code == 2 and ran.json["error"]["next_step"]


def test_a_server_is_trusted_over_the_network_and_then_checked(
    plant: RunningPlant, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole way: refused with the command, trusted by that command, connected; and taken back."""
    given = content(plant.endpoint, tags=[tag("x1"), tag("x3")], outputs=None)
    given["servers"][0] = {"name": "plant", "endpoint": plant.endpoint, "policy": "Basic256Sha256", "pki": "pki"}
    file = write(tmp_path, given)
    place = tmp_path / "pki"
    assert cli("cert", "new", "--config", file).code == 0
    ran = cli("check", file, "--json")
    (problem,) = [one for one in ran.json["findings"] if "not trusted" in one["problem"]]
    command = problem["fix"].partition("run: opcua-detector ")[2].split()
    assert command[:2] == ["cert", "trust"]
    shown = shown_by(plant, place)
    assert shown["uri"] == "urn:opcua-detector:simulated-plant:server"
    assert shown["digits"].startswith(command[2])
    ran = cli(*command, "--fingerprint", shown["digits"])
    assert ran.code == 0, ran.err
    assert not [one for one in cli("check", file, "--json").json["findings"] if one["error"]]
    assert cli("cert", "untrust", shown["digits"][:16], "--config", file).code == 0
    # by the server's name, too
    ran = cli("cert", "trust", "plant", "--config", file, "--fingerprint", shown["digits"][:16], "--json")
    assert ran.code == 0 and ran.json["notes"] == [], ran.err
    ran = cli("cert", "trust", "plant", "--config", file, "--fingerprint", "0" * 16)
    assert ran.code == 6 and "shows another certificate" in ran.err


def test_what_would_still_be_refused_is_told_before_it_is_trusted(plant: RunningPlant, tmp_path: Path) -> None:
    # another way to write the same address, which is no name of the certificate
    ran = cli("cert", "trust", f"opc.tcp://127.1:{plant.port}/", "--pki", tmp_path)
    assert ran.code == 2 and "it will still be refused" in ran.out and "not for host 127.1" in ran.out


def test_every_subcommand_has_help_and_json() -> None:
    for name in ("new", "show", "trust", "untrust", "export"):
        ran: Ran = cli("cert", name, "--help")
        assert ran.code == 0 and "--json" in ran.out and "--pki" in ran.out
