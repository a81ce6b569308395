"""Labelled records for the benchmarks: three public sets and the two simulated plants, all as `Case`s.

The public files are not part of the project. They are looked for in the folder that OPCUA_DETECTOR_DATA names, else in
../shared/data beside the project. Expected there: skab_valve1/skab_valve1.csv.gz (real water rig, GPL-3.0, test data
only), tep/tep.csv.gz (Tennessee Eastman) and asd/omi-<k>.npz with asd/omi-<k>.interpretation.txt (application servers,
MIT).

A case is one recording: healthy rows to learn from, then test rows with labels. Each belongs to the design half, whose
labels may be looked at while designing, or to the report half, which judges. Smoothing and VUS window are the
reference settings of the design, section 5.
"""

from __future__ import annotations

import csv
import gzip
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from opcua_detector.api import Float64, Int64, UInt8
from opcua_detector.errors import RecordError
from sim_server.processes import run_schedule

Half = Literal["design", "report", "both"]

PROJECT = Path(__file__).resolve().parents[2]
SKAB_HEALTHY_ROWS = 400
FIT_SHARE = 0.7  # of the healthy rows; the rest calibrates (TEP has a recording of its own for that)
TEP_FAULTS = (1, 2, 4, 5, 6, 7, 8, 10, 11, 14, 16, 19, 21)
TEP_DESIGN = frozenset({1, 2, 4, 5, 6, 7})
TEP_CALIBRATION_ROWS = 480
SKAB_RUNS, ASD_MACHINES = 16, 6
SKAB_DESIGN, ASD_DESIGN = frozenset(range(8)), frozenset({1, 2, 3})
SETS = ("skab", "tep", "asd")
SMOOTHING = {"skab": 10, "tep": 5, "asd": 6}
VUS_WINDOW = {"skab": 60, "tep": 20, "asd": 30}
SIMULATED_SEEDS = {"lorenz": 5, "throttle": 3}
SIMULATED_WINDOW, SETTLING_ROWS = 100, 40
SIMULATED_PERIOD_S = {"lorenz": 0.01, "throttle": 0.02}


@dataclass(frozen=True)
class RootCause:
    """One labelled event: test rows [start, stop) and the tags (columns, from 0) at its root."""

    start: int
    stop: int
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One recording of a data set.

    name : str; as in the data set
    data_set : str; "skab", "tep", "asd", "lorenz" or "throttle"
    half : "design", "report" or "both" (simulated, and the healthy TEP run)
    tags : names of the columns
    period_s : float; seconds per row
    healthy : float64[n_healthy, n_tags]; to learn from
    fit_rows : int; the first so many healthy rows are for fitting where a method calibrates on the others
    healthy_gap, test_gap : uint8[..]; 1 = this row does not continue the row before; 0 on the first test row where it
        continues the healthy rows
    test : float64[n_test, n_tags]
    truth : uint8[n_test]; all 0 in a healthy recording, which has false alarms and no ranking figure
    smoothing, vus_window : rows; reference settings
    healthy_times_s, test_times_s : float64[..] or None; seconds since 1970 UTC, where the rows carry times
    causes : root causes by event, where known
    block : int64[n_test]; number of the simulated block, zeros elsewhere
    """

    name: str
    data_set: str
    half: Half
    tags: tuple[str, ...]
    period_s: float
    healthy: Float64
    fit_rows: int
    healthy_gap: UInt8
    test: Float64
    test_gap: UInt8
    truth: UInt8
    smoothing: int
    vus_window: int
    healthy_times_s: Float64 | None = None
    test_times_s: Float64 | None = None
    causes: tuple[RootCause, ...] = ()
    block: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))

    def clean(self, window: int = SIMULATED_WINDOW) -> NDArray[np.bool_]:
        """Return bool[n_test]: False on the first window + 40 rows of each simulated block."""
        starts = np.flatnonzero(np.diff(self.block, prepend=-1))
        since = np.arange(len(self.truth)) - np.repeat(starts, np.diff(np.append(starts, len(self.truth))))
        return since >= window + SETTLING_ROWS


def data_folder() -> Path:
    """Return the folder of the public data.

    Raises
    ------
    RecordError
        There is no such folder.
    """
    folder = Path(os.environ.get("OPCUA_DETECTOR_DATA") or PROJECT.parent / "shared" / "data")
    if not folder.is_dir():
        raise RecordError("no public data here", where=str(folder),
                          next_step="set OPCUA_DETECTOR_DATA to the folder with skab_valve1, tep and asd")
    return folder


def public_cases(data_set: str) -> Iterator[Case]:
    """Yield the cases of "skab", "tep" or "asd".

    Raises
    ------
    RecordError
        The data set is unknown, or its file is missing.
    """
    if data_set not in SETS:
        raise RecordError(f"no data set {data_set!r}", next_step=f"one of {', '.join(SETS)}")
    return {"skab": skab_cases, "tep": tep_cases, "asd": asd_cases}[data_set]()


def skab_cases() -> Iterator[Case]:
    """Yield the 16 runs of valve 1; healthy are the first min(400, first anomaly) rows of each run."""
    head, rows = _table("skab_valve1/skab_valve1.csv.gz")
    tags = tuple(head[2:-2])
    for k in range(SKAB_RUNS):
        run = [row for row in rows if row[0] == f"valve1/{k}"]
        values = np.array([row[2:-2] for row in run], np.float64)
        truth = np.array([row[-2] for row in run], np.float64).astype(np.uint8)
        times = np.array([datetime.fromisoformat(row[1]).replace(tzinfo=UTC).timestamp() for row in run])
        stop = min(SKAB_HEALTHY_ROWS, int(np.argmax(truth)) if truth.any() else len(truth))
        yield Case(
            f"valve1/{k}", "skab", "design" if k in SKAB_DESIGN else "report", tags, 1.0, values[:stop],
            int(FIT_SHARE * stop), _gap(stop), values[stop:], _gap(len(truth) - stop, continues=True), truth[stop:],
            SMOOTHING["skab"], VUS_WINDOW["skab"], times[:stop], times[stop:])


def tep_cases() -> Iterator[Case]:
    """Yield the healthy test run and 13 faults: fit d00, calibrate d00_te[:480], false alarms on d00_te[480:]."""
    head, rows = _table("tep/tep.csv.gz")
    tags = tuple(head[2:-1])
    names = np.array([row[0] for row in rows])
    values = np.array([row[2:-1] for row in rows], np.float64)
    fault = np.array([row[-1] for row in rows], np.float64)
    fitted, second = values[names == "d00"], values[names == "d00_te"]
    healthy = np.concatenate([fitted, second[:TEP_CALIBRATION_ROWS]])
    gap = _gap(len(healthy))
    gap[len(fitted)] = 1
    rest = second[TEP_CALIBRATION_ROWS:]

    def case(name: str, half: Half, test: Float64, truth: UInt8, test_gap: UInt8) -> Case:
        return Case(name, "tep", half, tags, 180.0, healthy, len(fitted), gap, test, test_gap, truth,
                    SMOOTHING["tep"], VUS_WINDOW["tep"])

    yield case("d00_te", "both", rest, np.zeros(len(rest), np.uint8), _gap(len(rest), continues=True))
    for number in TEP_FAULTS:
        here = names == f"d{number:02d}_te"
        yield case(f"d{number:02d}_te", "design" if number in TEP_DESIGN else "report", values[here],
                   (fault[here] != 0).astype(np.uint8), _gap(int(here.sum())))


def asd_cases() -> Iterator[Case]:
    """Yield the six servers with the root causes of their events."""
    for k in range(1, ASD_MACHINES + 1):
        file, told = _file(f"asd/omi-{k}.npz"), _file(f"asd/omi-{k}.interpretation.txt")
        with np.load(file) as arrays:
            healthy, test = arrays["train"].astype(np.float64), arrays["test"].astype(np.float64)
            truth = arrays["label"].astype(np.uint8)
        causes = []
        for line in told.read_text(encoding="utf-8").split():
            rows, sensors = line.split(":")
            first, last = (int(one) for one in rows.split("-"))
            causes.append(RootCause(first, last + 1, tuple(int(one) - 1 for one in sensors.split(","))))
        yield Case(
            f"omi-{k}", "asd", "design" if k in ASD_DESIGN else "report",
            tuple(f"sensor {i + 1}" for i in range(healthy.shape[1])), 300.0, healthy, int(FIT_SHARE * len(healthy)),
            _gap(len(healthy)), test, _gap(len(test), continues=True), truth, SMOOTHING["asd"], VUS_WINDOW["asd"],
            causes=tuple(causes))


def simulated_cases(
    process: str, *, noise: float = 0.0, seeds: int | None = None, block_rows: int | None = None,
) -> Iterator[Case]:
    """Yield the paper's blocks of a simulated plant, one case per seed; the first block is the healthy one.

    The blocks are one stream, as in the paper: a window that spans a border belongs to the block of its last row.

    Parameters
    ----------
    process : "lorenz" or "throttle"
    noise : float >= 0; standard deviation of white noise, as a share of each tag's own
    seeds : int or None; None takes 5 (lorenz) or 3 (throttle)
    block_rows : int or None; None takes the published 20001 or 180001
    """
    for seed in range(SIMULATED_SEEDS[process] if seeds is None else seeds):
        run = run_schedule(process, seed=seed, block_rows=block_rows, noise=noise)
        length = int((run.block == 0).sum())
        yield Case(
            f"{process} seed {seed}" + (f" noise {noise:.0%}" if noise else ""), process, "both",
            ("x1", "x3") if process == "lorenz" else ("theta", "u"), SIMULATED_PERIOD_S[process],
            run.measured[:length], int(FIT_SHARE * length), _gap(length), run.measured[length:],
            _gap(len(run.labels) - length, continues=True), run.labels[length:], SIMULATED_WINDOW, SIMULATED_WINDOW,
            block=run.block[length:])


def _file(name: str) -> Path:
    file = data_folder() / name
    if not file.is_file():
        raise RecordError("file is missing", where=str(file),
                          next_step="set OPCUA_DETECTOR_DATA to the folder with skab_valve1, tep and asd")
    return file


def _table(name: str) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a gzipped CSV file."""
    with gzip.open(_file(name), "rt", encoding="utf-8", newline="") as text:
        head, *rows = csv.reader(text)
    return head, rows


def _gap(n: int, *, continues: bool = False) -> UInt8:
    """Return uint8[n]: 1 on the first row, unless it continues what came before."""
    gap = np.zeros(n, np.uint8)
    gap[:1] = not continues
    return gap
