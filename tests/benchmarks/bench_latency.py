"""Measures the way from SourceTimestamp to a score in another client's hands, over a real OPC UA server.

    python tests/benchmarks/bench_latency.py

Three processes on one machine: the simulated throttle (50 rows a second, speed 1), the detector's service (both
methods, fitted from the history it reads; store and write-back on), and a plain asyncua client that watches
LastUpdate, which is written in one request with Score, and takes the clock when the notification arrives. Once for
each publishing interval of the detector's subscription; the client's own is `--watch-ms`, its wait is in the figure.
The floor stands beside it: the same client watches a tag of the plant directly, by a session of its own.
Exit code 1 where the median is above the publishing interval + 10 ms. Wants an idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from opcua_detector import config as configuration
from opcua_detector.cli.simulator import simulated_plant
from opcua_detector.client.observer import Observer
from opcua_detector.service import Service

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "throttle.yaml"
HISTORY_ROWS = 20_000
SETTLE_S, ALLOWED_MS = 4.0, 10.0
RESULT = "nsu=urn:opcua-detector:results;s=throttle.LastUpdate"
TAG = "nsu=urn:opcua-detector:simulated-plant;s=throttle.theta"


def config_file(folder: Path, endpoint: str, publishing_ms: int) -> Path:
    """Write the sample config for this server and publishing interval."""
    text = CONFIG.read_text(encoding="utf-8").replace("opc.tcp://127.0.0.1:4840/", endpoint)
    file = folder / "throttle.yaml"
    file.write_text(text.replace("    period: 20 ms\n", f"    period: 20 ms\n    publishing: {publishing_ms} ms\n"),
                    encoding="utf-8")
    assert configuration.load(file).groups[0].publishing_ns == publishing_ms * 10**6
    return file


async def serve(file: Path, seconds: float) -> dict[str, Any]:
    """Run the service; return what it counted between the settling time and the end."""
    service = Service(configuration.load(file), file)
    await service.start()
    try:
        await asyncio.sleep(SETTLE_S)
        run, feed = service.runs["throttle"], service.feeds["throttle"]
        assert run.back is not None
        first = (service.steps, run.scored, feed.counters()["lost"], run.back.superseded.get("throttle", 0))
        cpu, wall = time.process_time(), time.perf_counter()
        await asyncio.sleep(seconds)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        last = (service.steps, run.scored, feed.counters()["lost"], run.back.superseded.get("throttle", 0))
        rows, scored, lost, superseded = (b - a for a, b in zip(first, last, strict=True))
        scoring = service.scoring_ns[first[0]:last[0]] / 1e3
        return {"cpu_s_per_s": cpu / wall, "rows": rows, "scored": scored, "lost": lost, "superseded": superseded,
                "step_us_p50": float(np.median(scoring)), "step_us_p99": float(np.quantile(scoring, 0.99)),
                "alerts": run.alerts_told}
    finally:
        await service.stop("measured")


async def watch(endpoint: str, watch_ms: float, seconds: float) -> dict[str, list[float]]:
    """Watch the results, and a tag of the plant, from another process; return the latencies in ms."""
    seen: list[float] = []
    direct: list[float] = []

    def on_value(value: Any, _stamp: int | None, seen_ns: int) -> None:
        if value:
            seen.append((seen_ns - value) / 1e6)

    def on_tag(_value: Any, stamp: int | None, seen_ns: int) -> None:
        if stamp is not None:
            direct.append((seen_ns - stamp) / 1e6)

    # By a session of its own: a server may publish all subscriptions of a session together.
    async with Observer(endpoint) as observer, Observer(endpoint) as other:
        await observer.watch(RESULT, watch_ms, on_value)
        await other.watch(TAG, watch_ms, on_tag)
        await asyncio.sleep(SETTLE_S)
        seen.clear()
        direct.clear()
        await asyncio.sleep(seconds)
        return {"seen": list(seen), "direct": list(direct)}


def child(*arguments: str) -> subprocess.Popen[bytes]:
    """Start this file in a process of its own, in another role."""
    return subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE)


def answer(process: subprocess.Popen[bytes], timeout_s: float) -> Any:
    """Wait for a child and return the JSON it prints last."""
    try:
        printed, _ = process.communicate(timeout=timeout_s)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode:
        raise SystemExit(f"a measuring process failed with exit code {process.returncode}")
    return json.loads(printed.splitlines()[-1])


def measure(publishing_ms: int, watch_ms: float, seconds: float) -> bool:
    """Measure with one publishing interval and print; return whether the promise holds."""
    with tempfile.TemporaryDirectory() as name, simulated_plant(
            ["--process", "throttle", "--port", "0", "--history-rows", str(HISTORY_ROWS), "--seed", "1"]) as ready:
        endpoint, file = ready["endpoint"], config_file(Path(name), ready["endpoint"], publishing_ms)
        fit = subprocess.run([sys.executable, "-m", "opcua_detector", "fit", str(file)], capture_output=True, text=True)
        if fit.returncode:
            raise SystemExit(f"`opcua-detector fit` failed with exit code {fit.returncode}:\n{fit.stderr}")
        service = child("--role", "service", "--config", str(file), "--seconds", str(seconds + 2 * SETTLE_S))
        try:
            time.sleep(SETTLE_S)
            client = child("--role", "client", "--endpoint", endpoint, "--watch-ms", str(watch_ms),
                           "--seconds", str(seconds))
            told = answer(client, seconds + 60)
            latency, direct = np.array(told["seen"]), np.array(told["direct"])
            counted = answer(service, seconds + 60)
        finally:
            if service.poll() is None:
                service.kill()
                service.wait()
    p50, p99 = np.quantile(latency, [0.5, 0.99])
    limit = publishing_ms + ALLOWED_MS
    holds = bool(p50 <= limit)
    print(f"publishing {publishing_ms} ms, {len(latency)} scores seen in {seconds:g} s\n"
          f"  SourceTimestamp to score seen: p50 {p50:.1f} ms   p99 {p99:.1f} ms   max {latency.max():.1f} ms"
          f"   promised p50 <= {limit:g} ms: {'holds' if holds else 'BROKEN'}\n"
          f"  a tag of the plant watched directly: p50 {np.median(direct):.1f} ms\n"
          f"  service: {counted['cpu_s_per_s']:.2f} s CPU a second; {counted['rows']} rows, "
          f"{counted['scored']} scored, {counted['lost']} samples lost, {counted['superseded']} writes superseded, "
          f"{counted['alerts']} alerts; engine step p50 {counted['step_us_p50']:.0f} us, "
          f"p99 {counted['step_us_p99']:.0f} us", flush=True)
    return holds


def main() -> int:
    """Measure each publishing interval, or play one of the roles; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--publishing-ms", type=int, nargs="*", default=[20, 10])
    parser.add_argument("--watch-ms", type=float, default=10.0)
    parser.add_argument("--role", choices=["all", "service", "client"], default="all", help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--endpoint", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    logging.getLogger("asyncua").setLevel(logging.ERROR)  # it tells each revised interval
    if chosen.role == "service":
        print(json.dumps(asyncio.run(serve(chosen.config, chosen.seconds))))
        return 0
    if chosen.role == "client":
        print(json.dumps(asyncio.run(watch(chosen.endpoint, chosen.watch_ms, chosen.seconds))))
        return 0
    kept = [measure(interval, chosen.watch_ms, chosen.seconds) for interval in chosen.publishing_ms]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    raise SystemExit(main())
