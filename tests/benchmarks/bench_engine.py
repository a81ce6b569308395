"""Measures the loop between a row and its verdict: time of a step, memory, and what a fit costs.

    python tests/benchmarks/bench_engine.py

The monitors are those of configs/*.yaml with both methods, on simulated rows. "hot": one step after the other; "paced":
one step every 10 ms as rows really come, so that it begins with cold caches and a core that has slept. Exit code 1
where a promise does not hold: `transition` at 2 tags at most 5 us a sample, engine step at most 60 us (medians, hot),
tracemalloc peak over 10 000 steps below 4 KiB. A busy machine shows in the paced figures and in every 99th percentile.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opcua_detector.api import Float64, Frame, Record
from opcua_detector.engine import Engine
from tests.benchmarks import DemoMonitor, demo_monitor

TRANSITION_US, STEP_US, PEAK_BYTES = 5.0, 60.0, 4096
PERIOD_S = 0.01
ROWS = 10_000


def rows_of(record: Record) -> list[tuple[Float64, np.ndarray, int]]:
    """Return (values, valid, source_ns) of each row, made before so that only the engine is measured."""
    return list(zip(record.values, record.valid, record.source_ns.tolist(), strict=True))


def told(name: str, took_ns: Float64, limit_us: float | None = None) -> bool:
    """Print one line; return whether the promise, if any, holds."""
    median, p99 = np.percentile(took_ns, [50, 99]) / 1e3
    promise = "" if limit_us is None else f"   promised {limit_us:g}: {'holds' if median <= limit_us else 'BROKEN'}"
    print(f"{name:46s} median {median:7.2f} us   p99 {p99:8.2f} us{promise}", flush=True)
    return limit_us is None or bool(median <= limit_us)


def transition_alone(one: DemoMonitor, record: Record) -> Float64:
    """Time `update` of the method `transition` on its own, ns a sample."""
    method = one.methods[0]
    columns = one.model.plan.prepare(record.select([tag.name for tag in one.model.tags]))
    method.reset()
    took = np.empty(len(record))
    for k, (values, valid) in enumerate(zip(columns.values, columns.valid, strict=True)):
        began = time.perf_counter_ns()
        method.update(values, valid)
        took[k] = time.perf_counter_ns() - began
    return took[1000:]


def steps(one: DemoMonitor, record: Record, *, pace_s: float = 0.0) -> Float64:
    """Time `Engine.step`, ns a row."""
    engine, frame = Engine([one.monitor()]), Frame.empty(len(record.tags))
    took = np.empty(len(record))
    due = time.perf_counter()
    for k, (values, valid, source_ns) in enumerate(rows_of(record)):
        frame.values[:], frame.valid[:] = values, valid
        frame.source_ns, frame.gap, frame.seq = source_ns, k == 0, k
        if pace_s and k >= 200:
            due = max(due + pace_s, time.perf_counter())
            time.sleep(max(0.0, due - time.perf_counter()))
        began = time.perf_counter_ns()
        engine.step(frame)
        took[k] = time.perf_counter_ns() - began
    return took[200:]


def peak_bytes(one: DemoMonitor, record: Record) -> int:
    """Return the peak of traced memory over 10 000 steps, after as many that warm up; the smaller of two."""
    engine, frame = Engine([one.monitor()]), Frame.empty(len(record.tags))
    rows = rows_of(record)

    def run() -> None:
        for values, valid, source_ns in rows:
            np.copyto(frame.values, values)
            np.copyto(frame.valid, valid)
            frame.source_ns = source_ns
            engine.step(frame)

    run()
    gc.collect()
    peaks = []
    tracemalloc.start()
    run()
    for _ in range(2):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        run()
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    return min(peaks)


def fit_line(process: str, rows: int) -> None:
    """Print what a fit of so many rows costs: seconds, and bytes of the model file."""
    began = time.perf_counter()
    one = demo_monitor(process, 1, rows=rows)
    took = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.npz"
        one.model.save(file)
        size = file.stat().st_size
    held = sum(array.nbytes for method in one.model.methods for array in method.arrays.values())
    print(f"{process} fit {rows:7d} rows, simulation included        {took:7.2f} s   model file {size / 1024:6.0f} KiB"
          f"   in memory {held / 1024:6.0f} KiB", flush=True)


def main() -> int:
    """Run all measurements; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paced-s", type=float, default=10.0, help="seconds of the paced part of each process")
    chosen = parser.parse_args()
    kept = True
    for process in ("lorenz", "throttle"):
        one = demo_monitor(process, 1, rows=40_000)
        record = one.plant.record(ROWS)
        kept &= told(f"{process} transition, 2 tags", transition_alone(one, record), TRANSITION_US)
        kept &= told(f"{process} engine step, both methods, hot", steps(one, record), STEP_US)
        if chosen.paced_s > 0:
            paced = record.rows(0, 200 + round(chosen.paced_s / PERIOD_S))
            told(f"{process} engine step, both methods, paced 10 ms", steps(one, paced, pace_s=PERIOD_S))
        peak = peak_bytes(one, record)
        print(f"{process} tracemalloc peak over {ROWS} steps         {peak:6d} B   promised below {PEAK_BYTES}: "
              f"{'holds' if peak < PEAK_BYTES else 'BROKEN'}", flush=True)
        kept &= peak < PEAK_BYTES
    for process in ("lorenz", "throttle"):
        for rows in (20_000, 40_000, 120_000):
            fit_line(process, rows)
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
