"""The tables of the store and how a file of an older version becomes one of this version.

`PRAGMA user_version` is the schema version, `application_id` tells our files from other programs' databases.
Each migration runs in one transaction with its version number, so a power failure leaves the old or the new
one.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sqlite_utils

from ..errors import StoreError

APPLICATION_ID = 0x4F504344  # "OPCD"
Synchronous = Literal["normal", "full"]

# Primary result codes (sqlite.org/rescode.html) that time or a human heals; the writer keeps its batch and
# tries again.
RETRYABLE = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_NOTADB,
    }
)
DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_ADVICE = {
    sqlite3.SQLITE_BUSY: (
        "is locked by another program",
        "close the program that writes to it (a database "
        "browser with an open edit, a backup tool), then try again",
    ),
    sqlite3.SQLITE_LOCKED: (
        "is locked by another program",
        "close the program that writes to it, then try again",
    ),
    sqlite3.SQLITE_FULL: ("has no room left: the disk is full", "free disk space or lower the store's quota"),
    sqlite3.SQLITE_READONLY: (
        "cannot be written",
        "give this user write permission on the file and its folder",
    ),
    sqlite3.SQLITE_CANTOPEN: (
        "cannot be opened",
        "check that the folder exists and this user may write to it",
    ),
    sqlite3.SQLITE_IOERR: ("cannot be read or written", "check the disk; the system log names the fault"),
}


@dataclass(frozen=True, slots=True)
class Migration:
    """One step of the schema: brings a file of version - 1 to `version`."""

    version: int
    name: str
    apply: Callable[[sqlite_utils.Database], None]


_V1 = (
    "CREATE TABLE migrations (version INTEGER PRIMARY KEY, name TEXT NOT NULL, applied_ns INTEGER)",
    """CREATE TABLE recordings (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, group_name TEXT NOT NULL,
        server TEXT NOT NULL, tags TEXT NOT NULL, period_ns INTEGER NOT NULL, started_ns INTEGER NOT NULL,
        ended_ns INTEGER, truth INTEGER NOT NULL, keep INTEGER NOT NULL, note TEXT NOT NULL)""",
    """CREATE TABLE row_chunks (
        id INTEGER PRIMARY KEY, recording_id INTEGER NOT NULL REFERENCES recordings(id) ON DELETE CASCADE,
        first_seq INTEGER NOT NULL, row_count INTEGER NOT NULL, first_ns INTEGER NOT NULL, last_ns INTEGER
        NOT NULL, written_ns INTEGER NOT NULL, level INTEGER NOT NULL, codec INTEGER NOT NULL, bytes INTEGER
        NOT NULL, source_ns BLOB NOT NULL,
        value_blob BLOB NOT NULL, seq BLOB, valid BLOB, status BLOB, gap BLOB, truth BLOB)""",
    "CREATE UNIQUE INDEX row_chunks_by_seq ON row_chunks (recording_id, first_seq)",
    "CREATE INDEX row_chunks_by_age ON row_chunks (level, written_ns)",
    """CREATE TABLE models (
        model_id TEXT NOT NULL, monitor TEXT NOT NULL, path TEXT NOT NULL, sha256 TEXT NOT NULL,
        created_ns INTEGER NOT NULL, header TEXT NOT NULL, PRIMARY KEY (model_id, monitor))""",
    """CREATE TABLE runs (
        id INTEGER PRIMARY KEY AUTOINCREMENT, started_ns INTEGER NOT NULL, ended_ns INTEGER,
        version TEXT NOT NULL, config_hash TEXT NOT NULL, end_reason TEXT NOT NULL)""",
    """CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT, run_id INTEGER NOT NULL, monitor TEXT NOT NULL,
        event_no INTEGER NOT NULL, raised_ns INTEGER NOT NULL, cleared_ns INTEGER, peak_score REAL,
        severity INTEGER NOT NULL, model_id TEXT NOT NULL, sentence TEXT NOT NULL, causes TEXT NOT NULL,
        UNIQUE (run_id, monitor, event_no))""",
    "CREATE INDEX events_by_time ON events (raised_ns)",
    """CREATE TABLE trend_series (
        id INTEGER PRIMARY KEY, run_id INTEGER NOT NULL, monitor TEXT NOT NULL, behind_ns INTEGER NOT NULL,
        UNIQUE (run_id, monitor))""",
    """CREATE TABLE trend (
        series_id INTEGER NOT NULL, bucket_ns INTEGER NOT NULL, width_ns INTEGER NOT NULL, score_min REAL,
        score_max REAL, score_last REAL, status INTEGER NOT NULL, alert INTEGER NOT NULL, row_count INTEGER
        NOT NULL,
        PRIMARY KEY (series_id, bucket_ns)) WITHOUT ROWID""",
    """CREATE TABLE trend_detail (
        series_id INTEGER NOT NULL, source_ns INTEGER NOT NULL, score REAL, status INTEGER NOT NULL,
        alert INTEGER NOT NULL, PRIMARY KEY (series_id, source_ns)) WITHOUT ROWID""",
    """CREATE TABLE feedback (
        id INTEGER PRIMARY KEY AUTOINCREMENT, at_ns INTEGER NOT NULL, who TEXT NOT NULL, label TEXT NOT NULL,
        monitor TEXT NOT NULL, event_no INTEGER, start_ns INTEGER, end_ns INTEGER, tags TEXT NOT NULL,
        comment TEXT NOT NULL, model_id TEXT NOT NULL)""",
    """CREATE TABLE audit (
        id INTEGER PRIMARY KEY AUTOINCREMENT, at_ns INTEGER NOT NULL, who TEXT NOT NULL, action TEXT NOT NULL,
        detail TEXT NOT NULL)""",
    *(
        f"CREATE TRIGGER {table}_kept BEFORE {verb} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table}: entries are never {done}'); END"
        for table, verb, done in (
            ("events", "DELETE", "deleted"),
            ("feedback", "DELETE", "deleted"),
            ("audit", "DELETE", "deleted"),
        )
    ),
    "CREATE TRIGGER audit_unchanged BEFORE UPDATE ON audit "
    "BEGIN SELECT RAISE(ABORT, 'audit: entries are never changed'); END",
)


def _create_v1(db: sqlite_utils.Database) -> None:
    for statement in _V1:
        db.execute(statement)


MIGRATIONS: tuple[Migration, ...] = (Migration(1, "first schema", _create_v1),)


def code_of(exc: sqlite3.Error) -> int:
    """Return SQLite's primary result code of an error (0 where Python's module raised it by itself)."""
    return int(getattr(exc, "sqlite_errorcode", 0) or 0) & 0xFF


def store_error(exc: sqlite3.Error, path: Path) -> StoreError:
    """Return the error of the product for an error of SQLite."""
    code = code_of(exc)
    if code in DAMAGED:
        return damaged(path, str(exc))
    what, next_step = _ADVICE.get(
        code, ("failed", "see the text of the error; if it stays, set the file aside")
    )
    return StoreError(f"the store {what} ({exc})", where=str(path), next_step=next_step)


class DamagedStore(StoreError):
    """The file is damaged or no SQLite file; it is left as it is."""


def damaged(path: Path, finding: str) -> DamagedStore:
    """Return the error for a damaged file."""
    return DamagedStore(
        f"the store is damaged or is not a SQLite file ({finding})",
        where=str(path),
        next_step="nothing was changed; restore a backup to this path, or set the file aside "
        "(Store.set_aside renames it and its -wal file) and start with an empty store",
    )


def connect(path: Path, *, create: bool, busy_timeout_s: float) -> sqlite_utils.Database:
    """Return a connection in autocommit mode (transactions are begun by hand)."""
    uri = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
    conn = sqlite3.connect(
        uri, uri=True, isolation_level=None, check_same_thread=False, timeout=busy_timeout_s
    )
    try:
        conn.execute("PRAGMA foreign_keys = ON")
        conn.execute("PRAGMA secure_delete = OFF")  # some builds zero every freed page, which doubles deletes
        return sqlite_utils.Database(conn, recursive_triggers=False, execute_plugins=False)
    except BaseException:
        conn.close()
        raise


def configure_writer(db: sqlite_utils.Database, synchronous: Synchronous) -> None:
    """Set what the write connection needs (WAL stays in the file, the rest belongs to the connection)."""
    db.execute("PRAGMA journal_mode = WAL").fetchone()
    db.execute(f"PRAGMA synchronous = {synchronous.upper()}")
    db.execute("PRAGMA journal_size_limit = 16777216").fetchone()
    db.execute("PRAGMA cache_size = -2000")


@contextmanager
def immediate(db: sqlite_utils.Database) -> Iterator[sqlite3.Connection]:
    """One write transaction; SQLite may have rolled it back by itself, which is no second error."""
    db.conn.execute("BEGIN IMMEDIATE")
    try:
        yield db.conn
        db.conn.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            db.rollback()
        raise


def schema_version(db: sqlite_utils.Database) -> int:
    """Return the schema version of the file (0 = empty)."""
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def check_file(db: sqlite_utils.Database, path: Path, newest: int) -> int:
    """Return the schema version after checking that the file is ours and not newer than this program.

    Raises
    ------
    StoreError
        Another program's database, or a schema newer than `newest`.
    """
    version = schema_version(db)
    application = int(db.execute("PRAGMA application_id").fetchone()[0])
    has_tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] > 0
    if has_tables and application != APPLICATION_ID:
        raise StoreError(
            "this is a database of another program",
            where=str(path),
            next_step="choose another store path; the file was not changed",
        )
    if version > newest:
        raise StoreError(
            f"the store has schema version {version}, this program knows up to {newest}",
            where=str(path),
            next_step="start the newer program that wrote it, or choose another "
            "store path; the file was not changed",
        )
    return version


def quick_check(db: sqlite_utils.Database, path: Path, full: bool = False) -> None:
    """Read the file's structure; StoreError with SQLite's first finding where it is damaged."""
    finding = db.execute(f"PRAGMA {'integrity_check' if full else 'quick_check'}(1)").fetchone()[0]
    if finding != "ok":
        raise damaged(path, finding)


def migrate(
    db: sqlite_utils.Database, path: Path, migrations: Sequence[Migration] = MIGRATIONS
) -> tuple[int, int]:
    """Bring the file to the newest version, one transaction per step; return (version before, version now).

    Raises
    ------
    StoreError
        A step failed; the file is as it was before that step.
    """
    before = check_file(db, path, migrations[-1].version)
    if before == 0:
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only takes effect before the first table
    for step in migrations:
        if step.version <= schema_version(db):
            continue
        try:
            with immediate(db):
                if step.version <= schema_version(db):
                    continue
                step.apply(db)
                db.execute(
                    "INSERT INTO migrations (version, name, applied_ns) VALUES (?, ?, ?)",
                    (step.version, step.name, time.time_ns()),
                )
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {step.version}")
        except sqlite3.Error as exc:
            if code_of(exc) in RETRYABLE:
                raise
            raise StoreError(
                f"migration to schema version {step.version} ({step.name}) failed: {exc}",
                where=str(path),
                next_step="the file is unchanged; start the older program, or set "
                "the file aside and report this text",
            ) from exc
    return before, schema_version(db)
