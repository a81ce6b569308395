"""What leaves the machine as one file: backups, which hold all, and support bundles, which hold no secret."""

from .archive import Backup, Restored, back_up, restore
from .bundle import Bundle, collect

__all__ = ["Backup", "Bundle", "Restored", "back_up", "collect", "restore"]
