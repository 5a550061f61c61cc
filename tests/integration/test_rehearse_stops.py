"""Rehearsals that are stopped, killed, or not alone."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest
import redis

from producer.keys import Keys
from tests.rehearsing import LEFT, OPEN_ORDERS, ORDER, GoOn, Relay, refusal, run
from tests.servers import ROOT, eventually, running_valkey, scrubbed

# ---- being stopped ---------------------------------------------------------------------------------------------------


def started(demo: dict[str, str]) -> subprocess.Popen[str]:
    """A rehearsal in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "worker", "rehearse"],
        cwd=ROOT,
        env=scrubbed() | demo,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(("number", "method"), [(signal.SIGINT, "POST"), (signal.SIGTERM, "DELETE")])
def test_who_stops_it_leaves_nothing(
    number: signal.Signals, method: str, demo: dict[str, str], relay: Relay, connection: redis.Redis
) -> None:
    """A signal while the order is placed, or while it is cancelled: the order is taken back before the end."""
    here = threading.Event()

    def stop(go_on: GoOn) -> bytes:
        assert here.wait(30)
        process.send_signal(number)
        return go_on() if method == "POST" else refusal(-1008, status="503 Busy")

    relay.once(method, ORDER, stop)
    process = started(demo)
    here.set()
    out, _ = process.communicate(timeout=60)

    assert process.returncode == 128 + number, out
    assert out.splitlines()[-1].startswith("interrupted: ")
    assert relay.order().status == "CANCELED"
    assert connection.dbsize() == 0


@pytest.mark.parametrize("symbol", ["BTCUSDT", "SOLUSDT"])
def test_what_a_killed_rehearsal_left_is_cleared_by_the_next(
    symbol: str, demo: dict[str, str], relay: Relay, connection: redis.Redis
) -> None:
    """After SIGKILL the order rests and keys stand in Redis, for a while only; the next start, on whatever symbol,
    cancels and removes them, says so, and leaves all other orders alone."""
    others = relay.exchange.add_orders(client_algo_ids=["mine", "acq-rehearsal-of-mine", f"x{LEFT}"])
    others += relay.exchange.add_orders(client_algo_ids=[LEFT], symbol="ETHUSDT")
    here, held = threading.Event(), threading.Event()

    def hold(go_on: GoOn) -> bytes:
        here.set()
        assert held.wait(60)
        raise ConnectionResetError

    relay.once("DELETE", ORDER, hold)
    process = started(demo)
    assert here.wait(60)
    order = relay.order()
    eventually(lambda: all(connection.ttl(key) > 0 for key in connection.scan_iter() if key != b"rq:queues"))
    process.kill()
    process.communicate(timeout=60)
    held.set()
    assert relay.order().status == "NEW"
    assert connection.dbsize() > 0

    code, text = run(demo, symbol)

    assert code == 0, text
    assert f"leftover of a killed rehearsal: {order.client_algo_id}, its order is CANCELED now" in text
    book = relay.exchange.book()
    assert book[order.algo_id].status == "CANCELED"
    assert {book[other.algo_id].status for other in others} == {"NEW"}
    assert connection.dbsize() == 0


def test_an_order_that_was_left_without_a_queue_is_cleared(demo: dict[str, str], relay: Relay) -> None:
    """An order on the symbol that bears a rehearsal's name, of which nobody knows any more, is cancelled and told."""
    (left,) = relay.exchange.add_orders(client_algo_ids=[LEFT])

    code, text = run(demo)

    assert code == 0, text
    assert f"leftover of a killed rehearsal: {LEFT}, its order is CANCELED now" in text
    assert relay.exchange.book()[left.algo_id].status == "CANCELED"


def test_other_queues_jobs_are_no_leftovers(demo: dict[str, str], relay: Relay, connection: redis.Redis) -> None:
    """The job of another queue that somebody wrote into a dead rehearsal's keys is not removed with them."""
    keys = Keys(LEFT)
    connection.sadd(keys.queues, keys.waiting)
    connection.zadd(keys.unfinished, {"a-job": 1})
    connection.set(keys.waiting, "damaged")
    connection.hset(f"{keys.job_prefix}a-job", "origin", "cancels")

    code, text = run(demo)

    assert code == 0, text
    assert LEFT in text
    assert set(connection.scan_iter()) == {f"{keys.job_prefix}a-job".encode()}


def test_a_reader_that_leaves_ends_nothing(demo: dict[str, str], relay: Relay) -> None:
    """Where stdout is closed in the middle, the order is cancelled all the same, and the exit code tells."""
    process = started(demo)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()

    assert process.wait(60) == 0
    assert relay.order().status == "CANCELED"


def test_a_ban_is_not_made_worse(demo: dict[str, str], relay: Relay) -> None:
    """Once the exchange has said that this address is to be quiet, nothing more is sent, and the order that is left is
    named."""
    banned = refusal(-1003, "Too many requests.", "429 No")

    def ban(_: GoOn) -> bytes:
        relay.answer("DELETE", ORDER, banned)
        relay.answer("GET", ORDER, banned)
        relay.answer("GET", OPEN_ORDERS, banned)
        return banned

    relay.hooks["DELETE", ORDER] = ban

    code, text = run(demo | {"CANCEL_DEADLINE_S": "2"})

    assert code == 1, text
    assert relay.order().client_algo_id in text.splitlines()[-1]
    assert len(relay.asked("DELETE")) == 1
    assert len([target for target in relay.asked("GET") if target.startswith(ORDER)]) == 1


def test_another_rehearsal_at_work_is_left_alone(demo: dict[str, str], relay: Relay, connection: redis.Redis) -> None:
    """As long as a rehearsal lives nobody takes its order and its queue for leftovers."""
    (order,) = relay.exchange.add_orders(client_algo_ids=[LEFT])
    keys = Keys(LEFT)
    connection.sadd(keys.queues, keys.waiting)
    connection.rpush(keys.waiting, "its-job")
    connection.hset(f"{keys.job_prefix}its-job", "origin", LEFT)
    with connection.pubsub(ignore_subscribe_messages=True) as alive:
        alive.subscribe(keys.outcome_prefix + LEFT)
        alive.get_message(timeout=20)
        code, text = run(demo)

    assert code == 0, text
    assert f"{LEFT} is the order of another rehearsal" in text
    assert relay.exchange.book()[order.algo_id].status == "NEW"
    assert connection.llen(keys.waiting) == 1


def test_a_redis_that_goes_away_leaves_no_order(demo: dict[str, str], relay: Relay) -> None:
    """Where Redis dies once the order is placed, the order is taken back past the queue."""
    with running_valkey() as server:

        def die(go_on: GoOn) -> bytes:
            server.stop(signal.SIGKILL)
            return go_on()

        relay.once("POST", ORDER, die)
        code, text = run(demo | {"REDIS_URL": server.url})

    assert code == 69, text
    assert relay.order().status == "CANCELED"


def test_its_queue_is_its_own(demo: dict[str, str], relay: Relay, connection: redis.Redis) -> None:
    """A closed gate and a waiting job of the fleet's neither hold a rehearsal up nor change."""
    keys = Keys()
    connection.hset(keys.gate("all"), "until_ms", "9999999999999")
    connection.rpush(keys.waiting, "a-job")

    code, text = run(demo)

    assert code == 0, text
    assert set(connection.scan_iter()) == {keys.gate("all").encode(), keys.waiting.encode()}
