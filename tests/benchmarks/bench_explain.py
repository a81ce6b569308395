"""Measures explanations: does the first cause name the guilty tag, and what does an explanation take?

    python -m tests.benchmarks.bench_explain                      # simulated single-sensor faults
    python -m tests.benchmarks.bench_explain --public             # + application servers, given the true segment
    python -m tests.benchmarks.bench_explain --public --design    # only their design half
    python -m tests.benchmarks.bench_explain --speed              # + time of an explanation at 10 and 200 tags

Simulated: each tag of a ten-tag loop has each fault (bias, stuck, noise, gain, lag), streamed through a monitor with
the default settings; asked are the explanation at the alert, that at the end of the fault where the alert stands, and
`Detector.contributions` over the fault. The same without lag on the two nonlinear processes, where a delay of one of
two tags is one of the other. Exit code 1 where a precision is below .95.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from opcua_detector import detector
from opcua_detector.detector import Detector
from opcua_detector.engine import RowMonitor, frames_of
from tests.benchmarks.bench_regression import plant as many_tags
from tests.benchmarks.public_data import asd_cases
from tests.fault_plants import KINDS, LINEAR, LORENZ, NONLINEAR_KINDS, THROTTLE, FaultyRows, Plant, faults, fitted

WANTED = 0.95
WARM_UP_ROWS = 500


def explained(model: Detector, fault: FaultyRows) -> Iterator[tuple[str, str]]:
    """Yield (when, tag named first): at the alert, at the end of the fault, over the fault as a whole."""
    monitor = model.monitor()
    raised = False
    first = max(0, fault.start - WARM_UP_ROWS)
    for row, frame in enumerate(frames_of(model.record(fault.rows[first:])), start=first):
        verdict = monitor.step(frame)
        if row < fault.start:
            continue
        if verdict.alert and not raised:
            raised = True
            yield "alert", named(monitor)
        elif row == fault.stop - 1 and verdict.alert:
            yield "end", named(monitor)
    shares = model.contributions(fault.rows, fault.start, fault.stop)
    yield "interval", next(iter(shares), "")


def named(monitor: RowMonitor) -> str:
    """Return the tag of the first cause."""
    causes = monitor.explain(monitor.snapshot()).causes
    return monitor.plan.owner(causes[0].tag) if causes else ""


def simulated(plant: Plant, seeds: range, kinds: tuple[str, ...]) -> dict[str, tuple[int, int, Counter[str]]]:
    """Return when -> (right, asked, what was wrong)."""
    out: dict[str, tuple[int, int, Counter[str]]] = {}
    model = fitted(plant)
    for fault in faults(plant, seeds, kinds):
        for when, tag in explained(model, fault):
            right, asked, wrong = out.get(when, (0, 0, Counter[str]()))
            if tag != fault.tag:
                wrong[f"{fault.kind} of {fault.tag}: {tag or 'nothing'}"] += 1
            out[when] = right + (tag == fault.tag), asked + 1, wrong
    return out


def servers(design: bool) -> Iterator[tuple[str, int, int]]:
    """Yield (machine, events whose first tag is at the root, events) of the application servers."""
    for case in asd_cases():
        if design and case.half != "design":
            continue
        model = detector.fit(case.healthy, case.tags, case.period_s)
        right = 0
        for cause in case.causes:
            shares = model.contributions(case.test, cause.start, cause.stop)
            right += next(iter(shares), "") in {case.tags[c] for c in cause.columns}
        yield f"{case.name} ({case.half})", right, len(case.causes)


def speed(tags: int) -> None:
    """Print how long a snapshot and an explanation of a standing alert take."""
    rows = many_tags(21_500, tags)
    healthy, live = rows[:20_000], rows[20_000:].copy()
    live[1000:, tags // 2] += 4 * healthy[:, tags // 2].std()
    model = detector.fit(healthy, [f"t{k}" for k in range(tags)], 0.01)
    monitor = model.monitor()
    for frame in frames_of(model.record(live)):
        monitor.step(frame)
    taken = monitor.snapshot()
    took = []
    for ask in (monitor.snapshot, lambda: monitor.explain(taken)):
        best = min(_seconds(ask) for _ in range(5))
        took.append(f"{1e3 * best:.2f} ms")
    told = monitor.explain(taken)
    print(f"{tags:4d} tags, {len(taken.source_ns)} rows: snapshot {took[0]}, explanation {took[1]}; {told.sentence}; "
          f"without: {told.counterfactual}")


def _seconds(ask: object) -> float:
    began = time.perf_counter()
    ask()  # type: ignore[operator]
    return time.perf_counter() - began


def main() -> int:
    """Run the chosen measurements; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--public", action="store_true")
    parser.add_argument("--design", action="store_true")
    parser.add_argument("--speed", action="store_true")
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    low = False
    print("plant      noise  asked at  right / asked  precision  wrong")
    for plant in (LINEAR, LORENZ, THROTTLE, replace(LORENZ, noise=0.0), replace(THROTTLE, noise=0.0)):
        kinds = KINDS if plant is LINEAR else NONLINEAR_KINDS
        for when, (right, asked, wrong) in simulated(plant, seeds, kinds).items():
            low |= right < WANTED * asked
            print(f"{plant.name:9s} {plant.noise:6.2f}  {when:8s}  {right:5d} / {asked:<5d}  {right / asked:9.3f}  "
                  + ", ".join(f"{what} ({n})" for what, n in wrong.most_common(4)), flush=True)
    if args.public:
        found = list(servers(args.design))
        for name, right, asked in found:
            print(f"{name}: {right} of {asked}")
        precision = sum(right for _, right, _ in found) / sum(asked for _, _, asked in found)
        low |= precision < WANTED
        print(f"application servers, given the true segment: {precision:.3f}")
    if args.speed:
        for tags in (10, 200):
            speed(tags)
    return 1 if low else 0


if __name__ == "__main__":
    np.set_printoptions(precision=3)
    raise SystemExit(main())
