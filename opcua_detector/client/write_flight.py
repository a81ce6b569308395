"""Requests of the write-back that are under way: at most one of each kind, each with a time-out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from asyncua import Client
from asyncua.ua.uaerrors import UaError

from . import wire
from .session import Session


class Flight:
    """At most one request of a kind ("fast": scores, "slow": texts) under way on a session.

    on_timeout : called when one was not answered, before the session is told
    """

    def __init__(self, session: Session, on_timeout: Callable[[], None]) -> None:
        self._session, self._on_timeout = session, on_timeout
        self._out: dict[str, tuple[object, asyncio.TimerHandle]] = {}
        self._landed: asyncio.Future[None] | None = None

    def busy(self, kind: str) -> bool:
        """Whether one of this kind is under way."""
        return kind in self._out

    def send(
        self, kind: str, what: str, request: wire.Prepared, client: Client, call: Callable[[Any], None]
    ) -> bool:
        """Send a request and have `call` get the body of its answer; False where the connection is gone.

        A connection that ends, or does not answer, is told to the session; `call` is then never called.
        """
        mark = object()
        timeout_s = self._session.timeout_s

        def answered(body: Any, error: BaseException | None) -> None:
            if self._out.get(kind, (None,))[0] is not mark:
                return  # of an earlier connection
            if error is not None:
                self._session.fail(f"{what}: {error}", client)
                return
            self._out.pop(kind)[1].cancel()
            if not self._out and self._landed is not None and not self._landed.done():
                self._landed.set_result(None)
            call(body)

        try:
            wire.post(client, request, timeout_s, answered)
        except (OSError, UaError) as error:
            self._session.fail(f"{what}: {error}", client)
            return False
        timer = asyncio.get_running_loop().call_later(timeout_s, self._timed_out, kind, what, mark, client)
        self._out[kind] = (mark, timer)
        return True

    def _timed_out(self, kind: str, what: str, mark: object, client: Client) -> None:
        if self._out.get(kind, (None,))[0] is mark:
            self._on_timeout()
            self._session.fail(f"{what}: no answer within {self._session.timeout_s:g} s", client)

    def forget(self) -> None:
        """Wait for none of them any more: their connection is gone."""
        for _, timer in self._out.values():
            timer.cancel()
        self._out.clear()
        if self._landed is not None and not self._landed.done():
            self._landed.set_result(None)

    async def landed(self, timeout_s: float) -> None:
        """Wait until none is under way, no longer than the time-out."""
        if self._out:
            self._landed = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._landed], timeout=timeout_s)
