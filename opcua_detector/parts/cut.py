"""A record of a cyclic process off the loop: into which parts it falls, and the score of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..alarms import AlertState
from ..api import Float64, Int64, Record, UInt8
from ..guards import Guards
from ..kernels.parts import BEGIN, BROKEN, CHANGE, END, watch_rows
from ..model import NormalityModel
from .judge import PartJudge
from .model import MODES, Cycle, PartModel, judged_plan


@dataclass(frozen=True)
class Cut:
    """How a record falls into parts, int64[p] each.

    begin, end : rows, half open; whole : uint8[p], 0 where the part is cut by the record, a gap or a missing
    trigger; number : value of the counter, or count from 1
    """

    begin: Int64
    end: Int64
    whole: UInt8
    number: Int64


def cut_record(record: Record, cycle: Cycle, tolerance: int) -> Cut:
    """Cut a record into parts, as the stream is cut; the record holds the trigger among its tags."""
    at = [tag.name for tag in record.tags].index(cycle.tag)
    codes = np.zeros(len(record), np.int64)
    silent = np.zeros(len(record), np.uint8)
    value = np.ascontiguousarray(record.values[:, at])
    mode = MODES[cycle.on]
    watch_rows(value, np.ascontiguousarray(record.valid[:, at]), record.gap, mode, cycle.until == "back", tolerance,
               codes, silent)
    found: list[tuple[int, int, int, int]] = []
    open_at, number, begun = -1, 0, 0
    for t in np.flatnonzero((codes != 0) | (record.gap != 0)):
        if open_at >= 0 and (record.gap[t] or codes[t] & (BROKEN | END)):
            found.append((open_at, int(t), int(not record.gap[t] and not codes[t] & BROKEN), number))
            open_at = -1
        if codes[t] & BEGIN:
            begun += 1
            open_at, number = int(t), round(float(value[t])) if mode == CHANGE else begun
    if open_at >= 0:
        found.append((open_at, len(record), 0, number))
    table = np.array(found, np.int64).reshape(-1, 4)
    return Cut(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].astype(np.uint8), table[:, 3].copy())


@dataclass(frozen=True)
class PartRows:
    """One whole part of a record as the stream sees it, guards included.

    at : its index in the `Cut`; number, begin_ns, end_ns : as in `api.PartVerdict`
    values : float64[n, c]; valid : uint8[n, c]; aside : bool[c], columns that a guard masks
    """

    at: int
    number: int
    begin_ns: int
    end_ns: int
    values: Float64
    valid: UInt8
    aside: NDArray[np.bool_]

    def judged_by(self, judge: PartJudge) -> float:
        """Return its score; the judge then knows its features."""
        return judge.whole(self.values, self.valid, self.aside)


def cut_by(model: NormalityModel, record: Record) -> Cut:
    """Return how a record falls into parts by a model."""
    parts = PartModel.from_method(model.methods[0])
    return cut_record(record, parts.cycle, parts.tolerance)


def parts_of(
    model: NormalityModel, record: Record, cut: Cut, kept_back: NDArray[np.bool_] | None = None,
) -> Iterator[PartRows]:
    """Yield the whole parts of a record of the model's tags, which falls into parts like this.

    kept_back : bool[n]; rows of maintenance and the like: a part with one of them is left out
    """
    names = [tag.name for tag in record.tags]
    plan, tag_at = judged_plan(model, names)
    guarded = Guards(model.facts.get("guards", {}), names).rows(record)
    columns = plan.prepare(replace(guarded, gap=record.gap))
    masked = ((guarded.valid == 0) & (record.valid != 0))[:, tag_at]
    told = np.flatnonzero(guarded.gap != record.gap)
    for p in np.flatnonzero(cut.whole):
        begin, end = int(cut.begin[p]), int(cut.end[p])
        if kept_back is not None and kept_back[begin:end].any():
            continue
        known = columns.valid[begin:end].copy()
        for t in told[(told >= begin) & (told <= end)]:
            known[:t - begin, masked[t]] = 0
        yield PartRows(int(p), int(cut.number[p]), int(record.source_ns[begin]), int(record.source_ns[end - 1]),
                       columns.values[begin:end], known, masked[begin + 1:end + 1].any(axis=0))


def part_scores(
    model: NormalityModel, record: Record, kept_back: NDArray[np.bool_] | None = None,
) -> tuple[Cut, Float64]:
    """Return the parts of a record and the score of each, float64[p]; NaN where it is not whole or mostly masked.

    The record holds the model's tags; the score is the one that a stream of the same rows gives at each part's end.

    kept_back : bool[n]; rows on which alerts are kept back: a part with one of them has no score
    """
    cut = cut_by(model, record)
    judge = PartJudge(PartModel.from_method(model.methods[0]))
    score = np.full(len(cut.begin), np.nan)
    for part in parts_of(model, record, cut, kept_back):
        score[part.at] = part.judged_by(judge)
    return cut, score


def count_part_alerts(
    model: NormalityModel, record: Record, kept_back: NDArray[np.bool_], on_delay_ns: int, off_delay_ns: int,
) -> int:
    """Return how many alerts the whole parts of a record raise; kept_back : see `part_scores`."""
    cut, scores = part_scores(model, record, kept_back)
    alert = AlertState(on_delay_ns, off_delay_ns, deadband=0.0)
    raised = 0
    stop = len(record) - 1
    for p in np.flatnonzero(cut.whole):
        # The verdict stands until the next part has ended, so a delay is over some time before.
        until = min(int(cut.end[p]) + int(cut.end[p] - cut.begin[p]), stop)
        for t in (min(int(cut.end[p]), stop), until):
            held = kept_back[cut.begin[p]:cut.end[p]].any()
            alert.step(0.0 if held else float(scores[p]), int(record.source_ns[t]))
            raised += alert.raised
    return raised
