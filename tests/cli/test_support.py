"""Support bundles, backups and restores, beside a running service; and archives that somebody has spoilt."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import socket
import sqlite3
import stat
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import cli, content, wait_for, write

from cli.conftest import PASSWORD, USER, Fitted
from opcua_detector import __version__
from opcua_detector.cli import support
from opcua_detector.config import load
from opcua_detector.errors import DetectorError, StoreError
from opcua_detector.model import load as load_model
from opcua_detector.service import Service
from opcua_detector.store import MIGRATIONS, AuditEntry, FeedbackEntry, Store
from opcua_detector.store.backup import check_copy, copy_store
from opcua_detector.support import bundle, collect
from sim_server.testing import RunningPlant

SECRET_COMMENT = "Mr Smith says it is the pump again"


@contextmanager
def service(file: Path) -> Iterator[None]:
    """The service in a thread of its own for a while: it records, scores and writes its store."""
    config, stop, up = load(file), asyncio.Event(), threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []
    failed: list[BaseException] = []

    async def live() -> None:
        loops.append(asyncio.get_running_loop())
        one = Service(config, file)
        try:
            await one.start()
            while not one.runs["lorenz"].scored:
                await asyncio.sleep(0.05)
            up.set()
            await stop.wait()
        finally:
            await one.stop()

    def run() -> None:
        try:
            asyncio.run(live())
        except BaseException as error:
            failed.append(error)
        finally:
            up.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert up.wait(90) and not failed, failed
        yield
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(30)
    assert not failed, failed


@pytest.fixture
def fitted_with_store(fitted: Fitted) -> Fitted:
    """A fitted monitor with feedback and audit in its store."""
    with Store.open(load(fitted.file).store.path) as store:
        store.record_feedback(FeedbackEntry("miller", "false alarm", "lorenz", comment=SECRET_COMMENT))
        store.record_audit(AuditEntry("miller", "looked at it", {"comment": SECRET_COMMENT}))
    return fitted


def recorded(file: Path) -> int:
    """Return how many rows the store of a configuration holds."""
    with Store.open(load(file).store.path, readonly=True) as store:
        return sum(one.rows for one in store.recordings())


def backed_up(fitted: Fitted, *options: object) -> Path:
    """Return a backup of a fitted monitor."""
    file = fitted.folder.parent / "backup.zip"
    ran = cli("backup", fitted.file, "--out", file, "--force", *options, "--json")
    assert ran.code == 0, ran.err
    return file


# --- backup and restore ---


def test_a_backup_of_a_running_service_is_whole_and_restores_elsewhere(
    plant: RunningPlant, fitted_with_store: Fitted, tmp_path: Path,
) -> None:
    fitted = fitted_with_store
    with service(fitted.file):
        wait_for(lambda: recorded(fitted.file), "rows in the store")
        file = tmp_path / "live.zip"
        ran = cli("backup", fitted.file, "--out", file, "--json")
        assert ran.code == 0, ran.err
        assert {one["name"] for one in ran.json["files"]} == {"config.yaml", "models/lorenz.npz", "store.db"}
        assert any("--with-keys" in text for text in ran.json["left_out"])
        if os.name == "posix":
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
        taken = cli("restore", file, "--to", fitted.folder, "--force", "--json")
        assert taken.code == 5 and "another process writes to this store" in taken.err  # and nothing was moved
        assert fitted.model.exists() and not list(fitted.folder.rglob("*before-restore*"))
    target = tmp_path / "elsewhere"
    ran = cli("restore", file, "--to", target, "--json")
    assert ran.code == 0, ran.err
    assert (target / "plant.yaml").read_bytes() == fitted.file.read_bytes()
    assert load_model(target / "models" / "lorenz.npz").model_id == load_model(fitted.model).model_id
    config = load(target / "plant.yaml")
    assert config.store.path.parent == target
    assert recorded(target / "plant.yaml") > 0
    with Store.open(config.store.path, readonly=True) as store:
        store.verify()
        assert [one.who for one in store.feedback()] == ["miller"]
        assert store.audit("restored from a backup")[-1].detail == {"backup": "live.zip"}
    with service(target / "plant.yaml"):
        pass  # it runs from there
    assert not list(target.glob(".restore-*"))


def test_what_stands_there_is_only_replaced_with_force_and_never_deleted(fitted_with_store: Fitted) -> None:
    fitted = fitted_with_store
    file = backed_up(fitted)
    before = fitted.model.read_bytes()
    ran = cli("restore", file, "--to", fitted.folder, "--json")
    assert ran.code == 2 and "--force" in ran.err and "stands there already" in ran.err
    wal = Path(f"{load(fitted.file).store.path}-wal")
    wal.write_bytes(b"of another life")
    fitted.model.write_bytes(b"spoilt")
    ran = cli("restore", file, "--to", fitted.folder, "--force", "--json")
    assert ran.code == 0, ran.err
    assert fitted.model.read_bytes() == before
    renamed = {Path(new).name for new in ran.json["set_aside"].values()}
    assert len(renamed) >= 4 and any(name.endswith("-wal") for name in renamed)  # no log of the old beside the new
    (spoilt,) = fitted.model.parent.glob("*before-restore*")
    assert spoilt.read_bytes() == b"spoilt"
    with Store.open(load(fitted.file).store.path, readonly=True) as store:
        store.verify()


def test_a_place_outside_of_the_folder_must_be_asked_for(fitted_with_store: Fitted, tmp_path: Path) -> None:
    fitted = fitted_with_store
    away = tmp_path / "var" / "detector.db"
    away.parent.mkdir()
    given = yaml.safe_load(fitted.file.read_text(encoding="utf-8"))
    shutil.copy(load(fitted.file).store.path, away)
    fitted.file.write_text(yaml.safe_dump(given | {"store": {"path": str(away)}}), encoding="utf-8")
    file = backed_up(fitted)
    away.unlink()
    target = tmp_path / "new"
    ran = cli("restore", file, "--to", target, "--json")
    assert ran.code == 2 and str(away) in ran.err and "--outside" in ran.err
    assert not away.exists() and not (target / "plant.yaml").exists()
    ran = cli("restore", file, "--to", target, "--outside", "--json")
    assert ran.code == 0 and away.exists() and (target / "plant.yaml").exists()


def test_keys_travel_only_when_asked_and_come_back_for_this_user_alone(fitted: Fitted, tmp_path: Path) -> None:
    own = fitted.folder / "pki" / "own"
    own.mkdir(parents=True)
    (own / "opcua-detector.key.pem").write_text("a key", encoding="utf-8")
    (fitted.folder / "pki" / "rejected").mkdir()
    (fitted.folder / "pki" / "rejected" / "x.der").write_bytes(b"x")
    with zipfile.ZipFile(backed_up(fitted)) as archive:
        assert not any(name.startswith("pki/") for name in archive.namelist())
    file = backed_up(fitted, "--with-keys")
    assert cli("restore", file, "--to", tmp_path / "new", "--json").code == 0
    key = tmp_path / "new" / "pki" / "own" / "opcua-detector.key.pem"
    assert key.read_text(encoding="utf-8") == "a key"
    if os.name == "posix":
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert not (tmp_path / "new" / "pki" / "rejected").exists()


def test_without_models_and_store_the_configuration_alone_is_backed_up(plant: RunningPlant, tmp_path: Path) -> None:
    file = write(tmp_path, content(plant.endpoint))
    ran = cli("backup", file, "--out", tmp_path / "b.zip", "--json")
    assert ran.code == 0 and [one["name"] for one in ran.json["files"]] == ["config.yaml"]
    assert sum("not there" in text for text in ran.json["left_out"]) == 2
    again = cli("backup", file, "--out", tmp_path / "b.zip", "--json")
    assert again.code == 2 and "--force" in again.err
    unwritable = cli("backup", file, "--out", tmp_path / "nowhere" / "b.zip", "--json")
    assert unwritable.code == 1 and "check folder" in unwritable.err


# --- archives that are not as `backup` made them ---


def rewritten(file: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """Return a copy of an archive with other content."""
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    change(parts)
    target = file.with_name("spoilt.zip")
    with zipfile.ZipFile(target, "w") as archive:
        for name, content_ in parts.items():
            archive.writestr(name, content_)
    return target


def listed(parts: dict[str, bytes], change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest."""
    manifest = json.loads(parts["manifest.json"])
    change(manifest)
    parts["manifest.json"] = json.dumps(manifest).encode()


def put(parts: dict[str, bytes], name: str, data: bytes, role: str = "model") -> None:
    """Put a file in, and into the manifest, as a careful attacker would."""
    parts[name] = data
    listed(parts, lambda manifest: manifest["files"].append({
        "name": name, "role": role, "file": "x", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}))


def replaced(parts: dict[str, bytes], name: str, data: bytes) -> None:
    """Replace a file, and what the manifest says of it."""
    parts[name] = data

    def change(manifest: dict[str, Any]) -> None:
        for one in manifest["files"]:
            if one["name"] == name:
                one |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    listed(parts, change)


def flipped(parts: dict[str, bytes]) -> None:
    data = bytearray(parts["models/lorenz.npz"])
    data[len(data) // 2] ^= 1
    parts["models/lorenz.npz"] = bytes(data)


SPOILT: dict[str, tuple[Callable[[dict[str, bytes]], Any], str]] = {
    "a bit flipped": (flipped, "SHA-256 does not fit"),
    "a file too few": (lambda parts: parts.pop("models/lorenz.npz"), "not what its manifest lists"),
    "a file too many": (lambda parts: parts.update(extra=b""), "not what its manifest lists"),
    "no manifest": (lambda parts: parts.pop("manifest.json"), "no manifest"),
    "no JSON": (lambda parts: parts.update({"manifest.json": b"{"}), "manifest cannot be read"),
    "wrong types": (lambda parts: listed(parts, lambda m: m.update(files=7)), "manifest cannot be read"),
    "another size": (lambda parts: listed(parts, lambda m: m["files"][0].update(bytes=3)), "another size"),
    "a newer format": (lambda parts: listed(parts, lambda m: m.update(format=99)), "has format 99"),
    "up and away": (lambda parts: put(parts, "../evil.npz", b"x"), "no name that a backup has"),
    "deep up": (lambda parts: put(parts, "pki/plant/../../evil", b"x"), "no name that a backup has"),
    "an absolute path": (lambda parts: put(parts, "/tmp/evil", b"x"), "no name that a backup has"),
    "a drive": (lambda parts: put(parts, "C:\\evil", b"x"), "no name that a backup has"),
    "a hidden file": (lambda parts: put(parts, "pki/plant/.bashrc", b"x"), "no name that a backup has"),
    "unknown to the configuration": (lambda parts: put(parts, "models/other.npz", b"x"), "knows nothing of"),
    "no model": (lambda parts: replaced(parts, "models/lorenz.npz", b"PK nothing"), "no model"),
    "no database": (lambda parts: replaced(parts, "store.db", b"SQLite format 3\0" + b"x" * 500), "damaged"),
    "no configuration": (lambda parts: replaced(parts, "config.yaml", b"version: 1\n"), "config.yaml"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_damaged_or_hostile_archive_changes_nothing(how: str, fitted_with_store: Fitted, tmp_path: Path) -> None:
    change, words = SPOILT[how]
    file = rewritten(backed_up(fitted_with_store), change)
    target = tmp_path / "new"
    ran = cli("restore", file, "--to", target, "--outside", "--force", "--json")
    assert ran.code in (1, 2, 4, 5), ran.out
    assert words in ran.err, ran.err
    assert ran.json["error"]["next_step"]
    assert not [path for path in target.rglob("*") if path.is_file()]
    assert not (tmp_path / "evil.npz").exists() and not Path("/tmp/evil").exists()


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_a_truncated_archive_is_refused(keep: int, fitted_with_store: Fitted, tmp_path: Path) -> None:
    file = backed_up(fitted_with_store)
    file.write_bytes(file.read_bytes()[:keep])
    ran = cli("restore", file, "--to", tmp_path / "new", "--json")
    assert ran.code == 1 and "damaged" in ran.err and "another backup" in ran.err


def test_a_store_of_a_newer_schema_is_refused(fitted_with_store: Fitted, tmp_path: Path) -> None:
    copy = tmp_path / "newer.db"
    assert copy_store(load(fitted_with_store.file).store.path, copy) == MIGRATIONS[-1].version
    with sqlite3.connect(copy) as db:
        db.execute(f"PRAGMA user_version = {MIGRATIONS[-1].version + 1}")
    file = rewritten(backed_up(fitted_with_store), lambda parts: replaced(parts, "store.db", copy.read_bytes()))
    ran = cli("restore", file, "--to", tmp_path / "new", "--json")
    assert ran.code == 5 and "schema version" in ran.err
    with pytest.raises(StoreError, match="empty"):
        sqlite3.connect(tmp_path / "empty.db").execute("VACUUM").connection.close()
        check_copy(tmp_path / "empty.db")


def test_a_copy_of_a_store_that_is_being_written_is_one_moment_of_it(tmp_path: Path) -> None:
    with Store.open(tmp_path / "live.db") as store:
        done = threading.Event()

        def keep_writing() -> None:
            n = 0
            while not done.is_set():
                store.record_audit(AuditEntry("test", "step", {"n": n}))
                n += 1

        writer = threading.Thread(target=keep_writing)
        writer.start()
        try:
            wait_for(lambda: len(store.audit("step")) > 5, "entries")
            for i in range(5):
                copy_store(tmp_path / "live.db", tmp_path / f"copy{i}.db")
        finally:
            done.set()
            writer.join()
        for i in range(5):
            assert check_copy(tmp_path / f"copy{i}.db") == MIGRATIONS[-1].version
            with Store.open(tmp_path / f"copy{i}.db", readonly=True) as copy:
                steps = [one.detail["n"] for one in copy.audit("step")]
                assert len(steps) > 5 and sorted(steps) == list(range(len(steps)))


# --- support bundle ---


def test_a_bundle_of_a_running_service_holds_facts_and_no_secret(
    plant: RunningPlant, fitted_with_store: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SUPPORT_TEST_PASSWORD", PASSWORD)
    fitted = fitted_with_store
    given = yaml.safe_load(fitted.file.read_text(encoding="utf-8"))
    given["servers"][0] |= {"policy": "Basic256Sha256", "user": USER, "password_env": "SUPPORT_TEST_PASSWORD"}
    log = fitted.folder / "logs" / "detector.log"
    given |= {"metrics": {"listen": 0}, "log": {"format": "json", "file": str(log)}}
    write(fitted.folder, given, "plant.yaml")
    with open(fitted.file, "a", encoding="utf-8") as file:
        file.write(f"# the old password was {PASSWORD}-1\n")
    log.parent.mkdir()
    log.write_text(f"login of {USER} with {PASSWORD} at {plant.endpoint}\n", encoding="utf-8")
    out = tmp_path / "support.zip"
    with service(fitted.file):
        ran = cli("support-bundle", fitted.file, "--with-doctor", "--out", out, "--json")
    assert ran.code == 0, ran.err
    with zipfile.ZipFile(out) as archive:
        parts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert [one["name"] for one in ran.json["parts"]] == list(parts)
    assert {"README.txt", "about.json", "config.yaml", "models.json", "store.json", "doctor.json",
            "logs/detector.log"} <= parts.keys()
    everything = "\n".join(parts.values())
    for secret in (PASSWORD, SECRET_COMMENT, "miller", USER):
        assert secret not in everything, secret
    if os.name == "posix":
        assert stat.S_IMODE(out.stat().st_mode) == 0o600
    about, store = json.loads(parts["about.json"]), json.loads(parts["store.json"])
    assert about["version"] == __version__ and about["packages"]["asyncua"]
    (model,) = json.loads(parts["models.json"])
    assert model["model_id"] and [tag["name"] for tag in model["tags"]] == ["x1", "x3"] and "arrays" not in model
    assert store["feedback"] == {"false alarm": 1} and store["audit"] and store["recordings"]
    assert store["audit"][-1]["who"].startswith("user-") or "service" in {one["who"] for one in store["audit"]}
    doctor = json.loads(parts["doctor.json"])
    assert doctor["servers"]["plant"]["policy"] == "Basic256Sha256"
    config = yaml.safe_load(parts["config.yaml"])
    assert config["servers"][0]["user"].startswith("user-") and config["servers"][0]["endpoint"] == plant.endpoint
    assert config["groups"] == given["groups"]
    assert "login of user-" in parts["logs/detector.log"] and "with ***" in parts["logs/detector.log"]


def test_hosts_are_hashed_when_asked_and_the_list_writes_nothing(
    fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = yaml.safe_load(fitted.file.read_text(encoding="utf-8"))
    given["servers"][0]["endpoint"] = "opc.tcp://plc-7.Hall3.example:4840/"
    file = write(fitted.folder, given)
    made = collect(load(file), file, redact_hosts=True)
    assert "plc-7" not in "".join(text for _, text in made.parts.values())
    assert "opc.tcp://host-" in made.parts["config.yaml"][1]
    monkeypatch.chdir(tmp_path)
    ran = cli("support-bundle", file, "--list")
    assert ran.code == 0 and "config.yaml" in ran.out and "written" not in ran.err and not list(tmp_path.glob("*.zip"))
    assert "journalctl" in ran.err  # where the log is instead
    ran = cli("support-bundle", file, "--out", tmp_path / "b.zip", "--json")
    assert ran.code == 0 and not ran.json["parts"][0]["name"].startswith("/")
    again = cli("support-bundle", file, "--out", tmp_path / "b.zip", "--json")
    assert again.code == 1 and "--force" in again.err


def test_the_metrics_of_a_service_that_listens_are_in_the_bundle(fitted: Fitted, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = yaml.safe_load(fitted.file.read_text(encoding="utf-8")) | {"metrics": {"listen": port}}
    file = write(fitted.folder, given)
    away = collect(load(file), file)
    assert any("no service answers" in note for note in away.notes) and "metrics.txt" not in away.parts
    with service(file):
        live = collect(load(file), file)
    assert "opcua_detector_server_connected" in live.parts["metrics.txt"][1]
    assert json.loads(live.parts["ready.json"][1])["ok"] and json.loads(live.parts["health.json"][1])["ok"]


def test_a_bundle_that_would_hold_a_password_is_not_made(
    fitted: Fitted, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bundle, "passwords", lambda _: ["lorenz"])  # stands in every part
    monkeypatch.setattr(bundle.Redactor, "text", lambda self, text: text)
    with pytest.raises(DetectorError, match="none is made"):
        bundle.collect(load(fitted.file), fitted.file)


def test_each_command_has_help() -> None:
    for name in ("support-bundle", "backup", "restore", "doctor"):
        ran = cli(name, "--help")
        assert ran.code == 0 and "--json" in ran.out
    assert support.support_bundle.__doc__ and "support-bundle" in cli("--help").out
