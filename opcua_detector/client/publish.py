"""Keeps publish requests outstanding on a session and hands each answer to its subscription, without a task.

Why our own pump: asyncua keeps one request outstanding, which costs a round trip per notification, and starts
a task per tag value. Source: OPC UA Part 4, 5.14.5 (Publish) and 5.14.1.2
(acknowledgement).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from asyncua import Client, ua
from asyncua.ua.uaerrors import UaError

from . import wire

log = logging.getLogger(__name__)

OUTSTANDING = 2
_BROKEN_IN_A_ROW = 3


class PublishPump:
    """The publish requests of one connection.

    on_dead : called with the reason when the connection does not answer any more
    """

    def __init__(self, client: Client, on_dead: Callable[[str], None]) -> None:
        self._client = client
        self._on_dead = on_dead
        self._handlers: dict[int, Callable[[wire.Publish | None], None]] = {}
        self._acks: list[Any] = []
        self._out = 0
        self._target = OUTSTANDING
        self._stopped = False
        self._broken = 0
        self.counters = {
            "publish_responses": 0,
            "handler_errors": 0,
            "decode_errors": 0,
            "too_many_publish": 0,
        }

    def register(self, subscription_id: int, handler: Callable[[wire.Publish | None], None]) -> None:
        """Hand notifications of a subscription to `handler`; it gets None when the server has lost them."""
        self._handlers[subscription_id] = handler
        self._fill()

    def forget(self, subscription_id: int) -> None:
        """Stop handing out notifications of a subscription."""
        self._handlers.pop(subscription_id, None)

    def stop(self) -> None:
        """Send no more requests; answers still under way are ignored."""
        self._stopped = True
        self._handlers.clear()

    def _fill(self) -> None:
        while not self._stopped and self._handlers and self._out < self._target:
            request = ua.PublishRequest()
            request.Parameters.SubscriptionAcknowledgements = self._acks
            try:
                future = wire.send(self._client, request, 0)
            except (OSError, UaError) as error:
                self._dead(f"publish: {error}")
                return
            self._acks = []
            self._out += 1
            future.add_done_callback(self._answered)

    def _dead(self, reason: str) -> None:
        if not self._stopped:
            self.stop()
            self._on_dead(reason)

    def _answered(self, future: asyncio.Future[Any]) -> None:
        self._out -= 1
        if future.cancelled():
            return
        error = future.exception()
        if self._stopped:
            return
        if error is not None:
            self._dead(f"publish: {type(error).__name__}: {error}")
            return
        try:
            answer = wire.decode_publish(future.result())
            self._broken = 0
        except UaError as problem:
            self._refused(problem)
            return
        except Exception as problem:
            self._undecodable(problem)
            return
        self.counters["publish_responses"] += 1
        handler = self._handlers.get(answer.subscription_id)
        if answer.samples is not None or answer.status_change is not None:
            ack = ua.SubscriptionAcknowledgement()
            ack.SubscriptionId, ack.SequenceNumber = answer.subscription_id, answer.sequence_number
            self._acks.append(ack)
        self._fill()  # first: the server can answer while the values are worked on
        if handler is not None:
            self._hand(handler, answer)

    def _hand(self, handler: Callable[[wire.Publish | None], None], answer: wire.Publish | None) -> None:
        try:
            handler(answer)
        except Exception:
            self.counters["handler_errors"] += 1
            if self.counters["handler_errors"] == 1:
                log.exception("a notification could not be worked on; further ones are counted only")

    def _refused(self, problem: UaError) -> None:
        name = type(problem).__name__
        if name == "BadTooManyPublishRequests":
            self.counters["too_many_publish"] += 1
            self._target = max(1, self._target - 1)
            if self._out == 0:
                self._fill()
        elif name == "BadTimeout":
            self._fill()
        elif name == "BadNoSubscription":
            handlers = list(self._handlers.values())
            self._handlers.clear()
            for handler in handlers:
                self._hand(handler, None)
        else:
            self._dead(f"publish: {name}")

    def _undecodable(self, problem: Exception) -> None:
        self.counters["decode_errors"] += 1
        self._broken += 1
        if self._broken >= _BROKEN_IN_A_ROW:
            self._dead(f"notifications cannot be decoded: {problem!r}")
        else:
            self._fill()
