"""Adapts a transition model to rows that were normal: operator feedback, and learning of new healthy batches.

    model, journal = adapt(model, record)

needs neither the training data nor a new fit, forgets no old state and does nothing a second time: after it no
row that had a known transition has a larger `trans` or `bound` than before, and the rows of the record have
`trans` 0 and `bound` 0. Levels and scales stay as they were fitted.

Source: M. Alamir, R. Dion (2024), eq. 14 (new transitions), 17a, 17b (bounds), 20, 21 (vectors); the maps are
ours (section 3.4 of the design).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcua_detector.api import Float64, Int64, MethodModel, Record, UInt8
from opcua_detector.detectors.transition_fit import USUAL_ERRORS, Int32
from opcua_detector.errors import ModelTagsError
from opcua_detector.kernels.bounds import learn_bounds, lowest_correlation, reduce_vectors, widen_sensor
from opcua_detector.kernels.transition import LARGEST

BY_ROW = ("lo", "hi", "cover", "instants")
BY_ROW_AFFINE = ("maps", "spread", "limit", "slack")
NEW, WIDER, MOVED, SLACK = range(4)
COUNTS = ("transitions", "bounds", "vectors", "offsets", "slacks")


def adapt(model: MethodModel, record: Record, *, borrow_widths: bool = True) -> tuple[MethodModel, dict[str, Any]]:
    """Return a model for which the rows of a record are normal, and what changed; the old model is not touched.

    Parameters
    ----------
    model : MethodModel of the method `transition`, any mode
    record : rows that were normal, with the model's columns among its tags (columns of a plan, as for `fit`);
        gaps and masks as ever. Each instant needs 2 step rows: give the rows around an alert too
    borrow_widths : a new transition starts with bounds centred on its vector, with the widths of the nearest
        one: right for feedback on a few rows. False: its bounds are those of its own vectors, right for a
        healthy batch, and the same as a fit with these levels and scales would give

    Returns
    -------
    MethodModel : arrays that did not change are equal bit for bit; instants of old transitions stay as fitted
    dict, JSON-able:
        instants : int, how many were looked at, over all sensors
        changed : bool
        tags : tag -> {transitions: new ones, bounds: transitions whose bounds were widened, vectors: how many
            join the kept ones, offsets: maps that were moved, slacks: transitions whose affine error is now excused
            up to the farthest of these rows}; only tags of which something changed
        low, high : tag -> value in its unit; where the range of normal values grew

    Raises
    ------
    ModelTagsError
        A column of the model is missing, or the rows have another period.

    Notes
    -----
    Instants are taken in order of time and each may build on the one before, so a record in one go gives the
    same as its parts one after the other (but for the choice of vectors, of which any that covers will do).
    Values that are not valid teach nothing. Where the kept vectors would be more than `max_vectors`, the union
    is covered anew by farthest first; `cover` then bounds, by the angles, how far an old vector can be from
    those that are left.
    """
    missing = [name for name in model.columns if name not in {tag.name for tag in record.tags}]
    if missing or record.period_ns != model.period_ns:
        raise ModelTagsError(
            f"the rows lack {', '.join(missing)}" if missing else
            f"the rows are {record.period_ns / 1e6:g} ms apart, the model is for {model.period_ns / 1e6:g} ms",
            where=model.plugin, next_step="take the rows of the monitor that the model was fitted for",
        )
    rows = _Rows(model, record.select(model.columns))
    a = model.arrays
    parts, tables, journal, looked_at = [], [], {}, 0
    n_rows = 0
    for i, own in enumerate(np.flatnonzero(a["judged"])):
        part, table, counts, instants = _adapt_sensor(model, rows, i, int(own), borrow_widths)
        tables.append(np.where(table >= 0, table + n_rows, -1).astype(np.int32))
        n_rows += part["lo"].shape[0]
        parts.append(part)
        looked_at += instants
        if any(counts):
            journal[model.columns[own]] = dict(zip(COUNTS, counts, strict=True))
    arrays = {**a, **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]}}
    n_vectors = arrays.pop("n_vectors")
    arrays["pointers"] = np.concatenate([[0], np.cumsum(n_vectors)]).astype(np.int32)
    arrays["table"] = np.array(tables)
    arrays["low"], arrays["high"] = rows.ranges()
    told = {
        name: {tag: float(after[c]) for c, tag in enumerate(model.columns) if after[c] != a[name][c]}
        for name, after in (("low", arrays["low"]), ("high", arrays["high"]))
    }
    changed = bool(journal or told["low"] or told["high"])
    return replace(model, arrays=arrays), {"instants": looked_at, "changed": changed, "tags": journal, **told}


class _Rows:
    """A record in the model's columns as the kernels want it.

    values : float64[n, n_columns], engineering units; valid : uint8[n_columns, n]; scaled : float64[n_columns, n],
    0 where not valid
    """

    def __init__(self, model: MethodModel, record: Record) -> None:
        self.model, self.record, self.values = model, record, record.values
        a = model.arrays
        good = (record.valid != 0) & np.isfinite(record.values)
        with np.errstate(invalid="ignore", over="ignore"):
            z = ((record.values - a["mean"]) * a["inverse"]).clip(-LARGEST, LARGEST)
        self.scaled: Float64 = np.ascontiguousarray(np.where(good, z, 0.0).T)
        self.valid: UInt8 = np.ascontiguousarray(good.T.astype(np.uint8))
        self._taught = np.zeros(len(record), np.int64)

    def instants(self, own: int, step: int) -> Int64:
        """Return int64[m]: instants of a sensor that are judged; mark the rows they touch."""
        ok = np.zeros(len(self.record), bool)
        for start, stop in self.record.segments() if len(self.record) else ():
            ok[start + step - 1 : max(start + step - 1, stop - step)] = True
        t = np.flatnonzero(ok & (self.valid[own] != 0))
        t = t[self.valid[own, t + step] != 0]
        # as differences, for a running sum
        np.add.at(self._taught, t - step + 1, 1)
        np.add.at(self._taught, (t + step + 1)[t + step + 1 < self._taught.size], -1)
        return t

    def ranges(self) -> tuple[Float64, Float64]:
        """Return (low, high) of the columns, widened by the values that took part."""
        a = self.model.arrays
        low, high = a["low"].copy(), a["high"].copy()
        took_part = (self.valid != 0) & (np.cumsum(self._taught) > 0)
        for c in np.flatnonzero(took_part.any(axis=1) & (a["inverse"] != 0.0)):
            x = self.values[took_part[c], c]
            low[c], high[c] = min(low[c], x.min()), max(high[c], x.max())
        return low, high


def _adapt_sensor(
    model: MethodModel, rows: _Rows, i: int, own: int, borrow: bool
) -> tuple[dict[str, NDArray[Any]], Int32, tuple[int, ...], int]:
    """Adapt one sensor; return its arrays by row, its table with rows from 0 on, `COUNTS`, and its instants."""
    a, p = model.arrays, model.params
    levels, step, affine = int(p["levels"]), int(p["step"]), "maps" in a
    old_codes = np.flatnonzero(a["table"][i] >= 0)
    old_rows = a["table"][i][old_codes]
    t = rows.instants(own, step)
    level = np.searchsorted(a["edges"][i], rows.values[t, own], side="left")
    codes = (level * levels + np.searchsorted(a["edges"][i], rows.values[t + step, own], side="left")).astype(np.int64)
    new_codes = np.setdiff1d(codes, old_codes)
    n_old, n = old_rows.size, old_rows.size + new_codes.size
    names = BY_ROW + (BY_ROW_AFFINE if affine else ())
    part = {name: np.zeros((n, *a[name].shape[1:]), a[name].dtype) for name in names}
    for name in names:
        part[name][:n_old] = a[name][old_rows]
    table = np.full(levels**2, -1, np.int32)
    table[old_codes] = np.arange(n_old, dtype=np.int32)
    changed = np.zeros((n, 4), np.uint8)
    nothing, none = np.zeros((0, 0)), np.zeros(0)
    widen_sensor(
        rows.scaled, rows.valid, np.array(a["partners"][i]), own, step, levels, t, codes, table,
        part["lo"], part["hi"], part["maps"] if affine else nothing,
        np.array(a["general"][i]) if affine else none, part["spread"] if affine else nothing,
        part["limit"] if affine else none, part["slack"] if affine else none,
        USUAL_ERRORS * float(a["usual"][i]) if affine else 0.0, borrow, n_old, changed,
    )
    part["instants"][n_old:] = np.bincount(table[codes], minlength=n)[n_old:]
    kept = [a["vectors"][a["pointers"][row] : a["pointers"][row + 1]] for row in old_rows]
    kept += [np.zeros((0, a["vectors"].shape[1]), np.float32)] * new_codes.size
    joined = _join_vectors(model, rows, i, own, t, table[codes], kept, part["cover"])
    seen = np.flatnonzero(table >= 0)
    by_code = table[seen]
    part = {name: array[by_code] for name, array in part.items()}
    kept = [kept[row] for row in by_code]
    part["n_vectors"] = np.array([len(vectors) for vectors in kept], np.int64)
    part["vectors"] = np.concatenate(kept)
    sorted_table = np.full(levels**2, -1, np.int32)
    sorted_table[seen] = np.arange(n, dtype=np.int32)
    wider = (changed[:, WIDER] != 0) & (changed[:, NEW] == 0)
    counts = (
        int(changed[:, NEW].sum()), int(wider.sum()), joined,
        int(changed[:, MOVED].sum()), int(changed[:, SLACK].sum()),
    )
    return part, sorted_table, counts, int(t.size)


def _join_vectors(
    model: MethodModel, rows: _Rows, i: int, own: int, t: Int64, row: Int32, kept: list[NDArray[np.float32]],
    cover: NDArray[np.float32],
) -> int:
    """Join the vectors of the instants t, each of which belongs to `row`, to the kept ones; return how many join.

    Those kept stay, and of the others join what is not covered; so all that was covered stays covered. Only
    where that is more than `max_vectors` is the union reduced anew.

    kept : per row float32[m, n_e]; cover : float32[n_rows]; both are changed
    """
    a, p = model.arrays, model.params
    step, eta, faithful = int(p["step"]), float(p["eta"]), bool(p["faithful"])
    most = 0 if faithful else int(p["max_vectors"])
    partners = np.array(a["partners"][i])
    # only whole vectors have a shape that can be compared
    bad = np.concatenate([[0], np.cumsum(rows.valid[own] == 0)])
    whole = (rows.valid[partners][:, t] != 0).all(axis=0) & (bad[t + 1] == bad[t - step + 1])
    t, row = t[whole], row[whole]
    order = np.argsort(row, kind="stable")
    t, row = np.ascontiguousarray(t[order]), row[order]
    borders = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), row.size] if row.size else []
    n_e = a["lo"].shape[1]
    joined = 0
    for start, stop in pairwise(borders):
        at = int(row[start])
        old = kept[at]
        n = len(old) + stop - start
        unit, scratch = np.empty((n, n_e), np.float32), np.zeros((2, n_e))
        unit[: len(old)] = old
        n = len(old) + learn_bounds(
            rows.scaled, partners, own, step, t, start, stop, scratch, 0, unit[len(old) :]
        )
        best, chosen = np.empty(n), np.empty(n, np.int32)
        enough = max(len(old), most + 1) if most else n
        n_kept = reduce_vectors(unit, n, len(old), eta, enough, not faithful, faithful, best, chosen)
        stays = np.ones(len(old), bool)
        if most and n_kept > max(most, len(old)):
            n_kept = reduce_vectors(unit, n, 0, eta, most, True, False, best, chosen)
            stays[:] = False
            stays[chosen[:n_kept][chosen[:n_kept] < len(old)]] = True
        kept[at] = unit[chosen[:n_kept]]
        joined += int((chosen[:n_kept] >= len(old)).sum())
        farthest = _farthest(kept[at], unit[len(old) : n])
        if not stays.all():  # what a dropped one stood for is at most the two angles away
            angles = np.arccos(1.0 - np.clip([float(cover[at]), _farthest(kept[at], old[~stays])], 0.0, 2.0))
            farthest = max(farthest, float(1.0 - np.cos(min(angles.sum(), np.pi))))
        cover[at] = max(cover[at], np.float32(farthest))
    return joined


def _farthest(kept: NDArray[np.float32], others: NDArray[np.float32]) -> float:
    """Return how far (1 - signed correlation) the farthest of some vectors is from the nearest kept one."""
    return 1.0 - lowest_correlation(np.concatenate([kept, others]), len(kept), len(kept) + len(others))
