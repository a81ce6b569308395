"""What an exported graph says of itself: the metadata that travels inside an ONNX file.

The exporter writes it with `onnx.helper.set_model_props(graph, contract.to_props())`; the runtime reads it back
with `session.get_modelmeta()`, without the package onnx. All values are strings; lists are JSON.

A **window** graph takes `float32[batch, window, n_columns]` (or flat `[batch, window * n_columns]`, row by row), oldest
row first, and judges the newest row. A **step** graph takes `float32[1, n_columns]` and states, and gives the states
after the row. Both give an output named `residual`, `float32[batch, n_judged]`, and may give one named `prediction`,
the value expected of each judged column in its engineering unit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ModelFileError

FORMAT = "opcua-detector graph 1"
RESIDUAL, PREDICTION = "residual", "prediction"

_EXPORT_AGAIN = "export the graph again with GraphContract.to_props(), see plugins/detectors/mlp/README.md"


@dataclass(frozen=True)
class GraphContract:
    """What the runtime has to know of a graph.

    kind : window or step
    columns : names of the input columns, in the order of the graph's input
    judged : names of the columns that the output judges, in the order of the output; each is one of `columns`
    period_ns : int; distance of rows the graph was trained for
    window : rows in the input of a window graph, the judged one included
    memory : rows a step graph needs before its residual means something
    residual : forecast (the judged columns of the newest row enter only as what is compared, each for itself)
        or reconstruction (every value of the window enters every residual)
    scale : float[n_judged], EU; a residual of 1 is this far from the prediction
    levels, quantiles : healthy residuals: quantiles[j][k] is the quantile levels[k] of judged column j
    states : name of the input -> name of the output that carries it on (step graphs)
    training : facts for the reader: rows, seed, source ...
    """

    kind: Literal["window", "step"]
    columns: tuple[str, ...]
    judged: tuple[str, ...]
    period_ns: int
    window: int = 1
    memory: int = 0
    residual: Literal["forecast", "reconstruction"] = "forecast"
    scale: tuple[float, ...] = ()
    levels: tuple[float, ...] = ()
    quantiles: tuple[tuple[float, ...], ...] = ()
    states: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def to_props(self) -> dict[str, str]:
        """Return the metadata as strings, for `onnx.helper.set_model_props`."""
        return {
            "format": FORMAT, "kind": self.kind, "columns": json.dumps(self.columns),
            "judged": json.dumps(self.judged), "period_ns": str(self.period_ns), "window": str(self.window),
            "memory": str(self.memory), "residual": self.residual, "scale": json.dumps(self.scale),
            "levels": json.dumps(self.levels), "quantiles": json.dumps(self.quantiles),
            "states": json.dumps(dict(self.states)), "training": json.dumps(dict(self.training)),
        }


def read_props(props: Mapping[str, str], where: str) -> GraphContract:
    """Return the contract in a graph's metadata.

    Raises
    ------
    ModelFileError
        A key is missing, is not what it should be, or contradicts another one.
    """
    reader = _Reader(props, where)
    found = reader.text("format")
    if found != FORMAT:
        raise reader.wrong("format", found, repr(FORMAT))
    kind = reader.choice("kind", ("window", "step"))
    columns, judged = reader.names("columns"), reader.names("judged")
    if strangers := [name for name in judged if name not in columns]:
        raise reader.wrong("judged", strangers, f"names out of columns {list(columns)}")
    contract = GraphContract(
        kind="step" if kind == "step" else "window", columns=columns, judged=judged,
        period_ns=reader.whole("period_ns", 1), window=reader.whole("window", 1) if kind == "window" else 1,
        memory=reader.whole("memory", 0, default="0"),
        residual="forecast" if reader.choice("residual", ("forecast", "reconstruction")) == "forecast"
        else "reconstruction",
        scale=reader.numbers("scale"), levels=reader.numbers("levels"), quantiles=reader.table("quantiles"),
        states=reader.mapping("states"), training=reader.mapping("training"),
    )
    _agree(contract, reader)
    return contract


def _agree(contract: GraphContract, reader: _Reader) -> None:
    n = len(contract.judged)
    if contract.scale and (len(contract.scale) != n or not all(s > 0 for s in contract.scale)):
        raise reader.wrong("scale", contract.scale, f"{n} numbers above 0, one for each judged column")
    levels = contract.levels
    if list(levels) != sorted(set(levels)) or (levels and not 0 <= levels[0] <= levels[-1] <= 1):
        raise reader.wrong("levels", levels, "increasing numbers in 0..1")
    if bool(levels) != bool(contract.quantiles) or (levels and len(contract.quantiles) != n) or any(
        len(row) != len(levels) or list(row) != sorted(row) for row in contract.quantiles
    ):
        raise reader.wrong("quantiles", contract.quantiles, f"{n} rows of {len(levels)} increasing numbers")
    if any(not isinstance(name, str) for name in contract.states.values()):
        raise reader.wrong("states", dict(contract.states), "names of outputs by names of inputs")


class _Reader:
    """Reads one key at a time, so that an error can name it."""

    def __init__(self, props: Mapping[str, str], where: str) -> None:
        self._props, self._where = props, where

    def wrong(self, key: str, value: object, expected: str) -> ModelFileError:
        return ModelFileError(f"the graph's metadata has {key} = {value!r}; expected {expected}",
                              where=self._where, next_step=_EXPORT_AGAIN)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._props.get(key, default)
        if value is None:
            has = ", ".join(sorted(self._props)) or "no metadata at all"
            raise ModelFileError(f"the graph's metadata lacks {key} (it has {has})", where=self._where,
                                 next_step=_EXPORT_AGAIN)
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.text(key)
        if value not in allowed:
            raise self.wrong(key, value, " or ".join(allowed))
        return value

    def whole(self, key: str, least: int, default: str | None = None) -> int:
        text = self.text(key, default)
        try:
            value = int(text)
        except ValueError:
            raise self.wrong(key, text, "a whole number") from None
        if value < least:
            raise self.wrong(key, value, f"at least {least}")
        return value

    def _json(self, key: str, kind: type, default: str | None = None) -> Any:
        text = self.text(key, default)
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, kind):
            raise self.wrong(key, text, f"a JSON {'list' if kind is list else 'object'}")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        value = self._json(key, list)
        if not value or len(set(map(str, value))) != len(value) or not all(isinstance(v, str) and v for v in value):
            raise self.wrong(key, value, "a JSON list of different names")
        return tuple(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self._json(key, list, "[]")
        if not all(_finite(v) for v in value):
            raise self.wrong(key, value, "a JSON list of finite numbers")
        return tuple(float(v) for v in value)

    def table(self, key: str) -> tuple[tuple[float, ...], ...]:
        value = self._json(key, list, "[]")
        if not all(isinstance(row, list) and all(_finite(v) for v in row) for row in value):
            raise self.wrong(key, value, "a JSON list of lists of finite numbers")
        return tuple(tuple(float(v) for v in row) for row in value)

    def mapping(self, key: str) -> dict[str, Any]:
        return dict(self._json(key, dict, "{}"))


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
