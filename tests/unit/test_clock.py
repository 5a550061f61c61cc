"""The exchange's time on a monotonic base: every value is computed from clocks that the test sets."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.clock import BEHIND_MS, CONTRADICTION_MS, KEPT_SAMPLES, RECENT_S, ServerClock

MS = 1_000_000
START_MS = 1_760_000_000_000


class World:
    """A host whose clocks stand still until they are moved, and an exchange that is ``ahead_ms`` of the host."""

    def __init__(self, ahead_ms: int = 0) -> None:
        self.mono_ns = 5_000 * MS
        self.wall_ms = START_MS
        self.ahead_ms = ahead_ms
        self.clock = ServerClock(mono_ns=lambda: self.mono_ns, wall_ms=lambda: self.wall_ms)

    def pass_ms(self, ms: int) -> None:
        self.mono_ns += ms * MS
        self.wall_ms += ms

    @property
    def exchange_ms(self) -> int:
        return self.wall_ms + self.ahead_ms

    def measure(self, out_ms: int, back_ms: int) -> None:
        sent_ns = self.mono_ns
        self.pass_ms(out_ms)
        server_time_ms = self.exchange_ms
        self.pass_ms(back_ms)
        self.clock.add_sample(sent_ns, self.mono_ns, server_time_ms)


def test_unmeasured_clock_is_the_hosts() -> None:
    """Before the first sample the host's wall clock is all there is, and it is used as it stands."""
    world = World(ahead_ms=5_000)
    assert (world.clock.measured, world.clock.offset_ms, world.clock.age_s) == (False, 0, None)
    assert world.clock.now_ms() == START_MS


@pytest.mark.parametrize("ahead_ms", [-3_600_000, -5_000, 0, 7, 5_000, 3_600_000])
def test_offset_is_taken_at_the_middle_of_the_round_trip(ahead_ms: int) -> None:
    """On an even path the estimate is exact, and timestamps are the fixed small time behind it."""
    world = World(ahead_ms)
    world.measure(20, 20)
    world.pass_ms(1_234)
    assert world.clock.measured
    assert world.clock.now_ms() == world.exchange_ms - BEHIND_MS
    assert world.clock.offset_ms == ahead_ms


@given(
    ahead_ms=st.integers(-10_000, 10_000),
    trips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), min_size=1, max_size=20),
    out_ms=st.integers(0, 400),
)
def test_timestamp_is_never_ahead_on_arrival_and_hardly_behind(
    ahead_ms: int, trips: list[tuple[int, int]], out_ms: int
) -> None:
    """However uneven the best trip was, it shifts timestamps by at most half of it, beside the fixed bias."""
    world = World(ahead_ms)
    for out, back in trips:
        world.measure(out, back)
        world.pass_ms(50)
    best_ms = min(out + back for out, back in trips[-KEPT_SAMPLES:])
    behind_ms = world.exchange_ms - world.clock.now_ms()
    assert BEHIND_MS - best_ms / 2 <= behind_ms <= BEHIND_MS + best_ms / 2 + 1


def test_slow_way_out_never_brings_a_timestamp_ahead() -> None:
    """If all of the round trip is the way out, the request's own way out makes up for the shift."""
    world = World()
    world.measure(600, 0)
    timestamp = world.clock.now_ms()
    world.pass_ms(600)
    assert timestamp < world.exchange_ms


def test_shortest_round_trip_wins() -> None:
    """A slow, uneven answer after a quick one does not move the clock."""
    world = World(ahead_ms=100)
    world.measure(1, 1)
    world.measure(300, 0)
    assert world.clock.offset_ms == 100


def test_quick_sample_replaces_a_slow_one() -> None:
    """A better sample counts at once."""
    world = World(ahead_ms=100)
    world.measure(300, 0)
    assert world.clock.offset_ms == 250
    world.measure(1, 1)
    assert world.clock.offset_ms == 100


def test_old_samples_make_room() -> None:
    """A quick sample does not win for ever: after a time, or after enough newer ones, drift has outweighed it."""
    for gap_ms, later in ((RECENT_S * 1000 + 1, 1), (10, KEPT_SAMPLES)):
        world = World(ahead_ms=100)
        world.measure(0, 0)
        world.pass_ms(gap_ms)
        for _ in range(later):
            world.measure(40, 0)
        assert world.clock.offset_ms == 120


def test_last_sample_is_kept_without_a_newer_one() -> None:
    """An estimate does not expire by itself: an old one is better than a wall clock that nobody checked."""
    world = World(ahead_ms=5_000)
    world.measure(10, 10)
    world.pass_ms(10 * RECENT_S * 1000)
    assert world.clock.now_ms() == world.exchange_ms - BEHIND_MS
    assert world.clock.age_s == 10 * RECENT_S


def test_jump_of_the_wall_clock_does_not_matter() -> None:
    """Once measured, the time rests on the monotonic clock alone; the status shows the new offset."""
    world = World(ahead_ms=40)
    world.measure(5, 5)
    before = world.clock.now_ms()
    world.wall_ms -= 3_600_000
    assert world.clock.now_ms() == before
    assert world.clock.offset_ms == 3_600_040


@pytest.mark.parametrize("jump_ms", [-5_000, 5_000])
def test_sample_that_contradicts_the_others_replaces_them(jump_ms: int) -> None:
    """When the exchange's clock is set, or the host slept, the first new sample is believed, though it was slower."""
    world = World()
    for _ in range(KEPT_SAMPLES):
        world.measure(1, 1)
    world.ahead_ms += jump_ms
    world.measure(20, 20)
    assert world.clock.now_ms() == world.exchange_ms - BEHIND_MS


def test_sample_that_agrees_within_its_error_replaces_nothing() -> None:
    """Unevenness that half a round trip explains is no contradiction."""
    world = World()
    world.measure(1, 1)
    world.ahead_ms += CONTRADICTION_MS
    world.measure(20, 20)
    assert world.clock.offset_ms == 0


def test_dropped_samples_are_forgotten() -> None:
    """After a clock refusal nothing measured before counts, however quick it was."""
    world = World(ahead_ms=500)
    world.measure(0, 0)
    world.clock.drop_samples()
    assert not world.clock.measured
    assert world.clock.age_s is None
    assert world.clock.now_ms() == world.wall_ms
    world.ahead_ms = 510
    world.measure(30, 30)
    assert world.clock.offset_ms == 510


def test_age_is_the_newest_samples() -> None:
    """The age tells when somebody last asked, not when the best answer came."""
    world = World()
    world.measure(0, 0)
    world.pass_ms(2_000)
    world.measure(100, 100)
    world.pass_ms(1_500)
    assert world.clock.age_s == 1.5


def test_impossible_sample_is_refused() -> None:
    """An answer from before its question is a caller's error, and changes nothing."""
    clock = World().clock
    with pytest.raises(ValueError, match="before it was sent"):
        clock.add_sample(2, 1, START_MS)
    assert not clock.measured


def test_real_clocks_agree_with_the_host() -> None:
    """With the host's own time as the exchange's, the clock shows the host's time, the bias aside."""
    clock = ServerClock()
    now_ns = time.monotonic_ns()
    clock.add_sample(now_ns, now_ns, time.time_ns() // MS)
    assert abs(clock.now_ms() + BEHIND_MS - time.time_ns() // MS) <= 50
    assert abs(clock.offset_ms) <= 50


def test_threads_share_the_clock() -> None:
    """While some threads add and drop samples, others always read one of the two true times."""
    world = World(ahead_ms=1_000)
    allowed = {START_MS, START_MS + 1_000 - BEHIND_MS}
    seen: set[int] = set()
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            world.clock.add_sample(world.mono_ns, world.mono_ns, world.exchange_ms)
            world.clock.drop_samples()

    def read() -> None:
        for _ in range(5_000):
            seen.add(world.clock.now_ms())

    writers = [threading.Thread(target=write) for _ in range(2)]
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in writers + readers:
        thread.start()
    for thread in readers:
        thread.join()
    stop.set()
    for thread in writers:
        thread.join()
    assert seen <= allowed
