"""Opening one connection in an event loop: name look-up, connecting, the proxy's tunnel, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Callable, Sequence
from http.client import RemoteDisconnected
from typing import Any

from worker.http1 import MalformedResponse, ResponseReader
from worker.transport import Route

__all__ = ["NEXT_ADDRESS_S", "Addresses", "Opening", "TunnelRefused"]

#: How long one address of a name has for itself before the next is tried beside it, s (RFC 8305, section 5).
NEXT_ADDRESS_S = 0.25
#: A connection in silence is looked after by the kernel: the first probe after so many seconds, the next ones at this
#: distance, and it is dead after so many without an answer. It keeps a firewall's memory of the flow awake, too.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


#: One address as :func:`socket.getaddrinfo` gives it.
_Address = tuple[int, int, int, str, tuple[Any, ...]]


class TunnelRefused(ConnectionError):
    """The proxy answered CONNECT with ``status``, which is not success."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Opening:
    """One connection while it is being opened; ``phase`` says what it would have failed at."""

    def __init__(self, route: Route, addresses: Addresses, loop: asyncio.AbstractEventLoop) -> None:
        self._route = route
        self._addresses = addresses
        self._loop = loop
        self.phase = "could not connect"

    async def connect(self, protocol: asyncio.BaseProtocol, attach: Callable[[asyncio.Transport], None]) -> None:
        """Open it for ``protocol``; ``attach`` is given the transport if that is not the one it was made with.

        Raises:
            OSError: it could not be opened.
            worker.http1.MalformedResponse: what the proxy said is no answer to CONNECT.
        """
        route, head = self._route, _TunnelHead(self._loop)
        near = route.proxy or route.exchange
        first = head if route.proxy else asyncio.Protocol() if near.secure else protocol
        sock = await self._addresses.connect(near.host, near.port, self._loop)
        transport, _ = await self._loop.create_connection(lambda: first, sock=sock)
        try:
            self.phase = "no TLS session" if route.proxy is None else "no tunnel through the proxy"
            if near.secure:
                transport = await self._secure(transport, head if route.proxy else protocol, near.host)
            if route.proxy:
                transport.write(route.encode_connect())
                await head.came
                self.phase = "no TLS session"
                transport = await self._secure(transport, protocol, route.exchange.host)
        except BaseException:
            transport.abort()
            raise
        if route.exchange.secure:
            attach(transport)

    async def _secure(
        self, transport: asyncio.Transport, protocol: asyncio.BaseProtocol, host: str
    ) -> asyncio.Transport:
        assert self._route.tls is not None
        inner = await self._loop.start_tls(transport, protocol, self._route.tls, server_hostname=host)
        assert inner is not None
        return inner


class Addresses:
    """Connects to a host by any of its addresses, as RFC 8305 has it; the names' look-up is the loop's.

    It goes on behind the addresses that failed: those are tried last the next time, the latest failure behind all.
    asyncio's own race loses a connected socket when it is given up, and begins with the same dead addresses each time.
    """

    def __init__(self) -> None:
        self._failed: dict[tuple[Any, ...], int] = {}  # in which turn an address failed
        self._turns = itertools.count()

    async def connect(self, host: str, port: int, loop: asyncio.AbstractEventLoop) -> socket.socket:
        """A connected socket; each address has :data:`NEXT_ADDRESS_S` for itself before the next one joins.

        Raises:
            OSError: the name has no address, or none of them takes the connection.
        """
        waiting = self._in_order(await _looked_up(host, port, loop))
        trials: dict[asyncio.Task[socket.socket], _Address] = {}
        error: BaseException = OSError("the name has no address")
        try:
            while waiting or trials:
                if waiting:
                    address = waiting.pop(0)
                    trials[loop.create_task(_connected(address, loop))] = address
                done, _ = await asyncio.wait(
                    trials, timeout=NEXT_ADDRESS_S if waiting else None, return_when=asyncio.FIRST_COMPLETED
                )
                for trial in done:
                    failure = trial.exception()
                    if failure is None:
                        self._failed.pop(trials.pop(trial)[4], None)
                        return trial.result()
                    error = failure
                    self._note(trials.pop(trial))
            raise error
        finally:
            for trial, address in trials.items():
                self._note(address)
                _give_up(trial)

    def _in_order(self, found: Sequence[_Address]) -> list[_Address]:
        """The families by turns, and what has failed behind what has not."""
        families: dict[int, list[_Address]] = {}
        for address in found:
            families.setdefault(address[0], []).append(address)
        by_turns = [one for turn in itertools.zip_longest(*families.values()) for one in turn if one is not None]
        self._failed = {one[4]: self._failed[one[4]] for one in found if one[4] in self._failed}
        return sorted(by_turns, key=lambda one: self._failed.get(one[4], -1))

    def _note(self, address: _Address) -> None:
        self._failed[address[4]] = next(self._turns)


async def _looked_up(host: str, port: int, loop: asyncio.AbstractEventLoop) -> Sequence[_Address]:
    with contextlib.suppress(socket.gaierror):  # what is no name needs no thread
        flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)


async def _connected(address: _Address, loop: asyncio.AbstractEventLoop) -> socket.socket:
    family, kind, protocol, _, place = address
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):  # not everywhere
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        await loop.sock_connect(sock, place)
    except BaseException:
        sock.close()
        raise
    return sock


def _give_up(trial: asyncio.Task[socket.socket]) -> None:
    """End a trial that nobody waits for any more; one that has just connected is closed."""
    if not trial.cancel() and trial.exception() is None:
        trial.result().close()


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
