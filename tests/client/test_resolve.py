"""Nodes: found by NodeId and by path, in any order of namespaces; checks that tell all and write nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from asyncua import Client, ua

from opcua_detector.api import Tag, TagKind
from opcua_detector.client import Finding, Session, check_outputs, check_tags, raise_findings, walk
from opcua_detector.client.browse import recent_values
from opcua_detector.client.nodes import NodeRef, resolve, resolve_one, split_path
from opcua_detector.columns import suggest_kind
from opcua_detector.errors import NodeProblem
from opcua_detector.nodes import NO_SCORE, SIGNALS

from .conftest import PLANT, RESULTS, OddServer, server_config


async def test_node_ids_and_browse_paths_lead_to_the_same_node(session: Session) -> None:
    index = session.namespaces.index("urn:opcua-detector:simulated-plant")
    texts = [
        f"{PLANT}lorenz.x1",
        f"ns={index};s=lorenz.x1",
        f"/Objects/{index}:Plant/{index}:lorenz/{index}:x1",
        "/Objects/nsu=urn:opcua-detector:simulated-plant;Plant/"
        f"{index}:lorenz/nsu=urn:opcua-detector:simulated-plant;x1",
    ]
    found = await resolve(session, texts)
    assert {ref.nsu for ref in found.values() if isinstance(ref, NodeRef)} == {f"{PLANT}lorenz.x1"}
    assert all(isinstance(ref, NodeRef) for ref in found.values())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nsu=urn:elsewhere;s=x", "no namespace 'urn:elsewhere'"),
        ("/Objects/2:Plant/2:nowhere", "leads nowhere"),
        ("/Objects//2:x", "step of the browse path is empty"),
        ("ns=two;s=x", "no NodeId"),
    ],
)
async def test_a_text_that_leads_nowhere_says_why(session: Session, text: str, words: str) -> None:
    with pytest.raises(NodeProblem, match=words) as caught:
        await resolve_one(session, text)
    assert text in str(caught.value) and caught.value.next_step


def test_a_path_may_hold_uris_with_slashes_and_escaped_names() -> None:
    assert split_path("/Objects/nsu=http://a/b;Plant/3:a&/b/2:c&:d") == [
        ("0", "Objects"),
        ("nsu=http://a/b", "Plant"),
        ("3", "a/b"),
        ("2", "c:d"),
    ]


async def test_the_index_of_a_namespace_is_asked_on_each_session(cache: Path) -> None:
    """The same nsu= text finds its node on servers that register their namespaces in another order."""
    indices = []
    for before in (("urn:other",), ()):
        odd = OddServer(cache)
        await odd.start(*before)
        one = Session(server_config(odd.endpoint))
        await one.open()
        ref = await resolve_one(one, odd.text("Double"))
        indices.append(ref.id.NamespaceIndex)
        assert ref.nsu == odd.text("Double")
        await one.close()
        await odd.server.stop()
    assert indices[0] != indices[1]


async def test_good_tags_and_outputs_have_no_findings(session: Session) -> None:
    tags = [
        Tag("x1", f"{PLANT}lorenz.x1", unit="1", eu_range=(-30.0, 30.0)),
        Tag("state", f"{PLANT}lorenz.state", TagKind.STATE),
        Tag("fault", f"{PLANT}lorenz.active_fault", TagKind.STATE),
    ]
    assert await check_tags(session, tags) == []
    assert await check_outputs(session, {signal: RESULTS + signal for signal in SIGNALS}) == []


async def test_all_problems_of_tags_are_found_at_once(session: Session) -> None:
    tags = [
        Tag("gone", f"{PLANT}lorenz.x9"),
        Tag("object", f"{PLANT}lorenz"),
        Tag("text", f"{PLANT}lorenz.active_fault"),
        Tag("unit", f"{PLANT}lorenz.x1", unit="kg"),
        Tag("range", f"{PLANT}lorenz.x3", eu_range=(0.0, 1.0)),
        Tag("path", "/Objects/2:no"),
    ]
    findings = await check_tags(session, tags)
    assert [(f.where.split(" ")[0], f.error) for f in findings] == [
        ("tags.gone", True),
        ("tags.object", True),
        ("tags.text", True),
        ("tags.unit", True),
        ("tags.range", False),
        ("tags.path", True),
    ]
    assert all(f.fix for f in findings)
    assert "BadNodeIdUnknown" in findings[0].problem and "'kg'" in findings[3].problem
    with pytest.raises(NodeProblem, match="5 nodes are not as configured") as caught:
        raise_findings(findings)
    assert "tags.gone" in str(caught.value) and "tags.path" in str(caught.value)


def test_warnings_alone_raise_nothing() -> None:
    raise_findings([Finding("a", "b", "c", error=False)])


async def test_problems_of_outputs_are_found_without_writing(odd: OddServer) -> None:
    one = Session(server_config(odd.endpoint))
    await one.open()
    findings = await check_outputs(
        one,
        {
            "Score": odd.text("Float"),
            "Limit": odd.text("ReadOnly"),
            "IsAnomaly": odd.text("Double"),
            "State": odd.text("Int16"),
            "RTrans": odd.text("Int16"),
            "StateText": odd.text("Nowhere"),
            "Residuals": odd.text("Double"),
            "LastUpdate": odd.text("String"),
            "ExplanationText": odd.text("Text"),
        },
    )
    problems = {f.where.split(".")[1].split(" ")[0]: f.problem for f in findings if f.error}
    assert "may not write" in problems["Limit"]
    assert "Double, IsAnomaly is Boolean" in problems["IsAnomaly"]
    assert "State is written to the same node" in problems["RTrans"]
    assert "does not exist" in problems["StateText"]
    assert "written to the same node" in problems["Residuals"] or "array" in problems["Residuals"]
    assert "LastUpdate is DateTime" in problems["LastUpdate"]
    assert not {"Score", "State", "ExplanationText"} & set(problems)
    assert any("rounded" in f.problem and not f.error for f in findings)
    assert await odd.nodes["Double"].read_value() == 0.0
    await one.close()


async def test_browse_gives_facts_paths_that_resolve_and_samples(session: Session, other: Client) -> None:
    found = [node async for node in walk(session, pattern="lorenz.x")]
    assert [node.name for node in found] == ["x1", "x3"]
    first = found[0]
    assert (first.type, first.unit, first.eu_range) == ("Double", "1", (-30.0, 30.0))
    assert first.readable and first.history and not first.writable
    assert (await resolve_one(session, first.path)).nsu == first.node == f"{PLANT}lorenz.x1"
    everything = [node async for node in walk(session, start="/Objects/2:Plant")]
    names = {node.name for node in everything}
    assert {"lorenz", "total", "clock", "constant", "sigma"} <= names and "EURange" not in names
    assert len([node async for node in walk(session, max_nodes=5)]) == 5
    values = await recent_values(
        session, [n for n in everything if n.name in ("x1", "sigma")], span_ns=2 * 10**9, polls=2, poll_s=0
    )
    stamps, numbers = values[f"{PLANT}lorenz.x1"]
    assert len(stamps) >= 200 and numbers.std() > 0
    assert values[f"{PLANT}lorenz.faults.sigma"][1].tolist() == [1.0, 1.0]


async def test_a_counter_that_steps_seldom_is_read_until_it_can_be_told_as_one(odd: OddServer) -> None:
    """Kinds of tags must not depend on how often a node happened to move while it was looked at."""
    one = Session(server_config(odd.endpoint))
    await one.open()
    seldom, once = odd.nodes["UInt32"], odd.nodes["Int16"]

    async def count() -> None:
        for k in range(1, 200):
            await asyncio.sleep(0.5)
            await seldom.write_value(ua.Variant(k, ua.VariantType.UInt32))

    async def switch() -> None:
        await asyncio.sleep(0.15)
        await once.write_value(ua.Variant(2, ua.VariantType.Int16))

    nodes = [node async for node in walk(one, pattern="nsu=urn:odd;*") if node.name in ("UInt32", "Int16", "Double")]
    counting = asyncio.create_task(count())
    try:
        quick = await recent_values(one, nodes, polls=8, poll_s=0.1)
        await once.write_value(ua.Variant(1, ua.VariantType.Int16))
        bounded, _ = await asyncio.gather(recent_values(one, nodes, polls=8, poll_s=0.1, most_s=4.0), switch())
    finally:
        counting.cancel()
    await one.close()
    text = odd.text
    for values in (quick, bounded):
        kind, reason = suggest_kind("UInt32", True, values[text("UInt32")][1])
        assert np.count_nonzero(np.diff(values[text("UInt32")][1])) >= 3
        assert kind == "counter" and "only moves one way" in reason
        assert len(values[text("Double")][1]) == 8  # what does not move holds nobody up
    assert len(quick[text("UInt32")][1]) > 8 == len(quick[text("Int16")][1])
    # What moves too seldom to be told is read as long as it may be, and what is read on is read together.
    assert len(bounded[text("UInt32")][1]) == len(bounded[text("Int16")][1]) > 8
    assert bounded[text("Int16")][1][-1] == 2.0


async def test_checks_leave_the_result_nodes_alone(session: Session, other: Client) -> None:
    index = await other.get_namespace_index("urn:opcua-detector:results")
    node = other.get_node(f"ns={index};s=lorenz.Limit")
    before = await node.read_data_value()
    await check_outputs(session, {signal: RESULTS + signal for signal in SIGNALS})
    after = await node.read_data_value()
    assert before == after
    assert after.Value.Value == 1.0 and after.Value.VariantType == ua.VariantType.Double
    assert NO_SCORE == -1.0
