"""Measures ours and the peers on SKAB valve 1, Tennessee Eastman (13 faults) and ASD 1-6 from the shared data.

    python tests/benchmarks/bench_public.py                         # everything, design and report half and both
    python tests/benchmarks/bench_public.py --sets skab --peers-only
    python tests/benchmarks/bench_public.py --simulated --noise 0.01

Protocol: `tests/benchmarks/peers.py`; data: `tests/benchmarks/public_data.py`. AUC, pAUC and VUS-PR are means over the
runs, faults or servers; the operating point is that of all of them together, each method at its own healthy limit. On
TEP the false alarms are those of d00_te[480:]. "no verdict" is the share of test rows without a score. On the
simulated plants faulty blocks that follow each other are one event.

Ours is fitted by `opcua_detector.fit` on the healthy rows with the default parameters, the same for every data set,
and alarms above its own limit. Differences are ours minus the peer on the same cases, with the 95 % interval of their
mean from a bootstrap over cases. Exit code 1 where a peer's rerun misses its reference row by more than .01: then its
figures count for nothing.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opcua_detector.api import Float64
from opcua_detector.metrics import OperatingPoint, auc, operating_point, partial_auc, vus_pr
from tests.benchmarks.peers import Judged, Peer, all_peers, judge, meets_reference, segments
from tests.benchmarks.public_data import SETS, SIMULATED_SEEDS, Case, public_cases, simulated_cases

HALVES = ("design", "report", "all")
OURS = "ours"
SHARE, AT_SHARE = 0.75, "ours, alarm at .75 of the limit"
"""Share of the limit with the best F1 on the design halves of TEP and ASD (ASD .321, at the limit .257)."""
RESAMPLES, COVERED = 4000, 0.95
FIGURES = ("AUC", "pAUC", "VUS-PR")


@dataclass(frozen=True)
class Result:
    """A judged case; ranking float64[3]: AUC, pAUC(0.1), VUS-PR, NaN where the case is healthy throughout."""

    case: Case
    judged: Judged
    ranking: Float64


def judge_ours(cases: Iterable[Case]) -> Iterator[tuple[Case, Judged]]:
    """Fit ours on the healthy rows of each case and score its test rows; the same healthy rows are fitted once.

    Test rows that continue the healthy rows are scored as their continuation, others as a stream of their own.
    """
    from opcua_detector import fit

    last: Float64 | None = None
    for case in cases:
        if case.healthy is not last:
            last = case.healthy
            parts = segments(case.healthy_gap)
            model = fit(case.healthy, case.tags, case.period_s, intervals=parts if len(parts) > 1 else None)
        before = case.healthy[:0] if case.test_gap[0] else case.healthy
        score = model.score(np.concatenate([before, case.test]))[len(before):]
        yield case, Judged(score, float(model.limit))


def rank(case: Case, judged: Judged, with_vus: bool) -> Float64:
    """Return float64[3]: AUC, pAUC(0.1), VUS-PR."""
    vus = vus_pr(judged.score, case.truth, case.vus_window) if with_vus else np.nan
    return np.array([auc(judged.score, case.truth), partial_auc(judged.score, case.truth), vus])


def of_half(results: Sequence[Result], half: str) -> list[Result]:
    """Return the results of "design", "report" or "all"."""
    return [one for one in results if half == "all" or one.case.half in (half, "both")]


def halves_of(results: Sequence[Result]) -> tuple[str, ...]:
    """Return the halves to show; simulated runs belong to none."""
    return HALVES if any(one.case.half == "design" for one in results) else ("all",)


def ranked_by(results: Sequence[Result]) -> list[int]:
    """Return which two figures compare methods: AUC and VUS-PR, on the simulated plants AUC and pAUC."""
    return [0, 1] if results[0].case.data_set in SIMULATED_SEEDS else [0, 2]


def together(results: Sequence[Result]) -> tuple[OperatingPoint, OperatingPoint]:
    """Return the operating point of all rows and the one whose false alarms count.

    They differ where a data set has healthy recordings of its own (TEP): false alarms are those of the recordings.
    """
    def point(of: Sequence[Result]) -> OperatingPoint:
        gap = np.zeros(sum(len(one.case.truth) for one in of), np.uint8)
        gap[np.cumsum([0, *(len(one.case.truth) for one in of[:-1])])] = 1
        return operating_point(np.concatenate([one.judged.alert for one in of]),
                               np.concatenate([one.case.truth for one in of]), of[0].case.period_s, gap)

    healthy = [one for one in results if not one.case.truth.any()]
    return point(results), point(healthy or results)


def interval(differences: Float64) -> tuple[float, float, float]:
    """Return mean and bootstrap interval of the mean of float64[n_cases] differences."""
    draws = np.random.default_rng(0).integers(0, len(differences), (RESAMPLES, len(differences)))
    low, high = np.quantile(differences[draws].mean(axis=1), [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return float(differences.mean()), float(low), float(high)


def figure(value: float, digits: int = 3) -> str:
    """Return a number as the tables show it."""
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def line(cells: Iterable[str]) -> str:
    """Return one row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def table(data_set: str, found: dict[str, list[Result]], seconds: dict[str, float]) -> bool:
    """Print the table of a data set; return whether every peer with a reference meets it."""
    head = ("method", "half", *FIGURES, "onset recall", "false alarms/h", "FAR %", "rows found %", "F1", "delay s",
            "no verdict %", "reference", "s")
    print(line(head))
    print(line(["---"] * len(head)))
    holds = True
    for name, results in found.items():
        for half in halves_of(results):
            chosen = of_half(results, half)
            ranking = np.mean([one.ranking for one in chosen if one.case.truth.any()], axis=0)
            every, false = together(chosen)
            silent = np.mean(np.isnan(np.concatenate([one.judged.score for one in chosen])))
            met = meets_reference(data_set, name, *ranking[ranked_by(results)]) if half == "all" else None
            holds &= met is not False
            print(line([
                name, half, *(figure(value) for value in ranking), f"{every.detected}/{every.onsets}",
                figure(false.false_alarms_per_hour, 2), figure(100 * false.false_alarm_share, 1),
                figure(100 * (1 - every.missed_share), 1), figure(every.f1), figure(every.delay_s, 2),
                figure(100 * silent, 1), {None: "", True: "met", False: "MISSED"}[met],
                figure(seconds[name], 1) if half == "all" else ""]), flush=True)
    return holds


def differences(found: dict[str, list[Result]]) -> None:
    """Print ours minus each peer, paired by case."""
    halves, columns = halves_of(found[OURS]), ranked_by(found[OURS])
    head = ("ours minus", *(f"{FIGURES[k]}, {half}" for half in halves for k in columns))
    print(line(head))
    print(line(["---"] * len(head)))
    for name, theirs in found.items():
        if name in (OURS, AT_SHARE):
            continue
        cells = []
        for half in halves:
            pairs = list(zip(of_half(found[OURS], half), of_half(theirs, half), strict=True))
            change = np.array([a.ranking - b.ranking for a, b in pairs if a.case.truth.any()])
            for k in columns:
                mean, low, high = interval(change[:, k])
                cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        print(line([name, *cells]), flush=True)


def measure(
    data_set: str, cases: Sequence[Case], judges: dict[str, Callable[[Iterable[Case]], Iterator[tuple[Case, Judged]]]],
    with_vus: bool,
) -> bool:
    """Run all methods over a data set and print its tables; return whether every peer meets its reference."""
    found: dict[str, list[Result]] = {}
    seconds: dict[str, float] = {}
    for name, of in judges.items():
        began = time.perf_counter()
        judged = list(of(cases))
        seconds[name] = time.perf_counter() - began
        found[name] = [Result(case, one, rank(case, one, with_vus)) for case, one in judged]
        if name == OURS:
            seconds[AT_SHARE] = seconds[name]
            found[AT_SHARE] = [replace(r, judged=replace(r.judged, limit=SHARE * r.judged.limit)) for r in found[name]]
    print(f"\n### {data_set}: {len(cases)} cases\n")
    holds = table(data_set, found, seconds)
    if OURS in found:
        print()
        differences(found)
    return holds


def main() -> int:
    """Run the chosen part; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", choices=SETS, default=SETS)
    parser.add_argument("--peers-only", action="store_true", help="without ours")
    parser.add_argument("--ours-only", action="store_true", help="without the peers")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="these peers only, by the names in the table")
    parser.add_argument("--simulated", action="store_true", help="the simulated plants instead of the public sets")
    parser.add_argument("--noise", type=float, default=0.0, help="of the simulated plants, share of each tag's std")
    parser.add_argument("--seeds", type=int, help="of the simulated plants")
    args = parser.parse_args()
    peers: list[Peer] = [] if args.ours_only else all_peers()
    if args.peers is not None:
        unknown = set(args.peers) - {peer.name for peer in peers}
        if unknown:
            parser.error(f"no peer {sorted(unknown)}; there are {[peer.name for peer in peers]}")
        peers = [peer for peer in peers if peer.name in args.peers]
    judges: dict[str, Callable[[Iterable[Case]], Iterator[tuple[Case, Judged]]]] = {}
    if not args.peers_only:
        judges[OURS] = judge_ours
    for peer in peers:
        judges[peer.name] = partial(judge, peer)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, numpy {np.__version__}: {' '.join(sys.argv)}\n")
    for peer in peers:
        print(f"- {peer.name}: {peer.settings}")
    holds = True
    if args.simulated:
        for process in SIMULATED_SEEDS:
            cases = list(simulated_cases(process, noise=args.noise, seeds=args.seeds))
            named = f"{process} {args.noise:.0%}" if args.noise else process
            holds &= measure(named, cases, judges, with_vus=False)
    else:
        for data_set in args.sets:
            holds &= measure(data_set, list(public_cases(data_set)), judges, with_vus=True)
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
