"""What a support engineer needs of a machine, without a secret and without the plant's data.

Each part is text that anybody can read before it is sent. What is left out on purpose: rows, scores, comments of
operators, certificates' keys, passwords, and the file of the configuration as it stands (comments may say anything): it
is written anew from its keys.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..app import model_path
from ..config import Config
from ..errors import DetectorError
from ..model import load as load_model
from ..store import Store
from ..telemetry import Redactor
from ..telemetry.lines import last_lines, log_files
from ..telemetry.redact import hashed, passwords
from .part import part_of

PACKAGES = ("asyncua", "cryptography", "numpy", "numba", "onnxruntime", "pydantic", "PyYAML", "sqlite-utils", "typer",
            "rich", "prometheus-client")
LAST_AUDIT, LAST_RUNS = 200, 50
LOG_BYTES = 1_000_000
ASK_S = 3.0
_README = """\
Support bundle of opcua-detector {version}, made {made}.

{parts}
Passwords are taken out, user names are hashed (user-xxxxxxxx){hosts}.
Rows, scores and comments of operators are not in it.
"""


@dataclass(frozen=True)
class Bundle:
    """The parts: name -> (what it is, text); notes: what could not be had, and why."""

    parts: Mapping[str, tuple[str, str]]
    notes: tuple[str, ...]

    def write(self, target: Path, *, force: bool = False) -> None:
        """Write the bundle as a zip, for this user alone.

        Raises
        ------
        DetectorError
            There is such a file already, or it cannot be written.
        """
        if os.path.exists(target) and not force:  # unlike Path.exists, quiet about a folder that may not be entered
            raise DetectorError("there is a file of this name already", where=str(target),
                                next_step="choose another name, or add --force")
        with part_of(target) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, (_, text) in self.parts.items():
                archive.writestr(name, text)


def collect(config: Config, config_file: Path, *, redact_hosts: bool = False,
            doctor: Mapping[str, Any] | None = None) -> Bundle:
    """Collect the parts; what cannot be had is a note, never an error.

    Parameters
    ----------
    redact_hosts : hash the hosts of endpoints and this machine's name too
    doctor : what `doctor` found, to be put in
    """
    redactor = Redactor(secrets=passwords(config), names=[server.user for server in config.servers if server.user],
                        hosts=[*Redactor.hosts_of(config), socket.gethostname()] if redact_hosts else ())
    notes: list[str] = []
    found: dict[str, tuple[str, Any]] = {
        "about.json": ("versions, system, hash of the configuration", _about(config_file)),
        "config.yaml": ("the configuration, written anew from its keys", _config(config_file, notes)),
        "models.json": ("facts of the models, without arrays", _models(config, config_file)),
        "store.json": ("statistics of the store, runs and the last steps of the audit", _store(config, notes)),
    }
    if doctor is not None:
        found["doctor.json"] = ("what `doctor` found", doctor)
    found |= _live(config, notes)
    found |= _logs(config, notes)
    parts = {name: (words, _text(name, content, redactor)) for name, (words, content) in found.items()}
    listed = "".join(f"{name:<16} {words}\n" for name, (words, _) in parts.items())
    parts = {"README.txt": ("what is in here", _README.format(
        version=__version__, made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), parts=listed,
        hosts=", hosts too (host-xxxxxxxx)" if redact_hosts else "; endpoints keep their hosts"))} | parts
    _prove(parts, config)
    return Bundle(parts, tuple(redactor.text(note) for note in notes))


def _text(name: str, content: Any, redactor: Redactor) -> str:
    if isinstance(content, str):
        return redactor.text(content)
    clean = redactor.content(content)
    if name.endswith(".yaml"):
        return yaml.safe_dump(clean, sort_keys=False, allow_unicode=True, width=120)
    return json.dumps(clean, indent=1, ensure_ascii=False, default=str) + "\n"


def _prove(parts: Mapping[str, tuple[str, str]], config: Config) -> None:
    """Look once more: no bundle is better than one with a secret."""
    for name, (_, text) in parts.items():
        if any(secret in text for secret in passwords(config) if len(secret) >= 4):
            raise DetectorError("a password would stand in the bundle, so none is made", where=name,
                                next_step="report this; send the other parts by hand")


# --- the parts ---


def _about(config_file: Path) -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "version": __version__, "python": sys.version.split()[0], "platform": platform.platform(),
        "machine": platform.machine(), "cpus": os.cpu_count(), "packages": versions,
        "config": {"file": config_file.name, "sha256": hashlib.sha256(config_file.read_bytes()).hexdigest()},
    }


def _config(config_file: Path, notes: list[str]) -> Any:
    try:
        return yaml.safe_load(config_file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        notes.append(f"the configuration cannot be read: {type(error).__name__}")
        return {}


def _models(config: Config, config_file: Path) -> list[dict[str, Any]]:
    found = []
    for item in config.monitors:
        path = model_path(config_file, item)
        about: dict[str, Any] = {"monitor": item.name, "file": path.name}
        try:
            about["bytes"] = path.stat().st_size
            model = load_model(path)
            about |= {
                "model_id": model.model_id, "period_ns": model.period_ns, "methods": list(model.names),
                "tags": [{"name": tag.name, "kind": str(tag.kind), "unit": tag.unit} for tag in model.tags],
                "excluded": dict(model.excluded), "notes": list(model.calibration.notes),
                "adaptations": len(model.deltas),
                "facts": {key: value for key, value in model.facts.items() if isinstance(value, str | int | bool)},
            }
        except (DetectorError, OSError) as error:
            about["problem"] = error.what if isinstance(error, DetectorError) else str(error.strerror)
        found.append(about)
    return found


def _store(config: Config, notes: list[str]) -> dict[str, Any]:
    """Return counts and times of the store; names of people are hashed, what they wrote is left out."""
    try:
        with Store.open(config.store.path, readonly=True) as store:
            events = store.events()
            return {
                "usage": asdict(store.usage()),
                "recordings": [{"name": one.name, "rows": one.rows, "tags": len(one.tags), "period_ns": one.period_ns,
                                "first_ns": one.first_ns, "last_ns": one.last_ns, "ended": one.ended_ns is not None,
                                "thinned": one.thinned} for one in store.recordings()],
                "runs": [asdict(one) for one in store.runs()[-LAST_RUNS:]],
                "alerts": dict(Counter(one.monitor for one in events)),
                "standing": [one.monitor for one in events if one.cleared_ns is None],
                "feedback": dict(Counter(one.label for one in store.feedback())),
                "audit": [{"at_ns": one.at_ns, "who": _who(one.who), "action": one.action}
                          for one in store.audit(limit=LAST_AUDIT)],
            }
    except DetectorError as error:
        notes.append(f"the store cannot be read: {error.what}")
        return {"problem": error.what}


def _who(name: str) -> str:
    """Return who did something: parts of the product by name, people hashed."""
    return name if name in ("service", "store", "fit", "restore") else f"user-{hashed(name)}"


def _live(config: Config, notes: list[str]) -> dict[str, tuple[str, Any]]:
    """Ask a service that runs, where it listens, for its metrics and health."""
    if config.metrics is None or config.metrics.port == 0:
        return {}
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.metrics.host, config.metrics.host)
    address = f"http://{f'[{host}]' if ':' in host else host}:{config.metrics.port}"
    found: dict[str, tuple[str, Any]] = {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the machine itself, never a proxy
    for path, name, words in (("/metrics", "metrics.txt", "counters of the running service"),
                              ("/health", "health.json", "whether its loop turns"),
                              ("/ready", "ready.json", "whether it does its work")):
        try:
            with opener.open(address + path, timeout=ASK_S) as answer:
                found[name] = (words, answer.read(4_000_000).decode("utf-8", "replace"))
        except urllib.error.HTTPError as error:  # 503 tells its reasons
            found[name] = (words, error.read(1_000_000).decode("utf-8", "replace"))
        except (OSError, ValueError) as error:
            notes.append(f"no service answers at {address}: {error}")
            return found
    return found


def _logs(config: Config, notes: list[str]) -> dict[str, tuple[str, Any]]:
    if config.log.file is None:
        notes.append("no log file is configured (log.file); with systemd: journalctl -u opcua-detector")
        return {}
    found: dict[str, tuple[str, Any]] = {}
    left = LOG_BYTES
    for file in log_files(config.log.file):
        text = last_lines(file, left)
        if text:
            found[f"logs/{re.sub(r'[^A-Za-z0-9_.-]', '_', file.name)}"] = ("the last lines of the log", text)
        left -= len(text.encode())
        if left <= 0:
            break
    if not found:
        notes.append(f"the log file {config.log.file} is not there")
    return found
