"""Plugin `mlp`: a small forecaster, trained by torch on healthy rows and run as an ONNX graph.

It predicts each judged column from the rows before and judges how far the plant is from the prediction. Importing
this package does not import torch; only fitting does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from opcua_detector.api import Method, MethodModel, Record, Tag
from opcua_detector.detectors.onnx_model import OnnxPlugin, graph_model

__all__ = ["MlpParams", "MlpPlugin", "plugin"]


@dataclass(frozen=True)
class MlpParams:
    """Parameters of `mlp`, with their defaults.

    window : rows before the judged one that the prediction is made of
    hidden : width of the one hidden layer
    steps : optimiser steps; 10 000 take about 20 s for two tags
    batch : windows in a step
    rate : learning rate at the start; it falls along a cosine
    noise : white noise put on the judged columns while training, as a fraction of each one's standard deviation.
        Without it the net learns to extrapolate smooth curves, which faulty ones are too, instead of the plant
    seed : seed of every random choice
    """

    window: int = 12
    hidden: int = 48
    steps: int = 10_000
    batch: int = 2048
    rate: float = 3e-3
    noise: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for key, least in (("window", 2), ("hidden", 1), ("steps", 1), ("batch", 16), ("seed", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} is {getattr(self, key)}; expected at least {least}")
        if not self.rate > 0:
            raise ValueError(f"rate is {self.rate}; expected above 0")
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise is {self.noise}; expected 0 <= noise < 1")


class MlpPlugin:
    """Trains the forecaster and hands it over as an ONNX graph, which runs without torch."""

    name = "mlp"
    Params = MlpParams
    learns = True

    def fit(self, record: Record, params: MlpParams) -> MethodModel:
        """Train on healthy rows; the model that comes back is opened by the plugin `onnx`.

        Raises
        ------
        PluginError
            torch or onnx is not installed.
        RecordError
            No judged column, or too few whole windows.
        """
        from .trainer import train

        return graph_model(train(record, params), f"trained on {len(record)} rows", {"mlp": asdict(params)})

    def open(self, model: MethodModel, columns: Sequence[Tag]) -> Method:
        """Make the method for rows of these columns."""
        return OnnxPlugin().open(model, columns)


plugin = MlpPlugin()
