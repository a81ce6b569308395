"""Every command of the README runs as it is written there, in its order, from a folder with the sample configs.

Taken are the fenced `bash` blocks; `<!-- not run: reason -->` in the line above a block leaves it out. A command
that ends in `&` stays in the background until the end; the next one waits for its first line of output.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from running import wait_for

from opcua_detector.cli import COMMANDS, EXIT_CODES
from opcua_detector.cli.terminal import EXIT_INTERRUPTED
from opcua_detector.errors import DetectorError

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RUNNABLE = ("opcua-detector ", "python -m sim_server ")
PORT = "4840"
COMMAND_TIMEOUT_S = 180
_BLOCK = re.compile(r"^(?P<above>[^\n]*)\n```(?P<language>\w*)\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+?) -->")


def blocks(text: str) -> Iterator[tuple[list[str], str]]:
    """Yield (commands, reason not to run them or empty) of each bash block."""
    for found in _BLOCK.finditer(text):
        if found["language"] != "bash":
            continue
        joined = found["body"].replace("\\\n", " ")
        commands = [line.split(" # ")[0].strip() for line in joined.splitlines()]
        skipped = _NOT_RUN.fullmatch(found["above"].strip())
        yield [c for c in commands if c and not c.startswith("#")], skipped["reason"] if skipped else ""


def to_run() -> list[str]:
    """Return the commands that are run, in order."""
    return [c for commands, reason in blocks(README.read_text(encoding="utf-8")) if not reason for c in commands]


def test_the_extraction_knows_blocks_comments_backgrounds_and_what_is_not_run() -> None:
    text = ("x\n```bash\nopcua-detector check a.yaml  # why\n# a remark\n"
            "python -m sim_server run \\\n  --port 1 &\n```\n"
            "\n<!-- not run: slow -->\n```bash\nopcua-detector demo\n```\n```sh\nmake\n```\n")
    assert list(blocks(text)) == [
        (["opcua-detector check a.yaml", "python -m sim_server run    --port 1 &"], ""),
        (["opcua-detector demo"], "slow")]


def test_bash_blocks_hold_commands_of_the_project_alone_and_most_of_its_commands_are_shown() -> None:
    text = README.read_text(encoding="utf-8")
    every = [command for commands, _ in blocks(text) for command in commands]
    for command in every:
        assert command.startswith(RUNNABLE), f"a bash block of the README holds: {command}"
    shown = {shlex.split(command)[1] for command in every if command.startswith("opcua-detector ")}
    known = {function.__name__ for function, _ in COMMANDS} | {"feedback", "support-bundle"}  # no plain command
    assert shown <= known
    assert known - shown <= {"sim"}


def test_the_readme_states_every_exit_code() -> None:
    text = README.read_text(encoding="utf-8")
    table = re.findall(r"^\| ([\d /]+) \|", text, re.MULTILINE)
    stated = {int(code) for row in table for code in row.split("/")}
    assert stated == {int(code) for code in re.findall(r"^ +(\d+) ", EXIT_CODES, re.MULTILINE)}
    assert {kind.exit_code for kind in kinds_of(DetectorError)} | {0, EXIT_INTERRUPTED} <= stated


def kinds_of(kind: type[DetectorError]) -> set[type[DetectorError]]:
    """Return a kind of error and all below it."""
    return {kind}.union(*(kinds_of(below) for below in kind.__subclasses__()))


def port_to_use() -> str:
    """Return the README's port, or another one where that is taken on this machine."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", int(PORT)))
            return PORT
        except OSError:
            probe.bind(("127.0.0.1", 0))
            return str(probe.getsockname()[1])


@contextmanager
def background(command: str, folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """Run a command beside the others; it is there when its first line is out."""
    log = folder / "background.log"
    with log.open("w") as out:
        child = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=folder, env=environment, stdout=out,
                                 stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            wait_for(lambda: "\n" in log.read_text() or child.poll() is not None, command)
            assert child.poll() is None, f"{command}\n{log.read_text()}"
            yield
            assert child.poll() is None, f"{command} ended by itself\n{log.read_text()}"
        finally:
            if child.poll() is None:
                child.terminate()
            child.wait(30)


@pytest.mark.timeout(900)
@pytest.mark.skipif(os.name == "nt", reason="the blocks are for a POSIX shell")
def test_every_command_of_the_readme_runs_as_written(tmp_path: Path) -> None:
    port = port_to_use()
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    for file in (tmp_path / "configs").glob("*.yaml"):
        file.write_text(file.read_text(encoding="utf-8").replace(f":{PORT}/", f":{port}/"), encoding="utf-8")
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), "COLUMNS": "100"}
    run_all([command.replace(PORT, port) for command in to_run()], tmp_path, environment)
    assert (tmp_path / "configs" / "models" / "lorenz.npz").exists()


def test_the_python_of_the_readme_runs_as_written(tmp_path: Path) -> None:
    found = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found
    subprocess.run([sys.executable, "-m", "sim_server", "csv", "--process", "lorenz", "--rows", "20000", "--seed", "3",
                    "--out", str(tmp_path / "healthy.csv")], check=True, cwd=ROOT, timeout=COMMAND_TIMEOUT_S)
    ran = subprocess.run([sys.executable, "-c", "\n".join(found)], cwd=tmp_path, capture_output=True, text=True,
                         timeout=COMMAND_TIMEOUT_S)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "rows.npz").exists()


def run_all(commands: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run commands in order; each must exit 0."""
    if not commands:
        return
    command, rest = commands[0], commands[1:]
    if command.endswith("&"):
        with background(command.removesuffix("&").strip(), folder, environment):
            run_all(rest, folder, environment)
        return
    ran = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True,
                         timeout=COMMAND_TIMEOUT_S, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, f"{command}\nexit code {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
    assert "Traceback" not in ran.stderr, f"{command}\n{ran.stderr}"
    run_all(rest, folder, environment)
