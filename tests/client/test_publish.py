"""The publish pump against a real server that loses, repeats and refuses: nothing is lost silently."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from asyncua import ua
from asyncua.common.utils import Buffer
from asyncua.server.internal_subscription import InternalSubscription
from asyncua.server.subscription_service import SubscriptionService
from asyncua.server.uaprocessor import UaProcessor
from hypothesis import given
from hypothesis import strategies as st

from opcua_detector.client import Session, wire
from opcua_detector.client.publish import MOST_OUTSTANDING, PublishPump, _ahead, next_number

from .conftest import WAIT_S, OddServer, server_config

NUMBERS = 2**32 - 1


class Seen:
    """What a handler got, and waiting for more."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, list[float], int]] = []
        self.lost = self.ended = 0
        self._change = asyncio.Event()

    def __call__(self, answer: wire.Publish | None) -> None:
        if answer is None:
            self.ended += 1
        else:
            values = [] if answer.samples is None else answer.samples.value.tolist()  # they hold until we return
            self.lost += answer.lost
            self.messages.append((answer.sequence_number, values, answer.lost))
        self._change.set()

    @property
    def values(self) -> list[float]:
        return [value for _, values, _ in self.messages for value in values]

    async def until(self, wanted: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not wanted():
                self._change.clear()
                await self._change.wait()


async def eventually(wanted: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not wanted():
            await asyncio.sleep(0.005)


class Rig:
    """A session with one subscription to one node of a real server."""

    def __init__(self, odd: OddServer, session: Session) -> None:
        self.odd, self.session, self.seen = odd, session, Seen()
        self.subscription_id = 0

    @property
    def pump(self) -> PublishPump:
        assert self.session.pump is not None
        return self.session.pump

    @property
    def held_by_server(self) -> dict[int, Any]:
        """Messages that the server keeps until they are acknowledged."""
        return self.server_side()._not_acknowledged_results

    def server_side(self) -> InternalSubscription:
        service: SubscriptionService = self.odd.server.iserver.subscription_service
        return service.subscriptions[self.subscription_id]

    async def ask(self, request: Any, answer: type) -> Any:
        body = await self.session.call(wire.send(self.session.client, request, 5.0), "ask")
        return wire.decode(body, answer)

    async def subscribe(self, name: str = "Double", elements: np.ndarray = wire.NO_ELEMENTS) -> None:
        create = ua.CreateSubscriptionRequest()
        create.Parameters.RequestedPublishingInterval = 10
        create.Parameters.RequestedMaxKeepAliveCount, create.Parameters.RequestedLifetimeCount = 20, 6000
        create.Parameters.PublishingEnabled = True
        self.subscription_id = (await self.ask(create, ua.CreateSubscriptionResponse)).Parameters.SubscriptionId
        self.pump.register(self.subscription_id, self.seen, elements)
        items = ua.CreateMonitoredItemsRequest()
        items.Parameters.SubscriptionId = self.subscription_id
        items.Parameters.TimestampsToReturn = ua.TimestampsToReturn.Both
        one = ua.MonitoredItemCreateRequest()
        one.ItemToMonitor.NodeId = self.odd.nodes[name].nodeid
        one.ItemToMonitor.AttributeId = ua.AttributeIds.Value
        one.MonitoringMode = ua.MonitoringMode.Reporting
        one.RequestedParameters.ClientHandle, one.RequestedParameters.QueueSize = 0, 100
        items.Parameters.ItemsToCreate = [one]
        (result,) = (await self.ask(items, ua.CreateMonitoredItemsResponse)).Results
        assert result.StatusCode.is_good()
        await self.seen.until(lambda: bool(self.seen.values))

    async def write(self, *values: float) -> None:
        """Let the node take values, one message each, all of which the server has sent when this returns."""
        for value in values:
            number = self.server_side()._notification_seq
            await self.odd.nodes["Double"].write_value(float(value))
            await eventually(lambda number=number: self.server_side()._notification_seq != number)


@pytest_asyncio.fixture
async def rig(odd: OddServer) -> AsyncIterator[Rig]:
    session = Session(server_config(odd.endpoint))
    await session.open()
    yield Rig(odd, session)
    await session.close()


class Lossy:
    """Takes messages away between the server's subscription and the network.

    drop : numbers of messages that are not sent (the server keeps them for Republish)
    twice : numbers of messages that are sent a second time
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drop: set[int] = set()
        self.twice: set[int] = set()
        original = UaProcessor.forward_publish_response

        async def forward(processor: UaProcessor, result: Any, data: Any) -> None:
            message = result.NotificationMessage
            if message.SequenceNumber in self.drop and message.NotificationData:
                self.drop.remove(message.SequenceNumber)
                processor._publish_requests.appendleft(data)
                return
            await original(processor, result, data)
            if message.SequenceNumber in self.twice and message.NotificationData:
                self.twice.remove(message.SequenceNumber)
                await eventually(lambda: bool(processor._publish_requests))
                await original(processor, result, processor._publish_requests.popleft())

        monkeypatch.setattr(UaProcessor, "forward_publish_response", forward)


async def test_messages_come_in_order_and_are_acknowledged(rig: Rig) -> None:
    await rig.subscribe()
    await rig.write(*range(1, 21))
    await rig.seen.until(lambda: rig.seen.values == list(range(21)))
    await eventually(lambda: len(rig.held_by_server) <= 1)  # the last acknowledgement waits for the next request
    assert 2 <= rig.pump.outstanding <= MOST_OUTSTANDING
    counters = rig.pump.counters
    assert counters["publish_responses"] >= 21
    assert not any(count for name, count in counters.items() if name != "publish_responses"), counters


async def test_an_element_of_an_array_is_a_tag(rig: Rig) -> None:
    await rig.subscribe("Array", np.array([1], np.int32))
    await rig.odd.nodes["Array"].write_value([5.0, 6.0, 7.0])
    await rig.seen.until(lambda: rig.seen.values[-1] == 6.0)


@pytest.mark.parametrize("dropped", [{3}, {3, 4, 5}, {3, 6}, {3, 5, 7, 8}])
async def test_what_is_missing_is_asked_for_again_and_comes_in_its_order(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, dropped: set[int]
) -> None:
    lossy = Lossy(monkeypatch)
    await rig.subscribe()
    lossy.drop |= dropped
    await rig.write(*range(1, 12))
    await rig.seen.until(lambda: len(rig.seen.values) == 12)
    assert rig.seen.values == list(range(12))
    assert [number for number, values, _ in rig.seen.messages if values] == list(range(1, 13))
    counters = rig.pump.counters
    assert counters["republished"] == len(dropped) and counters["lost_notifications"] == rig.seen.lost == 0
    assert 1 <= counters["holes"] <= len(dropped)


def _refuse(subscription: InternalSubscription, number: int) -> Any:
    raise ua.uaerrors.BadMessageNotAvailable


def _unknown(subscription: InternalSubscription, number: int) -> Any:
    raise ua.uaerrors.BadServiceUnsupported


def _empty(subscription: InternalSubscription, number: int) -> Any:
    return ua.NotificationMessage()


@pytest.mark.parametrize("answer", [_refuse, _unknown, _empty])
async def test_what_the_server_has_not_kept_is_lost_and_told(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, answer: Callable[[InternalSubscription, int], Any]
) -> None:
    lossy = Lossy(monkeypatch)
    monkeypatch.setattr(InternalSubscription, "republish", answer)
    await rig.subscribe()
    lossy.drop |= {3, 4, 7}
    await rig.write(*range(1, 10))
    await rig.seen.until(lambda: rig.seen.values[-1] == 9.0)
    assert rig.seen.values == [0.0, 1.0, 4.0, 5.0, 7.0, 8.0, 9.0]
    assert rig.seen.lost == rig.pump.counters["lost_notifications"] == 3
    assert rig.pump.counters["republished"] == 0
    assert [lost for _, values, lost in rig.seen.messages if values[:1] == [7.0]] == [1]


async def test_a_hole_that_only_the_keep_alive_shows_is_filled(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    lossy = Lossy(monkeypatch)
    await rig.subscribe()
    lossy.drop |= {2}
    await rig.write(1)
    await rig.seen.until(lambda: rig.seen.values == [0.0, 1.0])
    assert rig.pump.counters["republished"] == 1


async def test_keep_alives_with_wrong_numbers_do_no_harm(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    original = UaProcessor.forward_publish_response

    async def wrong(processor: UaProcessor, result: Any, data: Any) -> None:
        if not result.NotificationMessage.NotificationData:
            result.NotificationMessage.SequenceNumber += 40
        await original(processor, result, data)

    monkeypatch.setattr(UaProcessor, "forward_publish_response", wrong)
    await rig.subscribe()
    for value in (1.0, 2.0, 3.0):
        keep_alives = sum(not values for _, values, _ in rig.seen.messages)
        await rig.seen.until(lambda n=keep_alives: sum(not values for _, values, _ in rig.seen.messages) > n)
        await rig.write(value)
    await rig.seen.until(lambda: rig.seen.values == [0.0, 1.0, 2.0, 3.0])
    counters = rig.pump.counters
    assert counters["holes"] == counters["duplicates"] == counters["renumbered"] == rig.seen.lost == 0


async def test_a_server_that_does_not_answer_republish_holds_nothing_up(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    lossy = Lossy(monkeypatch)
    original = UaProcessor._process_message

    async def deaf(processor: UaProcessor, typeid: Any, *rest: Any) -> Any:
        if typeid.Identifier == ua.ObjectIds.RepublishRequest_Encoding_DefaultBinary:
            return True
        return await original(processor, typeid, *rest)

    monkeypatch.setattr(UaProcessor, "_process_message", deaf)
    rig.pump._timeout_s = 0.2
    await rig.subscribe()
    lossy.drop |= {3}
    await rig.write(1, 2, 3, 4)
    await rig.seen.until(lambda: rig.seen.values == [0.0, 1.0, 3.0, 4.0])
    assert rig.seen.lost == rig.pump.counters["lost_notifications"] == 1


async def test_a_message_that_comes_twice_counts_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    lossy = Lossy(monkeypatch)
    await rig.subscribe()
    lossy.twice |= {3}
    await rig.write(1, 2, 3, 4)
    await rig.seen.until(lambda: rig.seen.values[-1] == 4.0)
    assert rig.seen.values == list(range(5)) and rig.pump.counters["duplicates"] == 1


@pytest.mark.parametrize(("first", "unseen"), [(1, 2), (2**31, 0)])
async def test_numbers_that_begin_anew_do_not_silence_a_subscription(rig: Rig, first: int, unseen: int) -> None:
    await rig.subscribe()
    await rig.write(1, 2, 3)
    await rig.seen.until(lambda: rig.seen.values[-1] == 3.0)
    rig.server_side()._notification_seq = first
    await rig.write(4, 5, 6, 7)
    await rig.seen.until(lambda: rig.seen.values[-1] == 7.0)
    assert rig.pump.counters["renumbered"] == 1 and rig.pump.counters["duplicates"] == unseen
    assert rig.pump.counters["lost_notifications"] == 0 and len(rig.seen.values) == 8 - unseen


async def test_the_number_after_the_last_is_1(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    lossy = Lossy(monkeypatch)
    await rig.subscribe()
    rig.server_side()._notification_seq = rig.pump._lines[rig.subscription_id].expected = NUMBERS - 1
    lossy.drop |= {NUMBERS}
    await rig.write(1, 2)
    rig.server_side()._notification_seq = 1
    await rig.write(3, 4)
    await rig.seen.until(lambda: rig.seen.values == [0.0, 1.0, 2.0, 3.0, 4.0])
    assert rig.pump.counters["republished"] == 1 and rig.pump.counters["renumbered"] == 0


@pytest.mark.parametrize("limit", [1, 2])
async def test_a_server_that_takes_few_publish_requests_gets_few(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(UaProcessor, "publish_request_limit", lambda processor, subscriptions: limit)
    rig.pump._wanted = MOST_OUTSTANDING
    await rig.subscribe()
    await rig.write(*range(1, 11))
    await rig.seen.until(lambda: rig.seen.values == list(range(11)))
    assert rig.pump.allowed == limit == rig.pump.outstanding
    assert 1 <= rig.pump.counters["too_many_publish"] <= 2 * MOST_OUTSTANDING
    assert rig.pump.counters["lost_notifications"] == 0


async def test_a_server_that_refuses_at_once_is_not_hammered(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await rig.subscribe()
    original = UaProcessor._process_message
    refusing = True

    async def busy(processor: UaProcessor, typeid: Any, *rest: Any) -> Any:
        if refusing and typeid.Identifier == ua.ObjectIds.PublishRequest_Encoding_DefaultBinary:
            raise ua.uaerrors.BadTimeout
        return await original(processor, typeid, *rest)

    monkeypatch.setattr(UaProcessor, "_process_message", busy)
    await eventually(lambda: rig.pump.counters["refused"] >= 10)  # after the keep-alives have used up what it had
    assert rig.pump._pause_s >= 0.4  # two at a time, and twice as long each time
    refusing = False
    await rig.odd.nodes["Double"].write_value(3.0)
    await rig.seen.until(lambda: rig.seen.values[-1] == 3.0)
    assert rig.pump._pause_s == 0.0 and rig.session.state == "connected"


async def test_a_subscription_that_is_gone_is_told_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await rig.subscribe()

    async def none(processor: UaProcessor, typeid: Any, *rest: Any) -> Any:
        raise ua.uaerrors.BadNoSubscription

    monkeypatch.setattr(UaProcessor, "_process_message", none)
    rig.pump._pause_s = 0.0
    rig.pump._wanted = MOST_OUTSTANDING
    rig.pump._fill()
    await rig.seen.until(lambda: rig.seen.ended > 0)
    await asyncio.sleep(0.05)
    assert rig.seen.ended == 1


async def test_a_handler_that_fails_is_counted_and_called_again(rig: Rig) -> None:
    await rig.subscribe()
    calls: list[Any] = []

    def fails(answer: Any) -> None:
        calls.append(answer)
        raise RuntimeError("of the handler")

    rig.pump.register(rig.subscription_id, fails)
    await rig.write(1, 2)
    await eventually(lambda: rig.pump.counters["handler_errors"] >= 2)
    assert len(calls) >= 2 and rig.session.state == "connected"


async def test_bytes_that_are_no_opc_ua_end_the_connection_when_they_do_not_stop(odd: OddServer) -> None:
    session = Session(server_config(odd.endpoint))
    await session.open()
    dead: list[str] = []
    pump = PublishPump(session.client, dead.append)
    try:
        for i in range(3):
            assert not dead, i
            pump.outstanding += 1
            pump._answered([], Buffer(b"\x01\x00\x3d\x03" + b"\xff" * 40), None)
        assert pump.counters["decode_errors"] == 3
        assert len(dead) == 1 and "is no OPC UA" in dead[0]
    finally:
        await session.close()


async def test_nothing_is_sent_after_the_end(rig: Rig) -> None:
    await rig.subscribe()
    pump = rig.pump
    pump.stop()
    seen, asked = len(rig.seen.messages), rig.session.client.uaclient.protocol._request_id
    await rig.odd.nodes["Double"].write_value(5.0)
    await eventually(lambda: pump.outstanding < 2)  # the server answered a request that was still there
    assert len(rig.seen.messages) == seen
    assert rig.session.client.uaclient.protocol._request_id == asked


@given(st.integers(1, NUMBERS), st.integers(-1000, 1000))
def test_sequence_numbers_run_on_from_the_last_to_the_first(number: int, steps: int) -> None:
    other = (number - 1 + steps) % NUMBERS + 1
    assert _ahead(other, number) == steps
    assert next_number(NUMBERS) == 1 and _ahead(next_number(number), number) == 1
