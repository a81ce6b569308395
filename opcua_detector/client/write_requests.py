"""Write and Read requests of the output nodes, encoded once for each set of nodes that is written together.

A row writes the same nodes every time, so the bytes of its request differ by its values alone (`wire_requests`). What
the prepared form cannot hold is encoded by asyncua; a value that neither can encode is the fault of its output.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from asyncua import Client, ua

from . import wire
from .wire_requests import Encoded, PreparedRead, PreparedWrite, ReadFrom
from .write_outputs import Output

MOST_SETS = 64  # sets of nodes whose requests are kept; of more, the oldest are made anew
_UNFIT = (ValueError, TypeError, OverflowError, AttributeError, struct.error, ua.UaError)


class CannotEncode(ValueError):
    """Some values have no encoding as the type of their node; `outputs` are these, with what is wrong."""

    def __init__(self, outputs: list[tuple[Output, str]]) -> None:
        self.outputs = outputs
        super().__init__(f"{len(outputs)} values cannot be encoded")


class WriteRequests:
    """The requests of one connection; they belong to its session, so a new connection needs new ones.

    encoded : how many were left to asyncua
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.encoded = 0
        self._token = wire.token_of(client)
        # By the identity of the targets, which the requests keep alive: a node that is found anew is a new target.
        self._writes: dict[tuple[int, ...], PreparedWrite | None] = {}
        self._reads: dict[tuple[int, ...], PreparedRead] = {}

    def write(self, outputs: Sequence[Output]) -> wire.Prepared:
        """Return the request that writes `value` to each output, alone: without status and time stamps.

        Its bytes hold until the next call. CannotEncode where a value is not of the type of its node.
        """
        key = tuple([id(one.target) for one in outputs])
        try:
            prepared = self._writes[key]
        except KeyError:
            prepared = self._prepare(key, outputs)
        if prepared is not None:
            try:
                prepared.set([one.value for one in outputs])
                return prepared
            except _UNFIT:
                pass  # asyncua may still know how
        return self._encode(outputs)

    def _prepare(self, key: tuple[int, ...], outputs: Sequence[Output]) -> PreparedWrite | None:
        try:
            prepared: PreparedWrite | None = PreparedWrite(self._token, [_known(one) for one in outputs])
        except ValueError:
            return None  # of no use to remember: who has such a type is rare
        while len(self._writes) >= MOST_SETS:
            del self._writes[next(iter(self._writes))]
        self._writes[key] = prepared
        return prepared

    def _encode(self, outputs: Sequence[Output]) -> Encoded:
        unfit: list[tuple[Output, str]] = []
        request = ua.WriteRequest()
        for one in outputs:
            try:
                item = _item(one)
                ua.ua_binary.struct_to_binary(item)
                request.Parameters.NodesToWrite.append(item)
            except _UNFIT as error:
                unfit.append((one, f"its value cannot be encoded as {one.type}: {error}"))
        if unfit:
            raise CannotEncode(unfit)
        self.encoded += 1
        return Encoded(self._token, request)

    def read(self, outputs: Sequence[Output]) -> PreparedRead:
        """Return the request that reads the values of these outputs, without time stamps."""
        key = tuple([id(one.target) for one in outputs])
        found = self._reads.get(key)
        if found is None:
            while len(self._reads) >= MOST_SETS:
                del self._reads[next(iter(self._reads))]
            targets = [_known(one) for one in outputs]
            found = PreparedRead(self._token, [ReadFrom(one.node) for one in targets], times="neither")
            self._reads[key] = found
        return found


def _known(output: Output) -> Any:
    if output.target is None:
        raise ValueError(f"the node of {output.monitor}.{output.signal} is not known on this connection")
    return output.target


def _item(output: Output) -> Any:
    """Return asyncua's WriteValue of an output."""
    target = _known(output)
    item = ua.WriteValue()
    item.NodeId, item.AttributeId = target.node, ua.AttributeIds.Value
    item.Value = ua.DataValue(
        ua.Variant(output.value, ua.VariantType[target.type], is_array=target.array), None)
    return item
