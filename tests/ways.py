"""Clients of the exchange over either transport, for tests that make one call after the other."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from producer.message import Call
from tests.loopback import Behaviour, Server
from worker.classify import Failure, OrderRef, Ref, Reply
from worker.clock import ServerClock
from worker.daemon import WorkerLoop
from worker.exchange import Answer, Exchange, Sent
from worker.signing import Credential
from worker.transport import Route
from worker.transport_asyncio import AsyncioTransport
from worker.transport_requests import RequestsTransport

__all__ = [
    "API_KEY",
    "BRIEF_MS",
    "REF",
    "SECRET",
    "TOTAL_S",
    "WAYS",
    "Bench",
    "Client",
    "bounded",
    "failed",
    "passed",
    "replied",
    "several",
]

T = TypeVar("T")

WAYS = ("asyncio", "requests")
SECRET = "s3cr3t-canary-of-the-account"
API_KEY = "key-of-the-account"
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

    def call(self, call: Call, credential: Credential, ref: Ref = REF) -> Reply | Failure:
        """One signed call that may go."""
        answer = self.run(self.exchange.call(call, credential, ref))
        assert answer is not None
        return answer

    def cancel(self, credential: Credential, ref: OrderRef = REF) -> Reply | Failure:
        """A signed DELETE."""
        return self.call(Call.CANCEL, credential, ref)

    def patient_cancel(self, credential: Credential, ref: OrderRef = REF) -> Reply | Failure:
        """The same, waited for as long as answers take."""
        answer = self.run(self.exchange.call(Call.CANCEL, credential, ref, sent=Sent(late=lambda _: None)))
        assert answer is not None
        return answer

    def query(self, credential: Credential, ref: OrderRef = REF) -> Reply | Failure:
        """A signed GET."""
        return self.call(Call.QUERY, credential, ref)

    def close(self) -> None:
        """Close connections and loop."""

        async def close() -> None:
            self.exchange.close()

        self.run(close())
        self._runner.close()
        assert self._troubles == []  # what nobody awaited, or a callback raised


class Bench:
    """Starts servers and clients of one way, and closes them all."""

    def __init__(self, way: str = "asyncio") -> None:
        self.way = way
        self._open = contextlib.ExitStack()

    def server(self, behaviour: Behaviour, tls: Any = None) -> Server:
        """A server that does so with each connection."""
        server = Server(behaviour, tls)
        self._open.callback(server.close)
        return server

    def client(self, url: str, clock: ServerClock | None = None, **options: Any) -> Client:
        """A client; ``options`` are those of route, transport and exchange."""
        options.setdefault("recv_window_ms", 5_000)
        client = Client(self.way, url, clock or ServerClock(), options)
        self._open.callback(client.close)
        return client

    def to(self, behaviour: Behaviour, **options: Any) -> tuple[Server, Client]:
        """A server, and a client of it."""
        server = self.server(behaviour)
        return server, self.client(server.url, **options)

    def impatient(self, behaviour: Behaviour) -> tuple[Server, Client]:
        """The same for break-downs."""
        return self.to(behaviour, recv_window_ms=BRIEF_MS)

    def close(self) -> None:
        """End everything."""
        self._open.close()


@contextlib.contextmanager
def bounded(seconds: float = TOTAL_S) -> Iterator[None]:
    """What runs inside may take ``seconds`` and the slack of a busy machine."""
    started_at = time.monotonic()
    yield
    assert time.monotonic() - started_at < seconds + _SLACK_S


def failed(answer: Answer | None, *, seen: bool, reason: str) -> None:
    """It is that failure; a ``reason`` that ends with a colon leaves the class of the error open."""
    assert isinstance(answer, Failure)
    assert answer.seen is seen
    assert answer.reason.startswith(reason) if reason.endswith(":") else answer.reason == reason


def replied(answer: Answer | None) -> Reply:
    """It is a reply."""
    assert isinstance(answer, Reply)
    return answer


async def several(client: Client, credential: Credential, count: int, first: int = 1) -> list[Answer | None]:
    """As many calls at once, for the orders from ``first`` on."""
    refs = [OrderRef(first + n) for n in range(count)]
    return await asyncio.gather(*[client.exchange.call(Call.CANCEL, credential, ref) for ref in refs])


async def passed(condition: Callable[[], object]) -> None:
    """Let the loop run until something is so."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)
