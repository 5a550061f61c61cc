"""The check that nobody sends without a lease: it must see whoever does, and nobody else."""

from __future__ import annotations

import pytest

from producer.message import WORKER_LOST, Attempt, Call, Outcome, OutcomeKind
from tests.fault.fence import IN_FLIGHT_MS, LATE_MS, lost_holds, sent_without_lease
from worker.sandbox.arrivals import Arrival

ORDER, NAME = 7, "auto-7"


def attempt(at_ms: int, ms: int = 60, call: Call = Call.CANCEL, msg: str = "", verdict: str = "unclear") -> Attempt:
    """One that lasted from then for so long."""
    return Attempt(1, at_ms, call, None, None, msg, verdict, ms)


def lost(at_ms: int, ms: int) -> Attempt:
    """A hold that somebody else ended."""
    return attempt(at_ms, ms, msg=WORKER_LOST)


def record(*attempts: Attempt) -> Outcome:
    """What became of the request for the order."""
    return Outcome(id="a" * 32, algo_id=ORDER, kind=OutcomeKind.CANCELLED, may_be_live=False, run=1, attempts=attempts)


def arrival(at_ms: float, method: str = "DELETE", client_algo_id: str | None = None) -> Arrival:
    """A request about the order."""
    algo_id = None if client_algo_id else ORDER
    return Arrival(round(at_ms * 1e6), method, 40_000, algo_id, client_algo_id, round(at_ms))


def found(attempts: list[Attempt], *arrivals: Arrival) -> list[str]:
    """What is said of these requests."""
    return sent_without_lease([record(*attempts)], arrivals, {NAME: ORDER})


def test_each_attempt_accounts_for_its_request() -> None:
    """A cancel, the question behind it, and a cancel by client id before the order was known: all as recorded."""
    attempts = [attempt(1000), attempt(1060, call=Call.QUERY), attempt(1200)]
    assert found(attempts, arrival(1001, client_algo_id=NAME), arrival(1062, "GET"), arrival(1215)) == []


def test_whoever_wakes_and_sends_is_seen() -> None:
    """The holder was stopped, its job was carried on and ended by another, and then its own next request comes."""
    attempts = [lost(1000, 900), attempt(1950, call=Call.QUERY)]
    (said,) = found(attempts, arrival(1010), arrival(1955, "GET"), arrival(3000, "GET"))
    assert said.startswith(f"order {ORDER}: GET at 3000 from port 40000, 1100 ms after a lease was lost")


@pytest.mark.parametrize(("late_ms", "is_seen"), [(IN_FLIGHT_MS - 1, False), (IN_FLIGHT_MS + 1, True)])
def test_what_was_on_its_way_may_arrive(late_ms: int, is_seen: bool) -> None:
    """For 0.2 s after the lease was taken away a request may still come, and no longer."""
    assert bool(found([lost(1000, 900)], arrival(1900 + late_ms))) is is_seen


def test_a_request_beside_the_new_holders_own_is_seen() -> None:
    """Two came while the new holder had one in flight: one of them was another's."""
    attempts = [lost(1000, 900), attempt(2500, 1200)]
    assert found(attempts, arrival(1010), arrival(2510)) == []
    assert len(found(attempts, arrival(1010), arrival(2510), arrival(2700))) == 1


def test_the_other_call_accounts_for_nothing() -> None:
    """A question in flight does not excuse a cancel."""
    assert len(found([attempt(1000, call=Call.QUERY)], arrival(1010))) == 1


def test_an_attempt_that_never_left_accounts_for_nothing() -> None:
    """Where no byte was sent, whatever came was somebody else's."""
    assert len(found([attempt(1000, verdict="not_sent")], arrival(1010))) == 1


def test_a_request_of_which_nobody_tells_is_seen() -> None:
    """Before any lease was lost, for an order that nobody asked about, or long after its outcome."""
    (said,) = found([attempt(1000)], arrival(500))
    assert "no lease was lost before" in said
    assert len(sent_without_lease([], [arrival(1000)], {})) == 1
    assert len(found([attempt(1000)], arrival(1060 + LATE_MS + 1))) == 1


def test_an_attempt_is_noted_too_early_where_redis_was_held_up() -> None:
    """A worker that has had one answer, late, takes Redis' clock for as much behind: that is no crime."""
    records, late = [record(attempt(1000))], [arrival(3100)]
    assert len(sent_without_lease(records, late, {})) == 1
    assert sent_without_lease(records, late, {}, [(900, 3000)]) == []
    assert len(sent_without_lease(records, late, {}, [(1100, 3000)])) == 1
    assert len(sent_without_lease(records, [arrival(3100 + 700)], {}, [(900, 3000)])) == 1


def test_the_requests_of_all_runs_and_jobs_count_together() -> None:
    """Two jobs about one order, or two runs of one: what either tells accounts for what came."""
    records = [record(attempt(1000)), record(attempt(1010, 70))]
    assert sent_without_lease(records, [arrival(1011), arrival(1012)], {}) == []
    assert len(sent_without_lease(records, [arrival(1011), arrival(1012), arrival(1013)], {})) == 1


def test_lost_holds_are_counted() -> None:
    """Where nobody lost a lease, that nobody sent for one would say nothing."""
    assert lost_holds([record(lost(1, 2), attempt(9)), record(lost(3, 4), lost(5, 6))]) == 3
