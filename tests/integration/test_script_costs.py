"""What the scripts cost: round trips, commands, and what stays behind; and how they spell a moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest
import redis
from hypothesis import example, given
from hypothesis import strategies as st
from rq.utils import utcformat

from producer import CancelClient, OutcomeKind
from producer.keys import Keys, Script
from tests.examples import examples
from tests.fault.proxy import Proxy
from tests.holders import Holder, OpenHolder, back, ended, ids, later, orders
from tests.servers import Peek, Valkey
from worker.store import Suspect


def test_scripts_survive_a_flush(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """A server that has forgotten the scripts gets them again, and no call is lost or doubled."""
    tickets = [ticket.id for ticket in orders(client, 3)]

    def forgotten() -> Holder:
        peek("SCRIPT", "FLUSH")
        return holder

    leases = forgotten().claim(1, wait=True) + forgotten().claim(1)
    assert ids(leases) == tickets[:2]
    assert forgotten().beat(*leases).lost == frozenset()
    assert forgotten().complete(*map(ended, leases)) == [1, 1]
    assert ids(forgotten().claim_one(tickets[2]).leases) == tickets[2:]
    assert forgotten().ask(holder.store.tidy(0, 0)) == (0, 0, ())
    assert forgotten().ask(holder.store.key(Suspect("default", "0" * 16), "ask", "x", 5, 5)) == (0, "")
    assert forgotten().close_gate(5) > 0
    assert len(peek.ledger()) == 2


def test_round_trips(valkey: Valkey, client: CancelClient, open_holder: OpenHolder) -> None:
    """Waiting and claiming are one round trip, and so is completing fifty jobs, a beat, and closing the gate."""
    orders(client, 60)
    with Proxy(valkey.port) as counter:
        holder = open_holder(port=counter.port)
        holder.complete(*map(back, holder.claim(1, wait=True)))  # connects, and the server learns the scripts
        holder.beat()
        holder.close_gate(0)
        before = counter.count.turns

        leases = holder.claim(50, wait=True)
        assert (len(leases), counter.count.turns - before) == (50, 1)
        holder.beat(*leases)
        assert counter.count.turns - before == 2
        holder.complete(*map(ended, leases))
        assert counter.count.turns - before == 3
        holder.close_gate(0)
        assert counter.count.turns - before == 4


def test_a_drained_queue_leaves_a_constant_number_of_keys(
    client: CancelClient, open_holder: OpenHolder, peek: Peek
) -> None:
    """After 500 jobs nothing stays for ever that was not there after the first: what they leave carries a lifetime."""
    peek("HSET", "rq:worker:w", "birth", "x")
    peek("EXPIRE", "rq:worker:w", 60)
    holder = open_holder("w")

    def drain(count: int, first: int) -> set[str]:
        orders(client, count, first)
        while leases := holder.claim(64):
            kinds = (OutcomeKind.REFUSED if i % 3 == 0 else OutcomeKind.CANCELLED for i in range(len(leases)))
            holder.complete(*map(ended, leases, kinds))
        return {key for key in peek("KEYS", "*") if peek("TTL", key) == -1}

    once = drain(1, 1)
    once |= drain(1, 2)  # one of each sort

    assert drain(500, 1000) <= once | {peek.keys.failed, peek.keys.finished}
    keys = peek.keys
    assert once <= {"rq:queues", keys.failed, keys.finished, keys.outcomes, keys.counts}
    assert holder.is_drained()


def test_drained_sees_every_place(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """A queue is drained only when no job waits, is on its way, is due later, is in anybody's hand or in no list."""
    assert holder.is_drained()
    client.cancel(algo_id=1)
    assert not holder.is_drained()
    (lease,) = holder.claim()
    assert not holder.is_drained()
    holder.complete(later(lease, 1))
    assert not holder.is_drained()
    time.sleep(0.005)
    (lease,) = holder.claim()
    holder.complete(back(lease))
    peek("DEL", peek.keys.waiting)
    assert not holder.is_drained()
    client.cancel(algo_id=1)
    holder.complete(*map(ended, holder.claim()))
    assert holder.is_drained()
    peek("RPUSH", peek.keys.claiming, "x")
    assert not holder.is_drained()


@pytest.fixture(scope="module")
def rq_time(_valkey_process: Valkey) -> Iterator[Callable[[int, int], str]]:
    """The scripts' spelling of a moment: seconds since the epoch and microseconds."""
    source = Script(Keys().lua() | {"GATE": "g", "DEADLINE_MS": 1}, "worker/common.lua").source
    with redis.Redis(port=_valkey_process.port, decode_responses=True) as connection:
        spell = connection.register_script(
            source + "now.s, now.micros = tonumber(ARGV[1]), tonumber(ARGV[2]) return now.stamp()"
        )
        yield lambda seconds, micros: str(spell(args=[seconds, micros]))


@examples(400)
@given(st.integers(0, 4_102_444_799), st.integers(0, 999_999))
@example(0, 0)
@example(951_782_400, 0)  # 2000-02-29
@example(951_868_799, 999_999)
@example(1_709_164_800, 1)  # 2024-02-29
@example(4_107_542_399, 0)  # the last second before 2100-03-01, a year without a leap day
@example(1_735_689_599, 999_999)  # the last moment of 2024
def test_rq_time_is_spelt_as_rq_spells_it(rq_time: Callable[[int, int], str], seconds: int, micros: int) -> None:
    """The scripts write any moment as rq.utils.utcformat writes it."""
    moment = datetime.fromtimestamp(seconds, UTC).replace(microsecond=micros)

    assert rq_time(seconds, micros) == utcformat(moment)
