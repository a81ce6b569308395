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
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from asyncua import Client
from asyncua.ua.uaerrors import UaError

from . import wire
from .casts import CastError, cast
from .limits import too_much
from .session import ENDING_S, LinkState, Session
from .waiting import end_tasks, within
from .write_check import ReadBack
from .write_flight import Flight
from .write_nodes import look_up
from .write_outputs import OUTSIDE, Output, ServerOutputs
from .write_requests import CannotEncode, WriteRequests
from .write_rules import NO_RULES, Budget, Pace, WriteRules

__all__ = ["HEARTBEAT_S", "OUTSIDE", "Leases", "OnAck", "WriteBack"]

HEARTBEAT_S = 0.5
_SLOW_SHARE = 0.25  # of the values a second, so that texts get through beside scores

OnAck = Callable[[str, int, int], None]


class Leases(Protocol):
    """Says whether this instance may write the outputs of a monitor now."""

    def holds(self, monitor: str) -> bool:
        """Whether it may."""
        ...


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
        dry run), read_back, mismatches, read_back_failed (see `ReadBack`)
    outputs : ServerOutputs; the nodes by (monitor, signal)
    superseded : by monitor
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
        self.outputs = ServerOutputs(nodes, optional or {}, lambda: session.where, clock_s)
        names = ("requests", "values", "superseded", "failed_items", "cast_errors", "timeouts", "refused", "limited",
                 "withheld", "dry", "read_back", "mismatches", "read_back_failed")
        self.counters = dict.fromkeys(names, 0)
        self.superseded: dict[str, int] = {monitor: 0 for monitor, _ in nodes}
        self.heartbeat = 0
        self._on_ack, self._leases = on_ack, leases
        self._clock_s, self._utc_ns = clock_s, utc_ns
        self._fast: dict[str, tuple[int, dict[str, Any]]] = {}
        self._slow: dict[str, dict[str, Any]] = {}
        self._newest_fast: dict[str, dict[str, Any]] = {}  # all that was ever offered, for who missed it
        self._newest_slow: dict[str, dict[str, Any]] = {}
        self._flight = Flight(session, self._timed_out)
        self._check = ReadBack(session, self._flight, self.counters, rules.read_back_s, clock_s)
        self._requests: WriteRequests | None = None  # those of this connection
        self._timers: dict[str, asyncio.TimerHandle] = {}
        share = _SLOW_SHARE * rules.values_per_s
        self._pace = {
            "fast": Pace(rules.node_every_s, Budget(rules.values_per_s - share, clock_s), clock_s),
            "slow": Pace(rules.node_every_s, Budget(share, clock_s), clock_s),
        }
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
        return self.outputs.states()

    def mismatches(self) -> dict[tuple[str, str], str]:
        """Return the outputs that hold another value than was written, with what was read."""
        return self.outputs.mismatches()

    def trouble(self, monitor: str) -> str:
        """Say in a few words which outputs of a monitor are not written, or not kept, by a server that is there."""
        return self.outputs.trouble(monitor)

    def preview(self) -> dict[tuple[str, str], Any]:
        """Return what a dry run would have written last, cast to the types of the nodes."""
        return self.outputs.preview()

    def preview_lines(self) -> list[str]:
        """Return what a dry run would have written last, one line per output, and why it could not write the others."""
        return self.outputs.preview_lines()

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
        await self._flight.landed(self.session.timeout_s)
        told = False
        outputs = self._filled({monitor: dict(values) for monitor, values in (final or {}).items()
                                if self.may_write(monitor)})
        if outputs and self._ready and self.session.state is LinkState.CONNECTED and not self.rules.dry_run:
            with contextlib.suppress(Exception):  # whatever is answered now, stopping goes on
                told = await within(self._say(outputs), self.session.timeout_s)
        self._ready = False
        self.outputs.tell()
        self.session.detach(self)
        return told

    # --- part of the session ---

    async def link_up(self) -> None:
        """Find the nodes on this connection and read their types; then write what they missed."""
        self._requests = WriteRequests(self.session.client)
        await self._prepare(list(self.outputs.values()))
        self._ready = True
        for monitor in self._newest_fast:
            self.catch_up(monitor)
        self._beat()
        self._send()

    def link_down(self) -> None:
        """Forget the connection; the newest results wait for the next one."""
        self._ready = False
        self._requests = None
        self._flight.forget()
        self._cancel_timers()
        self.outputs.lost()

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
        missed, outside = await look_up(self.session, self.outputs, outputs, self.rules)
        self.counters["refused"] += outside
        for monitor in {output.monitor for output in missed}:
            self.catch_up(monitor)  # a text that does not change would never be written again

    # --- requests ---

    def _filled(self, values: Mapping[str, Mapping[str, Any]]) -> list[Output]:
        """Cast all values that can be written to the types of their nodes; return their outputs."""
        outputs = []
        for monitor, signals in values.items():
            for signal, value in signals.items():
                output = self.outputs.get((monitor, signal))
                if output is None or output.reason or value is None:
                    continue
                try:
                    output.value = cast(signal, value, output.type, output.array)
                except (CastError, ValueError, TypeError, OverflowError) as error:
                    self.counters["cast_errors"] += 1
                    self.outputs.fails(output, str(error))
                    continue
                outputs.append(output)
        return outputs

    def _request(self, requests: WriteRequests, outputs: Sequence[Output]) -> tuple[wire.Prepared, list[Output]]:
        """Return the request that writes outputs, and these without those whose value has no encoding."""
        left = list(outputs)
        while True:
            try:
                request = requests.write(left)
                break
            except CannotEncode as error:
                for output, why in error.outputs:
                    self.counters["cast_errors"] += 1
                    self.outputs.fails(output, why)
                    left.remove(output)
        self.counters["requests"] += bool(left)
        self.counters["values"] += len(left)
        self._sent_at = self._clock_s()
        return request, left

    async def _say(self, outputs: list[Output]) -> bool:
        """Write the last words; True when all of them were taken."""
        taken = True
        size = self.session.limit("write")
        requests = self._requests
        assert requests is not None
        for start in range(0, len(outputs), size):
            request, sent = self._request(requests, outputs[start : start + size])
            taken = taken and len(sent) == len(outputs[start : start + size])
            if sent:
                body = await wire.send_prepared(requests.client, request, self.session.timeout_s)
                taken = not any(code & 0x80000000 for code in wire.write_results(body)) and taken
        return taken

    def _send(self) -> None:
        """Send what waits: scores first, texts when no score waits; one request of each kind under way."""
        if not self._ready or self._stopping:
            return
        if self._fast and not self._flight.busy("fast"):
            ready, self._fast = self._within_limits("fast", self._fast, lambda one: len(one[1]))
            if ready:
                self.heartbeat += 1
                values = {monitor: signals | {"Heartbeat": self.heartbeat} for monitor, (_, signals) in ready.items()}
                self._post("fast", values, {monitor: source_ns for monitor, (source_ns, _) in ready.items()})
        if self._slow and (not self._fast or self.rules.limited) and not self._flight.busy("slow"):
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
        outputs = self._filled(values)
        if not outputs or self._requests is None:
            return
        if self.rules.dry_run:
            self.counters["dry"] += len(outputs)
            for output in outputs:
                output.shown = output.value
                self.outputs.written(output)
            return
        self._post_part(kind, outputs, 0, stamps, self._requests)

    def _post_part(
        self, kind: str, outputs: Sequence[Output], start: int, stamps: Mapping[str, int], requests: WriteRequests
    ) -> None:
        """Send as many of the filled outputs as the server takes at once, from `start` on."""
        part = outputs[start : start + self.session.limit("write")]
        request, sent = self._request(requests, part)
        if not sent:
            self._went(kind, outputs, start + len(part), stamps, requests, some=False)
            return
        self._flight.send(
            kind, "write", request, requests.client,
            lambda body: self._answered(kind, body, outputs, sent, start, start + len(part), stamps, requests))

    def _timed_out(self) -> None:
        self.counters["timeouts"] += 1

    def _answered(
        self, kind: str, body: Any, outputs: Sequence[Output], sent: Sequence[Output], start: int, stop: int,
        stamps: Mapping[str, int], requests: WriteRequests,
    ) -> None:
        """Take the results of one request, which wrote `sent` of outputs[start:stop]."""
        acknowledged_ns = self._utc_ns()
        try:
            results = wire.write_results(body)
        except UaError as refused:
            if too_much(refused) and len(sent) > 1:
                self.session.limits.refused("write", len(sent))
                self._post_part(kind, outputs, start, stamps, requests)
                return
            for output in sent:
                self.outputs.fails(output, type(refused).__name__)
            self.counters["failed_items"] += len(sent)
            results = []
        except Exception as broken:
            self.session.fail(f"the answer to a write cannot be decoded: {broken!r}", requests.client)
            return
        for output, code in zip(sent, results, strict=False):
            if code & 0x80000000:
                self.counters["failed_items"] += 1
                self.outputs.fails(output, wire.status_name(code))
            else:
                self.outputs.written(output)
        self._went(kind, outputs, stop, stamps, requests, some=bool(results), acknowledged_ns=acknowledged_ns)

    def _went(
        self, kind: str, outputs: Sequence[Output], stop: int, stamps: Mapping[str, int], requests: WriteRequests,
        *, some: bool, acknowledged_ns: int = 0,
    ) -> None:
        """Go on with the next part, or, after the last one, tell of the row and look at what waits.

        some : whether the last part got results
        """
        if stop < len(outputs):
            self._post_part(kind, outputs, stop, stamps, requests)
            return
        if some and self._on_ack is not None:
            for monitor, source_ns in stamps.items():
                if source_ns > 0:  # 0: an offer without a row, such as "no data", has no latency
                    self._on_ack(monitor, source_ns, acknowledged_ns)
        if self._stopping or not self._ready or not self._check.begin(
                kind, [one for one in outputs if not one.reason], requests, self._send):
            self._send()

    # --- heartbeat and repair ---

    def _beat(self) -> None:
        """Count the heartbeat up when no row has done it, and look after outputs that fail."""
        if not self._ready or self._stopping:
            return
        now = self._clock_s()
        if now - self._sent_at >= 0.9 * HEARTBEAT_S and not self._flight.busy("fast"):
            self.heartbeat += 1
            alive = {monitor: {"Heartbeat": self.heartbeat} for monitor in self.superseded if self.may_write(monitor)}
            self._post("fast", alive, {})
        due = self.outputs.due()
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
