"""What the service tells of itself: metrics, health, readiness, watchdog and log, most of it beside a real service."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as classic
from running import cli, content, until, wait_for, write

from opcua_detector import __version__
from opcua_detector.client import ClockOffset, LinkState, Session, measure_clock
from opcua_detector.config import ServerConfig, load, parse
from opcua_detector.errors import ConfigError, LoginRefused, ModelError
from opcua_detector.nodes import State
from opcua_detector.service import Service
from opcua_detector.telemetry import Notifier, Pulse, Redactor, configure_logging
from opcua_detector.telemetry.endpoint import MOST_CLIENTS, MOST_REQUEST_BYTES, Answer, Endpoint
from opcua_detector.telemetry.lines import JsonLines, event_of, last_lines, log_files
from sim_server.testing import RunningPlant, running_plant

PREFIX = "opcua_detector_"
WAIT_S = 30.0


@pytest.fixture(scope="module")
def plant() -> Iterator[RunningPlant]:
    """A plant with history to learn from."""
    with running_plant("lorenz", history_rows=8000) as running:
        yield running


def configuration(endpoint: str, **more: Any) -> dict[str, Any]:
    """The Lorenz monitor, with an endpoint on a free port."""
    return content(endpoint) | {"metrics": {"listen": 0}} | more


@pytest.fixture(scope="module")
def folder(plant: RunningPlant, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a fitted model."""
    made = tmp_path_factory.mktemp("telemetry")
    ran = cli("fit", write(made, configuration(plant.endpoint)), "--json")
    assert ran.code == 0, ran.err
    return made


@asynccontextmanager
async def running(file: Path) -> AsyncIterator[Service]:
    """A started service, stopped at the end."""
    service = Service(load(file), file)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


def get(address: tuple[str, int], path: str, accept: str = "") -> tuple[int, str, bytes]:
    """Return (status, content type, body)."""
    connection = HTTPConnection(*address, timeout=WAIT_S)
    try:
        connection.request("GET", path, headers={"Accept": accept} if accept else {})
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type", ""), answer.read()
    finally:
        connection.close()


async def ask(service: Service, path: str, accept: str = "") -> tuple[int, str, bytes]:
    """Ask a running service, from another thread as Prometheus would."""
    address = service.telemetry.address
    assert address is not None
    return await asyncio.to_thread(get, address, path, accept)


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(body: bytes, parser: Callable[[str], Any] = classic) -> Samples:
    """Return (name without prefix, labels) -> value."""
    return {(one.name.removeprefix(PREFIX), tuple(sorted(one.labels.items()))): one.value
            for family in parser(body.decode()) for one in family.samples}


def labels(**given: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(given.items()))


# --- metrics ---


async def test_a_running_service_tells_its_counters_in_both_formats(plant: RunningPlant, folder: Path) -> None:
    async with running(write(folder, configuration(plant.endpoint))) as service:
        run = service.runs["lorenz"]
        await until(lambda: run.scored > 50 and service.clocks["plant"].measured and run.latency_ms > 0, "scores")
        scored, steps = run.scored, service.steps
        status, kind, body = await ask(service, "/metrics")
        assert status == 200 and kind.startswith("text/plain")
        found = samples(body)
        server, monitor = labels(server="plant"), labels(monitor="lorenz")
        stream = labels(group="lorenz", server="plant")
        assert found["info", labels(version=__version__)] == 1
        assert found["server_connected", server] == 1 and found["server_insecure", server] == 1
        assert found["server_connects_total", server] == 1 and found["server_reconnects_total", server] == 0
        assert abs(found["server_clock_offset_seconds", server]) < 1  # one machine, one clock
        assert found["subscription_values_total", stream] >= 2 * scored
        assert found["subscription_tags", stream] == 2 and found["subscription_tags_failing", stream] == 0
        assert found["subscription_tags_polled", stream] == 0
        assert 0 <= found["server_publish_requests_outstanding", server] <= 4
        assert found["group_rows_total", labels(group="lorenz")] >= scored
        fates = ("used", "late", "duplicate", "replaced", "skipped")
        taken = sum(found[f"group_samples_{fate}_total", labels(group="lorenz")] for fate in fates)
        assert 0 <= found["group_samples_delivered_total", labels(group="lorenz")] - taken < 1000  # some wait
        assert found["group_cells_masked_total", labels(group="lorenz")] >= 0
        assert found["write_values_total", server] > 0
        assert found["monitor_rows_scored_total", monitor] >= scored
        assert found["monitor_score", monitor] == pytest.approx(found["monitor_limit_ratio", monitor])
        assert found["monitor_write_latency_seconds", monitor] > 0
        states = {key[1][1][1]: value for key, value in found.items() if key[0] == "monitor_state"}
        assert sum(states.values()) == 1 and len(states) == 7
        assert found["monitor_model_info", labels(monitor="lorenz", model_id=run.monitor.model.model_id)] == 1
        assert found["scoring_seconds_count", ()] >= steps
        assert found["scoring_seconds_bucket", labels(le="+Inf")] == found["scoring_seconds_count", ()]
        assert found["scoring_seconds_sum", ()] > 0
        assert found["store_size_bytes", ()] > 0 and found["store_writable", ()] == 1
        assert found["store_rows_dropped_total", ()] == 0 and ("store_queue_length", ()) in found
        assert found["feedback_not_taken_total", ()] == 0
        if sys.platform == "linux":
            assert found["process_resident_memory_bytes", ()] > 1e7
        status, kind, body = await ask(service, "/metrics", "application/openmetrics-text; version=1.0.0")
        assert kind.startswith("application/openmetrics-text") and body.endswith(b"# EOF\n")
        assert samples(body, open_metrics)["server_connected", server] == 1


def test_names_follow_the_rules_and_every_family_has_help(plant: RunningPlant, folder: Path) -> None:
    async def scrape() -> bytes:
        async with running(write(folder, configuration(plant.endpoint))) as service:
            await until(lambda: service.runs["lorenz"].scored, "a score")
            return (await ask(service, "/metrics", "application/openmetrics-text; version=1.0.0"))[2]

    families = list(open_metrics(asyncio.run(scrape()).decode()))
    ours = [f for f in families if f.name.startswith(PREFIX.rstrip("_"))]
    assert len(ours) > 60
    for family in ours:
        assert not family.documentation.startswith("Counter "), f"{family.name} has no words in telemetry/words.py"
        assert family.documentation.rstrip().endswith((".", ")")), family.name
        assert not family.name.endswith(("_ms", "_ns", "_us", "_percent")), "base units"
        if family.type == "counter":
            assert all(one.name.endswith(("_total", "_created")) for one in family.samples)
    assert len({f.name for f in families}) == len(families)


async def test_polled_tags_the_service_level_and_a_model_that_is_not_taken_are_shown(
    plant: RunningPlant, folder: Path, tmp_path: Path,
) -> None:
    shutil.copytree(folder / "models", tmp_path / "models")
    given = configuration(plant.endpoint)
    given["groups"][0]["sampling"] = "poll"
    async with running(write(tmp_path, given)) as service:
        server, monitor = labels(server="plant"), labels(monitor="lorenz")
        stream = labels(group="lorenz", server="plant")
        session = service.sessions["plant"]
        await until(lambda: session.standing, "the server to be asked how it stands")
        found = samples((await ask(service, "/metrics"))[2])
        assert found["subscription_tags_polled", stream] == 2 and found["subscription_polls_total", stream] > 0
        assert found["server_service_level", server] == session.standing[session.endpoint].level == 255
        assert found["monitor_model_refused", monitor] == found["service_models_refused_total", ()] == 0
        (tmp_path / "models" / "lorenz.npz").write_bytes(b"no model")
        await service.reload()
        await asyncio.sleep(1.1)  # a scrape may be so old
        found = samples((await ask(service, "/metrics"))[2])
        assert found["monitor_model_refused", monitor] == found["service_models_refused_total", ()] == 1


async def test_metrics_follow_an_outage_and_count_the_reconnect(folder: Path) -> None:
    with running_plant("lorenz", history_rows=100) as own:
        async with running(write(folder, configuration(own.endpoint), "outage.yaml")) as service:
            session = service.sessions["plant"]
            await until(lambda: service.runs["lorenz"].scored, "a score")
            own.kill()
            await until(lambda: session.state is LinkState.WAITING, "the loss to be noticed")
            await asyncio.sleep(1.1)  # a scrape may be so old
            found = samples((await ask(service, "/metrics"))[2])
            assert found["server_connected", labels(server="plant")] == 0
            assert found["monitor_state", labels(monitor="lorenz", state="no data")] == 1
            status, _, body = await ask(service, "/ready")
            assert status == 503 and any("server plant: waiting" in why for why in json.loads(body)["reasons"])
            assert (await ask(service, "/health"))[0] == 200  # the process lives, and restarting it would not help
            await asyncio.to_thread(own.restart)
            await until(lambda: session.counters["reconnects"] == 1, "the connection")
            await asyncio.sleep(1.1)
            found = samples((await ask(service, "/metrics"))[2])
            assert found["server_reconnects_total", labels(server="plant")] == 1
            assert found["server_connections_lost_total", labels(server="plant")] == 1
            assert (await ask(service, "/ready"))[0] == 200


async def test_a_flood_of_scrapes_makes_the_text_once_a_second(plant: RunningPlant, folder: Path) -> None:
    async with running(write(folder, configuration(plant.endpoint))) as service:
        bodies = {(await ask(service, "/metrics"))[2] for _ in range(5)}
        assert len(bodies) <= 2


# --- health ---


async def test_ready_waits_for_the_first_score_and_health_tells_a_blocked_loop(
    plant: RunningPlant, folder: Path,
) -> None:
    given = configuration(plant.endpoint, metrics={"listen": 0, "stalled_after": "1 s"})
    service = Service(load(file := write(folder, given, "stalled.yaml")), file)
    service.telemetry.start()
    status, kind, body = await ask(service, "/ready")
    told = json.loads(body)
    assert status == 503 and kind == "application/json" and not told["ok"]
    assert told["reasons"] == ["start: not done yet", "monitor lorenz: its model is not loaded yet"]
    service.telemetry.stop()
    await service.start()
    try:
        await until(lambda: service.runs["lorenz"].scored, "a score")
        status, _, body = await ask(service, "/ready")
        told = json.loads(body)
        assert status == 200 and told["ok"] and told["reasons"] == []
        assert {one["check"] for one in told["checks"]} == {"start", "server plant", "monitor lorenz"}
        address = service.telemetry.address
        assert address is not None
        answers: list[tuple[int, str, bytes]] = []
        asking = asyncio.create_task(asyncio.to_thread(_ask_until_stalled, address, answers))
        await asyncio.sleep(0.3)
        time.sleep(2.5)  # the loop does not turn; the endpoint's own thread does
        await asking
        status, _, body = answers[-1]
        assert status == 503 and "has not turned" in json.loads(body)["reasons"][0]
        await until(lambda: service.telemetry.pulse.age_s < 1, "a turn")
        assert (await ask(service, "/health"))[0] == 200
    finally:
        await service.stop()
    with pytest.raises(OSError):
        get(address, "/health")


def _ask_until_stalled(address: tuple[str, int], answers: list[tuple[int, str, bytes]]) -> None:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end and (not answers or answers[-1][0] == 200):
        answers.append(get(address, "/health"))
        time.sleep(0.05)


async def test_nothing_listens_unless_it_is_configured(plant: RunningPlant, folder: Path) -> None:
    given = configuration(plant.endpoint)
    del given["metrics"]
    async with running(write(folder, given, "silent.yaml")) as service:
        assert service.telemetry.address is None


def test_a_port_in_use_is_told_before_anything_connects(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        given = configuration("opc.tcp://127.0.0.1:1/", metrics={"listen": port})
        file = write(folder, given, "taken.yaml")
        ran = cli("run", file, "--json")
        assert ran.code == 2 and f"127.0.0.1:{port}" in ran.err and "choose another address or port" in ran.err
        assert ran.json["error"]["where"] == "metrics.listen"


# --- the endpoint alone ---


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """An endpoint with one path, and little patience."""
    def breaks(_: object) -> Answer:
        raise RuntimeError("no")

    one = Endpoint("127.0.0.1", 0, {"/x": lambda headers: Answer(headers.get("accept", "").encode()),
                                    "/big": lambda _: Answer(b"b" * 50_000_000), "/breaks": breaks},
                   request_s=0.5, answer_s=0.5)
    one.start()
    yield one
    one.stop()


def say(address: tuple[str, int], request: bytes) -> bytes:
    """Send bytes as they are, and return all that comes back."""
    with socket.create_connection(address, WAIT_S) as one:
        one.sendall(request)
        return b"".join(iter(lambda: one.recv(65536), b""))


def served(address: tuple[str, int]) -> bytes:
    """Ask once; return the status, empty where the connection was cut."""
    try:
        return say(address, b"GET /x HTTP/1.1\r\n\r\n")[9:12]
    except ConnectionResetError:
        return b""


@pytest.mark.parametrize(("request_", "status", "part"), [
    (b"GET /x HTTP/1.1\r\nAccept: a/b\r\n\r\n", 200, b"a/b"),
    (b"GET /x?y=1 HTTP/1.1\r\n\r\n", 200, b""),
    (b"GET / HTTP/1.1\r\n\r\n", 404, b"/x, /big"),
    (b"POST /x HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405, b"Allow: GET, HEAD"),
    (b"GET /x\r\n\r\n", 400, b"no HTTP/1"),
    (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400, b"no HTTP/1"),
    (b"GET /breaks HTTP/1.1\r\n\r\n", 500, b"the log says why"),
    (b"GET /x HTTP/1.1\r\nA: " + b"a" * (4 * MOST_REQUEST_BYTES) + b"\r\n\r\n", 431, b"too long"),
    (b"GET /x HT", 408, b"in time"),
], ids=lambda value: value[:20].decode("latin-1") if isinstance(value, bytes) else None)
def test_odd_requests_get_their_answer(endpoint: Endpoint, request_: bytes, status: int, part: bytes) -> None:
    try:
        answer = say(endpoint.address, request_)
    except ConnectionResetError:  # it was still sending when the answer was given
        assert status == 431
        return
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()) and part in answer


def test_head_gives_no_body(endpoint: Endpoint) -> None:
    answer = say(endpoint.address, b"HEAD /big HTTP/1.1\r\n\r\n")
    assert b"Content-Length: 50000000" in answer and answer.endswith(b"\r\n\r\n")


def test_slow_and_many_clients_hold_nobody_up(endpoint: Endpoint) -> None:
    slow = [socket.create_connection(endpoint.address, WAIT_S) for _ in range(MOST_CLIENTS - 1)]
    greedy = socket.create_connection(endpoint.address, WAIT_S)
    greedy.sendall(b"GET /big HTTP/1.1\r\n\r\n")  # and never takes the answer
    try:
        assert served(endpoint.address) in (b"200", b"503", b"")  # whoever comes too many is sent away at once
        wait_for(lambda: served(endpoint.address) == b"200", "room again")
        for one in slow:  # each was sent away for saying nothing
            assert one.recv(100).startswith(b"HTTP/1.1 408")
    finally:
        for one in (*slow, greedy):
            one.close()


def test_an_address_of_no_machine_is_refused_with_the_next_step() -> None:
    with pytest.raises(ConfigError, match=r"(?s)metrics\.listen.*choose another address or port") as caught:
        Endpoint("192.0.2.1", 9464, {}).start()
    assert caught.value.key == "metrics.listen"


# --- systemd ---


class Manager:
    """Listens as systemd does."""

    def __init__(self, folder: Path, watchdog_us: int = 0) -> None:
        self.path = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.setblocking(False)
        self.environment = {"NOTIFY_SOCKET": str(self.path)}
        if watchdog_us:
            self.environment["WATCHDOG_USEC"] = str(watchdog_us)

    def heard(self) -> list[str]:
        """Return what came since the last call, one text per message."""
        found = []
        while True:
            try:
                found.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return found

    def close(self) -> None:
        self._socket.close()


needs_unix = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="systemd is on Linux alone")


@needs_unix
async def test_systemd_hears_ready_the_watchdog_only_while_the_loop_turns_and_stopping(
    plant: RunningPlant, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager = Manager(tmp_path, watchdog_us=400_000)
    for name, value in manager.environment.items():
        monkeypatch.setenv(name, value)
    file = write(folder, configuration(plant.endpoint), "watched.yaml")
    service = Service(load(file), file)
    await service.start()
    heard = manager.heard()
    assert "STATUS=starting" in heard and any(one.startswith("READY=1\nSTATUS=running lorenz") for one in heard)
    await until(lambda: manager.heard().count("WATCHDOG=1") >= 1, "the watchdog")
    time.sleep(1.0)  # the loop is blocked: nobody may tell systemd that all is well
    assert manager.heard().count("WATCHDOG=1") <= 1
    await until(lambda: manager.heard().count("WATCHDOG=1") >= 1, "the watchdog again")
    assert service.telemetry.pulse.longest_delay_s > 0.5
    await service.stop()
    assert any(one.startswith("STOPPING=1") for one in manager.heard())
    await asyncio.sleep(0.3)
    assert manager.heard() == []
    manager.close()


@needs_unix
def test_a_manager_that_is_gone_or_means_another_process_costs_nothing(tmp_path: Path) -> None:
    manager = Manager(tmp_path, watchdog_us=1_000_000)
    assert Notifier(manager.environment | {"WATCHDOG_PID": "1"}).watchdog_s is None
    notifier = Notifier(manager.environment)
    assert notifier.watchdog_s == 1.0
    notifier.tell(STATUS="two\nlines\nREADY=1")
    assert manager.heard() == ["STATUS=two lines READY=1"]  # a text cannot smuggle in another message
    manager.close()
    manager.path.unlink()
    notifier.tell(READY="1")
    assert notifier.failed == 1
    assert not Notifier({}).active and not Notifier({"NOTIFY_SOCKET": "relative"}).active


async def test_the_age_of_the_pulse_grows_when_the_loop_is_blocked() -> None:
    pulse = Pulse()
    pulse.start()
    await until(lambda: pulse.turns >= 2, "two turns")
    time.sleep(0.7)
    assert pulse.age_s >= 0.7
    await until(lambda: pulse.age_s < 0.5 and pulse.longest_delay_s > 0.1, "the next turn")
    pulse.stop()
    turns = pulse.turns
    await asyncio.sleep(0.7)
    assert pulse.turns == turns


# --- the clock ---


async def test_the_offset_of_a_clock_is_found_within_half_of_the_round_trip(plant: RunningPlant) -> None:
    session = Session(ServerConfig(name="plant", endpoint=plant.endpoint, policy="None", insecure=True))
    await session.open()
    try:
        here = await measure_clock(session)
        assert isinstance(here, ClockOffset)
        assert abs(here.offset_s) <= here.uncertainty_s + 0.02  # whose stamps have their own grain
        ahead = await measure_clock(session, utc_ns=lambda: time.time_ns() - 3_600_000_000_000)
        assert ahead is not None and ahead.offset_s == pytest.approx(3600, abs=0.1)
        assert ahead.round_trip_s <= ahead.median_round_trip_s <= ahead.longest_round_trip_s and ahead.reads == 9
    finally:
        await session.close()


# --- the log ---

SECRET = "correct-horse-battery"
_WITH_USER = """\
version: 1
servers:
  - {name: plant, endpoint: "opc.tcp://plc-7.example:4840/", user: miller, password_env: TELEMETRY_TEST_PASSWORD,
     insecure: true}
groups: [{name: g, server: plant, period: 1 s, tags: [{name: t, node: "i=2258"}]}]
"""


@pytest.fixture
def root_log() -> Iterator[None]:
    """Gives the root logger back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    root.setLevel(level)


def test_json_lines_name_event_server_and_monitor_and_never_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root_log: None,
) -> None:
    monkeypatch.setenv("TELEMETRY_TEST_PASSWORD", SECRET)
    redactor = Redactor.of(parse(_WITH_USER))
    file = tmp_path / "logs" / "detector.log"
    configure_logging(form="json", level="info", redactor=redactor, file=file, stream=sys.stderr)
    log = logging.getLogger("opcua_detector.test")
    log.warning("monitor %s: alert %d raised", "pump", 7)
    log.warning("%s: connection lost: %s", "server plant at opc.tcp://plc-7.example:4840/ (policy None)", "two\nlines")
    log.info("group %s: a row could not be worked on", "fast")
    log.error("a log-in was refused: %s at %s", SECRET, f"opc.tcp://miller:{SECRET}@plc-7.example/")
    try:
        raise ValueError(SECRET)
    except ValueError:
        log.exception("it broke", extra={"monitor": "pump"})
    log.debug("never")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line["event"] for line in lines] == [
        "alert raised", "connection lost", "a row could not be worked on", "a log-in was refused: at",
        "it broke"]
    assert lines[0]["monitor"] == "pump" and lines[0]["message"] == "monitor pump: alert 7 raised"
    assert lines[0]["level"] == "warning" and lines[0]["ts"].endswith("Z")
    assert lines[1]["server"] == "plant" and lines[1]["message"].endswith("two\nlines")
    assert lines[2]["group"] == "fast"
    assert lines[4]["monitor"] == "pump" and "ValueError: ***" in lines[4]["exception"]
    assert SECRET not in file.read_text(encoding="utf-8")


def test_a_text_log_in_a_file_is_rotated_and_its_end_can_be_read(tmp_path: Path, root_log: None) -> None:
    file = tmp_path / "detector.log"
    configure_logging(form="text", level="info", redactor=Redactor(), file=file, file_bytes=2000,
                      text_handler=logging.NullHandler())
    for i in range(200):
        logging.getLogger("opcua_detector.test").info("line %d of many", i)
    assert len(log_files(file)) == 5 and all(one.stat().st_size <= 2000 for one in log_files(file))
    assert last_lines(file).rstrip().endswith("line 199 of many")
    assert last_lines(file, 100).startswith("20")  # a whole line
    with pytest.raises(ConfigError, match=r"log\.file"):
        configure_logging(form="text", level="info", redactor=Redactor(), file=tmp_path / "detector.log" / "x")


@pytest.mark.parametrize(("template", "event"), [
    ("monitor %s: alert %d raised", "alert raised"),
    ("%s: connection lost: %s", "connection lost"),
    ("store %s is written again after %d failed attempts since the start",
     "store is written again after failed attempts since the start"),
    ("%s: tag %s (%s) delivers nothing: %s", "tag delivers nothing"),
])
def test_an_event_has_the_same_words_whatever_the_figures(template: str, event: str) -> None:
    assert event_of(template) == event


def test_a_redactor_finds_secrets_by_key_by_value_and_by_shape() -> None:
    redactor = Redactor([SECRET], names=["miller"], hosts=["plc-7.example"])
    clean = redactor.content({
        "servers": [{"endpoint": "opc.tcp://plc-7.example:4840/", "user": "miller", "password": "abc",
                     "password_env": "PLANT_PASSWORD", "note": f"say {SECRET}x to miller, not to millers"}],
        "api_key": 5, "pem": "-----BEGIN PRIVATE KEY-----\nAAA\n-----END PRIVATE KEY-----"})
    (server,) = clean["servers"]
    assert server["password"] == clean["api_key"] == clean["pem"] == "***"
    assert server["password_env"] == "PLANT_PASSWORD"  # a name is no secret, and helps
    assert server["user"].startswith("user-") and "plc-7" not in server["endpoint"]
    assert server["note"] == f"say ***x to {server['user']}, not to millers"
    assert redactor.text("opc.tcp://a:b@h/ password: 'x y', token=abc") == "opc.tcp://***@h/ password: ***, token=***"
    assert Redactor(["abc"]).text("abc") == "abc"  # too short to be told from ordinary text


def test_json_lines_without_a_configuration_still_take_out_what_looks_like_a_secret() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "password=%s", ("hunter2",), None)
    assert json.loads(JsonLines().format(record))["message"] == "password=***"


async def test_a_stopped_service_is_as_live_states_say(plant: RunningPlant, folder: Path) -> None:
    async with running(write(folder, configuration(plant.endpoint))) as service:
        await until(lambda: service.runs["lorenz"].state == State.NORMAL, "normal")
        found = samples((await ask(service, "/metrics"))[2])
        assert found["monitor_alert", labels(monitor="lorenz")] == 0
        url = "http://{}:{}/metrics".format(*(service.telemetry.address or ()))
        with await asyncio.to_thread(urllib.request.urlopen, url) as answer:  # a client of another make
            assert answer.status == 200


def test_run_tells_everything_as_json_lines_where_that_is_configured(
    plant: RunningPlant, folder: Path, root_log: None,
) -> None:
    given = configuration(plant.endpoint, log={"format": "json", "level": "info"})
    ran = cli("run", write(folder, given, "json.yaml"), "--seconds", "2")
    assert ran.code == 0, ran.err
    lines = [json.loads(line) for line in ran.err.splitlines()]
    told = {line["event"] for line in lines}
    assert {"run", "metrics and health are served at"} <= told and "" not in told
    assert any("INSECURE" in line["message"] and line["server"] == "plant" for line in lines)
    assert all(line["ts"] and line["level"] in ("info", "warning") for line in lines)


# --- the samples for service managers ---

UNIT = Path(__file__).resolve().parent.parent / "configs" / "service" / "opcua-detector.service"


def test_the_unit_asks_for_what_the_service_tells_and_keeps_it_in_its_place(tmp_path: Path) -> None:
    lines = [line for line in UNIT.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    given = dict(line.split("=", 1) for line in lines if "=" in line)
    assert given["Type"] == "notify" and float(given["WatchdogSec"]) >= 10
    assert given["NoNewPrivileges"] == "yes" and given["ProtectSystem"] == "strict"
    assert given["CapabilityBoundingSet"] == ""
    assert given["User"] not in ("root", "0")
    assert "MemoryDenyWriteExecute" not in given  # the kernels are compiled in the process
    # Exit codes of the product that a new start does not mend.
    assert given["RestartPreventExitStatus"].split() == [
        str(kind.exit_code) for kind in (ConfigError, ModelError, LoginRefused)]
    analyze = shutil.which("systemd-analyze")
    if analyze is not None:  # where systemd is, it judges the unit itself
        unit = tmp_path / UNIT.name
        text = UNIT.read_text(encoding="utf-8")
        unit.write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", text), encoding="utf-8")
        judged = subprocess.run([analyze, "verify", unit], capture_output=True, text=True)
        assert judged.returncode == 0 and not judged.stderr.strip(), judged.stderr
