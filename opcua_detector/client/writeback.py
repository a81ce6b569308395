"""Writes results into nodes of the plant's server: newest wins, never awaited by the caller, only configured
nodes.

Each request carries Values alone, without status and timestamps, because many PLCs refuse a write that has
them. The fast request (scores) and the slow one (texts, causes) are separate, so that
an explanation never delays a score. An item that fails is taken out, told once, and tried again with growing
delays. What a server missed while it was away, or while another instance wrote, is written when it is there: the
newest value of each signal, scores first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from asyncua import Client, ua
from asyncua.ua.uaerrors import UaError

from ..errors import NodeProblem
from ..nodes import RESULT_SIGNALS
from . import wire
from .casts import CastError, cast, same
from .limits import too_much
from .nodes import ACCEPTS, NodeRef, read_facts, resolve
from .session import ENDING_S, LinkState, Session
from .waiting import end_tasks, within
from .write_rules import NO_RULES, Budget, Pace, WriteRules

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
_RETRY_FIRST_S, _RETRY_LAST_S = 1.0, 30.0
OUTSIDE = "is outside the allow-list"
_NOT_CONNECTED, _NOT_THERE = "not connected", "the server does not have it"
_SLOW_SHARE = 0.25  # of the values a second, so that texts get through beside scores
_TOLD = 2  # outputs that a Quality text names

OnAck = Callable[[str, int, int], None]


class Leases(Protocol):
    """Says whether this instance may write the outputs of a monitor now."""

    def holds(self, monitor: str) -> bool:
        """Whether it may."""
        ...


@dataclass(slots=True)
class Output:
    """One configured node.

    reason : why it is not written now; empty while it is
    optional : that the server does not have it is no fault
    mismatch : what was read back instead of the value written; empty while they agree
    shown : the value of a dry run, as it would be written
    """

    monitor: str
    signal: str
    node: str
    optional: bool = False
    reason: str = _NOT_CONNECTED
    type: str = ""
    array: bool = False
    mismatch: str = ""
    shown: Any = None
    retry_at: float = 0.0
    delay_s: float = _RETRY_FIRST_S
    item: Any = field(default=None, repr=False)
    variant: Any = field(default=None, repr=False)


class WriteBack:
    """A part of a session that writes results.

    Parameters
    ----------
    nodes : (monitor, signal) -> text of the node; nothing else is ever written
    optional : those of them that a server need not have
    on_ack : called with (monitor, source_ns of the row, utc ns of the server's acknowledgement) after each
        fast write of a row; not for offers without a row (source_ns <= 0)
    rules : bounds of the configuration
    leases : which monitors this instance may write; None: all
    clock_s, utc_ns : for delays, and for the acknowledgement

    Attributes
    ----------
    counters : requests, values, superseded (results replaced by a newer one before they were sent),
        failed_items, cast_errors, timeouts, refused (nodes outside the allow-list), limited (times that a monitor
        had to wait for a limit), withheld (results not written because another instance writes), dry (values of a
        dry run), read_back, mismatches
    """

    def __init__(
        self,
        session: Session,
        nodes: Mapping[tuple[str, str], str],
        *,
        optional: Mapping[tuple[str, str], str] | None = None,
        on_ack: OnAck | None = None,
        rules: WriteRules = NO_RULES,
        leases: Leases | None = None,
        clock_s: Callable[[], float] = time.monotonic,
        utc_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.session, self.rules = session, rules
        self.outputs = {key: Output(*key, text) for key, text in nodes.items()}
        self.outputs |= {key: Output(*key, text, optional=True) for key, text in (optional or {}).items()}
        self._of: dict[str, list[Output]] = {}
        for output in self.outputs.values():
            self._of.setdefault(output.monitor, []).append(output)
        names = ("requests", "values", "superseded", "failed_items", "cast_errors", "timeouts", "refused", "limited",
                 "withheld", "dry", "read_back", "mismatches")
        self.counters = dict.fromkeys(names, 0)
        self.superseded: dict[str, int] = {monitor: 0 for monitor, _ in nodes}
        self.heartbeat = 0
        self._on_ack, self._leases = on_ack, leases
        self._clock_s, self._utc_ns = clock_s, utc_ns
        self._fast: dict[str, tuple[int, dict[str, Any]]] = {}
        self._slow: dict[str, dict[str, Any]] = {}
        self._newest_fast: dict[str, dict[str, Any]] = {}  # all that was ever offered, for who missed it
        self._newest_slow: dict[str, dict[str, Any]] = {}
        self._out: dict[str, asyncio.Future[Any]] = {}  # "fast" and "slow": at most one of each under way
        self._timers: dict[str, asyncio.TimerHandle] = {}
        share = _SLOW_SHARE * rules.values_per_s
        self._pace = {
            "fast": Pace(rules.node_every_s, Budget(rules.values_per_s - share, clock_s), clock_s),
            "slow": Pace(rules.node_every_s, Budget(share, clock_s), clock_s),
        }
        self._ready = False
        self._stopping = False
        self._sent_at = 0.0
        self._read_at = {"fast": 0.0, "slow": 0.0}
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
        self._newest_fast.setdefault(monitor, {}).update(fast)
        if slow:
            self._newest_slow.setdefault(monitor, {}).update(slow)
        if not self.may_write(monitor):
            self.counters["withheld"] += 1
            self._fast.pop(monitor, None)
            self._slow.pop(monitor, None)
            return
        waiting = self._fast.get(monitor)
        if waiting is not None and waiting[0] != source_ns:  # the same row with more words is no loss
            self.counters["superseded"] += 1
            self.superseded[monitor] = self.superseded.get(monitor, 0) + 1
        # What waits is kept below the new: "no data" must not swallow that an alert was raised just before.
        self._fast[monitor] = (source_ns, (waiting[1] if waiting else {}) | dict(fast))
        if slow:
            self._slow[monitor] = self._slow.get(monitor, {}) | dict(slow)
        self._send()

    def tell(self, monitor: str, texts: Mapping[str, Any]) -> None:
        """Give texts of a monitor that belong to no row; never waits."""
        self._newest_slow.setdefault(monitor, {}).update(texts)
        if not self._stopping and self.may_write(monitor):
            self._slow[monitor] = self._slow.get(monitor, {}) | dict(texts)
            self._send()

    def may_write(self, monitor: str) -> bool:
        """Whether this instance writes the outputs of a monitor now; another one does where it does not."""
        return self._leases is None or self._leases.holds(monitor)

    def catch_up(self, monitor: str) -> None:
        """Write the newest value of each signal, scores first: the nodes hold what somebody else wrote."""
        if self._stopping or not self.may_write(monitor):
            return
        if monitor in self._newest_fast:
            stamp, waiting = self._fast.get(monitor, (0, {}))
            self._fast[monitor] = (stamp, self._newest_fast[monitor] | waiting)
        if monitor in self._newest_slow:
            self._slow[monitor] = dict(self._newest_slow[monitor])

    def resume(self, monitor: str) -> None:
        """Take the writing over from another instance."""
        self.catch_up(monitor)
        self._send()

    def states(self) -> dict[tuple[str, str], str]:
        """Return for each output why it is not written; empty while it is."""
        return {key: output.reason for key, output in self.outputs.items()
                if not (output.optional and output.reason == _NOT_THERE)}

    def mismatches(self) -> dict[tuple[str, str], str]:
        """Return the outputs that hold another value than was written, with what was read."""
        return {key: output.mismatch for key, output in self.outputs.items() if output.mismatch}

    def trouble(self, monitor: str) -> str:
        """Say in a few words which outputs of a monitor are not written, or not kept, by a server that is there."""
        found = [(one.signal, one.reason or one.mismatch) for one in self._of.get(monitor, ())
                 if (one.reason or one.mismatch) and one.reason != _NOT_CONNECTED
                 and not (one.optional and one.reason == _NOT_THERE)]
        if not found:
            return ""
        more = f" and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
        return "not written: " + ", ".join(f"{signal} ({why})" for signal, why in found[:_TOLD]) + more

    def preview(self) -> dict[tuple[str, str], Any]:
        """Return what a dry run would have written last, cast to the types of the nodes."""
        return {key: output.shown for key, output in self.outputs.items() if output.shown is not None}

    def preview_lines(self) -> list[str]:
        """Return what a dry run would have written last, one line per output, and why it could not write the others."""
        lines = []
        for one in self.outputs.values():
            if one.shown is not None and not one.reason:
                kind = f"{one.type}[]" if one.array else one.type
                lines.append(f"{one.monitor}.{one.signal} = {_short(one.shown)} ({kind}) to {one.node}")
            elif one.reason and not (one.optional and one.reason == _NOT_THERE):
                lines.append(f"{one.monitor}.{one.signal} not to {one.node}: {one.reason}")
        return lines

    async def stop(self, final: Mapping[str, Mapping[str, Any]] | None = None) -> bool:
        """Write the last words of each monitor (State "stopped") and write nothing more; True when
        acknowledged.

        Nothing is said for a monitor that another instance writes. Waits no longer than twice the time-out of the
        session, and a second for a look-up under way.
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
        items, _ = self._items({monitor: dict(values) for monitor, values in (final or {}).items()
                                if self.may_write(monitor)})
        if items and self._ready and self.session.state is LinkState.CONNECTED and not self.rules.dry_run:
            with contextlib.suppress(Exception):  # whatever is answered now, stopping goes on
                told = await within(self._say(items), self.session.timeout_s)
        self._ready = False
        self.session.detach(self)
        return told

    # --- part of the session ---

    async def link_up(self) -> None:
        """Find the nodes on this connection and read their types; then write what they missed."""
        await self._prepare(list(self.outputs.values()))
        self._ready = True
        for monitor in self._newest_fast:
            self.catch_up(monitor)
        self._beat()
        self._send()

    def link_down(self) -> None:
        """Forget the connection; the newest results wait for the next one."""
        self._ready = False
        self._out.clear()
        self._cancel_timers()
        for output in self.outputs.values():
            output.reason, output.mismatch = _NOT_CONNECTED, ""

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
                self._fails(output, _NOT_THERE if output.optional else ref.what)
            elif not self.rules.allows(ref.nsu):
                self.counters["refused"] += 1
                self._fails(output, f"{ref.nsu} {OUTSIDE}")
            else:
                known.append((output, ref))
        facts = await read_facts(self.session, [ref for _, ref in known])
        for (output, ref), fact in zip(known, facts, strict=True):
            expected = RESULT_SIGNALS[output.signal].type
            if not fact.is_variable:
                self._fails(output, _NOT_THERE if output.optional else
                            f"there is no such variable ({fact.read_status})")
            elif not fact.writable:
                self._fails(output, "this user may not write it")
            elif fact.type not in ACCEPTS[expected]:
                self._fails(
                    output, f"its type is {fact.type_name or 'unknown'}, {output.signal} is {expected}"
                )
            else:
                self._works(output, ref, fact.type, RESULT_SIGNALS[output.signal].array)

    def _works(self, output: Output, ref: NodeRef, type_name: str, array: bool) -> None:
        if output.reason not in ("", _NOT_CONNECTED, _NOT_THERE):
            log.warning("%s: output %s.%s is tried again", self.session.where, output.monitor, output.signal)
        missed = output.reason not in ("", _NOT_CONNECTED)
        output.reason, output.type, output.array = "", type_name, array
        kind = ua.VariantType[type_name]
        output.variant = ua.Variant([] if array else ua.get_default_value(kind), kind, is_array=array)
        output.item = ua.WriteValue()
        output.item.NodeId = ref.id
        output.item.AttributeId = ua.AttributeIds.Value
        output.item.Value = ua.DataValue(output.variant, None)
        if missed:
            self.catch_up(output.monitor)  # a text that does not change would never be written again

    def _fails(self, output: Output, reason: str) -> None:
        if output.reason != reason and not (output.optional and reason == _NOT_THERE):
            log.warning(
                "%s: output %s.%s (%s) is not written: %s",
                self.session.where,
                output.monitor,
                output.signal,
                output.node,
                reason,
            )
        output.reason, output.mismatch = reason, ""
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

    async def _say(self, items: list[Any]) -> bool:
        """Write the last words; True when all of them were taken."""
        taken = True
        size = self.session.limit("write")
        for start in range(0, len(items), size):
            results = wire.write_results(await self._request(items[start : start + size]))
            taken = taken and not any(code & 0x80000000 for code in results)
        return taken

    def _request(self, items: list[Any]) -> asyncio.Future[Any]:
        request = ua.WriteRequest()
        request.Parameters.NodesToWrite = items
        self.counters["requests"] += 1
        self.counters["values"] += len(items)
        self._sent_at = self._clock_s()
        return wire.send(self.session.client, request, self.session.timeout_s)

    def _send(self) -> None:
        """Send what waits: scores first, texts when no score waits; one request of each kind under way."""
        if not self._ready or self._stopping:
            return
        if self._fast and "fast" not in self._out:
            ready, self._fast = self._within_limits("fast", self._fast, lambda one: len(one[1]))
            if ready:
                self.heartbeat += 1
                values = {monitor: signals | {"Heartbeat": self.heartbeat} for monitor, (_, signals) in ready.items()}
                self._post("fast", values, {monitor: source_ns for monitor, (source_ns, _) in ready.items()})
        if self._slow and (not self._fast or self.rules.limited) and "slow" not in self._out:
            texts, self._slow = self._within_limits("slow", self._slow, len)
            if texts:
                self._post("slow", texts, {})

    def _within_limits(
        self, kind: str, pending: dict[str, Any], size: Callable[[Any], int]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (what may be written now, what has to wait) of each monitor that this instance writes."""
        pending = {monitor: one for monitor, one in pending.items() if self.may_write(monitor)}
        if not self.rules.limited:
            return pending, {}
        pace, ready, later = self._pace[kind], {}, {}
        for monitor, one in pending.items():
            first = monitor not in pace.waiting
            if pace.may(monitor, size(one)):
                ready[monitor] = one
            else:
                later[monitor] = one
                self.counters["limited"] += first
        if later and f"wait {kind}" not in self._timers:
            self._timers[f"wait {kind}"] = asyncio.get_running_loop().call_later(
                pace.wait_s(set(later)), self._waited, kind)
        return ready, later

    def _waited(self, kind: str) -> None:
        self._timers.pop(f"wait {kind}", None)
        self._send()

    def _post(self, kind: str, values: Mapping[str, Mapping[str, Any]], stamps: Mapping[str, int]) -> None:
        items, outputs = self._items(values)
        if not items:
            return
        if self.rules.dry_run:
            self.counters["dry"] += len(items)
            for output in outputs:
                output.shown = output.variant.Value
            return
        self._post_part(kind, outputs, 0, stamps, self.session.client)

    def _post_part(
        self, kind: str, outputs: Sequence[Output], start: int, stamps: Mapping[str, int], client: Client
    ) -> None:
        """Send as many of the filled items as the server takes at once, from `start` on."""
        stop = start + self.session.limit("write")
        try:
            future = self._request([output.item for output in outputs[start:stop]])
        except (OSError, UaError) as error:
            self.session.fail(f"write: {error}", client)
            return
        self._under_way(kind, future, client)
        future.add_done_callback(
            lambda done: self._answered(kind, done, outputs, (start, min(stop, len(outputs))), stamps, client))

    def _under_way(self, kind: str, future: asyncio.Future[Any], client: Client) -> None:
        self._out[kind] = future
        loop = asyncio.get_running_loop()
        self._timers[kind] = loop.call_later(self.session.timeout_s, self._timed_out, kind, future, client)

    def _timed_out(self, kind: str, future: asyncio.Future[Any], client: Client) -> None:
        if self._out.get(kind) is future:
            self.counters["timeouts"] += 1
            self.session.fail("a write was not answered", client)

    def _came(self, kind: str, future: asyncio.Future[Any], client: Client) -> bool:
        """Whether a request of this connection was answered at all; it is under way no more."""
        if future.cancelled() or (error := future.exception()) is not None:
            if self._out.get(kind) is future:
                self.session.fail(f"write: {'cancelled' if future.cancelled() else error}", client)
            return False
        if self._out.get(kind) is not future:
            return False  # of an earlier connection
        del self._out[kind]
        timer = self._timers.pop(kind, None)
        if timer is not None:
            timer.cancel()
        return True

    def _answered(
        self,
        kind: str,
        future: asyncio.Future[Any],
        outputs: Sequence[Output],
        span: tuple[int, int],
        stamps: Mapping[str, int],
        client: Client,
    ) -> None:
        if not self._came(kind, future, client):
            return
        acknowledged_ns = self._utc_ns()
        start, stop = span
        try:
            results = wire.write_results(future.result())
        except UaError as refused:
            if too_much(refused) and stop - start > 1:
                self.session.limits.refused("write", stop - start)
                self._post_part(kind, outputs, start, stamps, client)
                return
            for output in outputs[start:stop]:
                self._fails(output, type(refused).__name__)
            self.counters["failed_items"] += stop - start
            results = []
        except Exception as broken:
            self.session.fail(f"the answer to a write cannot be decoded: {broken!r}", client)
            return
        for output, code in zip(outputs[start:stop], results, strict=False):
            if code & 0x80000000:
                self.counters["failed_items"] += 1
                self._fails(output, wire.status_name(code))
            else:
                output.delay_s = _RETRY_FIRST_S
        if stop < len(outputs):
            self._post_part(kind, outputs, stop, stamps, client)
            return
        if results and self._on_ack is not None:
            for monitor, source_ns in stamps.items():
                if source_ns > 0:  # 0: an offer without a row, such as "no data", has no latency
                    self._on_ack(monitor, source_ns, acknowledged_ns)
        if not self._read_back(kind, [one for one in outputs if not one.reason], client):
            self._send()

    # --- reading back ---

    def _read_back(self, kind: str, outputs: Sequence[Output], client: Client) -> bool:
        """Read what was just written, when it is time to; the next write of the kind waits for the answer."""
        now = self._clock_s()
        every_s = self.rules.read_back_s
        if every_s <= 0 or not outputs or self._stopping or not self._ready or now - self._read_at[kind] < every_s:
            return False
        self._read_at[kind] = now
        chosen = [(one, one.variant.Value) for one in outputs[: self.session.limit("read")]]
        request = ua.ReadRequest()
        request.Parameters.TimestampsToReturn = ua.TimestampsToReturn.Neither
        for output, _ in chosen:
            one = ua.ReadValueId()
            one.NodeId, one.AttributeId = output.item.NodeId, ua.AttributeIds.Value
            request.Parameters.NodesToRead.append(one)
        try:
            future = wire.send(client, request, self.session.timeout_s)
        except (OSError, UaError) as error:
            self.session.fail(f"read back: {error}", client)
            return True
        self._under_way(kind, future, client)
        future.add_done_callback(lambda done: self._compare(kind, done, chosen, client))
        return True

    def _compare(
        self, kind: str, future: asyncio.Future[Any], chosen: Sequence[tuple[Output, Any]], client: Client
    ) -> None:
        if not self._came(kind, future, client):
            return
        try:
            results = wire.decode(future.result(), ua.ReadResponse).Results
        except Exception as error:  # a server that does not let itself be read is no fault of the connection
            log.warning("%s: what was written cannot be read back: %s", self.session.where, error)
            results = []
        for (output, written), one in zip(chosen, results, strict=False):
            self.counters["read_back"] += 1
            bad = one.StatusCode is not None and one.StatusCode.value & 0x80000000
            read = None if bad or one.Value is None else one.Value.Value
            agree = not bad and same(written, read, output.type)
            text = "" if agree else f"reads {one.StatusCode.name if bad else _short(read)}, written {_short(written)}"
            self.counters["mismatches"] += not agree
            if bool(text) != bool(output.mismatch):
                log.warning("%s: output %s.%s (%s) %s", self.session.where, output.monitor, output.signal,
                            output.node, text or "holds what is written again")
            output.mismatch = text
        self._send()

    # --- heartbeat and repair ---

    def _beat(self) -> None:
        """Count the heartbeat up when no row has done it, and look after outputs that fail."""
        if not self._ready or self._stopping:
            return
        now = self._clock_s()
        if now - self._sent_at >= 0.9 * HEARTBEAT_S and "fast" not in self._out:
            self.heartbeat += 1
            alive = {monitor: {"Heartbeat": self.heartbeat} for monitor in self.superseded if self.may_write(monitor)}
            self._post("fast", alive, {})
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
            return
        self._send()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
