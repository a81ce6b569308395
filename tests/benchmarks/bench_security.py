"""Measures what a secure connection costs: a round trip over Basic256Sha256 against the plain one, in one run.

    python tests/benchmarks/bench_security.py

A simulated plant in its own process, three sessions to it (policy None, Sign, SignAndEncrypt). The round trips take
turns, so that what else the machine does falls on all of them; the median ratio is held against 1.8. "prepared" are
the requests of the running product (bytes made before, answer decoded into columns), "asyncua" those of its start.
CPU is that of this process per round trip. Exit code 1 where a ratio is above 1.8.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
from asyncua import ua

from opcua_detector.cli.simulator import simulated_plant
from opcua_detector.client import Session, wire
from opcua_detector.client.pki import load_chain
from opcua_detector.client.trust import Folder, TrustList
from opcua_detector.client.wire_requests import PreparedRead, ReadFrom
from opcua_detector.config import ServerConfig

ALLOWED = 1.8
WARM_UP = 30
SERVER_STATE = ua.NodeId(2259)
MODES: dict[str, dict[str, Any]] = {
    "plain": {"policy": "None", "insecure": True}, "Sign": {"mode": "Sign"}, "SignAndEncrypt": {},
}


def round_trips(session: Session, nodes: int) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Return the kinds of round trip: a Read of so many values."""
    client = session.client
    prepared = PreparedRead(wire.token_of(client), [ReadFrom(SERVER_STATE)] * nodes)
    ids = [SERVER_STATE] * nodes

    async def ours() -> None:
        wire.decode_read(await wire.send_prepared(client, prepared, 4.0), nodes)

    async def theirs() -> None:
        await client.uaclient.read_attributes(ids, ua.AttributeIds.Value)

    return {"prepared": ours, "asyncua": theirs}


async def measure(endpoint: str, pki: Path, turns: int) -> list[dict[str, Any]]:
    """Return one row per kind and number of values: median round trips in us and their ratios."""
    sessions = {
        name: Session(ServerConfig(name=name, endpoint=endpoint, pki=pki, **changes)) for name, changes in MODES.items()
    }
    rows = []
    try:
        shown = (await sessions["plain"].discover()).endpoints
        raw = next(bytes(one.ServerCertificate) for one in shown if one.ServerCertificate)
        TrustList(pki).put(load_chain(raw)[0], Folder.TRUSTED)
        for session in sessions.values():
            await session.open()
        for nodes in (1, 20, 200):
            trips = {name: round_trips(session, nodes) for name, session in sessions.items()}
            for kind in ("prepared", "asyncua"):
                took = {name: np.empty(turns) for name in sessions}
                cpu = {name: np.empty(turns) for name in sessions}
                for k in range(-WARM_UP, turns):
                    for name in sessions:
                        began, used = time.perf_counter(), time.process_time()
                        await trips[name][kind]()
                        if k >= 0:
                            took[name][k] = time.perf_counter() - began
                            cpu[name][k] = time.process_time() - used
                plain = took["plain"]
                rows.append({
                    "kind": kind, "values": nodes,
                    **{f"{name}_us": float(np.median(took[name])) * 1e6 for name in sessions},
                    **{f"{name}_cpu_us": float(np.median(cpu[name])) * 1e6 for name in sessions},
                    "ratio_sign": float(np.median(took["Sign"] / plain)),
                    "ratio": float(np.median(took["SignAndEncrypt"] / plain)),
                })
    finally:
        for session in sessions.values():
            await session.close()
    return rows


def main() -> int:
    """Print one line per case and a JSON object last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=600, help="round trips of each kind")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # that the plain one is insecure is what is measured
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--process", "lorenz", "--history-rows", "0", "--pki", f"{folder}/plant"]
        with simulated_plant(arguments) as plant:
            rows = asyncio.run(measure(plant["endpoint"], Path(folder) / "client", options.turns))
    for row in rows:
        print(f"{row['kind']:9} {row['values']:4} values: plain {row['plain_us']:6.0f} us, Sign {row['Sign_us']:6.0f}, "
              f"SignAndEncrypt {row['SignAndEncrypt_us']:6.0f} us = {row['ratio']:.2f} x "
              f"(CPU here {row['plain_cpu_us']:.0f} -> {row['SignAndEncrypt_cpu_us']:.0f} us)")
    failed = [row for row in rows if row["ratio"] > ALLOWED]
    print("Basic256Sha256 SignAndEncrypt is at most 1.8 x the plain round trip:", "no" if failed else "yes")
    print(json.dumps({"rows": rows, "ok": not failed}))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
