"""The command line `opcua-detector`: one file per group of commands, shared manners in `terminal`.

Exit codes: 0 done; 1 unexpected failure; 2 configuration or usage; 3 record of rows; 4 model or plugin;
5 store; 6 server or access; 7 node; 8 simulator; 9 a check or demonstration found something wrong;
130 interrupted.
"""

from __future__ import annotations

import sys

import typer

from .. import __version__
from ..errors import DetectorError
from . import demo, offline, online
from .terminal import EXIT_INTERRUPTED, fail

app = typer.Typer(
    name="opcua-detector", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None, help="Anomaly detection that lives next to the PLC.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"opcua-detector {__version__}")
        raise typer.Exit


@app.callback()
def _top(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True,
                                      help="Print the version and stop.")) -> None:
    """Anomaly detection that lives next to the PLC."""


for part in (demo, online, offline):
    part.register(app)


def main() -> None:
    """Run the command line; every error of ours ends with its text and its exit code."""
    try:
        app()
    except DetectorError as error:
        sys.exit(fail(error, as_json="--json" in sys.argv))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
