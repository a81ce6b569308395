"""The tags beside the measured ones are what they claim, and the CSV holds exactly the rows."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from sim_server.cli import main
from sim_server.errors import ProcessError
from sim_server.faults import parse_script
from sim_server.plant import Plant, tag_table
from sim_server.processes import MODELS, make, model
from sim_server.table import iso_time, write_csv

BOTH = sorted(MODELS)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("rollover", [0.0, 3.0])
def test_rows_one_by_one_equal_rows_in_blocks(name: str, rollover: float) -> None:
    stepped, blocks = (Plant(make(name, seed=6, noise=0.01), total_rollover=rollover) for _ in range(2))
    expected = np.array([stepped.step() for _ in range(700)])
    parts = [blocks.rows(n).values for n in (1, 250, 0, 449)]
    assert (np.concatenate(parts) == expected).all()


@pytest.mark.parametrize("name", BOTH)
def test_extra_tags_are_what_they_claim(name: str) -> None:
    plant = Plant(make(name, seed=6))
    values = plant.rows(5000).values
    column = {tag.name: values[:, i] for i, tag in enumerate(plant.tags)}
    kinds = [tag.kind for tag in plant.tags]
    assert kinds == ["measured", "measured", "setpoint", "counter", "clock", "constant", "duplicate", "state"]
    first = model(name).measured[0].name
    assert (np.diff(column["total"]) >= 0).all()
    assert column["total"][-1] == pytest.approx(np.abs(column[first]).sum() * plant.period_ns * 1e-9)
    assert np.allclose(np.diff(column["clock"]), plant.period_ns * 1e-9)
    assert np.ptp(column["constant"]) == 0
    assert (column["duplicate"] == column[first]).all()
    assert (column["state"] == 1).all()
    assert plant.tags[2].name == {"lorenz": "setpoint", "throttle": "r"}[name]


def test_totaliser_rolls_over() -> None:
    total = Plant(make("lorenz", seed=1), total_rollover=5.0).rows(3000).values[:, 3]
    assert total.max() < 5.0
    assert np.count_nonzero(np.diff(total) < 0) >= 10
    with pytest.raises(ProcessError):
        Plant(make("lorenz"), total_rollover=-1.0)


def test_active_fault_is_told_in_words() -> None:
    plant = Plant(make("lorenz"))
    assert plant.active_fault == ""
    plant.process.set_factor("sigma", 2 / 3)
    plant.process.set_factor("beta", 1.25)
    assert plant.active_fault == "sigma x 0.6667, beta x 1.25"


def read(file: Path) -> tuple[list[str], list[list[str]]]:
    with file.open(newline="") as lines:
        rows = list(csv.reader(lines))
    return rows[0], rows[1:]


@pytest.mark.parametrize("name", BOTH)
def test_csv_restores_the_same_bits(name: str, tmp_path: Path) -> None:
    file, script = tmp_path / "rows.csv", tmp_path / "faults.yaml"
    one = model(name).parameters[0].name
    script.write_text(f"- {{parameter: {one}, factor: 1.3, from: 2, to: 4}}\n")
    command = ["csv", "--process", name, "--rows", "600", "--seed", "8", "--noise", "0.01"]
    assert main([*command, "--script", str(script), "--out", str(file)]) == 0
    header, rows = read(file)
    assert header == ["time", "source_ns", *(tag.name for tag in tag_table(model(name))), "ground_truth"]
    parsed = parse_script([{"parameter": one, "factor": 1.3, "from": 2, "to": 4}], model(name))
    expected = Plant(make(name, seed=8, noise=0.01)).rows(600, parsed.faults(600))
    assert (np.array([row[2:-1] for row in rows], dtype=float) == expected.values).all()
    assert [int(row[-1]) for row in rows] == expected.labels.tolist()
    assert 0 < expected.labels.sum() < 600
    source_ns = np.array([int(row[1]) for row in rows])
    assert (np.diff(source_ns) == model(name).period_ns).all()
    for row in rows[:3]:
        whole, _, decimals = row[0].rstrip("Z").partition(".")
        seconds = int(datetime.fromisoformat(whole + "+00:00").timestamp())
        assert seconds * 10**9 + int(decimals) == int(row[1])
    assert not list(tmp_path.glob("*.part"))


def test_csv_of_many_chunks_equals_one(monkeypatch: pytest.MonkeyPatch) -> None:
    script = parse_script([{"parameter": "sigma", "factor": 0.7, "from": 0.9, "to": 2.0}], model("lorenz"))
    texts = []
    for chunk in (50_000, 70, 100):
        monkeypatch.setattr("sim_server.table._CHUNK_ROWS", chunk)
        out = io.StringIO()
        write_csv(out, Plant(make("lorenz", seed=3)), 300, 0, script)
        texts.append(out.getvalue())
    assert texts[0] == texts[1] == texts[2]
    assert texts[0].count(",1\n") == 110


def test_iso_time_keeps_nanoseconds() -> None:
    assert iso_time(1_700_000_000_123_456_789) == "2023-11-14T22:13:20.123456789Z"
    assert iso_time(0) == "1970-01-01T00:00:00.000000000Z"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["csv", "--rows", "0", "--out", "x.csv"], "--rows"),
        (["csv", "--rows", "10", "--out", "gone/x.csv"], "no such folder"),
        (["csv", "--rows", "10", "--out", "x.csv", "--noise", "-1"], "noise"),
        (["csv", "--rows", "10", "--out", "x.csv", "--script", "gone.yaml"], "gone.yaml"),
        (["run", "--config", "gone.yaml"], "gone.yaml"),
        (["run", "--speed", "0"], "speed"),
        (["run", "--user", "me"], "NAME:PASSWORD"),
        (["run", "--nodeset", "gone.xml"], "gone.xml"),
        (["run", "--host", "192.0.2.1"], "192.0.2.1"),
    ],
)
def test_wrong_commands_exit_with_2_and_one_line(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err
    assert captured.err.startswith("error: ")
    assert not list(tmp_path.glob("*.csv*"))


def test_csv_does_not_start_a_server() -> None:
    """CSV works where asyncua cannot even be imported."""
    code = (
        "import sys, json; sys.modules['asyncua'] = None\n"
        "from sim_server.cli import main\n"
        "code = main(['csv', '--rows', '3', '--out', '-'])\n"
        "print(json.dumps({'code': code}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert json.loads(lines[-1]) == {"code": 0}
