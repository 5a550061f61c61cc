"""Connections in an event loop: how one is opened (name look-up, connecting, the proxy's tunnel, TLS), and one request
after the other on it.

Asyncio carries the bytes, :mod:`worker.http1` reads the answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import select
import socket
from collections.abc import Sequence
from typing import Any

from worker.clock import local_ns
from worker.http1 import MalformedResponse, ResponseReader
from worker.transport import Route

__all__ = ["Connection", "Opener", "TunnelRefused"]

#: How long one address of a name has for itself before the next is tried beside it, s (RFC 8305, section 5).
NEXT_ADDRESS_S = 0.25
#: A connection in silence is looked after by the kernel: the first probe after so many seconds, the next ones at this
#: distance, and it is dead after so many without an answer. It keeps a firewall's memory of the flow awake, too.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
#: Most bytes that one answer may take with its framing, more than any has: a flood must not keep the event loop.
_ANSWER_LIMIT = 1024 * 1024
#: Most bytes of one read.
_READ_SIZE = 16 * 1024

#: One address as :func:`socket.getaddrinfo` gives it.
_Address = tuple[int, int, int, str, tuple[Any, ...]]


class Connection(asyncio.BufferedProtocol):
    """A connection that serves one request after the other. It reads into ``buffer``, which others of its loop share:
    each read is dealt with at once.

    ``phase``: what its opening would have failed at. ``reusable``: nothing of an earlier request can still come.
    """

    done: asyncio.Future[None]  # of the latest request: that ``reader`` has the answer, or ``error`` says why not
    reader: ResponseReader

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer
        self._transport: asyncio.Transport | None = None
        self._poll = select.poll()
        self._is_asked = self._is_dropped = False
        self._taken = 0
        self.phase = "could not connect"
        self.reusable = True
        self.error: BaseException | None = None
        self.idle_since_ns = self.sent_ns = self.received_ns = 0

    def attach(self, transport: asyncio.Transport) -> None:
        """From now on the bytes go through ``transport``."""
        self._transport = transport
        if self._is_dropped:  # something came along with the handshake
            transport.abort()
            return
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def ask(self, data: bytes, reader: ResponseReader) -> None:
        """Write a request, whose answer is for ``reader``."""
        self.reader, self.error, self._taken, self.received_ns = reader, None, 0, 0
        self.done = asyncio.get_running_loop().create_future()
        self._is_asked, self.reusable = True, False
        self.sent_ns = local_ns()
        assert self._transport is not None
        self._transport.write(data)

    def end(self, error: BaseException | None) -> None:
        """Take no more of the answer to the request under way, if there is one."""
        if self._is_asked:
            self._is_asked = False
            self.error, self.reusable = error, self.reader.reusable
            if not self.done.done():
                self.done.set_result(None)

    @property
    def is_over(self) -> bool:
        """Whether it is closed, or about to be."""
        return self._transport is None or self._transport.is_closing()

    def stands(self) -> bool:
        """Whether a request may be written, as far as can be told: nothing has come unasked, and nothing lies unread.

        On a new connection session tickets may, which say nothing.
        """
        return not (self.is_over or (self.received_ns and self._poll.poll(0)))

    def abort(self) -> None:
        """Close it at once; whatever was asked has no answer any more."""
        self.end(ConnectionAbortedError())
        self._is_dropped = True
        if self._transport is not None:
            self._transport.abort()

    # -- what asyncio calls

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._is_asked:
            self._take(bytes(self._buffer[:nbytes]))
        else:
            self.abort()  # nobody asked

    def eof_received(self) -> None:
        if self._is_asked:
            self._take(b"")
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(exc)
        self.abort()

    def _take(self, data: bytes) -> None:
        reader = self.reader
        self._taken += len(data)
        try:
            reader.feed(data)
        except Exception as error:  # noqa: BLE001 - whatever it was, the request is in doubt
            self.end(error)
            return
        if reader.status and not self.received_ns:
            self.received_ns = local_ns()
        if reader.ended:
            self.end(None)
        elif self._taken > _ANSWER_LIMIT:
            self.end(MalformedResponse("a flood"))


class TunnelRefused(ConnectionError):
    """The proxy answered CONNECT with a status, its text, that is not success."""


class Opener:
    """Opens connections by one route."""

    def __init__(self, route: Route) -> None:
        self._route = route
        self._addresses = _Addresses()
        self._buffer = memoryview(bytearray(_READ_SIZE))

    def new(self) -> Connection:
        """A connection that is to be opened."""
        return Connection(self._buffer)

    async def open(self, connection: Connection) -> None:
        """Open it.

        Raises:
            OSError: it could not be opened.
            worker.http1.MalformedResponse: what the proxy said is no answer to CONNECT.
        """
        route, loop = self._route, asyncio.get_running_loop()
        near, first = (route.proxy, self.new()) if route.proxy else (route.exchange, connection)
        sock = await self._addresses.connect(near.host, near.port)
        transport, _ = await loop.create_connection(lambda: first, sock=sock)
        try:
            connection.phase = "no tunnel through the proxy" if route.proxy else "no TLS session"
            if near.secure:
                transport = await self._secured(transport, first, near.host)
            if route.proxy:
                first.attach(transport)
                await self._ask_for_tunnel(first)
                connection.phase = "no TLS session"
                transport = await self._secured(transport, connection, route.exchange.host)
        except BaseException:
            transport.abort()
            raise
        connection.attach(transport)

    async def _ask_for_tunnel(self, proxy: Connection) -> None:
        reader = ResponseReader(0, head_only=True)
        proxy.ask(self._route.encode_connect(), reader)
        await proxy.done
        if not reader.status:
            raise proxy.error or ConnectionAbortedError()
        if not 200 <= reader.status < 300:
            raise TunnelRefused(reader.status)
        if reader.surplus or not proxy.stands():  # the exchange says nothing before the handshake
            raise MalformedResponse("bytes behind the answer to CONNECT")

    async def _secured(
        self, transport: asyncio.Transport, protocol: asyncio.BaseProtocol, host: str
    ) -> asyncio.Transport:
        assert self._route.tls is not None
        inner = await asyncio.get_running_loop().start_tls(transport, protocol, self._route.tls, server_hostname=host)
        assert inner is not None
        return inner


class _Addresses:
    """Connects to a host by any of its addresses, as RFC 8305 has it; the names' look-up is the loop's.

    It goes on behind the addresses that failed: those are tried last the next time, the latest failure behind all.
    asyncio's own race loses a connected socket when it is given up, and begins with the same dead addresses each time.
    """

    def __init__(self) -> None:
        self._failed: dict[tuple[Any, ...], int] = {}  # in which turn an address failed
        self._turns = itertools.count()

    async def connect(self, host: str, port: int) -> socket.socket:
        """A connected socket; each address has :data:`NEXT_ADDRESS_S` for itself before the next one joins.

        Raises:
            OSError: the name has no address, or none of them takes the connection.
        """
        waiting = self._in_order(await _looked_up(host, port))
        trials: dict[asyncio.Task[socket.socket], _Address] = {}
        error: BaseException = OSError("the name has no address")
        try:
            while waiting or trials:
                if waiting:
                    address = waiting.pop(0)
                    trials[asyncio.create_task(_connected(address))] = address
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


async def _looked_up(host: str, port: int) -> Sequence[_Address]:
    with contextlib.suppress(socket.gaierror):  # what is no name needs no thread
        flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)


async def _connected(address: _Address) -> socket.socket:
    family, kind, protocol, _, place = address
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):  # not everywhere
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        await asyncio.get_running_loop().sock_connect(sock, place)
    except BaseException:
        sock.close()
        raise
    return sock


def _give_up(trial: asyncio.Task[socket.socket]) -> None:
    """End a trial that nobody waits for any more; one that has just connected is closed."""
    if not trial.cancel() and trial.exception() is None:
        trial.result().close()
