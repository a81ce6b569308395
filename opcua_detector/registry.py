"""Finds detector plugins: built in, shipped, in folders that the config names, and entry points.

Finding reads names only; a plugin is imported when it is asked for, so that one that is broken, or that needs an
extra, does not disturb a config that does not name it.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Union

from .api import Plugin
from .errors import ConfigError, PluginError

ENTRY_POINTS = "opcua_detector.plugins"
_BUILT_IN = {
    "transition": ("opcua_detector.detectors.transition", "TransitionPlugin"),
    "regression": ("opcua_detector.detectors.regression", "RegressionPlugin"),
    "checks": ("opcua_detector.detectors.checks", "ChecksPlugin"),
    "onnx": ("opcua_detector.detectors.onnx_model", "OnnxPlugin"),
}
_SHIPPED = "opcua_detector.plugins.detectors"
_DROP_IN = "opcua_detector_drop_in_"


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a plugin is, and how it is loaded."""

    where: str
    load: Callable[[], Any]


class Registry:
    """All plugins that can be named in a config.

    Parameters
    ----------
    folders : folders of drop-in plugins, each either one plugin (it holds `__init__.py`) or a folder of such folders;
        the folder's name is the plugin's name, and its `__init__.py` exposes `plugin`

    Raises
    ------
    PluginError
        A folder is missing or holds no plugin, or two plugins have the same name.
    """

    def __init__(self, folders: Iterable[str | Path] = ()) -> None:
        self._places: dict[str, _Place] = {}
        self._loaded: dict[str, Plugin] = {}
        for name, (module, attribute) in _BUILT_IN.items():
            self._add(name, _Place(module, partial(_built_in, module, attribute)))
        for shipped in _shipped_folders():
            for one in _plugin_folders(shipped):
                module = f"{_SHIPPED}.{one.name}"
                self._add(one.name, _Place(module, partial(_exposed, module)))
        for folder in folders:
            self._add_folder(Path(folder))
        for entry in metadata.entry_points(group=ENTRY_POINTS):
            self._add(entry.name, _Place(f"entry point {entry.value}", partial(_from_entry_point, entry)))

    def _add(self, name: str, place: _Place) -> None:
        if name in self._places:
            raise PluginError(f"two plugins are called {name!r}", where=f"{self._places[name].where}, {place.where}",
                              next_step="rename the folder or the entry point of one of them")
        self._places[name] = place

    def _add_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            raise PluginError("the plugin folder is not there", where=str(folder),
                              next_step="correct `plugins` in the configuration file")
        found = [folder] if (folder / "__init__.py").is_file() else _plugin_folders(folder)
        if not found:
            raise PluginError("no plugin in this folder: neither it nor a folder in it holds __init__.py",
                              where=str(folder), next_step="correct `plugins` in the configuration file")
        for one in found:
            self._add(one.name, _Place(str(one), partial(_from_folder, one)))

    def names(self) -> list[str]:
        """Return the names of all plugins, sorted; none is imported."""
        return sorted(self._places)

    def get(self, name: str) -> Plugin:
        """Import a plugin and return it.

        Raises
        ------
        PluginError
            No plugin has this name, or it cannot be imported, or it is not what `api.Plugin` asks for.
        """
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def _load(self, name: str) -> Plugin:
        if name not in self._places:
            raise PluginError(f"no plugin is called {name!r}", where="methods",
                              next_step=f"choose out of {', '.join(self.names())}, or name its folder under `plugins`")
        place = self._places[name]
        try:
            plugin = place.load()
        except PluginError:
            raise
        except Exception as error:  # whatever a stranger's module raises
            raise PluginError(f"plugin {name!r} cannot be imported: {type(error).__name__}: {error}",
                              where=place.where, next_step="repair or remove the plugin") from error
        if reason := _not_a_plugin(plugin, name):
            raise PluginError(f"plugin {name!r} {reason}", where=place.where,
                              next_step="compare it with opcua_detector.api.Plugin; testing.check_plugin tests it")
        return typing.cast(Plugin, plugin)

    def params(self, name: str, mapping: Mapping[str, Any]) -> Any:
        """Return a plugin's parameters made of what the config says; what it does not say takes the default.

        Raises
        ------
        PluginError
            As `get`.
        ConfigError
            An unknown or missing key, a wrong type, or a value that the plugin refuses.
        """
        made = self.get(name).Params
        hints = typing.get_type_hints(made)
        fields = {field.name: field for field in dataclasses.fields(made) if field.init}
        for key in mapping:
            if key not in fields:
                raise ConfigError("unknown key", key=f"{name}.{key}", value=mapping[key],
                                  expected=f"one of {', '.join(fields)}" if fields else "no key at all",
                                  next_step="remove it or correct its spelling")
        for key, field in fields.items():
            if key not in mapping and field.default is dataclasses.MISSING \
                    and field.default_factory is dataclasses.MISSING:
                raise ConfigError("missing key", key=f"{name}.{key}", expected=_words(hints[key]),
                                  next_step="add it to the method")
        values = {key: _convert(value, hints[key], f"{name}.{key}") for key, value in mapping.items()}
        try:
            return made(**values)
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error), key=name, next_step="correct the value in the configuration file") from error


def _shipped_folders() -> list[Path]:
    """Return the folder of the shipped plugins; nowhere in a checkout that was not installed."""
    try:
        spec = importlib.util.find_spec(_SHIPPED)
    except ModuleNotFoundError:
        return []
    return [Path(path) for path in (spec.submodule_search_locations or ())] if spec is not None else []


def _plugin_folders(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/__init__.py") if path.parent.name.isidentifier())


def _import_folder(folder: Path) -> types.ModuleType:
    """Import a drop-in folder as a package of its own, so that its relative imports work."""
    name = _DROP_IN + folder.name
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} is no package")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _built_in(module: str, attribute: str) -> Any:
    return getattr(importlib.import_module(module), attribute)()


def _exposed(module: str) -> Any:
    return importlib.import_module(module).plugin


def _from_folder(folder: Path) -> Any:
    return _import_folder(folder).plugin


def _from_entry_point(entry: metadata.EntryPoint) -> Any:
    """Return what an entry point gives: the plugin, its class, or a module that exposes `plugin`."""
    found = entry.load()
    if isinstance(found, types.ModuleType):
        return found.plugin
    return found() if isinstance(found, type) else found


def _not_a_plugin(plugin: Any, name: str) -> str:
    """Say what keeps an object from being the plugin `name`; empty: nothing."""
    if missing := [part for part in ("name", "Params", "learns", "fit", "open") if not hasattr(plugin, part)]:
        return f"lacks {', '.join(missing)}"
    if plugin.name != name:
        return f"calls itself {plugin.name!r}"
    if not (isinstance(plugin.Params, type) and dataclasses.is_dataclass(plugin.Params)):
        return "has Params that are not a dataclass"
    return ""


# -- values of a config as parameters --------------------------------------------------------------------------------


def _convert(value: Any, hint: Any, key: str) -> Any:
    """Return `value` as the type `hint`; lists become tuples, whole numbers become floats where floats are wanted."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _first_that_fits(value, arguments, hint, key)
    if origin is Literal:
        if any(value == one and type(value) is type(one) for one in arguments):
            return value
        raise _wrong(value, hint, key)
    if origin in (tuple, list):
        return _convert_items(value, origin, arguments, hint, key)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {_convert(k, arguments[0], key): _convert(v, arguments[1], f"{key}.{k}") for k, v in value.items()}
    if isinstance(hint, type):
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if issubclass(hint, Enum) and not isinstance(value, hint):
            if value in [one.value for one in hint]:
                return hint(value)
            raise _wrong(value, hint, key)
        if issubclass(hint, Path) and isinstance(value, str):
            return hint(value)
        if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
            return value
    raise _wrong(value, hint, key)


def _first_that_fits(value: Any, arguments: tuple[Any, ...], hint: Any, key: str) -> Any:
    exact = [one for one in arguments if one is type(value)]  # an int stays one in `float | int`
    for one in [*exact, *arguments]:
        try:
            return _convert(value, one, key)
        except ConfigError:
            continue
    raise _wrong(value, hint, key)


def _convert_items(value: Any, origin: Any, arguments: tuple[Any, ...], hint: Any, key: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong(value, hint, key)
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is ...):
        if len(value) != len(arguments):
            raise _wrong(value, hint, key)
        kinds = list(arguments)
    else:
        kinds = [arguments[0]] * len(value)
    return origin(_convert(v, kind, f"{key}[{i}]") for i, (v, kind) in enumerate(zip(value, kinds, strict=True)))


def _wrong(value: Any, hint: Any, key: str) -> ConfigError:
    return ConfigError("wrong type", key=key, value=value, expected=_words(hint),
                       next_step="correct the value in the configuration file")


def _words(hint: Any) -> str:
    """Return a type in words that a reader of a YAML file understands."""
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a file",
             type(None): "nothing"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in plain:
        return plain[hint]
    if origin in (Union, types.UnionType):
        return " or ".join(_words(one) for one in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (tuple, list):
        inner = [one for one in arguments if one is not ...]
        return f"a list of {len(inner) if origin is tuple and ... not in arguments else ''} ".rstrip() + \
            f" ({', '.join(_words(one) for one in inner)})"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(str(one.value) for one in hint)
    return str(hint)
