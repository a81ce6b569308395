"""Each command as a new user would use it: what it prints, what `--json` gives, how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from running import PLANT, RESULTS, cli, content, read, result_nodes, snapshot, tag, wait_for, write

from cli.conftest import HISTORY_ROWS, Fitted
from opcua_detector import __version__
from opcua_detector.api import Record, Tag
from opcua_detector.cli import COMMANDS, offline
from opcua_detector.cli.emit import period_of, proposals
from opcua_detector.cli.online import history_record
from opcua_detector.cli.terminal import interval_ns
from opcua_detector.client import BrowsedNode, Session
from opcua_detector.client.history import read_samples
from opcua_detector.config import ServerConfig, load
from opcua_detector.csv_rows import write_csv
from opcua_detector.nodes import NO_SCORE
from opcua_detector.store import Store
from sim_server.processes import Fault, make
from sim_server.testing import RunningPlant, running_plant

START_NS = 1_767_225_600_000_000_000  # 2026-01-01T00:00:00Z

STATE = {signal: f"{RESULTS}lorenz.{signal}" for signal in ("State", "StateText", "Score")}


@contextmanager
def process(*arguments: object, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A command in a process of its own; it never outlives the block."""
    child = subprocess.Popen([sys.executable, "-m", "opcua_detector", *map(str, arguments)], cwd=cwd, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()


# --- manners of all commands ---


def test_help_names_every_command_and_every_exit_code() -> None:
    ran = cli("--help")
    assert ran.code == 0
    for function, words in COMMANDS:
        assert function.__name__ in ran.out and words in ran.out
    codes = [line.split()[0] for line in ran.out.partition("Exit codes:")[2].splitlines() if line.strip()][:12]
    assert codes == ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "130"]
    assert cli("--version").out.strip() == f"opcua-detector {__version__}"


@pytest.mark.parametrize("name", [function.__name__ for function, _ in COMMANDS])
def test_every_command_has_help(name: str) -> None:
    if name == "sim":  # the help of another program
        ran = subprocess.run([sys.executable, "-m", "opcua_detector", "sim", "--help"], capture_output=True, text=True)
        assert ran.returncode == 0 and "--history-rows" in ran.stdout
        return
    ran = cli(name, "--help")
    assert ran.code == 0 and "--json" in ran.out


def test_every_command_gives_one_json_object_as_last_line_of_stdout(plant: RunningPlant, fitted: Fitted) -> None:
    out = fitted.folder / "results.xml"
    for arguments in (
        ("browse", fitted.file, "--filter", "lorenz"), ("browse", fitted.file, "--filter", "lorenz.x", "--emit-yaml"),
        ("check", fitted.file), ("record", fitted.file, "--seconds", "1", "--name", "short"), ("fit", fitted.file),
        ("run", fitted.file, "--seconds", "1"), ("replay", fitted.file, "--recording", "short"),
        ("models", fitted.file), ("nodeset", fitted.file), ("nodeset", fitted.file, "--out", out), ("schema",),
    ):
        ran = cli(*arguments, "--json")
        assert ran.code == 0, (arguments, ran.err)
        assert isinstance(ran.json, dict) and ran.json, arguments
        assert len(ran.out.splitlines()) == 1, arguments


def test_a_failure_nobody_thought_of_is_told_in_one_line_and_exits_1(
    fitted: Fitted, monkeypatch: pytest.MonkeyPatch,
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise RuntimeError("a wheel came off")

    monkeypatch.setattr(offline, "load_model", breaks)
    ran = cli("models", fitted.file, "--json")
    assert ran.code == 1 and "unexpected failure: RuntimeError: a wheel came off" in ran.err
    assert "OPCUA_DETECTOR_TRACEBACK=1" in ran.json["error"]["next_step"]
    ran = cli("nodeset", fitted.file, "--out", fitted.folder / "nowhere" / "results.xml")
    assert ran.code == 1 and "nowhere" in ran.err and "check path" in ran.err


# --- browse ---


def test_browse_shows_the_tree_in_order_and_a_filter_shows_paths(plant: RunningPlant, fitted: Fitted) -> None:
    ran = cli("browse", plant.endpoint, "--insecure")
    lines = ran.out.splitlines()
    at = [next(i for i, line in enumerate(lines) if line.split()[0] == name and part in line) for name, part in (
        ("Plant", "simulated-plant;s=plant"), ("lorenz", "simulated-plant;s=lorenz"), ("x1", f"{PLANT}lorenz.x1"),
        ("faults", f"{PLANT}lorenz.faults"), ("sigma", f"{PLANT}lorenz.faults.sigma"))]
    assert at == sorted(at), ran.out  # children stand below their parent
    indent = [len(lines[i]) - len(lines[i].lstrip()) for i in at]
    assert indent == [0, 2, 4, 4, 6]
    assert "Double" in lines[at[2]] and " -h " in lines[at[2]] and " w- " in lines[at[4]]
    filtered = cli("browse", fitted.file, "--filter", "lorenz.x").out.splitlines()
    assert [line.split()[0] for line in filtered] == [f"/Objects/2:Plant/2:lorenz/2:{name}" for name in ("x1", "x3")]
    nodes = cli("browse", fitted.file, "--filter", "lorenz.x", "--json").json["nodes"]
    assert [n["node"] for n in nodes] == [f"{PLANT}lorenz.x1", f"{PLANT}lorenz.x3"]
    assert all(n["type"] == "Double" and n["history"] and not n["writable"] for n in nodes)


def test_the_config_that_browse_emits_goes_through_check_fit_and_run(plant: RunningPlant, tmp_path: Path) -> None:
    ran = cli("browse", plant.endpoint, "--insecure", "--filter", "lorenz", "--emit-yaml")
    assert ran.code == 0
    file = tmp_path / "emitted.yaml"
    file.write_text(ran.out, encoding="utf-8")
    group = load(file).groups[0]
    kinds = {t.name: t.kind.value for t in group.tags}
    assert kinds.pop("setpoint", "setpoint") == "setpoint"  # there when it moved in the time that was looked at
    assert kinds == {"x1": "measured", "x3": "measured"}
    assert group.period == 10_000_000
    assert group.tags[0].unit == "1" and group.tags[0].eu_range == (-30.0, 30.0)
    for name, reason in (("total", "totaliser"), ("clock", "clock"), ("constant", "constant at 24"),
                         ("duplicate", "duplicate of x1"), ("state", "constant"), ("RowsPublished", "one way")):
        line = next(line for line in ran.out.splitlines() if f"name: {name}," in line)
        assert line.lstrip().startswith("# - {") and "left out: " in line and reason in line
    assert RESULTS not in "".join(line for line in ran.out.splitlines() if "- {" in line)
    uncommented = ran.out.replace("# - {name: constant", "- {name: constant")
    assert "constant" in [t["name"] for t in yaml.safe_load(uncommented)["groups"][0]["tags"]]
    assert cli("check", file).code == 0
    assert cli("fit", file).code == 0
    ran = cli("run", file, "--seconds", "2", "--json")
    assert ran.code == 0 and ran.json["monitors"]["plant"]["scored"] > 0


def browsed(name: str, kind: str = "Double", **more: Any) -> BrowsedNode:
    """A variable as `browse` finds it."""
    return BrowsedNode(f"/Objects/2:{name}", f"nsu=urn:p;s={name}", name, 1, True, type=kind, readable=True, **more)


def test_browse_proposes_kind_and_period_from_what_the_values_do() -> None:
    at = START_NS + np.arange(3000) * 50_000_000
    rng = np.random.default_rng(1)
    steps = {
        browsed("pressure"): rng.normal(size=3000), browsed("level", writable=True): rng.normal(size=3000),
        browsed("target"): np.repeat([20.0, 30.0, 25.0], 1000), browsed("mode", "Int32"): np.repeat([1, 2, 1], 1000),
        browsed("running", "Boolean"): np.repeat([1, 0, 1], 1000), browsed("pieces", "UInt32"): np.arange(3000) // 900,
        browsed("hours"): np.arange(3000) * 0.05, browsed("limit"): np.full(3000, 4.0),
        browsed("note", "String"): rng.normal(size=3000), browsed("today", "DateTime"): np.arange(3000.0),
    }
    nodes = list(steps)
    recent = {node.node: (at, values.astype(float)) for node, values in steps.items()}
    found = {node.name: proposals(nodes, recent)[node.node] for node in nodes}
    assert {name: kind for name, (kind, reason) in found.items() if not reason} == {
        "pressure": "measured", "level": "setpoint", "target": "setpoint", "mode": "state", "running": "state"}
    for name, word in (("pieces", "totaliser"), ("hours", "totaliser or clock"), ("limit", "constant at 4"),
                       ("note", "text"), ("today", "clock")):
        assert word in found[name][1], found[name]
    assert period_of(nodes, recent) == 50_000_000
    jittery = {node: (stamps + rng.integers(-2_000_000, 2_000_000, 3000), v) for node, (stamps, v) in recent.items()}
    assert period_of(nodes, jittery) in (49_000_000, 50_000_000, 51_000_000)


def test_browse_emits_the_access_of_the_config_it_was_given(plant: RunningPlant, tmp_path: Path) -> None:
    given = content(plant.endpoint)
    given["servers"][0] |= {"timeout": "6 s", "pki": "own-pki"}
    emitted = cli("browse", write(tmp_path, given), "--filter", "lorenz.x", "--emit-yaml").out
    (tmp_path / "emitted.yaml").write_text(emitted, encoding="utf-8")
    assert load(tmp_path / "emitted.yaml").servers == load(tmp_path / "plant.yaml").servers


def test_browse_emits_no_config_without_a_usable_variable(plant: RunningPlant, tmp_path: Path) -> None:
    ran = cli("browse", plant.endpoint, "--insecure", "--filter", "lorenz.constant", "--emit-yaml", "--json")
    assert ran.code == 7 and "constant at 24" in ran.err and "widen --filter" in ran.err


# --- fit ---


def test_fit_reports_coverage_per_state_and_rows(plant: RunningPlant, tmp_path: Path) -> None:
    file = write(tmp_path, content("opc.tcp://127.0.0.1:1/", tags=[tag("x1"), tag("x3"), tag("mode", kind="state")]))
    with_state = content("opc.tcp://127.0.0.1:1/", tags=[tag("x1"), tag("x3"), tag("mode", kind="state")])
    with_state["monitors"][0]["state_tag"] = "mode"
    write(tmp_path, with_state)
    ran = cli("fit", file, "--csv", stateful_csv(tmp_path), "--json")
    assert ran.code == 0, ran.err
    (monitor,) = ran.json["monitors"]
    assert monitor["rows"] == 9000
    assert monitor["coverage"] == pytest.approx({"1": 5000 / 9000, "2": 3900 / 9000})
    for text in ("coverage of state 1: 55.6%", "coverage of state 2: 43.3%", "coverage of not learnt: 1.1%"):
        assert text in ran.err


def stateful_csv(folder: Path) -> Path:
    """Lorenz rows in state 1, then 2, then a few in state 3."""
    rows = make("lorenz", seed=7).simulate(9000)
    mode = np.repeat([1, 2, 3], [5000, 3900, 100])
    file = folder / "stateful.csv"
    lines = [f"{START_NS // 10**6 + 10 * i},{a:.9g},{b:.9g},{m}" for i, ((a, b), m) in
             enumerate(zip(rows, mode, strict=True))]
    file.write_text("\n".join(["t_ms,x1,x3,mode", *lines, ""]), encoding="utf-8")
    return file


def both_methods(folder: Path) -> Path:
    """A configuration with the two methods, without a server behind it."""
    given = content("opc.tcp://127.0.0.1:1/")
    given["monitors"][0] |= {"methods": ["auto", {"name": "onnx", "model": "bundled:lorenz"}]}
    return write(folder, given)


def rows_csv(file: Path, rows: np.ndarray) -> Path:
    """Lorenz rows from START_NS on as CSV."""
    write_csv(file, Record.from_rows(rows, [Tag("x1"), Tag("x3")], 10_000_000, start_ns=START_NS))
    return file


def test_fit_points_at_a_stretch_that_is_unlike_the_rest_and_can_leave_it_out(tmp_path: Path) -> None:
    rows = make("lorenz", seed=3).simulate(12_000)
    rows[6000:6600, 0] += 15.0
    file, csv = both_methods(tmp_path), rows_csv(tmp_path / "rows.csv", rows)
    ran = cli("fit", file, "--csv", csv, "--json")
    assert ran.code == 0, ran.err
    fault_ns = (START_NS + 60 * 10**9, START_NS + 66 * 10**9)
    options = [line.split()[1] for line in ran.err.splitlines() if "--without" in line]
    found = [text for text in options
             if interval_ns(text, key="")[0] < fault_ns[1] and interval_ns(text, key="")[1] > fault_ns[0]]
    assert found, ran.err
    again = cli("fit", file, "--csv", csv, *(word for text in found for word in ("--without", text)), "--json")
    assert again.code == 0, again.err
    (before,), (after,) = ran.json["monitors"], again.json["monitors"]
    assert after["rows"] < before["rows"] and after["gaps"] >= 1 and after["model_id"] != before["model_id"]
    some = cli("fit", file, "--csv", csv, "--only", "2026-01-01T00:00:00Z/2026-01-01T00:00:30Z", "--json")
    assert some.json["monitors"][0]["rows"] == 3001
    assert cli("fit", file, "--csv", csv, "--only", "2025-01-01/2025-01-02").code == 3


def test_fit_works_beside_a_service_that_writes_the_store(plant: RunningPlant, fitted: Fitted) -> None:
    with Store.open(load(fitted.file).store.path):
        ran = cli("fit", fitted.file, "--json")
    assert ran.code == 0, ran.err
    registered = cli("models", fitted.file, "--json").json["registered"]
    assert ran.json["monitors"][0]["model_id"] in [m["model_id"] for m in registered]


def on_two_servers(first: RunningPlant, second: RunningPlant) -> dict[str, Any]:
    """A monitor whose tag x3 lies on another server than x1."""
    given = content(first.endpoint, outputs=False, tags=[tag("x1"), tag("x3", server="other")])
    given["servers"].append({"name": "other", "endpoint": second.endpoint, "policy": "None", "insecure": True})
    return given


def test_fit_puts_the_histories_of_two_servers_together_by_the_rule_of_time(
    plant: RunningPlant, tmp_path: Path,
) -> None:
    with running_plant("lorenz", history_rows=4000, seed=1) as other:
        file = write(tmp_path, on_two_servers(plant, other))
        ran = cli("fit", file, "--json")
        assert ran.code == 0, ran.err
        (monitor,) = ran.json["monitors"]
        # It begins where both have values: at the begin of the shorter history.
        assert 4000 <= monitor["rows"] < HISTORY_ROWS and not monitor["excluded"]
        config = load(file)
        record = history_record(config, file, config.groups[0], 3600 * 10**9)
        samples = asyncio.run(samples_of({plant.endpoint: "x1", other.endpoint: "x3"}))
    assert len(record) >= 4000 and record.valid[1:-100].all() and record.gap.sum() == 1
    assert other.start_ns - 4001 * 10**7 <= record.source_ns[0] <= other.start_ns - 3999 * 10**7
    for k, (stamps, values) in enumerate(samples):  # each row has the newest sample up to half a period after it
        newest = np.searchsorted(stamps, record.source_ns + 5_000_000, side="right") - 1
        assert np.array_equal(record.values[1:-100, k], values[newest[1:-100]])  # the last ones were not all there yet


async def samples_of(nodes: dict[str, str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Stamps and values that servers keep: endpoint -> tag."""
    found = []
    for endpoint, name in nodes.items():
        session = Session(ServerConfig(name="plant", endpoint=endpoint, policy="None", insecure=True))
        await session.open()
        (samples,) = await read_samples(session, [f"{PLANT}lorenz.{name}"], 0, 2 * 10**18)
        await session.close()
        found.append((samples.source_ns, samples.value))
    return found


def test_fit_names_the_server_that_has_no_history(plant: RunningPlant, tmp_path: Path) -> None:
    given = on_two_servers(plant, plant)
    given["groups"][0]["tags"][1]["node"] = f"{PLANT}lorenz.faults.sigma"
    ran = cli("fit", write(tmp_path, given), "--json")
    assert ran.code == 7, ran.err
    assert "server other, tag x3: its history cannot be read" in ran.err and "opcua-detector record" in ran.err
    assert not (tmp_path / "models").exists()


# --- record, fit, replay ---


def test_record_then_fit_then_replay_use_the_same_rows(plant: RunningPlant, fitted: Fitted) -> None:
    ran = cli("record", fitted.file, "--seconds", "4", "--name", "now", "--json")
    assert ran.code == 0, ran.err
    rows = ran.json["rows"]
    assert rows > 300 and ran.json["counters"]["lost"] == 0 and ran.json["committed_seq"] >= rows
    scores = fitted.folder / "scores.csv"
    ran = cli("replay", fitted.file, "--recording", "now", "--scores", scores, "--json")
    (monitor,) = ran.json["monitors"]
    assert monitor["rows"] == rows and monitor["scored"] > 0.5 * rows and monitor["alerts"] == []
    lines = scores.read_text().splitlines()
    assert lines[0] == "source_ns,monitor,score,valid_tags" and len(lines) == rows + 1
    with Store.open(load(fitted.file).store.path) as store:
        healthy = Record.from_rows(make("lorenz", seed=9).simulate(4000), [Tag("x1"), Tag("x3")], 10_000_000,
                                   start_ns=START_NS)
        store.write_record("healthy", healthy)
    learnt = cli("fit", fitted.file, "--recording", "healthy", "--json")
    assert learnt.code == 0, learnt.err
    assert learnt.json["monitors"][0]["rows"] == 4000
    slower = content(plant.endpoint)
    slower["groups"][0]["period"] = "20 ms"
    ran = cli("fit", write(fitted.folder, slower), "--recording", "healthy")
    assert ran.code == 3 and "period of 10 ms, the group lorenz 20 ms" in ran.err


def test_replay_over_a_csv_lists_the_alert_with_its_cause(tmp_path: Path) -> None:
    file = both_methods(tmp_path)
    healthy = rows_csv(tmp_path / "healthy.csv", make("lorenz", seed=0).simulate(40_000))
    assert cli("fit", file, "--csv", healthy).code == 0
    block = make("lorenz", seed=3).simulate_block(6000, faults=[Fault("rho", 1.5, 3000, 5000)])
    faulty = rows_csv(tmp_path / "faulty.csv", block.measured)
    before = snapshot(tmp_path)
    ran = cli("replay", file, "--csv", faulty, "--json")
    assert ran.code == 0, ran.err
    (monitor,) = ran.json["monitors"]
    assert monitor["alerts"] and monitor["rows"] == 6000
    first = monitor["alerts"][0]
    assert "2026-01-01T00:00:30" <= first["raised"] < "2026-01-01T00:00:50" and first["cleared"]
    assert first["top_tag"] in ("x1", "x3") and first["explanation"] and first["peak_score"] >= 1.0
    shown = cli("replay", file, "--csv", faulty)
    assert first["explanation"] in shown.out and f"{len(monitor['alerts'])} alerts" in shown.err
    assert snapshot(tmp_path) == before


def test_rows_that_the_simulator_writes_as_csv_can_be_learnt(fitted: Fitted) -> None:
    file = fitted.folder / "healthy.csv"
    with process("sim", "csv", "--process", "lorenz", "--rows", 5000, "--seed", 3, "--out", file) as child:
        assert child.wait(60) == 0
    ran = cli("fit", fitted.file, "--csv", file, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["monitors"][0]["rows"] == 5000


# --- models, nodeset, schema ---


def test_models_lists_the_file_its_tags_and_what_is_registered(plant: RunningPlant, fitted: Fitted) -> None:
    ran = cli("models", fitted.file)
    (model,) = cli("models", fitted.file, "--json").json["models"]
    assert model["state"] == "ok" and model["tags"] == ["x1", "x3"] and model["methods"] == ["transition"]
    assert model["model_id"] in ran.out and "x1, x3" in ran.out and "ok" in ran.out
    assert "1 registered in the store" in ran.out


def test_nodeset_gives_the_nodes_that_the_outputs_name(fitted: Fitted) -> None:
    text = cli("nodeset", fitted.file).out
    ids = {element.get("NodeId") for element in ElementTree.fromstring(text).iter() if element.get("NodeId")}
    wanted = load(fitted.file).monitors[0].outputs
    assert wanted is not None
    assert {node.replace("nsu=urn:opcua-detector:results", "ns=1") for node in wanted.node_of().values()} <= ids
    file = fitted.folder / "results.xml"
    assert cli("nodeset", fitted.file, "--out", file).out == ""
    assert file.read_text(encoding="utf-8") == text


def test_schema_is_json_with_every_section(tmp_path: Path) -> None:
    schema = json.loads(cli("schema").out)
    assert {"servers", "groups", "monitors", "store"} <= set(schema["properties"])


# --- run and sim as processes: how they end ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_signal_ends_run_cleanly_with_state_stopped_in_the_nodes(
    number: int, plant: RunningPlant, fitted: Fitted,
) -> None:
    with process("run", fitted.file, "--json") as child:
        wait_for(lambda: read(plant.endpoint, STATE)["State"] == 2, "the state normal in the nodes")
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    assert child.returncode == 0 and "Traceback" not in err, err
    assert json.loads(out.splitlines()[-1])["monitors"]["lorenz"]["scored"] > 0
    assert read(plant.endpoint, STATE) == {"State": 0, "StateText": "stopped", "Score": NO_SCORE}
    with Store.open(load(fitted.file).store.path, readonly=True) as store:
        assert store.runs()[0].end_reason == "stopped"


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_ends_a_recording_and_keeps_its_rows(plant: RunningPlant, fitted: Fitted) -> None:
    def rows() -> int:
        path = load(fitted.file).store.path
        if not path.exists():
            return 0
        with Store.open(path, readonly=True) as store:
            return sum(r.rows for r in store.recordings() if r.name == "cut")

    with process("record", fitted.file, "--name", "cut", "--json") as child:
        wait_for(lambda: rows() > 50, "rows in the store")
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["rows"] == rows()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_sim_serves_until_a_signal_and_leaves_no_process_behind() -> None:
    with process("sim", "--process", "throttle", "--port", "0", "--history-rows", "100") as child:
        assert child.stdout is not None
        ready = json.loads(child.stdout.readline())
        assert ready["process"] == "throttle"
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 0
        wait_for(lambda: not alive(ready["pid"]), "the simulator to end")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_the_simulator_ends_when_sim_is_killed() -> None:
    with process("sim", "--port", "0", "--history-rows", "100") as child:
        assert child.stdout is not None
        ready = json.loads(child.stdout.readline())
        child.kill()
        wait_for(lambda: not alive(ready["pid"]), "the simulator to end")


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("option", "says"), [("--port", "port"), ("--speed", "speed")])
def test_sim_with_a_port_taken_or_a_wrong_option_exits_8(option: str, says: str, plant: RunningPlant) -> None:
    value = {"--port": str(plant.port), "--speed": "-1"}[option]
    with process("sim", option, value, "--history-rows", "100", "--json") as child:
        out, err = child.communicate(timeout=90)
    assert child.returncode == 8, err
    assert says in err.lower() and "Traceback" not in err
    assert value in err
    assert json.loads(out.splitlines()[-1])["error"]["exit_code"] == 8


def test_a_dry_run_writes_no_node(plant: RunningPlant, fitted: Fitted) -> None:
    nodes = result_nodes("lorenz", "throttle")
    before = read(plant.endpoint, nodes)
    ran = cli("run", fitted.file, "--dry-run", "--seconds", "3", "--json")
    assert ran.code == 0 and "nothing is written" in ran.err
    assert ran.json["monitors"]["lorenz"]["scored"] > 0
    assert read(plant.endpoint, nodes) == before
