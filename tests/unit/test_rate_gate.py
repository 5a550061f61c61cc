"""The gate as one process knows it: when it is closed, what Redis is told of it, and how it opens again."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from producer.message import Call
from worker.classify import Means, Verdict
from worker.clock import local_ns
from worker.decide import BAN_PAUSE_MS, Policy, Span
from worker.rate_gate import DEFAULT_WEIGHT_LIMIT, NO_QUERIES_AT, RAMP_MS, Gate, LookUps, ms_to_next_minute

NOW_MS = 1_700_000_000_000
LIMITED = Verdict(Means.LIMITED, 429, -1003, "Too many requests.", retry_after_ms=3000)
BANNED = Verdict(Means.LIMITED, 418)
BLOCKED = Verdict(Means.BLOCKED, 403, None, "Forbidden")
#: Redis' clock and the exchange's are one and the same.
SAME = Span(0, 0)


class Worker:
    """A gate, and the Redis that its closings are told to: it answers with its own end, or fails while it is away."""

    def __init__(self) -> None:
        self.gate = Gate(self.publish)
        self.told: list[tuple[int, str, bool]] = []
        self.until_ms = 0
        self.is_away = False

    async def publish(self, pause_ms: int, reason: str, doubling: bool) -> int:
        """As :data:`worker.rate_gate.Publish` says."""
        if self.is_away:
            raise redis.ConnectionError("away")
        self.told.append((pause_ms, reason, doubling))
        return self.until_ms

    def share(self, now_ms: int = NOW_MS) -> None:
        """Tell Redis what it has not heard of."""
        asyncio.run(self.gate.share(now_ms))

    def close(self, verdict: Verdict, now_ms: int = NOW_MS) -> None:
        """Close it, and tell Redis as soon as it asks for that."""
        if self.gate.close_for(verdict, Policy(), now_ms, SAME):
            self.share(now_ms)

    def spend(self, used: int, in_flight: int = 0, server_now_ms: int = 0, now_ms: int = NOW_MS) -> None:
        """Spend weight, and tell Redis as soon as the gate asks for that."""
        if self.gate.spend(used, in_flight, server_now_ms, now_ms):
            self.share(now_ms)

    def opens_at(self, at_ms: int) -> bool:
        """Whether it is closed until then, and not longer."""
        return self.gate.closed(at_ms - 1) and not self.gate.closed(at_ms)


@pytest.fixture
def worker() -> Worker:
    """Nothing told yet."""
    return Worker()


@pytest.mark.parametrize("earlier", [None, 0, NOW_MS, NOW_MS + 499])
def test_closed_until_what_redis_says(earlier: int | None, worker: Worker) -> None:
    """Open at the start; an end that Redis told holds up to its very millisecond, and an answer that left Redis before
    that closing opens nothing."""
    assert not worker.gate.closed(NOW_MS)
    assert worker.gate.ceiling(64, NOW_MS) == 64
    worker.gate.observe(NOW_MS + 500)
    if earlier is not None:
        worker.gate.observe(earlier)
    assert worker.opens_at(NOW_MS + 500)


@pytest.mark.parametrize(
    ("verdict", "pause_ms", "doubling"),
    [
        (LIMITED, 3000, False),
        (BANNED, BAN_PAUSE_MS, False),
        (BLOCKED, Policy().waf_pause_ms, True),
        (Verdict(Means.BLOCKED, 451), 1_000, False),
    ],
)
def test_closed_as_long_as_the_exchange_asks(verdict: Verdict, pause_ms: int, doubling: bool, worker: Worker) -> None:
    """A refusal closes the gate here at once and tells Redis for how long; only a firewall's block doubles."""
    worker.close(verdict)

    assert worker.opens_at(NOW_MS + pause_ms)
    ((told_ms, reason, doubled),) = worker.told
    assert (told_ms, doubled) == (pause_ms, doubling)
    assert reason.startswith(str(verdict.http))


def test_later_end_of_redis_holds(worker: Worker) -> None:
    """When somebody else closed it for longer, Redis' answer to our own closing says so, and it holds."""
    worker.until_ms = NOW_MS + 60_000
    worker.close(LIMITED)
    assert worker.opens_at(NOW_MS + 60_000)


def test_wave_of_refusals_is_told_once_and_then_at_the_next_look(worker: Worker) -> None:
    """Requests that were in flight together are one closing; how much later the last one moved the end is told too."""
    for late_ms in range(64):
        worker.close(LIMITED, NOW_MS + late_ms)
    assert len(worker.told) == 1
    assert worker.opens_at(NOW_MS + 63 + 3000)

    worker.share(NOW_MS + 500)

    assert worker.told[1:] == [(2563, worker.told[0][1], False)]


def test_end_that_moves_far_is_told_at_once(worker: Worker) -> None:
    """A ban after a short pause must reach the other workers before they send again."""
    worker.close(LIMITED)
    worker.close(BANNED, NOW_MS + 10)
    assert [pause_ms for pause_ms, _, _ in worker.told] == [3000, BAN_PAUSE_MS]


def test_closing_holds_while_redis_is_away(worker: Worker) -> None:
    """A closing that Redis did not hear holds here, and is told later with what is left of it."""
    worker.is_away = True
    worker.close(LIMITED)
    worker.share(NOW_MS + 500)
    assert worker.opens_at(NOW_MS + 3000)
    assert worker.told == []

    worker.is_away = False
    worker.share(NOW_MS + 1000)
    worker.share(NOW_MS + 1500)

    assert worker.told == [(2000, "429 Too many requests.", False)]


def test_only_the_latest_unheard_closing_is_told(worker: Worker) -> None:
    """Of several closings that Redis did not hear, the one that lasts longest is told."""
    worker.is_away = True
    for verdict in (LIMITED, BLOCKED, LIMITED):
        worker.close(verdict)
    worker.is_away = False

    worker.share()

    assert [(reason, doubling) for _, reason, doubling in worker.told] == [("403 Forbidden", True)]


def test_closing_during_a_publication_is_not_lost() -> None:
    """A later closing that comes while an earlier one is being told is told afterwards."""

    class Answered(Worker):
        async def publish(self, pause_ms: int, reason: str, doubling: bool) -> int:
            if not self.told:  # while this is on its way, another answer comes
                self.gate.close_for(BLOCKED, Policy(), NOW_MS, SAME)
            return await super().publish(pause_ms, reason, doubling)

    worker = Answered()
    worker.close(LIMITED)
    worker.share()

    assert [reason for _, reason, _ in worker.told] == ["429 Too many requests.", "403 Forbidden"]


@given(size=st.integers(1, 512))
def test_opens_with_a_ramp(size: int) -> None:
    """After a pause requests in flight grow from one to all, never falling back, never to none."""
    gate = Worker().gate
    gate.observe(NOW_MS)
    ceilings = [gate.ceiling(size, NOW_MS + at_ms) for at_ms in range(-1000, RAMP_MS + 1, 50)]

    assert ceilings[0] == 1
    assert all(1 <= before <= after <= size for before, after in itertools.pairwise(ceilings))
    assert gate.ceiling(size, NOW_MS + RAMP_MS // 2) <= max(1, size // 2)
    assert ceilings[-1] == size


# ---- the weight -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [0, 1, 63])
@pytest.mark.parametrize(
    ("limit", "reserve"), [(DEFAULT_WEIGHT_LIMIT, 24), (6_000, 60), (1_200, 12), (600, 10), (120, 10), (50, 5), (1, 1)]
)
def test_weight_near_the_limit_closes_until_the_next_minute(
    limit: int, reserve: int, in_flight: int, worker: Worker
) -> None:
    """Once the limit less the reserve is used, requests under way included, everybody waits for the next minute. Ten
    are left unused, or a hundredth where that is more, but never more than a tenth."""
    worker.gate.weight_limit = limit
    edge = max(limit - reserve - in_flight, 0)
    server_ms = 60_000 * 1000 + 45_000
    for used in range(max(edge - 70, 0), edge):
        worker.spend(used, in_flight, server_ms)
    assert not worker.gate.closed(NOW_MS)

    worker.spend(edge, in_flight, server_ms)
    worker.spend(edge + 5, in_flight, server_ms + 10, NOW_MS + 10)
    assert worker.gate.closed(NOW_MS + 14_999)
    assert not worker.gate.closed(NOW_MS + 16_000)
    assert len(worker.told) == 1


def test_fewer_are_in_flight_near_the_limit(worker: Worker) -> None:
    """No worker knows what the others have in flight: each takes a quarter of what is left in the minute."""
    worker.spend(2_200, 10, 40_000)
    assert worker.gate.ceiling(64, NOW_MS) == (2_400 - 24 - 2_200) // 4
    worker.spend(2_374, 1, 40_000)
    assert worker.gate.ceiling(64, NOW_MS) == 1
    assert not worker.gate.closed(NOW_MS)
    assert worker.gate.ceiling(64, NOW_MS + 21_000) == 64


def test_last_quarter_is_for_cancels(worker: Worker) -> None:
    """Queries stop at three quarters of the budget, cancels do not."""
    edge = int(NO_QUERIES_AT * DEFAULT_WEIGHT_LIMIT)
    assert [worker.gate.allows(Call.QUERY, used) for used in (0, edge - 1, edge)] == [True, True, False]
    assert worker.gate.allows(Call.CANCEL, edge)


def test_look_ups_after_silences_have_a_quarter_of_what_is_left(worker: Worker) -> None:
    """A wave of silences does not eat up the minute; the next minute begins anew, and cancels and others go on."""
    gate, used = worker.gate, 0
    while gate.allows_look_up(used, 7):
        gate.note_look_up(7)
        used += 1
    assert used == DEFAULT_WEIGHT_LIMIT // 5  # a quarter of what is left then
    assert gate.allows(Call.QUERY, used)
    assert gate.allows_look_up(0, 8)


def test_few_look_up_where_most_are_silent() -> None:
    """A quarter of the flight at a time, a sixteenth where most of it is silent; each that ends makes room for two."""
    look_ups, waiting = LookUps(64), [asyncio.Event() for _ in range(3)]
    assert [look_ups.begin(33, 64) for _ in range(5)] == [True] * 4 + [False]
    assert [look_ups.begin(32, 64) for _ in range(13)] == [True] * 12 + [False]
    look_ups.waiting.extend(waiting)
    look_ups.end()
    assert [event.is_set() for event in waiting] == [True, True, False]
    assert look_ups.begin(1, 64)
    assert [LookUps(1).begin(1, 1), LookUps(1).part] == [True, 1]


@given(st.integers(0, 5 * 10**12))
def test_next_minute_is_never_far_nor_past(server_ms: int) -> None:
    """The wait for the exchange's next minute ends in it, shortly after its beginning."""
    begins_ms = server_ms + ms_to_next_minute(server_ms)
    assert begins_ms // 60_000 == server_ms // 60_000 + 1
    assert begins_ms % 60_000 < 1000


# ---- its record in Redis --------------------------------------------------------------------------------------------


def test_a_person_can_open_it(worker: Worker) -> None:
    """An earlier end that somebody wrote into its record holds here too, and the requests ramp up from there."""
    worker.gate.observe(NOW_MS + 60_000)
    worker.gate.told(0, NOW_MS, local_ns())
    assert not worker.gate.closed(NOW_MS)
    assert worker.gate.ceiling(64, NOW_MS) == 1


@pytest.mark.parametrize("until_ms", [None, NOW_MS - 5_000, NOW_MS + 5_000, NOW_MS + 60_000])
def test_record_that_is_gone_or_old_opens_nothing(until_ms: int | None, worker: Worker) -> None:
    """A Redis that lost its data, or its last second, does not end a ban, and is told of it again."""
    worker.gate.observe(NOW_MS + 60_000)
    worker.gate.told(until_ms, NOW_MS, local_ns())
    worker.share()

    assert worker.opens_at(NOW_MS + 60_000)
    is_known = until_ms == NOW_MS + 60_000
    assert [(pause_ms, doubling) for pause_ms, _, doubling in worker.told] == [(60_000, False)] * (not is_known)


@pytest.mark.parametrize("is_ours", [True, False])
def test_record_read_before_a_closing_opens_nothing(is_ours: bool, worker: Worker) -> None:
    """What Redis answered before it heard of our closing, or before a claim told us of another's, is old news."""
    asked_at_ns = local_ns()
    if is_ours:
        worker.close(LIMITED)
    else:
        worker.gate.observe(NOW_MS + 3000)
    worker.gate.told(0, NOW_MS, asked_at_ns)
    assert worker.opens_at(NOW_MS + 3000)


def test_record_that_has_not_heard_of_a_closing_opens_nothing(worker: Worker) -> None:
    """A closing that could not be told yet holds, whatever the record says meanwhile."""
    worker.is_away = True
    worker.close(BANNED)
    worker.gate.told(0, NOW_MS, local_ns())
    assert worker.opens_at(NOW_MS + BAN_PAUSE_MS)
