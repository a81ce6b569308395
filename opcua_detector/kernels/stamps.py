"""Kernels over the samples of one notification: the clock of their source, and when each tag was heard."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from .jit import kernel

Array = NDArray[Any]


@kernel("int64(int64[::1], int32[::1], int64[::1], int64, int64)", cache=True, nogil=True)
def wild_stamps(last: Array, column: Array, source_ns: Array, most_ns: int, tolerance_ns: int) -> int:
    """Return how many stamps are above `most_ns`, or behind the last of their tag by more than a tolerance.

    Where none is, they become the last of their tags: numpy needs eight passes for what one does here.

    last : int64[n_tags]; column : int32[m]; source_ns : int64[m]
    """
    wild = 0
    for i in range(source_ns.shape[0]):
        if source_ns[i] > most_ns or source_ns[i] < last[column[i]] - tolerance_ns:
            wild += 1
    if wild == 0:
        for i in range(source_ns.shape[0]):
            if source_ns[i] > last[column[i]]:
                last[column[i]] = source_ns[i]
    return wild


@kernel("void(int64[::1], float64[::1], uint32[::1], int32[::1], float64[::1], uint32[::1], int64)", cache=True,
      nogil=True)
def note_heard(
    heard_ns: Array, last: Array, last_status: Array, column: Array, value: Array, status: Array, now_ns: int,
) -> None:
    """Note when each tag was heard, and with what.

    heard_ns int64[n_tags], last float64[n_tags], last_status uint32[n_tags] : written
    column int32[m], value float64[m], status uint32[m] : of the samples; now_ns : monotonic
    """
    for i in range(column.shape[0]):
        heard_ns[column[i]] = now_ns
        last[column[i]] = value[i]
        last_status[column[i]] = status[i]
