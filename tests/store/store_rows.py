"""Rows, verdicts and foreign locks for the tests of the store."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from opcua_detector.api import Frame, Record, Tag, Verdict
from opcua_detector.store import Recording, Store

PERIOD_NS = 10_000_000
NEVER_S = 3600.0  # commit interval of tests that decide themselves when to commit


def tags(n: int) -> tuple[Tag, ...]:
    return tuple(Tag(f"tag{k}") for k in range(n))


def noise(n: int, k: int, seed: int = 0, start_ns: int = 0) -> Record:
    """Rows that do not compress."""
    return Record.from_rows(
        np.random.default_rng(seed).normal(size=(n, k)), tags(k), PERIOD_NS, start_ns=start_ns
    )


def row_frame(k: int) -> Frame:
    frame = Frame.empty(k)
    frame.valid[:] = 1
    return frame


def offer_counted(store: Store, recording: Recording, start: int, stop: int, frame: Frame) -> int:
    """Offer rows start..stop whose values are their number; return how many were taken."""
    taken = 0
    for n in range(start, stop):
        frame.values[:] = n
        frame.source_ns = n * PERIOD_NS
        taken += store.offer_row(recording, frame) > 0
    return taken


def verdict(monitor: str = "pump") -> Verdict:
    return Verdict(monitor, "model-1", ("a",), np.zeros(1), np.zeros(1))


@contextmanager
def write_lock(path: Path) -> Iterator[None]:
    """Another program that holds SQLite's write lock."""
    conn = sqlite3.connect(path, isolation_level=None)
    conn.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        conn.execute("ROLLBACK")
        conn.close()
