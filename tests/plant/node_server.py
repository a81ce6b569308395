"""The second vendor: a node-opcua server in a process of its own, worked over its stdin, one JSON object per line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import which
from typing import IO, Any

FOLDER = Path(__file__).resolve().parent / "node_opcua"
RESULTS_NODESET = Path(__file__).resolve().parents[2] / "sim_server" / "results.NodeSet2.xml"
START_TIMEOUT_S = 90.0
ANSWER_TIMEOUT_S = 30.0


class NodeServer:
    """A node-opcua server as a child process.

    Parameters
    ----------
    settings : as in the head of `node_opcua/server.js`; `port` 0 takes a free one, kept by `restart`

    Attributes
    ----------
    ready : the whole ready line
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        if which("node") is None or not (FOLDER / "node_modules" / "node-opcua").is_dir():
            raise RuntimeError("the node-opcua server needs Node.js 18 or newer and its packages: run make test-plant")
        self.settings = dict(settings)
        self.ready: Mapping[str, Any] = {}
        self._child: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the object
        self._lock = threading.Lock()
        self._start()

    @property
    def port(self) -> int:
        """TCP port."""
        return int(self.settings["port"])

    @property
    def endpoint(self) -> str:
        """URL to connect to."""
        return f"opc.tcp://127.0.0.1:{self.port}/"

    @property
    def log(self) -> str:
        """What the server has written to stderr so far."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def do(self, what: str, **how: Any) -> dict[str, Any]:
        """Give a command and return its answer; RuntimeError with the server's words when it failed."""
        child = self._child
        assert child is not None and child.stdin is not None and child.stdout is not None
        with self._lock:
            with suppress(BrokenPipeError):  # it has ended; its words are told below
                child.stdin.write(json.dumps({"do": what, **how}).encode() + b"\n")
                child.stdin.flush()
            found = json.loads(self._line(child, ANSWER_TIMEOUT_S) or '{"ok": false, "error": "no answer"}')
        if not found.pop("ok"):
            raise RuntimeError(f"node-opcua server, {what}: {found.get('error')}\n{self.log[-2000:]}")
        return dict(found)

    def kill(self) -> None:
        """End the server at once (SIGKILL)."""
        if self._child is not None:
            self._child.kill()
            self._reap()

    def pause(self) -> None:
        """Freeze the server (SIGSTOP)."""
        assert self._child is not None
        os.kill(self._child.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen server go on."""
        assert self._child is not None
        os.kill(self._child.pid, signal.SIGCONT)

    def restart(self, **changes: Any) -> None:
        """Kill the server and start it again on the same port, with some settings changed."""
        self.kill()
        self.settings |= changes
        self._start()

    def close(self) -> None:
        """Stop the server and forget its log."""
        if self._child is not None:
            with suppress(ProcessLookupError):  # it may have ended by itself
                self.resume()
            self.kill()
        self._log.close()

    def _start(self) -> None:
        self._child = child = subprocess.Popen(
            ["node", "--no-warnings", str(FOLDER / "server.js"), json.dumps(self.settings)], cwd=FOLDER,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
        line = self._line(child, START_TIMEOUT_S)
        if not line:
            self.kill()
            raise RuntimeError(f"the node-opcua server did not start:\n{self.log[-4000:]}")
        self.ready = json.loads(line)
        self.settings["port"] = self.ready["port"]

    @staticmethod
    def _line(child: subprocess.Popen[bytes], timeout_s: float) -> bytes:
        """Read one line; a child that says nothing in time is killed, which ends the read."""
        assert child.stdout is not None
        watchdog = threading.Timer(timeout_s, child.kill)
        watchdog.start()
        try:
            return child.stdout.readline()
        finally:
            watchdog.cancel()

    def _reap(self) -> None:
        child, self._child = self._child, None
        assert child is not None
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


@contextmanager
def node_server(**settings: Any) -> Iterator[NodeServer]:
    """Run a node-opcua server for the length of a ``with`` block; settings as in `NodeServer`."""
    with tempfile.TemporaryDirectory(prefix="opcua-detector-node-") as scratch:
        given = {"port": 0, "process": "lorenz", "columns": [], "scratch": scratch,
                 "nodesets": [str(RESULTS_NODESET)], **settings}
        server = NodeServer(given)
        try:
            yield server
        finally:
            server.close()
