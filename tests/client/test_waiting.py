"""What ends must end: cancellations that arrive together with a result, servers and tasks that do not answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from asyncua import ua

from opcua_detector.client import LinkState, Session, session, waiting
from opcua_detector.client.waiting import end_tasks, farewell, within

from .conftest import WAIT_S, OddServer, server_config


async def test_a_cancellation_in_the_turn_of_the_result_is_not_lost() -> None:
    result: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    went_on = False

    async def ask() -> None:
        nonlocal went_on
        await within(result, 60)
        went_on = True

    task = asyncio.create_task(ask())
    await asyncio.sleep(0)
    result.set_result(1)
    task.cancel()  # on Python 3.11 asyncio.wait_for forgets it here
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not went_on


async def test_a_request_that_swallows_the_cancellation_does_not_hide_it() -> None:
    async def deaf() -> int:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return 1

    task = asyncio.create_task(within(deaf(), 60))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_time_out_and_a_request_that_was_given_up_are_errors_not_cancellations() -> None:
    loop = asyncio.get_running_loop()
    with pytest.raises(TimeoutError):
        await within(loop.create_future(), 0.01)
    given_up = loop.create_future()
    loop.call_soon(given_up.cancel)
    with pytest.raises(ConnectionError):
        await within(given_up, 60)


class Deaf:
    """A task that swallows so many cancellations; all of them until it is told to end."""

    def __init__(self, times: float = float("inf")) -> None:
        self.times = times
        self.task = asyncio.create_task(self._run(), name="deaf")

    async def _run(self) -> None:
        while self.times > 0:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                self.times -= 1

    async def end(self) -> None:
        self.times = 0
        self.task.cancel()
        await asyncio.wait({self.task}, timeout=WAIT_S)
        assert self.task.done()


async def test_tasks_are_cancelled_until_they_end_or_are_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "_AGAIN_S", 0.01)
    tasks = [Deaf(n).task for n in (1, 3)]
    await asyncio.sleep(0)
    assert await end_tasks((*tasks, None), 5.0)
    deaf = Deaf()
    await asyncio.sleep(0)
    started = time.monotonic()
    assert not await end_tasks([deaf.task], 0.1)
    assert time.monotonic() - started < 2 and "do not end: deaf" in caplog.text
    await deaf.end()


async def test_who_ends_tasks_can_be_cancelled() -> None:
    deaf = Deaf()
    ending = asyncio.create_task(end_tasks([deaf.task], 3600))
    await asyncio.sleep(0.01)
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(ending, WAIT_S)
    await deaf.end()


async def test_a_farewell_takes_no_longer_than_allowed_and_its_error_is_of_no_interest() -> None:
    async def fails() -> None:
        raise OSError("gone")

    started = time.monotonic()
    await farewell(asyncio.sleep(60), 0.05)
    await farewell(fails(), 60)
    assert time.monotonic() - started < 5


# --- sessions ---


@pytest_asyncio.fixture
async def link(odd: OddServer) -> AsyncIterator[Session]:
    one = Session(server_config(odd.endpoint, timeout="1 s"))
    await one.open()
    yield one
    await asyncio.wait_for(one.close(), WAIT_S)


async def test_closing_in_the_turn_in_which_the_probe_is_answered_ends(
    odd: OddServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "PROBE_S", 0.0)
    one = Session(server_config(odd.endpoint))
    await one.open()
    answer: asyncio.Future[list[ua.DataValue]] = asyncio.get_running_loop().create_future()
    asked = asyncio.Event()

    def read_attributes(nodes: object, attribute: object) -> asyncio.Future[list[ua.DataValue]]:
        monkeypatch.setattr(session, "PROBE_S", 3600.0)
        asked.set()
        return answer

    monkeypatch.setattr(one.client.uaclient, "read_attributes", read_attributes)
    await asyncio.wait_for(asked.wait(), WAIT_S)
    closing = asyncio.create_task(one.close())
    probe = one._probe_task
    assert probe is not None
    # runs after close() has begun: the same turn
    asyncio.get_running_loop().call_soon(answer.set_result, [ua.DataValue()] * 2)
    answer.add_done_callback(lambda _: None)
    await asyncio.wait({closing}, timeout=3.0)
    assert closing.done() and probe.done() and one.state is LinkState.CLOSED


async def test_a_session_under_a_storm_of_probes_closes_and_opens_two_hundred_times(
    odd: OddServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "PROBE_S", 0.0)
    before = asyncio.all_tasks()
    one = Session(server_config(odd.endpoint))
    for k in range(200):
        await asyncio.wait_for(one.open(), WAIT_S)
        for _ in range(k % 7):
            await asyncio.sleep(0)
        await asyncio.wait_for(one.close(), WAIT_S)
        assert one.state is LinkState.CLOSED
    assert one.counters["connects"] == 200 and one.counters["lost"] == 0
    await asyncio.sleep(0.05)
    left = {task.get_name() for task in asyncio.all_tasks() - before}
    assert not {name for name in left if name.startswith(("probe", "session", "farewell"))}


async def test_closing_can_be_cancelled_and_the_connection_is_dropped_all_the_same(
    odd: OddServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Session(server_config(odd.endpoint, timeout="60 s"))
    await one.open()
    monkeypatch.setattr(one.client, "disconnect", lambda: asyncio.sleep(3600))
    closing = asyncio.create_task(one.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    closing.cancel()
    done, _ = await asyncio.wait({closing}, timeout=3.0)
    assert done and closing.cancelled() and one.state is LinkState.CLOSED


async def test_closing_can_be_cancelled_while_a_task_does_not_end(odd: OddServer) -> None:
    one = Session(server_config(odd.endpoint, timeout="60 s"))
    await one.open()
    deaf = Deaf()
    old, one._probe_task = one._probe_task, deaf.task
    closing = asyncio.create_task(one.close())
    await asyncio.sleep(0.05)
    closing.cancel()
    done, _ = await asyncio.wait({closing}, timeout=3.0)
    assert done and closing.cancelled() and one.state is LinkState.CLOSED
    await end_tasks([old], 1.0)
    await deaf.end()


async def test_closing_takes_no_longer_than_the_time_out_whatever_does_not_end(
    link: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = Deaf()
    old, link._probe_task = link._probe_task, deaf.task
    monkeypatch.setattr(link.client, "disconnect", lambda: asyncio.sleep(3600))
    started = time.monotonic()
    await link.close()
    assert time.monotonic() - started < 2.0 and link.state is LinkState.CLOSED
    await end_tasks([old], 1.0)
    await deaf.end()


async def test_what_is_left_of_a_lost_connection_does_not_end_the_next_one(link: Session) -> None:
    old = link.client
    probe = link._probe_task
    assert probe is not None
    lost = old.uaclient.protocol.on_connection_lost
    pump = link.pump
    assert pump is not None
    link.fail("cut by the test")
    async with asyncio.timeout(WAIT_S):
        while link.counters["reconnects"] == 0 or link.state is not LinkState.CONNECTED:
            await asyncio.sleep(0.01)
    new = link.client
    assert new is not old and probe.done()
    lost(OSError("late"))
    link.fail("late", old)
    pump._on_dead("late")
    await link._probe(old)  # ends at once
    await asyncio.sleep(0.05)
    assert link.client is new and link.counters["lost"] == 1


async def test_an_answer_of_a_lost_connection_is_an_error(link: Session) -> None:
    from opcua_detector.errors import ServerUnreachable

    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    asking = asyncio.create_task(link.call(answer, "ask"))
    await asyncio.sleep(0)
    link._drop("cut by the test")
    answer.set_result(1)
    with pytest.raises(ServerUnreachable, match="the connection was lost"):
        await asking


async def test_an_observer_or_a_part_that_fails_does_not_end_the_reconnecting(
    odd: OddServer, caplog: pytest.LogCaptureFixture
) -> None:
    def tell(state: LinkState, reason: str) -> None:
        raise RuntimeError("observer")

    class Part:
        async def link_up(self) -> None:
            pass

        def link_down(self) -> None:
            raise RuntimeError("part")

    one = Session(server_config(odd.endpoint), on_state=tell)
    await one.open()
    await one.attach(Part())
    one.fail("cut by the test")
    async with asyncio.timeout(WAIT_S):
        while one.counters["reconnects"] == 0:
            await asyncio.sleep(0.01)
    await one.close()
    assert "could not be told" in caplog.text and "did not take the loss" in caplog.text


async def test_closing_while_a_server_that_accepts_and_says_nothing_is_connected_to(odd: OddServer) -> None:
    one = Session(server_config(odd.endpoint, timeout="2 s"))
    await one.open()
    silent = await asyncio.start_server(lambda reader, writer: asyncio.sleep(0), "127.0.0.1", 0)
    elsewhere = Session(server_config(f"opc.tcp://127.0.0.1:{silent.sockets[0].getsockname()[1]}/", timeout="2 s"))
    one.endpoint, one._login = elsewhere.endpoint, elsewhere._login
    one.fail("cut by the test")
    async with asyncio.timeout(WAIT_S):
        while one.state is not LinkState.CONNECTING:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    started = time.monotonic()
    await one.close()
    assert time.monotonic() - started < 1.5 and one.state is LinkState.CLOSED
    silent.close()
