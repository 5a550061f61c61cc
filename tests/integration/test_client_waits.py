"""How waiting ends, and what callers owe each other: limits, durable calls, the ledger's gaps."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from rq.job import Job
from rq.serializers import JSONSerializer

from producer import (
    AsyncCancelClient,
    CancelClient,
    CancelRequest,
    LedgerGap,
    NotDurable,
    OutcomeKind,
    QueueUnavailable,
    UnknownRequest,
    WaitTimeout,
)
from producer.keys import Keys
from producer.protocol import Commands
from producer.redis_url import at_once
from tests.exporting import append, record
from tests.fault.proxy import Proxy
from tests.holders import OpenHolder, ended
from tests.servers import Valkey, Workers, confirms_durability, eventually, running_valkey
from tests.strategies import BOTH, Talk, blocked, talking

KEYS = Keys()


@pytest.fixture(params=BOTH)
def talk(request: pytest.FixtureRequest, valkey: Valkey) -> Iterator[Talk]:
    """Either client."""
    with talking(request.param.from_url(valkey.url)) as talk:
        yield talk


# ---- ends -----------------------------------------------------------------------------------------------------------


def test_what_is_removed_ends_the_wait(talk: Talk, connection: redis.Redis) -> None:
    """Whoever waits without a time-out is told once a person has removed the request."""
    ticket = talk.cancel(algo_id=7)

    def remove() -> None:
        eventually(lambda: connection.info("clients")["blocked_clients"], what="somebody waits")
        Job.fetch(ticket.id, connection=connection, serializer=JSONSerializer).delete()

    remover = threading.Thread(target=remove)
    remover.start()
    with pytest.raises(UnknownRequest, match=f"{ticket.id} is not among the requests") as caught:
        talk.wait_for(ticket, None)
    remover.join()
    assert caught.value.job_ids == (ticket.id,)


def test_a_wait_outlasts_each_trouble_that_passes(talk: Talk, open_holder: OpenHolder, valkey: Valkey) -> None:
    """Connections that are lost now and then, each time for less than a call may take, end no wait."""
    with talking(type(talk.client).from_url(valkey.url, timeout_s=0.5)) as waiting:
        ticket = waiting.cancel(algo_id=7)

        def trouble() -> None:
            with redis.Redis(port=valkey.port) as killer:
                for _ in range(3):
                    eventually(lambda: killer.info("clients")["blocked_clients"], what="somebody listens")
                    time.sleep(0.7)
                    own = killer.client_id()
                    for each in killer.client_list():
                        if int(each["id"]) != own:
                            killer.client_kill_filter(_id=each["id"])
                    time.sleep(0.7)
            holder = open_holder()
            holder.complete(*(ended(lease, account="default", algo_id=7) for lease in holder.claim()))

        other = threading.Thread(target=trouble)
        other.start()
        assert waiting.wait_for(ticket, 30).kind is OutcomeKind.CANCELLED
        other.join()


def test_a_wait_needs_no_thread(client: CancelClient, workers: Workers, connection: redis.Redis) -> None:
    """Where the system has no thread left, or the interpreter is about to end, whoever waits looks for themselves; once
    there are threads again, the same client listens as ever."""
    tickets = [client.cancel(algo_id=number, account="nobody") for number in (1, 2)]
    before = threading.stack_size(2**46)  # more than any machine has
    try:
        with pytest.raises(WaitTimeout):
            tickets[0].wait(0.1)
        connection.set(KEYS.suspended, "1", px=3000)  # so that the first look finds nothing
        workers.start(WORKER_CONCURRENCY="1")  # in a process of its own
        assert tickets[0].wait(30).kind is OutcomeKind.REFUSED
    finally:
        threading.stack_size(before)
    assert tickets[1].wait(30).kind is OutcomeKind.REFUSED
    workers.stop()
    third = client.cancel(algo_id=3, account="nobody")

    def serve() -> None:
        eventually(lambda: connection.info("clients")["blocked_clients"], what="somebody listens")
        workers.start()

    starter = threading.Thread(target=serve)
    starter.start()
    assert third.wait(30).kind is OutcomeKind.REFUSED
    starter.join()


def test_what_has_expired_ends_the_wait_at_once(talk: Talk, workers: Workers, connection: redis.Redis) -> None:
    """An outcome whose record has run out is not waited for, though RQ keeps the failed job."""
    workers.start()
    ticket = talk.cancel(algo_id=7, account="nobody")
    assert talk.wait_for(ticket, 20).kind is OutcomeKind.REFUSED
    connection.delete(KEYS.outcome_prefix + ticket.id)

    with pytest.raises(UnknownRequest):
        talk.wait_for(ticket, None)


def test_what_a_worker_has_in_hand_is_waited_for(talk: Talk, connection: redis.Redis) -> None:
    """A job that is removed under a worker's hands is waited for as long as it is held."""
    ticket = talk.cancel(algo_id=1)
    connection.zadd(KEYS.unfinished, {ticket.id: time.time() * 1000 + 60_000})
    connection.delete(KEYS.job_prefix + ticket.id)
    with pytest.raises(WaitTimeout):
        talk.wait_for(ticket, 0.1)

    connection.zrem(KEYS.unfinished, ticket.id)
    with pytest.raises(UnknownRequest):
        talk.wait_for(ticket, None)


def test_a_time_out_says_who_serves(talk: Talk, workers: Workers) -> None:
    """It tells whether the request stands and whether anybody works on the queue."""
    ticket = talk.cancel(client_algo_id="x")
    began = time.monotonic()
    with pytest.raises(WaitTimeout, match="the request goes on: NO LIVE WORKER serves queue cancels") as caught:
        talk.wait_for(ticket, 0.3)
    assert time.monotonic() - began >= 0.3
    assert (caught.value.is_served, isinstance(caught.value, TimeoutError)) == (False, True)
    workers.start(CANCEL_DEADLINE_S="60", BACKOFF_CAP_MS="60000", NOT_FOUND_HORIZON_S="3600")
    time.sleep(1.1)  # who serves is asked once a second
    with pytest.raises(WaitTimeout, match="the request goes on: a live worker serves queue cancels") as caught:
        talk.wait_for(ticket, 0)
    assert caught.value.is_served is True


def listeners(client: CancelClient) -> set[str]:
    """Ids of the connections on which somebody waits for news."""
    return {each["id"] for each in client._redis.client_list() if "b" in each["flags"]}


def test_a_listener_that_is_cut_off_comes_back(valkey: Valkey, client: CancelClient, workers: Workers) -> None:
    """Waiters and followers do not notice that the connection which carries them was lost."""
    with Proxy(valkey.port) as proxy, CancelClient.from_url(proxy.redis_url) as mine, ThreadPoolExecutor(9) as pool:
        tickets = mine.cancel_many(CancelRequest(algo_id=number, account="nobody") for number in range(1, 9))
        waiting = [pool.submit(ticket.wait, 60) for ticket in tickets]
        following = pool.submit(next, mine.outcomes(follow=True))
        heard: set[str] = set()
        for _ in range(3):
            eventually(lambda: listeners(client) - heard, what="they listen, by another connection")
            heard.update(listeners(client))
            proxy.reset_peer()
        workers.start()
        assert {each.result(60).kind for each in waiting} == {OutcomeKind.REFUSED}
        assert following.result(60)[1].kind is OutcomeKind.REFUSED


def test_waits_end_without_a_ledger_too(talk: Talk, connection: redis.Redis) -> None:
    """Where somebody has put another thing in the ledger's place, whoever waits still gets the outcome."""
    ticket = talk.cancel(algo_id=1)
    connection.set(KEYS.outcomes, "of the wrong type")

    def settle() -> None:
        eventually(lambda: connection.info("commandstats").get("cmdstat_xrevrange"), what="somebody listens")
        connection.set(KEYS.outcome_prefix + ticket.id, record(1, id=ticket.id))

    settler = threading.Thread(target=settle)
    settler.start()
    assert talk.wait_for(ticket, 60).algo_id == 1
    settler.join()


# ---- the ledger -----------------------------------------------------------------------------------------------------


def test_a_reader_that_fell_behind_is_told(talk: Talk, connection: redis.Redis) -> None:
    """Entries that were trimmed unread are told, once, with where to go on; who is up to date is told nothing."""

    for number in range(1, 11):
        append(connection, record(number))
    ids = [entry for entry, _ in talk.ledger()]
    connection.xtrim(KEYS.outcomes, maxlen=4, approximate=False)

    with pytest.raises(LedgerGap, match="the ledger was trimmed beyond") as caught:
        talk.ledger(ids[2])
    assert (caught.value.after, caught.value.first) == (ids[2], ids[6])
    assert [outcome.algo_id for _, outcome in talk.ledger(caught.value.resume)] == [7, 8, 9, 10]
    assert [len(talk.ledger(position)) for position in (ids[6], ids[9], "0-0")] == [3, 0, 4]


def test_an_old_position_of_a_whole_ledger_misses_nothing(client: CancelClient, connection: redis.Redis) -> None:
    """A time from before the first entry is no gap where nothing was ever trimmed."""
    append(connection, record(1))

    assert [outcome.algo_id for _, outcome in client.outcomes("1700000000000")] == [1]


# ---- what callers owe each other ------------------------------------------------------------------------------------


def test_a_durable_call_holds_up_nobody() -> None:
    """While ten wait for a disk that does not come, others' cancels go out at once, also durable ones' requests."""
    if not confirms_durability():
        pytest.skip("this server has no WAITAOF")
    with (
        running_valkey("--appendonly", "yes", "--appendfsync", "no") as server,
        CancelClient.from_url(server.url, timeout_s=30) as client,
        redis.Redis(port=server.port) as connection,
        ThreadPoolExecutor(10) as pool,
    ):
        client.cancel(algo_id=1)
        waiting = [pool.submit(client.cancel, algo_id=number, durable=True) for number in range(2, 12)]
        eventually(lambda: connection.llen(KEYS.waiting) == 11, what="their requests are on the queue")
        eventually(lambda: blocked(client), what="they wait for the disk")
        for number in range(100, 150):
            client.cancel(algo_id=number)
        assert blocked(client)  # all of that while they waited
        assert not any(each.done() for each in waiting)
        for each in waiting:
            assert isinstance(each.exception(60), NotDurable)


def test_durable_calls_are_confirmed_together() -> None:
    """Many durable calls at once share the waits for the disk."""
    if not confirms_durability():
        pytest.skip("this server has no WAITAOF")
    with (
        running_valkey("--appendonly", "yes", "--appendfsync", "everysec") as server,
        CancelClient.from_url(server.url, timeout_s=10) as client,
        ThreadPoolExecutor(30) as pool,
    ):
        began = time.monotonic()
        tickets = list(pool.map(lambda number: client.cancel(algo_id=number, durable=True), range(1, 31)))
        assert len({ticket.id for ticket in tickets}) == 30
        assert time.monotonic() - began < 15  # one after the other they would take half a minute


def test_whose_limit_it_was() -> None:
    """A server without a connection left is told apart from a client whose connections are all taken."""
    with running_valkey("--maxclients", "1") as server, redis.Redis(port=server.port) as first:
        first.ping()
        for client in (CancelClient.from_url(server.url), AsyncCancelClient.from_url(server.url)):
            with (
                talking(client) as talk,
                pytest.raises(QueueUnavailable, match=r"its own limit, maxclients, is reached\) \[redis://127.0.0.1"),
            ):
                talk.cancel(algo_id=1)
    with running_valkey() as server, Proxy(server.port) as proxy, ThreadPoolExecutor(8) as pool:
        with CancelClient.from_url(proxy.redis_url, timeout_s=1) as client:
            client.status()
            proxy.timeout(True)
            many = [CancelRequest(algo_id=number) for number in range(1, 1001)]  # as much as fits in one write
            calls = [pool.submit(client.cancel_many, many) for _ in range(8)]
            said = [str(call.exception(60)) for call in calls]
        proxy.timeout(False)
    assert any("all 2 connections of this client were taken" in each and "its own limit" in each for each in said)
    assert any("Redis did not answer (TimeoutError)" in each for each in said)


def test_a_signal_s_handler_may_cancel(client: CancelClient) -> None:
    """A bot that cancels its stops when it is told to end is heard in whatever its thread is doing, a cancel too."""
    handled: list[str] = []

    def handle(*_: object) -> None:
        if len(handled) < 300:
            handled.append("")
            handled[-1] = client.cancel(algo_id=100_000 + len(handled)).id
            signal.setitimer(signal.ITIMER_REAL, 0.0003)

    before = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0003)
        tickets = [client.cancel(algo_id=1 + number) for number in range(1000)]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len({ticket.id for ticket in tickets} | set(handled)) == 1000 + len(handled)
    assert len(handled) > 10


def test_an_answer_to_an_earlier_question_ends_no_later_wait(client: CancelClient, connection: redis.Redis) -> None:
    """Who waits for a request that was retried is not told what somebody else was about to hear of its last run."""
    connection.set(KEYS.outcome_prefix + "a", record(id="a"))
    lines = client._mine()
    told: list[list[str]] = []
    with contextlib.ExitStack() as stack:
        waits = [stack.enter_context(lines.waiters.waiting(["a"], lambda: None))]

        def ask(trips: Sequence[Commands], _: float) -> list[list[Any]]:
            answers = [connection.execute_command(*command) for command in trips[0]]
            if len(waits) > 1:  # that is: what was recorded has been handed out
                told.extend(list(each.ends) for each in waits)
                lines.waiters.close(ValueError("enough was heard"))
            elif next(iter(trips[0]))[0] == "MGET":  # what is recorded
                waits.append(stack.enter_context(lines.waiters.waiting(["a"], lambda: None)))
            return [answers]

        at_once(lines._hear(SimpleNamespace(ask=ask), lambda: None))
    assert told == [["a"], []]
