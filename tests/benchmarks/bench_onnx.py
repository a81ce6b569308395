"""Measures the method `onnx` with the bundled graphs: time of an update, batch, and what each fault looks like.

    python -m tests.benchmarks.bench_onnx          # speed
    python -m tests.benchmarks.bench_onnx --auc    # AUC of the trailing mean over 100 rows, by fault and noise

Speed: exit code 1 if the median update is above 20 us.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from sklearn.metrics import roc_auc_score

from opcua_detector.api import Record
from opcua_detector.detectors.onnx_model import OnnxParams, OnnxPlugin
from sim_server.processes import Fault, make

FAULTS = {
    "lorenz": (("sigma", 2 / 3), ("rho", 26 / 28), ("beta", 1.25)),
    "throttle": (("Kb", 1.3), ("Kt", 1.3), ("La", 1.3)),
}
LIMIT_US = 20.0
WINDOW = 100
SETTLING = 500  # rows left out at the start of each run


def record_of(name, seed, rows, fault=None, noise=0.0):
    """Rows of a simulated plant, faulty from the first to the last."""
    plant = make(name, seed=seed, noise=noise)
    values = plant.simulate(rows, [Fault(*fault, 0, rows)] if fault else [])
    return Record.from_rows(values, [tag.name for tag in plant.model.measured], plant.period_ns)


def opened(name):
    """The bundled graph of a process as a method."""
    record = record_of(name, 0, 50)
    return OnnxPlugin().open(OnnxPlugin().fit(record, OnnxParams(f"bundled:{name}")), record.tags)


def speed(name, rows=20_000):
    """Print one row; return the median update in us."""
    method, record = opened(name), record_of(name, 1, rows)
    pairs = list(zip(record.values, record.valid, strict=True))
    took = np.empty(rows)
    for k, (values, valid) in enumerate(pairs):
        began = time.perf_counter_ns()
        method.update(values, valid)
        took[k] = time.perf_counter_ns() - began
    began_s = time.perf_counter()
    method.residuals(record)
    batch_us = (time.perf_counter() - began_s) / rows * 1e6
    median, p99 = np.percentile(took[method.memory + 1:], [50, 99]) / 1e3
    print(f"{name:10s} update p50 {median:6.2f} us  p99 {p99:6.2f} us   batch {batch_us:5.2f} us a row")
    return median


def surprise(residual, healthy):
    """-ln of the share of healthy residuals that are as large, per channel."""
    out = np.empty_like(residual)
    for j in range(residual.shape[1]):
        ranked = np.sort(healthy[:, j])
        above = len(ranked) - np.searchsorted(ranked, residual[:, j], side="left")
        out[:, j] = -np.log((above + 1) / (len(ranked) + 1))
    return out


def trailing(x):
    """Mean over the last WINDOW rows."""
    return np.convolve(x, np.full(WINDOW, 1 / WINDOW), "valid")


def auc(name, fault, noise, seeds=(1001, 1002), rows=20_000):
    """Return the AUC of the mean over channels of (log residual, surprise), trailing mean over WINDOW rows."""
    method = opened(name)
    calibration = method.residuals(record_of(name, 900, 50_000, noise=noise))[SETTLING:]

    def levels(shift, fault):
        parts = [method.residuals(record_of(name, seed + shift, rows, fault, noise))[SETTLING:] for seed in seeds]
        return [np.concatenate([trailing(f(part).mean(axis=1)) for part in parts])
                for f in (lambda r: np.log(r + 1e-3), lambda r: surprise(r, calibration))]

    healthy, faulty = levels(0, None), levels(50, fault)
    labels = np.r_[np.zeros(len(healthy[0])), np.ones(len(faulty[0]))]
    return [roc_auc_score(labels, np.r_[h, f]) for h, f in zip(healthy, faulty, strict=True)]


def main():
    """Run the benchmark; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--auc", action="store_true")
    if parser.parse_args().auc:
        print(f"AUC, mean over tags, trailing mean over {WINDOW} rows: log residual / surprise")
        for name, faults in FAULTS.items():
            for fault in faults:
                cells = [f"noise {noise:g}: {a:.4f} / {b:.4f}" for noise in (0.0, 0.001, 0.01)
                         for a, b in [auc(name, fault, noise)]]
                print(f"{name:10s}{fault[0]:6s} x {fault[1]:.3f}   " + "   ".join(cells))
        return 0
    return 0 if max(speed(name) for name in FAULTS) <= LIMIT_US else 1


if __name__ == "__main__":
    raise SystemExit(main())
