"""Manners of all commands: results on stdout, progress and errors on stderr, `--json` as one object at the end."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .. import config as configuration
from ..config import ServerConfig
from ..errors import ConfigError, DetectorError

EXIT_FOUND = 9
EXIT_INTERRUPTED = 130

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

UNFOLDED = 100_000  # columns: what goes into a file or a pipe is never folded

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration file (YAML); samples: configs/.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
MonitorName = Annotated[list[str] | None, typer.Option("--monitor", metavar="NAME",
                                                       help="Only this monitor; repeatable.")]


def chosen_server(config_file: Path | str, name: str) -> ServerConfig:
    """Return the server that `--server` names, the first one where it names none.

    Raises
    ------
    ConfigError
        There is none of this name.
    """
    config = configuration.load(config_file)
    names = [one.name for one in config.servers]
    if name and name not in names:
        raise ConfigError("there is no server of this name", key="--server", value=name,
                          expected=f"one of {', '.join(names)}", next_step="correct the option")
    return config.server(name or names[0])


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


def fail(error: DetectorError, *, as_json: bool = False, tell: bool = True) -> int:
    """Print an error (what, where, next step) and return its exit code; `tell` False: as JSON only."""
    if tell:
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
        number = bool(kept) and all(isinstance(row[i], int | float) or getattr(row[i], "justify", "") == "right"
                                    for row in kept)
        made.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in kept:
        made.add_row(*[value if isinstance(value, Text) else cell(value) for value in row])
    return made


def cell(value: Any) -> str:
    """Return a value as a person reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def clock(source_ns: int) -> str:
    """Return a SourceTimestamp as ISO 8601 text, UTC, with milliseconds."""
    return datetime.fromtimestamp(source_ns / 1e9, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def interval_ns(text: str, *, key: str) -> tuple[int, int]:
    """Return (from, to) of an ISO 8601 interval FROM/TO in ns; a time without offset is UTC.

    Raises
    ------
    ConfigError
        It is none; `key` is the option that it was given for.
    """
    try:
        start, end = (datetime.fromisoformat(part.strip()) for part in text.split("/"))
        stamps = [round(t.replace(tzinfo=t.tzinfo or UTC).timestamp() * 1e6) * 1000 for t in (start, end)]
        if stamps[0] >= stamps[1]:
            raise ValueError("it ends before it begins")
    except ValueError as error:
        raise ConfigError("wrong value", key=key, value=text,
                          expected="FROM/TO such as 2026-03-01T06:00:00Z/2026-03-01T07:30:00Z",
                          next_step=f"correct the option ({error})") from None
    return stamps[0], stamps[1]


class Lines(logging.Handler):
    """Prints log records as plain lines on stderr, above whatever is live there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        try:
            moment = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
            style = "red" if record.levelno >= logging.ERROR else "yellow"
            err.print(f"{moment} {self.format(record)}", style=style, markup=False)
        except Exception:
            self.handleError(record)


def log_lines() -> None:
    """Let changes of state that the product logs appear on stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[Lines()])


def show(content: Any) -> None:
    """Print a table on stdout; only a terminal folds its columns."""
    (out if out.is_terminal else Console(file=out.file, width=UNFOLDED, highlight=False)).print(content)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[float, float], None]]:
    """Show a bar on stderr where that is a terminal; yields update(done, total)."""
    if not err.is_terminal:
        yield lambda done, total: None
        return
    with Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
                  TimeElapsedColumn(), console=err) as bar:
        task = bar.add_task(what, total=1)
        yield lambda done, total: bar.update(task, completed=done, total=max(total, 1))
