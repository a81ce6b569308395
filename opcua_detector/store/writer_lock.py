"""One process writes a store: an operating system lock on a side file, released by the system when it dies.

SQLite's own locks are held per transaction, so two writers would take turns and mix their rows; and a lock
on the database file itself would keep readers out on Windows.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from ..errors import StoreError

_LOCKED_BYTE = 1 << 20  # behind the text: on Windows a locked byte cannot be read by others

if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)

    def _unlock(handle: int) -> None:
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)


class WriterLock:
    """The right to write one store, held until `release` or the end of the process.

    Raises
    ------
    StoreError
        Another process (or another `Store` of this process) holds it, or the side file cannot be made.
    """

    def __init__(self, database: Path) -> None:
        self.path = database.with_name(database.name + ".lock")
        try:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as exc:
            raise StoreError(
                f"the lock file {self.path} cannot be opened: {exc.strerror}",
                where=str(database),
                next_step="give this user write permission on the folder, or choose another store path",
            ) from exc
        try:
            _lock(self._handle)
        except OSError as exc:
            holder = self._holder()
            os.close(self._handle)
            raise StoreError(
                f"another process writes to this store{holder}",
                where=str(database),
                next_step="stop that process, or choose another store path; "
                "reading (readonly) works beside it",
            ) from exc
        os.ftruncate(self._handle, 0)
        os.lseek(self._handle, 0, os.SEEK_SET)
        os.write(self._handle, f"{os.getpid()}\n".encode())

    def _holder(self) -> str:
        with contextlib.suppress(OSError):
            os.lseek(self._handle, 0, os.SEEK_SET)
            text = os.read(self._handle, 32).decode("ascii", "replace").strip()
            if text.isdigit():
                return f" (process {text})"
        return ""

    def release(self) -> None:
        """Let another writer in; the side file stays, because deleting it would race with the next one."""
        if self._handle < 0:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, 0)
            _unlock(self._handle)
        os.close(self._handle)
        self._handle = -1
