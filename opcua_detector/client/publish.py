"""Keeps publish requests outstanding on a session and hands each answer to its subscription, without a task.

Why our own pump: asyncua keeps one request outstanding, which costs a round trip per notification, and starts a task
per tag value. Here two to four are outstanding, as many as the server takes; the acknowledgements ride on them.

Messages of a subscription are numbered without a hole. Where one is missing, the server is asked for it (Republish) and
what came after it waits, so that a subscription sees its messages in their order. A message that the server does not
have any more (BadMessageNotAvailable) is lost, and the next one that is handed out says how many were.

Source: OPC UA Part 4, 5.14.1.2 (acknowledgement), 5.14.5 (Publish), 5.14.6 (Republish).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from asyncua import Client
from asyncua.ua.uaerrors import UaError, UaStatusCodeError
from numpy.typing import NDArray

from ..errors import ConnectionProblem
from . import wire
from .wire_requests import PreparedPublish, PreparedRepublish

log = logging.getLogger(__name__)

OUTSTANDING = 2
MOST_OUTSTANDING = 4
MOST_MISSING = 64  # messages that are asked for again after one hole; of more, the oldest are lost
MOST_HELD_BYTES = 32 * 2**20  # of messages that wait for a missing one
_MOST_ACKS = 1000  # in one request
_BROKEN_IN_A_ROW = 3
_BEHIND_IN_A_ROW = 3
_MOST_AHEAD = 100_000  # messages that a server can have lost before it has rather begun anew with its numbers
_PAUSE_FIRST_S, _PAUSE_LAST_S = 0.05, 5.0
_BUSY = frozenset({"BadTimeout", "BadRequestTimeout", "BadServerTooBusy", "BadTcpServerTooBusy", "BadOutOfMemory"})
_NUMBERS = 0xFFFFFFFF  # sequence numbers run from 1 to this and begin at 1 again

OnPublish = Callable[[wire.Publish | None], None]


def next_number(number: int) -> int:
    """Return the sequence number after this one (Part 4, 7.8)."""
    return number % _NUMBERS + 1


def _ahead(number: int, expected: int) -> int:
    """How many messages lie between the expected and this one; negative for one that came before."""
    return (number - expected + _NUMBERS // 2) % _NUMBERS - _NUMBERS // 2


class _Line:
    """What is known of the messages of one subscription.

    expected : number of the message that comes next, 0 before the first
    missing : numbers that the server is asked for, in order; held : what came after them, values not yet read
    behind : how many in a row came with a number that was there before
    """

    __slots__ = ("behind", "elements", "expected", "handler", "held", "held_bytes", "lost", "missing", "timer")

    def __init__(self, handler: OnPublish, elements: NDArray[np.int32]) -> None:
        self.handler, self.elements = handler, elements
        self.expected = 0
        self.missing: list[int] = []
        self.held: list[wire.Message] = []
        self.held_bytes = self.lost = self.behind = 0
        self.timer: asyncio.TimerHandle | None = None


class PublishPump:
    """The publish requests of one connection.

    Parameters
    ----------
    on_dead : called with the reason when the connection does not answer any more
    timeout_s : how long the server may take to send a missing message again

    Attributes
    ----------
    outstanding : requests that wait at the server; allowed : the most that it takes, as far as is known
    counters : publish_responses, handler_errors, decode_errors, too_many_publish, refused (other faults of Publish),
        holes (in sequence numbers), republished (messages brought back), lost_notifications, duplicates,
        renumbered (the server began anew with its numbers), refused_acks, unknown_subscription

    The samples that a handler gets hold until it returns.
    """

    def __init__(self, client: Client, on_dead: Callable[[str], None], *, timeout_s: float = 4.0) -> None:
        self._client = client
        self._on_dead = on_dead
        self._timeout_s = timeout_s
        self._lines: dict[int, _Line] = {}
        self._columns = wire.Columns()
        self._acks: list[tuple[int, int]] = []
        self._publish: PreparedPublish | None = None
        self._republish: PreparedRepublish | None = None
        self._stopped = False
        self._broken = 0
        self._pause_s = 0.0
        self._pause: asyncio.TimerHandle | None = None
        self._wanted = OUTSTANDING
        self.outstanding = 0
        self.allowed = MOST_OUTSTANDING
        self.counters = {
            "publish_responses": 0,
            "handler_errors": 0,
            "decode_errors": 0,
            "too_many_publish": 0,
            "refused": 0,
            "holes": 0,
            "republished": 0,
            "lost_notifications": 0,
            "duplicates": 0,
            "renumbered": 0,
            "refused_acks": 0,
            "unknown_subscription": 0,
        }

    def register(
        self, subscription_id: int, handler: OnPublish, elements: NDArray[np.int32] = wire.NO_ELEMENTS
    ) -> None:
        """Hand the messages of a subscription to `handler`, in their order; None when the server has lost it.

        elements : int32[m]; by client handle the place in its array that a tag stands for, -1 for a scalar
        """
        self._lines[subscription_id] = _Line(handler, elements)
        self._fill()

    def forget(self, subscription_id: int) -> None:
        """Stop handing out messages of a subscription."""
        line = self._lines.pop(subscription_id, None)
        if line is not None and line.timer is not None:
            line.timer.cancel()

    def stop(self) -> None:
        """Send no more requests; answers still under way are ignored."""
        self._stopped = True
        if self._pause is not None:
            self._pause.cancel()
        for subscription_id in tuple(self._lines):
            self.forget(subscription_id)

    # --- requests ---

    def _target(self) -> int:
        return max(1, min(self.allowed, max(self._wanted, len(self._lines) + 1), MOST_OUTSTANDING))

    def _fill(self) -> None:
        while not self._stopped and self._lines and self._pause is None and self.outstanding < self._target():
            acks, self._acks = self._acks[:_MOST_ACKS], self._acks[_MOST_ACKS:]
            try:
                if self._publish is None:
                    self._publish = PreparedPublish(wire.token_of(self._client))
                self._publish.acknowledge(acks)
                wire.post(self._client, self._publish, 0, partial(self._answered, acks))
            except (OSError, UaError) as error:
                self._dead(f"publish: {error}")
                return
            self.outstanding += 1

    def _dead(self, reason: str) -> None:
        if not self._stopped:
            self.stop()
            self._on_dead(reason)

    def _rest(self) -> None:
        """Wait before the next request, longer each time: a server that refuses at once must not be hammered."""
        if self._pause is None:
            self._pause_s = min(max(2 * self._pause_s, _PAUSE_FIRST_S), _PAUSE_LAST_S)
            self._pause = asyncio.get_running_loop().call_later(self._pause_s, self._rested)

    def _rested(self) -> None:
        self._pause = None
        self._fill()

    def _answered(self, acks: list[tuple[int, int]], body: Any, error: BaseException | None) -> None:
        self.outstanding -= 1
        if self._stopped:
            return
        if error is not None:
            self._dead(f"publish: {type(error).__name__}: {error}")
            return
        try:
            message = wire.open_publish(body)
        except UaError as problem:
            self._acks = acks + self._acks  # the server did not take them
            self._refused(problem)
            return
        except ConnectionProblem as problem:
            self._undecodable(problem)
            self._fill()
            return
        self._pause_s = 0.0
        self.counters["publish_responses"] += 1
        if message.blocks:
            self._acks.append((message.subscription_id, message.sequence_number))
        if message.more:
            self._wanted = min(self._wanted + 1, MOST_OUTSTANDING)
        if self.outstanding == 0:
            self._fill()  # first: the server can answer while the values are worked on
        line = self._lines.get(message.subscription_id)
        if line is None:
            self.counters["unknown_subscription"] += 1
        else:
            self._arrived(line, message)
        # While another request waits at the server, what is made of the values goes out before the next one.
        self._fill()

    def _refused(self, problem: UaError) -> None:
        name = type(problem).__name__
        if name == "BadTooManyPublishRequests":
            self.counters["too_many_publish"] += 1
            self.allowed = max(1, min(self.allowed, self.outstanding))
            if self.outstanding == 0:
                self._rest()
        elif name in _BUSY:
            self.counters["refused"] += 1
            self._rest()
        elif name == "BadNoSubscription":
            self.counters["refused"] += 1
            self._acks = []
            lines = list(self._lines.values())
            for subscription_id in tuple(self._lines):
                self.forget(subscription_id)
            for line in lines:
                self._hand(line, None)
        else:
            self._dead(f"publish: {name}")

    def _undecodable(self, problem: Exception) -> None:
        self.counters["decode_errors"] += 1
        self._broken += 1
        if self._broken >= _BROKEN_IN_A_ROW:
            self._dead(f"notifications cannot be decoded: {problem}")

    # --- the order of messages ---

    def _arrived(self, line: _Line, message: wire.Message) -> None:
        """Hand a message out, or hold it until those before it are there."""
        number = message.sequence_number
        ahead = _ahead(number, line.expected) if line.expected else 0
        if not message.blocks:
            # Its number is that of the next message, but not with every server: believed where the server says itself
            # that it has kept what would be missing.
            if 0 < ahead <= MOST_MISSING and line.expected in message.available:
                self._misses(line, message.subscription_id, ahead)
                line.expected = number
        else:
            if -MOST_MISSING <= ahead < 0 and line.behind + 1 < _BEHIND_IN_A_ROW:
                line.behind += 1
                self.counters["duplicates"] += 1
                return
            line.behind = 0
            if ahead < 0 or ahead > _MOST_AHEAD:  # whoever waited for the old numbers would wait for ever
                self.counters["renumbered"] += 1
                self._give_up(line)
            elif ahead > 0:
                self._misses(line, message.subscription_id, ahead)
            line.expected = next_number(number)
        if not line.missing:
            self._deliver(line, message)
            return
        line.held.append(message)
        line.held_bytes += len(message.raw)
        if line.held_bytes > MOST_HELD_BYTES or len(line.missing) > 4 * MOST_MISSING:
            self._give_up(line)

    def _misses(self, line: _Line, subscription_id: int, ahead: int) -> None:
        """Ask for the messages from the expected one on; of many only the newest, which a server may still have."""
        self.counters["holes"] += 1
        asked = bool(line.missing)
        too_many = max(0, ahead - MOST_MISSING)
        line.lost += too_many
        line.missing += [(line.expected + i - 1) % _NUMBERS + 1 for i in range(too_many, ahead)]
        if not asked:
            self._ask(subscription_id, line)

    def _ask(self, subscription_id: int, line: _Line) -> None:
        """Ask for the first missing message."""
        try:
            if self._republish is None:
                self._republish = PreparedRepublish(wire.token_of(self._client))
            self._republish.ask(subscription_id, line.missing[0])
            wire.post(self._client, self._republish, self._timeout_s,
                      partial(self._asked, subscription_id, line, line.missing[0]))
        except (OSError, UaError) as error:
            self._dead(f"republish: {error}")
            return
        line.timer = asyncio.get_running_loop().call_later(self._timeout_s, self._give_up, line)

    def _asked(
        self, subscription_id: int, line: _Line, number: int, body: Any, error: BaseException | None
    ) -> None:
        if error is not None or self._stopped:
            return  # the connection is gone, which the publish requests tell as well
        if self._lines.get(subscription_id) is not line or not line.missing or line.missing[0] != number:
            return  # given up
        if line.timer is not None:
            line.timer.cancel()
            line.timer = None
        self._release(line, number)
        try:
            message = wire.open_republish(body, subscription_id)
        except UaStatusCodeError as problem:
            if type(problem).__name__ != "BadMessageNotAvailable":
                self._give_up(line)  # it has no Republish, or not for us
                return
            line.lost += 1
        except ConnectionProblem as problem:
            line.lost += 1
            self._undecodable(problem)
            if self._stopped:
                return
        else:
            # Some servers answer with an empty message to what they do not have.
            if message.blocks and message.sequence_number == number:
                self.counters["republished"] += 1
                self._acks.append((subscription_id, number))
                self._deliver(line, message)
            else:
                line.lost += 1
        if self._lines.get(subscription_id) is not line or not line.missing:
            return
        line.missing.pop(0)
        if line.missing:
            self._ask(subscription_id, line)
        else:
            self._release(line)

    def _give_up(self, line: _Line) -> None:
        """Count what is missing as lost and hand out what waits."""
        if line.timer is not None:
            line.timer.cancel()
            line.timer = None
        line.lost += len(line.missing)
        line.missing = []
        self._release(line)

    def _release(self, line: _Line, before: int = 0) -> None:
        """Hand out what waits, in its order; with `before` only what comes before this number."""
        held = line.held
        n = len(held)
        if before:
            later = (i for i, one in enumerate(held) if one.blocks and _ahead(one.sequence_number, before) > 0)
            n = next(later, n)
        line.held = held[n:]
        line.held_bytes = sum(len(one.raw) for one in line.held)
        for message in held[:n]:
            if not self._stopped:
                self._deliver(line, message)

    def _deliver(self, line: _Line, message: wire.Message) -> None:
        """Read the values of a message and hand it out."""
        try:
            answer = wire.read_message(message, self._columns, line.elements)
        except ConnectionProblem as problem:
            line.lost += 1
            self._undecodable(problem)
            return
        self._broken = 0
        answer.lost, line.lost = line.lost, 0
        self.counters["lost_notifications"] += answer.lost
        self.counters["refused_acks"] += answer.refused_acks
        self._hand(line, answer)

    def _hand(self, line: _Line, answer: wire.Publish | None) -> None:
        try:
            line.handler(answer)
        except Exception:
            self.counters["handler_errors"] += 1
            if self.counters["handler_errors"] == 1:
                log.exception("a notification could not be worked on; further ones are counted only")
