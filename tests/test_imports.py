"""The import rules of the architecture hold: imports go down only, torch stays out of the runtime."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = ROOT / "opcua_detector"

# Level of each part; a module imports only from lower levels, or from its own part.
LEVELS = {
    "errors": 0, "api": 0, "nodes": 0, "config": 0, "kernels": 0,
    "detectors": 2, "calibration": 2, "columns": 2, "frames": 2, "plugins": 2, "testing": 3,
    "limits": 2, "views": 2, "metrics": 2, "guards": 2,
    "absence": 3, "allowances": 3, "feedback": 4, "evaluation": 5, "report": 6,
    "alarms": 3, "explain": 3, "model": 3, "suspicious": 3, "engine": 4, "reasons": 4, "fitting": 4,
    "parts": 4,
    "client": 5, "store": 5, "registry": 5, "csv_rows": 5,
    "app": 6, "service": 6, "telemetry": 6, "support": 6,
    "detector": 7, "samples": 0, "__version__": 0,
    "feedback.desk": 6, "feedback.live": 6, "feedback.hmi": 6,  # what in a service answers feedback
    "cli": 7, "__main__": 8,
    "__init__": 8,  # the front door: it imports the detector only when that is asked for (see the tests below)
}
SIDE_BY_SIDE = {"client", "store", "registry", "csv_rows"}  # never each other
ALONE = {"kernels"}  # import nothing of ours
CONTRACT = {"errors", "api", "nodes", "config"}


def sources(folder: Path) -> list[Path]:
    """Return all modules below a folder."""
    return sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


def imported(path: Path) -> set[str]:
    """Return absolute names of all modules that a file imports, at any depth of its code."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{stem}.{alias.name}" for alias in node.names} if not node.module else {stem}
    return names


def part_of(path: Path) -> str:
    """Return the part of the architecture a runtime file belongs to."""
    return level_key(".".join(path.relative_to(RUNTIME).with_suffix("").parts))


def level_key(dotted: str) -> str:
    """Return the key in `LEVELS` of a module below the package: a room of its own, or its part."""
    room = ".".join(dotted.split(".")[:2])
    return room if room in LEVELS else dotted.split(".")[0]


@pytest.mark.parametrize("path", sources(RUNTIME), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    part = part_of(path)
    assert part in LEVELS, f"{part} has no place in the architecture: give it a level here and in the README"
    for name in imported(path):
        if not name.startswith("opcua_detector."):
            continue
        other = level_key(name.removeprefix("opcua_detector."))
        if other == part:
            continue
        assert part not in ALONE, f"{path}: kernels import nothing of ours, found {name}"
        if part in SIDE_BY_SIDE:
            assert other not in SIDE_BY_SIDE, f"{path}: {part} and {other} never import each other"
        if part in CONTRACT:
            assert other in CONTRACT, f"{path}: {part} imports nothing of ours but its like, found {name}"
        elif other != "__init__":
            assert LEVELS.get(other, 99) <= LEVELS[part], f"{path}: {part} must not import {other}"


@pytest.mark.parametrize(("library", "homes"), [
    ("asyncua", ("client", "server")), ("pydantic", ("config",)), ("sqlite_utils", ("store",)),
    ("onnxruntime", ("detectors",)), ("typer", ("cli",)), ("torch", ()), ("prometheus_client", ("telemetry",)),
])
def test_each_library_has_its_room(library: str, homes: tuple[str, ...]) -> None:
    for path in sources(RUNTIME):
        if any(name == library or name.startswith(library + ".") for name in imported(path)):
            assert part_of(path) in homes, f"{path} imports {library}, which belongs to {homes or 'no runtime part'}"


@pytest.mark.parametrize("path", sources(ROOT / "plugins"), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_plugin_uses_only_what_a_stranger_may_use(path: Path) -> None:
    allowed = {"api", "errors", "kernels", "detectors", "csv_rows", "frames", "testing", "plugins"}
    for name in imported(path):
        if name.startswith("opcua_detector."):
            assert name.split(".")[1] in allowed, f"{path} imports {name}"


def test_simulator_and_product_share_no_code() -> None:
    for path in sources(RUNTIME) + sources(ROOT / "plugins"):
        assert not any(name.split(".")[0] == "sim_server" for name in imported(path)), path
    for path in sources(ROOT / "sim_server"):
        assert not any(name.split(".")[0] == "opcua_detector" for name in imported(path)), path


def test_runtime_never_imports_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, opcua_detector\n"
        "for m in pkgutil.walk_packages(opcua_detector.__path__, 'opcua_detector.'):\n"
        "    if not m.name.endswith(('__main__', 'trainer')): importlib.import_module(m.name)\n"
        "print(sorted(n for n in ('torch', 'onnx', 'sklearn', 'matplotlib', 'jinja2') if n in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_of_the_package_is_light() -> None:
    heavy = "('numba', 'asyncua', 'onnxruntime', 'torch')"
    code = f"import sys, opcua_detector; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_folder_of_code_is_shipped() -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {p.parent for root in ("opcua_detector", "sim_server") for p in sources(ROOT / root)}
    assert {".".join(p.relative_to(ROOT).parts) for p in folders} <= set(shipped)
