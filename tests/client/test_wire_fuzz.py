"""The fuzzer itself: a short, fixed run finds nothing, and it does find what is broken on purpose."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FUZZER = ROOT / "tests" / "fuzz" / "fuzz_wire.py"


def fuzz(findings: Path, *arguments: str, prepare: str = "") -> subprocess.CompletedProcess[str]:
    """Run the fuzzer in a process of its own, since it limits the memory; `prepare` is run before it."""
    code = f"import sys, runpy\n{prepare}\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(FUZZER), "--findings", str(findings), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_some_thousand_hostile_inputs_find_nothing(tmp_path: Path) -> None:
    done = fuzz(tmp_path, "--rounds", "5000", "--seed", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5000 inputs" in done.stdout and "nothing found" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_decoder_that_lets_another_error_out_is_found_and_can_be_replayed(tmp_path: Path) -> None:
    broken = (
        "import opcua_detector.client.wire as wire\n"
        "def write_results(body):\n"
        "    raw = bytes(body)\n"
        "    return list(raw[raw[40]:raw[40] + 1]) if raw[24:28] == bytes(4) else []\n"
        "wire.write_results = write_results"
    )
    done = fuzz(tmp_path, "--rounds", "5000", prepare=broken)
    assert done.returncode == 1 and "FOUND" in done.stdout and "IndexError" in done.stdout, done.stdout + done.stderr
    (found,) = [path for path in tmp_path.iterdir() if path.name != "last.bin"]
    assert "IndexError" in fuzz(tmp_path, "--replay", str(found), prepare=broken).stderr
