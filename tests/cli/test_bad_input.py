"""Bad input gets an error that says what, where and what next, its exit code, and leaves everything as it was."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import PLANT, RESULTS, Ran, cli, content, snapshot, tag, write

from cli.conftest import PASSWORD, UNREADABLE, USER, Fitted
from opcua_detector.config import load
from opcua_detector.store import Store
from sim_server.processes import make
from sim_server.testing import RunningPlant

STAMP_NS = 1_767_225_600_000_000_000
Change = Callable[[dict[str, Any]], None]


def refused(folder: Path, code: int, says: tuple[str, ...], *arguments: object) -> Ran:
    """Run a command that must fail: exit code, texts on stderr, the same as JSON, and no file changed."""
    before = snapshot(folder)
    ran = cli(*arguments, "--json")
    assert ran.code == code, ran.err
    for text in (*says, "next step: "):
        assert text in ran.err, ran.err
    told = ran.json["error"]
    assert told["exit_code"] == code and told["what"] and told["next_step"]
    assert snapshot(folder) == before
    return ran


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- the configuration file ---


def misspelt(c: dict[str, Any]) -> None:
    c["groups"][0]["perod"] = c["groups"][0].pop("period")


def no_endpoint(c: dict[str, Any]) -> None:
    del c["servers"][0]["endpoint"]


def no_unit(c: dict[str, Any]) -> None:
    c["groups"][0]["period"] = "10 milliseconds"


def unknown_tag(c: dict[str, Any]) -> None:
    c["monitors"][0]["tags"] = ["x1", "x7"]


def unknown_method(c: dict[str, Any]) -> None:
    c["monitors"][0]["methods"] = ["transitions"]


def wrong_parameter(c: dict[str, Any]) -> None:
    c["monitors"][0]["methods"] = [{"name": "transition", "level": 20}]


@pytest.mark.parametrize("command", ["fit", "run", "check", "models", "nodeset", "record", "replay"])
def test_an_unknown_key_is_named_with_file_line_and_the_known_keys(command: str, tmp_path: Path) -> None:
    bad = content("opc.tcp://127.0.0.1:1/")
    misspelt(bad)
    file = write(tmp_path, bad)
    line = next(i for i, text in enumerate(file.read_text().splitlines(), 1) if "perod" in text)
    refused(tmp_path, 2, (f"{file}, line {line}", "groups[0].perod", "unknown key", "'10 ms'", "period", "spelling"),
            command, file)


@pytest.mark.parametrize(("change", "says"), [
    (no_endpoint, ("servers[0]", "a key is missing", "the key 'endpoint'")),
    (no_unit, ("groups[0].period", "'10 milliseconds'", "a number with its unit (us, ms, s, min, h, d)")),
    (unknown_tag, ("monitors[0].tags[1]", "'x7'", "one of x1, x3")),
])
def test_a_missing_key_a_wrong_unit_and_an_unknown_tag_are_told_before_anything_is_connected(
    change: Change, says: tuple[str, ...], tmp_path: Path,
) -> None:
    bad = content("opc.tcp://127.0.0.1:1/")
    change(bad)
    file = write(tmp_path, bad)
    refused(tmp_path, 2, (str(file), *says), "run", file)


@pytest.mark.parametrize(("change", "code", "says"), [
    (unknown_method, 4, ("transitions", "transition")),
    (wrong_parameter, 2, ("level", "levels")),
])
def test_an_unknown_method_or_parameter_is_named_with_the_known_ones(
    change: Change, code: int, says: tuple[str, ...], tmp_path: Path,
) -> None:
    bad = content("opc.tcp://127.0.0.1:1/")
    change(bad)
    refused(tmp_path, code, says, "fit", write(tmp_path, bad))


def test_a_config_that_is_not_there_or_no_yaml_is_named(tmp_path: Path) -> None:
    refused(tmp_path, 2, (str(tmp_path / "none.yaml"), "cannot be read"), "check", tmp_path / "none.yaml")
    (tmp_path / "odd.yaml").write_text("version: 1\n  servers: [", encoding="utf-8")
    refused(tmp_path, 2, ("odd.yaml, line 2", "not valid YAML"), "check", tmp_path / "odd.yaml")


def test_a_wrong_option_is_usage_with_exit_code_2_and_json(tmp_path: Path) -> None:
    file = write(tmp_path, content("opc.tcp://127.0.0.1:1/"))
    for arguments, says in ((("fit",), "CONFIG"), (("run", file, "--second", "5"), "--second"),
                            (("run", file, "--seconds", "soon"), "--seconds"), (("fly",), "fly")):
        ran = cli(*arguments, "--json")
        assert ran.code == 2 and says in ran.err and says in ran.json["error"]["what"]
    refused(tmp_path, 2, ("--last", "'5 minutes'", "us, ms, s, min, h, d"), "fit", file, "--last", "5 minutes")
    refused(tmp_path, 2, ("--without", "'yesterday'", "FROM/TO"), "fit", file, "--without", "yesterday")
    refused(tmp_path, 2, ("--csv", "--recording"), "fit", file, "--csv", "a.csv", "--recording", "b")
    refused(tmp_path, 2, ("'pump'", "one of lorenz"), "fit", file, "--monitor", "pump")
    refused(tmp_path, 2, ("'pump'", "one of lorenz"), "record", file, "--group", "pump")


# --- tags and outputs on the server ---


def no_such_node(c: dict[str, Any]) -> None:
    c["groups"][0]["tags"][1]["node"] = f"{PLANT}lorenz.x9"


def no_such_path(c: dict[str, Any]) -> None:
    c["groups"][0]["tags"][1]["node"] = "/Objects/2:Plant/2:lorenz/2:x9"


def no_such_namespace(c: dict[str, Any]) -> None:
    c["groups"][0]["tags"][1]["node"] = "nsu=urn:nobody;s=x3"


def unreadable(c: dict[str, Any]) -> None:
    c["groups"][0]["tags"][1]["node"] = UNREADABLE


def other_unit(c: dict[str, Any]) -> None:
    c["groups"][0]["tags"][1]["unit"] = "bar"


TAGS = [
    (no_such_node, (f"{PLANT}lorenz.x9", "does not exist", "opcua-detector browse")),
    (no_such_path, ("/Objects/2:Plant/2:lorenz/2:x9", "leads nowhere", "opcua-detector browse")),
    (no_such_namespace, ("no namespace 'urn:nobody'", "urn:opcua-detector:simulated-plant")),
    (unreadable, (UNREADABLE, "may not read", "read access")),
    (other_unit, ("the unit is '1' on the server, 'bar' in the configuration", "unit: 1")),
]


@pytest.mark.parametrize(("change", "says"), TAGS)
@pytest.mark.parametrize("command", ["fit", "run", "record"])
def test_a_tag_that_is_wrong_is_told_with_file_key_and_node_before_the_first_row(
    command: str, change: Change, says: tuple[str, ...], plant: RunningPlant, fitted: Fitted,
) -> None:
    bad = content(plant.endpoint)
    change(bad)
    write(fitted.folder, bad)
    more = ["--seconds", "1"] if command == "record" else []
    refused(fitted.folder, 7, (f"{fitted.file}: groups.lorenz.tags.x3", *says), command, fitted.file, *more)


def not_writable(c: dict[str, Any]) -> None:
    c["monitors"][0]["outputs"]["nodes"] = {"Score": f"{PLANT}lorenz.x1"}


def wrong_type(c: dict[str, Any]) -> None:
    c["monitors"][0]["outputs"]["nodes"] = {"Score": f"{RESULTS}lorenz.ModelId"}
    c["monitors"][0]["outputs"]["signals"] = ["State"]


def no_such_output(c: dict[str, Any]) -> None:
    c["monitors"][0]["outputs"]["base"] = f"{RESULTS}nobody"


OUTPUTS = [
    (not_writable, ("Score", f"{PLANT}lorenz.x1", "write")),
    (wrong_type, ("Score", f"{RESULTS}lorenz.ModelId", "String", "Double")),
    (no_such_output, (f"{RESULTS}nobody.Score", "does not exist")),
]


@pytest.mark.parametrize(("change", "says"), OUTPUTS)
def test_an_output_that_is_wrong_is_told_with_file_key_and_node_and_nothing_is_written(
    change: Change, says: tuple[str, ...], plant: RunningPlant, fitted: Fitted,
) -> None:
    bad = content(plant.endpoint)
    change(bad)
    write(fitted.folder, bad)
    refused(fitted.folder, 7, (f"{fitted.file}: monitors.lorenz.outputs", *says), "run", fitted.file)
    dry = cli("run", fitted.file, "--dry-run", "--seconds", "0.5", "--json")
    assert dry.code == 0, dry.err  # a dry run writes nothing, so outputs are not asked for


def test_check_lists_every_problem_with_its_fix_and_exits_9(plant: RunningPlant, fitted: Fitted) -> None:
    bad = content(plant.endpoint)
    no_such_node(bad)
    bad["groups"][0]["tags"][0]["unit"] = "bar"
    not_writable(bad)
    write(fitted.folder, bad)
    before = snapshot(fitted.folder)
    ran = cli("check", fitted.file)
    assert ran.code == 9
    for text in ("groups.lorenz.tags.x1", "'bar'", "groups.lorenz.tags.x3", "does not exist",
                 "monitors.lorenz.outputs.Score", "3 problems"):
        assert text in ran.out, ran.out
    assert ran.out.count("next step:") >= 3
    told = cli("check", fitted.file, "--json").json
    assert told["ok"] is False and len([f for f in told["findings"] if f["error"]]) == 3
    assert all(f["fix"] and f["where"] for f in told["findings"])
    assert snapshot(fitted.folder) == before


# --- records ---


def csv_file(folder: Path, values: np.ndarray, names: str = "x1,x3", stamps: np.ndarray | None = None) -> Path:
    """A CSV of rows 10 ms apart."""
    file = folder / "rows.csv"
    at = STAMP_NS + np.arange(len(values)) * 10_000_000 if stamps is None else stamps
    rows = [",".join((str(t), *("" if np.isnan(x) else f"{x:.9g}" for x in row)))
            for t, row in zip(at, values, strict=True)]
    file.write_text("\n".join([f"source_ns,{names}", *rows, ""]), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return make("lorenz", seed=5).simulate(4000)


def test_a_history_too_short_to_calibrate_says_how_long_it_must_be(plant: RunningPlant, fitted: Fitted) -> None:
    refused(fitted.folder, 3, ("too short to calibrate", "250 needed", "longer history"),
            "fit", fitted.file, "--last", "2 s")


def test_a_csv_too_short_to_calibrate_keeps_the_model_as_it_was(fitted: Fitted, rows: np.ndarray) -> None:
    file = csv_file(fitted.folder, rows[:200])
    refused(fitted.folder, 3, ("200 rows, 250 needed",), "fit", fitted.file, "--csv", file)


def test_a_constant_tag_alone_leaves_nothing_to_judge(plant: RunningPlant, tmp_path: Path) -> None:
    file = write(tmp_path, content(plant.endpoint, tags=[tag("constant")]))
    refused(tmp_path, 3, ("no tag is left to judge", "constant: constant at 24", "add measured tags"), "fit", file)


def test_constants_totalisers_clocks_and_duplicates_are_left_out_each_with_its_reason(
    plant: RunningPlant, tmp_path: Path,
) -> None:
    names = ["x1", "x3", "constant", "total", "clock", "duplicate"]
    ran = cli("fit", write(tmp_path, content(plant.endpoint, tags=[tag(name) for name in names])), "--json")
    assert ran.code == 0, ran.err
    (monitor,) = ran.json["monitors"]
    reasons = monitor["excluded"]
    assert set(reasons) == set(names[2:])
    for name, word in (("constant", "constant at 24"), ("total", "totaliser"), ("clock", "clock"),
                       ("duplicate", "duplicate of x1")):
        assert word in reasons[name] and f"left out: {name}: {reasons[name]}" in ran.err


def test_an_all_nan_tag_is_named(fitted: Fitted, rows: np.ndarray) -> None:
    broken = rows.copy()
    broken[:, 1] = np.nan
    file = csv_file(fitted.folder, broken)
    refused(fitted.folder, 3, ("tag x3", "no valid value"), "fit", fitted.file, "--csv", file)


def test_timestamps_that_do_not_increase_are_named_with_file_and_line(fitted: Fitted, rows: np.ndarray) -> None:
    stamps = STAMP_NS + np.arange(len(rows)) * 10_000_000
    stamps[[700, 701]] = stamps[[701, 700]]
    file = csv_file(fitted.folder, rows, stamps=stamps)
    for command in ("fit", "replay"):
        refused(fitted.folder, 3, (str(file), "line 703", "increas"), command, fitted.file, "--csv", file)


def test_a_csv_without_a_tag_or_with_text_or_not_there_is_named(fitted: Fitted, rows: np.ndarray) -> None:
    file = csv_file(fitted.folder, rows, names="x1,y")
    refused(fitted.folder, 3, (str(file), "x3"), "fit", fitted.file, "--csv", file)
    file.write_text("time,x1,x3\n2026-01-01T00:00:00Z,1.0,warm\n", encoding="utf-8")
    refused(fitted.folder, 3, (str(file), "line 2", "x3", "'warm'"), "fit", fitted.file, "--csv", file)
    refused(fitted.folder, 3, ("none.csv", "no such file"), "fit", fitted.file, "--csv", fitted.folder / "none.csv")


def test_a_recording_that_is_not_there_is_named_with_those_that_are(fitted: Fitted) -> None:
    refused(fitted.folder, 5, ("no recording 'june'", "record"), "replay", fitted.file, "--recording", "june")


def test_a_second_recording_of_the_same_name_leaves_the_first_alone(plant: RunningPlant, fitted: Fitted) -> None:
    assert cli("record", fitted.file, "--seconds", "1", "--name", "june").code == 0
    ran = cli("record", fitted.file, "--seconds", "1", "--name", "june", "--json")
    assert ran.code == 5 and "june" in ran.err and "next step" in ran.err
    with Store.open(fitted.folder / "opcua-detector.db", readonly=True) as store:
        assert len(store.read_recording("june")) > 50


# --- models ---


def test_a_truncated_model_is_refused_with_the_file_and_the_way_out(plant: RunningPlant, fitted: Fitted) -> None:
    whole = fitted.model.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        fitted.model.write_bytes(whole[:size])
        refused(fitted.folder, 4, (str(fitted.model), "truncated", "fit the monitor again"), "run", fitted.file)


def test_an_altered_model_is_refused_by_its_hash(plant: RunningPlant, fitted: Fitted) -> None:
    with np.load(fitted.model) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays["calibration/limit"] = arrays["calibration/limit"] * 2.0
    with fitted.model.open("wb") as file:
        np.savez_compressed(file, **arrays)
    refused(fitted.folder, 4, (str(fitted.model), "altered", "sha256", "fit the monitor again"), "run", fitted.file)
    assert "altered" in cli("models", fitted.file).out
    assert cli("check", fitted.file).code == 9
    assert cli("fit", fitted.file, "--last", "1 h").code == 0  # and fitting again mends it
    assert cli("check", fitted.file).code == 0


def test_a_model_that_is_not_there_says_fit_first(plant: RunningPlant, fitted: Fitted) -> None:
    fitted.model.unlink()
    refused(fitted.folder, 4, (str(fitted.model), "opcua-detector fit"), "run", fitted.file)


def test_a_model_fitted_for_other_tags_or_another_period_is_refused(plant: RunningPlant, fitted: Fitted) -> None:
    other = content(plant.endpoint, tags=[tag("x1"), tag("setpoint")])
    write(fitted.folder, other)
    refused(fitted.folder, 4, ("fitted for the tags x1, x3", "x3 is not among", "fit the monitor again"),
            "run", fitted.file)
    slower = content(plant.endpoint)
    slower["groups"][0]["period"] = "20 ms"
    write(fitted.folder, slower)
    refused(fitted.folder, 4, ("10 ms", "20 ms", "fit the monitor again"), "run", fitted.file)


def test_a_fit_that_fails_for_one_monitor_saves_none(plant: RunningPlant, tmp_path: Path) -> None:
    both = content(plant.endpoint, tags=[tag("x1"), tag("x3"), tag("constant")], outputs=None)
    both["monitors"].append({"name": "second", "group": "lorenz", "tags": ["constant"]})
    refused(tmp_path, 3, ("no tag is left to judge",), "fit", write(tmp_path, both))


# --- servers and access ---


@pytest.mark.parametrize("command", ["fit", "run", "record", "browse"])
def test_a_server_that_is_not_there_is_named_with_its_endpoint(command: str, fitted: Fitted) -> None:
    endpoint = f"opc.tcp://127.0.0.1:{free_port()}/"
    write(fitted.folder, content(endpoint))
    refused(fitted.folder, 6, ("server plant", endpoint, "check endpoint"), command, fitted.file)


def test_check_tells_of_a_server_that_is_not_there_and_exits_9(fitted: Fitted) -> None:
    endpoint = f"opc.tcp://127.0.0.1:{free_port()}/"
    write(fitted.folder, content(endpoint))
    ran = cli("check", fitted.file)
    assert ran.code == 9 and endpoint in ran.out and "next step:" in ran.out


def with_password(plant: RunningPlant, fitted: Fitted) -> None:
    secure = content(plant.endpoint)
    secure["servers"][0] |= {"policy": "Basic256Sha256", "user": USER, "password_env": "PLANT_PASSWORD",
                             "pki": str(fitted.folder.parent / "pki")}
    write(fitted.folder, secure)


def test_a_wrong_password_is_refused_and_shown_nowhere(
    plant: RunningPlant, fitted: Fitted, monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_password(plant, fitted)
    monkeypatch.setenv("PLANT_PASSWORD", "wrong-horse")
    ran = refused(fitted.folder, 10, ("Basic256Sha256/SignAndEncrypt", f"user '{USER}'", "BadUserAccessDenied"),
                  "run", fitted.file)
    assert "wrong-horse" not in ran.out + ran.err
    monkeypatch.setenv("PLANT_PASSWORD", PASSWORD)
    ran = cli("run", fitted.file, "--seconds", "1", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["steps"] > 0 and PASSWORD not in ran.out + ran.err


def test_a_password_that_is_not_set_is_told_by_the_name_of_its_variable(
    plant: RunningPlant, fitted: Fitted, monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_password(plant, fitted)
    monkeypatch.delenv("PLANT_PASSWORD", raising=False)
    refused(fitted.folder, 2, ("servers.plant.password_env", "'PLANT_PASSWORD'", "set PLANT_PASSWORD"),
            "run", fitted.file)


def test_an_endpoint_alone_asks_for_the_word_insecure(plant: RunningPlant, tmp_path: Path) -> None:
    refused(tmp_path, 2, (plant.endpoint, "--insecure"), "browse", plant.endpoint)
    refused(tmp_path, 2, ("http://plant/",), "browse", "http://plant/", "--insecure")


def test_a_store_that_another_process_writes_is_not_touched(plant: RunningPlant, fitted: Fitted) -> None:
    with Store.open(load(fitted.file).store.path) as store:
        before = store.recordings()
        ran = cli("run", fitted.file, "--seconds", "1", "--json")
        assert ran.code == 5 and "another process writes" in ran.err and "next step" in ran.err
        assert store.recordings() == before


def test_a_damaged_store_is_refused_and_kept(plant: RunningPlant, fitted: Fitted) -> None:
    store = fitted.folder / "opcua-detector.db"
    store.write_bytes(b"no database, but somebody's file" * 200)
    text = fitted.file.read_text(encoding="utf-8")
    fitted.file.write_text(f"{text}\nstore: {{on_corrupt: refuse}}\n", encoding="utf-8")
    refused(fitted.folder, 5, (str(store),), "run", fitted.file, "--seconds", "1")
