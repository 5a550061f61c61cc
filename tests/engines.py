"""A worker's engine without RQ around it, in a loop of its own, and exchanges that answer as a test says."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Self

import redis

from producer import CancelClient, CancelRequest, Ticket
from tests.conftest import API_KEY, API_SECRET
from tests.loopback import Behaviour, Peer, Server
from worker.cancel import Canceller
from worker.clock import ServerClock, SleepWatch
from worker.daemon import WorkerLoop
from worker.engine import Engine
from worker.exchange import Exchange
from worker.patience import FLOOR_S
from worker.rate_gate import Gate
from worker.settings import Settings
from worker.store import Store
from worker.transport import Route
from worker.transport_asyncio import AsyncioTransport
from worker.wiring import lease_of, open_engine, open_redis, open_store

KEYS = {"BINANCE_API_KEY": API_KEY, "BINANCE_API_SECRET": API_SECRET}
#: How long an answer of an exchange is held back at the most, s: no test hangs for good.
HELD_S = 30.0


@dataclass(frozen=True)
class Parts:
    """What an engine is put together from; a test may put something in front of one of them."""

    store: Store
    canceller: Canceller
    gate: Gate
    exchange: Exchange


class RunningEngine:
    """An engine that works in a thread until the end of a block, put together as a worker's is, with its beats.

    ``measures``: the exchange's clock, before it begins. ``patience_s``: the least that is waited for an answer.
    """

    def __init__(
        self,
        redis_url: str,
        exchange_url: str,
        size: int,
        name: str = "engine",
        *,
        ca_file: str | None = None,
        sleep: SleepWatch | None = None,
        change: Callable[[Parts], None] = lambda _: None,
        measures: bool = False,
        patience_s: float = FLOOR_S,
        **settings: str,
    ) -> None:
        said = {"REDIS_URL": redis_url, "BINANCE_BASE_URL": exchange_url, "WORKER_CONCURRENCY": str(size)}
        self.settings = Settings.from_env({**KEYS, **said, **settings})
        self._connection = open_redis(self.settings)
        self._sleep, self._change = sleep, change
        self._measures, self._patience_s = measures, patience_s
        self.store = open_store(self.settings, name, "cancels")
        self._name, self._route = name, Route(exchange_url, ca_file=ca_file)
        self.engine: Engine
        self.gate: Gate
        self.beats = threading.Event()
        self.beats.set()
        self._loop: asyncio.AbstractEventLoop
        self._ended: Future[None] = Future()
        self._stands = threading.Event()
        self._thread = threading.Thread(target=self._live, name=name)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._stands.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        try:
            self._ended.result(15)
        finally:
            self._thread.join(5)
            self._connection.close()

    def stop(self) -> None:
        """Tell it to stop; it may have ended already."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.engine.stop)

    def stand_still(self, seconds: float) -> None:
        """Have the loop do nothing for so long, as a machine that is too busy for it does."""
        self._loop.call_soon_threadsafe(time.sleep, seconds)

    def has_ended(self) -> bool:
        """Whether it was stopped, and everything in its hands is completed."""
        return self._ended.done()

    def is_closed(self) -> bool:
        """Whether its gate is closed, as far as it knows."""
        return self.gate.closed(self.store.clock.now_ms())

    def _live(self) -> None:
        try:
            with asyncio.Runner(loop_factory=WorkerLoop) as runner:
                runner.run(self._work())
            self._ended.set_result(None)
        except BaseException as error:  # noqa: BLE001 - it is the test's to see
            self._ended.set_exception(error)
            self._stands.set()

    async def _work(self) -> None:
        self._loop = asyncio.get_running_loop()
        clock, settings = ServerClock(), self.settings
        transport = AsyncioTransport(self._route, pool_size=settings.concurrency + 2)
        exchange = Exchange(
            transport, recv_window_ms=settings.recv_window_ms, clock=clock, least_patience_s=self._patience_s
        )
        if self._measures:
            await exchange.sync_time()
        parts = (settings, exchange, clock, self.store, self._connection, self._name)
        self.engine = open_engine(*parts, life_s=60, sleep=self._sleep)
        self.gate = self.engine.canceller.gate
        self._change(Parts(self.store, self.engine.canceller, self.gate, exchange))
        beating = asyncio.create_task(self._beat())
        self._stands.set()
        try:
            await self.engine.run()
        finally:
            beating.cancel()
            exchange.close()

    async def _beat(self) -> None:
        while True:
            with suppress(redis.RedisError):
                if self.beats.is_set():
                    await self.engine.beat(None)
            await asyncio.sleep(min(lease_of(self.settings) / 4, 1))


# ---- an exchange that answers as a test says ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that the exchange has read."""

    method: str
    path: str
    algo_id: int | None


@dataclass(frozen=True, slots=True)
class Said:
    """An answer of the exchange."""

    status: HTTPStatus
    body: dict[str, Any]
    retry_after_s: int | None = None

    def wire(self) -> bytes:
        """It as HTTP/1.1."""
        body = json.dumps(self.body).encode()
        fields = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        if self.retry_after_s is not None:
            fields += f"Retry-After: {self.retry_after_s}\r\n"
        return f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\n{fields}\r\n".encode() + body


CLOCK_ERROR = Said(HTTPStatus.BAD_REQUEST, {"code": -1021, "msg": "Timestamp outside of the recvWindow."})
OVERLOADED = Said(HTTPStatus.SERVICE_UNAVAILABLE, {"code": -1008, "msg": "Server is currently overloaded."})
TOO_MANY = Said(HTTPStatus.TOO_MANY_REQUESTS, {"code": -1003, "msg": "Too many requests."}, 60)
BANNED = Said(HTTPStatus.IM_A_TEAPOT, {"code": -1003, "msg": "Way too many requests; banned."}, 60)


def enqueued(client: CancelClient, count: int, first: int = 1) -> list[Ticket]:
    """New jobs, for orders that only such an exchange knows."""
    return client.cancel_many(CancelRequest(algo_id=first + n) for n in range(count))


def well(asked: Asked) -> Said:
    """What an exchange without faults says."""
    if asked.path.endswith("/time"):
        return Said(HTTPStatus.OK, {"serverTime": time.time_ns() // 1_000_000})
    if asked.path.endswith("/exchangeInfo"):
        return Said(HTTPStatus.OK, {})
    order: dict[str, Any] = {"algoId": asked.algo_id, "clientAlgoId": "x"}
    if asked.method == "GET":
        return Said(HTTPStatus.OK, {**order, "symbol": "BTCUSDT", "algoStatus": "NEW", "actualOrderId": ""})
    return Said(HTTPStatus.OK, {**order, "code": "200", "msg": "success"})


@dataclass
class Answerer:
    """An exchange that answers each request as ``behave`` says, in a thread for each connection.

    What ``holds`` is said of is answered when ``may_answer`` is set. With ``tls`` the first ``opened`` connections are
    opened at once, all others when ``may_open`` is set.
    """

    behave: Callable[[Asked], Said] = well
    holds: Callable[[Asked], object] = lambda _: False
    tls: ssl.SSLContext | None = None
    opened: int = 0
    asked: list[Asked] = field(default_factory=list)
    may_answer: threading.Event = field(default_factory=threading.Event)
    may_open: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        behaviour: Behaviour = self._serve
        self._server = Server(behaviour)
        return self

    def __exit__(self, *_: object) -> None:
        self.may_open.set()
        self.may_answer.set()
        self._server.close()

    @property
    def heads(self) -> list[bytes]:
        """All that was asked, as it came."""
        return self._server.heads

    @property
    def url(self) -> str:
        """Where it is."""
        return self._server.url.replace("http", "https" if self.tls else "http")

    def count(self) -> Counter[str]:
        """How many requests of each kind came: by their method, or as `time`."""
        return Counter("time" if asked.path.endswith("/time") else asked.method for asked in list(self.asked))

    def _serve(self, peer: Peer) -> None:
        if self.tls is None:
            self._answer(peer)
            return
        if peer.number > self.opened:
            self.may_open.wait(HELD_S)
        with self.tls.wrap_socket(peer.sock, server_side=True) as peer.sock:
            self._answer(peer)

    def _answer(self, peer: Peer) -> None:
        while head := peer.read_head().decode():
            method, target, *_ = head.split()
            path, _, query = target.partition("?")
            algo_id = re.search(r"algoId=(\d+)", query)
            asked = Asked(method, path, int(algo_id[1]) if algo_id else None)
            self.asked.append(asked)
            if self.holds(asked):
                self.may_answer.wait(HELD_S)
            peer.send(self.behave(asked).wire())


def every(asked: Asked) -> bool:
    """All that is asked about orders is held back."""
    return asked.algo_id is not None


def clock(asked: Asked) -> bool:
    """What asks for the time is held back."""
    return asked.path.endswith("/time")
