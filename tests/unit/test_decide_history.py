"""The history as a job keeps it: bounded in size, and every decision the same by it as by the whole."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from producer.message import (
    Attempt,
    Call,
    Outcome,
    OutcomeKind,
    decode_attempts,
    decode_outcome,
    encode_attempts,
)
from producer.untrusted import MAX_MSG_CHARS
from tests.examples import examples
from worker.classify import SILENCE, Means, Verdict
from worker.decide import (
    MAX_HISTORY,
    UNREADABLE,
    Again,
    Case,
    Policy,
    Span,
    Stop,
    as_known,
    bounded,
    counted,
    doubts,
    first_step,
    last_status,
    next_number,
    next_step,
    unread,
)

PROFILE = examples(25)
T0 = 1_750_485_492_076
CASE = Case(by_client_id=False, meant_at_ms=T0, deadline_at_ms=T0 + 7 * 86_400_000, ahead=Span(0, 0))
C, Q = Call.CANCEL, Call.QUERY

Told = tuple[Call | str, Means]
#: What happens to requests that take long, each a list to choose from by chance: who waits out a ban, a clock that
#: cannot be set, an order that nobody knows, an exchange that never answers, one that is overloaded, a bit of all.
LIVES: list[Sequence[Told]] = [
    [(C, Means.LIMITED), (Q, Means.LIMITED), (C, Means.BLOCKED)],
    [(C, Means.CLOCK), (C, Means.CLOCK), (C, Means.CLOCK), (C, Means.CLOCK), (Q, Means.CLOCK), (C, Means.LIMITED)],
    [(C, Means.CLOCK)],
    [(Q, Means.NO_SUCH_ORDER)] * 9 + [(C, Means.NO_SUCH_ORDER)],
    [(Q, Means.NO_SUCH_ORDER)] * 30 + [(Q, Means.OPEN), (C, Means.UNCLEAR)],
    [(C, Means.UNCLEAR), (Q, Means.UNCLEAR)],
    [(C, Means.BUSY)] * 50 + [(C, Means.UNCLEAR), (Q, Means.OPEN)],
    [(C, Means.NOT_SENT)],
    [(Q, Means.TRIGGERING)] * 40 + [(Q, Means.ODD_STATUS)],
    [(call, means) for call in (C, Q, "query_child") for means in Means],
]


def _attempt(n: int, at_ms: int, told: Told, ms: int = 20) -> Attempt:
    call, means = told
    return Attempt(n, at_ms, call, None, None, f"words {n}" if means is Means.ODD_STATUS else "", means.value, ms)


def _history(chance: random.Random) -> list[Attempt]:
    """Up to some hundred attempts, out of one kind of life or one after the other."""
    history, at_ms = list[Attempt](), T0
    for _ in range(chance.choice((1, 1, 2, 4))):
        life = chance.choice(LIVES)
        for _ in range(chance.choice((3, 60, 190, 260))):
            at_ms += chance.choice((0, 10, 500, 7_000))
            took_ms = chance.choice((0, 20, 4_000, 60_000))
            attempt = _attempt(len(history) + 1, at_ms, chance.choice(life), took_ms)
            is_silent = attempt.verdict == Means.UNCLEAR and chance.random() < 0.7
            history.append(dataclasses.replace(attempt, msg=SILENCE) if is_silent else attempt)
    return history


CHANCES = st.integers(0, 2**32).map(random.Random)


def _policies(whole: Sequence[Attempt]) -> list[Policy]:
    """Bounds that are nowhere near, and such as are just reached or just not."""
    spent = counted(whole)
    bounds = (10_000, max(spent, 1), spent + 1, spent + 2)
    return [Policy(max_attempts=most, not_found_horizon_ms=60_000) for most in bounds]


def _assert_alike(kept: Sequence[Attempt], whole: Sequence[Attempt], chance: random.Random) -> None:
    """Both lead to the same, whoever comes back to the request and whatever is answered next."""
    for fact in (counted, last_status, next_number):
        assert fact(kept) == fact(whole)
    now_ms = (whole[-1].at_ms if whole else T0) + chance.choice((0, 6_000, 30_000, 100_000))
    told = chance.choice([*chance.choice(LIVES), (C, Means.CONFIRMED), (Q, Means.CANCELED), (C, Means.DENIED)])
    case = dataclasses.replace(CASE, by_client_id=chance.random() < 0.5)
    following = _attempt(next_number(whole), now_ms, told)
    for policy in _policies(whole):
        case = dataclasses.replace(case, policy=policy)
        assert bool(doubts(kept, policy)) is bool(doubts(whole, policy))
        assert first_step(case, kept, now_ms) == first_step(case, whole, now_ms)
        for roll in (0.0, 0.7):
            verdict = Verdict(told[1], msg=following.msg)
            steps = [
                next_step(case, history, verdict, now_ms + 20, roll)
                for history in ([*whole, following], [*kept, following], bounded([*kept, following]))
            ]
            assert steps[0] == steps[1] == steps[2]


@PROFILE
@example(random.Random(497))  # a cancel that was confirmed stands among what is left out
@given(CHANCES)
def test_any_bounded_history_decides_as_the_whole(chance: random.Random) -> None:
    """Kind, call, delay and words are the same, now and after one more attempt, whatever was left out."""
    whole = _history(chance)
    kept = bounded(whole)
    for _ in range(4):
        _assert_alike(kept, whole, chance)


@examples(10)  # each bounds hundreds of histories
@given(CHANCES)
def test_a_history_bounded_after_each_attempt_decides_as_the_whole(chance: random.Random) -> None:
    """Bounding hundreds of times over, as a worker does, drifts from the whole by nothing."""
    whole, kept = list[Attempt](), list[Attempt]()
    for attempt in _history(chance):
        whole.append(attempt)
        kept = bounded([*kept, attempt])
        assert sum(each.counted_before is not None for each in kept) == (len(whole) > MAX_HISTORY)
        if len(whole) % 50 == 0:
            _assert_alike(kept, whole, chance)
    _assert_alike(kept, whole, chance)


@PROFILE
@given(CHANCES)
def test_what_is_kept(chance: random.Random) -> None:
    """The first, the newest and, from the newest on, the unclear attempts stay as they were, and in their order."""
    whole = _history(chance)
    kept = bounded(whole)
    plain = [dataclasses.replace(attempt, counted_before=None) for attempt in kept]
    assert len(kept) == min(len(whole), MAX_HISTORY)
    assert plain == [attempt for attempt in whole if attempt in plain]
    assert (plain[0], plain[-40:]) == (whole[0], whole[-40:])
    unclear = [attempt for attempt in whole if attempt.verdict == Means.UNCLEAR]
    held = [attempt for attempt in plain if attempt.verdict == Means.UNCLEAR]
    if len(unclear) <= MAX_HISTORY - 50:
        assert held == unclear
    else:
        assert len(held) >= MAX_HISTORY - 50
        assert set(held) >= set(unclear[-(MAX_HISTORY - 50) :])


def test_a_short_history_is_kept_as_it_is() -> None:
    """Ordinary records hold every attempt and nothing else."""
    whole = [_attempt(n, T0 + n, (C, Means.BUSY)) for n in range(1, MAX_HISTORY + 1)]
    assert bounded(whole) == whole
    assert not any("counted_before" in attempt.as_dict() for attempt in bounded(whole))
    assert bounded([]) == []


def test_a_week_of_refusals_is_a_short_record() -> None:
    """Where attempts were left out, the numbers show the gap, one attempt tells the count, and the record is read."""
    whole = [_attempt(n, T0 + n * 1_000, (C, Means.LIMITED if n % 2 else Means.TRIGGER_RACE)) for n in range(1, 10_001)]
    kept = decode_attempts(encode_attempts(bounded(whole)))
    assert (len(kept), kept[0].n, kept[1].n, kept[-1].n) == (MAX_HISTORY, 1, 10_002 - MAX_HISTORY, 10_000)
    assert [attempt.counted_before for attempt in kept if attempt.counted_before is not None] == [4_980]
    assert (counted(kept), next_number(kept)) == (5_000, 10_001)
    record = Outcome("j", 1, OutcomeKind.GAVE_UP, attempts=kept).encode()
    assert decode_outcome(record).attempts == kept


def test_the_last_cancel_to_lose_its_doubt_outlives_many_newer_ones() -> None:
    """A cancel that took long may be in doubt after hundreds of later ones are not; it is never left out."""
    slow = _attempt(2, T0, (C, Means.UNCLEAR), 10_000_000)
    quick = [_attempt(n, T0 + n, (C, Means.UNCLEAR)) for n in range(3, 500)]
    seen = _attempt(500, T0 + 9_000_000, (Q, Means.OPEN))
    kept = bounded([_attempt(1, T0, (C, Means.BUSY)), slow, *quick, seen])
    assert slow in kept
    assert doubts(kept, Policy())


@pytest.mark.parametrize(
    ("told", "later"),
    [
        ((C, Means.BUSY), ()),
        ((Q, Means.ODD_STATUS), ()),
        ((Q, Means.OPEN), ((Q, Means.TRIGGERING),)),
        ((Q, Means.NO_SUCH_ORDER), ((Q, Means.NO_SUCH_ORDER),)),
    ],
    ids=["a cancel", "the last state", "the last time that it was open", "the first time that it was unknown"],
)
def test_an_old_attempt_that_still_decides_is_kept(told: Told, later: tuple[Told, ...]) -> None:
    """A rare event of long ago stays in a history full of what means nothing, and of cancels in doubt."""
    for filler in ((Q, Means.BUSY), (Q, Means.UNCLEAR)):
        lives = [filler, filler, told, *later, *[filler] * 300]
        whole = [_attempt(n, T0 + n, each) for n, each in enumerate(lives, 1)]
        assert whole[2] in bounded(whole)


def test_the_longest_texts_fit_far_below_what_is_read() -> None:
    """Whatever stood in a job hash, what is kept of it takes less than a third of a megabyte."""
    long = Attempt(1, -(2**63), "é" * 5_000, -(2**63), -(2**63), '"' * 5_000 + "🙂" * 5_000, "\\" * 5_000, -(2**63), 1)
    kept = bounded(as_known([dataclasses.replace(long, n=n, msg=f"{n} {long.msg}") for n in range(5_000)]))
    assert len(encode_attempts(kept).encode()) < 350_000
    assert {(len(attempt.msg), len(attempt.call), attempt.verdict) for attempt in kept} == {
        (MAX_MSG_CHARS, 64, "unclear")
    }
    (only,) = as_known([dataclasses.replace(long, call=C, verdict="busy", msg="🙂" * 5_000)])
    assert (only.call, only.verdict, only.msg) == (C, "busy", "🙂" * (MAX_MSG_CHARS - 1) + "…")
    assert len(encode_attempts([only] * MAX_HISTORY).encode()) < 350_000


# ---- what comes out of a job hash -----------------------------------------------------------------------------------


def test_a_history_that_cannot_be_read_leaves_a_doubt() -> None:
    """It may have held a cancel that worked: the order is looked at first, and a refusal is never more than unknown."""
    now_ms = T0 + 50_000
    history = unread(now_ms)
    assert [(a.n, a.at_ms, a.call, a.verdict, a.msg) for a in history] == [(1, now_ms, C, "unclear", UNREADABLE)]
    assert first_step(CASE, history, now_ms) == Again(Q)
    refused = [*history, _attempt(next_number(history), now_ms, (Q, Means.DENIED))]
    step = next_step(CASE, refused, Verdict(Means.DENIED, 400, -1102), now_ms + 20, 0.5)
    assert isinstance(step, Stop)
    assert step.kind is OutcomeKind.UNKNOWN


def test_what_a_newer_worker_wrote() -> None:
    """An attempt whose verdict this version does not know may have worked, and is in doubt; a call that it does not
    know stays in the record as it was, and costs an attempt."""
    assert doubts(as_known([Attempt(1, T0, C, 200, 200, "", "brand_new", 5)]), Policy())
    theirs = Attempt(1, T0, "amend_child", 200, None, "", Means.CONFIRMED.value, 5)
    assert bounded(as_known([theirs])) == [theirs]
    assert counted([theirs]) == 1


def test_attempts_are_numbered_on() -> None:
    """The next number follows the highest one, also where attempts are missing or a script counted anew."""
    assert next_number([]) == 1
    assert next_number([_attempt(7, T0, (C, Means.BUSY)), _attempt(3, T0, (C, Means.UNCLEAR))]) == 8
