"""The log as JSON lines, for machines; as text it stays what the terminal prints.

One object per line: ts (ISO 8601, UTC), level, event (the same words for the same kind of event, whatever the
figures), message (the whole text), logger, and where the text names them server, monitor, group, store; with an
error its traceback. Secrets of the configuration never get through, whoever wrote the line.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal

from ..errors import ConfigError
from .redact import Redactor

KEPT_FILES = 5
# How the parts begin their messages: "monitor pump: ", "server plant at opc.tcp://... (...): ", "store x.db cannot ..."
_SUBJECT = re.compile(r"(?P<kind>server|monitor|group|store) (?P<name>\S+?)(?:: | at opc\.tcp:|(?<=\.db) )")
_PLACEHOLDER = re.compile(r"%[-+ #0]*(?:\d+|\*)?(?:\.\d+)?[a-zA-Z]")
_OWN = ("server", "monitor", "group", "store", "event")  # given by `extra=`, they count before the text


class JsonLines(logging.Formatter):
    """Formats each record as one JSON object on one line."""

    def __init__(self, redactor: Redactor | None = None) -> None:
        super().__init__()
        self._redactor = redactor or Redactor()

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        message = record.getMessage()
        line: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": event_of(str(record.msg)) or record.name.rpartition(".")[2],  # "%s: %s" says nothing by itself
            "message": message, "logger": record.name,
        }
        subject = _SUBJECT.match(message)
        if subject is not None:
            line[subject["kind"]] = subject["name"]
        for name in _OWN:
            if (given := getattr(record, name, None)) is not None:
                line[name] = given
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(self._redactor.content(line), ensure_ascii=False, default=str)


class TextLines(logging.Formatter):
    """Formats for people, by default with time and level; secrets taken out."""

    def __init__(self, redactor: Redactor | None = None, form: str = "%(asctime)s %(levelname)s %(message)s") -> None:
        super().__init__(form)
        self._redactor = redactor or Redactor()

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return self._redactor.text(super().format(record))


def event_of(template: str) -> str:
    """Return what a message says apart from its subject and figures: "monitor %s: alert %d raised" -> "alert raised".
    """
    words = re.sub(r"^(?:(?:server|monitor|group|store) )?%s: ", "", template)
    return " ".join(_PLACEHOLDER.sub("", words).replace("()", "").split()).strip(" :;,")


def configure_logging(
    *, form: Literal["text", "json"], level: str, redactor: Redactor, text_handler: logging.Handler | None = None,
    file: Path | None = None, file_bytes: int = 10_000_000, stream: IO[str] | None = None,
) -> list[logging.Handler]:
    """Let the product's log appear on stderr, and in a file where one is given; return the handlers.

    Parameters
    ----------
    text_handler : prints text on a terminal, with a time of its own; None: plain lines on the stream
    file : rotated at `file_bytes`, KEPT_FILES of them are kept

    Raises
    ------
    ConfigError
        The file cannot be written.
    """
    formatter: logging.Formatter = JsonLines(redactor) if form == "json" else TextLines(redactor)
    handlers: list[logging.Handler] = []
    if form == "text" and text_handler is not None:
        text_handler.setFormatter(TextLines(redactor, "%(message)s"))
        handlers.append(text_handler)
    else:
        handlers.append(logging.StreamHandler(stream or sys.stderr))
        handlers[0].setFormatter(formatter)
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            rotating = logging.handlers.RotatingFileHandler(
                file, maxBytes=file_bytes, backupCount=KEPT_FILES - 1, encoding="utf-8")
        except OSError as error:
            raise ConfigError("the log file cannot be written", key="log.file", value=str(file),
                              next_step=f"check the folder and its rights ({error.strerror})") from error
        rotating.setFormatter(formatter)
        handlers.append(rotating)
    root = logging.getLogger()
    for old in root.handlers[:]:
        if getattr(old, "_opcua_detector", False):  # a second run in one process takes the place of the first
            root.removeHandler(old)
            old.close()
    for handler in handlers:
        handler._opcua_detector = True  # type: ignore[attr-defined]
        root.addHandler(handler)
    root.setLevel(level.upper())
    return handlers


def last_lines(file: Path, most_bytes: int = 262_144) -> str:
    """Return the end of a log file, from the first whole line on; empty where there is none."""
    try:
        with file.open("rb") as content:
            size = content.seek(0, 2)
            content.seek(max(0, size - most_bytes))
            data = content.read()
    except OSError:
        return ""
    if size > most_bytes:
        data = data.partition(b"\n")[2]
    return data.decode("utf-8", "replace")


def log_files(file: Path) -> Sequence[Path]:
    """Return a rotated log, the newest file first."""
    every = [file, *(file.with_name(f"{file.name}.{i}") for i in range(1, KEPT_FILES))]
    return [one for one in every if one.exists()]
