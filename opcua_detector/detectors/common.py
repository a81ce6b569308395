"""What every built-in method checks alike: its parameters, and the columns that its model needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from opcua_detector.api import MethodModel, Tag
from opcua_detector.errors import ConfigError, ModelTagsError


def whole(x: object) -> bool:
    """Whether a parameter is a whole number (True and False are none)."""
    return isinstance(x, int) and not isinstance(x, bool)


def number(x: object) -> bool:
    """Whether a parameter is a finite number (True and False are none)."""
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def require(method: str, params: object, checks: Sequence[tuple[str, bool, str]]) -> None:
    """Check parameters; each check is (key, holds, what is expected).

    Raises
    ------
    ConfigError
        One of them does not hold.
    """
    for key, ok, expected in checks:
        if not ok:
            raise ConfigError(f"{method} cannot use this parameter", key=key, value=getattr(params, key),
                              expected=expected, next_step=f"correct {key} under the method's params")


def places(method: str, model: MethodModel, columns: Sequence[Tag]) -> dict[str, int]:
    """Return column -> place among the columns that a method is opened with.

    Raises
    ------
    ModelTagsError
        A column that the model needs is missing.
    """
    at = {tag.name: position for position, tag in enumerate(columns)}
    missing = [name for name in model.columns if name not in at]
    if missing:
        raise ModelTagsError(
            f"the model was fitted with {', '.join(missing)}, not among {', '.join(at) or 'no column'}",
            where=method, next_step="fit a new model for the tags of this monitor")
    return at
