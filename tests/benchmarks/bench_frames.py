"""Time of one notification through the rule of time: push and drain, with 2, 20 and 200 samples.

python tests/benchmarks/bench_frames.py
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from opcua_detector.api import Frame, Tag
from opcua_detector.frames import FrameBuilder, rows_from_samples

P = 10_000_000
T0 = 1_700_000_000_000_000_000


def push_us(n_tags: int, pushes: int) -> tuple[float, float]:
    """Return (median, 99th percentile) in microseconds of one push with one row drained."""
    builder = FrameBuilder([Tag(f"t{j}") for j in range(n_tags)], P, P, 20)
    frame = Frame.empty(n_tags)
    index, value = np.arange(n_tags, dtype=np.int32), np.zeros(n_tags)
    stamps, status = np.zeros(n_tags, np.int64), np.zeros(n_tags, np.uint32)
    took = np.zeros(pushes)
    rows = 0
    for k in range(pushes):
        stamps[:] = T0 + k * P
        begin = time.perf_counter_ns()
        builder.push(index, stamps, value, status)
        while builder.next_row(frame):
            rows += 1
        took[k] = time.perf_counter_ns() - begin
    assert rows == pushes
    return float(np.median(took) / 1e3), float(np.percentile(took, 99) / 1e3)


def batch_s(n_rows: int, n_tags: int) -> float:
    """Return seconds for a whole history."""
    index = np.repeat(np.arange(n_tags, dtype=np.int32), n_rows)
    stamps = np.tile(T0 + np.arange(n_rows) * P, n_tags)
    begin = time.perf_counter()
    record = rows_from_samples([Tag(f"t{j}") for j in range(n_tags)], P, index, stamps, np.zeros(len(stamps)))
    assert len(record) == n_rows
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pushes", type=int, default=5000)
    options = parser.parse_args()
    for n_tags in (2, 20, 200):
        median, p99 = push_us(n_tags, options.pushes)
        print(f"push + row, {n_tags:3d} samples: median {median:6.1f} us, p99 {p99:6.1f} us")
    print(f"history of 40000 rows x 4 tags: {batch_s(40_000, 4) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
