"""Says what is wrong with the tags and outputs of the configuration, before anything runs; writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ..api import Tag, TagKind
from ..errors import NodeProblem
from ..nodes import SIGNALS
from .nodes import ACCEPTS, INTEGER, NUMERIC, NodeFacts, NodeRef, read_facts, read_units, resolve
from .session import Session


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem with its fix; `error` False means that it runs all the same."""

    where: str
    problem: str
    fix: str
    error: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}\n  next step: {self.fix}"


def raise_findings(findings: Sequence[Finding], shown: int = 5) -> None:
    """Raise one NodeProblem that names the first errors together; nothing when there are none."""
    errors = [one for one in findings if one.error]
    if not errors:
        return
    if len(errors) == 1:
        raise NodeProblem(errors[0].problem, where=errors[0].where, next_step=errors[0].fix)
    lines = [f"{one.where}: {one.problem} (next step: {one.fix})" for one in errors[:shown]]
    if len(errors) > shown:
        lines.append(f"... and {len(errors) - shown} more")
    raise NodeProblem(
        "\n  ".join([f"{len(errors)} nodes are not as configured:", *lines]),
        next_step="correct them one by one; 'opcua-detector check' lists all of them",
    )


async def check_tags(
    session: Session, tags: Sequence[Tag], where: str = "tags", indexes: Mapping[str, int] = MappingProxyType({})
) -> list[Finding]:
    """Return all that is wrong with tags: found, a scalar of a usable type, readable, in the stated unit.

    indexes : name of a tag -> its place in the array that its node is
    """
    found = await resolve(session, [tag.node for tag in tags])
    refs = {text: ref for text, ref in found.items() if isinstance(ref, NodeRef)}
    facts = dict(zip(refs, await read_facts(session, list(refs.values())), strict=True))
    # Only where there is something to compare with: of thousands of tags that is a third of the start.
    stated = {tag.node for tag in tags if tag.unit or tag.eu_range}
    await read_units(session, [one for text, one in facts.items() if text in stated and one.is_variable])
    findings: list[Finding] = []
    for tag in tags:
        place = f"{where}.{tag.name} ({tag.node})"
        ref = found[tag.node]
        if isinstance(ref, NodeProblem):
            findings.append(Finding(place, ref.what, ref.next_step))
        else:
            findings += _tag_findings(tag, facts[tag.node], place, indexes.get(tag.name))
    return findings


def _missing(facts: NodeFacts, place: str) -> list[Finding]:
    if not facts.exists:
        return [
            Finding(
                place,
                f"the node does not exist ({facts.read_status})",
                "copy the NodeId from 'opcua-detector browse'",
            )
        ]
    if not facts.is_variable:
        return [
            Finding(
                place, "the node is no variable", "name the variable below it, see 'opcua-detector browse'"
            )
        ]
    return []


def _tag_findings(tag: Tag, facts: NodeFacts, place: str, index: int | None) -> list[Finding]:
    missing = _missing(facts, place)
    if missing:
        return missing
    findings = []
    if not facts.readable:
        findings.append(
            Finding(
                place,
                "this user may not read the tag",
                "give the user read access on the server, or leave the tag out",
            )
        )
    if index is not None:
        findings += _index_findings(facts, place, index)
    elif facts.rank >= 0:
        findings.append(
            Finding(
                place, f"the tag is an array (ValueRank {facts.rank})",
                "give the 'index' of the element that is meant, or name a scalar variable",
            )
        )
    if facts.type == "String" and tag.kind is not TagKind.STATE:
        findings.append(Finding(place, "the tag is text", "give it 'kind: state', or leave it out"))
    elif facts.type not in NUMERIC and facts.type != "String":
        findings.append(
            Finding(
                place,
                f"the type {facts.type_name or 'unknown'} is no number",
                "name a tag of a numeric type or Boolean",
            )
        )
    if tag.unit and facts.unit and tag.unit != facts.unit:
        findings.append(
            Finding(
                place,
                f"the unit is {facts.unit!r} on the server, {tag.unit!r} in the configuration",
                f"write 'unit: {facts.unit}' if the server is right",
            )
        )
    if tag.eu_range and facts.eu_range and tag.eu_range != facts.eu_range:
        findings.append(
            Finding(
                place,
                f"EURange is {list(facts.eu_range)} on the server, {list(tag.eu_range)} in the configuration",
                "correct the one that is wrong",
                error=False,
            )
        )
    if facts.readable and facts.status & 0x80000000:
        findings.append(
            Finding(
                place,
                f"the present value is Bad ({facts.read_status})",
                "look after the sensor or its connection; the tag is masked until then",
                error=False,
            )
        )
    return findings


def _index_findings(facts: NodeFacts, place: str, index: int) -> list[Finding]:
    """What is wrong with the index of a tag; the present length is only that of now."""
    if facts.rank == -1:
        return [Finding(place, "the tag has an index and the node is no array", "take the 'index' out")]
    if 0 <= facts.length <= index:
        return [
            Finding(
                place, f"index {index} of an array of {facts.length}, counted from 0",
                "correct the index; the tag is masked until the array is long enough", error=False,
            )
        ]
    return []


async def check_outputs(session: Session, nodes: Mapping[str, str], where: str = "outputs") -> list[Finding]:
    """Return everything that is wrong with outputs (signal -> node): found, writable, of a type that takes
    it.

    Nothing is written.
    """
    found = await resolve(session, nodes.values())
    refs = {text: ref for text, ref in found.items() if isinstance(ref, NodeRef)}
    facts = dict(zip(refs, await read_facts(session, list(refs.values())), strict=True))
    findings: list[Finding] = []
    taken: dict[str, str] = {}
    for signal, text in nodes.items():
        place = f"{where}.{signal} ({text})"
        ref = found[text]
        if isinstance(ref, NodeProblem):
            findings.append(Finding(place, ref.what, ref.next_step))
            continue
        if ref.nsu in taken:
            findings.append(
                Finding(place, f"{taken[ref.nsu]} is written to the same node", "give each a node of its own")
            )
        taken[ref.nsu] = signal
        findings += _output_findings(signal, facts[text], place)
    return findings


def _output_findings(signal: str, facts: NodeFacts, place: str) -> list[Finding]:
    missing = _missing(facts, place)
    if missing:
        return missing
    expected = SIGNALS[signal]
    findings = []
    if not facts.writable:
        findings.append(
            Finding(
                place,
                "this user may not write the node",
                "give the user write access on the server, or take the signal out of outputs",
            )
        )
    shape = "an array" if expected.array else "a scalar"
    if facts.type not in ACCEPTS[expected.type]:
        findings.append(
            Finding(
                place,
                f"the node is of type {facts.type_name or 'unknown'}, {signal} is {expected.type}",
                f"use a node of type {expected.type}",
            )
        )
    elif expected.type == "Double" and facts.type in INTEGER:
        findings.append(
            Finding(
                place,
                f"the node is of type {facts.type}: {signal} is rounded to whole numbers",
                "use a node of type Double or Float",
                error=False,
            )
        )
    if expected.array != (facts.rank >= 0) and facts.rank not in (-2, -3):
        findings.append(
            Finding(
                place,
                f"{signal} is {shape}, the node is not (ValueRank {facts.rank})",
                f"use a node that is {shape}",
            )
        )
    return findings
