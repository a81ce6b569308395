"""Runs a configuration as the service does and says what is committed, until it is killed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from opcua_detector.config import load
from opcua_detector.service import Service


async def main(file: Path) -> None:
    """Print the number of committed rows and verdicts whenever it changes."""
    service = Service(load(file), file)
    await service.start()
    told = 0
    while True:
        await asyncio.sleep(0.02)
        assert service.store is not None
        if service.store.committed_seq != told:
            told = service.store.committed_seq
            print(told, service.runs["lorenz"].scored, flush=True)


asyncio.run(main(Path(sys.argv[1])))
