"""Every sample configuration is fitted and run as it stands, against the simulator of its process."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import RESULTS, cli, read

from opcua_detector.config import load
from opcua_detector.nodes import State
from sim_server.testing import running_plant

CONFIGS = Path(__file__).parents[2] / "configs"
SAMPLES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith(("sim-", "secure")))


def test_there_is_a_sample_of_each_process() -> None:
    assert {"lorenz", "throttle", "press"} <= set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_checked_fitted_and_run(name: str, tmp_path: Path) -> None:
    # The plant's server has the result nodes that `nodeset` writes for this sample.
    results = tmp_path / "results.NodeSet2.xml"
    assert cli("nodeset", CONFIGS / f"{name}.yaml", "--out", results).code == 0
    with running_plant(name, history_rows=20_000, nodeset=results) as plant:
        text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
        assert text.count("opc.tcp://127.0.0.1:4840/") == 1
        file = tmp_path / f"{name}.yaml"
        file.write_text(text.replace("opc.tcp://127.0.0.1:4840/", plant.endpoint), encoding="utf-8")
        assert cli("check", file).code == 0
        learnt = cli("fit", file, "--json")
        assert learnt.code == 0, learnt.err
        (monitor,) = learnt.json["monitors"]
        assert monitor["rows"] >= 20_000 and set(monitor["excluded"]) == {"total", "clock", "constant"}
        checked = cli("check", file, "--json").json
        assert checked == {"ok": True, "findings": []}
        ran = cli("run", file, "--seconds", "5", "--json")
        assert ran.code == 0, ran.err
        facts = ran.json["monitors"][name]
        assert facts["scored"] > 0 and facts["alerts"] == [] and facts["state"] == "normal"
        assert ran.json["groups"][name]["lost"] == 0 and ran.json["store"]["committed_seq"] > 0
        nodes = read(plant.endpoint, {signal: f"{RESULTS}{name}.{signal}" for signal in ("State", "ModelId")})
        assert nodes == {"State": State.STOPPED, "ModelId": monitor["model_id"]}
        with_models = cli("models", file, "--json").json["models"]
        assert [m["state"] for m in with_models] == ["ok"] * len(load(file).monitors)
