"""Whether the process lives (/health) and whether it does its work (/ready), each with its reasons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..client import LinkState
from ..nodes import STATE_TEXTS
from .pulse import Pulse

if TYPE_CHECKING:
    from ..service import Service


@dataclass(frozen=True)
class Check:
    """One thing that must hold; `reason` says in words how it stands."""

    check: str
    ok: bool
    reason: str


def living(pulse: Pulse, stalled_s: float) -> list[Check]:
    """Return whether the loop turns; a service manager should restart a process whose loop does not."""
    age_s = pulse.age_s
    if age_s < stalled_s:
        return [Check("loop", True, f"it turned {age_s:.1f} s ago")]
    return [Check("loop", False, f"it has not turned for {age_s:.1f} s (limit {stalled_s:g} s)")]


def ready(service: Service, started: bool) -> list[Check]:
    """Return what the work needs: the start is over, every server is connected, every monitor has scored."""
    return [Check("start", started, "done" if started else "not done yet"), *_servers(service), *_monitors(service)]


def _servers(service: Service) -> Iterator[Check]:
    for name, session in list(service.sessions.items()):
        connected = session.state is LinkState.CONNECTED
        why = f": {session.reason}" if session.reason and not connected else ""
        yield Check(f"server {name}", connected, f"{session.state.value}{why}")


def _monitors(service: Service) -> Iterator[Check]:
    runs = dict(service.runs)
    for name in service.wanted:
        run = runs.get(name)
        if run is None:
            yield Check(f"monitor {name}", False, "its model is not loaded yet")
        else:
            words = f"model {run.monitor.model.model_id}, {run.scored} rows scored, now {STATE_TEXTS[run.state]}"
            yield Check(f"monitor {name}", run.scored > 0, words)


def as_json(checks: list[Check], **more: Any) -> dict[str, Any]:
    """Return the checks as one JSON object: ok, the reasons of what is not ok, and each check."""
    failing = [f"{one.check}: {one.reason}" for one in checks if not one.ok]
    return {"ok": not failing, "reasons": failing, **more, "checks": [asdict(one) for one in checks]}
