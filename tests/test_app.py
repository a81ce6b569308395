"""A model belongs to its monitor, and fitting replaces it only where the store can note it."""

from __future__ import annotations

from pathlib import Path

import pytest

from opcua_detector import config as configuration
from opcua_detector.api import Record
from opcua_detector.app import changed_since_fit, fit_config, keep_fitted, open_monitors
from opcua_detector.cli.terminal import fail
from opcua_detector.config import GroupConfig
from opcua_detector.errors import ModelTagsError, StoreError
from opcua_detector.store import Store
from sim_server.processes import make

TEXT = """
version: 1
servers: [{name: plant, endpoint: "opc.tcp://127.0.0.1:4840/", policy: None, insecure: true}]
groups:
  - name: plant
    server: plant
    period: 10 ms
    tags: [{name: x1, node: "ns=2;s=x1"}, {name: x3, node: "ns=2;s=x3"}]
monitors:
  - {name: first, group: plant, tags: [x1]}
  - {name: second, group: plant, tags: [x3]}
"""


def healthy(group: GroupConfig) -> Record:
    plant = make("lorenz", seed=5)
    plant.simulate(3000)
    return Record.from_rows(plant.simulate(6000), [tag.name for tag in group.tags], group.period)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "plant.yaml"
    path.write_text(TEXT, encoding="utf-8")
    config = configuration.load(path)
    with Store.open(tmp_path / "opcua-detector.db") as store:
        keep_fitted(fit_config(config, path, healthy), store)
        assert {entry.detail["monitor"] for entry in store.audit("model fitted")} == {"first", "second"}
    return path


def test_models_that_changed_places_are_refused(file: Path) -> None:
    first, second = (file.parent / "models" / f"{name}.npz" for name in ("first", "second"))
    assert set(open_monitors(configuration.load(file), file)) == {"plant"}
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(ModelTagsError, match="fitted for monitor second") as refused:
        open_monitors(configuration.load(file), file)
    assert fail(refused.value, tell=False) == 4


def test_other_tags_are_refused_and_another_method_is_told(file: Path) -> None:
    file.write_text(TEXT.replace("tags: [x1]", "tags: [x1, x3]"), encoding="utf-8")
    with pytest.raises(ModelTagsError, match="fitted with tags"):
        open_monitors(configuration.load(file), file)
    file.write_text(TEXT.replace("tags: [x1]}", "tags: [x1], windows: [7 s]}"), encoding="utf-8")
    config = configuration.load(file)
    (group,) = open_monitors(config, file).values()
    assert changed_since_fit(config.monitors[0], config.groups[0], group[0].model) == ["windows_ns"]
    assert changed_since_fit(config.monitors[1], config.groups[0], group[1].model) == []


def test_no_model_is_replaced_where_the_store_cannot_be_opened(file: Path) -> None:
    from opcua_detector.cli import main

    model = file.parent / "models" / "first.npz"
    before = model.read_bytes()
    (file.parent / "opcua-detector.db").write_bytes(b"this is no database")
    rows = file.parent / "rows.csv"
    record = healthy(configuration.load(file).groups[0])
    lines = [f"{t},{a},{b}" for t, (a, b) in zip(record.source_ns, record.values[::-1], strict=True)]
    rows.write_text("\n".join(["source_ns,x1,x3", *lines]), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["fit", str(file), "--csv", str(rows)])
    assert ended.value.code == StoreError.exit_code
    assert model.read_bytes() == before
