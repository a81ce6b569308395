"""The command line `opcua-detector`: one file per group of commands, shared manners in `terminal`.

Exit codes: 0 done; 1 unexpected failure, or feedback refused; 2 configuration or usage; 3 record of rows; 4 model or
plugin; 5 store; 6 server or access; 7 node; 8 simulator; 9 a check, doctor or demonstration found something wrong;
10 the login is refused; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import typer

from .. import __version__
from ..errors import ConfigError, DetectorError
from . import assess, cert, demo, doctor, feedback, offline, online, support
from .terminal import EXIT_INTERRUPTED, err, fail

TRACEBACK = "OPCUA_DETECTOR_TRACEBACK"  # set to 1: an unexpected failure shows where it happened

EXIT_CODES = """\b
Exit codes:
  0    done
  1    unexpected failure, or feedback refused
  2    configuration or usage
  3    record of rows: too short, not increasing in time, nothing to judge
  4    model or plugin
  5    store
  6    server or access
  7    node
  8    simulator
  9    check, doctor or demo found something wrong
  10   the server refuses the user or the password
  130  interrupted

Results go to stdout, progress and errors to stderr.
"""

app = typer.Typer(
    name="opcua-detector", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None, help="Anomaly detection that lives next to the PLC.", epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"opcua-detector {__version__}")
        raise typer.Exit


@app.callback(epilog=EXIT_CODES)
def _top(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True,
                                      help="Print the version and stop.")) -> None:
    """Anomaly detection that lives next to the PLC."""


COMMANDS: tuple[tuple[Callable[..., None], str], ...] = (
    (demo.demo, "Show the whole job on a simulated plant."),
    (online.sim, "Run the simulated plant, a real OPC UA server."),
    (online.browse, "Show the tree of a server, or make a configuration of it."),
    (online.check, "Check config, connections, nodes, types and rights."),
    (doctor.doctor, "Examine servers and measure what they deliver."),
    (online.record, "Record rows into the store, for fit and replay."),
    (offline.fit, "Learn what is normal from a healthy record."),
    (online.run, "Run the monitors: the service itself."),
    (offline.replay, "Run the engine over a recording or a CSV."),
    (assess.evaluate, "Say what the alarms are worth, best against ground truth."),
    (assess.report, "Write what happened as one HTML page with plots."),
    (offline.models, "List the models of a config."),
    (offline.nodeset, "Write the NodeSet2 file with the result nodes."),
    (offline.schema, "Print the JSON Schema of the configuration."),
    (support.backup, "Back up configuration, models and store."),
    (support.restore, "Put a backup back."),
)
for function, words in COMMANDS:
    own: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True} if function is online.sim else {}
    app.command(short_help=words, context_settings=own, add_help_option=function is not online.sim)(function)
app.command("support-bundle", short_help="Collect what support needs, without secrets.")(support.support_bundle)
app.add_typer(feedback.app, name="feedback", short_help="Tell what an alert was; review what was made of it.")
app.add_typer(cert.app, name="cert", short_help="This client's certificate, and which servers it trusts.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every error ends with its text, its next step and its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    try:
        code = app(given, prog_name="opcua-detector", standalone_mode=False)
    except DetectorError as error:
        code = fail(error, as_json=as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except Exception as error:
        code = _other(error, as_json)
    sys.exit(code if isinstance(code, int) else 0)


def _other(error: Exception, as_json: bool) -> int:
    """Tell what is no error of ours: wrong usage, a file that cannot be used, a failure nobody thought of."""
    usage = getattr(error, "format_message", None)
    if usage is not None:
        error.show()  # type: ignore[attr-defined]
        if as_json:
            fail(ConfigError(usage(), next_step="see --help"), as_json=True, tell=False)
        return int(getattr(error, "exit_code", ConfigError.exit_code))
    if os.environ.get(TRACEBACK):
        err.print(traceback.format_exc(), markup=False)
    if isinstance(error, OSError) and error.filename:
        return fail(DetectorError(error.strerror or type(error).__name__, where=str(error.filename),
                                  next_step="check path, rights and free space"), as_json=as_json)
    return fail(DetectorError(f"unexpected failure: {type(error).__name__}: {error}",
                              next_step=f"set {TRACEBACK}=1, run it again and report what it prints"), as_json=as_json)
