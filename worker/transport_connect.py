"""Opening one connection in an event loop: name look-up, connecting, the proxy's tunnel, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable
from http.client import RemoteDisconnected
from typing import Any

from worker.http1 import MalformedResponse, ResponseReader
from worker.transport import Place, Route

__all__ = ["NEXT_ADDRESS_S", "Opening", "TunnelRefused"]

#: How long one address of a name has for itself before the next is tried beside it, s (RFC 8305, section 5).
NEXT_ADDRESS_S = 0.25
#: A connection in silence is looked after by the kernel: the first probe after so many seconds, the next ones at this
#: distance, and it is dead after so many without an answer. It keeps a firewall's memory of the flow awake, too.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}

#: An address as socket.getaddrinfo gives it.
Address = tuple[Any, Any, int, str, Any]


class TunnelRefused(ConnectionError):
    """The proxy answered CONNECT with ``status``, which is not success."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Opening:
    """One connection while it is being opened; ``phase`` says what it would have failed at."""

    def __init__(self, route: Route, loop: asyncio.AbstractEventLoop) -> None:
        self._route = route
        self._loop = loop
        self.phase = "could not connect"

    async def connect(self, protocol: asyncio.BaseProtocol, attach: Callable[[asyncio.Transport], None]) -> None:
        """Open it for ``protocol``; ``attach`` is given the transport if that is not the one it was made with.

        Raises:
            OSError: it could not be opened.
            worker.http1.MalformedResponse: what the proxy said is no answer to CONNECT.
        """
        near, route = self._route.proxy or self._route.exchange, self._route
        sock = await _first_to_connect(self._loop, await _addresses(self._loop, near))
        self.phase = "no TLS session" if route.proxy is None else "no tunnel through the proxy"
        if not route.tunnels:
            await self._start(sock, near, protocol)
            return
        head = _TunnelHead(self._loop)
        transport = await self._start(sock, near, head)
        try:
            transport.write(route.encode_connect())
            await head.came
            self.phase = "no TLS session"
            assert route.tls is not None
            inner = await self._loop.start_tls(transport, protocol, route.tls, server_hostname=route.exchange.host)
        except BaseException:
            transport.abort()
            raise
        assert inner is not None
        attach(inner)

    async def _start(self, sock: socket.socket, near: Place, protocol: asyncio.BaseProtocol) -> asyncio.Transport:
        tls: dict[str, Any] = {"ssl": self._route.tls, "server_hostname": near.host} if near.secure else {}
        transport, _ = await self._loop.create_connection(lambda: protocol, sock=sock, **tls)
        return transport


class _TunnelHead(asyncio.Protocol):
    """Reads what a proxy says to CONNECT; ``came`` is done when the tunnel stands, or has the error."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.came: asyncio.Future[None] = loop.create_future()
        self._reader = ResponseReader(0)

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        try:
            reader.feed(data)
        except (MalformedResponse, RemoteDisconnected) as error:
            self._end(error)
            return
        if not reader.status:
            return
        if not 200 <= reader.status < 300:
            self._end(TunnelRefused(reader.status))
        elif reader.ended and not reader.whole:  # the exchange says nothing before the handshake
            self._end(MalformedResponse("bytes behind the answer to CONNECT"))
        else:
            self._end(None)

    def eof_received(self) -> None:
        self._end(RemoteDisconnected(""))

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or RemoteDisconnected(""))

    def _end(self, error: Exception | None) -> None:
        if self.came.done():
            return
        if error is None:
            self.came.set_result(None)
        else:
            self.came.set_exception(error)
            self.came.exception()  # whoever asked may have gone: asyncio would tell of an error that nobody heard of


# ---- addresses ------------------------------------------------------------------------------------------------------


class _Lookups:
    """Look-ups of names, each in a daemon thread of its own: unlike an executor's, it holds up nobody's exit.

    One that outlasts its callers goes on alone, and later callers join it in place of starting another. So there are
    never more than there are names.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[tuple[str, int], list[Callable[[list[Address] | Exception], None]]] = {}

    def look_up(self, host: str, port: int, then: Callable[[list[Address] | Exception], None]) -> None:
        """Call ``then`` with the addresses, or the error, in a thread of its own.

        Raises:
            RuntimeError: no thread can be started.
        """
        with self._lock:
            waiting = self._waiting.setdefault((host, port), [])
            waiting.append(then)
            if len(waiting) > 1:
                return
            try:
                threading.Thread(target=self._run, args=(host, port), name="resolver", daemon=True).start()
            except RuntimeError:
                del self._waiting[host, port]
                raise

    def _run(self, host: str, port: int) -> None:
        came: list[Address] | Exception
        try:
            came = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except Exception as error:  # noqa: BLE001 - it is the callers' to handle
            came = error
        with self._lock:
            waiting = self._waiting.pop((host, port))
        for then in waiting:
            then(came)


_lookups = _Lookups()


async def _addresses(loop: asyncio.AbstractEventLoop, place: Place) -> list[Address]:
    try:
        return socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass  # a name, not an address
    found: asyncio.Future[list[Address] | Exception] = loop.create_future()

    def take(came: list[Address] | Exception) -> None:
        if not found.done():
            found.set_result(came)

    def then(came: list[Address] | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(take, came)

    _lookups.look_up(place.host, place.port, then)
    came = await found
    if isinstance(came, Exception):
        raise came
    return came


def _interleaved(addresses: Iterable[Address]) -> deque[Address]:
    """The addresses with their families in turn (RFC 8305, section 4), else in their order."""
    families: dict[Any, deque[Address]] = {}
    for address in addresses:
        families.setdefault(address[0], deque()).append(address)
    order: deque[Address] = deque()
    while families:
        for family in list(families):
            order.append(families[family].popleft())
            if not families[family]:
                del families[family]
    return order


async def _first_to_connect(loop: asyncio.AbstractEventLoop, addresses: Iterable[Address]) -> socket.socket:
    """A socket connected to the first address that answers.

    The next address is tried when one has failed, or has been silent for :data:`NEXT_ADDRESS_S`; all go on.

    Raises:
        OSError: every one has failed.
    """
    untried = _interleaved(addresses)
    trying: set[asyncio.Task[socket.socket]] = set()
    error: BaseException = OSError("the name has no address")
    try:
        while untried or trying:
            if untried:
                trying.add(loop.create_task(_connected(loop, untried.popleft())))
            timeout_s = NEXT_ADDRESS_S if untried else None
            done, _ = await asyncio.wait(trying, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                trying.remove(task)
                failed = task.exception()
                if failed is None:
                    return task.result()
                error = failed
        raise error
    finally:
        for task in trying:
            task.cancel()
            task.add_done_callback(_close_loser)


def _close_loser(task: asyncio.Task[socket.socket]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().close()


async def _connected(loop: asyncio.AbstractEventLoop, address: Address) -> socket.socket:
    family, kind, protocol, _, where = address
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):  # not everywhere
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        await loop.sock_connect(sock, where)
    except BaseException:
        sock.close()
        raise
    return sock
