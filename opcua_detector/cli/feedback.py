"""The command `feedback`: what operators and engineers say of alerts, and what became of it."""

from __future__ import annotations

import getpass
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import config as configuration
from ..app import model_path
from ..config import Config
from ..errors import ConfigError, StoreError
from ..feedback import LABELS, journal, undo
from ..feedback.desk import ANSWERED, CONFIRM, EXPIRED, FORECAST, UNDO, Answer, Desk
from ..model import load as load_model
from ..store import FeedbackEntry, Store
from .terminal import AsJson, ConfigFile, clock, err, interval_ns, out, print_json, show, table

POLL_S = 0.2
REFUSED = 1  # exit code

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    help="Tell the detector what an alert was, and review what it made of that.",
    epilog="""\b
A false alarm is taken in at once, so that the same situation alarms no more. It is provisional: it reverts by
itself (after 7 days; `feedback: {expires: 14 d}` of the monitor) unless an engineer confirms it. Every step is in
the audit of the store.

\b
  opcua-detector feedback add plant.yaml --monitor pump --event 12 --label "false alarm"
  opcua-detector feedback add plant.yaml --monitor pump --label missed \\
      --interval 2026-03-01T06:00:00Z/2026-03-01T06:02:00Z
  opcua-detector feedback list plant.yaml
  opcua-detector feedback forecast plant.yaml --monitor pump --id 1a2b3c4d
  opcua-detector feedback confirm plant.yaml --monitor pump --id 1a2b3c4d
  opcua-detector feedback undo plant.yaml --monitor pump --id 1a2b3c4d

The commands work while `run` is live (it answers within seconds, and swaps the model in without losing a row) and
while it is not (they change the model file themselves).

\b
Exit code 0: it was taken, noted, is known already (nothing to change), or waits in the store for `run` to answer.
Exit code 1: it was refused; stderr says why and what to do. 2: wrong usage.
""",
)

Monitor = Annotated[str | None, typer.Option("--monitor", metavar="NAME", help=(
    "The monitor; may be left out where the config has one only."))]
DeltaId = Annotated[str, typer.Option("--id", metavar="ID", help=(
    "The adaptation, as `feedback list` shows it; its first characters are enough."))]
Who = Annotated[str | None, typer.Option("--who", metavar="NAME", help=(
    "Who says so, for the journal; default: the user of this session."))]
Wait = Annotated[float, typer.Option("--wait", metavar="SECONDS", min=0.0, help=(
    "How long to wait for the running service to answer."))]
PENDING = "nobody has answered yet: start `run`, or give any feedback while it is not running"


@app.command(short_help="Say what an alert or an interval was.")
def add(
    config_file: ConfigFile,
    label: Annotated[str, typer.Option("--label", help="false alarm, true, unsure, or missed.")],
    monitor: Monitor = None,
    event: Annotated[int | None, typer.Option("--event", metavar="NUMBER", min=1, help=(
        "Number of the alert; default: the last one."))] = None,
    interval: Annotated[str | None, typer.Option("--interval", metavar="FROM/TO", help=(
        "A time instead of an alert (ISO 8601, UTC)."))] = None,
    comment: Annotated[str, typer.Option("--comment", help="A remark for the journal.")] = "",
    for_good: Annotated[bool, typer.Option("--for-good", help=(
        "Confirm it at once: it does not expire (for engineers)."))] = False,
    who: Who = None,
    wait: Wait = 30.0,
    as_json: AsJson = False,
) -> None:
    """Say what an alert or an interval was: a false alarm, true, unsure, or missed (it should have alarmed).

    A false alarm is refused (exit code 1), with the reason and the next step on stderr, where it goes beyond EURange,
    a protected range or too far beyond what was learnt, or where a tag keeps trending. A missed alert lowers the limit
    that came closest, as far as the alarm budget allows; where it cannot it is noted. What changes nothing because it
    is known already ends with 0.
    """
    if label not in LABELS:
        raise ConfigError("wrong value", key="--label", value=label, expected=", ".join(LABELS),
                          next_step="correct the option")
    if event is not None and interval is not None:
        raise ConfigError("give either --event or --interval", next_step="drop one of the two")
    if label == "missed" and interval is None:
        raise ConfigError("a missed alert has no number", key="--interval", expected="FROM/TO",
                          next_step="give the time in which it should have alarmed")
    config = configuration.load(config_file)
    start, end = (None, None) if interval is None else interval_ns(interval, key="--interval")
    name = _monitor(config, monitor)
    entry = FeedbackEntry(_who(who), label, name, event, start, end, comment=comment, at_ns=time.time_ns())
    facts = _ask(config, config_file, entry, wait)
    if for_good and facts.get("delta"):
        facts |= {"confirmed": _ask(config, config_file, FeedbackEntry(
            _who(who), CONFIRM, name, comment=str(facts["delta"]), at_ns=time.time_ns()), wait)}
    _show(facts, as_json)


@app.command(short_help="Keep a provisional adaptation for good.")
def confirm(config_file: ConfigFile, delta: DeltaId, monitor: Monitor = None, who: Who = None, wait: Wait = 30.0,
            as_json: AsJson = False) -> None:
    """Keep a provisional adaptation for good: it does not expire any more (and can still be undone)."""
    _review(CONFIRM, config_file, delta, monitor, who, wait, as_json)


@app.command("undo", short_help="Take an adaptation back.")
def take_back(config_file: ConfigFile, delta: DeltaId, monitor: Monitor = None, who: Who = None, wait: Wait = 30.0,
              as_json: AsJson = False) -> None:
    """Take an adaptation back, the newest or an older one: the model is the same, to the bit, as without it."""
    _review(UNDO, config_file, delta, monitor, who, wait, as_json)


def _review(label: str, config_file: Path, delta: str, monitor: str | None, who: str | None, wait: float,
            as_json: bool) -> None:
    config = configuration.load(config_file)
    entry = FeedbackEntry(_who(who), label, _monitor(config, monitor), comment=delta, at_ns=time.time_ns())
    _show(_ask(config, config_file, entry, wait), as_json)


@app.command("list", short_help="List adaptations and what was said.")
def listed(config_file: ConfigFile, monitor: Monitor = None, as_json: AsJson = False) -> None:
    """List the adaptations in the model files, and everything that was said with what became of it."""
    config = configuration.load(config_file)
    names = [_monitor(config, monitor)] if monitor else [m.name for m in config.monitors]
    deltas = []
    for name in names:
        path = model_path(config_file, config.monitor(name))
        if path.exists():
            deltas += [{"monitor": name, **d} for d in journal(load_model(path))]
    said: list[dict[str, Any]] = []
    if config.store.path.exists():
        with Store.open(config.store.path, readonly=True) as store:
            answers = {e.detail.get("feedback"): e.detail for e in store.audit(ANSWERED)}
            for item in store.feedback():
                if item.monitor in names:
                    answer = answers.get(item.id, {})
                    said.append({**asdict(item), "action": answer.get("action", "pending"),
                                 "text": answer.get("text", PENDING)})
            expired = [e for e in store.audit(EXPIRED) if e.detail.get("monitor") in names]
        said += [{"id": None, "at_ns": e.at_ns, "who": e.who, "label": "expired", "monitor": e.detail["monitor"],
                  "action": "expired", "text": e.detail["text"]} for e in expired]
    if as_json:
        print_json({"adaptations": deltas, "said": said})
        return
    show(table("in force", ["monitor", "id", "state", "given", "by", "what"], [
        [d["monitor"], d["id"], _state(d), clock(d["at_ns"]) if "at_ns" in d else "", d.get("who", ""), d["text"]]
        for d in deltas]))
    out.print()
    show(table("said", ["when", "by", "monitor", "said", "what became of it"], [
        [clock(s["at_ns"]), s["who"], s["monitor"], s["label"], s["text"]]
        for s in sorted(said, key=lambda s: int(s["at_ns"]))]))


def _state(delta: Mapping[str, Any]) -> str:
    if "expires_ns" in delta:
        return f"{delta['state']}, expires {clock(delta['expires_ns'])[:10]}"
    return f"{delta['state']}, {delta['count']} together" if "count" in delta else str(delta["state"])


@app.command("forecast", short_help="Alerts per day without and with an adaptation.")
def forecast_(config_file: ConfigFile, delta: DeltaId, monitor: Monitor = None, as_json: AsJson = False) -> None:
    """Replay the stored rows without and with an adaptation and tell the alerts per day; changes nothing."""
    config = configuration.load(config_file)
    name = _monitor(config, monitor)
    model = load_model(model_path(config_file, config.monitor(name)))
    with Store.open(config.store.path, readonly=True) as store:
        told = Desk(config, config_file, store).compare(name, undo(model, delta), model)
    before, after = told.per_day if told.days else (None, None)
    if as_json:
        print_json({"monitor": name, "id": delta, "alerts_per_day_before": before, "alerts_per_day_after": after,
                    "alerts_before": told.before, "alerts_after": told.after, "days": told.days})
    else:
        out.print(f"{name}: {told}", markup=False)


# --- how an entry gets its answer ---


def _ask(config: Config, config_file: Path, entry: FeedbackEntry, wait: float) -> dict[str, Any]:
    """Give an entry to whoever holds the store, a running service or this command, and return the answer as facts."""
    config.monitor(entry.monitor)
    try:
        store = Store.open(config.store.path)
    except StoreError as error:
        if "another process" not in error.what:
            raise
        return _ask_service(config, entry, wait)
    with store:
        desk = Desk(config, config_file, store)
        answered: Answer | None = None
        number = store.record_feedback(entry)
        desk.expire(time.time_ns())
        for one in desk.pending():  # older ones too, in their order
            answer = desk.answer(one)
            told = desk.forecast(answer) if answer.model is not None else ""
            if one.id == number:
                answered, forecast = answer, told
        assert answered is not None
        return {"feedback": number, "monitor": entry.monitor, "action": answered.action, "text": answered.text,
                "delta": answered.delta_id, "forecast": forecast}


def _ask_service(config: Config, entry: FeedbackEntry, wait: float) -> dict[str, Any]:
    with Store.open(config.store.path, beside=True) as store:
        number = store.record_feedback(entry)
        end = time.monotonic() + wait
        answer: dict[str, Any] | None = None
        while True:
            if answer is None:
                answer = next((dict(e.detail) for e in store.audit(ANSWERED, 50) if e.detail.get("feedback") == number),
                              None)
            if answer is not None:
                forecast = next((e.detail["text"] for e in store.audit(FORECAST, 50)
                                 if e.detail.get("feedback") == number), "")
                changed = answer["model_before"] != answer["model_after"]
                if forecast or not changed or time.monotonic() > end:
                    return {**answer, "forecast": forecast}
            if time.monotonic() > end:
                break
            time.sleep(POLL_S)
    return {"feedback": number, "monitor": entry.monitor, "action": "pending", "delta": "", "forecast": "",
            "text": "kept in the store; the running service has not answered yet, see `opcua-detector feedback list`"}


def _show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Show the answer; leave with 1 where what was asked for was refused.

    Raises
    ------
    typer.Exit
        It was refused; the reason with the next step is on stderr.
    """
    refused = [one["text"] for one in (facts, facts.get("confirmed", {})) if one.get("action") == "refused"]
    if as_json:
        print_json(facts)
    else:
        if facts["action"] != "refused":
            out.print(facts["text"], markup=False)
        if facts.get("forecast"):
            out.print(str(facts["forecast"]), markup=False)
        if "confirmed" in facts and facts["confirmed"]["action"] != "refused":
            out.print(facts["confirmed"]["text"], markup=False)
        if facts["action"] == "pending":
            err.print("the store is held by another process", style="yellow")
    for text in refused:
        err.print(text, markup=False, style="red", soft_wrap=True)
    if refused:
        raise typer.Exit(REFUSED)


def _monitor(config: Config, given: str | None) -> str:
    if given is not None:
        return config.monitor(given).name
    if len(config.monitors) != 1:
        raise ConfigError("which monitor is meant?", key="--monitor",
                          expected="one of " + (", ".join(m.name for m in config.monitors) or "(none configured)"),
                          next_step="give --monitor NAME")
    return config.monitors[0].name


def _who(given: str | None) -> str:
    if given:
        return given
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name: containers
        return "unknown"
