"""What the service tells of itself: metrics, health, readiness, the watchdog of systemd, and its log.

    telemetry = Telemetry(service)       # nothing happens yet
    telemetry.start()                    # on the loop: the pulse begins; the endpoint listens where the config says so
    telemetry.running()                  # rows flow: systemd learns that the start is over
    telemetry.stop()

Nothing here is called by a row: the pulse turns with the loop, and a scrape reads, on a thread of its own, the
counters that the parts keep anyway. prometheus-client stays inside this package.
"""

from .lines import configure_logging
from .pulse import Pulse
from .redact import MASK, Redactor
from .systemd import Notifier
from .whole import Telemetry

__all__ = ["MASK", "Notifier", "Pulse", "Redactor", "Telemetry", "configure_logging"]
