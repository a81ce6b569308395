"""Manners of all commands: results on stdout, progress and errors on stderr, `--json` as one object at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..errors import DetectorError

EXIT_FOUND = 9
EXIT_INTERRUPTED = 130

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

ConfigFile = Annotated[Path, typer.Argument(help="Configuration file (YAML); samples are in configs/.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
MonitorName = Annotated[list[str] | None, typer.Option("--monitor", help="Only this monitor; repeatable.")]


def plain(value: Any) -> Any:
    """Return a JSON-able copy: NaN and infinity become null, paths text, tuples lists."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return value
    if hasattr(value, "item"):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Iterable):
        return [plain(v) for v in value]
    return str(value)


def print_json(content: Mapping[str, Any]) -> None:
    """Print one JSON object on one line of stdout."""
    print(json.dumps(plain(content), ensure_ascii=False), flush=True)


def fail(error: DetectorError, *, as_json: bool = False) -> int:
    """Print an error (what, where, next step) and return its exit code."""
    err.print(f"error: {error}", style="red", markup=False)
    if as_json:
        print_json({"error": {"kind": type(error).__name__, "what": error.what, "where": error.where,
                              "next_step": error.next_step, "exit_code": error.exit_code}})
    return error.exit_code


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """Return a table; numbers stand right."""
    made = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    kept = [list(row) for row in rows]
    for i, name in enumerate(columns):
        number = bool(kept) and all(isinstance(row[i], int | float) for row in kept)
        made.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in kept:
        made.add_row(*[cell(value) for value in row])
    return made


def cell(value: Any) -> str:
    """Return a value as a person reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def clock(source_ns: int) -> str:
    """Return a SourceTimestamp as UTC text with milliseconds."""
    return datetime.fromtimestamp(source_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + "Z"


@contextmanager
def progress_bar(what: str):  # type: ignore[no-untyped-def]
    """Show a bar on stderr; yields update(done, total)."""
    with Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
                  TimeElapsedColumn(), console=err, transient=not err.is_terminal) as bar:
        task = bar.add_task(what, total=1)
        yield lambda done, total: bar.update(task, completed=done, total=max(total, 1))
