"""The one table of result nodes: write-back casts by it, the NodeSet2 file is generated from it.

Plain scalar variables are the contract, because that is what every HMI reads; arrays are for those who can.
NodeIds are `nsu=urn:opcua-detector:results;s=<monitor>.<Signal>`. No Int64: some clients split it in two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from xml.etree import ElementTree as ET

RESULTS_NAMESPACE = "urn:opcua-detector:results"
NO_SCORE = -1.0  # outside EURange: "no verdict", never to be read as "no anomaly"
EXPLANATION_CHARS = 200
TOP = 3


@dataclass(frozen=True, slots=True)
class ResultNode:
    """One output of a monitor: `type` is the OPC UA built-in type (Part 6, 5.1.2); `array` is one-dimensional."""

    signal: str
    type: str
    meaning: str
    array: bool = False
    eu_range: tuple[float, float] | None = None
    unit: str = ""


def _top(rank: int) -> tuple[ResultNode, ...]:
    return (
        ResultNode(f"Top{rank}Tag", "String", f"tag that contributes most, rank {rank}; empty while healthy"),
        ResultNode(f"Top{rank}Contribution", "Double", f"its share of the score, 0 to 1, rank {rank}",
                   eu_range=(0.0, 1.0)),
        ResultNode(f"Top{rank}Cause", "String", f"cause of rank {rank} in words: tag, observed, normal range"),
    )


RESULT_NODES: tuple[ResultNode, ...] = (
    ResultNode("Score", "Double", "how abnormal; 1.0 is the limit; -1 is no verdict (see State)",
               eu_range=(0.0, 10.0)),
    ResultNode("Limit", "Double", "the limit of the score, always 1.0", eu_range=(0.0, 10.0)),
    ResultNode("SlowScore", "Double", "the second lamp, over a long window: what is weak but lasts; it does not alarm; "
               "-1 is no verdict", eu_range=(0.0, 10.0)),
    ResultNode("IsAnomaly", "Boolean", "an alert is standing, after delays"),
    ResultNode("Severity", "UInt16", "1 to 1000 while an alert stands, from the config; 0 otherwise"),
    ResultNode("State", "Int32", "0 stopped, 1 warming up, 2 normal, 3 alert, 4 no data, 5 state not learnt, 6 fault"),
    ResultNode("StateText", "String", "the state in words"),
    ResultNode("Quality", "String", "Good, or what is masked or missing"),
    ResultNode("ExplanationText", "String", "one sentence an operator can act on, at most 200 characters"),
    *_top(1), *_top(2), *_top(3),
    ResultNode("EventNo", "UInt32", "number of the standing or last alert"),
    ResultNode("RTrans", "Double", "share of unseen transitions in the window", eu_range=(0.0, 1.0)),
    ResultNode("RBound", "Double", "mean excess over the learnt bounds in the window"),
    ResultNode("RConf", "Double", "mean distance to the learnt configurations in the window", eu_range=(0.0, 2.0)),
    ResultNode("Residuals", "Double", "window mean of each residual channel", array=True),
    ResultNode("Contributions", "Double", "share of each tag of the monitor, in the order of the config", array=True),
    ResultNode("ModelId", "String", "hash of the model in force"),
    ResultNode("LastUpdate", "DateTime", "SourceTimestamp of the newest row used"),
    ResultNode("LastUpdateText", "String", "the same as ISO 8601 text, UTC"),
    ResultNode("Heartbeat", "UInt32", "counts up while the detector lives"),
    ResultNode("LatencyMs", "Double", "SourceTimestamp to the server's acknowledgement of the last write, milliseconds",
               unit="ms"),
    ResultNode("LostSamples", "UInt32", "samples known to be lost since the start"),
    ResultNode("SupersededWrites", "UInt32", "results that a newer one replaced before they could be written"),
    ResultNode("FeedbackResult", "String", "what became of the last feedback, in words"),
)
SIGNALS = {node.signal: node for node in RESULT_NODES}

# Written beside the results where the server has them; never configured one by one.
LEASE, EVENTS_AWAY, INSECURE = "Lease", "EventsAway", "Insecure"
EXTRA_NODES: tuple[ResultNode, ...] = (
    ResultNode(LEASE, "String", "which of several detectors writes these nodes: its name, its life, a counter, a word"),
    ResultNode(EVENTS_AWAY, "String", "alerts that were raised or cleared while this server could not be written: "
               "number, from, to, why; the newest first"),
    ResultNode(INSECURE, "Boolean", "a server that this monitor reads or writes is connected with insecure: true, not "
               "encrypted or not checked; StateText says so too"),
)
RESULT_SIGNALS = SIGNALS | {node.signal: node for node in EXTRA_NODES}

# Written by the HMI and read by the detector; beside the results, never configured one by one.
INPUT_NODES: tuple[ResultNode, ...] = (
    ResultNode("Feedback", "String", "write 'false alarm', 'true' or 'unsure' (of the last alert; with its number: "
               "'false alarm 12'), 'missed' or 'missed 120' (the last 60 or so many seconds); emptied when read"),
    ResultNode("FeedbackBy", "String", "who gives the feedback, for the journal; written before Feedback"),
)


class State:
    """Values of the `State` node, with their words in `STATE_TEXTS`."""

    STOPPED, WARMING_UP, NORMAL, ALERT, NO_DATA, STATE_NOT_LEARNT, FAULT = range(7)


STATE_TEXTS = ("stopped", "warming up", "normal", "alert", "no data", "operating state not learnt", "fault")

_UA = "http://opcfoundation.org/UA/2011/03/UANodeSet.xsd"
_TYPES = "http://opcfoundation.org/UA/2008/02/Types.xsd"
_TYPE_IDS = {"Boolean": 1, "UInt16": 5, "Int32": 6, "UInt32": 7, "Double": 11, "String": 12, "DateTime": 13}
_PLACEHOLDER = {"Boolean": "false", "String": "", "DateTime": "1970-01-01T00:00:00Z"}


def _variable_type(node: ResultNode) -> str:
    """Type definition: AnalogItemType i=2368 with a range, else BaseDataVariableType i=63."""
    return "i=2368" if node.eu_range is not None and not node.array else "i=63"


def _value(parent: ET.Element, node: ResultNode) -> None:
    holder = ET.SubElement(parent, "Value")
    if node.array:
        ET.SubElement(holder, f"{{{_TYPES}}}ListOf{node.type}")
        return
    initial = {"State": "0", "StateText": STATE_TEXTS[0], "Score": str(NO_SCORE), "Limit": "1.0"}.get(
        node.signal, _PLACEHOLDER.get(node.type, "0"))
    ET.SubElement(holder, f"{{{_TYPES}}}{node.type}").text = initial


def _references(parent: ET.Element, type_id: str, owner: str, owner_reference: str) -> None:
    refs = ET.SubElement(parent, "References")
    ET.SubElement(refs, "Reference", ReferenceType="i=40").text = type_id
    ET.SubElement(refs, "Reference", ReferenceType=owner_reference, IsForward="false").text = owner


def _eu_range(root: ET.Element, node_id: str, limits: tuple[float, float]) -> None:
    """EURange property of an AnalogItemType (Part 8, 5.3.2.3): i=884 Range, value as extension object i=885."""
    prop = ET.SubElement(root, "UAVariable", NodeId=f"{node_id}.EURange", BrowseName="0:EURange",
                         ParentNodeId=node_id, DataType="i=884")
    ET.SubElement(prop, "DisplayName").text = "EURange"
    _references(prop, "i=68", node_id, "i=46")
    holder = ET.SubElement(ET.SubElement(prop, "Value"), f"{{{_TYPES}}}ExtensionObject")
    ET.SubElement(ET.SubElement(holder, f"{{{_TYPES}}}TypeId"), f"{{{_TYPES}}}Identifier").text = "i=885"
    limit = ET.SubElement(ET.SubElement(holder, f"{{{_TYPES}}}Body"), f"{{{_TYPES}}}Range")
    ET.SubElement(limit, f"{{{_TYPES}}}Low").text = repr(limits[0])
    ET.SubElement(limit, f"{{{_TYPES}}}High").text = repr(limits[1])


def nodeset_xml(monitors: Iterable[str]) -> str:
    """Return a UANodeSet (Part 6, Annex F) with the result nodes of these monitors, to import into a server.

    Every variable is readable and writable (AccessLevel 3); namespace index 1 of the file is
    `urn:opcua-detector:results`.
    """
    ET.register_namespace("", _UA)
    ET.register_namespace("uax", _TYPES)
    root = ET.Element("UANodeSet", xmlns=_UA)
    uris = ET.SubElement(root, "NamespaceUris")
    ET.SubElement(uris, "Uri").text = RESULTS_NAMESPACE
    models = ET.SubElement(root, "Models")
    ET.SubElement(models, "Model", ModelUri=RESULTS_NAMESPACE, Version="1.0.0", PublicationDate="2026-11-01T00:00:00Z")
    for monitor in monitors:
        owner = f"ns=1;s={monitor}"
        obj = ET.SubElement(root, "UAObject", NodeId=owner, BrowseName=f"1:{monitor}")
        ET.SubElement(obj, "DisplayName").text = monitor
        ET.SubElement(obj, "Description").text = f"Results of monitor {monitor}"
        _references(obj, "i=58", "i=85", "i=35")
        for node in (*RESULT_NODES, *EXTRA_NODES, *INPUT_NODES):
            node_id = f"{owner}.{node.signal}"
            var = ET.SubElement(
                root, "UAVariable", NodeId=node_id, BrowseName=f"1:{node.signal}", ParentNodeId=owner,
                DataType=f"i={_TYPE_IDS[node.type]}", AccessLevel="3", UserAccessLevel="3",
                ValueRank="1" if node.array else "-1",
            )
            if node.array:
                var.set("ArrayDimensions", "0")
            ET.SubElement(var, "DisplayName").text = node.signal
            ET.SubElement(var, "Description").text = node.meaning
            _references(var, _variable_type(node), owner, "i=47")
            _value(var, node)
            if node.eu_range is not None and not node.array:
                _eu_range(root, node_id, node.eu_range)
    ET.indent(root, "  ")
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"
