"""Opening a store file for writing: folder, damage, schema; and setting a damaged one aside."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import sqlite_utils

from ..errors import StoreError
from .schema import (
    Migration,
    check_file,
    configure_writer,
    connect,
    migrate,
    quick_check,
    schema_version,
    store_error,
)
from .tasks import WriterSettings
from .writer_lock import WriterLock

QUICK_CHECK_BYTES = 268_435_456  # larger files are not read through at each start; see Store.verify


def make_folder(path: Path) -> None:
    """Make the folder of a store that is to come."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StoreError(
            f"the folder cannot be made: {exc.strerror}",
            where=str(path.parent),
            next_step="make it, or choose another store path",
        ) from exc
    if path.is_dir():
        raise StoreError(
            "is a folder, not a file", where=str(path), next_step="add a file name to the store path"
        )


def open_for_writing(
    path: Path, settings: WriterSettings, migrations: Sequence[Migration]
) -> sqlite_utils.Database:
    """Return the write connection of a file that is whole, ours and of the newest schema.

    Raises
    ------
    StoreError
        `DamagedStore` where the file is damaged.
    """
    db = None
    try:
        db = connect(path, create=True, busy_timeout_s=settings.busy_timeout_s)
        if schema_version(db) and path.stat().st_size <= QUICK_CHECK_BYTES:
            quick_check(db, path)
        check_file(db, path, migrations[-1].version)
        if schema_version(db) == 0:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before WAL and the first table
        configure_writer(db, settings.synchronous)
        migrate(db, path, migrations)
    except BaseException as exc:
        if db is not None:
            db.close()
        if isinstance(exc, sqlite3.Error):
            raise store_error(exc, path) from exc
        raise
    return db


def open_beside(
    path: Path, settings: WriterSettings, migrations: Sequence[Migration]
) -> sqlite_utils.Database:
    """Return a write connection beside another writer; only where there is none the schema may be changed.

    Raises
    ------
    StoreError
        The other writer works with an older schema.
    """
    try:
        lock = WriterLock(path)
    except StoreError as exc:
        db = connect(path, create=False, busy_timeout_s=settings.busy_timeout_s)
        if check_file(db, path, migrations[-1].version) == migrations[-1].version:
            configure_writer(db, settings.synchronous)
            return db
        db.close()
        raise StoreError(
            "a process of an older version writes to this store",
            where=str(path),
            next_step="stop it and start it with this version",
        ) from exc
    try:
        return open_for_writing(path, settings, migrations)
    finally:
        lock.release()


def set_aside(path: Path) -> Path:
    """Rename a damaged store and its log out of the way; return the new name."""
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S}"
    target = path.with_name(f"{path.name}.damaged-{stamp}Z")
    k = 1
    while target.exists():
        k += 1
        target = path.with_name(f"{path.name}.damaged-{stamp}Z-{k}")
    try:
        path.rename(target)
        for suffix in ("-wal", "-shm"):
            beside = path.with_name(path.name + suffix)
            if beside.exists():
                beside.rename(target.with_name(target.name + suffix))
    except OSError as exc:
        raise StoreError(
            f"cannot be renamed: {exc.strerror}",
            where=str(path),
            next_step="close programs that have it open",
        ) from exc
    return target
