"""The SQLite store: recordings, runs, models, events, score trend, feedback and audit; one writer thread."""

from .database import Store
from .entries import (
    AuditEntry,
    Event,
    FeedbackEntry,
    StoreCounters,
    StoredModel,
    StoredRecording,
    StoredRun,
    Trend,
    Usage,
)
from .retention import Retention
from .rings import Recording
from .schema import MIGRATIONS, Migration

__all__ = [
    "MIGRATIONS",
    "AuditEntry",
    "Event",
    "FeedbackEntry",
    "Migration",
    "Recording",
    "Retention",
    "Store",
    "StoreCounters",
    "StoredModel",
    "StoredRecording",
    "StoredRun",
    "Trend",
    "Usage",
]
