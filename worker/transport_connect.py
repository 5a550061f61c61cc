"""Opening one connection in an event loop: name look-up, connecting, the proxy's tunnel, TLS."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from http.client import RemoteDisconnected

from worker.http1 import MalformedResponse, ResponseReader
from worker.transport import Route

__all__ = ["NEXT_ADDRESS_S", "Opening", "TunnelRefused"]

#: How long one address of a name has for itself before the next is tried beside it, s (RFC 8305, section 5).
NEXT_ADDRESS_S = 0.25
#: A connection in silence is looked after by the kernel: the first probe after so many seconds, the next ones at this
#: distance, and it is dead after so many without an answer. It keeps a firewall's memory of the flow awake, too.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


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

        The addresses of a name are tried as RFC 8305 has it.

        Raises:
            OSError: it could not be opened.
            worker.http1.MalformedResponse: what the proxy said is no answer to CONNECT.
        """
        route, head = self._route, _TunnelHead(self._loop)
        near = route.proxy or route.exchange
        first = head if route.tunnels else asyncio.Protocol() if near.secure else protocol
        transport, _ = await self._loop.create_connection(
            lambda: first, near.host, near.port, happy_eyeballs_delay=NEXT_ADDRESS_S
        )
        try:
            _keep_alive(transport)
            self.phase = "no TLS session" if route.proxy is None else "no tunnel through the proxy"
            if near.secure:
                transport = await self._secure(transport, head if route.tunnels else protocol, near.host)
            if route.tunnels:
                transport.write(route.encode_connect())
                await head.came
                self.phase = "no TLS session"
                transport = await self._secure(transport, protocol, route.exchange.host)
        except BaseException:
            transport.abort()
            raise
        if near.secure or route.tunnels:
            attach(transport)

    async def _secure(
        self, transport: asyncio.Transport, protocol: asyncio.BaseProtocol, host: str
    ) -> asyncio.Transport:
        assert self._route.tls is not None
        inner = await self._loop.start_tls(transport, protocol, self._route.tls, server_hostname=host)
        assert inner is not None
        return inner


def _keep_alive(transport: asyncio.Transport) -> None:
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # not everywhere
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


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
