"""A fault script: which parameter is wrong by which factor, from when to when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from sim_server.errors import ConfigError, ProcessError
from sim_server.processes import Fault, ProcessModel


class FaultEntry(BaseModel):
    """One line of a fault script.

    Attributes
    ----------
    parameter
        Name of a parameter of the process.
    factor
        The parameter is multiplied by it; 1 is healthy.
    from_s, to_s
        Begin (included) and end (excluded), seconds of process time since the first live row or the
        first row of a file; written ``from`` and ``to`` in YAML.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    parameter: str
    factor: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    from_s: Annotated[float, Field(alias="from", ge=0.0, allow_inf_nan=False)]
    to_s: Annotated[float, Field(alias="to", gt=0.0, allow_inf_nan=False)]

    @model_validator(mode="after")
    def _ordered(self) -> FaultEntry:
        if self.to_s <= self.from_s:
            raise ValueError(f"'to' must be after 'from' ({self.from_s} s)")
        return self


_ENTRIES: TypeAdapter[list[FaultEntry]] = TypeAdapter(list[FaultEntry])


def first_problem(error: ValidationError, file: str, prefix: str = "") -> ConfigError:
    """Turn the first pydantic complaint into one that names file, key, value and what was expected."""
    problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in problem["loc"]) or "(whole file)"
    if prefix:
        key = f"{prefix}.{key}"
    expected = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        expected = "no such key"
    elif problem["type"] == "missing":
        expected = "this key to be present"
    # the input of a missing key is everything around it, passwords included
    found = "nothing" if problem["type"] == "missing" else problem["input"]
    return ConfigError(file, key, found, expected)


class FaultScript:
    """A checked fault script of one process; ground truth follows from the factors alone.

    Parameters
    ----------
    entries
        In any order; two entries of one parameter must not overlap.
    model
        The process they are for.
    file
        Named in errors.

    Raises
    ------
    ConfigError
        Unknown parameter, factor outside the simulated range, or overlapping entries.
    """

    def __init__(self, entries: Sequence[FaultEntry], model: ProcessModel, file: str = "<faults>") -> None:
        self.entries = tuple(sorted(entries, key=lambda one: (one.from_s, one.parameter)))
        self._period_ns = model.period_ns
        ends: dict[str, float] = {}
        for number, entry in enumerate(entries):
            try:
                model.check_factor(entry.parameter, entry.factor)
            except ProcessError as error:
                raise ConfigError(file, f"{number}.{error.key}", error.value, error.expected) from error
        for entry in self.entries:
            if entry.from_s < ends.get(entry.parameter, 0.0):
                raise ConfigError(
                    file,
                    f"{entry.parameter}.from",
                    entry.from_s,
                    f"a start at or after {ends[entry.parameter]} s, where the entry before it ends",
                )
            ends[entry.parameter] = entry.to_s

    def row(self, seconds: float) -> int:
        """Number of the first row at or after a moment; rows count from 0 at the start of the script."""
        return -int(-seconds * 1e9 // self._period_ns)

    def faults(self, n_rows: int) -> list[Fault]:
        """Return the script as faults of a batch of ``n_rows`` rows that starts with the script."""
        return self.faults_between(0, n_rows)

    def faults_between(self, first_row: int, stop_row: int) -> list[Fault]:
        """Return the faults of the rows ``first_row <= row < stop_row``, counted from ``first_row``.

        One that goes on after ``stop_row`` keeps its own end, so consecutive batches join up.
        """
        found = []
        for entry in self.entries:
            start = max(self.row(entry.from_s), first_row)
            stop = self.row(entry.to_s)
            if start < min(stop, stop_row):
                found.append(Fault(entry.parameter, entry.factor, start - first_row, stop - first_row))
        return found

    def changes(self) -> Mapping[int, list[tuple[str, float]]]:
        """Return what to set before which row: row -> [(parameter, factor)]; ends come before starts."""
        by_row: dict[int, list[tuple[str, float]]] = {}
        for entry in self.entries:
            by_row.setdefault(self.row(entry.from_s), []).append((entry.parameter, entry.factor))
        for entry in self.entries:
            by_row.setdefault(self.row(entry.to_s), []).insert(0, (entry.parameter, 1.0))
        return by_row


def read_yaml(path: Path) -> Any:
    """Read one YAML file.

    Raises
    ------
    ConfigError
        The file is not there, not readable or not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), "", error.strerror or str(error), "a readable YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), "", " ".join(str(error).split()), "valid YAML in UTF-8") from error


def parse_script(content: Any, model: ProcessModel, file: str = "<faults>") -> FaultScript:
    """Check the parsed content of a fault script.

    Raises
    ------
    ConfigError
        Anything but a list of {parameter, factor, from, to}; see also `FaultScript`.
    """
    try:
        entries = _ENTRIES.validate_python([] if content is None else content)
    except ValidationError as error:
        raise first_problem(error, file) from error
    return FaultScript(entries, model, file)


def load_script(path: Path, model: ProcessModel) -> FaultScript:
    """Read and check a fault script; see `parse_script` for the errors."""
    return parse_script(read_yaml(path), model, str(path))
