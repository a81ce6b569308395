"""A simulated plant in a process of its own, for tests that need a real server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from sim_server.errors import StartError

START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 10.0

_FOLDER: Final = Path(__file__).resolve().parent.parent


class RunningPlant:
    """A simulated plant that runs as a child process.

    Attributes
    ----------
    endpoint
        URL to connect to, ``opc.tcp://127.0.0.1:<port>/``.
    pid
        Process id of the server now running.
    port
        TCP port; `restart` keeps it.
    process
        Name of the simulated process.
    start_ns
        SourceTimestamp of the first live row, ns since the epoch.
    ready
        The whole ready line.

    Notes
    -----
    The child ends when its stdin is closed, so it cannot outlive the test that started it.
    """

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments
        self._child: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the object
        self.ready: Mapping[str, Any] = {}
        self._start(port=0)

    @property
    def endpoint(self) -> str:
        """URL to connect to."""
        return str(self.ready["endpoint"])

    @property
    def port(self) -> int:
        """TCP port."""
        return int(self.endpoint.rsplit(":", 1)[1].rstrip("/"))

    @property
    def pid(self) -> int:
        """Process id of the server now running."""
        return int(self.ready["pid"])

    @property
    def process(self) -> str:
        """Name of the simulated process."""
        return str(self.ready["process"])

    @property
    def start_ns(self) -> int:
        """SourceTimestamp of the first live row, ns since the epoch."""
        return int(self.ready["start_ns"])

    @property
    def running(self) -> bool:
        """Whether the child process is alive."""
        return self._child is not None and self._child.poll() is None

    @property
    def log(self) -> str:
        """What the server has written to stderr so far."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def kill(self) -> None:
        """End the server at once, as a power cut would (SIGKILL)."""
        if self._child is not None:
            self._child.kill()
            self._reap()

    def pause(self) -> None:
        """Freeze the server (SIGSTOP); its connections stay open and silent."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen server go on."""
        os.kill(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        """Kill the server if it runs, and start it again on the same port with the same options."""
        port = self.port
        self.kill()
        self._start(port)

    def stop(self) -> int | None:
        """Ask the server to stop and return its exit code; None if it was not running."""
        if self._child is None:
            return None
        if self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
        return self._reap()

    def close(self) -> None:
        """Stop the server and forget its log."""
        if self.running:
            # a frozen child would not see the signal to stop
            os.kill(self.pid, getattr(signal, "SIGCONT", 0))
        self.stop()
        self._log.close()

    def _reap(self) -> int:
        child, self._child = self._child, None
        assert child is not None
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        return child.wait()

    def _start(self, port: int) -> None:
        environment = dict(os.environ)
        paths = [str(_FOLDER), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        command = [sys.executable, "-m", "sim_server", "run", "--die-with-parent", "--port", str(port)]
        self._child = subprocess.Popen(
            [*command, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )
        line = self._first_line(self._child)
        if not line:
            code = self.stop()
            raise StartError(
                f"the simulated plant did not start (exit code {code})", " ".join(command), self.log.strip()
            )
        self.ready = json.loads(line)

    @staticmethod
    def _first_line(child: subprocess.Popen[bytes]) -> bytes:
        """Read the ready line; a child that says nothing in time is killed, which ends the read."""
        assert child.stdout is not None
        watchdog = threading.Timer(START_TIMEOUT_S, child.kill)
        watchdog.start()
        try:
            return child.stdout.readline()
        finally:
            watchdog.cancel()


@contextmanager
def running_plant(process: str = "lorenz", **options: Any) -> Iterator[RunningPlant]:
    """Run a simulated plant on a free loopback port for the length of a ``with`` block.

    Parameters
    ----------
    process
        ``lorenz`` or ``throttle``.
    options
        Options of ``python -m sim_server run`` with underscores: ``speed=10``, ``history_rows=20000``,
        ``noise=0.01``, ``no_anonymous=True``, ``user=["me:secret"]``, ``nodeset=[path]``.  Keys of the
        config that are no option (``quirks``, ``faults``, ``warmup_rows`` ...) go into ``config``, a
        mapping, which is handed over as a file.

    Raises
    ------
    StartError
        The server did not come up; the text ends with what it said.
    """
    config = options.pop("config", None)
    arguments = ["--process", process]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            arguments += [flag] if value else []
        else:
            for one in value if isinstance(value, list | tuple) else [value]:
                arguments += [flag, str(one)]
    with tempfile.TemporaryDirectory(prefix="opcua-detector-plant-") as folder:
        if isinstance(config, Mapping):
            # JSON is YAML
            config_file = Path(folder) / "plant.yaml"
            config_file.write_text(json.dumps(config), encoding="utf-8")
            config = config_file
        if config is not None:
            arguments += ["--config", str(config)]
        plant = RunningPlant(arguments)
        try:
            yield plant
        finally:
            plant.close()
