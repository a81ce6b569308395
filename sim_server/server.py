"""The OPC UA server of the simulated plant: puts process, history, quirks and rights together."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from asyncua import Server, ua

from sim_server.access import PlantAttributes, PlantUsers
from sim_server.config import SimConfig, build_reporter, build_script
from sim_server.disturb import Disturber
from sim_server.errors import ProcessError, QuirkError, StartError
from sim_server.history import Historian, TagHistory
from sim_server.live import LivePlant
from sim_server.nodes import build_plant, load_nodesets
from sim_server.pki import ensure_certificate
from sim_server.plant import Plant, PlantRows, ScriptPlayer
from sim_server.processes import Process, model
from sim_server.ua_types import status_code

APPLICATION_URI: Final = "urn:opcua-detector:simulated-plant:server"
DEFAULT_NODESET: Final = Path(__file__).with_name("results.NodeSet2.xml")

_POLICIES: Final = (
    ua.SecurityPolicyType.NoSecurity,
    ua.SecurityPolicyType.Basic256Sha256_Sign,
    ua.SecurityPolicyType.Basic256Sha256_SignAndEncrypt,
    ua.SecurityPolicyType.Aes128Sha256RsaOaep_Sign,
    ua.SecurityPolicyType.Aes128Sha256RsaOaep_SignAndEncrypt,
    ua.SecurityPolicyType.Aes256Sha256RsaPss_Sign,
    ua.SecurityPolicyType.Aes256Sha256RsaPss_SignAndEncrypt,
)

_logger = logging.getLogger(__name__)


class PlantServer:
    """The simulated plant as an OPC UA server.

    Parameters
    ----------
    config
        Checked settings.
    wall_clock_ns
        Says what time it is when the live rows begin, ns since the epoch.

    Notes
    -----
    Use as ``await start()``, ``await run()``, ``await stop()``; `run` returns only when the live loop
    fails or is cancelled.
    """

    def __init__(self, config: SimConfig, *, wall_clock_ns: Callable[[], int] = time.time_ns) -> None:
        self.config = config
        self.start_ns = 0
        self.port = config.port
        self._wall_clock_ns = wall_clock_ns
        one = model(config.process)
        self.plant = Plant(
            Process(one, seed=config.seed, noise=config.noise), total_rollover=config.total_rollover
        )
        self._reporter = build_reporter(config)
        self._player = ScriptPlayer(build_script(config))
        self._loopback = _is_loopback(config.host)
        anonymous = self._loopback if config.anonymous is None else config.anonymous
        users = PlantUsers({user.name: user.password for user in config.users}, anonymous)
        self._server = Server(user_manager=users)
        self._historian = Historian(self._server.iserver, config.history_page_rows)
        self._attributes = PlantAttributes(self._server.iserver.aspace, self._set_factor)
        self._live: LivePlant | None = None
        self._disturber: Disturber | None = None
        self._started = False
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        tokens: list[type] = [ua.UserNameIdentityToken]
        if anonymous:
            tokens.append(ua.AnonymousIdentityToken)
        self._server.set_identity_tokens(tokens)

    @property
    def endpoint(self) -> str:
        """URL clients connect to."""
        host = "127.0.0.1" if self.config.host in ("", "0.0.0.0", "::") else self.config.host
        return f"opc.tcp://{f'[{host}]' if ':' in host else host}:{self.port}/"

    async def start(self) -> None:
        """Build the address space, simulate the history and listen.

        Raises
        ------
        StartError
            The port is taken, the address is not ours, a NodeSet or the certificate cannot be had.
        """
        self._check_address()
        if not self._loopback:
            _logger.warning("listening on %s: reachable from outside this machine", self.config.host)
        server = self._server
        server.iserver.history_manager = self._historian
        server.iserver.attribute_service = self._attributes
        server.iserver.allow_remote_admin = False
        server.name = "opcua-detector simulated plant"
        server.product_uri = "urn:opcua-detector"
        server.manufacturer_name = "opcua-detector"
        server.application_type = ua.ApplicationType.Server
        await server.init()
        await server.set_application_uri(APPLICATION_URI)
        server.set_endpoint(self.endpoint)
        server.set_security_policy(list(_POLICIES))
        await self._load_certificate()
        for uri in self.config.namespaces_before:
            await server.register_namespace(uri)
        nodes = await build_plant(server, self.plant.process.model, self.plant.tags, self._methods())
        self._attributes.serve_factors(nodes.factors)
        nodes.results.extend(await load_nodesets(server, self._nodesets()))
        if self.config.refuse_write_timestamps:
            self._attributes.refuse_timestamps_on(nodes.results)
        self.plant.rows(self.config.warmup_rows)
        past = self.plant.rows(self.config.history_rows)
        await self._listen()
        # whole microseconds: the server library keeps stamps as datetime
        self.start_ns = self._wall_clock_ns() // 1000 * 1000
        histories = self._load_history(past, [kind for _, kind in nodes.tags])
        for (node_id, _), history in zip(nodes.tags, histories, strict=False):
            self._historian.add(node_id, history)
        self._historian.add(nodes.ground_truth, histories[-1])
        self._live = LivePlant(
            server,
            nodes,
            self.plant,
            self._player,
            self._reporter,
            histories,
            self.start_ns,
            self.config.speed,
        )
        self._disturber = Disturber(
            server,
            nodes.namespace,
            self.plant.process.name,
            nodes.results,
            self._live.set_type,
            self._live.set_clock,
        )

    async def run(self) -> None:
        """Publish live rows until cancelled; `start` must have returned."""
        if self._live is None:
            raise StartError("the server is not started", self.endpoint, "Call start() first.")
        await self._live.run()

    async def stop(self) -> None:
        """Close every connection and stop listening; safe to call at any stage."""
        clock, self._server.iserver.time_task = self._server.iserver.time_task, None
        if clock is not None:
            # the library would wait for its next tick
            clock.cancel()
            await asyncio.gather(clock, return_exceptions=True)
        if self._started:
            self._started = False
            await self._server.stop()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    # -- start-up ----------------------------------------------------------------------------------

    def _check_address(self) -> None:
        """Try the address first: a clear answer at once instead of a traceback after the long start."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self.config.host or None, self.config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen(1)
        except OSError as error:
            raise self._address_error(error) from error

    def _address_error(self, error: OSError) -> StartError:
        where = f"{self.config.host}:{self.config.port}"
        if error.errno == errno.EADDRINUSE:
            return StartError(
                "the port is taken", where, "Stop the other server, or take --port 0 for a free one."
            )
        if error.errno == errno.EACCES:
            return StartError("the port is not allowed", where, "Take a port above 1023, or --port 0.")
        reason = error.strerror or str(error)
        return StartError(f"cannot listen ({reason})", where, "Check the host; 127.0.0.1 is this machine.")

    async def _listen(self) -> None:
        try:
            await self._server.start()
        except OSError as error:
            raise self._address_error(error) from error
        self._started = True
        assert self._server.bserver is not None
        self.port = self._server.bserver.port
        self._server.set_endpoint(self.endpoint)
        for description in self._server.iserver.endpoints:
            description.EndpointUrl = self.endpoint
            description.Server.DiscoveryUrls = [self.endpoint]

    async def _load_certificate(self) -> None:
        if self.config.certificate is not None and self.config.private_key is not None:
            await self._server.load_certificate(self.config.certificate)
            await self._server.load_private_key(self.config.private_key)
            return
        folder = self.config.pki_dir
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="opcua-detector-pki-")
            folder = Path(self._temporary.name)
        certificate, key = ensure_certificate(folder, APPLICATION_URI, self.config.host or "localhost")
        await self._server.load_certificate(certificate)
        await self._server.load_private_key(key)

    def _nodesets(self) -> tuple[Path, ...]:
        if self.config.nodesets is not None:
            return self.config.nodesets
        return (DEFAULT_NODESET,) if DEFAULT_NODESET.is_file() else ()

    def _load_history(self, past: PlantRows, kinds: list[ua.VariantType]) -> list[TagHistory]:
        """Report the past through the same quirks and file it: what was published is what is stored."""
        n, period_ns = past.values.shape[0], self.plant.period_ns
        first_ns = self.start_ns - n * period_ns
        capacity = max(1, n + self.config.live_history_rows)
        histories = [TagHistory(capacity, kind) for kind in (*kinds, ua.VariantType.Boolean)]
        samples = self._reporter.report_block(-n, first_ns, past.values)
        for tag, history in enumerate(histories[:-1]):
            of = samples.tag == tag
            history.load(samples.source_ns[of], samples.value[of], samples.status[of], samples.arrival_ns[of])
        stamps = first_ns + np.arange(n, dtype=np.int64) * period_ns
        histories[-1].load(stamps, past.labels.astype(np.float64), np.zeros(n, np.uint32), stamps)
        return histories

    # -- methods -----------------------------------------------------------------------------------

    def _methods(self) -> dict[str, Callable[..., Any]]:
        return {
            "SetFault": self._method_set_fault,
            "ClearFaults": self._method_clear_faults,
            "SetQuirk": self._method_set_quirk,
            "ClearQuirks": self._method_clear_quirks,
            "Disturb": self._method_disturb,
        }

    def _set_factor(self, parameter: str, factor: float) -> ua.StatusCode:
        try:
            self.plant.process.set_factor(parameter, factor)
        except ProcessError as error:
            _logger.warning("fault refused: %s", error)
            code = (
                ua.StatusCodes.BadOutOfRange if error.key == "factor" else ua.StatusCodes.BadInvalidArgument
            )
            return status_code(code)
        return status_code(ua.StatusCodes.Good)

    async def _method_set_fault(self, parent: ua.NodeId, *arguments: ua.Variant) -> ua.StatusCode:
        given = _arguments(arguments, (str, float))
        if isinstance(given, ua.StatusCode):
            return given
        status = self._set_factor(given[0], given[1])
        await self._show_factors()
        return status

    async def _method_clear_faults(self, parent: ua.NodeId, *arguments: ua.Variant) -> ua.StatusCode:
        self.plant.process.clear_factors()
        await self._show_factors()
        return status_code(ua.StatusCodes.Good)

    async def _method_set_quirk(self, parent: ua.NodeId, *arguments: ua.Variant) -> ua.StatusCode:
        given = _arguments(arguments, (str, str, float))
        if isinstance(given, ua.StatusCode):
            return given
        row = self._live.row if self._live is not None else 0
        try:
            self._reporter.set_quirk(given[0], given[1], given[2], start_row=row)
        except QuirkError as error:
            _logger.warning("quirk refused: %s", error)
            code = ua.StatusCodes.BadOutOfRange if error.key == "value" else ua.StatusCodes.BadInvalidArgument
            return status_code(code)
        return status_code(ua.StatusCodes.Good)

    async def _method_clear_quirks(self, parent: ua.NodeId, *arguments: ua.Variant) -> ua.StatusCode:
        self._reporter.clear()
        return status_code(ua.StatusCodes.Good)

    async def _method_disturb(self, parent: ua.NodeId, *arguments: ua.Variant) -> ua.StatusCode:
        given = _arguments(arguments, (str, str))
        if isinstance(given, ua.StatusCode):
            return given
        if self._disturber is None:
            return status_code(ua.StatusCodes.BadInvalidState)
        try:
            await self._disturber.disturb(given[0], given[1])
        except QuirkError as error:
            _logger.warning("disturbance refused: %s", error)
            return status_code(ua.StatusCodes.BadInvalidArgument)
        return status_code(ua.StatusCodes.Good)

    async def _show_factors(self) -> None:
        if self._live is not None:
            await self._live.show_factors()


def _arguments(given: tuple[ua.Variant, ...], types: tuple[type, ...]) -> Any:
    """Return the plain values of method arguments, numbers as float; a StatusCode where they do not fit."""
    if len(given) < len(types):
        return status_code(ua.StatusCodes.BadArgumentsMissing)
    if len(given) > len(types):
        return status_code(ua.StatusCodes.BadTooManyArguments)
    values: list[Any] = []
    for variant, wanted in zip(given, types, strict=True):
        value = variant.Value
        if wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
            values.append(float(value))
        elif wanted is str and isinstance(value, str):
            values.append(value)
        else:
            return status_code(ua.StatusCodes.BadInvalidArgument)
    return values


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
