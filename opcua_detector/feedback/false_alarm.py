"""A false alarm: the delta with which the same situation alarms no more, or the reason why it is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..allowances import BALLS
from ..api import MethodModel, Record
from ..detectors.transition_adapt import adapt
from .bench import Bench
from .deltas import TRANSITION, Delta, delta_id_of, with_delta
from .evidence import Evidence
from .fold import make_room
from .policy import DAY_NS, Feedback, Outcome, Policy, Refused
from .refusals import check_residuals, check_trend, check_values
from .situation import balls_of
from .words import allowed_text, until_text

AT_REST: Final = 0.95  # score below which a situation is to stand afterwards
MORE_GENEROUS: Final = 1.25  # with every attempt
ATTEMPTS: Final = 6


def false_alarm(bench: Bench, feedback: Feedback, policy: Policy) -> Outcome:
    """Return the model for which the alerts of an interval are normal.

    Raises
    ------
    Refused
        With the reason.
    RecordError
        No row of the interval is there.
    """
    model = bench.model
    inside = bench.inside(feedback)
    score, views = bench.views(model)
    with np.errstate(invalid="ignore"):
        alarming = inside[score[inside] >= 1.0]
    if len(alarming) == 0:
        highest = np.nanmax(score[inside], initial=0.0)
        return Outcome("unchanged", model, f"nothing to change: the score stays at {highest:.2g} in this interval, "
                                           f"1 is the limit; model {model.model_id}")
    evidence = Evidence(bench)
    maker = _Maker(evidence, feedback, policy)
    evidence.look_at(alarming, views)
    check_values(evidence, policy)
    for attempt in range(ATTEMPTS):
        delta = maker.delta(MORE_GENEROUS**attempt)
        made = with_delta(model, delta)
        score, views = bench.views(made)
        with np.errstate(invalid="ignore"):
            left = inside[score[inside] >= AT_REST]
        if len(left) == 0:
            break
        evidence.look_at(left, views, AT_REST, relax=attempt >= 1)
        check_values(evidence, policy)
    else:
        with np.errstate(invalid="ignore"):
            if (score[inside] >= 1.0).any():
                raise Refused("the interval runs through too many situations to take them all in; give a shorter one, "
                              "or fit again on a record that holds it")
    check_residuals(evidence, policy)
    check_trend(evidence.model, evidence.reaches(), policy)
    made = make_room(made)
    text = f"adapted: {delta.about['text']}; {until_text(delta.about)}; model {made.model_id}"
    return Outcome("adapted", made, text, delta.id)


class _Maker:
    """Makes the delta of one false alarm from its evidence."""

    def __init__(self, evidence: Evidence, feedback: Feedback, policy: Policy) -> None:
        self.evidence, self.bench, self.feedback, self.policy = evidence, evidence.bench, feedback, policy
        self._adapted: tuple[bytes, list[MethodModel], list[dict[str, Any]]] = (b"", [], [])

    def delta(self, generosity: float) -> Delta:
        """Return the delta for the evidence so far."""
        evidence = self.evidence
        arrays: dict[str, NDArray[Any]] = {}
        about = about_of(self.feedback, self.policy) | {"reach": evidence.reaches()}
        residual, signed = evidence.base, evidence.signed
        rows = self._rows_to_adapt()
        changes: list[dict[str, Any]] = []
        if rows is not None:
            methods, changes = self._adapt(rows)
            if any(change["changed"] for change in changes):
                signed = self.bench.signed(methods)
                residual = np.abs(signed)
                arrays |= {"values": rows.values, "valid": rows.valid, "gap": rows.gap}
                about["rows"] = [tag.name for tag in rows.tags]
        balls = balls_of(evidence, residual, signed, generosity)
        if balls is not None:
            about[BALLS], arrays[BALLS] = balls
        about["text"] = allowed_text(evidence, changes)
        about["id"] = delta_id_of(about, arrays)
        return Delta(about, arrays)

    def _rows_to_adapt(self) -> Record | None:
        """Return the rows that the transition methods are to adapt to, with those around them; None for none."""
        off = self.evidence.off()[:, self.evidence.transition].any(axis=1)
        if not off.any():
            return None
        # The residual of row n looks back over two steps.
        wide = np.convolve(off, np.ones(self.evidence.context + 1), "full")[self.evidence.context:] > 0.5
        wide &= ~self.bench.kept_back
        fitted = self.evidence.fitted
        names = list(dict.fromkeys(name for m in fitted if m.plugin == TRANSITION for name in m.columns))
        return self.bench.columns.take(np.flatnonzero(wide)).select(names)

    def _adapt(self, rows: Record) -> tuple[list[MethodModel], list[dict[str, Any]]]:
        key = hashlib.sha256(rows.source_ns.tobytes()).digest()
        if self._adapted[0] != key:
            pairs = [adapt(m, rows) if m.plugin == TRANSITION else (m, {"changed": False})
                     for m in self.evidence.fitted]
            self._adapted = (key, [m for m, _ in pairs], [change for _, change in pairs])
        return self._adapted[1], self._adapted[2]


def about_of(feedback: Feedback, policy: Policy) -> dict[str, Any]:
    """Return what the journal keeps of any feedback: what was said, by whom, and how long it holds."""
    about: Mapping[str, Any] = {
        "label": feedback.label, "who": feedback.who, "at_ns": int(feedback.at_ns), "start_ns": int(feedback.start_ns),
        "end_ns": int(feedback.end_ns), "event_no": int(feedback.event_no), "comment": feedback.comment,
        "state": "paper" if policy.mode == "paper" else "provisional",
    }
    if policy.mode == "paper":
        return dict(about)
    return {**about, "expires_ns": int(feedback.at_ns) + round(policy.expires_days * DAY_NS)}
