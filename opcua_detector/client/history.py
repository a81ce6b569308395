"""Reads the historian: raw values of several tags, page by page, as rows by the rule of time.

Source: OPC UA Part 11, 6.5.3 (ReadRawModified). A page ends with a continuation point. Where there is none,
the server is asked again from the last stamp, and a tag is done only when that brings nothing new: servers
take NumValuesPerNode for one response or for all its pages together, or end early by a limit of their own, so
that the number of values tells nothing about the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from asyncua import ua

from ..api import Record, Tag
from ..errors import ConnectionProblem, NodeProblem, RecordError
from ..frames import iso_utc, rows_from_samples
from . import wire
from .limits import too_much
from .nodes import NodeRef, resolve
from .session import Session
from .waiting import within

Progress = Callable[[int, int], None]
PAGE_VALUES = 40_000  # values in one response over all its nodes
_LEAST_PAGE = 1000  # values of each node, so that a page is worth its round trip
_EMPTY_PAGES = 1000  # in a row: a server may give up a page for lack of time, but not for ever
_PATIENCE = 10  # a page may take this many time-outs: historians read from disk
_RECORD = "collect rows with 'opcua-detector record'"
_STEPS = {
    "BadHistoryOperationUnsupported": f"the server keeps no history of this tag: {_RECORD}",
    "BadHistoryOperationInvalid": f"the server does not take this kind of history read: {_RECORD}",
    "BadServiceUnsupported": f"the server has no history at all: {_RECORD}",
    "BadUserAccessDenied": "give the user the right to read history",
    "BadNotReadable": "give the user the right to read history",
    "BadNodeIdUnknown": "copy the NodeId from 'opcua-detector browse'",
}


class _Cursor:
    """Where the reading of one tag stands.

    start_ns : of the request by time, which its continuations repeat
    reached_ns : newest stamp that was read
    by_source : the server keeps its values by the stamp of the source; at first it may be by its own, where a
        source clock that is ahead would skip values: then asking on begins at the earlier of the two
    """

    def __init__(self, ref: NodeRef, start_ns: int) -> None:
        self.ref = ref
        self.start_ns = self.reached_ns = start_ns
        self.point: bytes | None = None
        self.done = self.by_source = False
        self.empty_pages = 0
        self.parts: list[wire.Samples] = []
        self.server_ns = wire.NO_STAMP  # newest stamp of the server
        self.read = self.new = 0  # values since the request by time, and those that were not known before
        self.chain = 0  # the first of `parts` since the request by time
        self.known = np.empty(0, np.int64)  # stamps that the request by time brings once more

    def take(self, samples: wire.Samples) -> int:
        """Keep what is new of a page; return how much it was."""
        stamps = _stamps(samples)
        self.read += len(stamps)
        if len(self.known):
            fresh = ~np.isin(stamps, self.known)
            samples, stamps = _where(samples, fresh), stamps[fresh]
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
            stamps = np.concatenate([_stamps(one) for one in chain])
            server = np.concatenate([one.server_ns for one in chain])
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
    session: Session,
    tags: Sequence[Tag],
    start_ns: int,
    end_ns: int,
    period_ns: int,
    *,
    lateness_ns: int | None = None,
    max_hold: int = 20,
    progress: Progress | None = None,
    counts: dict[str, int] | None = None,
) -> Record:
    """Return the rows of these tags in [start_ns, end_ns) from the server's history.

    progress : called with (rows done, rows expected) after each page
    counts : filled with the counters of the rule of time when given, and with `expected`, the rows that the
        range has room for, and `missing`, how many of them the history does not give (a range that ends now
        misses the few that are not stored yet)

    Raises NodeProblem where a tag is not found or has no history, RecordError where there is nothing in the
    range.
    """
    rows = max(1, (end_ns - start_ns) // period_ns)
    samples = await read_samples(
        session,
        [tag.node for tag in tags],
        start_ns,
        end_ns,
        None
        if progress is None
        else (
            lambda reached_ns: progress(int(min(rows, max(0, reached_ns - start_ns) // period_ns)), int(rows))
        ),
    )
    found: dict[str, int] = {}
    record = rows_of_samples(
        tags, samples, (start_ns, end_ns), period_ns, lateness_ns=lateness_ns, max_hold=max_hold, counts=found,
        where=session.where,
    )
    if counts is not None:
        counts.update(found)
        counts["expected"] = int(rows)
        counts["missing"] = max(0, int(rows) - len(record))
    if progress is not None:
        progress(int(rows), int(rows))
    return record


def rows_of_samples(
    tags: Sequence[Tag],
    samples: Sequence[wire.Samples],
    span_ns: tuple[int, int],
    period_ns: int,
    *,
    lateness_ns: int | None = None,
    max_hold: int = 20,
    counts: dict[str, int] | None = None,
    where: str = "",
) -> Record:
    """Return the rows of raw samples by the rule of time, whichever servers they were read from.

    samples : of each tag, in the order of the tags, as `read_samples` gives them
    span_ns : [start, end) that was asked for, and where : of whom, for the error
    counts : filled with the counters of the rule of time when given

    Raises RecordError where a tag has no sample.
    """
    empty = [tag.name for tag, one in zip(tags, samples, strict=True) if len(one.source_ns) == 0]
    if empty:
        raise RecordError(
            f"no history of {', '.join(empty)} from {iso_utc(span_ns[0])} to {iso_utc(span_ns[1])}",
            where=where,
            next_step="choose a time range that the historian has",
        )
    index = np.repeat(np.arange(len(tags), dtype=np.int32), [len(one.source_ns) for one in samples])
    stamps = np.concatenate([one.source_ns for one in samples])
    server = np.concatenate([one.server_ns for one in samples])
    value = np.concatenate([one.value for one in samples])
    status = np.concatenate([one.status for one in samples])
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
    if counts is not None:
        counts.update(found)
    return record


async def read_samples(
    session: Session,
    nodes: Sequence[str],
    start_ns: int,
    end_ns: int,
    progress: Callable[[int], None] | None = None,
) -> list[wire.Samples]:
    """Return the raw samples of each node in [start_ns, end_ns); `progress` gets the time they reached."""
    found = await resolve(session, nodes)
    cursors = []
    for text in nodes:
        ref = found[text]
        if isinstance(ref, NodeProblem):
            raise ref
        cursors.append(_Cursor(ref, start_ns))
    values = PAGE_VALUES
    try:
        while open_ones := [one for one in cursors if not one.done][: session.limit("history")]:
            # By all of them and not by those that are left: a continuation must repeat the request that it continues.
            share = values // min(len(cursors), session.limit("history"))
            page = max(min(values, _LEAST_PAGE), share)
            try:
                await _read_page(session, open_ones, end_ns, page)
            except ConnectionProblem as problem:
                values = _smaller(session, problem, len(open_ones), values)
            else:
                session.limits.worked("history")
                if progress is not None:
                    progress(min(end_ns if one.done else one.reached_ns for one in cursors))
    finally:
        await _release(session, cursors)
    return [_joined(one) for one in cursors]


def _smaller(session: Session, problem: ConnectionProblem, nodes: int, values: int) -> int:
    """Return how many values to ask for after a refusal: fewer nodes at once, or less of each; else raise it again."""
    if not too_much(problem) or values <= 1:
        raise problem
    session.counters["halved_calls"] += 1
    if type(problem.__cause__).__name__ == "BadTooManyOperations" and nodes > 1:
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


async def _read_page(session: Session, cursors: Sequence[_Cursor], end_ns: int, page: int) -> None:
    """Read one page of those that are farthest behind.

    One request has one time range, and a continuation must repeat the request that it continues.
    """
    begin = min(cursors, key=lambda one: one.reached_ns).start_ns
    await _ask(session, [one for one in cursors if one.start_ns == begin], end_ns, page)


async def _ask(session: Session, group: Sequence[_Cursor], end_ns: int, page: int) -> None:
    """Read one page of each cursor in one request; all have one start."""
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
        pages = wire.decode_history(body)
    except Exception as error:
        problem = session.problem(error, "read the history")
        step = _STEPS.get(type(error).__name__)
        raise (NodeProblem(problem.what, where=session.where, next_step=step) if step else problem) from error
    for one, got in zip(group, pages, strict=True):
        _accept(one, got, end_ns)


def _accept(cursor: _Cursor, got: wire.HistoryPage, end_ns: int) -> None:
    continued, cursor.point = cursor.point is not None, None
    if got.status & 0x80000000:
        name = wire.status_name(got.status)
        forgotten = name == "BadContinuationPointInvalid" and continued and cursor.new > 0
        if not forgotten and name != "BadNoData":
            raise NodeProblem(
                f"its history cannot be read ({name})",
                where=cursor.ref.text,
                next_step=_STEPS.get(name, "see the server's log"),
            )
        cursor.ended(end_ns)
        return
    new = cursor.take(got.samples)
    if got.continuation is None:
        cursor.empty_pages = 0
        cursor.ended(end_ns)
        return
    cursor.point = got.continuation
    cursor.empty_pages = 0 if new else cursor.empty_pages + 1
    if cursor.empty_pages > _EMPTY_PAGES:
        raise NodeProblem(
            f"its history does not end: {cursor.empty_pages} pages in a row without a new value",
            where=cursor.ref.text,
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


def _where(samples: wire.Samples, keep: Any) -> wire.Samples:
    return wire.Samples(
        samples.handle[keep],
        samples.source_ns[keep],
        samples.server_ns[keep],
        samples.value[keep],
        samples.status[keep],
    )


def _joined(cursor: _Cursor) -> wire.Samples:
    parts = cursor.parts or [wire.samples_of([])]
    return wire.Samples(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("handle", "source_ns", "server_ns", "value", "status")
        )
    )
