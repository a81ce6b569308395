"""Slow, plain twin of the method `regression`: one row, one column at a time, written from the text of the design.

It shares no code with the product: the fits solve each regression by itself on an augmented least squares problem
(rows of sqrt(lambda) for the ridge), the residuals keep whole rows in lists.
"""

from __future__ import annotations

import math

import numpy as np

HOLD_ROWS = 10
LARGEST = 50.0


def scaled(record):
    """Return (z float64[n, d], valid bool[n, d]): less mean, over standard deviation or, if larger, resolution."""
    good = (record.valid != 0) & np.isfinite(record.values)
    z = np.zeros(record.values.shape)
    for c in range(z.shape[1]):
        x = record.values[good[:, c], c]
        z[good[:, c], c] = np.clip((x - x.mean()) / max(x.std(), np.diff(np.unique(x)).min()), -LARGEST, LARGEST)
    return z, good


def usable(record, good, lags):
    """Return the rows whose own interval holds `lags` rows before them, all of them and the row itself valid."""
    return [t for t in range(lags, len(record))
            if not record.gap[t - lags + 1 : t + 1].any() and good[t - lags : t + 1].all()]


def ridge(x, y, weight):
    """Return the minimiser of |y - x b|^2 + weight |b|^2."""
    q = x.shape[1]
    return np.linalg.lstsq(np.vstack([x, math.sqrt(weight) * np.eye(q)]), np.append(y, np.zeros(q)), rcond=None)[0]


def fit_forecast(record, c, *, lags, weight, seen):
    """Return {(column, lag): coefficient} of the forecast of column c; `weight` is lambda / n."""
    z, good = scaled(record)
    rows = usable(record, good, lags)
    inputs = [(k, lag) for lag in range(lags, 0, -1) for k in seen]
    inputs += [(k, 0) for k in seen if not record.tags[k].judged]
    x = np.array([[z[t - lag, k] for k, lag in inputs] for t in rows])
    return dict(zip(inputs, ridge(x, z[rows, c], weight * len(rows)), strict=True))


def fit_relation(record, c, *, lags, weight, seen):
    """Return {(column, lag): coefficient} of the reconstruction of column c."""
    z, good = scaled(record)
    rows = usable(record, good, lags)
    inputs = [(k, lag) for lag in range(lags, -1, -1) for k in seen if (k, lag) != (c, 0)]
    x = np.array([[z[t - lag, k] for k, lag in inputs] for t in rows])
    return dict(zip(inputs, ridge(x, z[rows, c], weight * len(rows)), strict=True))


class Stream:
    """The method on a fitted model, for rows whose columns are the model's, in its order."""

    def __init__(self, model):
        a = self.a = model.arrays
        self.d, self.m = a["partners"].shape
        self.j = a["rms"].shape[1]
        self.inert = self.d - self.j
        self.lags = model.params["lags"]
        p = a["directions"].shape[0]
        self.behind = (p - self.inert) // self.d if p else self.lags
        self.reset()

    def reset(self):
        """Forget all rows."""
        self.past, self.bad, self.guess = [], [], []
        self.away = [0] * self.d

    def linear(self, c, weights, now):
        """Sum of weights over the rows t - lags ... t of the columns that c sees, as far as there are weights."""
        seen = self.a["partners"][c]
        rows = [*self.past[len(self.past) - self.lags :], now]
        flat = [row[k] for row in rows for k in seen]
        return sum(w * x for w, x in zip(weights, flat, strict=False))

    def forecast(self, c, now):
        """Forecast of the judged column c, NaN where the past is too short."""
        a, i = self.a, c - self.inert
        if a["corrected"][i] < 0:
            used = self.lags * self.m + sum(1 for k in a["partners"][c] if k < self.inert)
            return self.linear(c, a["forecast"][i][:used], now) if len(self.past) >= self.lags else math.nan
        if len(self.past) < self.behind:
            return math.nan
        x = np.array([z for row in self.past[-self.behind :] for z in row] + now[: self.inert])
        drive = a["offsets"] + x @ a["directions"]
        features = [v / math.sqrt(1.0 + v * v) for v in drive]
        return float(np.dot(a["correction"][a["corrected"][i]], [*features, *x, 1.0]))

    def relation(self, c, now):
        """Value less reconstruction of column c."""
        return self.linear(c, self.a["relation"][c], now)

    def share_is_known(self, c, kind):
        """Whether column c can be judged, by the rules of masks."""
        a, seen = self.a, self.a["partners"][c]
        if any(row[c] for row in self.guess[-self.lags :]):
            return False
        behind = self.lags
        if kind == "forecast" and a["corrected"][c - self.inert] >= 0:
            behind = self.behind
            if any(any(row) for row in [*self.guess[-behind:], self.guess_now]):
                return False
            if any(row[c] for row in self.bad[-behind:]):
                return False
        marks = [row[k] for row in self.bad[-behind:] for k in seen]
        marks += [self.bad_now[k] for k in seen if (kind == "relation" and k != c) or k < self.inert]
        return 2 * sum(marks) <= len(marks)

    def update(self, values, valid):
        """Return 2 j signed residuals: value less forecast, then value less reconstruction."""
        a = self.a
        self.bad_now = [not (valid[c] and math.isfinite(values[c])) for c in range(self.d)]
        now = []
        for c in range(self.d):
            if self.bad_now[c]:
                self.away[c] += 1
                now.append(self.past[-1][c] if self.past else 0.0)
            else:
                self.away[c] = 0
                now.append(min(max((values[c] - a["mean"][c]) * a["inverse"][c], -LARGEST), LARGEST))
        self.guess_now = [away > HOLD_ROWS for away in self.away]
        warm = len(self.past) >= self.lags
        for late in (False, True):
            for c in range(self.d):
                if not warm or not self.bad_now[c] or self.guess_now[c] != late:
                    continue
                z = now[c]
                if late:
                    z -= self.relation(c, now)
                elif c >= self.inert and math.isfinite(ahead := self.forecast(c, now)):
                    z = ahead
                now[c] = min(max(z, a["low"][c]), a["high"][c])
        out = [math.nan] * (2 * self.j)
        for i in range(self.j):
            c = self.inert + i
            if not warm or self.bad_now[c]:
                continue
            if self.share_is_known(c, "forecast"):
                out[i] = now[c] - self.forecast(c, now)
            if self.share_is_known(c, "relation"):
                out[self.j + i] = self.relation(c, now)
        self.past.append(now)
        self.bad.append(self.bad_now)
        self.guess.append(self.guess_now)
        return out


def residuals(model, record):
    """Return float64[n, 2 j] for a record whose columns are the model's, in its order."""
    stream, out = Stream(model), []
    for t in range(len(record)):
        if record.gap[t]:
            stream.reset()
        out.append(np.abs(stream.update(record.values[t], record.valid[t])))
    return np.array(out)


def follow(model, record, c):
    """Return float64[n], scaled: column c as the others say it should be, its own past included; no gap inside."""
    stream, out = Stream(model), []
    for t in range(len(record)):
        stream.update(record.values[t], record.valid[t])
        now = stream.past.pop()
        if len(stream.past) >= stream.lags:
            now[c] = min(max(now[c] - stream.relation(c, now), -LARGEST), LARGEST)
            out.append(now[c])
        else:
            out.append(math.nan)
        stream.past.append(now)
    return np.array(out)


def gram(z, rows, lags):
    """Return the sum over the rows of x x', x = [z(t - lags), ..., z(t)], one row after the other."""
    width = (lags + 1) * z.shape[1]
    total = np.zeros((width, width))
    for t in rows:
        x = z[t - lags : t + 1].ravel()
        total += np.outer(x, x)
    return total
