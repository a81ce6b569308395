"""The table of result nodes: types every client reads, a NodeSet2 file made of it, and a server that takes it."""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import pytest_asyncio
from asyncua import Client, Server, ua

from opcua_detector.nodes import (
    EXPLANATION_CHARS,
    EXTRA_NODES,
    INPUT_NODES,
    NO_SCORE,
    RESULT_NODES,
    RESULTS_NAMESPACE,
    SIGNALS,
    STATE_TEXTS,
    TOP,
    State,
    nodeset_xml,
)

ROOT = Path(__file__).resolve().parent.parent
NODESET = ROOT / "sim_server" / "results.NodeSet2.xml"
MONITORS = ["lorenz", "throttle"]
NS = {"ua": "http://opcfoundation.org/UA/2011/03/UANodeSet.xsd"}
# Signals of the scalar contract with their types: a client that was written against it must go on working.
CONTRACT = {
    "Score": "Double", "SlowScore": "Double", "Limit": "Double", "IsAnomaly": "Boolean", "Severity": "UInt16",
    "State": "Int32",
    "StateText": "String", "Quality": "String", "ExplanationText": "String", "EventNo": "UInt32", "ModelId": "String",
    "LastUpdate": "DateTime", "LastUpdateText": "String", "Heartbeat": "UInt32", "LatencyMs": "Double",
    "LostSamples": "UInt32", "SupersededWrites": "UInt32", "RTrans": "Double", "RBound": "Double", "RConf": "Double",
    "Residuals": "Double", "Contributions": "Double", "FeedbackResult": "String",
} | {f"Top{k}{part}": kind for k in (1, 2, 3)
     for part, kind in (("Tag", "String"), ("Contribution", "Double"), ("Cause", "String"))}


# -- the table --------------------------------------------------------------------------------------------------


def test_the_table_holds_the_contract_and_each_signal_once():
    assert {node.signal: node.type for node in RESULT_NODES} == CONTRACT
    assert len(RESULT_NODES) == len(SIGNALS)
    assert [node.signal for node in RESULT_NODES if node.array] == ["Residuals", "Contributions"]


def test_only_types_that_every_client_reads_are_used_and_int64_is_not_among_them():
    assert {node.type for node in RESULT_NODES} <= {
        "Boolean", "UInt16", "Int32", "UInt32", "Double", "String", "DateTime"}


def test_every_node_says_what_it_means():
    assert all(len(node.meaning) > 10 and node.meaning == node.meaning.strip() for node in RESULT_NODES)
    assert str(EXPLANATION_CHARS) in SIGNALS["ExplanationText"].meaning
    assert f"{NO_SCORE:g} is no verdict" in SIGNALS["Score"].meaning
    assert TOP == 3


def test_no_verdict_lies_outside_the_range_of_the_score():
    low, high = SIGNALS["Score"].eu_range
    assert not low <= NO_SCORE <= high and low <= 1.0 <= high


def test_each_state_has_one_number_and_one_text_that_the_node_tells():
    numbers = {name: value for name, value in vars(State).items() if name.isupper()}
    assert sorted(numbers.values()) == list(range(len(STATE_TEXTS)))
    for value, text in enumerate(STATE_TEXTS):
        assert f"{value} {text.replace('operating ', '')}" in SIGNALS["State"].meaning


# -- the file ---------------------------------------------------------------------------------------------------


def test_the_nodeset_file_of_the_simulator_is_current():
    assert NODESET.read_text(encoding="utf-8") == nodeset_xml(MONITORS), (
        "write it again: python -c \"from opcua_detector.nodes import nodeset_xml; "
        f"print(nodeset_xml({MONITORS}), end='')\" > sim_server/results.NodeSet2.xml")


def test_the_nodeset_is_well_formed_and_no_node_id_stands_twice():
    root = ET.fromstring(nodeset_xml(MONITORS))
    ids = [node.get("NodeId") for node in root if node.get("NodeId")]
    assert len(ids) == len(set(ids))
    ranges = sum(node.eu_range is not None and not node.array for node in RESULT_NODES)
    assert len(root.findall("ua:UAVariable", NS)) == len(MONITORS) * (
        len(RESULT_NODES) + len(EXTRA_NODES) + len(INPUT_NODES) + ranges)
    assert len(root.findall("ua:UAObject", NS)) == len(MONITORS)
    assert [uri.text for uri in root.iter(f"{{{NS['ua']}}}Uri")] == [RESULTS_NAMESPACE]


def test_every_reference_of_the_nodeset_points_into_the_file_or_the_base_namespace():
    root = ET.fromstring(nodeset_xml(MONITORS))
    ids = {node.get("NodeId") for node in root}
    targets = {ref.text for ref in root.iter(f"{{{NS['ua']}}}Reference")}
    assert targets and all(target in ids or target.startswith("i=") for target in targets)


def test_the_name_of_a_monitor_is_escaped_in_the_nodeset():
    assert 's=a&amp;b"' in nodeset_xml(["a&b"]) and ET.fromstring(nodeset_xml(['<"&>'])) is not None


# -- a server ---------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(tmp_path_factory):
    """A client of a real server that has imported the file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path_factory.mktemp("nodes") / "results.NodeSet2.xml"
    path.write_text(nodeset_xml(MONITORS), encoding="utf-8")
    server = Server()
    await server.init()
    server.set_endpoint(f"opc.tcp://127.0.0.1:{port}/")
    server.set_security_policy([ua.SecurityPolicyType.NoSecurity])
    await server.register_namespace("urn:of:the:plant")  # so that the file's index 1 is not the server's
    await server.import_xml(str(path))
    async with server, Client(f"opc.tcp://127.0.0.1:{port}/") as connected:
        yield connected


@pytest.mark.asyncio(loop_scope="module")
async def test_a_server_imports_the_nodeset_with_types_rights_and_initial_values(client):
    index = await client.get_namespace_index(RESULTS_NAMESPACE)
    first = {"Score": NO_SCORE, "Limit": 1.0, "State": State.STOPPED, "StateText": "stopped", "IsAnomaly": False}
    for monitor in MONITORS:
        owner = client.get_node(f"ns={index};s={monitor}")
        children = {(await child.read_browse_name()).Name: child for child in await owner.get_children()}
        inputs = {node.signal: node for node in (*INPUT_NODES, *EXTRA_NODES)}
        assert set(inputs) == {"Feedback", "FeedbackBy", "Lease", "EventsAway", "Insecure"}
        assert not set(inputs) & set(SIGNALS)
        assert set(children) == set(SIGNALS) | set(inputs)
        for signal, row in (SIGNALS | inputs).items():
            node = children[signal]
            assert node.nodeid.Identifier == f"{monitor}.{signal}" and node.nodeid.NamespaceIndex == index
            assert await node.read_data_type_as_variant_type() == ua.VariantType[row.type]
            rank = await node.read_value_rank()
            assert rank == (ua.ValueRank.OneDimension if row.array else ua.ValueRank.Scalar)
            assert await node.get_access_level() == {ua.AccessLevel.CurrentRead, ua.AccessLevel.CurrentWrite}
            assert await node.get_user_access_level() == {ua.AccessLevel.CurrentRead, ua.AccessLevel.CurrentWrite}
            assert (await node.read_description()).Text == row.meaning
            value = await node.read_value()
            assert value == first[signal] if signal in first else not value or row.type == "DateTime"


@pytest.mark.asyncio(loop_scope="module")
async def test_every_result_can_be_written_with_the_type_of_the_table_and_read_back(client):
    index = await client.get_namespace_index(RESULTS_NAMESPACE)
    given = {"Double": 2.5, "Boolean": True, "UInt16": 700, "Int32": 3, "UInt32": 4_000_000_000, "String": "u is 31 V",
             "DateTime": datetime(2026, 3, 1, 12, 30, tzinfo=UTC)}
    for signal, row in SIGNALS.items():
        node = client.get_node(f"ns={index};s=lorenz.{signal}")
        value = [0.5, 0.25] if row.array else given[row.type]
        await node.write_attribute(ua.AttributeIds.Value, ua.DataValue(ua.Variant(value, ua.VariantType[row.type])))
        assert await node.read_value() == value


@pytest.mark.asyncio(loop_scope="module")
async def test_the_score_carries_its_range_for_the_display(client):
    index = await client.get_namespace_index(RESULTS_NAMESPACE)
    node = client.get_node(f"ns={index};s=lorenz.Score")
    prop = await node.get_child("0:EURange")
    span = await prop.read_value()
    assert (span.Low, span.High) == SIGNALS["Score"].eu_range
    assert await node.read_type_definition() == ua.NodeId(ua.ObjectIds.AnalogItemType)
