"""Reads the historian: raw values of several tags, page by page, as rows by the rule of time.

Source: OPC UA Part 11, 6.5.3 (ReadRawModified). A page ends with a continuation point. Where there is none,
the server is asked again from the last stamp, and a tag is done only when that brings nothing new: servers
take NumValuesPerNode for one response or for all its pages together, or end early by a limit of their own, so
that the number of values tells nothing about the end.

A tag that is an element of an array (`index` in the configuration) is picked out of each historical value: history
delivers whole arrays, and an IndexRange of one is not asked for, for the reasons in `arrays`. A node is read once for
all the tags that it holds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from asyncua import ua

from ..api import Record, Tag, TagKind
from ..errors import ConnectionProblem, NodeProblem, RecordError
from ..frames import iso_utc, rows_from_samples
from . import wire
from .limits import too_much
from .nodes import NodeRef, read_facts, resolve
from .session import Session
from .waiting import within
from .wire_history import SCALAR, HistoryPage, decode_history

Progress = Callable[[int, int], None]
PAGE_VALUES = 40_000  # values in one response over all its nodes, each element of an array for itself
_LEAST_PAGE = 1000  # values of each node, so that a page is worth its round trip
_EMPTY_PAGES = 1000  # in a row: a server may give up a page for lack of time, but not for ever
_PATIENCE = 10  # a page may take this many time-outs: historians read from disk
_TYPE_MISMATCH = np.uint32(ua.StatusCodes.BadTypeMismatch)
_NO_INDEX: Mapping[str, int] = MappingProxyType({})
_RECORD = "collect rows with 'opcua-detector record', then fit with --recording"
_STEPS = {
    "BadHistoryOperationUnsupported": f"the server keeps no history of this tag: {_RECORD}",
    "BadHistoryOperationInvalid": f"the server does not take this kind of history read: {_RECORD}",
    "BadServiceUnsupported": f"the server has no history at all: {_RECORD}",
    "BadUserAccessDenied": "give the user the right to read history",
    "BadNotReadable": "give the user the right to read history",
    "BadNodeIdUnknown": "copy the NodeId from 'opcua-detector browse'",
}


class _Cursor:
    """Where the reading of one node stands.

    elements : places in its array that are read, or `SCALAR`
    width : elements of the array as it is now, 1 for a scalar: what a value costs in a response
    start_ns : of the request by time, which its continuations repeat
    reached_ns : newest stamp that was read
    by_source : the server keeps its values by the stamp of the source; at first it may be by its own, where a
        source clock that is ahead would skip values: then asking on begins at the earlier of the two
    """

    def __init__(self, ref: NodeRef, start_ns: int, elements: Sequence[int] = SCALAR) -> None:
        self.ref = ref
        self.elements = tuple(elements)
        self.width = 1
        self.start_ns = self.reached_ns = start_ns
        self.point: bytes | None = None
        self.done = self.by_source = False
        self.empty_pages = 0
        self.parts: list[tuple[wire.Samples, ...]] = []  # of each page, by element
        self.server_ns = wire.NO_STAMP  # newest stamp of the server
        self.read = self.new = 0  # values since the request by time, and those that were not known before
        self.chain = 0  # the first of `parts` since the request by time
        self.known = np.empty(0, np.int64)  # stamps that the request by time brings once more

    def take(self, page: HistoryPage) -> int:
        """Keep what is new of a page; return how much it was."""
        samples = (page.samples, *page.further)
        stamps = _stamps(page.samples)
        self.read += len(stamps)
        if len(self.known):
            fresh = ~np.isin(stamps, self.known)
            samples, stamps = tuple(_where(one, fresh) for one in samples), stamps[fresh]
        for one in samples:
            one.raw = b""  # the whole message, of which an array takes far more than the elements that are kept
        if len(stamps):
            self.parts.append(samples)
            self.new += len(stamps)
            self.reached_ns = max(self.reached_ns, int(stamps.max()))
        return len(stamps)

    def ended(self, end_ns: int) -> None:
        """Take the end of the continuation: done when it brought nothing new, else ask on by time."""
        if self.new == 0 and self.start_ns < self.reached_ns:
            self.start_ns, self.by_source = self.reached_ns, True
        elif self.new == 0:
            # Many known values and no new one: a source clock far behind the server's; go on by the latter.
            self.done = self.read <= 1 or not self.start_ns < self.server_ns < end_ns
            self.start_ns = max(self.start_ns, self.server_ns)
        else:
            chain = self.parts[self.chain :]
            stamps = np.concatenate([_stamps(one) for one, *_ in chain])
            server = np.concatenate([one.server_ns for one, *_ in chain])
            start = self.reached_ns
            self.server_ns = max(self.server_ns, int(server.max()))
            if not self.by_source and self.server_ns != wire.NO_STAMP:
                start = min(start, self.server_ns)
            self.start_ns = max(self.start_ns, start)
            again = np.maximum(stamps, server) >= self.start_ns // 1000 * 1000  # asked in whole microseconds
            self.known = np.union1d(self.known, stamps[again])
        self.done = self.done or self.start_ns >= end_ns
        self.read, self.new, self.chain = 0, 0, len(self.parts)


async def read_history(
    source: Session | Sequence[Session],
    tags: Sequence[Tag],
    start_ns: int,
    end_ns: int,
    period_ns: int,
    *,
    indexes: Mapping[str, int] = _NO_INDEX,
    lateness_ns: int | None = None,
    max_hold: int = 20,
    progress: Progress | None = None,
    counts: dict[str, int] | None = None,
) -> Record:
    """Return the rows of these tags in [start_ns, end_ns) from the history of their server, or of their servers.

    source : the session whose history has them, or that of each tag, in the order of the tags; tags of several servers
        become rows by their SourceTimestamps, as they do live
    indexes : name of a tag -> its place in the array that its node is; what an array does not have is masked
    progress : called with (rows done, rows expected) after each page
    counts : filled with the counters of the rule of time when given, and with `expected`, the rows that the
        range has room for, and `missing`, how many of them the history does not give (a range that ends now
        misses the few that are not stored yet)

    Raises NodeProblem where a tag is not found or has no history, RecordError where there is nothing in the
    range.
    """
    sources = [source] * len(tags) if isinstance(source, Session) else source
    rows = max(1, (end_ns - start_ns) // period_ns)
    told = None if progress is None else (
        lambda reached_ns: progress(int(min(rows, max(0, reached_ns - start_ns) // period_ns)), int(rows)))
    samples = await read_tags(sources, tags, start_ns, end_ns, told, indexes=indexes)
    found: dict[str, int] = {}
    record = rows_of_samples(
        tags, samples, (start_ns, end_ns), period_ns, lateness_ns=lateness_ns, max_hold=max_hold, counts=found,
        where=[one.where for one in sources],
    )
    if counts is not None:
        counts.update(found)
        counts["expected"] = int(rows)
        counts["missing"] = max(0, int(rows) - len(record))
    if progress is not None:
        progress(int(rows), int(rows))
    return record


async def read_tags(
    sources: Sequence[Session],
    tags: Sequence[Tag],
    start_ns: int,
    end_ns: int,
    progress: Callable[[int], None] | None = None,
    *,
    indexes: Mapping[str, int] = _NO_INDEX,
) -> list[wire.Samples]:
    """Return the raw samples of each tag in [start_ns, end_ns), read from all servers at once.

    sources : of each tag, in the order of the tags, the session whose history has it; progress, indexes : as
        `read_history`, progress gets the time that all of them have reached

    Raises what `read_samples` does, of the first server that fails; the others are not read on then.
    """
    of: dict[Session, list[int]] = {}
    for k, session in enumerate(sources):
        of.setdefault(session, []).append(k)
    reached = dict.fromkeys(of, start_ns)

    def told(session: Session, reached_ns: int) -> None:
        reached[session] = reached_ns
        if progress is not None:
            progress(min(reached.values()))

    async def read(session: Session, chosen: Sequence[int]) -> list[wire.Samples]:
        return await read_samples(
            session, [tags[k].node for k in chosen], start_ns, end_ns, lambda reached_ns: told(session, reached_ns),
            elements=[indexes.get(tags[k].name, -1) for k in chosen],
        )

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(read(*one), name="history") for one in of.items()]
    except BaseExceptionGroup as problems:
        raise problems.exceptions[0] from None
    found: dict[int, wire.Samples] = {}
    for chosen, task in zip(of.values(), tasks, strict=True):
        found |= dict(zip(chosen, task.result(), strict=True))
    return [found[k] for k in range(len(tags))]


def rows_of_samples(
    tags: Sequence[Tag],
    samples: Sequence[wire.Samples],
    span_ns: tuple[int, int],
    period_ns: int,
    *,
    lateness_ns: int | None = None,
    max_hold: int = 20,
    counts: dict[str, int] | None = None,
    where: Sequence[str] = (),
) -> Record:
    """Return the rows of raw samples by the rule of time, whichever servers they were read from.

    samples : of each tag, in the order of the tags, as `read_samples` gives them
    span_ns : [start, end) that was asked for, and where : of whom, for each tag, for the error
    counts : filled when given with the counters of the rule of time, and with `not_numeric`, the texts of tags that
        are numbers: they are masked, as they are live

    Raises RecordError where a tag has no sample.
    """
    empty = [k for k, one in enumerate(samples) if len(one.source_ns) == 0]
    if empty:
        raise RecordError(
            f"no history of {', '.join(tags[k].name for k in empty)} from {iso_utc(span_ns[0])} to "
            f"{iso_utc(span_ns[1])}",
            where=", ".join(dict.fromkeys(where[k] for k in empty if where)),
            next_step="choose a time range that the historian has",
        )
    index = np.repeat(np.arange(len(tags), dtype=np.int32), [len(one.source_ns) for one in samples])
    stamps = np.concatenate([one.source_ns for one in samples])
    server = np.concatenate([one.server_ns for one in samples])
    value = np.concatenate([one.value for one in samples])
    status = np.concatenate([one.status for one in samples])
    text = np.concatenate([_texts(one) if tag.kind is not TagKind.STATE else np.zeros(len(one.value), np.bool_)
                           for tag, one in zip(tags, samples, strict=True)])
    if text.any():
        value, status = np.where(text, np.nan, value), np.where(text, _TYPE_MISMATCH, status).astype(np.uint32)
    null = stamps == wire.NO_STAMP
    stamps = np.where(null, server, stamps)
    known = stamps != wire.NO_STAMP
    found: dict[str, int] = {}
    record = rows_from_samples(
        tags,
        period_ns,
        index[known],
        stamps[known],
        value[known],
        status[known],
        lateness_ns=lateness_ns,
        max_hold=max_hold,
        counts=found,
    )
    found["null_timestamp"] += int(null.sum())
    found["lost"] += int((~known).sum())
    found["not_numeric"] = int(text.sum())
    if counts is not None:
        counts.update(found)
    return record


async def read_samples(
    session: Session,
    nodes: Sequence[str],
    start_ns: int,
    end_ns: int,
    progress: Callable[[int], None] | None = None,
    *,
    elements: Sequence[int] = (),
) -> list[wire.Samples]:
    """Return the raw samples of each node in [start_ns, end_ns); `progress` gets the time they reached.

    elements : of each node the place in its flattened array, -1 for a scalar; empty: all are scalars. A node that is
        named several times is read once.
    """
    found = await resolve(session, nodes)
    wanted: dict[str, tuple[NodeRef, list[int]]] = {}
    places: list[tuple[str, int]] = []
    for text, element in zip(nodes, elements or [-1] * len(nodes), strict=True):
        ref = found[text]
        if isinstance(ref, NodeProblem):
            raise ref
        _, of_node = wanted.setdefault(ref.nsu, (ref, []))
        if element not in of_node:
            of_node.append(element)
        places.append((ref.nsu, of_node.index(element)))
    by_node = {nsu: _Cursor(ref, start_ns, of_node) for nsu, (ref, of_node) in wanted.items()}
    cursors = list(by_node.values())
    await _measure(session, cursors)
    values = PAGE_VALUES
    try:
        while open_ones := [one for one in cursors if not one.done][: session.limit("history")]:
            group = _next(open_ones)
            page = _page(values, group[0].width, cursors, session.limit("history"))
            try:
                await _ask(session, group, end_ns, page)
            except ConnectionProblem as problem:
                values = _smaller(session, problem, len(group), values, page)
            else:
                session.limits.worked("history")
                if progress is not None:
                    progress(min(end_ns if one.done else one.reached_ns for one in cursors))
    finally:
        await _release(session, cursors)
    return [_joined(by_node[nsu], k) for nsu, k in places]


async def _measure(session: Session, cursors: Sequence[_Cursor]) -> None:
    """Look how long the arrays are, since a page of long ones would be too large for a message."""
    arrays = [one for one in cursors if max(one.elements) >= 0]
    if arrays:
        facts = await read_facts(session, [one.ref for one in arrays])
        for one, fact in zip(arrays, facts, strict=True):
            one.width = max(1, fact.length)


def _next(open_ones: Sequence[_Cursor]) -> list[_Cursor]:
    """Return the cursors to ask for next: the one that is farthest behind, and those that fit into its request.

    One request has one time range and one number of values, and a continuation must repeat the request that it
    continues.
    """
    first = min(open_ones, key=lambda one: one.reached_ns)
    return [one for one in open_ones if one.start_ns == first.start_ns and one.width == first.width]


def _page(values: int, width: int, cursors: Sequence[_Cursor], limit: int) -> int:
    """Return how many values of each node of this width one response may have.

    By all nodes of the width and not by those that are left: a continuation must repeat the request that it continues.
    """
    alike = sum(one.width == width for one in cursors)
    return max(1, max(min(values, _LEAST_PAGE), values // min(alike, limit)) // width)


def _smaller(session: Session, problem: ConnectionProblem, nodes: int, values: int, page: int) -> int:
    """Return how many values to ask for after a refusal: fewer nodes at once, or less of each; else raise it again."""
    if not too_much(problem) or (page <= 1 and nodes <= 1):
        raise problem
    session.counters["halved_calls"] += 1
    if nodes > 1 and (page <= 1 or type(problem.__cause__).__name__ == "BadTooManyOperations"):
        session.limits.refused("history", nodes)
        return values
    return values // 2


async def oldest_ns(session: Session, node: str) -> int | None:
    """Return the stamp of the oldest value in the history of a node; None where there is none."""
    ref = (await resolve(session, [node]))[node]
    if isinstance(ref, NodeProblem):
        raise ref
    cursor = _Cursor(ref, 0)
    await _ask(session, [cursor], 2 * 10**18, 1)
    await _release(session, [cursor])
    stamps = _joined(cursor).source_ns
    return int(stamps[0]) if len(stamps) else None


async def _ask(session: Session, group: Sequence[_Cursor], end_ns: int, page: int) -> None:
    """Read one page of each cursor in one request; all are of one start and width."""
    details = ua.ReadRawModifiedDetails()
    details.IsReadModified = False
    details.StartTime = wire.to_datetime(group[0].start_ns)
    details.EndTime = wire.to_datetime(end_ns)
    details.NumValuesPerNode = page
    details.ReturnBounds = False
    request = ua.HistoryReadRequest()
    parameters = request.Parameters
    parameters.HistoryReadDetails = details
    parameters.TimestampsToReturn = ua.TimestampsToReturn.Both
    parameters.ReleaseContinuationPoints = False
    for one in group:
        item = ua.HistoryReadValueId()
        item.NodeId = one.ref.id
        item.ContinuationPoint = one.point
        parameters.NodesToRead.append(item)
    timeout_s = session.timeout_s * _PATIENCE
    try:
        body = await within(wire.send(session.client, request, timeout_s), timeout_s)
        pages = decode_history(body, [one.elements for one in group])
    except Exception as error:
        problem = session.problem(error, "read the history")
        step = _STEPS.get(type(error).__name__)
        raise (NodeProblem(problem.what, where=session.where, next_step=step) if step else problem) from error
    for one, got in zip(group, pages, strict=True):
        _accept(one, got, end_ns, f"{session.where}, {one.ref.text}")


def _accept(cursor: _Cursor, got: HistoryPage, end_ns: int, where: str) -> None:
    continued, cursor.point = cursor.point is not None, None
    if got.status & 0x80000000:
        name = wire.status_name(got.status)
        forgotten = name == "BadContinuationPointInvalid" and continued and cursor.new > 0
        if not forgotten and name != "BadNoData":
            raise NodeProblem(
                f"its history cannot be read ({name})",
                where=where,
                next_step=_STEPS.get(name, "see the server's log"),
            )
        cursor.ended(end_ns)
        return
    new = cursor.take(got)
    if got.continuation is None:
        cursor.empty_pages = 0
        cursor.ended(end_ns)
        return
    cursor.point = got.continuation
    cursor.empty_pages = 0 if new else cursor.empty_pages + 1
    if cursor.empty_pages > _EMPTY_PAGES:
        raise NodeProblem(
            f"its history does not end: {cursor.empty_pages} pages in a row without a new value",
            where=where,
            next_step="see the server's log",
        )


async def _release(session: Session, cursors: Sequence[_Cursor]) -> None:
    """Tell the server to forget continuation points that are not used to the end."""
    held = [one for one in cursors if one.point is not None]
    if not held:
        return
    request = ua.HistoryReadRequest()
    request.Parameters.HistoryReadDetails = ua.ReadRawModifiedDetails()
    request.Parameters.TimestampsToReturn = ua.TimestampsToReturn.Both
    request.Parameters.ReleaseContinuationPoints = True
    for one in held:
        item = ua.HistoryReadValueId()
        item.NodeId, item.ContinuationPoint = one.ref.id, one.point
        request.Parameters.NodesToRead.append(item)
        one.point = None
    with contextlib.suppress(Exception):
        await within(wire.send(session.client, request, session.timeout_s), session.timeout_s)


def _stamps(samples: wire.Samples) -> Any:
    """Return the stamps of the source; where there is none, those of the server."""
    return np.where(samples.source_ns == wire.NO_STAMP, samples.server_ns, samples.source_ns)


def _texts(samples: wire.Samples) -> Any:
    """Return bool[m]: the values that are texts."""
    return np.zeros(len(samples.value), np.bool_) if samples.text_at is None else samples.text_at >= 0


def _where(samples: wire.Samples, keep: Any) -> wire.Samples:
    return wire.Samples(
        samples.handle[keep],
        samples.source_ns[keep],
        samples.server_ns[keep],
        samples.value[keep],
        samples.status[keep],
        text_at=None if samples.text_at is None else samples.text_at[keep],
    )


def _joined(cursor: _Cursor, element: int = 0) -> wire.Samples:
    """Return all samples of one of the elements of a node; `text_at` tells texts only, they are not kept."""
    parts = [one[element] for one in cursor.parts] or [wire.samples_of([])]
    names = ("handle", "source_ns", "server_ns", "value", "status")
    text = np.concatenate([_texts(one) for one in parts])
    return wire.Samples(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in names),
        text_at=np.where(text, 0, -1),
    )
