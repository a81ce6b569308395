"""Kernel that looks at the masks of a row."""

from __future__ import annotations

from .jit import kernel


@kernel("boolean(uint8[::1], int64[::1])", cache=True, nogil=True)
def all_valid(valid, at):
    """Return whether the entries `at` int64[k] of valid uint8[n] are all not 0; numpy takes 1 us to say so."""
    good = 0
    for k in at:
        good += valid[k] != 0
    return good == at.shape[0]
