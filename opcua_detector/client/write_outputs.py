"""What is known of the configured output nodes: which are written, which are not and why, told once per change.

A server that withdraws the right to write fails all outputs of a request at once, and gives it back the same way: one
line then names how many and the first few, not one line each.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .wire_requests import WriteTo

log = logging.getLogger(__name__)

NOT_CONNECTED, NOT_THERE = "not connected", "the server does not have it"
OUTSIDE = "is outside the allow-list"
NO_RIGHT = "this user may not write it"
RETRY_FIRST_S, RETRY_LAST_S = 1.0, 30.0
GATHER_S = 0.2  # one event reaches the fast and the slow request, and the parts of either, so far apart
_NAMED = 3  # outputs in one line
_TOLD = 2  # outputs that a Quality text names
_RIGHTS = frozenset({NO_RIGHT, "BadUserAccessDenied", "BadNotWritable"})  # one event, whichever says it


@dataclass(slots=True, eq=False)
class Output:
    """One configured node.

    reason : why it is not written now; empty while it is
    optional : that the server does not have it is no fault
    mismatch : what was read back instead of the value written; empty while they agree
    shown : the value of a dry run, as it would be written
    target : node and type on this connection; value : as it was last cast to them
    told : the reason that the log was given last; empty: that it is written
    """

    monitor: str
    signal: str
    node: str
    optional: bool = False
    reason: str = NOT_CONNECTED
    mismatch: str = ""
    shown: Any = None
    retry_at: float = 0.0
    delay_s: float = RETRY_FIRST_S
    target: WriteTo | None = field(default=None, repr=False)
    value: Any = field(default=None, repr=False)
    told: str = ""

    @property
    def type(self) -> str:
        """Built-in type of the node, empty before it is known."""
        return "" if self.target is None else self.target.type

    @property
    def array(self) -> bool:
        """Whether the node holds an array."""
        return self.target is not None and self.target.array

    @property
    def missing(self) -> bool:
        """Whether it is one that the server need not have, and has not."""
        return self.optional and self.reason == NOT_THERE


class ServerOutputs(Mapping[tuple[str, str], Output]):
    """The outputs of one server by (monitor, signal).

    where : who speaks, at the beginning of a line of the log
    """

    def __init__(
        self, nodes: Mapping[tuple[str, str], str], optional: Mapping[tuple[str, str], str],
        where: Callable[[], str], clock_s: Callable[[], float],
    ) -> None:
        self._all = {key: Output(*key, text) for key, text in nodes.items()}
        self._all |= {key: Output(*key, text, optional=True) for key, text in optional.items()}
        self._of: dict[str, list[Output]] = {}
        for output in self._all.values():
            self._of.setdefault(output.monitor, []).append(output)
        self._where, self._clock_s = where, clock_s
        self._news: dict[Output, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __getitem__(self, key: tuple[str, str]) -> Output:
        return self._all[key]

    def __iter__(self) -> Any:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    # --- changes ---

    def fails(self, output: Output, reason: str) -> None:
        """Take an output out until it is tried again, later each time."""
        output.reason, output.mismatch = reason, ""
        output.retry_at = self._clock_s() + output.delay_s
        output.delay_s = min(output.delay_s * 2, RETRY_LAST_S)
        self._changed(output)

    def found(self, output: Output, target: WriteTo) -> bool:
        """Take an output up whose node is there and writable; whether it had missed what was offered meanwhile.

        The log hears of it when a write succeeds: a right that a server shows and does not give is no news.
        """
        missed = output.reason not in ("", NOT_CONNECTED)
        output.reason, output.target = "", target
        return missed

    def written(self, output: Output) -> None:
        """Take note that the server took a value."""
        output.delay_s = RETRY_FIRST_S
        if output.told:
            self._changed(output)

    def lost(self) -> None:
        """Take note that the connection is gone, which its session tells."""
        self.tell()
        for output in self._all.values():
            output.reason, output.mismatch, output.target = NOT_CONNECTED, "", None

    def due(self) -> list[Output]:
        """Return the outputs that are to be tried again now."""
        now = self._clock_s()
        return [one for one in self._all.values() if one.reason and one.retry_at <= now]

    # --- what the log hears ---

    def _changed(self, output: Output) -> None:
        self._news[output] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER_S, self.tell)

    def tell(self) -> None:
        """Write what has changed since the last time: one line for what fails, one for what is written again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        news, self._news = self._news, {}
        failing: dict[str, list[Output]] = {}
        again = []
        for output in news:
            if output.reason in (NOT_CONNECTED, output.told) or output.missing:
                continue
            if not output.reason:
                again.append(output)
            elif not (output.reason in _RIGHTS and output.told in _RIGHTS):
                failing.setdefault(output.reason, []).append(output)
            output.told = output.reason
        if failing:
            count = sum(len(each) for each in failing.values())
            log.warning("%s: %s not written: %s", self._where(), _count(count),
                        "; ".join(f"{_names(each)}: {reason}" for reason, each in failing.items()))
        if again:
            log.warning("%s: %s written again: %s", self._where(), _count(len(again)), _names(again))

    # --- what is shown ---

    def states(self) -> dict[tuple[str, str], str]:
        """Return for each output why it is not written; empty while it is."""
        return {key: output.reason for key, output in self._all.items() if not output.missing}

    def mismatches(self) -> dict[tuple[str, str], str]:
        """Return the outputs that hold another value than was written, with what was read."""
        return {key: output.mismatch for key, output in self._all.items() if output.mismatch}

    def trouble(self, monitor: str) -> str:
        """Say in a few words which outputs of a monitor are not written, or not kept, by a server that is there."""
        found = [(one.signal, one.reason or one.mismatch) for one in self._of.get(monitor, ())
                 if (one.reason or one.mismatch) and one.reason != NOT_CONNECTED and not one.missing]
        if not found:
            return ""
        more = f" and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
        return "not written: " + ", ".join(f"{signal} ({why})" for signal, why in found[:_TOLD]) + more

    def preview(self) -> dict[tuple[str, str], Any]:
        """Return what a dry run would have written last, cast to the types of the nodes."""
        return {key: output.shown for key, output in self._all.items() if output.shown is not None}

    def preview_lines(self) -> list[str]:
        """Return what a dry run would have written last, one line per output, and why it could not write the others."""
        lines = []
        for one in self._all.values():
            if one.shown is not None and not one.reason:
                kind = f"{one.type}[]" if one.array else one.type
                lines.append(f"{one.monitor}.{one.signal} = {short(one.shown)} ({kind}) to {one.node}")
            elif one.reason and not one.missing:
                lines.append(f"{one.monitor}.{one.signal} not to {one.node}: {one.reason}")
        return lines


def short(value: Any) -> str:
    """Return a value as text of at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _count(n: int) -> str:
    return "1 output is" if n == 1 else f"{n} outputs are"


def _names(outputs: Iterable[Output]) -> str:
    every = list(outputs)
    first = ", ".join(f"{one.monitor}.{one.signal} ({one.node})" for one in every[:_NAMED])
    return first + (f" and {len(every) - _NAMED} more" if len(every) > _NAMED else "")
