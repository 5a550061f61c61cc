"""A TCP proxy that misbehaves as it is told: resets, lost replies, silences, latency, black holes, refused connections.

The words are toxiproxy's. It stands in front of Valkey or of the exchange, on loopback, in a thread of the test's own
process, and ends TLS if told to; every method may be called from any other thread. What it does by chance depends on
its seed, on the number of the connection and on the number of the turn in it, and on nothing else.
"""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import Any, Self, TypeVar

T = TypeVar("T")

#: How long the bytes of a lost reply are swallowed before the connection breaks, s: a pipeline's later commands run
#: meanwhile, so that what is lost is the reply and not the command.
_LOSE_FOR_S = 0.05
#: How much of a request and of its answer is kept to recognise it, bytes.
_KEPT_BYTES = 256 * 1024
_RANGE = 2**64
#: Between the bytes of an answer that comes byte by byte, s: else the kernel hands over several at once.
_BYTE_S = 0.0002


class Toxic(StrEnum):
    """What can happen to a turn by chance: one request, and the answer to it."""

    RESET = "reset"  # the request is not passed on, the connection breaks
    LOSE = "lose"  # the request is passed on and carried out, the answer breaks off
    MUTE = "mute"  # the request is passed on and carried out, no answer comes, the connection stays
    DEAF = "deaf"  # the request is not passed on, no answer comes, the connection stays


@dataclass(frozen=True, slots=True)
class Weather:
    """How often a turn meets a toxic, as probabilities, and the draw that decides."""

    seed: int = 0
    reset: float = 0.0
    lose: float = 0.0
    mute: float = 0.0
    deaf: float = 0.0

    def meets(self, connection: int, turn: int) -> tuple[Toxic | None, int]:
        """The toxic of a turn, and how many bytes of a lost answer pass before it breaks off."""
        digest = blake2b(f"{self.seed}:{connection}:{turn}".encode(), digest_size=16).digest()
        chance = int.from_bytes(digest[:8], "big") / _RANGE
        for toxic, rate in zip(Toxic, (self.reset, self.lose, self.mute, self.deaf), strict=True):
            if chance < rate:
                return toxic, digest[8] % 48 if toxic is Toxic.LOSE else 0
            chance -= rate
        return None, 0


@dataclass(slots=True)
class Trap:
    """Lies in wait for one exchange of words: the answer to a request that holds ``request`` breaks off.

    ``answer``: only an answer that holds this too. ``keep``: how many of its bytes pass before.
    """

    request: bytes
    answer: bytes
    keep: int
    times: int
    sprung: int = 0

    def fits(self, asked: bytearray, answered: bytearray) -> bool:
        """Whether this exchange of words is the one."""
        return self.sprung < self.times and self.request in asked and self.answer in answered


@dataclass(slots=True)
class Count:
    """What the proxy has done so far."""

    connections: int = 0
    turns: int = 0  # a client speaks, for the first time or after an answer: round trips
    resets: int = 0
    replies_lost: int = 0
    silences: int = 0
    flows_forgotten: int = 0


class Proxy:
    """Between clients and a server on loopback. A context manager; leaves the server alone."""

    def __init__(self, target_port: int, tls: ssl.SSLContext | None = None, *, seed: int = 0) -> None:
        self.target_port = target_port
        self._tls = tls
        self.count = Count()
        self.seed = seed
        self.weather = Weather(seed)
        self.traps: list[Trap] = []
        self.latency_s = 0.0
        self.late_request = b""
        self.is_hole = False
        self.forgets_after_s = math.inf
        self.opens_after_s = 0.0  # how long a new connection waits for the server
        self.in_bytes = False  # answers come byte by byte
        self.links: set[_Link] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.port = 0
        self.port = self._run(self._listen())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def redis_url(self) -> str:
        """Its address, for a server that is a Valkey."""
        return f"{'rediss' if self._tls else 'redis'}://127.0.0.1:{self.port}/0"

    @property
    def http_url(self) -> str:
        """Its address, for a server that is the exchange."""
        return f"http://127.0.0.1:{self.port}"

    def latency(self, ms: float, request: bytes = b"") -> None:
        """Every answer to a request that holds ``request`` comes so much later, ms."""

        def delay() -> None:
            self.latency_s, self.late_request = ms / 1000, request

        self._do(delay)

    def timeout(self, on: bool = True) -> None:
        """A black hole: nothing passes in either direction, and nobody is told. Switched off, what was held passes."""
        self._do(lambda: self._set_hole(on))

    def down(self) -> None:
        """Refuse new connections and reset all that are there."""

        async def close() -> None:
            if self._server is not None:
                self._server.close()
                self._server = None
            self._reset_all()

        self._run(close())

    def up(self) -> None:
        """Accept connections again."""
        if self._server is None:
            self._run(self._listen())

    def reset_peer(self) -> int:
        """Reset all connections (RST to both ends); gives how many there were."""
        return self._do(self._reset_all)

    def limit_data(self, request: bytes, answer: bytes = b"", *, keep: int = 0, times: int = 1) -> Trap:
        """Have the next answers to such a request break off after ``keep`` bytes, once the command has run."""
        trap = Trap(request, answer, keep, times)
        self._do(lambda: self.traps.append(trap))
        return trap

    def let_it_rain(self, **toxics: float) -> None:
        """From now on turns meet these toxics (names of :class:`Toxic`) with these probabilities; no argument, none."""
        self._do(lambda: setattr(self, "weather", Weather(self.seed, **toxics)))

    def forget(self, after_s: float) -> None:
        """As a firewall: a flow that was still for so long is forgotten, and nobody is told: it swallows what comes."""
        self._do(lambda: setattr(self, "forgets_after_s", after_s))

    def forget_flows(self) -> None:
        """Forget all flows that there are now."""

        def forget() -> None:
            for link in self.links:
                self.count.flows_forgotten += not link.is_forgotten
                link.is_forgotten = True

        self._do(forget)

    def mute_flows(self) -> None:
        """From now on the server's answers are swallowed on all connections that there are now."""
        self._do_with_each(lambda link: setattr(link, "is_mute", True))

    def say(self, what: bytes) -> None:
        """Say something in the server's name, on all connections."""
        self._do_with_each(lambda link: link.write(what))

    def hang_up(self) -> None:
        """Close all connections in the server's name."""
        self._do_with_each(lambda link: link.leave())

    def heal(self) -> None:
        """Take every toxic out."""

        def heal() -> None:
            self.weather, self.latency_s, self.late_request = Weather(self.seed), 0.0, b""
            self.forgets_after_s = math.inf
            self.traps.clear()
            self._set_hole(False)

        self._do(heal)
        self.up()

    def close(self) -> None:
        """Break all connections and end; harmless when it has ended."""
        if not self._thread.is_alive():
            return
        self.down()
        self._run(asyncio.sleep(0.01))  # transports close their sockets in a later turn of the loop
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- inside the loop

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def _do(self, work: Callable[[], T]) -> T:
        async def call() -> T:
            return work()

        return self._run(call())

    def _do_with_each(self, work: Callable[[_Link], object]) -> None:
        self._do(lambda: [work(link) for link in list(self.links)])

    async def _listen(self) -> int:
        self._server = await self._loop.create_server(
            lambda: _End(_Link(self), is_client=True), "127.0.0.1", self.port, ssl=self._tls, backlog=1024
        )
        return int(self._server.sockets[0].getsockname()[1])

    def _set_hole(self, on: bool) -> None:
        self.is_hole = on
        for link in list(self.links):
            link.hold(on)

    def _reset_all(self) -> int:
        links = list(self.links)
        for link in links:
            link.reset()
        return len(links)


class _End(asyncio.Protocol):
    """One end of a link."""

    def __init__(self, link: _Link, *, is_client: bool) -> None:
        self._link = link
        self._is_client = is_client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if self._is_client:
            self._link.accept(transport)
        else:
            self._link.connect(transport)

    def data_received(self, data: bytes) -> None:
        (self._link.request if self._is_client else self._link.answer)(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._link.close()


@dataclass(eq=False, slots=True)
class _Link:
    """A client's connection and the one to the server that carries it on."""

    proxy: Proxy
    number: int = 0
    turn: int = 0
    client: asyncio.Transport | None = None
    server: asyncio.Transport | None = None
    opening: asyncio.Task[None] | None = None
    is_closed: bool = False
    is_lost: bool = False  # the answer is broken off: the rest of it is swallowed
    asked: bytearray = field(default_factory=bytearray)
    answered: bytearray = field(default_factory=bytearray)
    early: bytearray = field(default_factory=bytearray)  # came before the server was connected
    toxic: Toxic | None = None
    keep: int = 0
    is_mute: bool = False
    is_forgotten: bool = False
    moved_s: float = field(default_factory=time.monotonic)

    def accept(self, client: asyncio.Transport) -> None:
        """A client has come."""
        self.client = client
        self.number = self.proxy.count.connections
        self.proxy.count.connections += 1
        self.proxy.links.add(self)
        self.hold(self.proxy.is_hole)
        self.opening = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self.proxy.opens_after_s)
        try:
            await loop.create_connection(lambda: _End(self, is_client=False), "127.0.0.1", self.proxy.target_port)
        except OSError:
            self.reset()

    def connect(self, server: asyncio.Transport) -> None:
        """The server has answered the door."""
        self.server = server
        if self.is_closed:
            _break(server)
            return
        self.hold(self.proxy.is_hole)
        server.write(bytes(self.early))

    def hold(self, on: bool) -> None:
        """Stop reading at both ends, or go on."""
        for end in (self.client, self.server):
            if end is not None and not end.is_closing():
                (end.pause_reading if on else end.resume_reading)()

    def request(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._is_swallowed():
            return
        if self.answered or not self.asked:
            self.turn += 1
            self.proxy.count.turns += 1
            self.asked.clear()
            self.answered.clear()
            self.toxic, self.keep = self.proxy.weather.meets(self.number, self.turn)
            self.proxy.count.silences += self.toxic in (Toxic.MUTE, Toxic.DEAF)
        if self.toxic is Toxic.RESET:
            self.reset()
            return
        if self.toxic is Toxic.DEAF:
            self.asked += data
            return
        if len(self.asked) < _KEPT_BYTES:
            self.asked += data
        if self.server is None:
            self.early += data
        else:
            self.server.write(data)

    def answer(self, data: bytes) -> None:
        """Bytes from the server."""
        if self._is_swallowed() or self.is_mute or self.toxic is Toxic.MUTE:
            return
        passed = len(self.answered)
        self.answered += data[: max(_KEPT_BYTES - passed, 1)]
        if self.is_lost:
            return
        if self._is_to_be_lost():
            self.is_lost = True
            self.proxy.count.replies_lost += 1
            self._pass(data[: max(self.keep - passed, 0)])
            asyncio.get_running_loop().call_later(_LOSE_FOR_S, self.reset)
            return
        self._pass(data)

    def _is_swallowed(self) -> bool:
        now_s = time.monotonic()
        if not self.is_forgotten and now_s - self.moved_s > self.proxy.forgets_after_s:
            self.is_forgotten = True
            self.proxy.count.flows_forgotten += 1
        self.moved_s = now_s
        return self.is_forgotten

    def _is_to_be_lost(self) -> bool:
        for trap in self.proxy.traps:
            if trap.fits(self.asked, self.answered):
                trap.sprung += 1
                self.keep = trap.keep
                return True
        return self.toxic is Toxic.LOSE

    def _pass(self, data: bytes) -> None:
        if self.proxy.latency_s > 0 and self.proxy.late_request in self.asked:
            asyncio.get_running_loop().call_later(self.proxy.latency_s, self.write, data)
        elif self.proxy.in_bytes:
            for at in range(len(data)):
                asyncio.get_running_loop().call_later(at * _BYTE_S, self.write, data[at : at + 1])
        else:
            self.write(data)

    def write(self, data: bytes) -> None:
        """Bytes for the client."""
        if data and self.client is not None and not self.client.is_closing():
            self.client.write(data)

    def leave(self) -> None:
        """Close the client's connection as a server does that is done with it."""
        if self.client is not None:
            self.client.close()

    def reset(self) -> None:
        """Break both connections with RST."""
        if not self.is_closed:
            self.proxy.count.resets += 1
        for end in (self.client, self.server):
            if end is not None:
                _break(end)
        self.close()

    def close(self) -> None:
        """One end has gone: the other one goes too, once it has what was meant for it."""
        if self.is_closed:
            return
        self.is_closed = True
        self.proxy.links.discard(self)
        if self.opening is not None:
            self.opening.cancel()
        for end in (self.client, self.server):
            if end is not None:
                end.close()


def _break(transport: asyncio.Transport) -> None:
    # Lingering for zero seconds makes the kernel send RST instead of FIN.
    raw = transport.get_extra_info("socket")
    if raw is not None and not transport.is_closing():
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
