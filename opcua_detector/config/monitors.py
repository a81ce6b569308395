"""Monitors: which tags are judged, by what, how often it may cry wolf, and where the verdict goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, WithJsonSchema, field_validator, model_validator

from ..errors import ConfigError
from ..nodes import SIGNALS
from .units import UNITS_NS, DurationNs, Name, Section, Wrong, known, node_text, with_unit

Methods = Annotated[
    tuple[dict[str, Any], ...],
    WithJsonSchema({"type": "array", "minItems": 1, "items": {"anyOf": [
        {"type": "string"}, {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}]}}),
]


SAYS_WHAT_HAPPENED = ("State", "StateText", "Quality")


class OutputsConfig(Section):
    """Which node takes which output; only nodes named here are ever written.

    fail_after : without a new verdict for so long, the fail values are written
    fail_values : signal -> value, beside what is written then anyway (State, StateText, Quality, Score -1, IsAnomaly
        false, Severity 0)
    """

    server: str
    base: str = ""
    signals: tuple[str, ...] | None = None
    nodes: dict[str, Annotated[str, BeforeValidator(node_text)]] = Field(default_factory=dict)
    fail_after: DurationNs = 5 * UNITS_NS["s"]
    fail_values: dict[str, bool | int | float | str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> OutputsConfig:
        for i, signal in enumerate(self.signals or ()):
            known(signal, SIGNALS, ("signals", i))
        for signal in self.nodes:
            known(signal, SIGNALS, ("nodes", signal))
        for signal, value in self.fail_values.items():
            known(signal, SIGNALS, ("fail_values", signal))
            if signal in SAYS_WHAT_HAPPENED:
                raise Wrong(f"no {signal}: it says what happened", ("fail_values", signal), value)
            if signal == "Score" and isinstance(value, int | float) and 0 <= value < 1:
                raise Wrong("a score that is never just 'no anomaly': below 0, or 1 and more", ("fail_values", signal),
                            value)
        if not self.base and not self.nodes:
            raise Wrong("the node of the prepared result object, or the key 'nodes' (signal: NodeId)", ("base",))
        if self.base:
            try:
                node_text(self.base)
            except ValueError as error:
                raise Wrong(str(error), ("base",), self.base) from None
        if self.signals is not None and not self.base:
            raise Wrong("base beside signals: they are the nodes '<base>.<signal>'", ("base",))
        return self

    def node_of(self) -> dict[str, str]:
        """Return signal -> node text for every node that may be written."""
        chosen = (self.signals if self.signals is not None else tuple(SIGNALS)) if self.base else ()
        return {signal: f"{self.base}.{signal}" for signal in chosen} | self.nodes


class CycleConfig(Section):
    """What cuts the stream of a cyclic process into parts: a monitor with a cycle gives one verdict per part."""

    tag: str
    on: Literal["change", "rising", "falling"] = "change"
    until: Literal["next", "back"] = "next"
    shortest: DurationNs | None = None
    longest: DurationNs | None = None

    # YAML 1.1 reads a bare `on` as true, and as a key too.
    @model_validator(mode="before")
    @classmethod
    def _on(cls, value: Any) -> Any:
        return {("on" if key is True else key): item for key, item in value.items()} if isinstance(value, dict) \
            else value

    @model_validator(mode="after")
    def _consistent(self) -> CycleConfig:
        if self.on == "change" and self.until == "back":
            raise Wrong("'next': only a signal, with on: rising or on: falling, goes back", ("until",), "back")
        if self.shortest is not None and self.longest is not None and self.shortest >= self.longest:
            raise Wrong("more than the shortest", ("longest",), with_unit(self.longest, UNITS_NS))
        return self


def _mode(value: Any) -> Any:
    """YAML 1.1 reads a bare `off` as false."""
    return "off" if value is False else value


class FeedbackConfig(Section):
    """How far an operator's word may change a monitor (`opcua_detector.feedback.Policy`).

    mode : "bounded": within all limits, provisional until confirmed; "paper": at once and for good; "off": what is
        said is kept for evaluation and changes nothing
    expires : time after which an adaptation that nobody confirmed reverts
    beyond : no value further than this beyond the healthy range of its tag is taken in, no distance from what the
        other tags say that is larger; parts of the tag's healthy span
    protected : tag -> [low, high] in its unit: no value outside is taken in, whatever the healthy range is
    budget_factor : a missed alert may lower a limit while at most so many times the alarm budget is forecast
    """

    mode: Annotated[Literal["bounded", "paper", "off"], BeforeValidator(_mode)] = "bounded"
    expires: DurationNs = 7 * UNITS_NS["d"]
    beyond: float = Field(default=0.2, ge=0, le=0.3)
    protected: dict[str, tuple[float, float]] = Field(default_factory=dict)
    budget_factor: float = Field(default=3.0, ge=1, le=100)

    @field_validator("expires")
    @classmethod
    def _expires(cls, value: int) -> int:
        if not 0 < value <= 3650 * UNITS_NS["d"]:
            raise ValueError("more than '0 s' and at most '3650 d'")
        return value

    @model_validator(mode="after")
    def _ranges(self) -> FeedbackConfig:
        for tag, (low, high) in self.protected.items():
            if not low < high:
                raise Wrong("[low, high] with low < high", ("protected", tag), [low, high])
        return self


class MonitorConfig(Section):
    """A set of tags -> methods -> channels -> one fused score."""

    name: Name
    group: str
    tags: tuple[str, ...] | None = None
    methods: Methods = ({"name": "auto"},)
    windows: tuple[DurationNs, ...] = Field(default=(), max_length=4)
    state_tag: str = ""
    settling: DurationNs | None = None
    inhibit: tuple[str, ...] = ()
    maintenance: str = ""
    cycle: CycleConfig | None = None
    false_alarms_per_day: float = Field(default=1.0, gt=0, le=86400)
    on_delay: DurationNs = 0
    off_delay: DurationNs = 500 * 10**6
    severity: int = Field(default=500, ge=1, le=1000)
    model: Path | None = None
    feedback: FeedbackConfig = FeedbackConfig()
    outputs: OutputsConfig | None = None

    @field_validator("methods", mode="before")
    @classmethod
    def _methods(cls, value: Any) -> Any:
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise ValueError("a list such as [auto, {name: onnx, model: m.onnx}]")
        methods = [{"name": item} if isinstance(item, str) else item for item in value]
        for item in methods:
            if not isinstance(item, dict) or not isinstance(item.get("name"), str):
                raise ValueError("for each method its name, or a mapping with the key 'name'")
        return methods


def monitor_of(**given: Any) -> MonitorConfig:
    """Return a monitor's config made in code, without a file.

    Raises
    ------
    ConfigError
        A key that is not known, or a value that it cannot have.
    """
    try:
        return MonitorConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError("the monitor cannot use this", key=".".join(str(part) for part in first["loc"]),
                          value=first["input"], expected=first["msg"], next_step="correct it") from None
