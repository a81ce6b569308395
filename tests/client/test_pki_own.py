"""This client's own pair: as OPC UA wants it, made once, kept, and never replaced in silence."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from opcua_detector.client import pki
from opcua_detector.errors import AccessRefused, ConfigError

from .certificates import authority, make


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept") / "pki"
    pki.own_certificate(folder)
    return folder


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    """A copy of a pair that a test may spoil."""
    copy = tmp_path / "pki"
    (copy / "own").mkdir(parents=True)
    for file in (pki.certificate_file(kept), pki.key_file(kept)):
        (copy / "own" / file.name).write_bytes(file.read_bytes())
        (copy / "own" / file.name).chmod(0o600)
    return copy


def loaded(folder: Path) -> x509.Certificate:
    return x509.load_der_x509_certificate(pki.certificate_file(folder).read_bytes())


def test_the_certificate_is_an_application_instance_certificate(kept: Path) -> None:
    certificate = loaded(kept)
    about = pki.describe(certificate)
    assert about.application_uri == f"urn:{socket.gethostname()}:opcua-detector"
    assert pki.own_certificate(kept).application_uri == about.application_uri
    assert about.hosts[0] == socket.gethostname()
    assert about.key_bits == 2048 and about.signed_with == "sha256" and about.self_signed and not about.authority
    assert about.not_before < datetime.now(UTC) and about.not_after > datetime.now(UTC) + timedelta(days=3600)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature and usage.key_encipherment and usage.data_encipherment and usage.content_commitment
    extended = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH in extended
    certificate.verify_directly_issued_by(certificate)


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_the_key_is_its_owners_alone(kept: Path) -> None:
    assert pki.key_file(kept).stat().st_mode & 0o777 == 0o600
    assert pki.key_file(kept).parent.stat().st_mode & 0o777 == 0o700
    assert sorted(file.name for file in pki.key_file(kept).parent.iterdir()) == [
        "opcua-detector.der", "opcua-detector.key.pem"]  # and no temporary is left


def test_names_validity_and_key_are_as_asked(tmp_path: Path) -> None:
    pki.make_pair(tmp_path, hosts=["plc-gateway", "192.0.2.9"], days=30, bits=3072, uri="urn:line-7:detector")
    about = pki.describe(loaded(tmp_path))
    assert about.application_uri == "urn:line-7:detector" and about.key_bits == 3072
    assert {"plc-gateway", "192.0.2.9", socket.gethostname()} <= set(about.hosts)
    assert timedelta(days=29) < about.not_after - datetime.now(UTC) < timedelta(days=31)


def test_processes_that_start_at_once_use_one_pair(tmp_path: Path) -> None:
    code = ("import sys; from pathlib import Path; from opcua_detector.client import pki\n"
            "print(pki.fingerprint(pki.own_certificate(Path(sys.argv[1])).certificate.read_bytes()))")
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
               for _ in range(3)]
    answers = [one.communicate()[0].strip() for one in started]
    assert [one.returncode for one in started] == [0, 0, 0]
    assert set(answers) == {pki.fingerprint(pki.certificate_file(tmp_path).read_bytes())}


def test_a_start_that_broke_between_key_and_certificate_is_finished(folder: Path) -> None:
    key = pki.key_file(folder).read_bytes()
    pki.certificate_file(folder).unlink()
    pki.own_certificate(folder)
    assert pki.key_file(folder).read_bytes() == key
    assert loaded(folder).public_key() == pki.read_private_key(pki.key_file(folder)).public_key()


@pytest.mark.parametrize(("spoil", "text"), [
    (lambda f: pki.key_file(f).unlink(), "private key of this client's certificate is missing"),
    (lambda f: pki.certificate_file(f).write_bytes(b"damaged"), "cannot be read"),
    (lambda f: pki.key_file(f).write_bytes(b"damaged"), "damaged, or its pass phrase"),
    (lambda f: pki.key_file(f).write_bytes(make(name="another").pem_key()), "do not belong together"),
    (lambda f: pki.key_file(f).write_bytes(make(name="another").pem_key("locked")), "pass phrase"),
], ids=["no key", "damaged certificate", "damaged key", "another key", "locked key"])
def test_a_pair_that_cannot_be_used_is_told_and_left_as_it_is(folder: Path, spoil: object, text: str) -> None:
    spoil(folder)  # type: ignore[operator]
    before = {file.name: file.read_bytes() for file in (folder / "own").iterdir()}
    with pytest.raises(AccessRefused, match=text) as caught:
        pki.own_certificate(folder)
    assert f"cert new --replace --pki {folder}" in caught.value.next_step or "missing" in text
    assert {file.name: file.read_bytes() for file in (folder / "own").iterdir()} == before


def test_an_expired_certificate_is_told_and_not_replaced(folder: Path) -> None:
    old = make(name="old", days=(-9, -1))
    pki.certificate_file(folder).write_bytes(old.der)
    pki.key_file(folder).write_bytes(old.pem_key())
    with pytest.raises(AccessRefused, match="this client's certificate expired on") as caught:
        pki.own_certificate(folder)
    assert "cert new --replace" in caught.value.next_step
    assert pki.certificate_file(folder).read_bytes() == old.der


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_key_that_others_can_read_is_refused(folder: Path, mode: int) -> None:
    pki.key_file(folder).chmod(mode)
    with pytest.raises(AccessRefused, match="can be read by others") as caught:
        pki.own_certificate(folder)
    assert f"chmod 600 {pki.key_file(folder)}" in caught.value.next_step


def test_no_error_about_a_key_holds_any_of_it(tmp_path: Path) -> None:
    made = make(name="locked")
    file = tmp_path / "key.pem"
    for raw, password in ((made.pem_key("open-sesame"), "wrong-word"), (made.pem_key()[:-200], None),
                          (made.pem_key(), "needless-word")):
        file.write_bytes(raw)
        file.chmod(0o600)
        with pytest.raises(AccessRefused) as caught:
            pki.read_private_key(file, password=password)
        text = f"{caught.value!r} {caught.value} {caught.value.__cause__!r} {vars(caught.value)}"
        assert "word" not in text and raw.splitlines()[1].decode() not in text


def test_the_old_pair_is_kept_when_it_is_replaced(folder: Path) -> None:
    before = pki.certificate_file(folder).read_bytes()
    moved = pki.retire_pair(folder)
    assert len(moved) == 2 and moved[0].read_bytes() == before and not pki.certificate_file(folder).exists()
    pki.own_certificate(folder)
    assert pki.certificate_file(folder).read_bytes() != before


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "pki").write_text("a file")
    with pytest.raises(AccessRefused, match="cannot be made") as caught:
        pki.own_certificate(tmp_path / "pki")
    assert "choose a folder" in caught.value.next_step


def test_a_chain_is_read_leaf_first_and_whole() -> None:
    root = authority()
    leaf = make(root, name="leaf")
    assert pki.load_chain(leaf.der + root.der) == [leaf.certificate, root.certificate]
    for raw in (b"", leaf.der[:-1], leaf.der + b"\0", leaf.der + root.der[:40], leaf.der * 11, bytes(70_000),
                b"\x30\x80" + leaf.der, b"\x30\x84\xff\xff\xff\xff\0"):
        with pytest.raises(ValueError):
            pki.load_chain(raw)


GOOD = make().der


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4), st.binary(max_size=40))
def test_a_damaged_certificate_is_a_value_error_and_nothing_else(
    changes: list[tuple[int, int]], tail: bytes,
) -> None:
    raw = bytearray(GOOD + tail)
    for at, value in changes:
        raw[at] = value
    try:
        for certificate in pki.load_chain(bytes(raw)):
            assert pki.describe(certificate).fingerprint == pki.fingerprint(certificate)
    except ValueError:
        assert changes or tail  # the good one is read


def test_read_certificate_takes_der_and_pem_and_names_the_key_of_the_config(tmp_path: Path) -> None:
    made = make()
    file = tmp_path / "c"
    for encoding in (Encoding.DER, Encoding.PEM):
        file.write_bytes(made.certificate.public_bytes(encoding))
        assert pki.read_certificate(file, "k") == made.der
    file.write_bytes(b"no certificate")
    with pytest.raises(ConfigError, match=r"servers\.plant\.x.*no certificate"):
        pki.read_certificate(file, "servers.plant.x")
    assert isinstance(made.key, rsa.RSAPrivateKey)
