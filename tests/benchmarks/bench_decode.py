"""Measures decode and encode on the wire: CPU time against asyncua's own codec, same process, same bytes.

    python tests/benchmarks/bench_decode.py [--repeats 7]

Decoding ends in columns (value, status, source and server stamp, handle), asyncua's in its dataclasses. Each figure is
the least of the repeats, each repeat at least 50 ms of asyncua's work. Prints one line per case, what falls short of
the figures that the project holds (200 x at 1000 uniform items, 15 x at 20, 8 x with mixed masks), and a JSON object
last.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from asyncua import ua
from asyncua.common.utils import Buffer
from asyncua.ua.ua_binary import nodeid_to_binary, struct_from_binary, struct_to_binary

from opcua_detector.client import wire
from opcua_detector.client.wire_requests import PreparedPublish, PreparedRead, PreparedWrite, ReadFrom, WriteTo

NOW = datetime(2026, 1, 1, tzinfo=UTC)
KINDS = (
    (ua.VariantType.Double, 1.5), (ua.VariantType.Float, 2.5), (ua.VariantType.Boolean, True),
    (ua.VariantType.Int16, -7), (ua.VariantType.UInt32, 7), (ua.VariantType.Int64, 2**40), (ua.VariantType.Byte, 9),
    (ua.VariantType.String, "running"),
)
LEAST = {
    "publish, 1000 uniform": 200.0, "publish, 20 uniform": 15.0, "publish, 20 mixed": 8.0, "publish, 1000 mixed": 8.0,
}


def uniform(n: int) -> list[ua.DataValue]:
    """Doubles with both stamps, as plants send them."""
    return [
        ua.DataValue(ua.Variant(i * 0.5, ua.VariantType.Double), None, NOW + timedelta(milliseconds=i), NOW)
        for i in range(n)
    ]


def mixed(n: int) -> list[ua.DataValue]:
    """Several types, status words and stamps, in random order."""
    rng = random.Random(0)
    values = []
    for _ in range(n):
        kind, value = rng.choice(KINDS)
        status = ua.StatusCode(rng.choice((0x40000000, 0x80000000, 0x480))) if rng.random() < 0.3 else None
        stamps = [NOW if rng.random() < 0.8 else None for _ in range(2)]
        values.append(ua.DataValue(ua.Variant(value, kind), status, *stamps))
    return values


def publish_bytes(values: list[ua.DataValue]) -> bytes:
    """Encode a PublishResponse."""
    response = ua.PublishResponse()
    change = ua.DataChangeNotification()
    for i, one in enumerate(values):
        item = ua.MonitoredItemNotification()
        item.ClientHandle, item.Value = i, one
        change.MonitoredItems.append(item)
    response.Parameters.AvailableSequenceNumbers = [1, 2]
    response.Parameters.Results = [ua.StatusCode()]
    response.Parameters.NotificationMessage.SequenceNumber = 2
    response.Parameters.NotificationMessage.NotificationData = [change]
    return bytes(struct_to_binary(response))


def read_bytes(values: list[ua.DataValue]) -> bytes:
    """Encode a ReadResponse."""
    response = ua.ReadResponse()
    response.Results = values
    return bytes(struct_to_binary(response))


def history_bytes(values: list[ua.DataValue]) -> bytes:
    """Encode a HistoryReadResponse of one node."""
    response = ua.HistoryReadResponse()
    result = ua.HistoryReadResult()
    result.HistoryData = ua.HistoryData()
    result.HistoryData.DataValues = values
    response.Results.append(result)
    return bytes(struct_to_binary(response))


def least_us(work: Callable[[], Any], repeats: int, calls: int) -> float:
    """CPU time of one call in microseconds, the least of the repeats."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.process_time_ns()
        for _ in range(calls):
            work()
        best = min(best, (time.process_time_ns() - begin) / calls / 1e3)
    return best


def compare(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Time both and print the ratio."""
    ours(), theirs()
    rough = max(least_us(theirs, 1, 3), 1.0)
    calls = max(1, round(50_000 / rough))
    their_us = least_us(theirs, repeats, calls)
    our_us = least_us(ours, repeats, 10 * calls)
    ratio = their_us / our_us
    print(f"{name:28s} ours {our_us:8.2f} us   asyncua {their_us:9.1f} us   {ratio:6.1f} x")
    return {"ours_us": round(our_us, 3), "asyncua_us": round(their_us, 2), "ratio": round(ratio, 1)}


def decoding(repeats: int) -> dict[str, dict[str, float]]:
    """Publish, Read and HistoryRead."""
    found = {}
    columns = wire.Columns()
    for kind, make in (("uniform", uniform), ("mixed", mixed)):
        for n in (20, 100, 1000):
            raw = publish_bytes(make(n))
            name = f"publish, {n} {kind}"
            found[name] = compare(
                name,
                lambda raw=raw: wire.decode_publish(Buffer(raw), columns),
                lambda raw=raw: struct_from_binary(ua.PublishResponse, Buffer(raw)),
                repeats,
            )
        raw = read_bytes(make(100))
        name = f"read, 100 {kind}"
        found[name] = compare(
            name,
            lambda raw=raw: wire.decode_read(Buffer(raw), 100, columns),
            lambda raw=raw: struct_from_binary(ua.ReadResponse, Buffer(raw)),
            repeats,
        )
    raw = history_bytes(uniform(1000))
    found["history, 1000 uniform"] = compare(
        "history, 1000 uniform",
        lambda: wire.decode_history(Buffer(raw)),
        lambda: struct_from_binary(ua.HistoryReadResponse, Buffer(raw)),
        repeats,
    )
    return found


def encoding(repeats: int) -> dict[str, dict[str, float]]:
    """Write of 16 Doubles, Read of 100 nodes, Publish with two acknowledgements."""
    token = bytes(nodeid_to_binary(ua.NodeId(1, 0)))
    nodes = [ua.NodeId(f"results.signal{i}", 2) for i in range(100)]
    values = [0.5 * i for i in range(16)]
    write = PreparedWrite(token, [WriteTo(node, "Double") for node in nodes[:16]])

    def our_write() -> None:
        write.set(values)
        write.body(1, 2, 3)

    def their_write() -> None:
        request = ua.WriteRequest()
        for node, value in zip(nodes, values, strict=False):
            item = ua.WriteValue()
            item.NodeId, item.AttributeId = node, ua.AttributeIds.Value
            item.Value = ua.DataValue(ua.Variant(value, ua.VariantType.Double), None)
            request.Parameters.NodesToWrite.append(item)
        struct_to_binary(request)

    read = PreparedRead(token, [ReadFrom(node) for node in nodes])

    def their_read() -> None:
        request = ua.ReadRequest()
        for node in nodes:
            item = ua.ReadValueId()
            item.NodeId, item.AttributeId = node, ua.AttributeIds.Value
            request.Parameters.NodesToRead.append(item)
        struct_to_binary(request)

    publish = PreparedPublish(token)

    def our_publish() -> None:
        publish.acknowledge([(1, 2), (1, 3)])
        publish.body(1, 2, 3)

    def their_publish() -> None:
        request = ua.PublishRequest()
        for number in (2, 3):
            ack = ua.SubscriptionAcknowledgement()
            ack.SubscriptionId, ack.SequenceNumber = 1, number
            request.Parameters.SubscriptionAcknowledgements.append(ack)
        struct_to_binary(request)

    return {
        "write request, 16 Doubles": compare("write request, 16 Doubles", our_write, their_write, repeats),
        "read request, 100 nodes": compare("read request, 100 nodes", lambda: read.body(1, 2, 3), their_read, repeats),
        "publish request, 2 acks": compare("publish request, 2 acks", our_publish, their_publish, repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    found = decoding(repeats) | encoding(repeats)
    short = {name: least for name, least in LEAST.items() if found[name]["ratio"] < least}
    for name, least in short.items():
        print(f"short: {name}: {found[name]['ratio']} x, wanted {least:g} x")
    print(json.dumps({"decode": found, "short": sorted(short)}))


if __name__ == "__main__":
    main()
