"""What a status tells of refused keys and of workers, read from a real server."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import redis
from rq import Queue
from rq.serializers import JSONSerializer
from rq.utils import utcformat, utcparse

from producer import AsyncCancelClient, CancelClient, CancelRequest, QueueUnavailable, WaitTimeout
from producer.keys import Band, Keys
from producer.protocol import Conversation
from producer.status import Status, read_status
from producer.workers import FRESH_S, LIVE_S
from tests.exporting import append, record
from tests.fault.proxy import Proxy
from tests.holders import OpenHolder, age, ended, later, orders
from tests.servers import Peek, Valkey, Workers, eventually
from tests.strategies import now_ms
from worker.sandbox.control import RunningExchange

KEYS = Keys()


def test_a_status_costs_three_round_trips(valkey: Valkey, connection: redis.Redis, workers: Workers) -> None:
    """However much there is to tell, with workers, gates, keys, held jobs, and thousands of outcomes."""
    workers.start()
    for account in ("a", "b", "c"):
        connection.sadd(KEYS.suspects, account)
        connection.hset(KEYS.breaker(account), mapping={"failures": 5, "since_ms": 1, "probe_at_ms": 2})
        connection.sadd(KEYS.held(account), "waits")
    connection.zadd(KEYS.scheduled, {"waits": 4e9})
    append(connection, *(record(number) for number in range(5200)))
    with Proxy(valkey.port) as counter, CancelClient.from_url(counter.redis_url) as client:
        client.status()  # the connection's own greeting
        counter.count.turns = 0

        seen = client.status()

        assert counter.count.turns == 3
    assert [(key.account, key.open, key.held) for key in seen.keys] == [(name, True, 1) for name in "abc"]
    assert (len(seen.workers), seen.outcomes_partial, sum(seen.outcomes.values())) == (1, True, 5000)


def test_what_waits_for_a_key_is_told_where_it_cannot_be_compared(valkey: Valkey, connection: redis.Redis) -> None:
    """A server that lacks ZINTERCARD, or a user who may not use it, costs no more than how exact that number is."""
    connection.execute_command("ACL", "SETUSER", "old", "reset", "on", "nopass", "~*", "&*", "+@all", "-zintercard")
    connection.sadd(KEYS.suspects, "default")
    connection.hset(KEYS.breaker("default"), mapping={"failures": 5, "reason": "401", "since_ms": 1, "probe_at_ms": 2})
    connection.sadd(KEYS.held("default"), "waits", "ended long ago")
    connection.zadd(KEYS.scheduled, {"waits": 4e9, "another": 4e9, "a third": 4e9})
    try:
        with CancelClient.from_url(valkey.url.replace("//", "//old:x@")) as client:
            assert [(key.account, key.held) for key in client.status().keys] == [("default", 2)]
    finally:
        connection.execute_command("ACL", "DELUSER", "old")


def test_a_refused_key_is_told(client: CancelClient, connection: redis.Redis) -> None:
    """Open breakers with what waits for them come before suspected keys; a breaker that is gone is not told."""
    now_ms = int(connection.time()[0]) * 1000
    connection.sadd(KEYS.suspects, "default", "desk2", "gone", b"\xff\x00odd")
    breaker: dict[Any, Any] = {"failures": 5, "reason": "401 -2015 Invalid\nAPI-key."}
    connection.hset(KEYS.breaker("desk2"), mapping=breaker)
    connection.hset(
        KEYS.breaker("default"), mapping=breaker | {"since_ms": now_ms - 34_000, "probe_at_ms": now_ms + 26_000}
    )
    connection.hset(KEYS.breaker("").encode() + b"\xff\x00odd", mapping={"failures": "NaN", "since_ms": "soon"})
    connection.sadd(KEYS.held("default"), "waits", "waits too", "ended long ago")
    connection.zadd(KEYS.scheduled, {"waits": 4e9, "waits too": 4e9, "another": 4e9})
    before = sorted(connection.scan_iter())

    seen = client.status()

    assert [(key.account, key.failures, key.open, key.held) for key in seen.keys] == [
        ("default", 5, True, 2),
        ("desk2", 5, False, 0),
        ("\ufffd odd", 0, False, 0),
    ]
    key = seen.keys[0]
    assert key.reason == "401 -2015 Invalid API-key."
    assert key.since_s == pytest.approx(34, abs=2)
    assert key.probe_in_s == pytest.approx(26, abs=2)
    lines = "\n".join(seen.lines())
    assert re.search(
        r"^key default +HELD BACK for 3\d s, 2 jobs wait, next try in 2\d s: 401 -2015 Invalid API-key\.$", lines, re.M
    )
    assert re.search(r"^key desk2 +refused 5 times in a row, still tried: 401 ", lines, re.M)
    told = seen.as_dict()["keys"]
    assert isinstance(told, list)
    assert told[1] == {
        **{"account": "desk2", "failures": 5, "open": False, "since_s": None},
        **{"reason": "401 -2015 Invalid API-key.", "probe_in_s": None, "held": 0},
    }
    assert sorted(connection.scan_iter()) == before


def test_a_key_that_the_exchange_refuses_is_seen(client: CancelClient, workers: Workers) -> None:
    """Workers that meet a refused key make it a line of the status, with the jobs that wait for it."""
    workers.start(BINANCE_DESK2_API_KEY="no-such-key", BINANCE_DESK2_API_SECRET="secret", WORKER_CONCURRENCY="1")
    for algo_id in range(1, 9):
        client.cancel(algo_id=algo_id, account="desk2")

    def held_back() -> bool:
        keys = client.status().keys
        return bool(keys) and keys[0].open and keys[0].held == 3

    eventually(held_back, 20, "three of eight wait")
    (key,) = client.status().keys
    assert (key.account, key.failures) == ("desk2", 5)
    assert key.reason is not None
    assert "-2015" in key.reason
    assert 0 < (key.probe_in_s or 0) <= 60


def test_workers_tell_their_figures(client: CancelClient, workers: Workers, connection: redis.Redis) -> None:
    """Requests in flight and their bound, the clock, and the weight; the highest fresh weight is the queue's."""
    workers.start(WORKER_CONCURRENCY="7")

    def row() -> Any:
        rows = client.status().workers
        return rows and rows[0].clock_offset_ms is not None and rows[0]

    seen: Any = eventually(row, 10, "its figures")
    assert (seen.in_flight, seen.concurrency, seen.weight_limit) == (0, 7, 2400)
    assert abs(seen.clock_offset_ms) < 2000
    assert seen.used_weight >= 0
    for name, weight, age_s in (("fresh", 1500, 0), ("stale", 2300, FRESH_S + 5)):
        key = f"{KEYS.worker_prefix}{name}"
        beat = connection.hget(KEYS.worker_prefix + seen.name, "last_heartbeat")
        assert isinstance(beat, bytes)
        stamp = utcformat(utcparse(beat.decode()) - timedelta(seconds=age_s))
        connection.hset(key, mapping={"hostname": "h", "last_heartbeat": stamp, "c_used_weight": weight})
        connection.sadd("rq:workers:cancels", key)
    status = client.status()
    assert (status.used_weight, status.weight_limit) == (1500, 2400)
    assert (status.as_dict()["used_weight"], status.as_dict()["weight_limit"]) == (1500, 2400)
    lines = "\n".join(status.lines())
    assert re.search(r"^used weight +1,500 of 2,400 \(62 %\)$", lines, re.M)
    assert "0 of 7" in lines
    stock = next(row for row in status.workers if row.name == "fresh")
    assert (stock.in_flight, stock.concurrency, stock.clock_offset_ms) == (None, None, None)


def test_a_frozen_worker_is_not_live(client: CancelClient, workers: Workers, connection: redis.Redis) -> None:
    """A worker that beats no more is told as silent, in lines and JSON, until it beats again."""
    worker = workers.start()
    eventually(lambda: [row.concurrency for row in client.status().workers] == [64], 10, "its first figures")
    worker.process.send_signal(signal.SIGSTOP)
    try:
        (row,) = client.status().workers
        key = KEYS.worker_prefix + row.name
        connection.pexpire(key, connection.pttl(key) - int(LIVE_S + 20) * 1000)  # as so much time would
        client.cancel(algo_id=1)
        seen = client.status()
        assert (seen.live_workers, len(seen.workers), seen.unattended) == (0, 1, True)
        lines = "\n".join(seen.lines())
        assert re.search(r"^workers +0 live, 1 silent: NO LIVE WORKER, and work is waiting$", lines, re.M)
        assert re.search(r" silent for 3\d s$", lines, re.M)
        told: Any = seen.as_dict()["workers"]
        assert [each["live"] for each in told] == [False]
    finally:
        worker.process.send_signal(signal.SIGCONT)
    eventually(lambda: client.status().live_workers == 1, 10, "it goes on")


def test_a_host_whose_clock_is_off_has_live_workers(
    client: CancelClient, workers: Workers, connection: redis.Redis
) -> None:
    """RQ's stamp of a beat is by the host's clock; the age of a worker of ours is by Redis', and it is counted."""
    workers.start().process.send_signal(signal.SIGSTOP)
    key = KEYS.worker_prefix + client.status().workers[0].name
    connection.hset(key, "c_concurrency", 64)
    for stamp in ("2020-01-01T00:00:00.000000Z", "2100-01-01T00:00:00.000000Z"):
        connection.hset(key, "last_heartbeat", stamp)
        (row,) = client.status().workers
        assert row.live
        assert 0 <= (row.heartbeat_age_s or 0) < LIVE_S
    connection.pexpire(key, connection.pttl(key) - int(LIVE_S) * 1000 - 1)
    assert not client.status().workers[0].live


def test_damaged_figures_do_not_end_the_look(client: CancelClient, connection: redis.Redis) -> None:
    """Whatever somebody writes into the keys, a status is given, with nothing in it that a terminal obeys."""
    connection.hset(Keys.gate("all"), mapping={"until_ms": 4 * 10**12, "reason": b"\xff\x1b[2J", "by": "x\ny"})
    connection.hset(
        "rq:worker:bad\x1b[2J", mapping={"hostname": b"\xfe", "last_heartbeat": "never", "c_in_flight": "1e9"}
    )
    connection.sadd("rq:workers:cancels", "rq:worker:bad\x1b[2J")
    connection.rpush(KEYS.waiting, b"\xff")
    connection.hset(KEYS.job_prefix.encode() + b"\xff", mapping={"status": "queued", "c_enqueued_at_ms": "late"})

    seen = client.status()

    (row,) = seen.workers
    assert (row.name, row.host, row.in_flight, row.heartbeat_age_s) == ("bad [2J", "\ufffd", None, None)
    assert (seen.gates[0].reason, seen.gates[0].by, seen.oldest_queued_s) == ("\ufffd [2J", "x y", None)
    assert all(line.isprintable() for line in seen.lines())


def test_a_status_tells_how_the_queue_stands(client: CancelClient, connection: redis.Redis) -> None:
    """Each unfinished job counts by where the index has it, and the oldest is the one that really waits longest."""
    now = int(now_ms(connection))
    tickets = client.cancel_many(CancelRequest(algo_id=number) for number in range(1, 6))
    first, second, gone, unlisted, deleted = tickets
    connection.lrem(KEYS.waiting, 1, unlisted.id)  # a crash or RQ took it off the list: it waits still
    for ticket, waits_ms in ((gone, 90_000), (deleted, 80_000), (second, 7_000), (first, 10)):
        connection.zadd(KEYS.unfinished, {ticket.id: Band.WAITING + now - waits_ms})
    connection.delete(KEYS.job_prefix + gone.id, KEYS.job_prefix + deleted.id)
    connection.delete(KEYS.waiting)
    connection.zadd(KEYS.unfinished, {"x": now + 60_000, "lost": 1, "lost now": now})
    connection.zadd(KEYS.unfinished, {"y": Band.RETRY + now + 60_000, "z": Band.RETRY + 1})
    connection.zadd(KEYS.failed, {"f": 4e9})
    connection.set(KEYS.suspended, 1)
    until_ms = now + 30_000
    gate = {"until_ms": until_ms, "reason": "429", "by": "worker.1"}
    connection.hset(Keys.gate("all"), mapping=gate)  # type: ignore[arg-type]
    before = sorted(connection.scan_iter())

    seen = client.status()

    assert (seen.queued, seen.in_flight, seen.scheduled, seen.failed, seen.suspended) == (3, 1, 2, 1, True)
    assert (seen.to_be_taken_over, seen.unattended) == (2, True)
    assert seen.oldest_queued_s is None
    assert 7 <= (seen.gated_s or 0) < 80
    assert [(g.scope, g.open, g.until_ms, g.reason, g.by) for g in seen.gates] == [
        ("all", False, until_ms, "429", "worker.1")
    ]
    assert seen.gates[0].closed_for_s == pytest.approx(30, abs=1)
    assert (seen.outcomes, seen.enqueue_to_outcome.p50, seen.used_weight) == ({}, None, None)
    assert sorted(connection.scan_iter()) == before
    shown = "\n".join(seen.lines())
    assert "SUSPENDED" in shown
    assert "CLOSED for" in shown
    assert first.id not in shown


def test_the_age_of_the_oldest_is_how_long_it_waits_for_a_worker(
    client: CancelClient, open_holder: OpenHolder, peek: Peek
) -> None:
    """A retry counts from when it is due, and a lost job from the end of its lease, both before and after a claim has
    come by: age means that workers are missing."""
    orders(client, 1)
    age(peek, 500_000)
    assert 500 <= (client.status().oldest_queued_s or 0) < 550
    holder = open_holder()
    (lease,) = holder.claim()
    assert client.status().oldest_queued_s is None
    peek("ZADD", KEYS.unfinished, peek.now_ms() - 400_000, lease.id)
    for queued in (0, 1):
        seen = client.status()
        assert seen.queued == queued
        assert 400 <= (seen.oldest_queued_s or 0) < 450
        assert holder.claimed(0).leases == []  # it is lost, and there is no slot for it
    holder.complete(later(holder.claim()[0]))
    assert client.status().oldest_queued_s is None
    peek("ZADD", KEYS.unfinished, Band.RETRY + peek.now_ms() - 300_000, lease.id)
    for queued, words in ((0, "0, one is due for 3"), (1, "1, the oldest for 3")):
        seen = client.status()
        assert (seen.queued, seen.scheduled) == (queued, 1 - queued)
        assert 300 <= (seen.oldest_queued_s or 0) < 350
        assert words in "\n".join(seen.lines())
        assert holder.claimed(0).leases == []
    assert holder.complete(*map(ended, holder.claim())) == [1]
    assert client.status().oldest_queued_s is None


def test_what_is_claimed_between_two_looks_waits_no_more(
    client: CancelClient, open_holder: OpenHolder, peek: Peek
) -> None:
    """A status is more than one look: what was on its way to a worker at the first may be in its hand at the next."""
    orders(client, 1)
    age(peek, 500_000)
    peek("DEL", KEYS.waiting)

    def claimed_meanwhile() -> Conversation[Status]:
        look = read_status(KEYS)
        answers = yield next(look)
        assert len(open_holder().claim()) == 1
        try:
            while True:
                answers = yield look.send(answers)
        except StopIteration as end:
            seen: Status = end.value
            return seen

    seen = client.converse(claimed_meanwhile())

    assert (seen.queued, seen.in_flight, seen.oldest_queued_s) == (0, 1, None)


def test_what_nobody_may_send_is_told_apart(client: CancelClient, connection: redis.Redis, peek: Peek) -> None:
    """Behind a closed gate, in a suspended queue, or for a refused key requests wait for no worker; what waited behind
    a gate waits for one from its opening on."""
    now = peek.now_ms()
    ticket = client.cancel(algo_id=1)
    age(peek, 500_000)

    def told() -> tuple[float | None, float | None]:
        """For how long something waits for a worker, and for what else, to a hundred seconds."""
        seen = client.status()
        ages = (seen.oldest_queued_s, seen.gated_s)
        lines = "\n".join(seen.lines())
        assert (", the oldest for" in lines, "held back" in lines) == tuple(each is not None for each in ages)
        assert [seen.as_dict()[name] for name in ("oldest_queued_s", "gated_s")] == list(ages)
        return tuple(None if each is None else round(each, -2) for each in ages)  # type: ignore[return-value]

    assert told() == (500, None)
    connection.hset(Keys.gate("all"), "until_ms", now + 600_000)
    assert told() == (None, 500)
    connection.hset(Keys.gate("all"), "until_ms", now - 200_000)
    assert told() == (200, None)
    connection.set(KEYS.suspended, 1)
    assert told() == (None, 500)
    connection.delete(KEYS.suspended, Keys.gate("all"))
    for host in ("one", "two"):
        row = {"hostname": host, "last_heartbeat": utcformat(utcparse("2026-01-01T00:00:00Z"))}
        connection.hset(KEYS.worker_prefix + host, mapping=row)  # type: ignore[arg-type]
        connection.sadd(KEYS.queue_workers, KEYS.worker_prefix + host)
    connection.hset(Keys.gate("one"), "until_ms", now + 600_000)
    assert told() == (500, None)
    connection.hset(Keys.gate("two"), "until_ms", now + 600_000)
    assert told() == (None, 500)
    connection.hset(Keys.gate("two"), "until_ms", now - 100_000)
    assert told() == (100, None)
    connection.zadd(KEYS.unfinished, {ticket.id: Band.RETRY + now + 600_000})
    assert told() == (None, None)
    connection.zadd(KEYS.scheduled, {ticket.id: 4e9})
    connection.sadd(KEYS.suspects, "desk2")
    connection.hset(KEYS.breaker("desk2"), mapping={"failures": 5, "since_ms": now - 700_000, "probe_at_ms": now})
    assert told() == (None, None)
    connection.sadd(KEYS.held("desk2"), ticket.id)
    assert told() == (None, 700)


def test_what_only_rqs_lists_know_is_counted_too(
    client: CancelClient, connection: redis.Redis, open_holder: OpenHolder
) -> None:
    """What another program enqueued waits as well, on its way to a worker too; its age is told once a worker saw it."""
    queue = Queue(KEYS.queue, connection=connection, serializer=JSONSerializer)
    for _ in range(2):
        queue.enqueue("os.getcwd")
    queue.enqueue_in(timedelta(hours=1), "os.getcwd")
    connection.lmove(KEYS.waiting, KEYS.claiming, "LEFT", "RIGHT")

    seen = client.status()
    assert (seen.queued, seen.scheduled, seen.oldest_queued_s, seen.unattended) == (2, 1, None, True)

    connection.lmove(KEYS.claiming, KEYS.waiting, "LEFT", "RIGHT")
    holder = open_holder()
    holder.ask(holder.store.tidy(0, 0))
    seen = client.status()
    assert (seen.queued, seen.scheduled) == (2, 1)
    assert seen.oldest_queued_s == pytest.approx(0, abs=1)


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
    eventually(lambda: client.status().workers[0].ok == 4, 5, "the worker has told of its jobs")

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


# --- keys of the wrong type ---------------------------------------------------------------------------------------

_HOST = "egress1"
_WORKERS = [KEYS.worker_prefix + name for name in ("one", "two")]


def figures(status: Status) -> dict[str, Any]:
    """Those of a status that do not change from one look to the next."""
    return {
        "queued": status.queued,
        "in_flight": status.in_flight,
        "scheduled": status.scheduled,
        "failed": status.failed,
        "closed": [gate.scope for gate in status.gates if not gate.open],
        "keys": [(key.account, key.held) for key in status.keys],
        "outcomes": dict(status.outcomes),
        "workers": [row.name for row in status.workers],
    }


def fill(connection: redis.Redis) -> None:
    """Something to tell for each figure."""
    now_ms = int(connection.time()[0]) * 1000
    connection.rpush(KEYS.waiting, "waits")
    connection.rpush(KEYS.claiming, "is claimed")
    connection.zadd(KEYS.unfinished, {"held": now_ms + 60_000})
    connection.zadd(KEYS.scheduled, {"later": 4e9})
    connection.zadd(KEYS.failed, {"failed": 4e9})
    append(connection, record(id="ended", finished_at_ms=now_ms))
    for scope in ("all", _HOST):
        connection.hset(KEYS.gate(scope), "until_ms", 4_000_000_000_000)
    connection.sadd(KEYS.suspects, "default")
    connection.hset(KEYS.breaker("default"), mapping={"failures": 5, "since_ms": 1, "probe_at_ms": 2})
    connection.sadd(KEYS.held("default"), "later")
    connection.sadd(KEYS.queue_workers, *_WORKERS)
    for key in _WORKERS:
        connection.hset(key, mapping={"hostname": _HOST, "last_heartbeat": utcformat(utcparse("2026-01-01T00:00:00Z"))})


@pytest.mark.parametrize(
    ("key", "cost"),
    [
        (KEYS.waiting, {"queued": 1}),
        (KEYS.claiming, {"queued": 1}),
        (KEYS.unfinished, {"in_flight": 0}),
        (KEYS.scheduled, {"scheduled": 0, "keys": [("default", 0)]}),
        (KEYS.failed, {"failed": 0}),
        (KEYS.outcomes, {"outcomes": {}}),
        (KEYS.gate("all"), {"closed": [_HOST]}),
        (KEYS.gate(_HOST), {"closed": ["all"]}),
        (KEYS.suspects, {"keys": []}),
        (KEYS.breaker("default"), {"keys": []}),
        (KEYS.held("default"), {"keys": [("default", 0)]}),
        (KEYS.queue_workers, {"workers": [], "closed": ["all"]}),
        (_WORKERS[0], {"workers": ["two"]}),
    ],
)
def test_a_key_of_the_wrong_type_costs_its_own_figure_alone(
    client: CancelClient, connection: redis.Redis, valkey: Valkey, key: str, cost: dict[str, Any]
) -> None:
    """It counts as empty and is named, to both clients and to people; every other figure is told as before."""
    fill(connection)
    whole = client.status()
    assert whole.damaged == ()
    assert all(figures(whole).values())
    connection.delete(key)
    connection.set(key, "of the wrong type")

    async def look() -> Status:
        async with AsyncCancelClient.from_url(valkey.url) as other:
            return await other.status()

    for seen in (client.status(), asyncio.run(look())):
        assert figures(seen) == figures(whole) | cost
        assert seen.damaged == (key,)
        assert seen.as_dict()["damaged"] == [key]
        assert any(line.startswith("DAMAGED") and key in line for line in seen.lines())


def test_any_other_refusal_is_raised(connection: redis.Redis, valkey: Valkey) -> None:
    """What is not about a key's type, a missing right here, is no figure of nothing, also beside a damaged key."""
    connection.set(KEYS.claiming, "of the wrong type")
    connection.execute_command("ACL", "SETUSER", "half", "on", ">secret", "~*", "&*", "+@all", "-zcard")
    try:
        with (
            CancelClient.from_url(valkey.url.replace("://", "://half:secret@")) as client,
            pytest.raises(QueueUnavailable, match="NoPermission"),
        ):
            client.status()
    finally:
        connection.execute_command("ACL", "DELUSER", "half")


def test_a_damaged_set_of_workers_says_nothing_of_them(client: CancelClient, connection: redis.Redis) -> None:
    """Where nobody can tell who works on the queue, nobody says that it is unattended."""
    ticket = client.cancel(algo_id=1)
    assert client.status().unattended
    connection.set(KEYS.queue_workers, "of the wrong type")

    seen = client.status()

    assert not seen.unattended
    assert any("not known: their set is damaged" in line for line in seen.lines())
    time.sleep(1.1)  # who serves is asked once a second
    with pytest.raises(WaitTimeout, match="nobody can tell who serves"):
        ticket.wait(0)
