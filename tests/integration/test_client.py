"""The synchronous client against a real server: deduplication, order, repeats, waiting, retries, and bad days."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import pytest
import redis
from rq import Queue, Retry
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from producer import (
    CancelClient,
    CancelRequest,
    InvalidRequest,
    NotDurable,
    OutcomeKind,
    QueueUnavailable,
    Ticket,
    UnknownRequest,
    WaitTimeout,
)
from producer.keys import JobField, Keys
from producer.message import TASK, MalformedMessage, encode_request
from producer.protocol import FAILURE_TTL_S, RESULT_TTL_S, Wire, text
from tests.servers import Valkey, Workers, confirms_durability, eventually, running_valkey
from worker.sandbox.control import RunningExchange

KEYS = Keys()
PASSWORD = "password-of-the-tests"
#: Every way in which a strategy may have made its connection.
CONNECTIONS: tuple[dict[str, Any], ...] = (
    {"protocol": 2},
    {"protocol": 3},
    {"protocol": 2, "decode_responses": True},
    {"protocol": 3, "decode_responses": True},
)


class Proxy:
    """Stands between client and server: it can end TLS, and lose the answer to one command."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._upstream = port
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.lose_answer_to: bytes | None = None
        self.lost = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        for open_socket in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for open_socket in (self._listener, *self._sockets):
            open_socket.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError):
                if self._tls is not None:
                    client = self._tls.wrap_socket(client, server_side=True)
                server = socket.create_connection(("127.0.0.1", self._upstream))
                self._sockets += (client, server)
                losing = threading.Event()
                for pair in ((client, server, losing, True), (server, client, losing, False)):
                    thread = threading.Thread(target=self._pump, args=pair)
                    self._threads.append(thread)
                    thread.start()
                continue
            client.close()

    def _pump(self, source: socket.socket, target: socket.socket, losing: threading.Event, asks: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if asks and self.lose_answer_to is not None and self.lose_answer_to in data:
                    self.lose_answer_to = None
                    losing.set()
                if not asks and losing.is_set():
                    self.lost += 1
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def stopped(server: Valkey) -> Iterator[None]:
    """The server process does not run for the length of a block."""
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


def field(connection: redis.Redis, ticket: Ticket, name: str) -> int:
    """A number in the job's hash."""
    return int(connection.hget(KEYS.job_prefix + ticket.id, name) or 0)


def job_hash(connection: redis.Redis, job_id: str) -> dict[bytes, Any]:
    """RQ's hash of a job."""
    found: Any = connection.hgetall(KEYS.job_prefix + job_id)
    return dict(found)


def now_ms(connection: redis.Redis) -> float:
    """Redis' clock."""
    seconds, micros = connection.time()
    return float(seconds * 1000 + micros / 1000)


def calls(connection: redis.Redis, command: str) -> int:
    """How often the server has run a command since its counters were cleared."""
    statistics: Any = connection.info("commandstats")
    return int(statistics.get(f"cmdstat_{command}", {"calls": 0})["calls"])


def blocked(client: CancelClient) -> int:
    """How many clients the server lets wait."""
    told: Any = client._redis.info("clients")
    return int(told["blocked_clients"])


def fail(client: CancelClient, workers: Workers, count: int = 1) -> list[str]:
    """Requests that ended in a failed kind, as no worker has their account; ids in the order of RQ's registry."""
    if not workers.all:
        workers.start()
    tickets = client.cancel_many(CancelRequest(algo_id=number, account="nobody") for number in range(1, count + 1))
    assert {ticket.wait(10).kind for ticket in tickets} == {OutcomeKind.REFUSED}
    assert sorted(client.failed_ids()) == sorted(ticket.id for ticket in tickets)
    return client.failed_ids()


# --- one order, one job -------------------------------------------------------------------------------------------


def test_requests_for_one_order_share_its_open_job(client: CancelClient, connection: redis.Redis) -> None:
    """A second request for an order that is not finished gets the first one's id and says so."""
    first = client.cancel(algo_id=17)
    second = client.cancel(algo_id=17, tag="another strategy")

    assert (second.id, first.duplicate, second.duplicate) == (first.id, False, True)
    assert connection.lrange(KEYS.waiting, 0, -1) == [first.id.encode()]


@pytest.mark.parametrize(
    "other",
    [
        {"algo_id": 18},
        {"algo_id": 17, "account": "desk2"},
        {"client_algo_id": "stop-17"},
        {"client_algo_id": "17"},
    ],
    ids=["other algo id", "other account", "its client id", "client id of the same digits"],
)
def test_what_is_not_known_to_be_one_order_is_not_merged(client: CancelClient, other: dict[str, Any]) -> None:
    """Only account and id together make an order: ids of different kinds are never taken for one order."""
    first = client.cancel(algo_id=17)

    ticket = client.cancel(**other)

    assert ticket.id != first.id
    assert not ticket.duplicate


def test_with_both_ids_the_algo_id_says_which_order_it_is(client: CancelClient) -> None:
    """The exchange is asked by the algo id, so that one decides what is the same order."""
    first = client.cancel(algo_id=17, client_algo_id="a")

    assert client.cancel(algo_id=17, client_algo_id="b").id == first.id
    assert client.cancel(client_algo_id="a").id != first.id


def test_the_later_deadline_holds(client: CancelClient, connection: redis.Redis) -> None:
    """A joining request can prolong the deadline and never shorten it."""
    ticket = client.cancel(algo_id=17, deadline_s=10)
    short = field(connection, ticket, JobField.DEADLINE_AT_MS)
    client.cancel(algo_id=17, deadline_s=100)
    long = field(connection, ticket, JobField.DEADLINE_AT_MS)
    client.cancel(algo_id=17, deadline_s=50)

    assert short == pytest.approx(now_ms(connection) + 10_000, abs=2000)
    assert long == pytest.approx(now_ms(connection) + 100_000, abs=2000)
    assert field(connection, ticket, JobField.DEADLINE_AT_MS) == long


def test_a_joining_request_prolongs_a_deadline_that_would_have_passed(client: CancelClient, workers: Workers) -> None:
    """The worker pursues the request for as long as the one that waits longest wants, its own default included."""
    tickets = [client.cancel(algo_id=17, deadline_s=0.001), client.cancel(algo_id=18, deadline_s=0.001)]
    client.cancel(algo_id=17)
    workers.start(NOT_FOUND_HORIZON_S="0")

    assert [ticket.wait(10).kind for ticket in tickets] == [OutcomeKind.NOT_FOUND, OutcomeKind.OVERDUE]


def test_urgent_goes_first_and_is_applied_to_the_open_job(
    client: CancelClient, workers: Workers, exchange: RunningExchange
) -> None:
    """An urgent request, and one that an urgent request joins, are sent before what waited already."""
    first, joined, last, urgent = (order.algo_id for order in exchange.add_orders(4))
    tickets = client.cancel_many(CancelRequest(algo_id=algo_id) for algo_id in (first, joined, last))
    assert client.cancel(algo_id=joined, urgent=True).id == tickets[1].id
    tickets.append(client.cancel(algo_id=urgent, urgent=True))

    workers.start(WORKER_CONCURRENCY="1")

    assert [ticket.wait(10).kind for ticket in tickets] == [OutcomeKind.CANCELLED] * 4
    sent = sorted(exchange.book().values(), key=lambda entry: entry.delete_arrivals_ns[0])
    assert [entry.algo_id for entry in sent] == [urgent, joined, first, last]
    assert [entry.deletes for entry in sent] == [1, 1, 1, 1]


def test_requests_for_one_order_in_one_call_share_a_ticket(client: CancelClient) -> None:
    """Inside one call the order of the requests is kept, and each order has one job."""
    a, b, again = client.cancel_many([CancelRequest(algo_id=1), CancelRequest(algo_id=2), CancelRequest(algo_id=1)])

    assert again.id == a.id != b.id
    assert [a.duplicate, b.duplicate, again.duplicate] == [False, False, True]


def test_they_share_it_whatever_finishes_meanwhile(
    client: CancelClient, workers: Workers, exchange: RunningExchange
) -> None:
    """However fast workers are, and although one call is several round trips, one order gets one job and one DELETE."""
    orders = [order.algo_id for order in exchange.add_orders(200)]
    workers.start()

    tickets = client.cancel_many(CancelRequest(algo_id=algo_id) for algo_id in orders * 6)

    assert len({ticket.id for ticket in tickets}) == len(orders)
    assert [tickets[i].id for i in range(200)] == [tickets[i].id for i in range(200, 400)]
    assert {ticket.wait(20).kind for ticket in tickets[:200]} == {OutcomeKind.CANCELLED}
    assert {entry.deletes for entry in exchange.book().values()} == {1}


def _deleted(connection: redis.Redis, job: Job) -> None:
    job.delete()


def _emptied(connection: redis.Redis, job: Job) -> None:
    assert Queue(KEYS.queue, connection=connection, serializer=JSONSerializer).empty() == 1  # what `rq empty` calls


def _cancelled(connection: redis.Redis, job: Job) -> None:
    job.cancel()


@pytest.mark.parametrize("remove", [_deleted, _emptied, _cancelled])
def test_a_job_that_a_person_removed_is_not_joined(
    client: CancelClient, connection: redis.Redis, remove: Callable[[redis.Redis, Job], None]
) -> None:
    """After Job.delete, rq empty or Job.cancel the next request for the order starts a job of its own."""
    first = client.cancel(algo_id=17)
    remove(connection, client.job(first))

    second = client.cancel(algo_id=17)

    assert second.id != first.id
    assert not second.duplicate
    assert connection.lrange(KEYS.waiting, 0, -1) == [second.id.encode()]


def test_after_the_outcome_a_request_starts_anew_at_once(
    client: CancelClient, workers: Workers, exchange: RunningExchange
) -> None:
    """Both waiters get one outcome; the next request for that order has a fresh id and an outcome of its own."""
    (order,) = exchange.add_orders()
    tickets = [client.cancel(algo_id=order.algo_id), client.cancel(algo_id=order.algo_id)]
    workers.start()
    outcomes = [ticket.wait(10) for ticket in tickets]

    anew = client.cancel(algo_id=order.algo_id)

    assert outcomes[0] == outcomes[1]
    assert outcomes[0].kind is OutcomeKind.CANCELLED
    assert not anew.duplicate
    assert anew.wait(10).kind is OutcomeKind.ALREADY_CANCELLED
    assert anew.id != tickets[0].id


def test_threads_that_ask_at_once_share_one_job(client: CancelClient, connection: redis.Redis) -> None:
    """One client serves many threads, and of requests for one order exactly one makes the job."""
    with ThreadPoolExecutor(8) as pool:
        tickets = list(pool.map(lambda _: client.cancel(algo_id=17), range(64)))

    assert len({ticket.id for ticket in tickets}) == 1
    assert sum(not ticket.duplicate for ticket in tickets) == 1
    assert connection.llen(KEYS.waiting) == 1


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
            commands = conversation.send(client._round_trip(commands))
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
    with Proxy(valkey.port) as proxy, CancelClient.from_url(f"redis://127.0.0.1:{proxy.port}") as client:
        client.cancel(algo_id=1)
        proxy.lose_answer_to = b"EVALSHA"
        ticket, joined, other = client.cancel_many([CancelRequest(algo_id=algo_id) for algo_id in (17, 17, 18)])

        assert proxy.lost == 1
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

    ours, theirs = (job_hash(connection, job_id) for job_id in (ticket.id, by_rq.id))
    times = (b"created_at", b"enqueued_at")
    for fields in (ours, theirs):
        del fields[b"data"]  # RQ's is compressed; that RQ reads the same from both is shown below
        assert [len(fields.pop(name)) for name in times] == [27, 27]
    assert {name: value for name, value in ours.items() if not name.startswith(b"c_")} == theirs
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
            hurried._redis.xadd(KEYS.outcomes, {"outcome": "{}"})
            with pytest.raises(MalformedMessage):
                ended.result(5)


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
            eventually(lambda: client._redis.pubsub_channels(), what="the waiter listens")
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
    assert connection.pubsub_channels() == []
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


def test_a_strange_entry_is_named_so_that_one_can_go_on_after_it(client: CancelClient, connection: redis.Redis) -> None:
    """An entry of another version or of somebody else ends the reading by an error that tells where."""
    strange = text(connection.xadd(KEYS.outcomes, {"something": "else"}))

    with pytest.raises(MalformedMessage, match=strange):
        list(client.outcomes())
    assert list(client.outcomes(strange)) == []


# --- retries ------------------------------------------------------------------------------------------------------


def test_a_retry_is_a_new_run_of_the_same_id(client: CancelClient, workers: Workers, connection: redis.Redis) -> None:
    """The first outcome is gone at once, the second one has the next run and a new time of enqueueing."""
    (job_id,) = fail(client, workers)
    first = client.outcome(job_id)
    workers.all[0].stop(signal.SIGKILL)

    assert client.retry([job_id]) == [job_id]

    assert client.outcome(job_id) is None
    assert client.failed_ids() == []
    assert client.cancel(algo_id=1, account="nobody").id == job_id  # the order's open job again
    assert connection.ttl(KEYS.job_prefix + job_id) == -1
    workers.start()
    second = client.wait(job_id, 10)
    assert first is not None
    assert (first.run, second.run) == (1, 2)
    assert second.enqueued_at_ms > first.finished_at_ms  # type: ignore[operator]
    assert [ended.run for _, ended in client.outcomes()] == [1, 2]


def test_an_unknown_id_is_named_and_nothing_is_retried(client: CancelClient, workers: Workers) -> None:
    """Ids are checked before the first is started; missing_ok leaves them out instead."""
    job_ids = fail(client, workers, 2)
    workers.all[0].stop(signal.SIGKILL)

    with pytest.raises(UnknownRequest, match=r"nobody, also-not are not among") as caught:
        client.retry([job_ids[0], "nobody", "also-not", job_ids[1]])

    assert caught.value.job_ids == ("nobody", "also-not")
    assert client.failed_ids() == job_ids
    assert client.retry([*job_ids, "nobody"], missing_ok=True) == job_ids
    with pytest.raises(UnknownRequest):
        client.retry(job_ids)


def test_many_are_retried_or_none(client: CancelClient, connection: redis.Redis) -> None:
    """The rule holds beyond the thousand of one call, and an id given twice is started once."""
    tickets = client.cancel_many(CancelRequest(algo_id=number) for number in range(1, 1202))
    job_ids = [ticket.id for ticket in tickets]
    registry = FailedJobRegistry(KEYS.queue, connection=connection, serializer=JSONSerializer)
    connection.zadd(registry.key, {job_id: 4e9 + number for number, job_id in enumerate(job_ids)})
    connection.delete(KEYS.waiting)

    with pytest.raises(UnknownRequest, match="nobody"):
        client.retry([*job_ids, "nobody"])
    assert connection.llen(KEYS.waiting) == 0
    assert client.retry(job_ids + job_ids) == job_ids
    assert [text(job_id) for job_id in connection.lrange(KEYS.waiting, 0, -1)] == job_ids


def test_rq_requeues_to_the_same_hash(client: CancelClient, workers: Workers, connection: redis.Redis) -> None:
    """What a retry leaves is what RQ's requeue leaves, beside our own fields and the retries that RQ may count down."""
    ours, theirs = fail(client, workers, 2)
    workers.all[0].stop(signal.SIGKILL)

    client.retry([ours])
    FailedJobRegistry(KEYS.queue, connection=connection, serializer=JSONSerializer).requeue(theirs)

    hashes = [job_hash(connection, job_id) for job_id in (ours, theirs)]
    for fields in hashes:
        for name in (b"data", b"description", b"created_at", b"enqueued_at", b"last_heartbeat", b"worker_name"):
            assert fields.pop(name)
        assert fields.pop(b"retries_left") == b"1000000"
    plain = [{name: value for name, value in fields.items() if not name.startswith(b"c_")} for fields in hashes]
    assert plain[0] == plain[1]
    assert connection.lrange(KEYS.waiting, 0, -1) == [ours.encode(), theirs.encode()]


# --- status -------------------------------------------------------------------------------------------------------


class Counting(redis.Connection):
    """A connection that counts what goes out."""

    sent = 0

    def send_packed_command(self, *args: Any, **kwargs: Any) -> None:
        """One write to the socket."""
        Counting.sent += 1
        super().send_packed_command(*args, **kwargs)  # type: ignore[no-untyped-call]


def test_a_status_costs_three_round_trips(valkey: Valkey, workers: Workers, connection: redis.Redis) -> None:
    """However much there is to tell, with workers and their gates and thousands of outcomes."""
    for _ in range(2):
        workers.start()
    pool = redis.ConnectionPool(connection_class=Counting, host="127.0.0.1", port=valkey.port)
    with redis.Redis(connection_pool=pool) as counted, CancelClient(counted) as client:
        client.cancel_many(CancelRequest(algo_id=number, account="nobody") for number in range(1, 300))
        record = next(client.outcomes(follow=True))[1]
        pipeline = connection.pipeline()
        for _ in range(5200):
            pipeline.xadd(KEYS.outcomes, {"outcome": record.encode()})
        pipeline.execute()
        Counting.sent = 0

        seen = client.status()

        assert Counting.sent <= 3
    assert len(seen.workers) == 2
    assert seen.outcomes_partial
    assert sum(seen.outcomes.values()) == 5000
    pool.disconnect()


def test_a_status_tells_how_the_queue_stands(client: CancelClient, connection: redis.Redis) -> None:
    """Depth counts ids on their way to a worker too, and the age is that of the oldest job that really waits."""
    first, second, gone = client.cancel_many(CancelRequest(algo_id=number) for number in (1, 2, 3))
    connection.delete(KEYS.job_prefix + gone.id)
    connection.lpush(KEYS.waiting, gone.id)
    connection.lmove(KEYS.waiting, KEYS.claiming, "RIGHT", "LEFT")
    connection.hset(KEYS.job_prefix + second.id, JobField.ENQUEUED_AT_MS, int(now_ms(connection)) - 7000)
    connection.zadd(KEYS.leases, {"x": 4e12, "lost": 1})
    connection.zadd(KEYS.scheduled, {"y": 1, "z": 2})
    connection.zadd(KEYS.failed, {"f": 4e9})
    connection.set(KEYS.suspended, 1)
    until_ms = int(now_ms(connection)) + 30_000
    gate = {"until_ms": until_ms, "reason": "429", "by": "worker.1"}
    connection.hset(Keys.gate("all"), mapping=gate)  # type: ignore[arg-type]
    before = sorted(connection.scan_iter())

    seen = client.status()

    assert (seen.queued, seen.in_flight, seen.scheduled, seen.failed, seen.suspended) == (4, 1, 2, 1, True)
    assert seen.to_be_taken_over == 1
    assert seen.oldest_queued_s == pytest.approx(7, abs=1)
    assert [(g.scope, g.open, g.until_ms, g.reason, g.by) for g in seen.gates] == [
        ("all", False, until_ms, "429", "worker.1")
    ]
    assert seen.gates[0].closed_for_s == pytest.approx(30, abs=1)
    assert seen.outcomes == {}
    assert (seen.enqueue_to_outcome.p50, seen.enqueue_to_outcome.p99) == (None, None)
    assert sorted(connection.scan_iter()) == before
    shown = "\n".join(seen.lines())
    assert "SUSPENDED" in shown
    assert "CLOSED for" in shown
    assert first.id not in shown


def test_a_foreign_job_has_an_age_too(client: CancelClient, connection: redis.Redis) -> None:
    """What somebody else put on the queue waits as well, and nobody has stamped it yet."""
    Queue(KEYS.queue, connection=connection, serializer=JSONSerializer).enqueue("os.getcwd")

    assert client.status().oldest_queued_s == pytest.approx(0, abs=2)


def test_a_status_measures_the_last_minute(
    client: CancelClient, workers: Workers, exchange: RunningExchange, connection: redis.Redis
) -> None:
    """Outcomes by kind, the time to the first attempt and to the outcome, and each live worker with its counts."""
    orders = [order.algo_id for order in exchange.add_orders(4)]
    exchange.trigger(orders[3])
    worker = workers.start()
    exchange.set_latency_ms(50)
    for ticket in client.cancel_many(CancelRequest(algo_id=algo_id) for algo_id in orders):
        ticket.wait(10)
    connection.xadd(KEYS.outcomes, {"something": "else"})
    connection.hset(Keys.gate("elsewhere"), "until_ms", 4_000_000_000_000)
    host = client.status().workers[0].host
    connection.hset(Keys.gate(host), "until_ms", 4_000_000_000_000)

    seen = client.status()

    assert seen.outcomes == {"cancelled": 3, "triggered": 1, "unreadable": 1}
    assert 50 <= (seen.enqueue_to_outcome.p50 or 0) <= (seen.enqueue_to_outcome.p99 or 0) < 5000
    assert 0 <= (seen.enqueue_to_first_attempt.p50 or 0) < (seen.enqueue_to_outcome.p50 or 0)
    assert [(gate.scope, gate.open) for gate in seen.gates] == [("all", True), (host, False)]
    (row,) = seen.workers
    assert (row.pid, row.ok, row.failed) == (worker.process.pid, 4, 0)
    assert row.heartbeat_age_s is not None
    assert row.name in "\n".join(seen.lines())
    worker.stop()
    assert client.status().workers == ()
