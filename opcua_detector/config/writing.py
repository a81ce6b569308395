"""What may be written to a server, how often, and by which of two detectors."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from .units import UNITS_NS, DurationNs, Section, node_text


def _allowed(value: Any) -> str:
    """Return the text of a NodeId that names its namespace by URI, as an index moves; a final "*" ends a beginning."""
    if isinstance(value, str) and value.startswith("nsu="):
        return node_text(value)
    raise ValueError("a NodeId such as 'nsu=urn:plant;s=Detector.Score', or its beginning such as "
                     "'nsu=urn:plant;s=Detector.*'")


class LeaseConfig(Section):
    """Two instances on the same outputs: one writes, the other takes over. Needs the nodes <base>.Lease.

    period : the holder renews it six times in it; the other one takes over within one and a half of it
    name : of this instance; empty: made once and kept beside the store
    """

    period: DurationNs = 2 * UNITS_NS["s"]
    name: str = Field(default="", pattern=r"^[\w.\-]{0,64}$")

    @field_validator("period")
    @classmethod
    def _period(cls, value: int) -> int:
        if not UNITS_NS["s"] <= value <= 60 * UNITS_NS["s"]:
            raise ValueError("from '1 s' to '60 s'")
        return value


class WritingConfig(Section):
    """Bounds on what is written to a server, whatever the outputs say.

    allow : NodeIds, or their beginnings with '*'; a node that resolves to another one is refused. Empty: the nodes
        that the outputs name, where they are written as NodeIds; what is named by browse path goes where it leads
    dry_run : look everything up and count it, write nothing
    node_every : least time between two writes of one node; the newest value waits (0: none)
    values_per_s : most values a second over all nodes of the server, the newest wait (0: no bound)
    read_back : written values are read again this often and compared (0: never)
    lease : see LeaseConfig; none: this instance always writes
    """

    allow: tuple[Annotated[str, BeforeValidator(_allowed)], ...] = ()
    dry_run: bool = False
    node_every: DurationNs = 0
    values_per_s: float = Field(default=0.0, ge=0, le=1e6)
    read_back: DurationNs = 0
    lease: LeaseConfig | None = None
