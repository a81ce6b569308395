"""The real server, seen by a real client: history, live rows, faults, quirks, rights and restarts."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asyncua import Client, Node, ua
from asyncua.crypto.cert_gen import setup_self_signed_certificate
from asyncua.crypto.security_policies import SecurityPolicyBasic256Sha256
from cryptography.x509.oid import ExtendedKeyUsageOID

from sim_server.cli import main
from sim_server.errors import StartError
from sim_server.plant import Plant
from sim_server.processes import make
from sim_server.testing import RunningPlant, running_plant
from sim_server.ua_types import to_datetime, to_ns

PLANT_URI = "urn:opcua-detector:simulated-plant"
RESULTS_URI = "urn:opcua-detector:results"
SMALL = Path(__file__).with_name("small.NodeSet2.xml")
TIMEOUT_S = 20.0
HISTORY_ROWS = 7_000
WARMUP_ROWS = 2_000
SEED = 5


@pytest.fixture(scope="module")
def lorenz() -> Iterator[RunningPlant]:
    with running_plant(
        "lorenz",
        seed=SEED,
        noise=0.01,
        history_rows=HISTORY_ROWS,
        nodeset=SMALL,
        user=["me:secret"],
        config={"history_page_rows": 1500},
    ) as plant:
        yield plant


@pytest.fixture(scope="module")
def closed() -> Iterator[RunningPlant]:
    """A plant as an old installation would run it: named users only, strange stamps, strict writes."""
    config = {
        "anonymous": False,
        "users": [{"name": "me", "password": "secret"}],
        "refuse_write_timestamps": True,
        "nodesets": [str(SMALL)],
        "history_rows": 500,
        "quirks": [
            {"tag": "theta", "quirk": "skew_ms", "value": 40},
            {"tag": "u", "quirk": "null_source", "value": 1},
            {"tag": "total", "quirk": "rate_ms", "value": 1000},
        ],
        "faults": [{"parameter": "Kb", "factor": 1.3, "from": 2, "to": 4}],
        "speed": 4.0,
    }
    with running_plant("throttle", config=config) as plant:
        yield plant


@asynccontextmanager
async def connected(
    plant: RunningPlant, user: str | None = None, password: str = ""
) -> AsyncIterator[Client]:
    client = Client(plant.endpoint, timeout=TIMEOUT_S)
    if user is not None:
        client.set_user(user)
        client.set_password(password)
    async with client:
        yield client


class Changes:
    """Collects notifications; `get` waits for the next one."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[str, ua.DataValue]] = asyncio.Queue()

    def datachange_notification(self, node: Node, value: Any, event: Any) -> None:
        self.queue.put_nowait((node.nodeid.Identifier, event.monitored_item.Value))

    async def get(self) -> tuple[str, ua.DataValue]:
        return await asyncio.wait_for(self.queue.get(), TIMEOUT_S)

    async def until(self, condition: Any) -> ua.DataValue:
        while True:
            _, value = await self.get()
            if condition(value):
                return value


@asynccontextmanager
async def watching(client: Client, *names: str) -> AsyncIterator[Changes]:
    changes = Changes()
    subscription = await client.create_subscription(20, changes)
    await subscription.subscribe_data_change([tag(client, name) for name in names], queuesize=5000)
    yield changes
    await subscription.delete()


def tag(client: Client, name: str) -> Node:
    return client.get_node(f"ns=2;s={name}")


async def counters(client: Client, process: str) -> dict[str, float]:
    names = ("RowsPublished", "SamplesPublished", "SamplesDropped", "LateRows", "MaxLagMs")
    nodes = [tag(client, f"{process}.diagnostics.{name}") for name in names]
    return dict(zip(names, await client.read_values(nodes), strict=True))


# -- address space ---------------------------------------------------------------------------------


async def test_names_and_types_are_as_promised(lorenz: RunningPlant) -> None:
    assert lorenz.process == "lorenz"
    assert lorenz.ready["namespace"] == PLANT_URI
    assert lorenz.endpoint.startswith("opc.tcp://127.0.0.1:")
    async with connected(lorenz) as client:
        assert (await client.get_namespace_array())[2:] == [PLANT_URI, RESULTS_URI]
        for name in ("x1", "x3", "setpoint", "total", "clock", "constant", "duplicate"):
            node = await client.nodes.root.get_child(f"/0:Objects/2:Plant/2:lorenz/2:{name}")
            assert node == tag(client, f"lorenz.{name}")
            assert await node.read_type_definition() == ua.NodeId(ua.ObjectIds.AnalogItemType)
            assert await node.read_data_type() == ua.NodeId(ua.ObjectIds.Double)
            euro = await (await node.get_child("0:EURange")).read_value()
            assert euro.Low < euro.High
        unit = await (await tag(client, "lorenz.clock").get_child("0:EngineeringUnits")).read_value()
        assert (unit.DisplayName.Text, unit.UnitId) == ("s", 0x534543)
        state = tag(client, "lorenz.state")
        assert await state.read_data_type() == ua.NodeId(ua.ObjectIds.Int32)
        assert await state.read_value() == 1
        assert await tag(client, "lorenz.faults.sigma").read_value() == 1.0
        assert {one.EndpointUrl for one in await client.get_endpoints()} == {lorenz.endpoint}


# -- history and live rows -------------------------------------------------------------------------


async def test_history_runs_into_the_live_rows_without_gap_and_both_are_the_process(
    lorenz: RunningPlant,
) -> None:
    async with connected(lorenz) as client:
        async with watching(client, "lorenz.x1") as changes:
            live = [(await changes.get())[1] for _ in range(60)]
        end = live[-1].SourceTimestamp
        start = to_datetime(lorenz.start_ns - HISTORY_ROWS * 10_000_000)
        stored = await tag(client, "lorenz.x1").read_raw_history(start, end)
        names = ["x1", "x3", "setpoint", "total", "clock", "constant", "duplicate", "state"]
        stop = to_datetime(lorenz.start_ns)
        others = [
            await tag(client, f"lorenz.{name}").read_raw_history(start, stop, return_bounds=False)
            for name in names
        ]
        truth = await tag(client, "lorenz.ground_truth").read_raw_history(start, stop, return_bounds=False)
    stamps = np.array([to_ns(one.SourceTimestamp) for one in stored])
    assert stamps[0] == lorenz.start_ns - HISTORY_ROWS * 10_000_000
    assert (np.diff(stamps) == 10_000_000).all()
    by_stamp = {one.SourceTimestamp: one for one in stored}
    for one in live:
        assert by_stamp[one.SourceTimestamp].Value.Value == one.Value.Value
        assert one.StatusCode.value == by_stamp[one.SourceTimestamp].StatusCode.value == 0
        assert one.ServerTimestamp is not None
    # the server holds exactly the rows that the pure process gives
    pure = Plant(make("lorenz", seed=SEED, noise=0.01))
    pure.rows(WARMUP_ROWS)
    expected = pure.rows(len(stored)).values
    assert ([one.Value.Value for one in stored] == expected[:, 0]).all()
    for column, values in enumerate(others):
        assert len(values) == HISTORY_ROWS
        assert ([one.Value.Value for one in values] == expected[:HISTORY_ROWS, column]).all(), names[column]
    assert [one.Value.Value for one in truth] == [False] * HISTORY_ROWS
    assert others[-1][0].Value.VariantType == ua.VariantType.Int32


async def test_history_can_be_paged_by_time(lorenz: RunningPlant) -> None:
    start_ns = lorenz.start_ns - HISTORY_ROWS * 10_000_000
    stop = to_datetime(lorenz.start_ns)
    stamps: list[int] = []
    async with connected(lorenz) as client:
        node, at = tag(client, "lorenz.x3"), to_datetime(start_ns)
        while True:
            page = await node.read_raw_history(at, stop, 1_400, return_bounds=False)
            if not page:
                break
            stamps += [to_ns(one.SourceTimestamp) for one in page]
            at = page[-1].SourceTimestamp.replace(tzinfo=None) + timedelta(microseconds=1)
    assert stamps == list(range(start_ns, lorenz.start_ns, 10_000_000))


async def test_live_stamps_keep_pace_with_the_clock(lorenz: RunningPlant) -> None:
    async with connected(lorenz) as client, watching(client, "lorenz.x1") as changes:
        values = [(await changes.get())[1] for _ in range(100)]
    stamps = np.array([to_ns(one.SourceTimestamp) for one in values])
    assert (np.diff(stamps) == 10_000_000).all()
    assert ((stamps - lorenz.start_ns) % 10_000_000 == 0).all()
    lag_ms = np.array([to_ns(one.ServerTimestamp) - to_ns(one.SourceTimestamp) for one in values]) / 1e6
    # published after its nominal time, and usually at once
    assert lag_ms.min() > -1.0
    assert np.median(lag_ms) < 50.0


async def test_a_frozen_server_catches_up_without_holes_and_counts_it(lorenz: RunningPlant) -> None:
    async with connected(lorenz) as client, watching(client, "lorenz.x1") as changes:
        before = to_ns((await changes.get())[1].SourceTimestamp)
        lorenz.pause()
        # the connection is open, and nobody answers
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(tag(client, "lorenz.state").read_value(), 0.6)
        lorenz.resume()
        stamps = [before]
        while stamps[-1] < before + 1_500_000_000:
            stamps.append(to_ns((await changes.get())[1].SourceTimestamp))
        late = 0.0
        while late < 40:
            await asyncio.wait_for(changes.get(), TIMEOUT_S)
            late = (await counters(client, "lorenz"))["LateRows"]
    assert (np.diff(stamps) == 10_000_000).all()
    assert late >= 40


# -- faults ----------------------------------------------------------------------------------------


async def test_set_fault_changes_process_ground_truth_and_its_history(lorenz: RunningPlant) -> None:
    async with connected(lorenz) as client:
        plant = tag(client, "lorenz")
        async with (
            watching(client, "lorenz.ground_truth") as truth,
            watching(client, "lorenz.active_fault") as text,
        ):
            await truth.until(lambda one: one.Value.Value is False)
            await plant.call_method("2:SetFault", "sigma", 2 / 3)
            began = await truth.until(lambda one: one.Value.Value is True)
            assert (await text.until(lambda one: one.Value.Value)).Value.Value == "sigma x 0.6667"
            assert await tag(client, "lorenz.faults.sigma").read_value() == 2 / 3
            await plant.call_method("2:ClearFaults")
            ended = await truth.until(lambda one: one.Value.Value is False)
            assert await tag(client, "lorenz.faults.sigma").read_value() == 1.0
        stored = await tag(client, "lorenz.ground_truth").read_raw_history(
            began.SourceTimestamp - timedelta(milliseconds=10), ended.SourceTimestamp
        )
    labels = [one.Value.Value for one in stored]
    assert labels == [False, *[True] * (len(labels) - 2), False]
    assert len(labels) > 2


@pytest.mark.parametrize(
    "variant",
    [
        ua.Variant(0.75, ua.VariantType.Float),
        ua.Variant(0.75, ua.VariantType.Double),
        ua.Variant(1, ua.VariantType.Int32),
        ua.Variant(1, ua.VariantType.Byte),
    ],
    ids=lambda one: one.VariantType.name,
)
async def test_a_fault_node_takes_any_number(lorenz: RunningPlant, variant: ua.Variant) -> None:
    async with connected(lorenz) as client:
        node = tag(client, "lorenz.faults.beta")
        await node.write_value(ua.DataValue(variant))
        stored = (await node.read_data_value()).Value
        assert (stored.VariantType, stored.Value) == (ua.VariantType.Double, variant.Value)
        async with watching(client, "lorenz.active_fault") as text:
            await text.until(lambda one: one.Value.Value == ("" if variant.Value == 1 else "beta x 0.75"))
        await tag(client, "lorenz").call_method("2:ClearFaults")


@pytest.mark.parametrize(
    ("method", "arguments", "code"),
    [
        ("SetFault", ("gamma", 1.1), ua.uaerrors.BadInvalidArgument),
        ("SetFault", ("sigma", 99.0), ua.uaerrors.BadOutOfRange),
        ("SetFault", ("sigma",), ua.uaerrors.BadArgumentsMissing),
        ("SetFault", ("sigma", "much"), ua.uaerrors.BadInvalidArgument),
        ("SetQuirk", ("x9", "bad", 1.0), ua.uaerrors.BadInvalidArgument),
        ("SetQuirk", ("x1", "rust", 1.0), ua.uaerrors.BadInvalidArgument),
        ("SetQuirk", ("x1", "bad", 2.0), ua.uaerrors.BadOutOfRange),
    ],
)
async def test_wrong_method_calls_are_refused(
    lorenz: RunningPlant, method: str, arguments: tuple, code: type[Exception]
) -> None:
    async with connected(lorenz) as client:
        with pytest.raises(code):
            await tag(client, "lorenz").call_method(f"2:{method}", *arguments)
        assert await tag(client, "lorenz.faults.sigma").read_value() == 1.0


async def test_a_script_is_followed_and_shown(closed: RunningPlant) -> None:
    async with connected(closed, "me", "secret") as client:
        script_end = to_datetime(closed.start_ns + 5_000_000_000)
        async with watching(client, "throttle.clock") as clock:
            await clock.until(lambda one: one.SourceTimestamp > script_end)
        stored = await tag(client, "throttle.ground_truth").read_raw_history(
            to_datetime(closed.start_ns), script_end
        )
    truth = {(to_ns(one.SourceTimestamp) - closed.start_ns) // 20_000_000: one.Value.Value for one in stored}
    assert [row for row, faulty in truth.items() if faulty] == list(range(100, 200))


# -- quirks ----------------------------------------------------------------------------------------


async def test_quirks_are_set_and_cleared_at_run_time(lorenz: RunningPlant) -> None:
    async with connected(lorenz) as client:
        plant = tag(client, "lorenz")
        async with watching(client, "lorenz.x3") as changes:
            await plant.call_method("2:SetQuirk", "x3", "bad", ua.Variant(1, ua.VariantType.Int32))
            bad = await changes.until(lambda one: not one.StatusCode.is_good())
            assert bad.StatusCode.value == 0x808C_0000
            assert bad.Value.Value is None
            await plant.call_method("2:SetQuirk", "x3", "bad", 0.0)
            await plant.call_method("2:SetQuirk", "x3", "null_source", 1.0)
            null = await changes.until(lambda one: one.SourceTimestamp is None)
            assert null.ServerTimestamp is not None
            assert null.StatusCode.is_good()
            await plant.call_method("2:SetQuirk", "measured", "skew_ms", 40.0)
            await plant.call_method("2:SetQuirk", "x3", "null_source", 0.0)
            skewed = await changes.until(lambda one: one.SourceTimestamp is not None)
            assert (to_ns(skewed.SourceTimestamp) - lorenz.start_ns) % 10_000_000 == 0
            assert skewed.SourceTimestamp > skewed.ServerTimestamp
            await plant.call_method("2:ClearQuirks")
            clean = await changes.until(lambda one: one.SourceTimestamp <= one.ServerTimestamp)
            assert clean.StatusCode.is_good()
        stored = await tag(client, "lorenz.x3").read_raw_history(
            clean.SourceTimestamp - timedelta(seconds=30), clean.SourceTimestamp
        )
    assert {one.StatusCode.value for one in stored} >= {0, 0x808C_0000}


async def test_quirks_of_the_config_are_in_the_history_too(closed: RunningPlant) -> None:
    start, stop = to_datetime(closed.start_ns - 10_000_000_000), to_datetime(closed.start_ns)
    async with connected(closed, "me", "secret") as client:
        theta, u, total = [
            await tag(client, f"throttle.{name}").read_raw_history(start, stop, return_bounds=False)
            for name in ("theta", "u", "total")
        ]
    assert {(to_ns(one.SourceTimestamp) - closed.start_ns) % 20_000_000 for one in theta} == {0}
    assert to_ns(theta[0].SourceTimestamp) == closed.start_ns - 10_000_000_000 + 40_000_000
    assert {one.SourceTimestamp for one in u} == {None}
    assert len(u) == 500
    assert len(total) == 10


async def test_speed_compresses_time_but_not_the_stamps(closed: RunningPlant) -> None:
    async with connected(closed, "me", "secret") as client, watching(client, "throttle.theta") as changes:
        loop = asyncio.get_running_loop()
        first, began = (await changes.get())[1], loop.time()
        values = [(await changes.get())[1] for _ in range(300)]
        took_s = loop.time() - began
    stamps = [to_ns(one.SourceTimestamp) for one in (first, *values)]
    assert (np.diff(stamps) == 20_000_000).all()
    assert took_s < 6.0 * 0.6, "300 rows of 20 ms at speed 4 take 1.5 s"
    assert took_s > 6.0 / 4 * 0.6


# -- rights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", [None, "me"])
async def test_measured_tags_are_read_only_and_results_are_writable(
    lorenz: RunningPlant, user: str | None
) -> None:
    async with connected(lorenz, user, "secret") as client:
        for name in ("x1", "x3", "total", "setpoint", "state", "ground_truth", "active_fault"):
            node = tag(client, f"lorenz.{name}")
            level = await node.get_user_access_level()
            assert ua.AccessLevel.CurrentWrite not in level
            with pytest.raises(ua.uaerrors.BadUserAccessDenied):
                await node.write_value(ua.DataValue(ua.Variant(1.0, ua.VariantType.Double)))
        for name, value, kind in (
            ("Score", 2.5, ua.VariantType.Double),
            ("IsAnomaly", True, ua.VariantType.Boolean),
            ("ExplanationText", "u is high", ua.VariantType.String),
            ("Residuals", [0.5, 1.5], ua.VariantType.Double),
        ):
            node = client.get_node(f"ns=3;s=pump.{name}")
            assert ua.AccessLevel.CurrentWrite in await node.get_user_access_level()
            await node.write_value(ua.DataValue(ua.Variant(value, kind)))
            assert await node.read_value() == value
        serial = client.get_node("ns=3;s=pump.Serial")
        with pytest.raises(ua.uaerrors.BadUserAccessDenied):
            await serial.write_value(ua.DataValue(ua.Variant(8, ua.VariantType.UInt32)))
        with pytest.raises(ua.uaerrors.BadTypeMismatch):
            await client.get_node("ns=3;s=pump.Score").write_value(
                ua.DataValue(ua.Variant(1.0, ua.VariantType.Float))
            )


async def test_nobody_may_change_the_address_space(lorenz: RunningPlant) -> None:
    async with connected(lorenz, "me", "secret") as client:
        with pytest.raises(ua.uaerrors.BadUserAccessDenied):
            await client.nodes.objects.add_object(2, "mine")
        with pytest.raises(ua.uaerrors.BadUserAccessDenied):
            await tag(client, "lorenz.x1").write_attribute(
                ua.AttributeIds.AccessLevel, ua.DataValue(ua.Variant(3, ua.VariantType.Byte))
            )


async def test_imported_variables_start_with_a_typed_good_value(closed: RunningPlant) -> None:
    async with connected(closed, "me", "secret") as client:
        expected = {
            "Score": (-1.0, ua.VariantType.Double),
            "IsAnomaly": (False, ua.VariantType.Boolean),
            "ExplanationText": ("", ua.VariantType.String),
            "Residuals": ([], ua.VariantType.Double),
        }
        for name, (value, kind) in expected.items():
            current = await client.get_node(f"ns=3;s=pump.{name}").read_data_value()
            assert current.StatusCode.is_good()
            assert (current.Value.Value, current.Value.VariantType) == (value, kind)


async def test_writes_with_timestamps_are_refused_where_so_configured(closed: RunningPlant) -> None:
    async with connected(closed, "me", "secret") as client:
        node = client.get_node("ns=3;s=pump.Score")
        value = ua.Variant(3.0, ua.VariantType.Double)
        stamp = to_datetime(closed.start_ns)
        with pytest.raises(ua.uaerrors.BadWriteNotSupported):
            await node.write_attribute(ua.AttributeIds.Value, ua.DataValue(value, SourceTimestamp=stamp))
        assert await node.read_value() == -1.0
        await node.write_attribute(ua.AttributeIds.Value, ua.DataValue(value))
        assert await node.read_value() == 3.0


# -- users and security ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "password"),
    [("me", "wrong"), ("me", ""), ("admin", "admin"), ("nobody", "secret"), (None, "")],
)
async def test_who_is_not_known_is_refused(closed: RunningPlant, user: str | None, password: str) -> None:
    with pytest.raises((ua.uaerrors.BadUserAccessDenied, ua.uaerrors.BadIdentityTokenRejected)):
        async with connected(closed, user, password):
            pass


@pytest.mark.parametrize("mode", [ua.MessageSecurityMode.Sign, ua.MessageSecurityMode.SignAndEncrypt])
async def test_secure_channel_with_a_certificate_that_names_the_server(
    lorenz: RunningPlant, mode: ua.MessageSecurityMode, tmp_path: Path
) -> None:
    key, certificate, uri = tmp_path / "key.pem", tmp_path / "cert.der", "urn:opcua-detector:test"
    await setup_self_signed_certificate(
        key, certificate, uri, "localhost", [ExtendedKeyUsageOID.CLIENT_AUTH], {}
    )
    client = Client(lorenz.endpoint, timeout=TIMEOUT_S)
    client.application_uri = uri
    await client.set_security(SecurityPolicyBasic256Sha256, str(certificate), str(key), mode=mode)
    client.set_user("me")
    client.set_password("secret")
    async with client:
        assert isinstance(await tag(client, "lorenz.x1").read_value(), float)
        endpoints = await client.get_endpoints()
    from cryptography import x509

    server = x509.load_der_x509_certificate(endpoints[0].ServerCertificate)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [endpoints[0].Server.ApplicationUri]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    offered = {(one.SecurityPolicyUri.rsplit("#", 1)[1], one.SecurityMode.name) for one in endpoints}
    policies = ("Basic256Sha256", "Aes128_Sha256_RsaOaep", "Aes256_Sha256_RsaPss")
    assert offered == {("None", "None_")} | {(name, mode) for name in policies for mode in ("Sign", "SignAndEncrypt")}


# -- life and death --------------------------------------------------------------------------------


async def test_restarts_on_the_same_port_after_a_kill_and_keeps_its_certificate(tmp_path: Path) -> None:
    with running_plant("throttle", history_rows=100, pki=tmp_path / "pki") as plant:
        endpoint, first_start, first_pid = plant.endpoint, plant.start_ns, plant.pid
        async with connected(plant) as client, watching(client, "throttle.theta") as changes:
            await changes.get()
            old = (await client.get_endpoints())[0].ServerCertificate
            # killed with the connection open, which leaves the port in its worst state
            plant.kill()
        assert not plant.running
        plant.restart()
        assert plant.endpoint == endpoint
        assert plant.pid != first_pid
        assert plant.start_ns > first_start
        async with connected(plant) as client, watching(client, "throttle.theta") as changes:
            assert to_ns((await changes.get())[1].SourceTimestamp) >= plant.start_ns
            assert (await client.get_endpoints())[0].ServerCertificate == old
        assert plant.stop() == 0


def test_a_taken_port_is_refused_with_exit_code_2(
    lorenz: RunningPlant, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--port", str(lorenz.port)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    where = f"127.0.0.1:{lorenz.port}"
    advice = "Stop the other server, or take --port 0 for a free one."
    assert captured.err == f"error: the port is taken: {where}. {advice}\n"
    with pytest.raises(StartError, match=r"exit code 2.*the port is taken"), running_plant(port=lorenz.port):
        pass


@pytest.mark.parametrize("how", ["parent", "SIGINT"])
def test_the_server_ends_cleanly(how: str) -> None:
    command = [sys.executable, "-m", "sim_server", "--history-rows", "10", "--die-with-parent"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        ready = json.loads(child.stdout.readline())
        assert ready["ready"] is True
        assert ready["pid"] == child.pid
        if how == "parent":
            child.stdin.close()
        else:
            child.send_signal(getattr(signal, how))
        rest = child.stdout.read()
        assert child.wait(TIMEOUT_S) == 0
        assert rest == b"", "exactly one line on stdout"
        assert child.stderr is not None
        assert b"Traceback" not in child.stderr.read()


# -- disturbances ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "argument"),
    [("rust", ""), ("remove", "x9"), ("restore", "x1"), ("type", "x1=Guid"), ("session_limit", "few"),
     ("clock", "soon")],
)
async def test_a_disturbance_that_is_not_possible_is_refused(
    lorenz: RunningPlant, what: str, argument: str
) -> None:
    async with connected(lorenz) as client:
        with pytest.raises(ua.uaerrors.BadInvalidArgument):
            await tag(client, "lorenz").call_method("2:Disturb", what, argument)


async def test_a_removed_node_says_so_once_and_comes_back_for_new_items_only(lorenz: RunningPlant) -> None:
    async with connected(lorenz) as client:
        plant = tag(client, "lorenz")
        async with watching(client, "lorenz.x3") as changes:
            await plant.call_method("2:Disturb", "remove", "x3")
            gone = await changes.until(lambda one: not one.StatusCode.is_good())
            assert gone.StatusCode.value == ua.StatusCodes.BadNodeIdUnknown
            with pytest.raises(ua.uaerrors.BadNodeIdUnknown):
                await tag(client, "lorenz.x3").read_value()
            await plant.call_method("2:Disturb", "restore", "x3")
            async with watching(client, "lorenz.x3") as again:
                await again.until(lambda one: one.StatusCode.is_good())


async def test_the_clock_of_the_server_jumps_and_comes_back(lorenz: RunningPlant) -> None:
    async with connected(lorenz) as client:
        plant, x1 = tag(client, "lorenz"), tag(client, "lorenz.x1")
        for hours in (1, -1, 0):
            await plant.call_method("2:Disturb", "clock", str(hours * 3_600_000))

            async def there(hours: int = hours) -> bool:
                stamp = (await x1.read_data_value()).ServerTimestamp.replace(tzinfo=UTC)
                return abs(stamp - datetime.now(UTC) - timedelta(hours=hours)) < timedelta(minutes=1)

            async with asyncio.timeout(10):
                while not await there():
                    await asyncio.sleep(0.01)


async def test_a_tag_changes_its_type_and_back(lorenz: RunningPlant) -> None:
    async with connected(lorenz) as client:
        plant, x3 = tag(client, "lorenz"), tag(client, "lorenz.x3")
        for kind in (ua.VariantType.String, ua.VariantType.Float, ua.VariantType.Double):
            await plant.call_method("2:Disturb", "type", f"x3={kind.name}")
            async with watching(client, "lorenz.x3") as changes:
                await changes.until(lambda one, kind=kind: one.Value.VariantType == kind and one.Value.Value)
            assert await x3.read_data_type_as_variant_type() == kind


async def test_results_lose_and_regain_the_right_to_be_written(lorenz: RunningPlant) -> None:
    async with connected(lorenz) as client:
        index = await client.get_namespace_index("urn:opcua-detector:results")
        score = client.get_node(f"ns={index};s=pump.Score")
        value = ua.DataValue(ua.Variant(0.5, ua.VariantType.Double))
        await tag(client, "lorenz").call_method("2:Disturb", "read_only", "pump.")
        with pytest.raises(ua.uaerrors.UaStatusCodeError):
            await score.write_attribute(ua.AttributeIds.Value, value)
        await tag(client, "lorenz").call_method("2:Disturb", "writable", "pump.")
        await score.write_attribute(ua.AttributeIds.Value, value)


async def test_namespaces_before_the_plants_own_shift_its_index() -> None:
    with running_plant("lorenz", history_rows=0, config={"namespaces_before": ["urn:one", "urn:two"]}) as shifted:
        async with connected(shifted) as client:
            assert await client.get_namespace_index("urn:opcua-detector:simulated-plant") == 4
