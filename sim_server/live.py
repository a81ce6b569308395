"""Publishes the rows of the plant on time: one row a period, by an absolute schedule."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Final

from asyncua import Server, ua

from sim_server.history import NO_STAMP, TagHistory
from sim_server.nodes import PlantNodes
from sim_server.plant import Plant, ScriptPlayer
from sim_server.quirks import Reporter, Sample
from sim_server.ua_types import data_value, status_code, to_datetime, to_variant

_BATCH_ROWS: Final = 64
"""Rows published without letting clients be served, while catching up."""

_logger = logging.getLogger(__name__)


class LivePlant:
    """Steps the plant and writes what the reporter lets through.

    Parameters
    ----------
    server, nodes
        Where to write.
    plant, player, reporter
        What to write.
    histories
        One per tag, then one for the ground truth.
    start_ns
        SourceTimestamp of the first live row, ns since the epoch, a multiple of 1000.
    speed
        Simulated seconds per second.
    wall_clock_ns, clock_s, sleep_s
        The time of day, ns since the epoch; a clock that never jumps, seconds; and how to wait for it.

    Notes
    -----
    A row that could not be published on time is published late with its own nominal stamp: the process
    goes on whether or not anybody looks, and no time is invented or left out.
    """

    def __init__(
        self,
        server: Server,
        nodes: PlantNodes,
        plant: Plant,
        player: ScriptPlayer,
        reporter: Reporter,
        histories: list[TagHistory],
        start_ns: int,
        speed: float,
        *,
        wall_clock_ns: Callable[[], int] = time.time_ns,
        clock_s: Callable[[], float] = time.monotonic,
        sleep_s: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.row = 0
        self.samples = 0
        self.late_rows = 0
        self.max_lag_ms = 0.0
        self._server = server
        self._nodes = nodes
        self._kinds = [kind for _, kind in nodes.tags]
        self._plant = plant
        self._player = player
        self._reporter = reporter
        self._histories = histories
        self._start_ns = start_ns
        self._speed = speed
        self._wall_clock_ns = wall_clock_ns
        self._clock_s = clock_s
        self._sleep_s = sleep_s
        self._offset_ns = 0
        self._truth = False
        self._fault_text = ""
        self._status = {0: status_code(0)}
        self._rows_per_s = max(1, round(1e9 / plant.period_ns))

    async def run(self) -> None:
        """Publish rows until cancelled."""
        period_s = self._plant.period_ns * 1e-9 / self._speed
        # the moment of row 0 on the clock that never jumps
        zero = self._clock_s() - (self._wall_clock_ns() - self._start_ns) * 1e-9
        while True:
            now = self._clock_s()
            # without the grain a wake-up at the exact moment could round to just before it
            due = int((now - zero) / period_s + 1e-6) + 1
            for _ in range(min(due - self.row, _BATCH_ROWS)):
                lag = now - (zero + self.row * period_s)
                if lag > period_s:
                    self.late_rows += 1
                self.max_lag_ms = max(self.max_lag_ms, lag * 1e3)
                await self._publish()
            await self._sleep_s(max(0.0, zero + self.row * period_s - self._clock_s()))

    def set_type(self, tag: str, kind: ua.VariantType) -> None:
        """Publish a tag in another type from the next row on."""
        self._kinds[[one.name for one in self._plant.tags].index(tag)] = kind

    def set_clock(self, offset_ns: int) -> None:
        """Let ServerTimestamps be off the true time from the next row on; ns, positive is ahead."""
        self._offset_ns = offset_ns

    async def _publish(self) -> None:
        row, process = self.row, self._plant.process
        stamp_ns = self._start_ns + row * self._plant.period_ns
        if self._player.apply(row, process):
            await self.show_factors()
        values = self._plant.step()
        # simulated time runs ahead of the wall clock at any other speed, and both stamps must agree
        server_stamp = to_datetime(
            (self._wall_clock_ns() if self._speed == 1.0 else stamp_ns) + self._offset_ns
        )
        for sample in self._reporter.report(row, stamp_ns, values):
            await self._write(sample, server_stamp)
        await self._show_truth(stamp_ns, server_stamp)
        self.row += 1
        if self.row % self._rows_per_s == 0:
            await self._show_counters()

    async def _write(self, sample: Sample, server_stamp: datetime) -> None:
        node_id, kind = self._nodes.tags[sample.tag][0], self._kinds[sample.tag]
        status = self._status.get(sample.status)
        if status is None:
            status = self._status.setdefault(sample.status, status_code(sample.status))
        value = data_value(
            to_variant(sample.value, kind, sample.status),
            status,
            None if sample.source_ns is None else to_datetime(sample.source_ns),
            server_stamp,
        )
        await self._server.write_attribute_value(node_id, value)
        source_ns = NO_STAMP if sample.source_ns is None else sample.source_ns
        self._histories[sample.tag].append(source_ns, sample.value, sample.status, sample.arrival_ns)
        self.samples += 1

    async def _show_truth(self, stamp_ns: int, server_stamp: datetime) -> None:
        truth, text = self._plant.process.faulty, self._plant.active_fault
        self._histories[-1].append(stamp_ns, float(truth), 0, stamp_ns)
        if self.row > 0 and truth == self._truth and text == self._fault_text:
            return
        if truth != self._truth:
            _logger.info("row %d: %s", self.row, text or "healthy again")
        self._truth, self._fault_text = truth, text
        source = to_datetime(stamp_ns)
        for node_id, variant in (
            (self._nodes.ground_truth, ua.Variant(truth, ua.VariantType.Boolean)),
            (self._nodes.active_fault, ua.Variant(text, ua.VariantType.String)),
        ):
            await self._server.write_attribute_value(
                node_id, data_value(variant, self._status[0], source, server_stamp)
            )

    async def show_factors(self) -> None:
        """Write the factors in force to the fault nodes."""
        factors, now = self._plant.process.factors, to_datetime(self._wall_clock_ns())
        for node_id, parameter in self._nodes.factors.items():
            value = ua.Variant(factors[parameter], ua.VariantType.Double)
            await self._server.write_attribute_value(node_id, data_value(value, self._status[0], now, now))

    async def _show_counters(self) -> None:
        now = to_datetime(self._wall_clock_ns())
        counts = {
            "RowsPublished": self.row,
            "SamplesPublished": self.samples,
            "SamplesDropped": self._reporter.dropped,
            "LateRows": self.late_rows,
            "MaxLagMs": self.max_lag_ms,
        }
        for name, node_id in self._nodes.diagnostics.items():
            kind = ua.VariantType.Double if name.endswith("Ms") else ua.VariantType.UInt32
            value = data_value(ua.Variant(counts[name], kind), self._status[0], now, now)
            await self._server.write_attribute_value(node_id, value)
