"""Faults that take seconds, on the asyncua simulator: each leaves scores flowing, a count of the loss, and no rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import faults as f
from .faults import OUTAGE, Fault, hold, survives
from .vendors import Simulator

pytestmark = pytest.mark.usefixtures("quick")

FAULTS = [
    Fault("cut", f.cut, OUTAGE),
    Fault("reset", f.reset, OUTAGE, long=True),
    Fault("reset in the middle of an answer", f.reset_in_answer, OUTAGE),
    Fault("reset in the middle of a request", f.reset_in_request, OUTAGE, long=True),
    Fault("reset at every step of the log-in", f.reset_at_every_step_of_the_log_in, (*OUTAGE, "failed_attempts")),
    Fault("blackhole", f.blackhole, OUTAGE),
    Fault("half open, server not heard", f.half_open_server_mute, OUTAGE),
    Fault("half open, client not heard", f.half_open_client_mute, OUTAGE, long=True),
    Fault("refused for a while", f.refused_for_a_while, (*OUTAGE, "failed_attempts"), long=True),
    Fault("short stall", f.short_stall, still=("lost", "reconnects", "gaps", "overflowed"),
          seen="the score stands still"),
    Fault("subscription deleted", f.subscription_deleted, ("gaps",), seen="counter `rebuilt` or `reconnects`"),
    Fault("subscription expired", f.subscription_expired, ("rebuilt", "gaps"), still=("reconnects",),
          seen="counter `rebuilt`"),
    Fault("session closed", f.session_closed, OUTAGE),
    Fault("session limit", f.session_limit, (*OUTAGE, "failed_attempts")),
    Fault("too many publish requests", f.publish_limit, still=("lost", "reconnects", "gaps"),
          seen="counter `too_many_publish`"),
    Fault("GoodOverload", f.overload, ("overload",), still=("lost", "reconnects", "gaps"), seen="counter `overload`"),
    Fault("all tags Bad", f.all_bad, ("masked",), still=("lost", "reconnects")),
    Fault("tag removed and back", f.one_tag_removed, still=("reconnects",)),
    Fault("type changed", f.type_changed, still=("reconnects",)),
    Fault("output removed and back", f.output_removed, ("write_failed_items",), still=("reconnects",),
          lost="this output meanwhile; the newest value comes first"),
    Fault("write rights withdrawn", f.rights_withdrawn, ("write_failed_items",), still=("reconnects",),
          lost="these outputs meanwhile; the newest values come first"),
    Fault("clock jumps ahead and back", f.clock_there_and_back, ("gaps",), still=("reconnects",),
          seen="counter `clock_jumps`, the clock offset"),
    Fault("clock jumps behind", f.clock_behind, still=("reconnects",), seen="counter `clock_jumps`, the clock offset"),
    Fault("out of order and twice", f.out_of_order_and_twice, still=("lost", "reconnects", "gaps"),
          seen="counters `duplicate`, `replaced`, `late`"),
    Fault("overflow bits", f.overflow, ("overflowed",), still=("reconnects", "gaps"), seen="counter `overflowed`"),
    Fault("NaN and infinity", f.nan_and_infinity, ("masked",), still=("lost", "reconnects")),
    # The proxy stands still with the loop that it shares, so answers take longer than the usual time-out here.
    Fault("own event loop blocked 2 s", f.loop_blocked, still=("lost", "reconnects", "gaps"),
          seen="counter `loop_blocked`", lost="nothing: rows come late",
          changes={"server": {"timeout": "4 s"}}),
]


@survives(FAULTS)
async def test_fault_is_survived(fault: Fault, disturbed: Simulator, folder: Path) -> None:
    await hold(fault, disturbed, folder)
