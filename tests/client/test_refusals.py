"""Logins that a server refuses: tried so seldom that no account is locked, at once when a person has done something.

The servers are real ones, whose users a test changes while they run and which count how often somebody tried.
"""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from asyncua import ua
from asyncua.server.user_managers import User, UserRole
from hypothesis import given, settings
from hypothesis import strategies as st
from running import until

from opcua_detector.client import LinkState, Session, pki, redundancy, refusals, session
from opcua_detector.client.refusals import MOST_TRIES, PAUSES_S, WINDOW_S, Refusals
from opcua_detector.client.trust import Folder, TrustList
from opcua_detector.config import ServerConfig
from opcua_detector.errors import ConfigError, LoginRefused

from .certificates import USER, Made, Users, make, secure_server

OLD, NEW = "correct-horse", "battery-staple"


# --- the pauses ---


class Clock:
    """Seconds that a test counts."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def tries(clock: Clock, one: Refusals, mark: bytes, until_s: float) -> list[float]:
    """Try as soon as it is allowed, again and again, and be refused each time; return when."""
    found = []
    while (at := clock.now + one.left_s(mark)) < until_s:
        clock.now = at
        found.append(at)
        one.refused(mark, "no")
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_tries_are_few_in_any_quarter_of_an_hour_and_quick_at_first(seed: int) -> None:
    clock = Clock()
    begin = clock.now
    found = tries(clock, Refusals(random.Random(seed), clock), b"a", begin + 24 * 3600.0)
    for k, at in enumerate(found):
        assert sum(at <= other < at + WINDOW_S for other in found) <= MOST_TRIES, k
    after = [at - begin for at in found]
    assert after[0] == 0.0 and 2.0 <= after[1] <= 3.0 and after[2] <= 40.0
    pauses = [b - a for a, b in pairwise(found)]
    assert max(pauses) < WINDOW_S and all(300.0 <= pause <= 360.0 for pause in pauses[4:])


def test_another_secret_is_tried_at_once_and_counts_beside_the_ones_before() -> None:
    clock = Clock()
    one = Refusals(random.Random(1), clock)
    found = tries(clock, one, b"a", clock.now + 40.0)
    assert len(found) == 3 and one.left_s(b"a") > 200.0 and one.left_s(b"b") == 0.0
    clock.now += 1.0
    one.refused(b"b", "no")  # the fourth of this quarter of an hour
    assert one.left_s(b"b") == pytest.approx(found[0] + WINDOW_S - clock.now) and one.in_a_row == 1
    assert one.left_s(b"a") == 0.0  # somebody has put the old one back
    one.taken()
    assert one.left_s(b"b") == 0.0 and one.in_a_row == 0
    one.refused(b"b", "no")
    assert PAUSES_S[0] <= one.left_s(b"b") <= PAUSES_S[0] * refusals.LONGER


def test_a_reload_is_one_try_at_once_and_nothing_is_forgotten() -> None:
    clock = Clock()
    one = Refusals(random.Random(1), clock)
    tries(clock, one, b"a", clock.now + 500.0)
    assert one.in_a_row == MOST_TRIES and one.left_s(b"a") > 300.0 and one.news
    one.forgive()
    assert one.left_s(b"a") == 0.0
    one.refused(b"a", "no")
    assert one.left_s(b"a") >= 300.0 and not one.news


# --- servers ---


class Accounts(Users):
    """One account whose password is changed while the server runs; counts the logins that it was asked about."""

    def __init__(self, password: str = OLD, *, anonymous: bool = True) -> None:
        super().__init__(anonymous=anonymous)
        self.password, self.tries, self.refused = password, 0, 0

    def get_user(
        self, iserver: Any, username: Any = None, password: Any = None, certificate: Any = None
    ) -> User | None:
        self.tries += 1
        if (self.anonymous if username is None else (username, password) == (USER, self.password)):
            return User(role=UserRole.User)
        self.refused += 1
        return None


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with this client's pair, which takes a while to make."""
    folder = tmp_path_factory.mktemp("own-pki")
    pki.own_certificate(folder)
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything but the last pause within tenths of a second."""
    monkeypatch.setattr(session, "LAST_DELAY_S", 0.1)
    monkeypatch.setattr(session, "FIRST_DELAY_S", 0.05)
    monkeypatch.setattr(session, "LOOK_S", 0.05)
    monkeypatch.setattr(session, "PROBE_S", 0.1)
    monkeypatch.setattr(refusals, "PAUSES_S", (0.1, 0.1, 1000.0))
    return


hurried = pytest.mark.usefixtures("quick")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A password file."""
    file = tmp_path / "password"
    file.touch(mode=0o600)
    file.write_text(OLD)
    return file


@asynccontextmanager
async def with_user(cache: Path, own: Path, folder: Path, secret: Path) -> AsyncIterator[tuple[Session, Accounts]]:
    """A server with an account, and a session that is logged in to it."""
    shown, accounts = make(), Accounts()
    async with secure_server(cache, shown, users=accounts) as server:
        one = to(own, folder, shown, server.url, user=USER, password_file=secret)
        async with opened(one):
            yield one, accounts


def to(own: Path, folder: Path, shown: Made, *urls: str, **login: Any) -> Session:
    """A session to servers whose certificate is trusted."""
    place = Path(shutil.copytree(own, folder / "pki"))
    TrustList(place).put(shown.certificate, Folder.TRUSTED)
    return Session(ServerConfig(name="plant", endpoint=urls[0], endpoints=urls[1:], pki=place, timeout="3 s", **login))


@asynccontextmanager
async def opened(one: Session) -> AsyncIterator[Session]:
    await one.open()
    try:
        yield one
    finally:
        await one.close()


async def lose(one: Session, accounts: Accounts, password: str) -> None:
    """Let the connection be lost and the server not take the login any more."""
    accounts.password, accounts.tries, accounts.refused = password, 0, 0
    one.fail("cut by the test")


async def held_back(one: Session, accounts: Accounts) -> None:
    """Wait until three tries were made, and see that there is no fourth although there is time for many."""
    await until(lambda: "the next try is at" in one.reason and "3 times" in one.reason, f"the pause; {one.reason}")
    attempts = one.counters["failed_attempts"]
    await asyncio.sleep(1.0)
    assert accounts.refused == accounts.tries == 3 == attempts and one.counters["failed_attempts"] == attempts
    assert one.state is LinkState.WAITING


@hurried
async def test_a_refused_password_is_held_back_until_it_is_another_one(
    cache: Path, own: Path, tmp_path: Path, secret: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    async with with_user(cache, own, tmp_path, secret) as (one, accounts):
        await lose(one, accounts, NEW)
        with caplog.at_level(logging.WARNING, "opcua_detector"):
            await held_back(one, accounts)
        told = [record.getMessage() for record in caplog.records if "the next try is at" in record.getMessage()]
        assert len(told) == 3 and "BadUserAccessDenied (3 times in a row)" in told[-1]
        assert OLD not in caplog.text and NEW not in caplog.text
        secret.write_text("a third one\n")  # wrong as well: one try, since four are what an account is good for
        await until(lambda: accounts.refused == 4, "the try with the other password")
        await asyncio.sleep(0.5)
        assert accounts.refused == 4
        secret.unlink()  # nothing can be sent, so nothing is refused
        await until(lambda: one.counters["failed_attempts"] >= 7, "attempts without a password")
        assert accounts.refused == 4
        secret.touch(mode=0o600)
        secret.write_text(NEW)
        await until(lambda: one.state is LinkState.CONNECTED, "the connection with the right password")
        assert accounts.refused == 4 and one.counters["reconnects"] == 1 and one.reason == ""
        # What was is forgotten: a short mistake of the server is mended soon.
        await lose(one, accounts, OLD)
        await until(lambda: accounts.refused >= 1, "the refusal")
        accounts.password = NEW
        await until(lambda: one.counters["reconnects"] == 2, "the connection")


@hurried
async def test_a_reload_tries_a_refused_login_again_at_once_and_once(
    cache: Path, own: Path, tmp_path: Path, secret: Path,
) -> None:
    async with with_user(cache, own, tmp_path, secret) as (one, accounts):
        await lose(one, accounts, NEW)
        await held_back(one, accounts)
        one.retry_now()
        await until(lambda: accounts.refused == 4, "the try")
        await asyncio.sleep(0.5)
        assert accounts.refused == 4 and one.state is LinkState.WAITING
        accounts.password = OLD  # the server has changed its mind
        one.retry_now()
        await until(lambda: one.state is LinkState.CONNECTED, "the connection")


@hurried
async def test_closing_does_not_wait_for_the_pause(cache: Path, own: Path, tmp_path: Path, secret: Path) -> None:
    shown, accounts = make(), Accounts()
    async with secure_server(cache, shown, users=accounts) as server:
        one = to(own, tmp_path, shown, server.url, user=USER, password_file=secret)
        async with opened(one):
            await lose(one, accounts, NEW)
            await held_back(one, accounts)
        assert one.state is LinkState.CLOSED and one.reason == ""
        with pytest.raises(LoginRefused, match="BadUserAccessDenied"):  # whoever opens it anew means it
            await one.open()
        assert accounts.refused == 4


@hurried
async def test_other_refusals_are_tried_again_as_quickly_as_ever(
    cache: Path, own: Path, tmp_path: Path, secret: Path,
) -> None:
    shown, accounts = make(), Accounts()
    async with secure_server(cache, shown, users=accounts) as server:
        anonymous = to(own, tmp_path, shown, server.url)  # there is no account to be locked
        async with opened(anonymous):
            accounts.anonymous = False
            await lose(anonymous, accounts, NEW)
            await until(lambda: accounts.refused >= 8, "tries without a user")
            assert "next try" not in anonymous.reason
            accounts.anonymous = True
            await until(lambda: anonymous.state is LinkState.CONNECTED, "the connection")
        named = to(own, tmp_path / "user", shown, server.url, user=USER, password_file=secret)
        accounts.password = OLD
        async with opened(named):
            listed = TrustList(tmp_path / "user" / "pki")
            listed.put(shown.certificate, Folder.TRUSTED).unlink()
            await lose(named, accounts, OLD)
            await until(lambda: named.counters["failed_attempts"] >= 8, "certificates that are not trusted")
            assert accounts.tries == 0  # nobody was shown a password
            listed.put(shown.certificate, Folder.TRUSTED)
            await until(lambda: named.state is LinkState.CONNECTED, "the connection")


@hurried
async def test_a_secret_that_is_not_there_any_more_is_told(
    cache: Path, own: Path, tmp_path: Path, secret: Path,
) -> None:
    shown, accounts = make(), Accounts()
    async with secure_server(cache, shown, users=accounts) as server:
        one = to(own, tmp_path, shown, server.url, user=USER, password_file=secret)
        secret.unlink()
        with pytest.raises(ConfigError, match="cannot be read"):
            await one.open()
        assert accounts.tries == 0
        await one.close()


@hurried
async def test_a_standby_that_refuses_the_login_is_not_tried_with_each_probe(
    cache: Path, own: Path, tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A degraded server is left for a better one, for which the others are asked with each probe."""
    monkeypatch.setattr(redundancy, "PATIENCE_S", 0.0)
    shown, first, second = make(), Accounts(), Accounts(NEW)
    async with secure_server(cache, shown, users=first) as active, secure_server(cache, shown, users=second) as standby:
        for server, level in ((active, 100), (standby, 255)):
            await server.write_attribute_value(ua.NodeId(ua.ObjectIds.Server_ServiceLevel),
                                               ua.DataValue(ua.Variant(level, ua.VariantType.Byte)))
        one = to(own, tmp_path, shown, active.url, standby.url, user=USER, password_file=secret)
        async with opened(one):
            assert one.endpoint == active.url
            await until(lambda: second.refused == 3, "the pause for the standby")
            await asyncio.sleep(1.0)
            assert second.refused == 3 and one.state is LinkState.CONNECTED and one.counters["lost"] == 0
            second.password = OLD
            one.retry_now()
            await until(lambda: one.endpoint == standby.url and one.state is LinkState.CONNECTED, "the better server")
