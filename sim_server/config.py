"""Settings of the simulated plant: one YAML file, checked; every error names file, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sim_server.errors import ConfigError, QuirkError
from sim_server.faults import FaultEntry, FaultScript, first_problem, read_yaml
from sim_server.plant import tag_table
from sim_server.processes import model
from sim_server.quirks import Reporter

_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})

_STRICT = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

_Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class QuirkEntry(BaseModel):
    """One bad habit of the server.

    Attributes
    ----------
    tag
        Name of a tag, ``measured`` (all measured tags) or ``*`` (all tags).
    quirk, value
        See `sim_server.quirks.QUIRKS`.
    from_s, to_s
        Seconds since the first live row, written ``from`` and ``to``; without ``from`` the quirk is in
        the preloaded history too, without ``to`` it stays.
    """

    model_config = _STRICT

    tag: str = "measured"
    quirk: str
    value: Annotated[float, Field(allow_inf_nan=False)]
    from_s: Annotated[_Seconds | None, Field(alias="from")] = None
    to_s: Annotated[_Seconds | None, Field(alias="to")] = None


class User(BaseModel):
    """A named account; the password is compared as it stands here, so keep real ones out."""

    model_config = _STRICT

    name: Annotated[str, Field(min_length=1)]
    password: Annotated[str, Field(min_length=1, repr=False)]


class SimConfig(BaseModel):
    """Every knob of the simulated plant; the defaults make a clean, healthy Lorenz plant.

    Attributes
    ----------
    process
        ``lorenz``, ``throttle`` or ``press``.
    seed
        Seed of every random choice.
    noise
        White measurement noise, fraction of each tag's healthy standard deviation.
    speed
        Simulated seconds per second; SourceTimestamps are simulated time.
    history_rows, live_history_rows
        Healthy rows before the first live row, and how many live rows the historian keeps beside them.
    history_page_rows
        Values in one HistoryRead response at most; the rest follows by continuation point.
    warmup_rows
        Rows simulated and thrown away before the history begins.
    total_rollover
        The totaliser restarts at 0 when it reaches this value; 0 is never.
    host, port
        Address to bind; port 0 takes a free one.
    anonymous
        Whether sessions without a user are let in; None lets them in on a loopback address only.
    users
        Named accounts.
    pki_dir
        Where the server's certificate is kept; None makes a new one for this run only.
    certificate, private_key
        Files of a pair (DER, PEM) that is used as it is, however wrong or expired, in place of one from ``pki_dir``.
    nodesets
        NodeSet2 files to load; None loads ``results.NodeSet2.xml`` beside this module if it is there.
    namespaces_before
        Namespaces registered before the plant's own, which shifts all namespace indexes.
    refuse_write_timestamps
        True answers BadWriteNotSupported to a write of a result node that carries a timestamp, as many
        PLCs do.
    faults
        The fault script.
    quirks
        The server's bad habits.
    """

    model_config = _STRICT

    process: Literal["lorenz", "throttle", "press"] = "lorenz"
    seed: Annotated[int, Field(ge=0)] = 0
    noise: Annotated[float, Field(ge=0.0, le=10.0, allow_inf_nan=False)] = 0.0
    speed: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.0
    history_rows: Annotated[int, Field(ge=0, le=5_000_000)] = 40_000
    live_history_rows: Annotated[int, Field(ge=0, le=5_000_000)] = 100_000
    history_page_rows: Annotated[int, Field(ge=1, le=100_000)] = 5_000
    warmup_rows: Annotated[int, Field(ge=0)] = 2_000
    total_rollover: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 0
    anonymous: bool | None = None
    users: tuple[User, ...] = ()
    pki_dir: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    nodesets: tuple[Path, ...] | None = None
    namespaces_before: tuple[str, ...] = ()
    refuse_write_timestamps: bool = False
    faults: tuple[FaultEntry, ...] = ()
    quirks: tuple[QuirkEntry, ...] = ()


def parse_config(content: Any, file: str = "<config>") -> SimConfig:
    """Check the parsed content of a settings file.

    Raises
    ------
    ConfigError
        Unknown key, wrong type, value out of range, unknown parameter, tag or quirk.
    """
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(file, "", content, "keys with values at the top of the file")
    try:
        config = SimConfig.model_validate(content)
    except ValidationError as error:
        raise first_problem(error, file) from error
    build_script(config, file)
    build_reporter(config, file)
    return config


def load_config(path: Path, overrides: Mapping[str, Any] = _NOTHING) -> SimConfig:
    """Read and check a settings file; relative paths in it count from its own folder.

    Parameters
    ----------
    path
        The YAML file.
    overrides
        Keys that win over the file, before anything is checked.

    Raises
    ------
    ConfigError
        See `parse_config` and `sim_server.faults.read_yaml`.
    """
    content = read_yaml(path)
    if content is None:
        content = {}
    if isinstance(content, dict):
        content = {**content, **overrides}
    config = parse_config(content, str(path))
    folder = path.resolve().parent
    changes: dict[str, Any] = {}
    if config.pki_dir is not None and "pki_dir" not in overrides:
        changes["pki_dir"] = folder / config.pki_dir
    for name in ("certificate", "private_key"):
        file = getattr(config, name)
        if file is not None and name not in overrides:
            changes[name] = folder / file
    if config.nodesets is not None and "nodesets" not in overrides:
        changes["nodesets"] = tuple(folder / one for one in config.nodesets)
    return config.model_copy(update=changes)


def build_script(config: SimConfig, file: str = "<config>") -> FaultScript:
    """Return the checked fault script of a config.

    Raises
    ------
    ConfigError
        See `FaultScript`; the key begins with ``faults``.
    """
    try:
        return FaultScript(config.faults, model(config.process), file)
    except ConfigError as error:
        raise ConfigError(file, f"faults.{error.key}", error.value, error.expected) from error


def build_reporter(config: SimConfig, file: str = "<config>") -> Reporter:
    """Return a reporter with the quirks of a config; its rows count from the first live row.

    Raises
    ------
    ConfigError
        Unknown tag or quirk, a value out of range, or an interval that ends before it begins.
    """
    one = model(config.process)
    reporter = Reporter(tag_table(one), one.period_ns, config.seed)
    per_s = 1e9 / one.period_ns
    for number, entry in enumerate(config.quirks):
        if entry.to_s is not None and entry.to_s <= (entry.from_s or 0.0):
            raise ConfigError(file, f"quirks.{number}.to", entry.to_s, f"more than {entry.from_s or 0.0} s")
        start = None if entry.from_s is None else round(entry.from_s * per_s)
        stop = None if entry.to_s is None else round(entry.to_s * per_s)
        try:
            reporter.set_quirk(entry.tag, entry.quirk, entry.value, start, stop)
        except QuirkError as error:
            raise ConfigError(file, f"quirks.{number}.{error.key}", error.value, error.expected) from error
    return reporter
