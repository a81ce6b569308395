"""The whole file: its sections, what they name of each other, and how it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from ..errors import ConfigError
from .groups import GroupConfig
from .monitors import MonitorConfig
from .problems import config_error, no_duplicate_keys, yaml_error
from .servers import ServerConfig
from .telemetry import LogConfig, MetricsConfig
from .units import UNITS_BYTES, UNITS_NS, Bytes, DurationNs, Section, Wrong, known, unique, with_unit


class StoreConfig(Section):
    """The SQLite store: where, how much, how long.

    backfill : at most so much of a gap is read from the server's history; 0 s: none
    forward : events of the time without a server are told again when it is back, at most so old
    on_corrupt : what happens to a damaged store when the service starts
    """

    path: Path = Path("opcua-detector.db")
    quota: Bytes = 2 * 10**9
    keep_rows: DurationNs = 30 * 86400 * 10**9
    record: bool = True
    synchronous: Literal["normal", "full"] = "normal"
    backfill: DurationNs = 24 * UNITS_NS["h"]
    forward: DurationNs = 24 * UNITS_NS["h"]
    on_corrupt: Literal["set_aside", "refuse"] = "set_aside"


class Config(Section):
    """The whole file."""

    version: Literal[1]
    servers: tuple[ServerConfig, ...] = Field(min_length=1)
    groups: tuple[GroupConfig, ...] = Field(min_length=1)
    monitors: tuple[MonitorConfig, ...] = ()
    operator_alarms_per_week: float | None = Field(default=None, gt=0, le=604800)
    store: StoreConfig = StoreConfig()
    metrics: MetricsConfig | None = None
    log: LogConfig = LogConfig()
    plugins: tuple[Path, ...] = ()

    @model_validator(mode="after")
    def _references(self) -> Config:
        for key in ("servers", "groups", "monitors"):
            unique([item.name for item in getattr(self, key)], (key,))
        servers = [s.name for s in self.servers]
        tags_of = {g.name: [t.name for t in g.tags] for g in self.groups}
        for i, group in enumerate(self.groups):
            unique(tags_of[group.name], ("groups", i, "tags"))
            known(group.server, servers, ("groups", i, "server"))
            for k, tag in enumerate(group.tags):
                if tag.server:
                    known(tag.server, servers, ("groups", i, "tags", k, "server"))
        for i, monitor in enumerate(self.monitors):
            known(monitor.group, tags_of, ("monitors", i, "group"))
            for k, name in enumerate(monitor.tags or ()):
                known(name, tags_of[monitor.group], ("monitors", i, "tags", k))
            if monitor.state_tag:
                known(monitor.state_tag, tags_of[monitor.group], ("monitors", i, "state_tag"))
            if monitor.settling is not None and not monitor.state_tag:
                raise Wrong("the key 'state_tag' beside it: settling begins with a change of state",
                             ("monitors", i, "settling"), with_unit(monitor.settling, UNITS_NS))
            for k, name in enumerate(monitor.inhibit):
                known(name, tags_of[monitor.group], ("monitors", i, "inhibit", k))
            if monitor.maintenance:
                known(monitor.maintenance, tags_of[monitor.group], ("monitors", i, "maintenance"))
            if monitor.cycle:
                known(monitor.cycle.tag, tags_of[monitor.group], ("monitors", i, "cycle", "tag"))
                for key in ("methods", "windows", "state_tag", "settling"):
                    if key in monitor.model_fields_set:
                        raise Wrong(f"no key '{key}' beside 'cycle': parts are judged as a whole, by their own method",
                                     ("monitors", i, key))
            for name in monitor.feedback.protected:
                known(name, tags_of[monitor.group], ("monitors", i, "feedback", "protected", name))
            if monitor.outputs:
                if not monitor.outputs.base and monitor.outputs.server in servers \
                        and self.server(monitor.outputs.server).writing.lease:
                    raise Wrong("the key 'base' beside it: the lease lies at <base>.Lease",
                                ("monitors", i, "outputs", "base"))
                known(monitor.outputs.server, servers, ("monitors", i, "outputs", "server"))
        return self

    def server(self, name: str) -> ServerConfig:
        """Return the server of that name."""
        return next(s for s in self.servers if s.name == name)

    def group(self, name: str) -> GroupConfig:
        """Return the group of that name; ConfigError lists the known ones."""
        return _pick("groups", name, self.groups)

    def monitor(self, name: str) -> MonitorConfig:
        """Return the monitor of that name; ConfigError lists the known ones."""
        return _pick("monitors", name, self.monitors)


_Named = TypeVar("_Named", GroupConfig, MonitorConfig)


def _pick(key: str, name: str, among: tuple[_Named, ...]) -> _Named:
    for item in among:
        if item.name == name:
            return item
    raise ConfigError("there is none of this name", key=key, value=name,
                      expected="one of " + (", ".join(i.name for i in among) or "(none configured)"),
                      next_step="choose one of them, or add it to the configuration")


def load(path: str | Path) -> Config:
    """Read and validate a configuration file.

    Relative paths in the file are taken from the file's own folder.

    Raises
    ------
    ConfigError
        Not readable or wrong; with file, line, key, value, what was expected and the next step.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError("the configuration file cannot be read", file=str(file),
                          next_step=f"check the path ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError("the file is not UTF-8 text", file=str(file), next_step="save it as UTF-8") from error
    return parse(text, file=str(file), folder=file.resolve().parent)


def parse(text: str, *, file: str = "(text)", folder: Path | None = None) -> Config:
    """Validate configuration text; as `load`."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise yaml_error(error, file) from None  # the parser's own text quotes lines, which may hold a secret
    if root is None or not isinstance(content, dict):
        raise ConfigError("the file is empty or no mapping", file=file, expected="keys version, servers, groups",
                          next_step="start from a sample in configs/")
    no_duplicate_keys(root, file)
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        raise config_error(error, root, file, Config) from None
    config = _share_budget(config)
    return _resolve_paths(config, folder) if folder else config


def _share_budget(config: Config) -> Config:
    """Share the alarm budget of the operator position evenly over the monitors that state none of their own."""
    if config.operator_alarms_per_week is None:
        return config
    own = "false_alarms_per_day"
    silent = [m for m in config.monitors if own not in m.model_fields_set]
    stated = sum(m.false_alarms_per_day for m in config.monitors if own in m.model_fields_set)
    left = config.operator_alarms_per_week / 7 - stated
    if silent and left <= 0:
        raise ConfigError(
            "the monitors that state a budget of their own use up that of the operator position",
            key="operator_alarms_per_week", value=config.operator_alarms_per_week,
            expected=f"more than {7 * stated:g}", next_step="raise it, or take false_alarms_per_day off the monitors")
    return config.model_copy(update={"monitors": tuple(
        m if own in m.model_fields_set else m.model_copy(update={own: left / len(silent)}) for m in config.monitors)})


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the configuration, for editors; defaults stand there as one would type them."""
    schema = Config.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        for rule in section.get("properties", {}).values():
            if isinstance(rule.get("default"), dict) and "$ref" in rule:
                del rule["default"]  # the section states the defaults of its keys itself
            elif rule.get("type") == "string" and isinstance(rule.get("default"), int):
                units = UNITS_BYTES if "MB" in rule["pattern"] else UNITS_NS
                rule["default"] = with_unit(rule["default"], units)
    return schema


def _resolve_paths(config: Config, folder: Path) -> Config:
    def at(path: Path | None) -> Path | None:
        return None if path is None else folder / path

    return config.model_copy(update={
        "servers": tuple(s.model_copy(update={
            "password_file": at(s.password_file), "server_certificate": at(s.server_certificate),
            "user_certificate": at(s.user_certificate), "user_key": at(s.user_key),
            "pki": at(s.pki)}) for s in config.servers),
        "monitors": tuple(m.model_copy(update={"model": at(m.model), "methods": tuple(
            _method_paths(item, folder) for item in m.methods)}) for m in config.monitors),
        "store": config.store.model_copy(update={"path": at(config.store.path)}),
        "log": config.log.model_copy(update={"file": at(config.log.file)}),
        "plugins": tuple(folder / p for p in config.plugins),
    })


def _method_paths(item: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A method's `model` is a file, except where it names one that ships with a plugin (`bundled:...`)."""
    model = item.get("model")
    if isinstance(model, str) and not model.startswith("bundled:"):
        return item | {"model": str(folder / model)}
    return item
