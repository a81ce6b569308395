"""The event loop of a process that talks to servers: uvloop where it is installed, else asyncio's own."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from typing import Any


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the event loop, for `asyncio.Runner(loop_factory=...)`; None: asyncio's own.

    uvloop (libuv) spends less on each turn than asyncio in Python does. It is an extra, `opcua-detector[fast]`, since
    it does not exist on Windows; nothing but time depends on it.
    """
    try:
        uvloop: Any = importlib.import_module("uvloop")
    except ImportError:
        return None
    make: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return make
