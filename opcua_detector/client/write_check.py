"""Reads again what was just written and compares: a PLC's own logic may clamp it, or write over it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from asyncua import ua

from . import wire
from .casts import same
from .session import Session
from .write_flight import Flight
from .write_outputs import Output, short
from .write_requests import WriteRequests

log = logging.getLogger(__name__)


class ReadBack:
    """Compares the outputs of one session with what was written to them, every so often.

    every_s : 0: never
    counters : read_back (values compared), mismatches, read_back_failed (readings that the server refused, or whose
        answer was not readable) are counted there
    """

    def __init__(
        self, session: Session, flight: Flight, counters: dict[str, int], every_s: float, clock_s: Callable[[], float]
    ) -> None:
        self._session, self._flight, self._counters = session, flight, counters
        self._every_s, self._clock_s = every_s, clock_s
        self._at: dict[str, float] = {}
        self._refused = ""

    def begin(
        self, kind: str, outputs: Sequence[Output], requests: WriteRequests, then: Callable[[], None]
    ) -> bool:
        """Read what was just written, when it is time to; `then` is called when that is done.

        Returns whether it reads: the next write of the kind waits for it.
        """
        now = self._clock_s()
        if self._every_s <= 0 or not outputs or now - self._at.get(kind, 0.0) < self._every_s:
            return False
        self._at[kind] = now
        chosen = [(one, one.value) for one in outputs[: self._session.limit("read")]]

        def answered(body: Any) -> None:
            self._compare(body, chosen)
            then()

        self._flight.send(kind, "read back", requests.read([one for one, _ in chosen]), requests.client, answered)
        return True

    def _compare(self, body: Any, chosen: Sequence[tuple[Output, Any]]) -> None:
        try:
            results = wire.decode(body, ua.ReadResponse).Results
            if len(results) != len(chosen):
                raise ua.UaError(f"{len(results)} values for {len(chosen)} nodes")
        except Exception as error:  # a server that does not let itself be read is no fault of the connection
            self._fails(error)
            return
        if self._refused:
            log.warning("%s: what was written can be read back again", self._session.where)
            self._refused = ""
        for (output, written), one in zip(chosen, results, strict=True):
            self._counters["read_back"] += 1
            bad = one.StatusCode is not None and one.StatusCode.value & 0x80000000
            read = None if bad or one.Value is None else one.Value.Value
            agree = not bad and same(written, read, output.type)
            text = "" if agree else f"reads {one.StatusCode.name if bad else short(read)}, written {short(written)}"
            self._counters["mismatches"] += not agree
            if bool(text) != bool(output.mismatch):
                log.warning("%s: output %s.%s (%s) %s", self._session.where, output.monitor, output.signal,
                            output.node, text or "holds what is written again")
            output.mismatch = text

    def _fails(self, error: Exception) -> None:
        """Count a reading that failed; the log hears of the first, and of another reason."""
        self._counters["read_back_failed"] += 1
        reason = type(error).__name__
        if reason != self._refused:
            log.warning("%s: what was written cannot be read back: %s (further ones are counted only)",
                        self._session.where, error or reason)
        self._refused = reason
