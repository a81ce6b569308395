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
from . import words
from .endpoint import Answer
from .pulse import Pulse

if TYPE_CHECKING:
    from ..service import MonitorRun, Service

PREFIX = "opcua_detector"
SCRAPE_EVERY_S = 1.0  # asked more often, the same text is given again: no flood of scrapes takes time from the loop
# Seconds; from a row of one small monitor to a row that is too late for a period of 100 ms.
SCORING_BUCKETS = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


class _Counts:
    """Counters of one subject, one family each, over all label values."""

    def __init__(self, subject: str, table: words.Table, labels: tuple[str, ...]) -> None:
        self._subject, self._table, self._labels = subject, table, labels
        self._families: dict[str, CounterMetricFamily] = {}

    def add(self, labels: tuple[str, ...], counts: Mapping[str, int]) -> None:
        for key, n in dict(counts).items():
            family = self._families.get(key)
            if family is None:
                name, text = self._table.get(key, (key, f"Counter {key} of this {self._subject}."))
                family = CounterMetricFamily(f"{PREFIX}_{self._subject}_{name}", text, labels=self._labels)
                self._families[key] = family
            family.add_metric(labels, n)

    def families(self) -> list[Metric]:
        return list(self._families.values())


class _Gauges:
    """Gauges, one family per name, over all label values."""

    def __init__(self, subject: str, labels: tuple[str, ...], meanings: Mapping[str, str]) -> None:
        self._families = {name: GaugeMetricFamily(f"{PREFIX}_{subject}_{name}", text, labels=labels)
                          for name, text in meanings.items()}

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
        faults = _Counts("service", words.SERVICE, ())
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
            "service_level": "ServiceLevel of the endpoint in use as last read: 200 to 255 healthy, 2 to 199 degraded, "
                             "1 no data, 0 maintenance.",
        })
        counts, publish = _Counts("server", words.SESSION, ("server",)), _Counts("server", words.PUBLISH, ("server",))
        writes = _Counts("write", words.WRITE, ("server",))
        for name, session in list(service.sessions.items()):
            clock = service.clocks.get(name)
            measured = clock.measured if clock is not None else None
            how = session.standing.get(session.endpoint)
            gauges.add((name,), connected=session.state is LinkState.CONNECTED, insecure=session.config.insecure,
                       service_level=how.level if how is not None and how.state >= 0 else None,
                       clock_offset_seconds=measured.offset_s if measured else None,
                       round_trip_seconds=measured.round_trip_s if measured else None)
            counts.add((name,), session.counters | session.security.counters)
            pump = session.pump
            if pump is not None:
                publish.add((name,), pump.counters)
                gauges.add((name,), publish_requests_outstanding=pump.outstanding)
        leases = _Counts("lease", words.LEASE, ("server",))
        for name, back in list(service.backs.items()):
            writes.add((name,), back.counters)
        for name, keeper in list(service.keepers.items()):
            leases.add((name,), keeper.counters)
        for part in (gauges, counts, publish, writes, leases):
            yield from part.families()

    def _groups(self) -> Iterator[Metric]:
        both = ("group", "server")
        counts, streams = _Counts("group", words.GROUP, ("group",)), _Counts("subscription", words.SUBSCRIPTION, both)
        for name, filler in list(self._service.fillers.items()):
            counts.add((name,), filler.counters)
        gauges = _Gauges("subscription", both, {
            "tags": "Tags of the group on this server.",
            "tags_failing": "Tags of the group on this server that deliver nothing.",
            "tags_polled": "Tags of the group on this server that are read instead of monitored.",
            "publishing_interval_seconds": "The publishing interval that the server revised.",
        })
        for name, feed in list(self._service.feeds.items()):
            known = feed.builder.counters().keys() | {"frame_errors", "clock_jumps", "ahead_of_clock"}
            counts.add((name,), {key: n for key, n in feed.counters().items() if key in known})
            for server, one in feed.subscriptions.items():
                streams.add((name, server), one.counts)
                ms = one.revised.publishing_ms
                gauges.add((name, server), tags=len(one.items), tags_failing=sum(bool(i.reason) for i in one.items),
                           tags_polled=sum(bool(i.polled) for i in one.items),
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
            "model_refused": "1 while a newer model file is not taken because it is damaged or does not fit.",
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
                       masked_tags=masked, standby=run.standby, model_refused=bool(run.refused))
            for number, text in enumerate(STATE_TEXTS):
                state.add_metric((name, text), float(number == run.state))
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
        counts = _Counts("store", words.STORE, ())
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
