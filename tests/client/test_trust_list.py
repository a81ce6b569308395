"""The trust list judges certificates by themselves: no server is needed to know who is refused, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from opcua_detector.client import pki, trust
from opcua_detector.client.certificate_checks import Cause, Expected
from opcua_detector.client.trust import Folder, TrustList
from opcua_detector.errors import AccessRefused, ConfigError

from .certificates import NOW, SHA1, URI, Made, authority, crl, make

HERE = Expected(application_uri=URI, host="127.0.0.1", server="plant")


@pytest.fixture
def listed(tmp_path: Path) -> TrustList:
    return TrustList(tmp_path / "pki")


def causes(listed: TrustList, *chain: Made, expected: Expected = HERE, **more: Any) -> list[Cause]:
    return [one.cause for one in listed.inspect([one.certificate for one in chain], expected, **more)]


def put(listed: TrustList, folder: Folder, *some: Made) -> None:
    for one in some:
        listed.put(one.certificate, folder)


# --- who is trusted ---


def test_a_self_signed_certificate_is_accepted_when_it_is_listed_and_only_then(listed: TrustList) -> None:
    server = make()
    assert causes(listed, server) == [Cause.UNTRUSTED]
    put(listed, Folder.REJECTED, server)
    put(listed, Folder.ISSUERS, make(name="another"))
    assert causes(listed, server) == [Cause.UNTRUSTED]
    put(listed, Folder.TRUSTED, server)
    assert causes(listed, server) == []
    # another certificate of the same name and key is another certificate
    assert causes(listed, make(days=(-2, 300))) == [Cause.UNTRUSTED]


def test_a_certificate_of_a_listed_ca_is_accepted_with_any_way_up_to_it(listed: TrustList) -> None:
    root = authority()
    line = authority(root, name="line CA", path_length=0)
    direct, below = make(root), make(line, name="below")
    assert causes(listed, direct) == [Cause.CHAIN]
    assert causes(listed, direct, root) == [Cause.UNTRUSTED]  # that the server sends its CA makes it no more trusted
    put(listed, Folder.ISSUERS, root)
    assert causes(listed, direct) == [Cause.UNTRUSTED]  # a CA that completes chains is not trusted by itself
    put(listed, Folder.TRUSTED, root)
    assert causes(listed, direct) == []
    assert causes(listed, below) == [Cause.CHAIN]
    assert causes(listed, below, line) == []
    assert causes(listed, below, line, root) == []
    put(listed, Folder.ISSUERS, line)
    assert causes(listed, below) == []


def test_a_listed_ca_in_the_middle_is_enough(listed: TrustList) -> None:
    line = authority(authority(), name="line CA")
    put(listed, Folder.TRUSTED, line)
    assert causes(listed, make(line)) == []


def test_a_listed_certificate_needs_no_chain(listed: TrustList) -> None:
    server = make(authority())
    put(listed, Folder.TRUSTED, server)
    assert causes(listed, server) == []


@pytest.mark.parametrize(("what", "changes"), [
    ("no CA by its basicConstraints", {"ca": False}),
    ("no basicConstraints at all", {"ca": None}),
    ("no keyCertSign", {"sign_others": False}),
    ("expired", {"days": (-20, -1)}),
    ("not yet valid", {"days": (1, 20)}),
    ("a weak key", {"bits": 1024, "name": "weak CA"}),
    ("name constraints, which are not looked at", {"more": [
        (x509.NameConstraints(permitted_subtrees=[x509.DNSName("plant")], excluded_subtrees=None), True)]}),
])
def test_a_ca_that_may_not_sign_makes_nobody_trusted(listed: TrustList, what: str, changes: dict[str, Any]) -> None:
    ca = authority(**changes)
    put(listed, Folder.TRUSTED, ca)
    assert causes(listed, make(ca, name="leaf")) in ([Cause.UNTRUSTED], [Cause.CHAIN]), what


def test_a_ca_stands_no_higher_than_its_path_length_allows(listed: TrustList) -> None:
    root = authority(path_length=0)
    line = authority(root, name="line CA")
    put(listed, Folder.TRUSTED, root)
    assert causes(listed, make(root, name="leaf")) == []
    assert causes(listed, make(line, name="leaf"), line) == [Cause.UNTRUSTED]


def test_a_forged_ca_of_the_same_name_makes_nobody_trusted(listed: TrustList) -> None:
    right = authority()
    put(listed, Folder.TRUSTED, right)
    forger = authority(name="forger")
    forged = Made(right.certificate, forger.key)  # the listed certificate's name, the forger's signature
    assert causes(listed, make(forged, name="leaf")) == [Cause.CHAIN]


def test_the_certificate_of_an_application_signs_for_nobody_though_it_says_ca(listed: TrustList) -> None:
    """Many servers' own self-signed certificates are marked as a CA; to trust one server must not trust others."""
    plc = make(name="plc", ca=True, sign_others=True)
    put(listed, Folder.TRUSTED, plc)
    assert causes(listed, plc) == []
    assert causes(listed, make(plc, name="leaf")) == [Cause.CHAIN]


def test_cas_that_sign_each_other_in_circles_cost_no_minutes(
    listed: TrustList, monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = 0
    verify = trust.signed

    def counted(below: x509.Certificate, ca: x509.Certificate) -> bool:
        nonlocal asked
        asked += 1
        return verify(below, ca)

    monkeypatch.setattr(trust, "signed", counted)
    ring = [authority(name=f"ring {i}") for i in range(2)]
    crossed = [authority(Made(ring[i % 2].certificate, ring[i % 2].key), name=f"ring {(i + 1) % 2}", days=(-1, 50 + i))
               for i in range(9)]
    assert causes(listed, make(ring[0], name="leaf"), *crossed)[0] in (Cause.UNTRUSTED, Cause.CHAIN)
    assert 9 < asked < 150  # every order of them would be some ten thousand


# --- revocation ---


def test_a_revoked_certificate_is_refused_whether_its_ca_or_itself_is_listed(listed: TrustList) -> None:
    root = authority()
    line = authority(root, name="line CA")
    leaf, healthy = make(line, name="leaf"), make(line, name="healthy")
    put(listed, Folder.TRUSTED, root)
    put(listed, Folder.ISSUERS, line)
    listed.put_crl(crl(line, leaf))
    assert causes(listed, leaf) == [Cause.REVOKED]
    assert causes(listed, healthy) == []
    put(listed, Folder.TRUSTED, leaf)
    assert causes(listed, leaf) == [Cause.REVOKED]
    listed.put_crl(crl(root, line))
    assert causes(listed, healthy) == [Cause.REVOKED]  # with its CA


def test_an_outdated_list_still_revokes_and_is_not_enough_where_a_current_one_is_required(listed: TrustList) -> None:
    root = authority()
    leaf, healthy = make(root, name="leaf"), make(root, name="healthy")
    put(listed, Folder.TRUSTED, root)
    required = replace(HERE, require_crl=True)
    assert causes(listed, healthy) == []
    assert causes(listed, healthy, expected=required) == [Cause.REVOCATION_UNKNOWN]
    listed.put_crl(crl(root, leaf, days=(-20, -10)))
    assert causes(listed, leaf) == [Cause.REVOKED]
    assert causes(listed, healthy) == []
    assert causes(listed, healthy, expected=required) == [Cause.REVOCATION_UNKNOWN]
    listed.put_crl(crl(root, leaf))
    assert causes(listed, healthy, expected=required) == []
    # a self-signed certificate is nobody's to revoke
    server = make()
    put(listed, Folder.TRUSTED, server)
    assert causes(listed, server, expected=required) == []
    # a listed one whose CA is unknown is
    orphan = make(authority(name="unknown CA"), name="orphan")
    put(listed, Folder.TRUSTED, orphan)
    assert causes(listed, orphan, expected=required) == [Cause.REVOCATION_UNKNOWN]


def test_only_a_known_ca_brings_a_list_in_force_and_an_old_one_replaces_no_newer(listed: TrustList) -> None:
    root = authority()
    put(listed, Folder.TRUSTED, root)
    forged = Made(root.certificate, authority(name="forger").key)
    with pytest.raises(AccessRefused, match="no CA of the trust list has signed"):
        listed.put_crl(crl(forged))
    listed.put_crl(crl(root))
    with pytest.raises(AccessRefused, match="newer"):
        listed.put_crl(crl(root, days=(-9, 30)))
    # laid there by hand, a forged list says nothing
    (listed.folder / "crl" / "forged.crl").write_bytes(crl(forged, make(root)).public_bytes(Encoding.DER))
    assert causes(listed, make(root)) == []


# --- what it says ---


@pytest.mark.parametrize(("changes", "cause", "text", "step"), [
    ({"days": (-30, -2)}, Cause.EXPIRED, "expired on 20", "renew"),
    ({"days": (2, 30)}, Cause.NOT_YET, "not valid before 20", "clocks"),
    ({"uris": ("urn:another",)}, Cause.URI, "its certificate names 'urn:another'", "ApplicationUri"),
    ({"uris": ()}, Cause.URI, "no ApplicationUri", "ApplicationUri"),
    ({"hosts": ("plc-7", "192.0.2.7")}, Cause.HOST, "but for plc-7, 192.0.2.7", "servers.plant.expected_host"),
    ({"hosts": ()}, Cause.HOST, "but for none", "expected_host"),
    ({"bits": 1024, "name": "weak"}, Cause.WEAK, "RSA key of 1024 bits", "RSA 2048"),
    ({"extended": (ExtendedKeyUsageOID.CLIENT_AUTH,)}, Cause.USE, "lacks serverAuth", "application instance"),
    ({"more": [(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\5\0"), True)]}, Cause.USE,
     "1.2.3.4", "application instance"),
])
def test_each_fault_of_a_trusted_certificate_is_named_with_its_next_step(
    listed: TrustList, changes: dict[str, Any], cause: Cause, text: str, step: str,
) -> None:
    server = make(**changes)
    put(listed, Folder.TRUSTED, server)
    problems = listed.inspect([server.certificate], HERE)
    assert [one.cause for one in problems] == [cause]
    assert text in problems[0].what and step in problems[0].next_step


def test_a_signature_with_sha1_is_too_weak(listed: TrustList) -> None:
    old = pki.load_certificate(SHA1)
    listed.put(old, Folder.TRUSTED)
    (problem,) = listed.inspect([old], HERE, now=datetime(2050, 1, 1, tzinfo=UTC))
    assert problem.cause is Cause.WEAK and "signed with sha1" in problem.what and "SHA-256" in problem.next_step


@pytest.mark.parametrize(("offset_s", "told"), [
    (None, ""), (0.4, ""), (-3.0, ""), (-7200.0, "2 h behind ours"), (90.0, "1.5 min ahead of ours"),
    (-3.2e8, "d behind ours"),
])
def test_a_wrong_time_tells_how_far_the_clocks_are_apart(
    listed: TrustList, offset_s: float | None, told: str,
) -> None:
    server = make(days=(-30, -2))
    put(listed, Folder.TRUSTED, server)
    (problem,) = listed.inspect([server.certificate], replace(HERE, clock_offset_s=offset_s))
    assert ("clock" in problem.what) == bool(told) and told in problem.what
    # and it is our clock that counts
    assert causes(listed, server, now=NOW - timedelta(days=10)) == []


@pytest.mark.parametrize(("host", "names", "same"), [
    ("127.0.0.1", ("127.0.0.1",), True), ("plc-7", ("PLC-7",), True), ("plc-7.", ("plc-7",), True),
    ("192.0.2.7", ("dns:192.0.2.7",), True), ("::1", ("0:0:0:0:0:0:0:1",), True),
    ("plc-7", ("plc-70",), False), ("plc-7.plant", ("plc-7",), False), ("a.plant", ("*.plant",), False),
    ("192.0.2.7", ("192.0.2.70",), False), ("localhost", ("127.0.0.1",), False),
])
def test_hosts_are_compared_whole(listed: TrustList, host: str, names: Sequence[str], same: bool) -> None:
    server = make(hosts=names)
    put(listed, Folder.TRUSTED, server)
    assert causes(listed, server, expected=replace(HERE, host=host)) == ([] if same else [Cause.HOST])


def test_everything_that_is_wrong_is_told_at_once(listed: TrustList) -> None:
    server = make(hosts=(), uris=(), days=(-9, -1), bits=1024, name="weak")
    assert causes(listed, server) == [Cause.UNTRUSTED, Cause.EXPIRED, Cause.WEAK, Cause.URI, Cause.HOST]


def test_a_pinned_certificate_is_a_trust_list_of_one(listed: TrustList) -> None:
    server, other = make(), make(name="other")
    put(listed, Folder.TRUSTED, other)
    pinned = replace(HERE, pinned=server.der)
    assert causes(listed, server, expected=pinned) == []
    assert causes(listed, other, expected=pinned) == [Cause.UNTRUSTED]
    late = make(days=(-9, -1))
    assert causes(listed, late, expected=replace(HERE, pinned=late.der)) == [Cause.EXPIRED]


# --- the folders ---


def test_a_refused_certificate_is_kept_and_the_error_tells_the_command_that_trusts_it(listed: TrustList) -> None:
    server = make()
    with pytest.raises(AccessRefused) as caught:
        listed.check([server.certificate], HERE, where="server plant")
    (entry,) = listed.entries(Folder.REJECTED)
    digits = pki.fingerprint(server.certificate)
    assert entry.about is not None and entry.about.fingerprint == digits
    assert f"opcua-detector cert trust {digits[:16]} --pki {listed.folder}" in caught.value.next_step
    assert pki.spaced(digits) in caught.value.what and "[BadCertificateUntrusted]" in caught.value.what
    (found,) = listed.find(digits[:16], Folder.REJECTED)
    listed.put(pki.load_certificate(found.file.read_bytes()), Folder.TRUSTED)
    listed.check([server.certificate], HERE, where="server plant")
    assert listed.entries(Folder.REJECTED) == []


def test_rejected_certificates_do_not_fill_the_disk(listed: TrustList) -> None:
    for i in range(trust.KEEP_REJECTED + 7):
        file = listed.reject(make(days=(-1, 10 + i)).certificate)
        assert file is not None and file.exists()
    assert len(listed.entries(Folder.REJECTED)) == trust.KEEP_REJECTED
    again = make(name="again").certificate
    assert listed.reject(again) == listed.reject(again)  # the same one takes no second place


def test_find_takes_both_fingerprints_with_any_spacing_and_no_short_beginning(listed: TrustList) -> None:
    server = make()
    put(listed, Folder.TRUSTED, server)
    about = pki.describe(server.certificate)
    for digits in (about.fingerprint, about.thumbprint, pki.spaced(about.fingerprint[:12]), about.thumbprint[:8],
                   ":".join(about.thumbprint[i : i + 2] for i in range(0, 40, 2)).upper()):
        assert [one.about for one in listed.find(digits)] == [about], digits
    for digits in ("", about.fingerprint[:7], "f" * 64, "not hex!", "*"):
        assert listed.find(digits) == []


def test_a_damaged_file_trusts_nobody_and_harms_nobody(listed: TrustList) -> None:
    server, pem = make(), make(name="pem")
    put(listed, Folder.TRUSTED, server)
    folder = listed.folder / "trusted"
    (folder / "damaged.der").write_bytes(server.der[:-9])
    (folder / "notes.txt").write_text("ask the plant")
    (folder / "huge.der").write_bytes(bytes(trust._FILE_BYTES + 1))
    (folder / "as-pem.pem").write_bytes(pem.certificate.public_bytes(Encoding.PEM))
    assert causes(listed, server) == [] and causes(listed, pem) == []
    assert sorted(one.file.name for one in listed.entries() if one.about is None) == [
        "damaged.der", "huge.der", "notes.txt"]


def test_a_name_cannot_reach_the_terminal_or_leave_the_folder(listed: TrustList) -> None:
    hostile = make(name="../../\x1b[2J\nevil", hosts=("127.0.0.1",))
    with pytest.raises(AccessRefused) as caught:
        listed.check([hostile.certificate], HERE, where="x")
    assert "\x1b" not in str(caught.value) and "\nevil" not in str(caught.value)
    (entry,) = listed.entries()
    assert entry.file.parent == listed.folder / "rejected"


def test_read_any_knows_certificates_and_lists_from_everything_else(tmp_path: Path) -> None:
    root = authority()
    file = tmp_path / "file"
    for encoding in (Encoding.DER, Encoding.PEM):
        file.write_bytes(root.certificate.public_bytes(encoding))
        assert trust.read_any(file) == root.certificate
        file.write_bytes(crl(root).public_bytes(encoding))
        assert isinstance(trust.read_any(file), x509.CertificateRevocationList)
    file.write_bytes(root.pem_key())
    with pytest.raises(ConfigError, match="neither a certificate nor"):
        trust.read_any(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        trust.read_any(tmp_path / "nowhere")
