"""Examines a server as it is found: security, certificates, clock, state, what it can do; each with the fix beside it.

Nothing is written here, and nothing costs more than a few reads; what takes seconds is in `measure`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from asyncua import ua

from ..config import GroupConfig
from . import pki, secure, wire
from .clock import TELL_S, ClockOffset, measure_clock
from .node_checks import Finding
from .nodes import read_attributes
from .session import Session

CLOCK_PROBLEM_S = 300.0  # beyond this many stacks refuse tokens and certificates
HEALTHY_SERVICE_LEVEL = 200  # Part 4, 6.6.2.4.2: 0 maintenance, 1 no data, 2 to 199 degraded, 200 to 255 healthy

# What ServerCapabilities (Part 5, 6.3.2) and its OperationLimits (6.3.11) may hold; 0 and absent: no limit known.
_CAPABILITIES = {
    "MaxSessions": 24095, "MaxSubscriptions": 24096, "MaxSubscriptionsPerSession": 24098, "MaxMonitoredItems": 24097,
    "MaxMonitoredItemsPerSubscription": 24104, "MaxMonitoredItemsQueueSize": 31916, "MaxArrayLength": 11702,
    "MaxStringLength": 11703, "MaxByteStringLength": 12911, "MaxBrowseContinuationPoints": 2735,
    "MaxHistoryContinuationPoints": 2737,
}
_LIMITS = {
    "MaxNodesPerRead": 11705, "MaxNodesPerWrite": 11707, "MaxMonitoredItemsPerCall": 11714, "MaxNodesPerBrowse": 11710,
    "MaxNodesPerTranslateBrowsePathsToNodeIds": 11712, "MaxNodesPerHistoryReadData": 12165,
    "MaxNodesPerMethodCall": 11709, "MaxNodesPerRegisterNodes": 11711,
}
_MIN_SAMPLE, _STATUS, _SERVICE_LEVEL = 2272, 2256, 2267


class Mark(StrEnum):
    """How a finding is to be taken."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One thing that was looked at.

    Attributes
    ----------
    where : what it is about: "server plant", "group fast on plant", the place of a tag in the configuration
    what : short name of what was looked at
    found : what was found, in words with figures
    fix : what to do; empty where nothing is
    """

    where: str
    what: str
    mark: Mark
    found: str
    fix: str = ""


@dataclass(slots=True)
class Examined:
    """Diagnoses, and the figures behind them (JSON-able)."""

    diagnoses: list[Diagnosis] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, where: str, what: str, mark: Mark, found: str, fix: str = "") -> None:
        """Add one diagnosis."""
        self.diagnoses.append(Diagnosis(where, what, mark, found, fix))

    def ok(self, where: str, what: str, found: str) -> None:
        """Add what is as it should be."""
        self.add(where, what, Mark.OK, found)

    def warning(self, where: str, what: str, found: str, fix: str) -> None:
        """Add what runs all the same."""
        self.add(where, what, Mark.WARNING, found, fix)

    def problem(self, where: str, what: str, found: str, fix: str) -> None:
        """Add what keeps the detector from its work."""
        self.add(where, what, Mark.PROBLEM, found, fix)


def diagnosis_of(finding: Finding, what: str = "node") -> Diagnosis:
    """Return a finding of `check` as a diagnosis."""
    return Diagnosis(finding.where, what, Mark.PROBLEM if finding.error else Mark.WARNING, finding.problem, finding.fix)


def finding_of(one: Diagnosis) -> Finding:
    """Return a diagnosis as a finding of `check`."""
    problem = one.found if one.what == "connection" else f"{one.what}: {one.found}"
    return Finding(one.where, problem, one.fix, error=one.mark is Mark.PROBLEM)


async def examine_server(session: Session, groups: Sequence[GroupConfig] = ()) -> Examined:
    """Return what there is to say of an open session's server.

    groups : those that take tags from it; what they ask for is held against what the server can do

    Raises
    ------
    ConnectionProblem
        The connection was lost meanwhile.
    """
    told = Examined(facts={"endpoint": session.config.endpoint, "policy": session.config.policy})
    offered = list((await session.discover()).endpoints)
    _security(told, session, offered)
    _certificate(told, session, offered)
    _clock(told, session, await measure_clock(session))
    await _state(told, session)
    await _capabilities(told, session, groups)
    return told


def name_of(session: Session) -> str:
    """Return how diagnoses call a server."""
    return f"server {session.config.name}"


# --- security ---


def _security(told: Examined, session: Session, offered: Sequence[Any]) -> None:
    config, where = session.config, name_of(session)
    offer = secure.offer_text(offered)
    told.facts |= session.security.facts() | {"offered": offer}
    used = f"policy {config.policy}" + ("" if config.policy == "None" else f", {config.mode}")
    if not config.insecure:
        told.ok(where, "security", f"{used}; login {told.facts['login']}; offered: {offer}")
        return
    better = [name for name in secure.POLICIES if f"{name}/" in offer]
    if config.policy == "None":
        fix = (f"the server offers {', '.join(better)}: set policy: {better[-1]} and take 'insecure: true' away"
               if better else "switch a security policy on in the server, then take 'insecure: true' away")
        told.warning(where, "security", f"{used}, insecure: true: {session.security.unchecked}; "
                     f"offered: {offer}", fix)
    else:
        told.warning(where, "security", f"{used}, insecure: true: the server is not checked",
                 f"trust its certificate (opcua-detector cert trust), then take 'insecure: true' away of {config.name}")


def _certificate(told: Examined, session: Session, offered: Sequence[Any]) -> None:
    """Tell what the session found of the certificates when it connected, and of the time they have left."""
    config, where = session.config, name_of(session)
    fitting = secure.fitting(offered, config) or list(offered)
    shown = next((one for one in fitting if one.ServerCertificate), None)
    if shown is None:
        mark = Mark.OK if config.policy == "None" else Mark.WARNING
        told.add(where, "certificate", mark, "the server shows none")
        return
    try:
        about = pki.describe(pki.load_chain(bytes(shown.ServerCertificate))[0])
    except ValueError as error:
        told.problem(where, "certificate", f"it cannot be read ({error})",
                 "let the server make or load a valid certificate")
        return
    left = (about.not_after - datetime.now(UTC)).total_seconds() / 86400
    told.facts["certificate"] = {
        "name": about.name, "fingerprint": about.fingerprint, "application_uri": about.application_uri,
        "hosts": list(about.hosts), "not_before": about.not_before.isoformat(),
        "not_after": about.not_after.isoformat(), "days_left": round(left, 1), "key_bits": about.key_bits,
        "self_signed": about.self_signed}
    words = (f"{about.name}, valid to {about.not_after:%Y-%m-%d} ({left:.0f} days), "
             f"URI {about.application_uri or 'none'}, hosts {', '.join(about.hosts) or 'none'}, {about.key_bits} bits, "
             f"SHA-256 {pki.spaced(about.fingerprint[:16])} ...")
    if config.policy == "None":
        told.ok(where, "certificate", f"{words}; not used with policy None")
        return
    security = session.security
    for text in security.problems:  # only `insecure: true` connects in spite of them
        told.warning(where, "certificate", text, "mend that, or where this is the right server run: opcua-detector "
                     f"cert trust {config.endpoint} --pki {config.pki}; then take 'insecure: true' away")
    soon = security.warnings()
    for text in soon:
        told.warning(where, "certificate", text, "have it renewed in time, and trust the new one beforehand")
    if not security.problems and not soon:
        told.ok(where, "certificate", words)


# --- clock and state ---


def _clock(told: Examined, session: Session, found: ClockOffset | None) -> None:
    where = name_of(session)
    if found is None:
        told.warning(where, "clock", "the server tells no time", "set its clock; rows need its timestamps")
        return
    told.facts["clock"] = {"offset_s": found.offset_s, "uncertainty_s": found.uncertainty_s, "reads": found.reads}
    told.facts["round_trip_ms"] = {"shortest": found.round_trip_s * 1e3, "median": found.median_round_trip_s * 1e3,
                                   "longest": found.longest_round_trip_s * 1e3}
    size = abs(found.offset_s)
    mark = Mark.OK if size <= TELL_S else Mark.WARNING if size <= CLOCK_PROBLEM_S else Mark.PROBLEM
    words = (f"{interval(found.offset_s)} {'ahead of' if found.offset_s >= 0 else 'behind'} ours, within "
             f"{interval(found.uncertainty_s)} ({found.reads} reads)")
    told.add(where, "clock", mark, words, "" if mark is Mark.OK else
             "let both machines follow one time server (NTP): events carry the server's time, and certificates are "
             "judged by ours")
    told.ok(where, "round trip", f"one read: median {interval(found.median_round_trip_s)}, shortest "
             f"{interval(found.round_trip_s)}, longest {interval(found.longest_round_trip_s)}")


async def _state(told: Examined, session: Session) -> None:
    where = name_of(session)
    status, level = [_value(one) for one in await read_attributes(
        session, [(wire.node_id(number), ua.AttributeIds.Value) for number in (_STATUS, _SERVICE_LEVEL)])]
    build = getattr(status, "BuildInfo", None)
    if status is not None and build is not None:
        state = ua.ServerState(status.State).name
        since = status.StartTime
        told.facts["server"] = {"product": build.ProductName, "version": build.SoftwareVersion,
                                "manufacturer": build.ManufacturerName, "state": state,
                                "started": since.isoformat() if hasattr(since, "isoformat") else None}
        parts = (build.ManufacturerName, build.ProductName, build.SoftwareVersion)
        product = " ".join(str(part) for part in parts if part) or "no product name"
        told.add(where, "state", Mark.OK if state == "Running" else Mark.PROBLEM, f"{state}; {product}",
                 "" if state == "Running" else "see at the server why it does not run")
    if isinstance(level, int):
        told.facts["service_level"] = level
        if level < HEALTHY_SERVICE_LEVEL:
            told.warning(where, "service level", f"{level} of 255: a standby, or degraded",
                     "name the active server of the redundant pair, or see at the server what is wrong")


def _value(one: Any) -> Any:
    good = one.StatusCode is None or one.StatusCode.is_good()
    return one.Value.Value if good and one.Value is not None else None


# --- what the server can do ---


async def _capabilities(told: Examined, session: Session, groups: Sequence[GroupConfig]) -> None:
    numbers = _CAPABILITIES | _LIMITS | {"MinSupportedSampleRate": _MIN_SAMPLE}
    values = [_value(one) for one in await read_attributes(
        session, [(wire.node_id(number), ua.AttributeIds.Value) for number in numbers.values()])]
    found = {name: float(value) if isinstance(value, float) else int(value)
             for name, value in zip(numbers, values, strict=True) if isinstance(value, int | float) and value > 0}
    told.facts["limits"] = {name: found[name] for name in _LIMITS if name in found}
    told.facts["capabilities"] = {name: found[name] for name in (*_CAPABILITIES, "MinSupportedSampleRate")
                                  if name in found}
    where = name_of(session)
    stated = ", ".join(f"{name} {value:g}" for name, value in found.items()) or "none stated"
    told.ok(where, "limits", f"{stated}; calls are split to them")
    _fits(told, where, found, session.config.name, groups)


def _fits(told: Examined, where: str, found: Mapping[str, float], server: str, groups: Sequence[GroupConfig]) -> None:
    """Hold what the groups ask for against what the server can do."""
    tags = {group.name: sum((tag.server or group.server) == server for tag in group.tags) for group in groups}
    for name, wanted in (("MaxMonitoredItems", sum(tags.values())),
                         ("MaxMonitoredItemsPerSubscription", max(tags.values(), default=0)),
                         ("MaxSubscriptionsPerSession", len(tags)), ("MaxSubscriptions", len(tags))):
        if name in found and wanted > found[name]:
            told.problem(where, name, f"{found[name]:g}, the configuration needs {wanted}",
                     "raise it at the server, or leave tags out")
    floor_ms = found.get("MinSupportedSampleRate", 0.0)
    for group in groups:
        asked_ms = group.sampling_ns / 1e6
        if group.poll_ns is None and 0 < asked_ms < floor_ms:
            told.warning(where, "MinSupportedSampleRate", f"{floor_ms:g} ms, group {group.name} asks for "
                         f"{asked_ms:g} ms", f"set 'sampling: {math.ceil(floor_ms)} ms' and a period of twice that, "
                         "or lower it at the server")


def interval(seconds: float) -> str:
    """Return a duration as a person reads it: three digits and a unit, without its sign."""
    size = abs(seconds)
    for unit, width in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if size >= width:
            return f"{size / width:.3g} {unit}"
    return f"{size * 1e6:.3g} us"
