"""The command `cert`: this client's own certificate, and whom it trusts."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from ..client import Session, pki, secure, trust
from ..client.certificate_checks import Expected, host_of, offset_text, warnings_of
from ..client.trust import Folder, TrustList
from ..config import ServerConfig
from ..errors import AccessRefused, ConfigError
from .terminal import AsJson, chosen_server, err, out, print_json, show, table

SURE_DIGITS = 16  # hex digits of a fingerprint that stand for a look at it

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    help="Make and show this client's certificate; say which servers it trusts.",
    epilog="""\b
A secure connection needs two decisions: the server trusts this client, and this client trusts the server.

\b
  opcua-detector cert new --config plant.yaml
  opcua-detector cert export --config plant.yaml --out opcua-detector.der    (give it to the server)
  opcua-detector cert trust 192.0.2.10:4840 --config plant.yaml              (compare the fingerprint first)
  opcua-detector cert show --config plant.yaml
  opcua-detector cert untrust 1A2B3C4D --config plant.yaml

The folder `pki` beside the config holds own, trusted, issuers, crl and rejected. Private keys never leave it.
""",
)

Pki = Annotated[Path | None, typer.Option("--pki", metavar="FOLDER", help=(
    "The folder of certificates; default: that of --config, else pki."))]
ConfigOption = Annotated[Path | None, typer.Option("--config", metavar="CONFIG", help=(
    "Take the folder from the servers of this configuration."))]
ServerName = Annotated[str, typer.Option("--server", metavar="NAME", help=(
    "Which server of the configuration; default: the first."))]
Digits = Annotated[str, typer.Argument(metavar="FINGERPRINT", help=(
    "Beginning of its SHA-256 or SHA-1 fingerprint, at least 8 hex digits."))]


def _server(config_file: Path | None, name: str) -> ServerConfig | None:
    return None if config_file is None else chosen_server(config_file, name)


def _folder(folder: Path | None, config_file: Path | None, name: str) -> Path:
    server = _server(config_file, name)
    return folder or (server.pki if server else Path("pki"))


# --- own -----------------------------------------------------------------------------------------------------------


@app.command(short_help="Make this client's certificate.")
def new(
    folder: Pki = None,
    config_file: ConfigOption = None,
    server: ServerName = "",
    host: Annotated[list[str] | None, typer.Option("--host", metavar="NAME", help=(
        "Another name or address of this machine; repeatable."))] = None,
    days: Annotated[int, typer.Option(metavar="N", help="Validity.", min=1, max=20 * 366)] = pki.DAYS,
    bits: Annotated[int, typer.Option(metavar="N", help="RSA key: 2048, 3072 or 4096.")] = pki.KEY_BITS[0],
    uri: Annotated[str, typer.Option(metavar="URI", help=(
        "ApplicationUri; default: urn:<host>:opcua-detector."))] = "",
    replace: Annotated[bool, typer.Option("--replace", help=(
        "Move the present pair aside and make a new one; every server must trust it anew."))] = False,
    as_json: AsJson = False,
) -> None:
    """Make this client's key and certificate, once: it is kept over restarts, so that servers trust it once.

    The first secure connection makes one too, where there is none; this command chooses names, validity and key.
    """
    place = _folder(folder, config_file, server)
    if bits not in pki.KEY_BITS:
        raise ConfigError("wrong value", key="--bits", value=bits, expected=", ".join(map(str, pki.KEY_BITS)),
                          next_step="correct the option")
    kept = pki.certificate_file(place)
    if kept.exists() and not replace:
        raise ConfigError("there is a certificate already; servers trust it", key="--pki", value=str(kept),
                          next_step="use it (cert export), or add --replace if it must go")
    aside = pki.retire_pair(place) if replace else []
    file = pki.make_pair(place, hosts=host or (), days=days, bits=bits, uri=uri)
    pki.own_certificate(place)
    about = pki.describe(x509.load_der_x509_certificate(file.read_bytes()))
    if as_json:
        print_json({"certificate": str(file), "key": str(pki.key_file(place)), "replaced": aside,
                    **_facts(about)})
        return
    _print_described(about)
    out.print(f"certificate  {file}\nprivate key  {pki.key_file(place)} (mode 0600; never give it away)", markup=False)
    for one in aside:
        err.print(f"moved aside: {one}", markup=False)
    err.print("next: let each server trust this certificate (cert export makes a copy to carry there)", markup=False)


@app.command(short_help="Write a certificate to a file, to carry it elsewhere.")
def export(
    fingerprint: Annotated[str, typer.Argument(metavar="[FINGERPRINT]", help=(
        "A certificate of the trust list; default: this client's own."))] = "",
    target: Annotated[Path | None, typer.Option("--out", metavar="FILE", help=(
        "Where to write it; default: its name in this folder."))] = None,
    pem: Annotated[bool, typer.Option("--pem", help="Write PEM instead of DER.")] = False,
    folder: Pki = None,
    config_file: ConfigOption = None,
    server: ServerName = "",
    as_json: AsJson = False,
) -> None:
    """Write this client's certificate, or one of the trust list, to a file: DER, or PEM. Never a private key."""
    place = _folder(folder, config_file, server)
    source = _one(TrustList(place), fingerprint).file if fingerprint else pki.own_certificate(place).certificate
    certificate = pki.load_certificate(source.read_bytes())
    raw = certificate.public_bytes(Encoding.PEM if pem else Encoding.DER)
    file = target or Path(source.name).with_suffix(".pem" if pem else ".der")
    if file.exists() and file.read_bytes() != raw:
        raise ConfigError("there is another file of this name", key="--out", value=str(file),
                          next_step="choose another name, or remove it")
    file.write_bytes(raw)
    about = pki.describe(certificate)
    if as_json:
        print_json({"file": str(file), **_facts(about)})
        return
    _print_described(about)
    err.print(f"written: {file}", markup=False)


# --- trust ---------------------------------------------------------------------------------------------------------


@app.command("show", short_help="Show own and trusted certificates with their fingerprints.")
def show_all(
    fingerprint: Annotated[str, typer.Argument(metavar="[FINGERPRINT]", help="Only this one, with all it says.")] = "",
    folder: Pki = None,
    config_file: ConfigOption = None,
    server: ServerName = "",
    as_json: AsJson = False,
) -> None:
    """Show this client's certificate, whom it trusts, and what was rejected. Changes nothing."""
    place = _folder(folder, config_file, server)
    listed = TrustList(place)
    own = pki.certificate_file(place)
    found: list[tuple[str, Path, pki.Described | None]] = []
    if own.exists():
        try:
            found.append(("own", own, pki.describe(pki.load_certificate(own.read_bytes()))))
        except ValueError:
            found.append(("own", own, None))
    found += [(one.folder.value, one.file, one.about) for one in listed.entries()]
    if fingerprint:
        wanted = re.sub(r"[\s:]", "", fingerprint).lower()
        found = [one for one in found if one[2] is not None and len(wanted) >= trust.FEW_DIGITS
                 and (one[2].fingerprint.startswith(wanted) or one[2].thumbprint.startswith(wanted))]
        if not found:
            raise _unknown(fingerprint, place)
    if as_json:
        print_json({"pki": str(place), "certificates": [
            {"folder": kind, "file": str(file), **(_facts(about) if about else {"error": "cannot be read"})}
            for kind, file, about in found]})
        return
    if fingerprint:
        for kind, file, about in found:
            assert about is not None
            _print_described(about)
            out.print(f"{kind:12} {file}", markup=False)
        return
    show(table("", ("folder", "name", "SHA-256 fingerprint", "ApplicationUri", "valid until", "note"), [
        (kind, about.name, pki.spaced(about.fingerprint[:16]), about.application_uri or "-",
         f"{about.not_after:%Y-%m-%d}", _note(about)) if about
        else (kind, file.name, "-", "-", "-", "cannot be read: trusts nobody") for kind, file, about in found]))
    if not own.exists():
        err.print(f"no certificate of this client in {place}: 'opcua-detector cert new' makes one", markup=False)


@app.command("trust", short_help="Trust a server's certificate or a CA.")
def trust_one(
    target: Annotated[str, typer.Argument(metavar="FILE|HOST:PORT|FINGERPRINT", help=(
        "A certificate or revocation list (DER or PEM), a server that is asked for its certificate, or one that was "
        "rejected."))],
    fingerprint: Annotated[str, typer.Option("--fingerprint", metavar="HEX", help=(
        f"Trust it only if its fingerprint begins so (at least {SURE_DIGITS} digits); asks no question."))] = "",
    issuer: Annotated[bool, typer.Option("--issuer", help=(
        "A CA that completes chains, without trusting all it signs."))] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask no question: the fingerprint was compared.")] = False,
    folder: Pki = None,
    config_file: ConfigOption = None,
    server: ServerName = "",
    as_json: AsJson = False,
) -> None:
    """Trust a certificate: it is shown first, and trusted when you say that its fingerprint is the right one.

    Compare it with what the server itself shows (its configuration tool, or its own certificate file): whoever stands
    between could show another one. A CA in the trust list makes every certificate that it signs trusted.
    """
    chosen = _server(config_file, server)
    place = folder or (chosen.pki if chosen else Path("pki"))
    listed = TrustList(place)
    certificate, notes = _target(target, listed, chosen, fingerprint)
    if isinstance(certificate, x509.CertificateRevocationList):
        file = listed.put_crl(certificate)
        if as_json:
            print_json({"crl": str(file), "issuer": certificate.issuer.rfc4514_string()})
        else:
            err.print(f"revocation list in force: {file}", markup=False)
        return
    about = pki.describe(certificate)
    where = Folder.ISSUERS if issuer else Folder.TRUSTED
    if issuer and not about.authority:
        raise ConfigError("this certificate is not of a CA", key="--issuer", value=about.name,
                          next_step="trust it without --issuer")
    already = any(one.folder is where for one in listed.find(about.fingerprint))
    if not as_json:
        _print_described(about)
        if about.authority and not issuer:
            out.print("note: this is a CA: every certificate that it signs will be trusted", style="yellow")
        for text in notes:
            out.print(f"note: {text}", style="yellow", markup=False)
    if not already:
        _ask(about, fingerprint, yes, as_json)
    file = listed.put(certificate, where)
    if as_json:
        print_json({"file": str(file), "already": already, "notes": notes, **_facts(about)})
    else:
        err.print(f"{'was trusted already' if already else 'trusted'}: {file}", markup=False)


@app.command(short_help="Trust a certificate no longer.")
def untrust(fingerprint: Digits, folder: Pki = None, config_file: ConfigOption = None, server: ServerName = "",
            as_json: AsJson = False) -> None:
    """Trust a certificate no longer: it moves to `rejected`. Open connections to its server end within minutes."""
    listed = TrustList(_folder(folder, config_file, server))
    entry = _one(listed, fingerprint, Folder.TRUSTED, Folder.ISSUERS)
    assert entry.about is not None
    file = listed.put(pki.load_certificate(entry.file.read_bytes()), Folder.REJECTED)
    if as_json:
        print_json({"file": str(file), **_facts(entry.about)})
    else:
        _print_described(entry.about)
        err.print(f"not trusted any more: {file}", markup=False)


# --- parts ---------------------------------------------------------------------------------------------------------


def _target(target: str, listed: TrustList, chosen: ServerConfig | None,
            fingerprint: str) -> tuple[x509.Certificate | x509.CertificateRevocationList, list[str]]:
    """Return what a target of `trust` means, and what else there is to say of it."""
    if Path(target).is_file():
        return trust.read_any(Path(target)), []
    if chosen is not None and target == chosen.name:
        return _shown_by(chosen.endpoint, chosen, fingerprint)
    if "://" in target or re.fullmatch(r"[^/\\\s]+:\d+", target):
        return _shown_by(target if "://" in target else f"opc.tcp://{target}/", chosen, fingerprint)
    entry = _one(listed, target)
    return pki.load_certificate(entry.file.read_bytes()), []


def _shown_by(endpoint: str, chosen: ServerConfig | None, fingerprint: str) -> tuple[x509.Certificate, list[str]]:
    """Ask a server for its certificate; nothing is trusted by that, since anybody may answer."""
    try:
        asked = ServerConfig(name="server", endpoint=endpoint, policy="None", insecure=True)
    except ValueError as error:
        raise ConfigError("this is no endpoint", value=endpoint, expected="such as opc.tcp://192.0.2.10:4840/",
                          next_step="correct it") from error
    found = asyncio.run(Session(asked).discover())
    shown: dict[str, tuple[x509.Certificate, Any]] = {}
    for one in found.endpoints:
        try:
            leaf = pki.load_chain(bytes(one.ServerCertificate or b""))[0]
        except ValueError:
            continue
        shown.setdefault(pki.fingerprint(leaf), (leaf, one))
    if not shown:
        raise AccessRefused("the server shows no certificate", where=endpoint,
                            next_step=f"it offers: {secure.offer_text(found.endpoints)}; switch its security on")
    fits = [value for digits, value in shown.items() if not fingerprint or _same(digits, value[0], fingerprint)]
    if not fits:
        raise AccessRefused(
            f"the server shows another certificate (SHA-256 {pki.spaced(next(iter(shown)))})", where=endpoint,
            next_step="find out which one is right before you trust it")
    if len(fits) > 1:
        raise ConfigError("the server shows several certificates", key="--fingerprint",
                          expected=" or ".join(digits[:SURE_DIGITS] for digits in shown), next_step="choose one")
    leaf, described = fits[0]
    host = (chosen.expected_host if chosen is not None and endpoint == chosen.endpoint else "") or host_of(endpoint)
    problems = TrustList(Path("nowhere")).inspect([leaf], Expected(
        described.Server.ApplicationUri or "", host, found.clock_offset_s, leaf.public_bytes(Encoding.DER),
        server=chosen.name if chosen else ""))
    notes = [f"it will still be refused: {one.what}; {one.next_step}" for one in problems]
    clock = offset_text(found.clock_offset_s)
    return leaf, [*notes, clock] if clock else notes


def _same(digits: str, certificate: x509.Certificate, wanted: str) -> bool:
    given = re.sub(r"[\s:]", "", wanted).lower()
    return len(given) >= SURE_DIGITS and (digits.startswith(given)
                                          or pki.describe(certificate).thumbprint.startswith(given))


def _ask(about: pki.Described, fingerprint: str, yes: bool, as_json: bool) -> None:
    """Let a person compare the fingerprint; a script must say that somebody did."""
    if fingerprint:
        given = re.sub(r"[\s:]", "", fingerprint).lower()
        if len(given) >= SURE_DIGITS and (about.fingerprint.startswith(given) or about.thumbprint.startswith(given)):
            return
        raise AccessRefused("the fingerprint is another one", where=f"SHA-256 {pki.spaced(about.fingerprint)}",
                            next_step=f"give at least {SURE_DIGITS} digits of the right one, or do not trust it")
    if yes:
        return
    if as_json or not sys.stdin.isatty():
        raise ConfigError("nobody has compared the fingerprint", key="--fingerprint",
                          next_step=f"compare it, then add --fingerprint {about.fingerprint[:SURE_DIGITS]} or --yes")
    if not typer.confirm("Is this the fingerprint that the server itself shows?", err=True):
        raise typer.Abort


def _one(listed: TrustList, digits: str, *folders: Folder) -> trust.Entry:
    found = listed.find(digits, *folders)
    if not found:
        raise _unknown(digits, listed.folder)
    if len({one.about.fingerprint for one in found if one.about}) > 1:
        raise ConfigError("several certificates begin so", value=digits, next_step="give more digits")
    return found[0]


def _unknown(digits: str, place: Path) -> ConfigError:
    return ConfigError("there is no such certificate, file or server", value=digits,
                       expected="a file, HOST:PORT, or at least 8 digits of a fingerprint",
                       next_step=f"see: opcua-detector cert show --pki {place}")


def _note(about: pki.Described) -> str:
    told = warnings_of(about.not_after, now=datetime.now(UTC), whose="the")
    state = "expired" if about.not_after < datetime.now(UTC) else told[0].removeprefix("the certificate ") \
        if told else ""
    return ", ".join(text for text in ("CA" if about.authority else "", state) if text)


def _facts(about: pki.Described) -> dict[str, Any]:
    return {
        "name": about.name, "subject": about.subject, "issuer": about.issuer, "fingerprint": about.fingerprint,
        "thumbprint": about.thumbprint, "application_uri": about.application_uri, "hosts": about.hosts,
        "not_before": about.not_before.isoformat(), "not_after": about.not_after.isoformat(),
        "key_bits": about.key_bits, "self_signed": about.self_signed, "authority": about.authority,
    }


def _print_described(about: pki.Described) -> None:
    rows: Sequence[tuple[str, str]] = (
        ("name", about.name), ("subject", about.subject),
        ("issuer", "itself" if about.self_signed else about.issuer),
        ("uri", about.application_uri or "-"), ("hosts", ", ".join(about.hosts) or "-"),
        ("valid", f"{about.not_before:%Y-%m-%d} to {about.not_after:%Y-%m-%d}"),
        ("key", f"RSA {about.key_bits}, signed with {about.signed_with}" if about.key_bits else "no RSA key"),
        ("SHA-256", pki.spaced(about.fingerprint)), ("SHA-1", pki.spaced(about.thumbprint)),
    )
    for key, value in rows:
        out.print(f"{key:12} {value}", markup=False)
