"""The metrics, collected when they are asked for from the counters that the parts keep anyway.

Names follow the rules of Prometheus: base units, `_total` for what only grows, one meaning per name. Counters of a
connection (publish requests) begin anew with it, as after a restart; Prometheus' `rate` takes that into account.
A counter that a part has added meanwhile appears by itself, under its own name.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from .. import __version__
from ..client import LinkState
from ..nodes import STATE_TEXTS
from .endpoint import Answer
from .pulse import Pulse

if TYPE_CHECKING:
    from ..service import MonitorRun, Service

PREFIX = "opcua_detector"
SCRAPE_EVERY_S = 1.0  # asked more often, the same text is given again: no flood of scrapes takes time from the loop
# Seconds; from a row of one small monitor to a row that is too late for a period of 100 ms.
SCORING_BUCKETS = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)

# Key of a counter -> (name within its subject, help). What stands in no table gets its key as name.
_Table = Mapping[str, tuple[str, str]]
_SESSION: _Table = {
    "connects": ("connects", "Sessions that were made."),
    "reconnects": ("reconnects", "Sessions that were made again after a loss."),
    "failed_attempts": ("failed_attempts", "Attempts to connect again that failed."),
    "lost": ("connections_lost", "Connections that were lost."),
}
_PUBLISH: _Table = {
    "publish_responses": ("publish_responses", "Answers to publish requests, of this connection."),
    "handler_errors": ("notification_errors", "Notifications that could not be worked on, of this connection."),
    "decode_errors": ("decode_errors", "Messages that could not be decoded, of this connection."),
    "too_many_publish": ("too_many_publish_requests", "Answers BadTooManyPublishRequests, of this connection."),
}
_SUBSCRIPTION: _Table = {
    "notifications": ("notifications", "Notifications with values."),
    "samples": ("values", "Values that arrived."),
    "keep_alives": ("keep_alives", "Keep-alives: the server lives and nothing has changed."),
    "overload": ("overloaded_values", "Values with GoodOverload: the server lacks resources and samples slower."),
    "null_timestamp": ("values_without_source_timestamp", "Values without a SourceTimestamp."),
    "lost_notifications": ("lost_notifications", "Notifications that are missing in the sequence."),
    "rebuilt": ("rebuilds", "Subscriptions that were made again because the server ended them."),
}
_GROUP: _Table = {
    "delivered": ("samples_delivered", "Samples that came to the rule of time."),
    "used": ("samples_used", "Samples that became cells of rows."),
    "late": ("samples_late", "Samples older than one that their tag had used already."),
    "duplicate": ("samples_duplicate", "Samples with stamp and value of the one before."),
    "replaced": ("samples_replaced", "Samples of which a newer one stood in the same row."),
    "skipped": ("samples_skipped", "Samples that fell into no row."),
    "bad": ("samples_bad", "Samples with a Bad status."),
    "uncertain": ("samples_uncertain", "Samples with an Uncertain status."),
    "non_finite": ("samples_non_finite", "Samples that are NaN or infinite."),
    "overflowed": ("samples_overflowed", "Samples with the overflow bit: the server's queue lost some before them."),
    "null_timestamp": ("samples_without_source_timestamp", "Samples without a SourceTimestamp."),
    "lost": ("samples_lost", "Samples known to be lost: overflowed queues and missing notifications."),
    "held": ("cells_held", "Cells of rows with the last value of their tag."),
    "masked": ("cells_masked", "Cells of rows that are not valid."),
    "stale": ("cells_stale", "Cells of rows whose tag was silent for longer than max_hold."),
    "rows": ("rows", "Rows."),
    "gaps": ("gaps", "Rows that do not continue the row before."),
    "clock_back": ("clock_set_back", "Times that the clock of the source was set back."),
    "frame_errors": ("row_errors", "Rows that could not be worked on."),
}
_WRITE: _Table = {
    "requests": ("requests", "Write requests sent."),
    "values": ("values", "Values sent."),
    "superseded": ("superseded", "Results that a newer one replaced before they were sent."),
    "failed_items": ("failed_values", "Values that the server refused."),
    "cast_errors": ("cast_errors", "Values that do not fit the type of their node."),
    "timeouts": ("timeouts", "Write requests that were not answered."),
}
_STORE: _Table = {
    "rows": ("rows_written", "Rows committed."),
    "verdicts": ("verdicts_written", "Verdicts committed."),
    "entries": ("entries_written", "Events, feedback, audit, models and runs committed."),
    "commits": ("commits", "Transactions."),
    "dropped_rows": ("rows_dropped", "Rows dropped because the ring was full."),
    "dropped_verdicts": ("verdicts_dropped", "Verdicts dropped because the ring was full."),
    "out_of_order_rows": ("rows_out_of_order", "Rows not later than the one before."),
    "rejected": ("rejected", "Entries that were refused for their content."),
    "write_errors": ("write_errors", "Attempts to commit that failed; each is made again."),
    "thinned_rows": ("rows_thinned", "Rows that retention thinned out."),
    "deleted_rows": ("rows_deleted", "Rows that retention deleted."),
    "decimated_trend": ("trend_coarsened", "Buckets of the trend that retention joined."),
}


class _Counts:
    """Counters of one subject, one family each, over all label values."""

    def __init__(self, subject: str, table: _Table, labels: tuple[str, ...]) -> None:
        self._subject, self._table, self._labels = subject, table, labels
        self._families: dict[str, CounterMetricFamily] = {}

    def add(self, labels: tuple[str, ...], counts: Mapping[str, int]) -> None:
        for key, n in dict(counts).items():
            family = self._families.get(key)
            if family is None:
                name, words = self._table.get(key, (key, f"Counter {key} of this {self._subject}."))
                family = CounterMetricFamily(f"{PREFIX}_{self._subject}_{name}", words, labels=self._labels)
                self._families[key] = family
            family.add_metric(labels, n)

    def families(self) -> list[Metric]:
        return list(self._families.values())


class _Gauges:
    """Gauges, one family per name, over all label values."""

    def __init__(self, subject: str, labels: tuple[str, ...], words: Mapping[str, str]) -> None:
        self._families = {name: GaugeMetricFamily(f"{PREFIX}_{subject}_{name}", text, labels=labels)
                          for name, text in words.items()}

    def add(self, labels: tuple[str, ...], **values: float | None) -> None:
        for name, value in values.items():
            if value is not None:
                self._families[name].add_metric(labels, float(value))

    def families(self) -> list[Metric]:
        return list(self._families.values())


class ServiceCollector(Collector):
    """Collects from a service; reads only, on the thread of whoever asks."""

    def __init__(self, service: Service, pulse: Pulse) -> None:
        self._service, self._pulse = service, pulse
        self._bucket = np.zeros(len(SCORING_BUCKETS) + 1, np.int64)
        self._sum_s, self._seen = 0.0, 0

    def describe(self) -> list[Metric]:
        """Return nothing: names depend on the configuration, and this registry has no other collector of ours."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics as of now; between two of them the loop may have Python's lock, if it wants it."""
        for family in self._families():
            time.sleep(0)
            yield family

    def _families(self) -> Iterator[Metric]:
        yield InfoMetricFamily(PREFIX, "Version of the product.", value={"version": __version__})
        yield from self._loop()
        yield from self._servers()
        yield from self._groups()
        yield from self._monitors()
        yield self._scoring()
        yield from self._store()
        yield from self._feedback()

    def _loop(self) -> Iterator[Metric]:
        gauges = _Gauges("loop", (), {
            "age_seconds": "Time since the event loop was last seen to turn.",
            "delay_seconds": "How late the event loop was when it last turned.",
            "longest_delay_seconds": "The latest that the event loop has been.",
        })
        gauges.add((), age_seconds=self._pulse.age_s, delay_seconds=self._pulse.delay_s,
                   longest_delay_seconds=self._pulse.longest_delay_s)
        yield from gauges.families()
        faults = _Counts("service", {}, ())
        faults.add((), self._service.counters)
        yield from faults.families()

    def _servers(self) -> Iterator[Metric]:
        service = self._service
        gauges = _Gauges("server", ("server",), {
            "connected": "1 while the session stands.",
            "insecure": "1 where traffic is not encrypted or the server is not checked (insecure: true).",
            "clock_offset_seconds": "Clock of the server less our own; within half of the round trip.",
            "round_trip_seconds": "Shortest round trip of the last measurement of the clock.",
            "publish_requests_outstanding": "Publish requests that the server holds.",
        })
        counts, publish = _Counts("server", _SESSION, ("server",)), _Counts("server", _PUBLISH, ("server",))
        writes = _Counts("write", _WRITE, ("server",))
        for name, session in list(service.sessions.items()):
            clock = service.clocks.get(name)
            measured = clock.measured if clock is not None else None
            gauges.add((name,), connected=session.state is LinkState.CONNECTED, insecure=session.config.insecure,
                       clock_offset_seconds=measured.offset_s if measured else None,
                       round_trip_seconds=measured.round_trip_s if measured else None)
            counts.add((name,), session.counters)
            pump = session.pump
            if pump is not None:
                publish.add((name,), pump.counters)
                gauges.add((name,), publish_requests_outstanding=pump.outstanding)
        leases = _Counts("lease", {}, ("server",))
        for name, back in list(service.backs.items()):
            writes.add((name,), back.counters)
        for name, keeper in list(service.keepers.items()):
            leases.add((name,), keeper.counters)
        for part in (gauges, counts, publish, writes, leases):
            yield from part.families()

    def _groups(self) -> Iterator[Metric]:
        both = ("group", "server")
        counts, streams = _Counts("group", _GROUP, ("group",)), _Counts("subscription", _SUBSCRIPTION, both)
        for name, filler in list(self._service.fillers.items()):
            counts.add((name,), filler.counters)
        gauges = _Gauges("subscription", both, {
            "tags": "Tags of the group on this server.",
            "tags_failing": "Tags of the group on this server that deliver nothing.",
            "publishing_interval_seconds": "The publishing interval that the server revised.",
        })
        for name, feed in list(self._service.feeds.items()):
            known = feed.builder.counters().keys() | {"frame_errors", "clock_jumps", "ahead_of_clock"}
            counts.add((name,), {key: n for key, n in feed.counters().items() if key in known})
            for server, one in feed.subscriptions.items():
                streams.add((name, server), one.counts)
                ms = one.revised.publishing_ms
                gauges.add((name, server), tags=len(one.items), tags_failing=sum(bool(i.reason) for i in one.items),
                           publishing_interval_seconds=None if ms != ms else ms / 1e3)
        for part in (counts, streams, gauges):
            yield from part.families()

    def _monitors(self) -> Iterator[Metric]:
        gauges = _Gauges("monitor", ("monitor",), {
            "score": "How abnormal; 1 is the limit; NaN while there is no verdict.",
            "slow_score": "The second lamp, over a long window; NaN where there is none.",
            "limit": "The limit of the score.",
            "limit_ratio": "Score over limit; NaN while there is no verdict.",
            "alert": "1 while an alert stands.",
            "alert_severity": "Severity of the standing alert, 0 while there is none.",
            "write_latency_seconds": "SourceTimestamp to the server's acknowledgement of the last write.",
            "last_row_timestamp_seconds": "SourceTimestamp of the newest row that was judged.",
            "standby": "1 while another instance writes the outputs.",
            "masked_tags": "Tags of the monitor without a valid value in the newest row.",
        })
        state = GaugeMetricFamily(f"{PREFIX}_monitor_state", "1 for the state that the monitor is in.",
                                  labels=("monitor", "state"))
        model = InfoMetricFamily(f"{PREFIX}_monitor_model", "The model in force.", labels=("monitor",))
        counts = _Counts("monitor", {
            "alerts": ("alerts", "Alerts raised, as numbered in the store."),
            "scored": ("rows_scored", "Rows with a score."),
            "superseded": ("superseded_writes", "Results that a newer one replaced before they were sent."),
        }, ("monitor",))
        for name, run in list(self._service.runs.items()):
            time.sleep(0)  # as in `collect`: there may be many
            verdict = run.monitor.verdict
            score, masked = verdict.score, self._masked(run)
            gauges.add((name,), score=score, slow_score=verdict.slow_score, limit=1.0, limit_ratio=score,
                       alert=verdict.alert, alert_severity=verdict.severity,
                       write_latency_seconds=None if run.latency_ms != run.latency_ms else run.latency_ms / 1e3,
                       last_row_timestamp_seconds=verdict.source_ns / 1e9 if verdict.source_ns else None,
                       masked_tags=masked, standby=run.standby)
            for number, words in enumerate(STATE_TEXTS):
                state.add_metric((name, words), float(number == run.state))
            model.add_metric((name,), {"model_id": verdict.model_id})
            counts.add((name,), {"alerts": verdict.event_no, "scored": run.scored,
                                 "superseded": run.back.superseded.get(name, 0) if run.back else 0})
        yield from (*gauges.families(), state, model, *counts.families())

    def _masked(self, run: MonitorRun) -> float | None:
        feed = self._service.feeds.get(run.config.group)
        return None if feed is None else float(len(run.columns) - np.count_nonzero(feed.frame.valid[run.columns]))

    def _scoring(self) -> Metric:
        """Return how long rows took; those that came since the last scrape are sorted into buckets now.

        The service keeps the last 65536 times. Where more rows came since the last scrape, the older ones are left
        out: buckets and count are of the rows that were seen, and still agree.
        """
        times = self._service.scoring_ns
        steps = self._service.steps
        fresh = min(steps - self._seen, len(times))
        if fresh > 0:
            seconds = times[np.arange(steps - fresh, steps) % len(times)] / 1e9
            self._bucket += np.bincount(np.searchsorted(SCORING_BUCKETS, seconds), minlength=len(self._bucket))
            self._sum_s += float(seconds.sum())
        self._seen = steps
        upto = np.cumsum(self._bucket)
        edges = (*(repr(edge) for edge in SCORING_BUCKETS), "+Inf")
        return HistogramMetricFamily(
            f"{PREFIX}_scoring_seconds", "Time that all monitors of a group take for one row.",
            buckets=[(edge, float(n)) for edge, n in zip(edges, upto, strict=True)], sum_value=self._sum_s)

    def _store(self) -> Iterator[Metric]:
        store = self._service.store
        if store is None:
            return
        gauges = _Gauges("store", (), {
            "queue_length": "Rows, verdicts and entries that wait for a commit.",
            "writable": "1 while commits succeed.",
            "size_bytes": "The database file.",
            "log_size_bytes": "The write-ahead log beside it.",
            "quota_bytes": "What the database file may grow to.",
        })
        gauges.add((), queue_length=store.queued, writable=not store.last_error, size_bytes=_size(store.path),
                   log_size_bytes=_size(store.path.with_name(store.path.name + "-wal")),
                   quota_bytes=store.retention.quota_bytes)
        counts = _Counts("store", _STORE, ())
        counts.add((), asdict(store.counters))
        yield from (*gauges.families(), *counts.families())

    def _feedback(self) -> Iterator[Metric]:
        feedback = self._service.feedback
        if feedback is None:
            return
        family = CounterMetricFamily(f"{PREFIX}_feedback", "Feedback that was answered, by what became of it.",
                                     labels=("monitor", "label", "outcome"))
        counted: dict[tuple[str, str, str], int] = {}
        for answer in list(feedback.answers):
            outcome = "adapted" if answer.model is not None else "kept"
            key = (answer.entry.monitor, answer.entry.label, outcome)
            counted[key] = counted.get(key, 0) + 1
        for key, n in counted.items():
            family.add_metric(key, n)
        yield family
        yield CounterMetricFamily(f"{PREFIX}_feedback_not_taken", "Texts of an HMI that were no feedback, or too many.",
                                  value=feedback.refused)


def _size(path: os.PathLike[str]) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


class Scrapes:
    """Gives the metrics of a service as text, in the format that the client asks for.

    least_s : so old may a text be before it is made anew
    """

    def __init__(self, service: Service, pulse: Pulse, *, least_s: float = SCRAPE_EVERY_S,
                 clock_s: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(ServiceCollector(service, pulse))
        ProcessCollector(registry=self.registry)  # CPU, memory, open files of this process, where the system tells
        self._least_s, self._clock_s = least_s, clock_s
        self._made: dict[str, tuple[float, bytes]] = {}
        self._lock = threading.Lock()

    def answer(self, headers: Mapping[str, str]) -> Answer:
        """Return the metrics."""
        encoder: Any
        encoder, content_type = choose_encoder(headers.get("accept", ""))
        with self._lock:
            made_s, body = self._made.get(content_type, (-1e9, b""))
            if self._clock_s() - made_s >= self._least_s:
                body = encoder(self.registry)
                self._made[content_type] = (self._clock_s(), body)
        return Answer(body, content_type)
