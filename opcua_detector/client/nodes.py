"""Finds the nodes that the configuration names, and reads what the server says of them.

Text of a node: `nsu=<uri>;s=<id>` (best: survives a re-ordered namespace table), `ns=2;s=<id>`, `i=2258`, or
a browse path from the root, `/Objects/2:Plant/2:lorenz/2:x1`, whose names may carry `nsu=<uri>;` instead of
the index. In a path `&` takes the special meaning from the character behind it (Part 4, A.2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from asyncua import ua

from ..errors import NodeProblem
from . import wire
from .limits import in_batches
from .session import Session

_READ, _WRITE = 0x01, 0x02  # AccessLevel (Part 3, 8.57)
_HISTORY = 0x04
NUMERIC = frozenset(
    {"Boolean", "SByte", "Byte", "Int16", "UInt16", "Int32", "UInt32", "Int64", "UInt64", "Float", "Double"}
)
INTEGER = NUMERIC - {"Boolean", "Float", "Double"}
# Which built-in types take a result of which type; the value is cast with a range check (`writeback`).
ACCEPTS: Mapping[str, frozenset[str]] = {
    "Double": frozenset({"Double", "Float"}) | INTEGER,
    "Boolean": frozenset({"Boolean"}) | INTEGER,
    "UInt16": INTEGER | {"Double", "Float"},
    "Int32": INTEGER | {"Double", "Float"},
    "UInt32": INTEGER | {"Double", "Float"},
    "String": frozenset({"String", "LocalizedText"}),
    "DateTime": frozenset({"DateTime"}),
}


@dataclass(frozen=True, slots=True)
class NodeRef:
    """A node on the present connection; `nsu` is its text that stays true on the next one."""

    text: str
    nsu: str
    id: Any = field(repr=False)


@dataclass(slots=True)
class NodeFacts:
    """What the server says of a node; `type` is the built-in type, `value` the present number.

    length : elements of the array that is its value now, -1: it is none
    """

    ref: NodeRef
    exists: bool = False
    is_variable: bool = False
    type: str = ""
    type_name: str = ""
    rank: int = -1
    length: int = -1
    readable: bool = False
    writable: bool = False
    history: bool = False
    value: float = float("nan")
    value_text: str = ""
    status: int = 0
    source_ns: int = wire.NO_STAMP
    unit: str = ""
    eu_range: tuple[float, float] | None = None
    read_status: str = ""


# --- text to NodeId ---


async def resolve(session: Session, texts: Iterable[str]) -> dict[str, NodeRef | NodeProblem]:
    """Return for each text its node on this connection, or the problem; existence of NodeIds is not asked
    here.

    Browse paths are translated by the server, several in one call.
    """
    found: dict[str, NodeRef | NodeProblem] = {}
    paths: dict[str, ua.BrowsePath] = {}
    for text in texts:
        try:
            if text.startswith("/"):
                paths[text] = _browse_path(session, text)
            else:
                found[text] = _reference(session, text, _node_id(session, text))
        except NodeProblem as problem:
            found[text] = problem
    results = await translate(session, list(paths.values()), "translate browse paths")
    for name, result in zip(paths, results, strict=True):
        found[name] = _translated(session, name, result)
    return found


async def translate(session: Session, paths: Sequence[Any], what: str) -> list[Any]:
    """Return the BrowsePathResult of each BrowsePath, in calls that the server takes."""
    return await in_batches(
        session, "translate", paths,
        lambda part: session.client.uaclient.translate_browsepaths_to_nodeids(list(part)), what,
    )


async def resolve_one(session: Session, text: str) -> NodeRef:
    """Return the node of a text; NodeProblem where it is not found."""
    found = (await resolve(session, [text]))[text]
    if isinstance(found, NodeProblem):
        raise found
    return found


def _namespace(session: Session, uri: str, text: str) -> int:
    try:
        return session.namespaces.index(uri)
    except ValueError:
        raise NodeProblem(
            f"the server has no namespace {uri!r}",
            where=text,
            next_step="choose among its namespaces: " + ", ".join(session.namespaces),
        ) from None


def _node_id(session: Session, text: str) -> ua.NodeId:
    match = re.fullmatch(r"nsu=([^;]+);([isgb]=.+)", text, re.DOTALL)
    text_id = f"ns={_namespace(session, match[1], text)};{match[2]}" if match else text
    try:
        return ua.NodeId.from_string(text_id)
    except Exception as error:
        raise NodeProblem(
            "this is no NodeId",
            where=text,
            next_step="write it as 'nsu=<uri>;s=<name>' or as a browse path '/Objects/...'",
        ) from error


def nsu_text(session: Session, node_id: Any) -> str:
    """Return a NodeId as text that does not depend on the order of namespaces."""
    text = str(node_id.to_string())
    index = int(node_id.NamespaceIndex)
    if index == 0 or index >= len(session.namespaces):
        return text
    return f"nsu={session.namespaces[index]};{text.partition(';')[2]}"


def _reference(session: Session, text: str, node_id: ua.NodeId) -> NodeRef:
    return NodeRef(text, nsu_text(session, node_id), node_id)


def split_path(text: str) -> list[tuple[str, str]]:
    """Return (namespace, name) of each step of a browse path; the namespace is an index or `nsu=<uri>`."""
    steps = []
    # a step: an optional nsu=<uri>; in which '/' is no end, then a name in which & takes the meaning from a
    # character
    for match in re.finditer(r"/(nsu=[^;]+;|\d+:)?((?:&.|[^/&])*)", text):
        namespace = (match[1] or "0:").rstrip(":;")
        steps.append((namespace, re.sub(r"&(.)", r"\1", match[2])))
    return steps


def _browse_path(session: Session, text: str) -> ua.BrowsePath:
    path = ua.BrowsePath()
    path.StartingNode = wire.node_id(84)
    elements = []
    for namespace, name in split_path(text):
        if not name:
            raise NodeProblem(
                "a step of the browse path is empty",
                where=text,
                next_step="write it as '/Objects/2:Plant/2:T1'",
            )
        index = _namespace(session, namespace[4:], text) if namespace.startswith("nsu=") else int(namespace)
        element: Any = ua.RelativePathElement()
        element.ReferenceTypeId = wire.node_id(ua.ObjectIds.HierarchicalReferences)
        element.IsInverse = False
        element.IncludeSubtypes = True
        element.TargetName = ua.QualifiedName(name, index)
        elements.append(element)
    path.RelativePath.Elements = elements
    return path


def _translated(session: Session, text: str, result: Any) -> NodeRef | NodeProblem:
    if result.StatusCode.is_good() and result.Targets:
        target = result.Targets[0].TargetId
        return _reference(
            session, text, ua.NodeId(target.Identifier, target.NamespaceIndex, target.NodeIdType)
        )
    return NodeProblem(
        f"the browse path leads nowhere ({result.StatusCode.name})",
        where=text,
        next_step="compare each step and its namespace index with 'opcua-detector browse'",
    )


# --- facts ---

_ATTRIBUTES = (
    ua.AttributeIds.NodeClass,
    ua.AttributeIds.DataType,
    ua.AttributeIds.ValueRank,
    ua.AttributeIds.AccessLevel,
    ua.AttributeIds.UserAccessLevel,
    ua.AttributeIds.Value,
)


async def read_facts(session: Session, refs: Sequence[NodeRef], *, units: bool = False) -> list[NodeFacts]:
    """Read type, rights and present value of nodes, and with `units` their EngineeringUnits and EURange."""
    wanted = [(ref.id, attribute) for ref in refs for attribute in _ATTRIBUTES]
    values = await read_attributes(session, wanted)
    facts = []
    width = len(_ATTRIBUTES)
    for i, ref in enumerate(refs):
        facts.append(await _facts(session, ref, values[i * width : (i + 1) * width]))
    if units:
        await read_units(session, [one for one in facts if one.is_variable])
    return facts


async def read_attributes(session: Session, wanted: Sequence[tuple[Any, Any]]) -> list[Any]:
    """Read (node, attribute) pairs, split to the server's limit."""

    def ask(part: Sequence[tuple[Any, Any]]) -> Any:
        parameters = ua.ReadParameters()
        parameters.TimestampsToReturn = ua.TimestampsToReturn.Both
        for node_id, attribute in part:
            one = ua.ReadValueId()
            one.NodeId, one.AttributeId = node_id, attribute
            parameters.NodesToRead.append(one)
        return session.client.uaclient.read(parameters)

    return await in_batches(session, "read", wanted, ask, "read attributes")


def _plain(value: Any) -> Any:
    """Value of a DataValue whose status is not Bad, else None."""
    if value.StatusCode is not None and value.StatusCode.value & 0x80000000:
        return None
    return value.Value.Value if value.Value is not None else None


async def _facts(session: Session, ref: NodeRef, values: Sequence[Any]) -> NodeFacts:
    node_class, data_type, rank, access, user_access, value = values
    facts = NodeFacts(ref)
    status = node_class.StatusCode
    if status is not None and status.value & 0x80000000:
        facts.read_status = status.name
        return facts
    facts.exists = True
    facts.is_variable = _plain(node_class) == ua.NodeClass.Variable
    if not facts.is_variable:
        return facts
    if _plain(data_type) is not None:
        facts.type, facts.type_name = await _builtin(session, _plain(data_type))
    facts.rank = -1 if _plain(rank) is None else int(_plain(rank))
    level = _plain(user_access)
    if level is None:
        level = _plain(access) or 0
    facts.readable, facts.writable = bool(level & _READ), bool(level & _WRITE)
    facts.history = bool(level & _HISTORY)
    facts.status = int(value.StatusCode.value) if value.StatusCode is not None else 0
    facts.read_status = value.StatusCode.name if value.StatusCode is not None else "Good"
    content = value.Value.Value if value.Value is not None else None
    facts.value, facts.value_text = wire.to_number(content), _shown(content)
    facts.length = _length(content)
    facts.source_ns = wire.to_ns(value.SourceTimestamp)
    return facts


def _length(content: Any) -> int:
    """Elements of an array of any dimensions, -1 for what is none."""
    if not isinstance(content, list | tuple):
        return -1
    return sum(max(1, _length(one)) if isinstance(one, list | tuple) else 1 for one in content)


def _shown(content: Any) -> str:
    text = f"{content:.6g}" if isinstance(content, float) else str("" if content is None else content)
    return text if len(text) <= 40 else text[:37] + "..."


async def _builtin(session: Session, data_type: Any) -> tuple[str, str]:
    """Return (built-in type, own name) of a DataType; enumerations, Duration ... are followed upwards."""
    node, first = data_type, ""
    for _ in range(10):
        if node.NamespaceIndex == 0 and isinstance(node.Identifier, int):
            number = node.Identifier
            if number == 29:
                return "Int32", first or "Enumeration"
            if 1 <= number <= 25:
                name = ua.VariantType(number).name
                return name, first or name
        description = ua.BrowseDescription()
        description.NodeId = node
        description.BrowseDirection = ua.BrowseDirection.Inverse
        description.ReferenceTypeId = wire.node_id(ua.ObjectIds.HasSubtype)
        description.IncludeSubtypes = True
        description.NodeClassMask = 0
        description.ResultMask = ua.BrowseResultMask.BrowseName
        parameters = ua.BrowseParameters()
        parameters.NodesToBrowse = [description]
        (result,) = await session.call(session.client.uaclient.browse(parameters), "browse a data type")
        first = first or nsu_text(session, data_type)
        if not result.References:
            break
        target = result.References[0].NodeId
        node = ua.NodeId(target.Identifier, target.NamespaceIndex, target.NodeIdType)
    return "", first or nsu_text(session, data_type)


async def read_units(session: Session, facts: Sequence[NodeFacts]) -> None:
    """Read EngineeringUnits and EURange (Part 8, 5.3.2.3) of variables that have them."""
    paths, owners = [], []
    for one in facts:
        for name in ("EngineeringUnits", "EURange"):
            element: Any = ua.RelativePathElement()
            element.ReferenceTypeId = wire.node_id(ua.ObjectIds.HasProperty)
            element.IncludeSubtypes = True
            element.IsInverse = False
            element.TargetName = ua.QualifiedName(name, 0)
            path = ua.BrowsePath()
            path.StartingNode = one.ref.id
            path.RelativePath.Elements = [element]
            paths.append(path)
            owners.append((one, name))
    wanted, of = [], []
    for owner, result in zip(owners, await translate(session, paths, "find units and ranges"), strict=True):
        if result.StatusCode.is_good() and result.Targets:
            target = result.Targets[0].TargetId
            node = ua.NodeId(target.Identifier, target.NamespaceIndex, target.NodeIdType)
            wanted.append((node, ua.AttributeIds.Value))
            of.append(owner)
    for (one, name), value in zip(of, await read_attributes(session, wanted), strict=True):
        content = _plain(value)
        if name == "EURange" and hasattr(content, "Low"):
            low, high = float(content.Low), float(content.High)
            one.eu_range = (low, high) if low < high else None
        elif name == "EngineeringUnits" and hasattr(content, "DisplayName"):
            one.unit = content.DisplayName.Text or ""
