"""Measures the method `regression`: stream, batch, fit, model size; with --forecast how sharp its forecasts are.

    python -m tests.benchmarks.bench_regression               # speed at 2, 10, 50 and 200 tags
    python -m tests.benchmarks.bench_regression --forecast    # linear and corrected forecasts, simulated processes

Exit code 1 if the stream's median is above its limit: 1.5 us a row at 2 tags (6 us with the correction), 8 us at 10,
40 us at 50, 120 us at 200 (linear).
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from opcua_detector.api import Record
from opcua_detector.detectors.regression import RegressionParams, RegressionPlugin
from sim_server.processes import make

PLUGIN = RegressionPlugin()
LIMITS_US = {(2, "off"): 1.5, (2, "on"): 6.0, (10, "off"): 8.0, (50, "off"): 40.0, (200, "off"): 120.0}
SETTLING = 1000


def record_of(values):
    """Record of rows 10 ms apart."""
    return Record.from_rows(values, [f"t{k}" for k in range(values.shape[1])], 10_000_000)


def plant(n, tags, seed=0):
    """float64[n, tags]: Lorenz at 2 tags, else noisy mixtures of eight slow waves."""
    if tags == 2:
        return make("lorenz", seed=seed).simulate(n + SETTLING)[SETTLING:]
    rng = np.random.default_rng(seed)
    waves = np.sin(np.arange(n)[:, None] * rng.uniform(0.005, 0.1, 8) + rng.uniform(0, 6, 8))
    return waves @ rng.standard_normal((8, tags)) + 0.05 * rng.standard_normal((n, tags))


def median_us(method, record, bad_tag=None):
    """Return (median, 99 % quantile) of single updates in us; `bad_tag` is not valid in any row."""
    valid = record.valid.copy()
    if bad_tag is not None:
        valid[:, bad_tag] = 0
    took = np.empty(len(record))
    for k in range(len(record)):
        values, mask = record.values[k], valid[k]
        began = time.perf_counter_ns()
        method.update(values, mask)
        took[k] = time.perf_counter_ns() - began
    return np.percentile(took, [50, 99]) / 1e3


def speed(tags, rows, nonlinear):
    """Print one row of the speed table; return the stream's median in us a row."""
    record = record_of(plant(rows, tags))
    began = time.perf_counter()
    model = PLUGIN.fit(record, RegressionParams(nonlinear=nonlinear))
    fit_s = time.perf_counter() - began
    method = PLUGIN.open(model, record.tags)
    live = record_of(plant(5000, tags, seed=1))
    batch_s = np.inf
    for _ in range(3):
        began = time.perf_counter()
        method.residuals(live)
        batch_s = min(batch_s, time.perf_counter() - began)
    median, p99 = median_us(method, live)
    bad, _ = median_us(method, live, bad_tag=0)
    size = sum(array.nbytes for array in model.arrays.values()) / 1e6
    print(f"{tags:5d} {rows:7d} {nonlinear:>9s} {median:10.2f} {p99:8.2f} {bad:11.2f} {batch_s / len(live) * 1e6:9.2f}"
          f" {fit_s:8.2f} {size:9.2f} {method.nonlinear_share:11.2f}", flush=True)
    return median


def forecasts(rows):
    """Print errors of linear and corrected forecasts on fresh rows, in healthy standard deviations."""
    print("process   noise tag |   linear rms   median | corrected rms   median "
          "| held out rms   95 % | nonlinear feature")
    for name in ("lorenz", "throttle"):
        for noise in (0.0, 0.001, 0.01, 0.05):
            record, fresh = (
                record_of(make(name, seed=seed, noise=noise).simulate(rows + SETTLING)[SETTLING:]) for seed in (3, 4))
            plain = PLUGIN.open(PLUGIN.fit(record, RegressionParams(nonlinear="off")), record.tags)
            method = PLUGIN.open(PLUGIN.fit(record, RegressionParams()), record.tags)
            was, now = plain.residuals(fresh), method.residuals(fresh)
            a, facts = method.model.arrays, method.model.params
            for k in range(2):
                print(f"{name:9s} {noise:5.3f} {k + 1:3d} | {_rms(was[:, k]):12.2e} {np.nanmedian(was[:, k]):8.1e}"
                      f" | {_rms(now[:, k]):13.2e} {np.nanmedian(now[:, k]):8.1e} | {a['rms'][0, k]:12.2e}"
                      f" {a['inner'][0, k]:.1e} | {facts['nonlinear_share']:9.2f} {facts['feature_share']:7.2f}",
                      flush=True)


def _rms(e):
    return np.sqrt(np.nanmean(e * e))


def main():
    """Run the chosen measurement; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--forecast", action="store_true", help="linear and corrected forecasts")
    parser.add_argument("--tags", type=int, nargs="*", default=[2, 10, 50, 200])
    parser.add_argument("--rows", type=int, default=20_000)
    args = parser.parse_args()
    if args.forecast:
        forecasts(args.rows)
        return 0
    print(" tags    rows nonlinear  us/update      p99  one bad tag  us/batch    fit s  model MB  nonlinear share")
    slow = []
    for tags in args.tags:
        for nonlinear in ("off", "on", "auto"):
            median = speed(tags, args.rows, nonlinear)
            if median > LIMITS_US.get((tags, nonlinear), np.inf):
                slow.append(f"{tags} tags, correction {nonlinear}: {median:.2f} us")
    if 2 in args.tags:
        speed(2, 180_000, "auto")
    print("above the limit: " + ", ".join(slow) if slow else "all medians within their limits")
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
