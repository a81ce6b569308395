"""CSV files as plants export them, to arrays and back; every refusal names file, line, column and value.

Read are: a header line, then rows; `,` `;` or tab between the fields (with `;` and tab also a decimal comma);
UTF-8, UTF-16 with a mark, or else Windows-1252. A cell that is empty or says NaN, Bad, null, None, N/A or -
is NaN; true and false are 1 and 0; everything else is a number or refused.

Time is ISO 8601 with `Z` or an offset; a naive time is taken as UTC. Or it is a number since 1970, in the
unit that the column's name ends in (`_ns`, `_us`, `_ms`, `_s`), or else by the size of the first one: below
1e11 seconds, below 1e14 milliseconds, below 1e17 microseconds, above nanoseconds (unambiguous from 1973 to
5138).
"""

from __future__ import annotations

import codecs
import csv
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import NoReturn, TextIO

import numpy as np

from .api import Float64, Int64, Record, UInt8
from .errors import RecordError

TRUTH_NAME = "truth"  # taken as ground truth where no tag is called so
_NO_VALUE = frozenset({"", "nan", "bad", "null", "none", "n/a", "na", "#n/a", "-"})
_LOGICAL = {"true": 1.0, "false": 0.0}
_TIME_NAMES = frozenset(
    {
        "time",
        "timestamp",
        "datetime",
        "date",
        "source",
        "sourcetime",
        "sourcetimestamp",
        "servertimestamp",
        "ts",
        "t",
        "epoch",
        "utc",
        "timeutc",
        "timestamputc",
        "zeit",
        "zeitstempel",
        "datum",
        "datetimeutc",
    }
)
_UNIT_NS = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
_UNIT_SUFFIX = re.compile(r"[ _]\(?\[?(ns|us|ms|s)\]?\)?$", re.IGNORECASE)
_BEYOND_MICROSECONDS = re.compile(r"[.,]\d{6}(\d{1,3})")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ROWS_PER_BLOCK = 8192  # lines that become arrays at once: bounds the memory of their text


def read_csv(
    path: str | os.PathLike[str],
    tags: Sequence[str] | None = None,
    time_column: str | None = None,
    truth_column: str | None = None,
) -> tuple[Int64, Float64, list[str], UInt8 | None]:
    """Return times and values of a CSV file.

    Parameters
    ----------
    tags : names of the columns wanted, in this order; None = all but time and truth
    time_column : None = the first column with a usual name (time, timestamp, date, source_ns, t_ms ...)
    truth_column : None = the column `truth`, where there is one that is no tag

    Returns
    -------
    source_ns : int64[n], nanoseconds since 1970 UTC, strictly increasing
    values : float64[n, k]; NaN = no value
    names : list of k str
    truth : uint8[n] or None

    Raises
    ------
    RecordError
        Missing or empty file, no header, no time column, duplicate or missing column, line of another length,
        text where a number is expected, time that is unreadable or does not increase.
    """
    file = os.fspath(path)
    with _opened(Path(path)) as stream:
        lines = _Lines(file, stream)
        time_at = lines.time_column(time_column)
        truth_at = lines.truth_column(truth_column, tags)
        if tags is None:
            columns = [k for k in range(len(lines.names)) if k not in (time_at, truth_at)]
        else:
            columns = [lines.find(name, "tag") for name in tags]
        if not columns:
            lines.refuse("there is no column besides the time", next_step="export at least one tag")
        return _read(lines, columns, time_at, truth_at)


def _read(
    lines: _Lines, columns: list[int], time_at: int, truth_at: int | None
) -> tuple[Int64, Float64, list[str], UInt8 | None]:
    clock = _Clock(lines, time_at)
    times: list[Int64] = []
    values: list[Float64] = []
    truths: list[UInt8] = []
    last_ns: int | None = None
    for numbers, fields in lines.blocks():
        block_ns = clock.read(fields[time_at], numbers)
        _check_increasing(lines, time_at, block_ns, last_ns, fields[time_at], numbers)
        last_ns = int(block_ns[-1])
        times.append(block_ns)
        values.append(np.column_stack([_numbers(lines, k, fields[k], numbers) for k in columns]))
        if truth_at is not None:
            truths.append(_truth(lines, truth_at, fields[truth_at], numbers))
    if not times:
        lines.refuse("there is no row below the header", next_step="export it again with rows")
    truth = np.concatenate(truths) if truth_at is not None else None
    return np.concatenate(times), np.concatenate(values), [lines.names[k] for k in columns], truth


def write_csv(path: str | os.PathLike[str], record: Record) -> None:
    """Write a record: column `time` (ISO 8601, UTC, nanoseconds), one per tag, `truth` where it is known.

    Values that are not valid become empty cells; numbers read back exactly. The file appears when it is
    whole.

    Raises
    ------
    RecordError
        The file cannot be written, or a tag is called `time` or `truth`.
    """
    names = [tag.name for tag in record.tags]
    header = ["time", *names] + ([TRUTH_NAME] if record.truth is not None else [])
    doubled = [name for k, name in enumerate(header) if name in header[:k]]
    if doubled:
        raise RecordError(
            f"two columns would be called {doubled[0]!r}",
            where=os.fspath(path),
            next_step="rename the tag in the config",
        )
    target = Path(path)
    part = target.with_name(target.name + ".part")
    try:
        with part.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(header)
            for start in range(0, len(record), _ROWS_PER_BLOCK):
                writer.writerows(_cells(record, slice(start, start + _ROWS_PER_BLOCK)))
        part.replace(target)
    except OSError as exc:
        with suppress(OSError):
            part.unlink()
        raise RecordError(
            f"the file cannot be written: {exc.strerror}",
            where=os.fspath(path),
            next_step="check folder, rights and free space",
        ) from exc


def _cells(record: Record, rows: slice) -> Iterable[tuple[object, ...]]:
    times = np.datetime_as_string(record.source_ns[rows].astype("datetime64[ns]"), unit="ns").tolist()
    columns: list[list[object]] = [[f"{time}Z" for time in times]]
    for k in range(len(record.tags)):
        usable = (record.valid[rows, k] != 0).tolist()
        columns.append(
            [
                repr(x) if good and x == x else ""
                for x, good in zip(record.values[rows, k].tolist(), usable, strict=True)
            ]
        )
    if record.truth is not None:
        columns.append(record.truth[rows].tolist())
    return zip(*columns, strict=True)


def _opened(path: Path) -> TextIO:
    """Open the text in the encoding it has; the whole file is looked through, because one byte decides."""
    try:
        with path.open("rb") as stream:
            head = stream.read(4)
            if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return path.open(encoding="utf-16", newline="")
            decoder = codecs.getincrementaldecoder("utf-8")()
            stream.seek(0)
            try:
                while block := stream.read(1 << 20):
                    decoder.decode(block)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                return path.open(encoding="cp1252", errors="replace", newline="")
        return path.open(encoding="utf-8-sig", newline="")
    except FileNotFoundError as exc:
        raise RecordError(
            "there is no such file",
            where=str(path),
            next_step="check the path; it counts from the current folder",
        ) from exc
    except OSError as exc:
        raise RecordError(
            f"the file cannot be read: {exc.strerror}",
            where=str(path),
            next_step="close programs that lock it; give this user read permission",
        ) from exc


class _Lines:
    """The lines of an open file: the header is read, the rows come in blocks of columns."""

    def __init__(self, file: str, stream: TextIO) -> None:
        self.file = file
        self._numbered = _Counted(stream)
        header = next((text for text in self._numbered if text.strip()), "")
        delimiter = ""
        if header.lower().startswith("sep=") and len(header.strip()) == 5:  # written by Excel
            delimiter = header.strip()[-1]
            header = next((text for text in self._numbered if text.strip()), "")
        if not header:
            raise RecordError(
                "the file is empty", where=file, next_step="export it again: a header line, then rows"
            )
        self.header_line = self._numbered.line
        bare = re.sub(r'"[^"]*"', "", header)
        self._delimiter = delimiter or max(";\t,", key=bare.count)
        self.decimal_comma = self._delimiter != ","
        self.names = [name.strip() for name in next(csv.reader([header], delimiter=self._delimiter))]
        if len(self.names) > 1 and not self.names[-1]:  # each line ends with a delimiter
            self.names.pop()
        self._check_names()

    def refuse(
        self, what: str, *, line: int | None = None, column: str = "", next_step: str = ""
    ) -> NoReturn:
        """Raise the error for a place in the file (the header line where none is given)."""
        at = self.header_line if line is None else line
        where = f"{self.file}, line {at}" + (f", column {column!r}" if column else "")
        raise RecordError(what, where=where, next_step=next_step)

    def _check_names(self) -> None:
        if all(_is_number(name) for name in self.names):
            self.refuse(
                f"the first line holds numbers ({', '.join(self.names[:4])}), expected names of columns",
                next_step="add a header line: a time column, then one name per tag",
            )
        for k, name in enumerate(self.names):
            if not name:
                self.refuse(f"column {k + 1} has no name", next_step="give every column a name")
            if name in self.names[:k]:
                self.refuse(
                    "two columns have this name", column=name, next_step="rename or remove one of them"
                )

    def find(self, name: str, what: str) -> int:
        """Return where the column of this name stands."""
        if name not in self.names:
            self.refuse(
                f"there is no {what} {name!r}; the columns are {', '.join(map(repr, self.names))}",
                next_step="use one of these names, or export the missing column",
            )
        return self.names.index(name)

    def time_column(self, name: str | None) -> int:
        """Return where the time stands: the column of that name, or the first with a usual name."""
        if name is not None:
            return self.find(name, "time column")
        for k, candidate in enumerate(self.names):
            if re.sub(r"[^a-z]", "", _UNIT_SUFFIX.sub("", candidate).lower()) in _TIME_NAMES:
                return k
        self.refuse(
            f"no time column among {', '.join(map(repr, self.names))}; expected a name such as 'time', "
            "'timestamp' or 'source_ns'",
            next_step="rename it, or say which one it is (time column)",
        )

    def truth_column(self, name: str | None, tags: Sequence[str] | None) -> int | None:
        """Return where the ground truth stands; None where there is none."""
        if name is not None:
            return self.find(name, "truth column")
        if TRUTH_NAME in self.names and TRUTH_NAME not in (tags or ()):
            return self.names.index(TRUTH_NAME)
        return None

    def blocks(self) -> Iterator[tuple[list[int], list[tuple[str, ...]]]]:
        """Yield (line of each row, columns of cells)."""
        reader = csv.reader(self._numbered, delimiter=self._delimiter)
        rows: list[list[str]] = []
        numbers: list[int] = []
        width = len(self.names)
        try:
            for row in reader:
                if len(row) != width and not self._fits(row, width):
                    continue
                rows.append(row)
                numbers.append(self._numbered.line)
                if len(rows) == _ROWS_PER_BLOCK:
                    yield numbers, list(zip(*rows, strict=True))
                    rows, numbers = [], []
        except csv.Error as exc:
            self.refuse(
                f"this is no CSV line: {exc}", line=self._numbered.line, next_step="export the file again"
            )
        if rows:
            yield numbers, list(zip(*rows, strict=True))

    def _fits(self, row: list[str], width: int) -> bool:
        """Decide on a row of another length: empty lines are left out, a trailing delimiter is forgiven."""
        if not any(cell.strip() for cell in row) and len(row) < 2:
            return False
        if len(row) == width + 1 and not row[-1].strip():
            row.pop()
            return True
        hint = (
            "a decimal comma needs ';' between the fields"
            if self._delimiter == ","
            else "a text needs quotes"
        )
        self.refuse(
            f"{len(row)} fields, expected {width} as in the header (the line begins with {row[0]!r})",
            line=self._numbered.line,
            next_step=f"correct the line or export the file again; {hint}",
        )


class _Counted:
    """Lines of a stream with the number of the last one (csv's own count restarts after the header)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.line = stream, 0

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> str:
        text = next(self._stream)
        self.line += 1
        return text


class _Clock:
    """Reads the cells of the time column; the first cell decides between ISO 8601 and numbers."""

    def __init__(self, lines: _Lines, column: int) -> None:
        self._lines, self._name = lines, lines.names[column]
        suffix = _UNIT_SUFFIX.search(self._name)
        self._unit_ns = _UNIT_NS[suffix.group(1).lower()] if suffix else 0
        self._numeric: bool | None = None

    def read(self, cells: Sequence[str], numbers: Sequence[int]) -> Int64:
        """Return int64[n], nanoseconds since 1970 UTC."""
        if self._numeric is None:
            first = self._plain(cells[0])
            self._numeric = _is_number(first) and math.isfinite(float(first))
            if self._numeric and not self._unit_ns:
                size = abs(Decimal(first))
                self._unit_ns = next(
                    (
                        unit
                        for limit, unit in ((10**11, 10**9), (10**14, 10**6), (10**17, 10**3))
                        if size < limit
                    ),
                    1,
                )
        one = self._number if self._numeric else _iso_ns
        source_ns = np.empty(len(cells), np.int64)
        k = 0
        try:
            for k, cell in enumerate(cells):  # k tells the handler where it was
                source_ns[k] = one(cell)
        except (ValueError, InvalidOperation, OverflowError):
            expected = "a number" if self._numeric else "ISO 8601 such as 2026-01-31T12:00:00.250Z"
            self._lines.refuse(
                f"{cells[k]!r} is no time; expected {expected}",
                line=numbers[k],
                column=self._name,
                next_step="correct the cell, export ISO 8601 or nanoseconds, or name another time column",
            )
        return source_ns

    def _plain(self, cell: str) -> str:
        text = cell.strip()
        return text.replace(",", ".") if self._lines.decimal_comma else text

    def _number(self, cell: str) -> int:
        try:
            return int(cell) * self._unit_ns
        except ValueError:
            # float64 has steps of 0.2 us at today's seconds, so decimals are read as decimals
            return int((Decimal(self._plain(cell)) * self._unit_ns).to_integral_value())


def _iso_ns(cell: str) -> int:
    text = cell.strip()
    when = datetime.fromisoformat(text)
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    since = when - _EPOCH
    source_ns = (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1_000
    if len(text) > 26 and (digits := _BEYOND_MICROSECONDS.search(text)):
        source_ns += int(digits.group(1).ljust(3, "0"))
    return source_ns


def _check_increasing(
    lines: _Lines,
    column: int,
    source_ns: Int64,
    last_ns: int | None,
    cells: Sequence[str],
    numbers: Sequence[int],
) -> None:
    before = source_ns[0] - 1 if last_ns is None else last_ns
    back = np.flatnonzero(np.diff(source_ns, prepend=before) <= 0)
    if not len(back):
        return
    at = int(back[0])
    by_s = (int(source_ns[at]) - int(source_ns[at - 1] if at else before)) / 1e9
    what = "the same time as the row before" if by_s == 0 else f"{-by_s:g} s before the row before"
    lines.refuse(
        f"time does not increase: {cells[at]!r} is {what}",
        line=numbers[at],
        column=lines.names[column],
        next_step="sort the rows by time and remove duplicates (local time goes back in autumn: export UTC)",
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def _numbers(lines: _Lines, column: int, cells: Sequence[str], numbers: Sequence[int]) -> Float64:
    """Return float64[n]; whole columns at once, cell by cell only where one of them is no plain number."""
    joined = "".join(cells)
    if "_" not in joined and not (lines.decimal_comma and "," in joined):  # float("1_0") is 10
        with suppress(ValueError):
            return np.array(list(map(float, cells)), np.float64)
    values = np.empty(len(cells))
    for k, cell in enumerate(cells):
        text = cell.strip()
        if lines.decimal_comma:
            text = text.replace(",", ".")
        if _is_number(text):
            values[k] = float(text)
        elif text.lower() in _NO_VALUE:
            values[k] = np.nan
        elif text.lower() in _LOGICAL:
            values[k] = _LOGICAL[text.lower()]
        else:
            lines.refuse(
                f"{cell!r} is no number",
                line=numbers[k],
                column=lines.names[column],
                next_step="correct the cell (empty, NaN or Bad = no value), or leave the column out "
                "by naming the tags wanted",
            )
    return values


def _truth(lines: _Lines, column: int, cells: Sequence[str], numbers: Sequence[int]) -> UInt8:
    values = _numbers(lines, column, cells, numbers)
    unknown = np.flatnonzero(np.isnan(values))
    if len(unknown):
        k = int(unknown[0])
        lines.refuse(
            f"{cells[k]!r} is no ground truth; expected 0 or 1",
            line=numbers[k],
            column=lines.names[column],
            next_step="correct the cell or leave the column out",
        )
    return (values != 0).astype(np.uint8)
