"""Runs a configuration as the service does, and says in JSON lines how it stands, until it is killed."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from opcua_detector.config import load
from opcua_detector.service import Service, Writing


async def main(file: Path, lease_s: float) -> None:
    """Say every 20 ms what is committed, how many rows are scored, whether an alert stands and whether it writes."""
    service = Service(load(file), file, writing={"plant": Writing(lease_s=lease_s)})
    await service.start()
    assert service.store is not None
    while True:
        run = service.runs["lorenz"]
        print(json.dumps({"committed": service.store.committed_seq, "scored": run.scored,
                          "alert": run.monitor.verdict.alert, "writes": not run.standby}), flush=True)
        await asyncio.sleep(0.02)


asyncio.run(main(Path(sys.argv[1]), float(sys.argv[2])))
