"""Both clients against a real server: many at once, repeats, connections, bad days, durability, the ledger."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
from rq import Queue, Retry
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from producer import (
    AsyncCancelClient,
    CancelClient,
    CancelRequest,
    NotDurable,
    OutcomeKind,
    QueueUnavailable,
    UnknownRequest,
)
from producer.keys import FAILURE_TTL_S, RESULT_TTL_S, Keys
from producer.message import TASK, encode_request
from producer.protocol import Wire, text
from producer.untrusted import MalformedMessage
from tests.exporting import append, record
from tests.fault.proxy import Proxy
from tests.servers import Valkey, Workers, confirms_durability, eventually, running_valkey, stopped
from tests.strategies import BOTH, CONNECTIONS, PASSWORD, Talk, calls, rqs_fields, talking
from worker.sandbox.control import RunningExchange

KEYS = Keys()


@pytest.fixture(params=BOTH)
def sort(request: pytest.FixtureRequest) -> type[Any]:
    """Either client."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def talk(sort: type[Any], valkey: Valkey) -> Iterator[Talk]:
    """One of them on the server."""
    with talking(sort.from_url(valkey.url)) as talk:
        yield talk


def meanwhile(work: Callable[[], object]) -> threading.Thread:
    """Have somebody else do this while the client waits."""
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def somebody_waits(port: int) -> None:
    """Until a client waits for news at the server."""
    with redis.Redis(port=port) as connection:
        eventually(lambda: connection.info("clients")["blocked_clients"], what="somebody waits")


# --- many at once, and repeats ------------------------------------------------------------------------------------


def test_many_keep_their_order_and_cost_a_call_a_hundred(talk: Talk, connection: redis.Redis) -> None:
    """Tickets stand in the order of the requests, requests for one order share one, and the server may serve others
    after each hundred."""
    talk.cancel(algo_id=1)  # the script is known now
    connection.config_resetstat()

    tickets = talk.cancel_many(CancelRequest(algo_id=1 + number % 1250) for number in range(2500))

    assert [ticket.request.algo_id for ticket in tickets] == [1 + number % 1250 for number in range(2500)]
    assert [ticket.id for ticket in tickets[:1250]] == [ticket.id for ticket in tickets[1250:]]
    assert calls(connection, "evalsha") == 25
    assert talk.outcomes_of(tickets) == {}
    assert calls(connection, "mget") == 2


def test_a_round_trip_carries_a_thousand(connection: redis.Redis) -> None:
    """2,500 requests cost three round trips, of ten calls of the script each."""
    connection.script_load(Wire("cancels").enqueue_script.source)
    conversation = Wire("cancels").enqueue((CancelRequest(algo_id=number) for number in range(1, 2501)), durable=False)
    commands = next(conversation)
    sent = [len(commands)]
    with contextlib.suppress(StopIteration):
        while True:
            commands = conversation.send([connection.execute_command(*command) for command in commands])
            sent.append(len(commands))

    assert sent == [10, 10, 5]


def test_a_script_that_the_server_forgot_is_sent_again(talk: Talk, connection: redis.Redis) -> None:
    """Where a server has lost its scripts, none of many requests is lost, and none is enqueued twice."""
    talk.cancel(algo_id=1)
    connection.script_flush()

    tickets = talk.cancel_many(CancelRequest(algo_id=number) for number in range(1, 451))

    assert [ticket.duplicate for ticket in tickets] == [True] + [False] * 449
    assert connection.llen("rq:queue:cancels") == 450


def test_nothing_is_sent_for_nothing(talk: Talk, connection: redis.Redis) -> None:
    """An empty list of requests or ids is answered without Redis."""
    connection.config_resetstat()

    assert talk.cancel_many([]) == []
    assert talk.outcomes_of([]) == {}
    assert talk.retry([]) == []
    assert calls(connection, "evalsha") + calls(connection, "mget") == 0


def test_a_repeated_enqueue_finds_itself(sort: type[Any], valkey: Valkey, connection: redis.Redis) -> None:
    """When the answer to an enqueue is lost, the client asks again with the same ids: one job for each order, by its
    client id too."""
    with Proxy(valkey.port) as proxy, talking(sort.from_url(proxy.redis_url)) as talk:
        talk.cancel(algo_id=1)
        proxy.limit_data(b"EVALSHA")
        ids: list[dict[str, Any]] = [{"algo_id": 17}, {"algo_id": 18}, {"client_algo_id": "x"}, {"client_algo_id": "y"}]
        tickets = talk.cancel_many([CancelRequest(**each) for each in (*ids, ids[0], ids[2])])

        assert proxy.count.replies_lost == 1
    assert [ticket.duplicate for ticket in tickets] == [False] * 4 + [True] * 2
    assert (tickets[4].id, tickets[5].id) == (tickets[0].id, tickets[2].id)
    assert sorted(connection.lrange(KEYS.waiting, 1, -1)) == sorted(ticket.id.encode() for ticket in tickets[:4])
    assert len(list(connection.scan_iter(f"{KEYS.job_prefix}*"))) == 5


def test_rq_sees_the_job_as_one_of_its_own(talk: Talk, connection: redis.Redis) -> None:
    """The hash is what RQ writes for the same call of the same function, field by field, beside fields of ours."""
    request = CancelRequest(algo_id=17, client_algo_id="stop", symbol="BTCUSDT", tag="t", deadline_s=5, urgent=True)
    ticket = talk.cancel_many([request])[0]
    queue = Queue(KEYS.queue, connection=connection, serializer=JSONSerializer)
    by_rq = queue.enqueue_call(
        TASK,
        args=(encode_request(request),),
        timeout=60,
        result_ttl=RESULT_TTL_S,
        failure_ttl=FAILURE_TTL_S,
        retry=Retry(max=1_000_000),
        description=request.describe(),
    )

    ours, theirs = (rqs_fields(connection, job_id) for job_id in (ticket.id, by_rq.id))
    assert len(ours.pop(b"last_heartbeat")) == 27  # without it a stock worker's beat would take the job for gone
    for fields in (ours, theirs):
        del fields[b"data"]  # RQ's is compressed; that RQ reads the same from both is shown below
        assert [len(fields.pop(name)) for name in (b"created_at", b"enqueued_at")] == [27, 27]
    assert ours == theirs
    job = Job.fetch(ticket.id, connection=connection, serializer=JSONSerializer)
    assert (list(job.args), job.kwargs) == (list(by_rq.args), by_rq.kwargs)
    assert (job.func_name, job.args, job.get_status(), job.origin) == (
        TASK,
        [encode_request(request)],
        JobStatus.QUEUED,
        KEYS.queue,
    )
    assert queue.job_ids == [ticket.id, by_rq.id]
    assert [known.name for known in Queue.all(connection=connection)] == [KEYS.queue]


# --- connections --------------------------------------------------------------------------------------------------


def test_every_kind_of_connection_serves(
    valkey: Valkey, workers: Workers, exchange: RunningExchange, connection: redis.Redis
) -> None:
    """RESP2 and RESP3, with decoded answers or without: all methods give the same."""
    workers.start()
    for sort, options in [(sort, options) for sort in BOTH for options in CONNECTIONS]:
        (order,) = exchange.add_orders()
        brought: Any = redis.Redis if sort is CancelClient else redis.asyncio.Redis
        with talking(sort(brought(port=valkey.port, socket_timeout=2, **options))) as talk:
            ticket = talk.cancel(algo_id=order.algo_id)
            refused = talk.cancel(algo_id=1, account="nobody")
            outcome = talk.wait_for(ticket)
            assert (outcome.kind, outcome.algo_id) == (OutcomeKind.CANCELLED, order.algo_id)
            assert talk.wait_for(refused).kind is OutcomeKind.REFUSED
            assert talk.outcome(ticket.id) == outcome
            assert talk.outcomes_of([ticket.id, "nobody"]) == {ticket.id: outcome}
            ledger = talk.ledger()
            assert {ended.id for _, ended in ledger} == {ticket.id, refused.id}
            assert talk.ledger(ledger[-2][0], follow=True, most=1) == ledger[-1:]
            assert talk.ledger("$") == []
            assert talk.failed_ids() == [refused.id]
            assert talk.statuses([ticket.id, refused.id, "nobody"]) == ["finished", "failed", None]
            assert talk.status().outcomes == {"cancelled": 1, "refused": 1}
            with pytest.raises(UnknownRequest, match="nobody"):
                talk.retry([refused.id, "nobody"])
            assert talk.retry([refused.id, "nobody"], missing_ok=True) == [refused.id]
            assert talk.wait_for(refused).run == 2
        connection.delete(KEYS.outcomes, KEYS.failed)


def test_a_short_time_out_does_not_cut_off_the_follower(
    sort: type[Any], valkey: Valkey, connection: redis.Redis
) -> None:
    """Following the ledger waits for longer than the connection's time-out without an error, and sees what is new."""
    append(connection, record(1))

    def go_on() -> None:
        somebody_waits(valkey.port)
        time.sleep(0.6)
        append(connection, record(2))

    with talking(sort.from_url(valkey.url, timeout_s=0.2)) as talk:
        other = meanwhile(go_on)
        assert [outcome.algo_id for _, outcome in talk.ledger("$", follow=True, most=1)] == [2]
        other.join()


def test_a_call_after_a_restart_of_the_server_works(sort: type[Any]) -> None:
    """A kept connection that the server closed is replaced without the caller noticing."""
    with running_valkey() as server, talking(sort.from_url(server.url)) as talk:
        talk.cancel(algo_id=1)
        server.stop()
        server.start()

        assert not talk.cancel(algo_id=2).duplicate


# --- bad days -----------------------------------------------------------------------------------------------------


def test_a_silent_server_is_unavailable_within_the_time_out(sort: type[Any], valkey: Valkey) -> None:
    """A server that is stopped costs each call its time-out, and every call says the same."""
    with talking(sort.from_url(valkey.url, timeout_s=0.2)) as talk:
        ticket = talk.cancel(algo_id=1)
        asks: list[Callable[[], object]] = [
            lambda: talk.cancel(algo_id=2),
            lambda: talk.outcome(ticket.id),
            lambda: talk.wait_for(ticket, 5),
            lambda: talk.ledger(),
            lambda: talk.failed_ids(),
            lambda: talk.status(),
        ]
        with stopped(valkey):
            for ask in asks:
                began = time.monotonic()
                with pytest.raises(QueueUnavailable):
                    ask()
                assert time.monotonic() - began < 5
        assert talk.cancel(algo_id=1).duplicate


def test_a_waiter_learns_that_the_server_is_gone(sort: type[Any]) -> None:
    """Waiting for an outcome ends with QueueUnavailable when the server dies, not with silence."""
    with running_valkey() as server, talking(sort.from_url(server.url)) as talk:
        ticket = talk.cancel(algo_id=1)

        def kill() -> None:
            somebody_waits(server.port)
            server.stop(signal.SIGKILL)

        other = meanwhile(kill)
        with pytest.raises(QueueUnavailable):
            talk.wait_for(ticket, 60)
        other.join()


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_refused_login_is_told_without_the_password(sort: type[Any], protocol: int) -> None:
    """A wrong password is reported as such, and stands in no part of the error."""
    with running_valkey("--requirepass", "another") as server:
        url = f"redis://:{PASSWORD}@127.0.0.1:{server.port}/0?protocol={protocol}"
        with talking(sort.from_url(url)) as talk, pytest.raises(QueueUnavailable, match="refused the login") as caught:
            talk.cancel(algo_id=1)
        assert PASSWORD not in "".join(traceback.format_exception(caught.value))


def test_a_server_that_refuses_writes_is_told_by_its_code(sort: type[Any]) -> None:
    """A full server under noeviction says OOM; nothing was enqueued and the caller learns why."""
    with running_valkey("--maxmemory", "1", "--maxmemory-policy", "noeviction") as server:
        with talking(sort.from_url(server.url)) as talk, pytest.raises(QueueUnavailable, match="refused"):
            talk.cancel(algo_id=1)
        with redis.Redis(port=server.port) as connection:
            assert connection.dbsize() == 0


def test_what_was_refused_half_way_is_in_doubt(sort: type[Any], valkey: Valkey, connection: redis.Redis) -> None:
    """Where a server runs full amid many requests, the error says that a part of them may be on the queue, and what a
    repeat would do."""
    with talking(sort.from_url(valkey.url)) as talk:
        talk.cancel(algo_id=1)
        connection.config_set("maxmemory-policy", "noeviction")
        connection.config_set("maxmemory", int(connection.info("memory")["used_memory"]) + 300_000)
        try:
            with pytest.raises(QueueUnavailable, match=r"refused \(.*it is full\).*it may have been carried out"):
                talk.cancel_many(CancelRequest(algo_id=number) for number in range(2, 10_000))
        finally:
            connection.config_set("maxmemory", 0)
        assert 1 < connection.llen(KEYS.waiting) < 9_999


# --- durability ---------------------------------------------------------------------------------------------------


def test_a_durable_request_survives_a_killed_server(sort: type[Any]) -> None:
    """What was acknowledged as durable is on the queue after SIGKILL and a restart."""
    options = ("--appendonly", "yes", "--appendfsync", "everysec")
    with running_valkey(*options) as server, talking(sort.from_url(server.url)) as talk:
        if not confirms_durability():
            with pytest.raises(NotDurable, match="this server cannot confirm it"):
                talk.cancel(algo_id=17, durable=True)
            return
        ticket = talk.cancel(algo_id=17, durable=True)
        server.stop(signal.SIGKILL)
        server.start()

        assert talk.statuses([ticket]) == ["queued"]
        assert talk.cancel(algo_id=17, durable=True).duplicate


def test_durable_waits_no_longer_than_the_connection_does(sort: type[Any]) -> None:
    """With a short time-out a file that is synced too late is NotDurable, and Redis is not called unavailable."""
    options = ("--appendonly", "yes", "--appendfsync", "no")
    with running_valkey(*options) as server, talking(sort.from_url(server.url, timeout_s=0.4)) as talk:
        said = "within 150 ms" if confirms_durability() else "this server cannot confirm it"
        with pytest.raises(NotDurable, match=said):
            talk.cancel(algo_id=17, durable=True)


# --- waiting and the ledger ---------------------------------------------------------------------------------------


def test_a_strange_entry_is_passed_over_and_named(
    talk: Talk, connection: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """An entry of another version or of somebody else costs itself alone, and one warning tells where it stands."""
    append(connection, record(1))
    strange = text(connection.xadd(KEYS.outcomes, {"something": "else"}))
    append(connection, record(2))
    last = text(connection.xadd(KEYS.outcomes, {"outcome": b"\xff\x1b[2J"}))

    assert [outcome.algo_id for _, outcome in talk.ledger()] == [1, 2]
    told = [each for each in caplog.records if each.name == "producer"]
    assert [each.levelname for each in told] == ["WARNING"] * 2
    for entry, each in zip((strange, last), told, strict=True):
        assert entry in each.getMessage()
        assert each.getMessage().isprintable()
    assert talk.ledger(last) == []
    append(connection, record(3))
    assert [outcome.algo_id for _, outcome in talk.ledger(strange, follow=True, most=2)] == [2, 3]


def test_a_strange_record_fails_its_own_id_alone(
    talk: Talk, connection: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Of many outcomes the others are read; a warning names the id, and so does the error of whoever asks for it."""
    for number in (1, 3):
        connection.set(KEYS.outcome_prefix + f"{number:032x}", record(number))
    connection.set(KEYS.outcome_prefix + "bad", '{"v":2}')

    found = talk.outcomes_of([f"{1:032x}", "bad", f"{3:032x}", "nobody"])

    assert [outcome.algo_id for outcome in found.values()] == [1, 3]
    assert ["outcome of bad" in each.getMessage() for each in caplog.records if each.name == "producer"] == [True]
    for ask in (talk.outcome, talk.wait):
        with pytest.raises(MalformedMessage, match="outcome of bad"):
            ask("bad")


# --- calls of tasks that are cancelled ----------------------------------------------------------------------------


async def listening(connection: redis.Redis) -> None:
    """Until a task waits for news at the server."""
    async with asyncio.timeout(30):
        while not (await asyncio.to_thread(connection.info, "clients"))["blocked_clients"]:
            await asyncio.sleep(0.01)


def test_a_cancelled_wait_leaves_nothing_behind(valkey: Valkey, connection: redis.Redis) -> None:
    """After CancelledError the client goes on as before, and holds no more connections than before."""

    async def main() -> None:
        async with AsyncCancelClient.from_url(valkey.url) as client:
            ticket = await client.cancel(algo_id=17)
            for _ in range(5):
                waiter = asyncio.create_task(ticket.wait())
                await listening(connection)
                waiter.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiter
                assert len(await asyncio.to_thread(connection.client_list)) <= 4  # its own, two for calls, the listener
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await ticket.wait()
            assert (await client.cancel(algo_id=17)).id == ticket.id

    asyncio.run(main(), debug=True)
    assert len(connection.client_list()) == 1


def test_a_call_that_is_cancelled_half_way_spoils_no_connection(valkey: Valkey, connection: redis.Redis) -> None:
    """An answer that comes after the cancellation is never taken for the answer to the next call."""

    async def first(client: AsyncCancelClient) -> object:
        return await anext(client.outcomes(follow=True))

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
            follower = asyncio.create_task(first(client))
            await listening(connection)
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)
            assert await client.failed_ids() == []

    asyncio.run(main(), debug=True)
    assert len(set(connection.lrange(KEYS.waiting, 0, -1))) <= 3
