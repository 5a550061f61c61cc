"""The engine in a loop of its own: what is claimed when, what is completed together, what a stop or a sleep leaves.

Against a real Redis and the local exchange, or one that answers when the test says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import Any

import pytest
import redis

from producer import CancelClient, CancelRequest, OutcomeKind
from tests.engines import (
    CLOCK_ERROR,
    OVERLOADED,
    Answerer,
    Asked,
    Parts,
    RunningEngine,
    Said,
    enqueued,
    every,
    well,
)
from tests.fault.conftest import mark_of
from tests.fault.proxy import Proxy
from tests.integration.conftest import Logged
from tests.orders import at_first_try, cancel_all, opened, outcomes, steps
from tests.servers import Peek, Valkey, eventually
from worker.clock import RedisClock, SleepWatch, local_ns
from worker.hold import Held
from worker.sandbox.control import RunningExchange
from worker.store import Beat, Claimed, Completed, Lease, Request, Retry, Row

# ---- claims ---------------------------------------------------------------------------------------------------------


def test_one_at_a_time(valkey: Valkey, client: CancelClient, exchange: RunningExchange, peek: Peek) -> None:
    """With one slot the orders are sent one after the other, and none is taken that another worker could send."""
    exchange.set_latency_ms(700)
    algo_ids = opened(exchange, 4)
    tickets = cancel_all(client, algo_ids)
    with RunningEngine(valkey.url, exchange.url, 1):
        for n, ticket in enumerate(tickets):
            eventually(lambda n=n: exchange.book()[algo_ids[n]].deletes == 1, what="it is sent")  # type: ignore[misc]
            ends_at = time.monotonic() + 0.15
            while time.monotonic() < ends_at:  # well before its answer
                assert (peek.held(), peek.waiting()) == ([ticket.id], [later.id for later in tickets[n + 1 :]])
                time.sleep(0.005)

        assert at_first_try(outcomes(client, tickets))
    assert exchange.stats().peak_in_flight == 1


def test_what_was_claimed_ahead_goes_back_when_the_exchange_stalls(
    valkey: Valkey, client: CancelClient, exchange: RunningExchange, stack: ExitStack
) -> None:
    """Jobs that were claimed for slots that do not fall free are soon handed back, unsent, and another sends them."""
    stalling: list[RunningEngine] = []

    def stalls(asked: Asked) -> bool:
        has_claimed_ahead = len(stalling) > 1 or stalling[0].engine.working_on > 16
        stalling.extend(stalling[:1] if has_claimed_ahead else ())
        time.sleep(0.03)
        return has_claimed_ahead

    server = stack.enter_context(Answerer(holds=stalls))
    tickets = cancel_all(client, opened(exchange, 1500))
    stalling.append(RunningEngine(valkey.url, server.url, 16, "stalled", patience_s=60, BINANCE_RECV_WINDOW_MS="60000"))
    stalled = stack.enter_context(stalling[0]).engine
    eventually(lambda: len(stalling) > 16, what="it has claimed ahead, and all slots are taken")

    eventually(lambda: stalled.in_hand == stalled.working_on == 16, 1, "what was not sent is handed back")
    stack.enter_context(RunningEngine(valkey.url, exchange.url, 64, "other"))
    eventually(lambda: len(client.outcomes_of(t.id for t in tickets)) == 1500 - 16, 25, "the other has sent the rest")
    server.may_answer.set()
    found = outcomes(client, tickets)
    assert at_first_try(found)
    sent_by_other = {outcome.algo_id for outcome in found if outcome.worker == "other"}
    assert {algo_id for algo_id, entry in exchange.book().items() if entry.deletes} == sent_by_other
    assert sent_by_other.isdisjoint(asked.algo_id for asked in server.asked)


def test_many_that_end_at_once(
    valkey: Valkey, client: CancelClient, connection: redis.Redis, exchange: RunningExchange, logged: Logged
) -> None:
    """Hundreds of jobs of one claim that need no request end one after another, and the engine goes on."""
    tickets = client.cancel_many(CancelRequest(algo_id=n + 1, account="nobody") for n in range(512))
    with RunningEngine(valkey.url, exchange.url, 512):
        found = outcomes(client, tickets)

        assert {outcome.kind for outcome in found} == {OutcomeKind.REFUSED}
        assert len({connection.hget(f"rq:job:{ticket.id}", "started_at") for ticket in tickets}) == 1  # in one claim
        assert at_first_try(outcomes(client, cancel_all(client, opened(exchange, 3))))
    assert logged("defect") == []


# ---- completions ----------------------------------------------------------------------------------------------------


def test_what_comes_up_together_is_completed_together(
    valkey: Valkey, client: CancelClient, connection: redis.Redis, stack: ExitStack
) -> None:
    """Outcomes of one moment cost a few calls of Redis in all, not one each."""
    server = stack.enter_context(Answerer(holds=every))
    tickets = enqueued(client, 64)
    engine = stack.enter_context(RunningEngine(valkey.url, server.url, 64)).engine
    eventually(lambda: len(server.asked) == 64, what="all are sent")
    connection.config_resetstat()
    server.may_answer.set()

    assert at_first_try(outcomes(client, tickets))
    eventually(lambda: engine.in_hand == 0, what="each is told of")
    assert connection.info("commandstats")["cmdstat_evalsha"]["calls"] < 32


def stumbling(at: int, row_of: Callable[[Lease], Row]) -> Callable[[Parts], None]:
    """Has the cancel of one order end in a row of the test's own, or raise."""

    def change(parts: Parts) -> None:
        carry = parts.canceller.carry

        async def carried(lease: Lease, hold: Held) -> Row:
            row = await carry(lease, hold)
            return row_of(lease) if f'"algo_id":{at}'.encode() in lease.data else row

        vars(parts.canceller)["carry"] = carried

    return change


@pytest.mark.parametrize("delay", [None, "soon"], ids=["that cannot be sent", "that the script stumbles over"])
def test_one_bad_row_costs_its_own_job_alone(
    valkey: Valkey, client: CancelClient, stack: ExitStack, logged: Logged, delay: Any
) -> None:
    """What cannot be recorded of one job is told of, and comes back with its lease; the rest of its group is
    recorded."""
    server = stack.enter_context(Answerer(holds=every))
    tickets = enqueued(client, 9)
    bad = tickets[4]
    change = stumbling(5, lambda lease: Retry(lease, (), delay))
    stack.enter_context(RunningEngine(valkey.url, server.url, 16, change=change, LEASE_S="1"))
    eventually(lambda: len(server.asked) == 9, what="all are sent")
    server.may_answer.set()

    assert at_first_try(outcomes(client, [ticket for ticket in tickets if ticket is not bad], 2))
    eventually(lambda: len(logged("defect")) > 1, what="it has come back, and is told of again")
    assert {(event["id"], event["where"]) for event in logged("defect")} == {(bad.id, "complete")}
    assert client.outcome(bad.id) is None


def test_a_defect_in_one_job_leaves_the_others(
    valkey: Valkey, client: CancelClient, stack: ExitStack, logged: Logged, peek: Peek
) -> None:
    """A job that its worker stumbles over is told of without a word of the error's, comes back as perhaps sent, and
    keeps nobody from anything."""

    def stumble(lease: Lease) -> Row:
        raise ZeroDivisionError("signature=c4n4ry")

    server = stack.enter_context(Answerer())
    tickets = enqueued(client, 9)
    running = stack.enter_context(RunningEngine(valkey.url, server.url, 4, change=stumbling(5, stumble), LEASE_S="1"))

    assert at_first_try(outcomes(client, [ticket for ticket in tickets if ticket is not tickets[4]], 2))
    eventually(lambda: len(logged("defect")) > 1, what="it has come back, and is told of again")
    assert {(event["id"], event["error"]) for event in logged("defect")} == {(tickets[4].id, "ZeroDivisionError")}
    assert "c4n4ry" not in str(logged("defect"))
    assert peek.job(tickets[4].id)["c_attempts"].count("worker lost") >= 1
    running.stop()
    eventually(lambda: running.engine.in_hand == 0, what="it does not keep the engine from its end")


def test_an_outcome_is_told_once_though_its_group_is_written_again(
    valkey: Valkey, client: CancelClient, stack: ExitStack, logged: Logged
) -> None:
    """Where a bad row has its group written one by one, and Redis is lost in the midst of it, nothing counts twice."""
    proxy = stack.enter_context(Proxy(valkey.port))

    def behave(asked: Asked) -> Said:
        time.sleep(0.05 * (asked.algo_id or 0))
        return well(asked)

    server = stack.enter_context(Answerer(behave, lambda asked: asked.algo_id != 1))
    tickets = enqueued(client, 4)
    change = stumbling(4, lambda lease: Retry(lease, (), None))  # type: ignore[arg-type]
    running = RunningEngine(proxy.redis_url, server.url, 8, change=change, LEASE_S="30")
    complete = mark_of(running.store.complete([]))
    proxy.latency(500, complete)
    trap = proxy.limit_data(b"done\r\n$32\r\n" + tickets[2].id.encode())
    with running:
        eventually(lambda: len(server.asked) == 4 and client.outcome(tickets[0].id), what="the first one is written")
        server.may_answer.set()

        assert at_first_try(outcomes(client, tickets[:3]))
        eventually(lambda: running.engine.in_hand == 0, what="each is told of")
    assert trap.sprung == 1
    assert [event["id"] for event in logged("outcome")] == [ticket.id for ticket in tickets[:3]]
    assert running.engine.outcomes == 3


def test_an_answer_for_other_rows_is_none(
    valkey: Valkey, client: CancelClient, exchange: RunningExchange, stack: ExitStack
) -> None:
    """Without an answer for each row of a completion nobody is held for ever: the jobs come back with their leases."""
    spoiled: list[object] = []

    def change(parts: Parts) -> None:
        complete = parts.store.complete

        def completed(rows: Sequence[Row]) -> Request[Completed]:
            request = complete(rows)
            if spoiled:
                return request
            spoiled.append(rows)
            return replace(request, read=lambda answers, stamps: request.read([[answers[0][0]]], stamps))

        vars(parts.store)["complete"] = completed

    (ticket,) = cancel_all(client, opened(exchange, 1))
    running = stack.enter_context(RunningEngine(valkey.url, exchange.url, 4, change=change))

    assert ticket.wait(5).kind is OutcomeKind.CANCELLED
    eventually(lambda: spoiled and running.engine.in_hand == 0, what="nothing is held any more")


# ---- leaving --------------------------------------------------------------------------------------------------------


def test_a_stop_waits_for_every_claim_that_is_on_its_way(
    valkey: Valkey, client: CancelClient, peek: Peek, stack: ExitStack
) -> None:
    """A retry that is claimed in the moment of a stop is handed back, and not left to its lease."""
    proxy = stack.enter_context(Proxy(valkey.port))
    server = stack.enter_context(Answerer(lambda asked: OVERLOADED if asked.method == "DELETE" else well(asked)))
    stopped: list[bool] = []

    def change(parts: Parts) -> None:
        claim = parts.store.claim

        def claimed(slots: int, *, wait: bool, **options: bool) -> Request[Claimed]:
            if not wait and not stopped:  # a retry is due
                stopped.append(True)
                running.stop()
            request = claim(slots, wait=wait, **options)
            (*move, last) = request.commands
            return replace(request, commands=(*((*words[:-1], 0.05) for words in move), last))

        vars(parts.store)["claim"] = claimed

    (ticket,) = enqueued(client, 1)
    running = RunningEngine(proxy.redis_url, server.url, 4, change=change)
    proxy.latency(400, mark_of(running.store.claim(1, wait=False)))
    with running:
        eventually(running.has_ended, what="it was stopped")

    assert stopped
    assert (peek.held(), peek.waiting()) == ([], [ticket.id])


def test_what_a_stop_hands_back_keeps_its_order(
    valkey: Valkey, client: CancelClient, peek: Peek, stack: ExitStack
) -> None:
    """Jobs that were claimed and not sent stand in their order again after a stop, those of a claim on its way too."""
    proxy = stack.enter_context(Proxy(valkey.port))
    running: list[RunningEngine] = []

    def behave(asked: Asked) -> Said:
        if running[-1].engine.working_on == 17:  # it has claimed one ahead, and most likely asks for more
            running[-1].stop()
        time.sleep(0.05)
        return well(asked)

    server = stack.enter_context(Answerer(behave))
    tickets = enqueued(client, 4000)
    for _ in range(6):
        running.append(RunningEngine(proxy.redis_url, server.url, 16))
        proxy.latency(4, mark_of(running[-1].store.claim(1, wait=False)))
        with running[-1] as one:
            eventually(one.has_ended, 30, "it has claimed ahead, and was stopped")
        ended = {outcome.id for outcome in peek.ledger()}
        assert peek.waiting() == [ticket.id for ticket in tickets if ticket.id not in ended]
    assert {len(outcome.attempts) for outcome in peek.ledger()} == {1}


# ---- a host whose sleep no clock counts -----------------------------------------------------------------------------

IN_DOUBT = Said(HTTPStatus.SERVICE_UNAVAILABLE, {"code": -1000, "msg": "Unknown error, please check your request."})


class Host:
    """A host whose own clock stands still while it sleeps, though its wall clock does not, and a worker on it.

    The first DELETE of each order is answered late, and leaves it open what became of the order.
    """

    def __init__(self) -> None:
        self._slept_ns = 0
        self.watch = SleepWatch(counts_sleep=False, wall_ns=lambda: time.time_ns() + self._slept_ns)
        self.before_answers: Callable[[], None] = lambda: None
        self.answers_s = 0.0
        self.asked: list[Asked] = []
        self.story: list[str] = []  # sleeps, questions to Redis about leases that were taken, and calls
        self.holds: list[Held] = []
        self._doubted: set[int | None] = set()
        self._interrupts = ""
        self._clock: RedisClock

    def sleep(self) -> None:
        """Sleep for a minute."""
        self.story.append("slept")
        self._slept_ns += 60 * 10**9

    def step(self) -> None:
        """Be told a time by Redis that cannot be, as after a failover to a server whose clock is ahead."""
        self.story.append("slept")
        now_ns = local_ns()
        self._clock.observe(now_ns, now_ns, self._clock.now_ms() + 60_000)

    def behave(self, asked: Asked) -> Said:
        """The exchange."""
        self.asked.append(asked)
        self.story.append(f"{asked.method} {asked.algo_id}")
        if asked.algo_id in self._doubted:
            return well(asked)
        self._doubted.add(asked.algo_id)
        time.sleep(self.answers_s)
        self.before_answers()
        return IN_DOUBT

    def change(self, parts: Parts) -> None:
        """See when leases are renewed, and be able to sleep before an answer of Redis is read."""
        carry, beat = parts.canceller.carry, parts.store.beat

        self._clock = parts.store.clock

        async def carried(lease: Lease, hold: Held) -> Row:
            self.holds.append(hold)
            return await carry(lease, hold)

        def beaten(held: Sequence[Lease], figures: Any, life_s: int) -> Request[Beat]:
            self.story += ["renewed"] if held else []
            return beat(held, figures, life_s)

        vars(parts.canceller)["carry"] = carried
        vars(parts.store)["beat"] = beaten
        for asked in ("claim", "beat"):
            vars(parts.store)[asked] = partial(self._interrupted, asked, getattr(parts.store, asked))

    def asked_first(self, call: str) -> bool:
        """Whether Redis was asked whose the jobs are between the last sleep and the first such call behind it."""
        behind = self.story[len(self.story) - self.story[::-1].index("slept") :]
        return "renewed" in behind[: behind.index(call)]

    def sleep_before_reading(self, asked: str) -> None:
        """Sleep before the next answer to such a request is read, and have the first job's turn come before it."""
        self._interrupts = asked

    def _interrupted(self, asked: str, request_of: Any, *given: Any, **options: Any) -> Request[Any]:
        request: Request[Any] = request_of(*given, **options)

        def read(answers: list[Any], stamps: Any) -> Any:
            result = request.read(answers, stamps)
            if self._interrupts == asked and (isinstance(result, Beat) or result.leases):
                self._interrupts = ""
                self.sleep()
                assert not self.holds[0].is_valid()
            return result

        return replace(request, read=read)


@pytest.fixture
def host() -> Host:
    """It has not slept yet."""
    return Host()


@pytest.mark.parametrize("what", ["sleep", "step"])
def test_after_a_sleep_or_a_step_leases_are_renewed_before_anything_is_sent(
    valkey: Valkey, client: CancelClient, host: Host, stack: ExitStack, what: str
) -> None:
    """A worker that wakes in the middle of a cancel, or sees Redis' clock set, asks Redis for the job anew before its
    next call, and goes on."""
    server = stack.enter_context(Answerer(host.behave))
    host.before_answers = getattr(host, what)
    stack.enter_context(RunningEngine(valkey.url, server.url, 4, sleep=host.watch, change=host.change, LEASE_S="30"))
    (ticket,) = enqueued(client, 1)

    assert steps(ticket.wait(10)) == ["unclear", "open", "confirmed"]
    assert host.asked_first("GET 1")


def test_after_a_sleep_nothing_is_sent_for_a_job_that_somebody_else_took(
    valkey: Valkey, client: CancelClient, connection: redis.Redis, peek: Peek, host: Host, stack: ExitStack
) -> None:
    """A worker that slept past its leases, by a clock that did not count it, sends nothing more for its jobs."""
    server = stack.enter_context(Answerer(host.behave))
    other_exchange = stack.enter_context(Answerer())

    def be_taken_over() -> None:
        sleeper.beats.clear()
        host.sleep()
        sleeper.stop()
        connection.zadd(peek.keys.unfinished, {ticket.id: 1})  # by Redis' clock the lease has ended
        with RunningEngine(valkey.url, other_exchange.url, 4, "other"):
            assert ticket.wait(5).worker == "other"

    host.before_answers = be_taken_over
    sleeper = RunningEngine(
        valkey.url, server.url, 4, "sleeper", sleep=host.watch, change=host.change, patience_s=60, LEASE_S="30"
    )
    stack.enter_context(sleeper)
    (ticket,) = enqueued(client, 1)
    eventually(sleeper.has_ended, what="the sleeper has its answer, and leaves")

    assert [asked.method for asked in host.asked] == ["DELETE"]
    assert [outcome.worker for outcome in peek.ledger()] == ["other"]


def test_after_a_clock_refusal_nothing_is_sent_for_a_job_that_somebody_else_took(
    valkey: Valkey, client: CancelClient, connection: redis.Redis, peek: Peek, stack: ExitStack
) -> None:
    """Where the exchange calls the time wrong, no clock of this host is believed: Redis is asked whose job it is."""
    other_exchange, asked_for = stack.enter_context(Answerer()), list[Asked]()

    def behave(asked: Asked) -> Said:
        if asked.algo_id is None:
            return well(asked)
        asked_for.append(asked)
        if len(asked_for) > 1:
            return well(asked)
        sleeper.beats.clear()
        sleeper.stop()
        connection.zadd(peek.keys.unfinished, {ticket.id: 1})  # by Redis' clock the lease has ended
        with RunningEngine(valkey.url, other_exchange.url, 4, "other"):
            assert ticket.wait(5).worker == "other"
        return CLOCK_ERROR

    server = stack.enter_context(Answerer(behave))
    sleeper = RunningEngine(valkey.url, server.url, 4, "sleeper", patience_s=60, LEASE_S="30")
    stack.enter_context(sleeper)
    (ticket,) = enqueued(client, 1)
    eventually(sleeper.has_ended, what="the sleeper has its answer, and leaves")

    assert [asked.method for asked in asked_for] == ["DELETE"]
    assert [outcome.worker for outcome in peek.ledger()] == ["other"]


def test_a_claim_from_before_a_sleep_gives_no_lease(
    valkey: Valkey, client: CancelClient, host: Host, stack: ExitStack
) -> None:
    """A job whose claim was answered before a sleep and is read after it is asked for anew before it is sent."""
    server = stack.enter_context(Answerer(host.behave))
    host.answers_s = 1.0
    stack.enter_context(RunningEngine(valkey.url, server.url, 4, sleep=host.watch, change=host.change, LEASE_S="30"))
    (first,) = enqueued(client, 1)
    eventually(lambda: len(host.asked) == 1, what="the first one is under way")
    host.sleep_before_reading("claim")
    (second,) = enqueued(client, 1, first=2)

    assert [steps(each.wait(10)) for each in (first, second)] == [["unclear", "open", "confirmed"]] * 2
    assert host.asked_first("DELETE 2")


def test_a_renewal_from_before_a_sleep_prolongs_nothing(
    valkey: Valkey, client: CancelClient, host: Host, stack: ExitStack
) -> None:
    """A lease whose renewal was answered before a sleep and is read after it is asked for anew before the next call."""
    server = stack.enter_context(Answerer(host.behave))
    host.answers_s = 2.0
    running = RunningEngine(valkey.url, server.url, 4, sleep=host.watch, change=host.change, LEASE_S="4")
    stack.enter_context(running)
    (ticket,) = enqueued(client, 1)
    eventually(lambda: len(host.asked) == 1, what="the cancel is under way")
    host.sleep_before_reading("beat")
    eventually(lambda: not host.holds[0].is_valid(), what="the renewal was read")
    running.beats.clear()

    assert steps(ticket.wait(10)) == ["unclear", "open", "confirmed"]
    assert host.asked_first("GET 1")
