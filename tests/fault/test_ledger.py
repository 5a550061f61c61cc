"""The judging itself: it must see what it is there to see."""

from __future__ import annotations

import pytest

from producer import OpenOutcome
from producer.message import Attempt, Call, ListedOrder, Outcome, OutcomeKind
from tests.fault.ledger import (
    Ask,
    ExchangeSide,
    Kill,
    difference,
    exchange_side,
    key_kinds,
    left_alone,
    pattern_of,
    queue_side,
    recoveries_ms,
    requests_during_bans,
)
from worker.sandbox.control import BookEntry, Incident

A, B, C = ("a" * 32, "b" * 32, "c" * 32)


def record(job_id: str, algo_id: int | None = 1, kind: str = "cancelled", **traits: object) -> Outcome:
    """An outcome."""
    known: dict[str, object] = {"may_be_live": not OutcomeKind(kind).off_the_book, "run": 1}
    return Outcome(**({"id": job_id, "algo_id": algo_id, "kind": OutcomeKind(kind)} | known | traits))  # type: ignore[arg-type]


def entry(algo_id: int = 1, status: str = "CANCELED", **traits: object) -> BookEntry:
    """A line of the exchange's book."""
    known: dict[str, object] = {
        "account": "default",
        "client_algo_id": f"auto-{algo_id}",
        "symbol": "BTCUSDT",
        "actual_order_id": "",
        "create_time_ms": 0,
        "update_time_ms": 0,
        "decoy": False,
        "deletes": 1,
        "deletes_effective": int(status == "CANCELED"),
        "gets": 0,
        "delete_arrivals_ns": [],
        "faults": [],
    }
    return BookEntry(algo_id=algo_id, status=status, **(known | traits))  # type: ignore[arg-type]


def attempt(at_ms: int, msg: str = "success", verdict: str = "confirmed") -> Attempt:
    """A cancel's attempt."""
    return Attempt(1, at_ms, Call.CANCEL, 200, 200, msg, verdict, 5)


def test_everything_acknowledged_and_recorded_once_is_ok() -> None:
    """A clean run has nothing but ok; requests that share a job are one."""
    side = queue_side([Ask(1, A), Ask(1, A), Ask(2, B)], [record(A), record(B, 2)], {})
    assert (side.attempted, side.acknowledged, side.ok) == (3, 3, 2)
    assert (side.lost, side.unexpected, side.recovered, side.duplicated) == ((), (), 0, ())


def test_acknowledged_without_a_record_is_lost() -> None:
    """A promise without an outcome is a loss."""
    assert queue_side([Ask(1, A), Ask(2, B)], [record(A)], {}).lost == (B,)


def test_a_second_record_of_a_run_is_a_duplicate_and_a_new_run_is_not() -> None:
    """One entry for an id and run."""
    assert queue_side([Ask(1, A)], [record(A), record(A)], {}).duplicated == (f"{A} run 1",)
    assert queue_side([Ask(1, A)], [record(A), record(A, run=2)], {}).duplicated == ()


def test_records_of_unacknowledged_ids() -> None:
    """What comes out for a call of unknown end was recovered; for no such call it is unexpected."""
    side = queue_side([Ask(1, None), Ask(1, A)], [record(A), record(B), record(C, 2)], {})
    assert (side.recovered, side.unexpected) == (1, (C,))
    assert side.lost == ()


def test_orders_known_by_client_id() -> None:
    """A record without an algo id is about the order of its client id."""
    by_client = record(B, None, client_algo_id="auto-1")
    assert queue_side([Ask(1, None)], [by_client], {"auto-1": 1}).recovered == 1
    assert queue_side([Ask(1, None)], [by_client], {}).unexpected == (B,)


@pytest.mark.parametrize(
    ("outcome", "line"),
    [
        (record(A), entry()),
        (record(A, attempts=(attempt(1, verdict="unclear"),)), entry(deletes_effective=0)),
        (record(A, kind="already_cancelled"), entry(deletes_effective=0)),
        (record(A, kind="triggered", actual_order_id="7"), entry(status="FINISHED", actual_order_id="7")),
        (record(A, kind="expired"), entry(status="EXPIRED")),
        (record(A, kind="rejected"), entry(status="REJECTED")),
        (record(A, kind="unknown"), entry(status="NEW")),
    ],
)
def test_outcomes_that_agree_with_the_book(outcome: Outcome, line: BookEntry) -> None:
    """An outcome that the book bears out is no difference."""
    assert difference(outcome, line, is_alone=True) is None


@pytest.mark.parametrize(
    ("outcome", "line"),
    [
        (record(A), None),
        (record(A), entry(status="NEW")),
        (record(A), entry(deletes_effective=0)),
        (record(A, kind="already_cancelled"), entry()),
        (record(A, kind="triggered", actual_order_id="7"), entry(status="TRIGGERED", actual_order_id="8")),
        (record(A, kind="triggered"), entry()),
        (record(A, kind="not_found"), entry(status="NEW")),
        (record(A, kind="refused"), entry(status="NEW")),
        (record(A, may_be_live=True), entry()),
    ],
)
def test_outcomes_that_contradict_the_book(outcome: Outcome, line: BookEntry | None) -> None:
    """An outcome that the book does not bear out is a difference."""
    assert difference(outcome, line, is_alone=True) is not None


def test_two_jobs_for_one_order() -> None:
    """When a repeated request became a job of its own, the second one finds the order cancelled by the first."""
    records = [record(A), record(B, kind="already_cancelled")]
    side = exchange_side([Ask(1, None), Ask(1, B)], records, {1: entry(deletes=2)}, {})
    assert (side.differences, side.repeated_deletes, side.harmful) == ((), 1, ())


def test_orders_that_nobody_asked_about_must_stay() -> None:
    """A DELETE for a bystander is harm, whatever it did; an untouched one is none."""
    book = {1: entry(), 2: entry(2, "NEW", deletes=0), 3: entry(3, "NEW", deletes=1)}
    side = exchange_side([Ask(1, A)], [record(A)], book, {})
    assert [line.split()[0] for line in side.harmful] == ["3"]


def test_undecided_kinds_are_counted() -> None:
    """unknown, gave_up and overdue are added up."""
    records = [record(A, kind="unknown"), record(B, kind="gave_up"), record(C, kind="overdue"), record(A)]
    assert exchange_side([Ask(1, A)], records, {1: entry()}, {}).undecided == 3


def test_recovery_runs_from_the_kill_to_the_next_request() -> None:
    """Not to the noted but unfinished attempt, nor to a later run; a job that needed none is left out."""
    history = (attempt(100, "worker lost", "unclear"), attempt(2600), attempt(2700))
    records = [record(A, attempts=history), record(B, attempts=(attempt(100),)), record(A, attempts=(attempt(9000),))]
    assert recoveries_ms([Kill(1000, (A, B, C))], records) == [1600]


def test_requests_during_bans_leave_the_first_second_out() -> None:
    """In the first second of a ban not everybody can have heard of it."""
    assert requests_during_bans([Incident("banned_418", "127.0.0.1", 0, 2000, [10, 999, 1001, 1500])]) == 2


def test_a_ban_is_not_heard_of_while_redis_is_away() -> None:
    """Workers tell each other through Redis: while it is away, and a moment after, only who was told can know."""
    ban = [Incident("banned_418", "127.0.0.1", 10_000, 9_000, [500, 3_500, 4_900, 5_100])]
    assert requests_during_bans(ban, [(9_000, 13_000)]) == 1
    assert requests_during_bans(ban, [(11_500, 12_000)]) == 3, "all had heard of it by then"
    assert requests_during_bans(ban, [(0, 8_000), (40_000, 50_000)]) == 3


# ---- left alone -----------------------------------------------------------------------------------------------------

NEWER = "the client id belongs to an order created after the request: left alone"
UNMEASURED = "it cannot be told whether the client id's order was created before the request"
ORDER_OF = {"auto-1": 1}


def left(*verdicts: str, error: str = NEWER, algo_id: int | None = None, **traits: object) -> Outcome:
    """A request by client id alone that ended so, after cancels with these verdicts."""
    attempts = tuple(attempt(n, verdict=verdict) for n, verdict in enumerate(verdicts))
    known: dict[str, object] = {"client_algo_id": "auto-1", "error": error, "attempts": attempts}
    return record(A, algo_id, "unknown", **(known | traits))


def excused(*records: Outcome, book: BookEntry | None = None, reopened: tuple[int, ...] = (1,)) -> int:
    """How many of these are excused."""
    side = exchange_side([Ask(1, A)], records, {1: book or entry()}, ORDER_OF, reopened)
    assert side.undecided == len(records) - sum(side.left_alone.values())
    return sum(side.left_alone.values())


def test_an_unclear_cancel_whose_client_id_was_taken_again_is_excused() -> None:
    """Nobody could know what became of that order; that it was the newer one, or perhaps it, is a good reason."""
    assert excused(left("unclear")) == 1
    assert excused(left("unclear", error=f"{UNMEASURED}: the clocks are known to 64 ms: left alone")) == 1
    assert excused(left("no_such_order"), book=entry(deletes_effective=0)) == 1


def test_whoever_was_second_is_excused() -> None:
    """Two requests for one order: whose cancel came too late, or who had to look first, found the id taken again."""
    first = record(B, 1)
    for second in (left("no_such_order"), left(), left("clock")):
        assert left_alone([first, second], {1: entry()}, ORDER_OF, (1,)) == {NEWER.removesuffix(": left alone"): 1}
    assert left_alone([first, left()], {1: entry()}, ORDER_OF, ()) == {}


def test_a_later_run_of_an_excused_request_is_excused() -> None:
    """Who asks once more is told the same; but only where the first run had its reason."""
    assert excused(left("unclear"), left(run=2)) == 2
    assert excused(left(run=2)) == 0


def test_no_other_reason_is_one() -> None:
    """The id was not taken again, the clocks were not looked at, the cancel was clear, or another order was named."""
    assert excused(left("unclear"), reopened=()) == 0
    assert excused(left("unclear"), book=entry(status="NEW")) == 0
    assert excused(left("unclear", error=f"{UNMEASURED}: the clocks are not measured: left alone")) == 0
    assert excused(left("unclear", error="the deadline passed")) == 0
    assert excused(left("busy")) == 0
    assert excused(left("no_such_order")) == 0, "it was a cancel of ours that worked"
    assert excused(left("unclear", algo_id=1)) == 0


# ---- all open orders of a symbol ------------------------------------------------------------------------------------

L, MOMENT_MS = "e" * 32, 5000


def listing(*orders: tuple[int, str], left_alone: tuple[int, ...] = (), before_ms: int = MOMENT_MS) -> Outcome:
    """The outcome of a request for all open orders."""
    named = tuple(ListedOrder(*order) for order in orders)
    known: dict[str, object] = {"orders": named, "left_alone": left_alone, "before_ms": before_ms}
    return record(L, None, "listed", symbol="BTCUSDT", may_be_live=True, **known)


def judged(*records: Outcome, is_told_live: bool | None = None, **states: str) -> ExchangeSide:
    """The verdict, where orders 1 and 2 were open at the moment and 3 was opened later, the first one is asked for by
    itself as well, and the rest is in the states of the book (NEW)."""
    opened_ms = {1: MOMENT_MS - 10, 2: MOMENT_MS - 2, 3: MOMENT_MS + 2}
    book = {i: entry(i, states.get(f"s{i}", "NEW"), deletes=int(f"s{i}" in states)) for i in opened_ms}
    asks = [Ask("BTCUSDT", L, MOMENT_MS + 1), Ask(1, A)]
    ends = {} if is_told_live is None else {L: OpenOutcome(L, OutcomeKind.LISTED, is_told_live)}
    return exchange_side(asks, records, book, {}, (), opened_ms, ends)


def test_a_listing_that_agrees_with_the_book() -> None:
    """What was open is named and gone, whoever's request did it, or left alone; what came later stays."""
    side = judged(listing((1, A), (2, B)), record(A), record(B, 2), s1="CANCELED", s2="CANCELED")
    assert (side.differences, side.harmful) == ((), ())
    assert (side.listings, side.named, side.joined, side.spared) == (1, 2, 1, 1)
    assert judged(listing((1, A), left_alone=(2,)), record(A), is_told_live=True, s1="CANCELED").differences == ()


@pytest.mark.parametrize(
    ("side", "said"),
    [
        (judged(listing((1, A)), record(A), s1="CANCELED"), "says nothing of order 2"),
        (
            judged(listing((1, A), left_alone=(2,)), record(A), is_told_live=False, s1="CANCELED"),
            "says nothing of order 2",
        ),
        (
            judged(listing((2, B), (3, C)), record(B, 2), record(C, 3), s2="CANCELED", s3="CANCELED"),
            "opened 2 ms after",
        ),
        (judged(listing((9, C)), record(C, 9)), "not of its symbol"),
        (judged(listing((2, B)), record(B, 1), s2="CANCELED"), "is named for order 2"),
        (judged(listing(before_ms=MOMENT_MS + 4)), "means a moment 3 ms after"),
    ],
)
def test_a_listing_that_contradicts_the_book(side: ExchangeSide, said: str) -> None:
    """An open order that is not told of, one that is named and was opened later, or a moment that is not its call's."""
    assert any(said in difference for difference in side.differences), side


def test_requests_of_a_listing_are_promised() -> None:
    """Each must come out, and no others may; an order that no listing names is harmed by a DELETE."""
    asks, ends = [Ask("BTCUSDT", L)], [listing((1, A), (2, B)), record(A)]
    assert queue_side(asks, ends, {}).lost == (B,)
    assert queue_side(asks, [*ends, record(B, 2), record(C, 3)], {}).unexpected == (C,)
    assert queue_side([Ask("BTCUSDT", None)], [*ends, record(B, 2)], {}).recovered == 1
    assert judged(listing(), s3="CANCELED").harmful == ("3 CANCELED 1 DELETEs",)


def test_a_short_deadline_is_excused_where_another_request_decided() -> None:
    """Of the listing and of what it made; and where the call told no id with which to try again."""
    ends = [listing((1, A)), record(A, kind="overdue"), record(A, run=2)]
    for asks, excused_ones in (([Ask("BTCUSDT", L, None, True)], 1), ([Ask("BTCUSDT", L)], 0)):
        assert exchange_side(asks, ends, {1: entry()}, {}).hasty == excused_ones
    assert exchange_side([Ask("BTCUSDT", L, None, True)], ends[:2], {1: entry()}, {}).undecided == 1
    assert exchange_side([Ask("BTCUSDT", L, None, True)], [*ends[:2], record(B)], {1: entry()}, {}).undecided == 0
    assert exchange_side([Ask("BTCUSDT", None, None, True)], ends[:2], {1: entry()}, {}).undecided == 0


# ---- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "pattern"),
    [
        (f"rq:job:{A}", "rq:job:*"),
        (f"rq:execution:{A}:{B}", "rq:execution:*"),
        ("rq:worker:worker.1.0123456789ab", "rq:worker:*"),
        ("rq:worker:host.12.0123456789ab:executions", "rq:worker:*:executions"),
        ("cancels:order:default:a:17", "cancels:order:*"),
        (f"cancels:outcome:{A}", "cancels:outcome:*"),
        ("cancels:outcomes", "cancels:outcomes"),
    ],
)
def test_kinds_of_keys(key: str, pattern: str) -> None:
    """Keys that differ in an id, an order or a worker's name alone are of one kind."""
    assert pattern_of(key) == pattern


def test_keys_are_counted_by_kind_and_life() -> None:
    """Each kind says how many of its keys end by themselves."""
    kinds = key_kinds([(f"rq:job:{A}", True), (f"rq:job:{B}", False), ("rq:queues", False)])
    assert [(kind.pattern, kind.count, kind.with_ttl) for kind in kinds] == [("rq:job:*", 2, 1), ("rq:queues", 1, 0)]
