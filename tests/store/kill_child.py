"""Writes rows, verdicts and events for ever and says what is committed, until it is killed."""

from __future__ import annotations

import sys

from store_rows import PERIOD_NS, row_frame, tags, verdict

from opcua_detector.store import Event, Store

store = Store.open(sys.argv[1], commit_interval_s=0.01)
store.start_run("test", "hash", ["pump"])
recording = store.start_recording(None, tags(5), PERIOD_NS, group="g")
frame, given = row_frame(5), verdict()
told = 0
n = 0
while True:
    frame.values[:] = n
    frame.source_ns = given.source_ns = n * PERIOD_NS
    given.score = float(n)
    store.offer_row(recording, frame)
    store.offer_verdict(given)
    if n % 100 == 0:
        store.record_event(Event("pump", n // 100 + 1, frame.source_ns))
    n += 1
    if store.queued > 1000:
        store.flush()
    committed = store.committed_seq
    if committed != told:
        told = committed
        print(committed, flush=True)
