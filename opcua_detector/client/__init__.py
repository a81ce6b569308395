"""OPC UA client: one session per server, rows of a group live, history, write-back, browse, checks.

    session = Session(server_config, on_state=...)      # nothing happens yet
    await session.open()                                # ServerUnreachable, AccessRefused; then kept alive
    findings = await check_tags(session, tags) + await check_outputs(session, {signal: node})
    raise_findings(findings)                            # NodeProblem with the first ones together
    record = await read_history(session, tags, start_ns, end_ns, period_ns, progress=lambda done, total: ...)
    feed = GroupFeed(group_config, {server_name: session}, on_frame)    # on_frame(frame): synchronous, reused
    await feed.start()
    back = WriteBack(session, {(monitor, signal): node}, on_ack=lambda monitor, source_ns, ack_utc_ns: ...)
    await session.attach(back)                          # nodes are looked up now and after each reconnect
    back.offer(monitor, verdict.source_ns, {"Score": .4, "LastUpdate": ns}, {"ExplanationText": ""})
    await back.stop({monitor: {"State": 0, "StateText": "stopped"}})
    await feed.stop()
    await session.close()

Everything runs on one event loop thread; `on_frame`, `on_ack` and `on_state` are called on it and must not
wait. What to show: `session.state`, `.reason`, `.counters`; `feed.counters()`, `.tag_states()`, `.revised()`;
`back.counters`, `.superseded[monitor]`, `.states()`. `Heartbeat` is counted by WriteBack itself. asyncio and
asyncua stay inside this package.
"""

from .browse import BrowsedNode, recent_values, walk
from .clock import ClockOffset, ClockWatch, measure_clock
from .doctor import Diagnosis, Examined, Mark, diagnosis_of, examine_server, finding_of
from .feed import GroupFeed
from .history import oldest_ns, read_history
from .measure import measure_group, measure_write
from .node_checks import Finding, check_outputs, check_tags, raise_findings
from .session import LinkState, Session
from .subscription import Item, Revised, Subscription
from .writeback import WriteBack

__all__ = [
    "BrowsedNode",
    "ClockOffset",
    "ClockWatch",
    "Diagnosis",
    "Examined",
    "Finding",
    "GroupFeed",
    "Item",
    "LinkState",
    "Mark",
    "Revised",
    "Session",
    "Subscription",
    "WriteBack",
    "check_outputs",
    "check_tags",
    "diagnosis_of",
    "examine_server",
    "finding_of",
    "measure_clock",
    "measure_group",
    "measure_write",
    "oldest_ns",
    "raise_findings",
    "read_history",
    "recent_values",
    "walk",
]
