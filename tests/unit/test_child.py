"""What is done about the child of a triggered order: rules that hold for any answers, and the steps of chosen ones."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.message import CHILD_ENDED, WORKER_LOST, Attempt, Call, OutcomeKind
from tests.decisions import (
    ALGO_ID,
    BAD_KEY,
    BAD_PARAM,
    CHILD_ID,
    GATEWAY,
    GONE,
    LATE_CLOCK,
    LIMITED,
    NO_CONNECTION,
    NOT_THERE,
    OVERLOAD,
    SILENT,
    T0,
    TIMEOUT,
    Answer,
    Played,
    state,
)
from tests.decisions import play as play_by_rules
from worker.child import Child
from worker.classify import SILENCE, ChildRef, Means, OrderRef, Reply, classify
from worker.decide import NOT_DONE, UNREADABLE, Again, Case, Policy, Stop, first_step, next_step

REF = ChildRef("BNBUSDT", int(CHILD_ID))
POLICY = Policy()
C, Q = "cancel_child", "query_child"


def child(status: str, executed: str = "0", price: str | None = "0.00000", **other: object) -> Reply:
    """The answer that shows the child in a state."""
    order = {"orderId": REF.order_id, "symbol": REF.symbol, "status": status, "executedQty": executed} | other
    return Reply(200, json.dumps(order | ({} if price is None else {"avgPrice": price})).encode())


NEW, PART, FILLED = child("NEW"), child("PARTIALLY_FILLED", "0.4", "9.5"), child("FILLED", "1", "9.6")
CANCELED, EXPIRED, ODD = child("CANCELED"), child("EXPIRED"), child("PENDING_NEW")
PRICED = child("CANCELED", "0.4", "9.5")
#: As a DELETE answers: without an average price.
DONE, DONE_IN_PART = child("CANCELED", price=None), child("CANCELED", "0.4", None)


def play(
    answers: list[Answer], *, cancels: bool = True, parent: str = "TRIGGERED", left_ms: int = 300_000, **how: Any
) -> Played:
    """Work on a child until it stops; the last answer is repeated for as long as calls are made."""
    known = Child(REF, Stop(OutcomeKind.TRIGGERED, parent, CHILD_ID))
    return play_by_rules(answers, rules=known, ref=REF, deadline_s=left_ms / 1000, cancels_child=cancels, **how)


ROWS: list[tuple[str, dict[str, object], list[Answer], list[str], str, str | None, bool | None]] = [
    ("reported", {"cancels": False}, [NEW], [Q], "triggered", "NEW", None),
    ("reported, whatever is said", {"cancels": False}, [BAD_KEY], [Q], "triggered", None, None),
    ("reported late", {"cancels": False, "left_ms": -1}, [PART], [Q], "triggered", "PARTIALLY_FILLED", None),
    ("filled", {}, [FILLED], [Q], "triggered", "FILLED", False),
    ("cancelled before", {}, [CANCELED], [Q], "triggered", "CANCELED", False),
    ("expired", {}, [EXPIRED], [Q], "triggered", "EXPIRED", False),
    ("cancelled", {}, [NEW, DONE], [Q, C], "triggered", "CANCELED", True),
    ("its price is read", {}, [NEW, DONE_IN_PART, PRICED], [Q, C, Q], "triggered", "CANCELED", True),
    ("its price is not told", {}, [NEW, DONE_IN_PART, TIMEOUT], [Q, C, Q], "triggered", "CANCELED", True),
    ("its price is known", {}, [PART, DONE_IN_PART], [Q, C], "triggered", "CANCELED", True),
    ("unknown state", {}, [ODD, DONE], [Q, C], "triggered", "CANCELED", True),
    ("filled meanwhile", {}, [NEW, GONE, FILLED], [Q, C, Q], "triggered", "FILLED", False),
    ("a cancel that shows it filled", {}, [NEW, FILLED], [Q, C], "triggered", "FILLED", False),
    ("a cancel that shows it live", {}, [NEW, NEW, CANCELED], [Q, C, Q], "triggered", "CANCELED", True),
    ("no answer, done", {}, [NEW, SILENT, CANCELED], [Q, C, Q], "triggered", "CANCELED", True),
    ("no answer, not done", {}, [NEW, TIMEOUT, NEW, DONE], [Q, C, Q, C], "triggered", "CANCELED", True),
    ("missed for a while", {}, [NEW, TIMEOUT, NOT_THERE, CANCELED], [Q, C, Q, Q], "triggered", "CANCELED", True),
    ("not sent", {}, [NEW, NO_CONNECTION, DONE], [Q, C, C], "triggered", "CANCELED", True),
    ("our clock", {}, [NEW, LATE_CLOCK, DONE], [Q, C, C], "triggered", "CANCELED", True),
    ("limited", {}, [NEW, LIMITED, DONE], [Q, C, C], "triggered", "CANCELED", True),
    ("lag", {}, [NOT_THERE, NOT_THERE, NEW, DONE], [Q, Q, Q, C], "triggered", "CANCELED", True),
    ("key", {}, [NEW, BAD_KEY], [Q, C], "refused", "NEW", None),
    ("refused after a doubt", {}, [NEW, TIMEOUT, BAD_PARAM], [Q, C, Q], "unknown", "NEW", None),
    ("near the deadline", {"left_ms": 900}, [DONE], [C], "triggered", "CANCELED", True),
    ("after the deadline", {"left_ms": 0}, [TIMEOUT, NEW], [C, Q], "unknown", "NEW", None),
    ("after the deadline, gone", {"left_ms": 0}, [GONE, FILLED], [C, Q], "triggered", "FILLED", False),
    ("after the deadline, not sent", {"left_ms": 0}, [OVERLOAD], [C], "gave_up", None, None),
    ("after the deadline, limited", {"left_ms": 0}, [LIMITED], [C], "gave_up", None, None),
    ("finished", {"parent": "FINISHED"}, [FILLED], [Q], "triggered", "FILLED", False),
    ("finished, refused", {"parent": "FINISHED"}, [BAD_KEY], [Q], "triggered", None, None),
    ("finished, told later", {"parent": "FINISHED"}, [OVERLOAD, FILLED], [Q, Q], "triggered", "FILLED", False),
    ("finished, late", {"parent": "FINISHED", "left_ms": 0}, [OVERLOAD], [Q], "triggered", None, None),
    ("finished, in doubt", {"parent": "FINISHED", "left_ms": 0}, [NEW, TIMEOUT], [Q, C, Q], "unknown", "NEW", None),
    ("finished, and shown open", {"parent": "FINISHED"}, [NEW, DONE], [Q, C], "triggered", "CANCELED", True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "answers", "calls", "kind", "status", "ours"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_steps(
    options: dict[str, object],
    answers: list[Answer],
    calls: list[str],
    kind: str,
    status: str | None,
    ours: bool | None,
) -> None:
    """Each answer leads to these calls and this end."""
    played = play(answers, **options)  # type: ignore[arg-type]

    seen = played.stop.child
    assert (played.calls, played.stop.kind.value) == (calls, kind)
    assert (seen.status if seen else None, played.stop.child_cancelled) == (status, ours)
    assert played.stop.actual_order_id == CHILD_ID


@pytest.mark.parametrize(
    "answers", [[NEW, SILENT], [NEW, OVERLOAD], [NEW, GONE, NEW, GONE, GATEWAY], [NOT_THERE], [LIMITED]]
)
def test_bounds(answers: list[Answer]) -> None:
    """What never ends ends by the deadline, or where the exchange does not know the child, as what may be live."""
    played = play(answers)

    assert played.stop.kind in (OutcomeKind.GAVE_UP, OutcomeKind.UNKNOWN)
    assert "may be live" in (played.stop.error or "")


def test_whose_cancel_it_was_that_a_lost_worker_sent() -> None:
    """A worker that was lost may have cancelled the child: then nobody knows."""
    lost = Attempt(1, T0, Call.CANCEL, None, None, WORKER_LOST, Means.UNCLEAR.value, 5)

    assert play([CANCELED], before=(lost,)).stop.child_cancelled is None
    assert play([NEW, DONE], before=(lost,)).stop.child_cancelled is True
    assert play([EXPIRED], before=(lost,)).stop.child_cancelled is False
    assert play([CANCELED], retried=True).stop.child_cancelled is None  # by an earlier run's, perhaps


def test_a_child_that_was_seen_is_missed_for_a_whole_horizon_from_then_on() -> None:
    """What the exchange did not know before it showed the child open says nothing of where it is now."""
    missed = Attempt(1, T0 - 20_000, Call.QUERY_CHILD, 400, -2013, "", Means.NO_SUCH_ORDER.value, 5)
    shown = Attempt(2, T0 - 10, Call.QUERY_CHILD, 200, None, "NEW", Means.OPEN.value, 5)

    last = play([GONE, NOT_THERE], before=(missed, shown)).history[-1]
    assert POLICY.not_found_horizon_ms <= last.at_ms - T0 < 3 * POLICY.not_found_horizon_ms


def test_a_finished_parent_is_believed_where_the_child_is_not_found() -> None:
    """What the exchange never shows, and calls finished, rests no more; it is asked for until the horizon."""
    played = play([NOT_THERE], parent="FINISHED")

    assert (set(played.calls), played.stop.kind, played.stop.child) == ({Q}, OutcomeKind.TRIGGERED, None)
    assert played.history[-1].at_ms - T0 >= POLICY.not_found_horizon_ms


def test_what_nobody_can_read_may_have_been_a_cancel_of_ours() -> None:
    """Neither a damaged history nor a newer version's call proves that somebody else cancelled the child."""
    damaged = Attempt(1, T0, Call.CANCEL, None, None, UNREADABLE, Means.UNCLEAR.value, 0)
    foreign = Attempt(1, T0, "amend_child", None, None, "", Means.UNCLEAR.value, 0)

    for before in (damaged, foreign):
        assert play([CANCELED], before=(before,)).stop.child_cancelled is None


def test_a_cancel_that_was_proven_to_have_done_nothing_was_not_ours() -> None:
    """A look that shows the child open, when the cancel could be accepted no more, takes it back."""
    tried = Attempt(1, T0, Call.CANCEL_CHILD, None, None, SILENCE, Means.UNCLEAR.value, 5)
    early, late = (Attempt(2, T0 + ms, Call.QUERY_CHILD, 200, None, "NEW", "open", 5) for ms in (100, 60_000))

    assert play([GONE, CANCELED], before=(tried, early, late)).stop.child_cancelled is False
    for before in ((tried, early), (tried, dataclasses.replace(late, verdict="unclear"))):
        assert play([GONE, CANCELED], before=before).stop.child_cancelled is True


def test_an_heir_after_the_deadline_looks_and_keeps_the_doubt() -> None:
    """Who takes the job over past its deadline asks for the child once more; its doubtful cancel stays a doubt."""
    case = Case(False, T0, T0 + 1_000, cancels_child=True)
    seen = Attempt(1, T0, Call.QUERY, 200, None, "TRIGGERED", Means.TRIGGERED.value, 5)
    tried = Attempt(2, T0 + 10, Call.CANCEL_CHILD, None, None, SILENCE, Means.UNCLEAR.value, 250)
    asked = Attempt(3, T0 + 2_000, Call.QUERY, 503, None, "", Means.BUSY.value, 5)

    busy = dataclasses.replace(tried, verdict="busy")
    looked = Attempt(3, T0 + 20, Call.QUERY_CHILD, 200, None, "NEW", "open", 5)
    for before in ([seen, tried], [seen, busy, looked], [seen, tried, looked]):
        assert first_step(case, before, T0 + 2_000) == Again(Call.QUERY)
    stop = first_step(case, [seen, tried, asked], T0 + 3_000)
    assert isinstance(stop, Stop)
    assert stop.kind is OutcomeKind.UNKNOWN


def test_cancels_that_find_nothing_are_not_sent_at_once() -> None:
    """An exchange that shows the child and does not find it is asked less and less often."""
    played = play([NEW, *[GONE, NEW] * 300], roll=0.0, left_ms=60_000)

    assert len(played.calls) < 60


@pytest.mark.parametrize("left_ms", [*range(50, 1_050, 100), 5_000])
@pytest.mark.parametrize(
    "answers",
    [[GATEWAY], [TIMEOUT], [NEW, GATEWAY], [NEW, *[GONE, NEW] * 300], [child("NEW", orderId=7)], [OVERLOAD], [GONE]],
)
def test_the_last_second_knows_pauses_too(answers: list[Answer], left_ms: int) -> None:
    """Just before the deadline an exchange that fails is asked no more often than before: a ban would hit everybody."""
    played = play(answers, left_ms=left_ms, roll=0.5)

    last = [attempt.at_ms for attempt in played.history if attempt.at_ms >= T0 + left_ms - 1_000]
    assert len(last) <= 12
    assert sum(at_ms >= T0 + left_ms for at_ms in last) <= 3


def test_the_first_cancel_waits_for_nothing_however_many_looks_were_in_doubt() -> None:
    """A child that is seen open after many unanswered looks is cancelled at once: no cancel of it was sent yet."""
    played = play([TIMEOUT] * 9 + [NEW, DONE, CANCELED], left_ms=60_000)

    assert played.calls == [*[Q] * 10, C]
    assert played.delays[-1] == 0


def test_what_an_earlier_holder_saw() -> None:
    """A history with what was seen of the child is gone on with, and not told: it can be forged."""
    seen = Attempt(1, T0, Call.QUERY_CHILD, 200, None, "PARTIALLY_FILLED", Means.OPEN.value, 5)

    assert play([DONE], before=(seen,)).calls == [C]
    assert play([NEW], before=(seen,), cancels=False).calls == [Q]
    for status in ("PARTIALLY_FILLED", "CANCELED"):
        stop = play([OVERLOAD], before=(dataclasses.replace(seen, msg=status),), left_ms=0).stop
        assert (stop.kind, stop.child) == (OutcomeKind.GAVE_UP, None)


@pytest.mark.parametrize("verdict", [Means.UNCLEAR, Means.CONFIRMED])
def test_what_redis_tells_of_an_earlier_holders_cancel_proves_no_cancel_of_ours(verdict: Means) -> None:
    """Whose cancel it was is not known; a cancel that this holder made is ours."""
    tried = Attempt(1, T0, Call.CANCEL_CHILD, None, None, SILENCE, verdict.value, 5)

    assert play([CANCELED], before=(tried,), told_to=1).stop.child_cancelled is None
    assert play([NEW, DONE], before=(tried,), told_to=1).stop.child_cancelled is True


ANSWERS = st.lists(
    st.sampled_from(
        [
            *(NEW, PART, FILLED, CANCELED, EXPIRED, ODD, DONE, DONE_IN_PART, GONE, NOT_THERE, TIMEOUT, SILENT),
            *(OVERLOAD, NO_CONNECTION, LATE_CLOCK, LIMITED, BAD_KEY, BAD_PARAM, GATEWAY),
            *(child("NEW", orderId=7), Reply(200, b"{}")),
        ]
    ),
    min_size=1,
    max_size=30,
)


@given(
    ANSWERS, st.booleans(), st.sampled_from(["TRIGGERED", "FINISHED"]), st.integers(-10, 20_000), st.floats(0, 0.999)
)
def test_rules(answers: list[Answer], cancels: bool, parent: str, left_ms: int, roll: float) -> None:
    """A child is cancelled only where that was asked for, and then told as triggered only where it is proven to rest no
    more; a cancel that may have worked is followed by a look; few calls pass the deadline."""
    played = play(answers, cancels=cancels, parent=parent, left_ms=left_ms, roll=roll)

    calls, stop = played.history, played.stop
    assert cancels or played.calls == [Q]
    if cancels and stop.kind is OutcomeKind.TRIGGERED:
        is_over = parent == "FINISHED" and not any(attempt.verdict == "open" for attempt in calls)
        assert is_over or (stop.child is not None and stop.child.status in CHILD_ENDED)
    if stop.child_cancelled:
        assert any(a.call is Call.CANCEL_CHILD and a.verdict in ("unclear", "confirmed") for a in calls)
    for before, after in itertools.pairwise(calls):
        if before.call is Call.CANCEL_CHILD and before.verdict not in NOT_DONE:
            assert after.call is Call.QUERY_CHILD
    assert all(delay_ms >= 0 for delay_ms in played.delays)
    assert sum(attempt.at_ms >= T0 + left_ms for attempt in calls) <= 3


def test_a_child_that_is_never_named_is_given_up_at_the_deadline() -> None:
    """A triggered order whose child the exchange does not name is asked again until then, and told as what may be live;
    where nothing hangs on the child, it is told as triggered after a few answers."""
    seen = Attempt(1, T0 + 900, Call.QUERY, 200, None, "TRIGGERED", Means.TRIGGERED.value, 5)
    verdict = classify(Call.QUERY, OrderRef(ALGO_ID), state("TRIGGERED"))
    case = Case(False, T0, T0 + 1_000, cancels_child=True)

    assert isinstance(next_step(case, [seen], verdict, T0 + 905, 0.5), Again)
    late = next_step(case, [seen], verdict, T0 + 1_000, 0.5)
    assert isinstance(late, Stop)
    assert (late.kind, late.order_status) == (OutcomeKind.GAVE_UP, "TRIGGERED")
    told = dataclasses.replace(case, cancels_child=False, deadline_at_ms=T0 + 60_000)
    steps = [next_step(told, [seen] * count, verdict, T0 + 905, 0.5) for count in (1, 6)]
    assert isinstance(steps[0], Again)
    assert isinstance(steps[1], Stop)
    assert steps[1].kind is OutcomeKind.TRIGGERED


@pytest.mark.parametrize(("policy", "left_ms"), [(dataclasses.replace(POLICY, max_attempts=1), 60_000), (POLICY, 900)])
def test_what_an_order_became_is_told_at_the_bounds_too(policy: Policy, left_ms: int) -> None:
    """A triggered order whose child the exchange does not name is no live order when attempts or time run out."""
    seen = Attempt(1, T0 + 900, Call.QUERY, 200, None, "TRIGGERED", Means.TRIGGERED.value, 5)
    verdict = classify(Call.QUERY, OrderRef(ALGO_ID), state("TRIGGERED"))
    case = Case(False, T0, T0 + left_ms, policy)

    for step in (next_step(case, [seen], verdict, T0 + 905, 0.5), first_step(case, [seen], T0 + 905)):
        assert step == Stop(OutcomeKind.TRIGGERED, "TRIGGERED")
