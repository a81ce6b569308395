"""What the service tells of itself: metrics and health over HTTP, and its log."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, WithJsonSchema, field_validator

from .units import Bytes, DurationNs, Section

LOOPBACK, PORT = "127.0.0.1", 9464


def _listen(value: Any) -> Any:
    """A port alone means loopback; another address must be typed."""
    text = f"{LOOPBACK}:{value}" if isinstance(value, int) and not isinstance(value, bool) else value
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.\-]+):(\d{1,5})", text) if isinstance(text, str) else None
    if match is None or not 0 <= int(match[2]) <= 65535:
        raise ValueError("an address and port such as '127.0.0.1:9464', '[::1]:9464', or a port alone (loopback)")
    return text


Listen = Annotated[str, BeforeValidator(_listen), WithJsonSchema({"anyOf": [
    {"type": "integer", "minimum": 0, "maximum": 65535}, {"type": "string", "pattern": r"^.+:\d{1,5}$"}]})]


class MetricsConfig(Section):
    """Prometheus metrics at /metrics, and /health and /ready, over HTTP; off unless this section is there.

    listen : address and port; 0 as port takes a free one (the log says which)
    stalled_after : /health says that the process is stuck when its loop has not turned for so long; the watchdog of
        systemd has its own time (WatchdogSec)
    """

    listen: Listen = f"{LOOPBACK}:{PORT}"
    stalled_after: DurationNs = 10 * 10**9

    @field_validator("stalled_after")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value < 10**9:
            raise ValueError("at least '1 s'")
        return value

    @property
    def host(self) -> str:
        """The address without brackets."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port; 0 takes a free one."""
        return int(self.listen.rpartition(":")[2])


class LogConfig(Section):
    """How changes of state are logged; `text` lines for people, `json` lines for machines, always on stderr.

    file : also into this file, which is rotated (5 of `size`); for machines without a journal
    """

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "warning"
    file: Path | None = None
    size: Bytes = 10 * 10**6
