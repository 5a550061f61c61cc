"""How the operators' page shows values: times, lengths of time, and what strangers wrote."""

from __future__ import annotations

import pytest
from markupsafe import Markup

from producer.message import OutcomeKind
from producer.web import formatting

AT_MS = 1_763_807_442_123  # 2025-11-22 10:30:42.123 UTC


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 ms"),
        (0.0154, "15 ms"),
        (0.9999, "1.0 s"),
        (2.04, "2.0 s"),
        (110, "110 s"),
        (180, "3.0 min"),
        (7200, "2.0 h"),
        (200_000, "2.3 days"),
        (None, "-"),
    ],
)
def test_a_length_of_time_has_the_unit_that_fits(seconds: float | None, shown: str) -> None:
    """Two digits that matter, in the unit in which a person would say it."""
    assert formatting.span(seconds) == shown


def test_what_cannot_be_sent_is_replaced_and_markup_is_left_alone() -> None:
    """Half a surrogate pair and control characters become a sign that something was there."""
    assert formatting.fit("a\ud800b\x1b[31m\x00") == "a�b�[31m�"
    assert formatting.fit(Markup("<b>")) == Markup("<b>")
    assert formatting.fit(7) == 7


def test_every_kind_says_what_it_means() -> None:
    """An operator reads on the page itself what a kind says of the order, and failed kinds are coloured as such."""
    for kind in OutcomeKind:
        assert formatting.meaning(kind).endswith(".")
        tone = "good" if kind.off_the_book else "bad" if kind.failed else "late"
        assert formatting.tone(kind.value) == ("plain" if kind is OutcomeKind.LISTED else tone)
    assert formatting.tone("unreadable") == "plain"
