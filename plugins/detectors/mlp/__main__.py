"""Command line of the plugin: `train` makes an ONNX file out of CSV files of healthy rows."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opcua_detector.api import Record, Tag, TagKind
from opcua_detector.detectors.onnx_model import graph_model
from opcua_detector.errors import ConfigError, DetectorError, RecordError

from . import MlpParams

TIME = "source_ns"
GAP = 1.5  # a step of more than so many periods begins a new stretch


def read_rows(files: Sequence[Path], tags: Sequence[Tag], time: str = TIME) -> Record:
    """Read CSV files with a header line into one record; each file begins after a gap.

    Raises
    ------
    RecordError
        A file or a column is missing, a value is no number, or time does not increase.
    """
    names = [time, *(tag.name for tag in tags)]
    parts = [_columns(file, names) for file in files]
    stamps = [part[0].astype(np.int64) for part in parts]
    steps = [np.diff(stamp) for stamp in stamps]
    for file, step in zip(files, steps, strict=True):
        if len(step) == 0 or (step <= 0).any():
            raise RecordError("timestamps do not increase, or there is only one row", where=f"{file}: {time}",
                              next_step="sort the file by time and remove duplicates")
    period = int(np.median(np.concatenate(steps)))
    gap = [np.concatenate([[1], step > GAP * period]).astype(np.uint8) for step in steps]
    values = np.concatenate([np.stack(part[1:], axis=1) for part in parts])
    record = Record.from_rows(values, tags, period, gap=np.concatenate(gap))
    return dataclasses.replace(record, source_ns=np.concatenate(stamps))


def _columns(file: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Return one array per name; the time as int64, everything else as float64."""
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = csv.reader(lines)
            header = next(rows, [])
            if missing := [name for name in names if name not in header]:
                raise RecordError(f"no column {', '.join(missing)}", where=str(file),
                                  next_step=f"choose out of {', '.join(header)}")
            at = [header.index(name) for name in names]
            cells = [[row[i] for i in at] for row in rows]
    except OSError as error:
        raise RecordError("the file cannot be read", where=str(file), next_step=str(error)) from error
    try:
        return [np.array([row[k] for row in cells], dtype=np.int64 if k == 0 else np.float64)
                for k in range(len(names))]
    except ValueError as error:
        raise RecordError("a value is no number", where=str(file), next_step=str(error)) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        judged, inputs = _list(options.tags), _list(options.inputs)
        tags = [Tag(n) for n in judged] + [Tag(n, kind=TagKind.SETPOINT) for n in inputs]
        try:
            params = MlpParams(**{f.name: getattr(options, f.name) for f in dataclasses.fields(MlpParams)})
        except ValueError as error:
            raise ConfigError(str(error), key="plugin mlp") from error
        record = read_rows(options.csv, tags, options.time)
        from .trainer import train

        graph = train(record, params)
        graph_model(graph, str(options.out), {})  # refuses what the runtime would refuse
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_bytes(graph)
    except DetectorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.out}: {len(graph)} bytes, trained on {len(record)} rows of {', '.join(judged)}")
    return 0


def _list(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m opcua_detector.plugins.detectors.mlp", description=__doc__)
    train = parser.add_subparsers(required=True).add_parser("train", help="train on healthy rows, write an ONNX file")
    train.add_argument("--csv", type=Path, nargs="+", required=True, help="CSV files of healthy rows, with a header")
    train.add_argument("--tags", required=True, help="columns to judge, separated by commas")
    train.add_argument("--inputs", default="", help="columns that help to predict but are not judged (setpoints, states)")
    train.add_argument("--time", default=TIME, help="column of the time in ns (default: %(default)s)")
    train.add_argument("--out", type=Path, required=True, help="the ONNX file to write")
    for field in dataclasses.fields(MlpParams):
        default = field.default
        train.add_argument(f"--{field.name}", type=type(default), default=default, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
