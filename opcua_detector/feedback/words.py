"""What an adaptation allows, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ..api import Int64, Tag
from .evidence import Evidence
from .ranges import channel_units, healthy_range


def value_text(x: float, tag: Tag) -> str:
    """Return a value with its unit."""
    return f"{float(x):.4g}" + (f" {tag.unit}" if tag.unit else "")


def until_text(about: Mapping[str, Any]) -> str:
    """Return how long a delta holds."""
    if "expires_ns" not in about:
        return "for good"
    day = datetime.fromtimestamp(about["expires_ns"] / 1e9, UTC).strftime("%Y-%m-%d")
    return f"expires {day} unless confirmed"


def allowed_text(evidence: Evidence, changes: Sequence[Mapping[str, Any]]) -> str:
    """Return what is allowed from now on; changes: what the transition methods have adapted."""
    off = evidence.off()
    if not off.any():
        return "what was seen is normal"
    usual = np.maximum(evidence.model.calibration.scale[0], 1e-12)
    c = int(np.argmax(np.where(off, evidence.base / usual, 0.0).sum(axis=0)))
    at, columns = int(evidence.column[c]), evidence.bench.columns
    column = evidence.model.plan.columns[at]
    rows = np.flatnonzero(off.any(axis=1) & (columns.valid[:, at] != 0))
    low, high = healthy_range(evidence.model)
    unit = channel_units(evidence.model, evidence.plugins)[c]
    x = columns.values[rows, at]
    if len(x) and x.max() > high[at]:
        text = f"{column.name} may reach {value_text(x.max(), column)}"
    elif len(x) and x.min() < low[at]:
        text = f"{column.name} may fall to {value_text(x.min(), column)}"
    elif unit > 0:
        text = f"{column.name} may be off by {value_text(float(evidence.base[off[:, c], c].max()) * unit, column)}"
    else:
        times = float(evidence.base[off[:, c], c].max() / usual[c])
        text = f"{column.name} may be off by {times:.2g} times its usual"
    text += _while(evidence, at, rows)
    new = sum(of["transitions"] for change in changes for of in change.get("tags", {}).values())
    wider = sum(of["bounds"] for change in changes for of in change.get("tags", {}).values())
    if new or wider:
        text += f"; {new} new transitions, {wider} with wider bounds"
    return text


def _while(evidence: Evidence, top: int, rows: Int64) -> str:
    """Return the situation: what the tag that moves most beside the one that is off does meanwhile."""
    columns = evidence.bench.columns
    others = [c for c in range(len(columns.tags)) if c != top and evidence.scale.inverse[c] > 0]
    if len(rows) < 2 or not others:
        return ""
    z = evidence.scale.rows(columns)[rows[0]:rows[-1] + 1, others]
    move = np.nan_to_num(z[-1] - z[0])
    c = int(np.argmax(np.abs(move)))
    name = columns.tags[others[c]].name
    if abs(move[c]) < 0.05:
        return f" while {name} is about {float(np.nanmedian(columns.values[rows, others[c]])):.4g}"
    return f" while {name} {'rises' if move[c] > 0 else 'falls'}"
