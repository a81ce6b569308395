"""Scripts and settings say exactly what is wrong with them, and every sample in configs/ loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim_server.config import SimConfig, build_script, load_config, parse_config
from sim_server.errors import ConfigError
from sim_server.faults import load_script, parse_script
from sim_server.plant import ScriptPlayer
from sim_server.processes import Fault, make, model

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SAMPLES = sorted(CONFIGS.glob("sim-*.yaml"))


def test_script_becomes_rows_and_ground_truth(tmp_path: Path) -> None:
    file = tmp_path / "faults.yaml"
    file.write_text(
        "- {parameter: sigma, factor: 0.5, from: 1, to: 2.005}\n"
        "- {parameter: rho, factor: 0.9, from: 2, to: 3}\n"
    )
    script = load_script(file, model("lorenz"))
    assert script.faults(400) == [Fault("sigma", 0.5, 100, 201), Fault("rho", 0.9, 200, 300)]
    block = make("lorenz").simulate_block(400, script.faults(400))
    assert block.labels[100:300].all()
    assert not block.labels[:100].any()
    assert not block.labels[300:].any()


def test_script_played_live_equals_the_batch_and_the_chunks() -> None:
    entries = [
        {"parameter": "Kb", "factor": 1.3, "from": 1.0, "to": 3.0},
        {"parameter": "Kb", "factor": 1.1, "from": 3.0, "to": 4.0},
        {"parameter": "La", "factor": 1.2, "from": 2.0, "to": 5.0},
    ]
    script = parse_script(entries, model("throttle"))
    batch = make("throttle", seed=1).simulate_block(300, script.faults(300))
    live, player, rows, truth = make("throttle", seed=1), ScriptPlayer(script), [], []
    for k in range(300):
        player.apply(k, live)
        rows.append(live.step())
        truth.append(live.faulty)
    assert (batch.measured == rows).all()
    assert (batch.labels == truth).all()
    chunked, at = make("throttle", seed=1), 0
    for stop in (40, 50, 150, 151, 200, 250, 300):
        block = chunked.simulate_block(stop - at, script.faults_between(at, stop))
        assert (block.measured == batch.measured[at:stop]).all(), (at, stop)
        assert (block.labels == batch.labels[at:stop]).all(), (at, stop)
        at = stop


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("{parameter: sigma}", "whole file", "list"),
        ("- {parameter: gamma, factor: 0.9, from: 1, to: 2}", "0.parameter", "sigma, rho, beta"),
        ("- {parameter: sigma, factor: 9, from: 1, to: 2}", "0.factor", "0.5 .. 2.0"),
        ("- {parameter: sigma, factor: fast, from: 1, to: 2}", "0.factor", "number"),
        ("- {parameter: sigma, factor: 0.9, from: 1}", "0.to", "present"),
        ("- {parameter: sigma, factor: 0.9, from: 3, to: 2}", "0", "after 'from'"),
        ("- {parameter: sigma, factor: 0.9, from: 1, to: 2, colour: red}", "0.colour", "no such key"),
        ("- {parameter: sigma, factor: 0.9, from: -1, to: 2}", "0.from", "greater than or equal to 0"),
        (
            "- {parameter: rho, factor: 1, from: 1, to: 3}\n- {parameter: rho, factor: 1, from: 2, to: 4}",
            "rho.from",
            "3.0 s",
        ),
        ("- [", "", "valid YAML"),
    ],
)
def test_wrong_script_names_file_key_value_and_expectation(
    tmp_path: Path, text: str, key: str, expected: str
) -> None:
    file = tmp_path / "faults.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_script(file, model("lorenz"))
    message = str(caught.value)
    assert str(file) in message
    assert key in caught.value.key
    assert key in message
    assert repr(caught.value.value) in message
    assert expected in message


def test_missing_script_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml.*No such file"):
        load_script(tmp_path / "gone.yaml", model("lorenz"))


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ([1, 2], ""),
        ({"proces": "lorenz"}, "proces"),
        ({"process": "pump"}, "process"),
        ({"speed": 0}, "speed"),
        ({"noise": -0.1}, "noise"),
        ({"port": 70_000}, "port"),
        ({"users": [{"name": "me"}]}, "users.0.password"),
        ({"faults": [{"parameter": "Kb", "factor": 1.3, "from": 1, "to": 2}]}, "faults.0.parameter"),
        ({"quirks": [{"tag": "theta", "quirk": "bad", "value": 0.1}]}, "quirks.0.tag"),
        ({"quirks": [{"tag": "x1", "quirk": "rust", "value": 0.1}]}, "quirks.0.quirk"),
        ({"quirks": [{"tag": "x1", "quirk": "bad", "value": 3}]}, "quirks.0.value"),
        ({"quirks": [{"tag": "x1", "quirk": "bad", "value": 1, "from": 5, "to": 5}]}, "quirks.0.to"),
    ],
)
def test_wrong_settings_name_the_key(content: object, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(content, "plant.yaml")
    assert caught.value.key == key
    assert "plant.yaml" in str(caught.value)
    assert caught.value.expected


def test_an_error_about_a_user_does_not_repeat_the_password() -> None:
    for wrong in ({"name": ""}, {}, {"name": 3}, {"name": "me", "colour": "red"}):
        with pytest.raises(ConfigError) as caught:
            parse_config({"users": [{**wrong, "password": "tops3cret"}]}, "plant.yaml")
        assert "tops3cret" not in str(caught.value)
    assert "tops3cret" not in repr(parse_config({"users": [{"name": "me", "password": "tops3cret"}]}))


@pytest.mark.parametrize("file", SAMPLES, ids=lambda one: one.name)
def test_sample_loads_and_states_every_knob(file: Path) -> None:
    config = load_config(file)
    assert file.name == f"sim-{config.process}.yaml"
    assert config.faults
    assert build_script(config).entries
    assert config.quirks
    assert config.model_fields_set == set(SimConfig.model_fields)


def test_there_is_a_sample_for_each_process() -> None:
    assert [one.name for one in SAMPLES] == ["sim-lorenz.yaml", "sim-throttle.yaml"]


def test_sample_comments_state_the_real_defaults() -> None:
    """In the Lorenz sample a knob without the word default stands at its default."""
    file = CONFIGS / "sim-lorenz.yaml"
    config, defaults = load_config(file), SimConfig()
    lines = {line.split(":")[0]: line for line in file.read_text().splitlines() if line[:1].isalpha()}
    for name in SimConfig.model_fields:
        if name in ("faults", "quirks"):
            assert getattr(defaults, name) == ()
        elif "default" in lines[name]:
            assert getattr(config, name) != getattr(defaults, name)
        else:
            assert getattr(config, name) == getattr(defaults, name), name


def test_paths_in_a_file_count_from_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "plant.yaml"
    file.write_text("pki_dir: keys\nnodesets: [more/results.xml]\ncertificate: own.der\nprivate_key: own.pem\n")
    config = load_config(file)
    assert config.pki_dir == tmp_path / "keys"
    assert (config.certificate, config.private_key) == (tmp_path / "own.der", tmp_path / "own.pem")
    assert config.nodesets == (tmp_path / "more/results.xml",)


def test_what_overrides_a_file_is_there_before_the_check(tmp_path: Path) -> None:
    file = tmp_path / "plant.yaml"
    file.write_text("faults: [{parameter: Kb, factor: 1.3, from: 1, to: 2}]\npki_dir: keys\n")
    config = load_config(file, {"process": "throttle", "pki_dir": "here"})
    assert config.process == "throttle"
    assert config.pki_dir == Path("here")
    with pytest.raises(ConfigError, match=r"faults\.0\.parameter"):
        load_config(file)
