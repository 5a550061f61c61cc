"""The synchronous client against a real server: round trips, repeats, waiting, the ledger, and bad days."""

from __future__ import annotations

import random
import signal
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from rq import Queue, Retry
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from producer import (
    CancelClient,
    CancelRequest,
    InvalidRequest,
    NotDurable,
    OutcomeKind,
    QueueUnavailable,
    WaitTimeout,
)
from producer.keys import FAILURE_TTL_S, RESULT_TTL_S, Keys
from producer.message import TASK, encode_request
from producer.protocol import Wire, text
from producer.untrusted import MalformedMessage
from tests.exporting import append, record
from tests.fault.proxy import Proxy
from tests.servers import Valkey, Workers, confirms_durability, eventually, running_valkey, stopped
from tests.strategies import CONNECTIONS, PASSWORD, blocked, calls, rqs_fields
from worker.sandbox.control import RunningExchange

KEYS = Keys()


# --- many at once, and repeats ------------------------------------------------------------------------------------


def test_tickets_come_in_the_order_of_the_requests(client: CancelClient) -> None:
    """However requests are grouped on their way, ticket n belongs to request n and its job says so."""
    ids = [number for number in range(1, 1501) for _ in range(2)]
    random.Random(7).shuffle(ids)
    tickets = client.cancel_many(CancelRequest(algo_id=algo_id) for algo_id in ids)

    assert [ticket.request.algo_id for ticket in tickets] == ids
    assert len({ticket.id for ticket in tickets}) == 1500
    for ticket in tickets[::500]:
        assert client.job(ticket).args == [encode_request(ticket.request)]


def test_a_round_trip_carries_a_thousand(client: CancelClient, connection: redis.Redis) -> None:
    """2,500 requests cost three round trips, of ten calls of the script each, and asking for their outcomes three."""
    client.cancel(algo_id=1)  # the script is known now
    connection.config_resetstat()
    conversation = Wire("cancels").enqueue((CancelRequest(algo_id=number) for number in range(1, 2501)), durable=False)
    calls_sent = []
    commands = next(conversation)
    accepted = None
    while accepted is None:
        calls_sent.append(len(commands))
        try:
            commands = conversation.send([client._redis.execute_command(*command) for command in commands])
        except StopIteration as end:
            accepted = end.value

    assert client.outcomes_of([job_id for job_id, _, _ in accepted.carried]) == {}
    assert calls_sent == [10, 10, 5]
    assert calls(connection, "evalsha") == 25
    assert calls(connection, "mget") == 3


def test_a_script_that_the_server_forgot_is_sent_again(client: CancelClient, connection: redis.Redis) -> None:
    """Where a server has lost its scripts, none of many requests is lost, and none is enqueued twice."""
    client.cancel(algo_id=1)
    connection.script_flush()

    tickets = client.cancel_many(CancelRequest(algo_id=number) for number in range(1, 451))

    assert [ticket.duplicate for ticket in tickets] == [True] + [False] * 449
    assert connection.llen("rq:queue:cancels") == 450


def test_nothing_is_sent_for_nothing(client: CancelClient, connection: redis.Redis) -> None:
    """An empty list of requests or ids is answered without Redis."""
    connection.config_resetstat()

    assert client.cancel_many([]) == []
    assert client.outcomes_of([]) == {}
    assert client.retry([]) == []
    assert calls(connection, "evalsha") + calls(connection, "mget") == 0


def test_a_repeated_enqueue_finds_itself(valkey: Valkey, connection: redis.Redis) -> None:
    """When the answer to an enqueue is lost, the client asks again and the request is on the queue once."""
    with Proxy(valkey.port) as proxy, CancelClient.from_url(proxy.redis_url) as client:
        client.cancel(algo_id=1)
        proxy.limit_data(b"EVALSHA")
        ticket, joined, other = client.cancel_many([CancelRequest(algo_id=algo_id) for algo_id in (17, 17, 18)])

        assert proxy.count.replies_lost == 1
    assert [ticket.duplicate, joined.duplicate, other.duplicate] == [False, True, False]
    assert connection.lrange(KEYS.waiting, 1, -1) == [ticket.id.encode(), other.id.encode()]
    assert len(list(connection.scan_iter(f"{KEYS.job_prefix}*"))) == 3


def test_a_server_that_forgot_the_script_is_told_it(client: CancelClient, connection: redis.Redis) -> None:
    """SCRIPT FLUSH, a failover or a restart costs one more round trip and nothing else."""
    client.cancel(algo_id=1)
    connection.script_flush()

    assert not client.cancel(algo_id=2).duplicate


def test_rq_sees_the_job_as_one_of_its_own(client: CancelClient, connection: redis.Redis) -> None:
    """The hash is what RQ writes for the same call of the same function, field by field, beside fields of ours."""
    request = CancelRequest(algo_id=17, client_algo_id="stop", symbol="BTCUSDT", tag="t", deadline_s=5, urgent=True)
    ticket = client.cancel_many([request])[0]
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
    job = client.job(ticket)
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
    for options in CONNECTIONS:
        (order,) = exchange.add_orders()
        with CancelClient(redis.Redis(port=valkey.port, socket_timeout=2, **options)) as client:
            ticket = client.cancel(algo_id=order.algo_id)
            refused = client.cancel(algo_id=1, account="nobody")
            outcome = ticket.wait(10)
            assert (outcome.kind, outcome.algo_id) == (OutcomeKind.CANCELLED, order.algo_id)
            assert refused.wait(10).kind is OutcomeKind.REFUSED
            assert client.outcome(ticket.id) == client.outcomes_of([ticket.id])[ticket.id] == outcome
            ledger = list(client.outcomes())
            assert (ticket.id, outcome) in [(ended.id, ended) for _, ended in ledger]
            assert next(client.outcomes(ledger[-2][0], follow=True)) == ledger[-1]
            assert client.failed_ids() == [refused.id]
            assert client.statuses([ticket.id, refused.id, "nobody"]) == ["finished", "failed", None]
            assert client.status().outcomes == {"cancelled": 1, "refused": 1}
            assert client.retry([refused.id]) == [refused.id]
            assert refused.wait(10).run == 2
        connection.delete(KEYS.outcomes, KEYS.failed)


def test_a_short_time_out_does_not_cut_off_the_follower(client: CancelClient, valkey: Valkey) -> None:
    """Following the ledger waits for longer than the connection's time-out without an error."""
    with CancelClient.from_url(valkey.url, timeout_s=0.2) as hurried:
        follower = hurried.outcomes(follow=True)
        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(next, follower)
            with pytest.raises(TimeoutError):
                ended.result(0.6)
            append(hurried._redis, record(1))
            assert ended.result(5)[1].algo_id == 1


def test_a_call_after_a_restart_of_the_server_works() -> None:
    """A kept connection that the server closed is replaced without the caller noticing."""
    with running_valkey() as server, CancelClient.from_url(server.url) as client:
        client.cancel(algo_id=1)
        server.stop()
        server.start()

        assert not client.cancel(algo_id=2).duplicate


def test_a_silent_server_is_unavailable_within_the_time_out(valkey: Valkey) -> None:
    """A server that is stopped costs each call its time-out, and every call says the same."""
    with CancelClient.from_url(valkey.url, timeout_s=0.2) as client:
        ticket = client.cancel(algo_id=1)
        with stopped(valkey):
            for call in (
                lambda: client.cancel(algo_id=2),
                lambda: client.outcome(ticket.id),
                lambda: ticket.wait(5),
                lambda: list(client.outcomes()),
                client.failed_ids,
                client.status,
            ):
                began = time.monotonic()
                with pytest.raises(QueueUnavailable):
                    call()
                assert time.monotonic() - began < 1
        assert client.cancel(algo_id=1).duplicate


def test_a_server_that_is_gone_is_unavailable_at_once() -> None:
    """Where nobody listens no time is lost, and the error shows no password."""
    with running_valkey() as server:
        pass
    with CancelClient.from_url(f"redis://user:{PASSWORD}@127.0.0.1:{server.port}/0") as client:
        began = time.monotonic()
        with pytest.raises(QueueUnavailable, match="did not answer") as caught:
            client.cancel(algo_id=1)
        assert time.monotonic() - began < 1
        assert PASSWORD not in "".join(traceback.format_exception(caught.value)) + repr(client)


def test_a_waiter_learns_that_the_server_is_gone() -> None:
    """Waiting for an outcome ends with QueueUnavailable when the server dies, not with silence."""
    with running_valkey() as server, CancelClient.from_url(server.url) as client:
        ticket = client.cancel(algo_id=1)
        with ThreadPoolExecutor(1) as pool:
            waiter = pool.submit(ticket.wait, 20)
            eventually(lambda: blocked(client), what="the waiter listens")
            server.stop(signal.SIGKILL)
            with pytest.raises(QueueUnavailable):
                waiter.result(5)


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_refused_login_is_told_without_the_password(protocol: int) -> None:
    """A wrong password is reported as such, and stands in no part of the error."""
    with running_valkey() as server, redis.Redis(port=server.port) as connection:
        connection.config_set("requirepass", "another")
        url = f"redis://:{PASSWORD}@127.0.0.1:{server.port}/0?protocol={protocol}"
        with CancelClient.from_url(url) as client, pytest.raises(QueueUnavailable, match="refused the login") as caught:
            client.cancel(algo_id=1)
        assert PASSWORD not in "".join(traceback.format_exception(caught.value))


def test_a_server_that_refuses_writes_is_told_by_its_code() -> None:
    """A full server under noeviction says OOM; nothing was enqueued and the caller learns why."""
    with running_valkey("--maxmemory", "1", "--maxmemory-policy", "noeviction") as server:
        with CancelClient.from_url(server.url) as client, pytest.raises(QueueUnavailable, match="refused"):
            client.cancel(algo_id=1)
        with redis.Redis(port=server.port) as connection:
            assert connection.dbsize() == 0


def test_a_bad_request_never_meets_redis() -> None:
    """A field that breaks its rule is refused although no server is there."""
    with running_valkey() as server:
        pass
    with (
        CancelClient.from_url(server.url) as client,
        pytest.raises(InvalidRequest, match=r"algo_id=0: must be a whole number") as caught,
    ):
        client.cancel(algo_id=0)
    assert (caught.value.field, caught.value.value) == ("algo_id", 0)


# --- durability ---------------------------------------------------------------------------------------------------


def test_a_durable_request_survives_a_killed_server() -> None:
    """What was acknowledged as durable is on the queue after SIGKILL and a restart."""
    options = ("--appendonly", "yes", "--appendfsync", "everysec")
    with running_valkey(*options) as server, CancelClient.from_url(server.url) as client:
        if not confirms_durability():
            with pytest.raises(NotDurable, match="this server cannot confirm it"):
                client.cancel(algo_id=17, durable=True)
            return
        ticket = client.cancel(algo_id=17, durable=True)
        server.stop(signal.SIGKILL)
        server.start()

        assert client.job(ticket).id == ticket.id
        assert client.cancel(algo_id=17, durable=True).duplicate


def test_durable_without_a_file_says_so_and_gives_the_tickets(client: CancelClient, connection: redis.Redis) -> None:
    """All requests are on the queue, the error carries their tickets, and a plain repeat joins them."""
    requests = [CancelRequest(algo_id=number) for number in range(1, 1502)]
    with pytest.raises(NotDurable, match="enqueued, but") as caught:
        client.cancel_many(requests, durable=True)

    assert [ticket.request for ticket in caught.value.tickets] == requests
    assert connection.llen(KEYS.waiting) == 1501
    assert [ticket.id for ticket in client.cancel_many(requests)] == [ticket.id for ticket in caught.value.tickets]


def test_durable_waits_no_longer_than_the_connection_does() -> None:
    """With a short time-out a file that is synced too late is NotDurable, and Redis is not called unavailable."""
    options = ("--appendonly", "yes", "--appendfsync", "no")
    with running_valkey(*options) as server, CancelClient.from_url(server.url, timeout_s=0.4) as client:
        began = time.monotonic()
        said = "within 150 ms" if confirms_durability() else "this server cannot confirm it"
        with pytest.raises(NotDurable, match=said):
            client.cancel(algo_id=17, durable=True)
        assert time.monotonic() - began < 1


# --- waiting and the ledger ---------------------------------------------------------------------------------------


def test_waiting_ends_when_its_time_is_up(client: CancelClient, connection: redis.Redis) -> None:
    """WaitTimeout names the request, comes in time, and leaves request and connections as they were."""
    ticket = client.cancel(algo_id=17)
    for timeout_s in (0.0, 0.3):
        began = time.monotonic()
        with pytest.raises(WaitTimeout, match=ticket.id) as caught:
            ticket.wait(timeout_s)
        assert timeout_s <= time.monotonic() - began < timeout_s + 0.5
    assert isinstance(caught.value, TimeoutError)
    assert client.outcome(ticket.id) is None
    assert connection.llen(KEYS.waiting) == 1


def test_a_waiter_wakes_with_the_outcome(client: CancelClient, workers: Workers, exchange: RunningExchange) -> None:
    """The wait ends when the outcome is recorded, not at the next look a second later."""
    workers.start()
    (warm, order) = exchange.add_orders(2)
    client.cancel(algo_id=warm.algo_id).wait(10)

    began = time.monotonic()
    outcome = client.cancel(algo_id=order.algo_id).wait()

    assert outcome.kind is OutcomeKind.CANCELLED
    assert time.monotonic() - began < 0.5


def test_the_ledger_is_read_from_any_entry_on(
    client: CancelClient, workers: Workers, exchange: RunningExchange
) -> None:
    """Every outcome stands in the ledger once; reading goes on after an entry, and $ shows only what is new."""
    orders = [order.algo_id for order in exchange.add_orders(3)]
    workers.start()
    for algo_id in orders[:2]:
        client.cancel(algo_id=algo_id).wait(10)

    ledger = list(client.outcomes())
    newest = client.outcomes("$", follow=True)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(next, newest)
        eventually(lambda: blocked(client) >= 2, what="follower and worker wait")
        client.cancel(algo_id=orders[2])
        entry, outcome = ended.result(10)

    assert [outcome.algo_id for _, outcome in ledger] == orders[:2]
    assert list(client.outcomes(ledger[0][0])) == [ledger[1], (entry, outcome)]
    assert outcome.algo_id == orders[2]
    assert list(client.outcomes("$")) == []


@pytest.mark.parametrize("after", ["", "yesterday", "1-2-3", "-", "+", "0x10"])
def test_a_place_that_cannot_be_in_the_ledger_is_refused(client: CancelClient, after: str) -> None:
    """A mistyped stream id is told at the call, by name and value, before Redis is asked."""
    with pytest.raises(InvalidRequest, match="after="):
        client.outcomes(after)


def test_a_strange_entry_is_passed_over_and_named(
    client: CancelClient, connection: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """An entry of another version or of somebody else costs itself alone, and one warning tells where it stands."""
    append(connection, record(1))
    strange = text(connection.xadd(KEYS.outcomes, {"something": "else"}))
    append(connection, record(2))
    last = text(connection.xadd(KEYS.outcomes, {"outcome": b"\xff\x1b[2J"}))

    assert [outcome.algo_id for _, outcome in client.outcomes()] == [1, 2]
    assert [(each.name, each.levelname) for each in caplog.records] == [("producer", "WARNING")] * 2
    assert strange in caplog.messages[0]
    assert last in caplog.messages[1]
    assert all(message.isprintable() for message in caplog.messages)
    assert list(client.outcomes(last)) == []
    following = client.outcomes(strange, follow=True)
    assert next(following)[1].algo_id == 2
    append(connection, record(3))
    assert next(following)[1].algo_id == 3


def test_a_strange_record_fails_its_own_id_alone(
    client: CancelClient, connection: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Of many outcomes the others are read; a warning names the id, and so does the error of whoever asks for it."""
    for number in (1, 3):
        connection.set(KEYS.outcome_prefix + f"{number:032x}", record(number))
    connection.set(KEYS.outcome_prefix + "bad", '{"v":2}')

    found = client.outcomes_of([f"{1:032x}", "bad", f"{3:032x}", "nobody"])

    assert [outcome.algo_id for outcome in found.values()] == [1, 3]
    assert ["outcome of bad" in message for message in caplog.messages] == [True]
    for ask in (client.outcome, client.wait):
        with pytest.raises(MalformedMessage, match="outcome of bad"):
            ask("bad")
