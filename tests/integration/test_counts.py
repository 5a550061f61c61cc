"""The counts that whoever records an outcome keeps, and what they tell of the last hour and the last day."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha1
from typing import Any

import pytest
import redis

from producer import CancelClient, OutcomeKind
from producer.counts import MINUTES_KEPT, SIZE, Counts
from producer.keys import Keys
from producer.message import ListedOrder, Outcome
from producer.protocol import Conversation
from producer.timeline import Timeline, read_counts, read_timeline
from tests.holders import SPOILED, Holder, OpenHolder, back, ended, later, orders, tried
from tests.servers import Peek
from worker.store import Done, Lease, Row

KEYS = Keys()
NOON = 29_400_000  # a minute since the epoch that begins an interval of whatever length
DEAD = OutcomeKind.REFUSED


def timed(lease: Lease, first_ms: int, took_ms: int, kind: OutcomeKind = OutcomeKind.CANCELLED) -> Done:
    """An end, so long after the enqueue."""
    at_ms = lease.enqueued_at_ms
    attempts = (replace(tried(1, "confirmed"), at_ms=at_ms + first_ms),)
    row = ended(lease, kind, attempts=attempts, enqueued_at_ms=at_ms)
    return replace(row, outcome=replace(row.outcome, finished_at_ms=at_ms + took_ms))


def counts(connection: redis.Redis) -> Counts:
    """All that was counted."""
    found = told(connection, read_counts(KEYS))
    assert isinstance(found, Counts)
    return found


def told(connection: redis.Redis, conversation: Conversation[Any], at_s: int | None = None) -> Any:
    """What a conversation comes to, with the server's clock at ``at_s``."""
    answers: list[Any] | None = None
    while True:
        try:
            commands = conversation.send(answers) if answers is not None else next(conversation)
        except StopIteration as end:
            return end.value
        with connection.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers = pipeline.execute(raise_on_error=False)
        if at_s is not None and list(commands) == [("TIME",)]:
            answers = [(at_s, 0)]


class Played:
    """Outcomes recorded at given moments: the script is told another time than the server's."""

    def __init__(self, client: CancelClient, holder: Holder, connection: redis.Redis) -> None:
        self._client, self._holder, self._connection = client, holder, connection
        self._source = holder.store._scripts["complete"].source
        self._order = 0

    def record(self, minute: int, kind: OutcomeKind = OutcomeKind.CANCELLED, count: int = 1) -> None:
        """So many outcomes of one kind at some moment of a minute, recorded as a group."""
        orders(self._client, count, self._order + 1)
        self._order += count
        rows = [timed(lease, 3, 40, kind) for lease in self._holder.claim(count)]
        script = self._holder.store._scripts["complete"]
        script.source = self._source.replace("redis.call('TIME')", f"{{'{60 * minute + 7}', '0'}}")
        script.sha = sha1(script.source.encode()).hexdigest()
        assert self._holder.complete(*rows) == [1] * count

    def timeline(self, minute: int, minutes: int = 60, step: int = 1) -> Timeline:
        """The last minutes as of some moment."""
        found = told(self._connection, read_timeline(KEYS, minutes, step), 60 * minute + 30)
        assert isinstance(found, Timeline)
        assert [each.start_ms for each in found.intervals] == list(
            range(found.intervals[0].start_ms, found.at_ms, 60_000 * step)
        )
        return found

    def kinds(self, minute: int, minutes: int = 60, step: int = 1) -> dict[int, dict[str, int]]:
        """What became of requests, by the minute in which an interval begins; empty intervals are left out."""
        found = self.timeline(minute, minutes, step)
        return {
            each.start_ms // 60_000: {kind.value: n for kind, n in each.counts.kinds.items() if n}
            for each in found.intervals
            if each.counts.count
        }


@pytest.fixture
def played(client: CancelClient, open_holder: OpenHolder, connection: redis.Redis) -> Played:
    """Somebody who records outcomes at given moments."""
    return Played(client, open_holder(), connection)


def test_each_outcome_is_counted_once(
    client: CancelClient, holder: Holder, connection: redis.Redis, peek: Peek
) -> None:
    """Kinds are those of the ledger and times are exact; a completion that is repeated, a retry, what is handed back
    and what somebody else has ended count nothing."""
    orders(client, 6)
    one, two, three, four, five, six = holder.claim()
    rows: list[Row] = [
        timed(one, 0, 7),
        timed(two, 2, 70_000, DEAD),
        later(three),
        back(four),
        ended(five),
        timed(six, 400, 10**6),
    ]
    client.job(five.id).delete()

    for _ in range(3):
        holder.complete(*rows)
    holder.complete(timed(one, 1, 1, OutcomeKind.TRIGGERED), ended(five))

    seen = counts(connection)
    assert {kind.value: n for kind, n in seen.kinds.items() if n} == peek.kinds() == {"cancelled": 3, "refused": 1}
    assert (seen.outcome.count, seen.outcome.sum_ms) == (3, 1_070_007)
    assert (seen.first_attempt.count, seen.first_attempt.sum_ms) == (3, 402)
    assert abs(seen.since_ms - peek.now_ms()) < 60_000
    (last,) = (each for each in told(connection, read_timeline(KEYS)).intervals if each.counts.count)
    assert (last.counts.kinds, last.counts.outcome) == (seen.kinds, seen.outcome)


def test_a_listing_is_counted(client: CancelClient, holder: Holder, connection: redis.Redis) -> None:
    """What makes requests is recorded by another script, and counted like all else; repeated, once."""
    client.cancel_open("BTCUSDT")
    (lease,) = holder.claim()
    row = Done(lease, Outcome(lease.id, 1, OutcomeKind.LISTED, orders=(ListedOrder(7, "0" * 32),), finished_at_ms=1))

    for _ in range(2):
        assert holder.complete(replace(row, requests=(("0" * 32, client.cancel(algo_id=9).request),))) == [1]

    assert counts(connection).kinds[OutcomeKind.LISTED] == 1


def test_minutes_tell_what_came_in_them(played: Played) -> None:
    """Each outcome is told in the minute in which it was recorded, also across a quiet hour, a day, and the place where
    the ring of minutes begins anew."""
    seam = NOON - NOON % MINUTES_KEPT + MINUTES_KEPT
    played.record(seam - 2, count=2)
    played.record(seam - 2, DEAD)
    played.record(seam - 1, DEAD)
    played.record(seam + 3, count=3)
    expected = {seam - 2: {"cancelled": 2, "refused": 1}, seam - 1: {"refused": 1}, seam + 3: {"cancelled": 3}}
    assert played.kinds(seam + 3) == expected
    assert played.kinds(seam + 60) == {seam + 3: {"cancelled": 3}}
    played.record(seam + 78)
    assert played.kinds(seam + 80) == {seam + 78: {"cancelled": 1}}
    assert played.kinds(seam + 80, 1440) == expected | {seam + 78: {"cancelled": 1}}
    played.record(seam + 3 + MINUTES_KEPT, DEAD)
    assert played.kinds(seam + 3 + MINUTES_KEPT, 1440) == {
        seam + 78: {"cancelled": 1},
        seam + 3 + MINUTES_KEPT: {"refused": 1},
    }
    whole = played.timeline(seam + 5 + MINUTES_KEPT, 2, 1)
    assert (whole.total.count, [each.counts.count for each in whole.intervals]) == (9, [0, 0])


def test_intervals_begin_where_they_did_before(played: Played) -> None:
    """Intervals of ten minutes hold what came in these minutes, whenever they are looked at; times come with them."""
    for minute, count in ((NOON + 9, 2), (NOON + 10, 3), (NOON + 19, 1), (NOON + 41, 4)):
        played.record(minute, count=count)

    expected = {NOON: {"cancelled": 2}, NOON + 10: {"cancelled": 4}, NOON + 40: {"cancelled": 4}}
    assert played.kinds(NOON + 41, 60, 10) == played.kinds(NOON + 49, 60, 10) == expected
    assert len(played.timeline(NOON + 41, 1440, 10).intervals) == 144
    (last,) = (each for each in played.timeline(NOON + 41).intervals if each.start_ms == 60_000 * (NOON + 41))
    assert (last.counts.outcome.count, last.counts.outcome.sum_ms, last.counts.first_attempt.sum_ms) == (4, 160, 12)
    assert last.counts.outcome.quantile(1) == 50


@pytest.mark.parametrize(("minutes", "step"), [(0, 1), (60, 0), (60, 7), (1441, 1), (10, 20)])
def test_what_no_interval_can_be_is_refused(minutes: int, step: int, connection: redis.Redis) -> None:
    """A reading covers whole steps, and a day at the most."""
    with pytest.raises(ValueError, match=f"minutes={minutes}, step={step}"):
        told(connection, read_timeline(KEYS, minutes, step))


def test_a_server_that_took_over_may_be_behind(played: Played) -> None:
    """A clock that is a little behind goes on in the minute that was begun; one that was far ahead is not waited
    for."""
    played.record(NOON)
    played.record(NOON + 1, DEAD)
    played.record(NOON)
    assert played.kinds(NOON) == {NOON: {"cancelled": 1}}
    played.record(NOON + 2)
    assert played.kinds(NOON + 2) == {NOON: {"cancelled": 1}, NOON + 1: {"cancelled": 1, "refused": 1}} | {
        NOON + 2: {"cancelled": 1}
    }
    played.record(NOON + 9)
    played.record(NOON + 3, DEAD)
    played.record(NOON + 5)
    played.record(NOON + 11)
    told = {NOON + 3: {"refused": 1}, NOON + 5: {"cancelled": 1}, NOON + 11: {"cancelled": 1}}
    assert played.kinds(NOON + 11) == told, "what it dated ahead is not believed when its time comes"


STRANGE = pytest.mark.parametrize("spoil", [SPOILED["set"], SPOILED["stream"]], ids=["set", "stream"])


@STRANGE
@pytest.mark.parametrize("name", ["counts", "minutes"])
def test_an_outcome_is_recorded_whatever_stands_there(
    name: str,
    spoil: Callable[[redis.Redis, str], object],
    client: CancelClient,
    holder: Holder,
    connection: redis.Redis,
    peek: Peek,
) -> None:
    """A key of another type is shown by a status, counts as nothing for readers, and is set aside and named by the
    completion, which counts."""
    key = getattr(KEYS, name)
    spoil(connection, key)
    assert client.status().damaged == (key,)
    assert told(connection, read_timeline(KEYS)).total.count == 0
    orders(client, 2)

    completed = holder.completed([ended(lease) for lease in holder.claim()])

    assert (completed.answers, completed.damaged) == ([1, 1], (key,))
    assert peek("EXISTS", f"{key}:set-aside") == 1
    assert (len(peek.ledger()), counts(connection).count) == (2, 2)
    assert sum(each.counts.count for each in told(connection, read_timeline(KEYS)).intervals) == 2
    assert client.status().damaged == ()


@pytest.mark.parametrize("numbers", [b"x", b"\xff" * SIZE, b"\x7f" + b"\xff" * 1_000_000], ids=["x", "-1", "large"])
def test_an_outcome_is_recorded_whatever_is_written_there(
    numbers: bytes, client: CancelClient, holder: Holder, connection: redis.Redis, peek: Peek
) -> None:
    """Numbers that are none of ours cost figures alone; a reader is given a bounded part of them."""
    connection.set(KEYS.counts, numbers)
    connection.set(KEYS.minutes, numbers * 2)
    orders(client, 2)
    assert holder.complete(*(ended(lease) for lease in holder.claim())) == [1, 1]
    assert len(peek.ledger()) == 2

    found = told(connection, read_timeline(KEYS, 1440))

    assert found.total.count >= 0
    assert len(found.intervals) == 1440
    assert all(each.counts.count >= 0 for each in found.intervals)


@pytest.mark.parametrize("right", ["bitfield", "setrange", "getrange"])
def test_who_may_not_count_still_ends_jobs(
    right: str, client: CancelClient, open_holder: OpenHolder, connection: redis.Redis, peek: Peek
) -> None:
    """A user of Redis without one of the rights records and announces each outcome."""
    rights = ["+@all", f"-{right}"]
    connection.acl_setuser("few", enabled=True, nopass=True, keys=["*"], channels=["*"], commands=rights)
    orders(client, 2)
    holder = open_holder(connection={"username": "few", "password": "x"})

    assert holder.complete(*(ended(lease) for lease in holder.claim())) == [1, 1]

    assert len(peek.ledger()) == 2
    assert holder.is_drained()
    connection.acl_deluser("few")
