"""Writes rows of the plant as CSV, for use without a server."""

from __future__ import annotations

import csv
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TextIO

from sim_server.faults import FaultScript
from sim_server.plant import Plant

_CHUNK_ROWS: Final = 50_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def iso_time(ns: int) -> str:
    """Return ns since the epoch as ISO 8601 UTC text with nine decimals."""
    seconds, rest = divmod(ns, 1_000_000_000)
    return f"{_EPOCH + timedelta(seconds=seconds):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def write_csv(
    out: TextIO, plant: Plant, n_rows: int, start_ns: int, script: FaultScript | None = None
) -> None:
    """Write ``n_rows`` rows: time, source_ns, one column a tag, ground_truth.

    Parameters
    ----------
    out
        Opened with ``newline=""``.
    plant
        Continues from where it stands.
    n_rows
        Number of rows.
    start_ns
        Stamp of the first row, ns since the epoch.
    script
        Its time 0 is the first row.

    Notes
    -----
    Numbers are written with the digits that restore the same float64.
    """
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["time", "source_ns", *(tag.name for tag in plant.tags), "ground_truth"])
    whole = {i for i, tag in enumerate(plant.tags) if tag.kind == "state"}
    for at in range(0, n_rows, _CHUNK_ROWS):
        stop = min(at + _CHUNK_ROWS, n_rows)
        faults = [] if script is None else script.faults_between(at, stop)
        rows = plant.rows(stop - at, faults)
        for k, (values, label) in enumerate(zip(rows.values.tolist(), rows.labels.tolist(), strict=True)):
            ns = start_ns + (at + k) * plant.period_ns
            cells = [int(value) if i in whole else repr(value) for i, value in enumerate(values)]
            writer.writerow([iso_time(ns), ns, *cells, label])


def write_csv_file(
    file: Path, plant: Plant, n_rows: int, start_ns: int, script: FaultScript | None = None
) -> None:
    """Write a CSV file in one step: it is complete or not there; see `write_csv`.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    part = file.with_name(file.name + ".part")
    try:
        with part.open("w", encoding="utf-8", newline="") as out:
            write_csv(out, plant, n_rows, start_ns, script)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
