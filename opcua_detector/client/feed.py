"""A group's tags, from one or several servers, as frames: subscriptions in, one call per row out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from ..api import Frame
from ..config import GroupConfig
from ..frames import FrameBuilder
from .session import Session
from .subscription import Item, Revised, Subscription

log = logging.getLogger(__name__)

_LEAST_KEEP_ALIVE_S = 0.5


class GroupFeed:
    """Rows of a group, live.

    Parameters
    ----------
    group : tags, period, sampling, publishing, lateness, max_hold
    sessions : name of the server -> its session
    on_frame : called synchronously for each closed row with one reused frame; it must not wait
    clock_ns : for silence of an idle plant

    Attributes
    ----------
    builder : FrameBuilder
    frame : the reused Frame
    """

    def __init__(
        self,
        group: GroupConfig,
        sessions: Mapping[str, Session],
        on_frame: Callable[[Frame], None],
        *,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.group = group
        tags = [tag.tag() for tag in group.tags]
        self.builder = FrameBuilder(tags, group.period, group.lateness_ns, group.max_hold)
        self.frame = Frame.empty(len(tags))
        self.frame_errors = 0
        self._on_frame = on_frame
        self._clock_ns = clock_ns
        self._newest_ns: int | None = None
        self._pushed_at_ns = 0
        by_server: dict[str, list[Item]] = {}
        for column, tag in enumerate(group.tags):
            by_server.setdefault(tag.server or group.server, []).append(Item(tag.name, tag.node, column))
        self.subscriptions = {
            server: Subscription(
                sessions[server],
                items,
                sampling_ns=group.sampling_ns,
                publishing_ns=group.publishing_ns,
                on_samples=self._samples,
                on_lost=self._lost,
                on_idle=self._idle,
                keep_alive_s=max(_LEAST_KEEP_ALIVE_S, group.max_hold * group.period / 2e9),
                clock_ns=clock_ns,
            )
            for server, items in by_server.items()
        }

    async def start(self) -> None:
        """Subscribe on every server; the sessions must be open."""
        for subscription in self.subscriptions.values():
            await subscription.session.attach(subscription)

    async def stop(self) -> None:
        """Stop the rows."""
        for subscription in self.subscriptions.values():
            subscription.session.detach(subscription)

    def counters(self) -> dict[str, int]:
        """Return the counters of rows and of subscriptions by name; those of several servers are added."""
        found = self.builder.counters()
        for subscription in self.subscriptions.values():
            for name, n in subscription.counters.items():
                found[name] = found.get(name, 0) + n
        found["lost"] += found["overflowed"] + found["lost_notifications"]
        found["frame_errors"] = self.frame_errors
        return found

    def tag_states(self) -> dict[str, str]:
        """Return for each tag why it delivers nothing; empty while it delivers."""
        items = sorted(
            (item for one in self.subscriptions.values() for item in one.items), key=lambda i: i.column
        )
        return {item.name: item.reason for item in items}

    def revised(self) -> dict[str, Revised]:
        """Return per server what it made of the requested intervals."""
        return {server: one.revised for server, one in self.subscriptions.items()}

    def _samples(
        self,
        column: NDArray[np.int32],
        source_ns: NDArray[np.int64],
        value: NDArray[np.float64],
        status: NDArray[np.uint32],
    ) -> None:
        self._newest_ns = max(int(source_ns.max()), self._newest_ns or 0)
        self._pushed_at_ns = self._clock_ns()
        self.builder.push(column, source_ns, value, status)
        self._drain()

    def _lost(self) -> None:
        self._newest_ns = None
        self.builder.connection_lost()
        self._drain()

    def _drain(self) -> None:
        while self.builder.next_row(self.frame):
            try:
                self._on_frame(self.frame)
            except Exception:
                self.frame_errors += 1
                if self.frame_errors == 1:
                    log.exception(
                        "group %s: a row could not be worked on; further ones are counted only",
                        self.group.name,
                    )

    def _idle(self) -> None:
        """Close held rows when a server says that it lives and nothing has changed.

        By a keep-alive and not by a timer: a server that stalls says nothing, and its samples, late but
        complete, must find their rows open.
        """
        if self._newest_ns is None:
            return
        silent_ns = self._clock_ns() - self._pushed_at_ns
        # The source clock as it was at the last value, less the time a value may be under way.
        self.builder.advance(self._newest_ns + silent_ns - 2 * self.group.publishing_ns)
        self._drain()
