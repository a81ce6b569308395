"""A small HTTP server for a few fixed paths, on a thread and an event loop of its own.

Why our own: the standard library's server gives each client a thread and waits for it without end. Here a client has
a few seconds to ask, a few kilobytes to do it in, and a few seconds to take the answer; so many may be connected at
once, and none of them is noticed by the others or by the loop of the rows. GET and HEAD, one request per connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import ConfigError

log = logging.getLogger(__name__)

MOST_REQUEST_BYTES = 8192
MOST_CLIENTS = 32
REQUEST_S, ANSWER_S = 5.0, 10.0
START_S = 10.0
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout",
            431: "Request Header Fields Too Large", 500: "Internal Server Error", 503: "Service Unavailable"}


@dataclass(frozen=True)
class Answer:
    """What a path gives."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: int = 200


Route = Callable[[Mapping[str, str]], Answer]  # takes the headers of the request, names in lower case


class Endpoint:
    """Serves routes until `stop`.

    Parameters
    ----------
    host, port : where to listen; port 0 takes a free one
    routes : path -> what answers it, called on the thread of the endpoint
    request_s, answer_s : how long a client may take to ask, and to take the answer

    Attributes
    ----------
    address : (host, port) it listens on, once started
    """

    def __init__(self, host: str, port: int, routes: Mapping[str, Route], *, request_s: float = REQUEST_S,
                 answer_s: float = ANSWER_S) -> None:
        self._wanted, self._routes = (host, port), dict(routes)
        self._request_s, self._answer_s = request_s, answer_s
        self.address: tuple[str, int] = (host, port)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event | None = None
        self._up = threading.Event()
        self._clients: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Listen; returns when it does.

        Raises
        ------
        ConfigError
            The address is taken, is none of this machine, or may not be used.
        """
        taken = self._bind()
        self.address = taken.getsockname()[:2]
        self._thread = threading.Thread(target=self._run, args=(taken,), name="opcua-detector metrics", daemon=True)
        self._thread.start()
        self._up.wait(START_S)

    def _bind(self) -> socket.socket:
        host, port = self._wanted
        try:
            (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            one = socket.socket(family, kind, protocol)
            try:
                if socket.has_ipv6 and family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows lets two processes share a port otherwise
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
                else:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind(address)
                one.listen(MOST_CLIENTS)
                one.setblocking(False)
            except BaseException:
                one.close()
                raise
            return one
        except OSError as error:
            raise ConfigError("metrics and health cannot be served here", key="metrics.listen", value=f"{host}:{port}",
                              next_step="stop the program that listens there, or choose another address or port "
                              f"({error.strerror or error})") from error

    def stop(self) -> None:
        """End the thread; whoever is being answered is cut off."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if self._loop is not None and self._end is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(self._end.set)
        thread.join(START_S)

    # --- on the thread

    def _run(self, taken: socket.socket) -> None:
        try:
            asyncio.run(self._serve(taken))
        except Exception:
            log.exception("metrics and health: the endpoint ended")
        finally:
            taken.close()
            self._up.set()

    async def _serve(self, taken: socket.socket) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._client, sock=taken, limit=MOST_REQUEST_BYTES)
        self._up.set()
        await self._end.wait()
        server.close()
        clients = tuple(self._clients)
        for task in clients:
            task.cancel()
        if clients:
            await asyncio.wait(clients, timeout=1.0)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            if len(self._clients) > MOST_CLIENTS:
                answer, head = Answer(b"too many clients\n", status=503), False
            else:
                answer, head = await self._answer(reader)
            async with asyncio.timeout(self._answer_s):
                writer.write(_message(answer, head))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass  # it went away, takes its answer too slowly, or the endpoint ends: nobody else cancels this task
        finally:
            self._clients.discard(task)
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[Answer, bool]:
        """Read one request and return its answer, and whether only its head was asked for."""
        try:
            async with asyncio.timeout(self._request_s):
                request = await reader.readuntil(b"\r\n\r\n")
        except TimeoutError:
            return Answer(b"no request came in time\n", status=408), False
        except asyncio.LimitOverrunError:
            return Answer(b"the request is too long\n", status=431), False
        except asyncio.IncompleteReadError:
            return Answer(b"the request is not whole\n", status=400), False
        line, _, rest = request.decode("latin-1").partition("\r\n")
        words = line.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return Answer(b"this is no HTTP/1 request\n", status=400), False
        head = words[0] == "HEAD"
        if words[0] not in ("GET", "HEAD"):
            return Answer(b"GET and HEAD only\n", status=405), False
        route = self._routes.get(words[1].partition("?")[0])
        if route is None:
            return Answer(f"there is: {', '.join(self._routes)}\n".encode(), status=404), head
        headers = {name.strip().lower(): value.strip() for name, _, value in
                   (one.partition(":") for one in rest.split("\r\n") if ":" in one)}
        try:
            return route(headers), head
        except Exception:
            log.exception("metrics and health: %s could not be answered", words[1])
            return Answer(b"this could not be answered; the log says why\n", status=500), head


def _message(answer: Answer, head: bool) -> bytes:
    lines = [f"HTTP/1.1 {answer.status} {_REASONS[answer.status]}", f"Content-Type: {answer.content_type}",
             f"Content-Length: {len(answer.body)}", "Cache-Control: no-store", "X-Content-Type-Options: nosniff",
             "Connection: close"]
    if answer.status == 405:
        lines.append("Allow: GET, HEAD")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + (b"" if head else answer.body)
