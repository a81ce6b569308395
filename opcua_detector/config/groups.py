"""Tags, and the groups in which they are sampled at one period."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ..api import Tag, TagKind
from .units import UNITS_NS, DurationNs, Name, NodeText, Poll, Sampling, Section, Wrong, node_text, with_unit


class TagConfig(Section):
    """One tag of a group.

    index : the node is an array and the tag its element at this place, from 0; of several dimensions, as they are
        flattened, the last one running first (Part 6, 5.2.2.16)
    """

    name: Name
    node: Annotated[NodeText, BeforeValidator(node_text)]
    kind: TagKind = TagKind.MEASURED
    unit: str = ""
    eu_range: tuple[float, float] | None = None
    decimals: int | None = Field(default=None, ge=0, le=15)
    description: str = ""
    path: str = ""
    quality: Literal["hold", "mask", "stop"] = "mask"
    uncertain: Literal["use", "hold", "mask", "stop"] = "use"
    stale_after: DurationNs | None = None
    turn: float = Field(default=360.0, gt=0)
    server: str = ""
    index: int | None = Field(default=None, ge=0, le=2**31 - 2)

    @field_validator("eu_range")
    @classmethod
    def _range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError("[low, high] with low < high")
        return value

    def tag(self) -> Tag:
        """Return the tag as the engine knows it."""
        return Tag(self.name, self.node, self.kind, self.unit, self.eu_range, self.decimals,
                   self.description, self.path, self.quality, self.turn, self.uncertain, self.stale_after)


class GroupConfig(Section):
    """Tags sampled at one period; the rule of time is in `opcua_detector.frames`."""

    name: Name
    server: str
    period: DurationNs
    sampling: Sampling | None = None
    publishing: DurationNs | None = None
    lateness: DurationNs | None = None
    max_hold: int = Field(default=20, ge=1, le=100000)
    tags: tuple[TagConfig, ...] = Field(min_length=1)

    @field_validator("period")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value < 10**6:
            raise ValueError("a period of at least '1 ms'")
        return value

    @model_validator(mode="after")
    def _polled_often_enough(self) -> GroupConfig:
        if self.poll_ns is not None and not 10**6 <= self.poll_ns <= self.period:
            typed = f"poll {with_unit(self.poll_ns, UNITS_NS)}"
            raise Wrong("polls from '1 ms' to one period apart", ("sampling",), typed)
        return self

    @property
    def poll_ns(self) -> int | None:
        """How often the group is read although the server could report changes (`sampling: poll`); None: it is not."""
        return (self.sampling.every or self.fallback_poll_ns) if isinstance(self.sampling, Poll) else None

    @property
    def fallback_poll_ns(self) -> int:
        """How often tags are read that the server cannot report: as often as it would have sampled them."""
        often = 0 < self.sampling_ns < self.period
        return max(10**6, self.sampling_ns if often else self.period // 2)

    @property
    def sampling_ns(self) -> int:
        """Requested SamplingInterval: half the period, since at the period itself 15-25 % of changes are lost."""
        return self.sampling if isinstance(self.sampling, int) else self.period // 2

    @property
    def publishing_ns(self) -> int:
        """Requested PublishingInterval, by default the period."""
        return self.period if self.publishing is None else self.publishing

    @property
    def lateness_ns(self) -> int:
        """How long a row waits for tags that have not reported, by default one period."""
        return self.period if self.lateness is None else self.lateness
