"""Writes results into nodes of the plant's server: newest wins, never awaited by the caller, only configured
nodes.

Each request carries Values alone, without status and timestamps, because many PLCs refuse a write that has
them. The fast request (scores) and the slow one (texts, causes) are separate, so that
an explanation never delays a score. An item that fails is taken out, told once, and tried again with growing
delays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from asyncua import Client, ua
from asyncua.ua.uaerrors import UaError

from ..errors import NodeProblem
from ..nodes import NO_SCORE, SIGNALS
from . import wire
from .nodes import ACCEPTS, NodeRef, read_facts, resolve
from .session import ENDING_S, LinkState, Session
from .waiting import end_tasks, within

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
_RETRY_FIRST_S, _RETRY_LAST_S = 1.0, 30.0
_RANGES = {
    "SByte": (-(2**7), 2**7 - 1),
    "Byte": (0, 2**8 - 1),
    "Int16": (-(2**15), 2**15 - 1),
    "UInt16": (0, 2**16 - 1),
    "Int32": (-(2**31), 2**31 - 1),
    "UInt32": (0, 2**32 - 1),
    "Int64": (-(2**63), 2**63 - 1),
    "UInt64": (0, 2**64 - 1),
}
_FLOAT_MAX = 3.4028234663852886e38

OnAck = Callable[[str, int, int], None]


class CastError(ValueError):
    """A value does not fit the type of its node."""


def cast(signal: str, value: Any, type_name: str, array: bool) -> Any:
    """Return a value as the built-in type takes it; CastError where it does not fit.

    A NaN Score is `nodes.NO_SCORE`; the Heartbeat wraps around at the end of the type; DateTime takes
    nanoseconds.
    """
    if array:
        return [cast(signal, one, type_name, False) for one in value]
    if type_name in _RANGES:
        return _whole(signal, value, type_name)
    if type_name in ("Double", "Float"):
        number = float(value)
        if math.isnan(number) and signal == "Score":
            return NO_SCORE
        if type_name == "Float" and math.isfinite(number) and abs(number) > _FLOAT_MAX:
            raise CastError(f"{number} does not fit a Float")
        return number
    if type_name == "Boolean":
        return bool(value)
    if type_name == "String":
        return str(value)
    if type_name == "LocalizedText":
        return ua.LocalizedText(str(value))
    if type_name == "DateTime":
        return wire.to_datetime(int(value))
    raise CastError(f"{type_name} takes no {SIGNALS[signal].type}")


def _whole(signal: str, value: Any, type_name: str) -> int:
    low, high = _RANGES[type_name]
    number = float(value) if isinstance(value, float) else value
    if isinstance(number, float):
        if math.isnan(number) and signal == "Score":
            number = NO_SCORE
        if not math.isfinite(number):
            raise CastError(f"{number} is no {type_name}")
        number = round(number)
    whole = int(number)
    if signal == "Heartbeat":
        return whole % (high + 1)
    if not low <= whole <= high:
        raise CastError(f"{whole} does not fit {type_name}")
    return whole


@dataclass(slots=True)
class Output:
    """One configured node.

    reason : why it is not written now; empty while it is
    """

    monitor: str
    signal: str
    node: str
    reason: str = "not connected"
    type: str = ""
    array: bool = False
    retry_at: float = 0.0
    delay_s: float = _RETRY_FIRST_S
    item: Any = field(default=None, repr=False)
    variant: Any = field(default=None, repr=False)


class WriteBack:
    """A part of a session that writes results.

    Parameters
    ----------
    nodes : (monitor, signal) -> text of the node; nothing else is ever written
    on_ack : called with (monitor, source_ns of the row, utc ns of the server's acknowledgement) after each
        fast write of a row; not for offers without a row (source_ns <= 0)
    clock_s, utc_ns : for delays, and for the acknowledgement

    Attributes
    ----------
    counters : requests, values, superseded (results replaced by a newer one before they were sent),
        failed_items, cast_errors, timeouts
    """

    def __init__(
        self,
        session: Session,
        nodes: Mapping[tuple[str, str], str],
        *,
        on_ack: OnAck | None = None,
        clock_s: Callable[[], float] = time.monotonic,
        utc_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.session = session
        self.outputs = {key: Output(*key, text) for key, text in nodes.items()}
        self.counters = {
            "requests": 0,
            "values": 0,
            "superseded": 0,
            "failed_items": 0,
            "cast_errors": 0,
            "timeouts": 0,
        }
        self.superseded: dict[str, int] = {monitor: 0 for monitor, _ in nodes}
        self.heartbeat = 0
        self._on_ack = on_ack
        self._clock_s, self._utc_ns = clock_s, utc_ns
        self._fast: dict[str, tuple[int, dict[str, Any]]] = {}
        self._slow: dict[str, dict[str, Any]] = {}
        self._out: dict[str, asyncio.Future[Any]] = {}  # "fast" and "slow": at most one of each under way
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._ready = False
        self._stopping = False
        self._sent_at = 0.0
        self._beat_timer: asyncio.TimerHandle | None = None
        self._repair_task: asyncio.Task[None] | None = None

    # --- for the application ---

    def offer(
        self, monitor: str, source_ns: int, fast: Mapping[str, Any], slow: Mapping[str, Any] | None = None
    ) -> None:
        """Give the newest result of a monitor; never waits.

        fast, slow : signal -> value (numbers, bool, str, sequences for arrays, ns for DateTime); signals that
            are not configured and values that are None are left out. The mappings are copied.
        """
        if self._stopping:
            return
        if monitor in self._fast and self._fast[monitor][0] != source_ns:  # the same row with more words is no loss
            self.counters["superseded"] += 1
            self.superseded[monitor] = self.superseded.get(monitor, 0) + 1
        self._fast[monitor] = (source_ns, dict(fast))
        if slow:
            self._slow[monitor] = self._slow.get(monitor, {}) | dict(slow)
        self._send()

    def states(self) -> dict[tuple[str, str], str]:
        """Return for each output why it is not written; empty while it is."""
        return {key: output.reason for key, output in self.outputs.items()}

    async def stop(self, final: Mapping[str, Mapping[str, Any]] | None = None) -> bool:
        """Write the last words of each monitor (State "stopped") and write nothing more; True when
        acknowledged.

        Waits no longer than twice the time-out of the session, and a second for a look-up under way.
        """
        self._stopping = True
        repair = self._repair_task
        self._cancel_timers()
        self._fast.clear()
        self._slow.clear()
        await end_tasks((repair,), min(ENDING_S, self.session.timeout_s / 2))
        under_way = [one for one in self._out.values() if not one.done()]
        if under_way:
            await asyncio.wait(under_way, timeout=self.session.timeout_s)
        told = False
        items, _ = self._items({monitor: dict(values) for monitor, values in (final or {}).items()})
        if items and self._ready and self.session.state is LinkState.CONNECTED:
            with contextlib.suppress(Exception):  # whatever is answered now, stopping goes on
                results = wire.write_results(await within(self._request(items), self.session.timeout_s))
                told = not any(code & 0x80000000 for code in results)
        self._ready = False
        self.session.detach(self)
        return told

    # --- part of the session ---

    async def link_up(self) -> None:
        """Find the nodes on this connection and read their types."""
        await self._prepare(list(self.outputs.values()))
        self._ready = True
        self._beat()
        self._send()

    def link_down(self) -> None:
        """Forget the connection; the newest results wait for the next one."""
        self._ready = False
        self._out.clear()
        self._cancel_timers()
        for output in self.outputs.values():
            output.reason = "not connected"

    def _cancel_timers(self) -> None:
        for timer in (*self._timers.values(), self._beat_timer):
            if timer is not None:
                timer.cancel()
        self._timers.clear()
        self._beat_timer = None
        if self._repair_task is not None:
            self._repair_task.cancel()
            self._repair_task = None

    async def _prepare(self, outputs: Sequence[Output]) -> None:
        found = await resolve(self.session, [output.node for output in outputs])
        known: list[tuple[Output, NodeRef]] = []
        for output in outputs:
            ref = found[output.node]
            if isinstance(ref, NodeProblem):
                self._fails(output, ref.what)
            else:
                known.append((output, ref))
        facts = await read_facts(self.session, [ref for _, ref in known])
        for (output, ref), fact in zip(known, facts, strict=True):
            expected = SIGNALS[output.signal].type
            if not fact.is_variable:
                self._fails(output, f"there is no such variable ({fact.read_status})")
            elif not fact.writable:
                self._fails(output, "this user may not write it")
            elif fact.type not in ACCEPTS[expected]:
                self._fails(
                    output, f"its type is {fact.type_name or 'unknown'}, {output.signal} is {expected}"
                )
            else:
                self._works(output, ref, fact.type, SIGNALS[output.signal].array)

    def _works(self, output: Output, ref: NodeRef, type_name: str, array: bool) -> None:
        if output.reason not in ("", "not connected"):
            log.warning("%s: output %s.%s is tried again", self.session.where, output.monitor, output.signal)
        output.reason, output.type, output.array = "", type_name, array
        kind = ua.VariantType[type_name]
        output.variant = ua.Variant([] if array else ua.get_default_value(kind), kind, is_array=array)
        output.item = ua.WriteValue()
        output.item.NodeId = ref.id
        output.item.AttributeId = ua.AttributeIds.Value
        output.item.Value = ua.DataValue(output.variant, None)

    def _fails(self, output: Output, reason: str) -> None:
        if output.reason != reason:
            log.warning(
                "%s: output %s.%s (%s) is not written: %s",
                self.session.where,
                output.monitor,
                output.signal,
                output.node,
                reason,
            )
        output.reason = reason
        output.retry_at = self._clock_s() + output.delay_s
        output.delay_s = min(output.delay_s * 2, _RETRY_LAST_S)

    # --- requests ---

    def _items(self, values: Mapping[str, Mapping[str, Any]]) -> tuple[list[Any], list[Output]]:
        """Fill the prepared items of all values that can be written."""
        items, outputs = [], []
        for monitor, signals in values.items():
            for signal, value in signals.items():
                output = self.outputs.get((monitor, signal))
                if output is None or output.reason or value is None:
                    continue
                try:
                    output.variant.Value = cast(signal, value, output.type, output.array)
                except (CastError, ValueError, TypeError, OverflowError) as error:
                    self.counters["cast_errors"] += 1
                    self._fails(output, str(error))
                    continue
                items.append(output.item)
                outputs.append(output)
        return items, outputs

    def _request(self, items: list[Any]) -> asyncio.Future[Any]:
        request = ua.WriteRequest()
        request.Parameters.NodesToWrite = items
        self.counters["requests"] += 1
        self.counters["values"] += len(items)
        self._sent_at = self._clock_s()
        return wire.send(self.session.client, request, self.session.timeout_s)

    def _send(self) -> None:
        """Send what waits: scores first, texts when no score waits; one request of each kind under way."""
        if not self._ready:
            return
        if self._fast and "fast" not in self._out:
            waiting, self._fast = self._fast, {}
            self.heartbeat += 1
            values = {
                monitor: signals | {"Heartbeat": self.heartbeat} for monitor, (_, signals) in waiting.items()
            }
            self._post("fast", values, {monitor: source_ns for monitor, (source_ns, _) in waiting.items()})
        if self._slow and not self._fast and "slow" not in self._out:
            texts, self._slow = self._slow, {}
            self._post("slow", texts, {})

    def _post(self, kind: str, values: Mapping[str, Mapping[str, Any]], stamps: Mapping[str, int]) -> None:
        items, outputs = self._items(values)
        if not items:
            return
        client = self.session.client
        try:
            future = self._request(items)
        except (OSError, UaError) as error:
            self.session.fail(f"write: {error}", client)
            return
        self._out[kind] = future
        loop = asyncio.get_running_loop()
        self._timers[kind] = loop.call_later(self.session.timeout_s, self._timed_out, kind, future, client)
        future.add_done_callback(lambda done: self._answered(kind, done, outputs, stamps, client))

    def _timed_out(self, kind: str, future: asyncio.Future[Any], client: Client) -> None:
        if self._out.get(kind) is future:
            self.counters["timeouts"] += 1
            self.session.fail("a write was not answered", client)

    def _answered(
        self,
        kind: str,
        future: asyncio.Future[Any],
        outputs: Sequence[Output],
        stamps: Mapping[str, int],
        client: Client,
    ) -> None:
        if future.cancelled() or (error := future.exception()) is not None:
            if self._out.get(kind) is future:
                self.session.fail(f"write: {'cancelled' if future.cancelled() else error}", client)
            return
        if self._out.get(kind) is not future:
            return  # of an earlier connection
        del self._out[kind]
        timer = self._timers.pop(kind, None)
        if timer is not None:
            timer.cancel()
        acknowledged_ns = self._utc_ns()
        try:
            results = wire.write_results(future.result())
        except UaError as refused:
            for output in outputs:
                self._fails(output, type(refused).__name__)
            self.counters["failed_items"] += len(outputs)
            results = []
        except Exception as broken:
            self.session.fail(f"the answer to a write cannot be decoded: {broken!r}", client)
            return
        for output, code in zip(outputs, results, strict=False):
            if code & 0x80000000:
                self.counters["failed_items"] += 1
                self._fails(output, wire.status_name(code))
            else:
                output.delay_s = _RETRY_FIRST_S
        if results and self._on_ack is not None:
            for monitor, source_ns in stamps.items():
                if source_ns > 0:  # 0: an offer without a row, such as "no data", has no latency
                    self._on_ack(monitor, source_ns, acknowledged_ns)
        self._send()

    def _beat(self) -> None:
        """Count the heartbeat up when no row has done it, and look after outputs that fail."""
        if not self._ready or self._stopping:
            return
        now = self._clock_s()
        if now - self._sent_at >= 0.9 * HEARTBEAT_S and "fast" not in self._out:
            self.heartbeat += 1
            self._post("fast", {monitor: {"Heartbeat": self.heartbeat} for monitor in self.superseded}, {})
        due = [one for one in self.outputs.values() if one.reason and one.retry_at <= now]
        if due and (self._repair_task is None or self._repair_task.done()):
            self._repair_task = asyncio.create_task(
                self._repair(due, self.session.client), name="outputs that fail"
            )
        self._beat_timer = asyncio.get_running_loop().call_later(HEARTBEAT_S, self._beat)

    async def _repair(self, outputs: Sequence[Output], client: Client) -> None:
        try:
            await self._prepare(outputs)
        except Exception as error:
            self.session.fail(f"outputs cannot be looked up: {error}", client)
