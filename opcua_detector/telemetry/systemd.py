"""The messages of `sd_notify`: the start is over, the loop turns, the end begins.

The protocol is one datagram of KEY=VALUE lines to the socket that NOTIFY_SOCKET names (systemd: sd_notify(3),
sd_watchdog_enabled(3)); a library is not needed for it. Without that variable, and on systems without such sockets,
nothing is sent.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


class Notifier:
    """Tells the service manager that started this process.

    Attributes
    ----------
    active : bool; whether anybody listens
    watchdog_s : float or None; WATCHDOG=1 must come at least this often; None: no watchdog
    failed : int; messages that could not be sent
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        given = os.environ if environment is None else environment
        address = given.get("NOTIFY_SOCKET", "")
        # "@" stands for the zero byte of an abstract socket.
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self.active = address.startswith(("/", "@")) and hasattr(socket, "AF_UNIX")
        self.watchdog_s = _watchdog_s(given) if self.active else None
        self.failed = 0

    def tell(self, **fields: str) -> None:
        """Send one message such as READY="1", STATUS="scoring"; never waits, never raises."""
        if not self.active:
            return
        text = "\n".join(f"{name}={' '.join(value.split())}" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
                out.setblocking(False)
                out.sendto(text.encode(), self._address)
        except OSError:
            self.failed += 1


def _watchdog_s(given: Mapping[str, str]) -> float | None:
    """Return the time-out of the watchdog, where it watches this process."""
    text, pid = given.get("WATCHDOG_USEC", ""), given.get("WATCHDOG_PID", "")
    if not text.isdigit() or int(text) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(text) / 1e6
