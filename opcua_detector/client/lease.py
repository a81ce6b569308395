"""Two instances on the same outputs: a lease on a String node says which of them writes, the other one stands by.

OPC UA has no compare-and-swap, so a lease is claimed by writing, waiting and reading back: whose text the node holds
after the wait has it, and whoever finds another's text gives way. That leaves exactly one, since the last writer never
finds another's text. The text is `<name> <life> <count> <word>`: the name is kept over restarts, the life is new with
each process, the count grows with each renewal, the word is `claims`, `holds` or `released`.

Time is each instance's own monotonic clock, and nothing is compared between two machines. With the period P:

- The holder renews six times in P, and stops to write 2/3 P after it *sent* its last renewal that was acknowledged,
  whatever became of it: cut off, blocked, or frozen and woken up again.
- Another one claims when it has seen the text unchanged for P, and waits P/3 before it reads back.

So the old holder has stopped for at least P/3 when the new one begins: at no time do two of them write. Where an
acknowledged write of one reaches the server late (a stalled network), both may for as long as it takes the first to
read the other's text, that is one sixth of P.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from asyncua import Client, ua

from ..errors import DetectorError, NodeProblem
from . import wire
from .limits import in_batches
from .nodes import NodeRef, read_attributes, resolve
from .session import ENDING_S, LinkState, Session
from .waiting import end_tasks, within

log = logging.getLogger(__name__)

PERIOD_S = 2.0
RENEWALS = 6  # in a period
MOST_NUMBER = 2**31  # what is larger was never counted up to
HOLD_SHARE, SETTLE_SHARE = 2 / 3, 1 / 3  # of the period: see above
_TEXT = re.compile(r"(?P<name>\S{1,100}) (?P<life>[0-9a-f]{1,32}) (?P<count>\d{1,15}) (?P<word>claims|holds|released)")
_NAME = re.compile(r"[\w.\-]{1,100}")


class Role(StrEnum):
    """What an instance is for one lease."""

    STANDBY = "standby"
    CLAIMING = "claiming"
    HOLDER = "holder"


@dataclass(slots=True)
class Lease:
    """One lease as seen by one instance; pure, times are seconds of its own monotonic clock.

    name, life : of this instance
    other : name of the instance that has it, as far as known; empty: nobody, or this one
    """

    name: str
    life: str
    period_s: float = PERIOD_S
    role: Role = Role.STANDBY
    other: str = ""
    _text: str | None = None
    _changed_s: float = math.inf
    _until_s: float = -math.inf
    _claimed_s: float = math.inf
    _count: int = 0
    _had: bool = False
    _met: bool = False  # another instance was seen
    _asked_s: float = -math.inf

    def holds(self, now_s: float) -> bool:
        """Whether this instance may write now."""
        return self.role is Role.HOLDER and now_s < self._until_s

    def read(self, text: str, asked_s: float, now_s: float) -> str | None:
        """Take what the node says; return what is to be written to it now, None: nothing.

        asked_s : when the read was sent: the text is at least as new
        """
        # Who was not looking all the time cannot say that the holder had a chance to change the text.
        looked_away = asked_s - self._asked_s > self.period_s / 2
        if text != self._text or looked_away:
            self._text, self._changed_s = text, now_s
        self._asked_s = now_s
        found = _TEXT.fullmatch(text)
        mine = found is not None and found["life"] == self.life
        taken = found is not None and not mine and found["word"] != "released"
        self.other = found["name"] if found is not None and taken else ""
        if self.role is Role.HOLDER:
            if not taken and (asked_s < self._until_s or self._until_s == -math.inf):
                return self._say("holds")  # an emptied node, as after a restart of the server, is written again
            self.role = Role.STANDBY
        elif self.role is Role.CLAIMING:
            if mine and asked_s - self._claimed_s >= SETTLE_SHARE * self.period_s:
                self.role, self._had = Role.HOLDER, True  # and may write once this is acknowledged
                self._until_s = -math.inf
                return self._say("holds")
            if mine:
                return None
            self.role = Role.STANDBY
        if taken:
            self._had, self._met = False, True
        if asked_s - self._changed_s < self._patience_s(found):
            return None
        if found is not None:
            self._count = max(self._count, int(found["count"]))
        self.role, self._claimed_s = Role.CLAIMING, math.inf
        return self._say("claims")

    def written(self, sent_s: float, now_s: float) -> None:
        """Take that the server has acknowledged now what was sent then."""
        if self.role is Role.CLAIMING:
            self._claimed_s = now_s
        elif self.role is Role.HOLDER:
            self._until_s = max(self._until_s, sent_s + HOLD_SHARE * self.period_s)

    def refused(self) -> None:
        """Take that the node could not be written: what was held ends with its time."""
        if self.role is Role.CLAIMING:
            self.role = Role.STANDBY

    def released(self) -> str:
        """Return the last text of a holder."""
        self.role, self._until_s = Role.STANDBY, -math.inf
        return self._say("released")

    def _say(self, word: str) -> str:
        self._count += 1
        return f"{self.name} {self.life} {self._count} {word}"

    def _patience_s(self, found: re.Match[str] | None) -> float:
        """How long a text must stand before this instance claims.

        At once: its own text (the lease ran out), one that was released, or an empty node, unless another instance
        had it: that one is let go first. Half a period: an earlier life of itself. A period: everybody else.
        """
        if found is None:
            return self.period_s / 2 if self._met and not self._had else 0.0
        if found["word"] == "released" or found["life"] == self.life:
            return 0.0
        return self.period_s / 2 if found["name"] == self.name else self.period_s


def instance_name(store: Path, given: str = "") -> str:
    """Return the name of this instance: as configured, or made once and kept beside its store."""
    if given:
        return given
    file = store.with_name(store.name + ".instance")
    with suppress(OSError, UnicodeDecodeError):
        text = file.read_text(encoding="utf-8").strip()
        if _NAME.fullmatch(text):
            return text
    host = re.sub(r"[^\w.\-]", "-", socket.gethostname(), flags=re.ASCII)[:60] or "host"
    name = f"{host}-{secrets.token_hex(3)}"
    try:
        new = file.with_name(file.name + f".{os.getpid()}")
        new.write_text(name + "\n", encoding="utf-8")
        new.replace(file)
    except OSError as error:
        log.warning("the name of this instance cannot be kept in %s (%s): it is another one after a restart", file,
                    error.strerror)
    return name


@dataclass
class _Node:
    """The node of one lease on the present connection; `reason` says why there is none."""

    ref: NodeRef | None = None
    reason: str = ""


@dataclass
class LeaseKeeper:
    """A part of a session that keeps the leases of all monitors with outputs on it.

    nodes : monitor -> text of its lease node
    name : of this instance
    on_change : called with (monitor, role, name of the other instance) on the loop when a role changes
    numbers : monitor -> text of the node with the number of its last alert
    on_number : called with (monitor, number) on the loop each time that it was read while this instance did not write;
        it is read with the lease, so before the first own value the last one of the other instance is known

    Attributes
    ----------
    counters : gained, lost (leases), refused (renewals that the server did not take)
    """

    session: Session
    nodes: Mapping[str, str]
    name: str
    period_s: float = PERIOD_S
    on_change: Callable[[str, Role, str], None] | None = None
    numbers: Mapping[str, str] = field(default_factory=dict)
    on_number: Callable[[str, int], None] | None = None
    clock_s: Callable[[], float] = time.monotonic
    life: str = field(default_factory=lambda: secrets.token_hex(4))

    def __post_init__(self) -> None:
        self.leases = {monitor: Lease(self.name, self.life, self.period_s) for monitor in self.nodes}
        self.counters = {"gained": 0, "lost": 0, "refused": 0}
        self._at = {monitor: _Node() for monitor in self.nodes}
        self._number_at: dict[str, NodeRef] = {}
        self._told: dict[str, tuple[Role, str]] = {}
        self._task: asyncio.Task[None] | None = None

    def holds(self, monitor: str) -> bool:
        """Whether this instance may write the outputs of a monitor now."""
        lease = self.leases.get(monitor)
        return lease is None or lease.holds(self.clock_s())

    def role(self, monitor: str) -> Role:
        """Return what this instance is for a monitor now; a holder whose time is over stands by."""
        lease = self.leases[monitor]
        return Role.STANDBY if lease.role is Role.HOLDER and not self.holds(monitor) else lease.role

    def reason(self, monitor: str) -> str:
        """Return why the lease of a monitor cannot be kept; empty while it can."""
        return self._at[monitor].reason

    async def link_up(self) -> None:
        """Find the nodes on this connection and begin."""
        found = await resolve(self.session, [*self.nodes.values(), *self.numbers.values()])
        self._number_at = {monitor: ref for monitor, text in self.numbers.items()
                           if isinstance(ref := found[text], NodeRef)}
        for monitor, text in self.nodes.items():
            ref = found[text]
            at = self._at[monitor]
            at.ref = ref if isinstance(ref, NodeRef) else None
            self._reason(monitor, ref.what if isinstance(ref, NodeProblem) else "")
        with suppress(TimeoutError, OSError, ua.UaError):  # the session finds out whether the connection lives
            await self._turn()
        self._task = asyncio.create_task(self._keep(self.session.client), name=f"lease {self.session.config.name}")

    def link_down(self) -> None:
        """Forget the connection; what is held ends with its time."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        for at in self._at.values():
            at.ref = None

    async def stop(self) -> None:
        """Release what is held, so that the other instance need not wait."""
        task, self._task = self._task, None
        await end_tasks((task,), ENDING_S)
        held = {monitor: lease.released() for monitor, lease in self.leases.items() if self.holds(monitor)}
        if held and self.session.state is LinkState.CONNECTED:
            with suppress(Exception):
                await self._write(held)
        self.session.detach(self)

    async def _keep(self, client: Client) -> None:
        every_s = self.period_s / RENEWALS
        due = self.clock_s()
        while True:
            due = max(due + every_s, self.clock_s())
            await asyncio.sleep(max(0.0, due - self.clock_s()))
            try:
                if self.session.client is not client:
                    return
                await self._turn()
            except (DetectorError, TimeoutError, OSError, ua.UaError) as error:
                # The session finds out whether the connection lives.
                log.debug("%s: the leases could not be kept: %s", self.session.where, error)
                self.look()

    async def _turn(self) -> None:
        """Read all leases and numbers, and write the leases that ask for it."""
        refs = {monitor: at.ref for monitor, at in self._at.items() if at.ref is not None}
        if not refs:
            self.look()
            return
        asked_s = self.clock_s()
        others = {monitor: ref for monitor, ref in self._number_at.items()
                  if self.leases[monitor].role is not Role.HOLDER}
        wanted_of = [(ref.id, ua.AttributeIds.Value) for ref in (*refs.values(), *others.values())]
        values = await within(read_attributes(self.session, wanted_of), self.period_s)
        now_s = self.clock_s()
        for monitor, value in zip(others, values[len(refs):], strict=True):
            self._number(monitor, value)
        wanted: dict[str, str] = {}
        for monitor, value in zip(refs, values, strict=False):
            bad = value.StatusCode is not None and value.StatusCode.value & 0x80000000
            text = None if bad or value.Value is None else value.Value.Value
            if bad or not isinstance(text, str | None):
                self._reason(monitor, value.StatusCode.name if bad else "it is no String")
                continue
            said = self.leases[monitor].read(text or "", asked_s, now_s)
            if said is not None:
                wanted[monitor] = said
        self.look()
        if wanted:
            await self._write(wanted)
            self.look()

    def _number(self, monitor: str, value: Any) -> None:
        """Tell a number that was read; what a server holds before anybody wrote it may be anything."""
        bad = value.StatusCode is not None and value.StatusCode.value & 0x80000000
        content = None if bad or value.Value is None else value.Value.Value
        if isinstance(content, int | float) and 0 <= content < MOST_NUMBER and self.on_number is not None:
            self.on_number(monitor, int(content))

    async def _send(self, items: Sequence[tuple[NodeRef, str]]) -> Sequence[int]:
        """Write texts; return the StatusCode of each."""
        request = ua.WriteRequest()
        for ref, text in items:
            item: Any = ua.WriteValue()
            item.NodeId, item.AttributeId = ref.id, ua.AttributeIds.Value
            item.Value = ua.DataValue(ua.Variant(text, ua.VariantType.String), None)
            request.Parameters.NodesToWrite.append(item)
        return wire.write_results(await wire.send(self.session.client, request, self.period_s))

    async def _write(self, texts: Mapping[str, str]) -> None:
        chosen = [(monitor, ref, text) for monitor, text in texts.items()
                  if (ref := self._at[monitor].ref) is not None]
        sent_s = self.clock_s()
        try:
            codes = await within(in_batches(self.session, "write", [(ref, text) for _, ref, text in chosen], self._send,
                                            "write the leases"), self.period_s)
        except BaseException:
            for monitor, _, _ in chosen:
                self.leases[monitor].refused()
            raise
        for (monitor, _, _), code in zip(chosen, codes, strict=True):
            if code & 0x80000000:
                self.counters["refused"] += 1
                self.leases[monitor].refused()
                self._reason(monitor, wire.status_name(code))
            else:
                self.leases[monitor].written(sent_s, self.clock_s())
                self._reason(monitor, "")

    def _reason(self, monitor: str, reason: str) -> None:
        at = self._at[monitor]
        if reason and reason != at.reason:
            log.error("%s: monitor %s writes nothing: its lease (%s) cannot be kept: %s", self.session.where, monitor,
                      self.nodes[monitor], reason)
        at.reason = reason

    def look(self) -> None:
        """Tell roles that have changed, by the passing of time too."""
        for monitor, lease in self.leases.items():
            now = (self.role(monitor), lease.other)
            before = self._told.get(monitor)
            if now == before or now[0] is Role.CLAIMING:
                continue
            self._told[monitor] = now
            held = before is not None and before[0] is Role.HOLDER
            self.counters["gained"] += now[0] is Role.HOLDER
            self.counters["lost"] += held and now[0] is not Role.HOLDER
            if self.on_change is not None:
                self.on_change(monitor, *now)
