"""The filters of the operators' page: what can be typed, and which requests are meant by it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.message import OutcomeKind
from producer.web.filters import wanted_of
from producer.web.seen import Seen

KINDS = tuple(kind.value for kind in OutcomeKind)
#: 2026-11-29 00:00 UTC, ms.
DAY_MS = 1_795_910_400_000


@pytest.mark.parametrize(
    ("typed", "first_ms", "last_ms"),
    [
        ("2026-11-29", 0, 86_400_000 - 1),
        ("2026-11-29Z", 0, 86_400_000 - 1),
        ("2026-11-29 09:30", 34_200_000, 34_260_000 - 1),
        ("2026-11-29T09:30Z", 34_200_000, 34_260_000 - 1),
        (" 2026-11-29 09:30:15 ", 34_215_000, 34_216_000 - 1),
    ],
)
def test_a_time_means_the_whole_day_minute_or_second(typed: str, first_ms: int, last_ms: int) -> None:
    """From its first millisecond until its last one, so that one day typed twice is that day."""
    wanted = wanted_of({"from": typed, "until": typed}, KINDS)

    assert (wanted.fault, wanted.since_ms, wanted.until_ms) == (None, DAY_MS + first_ms, DAY_MS + last_ms)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"from": "yesterday"}, "from='yesterday': must be a time in UTC, as 2026-11-29 or 2026-11-29 09:30."),
        ({"until": "2026-13-01"}, "until='2026-13-01': must be a time in UTC"),
        ({"until": "2026-11-29 24:00"}, "until='2026-11-29 24:00': must be a time in UTC"),
        ({"from": "٢٠٢٦-11-29"}, "must be a time in UTC"),
        ({"from": "0000-01-01"}, "must be a time in UTC"),
        ({"from": "2026-11-30", "until": "2026-11-29"}, "until='2026-11-29': is before from='2026-11-30'"),
        ({"kind": "gone"}, "kind='gone': must be one of cancelled, "),
        ({"tag": "t" * 65}, "give at most 64 characters, or leave it empty."),
        ({"account": "a\x1b[31m" * 10}, "give at most 32 characters"),
    ],
)
def test_wrong_input_is_named_with_its_value_and_the_way_out(given: dict[str, str], fault: str) -> None:
    """And what was typed is kept, so that it can be mended."""
    wanted = wanted_of(given, KINDS)

    assert fault in (wanted.fault or "")
    assert wanted.typed == given


@given(
    st.dictionaries(st.sampled_from(["kind", "account", "symbol", "tag", "from", "until", "x"]), st.text(max_size=70))
)
def test_no_input_breaks_a_filter(given: dict[str, str]) -> None:
    """Whatever is typed is a filter or a fault."""
    assert wanted_of(given, KINDS).meets(Seen("x")) in (True, False)
