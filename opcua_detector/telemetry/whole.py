"""Telemetry of one service: the pulse, the messages to systemd, and the endpoint where one is configured."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .. import __version__
from .endpoint import Answer, Endpoint
from .health import Check, as_json, living, ready
from .pulse import Pulse
from .systemd import Notifier

if TYPE_CHECKING:
    from ..service import Service

log = logging.getLogger(__name__)

METRICS, HEALTH, READY = "/metrics", "/health", "/ready"


class Telemetry:
    """What a service tells of itself.

    Attributes
    ----------
    pulse : Pulse of the loop on which `start` was called
    address : (host, port) of the endpoint, None where none is configured
    """

    def __init__(self, service: Service, *, notifier: Notifier | None = None) -> None:
        self._service = service
        self._notifier = notifier or Notifier()
        self.pulse = Pulse(self._notifier)
        self._endpoint: Endpoint | None = None
        self._started = False

    @property
    def address(self) -> tuple[str, int] | None:
        """Where the endpoint listens."""
        return None if self._endpoint is None else self._endpoint.address

    def start(self) -> None:
        """Begin, on the running loop.

        Raises
        ------
        ConfigError
            The configured address cannot be used.
        """
        settings = self._service.config.metrics
        self.pulse.start()
        self._notifier.tell(STATUS="starting")
        if settings is None:
            return
        # Imported here: whoever does not ask for metrics does not pay for the library.
        from .collector import Scrapes

        scrapes = Scrapes(self._service, self.pulse)
        stalled_s = settings.stalled_after / 1e9

        def health(_: Mapping[str, str]) -> Answer:
            return _told(living(self.pulse, stalled_s), self.pulse)

        def is_ready(_: Mapping[str, str]) -> Answer:
            return _told(ready(self._service, self._started), self.pulse)

        endpoint = Endpoint(settings.host, settings.port, {METRICS: scrapes.answer, HEALTH: health, READY: is_ready})
        endpoint.start()
        self._endpoint = endpoint
        host, port = endpoint.address
        log.info("metrics and health are served at %s", f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def running(self) -> None:
        """Say that the start is over."""
        self._started = True
        self._notifier.tell(READY="1", STATUS=f"running {', '.join(self._service.runs)}")

    def stopping(self) -> None:
        """Say that the end begins."""
        self._started = False
        self._notifier.tell(STOPPING="1", STATUS="stopping")

    def stop(self) -> None:
        """End the endpoint and the pulse."""
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            endpoint.stop()
        self.pulse.stop()


def _told(checks: list[Check], pulse: Pulse) -> Answer:
    content = as_json(checks, version=__version__, loop_delay_s=round(pulse.delay_s, 4))
    return Answer(json.dumps(content).encode() + b"\n", "application/json", 200 if content["ok"] else 503)
