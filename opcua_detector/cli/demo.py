"""The demonstration: a simulated plant, learnt from its history, watched live, hurt by a fault, explained, healed."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from .. import config as configuration
from ..api import Verdict
from ..app import Fitted, fit_config
from ..client.observer import Observer
from ..config import Config
from ..errors import ConfigError
from ..nodes import NO_SCORE
from ..service import MonitorRun, Service, known
from .online import history_record, run_async
from .simulator import simulated_plant
from .terminal import EXIT_FOUND, AsJson, err, print_json

PLANT = "urn:opcua-detector:simulated-plant"
HISTORY_ROWS = {"lorenz": 120_000, "throttle": 40_000}
DEFAULT_FAULT = {"lorenz": "sigma", "throttle": "Kt"}
MIN_SECONDS = 15.0
HEALTHY_SHARE, FAULT_SHARE = 0.35, 0.4
CLEAR_S = 15.0  # a standing alert is given so much longer to clear: the longest averaging window is 10 s
MIN_ROWS = 20_000
_READ = ("Score", "IsAnomaly", "State", "RTrans", "RBound", "RConf", "EventNo")


def demo(
    process: Annotated[str, typer.Option(metavar="NAME", help="lorenz or throttle.")] = "lorenz",
    fault: Annotated[str, typer.Option(metavar="NAME", show_default="sigma; Kt", help=(
        "lorenz: sigma, rho, beta; throttle: Kb, Kt, La; or none."))] = "",
    seconds: Annotated[float, typer.Option(metavar="N", help="Length of the live part.", min=MIN_SECONDS)] = 60.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the simulated plant.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show the whole job on a simulated plant: learn from history, watch live, detect a fault, explain, see it clear.

    Exit code 0 only when all of it held; with `--fault none` nothing may be detected.
    """
    if process not in HISTORY_ROWS:
        raise ConfigError("unknown process", key="--process", value=process, expected="lorenz or throttle",
                          next_step="correct the option")
    options = ["--process", process, "--port", "0", "--history-rows", str(HISTORY_ROWS[process]), "--seed", str(seed)]
    err.print(f"[bold]simulated plant[/] {process}: starting", markup=True)
    with tempfile.TemporaryDirectory(prefix="opcua-detector-demo-") as folder, simulated_plant(options) as ready:
        chosen = fault or DEFAULT_FAULT[process]
        if chosen != "none" and chosen not in ready["faults"]:
            raise ConfigError("unknown fault", key="--fault", value=chosen,
                              expected=f"one of {', '.join(ready['faults'])}, none", next_step="correct the option")
        err.print(f"  real OPC UA server at {ready['endpoint']}, {ready['history_rows']} rows of healthy history")
        config, file = _config(process, ready["endpoint"], Path(folder))
        fitted, fit_s = _fit(config, file, ready)
        show = Show(process, chosen, ready, seconds)
        run_async(show.run(config, file))
    result = show.result(fitted, fit_s)
    failed = show.problems(result)
    for line in failed:
        err.print(f"  not as promised: {line}", style="red")
    if not failed:
        err.print("[green]all as promised[/]: " + ("nothing detected, as nothing was wrong" if chosen == "none" else
                  "fault detected, explained, read back by a second client, and cleared"))
    if as_json:
        print_json(result)
    if failed:
        raise typer.Exit(EXIT_FOUND)


def _config(process: str, endpoint: str, folder: Path) -> tuple[Config, Path]:
    """Return the sample config of this process, pointed at the server just started, in a folder of its own."""
    text = resources.files("opcua_detector.samples").joinpath(f"{process}.yaml").read_text(encoding="utf-8")
    file = folder / f"{process}.yaml"
    file.write_text(text.replace("opc.tcp://127.0.0.1:4840/", endpoint), encoding="utf-8")
    return configuration.load(file), file


def _fit(config: Config, file: Path, ready: dict[str, Any]) -> tuple[Fitted, float]:
    span_ns = ready["history_rows"] * ready["period_ns"] + 60 * 10**9
    started = time.perf_counter()
    (fitted,) = fit_config(config, file, lambda group: history_record(config, file, group, span_ns),
                           progress=lambda text: err.print(f"  {text}", markup=False))
    fitted.model.save(fitted.path)
    fit_s = time.perf_counter() - started
    for name, reason in fitted.report.excluded.items():
        err.print(f"  left out: {name}: {reason}", markup=False)
    err.print(f"  learnt from {fitted.report.rows} rows read over OPC UA in {fit_s:.1f} s, "
              f"model {fitted.model.model_id}")
    return fitted, fit_s


@dataclass
class Show:
    """The live part and what was seen of it."""

    process: str
    fault: str
    ready: dict[str, Any]
    seconds: float
    service: Service | None = None
    scores: list[tuple[int, float]] = field(default_factory=list)
    written: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    raised: list[int] = field(default_factory=list)
    cleared: list[int] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    truth: list[tuple[int, bool]] = field(default_factory=list)
    readbacks: int = 0
    mismatches: list[str] = field(default_factory=list)
    top: dict[str, float] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    started_ns: int = 0

    async def run(self, config: Config, file: Path) -> None:
        """Run healthy, with the fault, and healthy again."""
        self.service = service = Service(config, file, on_verdict=self._on_verdict)
        async with Observer(self.ready["endpoint"]) as observer:
            await observer.watch(f"nsu={PLANT};s={self.process}.ground_truth", 10,
                                 lambda value, stamp, seen: self.truth.append((stamp or seen, bool(value))))
            await service.start()
            try:
                await observer.watch(self._node("LastUpdate"), 10, self._seen)
                await self._acts(observer)
                self._collect(service)
            finally:
                await service.stop("demonstration ended")
            last = await observer.read({"State": self._node("State"), "StateText": self._node("StateText"),
                                        "Score": self._node("Score")})
            if last != {"State": 0, "StateText": "stopped", "Score": NO_SCORE}:
                self.mismatches.append(f"after the stop the nodes say {last}")

    async def _acts(self, observer: Observer) -> None:
        began = time.monotonic()
        self.started_ns = time.time_ns()
        with_fault = self.fault != "none"
        factor_node = f"nsu={PLANT};s={self.process}.faults.{self.fault}"
        err.print("[bold]live[/]: healthy")
        await self._watch_until(observer, began + self.seconds * (HEALTHY_SHARE if with_fault else 1.0))
        if not with_fault:
            return
        factor = float(self.ready["faults"][self.fault]["factor"])
        err.print(f"[bold]fault[/]: {self.fault} x {factor:.3g}")
        await observer.write_double(factor_node, factor)
        await self._watch_until(observer, began + self.seconds * (HEALTHY_SHARE + FAULT_SHARE))
        await self._read_words(observer)
        err.print("[bold]fault cleared[/]")
        await observer.write_double(factor_node, 1.0)
        end = began + self.seconds
        await self._watch_until(observer, end)
        await self._watch_until(observer, end + CLEAR_S, done=lambda: len(self.cleared) >= len(self.raised))

    async def _watch_until(self, observer: Observer, end: float, done: Callable[[], bool] = lambda: False) -> None:
        """Read the nodes back five times a second and compare them with what was written for the same row."""
        shown = 0.0
        while time.monotonic() < end and not done():
            await self._read_back(observer)
            if time.monotonic() - shown > 2:
                shown = time.monotonic()
                self._print_line()
            await asyncio.sleep(min(0.2, max(0.01, end - time.monotonic())))

    async def _read_back(self, observer: Observer) -> None:
        nodes = {signal: self._node(signal) for signal in (*_READ, "LastUpdate")}
        got = await observer.read(nodes)
        wrote = self.written.get(got["LastUpdate"])
        if wrote is None:
            if self.written and got["LastUpdate"] >= min(self.written):
                self.mismatches.append(f"LastUpdate {got['LastUpdate']} was never written")
            return
        self.readbacks += 1
        read = tuple(got[signal] for signal in _READ)
        if read != wrote:
            self.mismatches.append(f"at {got['LastUpdate']}: read {read}, written {wrote}")

    async def _read_words(self, observer: Observer) -> None:
        signals = ("ExplanationText", "Top1Tag", "Top1Contribution", "Top1Cause", "Top2Cause", "IsAnomaly", "StateText")
        self.told = await observer.read({signal: self._node(signal) for signal in signals})
        err.print(f"  the HMI reads: {self.told['StateText']}: {self.told['ExplanationText']} "
                  f"(top tag {self.told['Top1Tag']}, {self.told['Top1Contribution']:.0%})", markup=False)

    def _node(self, signal: str) -> str:
        return f"nsu=urn:opcua-detector:results;s={self.process}.{signal}"

    def _print_line(self) -> None:
        assert self.service is not None
        for run in self.service.runs.values():
            verdict = run.monitor.verdict
            lamp = "[red]ALERT[/]" if verdict.alert else "[green]ok[/]   "
            cause = f"  {run.explanation.sentence}" if verdict.alert and run.explanation else ""
            err.print(f"  {lamp} score {verdict.score:6.3f}  r_trans {verdict.r_trans:.3f}  r_bound "
                      f"{verdict.r_bound:.3f}  r_conf {verdict.r_conf:.4f}{cause}")

    def _on_verdict(self, run: MonitorRun, verdict: Verdict) -> None:
        if not np.isnan(verdict.score):
            self.scores.append((verdict.source_ns, verdict.score))
        sent = run.fast(verdict) | {"Score": known(verdict.score)}
        self.written[verdict.source_ns // 1000 * 1000] = tuple(sent[signal] for signal in _READ)  # DateTime: us
        if len(self.written) > 2000:
            del self.written[next(iter(self.written))]
        if verdict.raised:
            self.raised.append(verdict.source_ns)
        if verdict.cleared:
            self.cleared.append(verdict.source_ns)
        if verdict.alert:
            for tag, share in zip(verdict.tags, verdict.contribution, strict=True):
                self.top[tag] = self.top.get(tag, 0.0) + float(share)

    def _seen(self, value: Any, _stamp: int | None, seen_ns: int) -> None:
        if value:
            self.latency_ms.append((seen_ns - value) / 1e6)

    def _collect(self, service: Service) -> None:
        run = service.runs[self.process]
        feed = service.feeds[run.config.group]
        self.facts = {
            "scored": run.scored, "lost": feed.counters()["lost"],
            "superseded": run.back.superseded.get(run.config.name, 0) if run.back else 0,
            "explanation": run.alerts[-1].sentence if run.alerts else "",
            "scoring_ns": service.scoring_ns[: min(service.steps, len(service.scoring_ns))].copy(),
        }

    # --- verdict on the demonstration ------------------------------------------------------------------------------

    def result(self, fitted: Fitted, fit_s: float) -> dict[str, Any]:
        """Return the facts, in the order the command documents."""
        fault_ns = next((stamp for stamp, faulty in self.truth if faulty), None)
        healed_ns = next((stamp for stamp, faulty in self.truth if not faulty and fault_ns and stamp > fault_ns), None)
        end_ns = healed_ns or 1 << 62
        before = [t for t in self.raised if fault_ns is None or t < fault_ns]
        during = [t for t in self.raised if fault_ns is not None and fault_ns <= t < end_ns]
        healthy = [s for t, s in self.scores if fault_ns is None or t < fault_ns]
        faulty = [s for t, s in self.scores if during and during[0] <= t < end_ns]
        standing = len(self.raised) > len(self.cleared)
        scoring = self.facts["scoring_ns"] / 1e3
        return {
            "process": self.process, "detectors": list(fitted.model.names), "rows_fitted": fitted.report.rows,
            "fit_s": round(fit_s, 2), "samples_scored": self.facts["scored"], "lost_samples": self.facts["lost"],
            "superseded_writes": self.facts["superseded"], "fault": self.fault,
            "fault_at_s": None if fault_ns is None else round((fault_ns - self.started_ns) / 1e9, 3),
            "detected": bool(during),
            "delay_s": round((during[0] - fault_ns) / 1e9, 3) if during and fault_ns else None,
            "false_alarms_before_fault": len(before), "score_healthy_p99": _quantile(healthy, 0.99),
            "score_fault_p50": _quantile(faulty, 0.5),
            "top_tag": max(self.top, key=lambda tag: self.top[tag]) if during and self.top else None,
            "explanation": self.told.get("ExplanationText") or self.facts["explanation"] or None,
            "readback_ok": self.readbacks > 0 and not self.mismatches, "readbacks": self.readbacks,
            "alarm_cleared": (not standing and bool(self.cleared)) if during else None,
            "latency_ms": {"p50": _quantile(self.latency_ms, 0.5), "p99": _quantile(self.latency_ms, 0.99)},
            "scoring_us": {"p50": _quantile(scoring, 0.5), "p99": _quantile(scoring, 0.99)},
            "excluded": dict(fitted.report.excluded),
        }

    def problems(self, result: dict[str, Any]) -> list[str]:
        """Return what did not hold; empty when all did."""
        found = []
        if result["rows_fitted"] < MIN_ROWS:
            found.append(f"only {result['rows_fitted']} rows fitted")
        if len(result["detectors"]) < 2:
            found.append("fewer than two methods ran")
        if not result["samples_scored"]:
            found.append("no sample was scored")
        if result["false_alarms_before_fault"]:
            found.append(f"{result['false_alarms_before_fault']} false alarms while healthy")
        if not result["readback_ok"]:
            found.append(f"read back: {self.mismatches[:3] or 'nothing could be compared'}")
        if self.fault == "none":
            return found
        if not result["detected"]:
            return [*found, "the fault was not detected"]
        touched = self.ready["faults"][self.fault]["touches"]
        if result["top_tag"] not in touched:
            found.append(f"top tag {result['top_tag']} is not touched by the fault ({', '.join(touched)})")
        if not result["alarm_cleared"]:
            found.append("the alert did not clear after the fault")
        if not result["explanation"]:
            found.append("no explanation was written")
        return found


def _quantile(values: Any, share: float) -> float | None:
    return round(float(np.quantile(values, share)), 4) if len(values) else None
