"""What a subscription or a poll delivers, on its way to the rows: counted, completed, odd values masked."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from asyncua import ua
from numpy.typing import NDArray

from ..errors import ConnectionProblem
from . import wire
from .arrays import Fan, take
from .items import Item, Monitoring
from .silence import Silence

log = logging.getLogger(__name__)

GOOD_OVERLOAD = 0x002F0000  # Part 4, 7.38.2: sampling slowed down for lack of resources
# A value with one of these means that the node is not there any more, or not for us: its item may stay dead for ever.
_GONE = np.array(
    [getattr(ua.StatusCodes, name) for name in (
        "BadNodeIdUnknown", "BadNodeIdInvalid", "BadAttributeIdInvalid", "BadNotReadable", "BadUserAccessDenied",
        "BadMonitoredItemIdInvalid",
    )],
    np.uint32,
)
_TYPE_MISMATCH = np.uint32(ua.StatusCodes.BadTypeMismatch)

# (column int32[m], value float64[m], status uint32[m], sent_ns): as `Subscription`
OnRested = Callable[[NDArray[np.int32], NDArray[np.float64], NDArray[np.uint32], int], None]
OnSamples = Callable[[NDArray[np.int32], NDArray[np.int64], NDArray[np.float64], NDArray[np.uint32]], None]


class Intake:
    """Takes the samples of the items of one subscription.

    Parameters
    ----------
    items : all tags; state : what is asked of the server for them
    on_samples, on_resting : as `Subscription`
    silence : is told what was heard
    counters : of the subscription; samples, overload, null_timestamp, type_changes, not_numeric, unknown_handles

    Attributes
    ----------
    elements : int32[m] by client handle, for the decoder
    """

    def __init__(
        self, items: Sequence[Item], state: Monitoring, on_samples: OnSamples, on_resting: OnRested,
        counters: dict[str, int], silence: Silence, utc_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.counters, self._silence = counters, silence
        self._state, self._on_samples, self._on_resting, self._utc_ns = state, on_samples, on_resting, utc_ns
        self._by_column = {item.column: item for item in items}
        width = max(self._by_column, default=-1) + 1
        self._own = np.zeros(width, np.bool_)  # by client handle: is it one of these items
        self._own[list(state.places)] = True
        self._all_own = bool(self._own.all())
        self._no_text = np.zeros(width, np.bool_)
        self._no_text[[item.column for item in items if not item.text]] = True
        self._textual = np.zeros(width, np.bool_)  # by column, as the items say
        self._fan = Fan(state.places)
        self.elements = self._fan.elements

    def published(self, samples: wire.Samples) -> None:
        """Take the values of one notification."""
        handles = samples.handle
        if self._all_own and 0 <= samples.highest < len(self._own):  # what almost every notification is
            column, samples, _ = self._fan.spread(samples, partial(_read_again, samples.raw))
            self.take(column, samples.source_ns, samples)
            return
        known = (handles >= 0) & (handles < len(self._own))
        rows = None
        if not known.all() or not self._own[handles].all():
            known[known] = self._own[handles[known]]
            self.counters["unknown_handles"] += int(len(known) - known.sum())
            rows = np.flatnonzero(known)
            samples = take(samples, rows)
        if not len(samples.handle):
            return

        def again(elements: NDArray[np.int32], room: wire.Columns) -> wire.Samples:
            found = _read_again(samples.raw, elements, room)
            return found if rows is None else take(found, rows)

        column, samples, _ = self._fan.spread(samples, again)
        self.take(column, samples.source_ns, samples)

    def take(self, columns: NDArray[np.int32], stamps: NDArray[np.int64], samples: wire.Samples) -> None:
        """Count what is odd, put in what is missing, and hand the samples on.

        columns : int32[m]; stamps : int64[m], in place of the source stamps of the samples, NO_STAMP: none
        """
        self.counters["samples"] += len(columns)
        looked = stamps is samples.source_ns and not samples.notes & wire.NOTE_NO_STAMP
        if not looked and (null := stamps == wire.NO_STAMP).any():
            self.counters["null_timestamp"] += int(null.sum())
            stamps = np.where(null, samples.server_ns, stamps)
            stamps = np.where(stamps == wire.NO_STAMP, self._utc_ns(), stamps)
        value, status = self._looked_at(columns, samples)
        self._silence.heard(columns, samples.value, samples.status)
        self._on_samples(columns, stamps, value, status)

    def rested(self, columns: NDArray[np.int32], samples: wire.Samples, sent_ns: int) -> None:
        """Hand on what was read again and had not changed."""
        self.counters["samples"] += len(columns)
        value, status = self._looked_at(columns, samples)
        self._on_resting(columns, value, status, sent_ns)

    def _look_for_gone(
        self, columns: NDArray[np.int32], status: NDArray[np.uint32], severe: NDArray[np.bool_]
    ) -> None:
        """Doubt items whose node is gone, and believe those again that deliver."""
        gone = severe & np.isin(status & 0xFFFF0000, _GONE)
        for i in np.flatnonzero(gone):
            self._state.gone(int(columns[i]), wire.status_name(int(status[i]) & 0xFFFF0000))
        for column in columns[~gone & self._state.doubted[columns]]:
            self._state.back(int(column))

    def _looked_at(
        self, columns: NDArray[np.int32], samples: wire.Samples
    ) -> tuple[NDArray[np.float64], NDArray[np.uint32]]:
        """Count what is odd of the status; return values and status, without the texts of tags that are numbers."""
        if samples.notes & wire.NOTE_STATUS or self._state.doubted.any():
            severe = samples.status >= 0x80000000
            if severe.any() or self._state.doubted.any():
                self._look_for_gone(columns, samples.status, severe)
            self.counters["overload"] += int(((samples.status & 0xFFFF0000) == GOOD_OVERLOAD).sum())
        if samples.text_at is None or not (
                self._textual.any() or (samples.notes & wire.NOTE_TEXT and (samples.text_at >= 0).any())):
            return samples.value, samples.status
        return self._without_text(columns, samples.text_at >= 0, samples.value, samples.status)

    def _without_text(
        self, columns: NDArray[np.int32], text: NDArray[np.bool_], value: NDArray[np.float64],
        status: NDArray[np.uint32],
    ) -> tuple[NDArray[np.float64], NDArray[np.uint32]]:
        """Mask the texts of tags that are numbers: the code of a text would pass for a value."""
        wrong = text & self._no_text[columns]
        bad = status >= 0x80000000  # without a value, which says nothing of the type
        for i in np.flatnonzero((wrong != self._textual[columns]) & ~bad):
            item = self._by_column[int(columns[i])]
            item.textual = self._textual[item.column] = bool(wrong[i])
            self.counters["type_changes"] += 1
            log.warning(
                "%s: tag %s (%s) delivers %s", self._state.session.where, item.name, item.node,
                "text instead of numbers; it is masked" if item.textual else "numbers again",
            )
        if not wrong.any():
            return value, status
        self.counters["not_numeric"] += int(wrong.sum())
        return np.where(wrong, np.nan, value), np.where(wrong, _TYPE_MISMATCH, status).astype(np.uint32)


def _read_again(raw: bytes, elements: NDArray[np.int32], room: wire.Columns) -> wire.Samples:
    """Read the values of a notification message once more, with other elements of its arrays."""
    try:
        answer = wire.decode_publish(raw, room, elements)
    except ConnectionProblem:  # not a PublishResponse: it was brought back by Republish
        answer = wire.read_message(wire.open_republish(raw, 0), room, elements)
    assert answer.samples is not None
    return answer.samples
