"""Measures how fast a false alarm is taken in by a running service, from the answer being heard to the swap.

    python tests/benchmarks/bench_feedback.py [--tags 10 50 200] [--repeat 3]

Each monitor is the default configuration on a random linear process (three slow factors, noise of its own on each
tag), 100 ms a row. Rows run on an event loop as they do in the service, with the real desk, store, model file and
priming; a tag is then biased until the alert stands, and "false alarm" is said. Printed are the medians of

    adapt     the delta is made and checked          prime     the new monitor takes in the last rows, off the loop
    swap      it takes the place of the old one, on the loop: that is all the loop stands still for
    save      model file and audit                   forecast  replay of the stored rows

and `adapt + prime + swap` against the promise of one second. Exit code 1 where it is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opcua_detector.api import Float64, Frame, Record
from opcua_detector.app import fit_config, group_tags, keep_fitted, open_monitors
from opcua_detector.config import Config, MonitorConfig, load
from opcua_detector.engine import Engine, RowMonitor
from opcua_detector.feedback.hmi import Gate
from opcua_detector.feedback.live import LiveFeedback
from opcua_detector.store import FeedbackEntry, Store

PROMISED_S = 1.0
PERIOD_NS = 100_000_000
HEALTHY_ROWS, LIVE_ROWS, ALERT_ROWS = 8000, 3000, 60
START_NS = 1_790_000_000_000_000_000
STEPS = ("adapt", "prime", "swap", "save", "forecast")


def plant(n: int, tags: int, seed: int) -> Float64:
    """Rows of a linear process: three slow factors, each tag a mix of them with noise of its own."""
    fixed = np.random.default_rng(99)
    mix, gain = fixed.standard_normal((tags, 3)), fixed.uniform(0.5, 20, tags)
    rng = np.random.default_rng(seed)
    keep, state, factors = np.array([0.98, 0.95, 0.9]), np.zeros(3), np.empty((n, 3))
    for t in range(n):
        state = keep * state + np.sqrt(1 - keep * keep) * rng.standard_normal(3)
        factors[t] = state
    return gain * (factors @ mix.T + 0.15 * rng.standard_normal((n, tags)))


@dataclass
class Running:
    """A monitor in operation, without a server."""

    config: MonitorConfig
    monitor: Any
    back: None = None

    def fast(self, verdict: Any) -> dict[str, Any]:
        """Return nothing: there is no HMI here."""
        return {}


def configured(folder: Path, tags: int) -> tuple[Config, Path]:
    """Write and load a config of one monitor."""
    file = folder / "plant.yaml"
    file.write_text(yaml.safe_dump({
        "version": 1,
        "servers": [{"name": "plant", "endpoint": "opc.tcp://127.0.0.1:1/", "policy": "None", "insecure": True}],
        "groups": [{"name": "rows", "server": "plant", "period": "100 ms",
                    "tags": [{"name": f"t{i}", "node": f"nsu=urn:plant;s=t{i}"} for i in range(tags)]}],
        "monitors": [{"name": "rows", "group": "rows"}],
    }), encoding="utf-8")
    return load(file), file


async def answered(config: Config, file: Path, store: Store, tags: int, seed: int) -> dict[str, float]:
    """Run rows into an alert, say "false alarm", and return how long each step took."""
    (monitor,) = open_monitors(config, file)["rows"]
    assert isinstance(monitor, RowMonitor)
    engine = Engine([monitor])
    run = Running(config.monitors[0], monitor)
    live = LiveFeedback(config, file, store, {"rows": run}, lambda *_: None)
    recent = live.watch("rows", engine)
    await live.start({}, read_nodes=False)
    rows = plant(LIVE_ROWS, tags, 1000 + seed)
    rows[-ALERT_ROWS:, 3] += 0.7 * plant(HEALTHY_ROWS, tags, 1)[:, 3].std()
    frame = Frame.empty(tags)
    raised = 0
    first_ns = START_NS + seed * 10**12
    for i, row in enumerate(rows):
        frame.values[:], frame.valid[:], frame.source_ns = row, 1, first_ns + i * PERIOD_NS
        frame.gap, frame.seq = i == 0, i
        verdict = engine.step(frame)[0]
        recent.offer(frame)
        if verdict.alert and i >= LIVE_ROWS - ALERT_ROWS and not raised:
            raised = frame.source_ns
    assert raised, "the plant was to alarm"
    span = (raised, int(frame.source_ns))
    before = run.monitor.model.model_id
    entry = FeedbackEntry("bench", "false alarm", "rows", None, *span, at_ns=time.time_ns())
    await live._take(entry, Gate("rows"))
    assert live.answers[-1].action == "adapted", live.answers[-1].text
    assert run.monitor.model.model_id != before
    seconds = dict(live.seconds)
    await live.stop()
    return seconds


def measure(tags: int, repeat: int) -> bool:
    """Print one line; return whether the promise holds."""
    with tempfile.TemporaryDirectory() as name:
        config, file = configured(Path(name), tags)
        healthy = Record.from_rows(plant(HEALTHY_ROWS, tags, 1), group_tags(config.groups[0]), PERIOD_NS,
                                   start_ns=START_NS)
        fitted = fit_config(config, file, lambda _: healthy)
        with Store.open(config.store.path) as store:
            store.write_record("healthy", healthy, group="rows", server="plant")
            keep_fitted(fitted, store)
            found = []
            for seed in range(repeat):
                keep_fitted(fitted, store)  # from the same model each time
                found.append(asyncio.run(answered(config, file, store, tags, seed)))
    middle = {step: float(np.median([one[step] for one in found])) for step in STEPS}
    heard_to_swap = [sum(one[step] for step in ("adapt", "prime", "swap")) for one in found]
    median, worst = float(np.median(heard_to_swap)), max(heard_to_swap)
    told = "  ".join(f"{step} {1e3 * middle[step]:7.1f} ms" for step in STEPS)
    print(f"{tags:4d} tags  {told}   heard to swap {median:5.2f} s (worst {worst:.2f})   promised {PROMISED_S:g}: "
          f"{'holds' if median <= PROMISED_S else 'BROKEN'}", flush=True)
    return median <= PROMISED_S


def main() -> int:
    """Run; 0 where every promise holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tags", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    return 0 if all([measure(tags, given.repeat) for tags in given.tags]) else 1


if __name__ == "__main__":
    sys.exit(main())
