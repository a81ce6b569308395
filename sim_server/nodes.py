"""The address space of the simulated plant: its objects, tags, fault nodes and methods."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from asyncua import Server, ua
from asyncua.common.xmlimporter import XmlImporter

from sim_server.disturb import DISTURBANCES
from sim_server.errors import StartError
from sim_server.processes import ProcessModel, TagSpec
from sim_server.quirks import QUIRKS
from sim_server.ua_types import node_id as make_node_id

PLANT_URI: Final = "urn:opcua-detector:simulated-plant"
RESULTS_URI: Final = "urn:opcua-detector:results"

_READ: Final = 0b0000_0001
_WRITE: Final = 0b0000_0010
_HISTORY: Final = 0b0000_0100

_UNECE: Final = "http://www.opcfoundation.org/UA/units/un/cefact"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlantNodes:
    """Where everything is.

    Attributes
    ----------
    namespace
        Index of `PLANT_URI`.
    tags
        NodeId and type of each tag, in the order of the tag table.
    factors
        NodeId of each fault node -> parameter.
    ground_truth, active_fault
        What is really wrong.
    diagnostics
        Counter name -> NodeId.
    results
        Writable variables that came with the NodeSets.
    """

    namespace: int
    tags: tuple[tuple[ua.NodeId, ua.VariantType], ...]
    factors: dict[ua.NodeId, str]
    ground_truth: ua.NodeId
    active_fault: ua.NodeId
    diagnostics: dict[str, ua.NodeId]
    results: list[ua.NodeId] = field(default_factory=list)


DIAGNOSTICS: Final = ("RowsPublished", "SamplesPublished", "SamplesDropped", "LateRows", "MaxLagMs")


class AddressSpaceWriter:
    """Adds nodes below the Plant object, each with a readable string NodeId."""

    def __init__(self, server: Server, namespace: int) -> None:
        self._server = server
        self._namespace = namespace

    def node_id(self, name: str) -> ua.NodeId:
        """Return ``ns=<plant>;s=<name>``."""
        return make_node_id(name, self._namespace)

    async def add_object(self, parent: ua.NodeId, name: str, browse_name: str, description: str) -> ua.NodeId:
        """Add an object and return its NodeId."""
        attributes = ua.ObjectAttributes()
        attributes.EventNotifier = 0
        organizes = parent == make_node_id(ua.ObjectIds.ObjectsFolder)
        return await self._add(
            self.node_id(name),
            parent,
            ua.ObjectIds.Organizes if organizes else ua.ObjectIds.HasComponent,
            ua.QualifiedName(browse_name, self._namespace),
            ua.NodeClass.Object,
            ua.ObjectIds.BaseObjectType,
            attributes,
            description,
        )

    async def add_variable(
        self,
        parent: ua.NodeId,
        name: str,
        browse_name: str,
        value: Any,
        variant_type: ua.VariantType,
        *,
        description: str = "",
        access: int = _READ,
        type_id: int = ua.ObjectIds.BaseDataVariableType,
    ) -> ua.NodeId:
        """Add a variable and return its NodeId; ``access`` is the AccessLevel for everybody."""
        return await self._add(
            self.node_id(name),
            parent,
            ua.ObjectIds.HasComponent,
            ua.QualifiedName(browse_name, self._namespace),
            ua.NodeClass.Variable,
            type_id,
            _variable(ua.Variant(value, variant_type), make_node_id(variant_type.value), access),
            description,
        )

    async def add_property(self, owner: str, browse_name: str, value: Any, data_type: int) -> None:
        """Add a read-only structure as property of a node."""
        variant = ua.Variant(value, ua.VariantType.ExtensionObject)
        await self._add(
            self.node_id(f"{owner}.{browse_name}"),
            self.node_id(owner),
            ua.ObjectIds.HasProperty,
            ua.QualifiedName(browse_name, 0),
            ua.NodeClass.Variable,
            ua.ObjectIds.PropertyType,
            _variable(variant, make_node_id(data_type), _READ),
            "",
        )

    async def _add(
        self,
        node_id: ua.NodeId,
        parent: ua.NodeId,
        reference: int,
        browse_name: ua.QualifiedName,
        node_class: ua.NodeClass,
        type_id: int,
        attributes: Any,
        description: str,
    ) -> ua.NodeId:
        attributes.DisplayName = ua.LocalizedText(browse_name.Name)
        attributes.Description = ua.LocalizedText(description)
        attributes.WriteMask = attributes.UserWriteMask = 0
        item = ua.AddNodesItem()
        item.RequestedNewNodeId = node_id
        item.BrowseName = browse_name
        item.ParentNodeId = parent
        item.ReferenceTypeId = make_node_id(reference)
        item.NodeClass = node_class
        item.TypeDefinition = make_node_id(type_id)
        item.NodeAttributes = attributes
        (result,) = await self._server.iserver.isession.add_nodes([item])
        result.StatusCode.check()
        added: ua.NodeId = result.AddedNodeId
        return added

    async def add_method(
        self,
        parent: ua.NodeId,
        name: str,
        callback: Callable[..., Any],
        arguments: tuple[tuple[str, ua.VariantType, str], ...],
    ) -> None:
        """Add a method; ``arguments`` are (name, type, description)."""
        inputs = []
        for argument_name, variant_type, description in arguments:
            argument = ua.Argument()
            argument.Name = argument_name
            argument.DataType = make_node_id(variant_type.value)
            argument.ValueRank = -1
            argument.Description = ua.LocalizedText(description)
            inputs.append(argument)
        node = self._server.get_node(parent)
        await node.add_method(
            self.node_id(f"{parent.Identifier!s}.{name}"),
            ua.QualifiedName(name, self._namespace),
            callback,
            inputs,
            [],
        )


def _variable(value: ua.Variant, data_type: ua.NodeId, access: int) -> ua.VariableAttributes:
    attributes = ua.VariableAttributes()
    attributes.Value = value
    attributes.DataType = data_type
    attributes.ValueRank = -1
    attributes.AccessLevel = attributes.UserAccessLevel = access
    attributes.Historizing = bool(access & _HISTORY)
    attributes.MinimumSamplingInterval = 0.0
    return attributes


def unit_information(tag: TagSpec) -> ua.EUInformation:
    """Return the engineering unit of a tag; the UnitId is made of the UNECE code's bytes.

    Source: OPC UA Part 8, clause 5.6.4.3.
    """
    unit_id = 0
    for letter in tag.unit_code.encode("ascii"):
        unit_id = unit_id << 8 | letter
    unit = ua.EUInformation()
    unit.NamespaceUri = _UNECE
    unit.UnitId = unit_id
    unit.DisplayName = ua.LocalizedText(tag.unit)
    unit.Description = ua.LocalizedText(tag.unit)
    return unit


async def add_tag(
    writer: AddressSpaceWriter, plant: ua.NodeId, process: str, tag: TagSpec
) -> tuple[ua.NodeId, ua.VariantType]:
    """Add one tag with its range and unit; a state is a plain Int32."""
    name = f"{process}.{tag.name}"
    if tag.kind == "state":
        kind, type_id = ua.VariantType.Int32, ua.ObjectIds.BaseDataVariableType
    else:
        kind, type_id = ua.VariantType.Double, ua.ObjectIds.AnalogItemType
    node_id = await writer.add_variable(
        plant,
        name,
        tag.name,
        0 if kind == ua.VariantType.Int32 else 0.0,
        kind,
        description=tag.description,
        access=_READ | _HISTORY,
        type_id=type_id,
    )
    if type_id == ua.ObjectIds.AnalogItemType:
        await writer.add_property(name, "EURange", ua.Range(tag.eu_low, tag.eu_high), ua.ObjectIds.Range)
        await writer.add_property(name, "EngineeringUnits", unit_information(tag), ua.ObjectIds.EUInformation)
    return node_id, kind


async def build_plant(
    server: Server,
    model: ProcessModel,
    tags: tuple[TagSpec, ...],
    methods: dict[str, Callable[..., Any]],
) -> PlantNodes:
    """Build Objects/Plant/<process> with tags, faults, methods, ground truth and counters.

    Parameters
    ----------
    server
        Initialised, not started; both namespaces are registered here, the plant's first.
    methods
        Callbacks named SetFault, ClearFaults, SetQuirk, ClearQuirks and Disturb.
    """
    namespace = await server.register_namespace(PLANT_URI)
    await server.register_namespace(RESULTS_URI)
    writer = AddressSpaceWriter(server, namespace)
    objects = make_node_id(ua.ObjectIds.ObjectsFolder)
    name = model.name
    top = await writer.add_object(objects, "plant", "Plant", "Simulated plant")
    plant = await writer.add_object(top, name, name, f"Simulated process {name}")
    tag_nodes = [await add_tag(writer, plant, name, tag) for tag in tags]
    faults = await writer.add_object(
        plant, f"{name}.faults", "faults", "Factor of each parameter; 1 is healthy"
    )
    factors = {}
    for one in model.parameters:
        node_id = await writer.add_variable(
            faults,
            f"{name}.faults.{one.name}",
            one.name,
            1.0,
            ua.VariantType.Double,
            description=f"{one.description}: factor {one.factor_low} .. {one.factor_high}",
            access=_READ | _WRITE,
        )
        factors[node_id] = one.name
    truth = await writer.add_variable(
        plant,
        f"{name}.ground_truth",
        "ground_truth",
        False,
        ua.VariantType.Boolean,
        description="Whether any parameter is faulty",
        access=_READ | _HISTORY,
    )
    active = await writer.add_variable(
        plant,
        f"{name}.active_fault",
        "active_fault",
        "",
        ua.VariantType.String,
        description="The faults in force, empty when healthy",
    )
    await _add_methods(writer, plant, methods)
    diagnostics = await _add_diagnostics(writer, plant, name)
    return PlantNodes(namespace, tuple(tag_nodes), factors, truth, active, diagnostics)


async def _add_methods(
    writer: AddressSpaceWriter, plant: ua.NodeId, methods: dict[str, Callable[..., Any]]
) -> None:
    text, number = ua.VariantType.String, ua.VariantType.Double
    await writer.add_method(
        plant,
        "SetFault",
        methods["SetFault"],
        (("name", text, "Parameter"), ("factor", number, "1 is healthy")),
    )
    await writer.add_method(plant, "ClearFaults", methods["ClearFaults"], ())
    await writer.add_method(
        plant,
        "SetQuirk",
        methods["SetQuirk"],
        (
            ("tag", text, "Tag, 'measured' or '*'"),
            ("quirk", text, f"One of {', '.join(QUIRKS)}"),
            ("value", number, "0 switches it off"),
        ),
    )
    await writer.add_method(plant, "ClearQuirks", methods["ClearQuirks"], ())
    await writer.add_method(
        plant,
        "Disturb",
        methods["Disturb"],
        (
            ("what", text, f"One of {', '.join(DISTURBANCES)}"),
            ("argument", text, "What the disturbance needs, else empty"),
        ),
    )


async def _add_diagnostics(writer: AddressSpaceWriter, plant: ua.NodeId, name: str) -> dict[str, ua.NodeId]:
    parent = await writer.add_object(plant, f"{name}.diagnostics", "diagnostics", "Counters of the server")
    found = {}
    for counter in DIAGNOSTICS:
        kind = ua.VariantType.Double if counter.endswith("Ms") else ua.VariantType.UInt32
        found[counter] = await writer.add_variable(
            parent, f"{name}.diagnostics.{counter}", counter, 0.0 if counter.endswith("Ms") else 0, kind
        )
    return found


async def load_nodesets(server: Server, files: tuple[Path, ...]) -> list[ua.NodeId]:
    """Load NodeSet2 files and return their writable variables, each with a typed Good value.

    Raises
    ------
    StartError
        A file is missing, is no NodeSet2, or asks for a model that is not there.
    """
    writable = []
    for file in files:
        if not file.is_file():
            raise StartError("NodeSet not found", str(file), "Check --nodeset or the key nodesets.")
        importer = XmlImporter(server, strict_mode=True)
        try:
            added = await importer.import_xml(str(file))
        except Exception as error:
            raise StartError(
                f"NodeSet cannot be loaded ({type(error).__name__}: {error})",
                str(file),
                "It must be a NodeSet2 XML file without models that this server does not have.",
            ) from error
        for node_id in added:
            if await _prepare_result(server, node_id):
                writable.append(node_id)
        _logger.info("loaded %s: %d nodes", file, len(added))
    return writable


async def _prepare_result(server: Server, node_id: ua.NodeId) -> bool:
    """Give an imported variable a typed Good value and everybody the node's own rights."""
    aspace = server.iserver.aspace
    node_class = aspace.read_attribute_value(node_id, ua.AttributeIds.NodeClass).Value
    if node_class is None or node_class.Value != ua.NodeClass.Variable:
        return False
    level = aspace.read_attribute_value(node_id, ua.AttributeIds.AccessLevel)
    # a NodeSet seldom states UserAccessLevel; the importer then leaves read-only
    await server.iserver.write_attribute_value(node_id, level, ua.AttributeIds.UserAccessLevel)
    current = aspace.read_attribute_value(node_id, ua.AttributeIds.Value)
    if current.Value is None or current.Value.VariantType == ua.VariantType.Null:
        value = _initial_value(aspace, node_id)
        if value is not None:
            await server.iserver.write_attribute_value(node_id, ua.DataValue(value))
    return level.Value is not None and bool(level.Value.Value & _WRITE)


def _initial_value(aspace: Any, node_id: ua.NodeId) -> ua.Variant | None:
    """Zero of a built-in type, an empty list for an array; None where the type is not built in."""
    data_type = aspace.read_attribute_value(node_id, ua.AttributeIds.DataType).Value.Value
    if data_type.NamespaceIndex != 0 or not 1 <= data_type.Identifier <= 25:
        return None
    kind = ua.VariantType(data_type.Identifier)
    rank = aspace.read_attribute_value(node_id, ua.AttributeIds.ValueRank).Value
    if rank is not None and rank.Value is not None and int(rank.Value) >= 0:
        return ua.Variant([], kind, is_array=True)
    if kind == ua.VariantType.String:
        return ua.Variant("", kind)
    if kind == ua.VariantType.DateTime:
        return ua.Variant(datetime(1970, 1, 1, tzinfo=UTC), kind)
    return ua.Variant(ua.get_default_value(kind), kind)
