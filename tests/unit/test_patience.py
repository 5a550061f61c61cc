"""How long an answer is waited for: what answers took, and how long nothing has been heard."""

from __future__ import annotations

import pytest

from producer.message import Call
from worker.patience import FIRST_S, FLOOR_S, Patience

MOST_S = 4.0
C, Q = Call.CANCEL, Call.QUERY
MS = 1_000_000


def heard(patience: Patience, call: Call, *took_ms: int, from_ms: int = 0) -> int:
    """Calls one after the other that took so long; gives when the last one was answered, ms."""
    for ms in took_ms:
        patience.answered(call, from_ms * MS, (from_ms + ms) * MS)
        from_ms += ms
    return from_ms


def test_nothing_is_known_at_first() -> None:
    """Before the first answer a second is waited, or what an attempt may take."""
    assert Patience(MOST_S).of(C) == FIRST_S
    assert Patience(0.4).of(C) == 0.4


def test_answers_are_smoothed() -> None:
    """RFC 6298: half of the first time is taken for its variation, and four times that is added (2.2). Later the
    variation learns by a quarter, and first; the smoothed time by an eighth (2.3)."""
    patience = Patience(MOST_S)
    heard(patience, C, 200)
    assert patience.of(C) == pytest.approx(0.2 + 4 * 0.1)
    heard(patience, C, 400)
    assert patience.of(C) == pytest.approx((0.2 * 7 / 8 + 0.4 / 8) + 4 * (0.1 * 3 / 4 + 0.2 / 4))


def test_fast_answers_are_given_a_quarter_of_a_second() -> None:
    """However fast and even answers are, what is waited does not fall below the floor, nor rise above the most."""
    patience = Patience(MOST_S)
    heard(patience, C, *[5] * 50)
    assert patience.of(C) == FLOOR_S == 0.25
    heard(patience, C, *[3_900] * 50)
    assert 3.9 <= patience.of(C) <= MOST_S
    heard(patience, C, 10_000)
    assert patience.of(C) == MOST_S


def test_kinds_of_calls_are_told_apart() -> None:
    """Slow cancels make nobody wait longer for a query; one that was never answered is judged by the other."""
    patience = Patience(MOST_S)
    heard(patience, C, *[900] * 20)
    assert patience.of(Q) == patience.of(C) > 0.9
    heard(patience, Q, *[5] * 20)
    assert (patience.of(Q), patience.of(C) > 0.9) == (FLOOR_S, True)


def test_it_doubles_once_for_each_period_of_silence() -> None:
    """However many calls of one flight stay without an answer; those sent after the doubling double it again."""
    patience = Patience(MOST_S)
    heard(patience, C, *[5] * 20)
    for _ in range(64):
        patience.silent(1_000 * MS, 1_250 * MS)
    assert (patience.of(C), patience.of(Q)) == (0.5, 0.5)
    patience.silent(1_251 * MS, 1_751 * MS)
    assert patience.of(Q) == 1.0


def test_a_silence_while_others_are_answered_doubles_nothing() -> None:
    """One call that gets lost among others says nothing of how long answers take."""
    patience = Patience(MOST_S)
    heard(patience, C, *[5] * 20, from_ms=1_000)
    patience.silent(1_050 * MS, 1_300 * MS)
    assert patience.of(C) == FLOOR_S


def test_any_answer_ends_the_silence() -> None:
    """However long it lasts, what is waited is what an attempt may take. Any answer ends it, also a late one, and one
    to another kind of call: whoever is heard is there."""
    patience = Patience(MOST_S)
    heard(patience, C, *[5] * 20)
    for sent_ms in range(1_000, 10_000_000, 5_000):
        patience.silent(sent_ms * MS, (sent_ms + 4_000) * MS)
    assert patience.of(C) == MOST_S
    heard(patience, Q, 5, from_ms=20_000_000)
    assert patience.of(C) == FLOOR_S
