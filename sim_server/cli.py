"""Command line of the simulated plant: ``run`` serves it, ``csv`` writes it to a file."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from sim_server.config import SimConfig, build_script, load_config, parse_config
from sim_server.errors import ConfigError, SimError, StartError
from sim_server.faults import FaultScript, load_script
from sim_server.processes import CYCLIC, MODELS, SCHEDULES, make, model

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_REFUSED: Final = 2
"""Wrong arguments, wrong config, or a server that cannot start."""

_COMMANDS: Final = ("run", "csv")

_logger = logging.getLogger("sim_server")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed while running, 2 refused."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0] not in _COMMANDS and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "run")
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if options.verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    # one line for each refused write or closed connection is traffic, not trouble
    logging.getLogger("asyncua").setLevel(logging.CRITICAL)
    try:
        return _csv(options) if options.command == "csv" else asyncio.run(_run(_settings(options), options))
    except SimError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return EXIT_REFUSED


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--process", choices=sorted({**MODELS, **CYCLIC}), help="process to simulate (default: lorenz)")
    common.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML settings; options below override them"
    )
    common.add_argument("--seed", type=int, metavar="N", help="seed of every random choice (default: 0)")
    common.add_argument(
        "--noise", type=float, metavar="F", help="noise, fraction of the healthy std (default: 0)"
    )
    common.add_argument("--script", type=Path, metavar="FILE", help="YAML fault script")
    common.add_argument("--verbose", action="store_true", help="log changes of state to stderr")
    parser = argparse.ArgumentParser(prog="python -m sim_server", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", parents=[common], help="serve the plant over OPC UA (default)")
    run.add_argument("--host", help="address to bind (default: 127.0.0.1)")
    run.add_argument("--port", type=int, metavar="N", help="TCP port, 0 takes a free one (default: 0)")
    run.add_argument("--speed", type=float, metavar="X", help="simulated seconds per second (default: 1)")
    run.add_argument("--history-rows", type=int, metavar="N", help="healthy rows of history (default: 40000)")
    run.add_argument(
        "--nodeset", type=Path, metavar="FILE", action="append", help="NodeSet2 file, repeatable"
    )
    run.add_argument("--pki", type=Path, metavar="DIR", help="keeps the certificate (default: a new one)")
    run.add_argument("--user", metavar="NAME:PASSWORD", action="append", help="named account, repeatable")
    run.add_argument("--no-anonymous", action="store_true", help="refuse sessions without a user")
    run.add_argument("--duration", type=float, metavar="S", help="stop after so many seconds")
    run.add_argument("--die-with-parent", action="store_true", help="stop when stdin is closed")
    table = commands.add_parser("csv", parents=[common], help="write rows to a CSV file")
    table.add_argument("--rows", type=int, required=True, metavar="N", help="rows to write")
    table.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write, - for stdout")
    table.add_argument(
        "--start-ns",
        type=int,
        default=1_767_225_600_000_000_000,
        metavar="NS",
        help="stamp of the first row, ns since the epoch (default: 2026-01-01T00:00:00Z)",
    )
    return parser


def _settings(options: argparse.Namespace) -> SimConfig:
    """Merge file and options; an option wins over the file.

    Raises
    ------
    ConfigError
        A file or an option is wrong.
    """
    changes: dict[str, Any] = {}
    for name, key in (
        ("process", "process"),
        ("seed", "seed"),
        ("noise", "noise"),
        ("host", "host"),
        ("port", "port"),
        ("speed", "speed"),
        ("history_rows", "history_rows"),
        ("pki", "pki_dir"),
    ):
        if getattr(options, name, None) is not None:
            changes[key] = getattr(options, name)
    if getattr(options, "nodeset", None):
        changes["nodesets"] = list(options.nodeset)
    if getattr(options, "no_anonymous", False):
        changes["anonymous"] = False
    if getattr(options, "user", None):
        changes["users"] = [_user(text) for text in options.user]
    if options.script is not None:
        changes["faults"] = []
    if options.config is not None:
        config = load_config(options.config, changes)
    else:
        config = parse_config(changes, "command line")
    if options.script is not None:
        script = load_script(options.script, model(config.process))
        config = config.model_copy(update={"faults": script.entries})
    return config


def _user(text: str) -> dict[str, str]:
    name, colon, password = text.partition(":")
    if not (name and colon and password):
        raise ConfigError("command line", "--user", f"{name}:...", "NAME:PASSWORD, both not empty")
    return {"name": name, "password": password}


async def _run(config: SimConfig, options: argparse.Namespace) -> int:
    # imported here: csv needs no server and starts without one
    from sim_server.nodes import PLANT_URI, RESULTS_URI
    from sim_server.server import PlantServer

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, stop.set)
        except NotImplementedError:  # Windows: no handlers on the event loop
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    if options.die_with_parent:
        _watch_stdin(loop, stop)
    server = PlantServer(config)
    starting = asyncio.create_task(server.start())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return EXIT_OK
        starting.result()
        ready = {
            "ready": True,
            "endpoint": server.endpoint,
            "process": config.process,
            "pid": os.getpid(),
            "namespace": PLANT_URI,
            "results_namespace": RESULTS_URI,
            "start_ns": server.start_ns,
            "period_ns": server.plant.period_ns,
            "history_rows": config.history_rows,
            "faults": _paper_faults(config.process),
        }
        print(json.dumps(ready), flush=True)
        living = asyncio.create_task(server.run())
        await asyncio.wait({living, stopped}, timeout=options.duration, return_when=asyncio.FIRST_COMPLETED)
        failed = living.done()
        living.cancel()
        (outcome,) = await asyncio.gather(living, return_exceptions=True)
        if failed:
            _logger.critical("the live loop failed: %r", outcome, exc_info=outcome)
        return EXIT_FAILED if failed else EXIT_OK
    finally:
        stopped.cancel()
        await server.stop()


def _paper_faults(name: str) -> dict[str, dict[str, Any]]:
    """Return the faults of the paper's schedule: parameter -> its factor and the tags it touches; none elsewhere."""
    if name not in SCHEDULES:
        return {}
    touches = {one.name: list(one.touches) for one in model(name).parameters}
    return {
        parameter: {"factor": factor, "touches": touches[parameter]}
        for _, parameter, factor in SCHEDULES[name].blocks
        if parameter
    }


def _watch_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Stop when stdin reaches its end, which is what happens when the parent is gone."""

    def wait() -> None:
        # not through sys.stdin: its lock, held by a waiting thread, aborts the interpreter at exit
        while os.read(0, 4096):
            pass
        loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait, name="stdin", daemon=True).start()


def _csv(options: argparse.Namespace) -> int:
    from sim_server.plant import Plant
    from sim_server.table import write_csv, write_csv_file

    if options.rows < 1:
        raise ConfigError("command line", "--rows", options.rows, "a number >= 1")
    config = _settings(options)
    process = make(config.process, seed=config.seed, noise=config.noise)
    plant = Plant(process, total_rollover=config.total_rollover)
    script: FaultScript = build_script(config)
    began = time.monotonic()
    if str(options.out) == "-":
        write_csv(sys.stdout, plant, options.rows, options.start_ns, script)
        return EXIT_OK
    if not options.out.parent.is_dir():
        raise StartError("no such folder", str(options.out.parent), "Create it, or choose another --out.")
    write_csv_file(options.out, plant, options.rows, options.start_ns, script)
    _logger.info("%s: %d rows in %.1f s", options.out, options.rows, time.monotonic() - began)
    return EXIT_OK
