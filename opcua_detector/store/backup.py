"""Copies a store while it is written, and checks a copy before it is put to use."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import sqlite_utils

from ..errors import StoreError
from .schema import MIGRATIONS, check_file, quick_check, store_error
from .writer_lock import WriterLock

_SIDE_FILES = ("-wal", "-shm")
BUSY_S = 10.0


def copy_store(source: Path, target: Path) -> int:
    """Copy a store as it is at this moment into a new file, by SQLite's backup interface; return its schema version.

    A process that writes it is neither stopped nor slowed down: it is read as one snapshot, while the write-ahead log
    takes what is committed meanwhile. The whole is copied in one step, because a copy in several steps begins anew
    whenever somebody writes in between (sqlite.org/backup.html), which on a live store has no end.

    Raises
    ------
    StoreError
        There is none, it is locked or damaged, it is another program's, or there is no room for the copy.
    """
    if not source.exists():
        raise StoreError("there is no store", where=str(source), next_step="check the path, or record something first")
    try:
        with closing(_open(source, "ro")) as live, closing(sqlite3.connect(target)) as copy:
            version = check_file(sqlite_utils.Database(live), source, MIGRATIONS[-1].version)
            live.backup(copy, pages=-1)
            copy.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
            quick_check(sqlite_utils.Database(copy), target)
            return version
    except sqlite3.Error as error:
        raise store_error(error, source) from error


def check_copy(file: Path) -> int:
    """Return the schema version of a copied store that is whole, ours and not newer than this program.

    Raises
    ------
    StoreError
        It is not.
    """
    try:
        with closing(_open(file, "ro")) as found:
            db = sqlite_utils.Database(found)
            quick_check(db, file)
            version = check_file(db, file, MIGRATIONS[-1].version)
    except sqlite3.Error as error:
        raise store_error(error, file) from error
    if version == 0:
        raise StoreError("the store in it is empty, without tables", where=str(file), next_step="use another backup")
    return version


def aside(store: Path, suffix: str) -> list[Path]:
    """Rename a store and the log beside it, so that another can take its place; return the new names.

    Nothing is deleted. The log must go with its file: beside another one SQLite would replay it into that.

    Raises
    ------
    StoreError
        A process is writing it, or it cannot be renamed.
    """
    lock = WriterLock(store)
    try:
        moved = []
        for end in ("", *_SIDE_FILES):
            file = store.with_name(store.name + end)
            if file.exists():
                target = file.with_name(f"{store.name}{suffix}{end}")
                file.rename(target)
                moved.append(target)
        return moved
    except OSError as error:
        raise StoreError(f"cannot be renamed: {error.strerror}", where=str(store),
                         next_step="close programs that have it open") from error
    finally:
        lock.release()


def _open(file: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode={mode}", uri=True, timeout=BUSY_S, isolation_level=None)
