"""Every error the simulated plant raises on purpose.

SimError                    text = what, where, next step
  ProcessError              a process was asked for something it cannot do (key, value, expected)
  QuirkError                a quirk that does not exist or cannot apply (key, value, expected)
  ConfigError               a file of settings or faults is wrong (file, key, value, expected)
  StartError                the server cannot start (where, next_step)
"""

from __future__ import annotations


class SimError(Exception):
    """Base of every error of the simulated plant."""


class _ArgumentError(SimError, ValueError):
    """An argument outside what is accepted.

    Attributes
    ----------
    key, value, expected
        Which argument, what it was, and what would have been accepted.
    """

    def __init__(self, text: str, key: str, value: object, expected: str) -> None:
        super().__init__(f"{text}; expected {expected}")
        self.key = key
        self.value = value
        self.expected = expected


class ProcessError(_ArgumentError):
    """A process was asked for something it cannot do."""


class QuirkError(_ArgumentError):
    """A quirk that does not exist, or that the tag cannot have."""


class ConfigError(SimError, ValueError):
    """A file of settings or faults is wrong.

    Attributes
    ----------
    file, key, value, expected
        Where it is wrong, what was found, and what would have been accepted.
    """

    def __init__(self, file: str, key: str, value: object, expected: str) -> None:
        at = f", key {key}" if key else ""
        super().__init__(f"{file}{at}: {value!r} is not accepted; expected {expected}")
        self.file = file
        self.key = key
        self.value = value
        self.expected = expected


class StartError(SimError):
    """The server cannot start.

    Attributes
    ----------
    where, next_step
        What could not be had, and what to do about it.
    """

    def __init__(self, what: str, where: str, next_step: str) -> None:
        super().__init__(f"{what}: {where}. {next_step}")
        self.where = where
        self.next_step = next_step
