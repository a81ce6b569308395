"""Measures the store: cost of an offer in the loop, rows a second through the writer, size, reading back.

    python tests/benchmarks/bench_store.py [--tags 8] [--rows 200000] [--folder FOLDER]

Prints one line per figure and a JSON object last. Offers are timed one by one while the writer commits beside
them; the rows are waves and noise in steps of 12 bit, as analog inputs give them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from opcua_detector.api import Frame, Record, Tag, Verdict
from opcua_detector.csv_rows import read_csv, write_csv
from opcua_detector.store import Retention, Store

PERIOD_NS = 10_000_000


def plant_rows(n: int, k: int) -> Record:
    """Return rows as an analog input card gives them: slow waves, noise, 4096 steps."""
    rng = np.random.default_rng(0)
    t = np.arange(n)[:, None] * 0.01
    wave = np.sin(t * rng.uniform(0.05, 3.0, k) + rng.uniform(0, 6, k)) + rng.normal(0, 0.01, (n, k))
    return Record.from_rows(np.round(wave * 2048) / 2048 * 50.0, [f"tag{i}" for i in range(k)], PERIOD_NS)


def offers(folder: Path, record: Record, n: int, pause_every: int) -> dict[str, float]:
    """Time each offer; the loop rests after `pause_every` rows until the writer has caught up."""
    k = len(record.tags)
    frame, verdict = Frame.empty(k), Verdict("m", "id", ("a",), np.zeros(1), np.zeros(1))
    frame.valid[:] = 1
    row_ns, verdict_ns = np.zeros(n), np.zeros(n)
    with Store.open(folder / "offers.db", commit_interval_s=0.05) as store:
        store.start_run("bench", monitors=["m"])
        recording = store.start_recording("r", record.tags, PERIOD_NS)
        for i in range(n):
            frame.values[:] = record.values[i]
            frame.source_ns = verdict.source_ns = i * PERIOD_NS
            verdict.score = 0.5
            a = time.perf_counter_ns()
            store.offer_row(recording, frame)
            b = time.perf_counter_ns()
            store.offer_verdict(verdict)
            verdict_ns[i] = time.perf_counter_ns() - b
            row_ns[i] = b - a
            if i % pause_every == 0:
                store.flush()
        store.flush()
        dropped = store.counters.dropped_rows + store.counters.dropped_verdicts
    assert dropped == 0
    return {
        "offer_row_p50_us": float(np.percentile(row_ns, 50)) / 1e3,
        "offer_row_p99_us": float(np.percentile(row_ns, 99)) / 1e3,
        "offer_verdict_p50_us": float(np.percentile(verdict_ns, 50)) / 1e3,
        "offer_verdict_p99_us": float(np.percentile(verdict_ns, 99)) / 1e3,
    }


def sustained(folder: Path, record: Record) -> dict[str, float]:
    """Offer as fast as the writer takes rows, without a drop; then measure the file."""
    n, k = record.values.shape
    frame = Frame.empty(k)
    frame.valid[:] = 1
    with Store.open(folder / "live.db", commit_interval_s=0.05) as store:
        recording = store.start_recording("r", record.tags, PERIOD_NS)
        cpu, wall = time.process_time(), time.perf_counter()
        for i in range(n):
            frame.values[:] = record.values[i]
            frame.source_ns = i * PERIOD_NS
            store.offer_row(recording, frame)
            if i % 1024 == 0 and store.queued > 4096:
                store.flush()
        store.flush()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        store.end_recording(recording)
        assert store.counters.dropped_rows == 0
        start = time.perf_counter()
        read = store.read_recording("r")
        read_s = time.perf_counter() - start
        np.testing.assert_array_equal(read.values, record.values)
        size = store.usage().total_bytes
    return {
        "live_rows_per_s": n / wall,
        "live_cpu_us_per_row": cpu / n * 1e6,
        "live_bytes_per_row": size / n,
        "read_rows_per_s": n / read_s,
    }


def whole(folder: Path, record: Record) -> dict[str, float]:
    """Write a record in one call, run a retention pass over it, and pass it through CSV."""
    n = len(record)
    path = folder / "whole.db"
    with Store.open(path) as store:
        start = time.perf_counter()
        store.write_record("r", record)
        write_s = time.perf_counter() - start
        size = store.usage().total_bytes
    with Store.open(path, retention=Retention(quota_bytes=size // 2)) as store:
        start = time.perf_counter()
        store.apply_retention()
        retain_s = time.perf_counter() - start
    start = time.perf_counter()
    write_csv(folder / "r.csv", record)
    csv_write_s = time.perf_counter() - start
    start = time.perf_counter()
    read_csv(folder / "r.csv")
    return {
        "write_record_rows_per_s": n / write_s,
        "halve_by_retention_s": retain_s,
        "csv_write_s": csv_write_s,
        "csv_read_s": time.perf_counter() - start,
    }


def main() -> None:
    """Run all measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tags", type=int, default=8)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write; default: a temporary folder"
    )
    chosen = parser.parse_args()
    record = plant_rows(chosen.rows, chosen.tags)
    record = Record(
        tuple(Tag(tag.name) for tag in record.tags),
        PERIOD_NS,
        record.source_ns,
        record.values,
        record.valid,
        record.gap,
    )
    figures: dict[str, float] = {
        "tags": chosen.tags,
        "rows": chosen.rows,
        "raw_bytes_per_row": 8.0 * (chosen.tags + 1),
    }
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        figures |= offers(folder, record, min(chosen.rows, 50_000), 1000)
        figures |= sustained(folder, record)
        figures |= whole(folder, record)
    for key, value in figures.items():
        print(f"{key:28s} {value:14.6g}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
