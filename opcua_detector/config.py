"""The configuration: one YAML file -> validated models; every error names file, line, key, value, what was expected.

The models are the truth: the samples in `configs/` are tested against them, and `json_schema()` gives editors
the same rules. Durations carry their unit ("10 ms"), so that none is ever guessed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from .api import Tag, TagKind
from .errors import ConfigError
from .nodes import SIGNALS

_UNITS_NS = {"us": 10**3, "ms": 10**6, "s": 10**9, "min": 60 * 10**9, "h": 3600 * 10**9, "d": 86400 * 10**9}
_UNITS_BYTES = {"kB": 10**3, "MB": 10**6, "GB": 10**9}


class _Wrong(ValueError):
    """A value that is wrong beside another one: `at` leads to it from the section whose rule it breaks."""

    def __init__(self, expected: str, at: tuple[int | str, ...], value: object = None) -> None:
        super().__init__(expected)
        self.at, self.value = at, value


def _quantity(value: Any, units: dict[str, int], example: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", value) if isinstance(value, str) else None
    if match is None or match[2] not in units:
        raise ValueError(f"a number with its unit ({', '.join(units)}), such as {example!r}")
    return round(float(match[1]) * units[match[2]])


def _duration(value: Any) -> int:
    return _quantity(value, _UNITS_NS, "10 ms")


def _size(value: Any) -> int:
    return _quantity(value, _UNITS_BYTES, "2 GB")


DurationNs = Annotated[
    int, BeforeValidator(_duration),
    WithJsonSchema({"type": "string", "pattern": r"^\d+(\.\d+)? ?(us|ms|s|min|h|d)$"}),
]
Bytes = Annotated[
    int, BeforeValidator(_size), WithJsonSchema({"type": "string", "pattern": r"^\d+(\.\d+)? ?(kB|MB|GB)$"})
]
Name = Annotated[str, Field(pattern=r"^\w[\w.\-]*$", max_length=64)]
Methods = Annotated[
    tuple[dict[str, Any], ...],
    WithJsonSchema({"type": "array", "minItems": 1, "items": {"anyOf": [
        {"type": "string"}, {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}]}}),
]
NodeText = Annotated[str, Field(min_length=3)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _node_text(value: str) -> str:
    if value.startswith("/") or re.match(r"^(nsu=[^;]+;|ns=\d+;)?[isgb]=.+", value):
        return value
    raise ValueError("a NodeId such as 'nsu=urn:plant;s=Reactor.T1' or a browse path such as '/Objects/2:Plant/2:T1'")


class ServerConfig(Section):
    """One OPC UA server and how to log in."""

    name: Name
    endpoint: str
    policy: Literal["None", "Basic256Sha256"] = "Basic256Sha256"
    mode: Literal["Sign", "SignAndEncrypt"] = "SignAndEncrypt"
    insecure: bool = False
    user: str = ""
    password_env: str = Field(default="", pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")
    password_file: Path | None = None
    server_certificate: Path | None = None
    pki: Path = Path("pki")
    timeout: DurationNs = 4 * 10**9

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, value: str) -> str:
        if not re.match(r"^opc\.tcp://[^/\s:]+(:\d+)?(/\S*)?$|^opc\.tcp://\[[0-9a-fA-F:]+\](:\d+)?(/\S*)?$", value):
            raise ValueError("an endpoint such as 'opc.tcp://192.0.2.10:4840/'")
        return value

    @model_validator(mode="after")
    def _secure(self) -> ServerConfig:
        if self.policy == "None" and not self.insecure:
            raise _Wrong("policy Basic256Sha256, or 'insecure: true' typed beside 'policy: None'", ("policy",), "None")
        if self.policy != "None" and self.server_certificate is None and not self.insecure:
            raise _Wrong("the file of the certificate this client trusts, or 'insecure: true'", ("server_certificate",))
        if self.user and self.policy == "None":
            raise _Wrong("a policy other than None beside a user name: a password never travels in clear",
                         ("policy",), "None")
        if self.user and not (self.password_env or self.password_file):
            raise _Wrong("password_env (a variable's name) or password_file beside it; never the password itself",
                         ("user",), self.user)
        return self

    def password(self) -> str:
        """Return the password from its variable or file; ConfigError where it is not there."""
        key = f"servers.{self.name}"
        if self.password_env:
            if self.password_env not in os.environ:
                raise ConfigError("the variable with the password is not set", key=f"{key}.password_env",
                                  value=self.password_env, next_step=f"set {self.password_env} in the environment")
            return os.environ[self.password_env]
        assert self.password_file is not None
        try:
            if os.name == "posix" and self.password_file.stat().st_mode & 0o077:
                raise ConfigError("the password file is readable by others", key=f"{key}.password_file",
                                  value=str(self.password_file), expected="mode 0600",
                                  next_step=f"chmod 600 {self.password_file}")
            return self.password_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError("the password file cannot be read", key=f"{key}.password_file",
                              value=str(self.password_file), next_step=f"check the path: {error}") from error


class TagConfig(Section):
    """One tag of a group."""

    name: Name
    node: Annotated[NodeText, BeforeValidator(_node_text)]
    kind: TagKind = TagKind.MEASURED
    unit: str = ""
    eu_range: tuple[float, float] | None = None
    decimals: int | None = Field(default=None, ge=0, le=15)
    description: str = ""
    path: str = ""
    quality: Literal["hold", "mask", "stop"] = "mask"
    turn: float = Field(default=360.0, gt=0)
    server: str = ""

    @field_validator("eu_range")
    @classmethod
    def _range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError("[low, high] with low < high")
        return value

    def tag(self) -> Tag:
        """Return the tag as the engine knows it."""
        return Tag(self.name, self.node, self.kind, self.unit, self.eu_range, self.decimals,
                   self.description, self.path, self.quality, self.turn)


class GroupConfig(Section):
    """Tags sampled at one period; the rule of time is in `opcua_detector.frames`."""

    name: Name
    server: str
    period: DurationNs
    sampling: DurationNs | None = None
    publishing: DurationNs | None = None
    lateness: DurationNs | None = None
    max_hold: int = Field(default=20, ge=1, le=100000)
    tags: tuple[TagConfig, ...] = Field(min_length=1)

    @field_validator("period")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value < 10**6:
            raise ValueError("a period of at least '1 ms'")
        return value

    @property
    def sampling_ns(self) -> int:
        """Requested SamplingInterval: half the period, since at the period itself 15-25 % of changes are lost."""
        return self.period // 2 if self.sampling is None else self.sampling

    @property
    def publishing_ns(self) -> int:
        """Requested PublishingInterval, by default the period."""
        return self.period if self.publishing is None else self.publishing

    @property
    def lateness_ns(self) -> int:
        """How long a row waits for tags that have not reported, by default one period."""
        return self.period if self.lateness is None else self.lateness


class OutputsConfig(Section):
    """Which node takes which output; only nodes named here are ever written."""

    server: str
    base: str = ""
    signals: tuple[str, ...] | None = None
    nodes: dict[str, Annotated[str, BeforeValidator(_node_text)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> OutputsConfig:
        for i, signal in enumerate(self.signals or ()):
            _known(signal, SIGNALS, ("signals", i))
        for signal in self.nodes:
            _known(signal, SIGNALS, ("nodes", signal))
        if not self.base and not self.nodes:
            raise _Wrong("the node of the prepared result object, or the key 'nodes' (signal: NodeId)", ("base",))
        if self.base:
            try:
                _node_text(self.base)
            except ValueError as error:
                raise _Wrong(str(error), ("base",), self.base) from None
        if self.signals is not None and not self.base:
            raise _Wrong("base beside signals: they are the nodes '<base>.<signal>'", ("base",))
        return self

    def node_of(self) -> dict[str, str]:
        """Return signal -> node text for every node that may be written."""
        chosen = (self.signals if self.signals is not None else tuple(SIGNALS)) if self.base else ()
        return {signal: f"{self.base}.{signal}" for signal in chosen} | self.nodes


class CycleConfig(Section):
    """What cuts the stream of a cyclic process into parts: a monitor with a cycle gives one verdict per part."""

    tag: str
    on: Literal["change", "rising", "falling"] = "change"
    until: Literal["next", "back"] = "next"
    shortest: DurationNs | None = None
    longest: DurationNs | None = None

    # YAML 1.1 reads a bare `on` as true, and as a key too.
    @model_validator(mode="before")
    @classmethod
    def _on(cls, value: Any) -> Any:
        return {("on" if key is True else key): item for key, item in value.items()} if isinstance(value, dict) \
            else value

    @model_validator(mode="after")
    def _consistent(self) -> CycleConfig:
        if self.on == "change" and self.until == "back":
            raise _Wrong("'next': only a signal, with on: rising or on: falling, goes back", ("until",), "back")
        if self.shortest is not None and self.longest is not None and self.shortest >= self.longest:
            raise _Wrong("more than the shortest", ("longest",), _with_unit(self.longest, _UNITS_NS))
        return self


class MonitorConfig(Section):
    """A set of tags -> methods -> channels -> one fused score."""

    name: Name
    group: str
    tags: tuple[str, ...] | None = None
    methods: Methods = ({"name": "auto"},)
    windows: tuple[DurationNs, ...] = Field(default=(), max_length=4)
    state_tag: str = ""
    settling: DurationNs | None = None
    inhibit: tuple[str, ...] = ()
    maintenance: str = ""
    cycle: CycleConfig | None = None
    false_alarms_per_day: float = Field(default=1.0, gt=0, le=86400)
    on_delay: DurationNs = 0
    off_delay: DurationNs = 500 * 10**6
    severity: int = Field(default=500, ge=1, le=1000)
    model: Path | None = None
    outputs: OutputsConfig | None = None

    @field_validator("methods", mode="before")
    @classmethod
    def _methods(cls, value: Any) -> Any:
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise ValueError("a list such as [auto, {name: onnx, model: m.onnx}]")
        methods = [{"name": item} if isinstance(item, str) else item for item in value]
        for item in methods:
            if not isinstance(item, dict) or not isinstance(item.get("name"), str):
                raise ValueError("for each method its name, or a mapping with the key 'name'")
        return methods


class StoreConfig(Section):
    """The SQLite store: where, how much, how long."""

    path: Path = Path("opcua-detector.db")
    quota: Bytes = 2 * 10**9
    keep_rows: DurationNs = 30 * 86400 * 10**9
    record: bool = True
    synchronous: Literal["normal", "full"] = "normal"


class Config(Section):
    """The whole file."""

    version: Literal[1]
    servers: tuple[ServerConfig, ...] = Field(min_length=1)
    groups: tuple[GroupConfig, ...] = Field(min_length=1)
    monitors: tuple[MonitorConfig, ...] = ()
    operator_alarms_per_week: float | None = Field(default=None, gt=0, le=604800)
    store: StoreConfig = StoreConfig()
    plugins: tuple[Path, ...] = ()

    @model_validator(mode="after")
    def _references(self) -> Config:
        for key in ("servers", "groups", "monitors"):
            _unique([item.name for item in getattr(self, key)], (key,))
        servers = [s.name for s in self.servers]
        tags_of = {g.name: [t.name for t in g.tags] for g in self.groups}
        for i, group in enumerate(self.groups):
            _unique(tags_of[group.name], ("groups", i, "tags"))
            _known(group.server, servers, ("groups", i, "server"))
            for k, tag in enumerate(group.tags):
                if tag.server:
                    _known(tag.server, servers, ("groups", i, "tags", k, "server"))
        for i, monitor in enumerate(self.monitors):
            _known(monitor.group, tags_of, ("monitors", i, "group"))
            for k, name in enumerate(monitor.tags or ()):
                _known(name, tags_of[monitor.group], ("monitors", i, "tags", k))
            if monitor.state_tag:
                _known(monitor.state_tag, tags_of[monitor.group], ("monitors", i, "state_tag"))
            if monitor.settling is not None and not monitor.state_tag:
                raise _Wrong("the key 'state_tag' beside it: settling begins with a change of state",
                             ("monitors", i, "settling"), _with_unit(monitor.settling, _UNITS_NS))
            for k, name in enumerate(monitor.inhibit):
                _known(name, tags_of[monitor.group], ("monitors", i, "inhibit", k))
            if monitor.maintenance:
                _known(monitor.maintenance, tags_of[monitor.group], ("monitors", i, "maintenance"))
            if monitor.cycle:
                _known(monitor.cycle.tag, tags_of[monitor.group], ("monitors", i, "cycle", "tag"))
                for key in ("methods", "windows", "state_tag", "settling", "inhibit", "maintenance"):
                    if key in monitor.model_fields_set:
                        raise _Wrong(f"no key '{key}' beside 'cycle': parts are judged as a whole, by their own method",
                                     ("monitors", i, key))
            if monitor.outputs:
                _known(monitor.outputs.server, servers, ("monitors", i, "outputs", "server"))
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


def _unique(names: Sequence[str], at: tuple[int | str, ...]) -> None:
    for i, name in enumerate(names):
        if name in names[:i]:
            raise _Wrong("a name that is not used before", (*at, i, "name"), name)


def _known(name: str, among: Iterable[str], at: tuple[int | str, ...]) -> None:
    if name not in among:
        raise _Wrong(f"one of {', '.join(among)}", at, name)


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
        raise _yaml_error(error, file) from None  # the parser's own text quotes lines, which may hold a secret
    if root is None or not isinstance(content, dict):
        raise ConfigError("the file is empty or no mapping", file=file, expected="keys version, servers, groups",
                          next_step="start from a sample in configs/")
    _no_duplicate_keys(root, file)
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        raise _config_error(error, root, file) from None
    config = _share_budget(config)
    return _resolve_paths(config, folder) if folder else config


def monitor_of(**given: Any) -> MonitorConfig:
    """Return a monitor's config made in code, without a file.

    Raises
    ------
    ConfigError
        A key that is not known, or a value that it cannot have.
    """
    try:
        return MonitorConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError("the monitor cannot use this", key=".".join(str(part) for part in first["loc"]),
                          value=first["input"], expected=first["msg"], next_step="correct it") from None


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


def duration_ns(text: str, *, key: str) -> int:
    """Return a duration such as '2 h' in nanoseconds; ConfigError names the option `key` it was given for."""
    try:
        return _duration(text)
    except ValueError as error:
        raise ConfigError("wrong value", key=key, value=text, expected=str(error),
                          next_step="correct the option") from None


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the configuration, for editors; defaults stand there as one would type them."""
    schema = Config.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        for rule in section.get("properties", {}).values():
            if isinstance(rule.get("default"), dict) and "$ref" in rule:
                del rule["default"]  # the section states the defaults of its keys itself
            elif rule.get("type") == "string" and isinstance(rule.get("default"), int):
                units = _UNITS_BYTES if "MB" in rule["pattern"] else _UNITS_NS
                rule["default"] = _with_unit(rule["default"], units)
    return schema


def _with_unit(value: int, units: dict[str, int]) -> str:
    """Return a quantity as text, in the largest unit that leaves a whole number: 500 ms, 2 GB."""
    unit = max((u for u in units if value % units[u] == 0 and value >= units[u]), key=units.__getitem__, default="s")
    return f"{value // units[unit]} {unit}"


def _resolve_paths(config: Config, folder: Path) -> Config:
    def at(path: Path | None) -> Path | None:
        return None if path is None else folder / path

    return config.model_copy(update={
        "servers": tuple(s.model_copy(update={
            "password_file": at(s.password_file), "server_certificate": at(s.server_certificate),
            "pki": at(s.pki)}) for s in config.servers),
        "monitors": tuple(m.model_copy(update={"model": at(m.model), "methods": tuple(
            _method_paths(item, folder) for item in m.methods)}) for m in config.monitors),
        "store": config.store.model_copy(update={"path": at(config.store.path)}),
        "plugins": tuple(folder / p for p in config.plugins),
    })


def _method_paths(item: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A method's `model` is a file, except where it names one that ships with a plugin (`bundled:...`)."""
    model = item.get("model")
    if isinstance(model, str) and not model.startswith("bundled:"):
        return item | {"model": str(folder / model)}
    return item


def _yaml_error(error: Exception, file: str) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    where = f"{file}, line {mark.line + 1}, column {mark.column + 1}" if mark else file
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "a value cannot be read"
    return ConfigError(f"this is not valid YAML: {problem}", file=where, expected="YAML 1.1",
                       next_step="correct the line: mind indents, colons and quotes")


def _no_duplicate_keys(node: yaml.Node, file: str) -> None:
    for mapping in _mappings(node):
        seen: set[str] = set()
        for key, _ in mapping.value:
            if key.value in seen:
                raise ConfigError("the key stands here twice", file=f"{file}, line {key.start_mark.line + 1}",
                                  key=str(key.value), next_step="remove one of the two")
            seen.add(key.value)


def _mappings(node: yaml.Node) -> Iterator[yaml.MappingNode]:
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _mappings(value)


def _config_error(error: ValidationError, root: yaml.Node, file: str) -> ConfigError:
    """Turn the first pydantic error into ours; further ones are counted in the next step."""
    problems = [e for e in error.errors() if e["type"] != "too_short"] or list(error.errors())
    # A misspelt key is both unknown and missing: the unknown one tells more.
    first = next((e for e in problems if e["type"] == "extra_forbidden"), problems[0])
    loc = tuple(part for part in first["loc"] if not str(part).startswith("function-"))
    cause = first.get("ctx", {}).get("error")
    given = first["input"]
    if isinstance(cause, _Wrong):
        loc, given = loc + cause.at, cause.value
    line, key = _locate(root, loc)
    value = _shown(key, given)
    kind = first["type"]
    more = len(problems) - 1
    after = f" ({more} more to follow)" if more else ""
    message = str(first["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    where = f"{file}, line {line}"
    if kind == "extra_forbidden":
        allowed = _allowed_keys(loc)
        return ConfigError("unknown key", file=where, key=key, value=value, expected=allowed,
                           next_step=f"correct the spelling or remove the key{after}")
    if kind == "missing":
        return ConfigError("a key is missing", file=where, key=key, expected=f"the key '{loc[-1]}'",
                           next_step=f"add it; the samples in configs/ show each key{after}")
    return ConfigError("wrong value", file=where, key=key, value=value,
                       expected=message[0].lower() + message[1:], next_step=f"correct the value{after}")


def _shown(key: str, value: object) -> object:
    """Return what an error may show of a value: no mapping, no list, nothing secret."""
    if isinstance(value, dict | list | tuple) or re.search("passw|pwd|secret|token|credential", key, re.IGNORECASE):
        return None
    return re.sub(r"//[^/@]*@", "//...@", value) if isinstance(value, str) else value


def _locate(root: yaml.Node, loc: tuple[int | str, ...]) -> tuple[int, str]:
    """Return (line, dotted key) of a location, as deep as the file goes."""
    node, line, parts = root, root.start_mark.line + 1, []
    for part in loc:
        parts.append(f"[{part}]" if isinstance(part, int) else f".{part}")
        found: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == part:
                    found, line = value, key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = node.value[part]
            line = found.start_mark.line + 1
        if found is None:
            break
        node = found
    return line, "".join(parts).lstrip(".")


def _allowed_keys(loc: tuple[int | str, ...]) -> str:
    model: type[BaseModel] = Config
    tree: dict[str, type[BaseModel]] = {
        "servers": ServerConfig, "groups": GroupConfig, "monitors": MonitorConfig, "store": StoreConfig,
        "outputs": OutputsConfig, "cycle": CycleConfig}
    for part in loc[:-1]:
        model = TagConfig if part == "tags" and model is GroupConfig else tree.get(str(part), model)
    return "one of " + ", ".join(model.model_fields)
