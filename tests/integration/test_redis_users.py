"""The users of Redis that `python -m producer acl` prints: each can do its part, and no more."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from producer import AsyncCancelClient, CancelClient, CancelRequest, OutcomeKind, QueueUnavailable
from producer.keys import Keys
from producer.rights import Role, acl_lines
from producer.web.app import create_app
from tests.conftest import API_KEY, API_SECRET
from tests.exporting import exporting
from tests.orders import opened
from tests.rehearsing import Relay
from tests.servers import ROOT, Valkey, Workers, confirms_durability, eventually, python, running_valkey
from tests.webpages import TOKEN
from worker.sandbox.control import RunningExchange
from worker.sandbox.faults import Fault

KEYS = Keys()
#: How a script calls a command.
SCRIPT_COMMAND = re.compile(r"(?:call|on|write)\('([A-Z]+)'")


@pytest.fixture
def guarded() -> Iterator[Valkey]:
    """A server with these users; the default one is left to the tests' own looks."""
    with running_valkey("--appendonly", "yes") as server:
        with redis.Redis(port=server.port) as connection:
            for line in acl_lines(KEYS, redis_6=is_old(connection)):
                connection.execute_command(*line.split())
        yield server


@pytest.fixture
def fleet(guarded: Valkey, exchange: RunningExchange, tmp_path: Path) -> Iterator[Workers]:
    """Starts what is told where that server and the exchange are, as the worker's user."""
    environment = {
        "REDIS_URL": url_of(guarded, "worker"),
        "BINANCE_BASE_URL": exchange.url,
        "BINANCE_API_KEY": API_KEY,
        "BINANCE_API_SECRET": API_SECRET,
        "BACKOFF_CAP_MS": "200",
        "LEASE_S": "2",
    }
    made = Workers(tmp_path, environment)
    yield made
    made.stop()


def is_old(connection: redis.Redis) -> bool:
    """Whether it is a server that gets the lines without selectors."""
    version: str = connection.info()["redis_version"]
    return int(version.partition(".")[0]) < 7


def url_of(server: Valkey, name: str) -> str:
    """The server's URL with the login of a user."""
    return server.url.replace("//", f"//{name}:{name.upper()}-PASSWORD@")


def denied(server: Valkey) -> list[str]:
    """What was refused so far for want of a right."""
    with redis.Redis(port=server.port, decode_responses=True) as connection:
        log = connection.acl_log()
    return [f"{entry['username']}: {entry['context']} {entry['reason']} {entry['object']}" for entry in log]


# ---- each can do its part --------------------------------------------------------------------------------------------


def test_strategies_do_all_that_they_can(guarded: Valkey, exchange: RunningExchange, fleet: Workers) -> None:
    """Single and many, durable, urgent, joined, of a symbol, with a child, waited for and followed: all of it without
    one refusal, and without a right to write an outcome."""
    fleet.start()
    good, late, bad, entry, *more = opened(exchange, 8)
    exchange.script_faults(late, [Fault.UNAVAILABLE_503, Fault.LIMITED_1003])
    exchange.script_faults(bad, [Fault.DISABLED_2011])
    exchange.trigger(entry)
    with CancelClient.from_url(url_of(guarded, "strategy")) as strategy:
        durable = confirms_durability()
        assert strategy.cancel(algo_id=good, durable=durable).wait(30).kind is OutcomeKind.CANCELLED
        tickets = strategy.cancel_many([CancelRequest(late), CancelRequest(bad), CancelRequest(late, urgent=True)])
        child = strategy.cancel(algo_id=entry, on_trigger="cancel_child")
        ended, standing = strategy.wait_many([*tickets, child], 30)
        kinds = [ended[each.id].kind for each in (*tickets, child)]
        assert (kinds[:2], standing) == ([OutcomeKind.CANCELLED, OutcomeKind.REFUSED], {})
        assert kinds[3] is OutcomeKind.TRIGGERED
        assert strategy.outcome(tickets[0]) == ended[tickets[0].id]
        assert strategy.cancel_open("BTCUSDT").wait(30).off_the_book
        assert len(list(strategy.outcomes())) >= 5

    async def asynchronous() -> None:
        async with AsyncCancelClient.from_url(url_of(guarded, "strategy")) as strategy:
            tickets = await strategy.cancel_many([CancelRequest(algo_id) for algo_id in more])
            ended, _ = await strategy.wait_many(tickets, 30)
            assert {outcome.off_the_book for outcome in ended.values()} == {True}
            assert (await (await strategy.cancel_open("BTCUSDT")).wait(30)).orders == ()

    asyncio.run(asynchronous())
    assert denied(guarded) == []


def test_operators_readers_and_checks_do_their_part(guarded: Valkey, exchange: RunningExchange, fleet: Workers) -> None:
    """A retry from client and page, a gate that is opened, status, exporter, page, `check` and `health`: not one
    refusal, and `check` has no warning."""
    worker = fleet.start(LOG_LEVEL="DEBUG")
    first, second = opened(exchange, 2)
    for algo_id in (first, second):
        exchange.script_faults(algo_id, [Fault.DISABLED_2011])
    with (
        CancelClient.from_url(url_of(guarded, "operator")) as operator,
        CancelClient.from_url(url_of(guarded, "reader")) as reader,
    ):
        pages, looks = create_app(operator, TOKEN).test_client(), create_app(reader).test_client()
        tickets = operator.cancel_many([CancelRequest(first), CancelRequest(second)])
        assert {ticket.wait(30).kind for ticket in tickets} == {OutcomeKind.REFUSED}
        assert operator.retry([tickets[0]]) == [tickets[0].id]
        assert tickets[0].wait(30).kind is OutcomeKind.CANCELLED
        auth = {"Authorization": f"Bearer {TOKEN}"}
        assert pages.get(f"/retry?id={tickets[1].id}", headers=auth).status_code == 200
        assert pages.post("/retry/start", data={"id": tickets[1].id}, headers=auth).status_code == 303
        assert tickets[1].wait(30).kind is OutcomeKind.CANCELLED
        paths = ("/", "/queued", "/scheduled", "/outcomes?tag=x", "/failed", "/history", f"/search?q={first}")
        for path in (*paths, f"/requests/{tickets[0].id}"):
            assert (pages.get(path, headers=auth).status_code, looks.get(path).status_code) == (200, 200)
        with redis.Redis(port=guarded.port) as connection:  # a refused key has its own keys to be looked at
            connection.sadd(KEYS.suspects, "default " + "0" * 16)
            connection.hset(KEYS.breaker("0" * 16), "since_ms", 1)
            connection.sadd(KEYS.held("0" * 16), "x")
            connection.zadd(KEYS.scheduled, {"x": 2**40})
        seen = reader.status()
        assert (seen.live_workers, seen.damaged, [key.held for key in seen.keys]) == (1, (), [1])
        assert len(list(reader.outcomes())) == 4
    with redis.Redis.from_url(url_of(guarded, "operator")) as by_hand:
        by_hand.hset(KEYS.gate("all"), "until_ms", 0)
    with exporting(url_of(guarded, "reader")) as exporter:
        assert exporter.scrape()["cancel_up", ()] == 1
    health = python("-m", "worker", "health", REDIS_URL=url_of(guarded, "worker"))
    assert health.returncode == 0, health.stdout
    done = fleet.start("check", wait=False)
    assert done.process.wait(60) == 0, done.output()
    assert "warn" not in done.output()
    assert worker.stop() == 0
    assert denied(guarded) == []


def test_damage_lost_jobs_and_rqs_ways_need_no_more(guarded: Valkey, exchange: RunningExchange, fleet: Workers) -> None:
    """Keys of the wrong type are set aside, a dead worker's jobs taken over, and what RQ's tools put back is joined and
    done: each under its own user."""
    algo_id, other, last = opened(exchange, 3)
    exchange.script_faults(algo_id, [Fault.DISABLED_2011])
    with redis.Redis(port=guarded.port) as connection, CancelClient.from_url(url_of(guarded, "strategy")) as strategy:
        for key in (KEYS.waiting, KEYS.finished, KEYS.queues, KEYS.outcomes, KEYS.gate("all")):
            connection.set(key, "damaged")
        with pytest.raises(QueueUnavailable, match="refused"):
            strategy.cancel(algo_id=algo_id)
        assert connection.keys(f"{KEYS.job_prefix}*") == []
        connection.execute_command("ACL", "LOG", "RESET")  # it may not set aside, and says so
        first = fleet.start()
        eventually(lambda: connection.exists(f"{KEYS.queues}:set-aside", f"{KEYS.waiting}:set-aside") == 2)
        ticket = strategy.cancel(algo_id=algo_id)
        assert ticket.wait(30).kind is OutcomeKind.REFUSED
        exchange.set_latency_ms(3000)
        held = strategy.cancel(algo_id=other)
        eventually(lambda: connection.hget(KEYS.job_prefix + held.id, "c_lease"))
        first.stop(signal.SIGKILL)
        exchange.set_latency_ms(0)
        with redis.Redis.from_url(url_of(guarded, "stock")) as tools:
            queue = Queue("cancels", connection=tools, serializer=JSONSerializer)
            Job.fetch(ticket.id, connection=tools, serializer=JSONSerializer).requeue()
            again = strategy.cancel(algo_id=algo_id)
            assert (again.id, again.duplicate, strategy.outcome(again)) == (ticket.id, True, None)
            assert connection.exists(KEYS.outcome_prefix + ticket.id) == 1  # until the claim, and nobody's outcome
            taken_back = strategy.cancel(algo_id=last)
            Job.fetch(taken_back.id, connection=tools, serializer=JSONSerializer).cancel()
            assert queue.count >= 1
        fleet.start()
        ended = [each.wait(30) for each in (again, held, taken_back)]
        assert [(outcome.kind, outcome.run) for outcome in ended[:2]] == [
            (OutcomeKind.CANCELLED, 2),
            (OutcomeKind.CANCELLED, 1),
        ]
        assert ended[2].kind is OutcomeKind.GAVE_UP
    assert denied(guarded) == []


def test_a_stock_worker_does_its_part(guarded: Valkey, exchange: RunningExchange, fleet: Workers) -> None:
    """A stock `rq worker` with its scheduler, and `rq info`, under a user of their own."""
    good, late = opened(exchange, 2)
    exchange.script_faults(late, [Fault.UNAVAILABLE_503])
    rq = (str(Path(sys.executable).with_name("rq")),)
    url = ("--url", url_of(guarded, "stock"))
    stock = fleet.start("worker", "cancels", "--serializer", "json", "--with-scheduler", *url, command=rq, wait=False)
    with CancelClient.from_url(url_of(guarded, "strategy")) as strategy:
        tickets = strategy.cancel_many([CancelRequest(good), CancelRequest(late)])
        ended, _ = strategy.wait_many(tickets, 60)
        assert {outcome.kind for outcome in ended.values()} == {OutcomeKind.CANCELLED}, stock.output()
    info = fleet.start("info", "cancels", *url, command=rq, wait=False)
    assert info.process.wait(60) == 0, info.output()
    stock.stop()
    assert denied(guarded) == []


def test_a_rehearsal_does_its_part(guarded: Valkey, relay: Relay, fleet: Workers) -> None:
    """It works on a queue of its own, and leaves nothing there."""
    done = fleet.start("rehearse", wait=False, REDIS_URL=url_of(guarded, "rehearsal"), BINANCE_BASE_URL=relay.url)
    assert done.process.wait(60) == 0, done.output()
    assert denied(guarded) == []


# ---- and no more -----------------------------------------------------------------------------------------------------

ID = "0" * 32
FORGED = ("EVAL", f"return redis.call('SET', '{KEYS.outcome_prefix}{ID}', '1')", 0)
REFUSED: list[tuple[Role, tuple[Any, ...]]] = [
    (Role.STRATEGY, ("SET", KEYS.outcome_prefix + ID, "1")),
    (Role.STRATEGY, FORGED),
    (Role.STRATEGY, ("DEL", KEYS.outcome_prefix + ID)),
    (Role.STRATEGY, ("EXPIRE", KEYS.outcome_prefix + ID, 1)),
    (Role.STRATEGY, ("XADD", KEYS.outcomes, "*", "outcome", "{}")),
    (Role.STRATEGY, ("XTRIM", KEYS.outcomes, "MAXLEN", 0)),
    (Role.STRATEGY, ("PUBLISH", KEYS.outcome_prefix + ID, "1")),
    (Role.STRATEGY, ("HSET", KEYS.gate("all"), "until_ms", 0)),
    (Role.STRATEGY, ("DEL", KEYS.gate("all"))),
    (Role.STRATEGY, ("HSET", KEYS.breaker("0" * 16), "since_ms", 1)),
    (Role.STRATEGY, ("SADD", KEYS.suspects, "default")),
    (Role.STRATEGY, ("SET", KEYS.suspended, 1)),
    (Role.STRATEGY, ("ZADD", KEYS.failed, 1, ID)),
    (Role.STRATEGY, ("ZREM", KEYS.unfinished, ID)),
    (Role.STRATEGY, ("LPOP", KEYS.waiting)),
    (Role.STRATEGY, ("SET", KEYS.waiting, "1")),
    (Role.STRATEGY, ("SET", KEYS.job_prefix + ID, "1")),
    (Role.STRATEGY, ("DEL", KEYS.job_prefix + ID)),
    (Role.STRATEGY, ("RENAME", KEYS.job_prefix + ID, KEYS.job_prefix + "x")),
    (Role.STRATEGY, ("HSET", KEYS.worker_prefix + "w", "c_beat_at_ms", 1)),
    (Role.STRATEGY, ("GET", "somebody-elses")),
    (Role.STRATEGY, ("SCAN", 0)),
    (Role.STRATEGY, ("FLUSHDB",)),
    (Role.STRATEGY, ("CLIENT", "LIST")),
    (Role.STRATEGY, ("CLIENT", "PAUSE", 1)),
    (Role.STRATEGY, ("CLIENT", "TRACKING", "ON", "BCAST", "REDIRECT", 1)),
    (Role.READER, ("CLIENT", "TRACKING", "ON", "BCAST", "REDIRECT", 1)),
    (Role.OPERATOR, ("CLIENT", "TRACKING", "ON", "BCAST", "REDIRECT", 1)),
    (Role.WORKER, ("CLIENT", "TRACKING", "ON", "BCAST", "REDIRECT", 1)),
    (Role.STOCK, ("CLIENT", "TRACKING", "ON", "BCAST", "REDIRECT", 1)),
    (Role.READER, ("SET", KEYS.outcome_prefix + ID, "1")),
    (Role.READER, ("RPUSH", KEYS.waiting, ID)),
    (Role.READER, ("HSET", KEYS.gate("all"), "until_ms", 0)),
    (Role.READER, ("EVAL", "return 1", 0)),
    (Role.OPERATOR, ("SET", KEYS.outcome_prefix + ID, "1")),
    (Role.OPERATOR, ("XADD", KEYS.outcomes, "*", "outcome", "{}")),
    (Role.OPERATOR, ("DEL", KEYS.gate("all"))),
    (Role.OPERATOR, ("FLUSHALL",)),
    (Role.WORKER, ("CONFIG", "GET", "requirepass")),
    (Role.WORKER, ("KEYS", "*")),
    (Role.WORKER, ("SET", "somebody-elses", "1")),
    (Role.WORKER, ("RPUSH", "rq:queue:others", ID)),
    (Role.STOCK, ("SET", "somebody-elses", "1")),
    (Role.STOCK, ("FLUSHDB",)),
    (Role.REHEARSAL, ("RPUSH", KEYS.waiting, ID)),
    (Role.REHEARSAL, ("SET", KEYS.outcome_prefix + ID, "1")),
]


def test_no_user_can_do_more(guarded: Valkey) -> None:
    """What is not its part is refused: no outcome, gate, breaker or registry is forged, and nothing is destroyed."""
    with redis.Redis(port=guarded.port) as connection:
        if is_old(connection):
            pytest.skip("Redis 6.2 cannot keep them apart")
    for role, command in REFUSED:
        with redis.Redis.from_url(url_of(guarded, role)) as connection:
            try:
                said: object = connection.execute_command(*command)
            except redis.ResponseError as error:
                said = error
        assert isinstance(said, redis.ResponseError), (role, command)
        told = isinstance(said, redis.exceptions.NoPermissionError) or re.search(
            r"permissions|can't (run|access)", str(said)
        )
        assert told, (role, command, said)
    with redis.Redis(port=guarded.port) as connection, CancelClient.from_url(url_of(guarded, "strategy")) as strategy:
        connection.hset(KEYS.job_prefix + ID, "c_done", "refused")
        connection.zadd(KEYS.failed, {ID: 1})
        for ask in (strategy.status, lambda: strategy.retry([ID])):
            with pytest.raises(QueueUnavailable, match="lacks a right: `python -m producer acl`"):
                ask()


# ---- where they come from --------------------------------------------------------------------------------------------


def words_of(role: Role) -> set[str]:
    """The commands that a user is given by their own names."""
    line = next(line for line in acl_lines(KEYS, redis_6=True) if line.startswith(f"ACL SETUSER {role} "))
    return set(re.findall(r"\+([a-z]+)(?= |$)", line))


def test_the_writes_are_those_of_the_scripts(connection: redis.Redis) -> None:
    """Each user writes by the commands that its scripts use, and by no other; what a strategy cannot set aside, a
    worker does. A check rehearses each of a worker's."""
    reads = {name.decode() for name in connection.execute_command("ACL", "CAT", "read")} | {"time"}

    def said_in(*scripts: str) -> set[str]:
        texts = ((ROOT / f"{script}.lua").read_text("utf-8") for script in scripts)
        return {name.lower() for text in texts for name in SCRIPT_COMMAND.findall(text)} - reads

    begun = ("producer/scripts/job", "producer/scripts/place", "producer/scripts/enqueue")
    ours = tuple(str(path.relative_to(ROOT)).removesuffix(".lua") for path in (ROOT / "worker/scripts").glob("*.lua"))
    common = words_of(Role.READER) | {"eval", "evalsha"}
    session = {"publish", "subscribe", "unsubscribe", "multi", "exec", "discard", "info"}
    assert words_of(Role.STRATEGY) - common == said_in(*begun) - {"rename"}
    assert words_of(Role.OPERATOR) - common == said_in(*begun, "producer/scripts/retry") - {"rename"}
    assert words_of(Role.WORKER) - common - session == said_in(*begun[:2], *ours) | {"blmove"}
    rehearsed = (ROOT / "worker/check_redis.py").read_text("utf-8")
    assert [name for name in said_in(*begun[:2], *ours) if f"{name.upper()} {{" not in rehearsed] == []


def test_the_documents_hold_what_the_command_prints() -> None:
    """Who reads operating.md gives Redis the lines that the command prints; a queue's name stands in all its keys."""
    text = (ROOT / "worker/docs/operating.md").read_text("utf-8")
    printed = python("-m", "producer", "acl").stdout.splitlines()
    assert printed == acl_lines(KEYS)
    assert [line for line in printed if f"\n{line}\n" not in text] == []
    of_desk = python("-m", "producer", "acl", CANCEL_QUEUE="desk-a").stdout
    assert (of_desk.count("cancels"), "~desk-a:outcome:*" in of_desk) == (0, True)
    wrong = python("-m", "producer", "acl", "--queue", "a b")
    assert (wrong.returncode, wrong.stdout) == (2, "")
