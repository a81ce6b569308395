"""Results as the built-in types of their nodes take them: REAL and LREAL, all integers, with a check of the range."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from asyncua import ua

from ..nodes import NO_SCORE, RESULT_SIGNALS
from . import wire

_RANGES = {
    "SByte": (-(2**7), 2**7 - 1),
    "Byte": (0, 2**8 - 1),
    "Int16": (-(2**15), 2**15 - 1),
    "UInt16": (0, 2**16 - 1),
    "Int32": (-(2**31), 2**31 - 1),
    "UInt32": (0, 2**32 - 1),
    "Int64": (-(2**63), 2**63 - 1),
    "UInt64": (0, 2**64 - 1),
}
_FLOAT_MAX = 3.4028234663852886e38
# A score that is too large for its node is still too large: the end of the type says more than the value before.
_SATURATE = frozenset({"Score", "SlowScore"})


class CastError(ValueError):
    """A value does not fit the type of its node."""


def cast(signal: str, value: Any, type_name: str, array: bool) -> Any:
    """Return a value as the built-in type takes it; CastError where it does not fit.

    A NaN Score is `nodes.NO_SCORE`, one beyond the range of the type is its end; the Heartbeat wraps around at the
    end of the type; DateTime takes nanoseconds since 1970 UTC.
    """
    if array:
        return [cast(signal, one, type_name, False) for one in value]
    if type_name in _RANGES:
        return _whole(signal, value, type_name)
    if type_name in ("Double", "Float"):
        return _real(signal, float(value), type_name)
    if type_name == "Boolean":
        return bool(value)
    if type_name == "String":
        return str(value)
    if type_name == "LocalizedText":
        return ua.LocalizedText(str(value))
    if type_name == "DateTime":
        return wire.to_datetime(int(value))
    raise CastError(f"{type_name} takes no {RESULT_SIGNALS[signal].type}")


def same(written: Any, read: Any, type_name: str) -> bool:
    """Whether a node holds what was written to it, as far as its type can hold it."""
    if isinstance(written, list):
        return isinstance(read, list | tuple) and len(read) == len(written) and all(
            same(one, other, type_name) for one, other in zip(written, read, strict=True))
    if type_name in ("Double", "Float") and isinstance(read, int | float):
        if math.isnan(written):
            return math.isnan(read)
        return written == read or (type_name == "Float" and bool(np.float32(written) == np.float32(read)))
    if type_name == "LocalizedText":
        return (written.Text or "") == (getattr(read, "Text", read) or "")
    if type_name == "String":
        return bool((written or "") == (read or ""))
    if type_name == "DateTime":
        return wire.to_ns(written) == wire.to_ns(read)
    return bool(written == read)


def _real(signal: str, number: float, type_name: str) -> float:
    if math.isnan(number) and signal in _SATURATE:
        return NO_SCORE
    if type_name == "Float" and math.isfinite(number) and abs(number) > _FLOAT_MAX:
        if signal in _SATURATE:
            return math.copysign(_FLOAT_MAX, number)
        raise CastError(f"{number} does not fit a Float")
    return number


def _whole(signal: str, value: Any, type_name: str) -> int:
    low, high = _RANGES[type_name]
    number = float(value) if isinstance(value, float | np.floating) else value
    if isinstance(number, float):
        if math.isnan(number) and signal in _SATURATE:
            number = NO_SCORE
        if math.isinf(number) and signal in _SATURATE:
            return high if number > 0 else low
        if not math.isfinite(number):
            raise CastError(f"{number} is no {type_name}")
        number = round(number)
    whole = int(number)
    if signal == "Heartbeat":
        return whole % (high + 1)
    if signal in _SATURATE and whole > high:
        return high
    if not low <= whole <= high:
        raise CastError(f"{whole} does not fit {type_name}")
    return whole
