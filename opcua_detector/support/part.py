"""A file that takes its place only when it is whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DetectorError


@contextmanager
def part_of(target: Path) -> Iterator[Path]:
    """Give a file beside the target, for this user alone, that takes its place at the end.

    Where the block raises, the target stays as it was and nothing lies beside it.

    Raises
    ------
    DetectorError
        The file cannot be made or written.
    """
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        yield part
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(part, target)
    except OSError as error:
        raise DetectorError(f"cannot be written: {error.strerror or error}", where=str(target),
                            next_step="check folder, rights and free space") from error
    finally:
        part.unlink(missing_ok=True)
