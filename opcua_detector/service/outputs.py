"""What a service writes: result nodes by server, who of several instances writes them, and what a server missed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..client import Finding, Session, WriteBack, raise_findings
from ..client.forward import EventsAway
from ..client.lease import LeaseKeeper, Role, instance_name
from ..client.write_rules import NO_RULES, WriteRules
from ..client.writeback import OUTSIDE
from ..config import Config, MonitorConfig, ServerConfig
from ..errors import ConfigError
from ..nodes import EVENTS_AWAY, INSECURE, LEASE
from ..store import AuditEntry, Event, Store

log = logging.getLogger(__name__)

EVENT_NO = "EventNo"
_BESIDE = (EVENTS_AWAY, INSECURE)  # written beside the results where the server has them


@dataclass(frozen=True)
class Writing:
    """How one server is written.

    lease_s : period of the lease on the outputs; 0: this instance alone writes
    name : of this instance; empty: made once and kept beside the store
    """

    rules: WriteRules = NO_RULES
    lease_s: float = 0.0
    name: str = ""


def writing_of(server: ServerConfig) -> Writing:
    """Return how the configuration wants a server to be written."""
    given = server.writing
    lease = given.lease
    return Writing(
        WriteRules(given.allow, given.dry_run, given.node_every / 1e9, given.values_per_s,
                   given.read_back / 1e9),
        lease.period / 1e9 if lease else 0.0, lease.name if lease else "")


class Outputs:
    """The outputs of all monitors of a service.

    Parameters
    ----------
    sessions : server -> its session; those that are open when `attach` is called are written
    store : called for the store, None while there is none
    write : False: nothing is written to any server
    writing : server -> how it is written, in place of what the configuration says
    on_ack : as that of `WriteBack`
    on_number : called with (monitor, number, taking over) when another instance's EventNo was read, and once more when
        this instance takes over, before it writes anything

    Attributes
    ----------
    backs, keepers : server -> its write-back, and its leases where there are any
    numbers : monitor -> EventNo that another instance wrote, as last read
    dropped : alerts of the time away that are told in the store only
    """

    def __init__(self, config: Config, config_file: Path, sessions: Mapping[str, Session],
                 store: Callable[[], Store | None], *, write: bool, writing: Mapping[str, Writing],
                 on_ack: Callable[[str, int], None], on_number: Callable[[str, int, bool], None]) -> None:
        self.config, self.config_file, self.write = config, config_file, write
        self.backs: dict[str, WriteBack] = {}
        self.keepers: dict[str, LeaseKeeper] = {}
        self.numbers: dict[str, int] = {}
        self.dropped = 0
        self._sessions, self._store, self._writing = sessions, store, dict(writing)
        self._on_ack, self._on_number = on_ack, on_number
        self._away: dict[str, EventsAway] = {}
        self._acked_ns: dict[str, int] = {}

    async def attach(self, monitors: Sequence[MonitorConfig]) -> None:
        """Begin to write the outputs of these monitors.

        Raises
        ------
        ConfigError
            A lease is asked for where there is no node for it.
        NodeProblem
            An output leads to a node outside the allow-list.
        """
        targets: dict[str, dict[tuple[str, str], str]] = {}
        for item in monitors:
            if item.outputs is not None and item.outputs.server in self._sessions:
                nodes = targets.setdefault(item.outputs.server, {})
                nodes |= {(item.name, signal): node for signal, node in item.outputs.node_of().items()}
        for server, nodes in targets.items():
            await self._attach_server(server, nodes)

    async def _attach_server(self, server: str, nodes: dict[tuple[str, str], str]) -> None:
        session, writing = self._sessions[server], self._writing.get(server) or writing_of(self.config.server(server))
        bases = {name: outputs.base for name in dict.fromkeys(name for name, _ in nodes)
                 if (outputs := self.config.monitor(name).outputs) is not None}
        rules = writing.rules if self.write else replace(writing.rules, dry_run=True)
        keeper = None
        if writing.lease_s > 0 and not rules.dry_run:
            keeper = self._lease(server, bases, nodes, writing)
            await session.attach(keeper)
            raise_findings([
                Finding(f"{self.config_file}: monitors.{name}.outputs.base", f"no lease can be kept there: {why}",
                        "import the result nodes of this version into the server, or take the lease away")
                for name in bases if (why := keeper.reason(name))])
        back = WriteBack(session, nodes, optional=dict(_beside(bases, rules)), on_ack=self._acknowledged, rules=rules,
                         leases=keeper)
        self.backs[server] = back
        for name in bases:
            self._away[name] = EventsAway(most_age_ns=self.config.store.forward)
        await session.attach(back)
        if self.write:
            raise_findings([
                Finding(f"{self.config_file}: monitors.{monitor}.outputs.{signal}", reason,
                        "correct the output, or add the node to writing.allow of the server")
                for (monitor, signal), reason in back.states().items() if reason.endswith(OUTSIDE)])

    def of(self, item: MonitorConfig) -> WriteBack | None:
        """Return what writes the outputs of a monitor, None where it has none or they are not written."""
        return self.backs.get(item.outputs.server) if item.outputs else None

    # --- several instances -----------------------------------------------------------------------------------------

    def _lease(self, server: str, bases: Mapping[str, str], nodes: Mapping[tuple[str, str], str],
               writing: Writing) -> LeaseKeeper:
        for name, base in bases.items():
            if not base:
                raise ConfigError("a lease needs the result node Lease", file=str(self.config_file),
                                  key=f"monitors.{name}.outputs.base", next_step="give base, or take the lease away")
        keeper = LeaseKeeper(self._sessions[server], {name: f"{base}.{LEASE}" for name, base in bases.items()},
                             instance_name(self.config.store.path, writing.name), writing.lease_s,
                             on_change=self._role_changed, on_number=self._number_read,
                             numbers={name: node for (name, signal), node in nodes.items() if signal == EVENT_NO})
        self.keepers[server] = keeper
        return keeper

    def _number_read(self, monitor: str, number: int) -> None:
        self.numbers[monitor] = number
        self._on_number(monitor, number, False)

    def _role_changed(self, monitor: str, role: Role, other: str) -> None:
        """Another instance writes from now on, or this one does."""
        outputs, store = self.config.monitor(monitor).outputs, self._store()
        assert outputs is not None
        who = f", {other} writes" if other else ""
        log.warning("monitor %s: %s%s", monitor, "writes its outputs" if role is Role.HOLDER else "standby", who)
        if store is not None:
            store.record_audit(AuditEntry("service", "lease", {
                "monitor": monitor, "role": role.value, "other": other}), timeout_s=None)
        if role is Role.HOLDER and outputs.server in self.backs:
            self._on_number(monitor, self.numbers.get(monitor, 0), True)
            self.backs[outputs.server].resume(monitor)

    def look(self) -> None:
        """Look at the time: a lease may have run out."""
        for keeper in self.keepers.values():
            keeper.look()

    # --- what a server missed --------------------------------------------------------------------------------------

    def note(self, event: Event, now_ns: int) -> None:
        """Keep an event of a monitor for a server that is away."""
        away = self._away.get(event.monitor)
        if away is not None:
            away.note(event.event_no, event.raised_ns, event.cleared_ns, event.sentence, now_ns)

    def link(self, server: str, connected: bool) -> None:
        """Take a change of a connection: tell a server that is back what it missed."""
        now = time.time_ns()
        for name, away in self._away.items():
            outputs = self.config.monitor(name).outputs
            if outputs is None or outputs.server != server:
                continue
            if not connected:
                away.begin(self._acked_ns.get(name, now))
            elif text := away.end(now):
                self.backs[server].tell(name, {EVENTS_AWAY: text})
        dropped = sum(away.dropped for away in self._away.values())
        if dropped > self.dropped:
            log.warning("server %s: %d alerts of the time away are told in the store only", server,
                        dropped - self.dropped)
            self.dropped = dropped

    def _acknowledged(self, monitor: str, source_ns: int, ack_utc_ns: int) -> None:
        self._acked_ns[monitor] = ack_utc_ns
        self._on_ack(monitor, ack_utc_ns - source_ns)


def _beside(bases: Mapping[str, str], rules: WriteRules) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield (monitor, signal), node of what is written beside the results.

    An allow-list that was written before there was such a node is no reason not to start.
    """
    for name, base in bases.items():
        for signal in _BESIDE:
            node = f"{base}.{signal}"
            if base and (not node.startswith("nsu=") or rules.allows(node)):
                yield (name, signal), node
