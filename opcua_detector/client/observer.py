"""A second, plain client: reads result nodes as an HMI would, and works the simulated plant as its operator would.

It shares nothing with the detector's own session: asyncua's stock client, its stock codecs, its own connection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from asyncua import Client, ua

from ..errors import ConnectionProblem, ServerUnreachable
from .waiting import farewell, within


class Observer:
    """Plain client of one server without security, for demonstration and measurement on loopback."""

    def __init__(self, endpoint: str, *, timeout_s: float = 4.0) -> None:
        self._client = Client(endpoint, timeout=timeout_s)
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._nodes: dict[str, Any] = {}

    async def __aenter__(self) -> Self:
        try:
            await within(self._client.connect(), 2 * self._timeout_s)
        except (OSError, TimeoutError, ua.UaError) as error:
            raise ServerUnreachable(
                f"the second client cannot connect: {error}",
                where=self._endpoint,
                next_step="check that the server runs",
            ) from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await farewell(self._client.disconnect(), self._timeout_s)

    async def _node(self, text: str) -> Any:
        """Return the node of `nsu=<uri>;s=<identifier>`."""
        if text not in self._nodes:
            uri, identifier = text.removeprefix("nsu=").split(";", 1)
            index = await self._client.get_namespace_index(uri)
            self._nodes[text] = self._client.get_node(f"ns={index};{identifier}")
        return self._nodes[text]

    async def read(self, nodes: Mapping[str, str]) -> dict[str, Any]:
        """Read all nodes in one request; return name -> value, DateTime as ns since 1970 UTC."""
        found = [await self._node(text) for text in nodes.values()]
        try:
            values = await self._client.read_values(found)
        except (OSError, TimeoutError, ua.UaError) as error:
            raise ConnectionProblem(
                f"the second client cannot read: {error}", where=self._endpoint
            ) from error
        return {
            name: to_ns(value) if isinstance(value, datetime) else value
            for name, value in zip(nodes, values, strict=True)
        }

    async def write_double(self, node: str, value: float) -> None:
        """Write a Double, value only."""
        target = await self._node(node)
        await target.write_attribute(
            ua.AttributeIds.Value, ua.DataValue(ua.Variant(value, ua.VariantType.Double))
        )

    async def watch(
        self, node: str, publishing_ms: float, on_value: Callable[[Any, int | None, int], None]
    ) -> None:
        """Call `on_value(value, source_ns, seen_ns)` on each change; DateTime values as ns."""

        class Handler:
            def datachange_notification(self, _node: Any, value: Any, change: Any) -> None:
                stamp = change.monitored_item.Value.SourceTimestamp
                on_value(
                    to_ns(value) if isinstance(value, datetime) else value,
                    None if stamp is None else to_ns(stamp),
                    time.time_ns(),
                )

        subscription = await self._client.create_subscription(publishing_ms, Handler())
        await subscription.subscribe_data_change(await self._node(node), queuesize=100, sampling_interval=ua.Double(0))


def to_ns(value: datetime) -> int:
    """Return ns since 1970 UTC of an OPC UA DateTime as asyncua gives it (naive means UTC)."""
    aware = value if value.tzinfo else value.replace(tzinfo=UTC)
    delta = aware - datetime(1970, 1, 1, tzinfo=UTC)
    return ((delta.days * 86400 + delta.seconds) * 10**6 + delta.microseconds) * 1000
