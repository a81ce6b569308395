"""Starts the simulated plant as a process of its own; product and plant share only the wire."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import SimulatorError

START_TIMEOUT_S = 90.0


@contextmanager
def simulated_plant(arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Run `python -m sim_server run` with these options; yield its ready line, and stop it at the end.

    Raises
    ------
    SimulatorError
        It did not come up; the text says what it printed.
    """
    command = [sys.executable, "-m", "sim_server", "run", "--die-with-parent", *arguments]
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        try:
            yield _ready(child, log)
        finally:
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()


def _ready(child: subprocess.Popen[bytes], log: Any) -> dict[str, Any]:
    assert child.stdout is not None
    watchdog = threading.Timer(START_TIMEOUT_S, child.kill)
    watchdog.start()
    try:
        line = child.stdout.readline()
    finally:
        watchdog.cancel()
    if not line:
        code = child.wait()
        log.seek(0)
        said = log.read().decode(errors="replace").strip()
        raise SimulatorError(f"the simulated plant did not start (exit code {code}): {said}",
                             next_step="correct the option it names, or choose another port with --port")
    ready: dict[str, Any] = json.loads(line)
    return ready
