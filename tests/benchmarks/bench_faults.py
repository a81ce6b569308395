"""Measures what an operator feels: how soon a fault in mid-run is told, and how often a healthy plant alarms.

    python tests/benchmarks/bench_faults.py                       # delays, and healthy alarms over 10 h
    python tests/benchmarks/bench_faults.py --budget              # alarms on 48 h (asked 1/h) and 10 days (asked 1/day)
    python tests/benchmarks/bench_faults.py --ranking             # the paper's blocks: score and second lamp

The default configuration (`opcua_detector.fit` without parameters but the budget), fitted on healthy rows of the plant
that then goes on. A fault begins without a reset of the process, each of the six `--onsets` times per seed; an alarm
that stood before the onset does not count. An alert ends after half a second below the limit, so alarms closer than
that are one.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opcua_detector import Detector, fit
from opcua_detector.api import Float64, Int64
from opcua_detector.kernels.score import LEAD, SCORE
from opcua_detector.metrics import auc, partial_auc
from sim_server.processes import Fault, Process, make
from tests.benchmarks import FAULTS
from tests.benchmarks.public_data import simulated_cases

PERIOD_S = {"lorenz": 0.01, "throttle": 0.02}
SETTLING_ROWS, QUIET_ROWS, FAULT_ROWS = 2000, 2000, 6000
CHUNK = 200_000
OFF_DELAY_S = 0.5
SLOW_CLEAN = 1040  # rows left out at the start of each block for the second lamp: its window and 40


def plant_and_model(
    process: str, noise: float, seed: int, fit_hours: float, per_day: float,
) -> tuple[Process, Detector]:
    """Return a settled plant and the detector fitted on its first healthy hours."""
    plant = make(process, seed=seed, noise=noise)
    plant.simulate(SETTLING_ROWS)
    rows = plant.simulate(round(fit_hours * 3600 / PERIOD_S[process]))
    tags = [tag.name for tag in plant.model.measured]
    return plant, fit(rows, tags, PERIOD_S[process], params={"false_alarms_per_day": per_day})


def onsets(outs: Float64, period_s: float) -> Int64:
    """Return the rows at which an alert begins."""
    above = np.flatnonzero(outs[:, SCORE] >= 1.0)
    new = np.diff(above, prepend=-(10**9)) > OFF_DELAY_S / period_s
    return above[new]


def healthy_alarms(plant: Process, model: Detector, process: str, hours: float) -> tuple[int, Counter[str]]:
    """Return alarms on the next healthy hours, and the views that raised them."""
    period = PERIOD_S[process]
    count, views = 0, Counter[str]()
    for rows in chunks(plant, round(hours * 3600 / period)):
        outs = model.outs(rows)
        for row in onsets(outs, period):
            count += 1
            views[model.normality.calibration.views[int(outs[row, LEAD])].name] += 1
    return count, views


def chunks(plant: Process, n: int) -> Iterator[Float64]:
    """Yield n rows in pieces."""
    while n > 0:
        yield plant.simulate(min(n, CHUNK))
        n -= CHUNK


def delays(plant: Process, model: Detector, process: str, fault: str, times: int) -> tuple[list[float], int]:
    """Return the delay of each onset in seconds (inf = not told), and how many runs alarmed before it."""
    found, early = [], 0
    for k in range(times):
        start = QUIET_ROWS + 173 * k
        stop = start + FAULT_ROWS
        block = plant.simulate_block(stop, [Fault(fault, FAULTS[process][fault], start, stop)])
        score = model.outs(block.measured)[:, SCORE]
        early += bool((score[:start] >= 1.0).any())
        told = np.flatnonzero(score[start:] >= 1.0)
        found.append(float(told[0]) * PERIOD_S[process] if len(told) else np.inf)
        plant.simulate(SETTLING_ROWS)
    return found, early


def show_delays(arguments: argparse.Namespace) -> None:
    """Print delays and healthy alarms, at a budget of one false alarm an hour."""
    print("| process | noise % | fault | delay s: median | 90 % | worst | told | alarms on healthy hours | asked |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for process in arguments.process or FAULTS:
        for noise in (0.0, 0.01):
            pooled: list[float] = []
            lines, alarms = [], 0
            told: dict[str, list[float]] = {name: [] for name in FAULTS[process]}
            for seed in range(arguments.seeds):
                plant, model = plant_and_model(process, noise, seed, arguments.fit_hours, 24.0)
                alarms += healthy_alarms(plant, model, process, arguments.hours)[0]
                for name in told:
                    told[name] += delays(plant, model, process, name, arguments.onsets)[0]
            for name, found in told.items():
                pooled += found
                lines.append((name, found))
            for name, found in [*lines, ("all", pooled)]:
                asked = f"{alarms} on {arguments.seeds * arguments.hours:g} h | 1/h" if name == "all" else " | "
                high = np.quantile(found, 0.9)
                print(f"| {process} | {100 * noise:g} | {name} | {np.median(found):.2f} | {high:.2f} "
                      f"| {max(found):.2f} | {np.isfinite(found).sum()}/{len(found)} | {asked} |", flush=True)


def show_budget(arguments: argparse.Namespace) -> None:
    """Print the realised rate of false alarms against the one asked for."""
    print("| process | noise % | fitted on | asked | realised | on | views | what the fit said |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for process in arguments.process or FAULTS:
        for noise in (0.0, 0.01):
            for per_day, fit_hours, hours in ((24.0, 12.0, 48.0), (1.0, 6.0, 240.0)):
                plant, model = plant_and_model(process, noise, arguments.first_seed, fit_hours, per_day)
                count, views = healthy_alarms(plant, model, process, hours)
                said = "; ".join(model.report.notes) if model.report and model.report.notes else "supported"
                print(f"| {process} | {100 * noise:g} | {fit_hours:g} h | {per_day:g} a day "
                      f"| {count / hours * 24:.2f} a day | {hours:g} h | {dict(views)} | {said} |", flush=True)


def show_ranking(arguments: argparse.Namespace) -> None:
    """Print AUC and pAUC on the paper's blocks, training block left out, and those of the second lamp."""
    print("| process | noise % | seeds | AUC | pAUC | AUC on clean rows | second lamp: AUC on clean rows |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for process, seeds in (("lorenz", 5), ("throttle", 3)):
        for noise in (0.0, 0.01):
            found = []
            for case in simulated_cases(process, noise=noise, seeds=seeds):
                model = fit(case.healthy, case.tags, case.period_s)
                outs = model.outs(np.vstack([case.healthy, case.test]))[len(case.healthy):]
                score, slow = outs[:, SCORE], outs[:, 2]
                clean, late = case.clean(100), case.clean(SLOW_CLEAN - 40)
                found.append([auc(score, case.truth), partial_auc(score, case.truth),
                              auc(score[clean], case.truth[clean]), auc(slow[late], case.truth[late])])
            mean = np.mean(found, axis=0)
            figures = " | ".join(f"{x:.4f}" for x in mean)
            print(f"| {process} | {100 * noise:g} | {seeds} | {figures} |", flush=True)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", action="store_true")
    parser.add_argument("--ranking", action="store_true")
    parser.add_argument("--process", action="append", choices=sorted(FAULTS), help="only this plant (--ranking: both)")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=11)
    parser.add_argument("--onsets", type=int, default=10)
    parser.add_argument("--hours", type=float, default=10.0)
    parser.add_argument("--fit-hours", type=float, default=2.0)
    arguments = parser.parse_args()
    if arguments.budget:
        show_budget(arguments)
    elif arguments.ranking:
        show_ranking(arguments)
    else:
        show_delays(arguments)


if __name__ == "__main__":
    main()
