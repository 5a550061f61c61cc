"""Other clocks as bounds on this host's own: every value is computed from clocks that the test sets."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.examples import examples
from tests.servers import python
from worker.clock import BEHIND_MS, DRIFT_PPM, MOVED_NS, RedisClock, ServerClock, SleepWatch, local_ns, minus
from worker.hold import Trust

PROFILE = examples(100)
MS = 1_000_000
START_MS = 1_760_000_000_000


class Remote:
    """Another host's clock: so far ahead of this host's wall clock, so much faster than its own clock, and what is
    known of it here."""

    def __init__(self, world: World, known: RedisClock | ServerClock, ahead_ms: int) -> None:
        self._world, self._known, self._since_ns = world, known, world.local_ns
        self.ahead_ns, self.ppm = ahead_ms * MS, 0

    @property
    def now_ns(self) -> int:
        """What it shows, ns since the epoch."""
        passed_ns = self._world.local_ns - self._since_ns
        return START_MS * MS + passed_ns + passed_ns * self.ppm // 1_000_000 + self.ahead_ns

    @property
    def now_ms(self) -> int:
        """What it tells: whole milliseconds."""
        return self.now_ns // MS

    @property
    def offset_ns(self) -> int:
        """How far it is ahead of this host's own clock; what the bounds must hold."""
        return self.now_ns - self._world.local_ns

    def ask(self, out_ms: float, back_ms: float) -> None:
        """Ask it for its time, with a way out and a way back."""
        asked_ns = self._world.local_ns
        self._world.local_ns += round(out_ms * MS)
        told_ms = self.now_ms
        self._world.local_ns += round(back_ms * MS)
        self._known.observe(asked_ns, self._world.local_ns, told_ms)


class World:
    """A host whose clocks stand still until they are moved, with an exchange and a Redis elsewhere."""

    def __init__(self, exchange_ahead_ms: int = 0, redis_ahead_ms: int = 0) -> None:
        self.local_ns = 5_000 * MS
        self._wall_since_ns = self.local_ns
        self.wall_jump_ms = 0
        self.server = ServerClock(local=lambda: self.local_ns, wall_ms=lambda: self.wall_ms)
        self.redis_clock = RedisClock(local=lambda: self.local_ns, wall_ms=lambda: self.wall_ms)
        self.exchange = Remote(self, self.server, exchange_ahead_ms)
        self.redis = Remote(self, self.redis_clock, redis_ahead_ms)

    @property
    def wall_ms(self) -> int:
        """The host's wall clock."""
        return START_MS + (self.local_ns - self._wall_since_ns) // MS + self.wall_jump_ms

    def pass_ms(self, ms: int) -> None:
        """Let time go by."""
        self.local_ns += ms * MS


# ---- bounds ---------------------------------------------------------------------------------------------------------

_TRIPS = st.lists(
    st.tuples(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**12)), min_size=1, max_size=12
)


@PROFILE
@given(st.integers(-5_000, 5_000), st.integers(-DRIFT_PPM, DRIFT_PPM), _TRIPS, st.integers(-(10**12), 10**16))
@example(0, -DRIFT_PPM, [(0, 0, 0)], 10**16)
@example(0, DRIFT_PPM, [(0, 0, 0)], 10**16)
def test_the_bounds_hold_the_truth(ahead_ms: int, ppm: int, trips: list[tuple[int, int, int]], look_ns: int) -> None:
    """However uneven the trips, and whichever clock drifts: what is claimed of now, before and later is true."""
    world = World(redis_ahead_ms=ahead_ms)
    remote, clock = world.redis, world.redis_clock
    remote.ppm = ppm
    seen: list[tuple[int, int]] = []
    for out_ns, back_ns, pause_ns in trips:
        remote.ask(out_ns / MS, back_ns / MS)
        seen.append((world.local_ns, remote.now_ms))
        world.local_ns += pause_ns
    world.local_ns += look_ns
    known = clock.bounds()
    assert known is not None
    assert known[0] <= remote.offset_ns <= known[1]
    for local_ns_, told_ms in [*seen, (world.local_ns, remote.now_ms)]:
        earliest_ns, latest_ns = clock.moments(told_ms) or (0, 0)
        assert earliest_ns <= local_ns_ <= latest_ns


def test_doubt_grows_with_age() -> None:
    """Each bound widens by what two clocks can drift apart: 200 ms on either side in 1,000 s."""
    world = World()
    world.redis.ask(0, 0)
    lo_ns, hi_ns = world.redis_clock.bounds() or (0, 0)
    for ms in (1_000_000, -2_000_000):  # later, and before
        world.pass_ms(ms)
        far_lo_ns, far_hi_ns = world.redis_clock.bounds() or (0, 0)
        assert 200 * MS <= lo_ns - far_lo_ns < 201 * MS
        assert 200 * MS <= far_hi_ns - hi_ns < 201 * MS


@pytest.mark.parametrize("jump_ms", [-3_600_000, -50, 0, 50, 3_600_000])
def test_an_answer_that_contradicts_replaces_the_earlier_ones(jump_ms: int) -> None:
    """When a clock was set, another server took over or a sleep went uncounted, the newest answer alone is believed,
    though it was slower; and who holds leases is told."""
    world = World()
    for _ in range(9):
        world.redis.ask(1, 1)
        world.exchange.ask(1, 1)
    world.redis.ahead_ns += jump_ms * MS
    world.exchange.ahead_ns += jump_ms * MS
    world.redis.ask(20, 20)
    world.exchange.ask(20, 20)
    lo_ns, hi_ns = world.redis_clock.bounds() or (0, 0)
    assert lo_ns <= world.redis.offset_ns <= hi_ns
    assert (hi_ns - lo_ns > 40 * MS) == world.redis_clock.steps == (jump_ms != 0)
    assert world.server.now_ms() == world.exchange.now_ms - BEHIND_MS


# ---- the exchange's clock -------------------------------------------------------------------------------------------


@PROFILE
@given(
    ahead_ms=st.integers(-10_000, 10_000),
    trips=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900)), min_size=1, max_size=20),
)
def test_timestamp_is_never_ahead_and_hardly_behind(ahead_ms: int, trips: list[tuple[int, int]]) -> None:
    """However uneven the trips, a timestamp is off by at most half the quickest of them, beside the fixed bias: less
    than the 1,000 ms that the exchange allows ahead, and far less than recvWindow behind."""
    world = World(ahead_ms)
    for out, back in trips:
        world.exchange.ask(out, back)
        world.pass_ms(50)
    best_ms = min(out + back for out, back in trips)
    behind_ms = world.exchange.now_ms - world.server.now_ms()
    assert BEHIND_MS - best_ms / 2 - 2 <= behind_ms <= BEHIND_MS + best_ms / 2 + 2
    assert -1_000 < behind_ms < 1_000


def test_a_drifting_clock_is_followed() -> None:
    """A quick sample does not win for ever: hours of drift at 100 ppm are never more than a few milliseconds off."""
    world = World()
    world.exchange.ppm = 100
    world.exchange.ask(0, 0)
    for _ in range(400):
        world.pass_ms(25_000)
        world.exchange.ask(2, 2)
        assert abs(world.server.now_ms() + BEHIND_MS - world.exchange.now_ms) <= 5


def test_jump_of_the_wall_clock_does_not_matter() -> None:
    """Once measured, the time rests on the host's own clock alone; the status shows the new offset."""
    world = World(40)
    world.exchange.ask(5, 5)
    before = world.server.now_ms()
    world.wall_jump_ms -= 3_600_000
    assert world.server.now_ms() == before
    assert world.server.offset_ms == 3_600_040


def test_doubted_samples_prove_nothing() -> None:
    """After a clock refusal nothing is compared before the next sample, which counts alone, however slow it was."""
    world = World(500)
    world.exchange.ask(0, 0)
    before_ms = world.server.now_ms()
    world.server.doubt()
    assert (world.server.measured, world.server.bounds()) == (False, None)
    assert world.server.now_ms() == before_ms
    world.exchange.ahead_ns = 510 * MS
    world.exchange.ask(30, 30)
    assert world.server.offset_ms == 510


def test_an_answer_on_its_way_at_a_doubt_does_not_end_it() -> None:
    """It may tell the time from before the step that the doubt is about; the next one that is asked counts."""
    world = World()
    world.exchange.ask(0, 0)
    asked_ns, told_ms = world.local_ns, world.exchange.now_ms
    world.pass_ms(50)
    world.exchange.ahead_ns += 5_000 * MS
    world.server.doubt()
    world.server.observe(asked_ns, world.local_ns, told_ms)
    assert not world.server.measured
    world.exchange.ask(10, 10)
    assert world.server.offset_ms == 5_000


# ---- Redis' clock ---------------------------------------------------------------------------------------------------


@PROFILE
@given(
    st.lists(st.tuples(st.integers(0, 1_500), st.integers(0, 1_500), st.integers(0, 40_000)), min_size=1, max_size=9)
)
def test_redis_time_does_not_run_back(trips: list[tuple[int, int, int]]) -> None:
    """While nobody sets a clock, no look shows an earlier time than the last one, and each lies within the bounds."""
    world, shown = World(redis_ahead_ms=90), list[int]()
    world.local_ns += 999_999
    for out_ms, back_ms, pause_ms in trips:
        world.redis.ask(out_ms, back_ms)
        for part_ns in (0, pause_ms * MS, 500_000, 500_000):
            world.local_ns += part_ns
            shown.append(world.redis_clock.now_ms())
            assert shown[-1] * MS <= world.redis.now_ns <= (world.redis_clock.latest_ms() or 0) * MS
    assert all(before <= after for before, after in pairwise(shown))


def test_a_lease_is_counted_from_when_the_script_can_have_run() -> None:
    """A claim that waited 1,000 ms took its lease near the end of its wait, and a close look before proves that."""
    world = World(redis_ahead_ms=250)
    world.redis.ask(1, 1)
    asked_ns = world.local_ns
    world.pass_ms(1_000)
    ran_ns, ran_ms = world.local_ns, world.redis.now_ms
    world.pass_ms(1)
    world.redis_clock.observe(asked_ns, world.local_ns, ran_ms)
    earliest_ns, latest_ns = world.redis_clock.moments(ran_ms) or (0, 0)
    assert ran_ns - 3 * MS <= earliest_ns <= ran_ns <= latest_ns <= ran_ns + 3 * MS


# ---- two clocks -----------------------------------------------------------------------------------------------------


@PROFILE
@given(
    st.integers(-10_000, 10_000),
    st.integers(-10_000, 10_000),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300), st.integers(0, 10**9)), min_size=1, max_size=5),
)
def test_the_difference_of_two_clocks_is_within_its_bounds(
    exchange_ms: int, redis_ms: int, trips: list[tuple[int, int, int]]
) -> None:
    """A moment that the exchange dates in whole milliseconds is within the bounds by Redis' clock."""
    world = World(exchange_ms, redis_ms)
    for out_ms, back_ms, odd_ns in trips:
        world.local_ns += odd_ns
        world.exchange.ask(out_ms, back_ms)
        world.redis.ask(back_ms, out_ms)
    world.pass_ms(7_000)
    ahead = minus(world.redis_clock, world.server)
    assert ahead is not None
    assert world.exchange.now_ms + ahead.lo <= world.redis.now_ns / MS <= world.exchange.now_ms + ahead.hi
    took_ms = [out_ms + back_ms for out_ms, back_ms, _ in trips]
    drift_ms = 4 * 200e-6 * (7_000 + sum(took_ms))  # two clocks, both ways
    assert ahead.hi - ahead.lo <= 2 * min(took_ms) + drift_ms + 7  # and whole milliseconds


# ---- sleep ----------------------------------------------------------------------------------------------------------


class Host:
    """A host with a clock of its own that does not count sleep, and a wall clock."""

    def __init__(self) -> None:
        self._world = World()
        self._watch = SleepWatch(False, lambda: self._world.local_ns, lambda: self._world.wall_ms * MS)

    def live(self, local_ms: int, wall_ms: int) -> bool:
        """Let both clocks go on, and look."""
        self._world.pass_ms(local_ms)
        self._world.wall_jump_ms += wall_ms - local_ms
        return self._watch.moved()


@pytest.mark.parametrize("moved_ms", [-3_600_000, -1_001, 1_001, 60_000])
def test_a_wall_clock_that_moved_tells_of_a_sleep_once(moved_ms: int) -> None:
    """Where sleep is not counted, a jump of the wall clock either way is told at the next look, and not again."""
    host = Host()
    assert not host.live(60_000, 60_000)
    assert host.live(10, 10 + moved_ms)
    assert not host.live(60_000, 60_000)


def test_small_moves_of_the_wall_clock_add_up() -> None:
    """A second in all is told, however often somebody looked meanwhile: naps are not lost between looks."""
    host = Host()
    assert [host.live(1_000, 1_400) for _ in range(6)] == [False, False, True, False, False, True]
    assert [host.live(1_000, 1_000 + ms) for ms in (400, -400, 400, -400)] == [False] * 4
    assert MOVED_NS == 1_000 * MS


# ---- the real clocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "without", ["del time.CLOCK_BOOTTIME", "time.CLOCK_BOOTTIME = 9_999"], ids=["no such clock", "not in this sandbox"]
)
def test_elsewhere_the_monotonic_clock_serves(without: str) -> None:
    """A system without that clock, or one that does not hand it out, is served by the monotonic one, and says so."""
    code = f"""
import time
{without}
from worker.clock import COUNTS_SLEEP, local_ns
before = time.monotonic_ns()
assert before <= local_ns() <= time.monotonic_ns()
print(COUNTS_SLEEP)
"""
    done = python("-c", code)
    assert done.stdout == "False\n"


def test_who_holds_nothing_learns_of_a_step_when_it_asks() -> None:
    """After a step of Redis' clock the next claim takes nobody's lease, also that of a worker without any job."""
    clock = RedisClock()
    trust = Trust(clock)
    for shift_ms in (0, 60_000):
        assert trust.stepped_ns() == 0
        now_ns = local_ns()
        clock.observe(now_ns, now_ns, 1_760_000_000_000 + shift_ms)

    assert trust.stepped_ns() >= now_ns
