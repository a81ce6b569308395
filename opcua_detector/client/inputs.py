"""Texts that an HMI writes for the detector, such as feedback: read twice a second, handed on once, then emptied.

Polled and not subscribed: a click is rare, a poll is one small request, and it needs nothing of the server that
reading its nodes does not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from asyncua import Client, ua

from ..errors import ConnectionProblem, NodeProblem
from . import wire
from .nodes import NodeRef, read_attributes, resolve
from .session import ENDING_S, Session
from .waiting import end_tasks, within

log = logging.getLogger(__name__)

POLL_S = 0.5
MOST_CHARS = 200

OnTexts = Callable[[str, Mapping[str, str], bool], None]


class TextInputs:
    """A part of a session that watches String nodes.

    Parameters
    ----------
    nodes : name -> {signal: text of the node}; `trigger` is the signal that starts something when it is not empty
    on_texts : called with (name, {signal: text}, stale) when the trigger of a name is not empty; `stale`: it already
        stood there when these nodes were first read, so nobody knows how old it is
    may_take : whether the texts of a name are for us now; an instance that stands by leaves them to the other one

    Attributes
    ----------
    missing : nodes that the server does not have; those of one name are all watched or none
    """

    def __init__(
        self, session: Session, nodes: Mapping[str, Mapping[str, str]], trigger: str, on_texts: OnTexts,
        may_take: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self.session, self._nodes, self._trigger, self._on_texts = session, nodes, trigger, on_texts
        self._may_take = may_take
        self.missing: list[str] = []
        self._refs: dict[str, dict[str, NodeRef]] = {}
        self._seen: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    async def link_up(self) -> None:
        """Find the nodes on this connection and watch those that are there."""
        found = await resolve(self.session, [text for signals in self._nodes.values() for text in signals.values()])
        self._refs, missing = {}, []
        for name, signals in self._nodes.items():
            refs = {signal: ref for signal, text in signals.items() if isinstance(ref := found[text], NodeRef)}
            values = await self._read(list(refs.values())) if len(refs) == len(signals) else []
            if values and all(isinstance(one, str) for one in values):
                self._refs[name] = refs
            else:
                missing += list(signals.values())
        if missing and missing != self.missing:
            log.info("%s: no input from %s: no such String nodes", self.session.where, ", ".join(missing))
        self.missing = missing
        if self._refs:
            self._task = asyncio.create_task(self._watch(self.session.client), name="text inputs")

    def link_down(self) -> None:
        """Forget the connection."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._refs = {}

    async def stop(self) -> None:
        """Read nothing more."""
        task, self._task = self._task, None
        await end_tasks((task,), ENDING_S)
        self.session.detach(self)

    async def _read(self, refs: list[NodeRef]) -> list[str | None]:
        """Return the texts; None where one is no text."""
        values = await read_attributes(self.session, [(ref.id, ua.AttributeIds.Value) for ref in refs])
        texts: list[str | None] = []
        for value in values:
            bad = value.StatusCode is not None and value.StatusCode.value & 0x80000000
            content = None if bad or value.Value is None else value.Value.Value
            if isinstance(content, ua.LocalizedText):
                content = content.Text
            empty = not bad and content is None and value.Value is not None
            texts.append("" if empty else content[:MOST_CHARS] if isinstance(content, str) else None)
        return texts

    async def _watch(self, client: Client) -> None:
        try:
            while True:
                for name, refs in self._refs.items():
                    if not self._may_take(name):
                        continue
                    texts = dict(zip(refs, await self._read(list(refs.values())), strict=True))
                    text = (texts[self._trigger] or "").strip()
                    stale = name not in self._seen
                    self._seen.add(name)
                    if text and await self._empty(refs[self._trigger]):
                        self._on_texts(name, {signal: (one or "").strip() for signal, one in texts.items()}, stale)
                await asyncio.sleep(POLL_S)
        except (ConnectionProblem, NodeProblem, OSError, TimeoutError, ua.UaError) as error:
            self.session.fail(f"read inputs: {error}", client)

    async def _empty(self, ref: NodeRef) -> bool:
        """Empty the trigger, so that the same text can be written again; False where the server refuses."""
        item: Any = ua.WriteValue()
        item.NodeId, item.AttributeId = ref.id, ua.AttributeIds.Value
        item.Value = ua.DataValue(ua.Variant("", ua.VariantType.String), None)
        request = ua.WriteRequest()
        request.Parameters.NodesToWrite = [item]
        timeout_s = self.session.timeout_s
        answer = await within(wire.send(self.session.client, request, timeout_s), timeout_s)
        if any(code & 0x80000000 for code in wire.write_results(answer)):
            # Handing it on all the same would hand it on at every poll.
            log.warning("%s: %s cannot be emptied, so it is not read", self.session.where, ref.text)
            self._refs = {name: refs for name, refs in self._refs.items() if ref not in refs.values()}
            return False
        return True
