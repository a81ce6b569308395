"""CSV files as plants export them are read; what is wrong is named by file, line, column and value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_rows import noise

from opcua_detector.api import Record
from opcua_detector.csv_rows import read_csv, write_csv
from opcua_detector.errors import RecordError

T0 = 1_767_225_600 * 10**9  # 2026-01-01T00:00:00Z


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "Werk ü.csv"


def read(
    file: Path, text: str, **named: object
) -> tuple[list[int], list[list[float]], list[str], list[int] | None]:
    file.write_bytes(text.encode())
    source_ns, values, names, truth = read_csv(file, **named)  # type: ignore[arg-type]
    assert source_ns.dtype == np.int64 and values.dtype == np.float64
    assert values.shape == (len(source_ns), len(names))
    return source_ns.tolist(), values.tolist(), names, None if truth is None else truth.tolist()


@pytest.mark.parametrize(
    ("name", "cells", "expected"),
    [
        ("time", ["2026-01-01T00:00:00Z", "2026-01-01T00:00:00.25Z"], [T0, T0 + 250_000_000]),
        ("Timestamp", ["2026-01-01 00:00:00", "2026-01-01 00:00:01"], [T0, T0 + 10**9]),  # naive is UTC
        ("time", ["2026-01-01T02:00:00+02:00", "2026-01-01T00:00:01+00:00"], [T0, T0 + 10**9]),
        ("date_time", ["2026-01-01T00:00:00.123456789Z", "2026-01-01T00:00:00.12345679Z"],
         [T0 + 123_456_789, T0 + 123_456_790]),
        ("time", ["2025-12-31T23:59:59.999999999Z", "2026-01-01T00:00:00Z"], [T0 - 1, T0]),
        ("source_ns", ["1767225600000000001", "1767225600000000002"], [T0 + 1, T0 + 2]),
        ("time", ["1767225600000000001", "1767225600000000002"], [T0 + 1, T0 + 2]),
        ("time", ["1767225600000", "1767225600020"], [T0, T0 + 20_000_000]),
        ("time", ["1767225600000000", "1767225600000001"], [T0, T0 + 1000]),
        ("ts", ["1767225600", "1767225600.02"], [T0, T0 + 20_000_000]),
        ("time", ["1767225600.000000001", "1.767225600000000002E9"], [T0 + 1, T0 + 2]),
        ("t_s", ["0", "0.001"], [0, 1_000_000]),
        ("t_ms", ["0", "20.5"], [0, 20_500_000]),
        ("Time [us]", ["5", "6"], [5000, 6000]),
        ("time_ns", ["-5", "6"], [-5, 6]),
    ],
)  # fmt: skip
def test_time_is_read_in_each_form(file: Path, name: str, cells: list[str], expected: list[int]) -> None:
    text = f"{name},x\n" + "".join(f"{cell},1\n" for cell in cells)
    assert read(file, text)[0] == expected


@pytest.mark.parametrize(
    "text",
    [
        "time,a,b\n0,1.5,2\n1,-3e2,4\n",
        "time;a;b\n0;1,5;2\n1;-3e2;4\n",
        "time;a;b;\n0;1.5;2;\n1;-300;4;\n",
        "sep=;\r\ntime;a;b\r\n0;1,5;2\r\n1;-300;4\r\n",
        "time\ta\tb\n0\t1,5\t2\n\n1\t-300\t4\n\n",
        '\ufefftime,"a","b"\n0,"1.5", 2\n1,-300,4',
        "a,time,b\n1.5,0,2\n-300,1,4\n",
    ],
)
def test_delimiters_decimal_commas_marks_and_empty_lines_are_understood(file: Path, text: str) -> None:
    assert read(file, text) == ([0, 10**9], [[1.5, 2.0], [-300.0, 4.0]], ["a", "b"], None)


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252", "utf-8"])
def test_the_encodings_of_plants_are_understood(file: Path, encoding: str) -> None:
    file.write_bytes("time;Temperatur °C\n0;21,5\n1;22,5\n".encode(encoding))
    source_ns, values, names, _ = read_csv(file)
    assert names == ["Temperatur °C"] and values[:, 0].tolist() == [21.5, 22.5] and len(source_ns) == 2


def test_cells_without_a_value_are_nan_and_logical_ones_are_numbers(file: Path) -> None:
    cells = ["", "NaN", "nan", "Bad", "null", "None", "N/A", "-", "  "]
    text = "time,x,on\n" + "".join(f"{k},{cell},TRUE\n" for k, cell in enumerate(cells)) + "99,7,false\n"
    _, values, _, _ = read(file, text)
    column = [row[0] for row in values]
    assert all(np.isnan(column[:-1])) and column[-1] == 7.0
    assert [row[1] for row in values] == [1.0] * len(cells) + [0.0]


def test_columns_are_chosen_by_name_in_the_order_asked_for(file: Path) -> None:
    text = "no,stamp,time,b,a,truth\n1,5,0,2,1,0\n2,7,1,4,3,1\n"
    assert read(file, text, tags=["a", "b"]) == ([0, 10**9], [[1, 2], [3, 4]], ["a", "b"], [0, 1])
    assert read(file, text, tags=["time"], time_column="stamp")[:2] == (
        [5 * 10**9, 7 * 10**9],
        [[0.0], [1.0]],
    )
    assert read(file, text, tags=["a", "truth"])[2:] == (["a", "truth"], None)  # a tag of that name is a tag
    assert read(file, text, tags=["a"], truth_column="b")[3] == [1, 1]


@pytest.mark.parametrize(
    ("text", "named", "words"),
    [
        ("", {}, ["empty", "header"]),
        ("\n  \n", {}, ["empty"]),
        ("time,x\n", {}, ["no row below the header"]),
        ("0,1,2\n1,2,3\n", {}, ["line 1", "0, 1, 2", "names"]),
        ("time,x,x\n0,1,2\n", {}, ["line 1", "'x'", "two columns"]),
        ("time,,x\n0,1,2\n", {}, ["column 2 has no name"]),
        ("stamp,x\n0,1\n", {}, ["no time column", "'stamp'", "'time'"]),
        ("time,x\n0,1\n", {"time_column": "T"}, ["no time column 'T'", "'time', 'x'"]),
        ("time,x\n0,1\n", {"tags": ["x", "y"]}, ["no tag 'y'", "'x'"]),
        ("time,x\n0,1\n", {"truth_column": "t"}, ["no truth column 't'"]),
        ("time\n0\n", {}, ["no column besides"]),
        ("time,x\n0,1\n1,2,3\n", {}, ["line 3", "3 fields", "expected 2", "'1'"]),
        ("time,x,y\n0,1,2\n\n1,2\n", {}, ["line 4", "2 fields", "expected 3"]),
        ("time,x\n0,1,5\n1,2,5\n", {}, ["line 2", "decimal comma"]),
        ("time,x\n0,1\n1,abc\n", {}, ["line 3", "'x'", "'abc'", "Bad"]),
        ("time,x\n0,1\n1,1_0\n", {}, ["line 3", "'1_0'"]),
        ("time;x\n0;1.234,5\n", {}, ["line 2", "'1.234,5'"]),
        ("time,x\n0,1\nnoon,2\n", {}, ["line 3", "'time'", "'noon'", "expected a number"]),
        ("time,x\n31.01.2026 12:00,1\n", {}, ["line 2", "31.01.2026", "ISO 8601"]),
        ("time,x\nnan,1\n", {}, ["line 2", "'nan'", "no time"]),
        ("time,x\n99999999999999999999,1\n", {}, ["line 2", "no time"]),
        ("time,x\n2026-01-01T00:00:00Z,1\n,2\n", {}, ["line 3", "no time"]),
        ("time,x\n5,1\n6,2\n6,3\n", {}, ["line 4", "'6'", "same time"]),
        ("time,x\n5,1\n6,2\n4.5,3\n", {}, ["line 4", "'4.5'", "1.5 s before"]),
        ("time,x,truth\n0,1,0\n1,2,\n", {}, ["line 3", "'truth'", "0 or 1"]),
        ('time,x\n0,"1\n1,2\n', {}, ["line"]),
    ],
)
def test_what_is_wrong_is_named(file: Path, text: str, named: dict[str, object], words: list[str]) -> None:
    with pytest.raises(RecordError) as caught:
        read(file, text, **named)
    for word in [str(file), *words]:
        assert word in str(caught.value)
    assert caught.value.next_step


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no such file"):
        read_csv(tmp_path / "none.csv")
    with pytest.raises(RecordError, match="cannot be read"):
        read_csv(tmp_path)


def test_the_line_is_right_far_down_and_after_a_cell_of_two_lines(file: Path) -> None:
    rows = [f"{k},{k}\n" for k in range(20_000)]
    rows[3] = '3,"3\n"\n'
    rows[15_000] = "15000,x\n"
    with pytest.raises(RecordError, match="line 15003, column 'x'"):
        read(file, "time,x\n" + "".join(rows))
    rows[15_000] = "14998,1\n"
    with pytest.raises(RecordError, match="line 15003"):
        read(file, "time,x\n" + "".join(rows))


def test_time_must_increase_over_the_blocks_in_which_the_file_is_read(file: Path) -> None:
    rows = [f"{k},1\n" for k in range(8192)]
    with pytest.raises(RecordError, match="line 8194"):
        read(file, "time,x\n" + "".join(rows) + "8191,1\n")
    assert len(read(file, "time,x\n" + "".join(rows) + "8192,1\n")[0]) == 8193


def test_a_written_record_reads_back_exactly(file: Path) -> None:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        st.lists(st.floats() | st.sampled_from([0.1, -0.0, 1e308, 5e-324]), min_size=1, max_size=30),
        st.integers(0, 4 * 10**18), st.integers(1, 10**12), st.booleans(),
        st.text(st.characters(blacklist_categories=("Cs", "Cc", "Z")), min_size=1, max_size=8),
    )  # fmt: skip
    def check(cells: list[float], start_ns: int, period_ns: int, known: bool, name: str) -> None:
        named = f"x{name}x"
        n = len(cells)
        truth = (np.arange(n) % 2).astype(np.uint8) if known else None
        record = Record.from_rows(
            np.array(cells)[:, None], [named], period_ns, start_ns=start_ns, truth=truth
        )
        write_csv(file, record)
        source_ns, values, names, read_truth = read_csv(file)
        assert names == [named]
        np.testing.assert_array_equal(source_ns, record.source_ns)
        np.testing.assert_array_equal(values, np.where(record.valid == 1, record.values, np.nan))
        assert (read_truth is None) if truth is None else (read_truth.tolist() == truth.tolist())

    check()


def test_writing_refuses_double_names_and_leaves_no_half_file(tmp_path: Path) -> None:
    record = noise(5, 1)
    clash = Record.from_rows(record.values, ["time"], 10)
    with pytest.raises(RecordError, match="'time'"):
        write_csv(tmp_path / "x.csv", clash)
    with pytest.raises(RecordError, match="cannot be written"):
        write_csv(tmp_path / "no" / "x.csv", record)
    assert list(tmp_path.iterdir()) == []
