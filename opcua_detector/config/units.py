"""What the sections are made of: quantities with their unit, names, node texts, and the base of all sections."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema

from ..errors import ConfigError

UNITS_NS = {"us": 10**3, "ms": 10**6, "s": 10**9, "min": 60 * 10**9, "h": 3600 * 10**9, "d": 86400 * 10**9}
UNITS_BYTES = {"kB": 10**3, "MB": 10**6, "GB": 10**9}


class Wrong(ValueError):
    """A value that is wrong beside another one: `at` leads to it from the section whose rule it breaks."""

    def __init__(self, expected: str, at: tuple[int | str, ...], value: object = None) -> None:
        super().__init__(expected)
        self.at, self.value = at, value


def _quantity(value: Any, units: dict[str, int], example: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", value) if isinstance(value, str) else None
    if match is None or match[2] not in units:
        raise ValueError(f"a number with its unit ({', '.join(units)}), such as {example!r}")
    return round(float(match[1]) * units[match[2]])


def _duration(value: Any) -> int:
    return _quantity(value, UNITS_NS, "10 ms")


def _size(value: Any) -> int:
    return _quantity(value, UNITS_BYTES, "2 GB")


@dataclass(frozen=True, slots=True)
class Poll:
    """`sampling: poll` or `poll 2 ms`: tags are read, although the server could report their changes.

    every : ns; None: twice per period
    """

    every: int | None = None


def _sampling(value: Any) -> int | Poll:
    word, _, every = value.strip().partition(" ") if isinstance(value, str) else ("", "", "")
    try:
        if word == "poll":
            return Poll(_duration(every) if every else None)
        return _duration(value)
    except ValueError as error:
        raise ValueError(f"{error}, or 'poll', or 'poll 2 ms'") from None


Sampling = Annotated[
    int | Poll, PlainValidator(_sampling),
    WithJsonSchema({"type": "string", "pattern": r"^(poll|(poll )?\d+(\.\d+)? ?(us|ms|s|min|h|d))$"}),
]
DurationNs = Annotated[
    int, BeforeValidator(_duration),
    WithJsonSchema({"type": "string", "pattern": r"^\d+(\.\d+)? ?(us|ms|s|min|h|d)$"}),
]
Bytes = Annotated[
    int, BeforeValidator(_size), WithJsonSchema({"type": "string", "pattern": r"^\d+(\.\d+)? ?(kB|MB|GB)$"})
]
Name = Annotated[str, Field(pattern=r"^\w[\w.\-]*$", max_length=64)]
NodeText = Annotated[str, Field(min_length=3)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def node_text(value: str) -> str:
    if value.startswith("/") or re.match(r"^(nsu=[^;]+;|ns=\d+;)?[isgb]=.+", value):
        return value
    raise ValueError("a NodeId such as 'nsu=urn:plant;s=Reactor.T1' or a browse path such as '/Objects/2:Plant/2:T1'")


def unique(names: Sequence[str], at: tuple[int | str, ...]) -> None:
    for i, name in enumerate(names):
        if name in names[:i]:
            raise Wrong("a name that is not used before", (*at, i, "name"), name)


def known(name: str, among: Iterable[str], at: tuple[int | str, ...]) -> None:
    if name not in among:
        raise Wrong(f"one of {', '.join(among)}", at, name)


def duration_ns(text: str, *, key: str) -> int:
    """Return a duration such as '2 h' in nanoseconds; ConfigError names the option `key` it was given for."""
    try:
        return _duration(text)
    except ValueError as error:
        raise ConfigError("wrong value", key=key, value=text, expected=str(error),
                          next_step="correct the option") from None


def with_unit(value: int, units: dict[str, int]) -> str:
    """Return a quantity as text, in the largest unit that leaves a whole number: 500 ms, 2 GB."""
    unit = max((u for u in units if value % units[u] == 0 and value >= units[u]), key=units.__getitem__, default="s")
    return f"{value // units[unit]} {unit}"
