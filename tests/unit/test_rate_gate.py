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
from worker.decide import BAN_PAUSE_MS, LIMIT_PAUSE_MS, Policy, Span
from worker.rate_gate import DEFAULT_WEIGHT_LIMIT, NO_QUERIES_AT, RAMP_MS, Gate, LookUps, ms_to_next_minute

NOW_MS = 1_700_000_000_000
LIMITED = Verdict(Means.LIMITED, 429, -1003, "Too many requests.", retry_after_ms=3000)
BLOCKED = Verdict(Means.BLOCKED, 403, None, "Forbidden")
#: Redis' clock and the exchange's are one and the same.
SAME = Span(0, 0)


class Board:
    """Where closings are published; it answers with its own end, or fails while Redis is away."""

    def __init__(self) -> None:
        self.told: list[tuple[int, str, bool]] = []
        self.until_ms = 0
        self.is_away = False

    async def publish(self, pause_ms: int, reason: str, doubling: bool) -> int:
        """As :data:`worker.rate_gate.Publish` says."""
        if self.is_away:
            raise redis.ConnectionError("away")
        self.told.append((pause_ms, reason, doubling))
        return self.until_ms


@pytest.fixture
def board() -> Board:
    """Nothing told yet."""
    return Board()


@pytest.fixture
def gate(board: Board) -> Gate:
    """Open, as at a start."""
    return Gate(board.publish)


def share(gate: Gate, now_ms: int) -> None:
    """Tell Redis what it has not heard of."""
    asyncio.run(gate.share(now_ms))


def close(gate: Gate, verdict: Verdict, now_ms: int) -> None:
    """Close it, and tell Redis as soon as it asks for that."""
    if gate.close_for(verdict, Policy(), now_ms, SAME):
        share(gate, now_ms)


def spend(gate: Gate, used: int, in_flight: int, server_now_ms: int, now_ms: int) -> None:
    """Spend weight, and tell Redis as soon as the gate asks for that."""
    if gate.spend(used, in_flight, server_now_ms, now_ms):
        share(gate, now_ms)


def test_open_at_the_start(gate: Gate) -> None:
    """A gate that nobody closed lets everything pass, with all requests in flight."""
    assert not gate.closed(NOW_MS)
    assert gate.ceiling(64, NOW_MS) == 64


def test_closed_until_what_redis_says(gate: Gate) -> None:
    """An end that Redis told holds up to its very millisecond, and not longer."""
    gate.observe(NOW_MS + 500)

    assert gate.closed(NOW_MS)
    assert gate.closed(NOW_MS + 499)
    assert not gate.closed(NOW_MS + 500)


@pytest.mark.parametrize("earlier", [0, NOW_MS, NOW_MS + 499])
def test_earlier_end_opens_nothing(earlier: int, gate: Gate) -> None:
    """An answer that left Redis before a closing did not know of it."""
    gate.observe(NOW_MS + 500)
    gate.observe(earlier)

    assert gate.closed(NOW_MS + 499)


@pytest.mark.parametrize(
    ("verdict", "pause_ms", "doubling"),
    [
        (LIMITED, 3000, False),
        (Verdict(Means.LIMITED, 429), LIMIT_PAUSE_MS, False),
        (Verdict(Means.LIMITED, 418), BAN_PAUSE_MS, False),
        (Verdict(Means.LIMITED, 418, retry_after_ms=2000, banned_until_ms=NOW_MS + 9000), 9000, False),
        (Verdict(Means.LIMITED, 418, retry_after_ms=9000, banned_until_ms=NOW_MS + 2000), 9000, False),
        (BLOCKED, Policy().waf_pause_ms, True),
        (Verdict(Means.BLOCKED, 451), 1_000, False),
    ],
)
def test_closed_as_long_as_the_exchange_asks(
    verdict: Verdict, pause_ms: int, doubling: bool, gate: Gate, board: Board
) -> None:
    """A refusal closes the gate here at once and tells Redis for how long; only a firewall's block doubles."""
    close(gate, verdict, NOW_MS)

    assert gate.closed(NOW_MS + pause_ms - 1)
    assert not gate.closed(NOW_MS + pause_ms)
    ((told_ms, reason, doubled),) = board.told
    assert (told_ms, doubled) == (pause_ms, doubling)
    assert reason.startswith(str(verdict.http))


def test_later_end_of_redis_holds(gate: Gate, board: Board) -> None:
    """When somebody else closed it for longer, Redis' answer to our own closing says so, and it holds."""
    board.until_ms = NOW_MS + 60_000

    close(gate, LIMITED, NOW_MS)

    assert gate.closed(NOW_MS + 59_999)


def test_refusals_of_one_moment_are_told_once(gate: Gate, board: Board) -> None:
    """Requests that were in flight together are refused together: the first one closes the gate for all."""
    for _ in range(10):
        close(gate, LIMITED, NOW_MS)

    assert len(board.told) == 1


def test_closing_holds_while_redis_is_away(gate: Gate, board: Board) -> None:
    """A closing that Redis did not hear holds here, and is told later with what is left of it."""
    board.is_away = True
    close(gate, LIMITED, NOW_MS)
    share(gate, NOW_MS + 500)
    assert gate.closed(NOW_MS + 2999)
    assert board.told == []

    board.is_away = False
    share(gate, NOW_MS + 1000)
    share(gate, NOW_MS + 1500)

    assert board.told == [(2000, "429 Too many requests.", False)]


def test_only_the_latest_unheard_closing_is_told(gate: Gate, board: Board) -> None:
    """Of several closings that Redis did not hear, the one that lasts longest is told."""
    board.is_away = True
    close(gate, LIMITED, NOW_MS)
    close(gate, BLOCKED, NOW_MS)
    close(gate, LIMITED, NOW_MS + 1)
    board.is_away = False

    share(gate, NOW_MS + 1)

    assert [(reason, doubling) for _, reason, doubling in board.told] == [("403 Forbidden", True)]


def test_closing_during_a_publication_is_not_lost(board: Board) -> None:
    """A later closing that comes while an earlier one is being told is told afterwards."""
    gates: list[Gate] = []

    async def publish(pause_ms: int, reason: str, doubling: bool) -> int:
        if not board.told:  # while this is on its way, another answer comes
            gates[0].close_for(BLOCKED, Policy(), NOW_MS, SAME)
        return await board.publish(pause_ms, reason, doubling)

    gates.append(Gate(publish))
    close(gates[0], LIMITED, NOW_MS)
    share(gates[0], NOW_MS)

    assert [reason for _, reason, _ in board.told] == ["429 Too many requests.", "403 Forbidden"]


@given(size=st.integers(1, 512))
def test_opens_with_a_ramp(size: int) -> None:
    """After a pause requests in flight grow from one to all, never falling back, never to none."""
    gate = Gate(Board().publish)
    gate.observe(NOW_MS)
    ceilings = [gate.ceiling(size, NOW_MS + at_ms) for at_ms in range(-1000, RAMP_MS + 1, 50)]

    assert ceilings[0] == 1
    assert all(1 <= before <= after <= size for before, after in itertools.pairwise(ceilings))
    assert gate.ceiling(size, NOW_MS + RAMP_MS // 2) <= max(1, size // 2)
    assert ceilings[-1] == size


#: A hundredth of the usual limit is left unused.
RESERVE = 24


@pytest.mark.parametrize("in_flight", [0, 63])
def test_weight_near_the_limit_closes_until_the_next_minute(in_flight: int, gate: Gate, board: Board) -> None:
    """Once the limit less the reserve is used, requests under way included, everybody waits for the next minute."""
    edge = DEFAULT_WEIGHT_LIMIT - RESERVE - in_flight
    server_ms = 60_000 * 1000 + 45_000

    spend(gate, edge - 1, in_flight, server_ms, NOW_MS)
    assert not gate.closed(NOW_MS)

    spend(gate, edge, in_flight, server_ms, NOW_MS)
    spend(gate, edge + 5, in_flight, server_ms + 10, NOW_MS + 10)
    assert gate.closed(NOW_MS + 14_999)
    assert not gate.closed(NOW_MS + 16_000)
    assert len(board.told) == 1


def test_limit_of_the_exchange_replaces_the_usual_one(gate: Gate) -> None:
    """The budget follows the limit that the exchange tells."""
    gate.weight_limit = 6000
    spend(gate, 5939, 0, 0, NOW_MS)
    assert not gate.closed(NOW_MS)
    spend(gate, 5940, 0, 0, NOW_MS)
    assert gate.closed(NOW_MS)


@pytest.mark.parametrize(("limit", "reserve"), [(1_200, 12), (600, 10), (120, 10), (50, 5), (1, 1)])
def test_small_limits_keep_a_small_reserve(limit: int, reserve: int, gate: Gate) -> None:
    """Ten are left unused, or a hundredth where that is more, but never more than a tenth."""
    gate.weight_limit = limit
    for used in range(limit - reserve):
        spend(gate, used, 0, 0, NOW_MS)
    assert not gate.closed(NOW_MS)
    spend(gate, limit - reserve, 0, 0, NOW_MS)
    assert gate.closed(NOW_MS)


def test_fewer_are_in_flight_near_the_limit(gate: Gate) -> None:
    """No worker knows what the others have in flight: each takes a quarter of what is left in the minute."""
    spend(gate, 2_200, 10, 40_000, NOW_MS)
    assert gate.ceiling(64, NOW_MS) == (2_400 - RESERVE - 2_200) // 4
    spend(gate, 2_374, 1, 40_000, NOW_MS)
    assert gate.ceiling(64, NOW_MS) == 1
    assert not gate.closed(NOW_MS)
    assert gate.ceiling(64, NOW_MS + 21_000) == 64


def test_last_quarter_is_for_cancels(gate: Gate) -> None:
    """Queries stop at three quarters of the budget, cancels do not."""
    edge = int(NO_QUERIES_AT * DEFAULT_WEIGHT_LIMIT)

    assert [gate.allows(Call.QUERY, used) for used in (0, edge - 1, edge)] == [True, True, False]
    assert gate.allows(Call.CANCEL, edge)


def test_look_ups_after_silences_have_a_quarter_of_what_is_left(gate: Gate) -> None:
    """A wave of silences does not eat up the minute; the next minute begins anew, and cancels and others go on."""
    used = 0
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


def test_wave_of_refusals_is_told_once_and_then_at_the_next_look(gate: Gate, board: Board) -> None:
    """Requests that were in flight together are one closing; how much later the last one moved the end is told too."""
    for late_ms in range(64):
        close(gate, LIMITED, NOW_MS + late_ms)
    assert len(board.told) == 1
    assert gate.until_ms == NOW_MS + 63 + 3000

    share(gate, NOW_MS + 500)

    assert board.told[1:] == [(2563, board.told[0][1], False)]


def test_end_that_moves_far_is_told_at_once(gate: Gate, board: Board) -> None:
    """A ban after a short pause must reach the other workers before they send again."""
    close(gate, LIMITED, NOW_MS)
    close(gate, Verdict(Means.LIMITED, 418), NOW_MS + 10)

    assert [pause_ms for pause_ms, _, _ in board.told] == [3000, BAN_PAUSE_MS]


def test_a_person_can_open_it(gate: Gate) -> None:
    """An earlier end that somebody wrote into its record holds here too, and the requests ramp up from there."""
    gate.observe(NOW_MS + 60_000)

    gate.told(0, NOW_MS, local_ns())

    assert not gate.closed(NOW_MS)
    assert gate.ceiling(64, NOW_MS) == 1


@pytest.mark.parametrize("until_ms", [None, NOW_MS - 5_000, NOW_MS + 5_000, NOW_MS + 60_000])
def test_record_that_is_gone_or_old_opens_nothing(until_ms: int | None, gate: Gate, board: Board) -> None:
    """A Redis that lost its data, or its last second, does not end a ban, and is told of it again."""
    gate.observe(NOW_MS + 60_000)

    gate.told(until_ms, NOW_MS, local_ns())
    share(gate, NOW_MS)

    assert gate.closed(NOW_MS + 59_999)
    is_known = until_ms == NOW_MS + 60_000
    assert [(pause_ms, doubling) for pause_ms, _, doubling in board.told] == ([] if is_known else [(60_000, False)])


def test_record_read_before_a_closing_opens_nothing(gate: Gate, board: Board) -> None:
    """What Redis answered before it heard of our closing is old news, and one that it has not heard of holds."""
    asked_at_ns = local_ns()
    close(gate, LIMITED, NOW_MS)
    gate.told(0, NOW_MS, asked_at_ns)
    assert gate.closed(NOW_MS)

    board.is_away = True
    close(gate, Verdict(Means.LIMITED, 418), NOW_MS)
    gate.told(0, NOW_MS, local_ns())
    assert gate.closed(NOW_MS + BAN_PAUSE_MS - 1)


def test_record_read_before_a_claim_told_of_a_closing_opens_nothing(gate: Gate) -> None:
    """An answer that waited for its reader is older than what a claim has brought meanwhile."""
    asked_at_ns = local_ns()
    gate.observe(NOW_MS + 60_000)

    gate.told(0, NOW_MS, asked_at_ns)

    assert gate.closed(NOW_MS)
