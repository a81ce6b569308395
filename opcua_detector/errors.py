"""The one error tree: every error says what is wrong, where, and what to do next.

    DetectorError
    |-- ConfigError          the configuration file: unknown or missing key, wrong value, wrong unit
    |-- RecordError          a record of rows: too short, not monotonic, constant or all-NaN tag
    |-- ModelError           a model file or its use
    |   |-- ModelFileError   missing, truncated, altered (sha256), unknown format
    |   `-- ModelTagsError   fitted for other tags or another period
    |-- PluginError          a detector plugin is unknown, broken or lacks an extra
    |-- StoreError           the SQLite store: locked, full, corrupt, newer schema
    |-- ConnectionProblem    the OPC UA server
    |   |-- ServerUnreachable  nobody listens, time-out, wrong host
    |   |-- AccessRefused      wrong user, password, certificate or policy
    |   `-- NodeProblem        a node: not found, not readable, not writable, wrong type
    `-- SimulatorError       the simulated plant did not start (port taken, bad option)

The command line maps each branch to an exit code (`exit_code`); the loop itself never raises.
"""

from __future__ import annotations

from typing import ClassVar


class DetectorError(Exception):
    """Base of all errors of the product.

    Parameters
    ----------
    what : str
        What is wrong, in one clause.
    where : str
        File and key, endpoint, NodeId or tag; empty where there is none.
    next_step : str
        What the user does next.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", next_step: str = "") -> None:
        self.what, self.where, self.next_step = what, where, next_step
        super().__init__(self._text())

    def _text(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  next step: {self.next_step}" if self.next_step else text


class ConfigError(DetectorError):
    """The configuration is wrong.

    Adds `file`, `key` (dotted path), `value` and `expected` to the text; `problem` is the bare clause.
    """

    exit_code = 2

    def __init__(self, what: str, *, file: str = "", key: str = "", value: object = None,
                 expected: str = "", next_step: str = "") -> None:
        self.problem, self.file, self.key, self.value, self.expected = what, file, key, value, expected
        detail = what
        if value is not None:
            detail += f" (got {value!r})"
        if expected:
            detail += f"; expected {expected}"
        where = ": ".join(part for part in (file, key) if part)
        super().__init__(detail, where=where, next_step=next_step)


class RecordError(DetectorError):
    """A record of rows cannot be used."""

    exit_code = 3


class ModelError(DetectorError):
    """A model cannot be used."""

    exit_code = 4


class ModelFileError(ModelError):
    """A model file is missing, truncated, altered or of an unknown format."""


class ModelTagsError(ModelError):
    """A model was fitted for other tags or another period."""


class PluginError(DetectorError):
    """A detector plugin is unknown, broken or lacks an extra."""

    exit_code = 4


class StoreError(DetectorError):
    """The SQLite store cannot be used."""

    exit_code = 5


class ConnectionProblem(DetectorError):
    """The OPC UA server or the way to it."""

    exit_code = 6


class ServerUnreachable(ConnectionProblem):
    """Nobody answers at the endpoint."""


class AccessRefused(ConnectionProblem):
    """The server refuses the user, the certificate or the policy."""


class LoginRefused(AccessRefused):
    """The server refuses the user name and password, or the user certificate; trying often may lock the account."""

    exit_code = 10


class NodeProblem(ConnectionProblem):
    """A node is not found, not readable, not writable or of the wrong type."""

    exit_code = 7


class SimulatorError(DetectorError):
    """The simulated plant did not start."""

    exit_code = 8
