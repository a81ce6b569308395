"""Walks the address space and gives the raw facts of each variable; others decide which tags to take."""

from __future__ import annotations

import asyncio
import fnmatch
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from asyncua import ua

from ..errors import DetectorError, NodeProblem
from . import wire
from .history import read_samples
from .limits import in_batches
from .nodes import NodeFacts, NodeRef, nsu_text, read_attributes, read_facts, resolve, resolve_one
from .session import Session

ENOUGH_MOVES = 3  # the least from which `columns.suggest_kind` tells a value that only goes up
_BATCH = 100
_SERVER = 2253  # i=2253, the Server object: diagnostics that nobody monitors


@dataclass(frozen=True, slots=True)
class BrowsedNode:
    """One node of the tree.

    path : browse path from the root; node : NodeId as `nsu=` text; depth : steps below the start
    facts of a variable: type, unit, eu_range, rights, `value` (text), `number`, `status`, `source_ns`
    """

    path: str
    node: str
    name: str
    depth: int
    is_variable: bool
    is_property: bool = False
    description: str = ""
    type: str = ""
    unit: str = ""
    eu_range: tuple[float, float] | None = None
    readable: bool = False
    writable: bool = False
    history: bool = False
    array: bool = False
    value: str = ""
    number: float = float("nan")
    status: int = 0
    source_ns: int = wire.NO_STAMP


@dataclass(slots=True)
class _Found:
    path: str
    ref: NodeRef
    name: str
    depth: int
    variable: bool
    is_property: bool


async def walk(
    session: Session,
    *,
    start: str = "/Objects",
    pattern: str = "",
    max_depth: int = 10,
    max_nodes: int = 10_000,
    properties: bool = False,
    server_object: bool = False,
) -> AsyncIterator[BrowsedNode]:
    """Yield the nodes below `start`, level by level, with the facts of variables.

    pattern : part of the path or of the NodeId, or a pattern with * and ?; empty: all. Objects are yielded
        only when there is no pattern
    max_depth, max_nodes : bounds of the walk
    properties : also yield properties (EURange, EngineeringUnits ...)
    server_object : also walk below the Server object
    """
    root = await resolve_one(session, start)
    level = [_Found(start.rstrip("/") or "/", root, "", 0, False, False)]
    seen = {root.nsu}
    given = 0
    while level and level[0].depth < max_depth:
        below: list[_Found] = []
        for first in range(0, len(level), _BATCH):
            for child in await _children(session, level[first : first + _BATCH], server_object):
                if child.ref.nsu in seen or (child.is_property and not properties):
                    continue
                seen.add(child.ref.nsu)
                below.append(child)
                if len(seen) > max_nodes:
                    break
        for first in range(0, len(below), _BATCH):
            wanted = [one for one in below[first : first + _BATCH] if _matches(pattern, one)]
            facts = await read_facts(session, [one.ref for one in wanted if one.variable], units=True)
            by_node = {fact.ref.nsu: fact for fact in facts}
            for one in wanted:
                if pattern and not one.variable:
                    continue
                yield _browsed(one, by_node.get(one.ref.nsu))
                given += 1
                if given >= max_nodes:
                    return
        level = below if len(seen) <= max_nodes else []


def _matches(pattern: str, one: _Found) -> bool:
    if not pattern:
        return True
    if any(letter in pattern for letter in "*?"):
        return fnmatch.fnmatchcase(one.path, pattern) or fnmatch.fnmatchcase(one.ref.nsu, pattern)
    return pattern.lower() in one.path.lower() or pattern.lower() in one.ref.nsu.lower()


def _browsed(one: _Found, facts: NodeFacts | None) -> BrowsedNode:
    if facts is None:
        return BrowsedNode(one.path, one.ref.nsu, one.name, one.depth, False)
    return BrowsedNode(
        one.path,
        one.ref.nsu,
        one.name,
        one.depth,
        True,
        one.is_property,
        "",
        facts.type_name or facts.type,
        facts.unit,
        facts.eu_range,
        facts.readable,
        facts.writable,
        facts.history,
        facts.rank >= 0,
        facts.value_text,
        facts.value,
        facts.status,
        facts.source_ns,
    )


async def _children(session: Session, parents: Sequence[_Found], server_object: bool) -> list[_Found]:
    """Browse forward over hierarchical references, following continuation points."""
    def ask(part: Sequence[_Found]) -> Any:
        parameters = ua.BrowseParameters()
        for parent in part:
            description = ua.BrowseDescription()
            description.NodeId = parent.ref.id
            description.BrowseDirection = ua.BrowseDirection.Forward
            description.ReferenceTypeId = wire.node_id(ua.ObjectIds.HierarchicalReferences)
            description.IncludeSubtypes = True
            description.NodeClassMask = ua.NodeClass.Object | ua.NodeClass.Variable
            description.ResultMask = ua.BrowseResultMask.All
            parameters.NodesToBrowse.append(description)
        parameters.RequestedMaxReferencesPerNode = 1000
        return session.client.uaclient.browse(parameters)

    results = await in_batches(session, "browse", parents, ask, "browse")
    found: list[_Found] = []
    open_ones: list[tuple[_Found, Any]] = list(zip(parents, results, strict=True))
    while open_ones:
        more: list[tuple[_Found, bytes]] = []
        for parent, result in open_ones:
            for reference in result.References or []:
                child = _child(session, parent, reference)
                if server_object or child.ref.nsu != f"i={_SERVER}":
                    found.append(child)
            if result.ContinuationPoint:
                more.append((parent, result.ContinuationPoint))
        if not more:
            break
        following = ua.BrowseNextParameters()
        following.ReleaseContinuationPoints = False
        following.ContinuationPoints = [point for _, point in more]
        answers = await session.call(session.client.uaclient.browse_next(following), "browse on")
        open_ones = [(parent, answer) for (parent, _), answer in zip(more, answers, strict=True)]
    return found


def _child(session: Session, parent: _Found, reference: Any) -> _Found:
    target = reference.NodeId
    node_id = ua.NodeId(target.Identifier, target.NamespaceIndex, target.NodeIdType)
    name = reference.BrowseName
    step = re.sub(r"([/.<>:#!&])", r"&\1", name.Name or "")
    if name.NamespaceIndex:
        step = f"{name.NamespaceIndex}:{step}"
    text = nsu_text(session, node_id)
    return _Found(
        f"{parent.path.rstrip('/')}/{step}",
        NodeRef(text, text, node_id),
        name.Name or "",
        parent.depth + 1,
        reference.NodeClass == ua.NodeClass.Variable,
        reference.ReferenceTypeId.Identifier == ua.ObjectIds.HasProperty,
    )


async def recent_values(
    session: Session,
    nodes: Sequence[BrowsedNode],
    *,
    span_ns: int = 60 * 10**9,
    polls: int = 20,
    poll_s: float = 0.1,
    most_s: float = 8.0,
) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """Return node -> (source_ns int64[m], value float64[m]) of the last `span_ns`, for telling kinds of tags
    apart.

    From history where the server has it, otherwise from `polls` reads. Nodes that have moved by then, and too seldom
    for a verdict on how (`ENOUGH_MOVES`), are read on until each of them has, or `most_s` seconds are over since the
    first read: what a counter that steps once a second is called must not depend on the moment it was looked at.
    """
    values: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    polled: list[BrowsedNode] = []
    for one in nodes:
        if one.history and one.source_ns != wire.NO_STAMP:
            try:
                (got,) = await read_samples(session, [one.node], one.source_ns - span_ns, one.source_ns + 1)
            except DetectorError:
                polled.append(one)
                continue
            values[one.node] = (got.source_ns, got.value)
        else:
            polled.append(one)
    if polled:
        values |= await _poll(session, [one.node for one in polled], polls, poll_s, most_s)
    return values


async def _poll(
    session: Session, nodes: Sequence[str], polls: int, poll_s: float, most_s: float
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read nodes again and again, see `recent_values`; all that are read on have as many values as each other."""
    watched: dict[str, NodeRef] = {}
    for node, ref in (await resolve(session, nodes)).items():
        if isinstance(ref, NodeProblem):
            raise ref
        watched[node] = ref
    reads: dict[str, list[tuple[int, float]]] = {node: [] for node in watched}
    clock = asyncio.get_running_loop()
    end = clock.time() + most_s
    done = 0
    while watched:
        if done:
            await asyncio.sleep(poll_s)
        wanted = [(ref.id, ua.AttributeIds.Value) for ref in watched.values()]
        for node, value in zip(watched, await read_attributes(session, wanted), strict=True):
            number = float("nan") if value.Value is None else wire.to_number(value.Value.Value)
            reads[node].append((wire.to_ns(value.SourceTimestamp), number))
        done += 1
        if done == polls:
            watched = {node: ref for node, ref in watched.items() if 0 < _moves(reads[node]) < ENOUGH_MOVES}
        if done >= polls and (clock.time() >= end or all(_moves(reads[node]) >= ENOUGH_MOVES for node in watched)):
            break
    return {
        node: (np.array([stamp for stamp, _ in got], np.int64), np.array([number for _, number in got], np.float64))
        for node, got in reads.items()
    }


def _moves(reads: Sequence[tuple[int, float]]) -> int:
    """Count how often a value has changed from one read to the next."""
    known = np.array([number for _, number in reads])
    return int(np.count_nonzero(np.diff(known[np.isfinite(known)])))
