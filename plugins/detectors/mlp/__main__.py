"""Command line of the plugin: `train` makes an ONNX file out of CSV files of healthy rows."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opcua_detector.api import Record, Tag, TagKind
from opcua_detector.csv_rows import read_csv
from opcua_detector.detectors.onnx_model import graph_model
from opcua_detector.errors import ConfigError, DetectorError, RecordError

from . import MlpParams

GAP = 1.5  # a step of more than so many periods begins a new stretch


def read_rows(files: Sequence[Path], tags: Sequence[Tag], time: str | None = None) -> Record:
    """Read CSV files into one record; a gap begins with each file and wherever rows are missing.

    Raises
    ------
    RecordError
        A file or a column is missing, a value is no number, time does not increase, or there is only one row.
    """
    parts = [read_csv(file, [tag.name for tag in tags], time) for file in files]
    steps = [np.diff(part[0]) for part in parts]
    for file, step in zip(files, steps, strict=True):
        if len(step) == 0:
            raise RecordError("there is only one row", where=str(file), next_step="export a longer time")
    period = int(np.median(np.concatenate(steps)))
    gap = np.concatenate([np.concatenate([[1], step > GAP * period]) for step in steps]).astype(np.uint8)
    record = Record.from_rows(np.concatenate([part[1] for part in parts]), tags, period, gap=gap)
    return dataclasses.replace(record, source_ns=np.concatenate([part[0] for part in parts]))


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

        graph = train(record, params, ", ".join(file.name for file in options.csv))
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
    train.add_argument("--inputs", default="", 
                       help="columns that help to predict but are not judged (setpoints, states)")
    train.add_argument("--time", help="column of the time (default: the first with a usual name)")
    train.add_argument("--out", type=Path, required=True, help="the ONNX file to write")
    for field in dataclasses.fields(MlpParams):
        default = field.default
        train.add_argument(f"--{field.name}", type=type(default), default=default, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
