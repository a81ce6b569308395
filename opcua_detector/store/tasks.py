"""What is asked of the writer thread: how it commits, and work for its next transaction."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import sqlite_utils

from .schema import Synchronous


@dataclass(frozen=True, slots=True)
class WriterSettings:
    """How the writer commits (see `Store.open`)."""

    commit_interval_s: float = 0.5
    ring_rows: int = 8192
    ring_bytes: int = 33_554_432
    synchronous: Synchronous = "normal"
    sync_interval_s: float = 5.0
    busy_timeout_s: float = 2.0


@dataclass(slots=True)
class Task:
    """Something for the writer to do inside its next transaction.

    work : None = nothing, only to learn when everything before it is committed
    waited : bool; somebody takes the outcome
    """

    work: Callable[[sqlite_utils.Database], Any] | None
    future: Future[Any]
    waited: bool
    error: Exception | None = None
    value: Any = None
