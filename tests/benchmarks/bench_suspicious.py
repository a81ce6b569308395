"""Measures whether a fit notices a fault inside its "healthy" record, and names nothing in a record without one.

    python tests/benchmarks/bench_suspicious.py                   # both plants, noise-free and 1 %
    python tests/benchmarks/bench_suspicious.py --plants throttle --noise 0.01 --seeds 1 --clean 4

Each record has 12 000 rows, and in the middle of it a fault of 5 %: one of the three faults of the plant, or what the
sensor of its first tag tells is wrong (bias of 2 standard deviations, gain 1.5, stuck, noise of 1 standard deviation,
drift to 4). A fault is named where a stretch of `FitReport.suspicious` meets it; a stretch that lies elsewhere, or
anything in a clean record, is a false one. Exit code 1 where fewer than five of six faults of a plant are named, or a
clean record is suspected.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opcua_detector import fit
from opcua_detector.api import Float64
from sim_server.processes import Fault, make
from tests.benchmarks import FAULTS

ROWS, START, STOP = 12_000, 6000, 6600
SETTLING_ROWS = 1000
SENSOR = ("bias", "gain", "stuck", "noise", "drift")
ASKED = 5 / 6
EARLY, WIDEST = 0.3, 2.5  # times the fault: an earlier stretch says something else, a longer one too little


def sensor_fault(kind: str, x: Float64, spread: float, seed: int) -> Float64:
    """Return what a faulty sensor tells: float64[n] for the true x; `spread`: its standard deviation."""
    return {
        "bias": x + 2.0 * spread, "gain": 1.5 * x, "stuck": np.full(len(x), x[0]),
        "noise": x + spread * np.random.default_rng(seed).standard_normal(len(x)),
        "drift": x + np.linspace(0.0, 4.0, len(x)) * spread}[kind]


def record_with(process: str, noise: float, seed: int, fault: str = "") -> tuple[Float64, list[str], float]:
    """Return (rows float64[ROWS, n_tags], names, period in s); without a fault where none is named."""
    plant = make(process, seed=seed, noise=noise)
    plant.simulate(SETTLING_ROWS)
    own = [Fault(fault, FAULTS[process][fault], START, STOP)] if fault in FAULTS[process] else []
    rows = plant.simulate_block(ROWS, own).measured
    if fault in SENSOR:
        rows[START:STOP, 0] = sensor_fault(fault, rows[START:STOP, 0], float(rows[:, 0].std()), seed)
    return rows, [tag.name for tag in plant.model.measured], plant.model.period_ns / 1e9


def stretches(rows: Float64, names: list[str], period_s: float) -> list[tuple[int, int, float, str]]:
    """Return (first row, last row, height, view) of the suspicious stretches that a default fit names."""
    report = fit(rows, names, period_s).report
    assert report is not None
    return [(round(start / 1e9 / period_s), round(stop / 1e9 / period_s), height, view)
            for start, stop, height, view in report.suspicious]


def meets(start: int, stop: int) -> bool:
    """Whether a stretch tells of the fault: it overlaps with it, begins about with it or later, and is not much longer.

    Where a fault ends the plant moves on in a way that it seldom does, and the longest window has 1000 rows.
    """
    length = STOP - START
    return START - EARLY * length <= start < STOP and stop > START and stop - start <= WIDEST * length


def main() -> int:
    """Run the measurement; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plants", nargs="*", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--noise", nargs="*", type=float, default=[0.0, 0.01], help="share of each tag's std")
    parser.add_argument("--seeds", type=int, default=2, help="records of each fault")
    parser.add_argument("--clean", type=int, default=8, help="clean records of each plant and noise")
    args = parser.parse_args()
    kept = True
    for process in args.plants:
        for noise in args.noise:
            named, false, seen = 0, 0, 0
            for fault in (*FAULTS[process], *SENSOR):
                for seed in range(1, args.seeds + 1):
                    found = stretches(*record_with(process, noise, seed, fault))
                    hits = [one for one in found if meets(*one[:2])]
                    false += len(found) > len(hits)
                    named, seen = named + bool(hits), seen + 1
                    told = ", ".join(f"{a}..{b} {view} {height:.1f}" for a, b, height, view in found[:3])
                    print(f"{process} {noise:4.0%} {fault:6s} seed {seed}: {'named ' if hits else 'MISSED'} {told}",
                          flush=True)
            clean = [stretches(*record_with(process, noise, 100 + seed)) for seed in range(args.clean)]
            suspected = [one for one in clean if one]
            print(f"{process} {noise:4.0%}: {named} of {seen} faults named, {false} records with a false stretch "
                  f"beside; {len(suspected)} of {len(clean)} clean records suspected {suspected or ''}\n", flush=True)
            kept &= named >= ASKED * seen and not suspected
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
