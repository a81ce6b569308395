"""What the README says of each fault: what you see, what is lost, how long it takes; measured on both vendors' servers.

    python tests/benchmarks/bench_recovery.py [--runs 3] [--vendor asyncua] [--only cut] [--record FILE]
    python tests/benchmarks/bench_recovery.py --record FILE --table

The faults are those of the tests (`tests/plant/faults.py`), with the time limits and keep-alives that a user has, which
the tests shorten. A fault that the service does not survive fails here as there. Each run is appended to the record as
a line of JSON (`tests/plant/seen.py`), so that a table can be made of several sittings; `--table` runs nothing.

"How long" is the time from the end of the disturbance to the next score, for a disturbance of a moment from the
moment itself, the median over the runs. Where no two scores lay `seen.STALLED_S` or more apart, scores never stopped
("no break"), but for the rows that a window needs after a gap.
Rows that need a server or a process of their own kind are words, each with the test that holds them; the program
refuses to print a row whose test is gone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


from plant.faults import STORE, Fault, hold  # noqa: E402
from plant.identities import PASSWORD, VARIABLE, secured  # noqa: E402
from plant.identities import SEEN as IDENTITIES  # noqa: E402
from plant.rig import configuration  # noqa: E402
from plant.seen import ENVIRONMENT, STALLED_S, Seen  # noqa: E402
from plant.test_faults_plant import SLOW  # noqa: E402
from plant.test_faults_quick import FAULTS  # noqa: E402
from plant.vendors import Simulator, Vendor, second_vendor, simulator  # noqa: E402
from running import NOWHERE, write  # noqa: E402
from serving import fit_models  # noqa: E402

VENDORS = ("asyncua", "node-opcua")
KILLED = "kill -9 of the service, restarted at once"
AT_ONCE_S = 0.05
TIMEOUT = "4 s"  # the default of a server; the tests take 2 s


@dataclass(frozen=True)
class Told:
    """A row in words, held by a test (file, function) that measures no time."""

    fault: str
    seen: str
    lost: str
    long: str
    test: tuple[str, str]


TOLD = (
    Told("server takes fewer operations per call, whether it says so or not", "counter `halved_calls`", "nothing",
         "calls are split at once", ("plant/test_faults_plant.py", "test_too_many_operations_are_split")),
    Told("monitored-item limit reached", "the tag is polled, counter `polls`", "nothing",
         "monitored again when there is room", ("plant/test_faults_plant.py",
         "test_an_item_beyond_the_servers_limit_is_polled_and_monitored_when_there_is_room")),
    Told("queue overflow at the server", "counters `overflowed`, `lost`", "the samples thrown away (a gap)",
         "scores go on after the gap", ("plant/test_faults_plant.py",
                                        "test_a_queue_that_runs_over_is_counted_and_a_gap")),
    Told("a trusted server sends garbage, correctly signed", "as a lost connection; the log names what it was",
         "the rows meanwhile (a gap)", "as a lost connection", ("client/test_trust_hostile.py",
                                                               "test_garbage_on_a_standing_connection_is_survived")),
    Told("50 monitors on a connection that is cut", "one alarm, of the connection; 50 times State no data",
         "the rows meanwhile (a gap)", "as a lost connection", ("plant/test_faults_local.py",
         "test_fifty_monitors_on_a_connection_that_is_cut_are_one_alarm")),
    Told("store file corrupt at the start", "the log and the audit say where it was put",
         "the record in it; event numbers begin anew", "no time", ("plant/test_faults_local.py",
         "test_a_corrupt_store_is_set_aside_and_the_service_runs")),
    Told("model file corrupt at the start", "the start is refused, by the name of the file", "nothing is written",
         "until it is mended", ("plant/test_faults_local.py",
                                "test_a_corrupt_model_is_refused_by_name_before_anything_is_written")),
)


def settled(fault: Fault) -> Fault:
    """Return a fault with the time-out that a user has."""
    server = {"timeout": TIMEOUT} | dict(fault.changes.get("server", {}))
    return replace(fault, changes={**fault.changes, "server": server})


@contextmanager
def running(vendor: str, folder: Path) -> Iterator[Vendor]:
    """Run a server."""
    place = folder / "server"
    place.mkdir(exist_ok=True)
    with (simulator if vendor == "asyncua" else second_vendor)(place) as server:
        yield server


def meet(fault: Fault, server: Vendor, folder: Path) -> None:
    """Let a service meet a fault in an event loop of its own, and say so."""

    async def once() -> Seen:
        try:
            return await hold(fault, server, folder)
        finally:
            if isinstance(server, Simulator):
                await server.let_go()

    begun = time.monotonic()
    try:
        seen = asyncio.run(once())
    except AssertionError as error:
        print(f"NOT SURVIVED {fault.name} on {server.name}: {error}", *getattr(error, "__notes__", ()), flush=True)
        return
    print(f"{server.name}: {fault.name}: {seen.after_s:.2f} s after its end, {seen.blind_s:.2f} s without a score; "
          f"{time.monotonic() - begun:.0f} s", flush=True)


def clean(folder: Path) -> None:
    """Take away the store of the run before: each begins with an empty one."""
    for one in folder.glob("opcua-detector.db*"):
        one.unlink()


def killed(folder: Path, endpoint: str) -> Seen:
    """Kill the service in a process of its own and start it again; return the time to its first score."""
    file = write(folder, configuration(endpoint))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    seen = Seen(KILLED, "asyncua")
    for run in (1, 2):
        begun = time.monotonic()
        child = subprocess.Popen([sys.executable, str(ROOT / "tests/plant/kill_child.py"), str(file)],
                                 stdout=subprocess.PIPE, env=environment, cwd=folder)
        assert child.stdout is not None
        for line in child.stdout:
            if int(line.split()[1]) > (150 if run == 1 else 0):
                break
        seen.after_s = seen.blind_s = time.monotonic() - begun
        child.kill()
        child.wait()
        child.stdout.close()
    return seen


def measure(vendor: str, runs: int, only: str, folder: Path) -> None:
    """Let a service meet every fault on a server of this vendor."""
    fit_models(folder, configuration(NOWHERE))
    quick = [settled(one) for one in (*FAULTS, *(STORE if vendor == "asyncua" else ())) if only in one.name]
    slow = [settled(one) for one in SLOW if only in one.name]
    if quick:
        with running(vendor, folder) as server:
            for fault in quick:
                for _ in range(runs):
                    clean(folder)
                    meet(fault, server, folder)
    for fault in slow:
        for _ in range(runs if "restarted" in fault.name else 1):
            clean(folder)
            with running(vendor, folder) as server:
                meet(fault, server, folder)
    for name in IDENTITIES:
        if only not in name:
            continue
        clean(folder)
        with tempfile.TemporaryDirectory(prefix="opcua-detector-identity-") as place, \
                secured(Path(place), vendor, short="expires" in name) as (identities, server):
            (fault,) = (one for one in identities.faults() if one.name == name)
            meet(settled(fault), server, folder)
    if vendor == "asyncua" and only in KILLED:
        with running(vendor, folder) as server:
            for _ in range(runs):
                clean(folder)
                killed(folder, f"opc.tcp://127.0.0.1:{server.port}/").keep()


def words_seen(of_it: list[Seen], fault: Fault | None) -> str:
    """Return what a user sees: states and quality as recorded, the alarm, and the fault's own words."""
    said = [one for one in dict.fromkeys(state for seen in of_it for state in seen.states) if one != "normal"]
    told = []
    if said:
        told.append(f"State {', '.join(said)}")
    quality = next((one for seen in of_it for one in seen.qualities
                    if one not in ("Good", "warming up") and "waiting for the first row" not in one), "")
    if quality:
        told.append(f"Quality `{quality}`")
    if all(seen.alarm for seen in of_it):
        told.append("alarm of the connection")
    elif any(seen.alarm for seen in of_it):
        who = ", ".join(sorted({seen.vendor for seen in of_it if seen.alarm}))
        told.append(f"alarm of the connection ({who})")
    words = fault.seen if fault is not None else IDENTITIES.get(of_it[0].fault, "")
    if of_it[0].fault == KILLED:
        words = "Heartbeat and LastUpdate stand still"
    if words:
        told.append(words)
    return "; ".join(told) or "nothing"


def words_lost(of_it: list[Seen], fault: Fault | None) -> str:
    """Return what is lost: the fault's own words, and what the counters say, medians over the runs."""
    if fault is not None and fault.lost:
        return fault.lost
    if of_it[0].fault == KILLED:
        return "what came in the last half second, nothing up to `committed_seq`; the rows meanwhile"

    def counted(name: str) -> float:
        return statistics.median(seen.counted.get(name, 0) for seen in of_it)

    told = []
    if counted("gaps"):
        gaps = counted("gaps")
        told.append(f"the rows meanwhile ({'a gap' if gaps == 1 else f'{gaps:.0f} gaps'})")
    if counted("samples_lost"):
        told.append(f"{counted('samples_lost'):.0f} samples, counted in `lost`")
    if counted("masked") and not counted("gaps"):
        told.append("the masked values")
    return "; ".join(told) or "nothing"


def words_long(of_it: list[Seen]) -> str:
    """Return how long it takes on each vendor's server."""
    told = []
    for vendor in VENDORS:
        mine = [seen for seen in of_it if seen.vendor == vendor]
        if not mine:
            told.append("-")
            continue
        blind_s, after_s = (statistics.median(getattr(seen, name) for seen in mine) for name in ("blind_s", "after_s"))
        if blind_s < STALLED_S:
            told.append(f"{blind_s:.1f} s" if any(seen.counted.get("gaps") for seen in mine) else "no break")
        else:
            told.append(f"{after_s:.1f} s" if after_s >= AT_ONCE_S else "at once")
    return " / ".join(told)


def table(record: Path) -> str:
    """Return the Markdown table of a record.

    Raises
    ------
    SystemExit
        A row in words has lost its test.
    """
    lines = [Seen(**json.loads(line)) for line in record.read_text(encoding="utf-8").splitlines()]
    faults = {one.name: one for one in (*FAULTS, *SLOW, *STORE)}
    order = [*(one.name for one in FAULTS), *(one.name for one in SLOW), *IDENTITIES,
             *(one.name for one in STORE), KILLED]
    rows = ["| fault | what you see | what is lost | how long until the next score: asyncua / node-opcua |",
            "|---|---|---|---|"]
    for name in order:
        of_it = [one for one in lines if one.fault == name]
        if of_it:
            fault = faults.get(name)
            rows.append(f"| {name} | {words_seen(of_it, fault)} | {words_lost(of_it, fault)} | {words_long(of_it)} |")
    for told in TOLD:
        file, function = told.test
        if f"def {function}(" not in (ROOT / "tests" / file).read_text(encoding="utf-8"):
            raise SystemExit(f"the row {told.fault!r} has no test any more: {function} in tests/{file}")
        rows.append(f"| {told.fault} | {told.seen} | {told.lost} | {told.long} |")
    return "\n".join(rows)


def main() -> None:
    """Parse the options, run, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--vendor", choices=VENDORS, help="one vendor alone")
    parser.add_argument("--only", default="", help="faults whose name holds this")
    parser.add_argument("--record", type=Path, help="file of what was seen, a JSON object per line; appended to")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of --record")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="opcua-detector-recovery-") as place:
        record = given.record or Path(place) / "seen.jsonl"
        if not given.table:
            os.environ[ENVIRONMENT], os.environ[VARIABLE] = str(record.resolve()), PASSWORD
            for vendor in [given.vendor] if given.vendor else VENDORS:
                folder = Path(place) / vendor
                folder.mkdir()
                measure(vendor, given.runs, given.only, folder)
        print(table(record))


if __name__ == "__main__":
    main()
