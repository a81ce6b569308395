"""Kernels count no references, so they may not allocate."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from opcua_detector.kernels.jit import kernel


def test_a_kernel_that_allocates_is_refused_when_it_is_compiled() -> None:
    with pytest.raises(numba.core.errors.NumbaError, match="zeros"):

        @kernel("float64(int64)")
        def allocates(n: int) -> float:
            return float(np.zeros(n).sum())


def test_a_kernel_slices_and_passes_on_the_arrays_of_its_caller_and_counts_none() -> None:
    @kernel("float64(float64[::1])")
    def inner(x: np.ndarray) -> float:
        total = 0.0
        for value in x:
            total += value
        return total

    @kernel("float64(float64[:, ::1])")
    def outer(x: np.ndarray) -> float:
        total = 0.0
        for i in range(x.shape[0]):
            total += inner(x[i])
        return total

    rows = np.arange(12.0).reshape(3, 4)
    assert outer(rows) == rows.sum()
    assert "NRT_incref" not in outer.inspect_llvm(outer.signatures[0])
