"""Clients of the exchange over either transport, for tests that make one call after the other."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from producer.message import Call
from tests.loopback import LOOPBACK, Authority, Behaviour, Server
from worker.classify import Failure, Means, OrderRef, Ref, Reply, classify
from worker.clock import ServerClock
from worker.daemon import WorkerLoop
from worker.exchange import Answer, Exchange, Sent
from worker.signing import Credential
from worker.transport import Route
from worker.transport_asyncio import AsyncioTransport
from worker.transport_requests import RequestsTransport

T = TypeVar("T")

WAYS = ("asyncio", "requests")
SECRET = "s3cr3t-canary-of-the-account"
API_KEY = "key-of-the-account"
CREDENTIAL = Credential.from_secret("default", API_KEY, SECRET)
REF = OrderRef(2146760, "a:b/c.d_e-f")
#: recvWindow in tests of break-downs, ms; an attempt's bound by it, s; and by how much a busy machine may overrun that.
BRIEF_MS, TOTAL_S = 500, 0.4
_SLACK_S = 1.5


class Client:
    """An exchange client in an event loop of its own, which runs while a call is made and stands still in between."""

    def __init__(self, way: str, url: str, clock: ServerClock, options: dict[str, Any]) -> None:
        route_options = {name: options.pop(name) for name in ("ca_file", "egress_proxy_url") if name in options}
        self.route = route = Route(url, **route_options)
        pool = {name: options.pop(name) for name in ("idle_bound_s", "pool_size") if name in options}
        transport = AsyncioTransport(route, **pool) if way == "asyncio" else RequestsTransport(route, **pool)
        self.exchange = Exchange(transport, clock=clock, **options)
        self._runner = asyncio.Runner(loop_factory=WorkerLoop)
        self._troubles: list[dict[str, Any]] = []
        self._runner.get_loop().set_exception_handler(lambda _, context: self._troubles.append(context))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Have something done in the loop."""
        return self._runner.run(work)

    async def asking(self, ref: Ref = REF, call: Call = Call.CANCEL, **options: Any) -> Answer | None:
        """One signed call, in the loop; a DELETE unless told otherwise."""
        return await self.exchange.call(call, options.pop("credential", CREDENTIAL), ref, **options)

    def ask(self, ref: Ref = REF, call: Call = Call.CANCEL, **options: Any) -> Answer:
        """The same for who waits for it."""
        answer = self.run(self.asking(ref, call, **options))
        assert answer is not None
        return answer

    def ask_patiently(self) -> Answer:
        """A DELETE that is waited for as long as answers take."""
        return self.ask(sent=Sent(late=lambda _: None))

    async def several(self, count: int, first: int = 1) -> list[Answer | None]:
        """As many DELETEs at once, for the orders from ``first`` on."""
        return await asyncio.gather(*[self.asking(OrderRef(first + n)) for n in range(count)])

    def close(self) -> None:
        """Close connections and loop."""

        async def close() -> None:
            self.exchange.close()

        self.run(close())
        self._runner.close()
        assert self._troubles == []  # what nobody awaited, or a callback raised


class Bench:
    """Starts servers and clients of one way, and closes them all. Clients trust the one authority."""

    def __init__(self, way: str, authority: Authority) -> None:
        self.way = way
        self.authority = authority
        self._open = contextlib.ExitStack()

    def tls(self) -> ssl.SSLContext:
        """TLS for a server that clients trust."""
        return self.authority.server_context(LOOPBACK)

    def server(self, behaviour: Behaviour, tls: ssl.SSLContext | None = None) -> Server:
        """A server that does so with each connection."""
        server = Server(behaviour, tls)
        self._open.callback(server.close)
        return server

    def client(self, url: str, clock: ServerClock | None = None, **options: Any) -> Client:
        """A client; ``options`` are those of route, transport and exchange."""
        given = {"recv_window_ms": 5_000, "ca_file": self.authority.ca_file, **options}
        client = Client(self.way, url, clock or ServerClock(), given)
        self._open.callback(client.close)
        return client

    def to(self, behaviour: Behaviour, *, secure: bool = False, **options: Any) -> tuple[Server, Client]:
        """A server, and a client of it; ``secure``: over TLS."""
        server = self.server(behaviour, self.tls() if secure else None)
        return server, self.client(server.url, **options)

    def impatient(self, behaviour: Behaviour, *, secure: bool = False) -> tuple[Server, Client]:
        """The same for break-downs."""
        return self.to(behaviour, secure=secure, recv_window_ms=BRIEF_MS)

    def over_tls(self, behaviour: Behaviour, **options: Any) -> tuple[Server, Client]:
        """A server whose behaviour does its part of TLS by itself, if at all, and a client that expects TLS."""
        server = self.server(behaviour)
        return server, self.client(f"https://127.0.0.1:{server.port}", **options)

    def close(self) -> None:
        """End everything."""
        self._open.close()


@contextlib.contextmanager
def bounded(seconds: float = TOTAL_S) -> Iterator[None]:
    """What runs inside may take ``seconds`` and the slack of a busy machine."""
    started_at = time.monotonic()
    yield
    assert time.monotonic() - started_at < seconds + _SLACK_S


def failed(answer: Answer | None, *, seen: bool, reason: str = ":") -> Failure:
    """It is that failure; a ``reason`` that ends with a colon is its beginning."""
    assert isinstance(answer, Failure)
    assert answer.seen is seen
    assert answer.reason.startswith(reason.rstrip(":")) if reason.endswith(":") else answer.reason == reason
    return answer


def replied(answer: Answer | None) -> Reply:
    """It is a reply."""
    assert isinstance(answer, Reply)
    return answer


def proves_nothing(answer: Answer | None) -> None:
    """Whatever it is, it leaves the cancel in doubt."""
    assert answer is not None
    assert classify(Call.CANCEL, REF, answer).means is Means.UNCLEAR


async def passed(condition: Callable[[], object]) -> None:
    """Let the loop run until something is so."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)
