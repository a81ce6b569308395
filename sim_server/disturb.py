"""What goes wrong in a server while it runs: nodes vanish, types change, rights go, subscriptions and sessions end.

Each disturbance is one a real controller shows after a download, a change by an engineer, or a lack of resources.
The quirks (`sim_server.quirks`) are about samples; these are about the server that sends them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Final

from asyncua import Server, ua
from asyncua.server.internal_session import InternalSession
from asyncua.server.uaprocessor import UaProcessor

from sim_server.errors import QuirkError
from sim_server.ua_types import data_value, node_id, status_code, to_variant

DISTURBANCES: Final = MappingProxyType(
    {
        "delete_subscriptions": "All subscriptions end without a word",
        "expire_subscriptions": "All subscriptions end with StatusChangeNotification BadTimeout",
        "close_sessions": "All sessions that have a subscription are closed without a word",
        "session_limit": "At most so many sessions; 0: no limit",
        "publish_limit": "At most so many publish requests are kept; 0: the usual number",
        "remove": "The node of this name vanishes; its monitored items get BadNodeIdUnknown once, then nothing",
        "restore": "The node of this name is there again; monitored items of before stay dead",
        "type": "A tag changes its type: <tag>=<Double, Float, Int32, Boolean or String>",
        "read_only": "The result nodes whose name begins so can no longer be written",
        "writable": "The result nodes whose name begins so can be written again",
        "clock": "The server's clock is so many ms ahead of the true time (negative: behind), in answers and stamps",
    }
)
"""Name -> meaning of it and of its argument."""

NO_LIMIT: Final = 1000
"""Sessions that the server library allows by default."""

_TYPES: Final = MappingProxyType(
    {name: ua.VariantType[name] for name in ("Double", "Float", "Int32", "Boolean", "String")}
)
_WRITE: Final = 0b10

_USUAL_PUBLISH_LIMIT: Final = UaProcessor.publish_request_limit
_USUAL_SEND: Final = UaProcessor.send_response


class Disturber:
    """Disturbs a running server.

    Parameters
    ----------
    server
        Initialised.
    namespace
        Index of the namespace of the tags.
    process
        Name of the simulated process; tags are ``s=<process>.<tag>``.
    results
        Writable result nodes.
    set_type
        Called with (tag, type) when a tag changes its type.
    set_clock
        Called with the offset of the server's clock, ns, when it jumps.
    """

    def __init__(
        self,
        server: Server,
        namespace: int,
        process: str,
        results: Sequence[ua.NodeId],
        set_type: Callable[[str, ua.VariantType], None],
        set_clock: Callable[[int], None],
    ) -> None:
        self._server = server
        self._namespace = namespace
        self._process = process
        self._results = tuple(results)
        self._set_type = set_type
        self._set_clock = set_clock
        self._removed: dict[ua.NodeId, Any] = {}
        self._do: Mapping[str, Callable[[str], Awaitable[None]]] = {
            name: getattr(self, f"_{name}") for name in DISTURBANCES
        }

    async def disturb(self, what: str, argument: str) -> None:
        """Do one of `DISTURBANCES`.

        Raises
        ------
        QuirkError
            Unknown disturbance, or an argument that names nothing.
        """
        if what not in self._do:
            raise QuirkError(
                f"disturbance {what!r} is not known", "what", what, f"one of {', '.join(DISTURBANCES)}"
            )
        await self._do[what](argument)

    # -- subscriptions and sessions ----------------------------------------------------------------

    async def _delete_subscriptions(self, argument: str) -> None:
        service = self._server.iserver.subscription_service
        await service.delete_subscriptions(list(service.subscriptions))

    async def _expire_subscriptions(self, argument: str) -> None:
        service = self._server.iserver.subscription_service
        for subscription in list(service.subscriptions.values()):
            await subscription.enqueue_statuschange(status_code(ua.StatusCodes.BadTimeout))
            subscription._startup = True  # else a status change alone is not published
            await subscription.publish_results()
        await self._delete_subscriptions(argument)

    async def _close_sessions(self, argument: str) -> None:
        owners = {one.session_id for one in self._server.iserver.subscription_service.subscriptions.values()}
        bserver = self._server.bserver
        assert bserver is not None
        for client in list(bserver.clients):
            session = client.processor.session if client.processor is not None else None
            if session is not None and session.session_id in owners:
                await session.close_session(True)

    async def _session_limit(self, argument: str) -> None:
        InternalSession.max_connections = _number(argument) or NO_LIMIT

    async def _publish_limit(self, argument: str) -> None:
        limit = _number(argument)

        def limited(processor: UaProcessor, subscription_count: int) -> int:
            return limit or _USUAL_PUBLISH_LIMIT(processor, subscription_count)

        UaProcessor.publish_request_limit = limited  # type: ignore[assignment,method-assign]

    async def _clock(self, argument: str) -> None:
        """SourceTimestamps are set by the quirk ``skew_ms``: many a device has its own clock."""
        try:
            offset = timedelta(milliseconds=float(argument))
        except (ValueError, OverflowError) as error:
            raise QuirkError(f"argument {argument!r}", "argument", argument, "milliseconds") from error

        def shifted(processor: UaProcessor, handle: int, sequence: Any, response: Any, *more: Any) -> None:
            response.ResponseHeader.Timestamp += offset
            _USUAL_SEND(processor, handle, sequence, response, *more)

        UaProcessor.send_response = shifted if offset else _USUAL_SEND  # type: ignore[method-assign]
        self._set_clock(offset // timedelta(microseconds=1) * 1000)

    # -- nodes -------------------------------------------------------------------------------------

    def _node(self, name: str) -> ua.NodeId:
        """Return the node of a tag (``x1``) or of a result (``lorenz.Score``)."""
        for node in self._results:
            if node.Identifier == name:
                return node
        return node_id(f"{self._process}.{name}", self._namespace)

    async def _remove(self, argument: str) -> None:
        node, space = self._node(argument), self._server.iserver.aspace
        if node not in space:
            raise QuirkError(f"there is no node {argument!r}", "argument", argument, "a tag or a result node")
        data = self._removed[node] = space[node]
        value = data.attributes[ua.AttributeIds.Value]
        gone = data_value(
            ua.Variant(None, ua.VariantType.Null), status_code(ua.StatusCodes.BadNodeIdUnknown), None, None
        )
        for handle, callback in list(value.datachange_callbacks.items()):
            await callback(handle, gone)
            space.delete_datachange_callback(handle)
        del space[node]

    async def _restore(self, argument: str) -> None:
        node = self._node(argument)
        if node not in self._removed:
            raise QuirkError(f"node {argument!r} was not removed", "argument", argument, "a node that was removed")
        self._server.iserver.aspace[node] = self._removed.pop(node)

    async def _type(self, argument: str) -> None:
        tag, _, name = argument.partition("=")
        node, space = self._node(tag), self._server.iserver.aspace
        if name not in _TYPES or node not in space:
            raise QuirkError(f"type {argument!r}", "argument", argument, f"<tag>=<one of {', '.join(_TYPES)}>")
        attributes, kind = space[node].attributes, _TYPES[name]
        attributes[ua.AttributeIds.DataType].value = ua.DataValue(ua.Variant(node_id(kind.value)))
        attributes[ua.AttributeIds.Value].value = ua.DataValue(to_variant(0.0, kind, 0))
        self._set_type(tag, kind)

    async def _read_only(self, argument: str) -> None:
        await self._access(argument, lambda level: level & ~_WRITE)

    async def _writable(self, argument: str) -> None:
        await self._access(argument, lambda level: level | _WRITE)

    async def _access(self, prefix: str, change: Callable[[int], int]) -> None:
        space = self._server.iserver.aspace
        for node in self._results:
            if not str(node.Identifier).startswith(prefix) or node not in space:
                continue
            for attribute in (ua.AttributeIds.AccessLevel, ua.AttributeIds.UserAccessLevel):
                level = space.read_attribute_value(node, attribute).Value
                assert level is not None
                value = ua.DataValue(ua.Variant(change(int(level.Value)), ua.VariantType.Byte))
                await self._server.iserver.write_attribute_value(node, value, attribute)


def _number(argument: str) -> int:
    if not argument.isdigit():
        raise QuirkError(f"argument {argument!r}", "argument", argument, "a whole number, 0 or more")
    return int(argument)
