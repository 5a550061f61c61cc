"""Whose answer it is: across forks, event loops, lost replies and forged records nobody is told of another's order."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis
import redis.asyncio

from producer import AsyncCancelClient, CancelClient, OutcomeKind, QueueUnavailable
from producer.keys import JobField, Keys
from producer.message import Outcome
from producer.untrusted import MalformedMessage
from tests.exporting import append
from tests.fault.proxy import Proxy
from tests.servers import Valkey, Workers, eventually
from tests.strategies import fail, talking

KEYS = Keys()
CHILDREN = 12


def ask(client: CancelClient, first: int) -> None:
    """Cancels whose tickets must be of the orders that were asked for, and looks that must be of the tickets."""
    for number in range(first, first + 60):
        ticket = client.cancel(algo_id=number)
        assert ticket.request.algo_id == number
        assert client.statuses([ticket]) == ["queued"]


async def ask_async(client: AsyncCancelClient, first: int) -> None:
    """The same for tasks."""
    for number in range(first, first + 60, 6):
        tickets = await asyncio.gather(*(client.cancel(algo_id=number + each) for each in range(6)))
        assert [ticket.request.algo_id for ticket in tickets] == list(range(number, number + 6))
        assert await client.statuses(tickets) == ["queued"] * 6


def orders(connection: redis.Redis) -> list[str]:
    """The order of each job that waits."""
    ids: Any = connection.lrange(KEYS.waiting, 0, -1)
    found: Any = [connection.hget(KEYS.job_prefix + job_id.decode(), JobField.ORDER) for job_id in ids]
    return sorted(order.decode() for order in found)


# ---- forks ----------------------------------------------------------------------------------------------------------


def test_forked_children_share_no_connection(valkey: Valkey, connection: redis.Redis) -> None:
    """Parent and many children, forked while threads ask and one waits, each get their own tickets, all of them."""
    with CancelClient.from_url(valkey.url, timeout_s=20) as client:
        held = client.cancel(algo_id=1)
        waiter = threading.Thread(target=lambda: client.wait_many([held], 60))
        waiter.start()
        busy = threading.Thread(target=ask, args=(client, 100_000))
        busy.start()
        pids = []
        for number in range(CHILDREN):
            pid = os.fork()
            if pid == 0:
                signal.alarm(60)
                code = 1
                try:
                    ask(client, 1000 * (number + 1))
                    assert held.id in client.wait_many([held], 0.1).standing
                    code = 0
                finally:
                    os._exit(code)
            pids.append(pid)
        ask(client, 200_000)
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * CHILDREN
        busy.join()
        connection.set(KEYS.outcome_prefix + held.id, Outcome(held.id, 1, OutcomeKind.CANCELLED).encode())
        append(connection, Outcome(held.id, 1, OutcomeKind.CANCELLED).encode())
        waiter.join(20)
        assert not waiter.is_alive()
    assert len(orders(connection)) == len(set(orders(connection))) == 1 + 60 * (CHILDREN + 2)


def test_forked_children_of_a_loop_share_no_connection(valkey: Valkey, connection: redis.Redis) -> None:
    """The asyncio client on both sides of many forks: no side reads the other's answers or disturbs its loop."""

    async def main(client: AsyncCancelClient) -> None:
        await ask_async(client, 100_000)
        waiter = asyncio.create_task(client.wait_many(["nobody-knows", (await client.cancel(algo_id=1))], 30))
        busy = asyncio.create_task(ask_async(client, 200_000))
        pids = []
        for number in range(CHILDREN):
            pid = os.fork()
            if pid == 0:
                signal.alarm(60)
                code = 1
                try:
                    asyncio.run(ask_async(client, 1000 * (number + 1)))
                    code = 0
                finally:
                    os._exit(code)
            pids.append(pid)
            await asyncio.sleep(0)
        await busy
        assert [(await asyncio.to_thread(os.waitpid, pid, 0))[1] for pid in pids] == [0] * CHILDREN
        await ask_async(client, 300_000)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        await client.close()

    asyncio.run(main(AsyncCancelClient.from_url(valkey.url, timeout_s=20)))
    assert len(orders(connection)) == len(set(orders(connection))) == 1 + 60 * (CHILDREN + 3)


# ---- loops ----------------------------------------------------------------------------------------------------------


def test_a_second_run_works(valkey: Valkey, connection: redis.Redis) -> None:
    """One client serves one `asyncio.run` after the other, and loops of several threads at once."""
    client = AsyncCancelClient.from_url(valkey.url)

    async def once(number: int) -> str:
        ticket = await client.cancel(algo_id=7)
        assert list((await client.wait_many([ticket], 0.05)).standing) == [ticket.id]
        await ask_async(client, number * 1000)
        return ticket.id

    runs = [asyncio.run(once(number)) for number in range(1, 4)]
    found: list[str] = []
    threads = [threading.Thread(target=lambda n=n: found.append(asyncio.run(once(n)))) for n in range(4, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(runs + found)) == 1
    eventually(lambda: len(connection.client_list()) == 1, what="each loop has closed what it opened")


# ---- records and answers --------------------------------------------------------------------------------------------


def test_a_record_about_another_is_refused(client: CancelClient, connection: redis.Redis) -> None:
    """What stands under a request's key is its outcome only if it says so: id, account and order."""
    ticket = client.cancel(algo_id=7, account="desk2")
    honest: dict[str, Any] = {
        "id": ticket.id,
        "run": 1,
        "kind": OutcomeKind.CANCELLED,
        "account": "desk2",
        "algo_id": 7,
    }
    rows: list[tuple[dict[str, Any], str]] = [
        ({"id": "another"}, "it is about another request, another"),
        ({"account": "default"}, "it is about another order: account=default, not desk2"),
        ({"algo_id": 8}, "it is about another order: algo_id=8, not 7"),
        ({"algo_id": None}, "it is about another order: algo_id=None, not 7"),
    ]
    for forged, said in rows:
        connection.set(KEYS.outcome_prefix + ticket.id, Outcome(**{**honest, **forged}).encode())
        looks: list[Callable[[], object]] = [
            ticket.wait,
            lambda: client.outcome(ticket),
            lambda: client.wait(ticket, 5),
        ]
        for look in looks:
            with pytest.raises(MalformedMessage, match=said):
                look()
        assert client.outcomes_of([ticket]) == {}
        assert type(client.wait_many([ticket], 5).standing[ticket.id]) is MalformedMessage

    connection.set(KEYS.outcome_prefix + ticket.id, Outcome(**honest).encode())
    assert ticket.wait(5).off_the_book
    connection.delete(KEYS.job_prefix + ticket.id)
    refused: dict[str, Any] = {**honest, "kind": OutcomeKind.REFUSED, "algo_id": None, "account": None}
    connection.set(KEYS.outcome_prefix + ticket.id, Outcome(**refused).encode())
    assert ticket.wait(5).kind is OutcomeKind.REFUSED  # its job was damaged: nobody could say of which order it was


def test_a_record_that_comes_while_somebody_waits_is_looked_at(
    client: CancelClient, workers: Workers, connection: redis.Redis
) -> None:
    """The listener tells nobody of a ledger entry alone: the record decides."""
    ticket = client.cancel(algo_id=7)
    append(connection, Outcome(ticket.id, 1, OutcomeKind.CANCELLED, "default", 7).encode())
    assert type(client.wait_many([ticket], 1.5).standing[ticket.id]).__name__ == "WaitTimeout"


# ---- lost replies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sort", "kind"), [(CancelClient, redis.Redis), (AsyncCancelClient, redis.asyncio.Redis)])
def test_a_brought_connection_s_repeats_are_ours(
    sort: type[Any], kind: Any, valkey: Valkey, workers: Workers, client: CancelClient
) -> None:
    """A retry whose reply is lost is not sent twice, though the brought connection would; a cancel finds itself."""
    (failed,) = fail(client, workers)
    workers.stop()
    client.retry(["nobody-knows"], missing_ok=True)  # the server knows the script

    with Proxy(valkey.port) as proxy, talking(sort(kind.from_url(proxy.redis_url, socket_timeout=2))) as mine:
        mine.status()
        lost = proxy.limit_data(b"EVALSHA")
        assert mine.cancel(algo_id=17).request.algo_id == 17
        trap = proxy.limit_data(b"EVALSHA")
        with pytest.raises(QueueUnavailable, match="no longer among the failed") as caught:
            mine.retry([failed])
        assert f"127.0.0.1:{proxy.port}" in str(caught.value)
        assert (lost.sprung, trap.sprung) == (1, 1)
    assert client.failed_ids() == []
    assert client.job(failed).get_status() == "queued"


@pytest.mark.parametrize(("sort", "kind"), [(CancelClient, redis.Redis), (AsyncCancelClient, redis.asyncio.Redis)])
def test_one_bound_holds_for_a_call(sort: type[Any], kind: Any, valkey: Valkey) -> None:
    """A server that goes silent costs a call its time-out once, whatever the URL or a brought connection says."""
    with Proxy(valkey.port) as proxy:
        brought = kind.from_url(proxy.redis_url)
        brought.connection_pool.connection_kwargs["socket_timeout"] = 0.5
        for client in (sort.from_url(f"{proxy.redis_url}?socket_timeout=60", timeout_s=0.5), sort(brought)):
            with talking(client) as talk:
                talk.cancel(algo_id=1)
                proxy.timeout(True)
                began = time.monotonic()
                with pytest.raises(QueueUnavailable, match="by client id alone a repeat makes a second job"):
                    talk.cancel(algo_id=2)
                assert 0.4 < time.monotonic() - began < 5
                proxy.timeout(False)
