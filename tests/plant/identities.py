"""Faults of certificates and logins: a running service, and a server that comes back as somebody else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from client.certificates import NOW, PASSWORD, USER, Made, authority, make
from cryptography.hazmat.primitives.serialization import Encoding

from opcua_detector.client.trust import Folder, TrustList
from sim_server.server import APPLICATION_URI

from .faults import OUTAGE, Fault
from .rig import Rig, until
from .vendors import SecondVendor, Vendor, second_vendor, simulator

URIS = {"asyncua": APPLICATION_URI, "node-opcua": "urn:opcua-detector:second-vendor"}
LASTS_S = 15.0  # the certificate that expires while connected: enough to start server and service, and to score
VARIABLE = "PLANT_TESTS_PASSWORD"
# The faults, with what a user sees beside State, Quality and alarm.
SEEN = {
    "wrong server certificate": "the log says why it is refused, `doctor` what mends it",
    "wrong password": "the log says that the login is refused, never the password",
    "server certificate expires while connected": "told 30 days before and when it expires; the connection stays, the "
    "next one is refused until the certificate is renewed",
}


class Identities:
    """The certificates of a server, signed by a CA that the client trusts, and the client's `pki` folder.

    Trusting the CA, the client takes a renewed certificate without anybody's help.
    """

    def __init__(self, folder: Path, vendor: str) -> None:
        self.folder, self.vendor = folder, vendor
        self.ca = authority()
        self.pki = folder / "client-pki"
        TrustList(self.pki).put(self.ca.certificate, Folder.TRUSTED)

    def certificate(self, *, signed: bool = True, **changes: Any) -> Made:
        """A certificate of the server, as `client.certificates.Wanted` tells."""
        return make(self.ca if signed else None, **{"uris": (URIS[self.vendor],)} | changes)

    def shown(self, made: Made, password: str = PASSWORD) -> dict[str, Any]:
        """The settings of a server that shows this certificate and takes this password."""
        node = self.vendor == "node-opcua"
        name = f"{made.certificate.serial_number:x}"
        certificate, key = self.folder / f"{name}.{'pem' if node else 'der'}", self.folder / f"{name}.key.pem"
        certificate.write_bytes(made.certificate.public_bytes(Encoding.PEM if node else Encoding.DER))
        key.write_bytes(made.pem_key())
        users: Any = {USER: password} if node else [{"name": USER, "password": password}]
        more = {"pki": str(self.folder / "server-pki")} if node else {}
        return {"certificate": str(certificate), "private_key": str(key), "users": users, **more}

    @property
    def client(self) -> dict[str, Any]:
        """The keys of the server in the service's configuration; the password is in the environment."""
        return {"policy": "Basic256Sha256", "mode": "SignAndEncrypt", "insecure": False, "pki": str(self.pki),
                "user": USER, "password_env": VARIABLE}

    async def refused(self, rig: Rig, words: str, made: Made, password: str = PASSWORD) -> None:
        """Let the server come back as this, and wait until the service says why it does not connect."""
        await asyncio.to_thread(lambda: rig.vendor.restart(**self.shown(made, password)))
        await until(lambda: words in rig.session.reason, f"{words!r}, where the reason is {rig.session.reason!r}")

    async def right_again(self, rig: Rig) -> None:
        """Let the server come back with a good certificate and the right password."""
        await asyncio.to_thread(lambda: rig.vendor.restart(**self.shown(self.certificate())))
        rig.over()
        await rig.reconnected()

    # --- strikes ---

    async def wrong_certificates(self, rig: Rig) -> None:
        """Untrusted, expired, not yet valid, of another application, for another host; each refused for its reason."""
        await self.refused(rig, "not trusted", self.certificate(signed=False))
        await self.refused(rig, "expired on", self.certificate(days=(-20, -1)))
        await self.refused(rig, "names 'urn:another'", self.certificate(uris=("urn:another",)))
        await self.refused(rig, "but for plc-7", self.certificate(hosts=("plc-7",)))
        assert rig.grown("reconnects") == 0
        await self.right_again(rig)

    async def wrong_password(self, rig: Rig) -> None:
        await self.refused(rig, "BadUserAccessDenied", self.certificate(), "another password")
        assert rig.grown("reconnects") == 0 and PASSWORD not in rig.session.reason
        await self.right_again(rig)

    async def expires(self, rig: Rig) -> None:
        """Told in time, and the connection stays; the next one is refused until the certificate is renewed."""
        counters = rig.session.security.counters
        assert any("expires in 0 days" in one for one in rig.session.security.facts()["warnings"])
        await until(lambda: counters["certificates_expired"] == 1, "the warning")
        await rig.scoring(100)
        assert rig.grown("lost") == rig.grown("reconnects") == 0
        rig.proxy.reset()
        await until(lambda: "expired on" in rig.session.reason, "the refusal")
        await self.right_again(rig)

    def faults(self) -> list[Fault]:
        """The faults; each on a server that `secured` has started."""
        more = (*OUTAGE, "failed_attempts")
        changes = {"server": self.client}
        strikes = (self.wrong_certificates, self.wrong_password, self.expires)
        return [Fault(name, strike, more, changes=changes, seen=seen)
                for (name, seen), strike in zip(SEEN.items(), strikes, strict=True)]


@contextmanager
def secured(folder: Path, vendor: str, *, short: bool) -> Iterator[tuple[Identities, Vendor]]:
    """Run a server with a certificate of the CA; `short`: it expires in `LASTS_S`."""
    made = Identities(folder, vendor)
    days = (datetime.now(UTC) - NOW + timedelta(seconds=LASTS_S)) / timedelta(days=1) if short else 365.0
    settings = made.shown(made.certificate(days=(-1, days)))
    place = folder / "server"
    place.mkdir()
    begin = second_vendor if vendor == "node-opcua" else simulator
    with begin(place, **settings) as running:
        assert isinstance(running, SecondVendor) == (vendor == "node-opcua")
        yield made, running
