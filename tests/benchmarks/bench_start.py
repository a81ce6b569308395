"""How long a start takes: 10 000 tags on 5 connections, from nothing to the first row of every group.

    python tests/benchmarks/bench_start.py --servers 5 --tags 10000 [--vendor node-opcua]

Each server is a process of its own with `tags / servers` Double variables that change once a second. The client does
what the service does: sessions at the same time, all tags checked (found, type, rights, unit, present value), then a
group per server at 1 Hz. Reported: seconds of each step, CPU seconds of this process, its peak memory, and over the
`--watch` seconds after it the CPU share and the samples delivered. The start (`start_s`) is done when the first value
of each tag is there; the first row follows when the rule of time has seen some periods (`frames.START_PERIODS`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

URI = "urn:opcua-detector:load"


def serve(n: int) -> None:
    """Run an asyncua server with n variables that count once a second; prints its port; ends when stdin closes."""
    from asyncua import Server, ua

    async def main() -> None:
        server = Server()
        await server.init()
        server.set_endpoint("opc.tcp://127.0.0.1:0/")
        server.set_security_policy([ua.SecurityPolicyType.NoSecurity])
        index = await server.register_namespace(URI)
        folder = await server.nodes.objects.add_folder(index, "Load")
        nodes = [
            await folder.add_variable(ua.NodeId(f"v{k}", index), f"v{k}", 0.0, ua.VariantType.Double) for k in range(n)
        ]
        await server.start()
        assert server.bserver is not None
        print(server.bserver.port, flush=True)
        ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        count = 0.0
        while not ended.done():
            began = time.monotonic()
            count += 1
            for node in nodes:
                await server.write_attribute_value(node.nodeid, ua.DataValue(ua.Variant(count, ua.VariantType.Double)))
            await asyncio.wait({ended}, timeout=max(0.01, 1.0 - (time.monotonic() - began)))
        await server.stop()

    asyncio.run(main())


def asyncua_servers(stack: ExitStack, n: int, tags: int) -> tuple[list[str], str]:
    """Start n servers of asyncua; return their endpoints and the pattern of a node."""
    children = []
    for _ in range(n):
        child = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(tags)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.callback(child.wait)
        stack.callback(child.stdin.close)  # type: ignore[union-attr]
        children.append(child)
    ports = [int(child.stdout.readline()) for child in children]  # type: ignore[union-attr]
    return [f"opc.tcp://127.0.0.1:{port}/" for port in ports], f"nsu={URI};s=v{{}}"


def node_servers(stack: ExitStack, n: int, tags: int) -> tuple[list[str], str]:
    """Start n servers of node-opcua; return their endpoints and the pattern of a node."""
    from plant.node_server import node_server

    servers = [
        stack.enter_context(node_server(load={"count": tags, "rate": 1}, min_sampling_ms=10)) for _ in range(n)
    ]
    return [one.endpoint for one in servers], "nsu=urn:opcua-detector:simulated-plant;s=load.{}"


async def start(endpoints: list[str], pattern: str, tags: int, watch_s: float) -> dict[str, Any]:
    """Do what the service does at its start, and watch what is delivered afterwards."""
    from opcua_detector.api import Frame
    from opcua_detector.client import GroupFeed, Session, check_tags
    from opcua_detector.config import GroupConfig, ServerConfig, TagConfig

    groups = [
        GroupConfig(name=f"g{k}", server=f"s{k}", period="1 s",
                    tags=tuple(TagConfig(name=f"v{i}", node=pattern.format(i)) for i in range(tags)))
        for k in range(len(endpoints))
    ]
    sessions = {
        f"s{k}": Session(ServerConfig(name=f"s{k}", endpoint=one, policy="None", insecure=True, timeout="20 s"))
        for k, one in enumerate(endpoints)
    }
    took: dict[str, float] = {}
    cpu, at = time.process_time(), time.monotonic()
    begun = at

    def step(name: str) -> None:
        nonlocal at
        now = time.monotonic()
        took[name], at = now - at, now

    await asyncio.gather(*(one.open() for one in sessions.values()))
    step("sessions_s")
    findings = await asyncio.gather(
        *(check_tags(sessions[group.server], [tag.tag() for tag in group.tags]) for group in groups))
    step("check_s")
    errors = [str(one) for found in findings for one in found if one.error]
    whole = [asyncio.Event() for _ in groups]
    rows = [0] * len(groups)

    def take(k: int, frame: Frame) -> None:
        rows[k] += 1
        if frame.valid.all():
            whole[k].set()

    feeds = [
        GroupFeed(group, sessions, lambda frame, k=k: take(k, frame))  # type: ignore[misc]
        for k, group in enumerate(groups)
    ]
    await asyncio.gather(*(feed.start() for feed in feeds))
    step("subscribe_s")
    async with asyncio.timeout(120):
        while any(feed.counters()["delivered"] < tags for feed in feeds):  # the first value of each tag
            await asyncio.sleep(0.02)
        step("first_values_s")
        started_s, started_cpu = time.monotonic() - begun, time.process_time() - cpu
        await asyncio.gather(*(one.wait() for one in whole))
    step("first_whole_rows_s")
    delivered = sum(feed.counters()["delivered"] for feed in feeds)
    cpu, at = time.process_time(), time.monotonic()
    await asyncio.sleep(watch_s)
    watched = time.monotonic() - at
    counts = [feed.counters() for feed in feeds]
    delivered = sum(one["delivered"] for one in counts) - delivered
    found = {
        "tags": tags * len(endpoints), "connections": len(endpoints), "errors": errors[:3],
        "polled": sum(len(feed.polled_tags()) for feed in feeds),
        **{name: round(value, 2) for name, value in took.items()},
        "start_s": round(started_s, 2), "start_cpu_s": round(started_cpu, 2),
        "cpu_percent": round(100 * (time.process_time() - cpu) / watched, 1),
        "delivered_per_s": round(delivered / watched, 1), "lost": sum(one["lost"] for one in counts),
        "halved_calls": sum(one.counters["halved_calls"] for one in sessions.values()),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }
    await asyncio.gather(*(feed.stop() for feed in feeds))
    await asyncio.gather(*(one.close() for one in sessions.values()))
    return found


def main() -> None:
    """Parse the options, run, print one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--servers", type=int, default=5)
    parser.add_argument("--tags", type=int, default=10_000, help="of all servers together")
    parser.add_argument("--vendor", choices=["asyncua", "node-opcua"], default="asyncua")
    parser.add_argument("--watch", type=float, default=10.0, help="seconds to watch after the start")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        serve(given.serve)
        return
    each = given.tags // given.servers
    with ExitStack() as stack:
        begin = asyncua_servers if given.vendor == "asyncua" else node_servers
        endpoints, pattern = begin(stack, given.servers, each)
        found = asyncio.run(start(endpoints, pattern, each, given.watch))
    print(json.dumps({"vendor": given.vendor, **found}))


if __name__ == "__main__":
    main()
