"""Measures what a server really delivers: sampling, jitter, delay, losses and round trips of groups, and a write.

The subscription is the product's own, with the intervals and the rule of time that the service would use, so what is
measured is what the service would get.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from asyncua import ua
from numpy.typing import NDArray

from ..api import Frame, Tag
from ..config import GroupConfig
from ..errors import NodeProblem
from . import wire
from .doctor import Examined, Mark, interval
from .feed import GroupFeed
from .nodes import NodeRef, read_attributes, resolve
from .session import Session
from .subscription import Item, Subscription

LEAST_PERIODS, MOST_S = 20, 30.0  # so many periods are watched at least, but no longer than this
READS = 20
WRITES = 10
SLOWER = 1.5  # times the period: a tag that changes so much more slowly is told
LATE_KEEP_ALIVE_S = 10.0
_ROUNDING = 1.01
_LEFT_OUT = 0.05  # of the polls, since an answer was slow: so many are told


@dataclass(slots=True)
class _Stream:
    """What came of one group from one server: (arrival on our clock, ns; columns; source stamps)."""

    arrived: list[tuple[int, NDArray[np.int32], NDArray[np.int64]]] = field(default_factory=list)

    def by_column(self, n: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Return (source stamps, arrivals) of each column, in the order of arrival."""
        nothing = np.zeros(0, np.int64)
        columns = np.concatenate([nothing, *(one[1] for one in self.arrived)])
        source = np.concatenate([nothing, *(one[2] for one in self.arrived)])
        arrived = np.concatenate([nothing, *(np.full(len(one[1]), one[0]) for one in self.arrived)])
        order = np.argsort(columns, kind="stable")
        ends = np.searchsorted(columns[order], np.arange(1, n))
        return list(zip(np.split(source[order], ends), np.split(arrived[order], ends), strict=True))


class _Watched(Subscription):
    """A subscription that keeps what it asked for."""

    asked_items: list[Any]
    asked: Any

    async def _exchange(self, request: Any, answer: type) -> Any:
        if answer is ua.CreateSubscriptionResponse:
            self.asked, self.asked_items = request.Parameters, []
        elif answer is ua.CreateMonitoredItemsResponse:
            self.asked_items += [one.RequestedParameters for one in request.Parameters.ItemsToCreate]
        return await super()._exchange(request, answer)


async def measure_group(group: GroupConfig, sessions: Mapping[str, Session], seconds: float,
                        offsets: Mapping[str, float]) -> Examined:
    """Subscribe to a group as the service does, watch it for a while, and say what came.

    Parameters
    ----------
    sessions : server -> open session; a group of which a server is missing is left out
    seconds : how long to watch; a slow group is watched for some periods
    offsets : server -> clock of the server less ours, seconds, taken off the delays

    Raises
    ------
    ConnectionProblem
        The connection was lost meanwhile.
    """
    told = Examined()
    rows = 0

    def on_frame(frame: Frame) -> None:
        nonlocal rows
        rows += 1

    feed = GroupFeed(group, sessions, on_frame)
    streams: dict[str, _Stream] = {}
    watched: dict[str, _Watched] = {}
    for server, one in feed.subscriptions.items():
        streams[server] = stream = _Stream()
        watched[server] = _watch(one, group, feed, stream)
    span_s = min(max(seconds, LEAST_PERIODS * group.period / 1e9), max(seconds, MOST_S))
    try:
        for part in watched.values():
            await part.session.attach(part)
        began = time.monotonic()
        await asyncio.sleep(span_s)
        span_s = time.monotonic() - began
        counts = _counts(feed, watched.values(), rows)
        for server, part in watched.items():  # while they are attached: afterwards they know nothing any more
            where, offset_s = f"group {group.name} on {server}", offsets.get(server, 0.0)
            told.facts[server] = _revised(told, where, group, part) | _rates(
                told, where, group, part, streams[server], offset_s, span_s)
    finally:
        for part in watched.values():
            part.session.detach(part)
    for server, part in watched.items():
        nodes = [item.node for item in part.items]
        told.facts[server]["read_ms"] = await _read_round_trip(
            told, f"group {group.name} on {server}", part.session, nodes, group)
    _rows(told, f"group {group.name}", group, counts, rows, span_s)
    told.facts["counters"] = counts
    return told


def _counts(feed: GroupFeed, parts: Iterable[_Watched], rows: int) -> dict[str, int]:
    """Return the counters of the rule of time and of the subscriptions, added up."""
    counts = feed.counters() | {"rows": rows}
    for part in parts:
        for name, n in part.counters.items():
            counts[name] = counts.get(name, 0) + n
        counts["lost"] += part.counters["lost_notifications"]
    return counts


def _watch(one: Subscription, group: GroupConfig, feed: GroupFeed, stream: _Stream) -> _Watched:
    """Return a watched twin of a subscription of the feed, whose samples go on into the feed."""
    def on_samples(column: NDArray[np.int32], source_ns: NDArray[np.int64], value: NDArray[np.float64],
                   status: NDArray[np.uint32]) -> None:
        stream.arrived.append((time.time_ns(), column.copy(), source_ns.copy()))
        feed._samples(column, source_ns, value, status)

    return _Watched(one.session, [Item(item.name, item.node, item.column, text=item.text, element=item.element)
                                  for item in one.items],
                    sampling_ns=group.sampling_ns, publishing_ns=group.publishing_ns, on_samples=on_samples,
                    on_resting=feed._rested, on_hole=feed._hole, on_lost=lambda: None, on_idle=feed._idle,
                    keep_alive_s=one._keep_alive_s, poll_ns=group.poll_ns, fallback_poll_ns=group.fallback_poll_ns,
                    period_ns=group.period if group.poll_ns is not None else None)


# --- requested against revised ---


def _revised(told: Examined, where: str, group: GroupConfig, part: _Watched) -> dict[str, Any]:
    """Hold what the server made of the request against the request."""
    working = [item for item in part.items if not item.reason]
    for item in part.items:
        if item.reason:
            told.problem(where, "tag", f"{item.name} ({item.node}) delivers nothing: {item.reason}",
                     "see with 'opcua-detector browse' whether the node is there")
    if group.poll_ns is not None:
        return _polled(told, where, group.poll_ns / 1e6, part)
    got, asked = part.revised, part.asked
    sampling = max((item.revised_sampling_ms for item in working), default=math.nan)
    queue = min((item.revised_queue for item in working), default=0)
    asked_sampling = part.asked_items[0].SamplingInterval if part.asked_items else math.nan
    asked_queue = part.asked_items[0].QueueSize if part.asked_items else 0
    period_ms = group.period / 1e6
    if working:
        text = f"asked {_ms(asked_sampling)}, revised {_ms(sampling)}"
        if sampling <= asked_sampling * _ROUNDING or (asked_sampling == 0 and sampling <= period_ms):
            told.ok(where, "sampling", text)
        else:
            told.add(where, "sampling", Mark.PROBLEM if sampling >= 2 * period_ms else Mark.WARNING,
                     f"{text}; the period is {_ms(period_ms)}",
                     f"let the server sample faster, or set 'period: {math.ceil(2 * sampling)} ms' and fit again")
    asked_publishing = asked.RequestedPublishingInterval
    slow = got.publishing_ms > asked_publishing * _ROUNDING
    told.add(where, "publishing", Mark.WARNING if slow else Mark.OK,
             f"asked {_ms(asked_publishing)}, revised {_ms(got.publishing_ms)}",
             "scores come later by the difference; lower the floor at the server if that matters, or have the tags "
             f"read: 'sampling: poll {max(1.0, period_ms / 10):g} ms'" if slow else "")
    alive_s = got.keep_alive_count * got.publishing_ms / 1e3
    late = alive_s > LATE_KEEP_ALIVE_S
    told.add(where, "keep-alive", Mark.WARNING if late else Mark.OK,
             f"every {interval(alive_s)} (asked {asked.RequestedMaxKeepAliveCount} publishing intervals, revised "
             f"{got.keep_alive_count}), lifetime {interval(got.lifetime_count * got.publishing_ms / 1e3)}",
             "a lost subscription is noticed no sooner; lower the least keep-alive count at the server" if late else "")
    if working:
        needed = math.ceil(got.publishing_ms / sampling) + 1 if sampling > 0 else 2
        short = queue < needed
        told.add(where, "queue", Mark.PROBLEM if short else Mark.OK, f"asked {asked_queue}, revised {queue}, at least "
                 f"{needed} needed between two notifications",
                 "values are lost: raise the server's queue limit, or sample more slowly" if short else "")
    return {"sampling_ms": {"asked": asked_sampling, "revised": sampling},
            "publishing_ms": {"asked": asked_publishing, "revised": got.publishing_ms},
            "keep_alive": {"asked": asked.RequestedMaxKeepAliveCount, "revised": got.keep_alive_count},
            "lifetime": {"asked": asked.RequestedLifetimeCount, "revised": got.lifetime_count},
            "queue": {"asked": asked_queue, "revised": queue}}


def _polled(told: Examined, where: str, every_ms: float, part: _Watched) -> dict[str, Any]:
    """Say whether the server answers the polls as fast as they were asked for."""
    polls, overruns = part.counts["polls"], part.counts["poll_overruns"]
    slow = overruns > polls * _LEFT_OUT
    told.add(where, "polls", Mark.WARNING if slow else Mark.OK,
             f"read every {_ms(every_ms)} instead of monitored, as configured: {polls} answers, {overruns} polls left "
             f"out, {part.counts['poll_holes']} holes in which changes may have been missed",
             "an answer takes longer than that: poll less often, or leave 'sampling' out to have changes reported"
             if slow else "")
    return {"polls": {"every_ms": every_ms, "answers": polls, "left_out": overruns,
                      "holes": part.counts["poll_holes"]}}


# --- what came ---


@dataclass(frozen=True, slots=True)
class _Rate:
    """What one tag did: values, their usual distance, how far 95 % of the distances are from it, the delay (ms)."""

    values: int
    interval_ms: float
    jitter_ms: float
    delay_ms: float


def _rates(told: Examined, where: str, group: GroupConfig, part: _Watched, stream: _Stream, offset_s: float,
           span_s: float) -> dict[str, Any]:
    """Say how fast, how evenly and how late the tags of one server come."""
    mine = stream.by_column(len(group.tags))
    found = {item.name: _rate(*mine[item.column], offset_s) for item in part.items if not item.reason}
    tags = {tag.name: tag.tag() for tag in group.tags}
    moving = [rate for rate in found.values() if rate.values > 2]
    if moving:
        usual = float(np.median([rate.interval_ms for rate in moving]))
        jitter, worst = (float(of([rate.jitter_ms for rate in moving])) for of in (np.median, np.max))
        delay = float(np.median([rate.delay_ms for rate in moving]))
        told.ok(where, "rate", f"a value every {_ms(usual)} ({1e3 / usual:.4g} Hz), jitter {_ms(jitter)} (worst tag "
                f"{_ms(worst)}), {_ms(delay)} from source to here")
        if worst > group.period / 2e6:
            told.warning(where, "jitter", f"the stamps of a tag stray by {_ms(worst)} from its rhythm, half of the "
                         f"period is {_ms(group.period / 2e6)}",
                         "rows then hold or skip values: set a longer period, or 'lateness' above the jitter")
    _slow_and_still(told, where, group, found, tags, span_s)
    if part.counters.get("null_timestamp"):
        told.warning(where, "timestamps", f"{part.counters['null_timestamp']} values without a "
                     "SourceTimestamp", "the ServerTimestamp is taken; switch source timestamps on at the server")
    if part.counters.get("overload"):
        told.problem(where, "overload", f"{part.counters['overload']} values with GoodOverload: the server "
                 "samples more slowly than it said", "ask for fewer tags or a longer sampling interval")
    return {"tags": {name: {"values": rate.values, "interval_ms": rate.interval_ms, "jitter_ms": rate.jitter_ms,
                            "delay_ms": rate.delay_ms} for name, rate in found.items()}}


def _rate(source: NDArray[np.int64], arrived: NDArray[np.int64], offset_s: float) -> _Rate:
    """Return what the values of one tag did: stamps and arrivals int64[m], in the order of arrival."""
    n = len(source)
    # The first value was set before the subscription began: neither its distance nor its delay tells anything.
    steps = np.diff(np.unique(source[1:])).astype(np.float64) / 1e6
    delay = float(np.median(arrived[1:] - source[1:]) / 1e6 + offset_s * 1e3) if n > 1 else math.nan
    if not len(steps):
        return _Rate(n, math.nan, math.nan, delay)
    usual = float(np.median(steps))
    return _Rate(n, usual, float(np.quantile(np.abs(steps - usual), 0.95)), delay)


def _slow_and_still(told: Examined, where: str, group: GroupConfig, found: Mapping[str, _Rate], tags: Mapping[str, Tag],
                    span_s: float) -> None:
    period_ms = group.period / 1e6
    still = [name for name, rate in found.items() if tags[name].judged and rate.values < 2]
    slow = {name: rate.interval_ms for name, rate in found.items()
            if tags[name].judged and rate.values > 2 and rate.interval_ms > SLOWER * period_ms}
    hold_s = group.max_hold * group.period / 1e9
    if still and span_s > hold_s:
        told.warning(where, "still", f"no change within {interval(span_s)}: {_some(still)}; after "
                 f"{interval(hold_s)} without a value they are masked",
                 "raise 'max_hold' above the longest rest of these tags, or leave them out")
    if slow:
        worst = max(slow.values())
        told.warning(where, "slow tags", f"{_some(list(slow))}: a value every {_ms(worst)} at most, the "
                     f"period is {_ms(period_ms)}", "put them into a group of their own, or lengthen the period: "
                     "held values cost detection")


def _rows(told: Examined, where: str, group: GroupConfig, counts: Mapping[str, int], rows: int, span_s: float) -> None:
    expected = span_s * 1e9 / group.period
    lost = counts.get("lost", 0)
    gaps = max(0, counts.get("gaps", 0) - 1)  # the first row always is one
    text = (f"{rows} rows in {interval(span_s)} ({expected:.0f} periods), {lost} samples lost, "
            f"{counts.get('late', 0)} late, {counts.get('duplicate', 0)} duplicate, {gaps} gaps")
    bad = counts.get("bad", 0)
    if not rows:
        told.problem(where, "rows", f"{text}: nothing could be scored",
                 "see whether the tags change at all, and the findings on them")
    elif lost or gaps or counts.get("late", 0) > 0.01 * max(1, counts.get("delivered", 0)):
        told.warning(where, "rows", text, "see sampling, queue and jitter above; 'lateness' lets rows wait longer")
    else:
        told.ok(where, "rows", text)
    if bad:
        told.warning(where, "quality", f"{bad} of {counts.get('delivered', 0)} values are Bad",
                 "look after the sensors named above, or leave the tags out; they are masked until then")


async def _read_round_trip(told: Examined, where: str, session: Session, nodes: Sequence[str],
                           group: GroupConfig) -> dict[str, float]:
    """Read all tags of the group some times, as polling would."""
    found = await resolve(session, nodes)
    wanted = [(ref.id, ua.AttributeIds.Value) for ref in found.values() if isinstance(ref, NodeRef)]
    if not wanted:
        return {}
    took = []
    for _ in range(READS):
        began = time.perf_counter()
        await read_attributes(session, wanted)
        took.append(time.perf_counter() - began)
    median, worst = float(np.median(took)), max(took)
    slow = median > group.period / 1e9
    told.add(where, "read", Mark.WARNING if slow else Mark.OK,
             f"all {len(wanted)} tags: median {interval(median)}, longest {interval(worst)} of {READS}",
             "a write of the results takes about as long, so that not every row's result gets there: mend the network, "
             "or set a longer period" if slow else "")
    return {"median": median * 1e3, "longest": worst * 1e3, "tags": len(wanted)}


# --- writing ---

# Which signal is written back to itself: what changes with every row anyway and decides nothing.
_HARMLESS = ("Heartbeat", "LatencyMs", "LostSamples", "LastUpdateText", "Score")


async def measure_write(session: Session, monitor: str, nodes: Mapping[str, str]) -> Examined:
    """Write the present value of one output node back to it some times, and say how long that takes.

    nodes : signal -> node; outputs of the monitor that the configuration allows; nothing else is ever written

    Raises
    ------
    ConnectionProblem
        The connection was lost meanwhile.
    """
    told = Examined()
    where = f"monitor {monitor} on {session.config.name}"
    signal = next((one for one in _HARMLESS if one in nodes), "")
    if not signal:
        told.ok(where, "write", f"not measured: none of {', '.join(_HARMLESS)} is among the outputs")
        return told
    ref = (await resolve(session, [nodes[signal]]))[nodes[signal]]
    if isinstance(ref, NodeProblem):
        told.problem(where, "write", f"{signal}: {ref.what}", ref.next_step)
        return told
    (before,) = await read_attributes(session, [(ref.id, ua.AttributeIds.Value)])
    if before.Value is None or before.Value.Value is None:
        told.ok(where, "write", f"not measured: {signal} has no value yet that could be written back")
        return told
    took, code = [], 0
    for _ in range(WRITES):
        began = time.perf_counter()
        (code,) = await session.call(_write(session, ref, before.Value), f"write {signal}")
        took.append(time.perf_counter() - began)
        if code & 0x80000000:
            told.problem(where, "write", f"{signal} ({nodes[signal]}): {wire.status_name(code)}",
                     "give this user write access on the server; the value is written without status and timestamps")
            return told
    median = float(np.median(took))
    told.facts = {"signal": signal, "median_ms": median * 1e3, "longest_ms": max(took) * 1e3}
    told.ok(where, "write", f"{signal}, its present value: median {interval(median)}, longest "
             f"{interval(max(took))} of {WRITES}")
    return told


async def _write(session: Session, ref: NodeRef, value: Any) -> list[int]:
    item: Any = ua.WriteValue()
    item.NodeId, item.AttributeId = ref.id, ua.AttributeIds.Value
    item.Value = ua.DataValue(value, None)
    request = ua.WriteRequest()
    request.Parameters.NodesToWrite = [item]
    return wire.write_results(await wire.send(session.client, request, session.timeout_s))


def _ms(value: float) -> str:
    return "-" if math.isnan(value) else interval(value / 1e3)


def _some(names: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
