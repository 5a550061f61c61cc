"""How many connections of Redis the parts hold, counted by the server: small plans allow twenty."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import pytest
import redis

from producer import AsyncCancelClient, CancelClient, CancelRequest, NotDurable, OutcomeKind
from producer.protocol import TicketFields
from producer.web.app import create_app
from tests.integration.conftest import NewFleet
from tests.servers import Valkey, Workers, eventually, running_valkey
from tests.webpages import TOKEN, outcome, settle
from worker.redis_link import MAX_CONNECTIONS
from worker.sandbox.control import RunningExchange

#: What the README promises of a worker process, and of a client, whatever number of threads or tasks uses it.
PER_WORKER = 4
PER_CLIENT = 4
#: Of a worker's, those of its event loop: one for the claim that waits at the queue, one for all else.
IN_THE_LOOP = 2
OURS = "the-test"
GREETINGS = ("NULL", "hello", "auth", "select", "client|")
PRODUCER = "a-producer"


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    """A server to which nobody else has a connection left."""
    with running_valkey("--appendonly", "no") as server:
        yield server


class Count:
    """Looks at CLIENT LIST all the time, and keeps the most connections of workers and of producers that it saw."""

    def __init__(self, port: int) -> None:
        self.workers = 0
        self.producers = 0
        self.looks = 0
        self._redis = redis.Redis(port=port, client_name=OURS, socket_timeout=5)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._redis.close()

    def now(self) -> tuple[int, int]:
        """Connections of workers and of producers right now.

        One that has only just been made has no name yet, and nothing but greetings has been said on it.
        """
        greeted = [each for each in self._redis.client_list() if not each["cmd"].startswith(GREETINGS)]
        names = [each["name"] for each in greeted if each["name"] != OURS]
        producers = names.count(PRODUCER)
        return len(names) - producers, producers

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                workers, producers = self.now()
            except redis.RedisError:  # it is being restarted
                time.sleep(0.01)
                continue
            self.workers, self.producers = max(self.workers, workers), max(self.producers, producers)
            self.looks += 1
            time.sleep(0.002)


def burst(url: str, exchange: RunningExchange, count: int) -> None:
    """Ask for the cancels of fresh orders and wait for all."""
    orders = exchange.add_orders(count)
    with CancelClient.from_url(url, client_name=PRODUCER, timeout_s=10) as client:
        tickets = client.cancel_many(CancelRequest(algo_id=order.algo_id) for order in orders)
        eventually(lambda: len(client.outcomes_of(t.id for t in tickets)) == count, 60, "all have their outcome")
        kinds = {outcome.kind for outcome in client.outcomes_of(ticket.id for ticket in tickets).values()}
    assert kinds == {OutcomeKind.CANCELLED}


def test_a_worker_holds_four(valkey: Valkey, workers: Workers, exchange: RunningExchange) -> None:
    """However many requests are in flight, a worker process holds at most four connections."""
    exchange.set_latency_ms(300)
    workers.start(WORKER_CONCURRENCY="256")
    with Count(valkey.port) as count:
        burst(valkey.url, exchange, 700)

    assert exchange.stats().peak_in_flight >= 256 * 0.8
    assert count.looks > 20
    assert IN_THE_LOOP <= count.workers <= PER_WORKER == IN_THE_LOOP + MAX_CONNECTIONS


def test_after_a_restart_of_redis(durable: Valkey, exchange: RunningExchange, new_fleet: NewFleet) -> None:
    """Connections that were lost are replaced, not added to."""
    worker = new_fleet(REDIS_URL=durable.url).start(WORKER_CONCURRENCY="256")
    burst(durable.url, exchange, 100)
    with Count(durable.port) as count:
        for how in (signal.SIGKILL, signal.SIGTERM):
            durable.stop(how)
            durable.start()
            burst(durable.url, exchange, 300)
    assert count.looks > 20
    assert count.workers <= PER_WORKER
    assert worker.stop() == 0


def test_a_stopped_worker_holds_none(valkey: Valkey, workers: Workers, exchange: RunningExchange) -> None:
    """What a worker held it gives back when it leaves."""
    worker = workers.start()
    burst(valkey.url, exchange, 20)
    assert worker.stop() == 0
    with Count(valkey.port) as count:
        eventually(lambda: count.now()[0] == 0, what="no connection of a worker is left")


def test_a_client_holds_one_and_one_more_while_it_waits(
    valkey: Valkey, workers: Workers, exchange: RunningExchange
) -> None:
    """A client in one thread holds one connection, and one more that listens while somebody waits."""
    (order,) = exchange.add_orders(1)
    with Count(valkey.port) as count, CancelClient.from_url(valkey.url, client_name=PRODUCER) as client:
        ticket = client.cancel(algo_id=order.algo_id)
        client.cancel_many(CancelRequest(number) for number in range(1, 1500))
        client.status()
        list(client.outcomes())
        assert count.now()[1] == 1
        waiting = threading.Thread(target=ticket.wait, args=(20,))
        waiting.start()
        eventually(lambda: count.now()[1] == 2, what="it waits")
        workers.start(CANCEL_DEADLINE_S="5", NOT_FOUND_HORIZON_S="0")
        waiting.join()
        assert client.outcome(ticket.id) is not None
    assert count.producers == 2
    with Count(valkey.port) as after:
        eventually(lambda: after.now()[1] == 0, what="a closed client holds none")


@pytest.fixture
def crowded(new_fleet: NewFleet) -> Iterator[Valkey]:
    """A server of a small plan: twenty connections, a worker's four and the test's among them."""
    with running_valkey("--maxclients", "20") as server:
        new_fleet(REDIS_URL=server.url).start()
        yield server


def test_two_hundred_threads_share_four(crowded: Valkey, exchange: RunningExchange) -> None:
    """Threads that cancel, wait, follow the ledger and ask for durability on one client all get their answers."""
    orders = exchange.add_orders(200)

    def ask(number: int) -> OutcomeKind:
        if number % 50 == 0:
            next(client.outcomes(follow=True))
        try:
            ticket: TicketFields = client.cancel(algo_id=orders[number].algo_id, durable=number % 20 == 0)
        except NotDurable as error:
            (ticket,) = error.tickets
        assert ticket.request.algo_id == orders[number].algo_id
        outcome = client.wait(ticket.id, 60)
        assert outcome.algo_id == orders[number].algo_id
        return outcome.kind

    with (
        Count(crowded.port) as count,
        CancelClient.from_url(crowded.url, client_name=PRODUCER, timeout_s=20) as client,
        ThreadPoolExecutor(200) as pool,
    ):
        kinds = list(pool.map(ask, range(200)))

    assert kinds == [OutcomeKind.CANCELLED] * 200
    assert count.producers <= PER_CLIENT


def test_a_thousand_tasks_share_four(crowded: Valkey, exchange: RunningExchange) -> None:
    """The same for tasks of one loop."""
    orders = exchange.add_orders(1000)

    async def ask(client: AsyncCancelClient, number: int) -> OutcomeKind:
        ticket = await client.cancel(algo_id=orders[number].algo_id)
        outcome = await ticket.wait(60)
        assert (ticket.request.algo_id, outcome.algo_id) == (orders[number].algo_id,) * 2
        return outcome.kind

    async def main() -> list[OutcomeKind]:
        async with AsyncCancelClient.from_url(crowded.url, client_name=PRODUCER, timeout_s=20) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(1000)))

    with Count(crowded.port) as count:
        kinds = asyncio.run(main())

    assert kinds == [OutcomeKind.CANCELLED] * 1000
    assert count.producers <= PER_CLIENT


def test_the_operators_pages_hold_two(valkey: Valkey, connection: redis.Redis) -> None:
    """However many pages are loaded at a time, searches and retries among them, they share two connections."""
    pipeline = connection.pipeline(transaction=False)
    for number in range(1500):
        settle(pipeline, outcome(f"r{number}", algo_id=1 + number % 25))
    pipeline.execute()
    paths = (
        "/",
        "/search?q=7",
        "/failed",
        "/failed?kind=not_found&account=default",
        "/requests/r7",
        "/requests/r-none",
    )
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with Count(valkey.port) as count, CancelClient.from_url(valkey.url, client_name=PRODUCER) as client:
        app = create_app(client, TOKEN)

        def load(number: int) -> set[int]:
            pages = app.test_client()
            answers = [pages.get(path, headers=headers) for path in (*paths[number % 6 :], *paths[: number % 6])]
            answers.append(pages.post("/retry/start", data={"id": f"r{number}"}, headers=headers))
            return {answer.status_code for answer in answers}

        with ThreadPoolExecutor(12) as pool:  # as many as the server has threads
            codes = set().union(*pool.map(load, range(12)))

    assert codes <= {200, 303, 404, 503}  # 503: it was not its turn in time
    assert {200, 303, 404} <= codes
    assert count.looks > 20
    assert 1 <= count.producers <= 2
