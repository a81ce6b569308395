"""The registry finds every plugin, imports only those asked for, and says what is wrong with a broken one."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from opcua_detector.api import Plugin
from opcua_detector.detectors.onnx_model import OnnxParams
from opcua_detector.errors import ConfigError, PluginError
from opcua_detector.registry import Registry

WHOLE = '''
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal
from .part import NAME


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Params:
    needed: int
    ratio: float = 0.5
    on: bool = True
    label: str = "x"
    lags: tuple[int, ...] = (1, 2)
    span: tuple[float, float] = (0.0, 1.0)
    mode: Literal["fast", "slow"] = "fast"
    colour: Colour = Colour.RED
    where: Path | None = None
    either: int | float = 1

    def __post_init__(self):
        if self.ratio < 0:
            raise ValueError(f"ratio is {self.ratio}; expected at least 0")


class P:
    name = NAME
    Params = Params
    learns = True

    def fit(self, record, params):
        raise NotImplementedError

    def open(self, model, columns):
        raise NotImplementedError


plugin = P()
'''


def drop_in(folder, name="mine", source=WHOLE, called=None):
    """Write a plugin folder and return it."""
    path = folder / name
    path.mkdir(parents=True)
    (path / "__init__.py").write_text(source, encoding="utf-8")
    (path / "part.py").write_text(f"NAME = {called or name!r}\n", encoding="utf-8")
    return path


def test_the_plugins_of_the_product_are_known_without_importing_them():
    code = (
        "import sys\nfrom opcua_detector.registry import Registry\nprint(Registry().names())\n"
        "heavy = ('onnxruntime', 'numba', 'torch', 'opcua_detector.plugins.detectors.mlp')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, imported = done.stdout.splitlines()
    assert names == "['checks', 'mlp', 'onnx', 'regression', 'transition']"
    assert imported == "[]"


@pytest.mark.parametrize("name", ["transition", "regression", "checks", "onnx", "mlp"])
def test_each_of_them_is_a_plugin_of_that_name(name):
    registry = Registry()
    plugin = registry.get(name)
    assert isinstance(plugin, Plugin) and plugin.name == name
    assert registry.get(name) is plugin
    assert registry.params(name, {}) == plugin.Params()


def test_getting_mlp_does_not_import_torch():
    code = (
        "import sys\nfrom opcua_detector.registry import Registry\nRegistry().get('mlp')\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("whole_folder", [True, False])
def test_a_drop_in_folder_is_found_and_its_relative_imports_work(tmp_path, whole_folder):
    path = drop_in(tmp_path)
    (tmp_path / "notes").mkdir()
    registry = Registry([tmp_path if whole_folder else path])
    assert registry.names() == ["checks", "mine", "mlp", "onnx", "regression", "transition"]
    assert registry.get("mine").name == "mine"


def test_a_broken_plugin_disturbs_nobody_who_does_not_ask_for_it(tmp_path):
    drop_in(tmp_path, "broken", "import a_module_that_is_not_there\n")
    drop_in(tmp_path, "fine")
    registry = Registry([tmp_path])
    assert registry.get("fine").name == "fine"
    with pytest.raises(PluginError, match=r"broken.*ModuleNotFoundError.*a_module_that_is_not_there") as caught:
        registry.get("broken")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    assert "opcua_detector_drop_in_broken" not in sys.modules


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(PluginError, match=r"'transitoin'[\s\S]*checks, mlp, onnx, regression, transition"):
        Registry().get("transitoin")


@pytest.mark.parametrize(("source", "text"), [
    ("x = 1\n", "no attribute 'plugin'"),
    ("plugin = 5\n", "lacks name, Params, learns, fit, open"),
    (WHOLE.replace("name = NAME", "name = 'other'"), "calls itself 'other'"),
    (WHOLE.replace("    Params = Params", "    Params = dict"), "not a dataclass"),
])
def test_what_is_no_plugin_is_refused_with_the_reason(tmp_path, source, text):
    drop_in(tmp_path, "mine", source)
    with pytest.raises(PluginError, match=text):
        Registry([tmp_path]).get("mine")


def test_a_folder_that_is_missing_or_empty_is_refused(tmp_path):
    with pytest.raises(PluginError, match="not there"):
        Registry([tmp_path / "nowhere"])
    with pytest.raises(PluginError, match="no plugin in this folder"):
        Registry([tmp_path])


def test_two_plugins_of_one_name_are_refused(tmp_path):
    drop_in(tmp_path, "onnx")
    with pytest.raises(PluginError, match="two plugins are called 'onnx'"):
        Registry([tmp_path])


@pytest.mark.parametrize("attribute", ["", ":plugin", ":P"], ids=["module", "plugin", "class"])
def test_an_entry_point_is_found(monkeypatch, tmp_path, attribute):
    source = WHOLE.replace("from .part import NAME", "NAME = 'by_entry'")
    (tmp_path / "module_of_the_entry.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = metadata.EntryPoint("by_entry", f"module_of_the_entry{attribute}", "opcua_detector.plugins")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry] if group == entry.group else [])
    registry = Registry()
    assert "by_entry" in registry.names()
    assert registry.get("by_entry").name == "by_entry"
    monkeypatch.delitem(sys.modules, "module_of_the_entry")


@pytest.fixture
def mine(tmp_path):
    drop_in(tmp_path)
    return Registry([tmp_path])


def test_values_of_the_config_become_parameters(mine):
    made = mine.params("mine", {
        "needed": 3, "ratio": 2, "on": False, "lags": [4, 5, 6], "span": [1, 2], "mode": "slow", "colour": "blue",
        "where": "a/b", "either": 2.5})
    assert (made.needed, made.ratio, made.on, made.lags, made.span) == (3, 2.0, False, (4, 5, 6), (1.0, 2.0))
    assert isinstance(made.ratio, float) and isinstance(made.span[0], float)
    assert (made.mode, made.colour.value, made.where.name, made.either) == ("slow", "blue", "b", 2.5)
    assert made.label == "x"


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("needed", "3", "a whole number"), ("needed", 3.0, "a whole number"), ("needed", True, "a whole number"),
    ("ratio", "half", "a number"), ("ratio", False, "a number"), ("on", 1, "true or false"), ("label", 5, "a text"),
    ("lags", 3, "a list"), ("lags", [1, "2"], "a whole number"), ("span", [1.0], "a list of 2"),
    ("mode", "medium", "one of fast, slow"), ("colour", "green", "one of red, blue"), ("where", 5, "a file or nothing"),
    ("either", "x", "a whole number or a number"),
])
def test_a_wrong_value_is_refused_by_key(mine, key, value, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        mine.params("mine", {"needed": 1} | {key: value})
    assert caught.value.key.startswith(f"mine.{key}")


def test_an_unknown_or_missing_key_is_refused(mine):
    with pytest.raises(ConfigError, match=r"mine\.ratoi: unknown key.*ratio"):
        mine.params("mine", {"needed": 1, "ratoi": 0.5})
    with pytest.raises(ConfigError, match=r"mine\.needed: missing key.*a whole number"):
        mine.params("mine", {})


def test_what_the_plugin_itself_refuses_is_an_error_of_the_config(mine):
    with pytest.raises(ConfigError, match="ratio is -1"):
        mine.params("mine", {"needed": 1, "ratio": -1})


def test_parameters_of_the_onnx_plugin():
    assert Registry().params("onnx", {"model": "m.onnx", "stride": 2}) == OnnxParams("m.onnx", "", 2)
    with pytest.raises(ConfigError, match="stride"):
        Registry().params("onnx", {"model": "m.onnx", "stride": 0})
