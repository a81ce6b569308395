"""Kernels around the Cholesky factor of a ridge regression; the factor itself is LAPACK's (`np.linalg.cholesky`)."""

from __future__ import annotations

from .jit import kernel


@kernel("void(float64[:, ::1], int64[::1], float64, float64[:, ::1])", cache=True)
def ridged(total, entries, ridge, out):
    """Write the upper triangle of total[entries, entries] + ridge I into float64[k, k]; the lower one is left.

    Its transpose is the lower triangle column by column, as LAPACK reads it.

    total float64[n, n], symmetric; entries int64[k]
    """
    for i in range(entries.shape[0]):
        row = total[entries[i]]
        for j in range(i, entries.shape[0]):
            out[i, j] = row[entries[j]]
        out[i, i] += ridge


@kernel("void(float64[:, ::1], float64[::1])", cache=True)
def last_on_others(factor, weights):
    """Write float64[k - 1]: the regression of the last entry on all others, from the Cholesky factor float64[k, k].

    With A = [[B, b], [b', c]] = L L' the last row of L holds y = M^-1 b, where M M' = B, so M' w = y is all that is
    left of B w = b; L is read by rows.
    """
    k = weights.shape[0]
    for i in range(k):
        weights[i] = factor[k, i]
    for i in range(k - 1, -1, -1):
        w = weights[i] / factor[i, i]
        weights[i] = w
        for j in range(i):
            weights[j] -= w * factor[i, j]
