"""The decorator of the kernels."""

from __future__ import annotations

from typing import Any

import numba


def kernel(*given: Any, **options: Any) -> Any:
    """Return `numba.njit` of these arguments, without reference counting.

    numba counts references to each array it passes on or slices, with locked instructions that take several times as
    long as what a kernel does with one value. All arrays of a kernel belong to its caller, who keeps them for the
    call, so there is nothing to count. Whoever allocates an array in a kernel is told by numba when it is compiled.
    """
    options["_nrt"] = False
    return numba.njit(*given, **options)
