"""The asyncio client against a real server, in asyncio's debug mode: the same promises, and clean cancellation."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import pytest
import redis
import redis.asyncio

from producer import (
    AsyncCancelClient,
    AsyncTicket,
    CancelClient,
    CancelRequest,
    InvalidRequest,
    NotDurable,
    OutcomeKind,
    QueueUnavailable,
    UnknownRequest,
    WaitTimeout,
)
from producer.keys import Keys
from producer.untrusted import MalformedMessage
from tests.exporting import append, record
from tests.fault.proxy import Proxy
from tests.servers import Valkey, Workers, confirms_durability, running_valkey, stopped
from tests.strategies import CONNECTIONS
from worker.sandbox.control import RunningExchange

KEYS = Keys()
T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run in debug mode: what is never awaited, or left open, becomes a warning, hence an error."""
    return asyncio.run(main, debug=True)


async def eventually(condition: Callable[[], Awaitable[object]], timeout_s: float = 10) -> None:
    """Poll until ``condition`` holds."""
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.01)


async def first(ledger: AsyncIterator[T]) -> T:
    """The first of what comes."""
    return await anext(ledger)


def listening(connection: redis.Redis) -> Callable[[], Awaitable[object]]:
    """Asks whether a client waits for news at the server."""

    async def ask() -> object:
        return (await asyncio.to_thread(connection.info, "clients"))["blocked_clients"]

    return ask


def test_it_enqueues_what_the_other_client_enqueues(valkey: Valkey, client: CancelClient) -> None:
    """Both clients make the same job of the same request, and join each other's."""

    async def main() -> AsyncTicket:
        async with AsyncCancelClient.from_url(valkey.url) as mine:
            return await mine.cancel(algo_id=17, symbol="BTCUSDT", tag="t", deadline_s=9, urgent=True)

    ticket = run(main())
    joined = client.cancel(algo_id=17)
    other = client.cancel(algo_id=18, symbol="BTCUSDT", tag="t", deadline_s=9, urgent=True)

    assert (joined.id, joined.duplicate, ticket.duplicate) == (ticket.id, True, False)
    assert isinstance(ticket, AsyncTicket)
    assert ticket.as_dict() == {
        "id": ticket.id,
        "algo_id": 17,
        "client_algo_id": None,
        "account": "default",
        "duplicate": False,
    }
    jobs = [client.job(job_id).to_dict() for job_id in (ticket.id, other.id)]
    for job in jobs:
        for name in ("created_at", "enqueued_at", "last_heartbeat", "data", "description"):
            assert job.pop(name)
    assert jobs[0] == jobs[1]


def test_many_keep_their_order_and_cost_a_call_a_hundred(valkey: Valkey, connection: redis.Redis) -> None:
    """Tickets stand in the order of the requests, requests for one order share one, and the server may serve others
    after each hundred."""

    async def main() -> list[AsyncTicket]:
        async with AsyncCancelClient.from_url(valkey.url) as client:
            await client.cancel(algo_id=1)
            connection.config_resetstat()
            return await client.cancel_many(CancelRequest(algo_id=1 + number % 1250) for number in range(2500))

    tickets = run(main())

    assert [ticket.request.algo_id for ticket in tickets] == [1 + number % 1250 for number in range(2500)]
    assert [ticket.id for ticket in tickets[:1250]] == [ticket.id for ticket in tickets[1250:]]
    statistics: Any = connection.info("commandstats")
    assert statistics["cmdstat_evalsha"]["calls"] == 25


def test_a_whole_life_on_every_kind_of_connection(valkey: Valkey, workers: Workers, exchange: RunningExchange) -> None:
    """Cancel, wait, look up, read the ledger, retry and status give on RESP2 and RESP3, decoded or not, the same."""
    workers.start()
    orders = [order.algo_id for order in exchange.add_orders(len(CONNECTIONS))]

    async def main(options: dict[str, Any], algo_id: int) -> None:
        connection = redis.asyncio.Redis(port=valkey.port, socket_timeout=2, **options)
        async with AsyncCancelClient(connection) as client:
            ticket, refused = await client.cancel_many(
                [CancelRequest(algo_id=algo_id), CancelRequest(algo_id=1, account="nobody")]
            )
            outcome, failed = await asyncio.gather(ticket.wait(10), refused.wait(10))
            assert (outcome.kind, outcome.algo_id) == (OutcomeKind.CANCELLED, algo_id)
            assert failed.kind is OutcomeKind.REFUSED
            assert await client.outcome(ticket.id) == outcome
            assert await client.outcomes_of([ticket.id, "nobody"]) == {ticket.id: outcome}
            ledger = [ended async for ended in client.outcomes()]
            assert {ended.id for _, ended in ledger} == {ticket.id, refused.id}
            assert [ended async for ended in client.outcomes("$")] == []
            assert await client.failed_ids() == [refused.id]
            assert await client.statuses([ticket.id, refused.id]) == ["finished", "failed"]
            assert (await client.status()).outcomes == {"cancelled": 1, "refused": 1}
            with pytest.raises(UnknownRequest, match="nobody"):
                await client.retry([refused.id, "nobody"])
            assert await client.retry([refused.id, "nobody"], missing_ok=True) == [refused.id]
            assert (await refused.wait(10)).run == 2
            await connection.delete(KEYS.outcomes, KEYS.failed)

    for options, algo_id in zip(CONNECTIONS, orders, strict=True):
        run(main(options, algo_id))


def test_the_ledger_can_be_followed_and_left(valkey: Valkey, workers: Workers, exchange: RunningExchange) -> None:
    """`async for` over the followed ledger gives outcomes as they come, for longer than the connection's time-out."""
    orders = [order.algo_id for order in exchange.add_orders(3)]
    workers.start()

    async def follow(client: AsyncCancelClient) -> list[int | None]:
        seen = []
        async for _, outcome in client.outcomes("$", follow=True):
            seen.append(outcome.algo_id)
            if len(seen) == 2:
                break
        return seen

    async def main() -> None:
        async with AsyncCancelClient.from_url(valkey.url, timeout_s=0.4) as client:
            await (await client.cancel(algo_id=orders[0])).wait(10)
            follower = asyncio.create_task(follow(client))
            await asyncio.sleep(0.6)  # beyond the time-out, with nothing to read
            for algo_id in orders[1:]:
                await (await client.cancel(algo_id=algo_id)).wait(10)
            assert await asyncio.wait_for(follower, 10) == orders[1:]

    run(main())


def test_what_cannot_be_read_costs_itself_alone(
    valkey: Valkey, connection: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A strange entry or record is passed over with a warning that names it; asked for alone it is an error."""
    good = f"{1:032x}"
    connection.set(KEYS.outcome_prefix + good, record(1))
    connection.set(KEYS.outcome_prefix + "bad", "[]")
    strange: Any = connection.xadd(KEYS.outcomes, {"outcome": "{"})
    append(connection, record(1))

    async def main() -> None:
        async with AsyncCancelClient.from_url(valkey.url) as client:
            assert [outcome.id async for _, outcome in client.outcomes()] == [good]
            assert list(await client.outcomes_of(["bad", good])) == [good]
            with pytest.raises(MalformedMessage, match="outcome of bad"):
                await client.wait("bad")

    run(main())
    entry, outcome = (each.getMessage() for each in caplog.records if each.name == "producer")
    assert strange.decode() in entry
    assert "outcome of bad" in outcome


def test_the_wait_ends_in_time_or_with_the_outcome(valkey: Valkey, workers: Workers, exchange: RunningExchange) -> None:
    """WaitTimeout comes when the time is up; a later wait on the same ticket gets the outcome as it is recorded."""
    (order,) = exchange.add_orders()

    async def main() -> None:
        async with AsyncCancelClient.from_url(valkey.url) as client:
            ticket = await client.cancel(algo_id=order.algo_id)
            began = time.monotonic()
            with pytest.raises(WaitTimeout, match=ticket.id):
                await ticket.wait(0.2)
            assert time.monotonic() - began < 0.7
            waiters = [asyncio.create_task(ticket.wait()) for _ in range(3)]
            await asyncio.to_thread(workers.start)
            assert {outcome.kind for outcome in await asyncio.gather(*waiters)} == {OutcomeKind.CANCELLED}

    run(main())


def test_a_cancelled_wait_leaves_nothing_behind(valkey: Valkey, connection: redis.Redis) -> None:
    """After CancelledError the client goes on as before, and holds no more connections than before."""

    async def main() -> None:
        async with AsyncCancelClient.from_url(valkey.url) as client:
            ticket = await client.cancel(algo_id=17)
            for _ in range(5):
                waiter = asyncio.create_task(ticket.wait())
                await eventually(listening(connection))
                waiter.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiter
                assert len(await asyncio.to_thread(connection.client_list)) == 3  # its own, calls, the listener
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await ticket.wait()
            assert (await client.cancel(algo_id=17)).id == ticket.id

    run(main())
    assert len(connection.client_list()) == 1


def test_a_call_that_is_cancelled_half_way_spoils_no_connection(valkey: Valkey, connection: redis.Redis) -> None:
    """An answer that comes after the cancellation is never taken for the answer to the next call."""

    async def main() -> None:
        async with AsyncCancelClient.from_url(valkey.url) as client:
            ticket = await client.cancel(algo_id=17)
            for ticks in range(12):
                task = asyncio.create_task(client.cancel_many([CancelRequest(algo_id=18), CancelRequest(algo_id=19)]))
                for _ in range(ticks):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                assert await client.outcome(ticket.id) is None
                assert (await client.cancel(algo_id=17)).id == ticket.id
            follower = asyncio.create_task(first(client.outcomes(follow=True)))
            await eventually(listening(connection))
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)
            assert await client.failed_ids() == []

    run(main())
    assert len(set(connection.lrange(KEYS.waiting, 0, -1))) <= 3


def test_a_repeated_enqueue_finds_itself(valkey: Valkey, connection: redis.Redis) -> None:
    """When the answer to an enqueue is lost, the client asks again and the request is on the queue once."""

    async def main(proxy: Proxy) -> AsyncTicket:
        async with AsyncCancelClient.from_url(proxy.redis_url) as client:
            await client.cancel(algo_id=1)
            proxy.limit_data(b"EVALSHA")
            return await client.cancel(algo_id=17)

    with Proxy(valkey.port) as proxy:
        ticket = run(main(proxy))
        assert proxy.count.replies_lost == 1

    assert not ticket.duplicate
    assert connection.lrange(KEYS.waiting, 1, -1) == [ticket.id.encode()]


def test_bad_days_are_told_in_time(valkey: Valkey) -> None:
    """A stopped server, a dead one, a refused login and a bad field end in the same errors as with the other client."""

    async def silent() -> None:
        async with AsyncCancelClient.from_url(valkey.url, timeout_s=0.2) as client:
            ticket = await client.cancel(algo_id=1)
            with stopped(valkey):
                for call in (client.cancel(algo_id=2), client.outcome("x"), ticket.wait(5), client.failed_ids()):
                    began = time.monotonic()
                    with pytest.raises(QueueUnavailable):
                        await call
                    assert time.monotonic() - began < 1
            assert (await client.cancel(algo_id=1)).duplicate

    async def dying(server: Valkey) -> None:
        async with AsyncCancelClient.from_url(server.url) as client:
            waiter = asyncio.create_task((await client.cancel(algo_id=1)).wait(20))
            await eventually(listening(redis.Redis(port=server.port)))
            server.stop(signal.SIGKILL)
            with pytest.raises(QueueUnavailable):
                await asyncio.wait_for(waiter, 5)
            with pytest.raises(InvalidRequest, match="algo_id=0"):
                await client.cancel(algo_id=0)
            with pytest.raises(InvalidRequest, match="after="):
                client.outcomes("yesterday")
            server.start()
            assert not (await client.cancel(algo_id=2)).duplicate
            await client._redis.config_set("requirepass", "x")
        async with AsyncCancelClient.from_url(server.url) as client:
            with pytest.raises(QueueUnavailable, match="refused the login"):
                await client.cancel(algo_id=1)

    run(silent())
    with running_valkey() as server:
        run(dying(server))


@pytest.mark.parametrize("appendonly", ["yes", "no"])
def test_durable_is_confirmed_or_said_not_to_be(appendonly: str) -> None:
    """With an append-only file the request survives SIGKILL; without one NotDurable carries the tickets."""

    async def main(server: Valkey) -> None:
        async with AsyncCancelClient.from_url(server.url) as client:
            if appendonly == "no" or not confirms_durability():
                with pytest.raises(NotDurable) as caught:
                    await client.cancel(algo_id=17, durable=True)
                (ticket,) = caught.value.tickets
            else:
                ticket = await client.cancel(algo_id=17, durable=True)
                server.stop(signal.SIGKILL)
                server.start()
            assert (await client.cancel(algo_id=17)).id == ticket.id

    with running_valkey("--appendonly", appendonly, "--appendfsync", "always") as server:
        run(main(server))
