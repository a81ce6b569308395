"""The method `regression` with the direction of each residual: value less expectation, positive where too high."""

from __future__ import annotations

from collections.abc import Sequence

from opcua_detector.api import Float64, MethodModel, Record, Tag
from opcua_detector.detectors.regression import RegressionMethod
from opcua_detector.kernels.regression import SIGNED


class SignedRegression(RegressionMethod):
    """As `RegressionMethod`; the absolute values of its residuals are those of the plain one, bit for bit."""

    def __init__(self, model: MethodModel, columns: Sequence[Tag]) -> None:
        super().__init__(model, columns)
        self._state[SIGNED] = 1.0  # `reset` leaves it as it is

    def residuals(self, record: Record) -> Float64:
        """Return float64[n, n_channels]: what `update` gives row by row."""
        return self._score(record.values, record.valid, record.gap, signed=True)
