"""Measures what one row costs live: ours against the peers, in single calls, with the size of the model.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_peer_speed.py

Peers are called as a loop beside a PLC must call them: one row at a time, on the last rows they need. Ours is the whole
engine step (columns, methods, calibration, score, alert); the peers give a bare score. Healthy rows: a random stable
vector autoregression. Median of the calls, model as an npz (ours) or a pickle (peers); set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.covariance import LedoitWolf
from sklearn.ensemble import IsolationForest
from sklearn.linear_model import Ridge
from sklearn.neighbors import LocalOutlierFactor
from sklearn.neural_network import MLPRegressor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opcua_detector import Detector, fit
from opcua_detector.api import Float64
from opcua_detector.engine import Engine, frames_of

ROWS, CALLS, LAGS = 5000, 300, 3


def plant(tags: int, rows: int) -> Float64:
    """Return rows of a stable vector autoregression with sparse couplings."""
    rng = np.random.default_rng(tags)
    a = 0.8 * np.eye(tags) + (rng.random((tags, tags)) < 2 / tags) * rng.normal(0, 0.05, (tags, tags))
    x = np.zeros((rows, tags))
    for t in range(1, rows):
        x[t] = a @ x[t - 1] + rng.standard_normal(tags)
    return x


def lagged(x: Float64) -> Float64:
    """Return the last rows side by side."""
    return np.hstack([x[LAGS - k - 1:len(x) - k - 1] for k in range(LAGS)])


def median_us(call: Callable[[int], object]) -> float:
    """Return the median time of one call in microseconds."""
    taken = []
    for k in range(CALLS):
        began = time.perf_counter_ns()
        call(k)
        taken.append(time.perf_counter_ns() - began)
    return float(np.median(taken[20:])) / 1000


def ours(healthy: Float64, live: Float64) -> tuple[float, float, int]:
    """Return (us a row, seconds to fit, bytes of the model)."""
    began = time.perf_counter()
    model: Detector = fit(healthy, [f"t{k}" for k in range(healthy.shape[1])], 1.0)
    seconds = time.perf_counter() - began
    engine = Engine([model.monitor()])
    rows = frames_of(model.record(live))
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "m.npz")
        size = (Path(folder) / "m.npz").stat().st_size
    return median_us(lambda _: engine.step(next(rows))), seconds, size


def peers(healthy: Float64, live: Float64) -> dict[str, tuple[float, float, int]]:
    """Return name -> (us a row, seconds to fit, bytes of the model)."""
    past, now = lagged(healthy), healthy[LAGS:]
    live_past = lagged(live)
    found = {}
    makers: dict[str, tuple[Callable[[], object], Callable[[object, int], object]]] = {
        "ridge VAR(3)": (lambda: Ridge(alpha=1.0).fit(past, now),
                         lambda m, k: np.mean((live[k + LAGS] - m.predict(live_past[k:k + 1])[0]) ** 2)),
        "Mahalanobis": (lambda: LedoitWolf().fit(healthy), lambda m, k: m.mahalanobis(live[k:k + 1])),
        "MLP forecaster": (lambda: MLPRegressor(hidden_layer_sizes=(32,), max_iter=60).fit(past, now),
                           lambda m, k: np.mean((live[k + LAGS] - m.predict(live_past[k:k + 1])[0]) ** 2)),
        "isolation forest": (lambda: IsolationForest(random_state=0).fit(healthy),
                             lambda m, k: m.score_samples(live[k:k + 1])),
        "LOF": (lambda: LocalOutlierFactor(novelty=True).fit(healthy), lambda m, k: m.score_samples(live[k:k + 1])),
    }
    for name, (make, score) in makers.items():
        began = time.perf_counter()
        model = make()
        seconds = time.perf_counter() - began
        found[name] = (median_us(lambda k, m=model, s=score: s(m, k)), seconds, len(pickle.dumps(model)))
    return found


def main() -> None:
    """Print the table."""
    print("| tags | method | one row, us | times ours | fit, s | model, kB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for tags in (8, 52):
        x = plant(tags, ROWS + CALLS + 10)
        healthy, live = x[:ROWS], x[ROWS:]
        own = ours(healthy, live)
        for name, (us, seconds, size) in {"ours": own, **peers(healthy, live)}.items():
            print(f"| {tags} | {name} | {us:.0f} | {us / own[0]:.1f} | {seconds:.2f} | {size / 1000:.0f} |", flush=True)


if __name__ == "__main__":
    main()
