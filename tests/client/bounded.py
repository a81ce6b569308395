"""Limits that a real server keeps: put into the one of asyncua, which states limits and enforces none."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from asyncua import ua
from asyncua.common.utils import ServiceError
from asyncua.server.internal_session import InternalSession

from .conftest import OddServer

MANY = "many"


class Bounds:
    """How much the server takes of each kind of call, how often it was asked for more, and what the largest call was.

    per_call : read, translate, monitor, write, history, browse -> most items; a kind that is missing has no limit
    items : monitored items that all subscriptions of the server may hold
    refusal : StatusCode of a call that is too large
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **per_call: int) -> None:
        self.per_call = per_call
        self.items = 10**6
        self.refusal = ua.StatusCodes.BadTooManyOperations
        self.refused: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()
        for kind, method, length in (
            ("read", "read", lambda given: len(given.NodesToRead)),
            ("write", "write", lambda given: len(given.NodesToWrite)),
            ("history", "history_read", lambda given: len(given.NodesToRead)),
            ("browse", "browse", lambda given: len(given.NodesToBrowse)),
            ("translate", "translate_browsepaths_to_nodeids", len),
            ("monitor", "create_monitored_items", lambda given: len(given.ItemsToCreate)),
        ):
            self._bind(monkeypatch, kind, method, length)

    def _bind(self, monkeypatch: pytest.MonkeyPatch, kind: str, method: str, length: Any) -> None:
        original = getattr(InternalSession, method)

        async def bounded(session: InternalSession, given: Any, *more: Any) -> Any:
            if not session.external:
                return await original(session, given, *more)
            n = length(given)
            self.calls[kind] += 1
            if n > self.per_call.get(kind, 10**6):
                self.refused[kind] += 1
                raise ServiceError(self.refusal)
            self.largest[kind] = max(self.largest[kind], n)
            if kind == "monitor":
                return await self._monitor(session, given, original)
            return await original(session, given, *more)

        monkeypatch.setattr(InternalSession, method, bounded)

    async def _monitor(self, session: InternalSession, given: Any, original: Any) -> list[Any]:
        held = sum(
            len(one.monitored_item_srv._monitored_items)
            for one in session.subscription_service.subscriptions.values()
        )
        room = max(0, self.items - held)
        asked = list(given.ItemsToCreate)
        given.ItemsToCreate = asked[:room]
        results = list(await original(session, given))
        for _ in asked[room:]:
            full = ua.MonitoredItemCreateResult()
            full.StatusCode = ua.StatusCode(ua.StatusCodes.BadTooManyMonitoredItems)
            results.append(full)
        return results


async def add_many(odd: OddServer, n: int) -> list[str]:
    """Add n Double variables below Objects; return their names, which `odd.text` turns into nodes."""
    index = await odd.server.get_namespace_index(odd.uri)
    names = [f"{MANY}{k}" for k in range(n)]
    for k, name in enumerate(names):
        odd.nodes[name] = await odd.server.nodes.objects.add_variable(
            ua.NodeId(name, index), f"{index}:{name}", float(k), ua.VariantType.Double
        )
    return names
