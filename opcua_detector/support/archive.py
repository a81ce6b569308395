"""Backup and restore of configuration, models and store, as one zip with a manifest.

    manifest.json      format, version, and of each file role, size and SHA-256
    config.yaml        the configuration, as it stands
    models/<name>.npz  one per monitor that has been fitted
    store.db           the store at one moment, copied while it may be written
    methods/<n>-...    model files that methods of the configuration name (ONNX), which a new fit needs
    pki/<server>/...   on request: own certificate and key, trust list

A name in the archive never becomes a path: where a file goes is read from the restored configuration, and what would
lie outside of the chosen folder must be asked for. Everything is unpacked and checked beside its place first; only then
are files renamed into place.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from .. import __version__
from .. import config as configuration
from ..app import model_path
from ..config import Config
from ..errors import ConfigError, DetectorError
from ..model import load as load_model
from ..store import AuditEntry, Store
from ..store.backup import aside, check_copy, copy_store
from .part import part_of

FORMAT = 1
MANIFEST, CONFIG, STORE = "manifest.json", "config.yaml", "store.db"
MOST_MANIFEST_BYTES = 1_000_000
_CHUNK = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\- ]*(?:/[A-Za-z0-9_][A-Za-z0-9_.\- ]*){0,3}")
_AGAIN = "use another backup; nothing was changed"


@dataclass(frozen=True)
class Backup:
    """What a backup holds: name in the archive -> (role, bytes); left_out: what it does not, in words."""

    file: Path
    files: Mapping[str, tuple[str, int]]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Restored:
    """What was put where, and what was set aside for it (old -> new name)."""

    placed: Mapping[str, Path]
    set_aside: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


# --- where things belong ---


def _places(config: Config, config_file: Path, *, keys: bool) -> dict[str, tuple[str, Path]]:
    """Return name in the archive -> (role, path) for all that a configuration names, whether it is there or not."""
    found = {CONFIG: ("config", config_file), STORE: ("store", config.store.path)}
    n = 0
    for monitor in config.monitors:
        found[f"models/{monitor.name}.npz"] = ("model", model_path(config_file, monitor))
        for item in monitor.methods:
            named = item.get("model")
            if isinstance(named, str) and not named.startswith("bundled:"):
                n += 1
                found[f"methods/{n}-{_safe(Path(named).name)}"] = ("method", Path(named))
    if keys:
        for server in config.servers:
            for path in sorted(server.pki.rglob("*")) if server.pki.is_dir() else ():
                parts = path.relative_to(server.pki).parts
                if path.is_file() and not any(part.startswith(".") for part in parts) and parts[0] != "rejected":
                    found[f"pki/{server.name}/{'/'.join(parts)}"] = ("pki", path)
    return found


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.\-]", "_", name).lstrip(".-") or "model"


# --- backup ---


def back_up(config_file: Path, target: Path, *, keys: bool = False, force: bool = False,
            progress: Callable[[str], None] = lambda _: None) -> Backup:
    """Write a backup; the service may run meanwhile.

    Parameters
    ----------
    keys : with this client's certificate, its private key and the trust list
    force : replace a file that is there

    Raises
    ------
    DetectorError
        ConfigError, StoreError, or a file that cannot be read or written; an older backup stays as it was.
    """
    config = configuration.load(config_file)
    if target.exists() and not force:
        raise ConfigError("there is a file of this name already", key="--out", value=str(target),
                          next_step="choose another name, or add --force")
    listed: list[dict[str, Any]] = []
    left_out = [] if keys else ["this client's certificate and key, and the trust list (--with-keys)"]
    left_out += [f"{file}: a secret" for server in config.servers
                 for file in (server.password_file, server.user_key) if file]
    with part_of(target) as part:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            for name, (role, path) in _places(config, config_file, keys=keys).items():
                if not path.exists():
                    left_out.append(f"{role} {path}: not there")
                    continue
                progress(name)
                entry: dict[str, Any] = {"name": name, "role": role, "file": path.name}
                if role == "store":
                    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".backup-") as folder:
                        copy = Path(folder) / STORE
                        entry["schema"] = copy_store(path, copy)
                        entry |= _add(archive, name, copy)
                else:
                    entry |= _add(archive, name, path)
                listed.append(entry)
            if not any(one["role"] == "config" for one in listed):
                raise ConfigError("the configuration file is gone", file=str(config_file), next_step="check the path")
            archive.writestr(MANIFEST, json.dumps({
                "format": FORMAT, "kind": "opcua-detector backup", "version": __version__,
                "made": datetime.now(UTC).isoformat(timespec="seconds"), "files": listed}, indent=1))
        _prove(part)
    return Backup(target, {one["name"]: (one["role"], one["bytes"]) for one in listed}, tuple(left_out))


def _add(archive: zipfile.ZipFile, name: str, path: Path) -> dict[str, Any]:
    """Copy a file into the archive; what is hashed is what was copied, even if the file changes meanwhile."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as source, archive.open(name, "w", force_zip64=True) as out:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            size += out.write(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _prove(part: Path) -> None:
    """Read the archive through as a restore would: a backup that cannot be read is none."""
    with zipfile.ZipFile(part) as archive:
        for one in _manifest(archive, part)["files"]:
            _copy(archive, one, None, part)


# --- restore ---


def restore(archive_file: Path, folder: Path, *, force: bool = False, outside: bool = False,
            progress: Callable[[str], None] = lambda _: None) -> Restored:
    """Put a backup back: the configuration into `folder`, all else where that configuration says.

    Parameters
    ----------
    force : set aside what stands there already (it is renamed, not deleted)
    outside : allow places outside of the folder, which an absolute path in the configuration may name

    Raises
    ------
    DetectorError
        The archive is damaged, altered or of a newer version, a place is taken, or a service runs on the store;
        nothing was changed then.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(archive_file) as archive, tempfile.TemporaryDirectory(
                dir=folder, prefix=".restore-") as scratch:
            return _restore(archive, archive_file, folder.resolve(), Path(scratch), force=force, outside=outside,
                            progress=progress)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise _damaged(archive_file, f"it cannot be read as a zip ({error})") from error
    except OSError as error:
        raise DetectorError(f"cannot be read or written: {error.strerror or error}",
                            where=str(error.filename or archive_file), next_step="check path, rights and free space"
                            ) from error


def _restore(archive: zipfile.ZipFile, file: Path, folder: Path, scratch: Path, *, force: bool, outside: bool,
             progress: Callable[[str], None]) -> Restored:
    manifest = _manifest(archive, file)
    notes = []
    if manifest["version"] != __version__:
        notes.append(f"made by version {manifest['version']}, this is {__version__}")
    unpacked: dict[str, Path] = {}
    for i, one in enumerate(manifest["files"]):
        progress(f"checking {one['name']}")
        unpacked[one["name"]] = scratch / f"{i}"
        _copy(archive, one, unpacked[one["name"]], file)
    roles = {one["name"]: one for one in manifest["files"]}
    if CONFIG not in roles:
        raise _damaged(file, "it holds no configuration")
    config_file = folder / _plain_name(str(roles[CONFIG].get("file", CONFIG)))
    config = configuration.parse(unpacked[CONFIG].read_text(encoding="utf-8"), file=f"{file}: {CONFIG}", folder=folder)
    places = _destinations(config, config_file, roles, file)
    _check_content(unpacked, roles, file)
    moves = {name: places[name] for name in unpacked}
    _check_places(moves, folder, force=force, outside=outside)
    return _place(unpacked, moves, file, notes)


def _destinations(config: Config, config_file: Path, roles: Mapping[str, Any], file: Path) -> dict[str, Path]:
    """Return where each file of the archive belongs, by the configuration in it."""
    known = {name: path for name, (_, path) in _places(config, config_file, keys=False).items()}
    pki = {server.name: server.pki for server in config.servers}
    for name in roles:
        parts = name.split("/")
        if parts[0] == "pki" and len(parts) > 2 and parts[1] in pki:
            known[name] = pki[parts[1]].joinpath(*parts[2:])
        elif name not in known:
            raise _damaged(file, f"its configuration knows nothing of {name}")
    return known


def _check_content(unpacked: Mapping[str, Path], roles: Mapping[str, Any], file: Path) -> None:
    """Open models and store as the service would; what does not open here would not open there."""
    for name, path in unpacked.items():
        try:
            if roles[name]["role"] == "model":
                load_model(path)
            elif roles[name]["role"] == "store":
                check_copy(path)
        except DetectorError as error:
            raise type(error)(error.what, where=f"{file}: {name}", next_step=_AGAIN if "newer" not in error.what else
                              "install the version that made it, or a newer one; nothing was changed") from error


def _check_places(moves: Mapping[str, Path], folder: Path, *, force: bool, outside: bool) -> None:
    for name, path in moves.items():
        inside = path.resolve().is_relative_to(folder)
        if not inside and not outside:
            raise ConfigError("the configuration in the backup names a place outside of the folder", key=name,
                              value=str(path), next_step="look at it, then add --outside; or restore to the folder "
                              "where it was")
        if path.exists() and not force:
            raise ConfigError("something stands there already", key=name, value=str(path),
                              next_step="choose another folder, or add --force: it is renamed then, not deleted")
        if path.is_dir():
            raise ConfigError("a folder stands there", key=name, value=str(path), next_step="move it away")
    taken = [path.resolve() for path in moves.values()]
    if len(set(taken)) != len(taken):
        raise ConfigError("two files of the backup belong to the same place", key="config.yaml",
                          next_step="correct the configuration that was backed up")


def _place(unpacked: Mapping[str, Path], moves: Mapping[str, Path], file: Path, notes: list[str]) -> Restored:
    """Move the files into place, the store first: where a service runs on it, nothing is changed; all or nothing."""
    suffix = f".before-restore-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    old: dict[Path, Path] = {}
    placed: list[Path] = []
    try:
        for name in sorted(moves, key=lambda name: name != STORE):
            path = moves[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            if name == STORE:
                beside = aside(path, suffix)
                old |= {path.with_name(one.name.replace(suffix, "", 1)): one for one in beside}
            elif path.exists():
                old[path] = path.rename(path.with_name(path.name + suffix))
            shutil.move(unpacked[name], path)
            placed.append(path)
            if name.startswith("pki/"):
                path.chmod(0o600)
        if STORE in moves:
            with Store.open(moves[STORE]) as store:
                store.record_audit(AuditEntry("restore", "restored from a backup", {"backup": file.name}))
    except BaseException:
        for path in placed:
            path.unlink(missing_ok=True)
        for path, renamed in old.items():
            renamed.replace(path)
        raise
    return Restored({name: moves[name] for name in unpacked}, {str(path): one for path, one in old.items()},
                    tuple(notes))


# --- the archive itself ---


def _manifest(archive: zipfile.ZipFile, file: Path) -> dict[str, Any]:
    """Return the manifest after checking it against what is in the archive."""
    members = archive.infolist()
    names = [one.filename for one in members]
    if MANIFEST not in names or archive.getinfo(MANIFEST).file_size > MOST_MANIFEST_BYTES:
        raise _damaged(file, "it is no backup: there is no manifest")
    try:
        manifest = json.loads(archive.read(MANIFEST))
        files = [_Listed(**{key: one[key] for key in ("name", "role", "bytes", "sha256")}) for one in manifest["files"]]
        form, version = int(manifest["format"]), str(manifest["version"])
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise _damaged(file, f"its manifest cannot be read ({error})") from error
    if form > FORMAT:
        raise DetectorError(f"the backup has format {form}, this program knows up to {FORMAT}", where=str(file),
                            next_step=f"install version {version} or newer")
    if len(set(names)) != len(names) or set(names) != {MANIFEST, *(one.name for one in files)}:
        raise _damaged(file, "what it holds is not what its manifest lists")
    for one in files:
        if not _NAME.fullmatch(one.name) or ".." in one.name:
            raise _damaged(file, f"{one.name!r} is no name that a backup has")
        if archive.getinfo(one.name).file_size != one.bytes:
            raise _damaged(file, f"{one.name} has another size than the manifest says")
    return {"version": version, "files": [asdict(one) | {"file": given.get("file", "")} for one, given in zip(
        files, manifest["files"], strict=True)]}


@dataclass(frozen=True)
class _Listed:
    name: str
    role: str
    bytes: int
    sha256: str


def _copy(archive: zipfile.ZipFile, one: Mapping[str, Any], target: Path | None, file: Path) -> None:
    """Unpack one file (None: read it only) and compare size and SHA-256; never more bytes than the manifest says."""
    digest, size = hashlib.sha256(), 0
    out: BinaryIO | None = target.open("xb") if target is not None else None
    try:
        with archive.open(one["name"]) as source:
            while chunk := source.read(_CHUNK):
                size += len(chunk)
                if size > one["bytes"]:
                    break
                digest.update(chunk)
                if out is not None:
                    out.write(chunk)
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise _damaged(file, f"{one['name']} cannot be unpacked ({error})") from error
    except Exception as error:  # zlib and lzma have errors of their own
        if isinstance(error, OSError):
            raise
        raise _damaged(file, f"{one['name']} cannot be unpacked ({error})") from error
    finally:
        if out is not None:
            out.close()
    if size != one["bytes"] or digest.hexdigest() != one["sha256"]:
        raise _damaged(file, f"{one['name']} is not what was backed up: its SHA-256 does not fit")


def _plain_name(name: str) -> str:
    """Return a file name without any path in it."""
    return _safe(re.split(r"[/\\]", name)[-1])


def _damaged(file: Path, what: str) -> DetectorError:
    return DetectorError(f"the backup is damaged: {what}", where=str(file), next_step=_AGAIN)
