"""An hour of disturbances: does the service stay as it was? Memory, files, sockets, tasks, store, CPU, scores, losses.

    python tests/benchmarks/bench_soak.py [--minutes 60] [--every 60] [--seed 0] [--vendor node-opcua] [--out FILE]

The service runs in a process of its own, as `opcua-detector run` runs it: with store, result nodes and metrics, which
are scraped. It talks to a server process (the asyncua simulator, or node-opcua) through the chaos proxy, all at 100
rows a second. About every `--every` seconds something happens to network or server, in a seeded order in which each
disturbance comes before any comes again: cuts, resets, a server that is killed, frozen or full, subscriptions and
sessions that vanish, Bad and overloaded tags, nodes that go, clocks that jump. After each, scores must flow again
within `PATIENCE_S`. The system is looked at through /proc, so this runs on Linux only.

Flat memory is decided on the resident set after a warm-up of a third of the run, 20 minutes at most: within it every
bounded ring has been filled once (the store's ring of 8192 rows in 82 s, the recent rows that feedback looks at, the
65536 scoring times in 11 minutes), and each disturbance has come once, in a quicker pace, with the modules and buffers
it needs for the first time. The settings are those of the product.

From there on the median of the last third of the samples may lie at most `MOST_GROWN_MIB` above that of the first
third, and the slope (Theil-Sen: the median over all pairs, which a burst does not move) may be `MOST_MIB_PER_H` at
most. What a leak would be at this pace: one connection object per disturbance .6 MiB, 36 MiB an hour; 100 bytes per
row, 34 MiB an hour. The bound is 6 bytes per row; the noise of the resident set (arenas of malloc and of Python, pages
of the database) over 40 minutes is some tenths of a MiB. Beside it stand the memory in use inside Python (blocks) and
inside malloc, which show where growth comes from. A run with fewer than 15 minutes after the warm-up gets no verdict
on memory. Whatever the length: what must not become more (tasks, sockets, files) is compared between calm moments, and
each disturbance must be recovered from; else the exit code is 1.

`--trace` runs tracemalloc in the service, which slows it, and prints what has grown between warm-up and end.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from plant.proxy import TO_CLIENT, TO_SERVER, ChaosProxy  # noqa: E402
from plant.rig import configuration  # noqa: E402
from plant.vendors import (  # noqa: E402
    FULL,
    ROWS,
    SEED,
    TAGS,
    SecondVendor,
    Simulator,
    Vendor,
    second_vendor,
    simulator,
)
from running import write  # noqa: E402

PATIENCE_S = 60.0
MOST_MIB_PER_H, MOST_GROWN_MIB = 2.0, 1.5
LEAST_MEASURED_S = 15 * 60.0
WARM_UP_S = 20 * 60.0
EVERY_S = 5.0  # between two samples
POOL = min(32, (os.cpu_count() or 1) + 4)  # threads that asyncio's pool makes one after the other, and keeps
MIB = 2.0**20


# --- the service's own process ---


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def malloc_in_use() -> int:
    """Return the bytes that malloc has handed out, mapped ones too; 0 where the C library does not say."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return 0
    ask.restype = _Mallinfo2
    found = ask()
    return int(found.uordblks + found.hblkhd)


async def serve(file: Path, trace: bool) -> None:
    """Run the service; a JSON line a second on stdout; "mark" on stdin remembers the memory, its end ends it."""
    from opcua_detector.config import load
    from opcua_detector.service import Service, set_apart_what_stays

    set_apart_what_stays()
    service = Service(load(file), file)
    await service.start()
    assert service.store is not None
    if trace:
        tracemalloc.start(12)
    commands: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    stdin = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    marked: tracemalloc.Snapshot | None = None

    async def listen() -> None:
        while line := await stdin.readline():
            commands.put_nowait(line.decode().strip())
        commands.put_nowait("end")

    listening = asyncio.create_task(listen(), name="soak")
    run = service.runs["lorenz"]
    while True:
        with suppress(TimeoutError):
            command = await asyncio.wait_for(commands.get(), 1.0)
            if command == "end":
                break
            gc.collect()
            if trace:
                marked = tracemalloc.take_snapshot()
        session, feed = service.sessions["plant"], service.feeds["lorenz"]
        print(json.dumps({
            "scored": run.scored, "state": run.state, "link": session.state.value,
            "alerts": run.monitor.verdict.event_no, "tasks": len(asyncio.all_tasks()),
            "blocks": sys.getallocatedblocks(), "malloc": malloc_in_use(),
            "metrics": service.telemetry.address[1] if service.telemetry.address else 0,
            "session": session.counters, "feed": feed.counters(), "write": run.back.counters if run.back else {},
            "service": service.counters,
        }), flush=True)
    listening.cancel()
    if marked is not None:
        gc.collect()
        grown = tracemalloc.take_snapshot().compare_to(marked, "traceback")
        for one in grown[:12]:
            if one.size_diff > 0:
                print(f"+{one.size_diff / 1024:.0f} KiB in {one.count_diff} blocks", *one.traceback.format()[-8:],
                      sep="\n  ", file=sys.stderr)
    await service.stop()


# --- what is done to it ---


@dataclass
class Scene:
    """Server and proxy, and what the last line of the service said."""

    vendor: Vendor
    proxy: ChaosProxy
    said: dict[str, Any] = field(default_factory=dict)

    async def disturb(self, what: str, argument: str = "") -> None:
        await self.vendor.disturb(what, argument)


@dataclass(frozen=True)
class Disturbance:
    """Something that begins, lasts, and ends; `quirk`: the simulator alone can do it."""

    name: str
    begin: Callable[[Scene], Awaitable[Any]]
    seconds: float = 0.0
    end: Callable[[Scene], Awaitable[Any]] | None = None
    quirk: bool = False


async def _at_once(call: Callable[[], Any]) -> None:
    call()


async def _kill(scene: Scene) -> None:
    await asyncio.to_thread(scene.vendor.kill)


async def _restart(scene: Scene) -> None:
    await asyncio.to_thread(scene.vendor.restart)


async def _full(scene: Scene) -> None:
    await scene.disturb("session_limit", FULL)
    await scene.disturb("close_sessions")


def _quirk(tag: str, what: str, value: float) -> Callable[[Scene], Awaitable[None]]:
    async def do(scene: Scene) -> None:
        assert isinstance(scene.vendor, Simulator)
        await scene.vendor.quirk(tag, what, value)

    return do


def _heal(scene: Scene) -> Awaitable[None]:
    return _at_once(scene.proxy.heal)


def _status(code: str, *tags: str) -> Callable[[Scene], Awaitable[None]]:
    return lambda scene: scene.vendor.status(code, *tags)


DISTURBANCES = (
    Disturbance("connection cut", lambda s: _at_once(s.proxy.cut)),
    Disturbance("connection reset", lambda s: _at_once(s.proxy.reset)),
    Disturbance("reset in an answer", lambda s: _at_once(lambda: s.proxy.reset_in_message(37, TO_CLIENT)), 1),
    Disturbance("reset in a request", lambda s: _at_once(lambda: s.proxy.reset_in_message(37, TO_SERVER)), 1),
    Disturbance("blackhole", lambda s: _at_once(s.proxy.blackhole), 12, _heal),
    Disturbance("half open, server mute", lambda s: _at_once(lambda: s.proxy.blackhole(TO_CLIENT)), 12, _heal),
    Disturbance("half open, client mute", lambda s: _at_once(lambda: s.proxy.blackhole(TO_SERVER)), 12, _heal),
    Disturbance("stall", lambda s: _at_once(lambda: s.proxy.stall(TO_CLIENT)), 1, _heal),
    Disturbance("slow network", lambda s: _at_once(lambda: s.proxy.slow(latency_s=0.2, rate=8000.0)), 15, _heal),
    Disturbance("server killed, restarted", _kill, 5, _restart),
    Disturbance("server paused", lambda s: _at_once(s.vendor.pause), 10, lambda s: _at_once(s.vendor.resume)),
    Disturbance("subscription deleted", lambda s: s.disturb("delete_subscriptions")),
    Disturbance("subscription expired", lambda s: s.disturb("expire_subscriptions"), quirk=True),
    Disturbance("session closed", lambda s: s.disturb("close_sessions")),
    Disturbance("session limit", _full, 8, lambda s: s.disturb("session_limit", "0")),
    Disturbance("publish limit", lambda s: s.disturb("publish_limit", "1"), 5,
                lambda s: s.disturb("publish_limit", "0")),
    Disturbance("overload", _status("GoodOverload", *TAGS), 20, _status("Good", *TAGS)),
    Disturbance("one tag Bad", _status("BadSensorFailure", "x3"), 15, _status("Good", "x3")),
    Disturbance("all tags Bad", _status("BadSensorFailure", *TAGS), 10, _status("Good", *TAGS)),
    Disturbance("tag removed", lambda s: s.disturb("remove", "x3"), 8, lambda s: s.disturb("restore", "x3")),
    Disturbance("type changed", lambda s: s.disturb("type", "x3=String"), 8, lambda s: s.disturb("type", "x3=Double")),
    Disturbance("output removed", lambda s: s.disturb("remove", "lorenz.Score"), 8,
                lambda s: s.disturb("restore", "lorenz.Score")),
    Disturbance("rights withdrawn", lambda s: s.disturb("read_only", "lorenz."), 8,
                lambda s: s.disturb("writable", "lorenz.")),
    Disturbance("clock +1 h and back", lambda s: s.vendor.clock(3_600_000), 10, lambda s: s.vendor.clock(0)),
    Disturbance("clock -1 h and back", lambda s: s.vendor.clock(-3_600_000), 10, lambda s: s.vendor.clock(0)),
    Disturbance("out of order", _quirk("measured", "swap", 0.3), 10, _quirk("measured", "swap", 0.0), quirk=True),
    Disturbance("overflow bits", _quirk("x3", "overflow", 0.5), 5, _quirk("x3", "overflow", 0.0), quirk=True),
    Disturbance("NaN", _quirk("x3", "nan", 1.0), 5, _quirk("x3", "nan", 0.0), quirk=True),
)


# --- looking at it ---


def of_process(pid: int) -> dict[str, float]:
    """Return what Linux tells of a process: MiB resident, files and sockets open, threads, CPU seconds."""
    proc = Path(f"/proc/{pid}")
    sockets = files = 0
    for one in (proc / "fd").iterdir():
        with suppress(OSError):
            files += 1
            sockets += os.readlink(one).startswith("socket:")
    stat = (proc / "stat").read_text().rsplit(")", 1)[1].split()
    ticks = os.sysconf("SC_CLK_TCK")
    return {
        "rss_mib": int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB, "files": files,
        "sockets": sockets, "threads": int(stat[17]), "cpu_s": (int(stat[11]) + int(stat[12])) / ticks,
    }


def scrape(port: int) -> None:
    """Read the metrics once."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        answer.read()


def slope_per_h(t_s: list[float], values: list[float]) -> float:
    """Return the median slope over all pairs of samples (Theil-Sen), per hour."""
    t, y = np.array(t_s), np.array(values)
    i, j = np.triu_indices(len(t), 1)
    return float(np.median((y[j] - y[i]) / (t[j] - t[i])) * 3600.0) if len(i) else 0.0


def store_mib(folder: Path) -> float:
    """Return the size of the store with its side files."""
    return sum(one.stat().st_size for one in folder.glob("opcua-detector.db*")) / MIB


@dataclass
class Struck:
    """One disturbance that has been: seconds from its end until scores flowed (None: they did not), alerts raised."""

    name: str
    back_s: float | None
    alerts: int


class Soak:
    """The run: the service's lines, the samples, and what was done."""

    def __init__(self, scene: Scene, child: asyncio.subprocess.Process, folder: Path,
                 given: argparse.Namespace) -> None:
        self.scene, self.child, self.folder, self.given = scene, child, folder, given
        self.begun = time.monotonic()
        self.samples: list[dict[str, Any]] = []
        self.struck: list[Struck] = []
        self.calm: dict[str, dict[str, Any]] = {}
        self.scrapes = self.scrape_errors = 0

    @property
    def now_s(self) -> float:
        """Seconds since the begin."""
        return time.monotonic() - self.begun

    async def read_lines(self) -> None:
        """Keep the newest line of the service."""
        assert self.child.stdout is not None
        while line := await self.child.stdout.readline():
            self.scene.said = json.loads(line)
        self.scene.said = {}

    async def sample(self) -> None:
        """Take a sample every few seconds, and scrape the metrics as Prometheus would."""
        while True:
            await asyncio.sleep(EVERY_S)
            said = self.scene.said
            if not said:
                continue
            self.samples.append(self.look())
            if self.given.out:
                with Path(self.given.out).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(self.samples[-1]) + "\n")
            try:
                await asyncio.to_thread(scrape, said["metrics"])
                self.scrapes += 1
            except OSError:
                self.scrape_errors += 1

    def look(self) -> dict[str, Any]:
        """Return one sample."""
        said = self.scene.said
        return {"t_s": self.now_s, **of_process(self.child.pid), "store_mib": store_mib(self.folder),
                "malloc_mib": said["malloc"] / MIB, "blocks": said["blocks"], "tasks": said["tasks"],
                "scored": said["scored"], "alerts": said["alerts"], "lost": said["feed"]["lost"],
                "gaps": said["feed"]["gaps"], "reconnects": said["session"]["reconnects"]}

    async def flowing(self, more: int = 100) -> float | None:
        """Wait until the service judges rows and finds them normal; return the seconds, None when it does not."""
        begun, target = time.monotonic(), self.scene.said.get("scored", 0) + more
        while time.monotonic() - begun < PATIENCE_S:
            said = self.scene.said
            # 1, 2, 3: it judges; an alert that is right or wrong is no matter of the recovery
            if said and said["scored"] >= target and said["state"] in (1, 2, 3) and said["link"] == "connected":
                return time.monotonic() - begun
            await asyncio.sleep(0.1)
        return None

    async def quiet(self, name: str) -> None:
        """Remember what there is of things at a calm moment: nothing has happened for a while."""
        await asyncio.sleep(min(15.0, self.given.every / 4))
        if await self.flowing() is not None:
            self.calm[name] = self.look()

    async def strike(self, one: Disturbance) -> None:
        """Do a disturbance and wait for the end of it."""
        before = self.scene.said.get("alerts", 0)
        await one.begin(self.scene)
        await asyncio.sleep(one.seconds)
        if one.end is not None:
            await one.end(self.scene)
        back_s = await self.flowing()
        self.struck.append(Struck(one.name, back_s, self.scene.said.get("alerts", before) - before))

    async def mend(self) -> None:
        """End every disturbance after an error of the rig: a busy machine may leave its own calls unanswered.

        A server that has died of itself (node-opcua does, where a queue runs over while values are Bad) is started.
        """
        self.scene.proxy.heal()
        try:
            self.scene.vendor.resume()
            await self.scene.vendor.calm()
        except Exception:  # whatever the vendor's control connection raises: the server is not there any more
            await asyncio.to_thread(self.scene.vendor.restart)

    async def go(self) -> None:
        """Run for as long as was asked."""
        rng, minutes = random.Random(self.given.seed), float(self.given.minutes)
        kinds = [one for one in DISTURBANCES if not one.quirk or isinstance(self.scene.vendor, Simulator)]
        waiting: list[Disturbance] = []
        warm_up = min(WARM_UP_S, minutes * 20)
        assert self.child.stdin is not None
        if await self.flowing() is None:
            raise SystemExit("the service does not score on an undisturbed server")
        self.begun = time.monotonic()
        while self.now_s < minutes * 60:
            begun = time.monotonic()
            if "warm" not in self.calm and self.now_s >= warm_up:
                await self.quiet("warm")
                self.child.stdin.write(b"mark\n")
            if not waiting:
                waiting = rng.sample(kinds, len(kinds))
            one = waiting.pop()
            try:
                await self.strike(one)
            except Exception as error:  # of the rig itself: an hour is not thrown away for it
                print(f"{one.name}: {str(error)[:300]!r}", file=sys.stderr, flush=True)
                await self.mend()
            if self.child.returncode is not None:
                raise SystemExit(f"the service ended by itself with code {self.child.returncode}")
            every = self.given.every if "warm" in self.calm else min(self.given.every, warm_up / len(kinds))
            await asyncio.sleep(max(0.0, every * rng.uniform(0.8, 1.2) - (time.monotonic() - begun)))
        await self.scene.vendor.calm()
        await self.quiet("end")

    def report(self) -> bool:
        """Print the tables; return whether everything held."""
        warm = self.calm.get("warm", self.samples[0])
        after = [one for one in self.samples if one["t_s"] >= warm["t_s"]]
        t = [one["t_s"] for one in after]
        third = max(1, len(after) // 3)
        print(f"| {self.now_s / 60:.0f} min, {self.scene.vendor.name} | first | after warm-up | end | slope per hour |")
        print("|---|---|---|---|---|")
        medians: dict[str, tuple[float, float]] = {}
        for name, words in (("rss_mib", "resident memory, MiB"), ("malloc_mib", "in use in malloc, MiB"),
                            ("blocks", "blocks in use in Python"), ("files", "open files"), ("sockets", "sockets"),
                            ("threads", "threads"), ("tasks", "tasks"), ("store_mib", "store, MiB"),
                            ("cpu_s", "CPU, s"), ("scored", "scores"), ("lost", "samples lost"), ("gaps", "gaps"),
                            ("reconnects", "reconnects"), ("alerts", "alerts")):
            values = [float(one[name]) for one in after]
            medians[name] = statistics.median(values[:third]), statistics.median(values[-third:])
            print(f"| {words} | {self.samples[0][name]:.4g} | {values[0]:.6g} | {values[-1]:.6g} | "
                  f"{slope_per_h(t, values):+.4g} |")
        print(f"\n{len(self.struck)} disturbances, {self.scrapes} scrapes ({self.scrape_errors} failed), "
              f"{100 * (after[-1]['cpu_s'] - after[0]['cpu_s']) / (t[-1] - t[0]):.1f} % of a core\n")
        print("| disturbance | times | seconds from its end to the next 100 scores, median / longest | alerts |")
        print("|---|---|---|---|")
        for name in dict.fromkeys(one.name for one in self.struck):
            of_it = [one.back_s for one in self.struck if one.name == name]
            back = [one for one in of_it if one is not None]
            failed = f" ({len(of_it) - len(back)} NOT recovered)" if len(back) < len(of_it) else ""
            took = f"{statistics.median(back):.1f} / {max(back):.1f}" if back else "-"
            alerts = sum(one.alerts for one in self.struck if one.name == name)
            print(f"| {name} | {len(of_it)} | {took}{failed} | {alerts} |")
        print()
        return self.verdict(t, after, medians["rss_mib"], warm)

    def verdict(self, t: list[float], after: list[dict[str, Any]], rss: tuple[float, float],
                warm: dict[str, Any]) -> bool:
        """Print pass or fail of each thing that must hold."""
        slope, grown = slope_per_h(t, [float(one["rss_mib"]) for one in after]), rss[1] - rss[0]
        checks = {
            "every disturbance is recovered from": all(one.back_s is not None for one in self.struck),
            "no scrape failed": self.scrape_errors == 0,
        }
        if "end" in self.calm:
            end = self.calm["end"]
            more = {name: (warm[name], end[name]) for name in ("tasks", "sockets", "files") if end[name] > warm[name]}
            if end["threads"] > self.samples[0]["threads"] + POOL:
                more["threads"] = (self.samples[0]["threads"], end["threads"])
            checks[f"nothing is left over {more or ''}"] = not more
        if t[-1] - t[0] >= LEAST_MEASURED_S:
            checks[f"flat memory: {slope:+.2f} MiB/h (at most {MOST_MIB_PER_H:+g}), last third {grown:+.2f} MiB above "
                   f"the first (at most {MOST_GROWN_MIB:+g})"] = slope <= MOST_MIB_PER_H and grown <= MOST_GROWN_MIB
        else:
            print(f"no verdict on memory: {(t[-1] - t[0]) / 60:.1f} min after the warm-up are too short "
                  f"({slope:+.1f} MiB/h)")
        for what, holds in checks.items():
            print(f"{'pass' if holds else 'FAIL'}  {what}")
        return all(checks.values())


def fit(folder: Path) -> None:
    """Fit the monitor on the rows that both servers send in the first hour and more, so that none of them is news."""
    from opcua_detector.api import Record
    from opcua_detector.app import fit_config, group_tags
    from opcua_detector.config import GroupConfig, load
    from sim_server.processes import make

    def healthy(group: GroupConfig) -> Record:
        return Record.from_rows(make("lorenz", seed=SEED).simulate(ROWS), group_tags(group), group.period)

    file = write(folder, configuration("opc.tcp://127.0.0.1:1/"))
    for fitted in fit_config(load(file), file, healthy):
        fitted.model.save(fitted.path)


async def soak(vendor: Vendor, folder: Path, given: argparse.Namespace) -> bool:
    """Run the service before this server and disturb it."""
    async with ChaosProxy(vendor.port) as proxy:
        group = {"sampling": "0 ms"} if isinstance(vendor, SecondVendor) else {}
        content = configuration(proxy.endpoint, group=group) | {"metrics": {"listen": 0}}
        file = write(folder, content)
        log = (folder / "service.log").open("wb")
        child = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--serve", str(file), *(["--trace"] if given.trace else []), cwd=folder,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log)
        scene = Scene(vendor, proxy)
        run = Soak(scene, child, folder, given)
        lines = asyncio.create_task(run.read_lines())
        sampling = asyncio.create_task(run.sample())
        try:
            await vendor.calm()
            await run.go()
            return run.report()
        finally:
            sampling.cancel()
            assert child.stdin is not None
            child.stdin.close()
            with suppress(TimeoutError):
                await asyncio.wait_for(child.wait(), 60.0)
            if child.returncode is None:
                child.kill()
                await child.wait()
            lines.cancel()
            log.close()
            if isinstance(vendor, Simulator):
                await vendor.let_go()
            if given.trace or child.returncode:
                print((folder / "service.log").read_text(errors="replace")[-20000:], file=sys.stderr)


def main() -> None:
    """Parse the options, fit, run, report; the exit code tells whether everything held."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds from one disturbance to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vendor", choices=["asyncua", "node-opcua"], default="asyncua")
    parser.add_argument("--out", help="also write each sample to this file, a JSON object per line")
    parser.add_argument("--trace", action="store_true", help="say which lines of the service have grown")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        asyncio.run(serve(given.serve, given.trace))
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="opcua-detector-soak-")))
        fit(folder)
        begin = simulator if given.vendor == "asyncua" else second_vendor
        place = folder / "server"
        place.mkdir()
        vendor = stack.enter_context(begin(place))
        held = asyncio.run(soak(vendor, folder, given))
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
