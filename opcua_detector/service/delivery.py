"""What is told of a monitor: its outputs row by row, its explanation, and the words for when there is no verdict."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ..api import BAD_DATA_UNAVAILABLE, Explanation, Verdict
from ..client import WriteBack
from ..config import MonitorConfig
from ..engine import Monitor
from ..nodes import INSECURE, NO_SCORE, STATE_TEXTS, TOP, State

EXPLAIN_AGAIN_NS = 1_000_000_000  # while an alert stands its explanation follows the situation this often
SLOW_EVERY_NS = 1_000_000_000
KEPT_ALERTS = 100  # explanations in memory; the store keeps all
NOTHING_VALID = "Bad: no tag has a valid value"
INSECURE_WORDS = " (INSECURE connection)"  # behind StateText: who looks at an HMI must see it without looking for it
# Whoever reads one of these knows a silent detector from a healthy plant; who reads IsAnomaly alone does not.
TELLING = frozenset({"Score", "State", "StateText", "Quality"})
_EMPTY_CAUSES: Mapping[str, Any] = {
    "ExplanationText": "",
    **{f"Top{rank}{what}": empty for rank in range(1, TOP + 1)
       for what, empty in (("Tag", ""), ("Contribution", 0.0), ("Cause", ""))},
}


class MonitorRun:
    """One monitor in operation: its outputs, its explanation and what the terminal shows of it.

    insecure : a server that it reads from or writes to is connected with `insecure: true`

    Attributes
    ----------
    state : of `nodes.State`
    bad : why there is no verdict, while the state is "no data" or "fault"
    refused : why the model file was not taken at the last reload; empty where it was
    cut_off : servers of the group that are not connected
    stepped_s : time.monotonic() of the last row that was worked on
    """

    def __init__(self, config: MonitorConfig, monitor: Monitor, back: WriteBack | None, *,
                 insecure: bool = False) -> None:
        self.config, self.monitor, self.back, self.insecure = config, monitor, back, insecure
        self.explanation: Explanation | None = None
        self.explaining = False
        self.latency_ms = math.nan
        self.scored = 0
        self.raised_ns = 0
        self.peak = math.nan
        self.state = State.WARMING_UP
        self.bad = self.refused = ""
        self.cut_off: tuple[str, ...] = ()
        self.stepped_s = time.monotonic()
        self.alerts: deque[Explanation] = deque(maxlen=KEPT_ALERTS)
        self.alerts_told = 0
        self.columns = np.zeros(0, np.int64)  # of the group's frame: the tags that the monitor looks at
        self._told_state = -1
        self._told_ns = self._explained_ns = 0
        self._quality = ""

    @property
    def state_text(self) -> str:
        """The state in words, and whether another instance writes the outputs."""
        words = STATE_TEXTS[self.state]
        return f"standby, {words}" if self.standby else words

    @property
    def node_text(self) -> str:
        """What the StateText node says: the state in words, and whether a connection is insecure."""
        return STATE_TEXTS[self.state] + (INSECURE_WORDS if self.insecure else "")

    @property
    def standby(self) -> bool:
        """Whether another instance writes the outputs of this monitor."""
        return self.back is not None and not self.back.may_write(self.config.name)

    @property
    def quality(self) -> str:
        """What the Quality node says: of the verdict, of connections, of outputs and of a model that is not taken."""
        cut = f"no connection to {', '.join(self.cut_off)}" if self.cut_off else ""
        if self.state in (State.NO_DATA, State.FAULT):
            text = f"Bad: {cut}" if cut else self.bad or NOTHING_VALID
        else:
            text = f"{self.monitor.verdict.quality}; {cut}" if cut else self.monitor.verdict.quality
        trouble = self.back.trouble(self.config.name) if self.back is not None else ""
        return "; ".join(part for part in (text, trouble, self.refused) if part)

    @property
    def top_tags(self) -> list[tuple[str, float]]:
        """Tags by contribution, the largest first, those without any left out."""
        verdict = self.monitor.verdict
        order = np.argsort(-verdict.contribution, kind="stable")[:TOP]
        return [(verdict.tags[i], float(verdict.contribution[i])) for i in order if verdict.contribution[i] > 0]

    def take(self, verdict: Verdict, valid: bool) -> None:
        """Note the verdict on a row; `valid`: some tag of the monitor has a value."""
        self.state = state_of(verdict) if valid else State.NO_DATA
        self.bad = "" if valid else NOTHING_VALID
        self.stepped_s = time.monotonic()

    def explain_due(self, verdict: Verdict) -> bool:
        """Whether this row asks for a (new) explanation."""
        if not verdict.alert or self.explaining:
            return False
        due = verdict.raised or verdict.source_ns - self._explained_ns >= EXPLAIN_AGAIN_NS
        if due:
            self._explained_ns = verdict.source_ns
        return due

    def fast(self, verdict: Verdict) -> dict[str, Any]:
        """Return what changes with every row."""
        return {
            "Score": verdict.score, "SlowScore": known(verdict.slow_score), "IsAnomaly": verdict.alert,
            "Severity": verdict.severity, "State": self.state,
            "EventNo": verdict.event_no, "RTrans": known(verdict.r_trans), "RBound": known(verdict.r_bound),
            "RConf": known(verdict.r_conf), "Contributions": verdict.contribution,
            "Residuals": np.where(np.isnan(verdict.residual), NO_SCORE, verdict.residual),
            "LastUpdate": verdict.source_ns, "LastUpdateText": iso(verdict.source_ns), "LatencyMs": self.latency_ms,
        }

    def slow_due(self, verdict: Verdict) -> bool:
        """Whether texts or counters have to be told: something of them changed or a second has passed."""
        return (self.state != self._told_state or verdict.quality != self._quality or verdict.cleared
                or not 0 <= verdict.source_ns - self._told_ns < SLOW_EVERY_NS)

    def slow(self, verdict: Verdict, lost: int, superseded: int) -> dict[str, Any]:
        """Return texts and counters."""
        self._told_state, self._quality, self._told_ns = self.state, verdict.quality, verdict.source_ns
        return {"StateText": self.node_text, INSECURE: self.insecure, "Quality": self.quality,
                "ModelId": verdict.model_id, "Limit": 1.0, "LostSamples": lost, "SupersededWrites": superseded,
                **self.cause_values()}

    def cause_values(self) -> dict[str, Any]:
        """Return explanation, top tags and causes; empty texts while no alert stands."""
        verdict, told = self.monitor.verdict, self.explanation
        standing = verdict.alert
        values: dict[str, Any] = {"ExplanationText": told.sentence if standing and told else ""}
        top = (list(told.shares[:TOP]) if told and told.shares else self.top_tags) if standing else []
        causes = told.causes if standing and told else ()
        for rank in range(1, TOP + 1):
            tag, share = top[rank - 1] if rank <= len(top) else ("", 0.0)
            values[f"Top{rank}Tag"], values[f"Top{rank}Contribution"] = tag, share
            values[f"Top{rank}Cause"] = self.monitor.cause_text(causes[rank - 1]) if rank <= len(causes) else ""
        return values

    def no_verdict(self, state: int, bad: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Note that there is no verdict, and why; return (fast, slow) words for the nodes."""
        self.state, self.bad = state, bad
        words = fail_words(self.outputs, state, self.quality, self._given_words)
        return _split(words | {"StateText": self.node_text, INSECURE: self.insecure})

    def last_words(self) -> dict[str, Any]:
        """Return what the nodes say once the detector has stopped.

        An alert that nobody watches any more must not stand for ever; State and Score say that this is no all-clear.
        With the service its connections end, insecure ones too.
        """
        ended = {"IsAnomaly": False, "Severity": 0, INSECURE: False, **_EMPTY_CAUSES}
        return ended | fail_words(self.outputs, State.STOPPED, "Bad: the detector was stopped", self._given_words)

    @property
    def outputs(self) -> frozenset[str]:
        """Signals that are configured as outputs."""
        return frozenset(self.config.outputs.node_of()) if self.config.outputs else frozenset()

    @property
    def _given_words(self) -> Mapping[str, Any]:
        return self.config.outputs.fail_values if self.config.outputs else {}


_FAST = frozenset({  # what `MonitorRun.fast` gives: a node belongs to one request, so that the newest value wins
    "Score", "SlowScore", "IsAnomaly", "Severity", "State", "EventNo", "RTrans", "RBound", "RConf", "Contributions",
    "Residuals", "LastUpdate", "LastUpdateText", "LatencyMs"})


def _split(words: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return ({signal: value for signal, value in words.items() if signal in _FAST},
            {signal: value for signal, value in words.items() if signal not in _FAST})


def fail_words(outputs: Collection[str], state: int, quality: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return signal -> value for a monitor without a verdict; never just "no anomaly".

    outputs : signals that are configured; where none of them tells (`TELLING`), IsAnomaly is raised
    given : signal -> value of the configuration, which go before the usual ones
    """
    words: dict[str, Any] = {"Score": math.nan, "SlowScore": NO_SCORE, "State": state,
                             "StateText": STATE_TEXTS[state], "Quality": quality}
    if not TELLING & set(outputs):
        words["IsAnomaly"] = True
    return words | dict(given)


def known(residual: float) -> float:
    """Return a residual, or -1 where there is none: many PLCs and HMIs take NaN badly."""
    return NO_SCORE if math.isnan(residual) else residual


def state_of(verdict: Verdict) -> int:
    """Return the `State` that a verdict means."""
    if verdict.status == BAD_DATA_UNAVAILABLE:
        return State.STATE_NOT_LEARNT
    if math.isnan(verdict.score):
        return State.WARMING_UP
    return State.ALERT if verdict.alert else State.NORMAL


def iso(source_ns: int) -> str:
    """Return a SourceTimestamp as ISO 8601 text, UTC, microseconds."""
    text = datetime.fromtimestamp(source_ns // 1000 / 1e6, UTC).isoformat(timespec="microseconds")
    return text.replace("+00:00", "Z")
