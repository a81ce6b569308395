"""Tags that are elements of array nodes: one monitored item or one Read per node, for all the tags that it holds.

The whole array is asked for, and not an IndexRange of it (Part 4, 7.27): some servers ignore an IndexRange without a
word and send the array, of which the first element would then pass for the one that was meant; and a node that is asked
for once is sampled, encoded and sent once. The decoder picks one element of an array while it reads an answer, so an
answer is read once more for each further tag of the same node: some microseconds, and nothing where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..config import GroupConfig
from . import wire

Int32 = NDArray[np.int32]
# (int32[m] element by handle, columns to fill) -> the values of an answer that is at hand
Decode = Callable[[Int32, wire.Columns], wire.Samples]


def indexes_of(group: GroupConfig) -> dict[str, int]:
    """Return name of a tag -> its place in the array that its node is; scalars are left out."""
    return {tag.name: tag.index for tag in group.tags if tag.index is not None}


class Fan:
    """Which columns the values of an answer go to.

    Parameters
    ----------
    places : handle -> (column, element) of each tag of that node; element: place in the flattened array, -1: a scalar

    Attributes
    ----------
    elements : int32[m] by handle, what the first reading of an answer picks
    """

    def __init__(self, places: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        width = max(places, default=-1) + 1
        rounds = max((len(one) for one in places.values()), default=0)
        column = np.full((max(1, rounds), width), -1, np.int32)
        element = np.full((max(1, rounds), width), -1, np.int32)
        for handle, tags in places.items():
            for k, (of, at) in enumerate(tags):
                column[k, handle], element[k, handle] = of, at
        self.elements: Int32 = element[0] if (element[0] >= 0).any() else wire.NO_ELEMENTS
        self._column: Int32 = column[0]
        self._further = [(column[k], element[k], wire.Columns()) for k in range(1, rounds)]

    def spread(self, samples: wire.Samples, decode: Decode) -> tuple[Int32, wire.Samples, NDArray[np.int64]]:
        """Return the values of all tags in an answer.

        samples : int64[n] handles and so on, as first read with `elements`; every handle is one of `places`
        decode : reads the same answer again

        Returns column int32[m] >= n, the samples of these m, and int64[m], the row of the answer each of them is from.
        """
        column = self._column[samples.handle]
        rows = np.arange(len(column))
        if not self._further:
            return column, samples, rows
        columns, found, of = [column], [samples], [rows]
        for further, element, room in self._further:
            mine = np.flatnonzero(further[samples.handle] >= 0)
            if len(mine):
                columns.append(further[samples.handle[mine]])
                found.append(take(decode(element, room), mine))
                of.append(mine)
        return np.concatenate(columns), _join(found), np.concatenate(of)


def take(samples: wire.Samples, rows: NDArray[np.int64]) -> wire.Samples:
    """Return some rows of samples."""
    return wire.Samples(
        samples.handle[rows], samples.source_ns[rows], samples.server_ns[rows], samples.value[rows],
        samples.status[rows], text_at=None if samples.text_at is None else samples.text_at[rows], raw=samples.raw,
    )


def _join(parts: Sequence[wire.Samples]) -> wire.Samples:
    """Return samples of one answer as one."""
    texts = [one.text_at for one in parts if one.text_at is not None]
    return wire.Samples(
        np.concatenate([one.handle for one in parts]), np.concatenate([one.source_ns for one in parts]),
        np.concatenate([one.server_ns for one in parts]), np.concatenate([one.value for one in parts]),
        np.concatenate([one.status for one in parts]),
        text_at=np.concatenate(texts) if len(texts) == len(parts) else None, raw=parts[0].raw,
    )
