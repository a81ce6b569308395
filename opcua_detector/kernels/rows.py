"""The rule of time as one compiled state machine: samples in, rows on a regular grid out.

One kernel serves the live connection, history, recordings and CSVs, so that replay equals live by
construction. All state lives in arrays that the caller owns (`opcua_detector.frames` names and explains
them); the kernel allocates nothing and may stop in the middle when the output is full: it is then called
again with the same input.

Slot of a sample: the grid row whose window (g - P/2, g + P/2] holds its stamp.
"""

from __future__ import annotations

import numpy as np

from .jit import kernel

# scalar state, int64[N_SCALARS]
(
    PERIOD,
    LATENESS,
    MAX_HOLD,
    PHASE,
    ANCHOR,
    HAS_ANCHOR,
    ROW,
    NEWEST,
    LAST_ANY,
    MISSING,
    GAP_NEXT,
    SEQ,
    BOOT_N,
    BOOT_FIRST,
    BOOT_HOLES,
    BOOT_POS,
    BEHIND,
    OUT_N,
    BOOT_SPAN,
) = range(19)
N_SCALARS = 19
PHASE_BOOT, PHASE_RUN = 0, 1

# per tag, int64[N_TAG_INTS, n_tags]
(
    STAMP,
    SLOT,
    STATUS,
    KNOWN,
    USED,
    GOOD_SLOT,
    HAS_GOOD,
    NEWEST_SLOT,
    SEEN,
    STEP,
    STEP_MIN,
    STEP_MAX,
    STEP_COUNT,
    STALE,
    HOLD,
    POLICY,
    UNCERTAIN,
) = range(17)
N_TAG_INTS = 17
POLICY_HOLD, POLICY_MASK, POLICY_STOP, POLICY_USE = 0, 1, 2, 3

# counters, uint64[N_COUNTERS]
COUNTERS = (
    "delivered",
    "used",
    "late",
    "duplicate",
    "replaced",
    "skipped",  # what became of each sample
    "bad",
    "uncertain",
    "non_finite",
    "overflowed",
    "null_timestamp",
    "lost",  # what was wrong with samples
    "held",
    "masked",
    "stale",  # cells of rows
    "rows",
    "gaps",
    "clock_back",  # rows
)
(
    C_DELIVERED,
    C_USED,
    C_LATE,
    C_DUPLICATE,
    C_REPLACED,
    C_SKIPPED,
    C_BAD,
    C_UNCERTAIN,
    C_NON_FINITE,
    C_OVERFLOWED,
    C_NULL_TIMESTAMP,
    C_LOST,
    C_HELD,
    C_MASKED,
    C_STALE,
    C_ROWS,
    C_GAPS,
    C_CLOCK_BACK,
) = range(18)
N_COUNTERS = 18

DONE, FULL, UNSORTED = 0, 1, 2

FAR_PAST = -(2**62)
FOR_EVER = 2**62  # rows
STEP_WINDOW = 8  # intervals over which it is learnt whether a tag reports evenly, and how often
# Status words (Part 4, 7.39; Part 8, 6.3): what a cell says when it is not a fresh sample.
WAITING = 0x80320000  # BadWaitingForInitialData: never received
NO_COMMUNICATION = 0x80310000  # BadNoCommunication: older than max_hold
LAST_USABLE = 0x40900000  # UncertainLastUsableValue: held over a Bad sample
OUT_OF_RANGE = 0x803C0000  # BadOutOfRange: NaN or infinite
OVERFLOW_BITS = 0x480  # InfoType DataValue (bit 10) with the Overflow bit (bit 7)


@kernel
def _slot(st, stamp):
    """Row whose window (g - P/2, g + P/2] holds the stamp; half is rounded down for an odd period."""
    period = st[PERIOD]
    return (stamp - st[ANCHOR] + period - period // 2 - 1) // period


@kernel
def _expected(tags, j, row, max_hold):
    """Whether the row waits for this tag: no sooner than its shortest interval, no longer than max_hold."""
    age = row - tags[NEWEST_SLOT, j]
    return tags[STEP, j] <= age <= max_hold


@kernel
def _count_missing(st, tags, n):
    missing = 0
    for j in range(n):
        if tags[NEWEST_SLOT, j] < st[ROW] and _expected(tags, j, st[ROW], st[MAX_HOLD]):
            missing += 1
    st[MISSING] = missing


@kernel
def _policy(tags, j, status):
    """What the severity of a status word (Part 4, 7.39) does to the value of a tag."""
    if (status & 0x80000000) != 0:
        return tags[POLICY, j]
    if (status & 0x40000000) != 0:
        return tags[UNCERTAIN, j]
    return POLICY_USE


@kernel
def _set_current(tags, tag_values, counts, j, stamp, slot, value, status):
    """Make a sample the value of the tag from now on; one that no row has used is replaced."""
    if tags[KNOWN, j] == 1 and tags[USED, j] == 0:
        counts[C_REPLACED] += np.uint64(1)
    tags[STAMP, j] = stamp
    tags[SLOT, j] = slot
    tags[STATUS, j] = status
    tags[KNOWN, j] = 1
    tags[USED, j] = 0
    tag_values[0, j] = value
    if _policy(tags, j, status) == POLICY_USE and np.isfinite(value):
        tags[GOOD_SLOT, j] = slot
        tags[HAS_GOOD, j] = 1
        tag_values[1, j] = value


@kernel
def _close_row(st, tags, tag_values, ring, ring_values, out, out_values, out_valid, out_status, counts):
    """Close row ROW: newest sample per tag, hold-last, masks; then go on to the next row."""
    n = tags.shape[1]
    row = st[ROW]
    at = row % ring.shape[1]
    stop = False
    for j in range(n):
        if ring[0, at, j] != FAR_PAST:
            _set_current(tags, tag_values, counts, j, ring[0, at, j], row, ring_values[at, j], ring[1, at, j])
            ring[0, at, j] = FAR_PAST
        if tags[KNOWN, j] == 1 and (
            _policy(tags, j, tags[STATUS, j]) == POLICY_STOP
            or (tags[POLICY, j] == POLICY_STOP and not np.isfinite(tag_values[0, j]))
        ):
            stop = True
    st[ROW] = row + 1
    if stop:
        for j in range(n):
            if tags[KNOWN, j] == 1 and tags[USED, j] == 0:
                tags[USED, j] = 1
                counts[C_SKIPPED] += np.uint64(1)
        st[GAP_NEXT] = 1
        _count_missing(st, tags, n)
        return
    o = st[OUT_N]
    for j in range(n):
        value = np.nan
        valid = 0
        status = WAITING
        if tags[KNOWN, j] == 1:
            if tags[USED, j] == 0:
                tags[USED, j] = 1
                counts[C_USED] += np.uint64(1)
            status = tags[STATUS, j]
            policy = _policy(tags, j, status)
            if policy != POLICY_USE:
                if (
                    policy == POLICY_HOLD
                    and tags[HAS_GOOD, j] == 1
                    and row - tags[GOOD_SLOT, j] <= tags[HOLD, j]
                ):
                    value = tag_values[1, j]
                    valid = 1
                    status = LAST_USABLE
                    counts[C_HELD] += np.uint64(1)
                else:
                    counts[C_MASKED] += np.uint64(1)
            elif not np.isfinite(tag_values[0, j]):
                status = OUT_OF_RANGE
                counts[C_MASKED] += np.uint64(1)
            elif row - tags[SLOT, j] > tags[STALE, j]:
                value = tag_values[0, j]
                status = NO_COMMUNICATION
                counts[C_STALE] += np.uint64(1)
            else:
                value = tag_values[0, j]
                valid = 1
                if tags[SLOT, j] != row:
                    counts[C_HELD] += np.uint64(1)
        else:
            counts[C_MASKED] += np.uint64(1)
        out_values[o, j] = value
        out_valid[o, j] = valid
        out_status[o, j] = status
    out[0, o] = st[ANCHOR] + row * st[PERIOD]
    out[1, o] = st[GAP_NEXT]
    if st[GAP_NEXT] == 1 and counts[C_ROWS] > 0:
        counts[C_GAPS] += np.uint64(1)
    counts[C_ROWS] += np.uint64(1)
    st[GAP_NEXT] = 0
    st[OUT_N] = o + 1
    _count_missing(st, tags, n)


@kernel
def _close_due(
    st, tags, tag_values, ring, ring_values, out, out_values, out_valid, out_status, counts, hole, flush
):
    """Close every row that is due; True when the output is full and more may be due."""
    half = st[PERIOD] // 2
    while True:
        pending = st[ROW] <= st[LAST_ANY]
        overdue = st[NEWEST] >= st[ANCHOR] + st[ROW] * st[PERIOD] + half + st[LATENESS]
        if pending:
            due = flush or hole or overdue or st[MISSING] == 0
        else:
            due = overdue and not hole and not flush and st[ROW] - st[LAST_ANY] <= st[MAX_HOLD]
        if not due:
            return False
        if st[OUT_N] >= out.shape[1]:
            return True
        _close_row(st, tags, tag_values, ring, ring_values, out, out_values, out_valid, out_status, counts)


@kernel
def _sort(x, n):
    """Sort int64[n] in place (heapsort: numba's own sort allocates)."""
    end = n
    start = n // 2
    while end > 1:
        if start > 0:
            start -= 1
        else:
            end -= 1
            x[0], x[end] = x[end], x[0]
        root = start
        child = 2 * root + 1
        while child < end:
            if child + 1 < end and x[child] < x[child + 1]:
                child += 1
            if x[root] >= x[child]:
                break
            x[root], x[child] = x[child], x[root]
            root = child
            child = 2 * root + 1


@kernel
def _start_grid(st, tags, boot, counts):
    """End the start phase: choose the phase of the grid and the first row.

    The phase is the middle of the arc that the stamps seen so far cover (the circle less its widest empty
    arc), so that jitter and skew fall to both sides of it; where they cover the whole period it is the first
    stamp.
    """
    first = boot[1, st[BOOT_FIRST]]
    period = st[PERIOD]
    n = st[BOOT_N] - st[BOOT_FIRST]
    if st[HAS_ANCHOR] == 0:
        phases = boot[3]
        for i in range(n):
            phases[i] = (boot[1, st[BOOT_FIRST] + i] - first) % period
        _sort(phases, n)
        widest = phases[0] + period - phases[n - 1]  # empty arc that ends at the lowest phase
        after = 0
        for i in range(1, n):
            if phases[i] - phases[i - 1] > widest:
                widest = phases[i] - phases[i - 1]
                after = i
        centre = phases[after] + (period - widest) // 2
        st[ANCHOR] = first + centre if widest >= period // 8 else first
        # Whole periods back to the row that holds the first stamp, so that rows count from there.
        st[ANCHOR] += _slot(st, first) * period
        st[HAS_ANCHOR] = 1
        st[ROW] = 0
    else:
        slot = _slot(st, first)
        if slot >= st[ROW]:
            st[ROW] = slot
        elif st[ROW] - slot > st[MAX_HOLD] + st[LATENESS] // period + 1:
            st[ROW] = slot  # the source clock was set back: time goes back, marked as a gap
            counts[C_CLOCK_BACK] += np.uint64(1)
    st[LAST_ANY] = st[ROW] - 1
    st[NEWEST] = first
    for j in range(tags.shape[1]):
        tags[NEWEST_SLOT, j] = st[ROW] - 1
        tags[STEP, j] = 1
        tags[STEP_MIN, j] = 2**62
        tags[STEP_MAX, j] = 0
        tags[STEP_COUNT, j] = 0
    _count_missing(st, tags, tags.shape[1])
    st[PHASE] = PHASE_RUN
    st[BOOT_POS] = 0


@kernel
def _resume(st, tags, row):
    """Go on after a hole: the row waits for every tag that was alive when the hole began."""
    for j in range(tags.shape[1]):
        if st[LAST_ANY] - tags[NEWEST_SLOT, j] <= st[MAX_HOLD]:
            tags[NEWEST_SLOT, j] = row - 1
            tags[STEP, j] = 1
    st[ROW] = row
    _count_missing(st, tags, tags.shape[1])


@kernel
def _take(st, tags, tag_values, ring, ring_values, counts, j, stamp, slot, at, value, status):
    """Put one sample where it belongs: its row, the hold value when that row is closed, or a counter.

    at : place of its row in the ring
    """
    if tags[KNOWN, j] == 1 and stamp <= tags[STAMP, j]:
        if stamp < tags[STAMP, j]:
            counts[C_LATE] += np.uint64(1)
            return
        counts[C_DUPLICATE] += np.uint64(1)  # the newer arrival wins; it is no second sample
        used = tags[USED, j]
        tags[USED, j] = 1
        _set_current(tags, tag_values, counts, j, stamp, tags[SLOT, j], value, status)
        tags[USED, j] = used
        return
    if slot < st[ROW]:
        _set_current(tags, tag_values, counts, j, stamp, slot, value, status)
    else:
        held = ring[0, at, j]
        if held != FAR_PAST:
            if stamp < held:
                counts[C_REPLACED] += np.uint64(1)
                return
            if stamp == held:
                counts[C_DUPLICATE] += np.uint64(1)
            else:
                counts[C_REPLACED] += np.uint64(1)
        ring[0, at, j] = stamp
        ring[1, at, j] = status
        ring_values[at, j] = value
        if slot > st[LAST_ANY]:
            st[LAST_ANY] = slot
    step = slot - tags[NEWEST_SLOT, j]
    if step <= 0:
        tags[SEEN, j] = 1
        return
    if slot >= st[ROW] > tags[NEWEST_SLOT, j] and _expected(tags, j, st[ROW], st[MAX_HOLD]):
        st[MISSING] -= 1
    tags[NEWEST_SLOT, j] = slot
    if tags[SEEN, j] == 1:
        # A tag of even intervals is not waited for before it can report; one that reports on change always
        # is.
        tags[STEP, j] = min(tags[STEP, j], step)
        tags[STEP_MIN, j] = min(tags[STEP_MIN, j], step)
        tags[STEP_MAX, j] = max(tags[STEP_MAX, j], step)
        tags[STEP_COUNT, j] += 1
        if tags[STEP_COUNT, j] >= STEP_WINDOW:
            tags[STEP, j] = tags[STEP_MIN, j] if 4 * tags[STEP_MIN, j] >= 3 * tags[STEP_MAX, j] else 1
            tags[STEP_MIN, j] = 2**62
            tags[STEP_MAX, j] = 0
            tags[STEP_COUNT, j] = 0
    tags[SEEN, j] = 1
    if slot < st[ROW]:
        _count_missing(st, tags, tags.shape[1])  # when the tag is due next has changed


@kernel
def _lose(st, tags, ring, counts):
    """Forget every hold and go back to the start phase; the grid keeps its phase."""
    for j in range(tags.shape[1]):
        for at in range(ring.shape[1]):
            if ring[0, at, j] != FAR_PAST:
                ring[0, at, j] = FAR_PAST
                counts[C_SKIPPED] += np.uint64(1)
        if tags[KNOWN, j] == 1 and tags[USED, j] == 0:
            counts[C_SKIPPED] += np.uint64(1)
        tags[KNOWN, j] = 0
        tags[USED, j] = 1
        tags[STAMP, j] = FAR_PAST
        tags[HAS_GOOD, j] = 0
        tags[SEEN, j] = 0
    if st[PHASE] == PHASE_BOOT:
        counts[C_SKIPPED] += np.uint64(st[BOOT_N])
    st[PHASE] = PHASE_BOOT
    st[BOOT_N] = 0
    st[BOOT_FIRST] = 0
    st[BOOT_HOLES] = 0
    st[BOOT_POS] = 0
    st[BEHIND] = 0
    st[GAP_NEXT] = 1


@kernel(
    "int64(int64[::1], int64[:,::1], float64[:,::1], int64[:,:,::1], float64[:,::1], int64[:,::1], "
    "float64[::1], int64[:,::1], float64[:,::1], uint8[:,::1], uint32[:,::1], uint64[::1], int32[::1], "
    "int64[::1], float64[::1], uint32[::1], int64[::1], int64, boolean)",
    cache=True,
)
def close_rows(
    st,
    tags,
    tag_values,
    ring,
    ring_values,
    boot,
    boot_values,
    out,
    out_values,
    out_valid,
    out_status,
    counts,
    tag_index,
    source_ns,
    value,
    status,
    position,
    watermark,
    flush,
):
    """Take samples from `position` on and write the rows that close; the caller drains them and calls again.

    st : int64[N_SCALARS], tags : int64[N_TAG_INTS, n_tags], tag_values : float64[2, n_tags] (current, last
        good)
    ring : int64[2, n_slots, n_tags] (stamp, status), ring_values : float64[n_slots, n_tags]; rows not yet
        closed
    boot : int64[4, capacity] (tag, stamp, status; room to sort in), boot_values : float64[capacity]; samples
        before the first row
    out : int64[2, rows] (source_ns, gap); out_values, out_valid, out_status : [rows, n_tags]
    counts : uint64[N_COUNTERS]
    tag_index int32[m], source_ns int64[m] not decreasing, value float64[m], status uint32[m]; position
    int64[1]
    watermark : int; rows this much behind it close although nothing arrived (FAR_PAST: none)
    flush : bool; end of input: close every row that has a sample

    Returns DONE, FULL (drain and call again) or UNSORTED (nothing taken; sort by stamp and call again).
    """
    m = source_ns.shape[0]
    n = tags.shape[1]
    late_rows = st[LATENESS] // st[PERIOD] + 1
    # A division takes as long as all else that is done with a sample, and the next one is mostly of the same row.
    window_slot, window_at, window_start, window_end = 0, 0, 0, 0
    if position[0] == 0:
        for i in range(1, m):
            if source_ns[i] < source_ns[i - 1]:
                return UNSORTED
    while True:
        # the next sample: kept back at the start, or from the input
        replay = st[PHASE] == PHASE_RUN and st[BOOT_POS] < st[BOOT_N]
        from_input = not replay and position[0] < m
        if from_input:
            i = position[0]
            if tag_index[i] < 0 or tag_index[i] >= n:
                counts[C_DELIVERED] += np.uint64(1)
                counts[C_SKIPPED] += np.uint64(1)
                position[0] += 1
                continue
        if from_input and st[PHASE] == PHASE_BOOT:
            i = position[0]
            stamp = source_ns[i]
            b = st[BOOT_N]
            if b > 0 and stamp - boot[1, b - 1] > st[MAX_HOLD] * st[PERIOD] and st[BOOT_HOLES] <= n:
                # Values that were set long ago (a set-point) start no rows: they wait as holds for the first
                # one.
                st[BOOT_FIRST] = b
                st[BOOT_HOLES] += 1
            boot[0, b] = tag_index[i]
            boot[1, b] = stamp
            boot[2, b] = status[i]
            boot_values[b] = value[i]
            st[BOOT_N] = b + 1
            position[0] += 1
            counts[C_DELIVERED] += np.uint64(1)
            span = st[BOOT_SPAN] if st[HAS_ANCHOR] == 0 else 1
            if stamp - boot[1, st[BOOT_FIRST]] >= span * st[PERIOD] or st[BOOT_N] == boot.shape[1]:
                _start_grid(st, tags, boot, counts)
            continue
        if st[PHASE] == PHASE_BOOT:
            # no input left: a watermark or the end of input may end the start phase
            if st[BOOT_N] == 0:
                return DONE
            span = st[BOOT_SPAN] if st[HAS_ANCHOR] == 0 else 1
            if not flush and watermark - boot[1, st[BOOT_FIRST]] < span * st[PERIOD]:
                return DONE
            _start_grid(st, tags, boot, counts)
            continue
        has = replay or from_input
        hole = False
        slot = st[ROW]
        if replay:
            b = st[BOOT_POS]
            j, stamp, word, v = boot[0, b], boot[1, b], boot[2, b], boot_values[b]
        elif from_input:
            i = position[0]
            j, stamp, word, v = np.int64(tag_index[i]), source_ns[i], np.int64(status[i]), value[i]
        else:
            j, stamp, word, v = 0, watermark, 0, 0.0
        if has:
            if not window_start < stamp <= window_end:
                window_slot = _slot(st, stamp)
                window_at = window_slot % ring.shape[1]
                window_end = st[ANCHOR] + window_slot * st[PERIOD] + st[PERIOD] // 2
                window_start = window_end - st[PERIOD]
            slot = window_slot
            hole = slot - st[LAST_ANY] > st[MAX_HOLD]
        if stamp > st[NEWEST]:
            st[NEWEST] = stamp
        pending = st[ROW] <= st[LAST_ANY]
        overdue = st[NEWEST] >= st[ANCHOR] + st[ROW] * st[PERIOD] + st[PERIOD] // 2 + st[LATENESS]
        if (overdue or (pending and (st[MISSING] == 0 or hole or flush))) and _close_due(
            st,
            tags,
            tag_values,
            ring,
            ring_values,
            out,
            out_values,
            out_valid,
            out_status,
            counts,
            hole,
            flush and not has,
        ):
            return FULL
        if not has:
            return DONE
        # from here on the sample is consumed
        if replay:
            st[BOOT_POS] += 1
            if st[BOOT_POS] == st[BOOT_N]:
                st[BOOT_N] = 0
                st[BOOT_POS] = 0
        else:
            position[0] += 1
            if slot < st[ROW] - st[MAX_HOLD] - late_rows:
                st[BEHIND] += 1
                if st[BEHIND] > 4 * n + 16 and st[NEWEST] > stamp:
                    # Nothing but old stamps for long: the source clock was set back; start again from here.
                    _lose(st, tags, ring, counts)
                    position[0] -= 1
                    continue
            else:
                st[BEHIND] = 0
            counts[C_DELIVERED] += np.uint64(1)
        if (word & OVERFLOW_BITS) == OVERFLOW_BITS:
            counts[C_OVERFLOWED] += np.uint64(1)
        if (word & 0x80000000) != 0:
            counts[C_BAD] += np.uint64(1)
        else:
            if (word & 0x40000000) != 0:
                counts[C_UNCERTAIN] += np.uint64(1)
            if not np.isfinite(v):
                counts[C_NON_FINITE] += np.uint64(1)
        if hole:
            st[GAP_NEXT] = 1
            _resume(st, tags, max(slot, st[ROW]))
        _take(st, tags, tag_values, ring, ring_values, counts, j, stamp, slot, window_at, v, word)


@kernel(
    "int64(int64[::1], int64[:,::1], float64[:,::1], int64[:,:,::1], float64[:,::1], int64[:,::1], "
    "float64[:,::1], uint8[:,::1], uint32[:,::1], uint64[::1])",
    cache=True,
)
def lose_connection(
    st,
    tags,
    tag_values,
    ring,
    ring_values,
    out,
    out_values,
    out_valid,
    out_status,
    counts,
):
    """Close the rows that have samples, then forget every hold; arguments and result as in `close_rows`."""
    full = st[PHASE] == PHASE_RUN and _close_due(
        st, tags, tag_values, ring, ring_values, out, out_values, out_valid, out_status, counts, False, True
    )
    if full:
        return FULL
    _lose(st, tags, ring, counts)
    return DONE
