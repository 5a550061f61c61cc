"""A stranger's bytes where a message should be: read, or refused by one error; and what a stranger's words become."""

from __future__ import annotations

import bisect
import json
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.message import MAX_ATTEMPT_N, CancelRequest, decode_attempts, decode_call, decode_outcome
from producer.untrusted import (
    MAX_DEPTH,
    MAX_MSG_CHARS,
    MAX_PAYLOAD_BYTES,
    MalformedMessage,
    MessageError,
    clean_text,
    loads,
)
from tests.messages import (
    ATTEMPT,
    NASTY_JOBS,
    OUTCOME,
    PRINTABLE,
    PROFILE,
    UNPRINTABLE,
    assert_fit_for_a_log,
    call_of,
    texts,
)

# ---- decoding a stranger's bytes ------------------------------------------------------------------------------------


def _message_or_error(decode: Callable[[Any], object], data: Any) -> object:
    """The decoded message, or the one kind of exception that a decoder may raise."""
    try:
        return decode(data)
    except MessageError as error:
        assert_fit_for_a_log(str(error))
        return error


@pytest.mark.parametrize(("data", "words"), NASTY_JOBS.values(), ids=NASTY_JOBS.keys())
def test_a_nasty_job_is_refused_by_one_readable_error(data: bytes, words: str) -> None:
    """Nothing but the contract's own call is accepted; the refusal fits into one log line, and tells a foreign job from
    a damaged one."""
    with pytest.raises(MessageError) as caught:
        decode_call(data)
    assert_fit_for_a_log(str(caught.value))
    assert words in str(caught.value)


def test_a_payload_of_the_largest_size_is_read() -> None:
    """64 KiB are allowed, compressed or not; the next byte is not."""
    largest = call_of('{"v":1,"algo_id":1}').ljust(MAX_PAYLOAD_BYTES)
    assert MAX_PAYLOAD_BYTES == 65_536
    for data in (largest, zlib.compress(largest)):
        assert decode_call(data) == CancelRequest(algo_id=1)
    for data in (largest + b" ", zlib.compress(largest + b" ")):
        with pytest.raises(MalformedMessage):
            decode_call(data)


def test_a_zip_bomb_is_never_inflated() -> None:
    """Ten megabytes behind ten kilobytes cost no more memory than the largest payload allowed."""
    tracemalloc.start()
    try:
        with pytest.raises(MalformedMessage):
            decode_call(NASTY_JOBS["a zip bomb"][0])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * MAX_PAYLOAD_BYTES


DEEP: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "as tag": (decode_call, call_of('{"v":1,"algo_id":1,"tag":%s}')),
    "as algo id": (decode_call, call_of('{"v":1,"algo_id":%s}')),
    "as version": (decode_call, call_of('{"v":%s,"algo_id":1}')),
    "as request": (decode_call, call_of("%s")),
    "as function": (decode_call, b"[%s,null,[1],{}]"),
    "as a record's kind": (decode_outcome, json.dumps(OUTCOME.as_dict() | {"kind": "?"}).replace('"?"', "%s").encode()),
}


@pytest.mark.parametrize(("decode", "shape"), DEEP.values(), ids=DEEP.keys())
def test_no_depth_escapes_the_one_error(decode: Callable[[bytes], object], shape: bytes) -> None:
    """Nesting that the parser just survives must not break what reports it: any depth is a MessageError."""

    def decoded(depth: int) -> str:
        return str(_message_or_error(decode, shape % (b"[" * depth + b"]" * depth)))

    deepest = bisect.bisect_left(range(20_000), True, key=lambda depth: decoded(depth) == "nested too deeply")
    for depth in range(deepest - 20, deepest + 2):
        assert decoded(depth)


@pytest.mark.parametrize(("opened", "closed"), ["[]", ('{"a":', "}"), ('[1,{"a":"]","b":', "}]")], ids=str)
def test_nesting_is_bounded_before_it_is_parsed(opened: str, closed: str) -> None:
    """The same depth is the deepest on every Python, whatever it is made of."""
    each = opened.count("[") + opened.count("{")
    deepest = MAX_DEPTH // each
    assert loads(opened * deepest + "0" + closed * deepest)
    inner = opened * (deepest - 1) + "0" + closed * (deepest - 1)
    assert loads(f"[{inner},{inner}]") == [loads(inner)] * 2
    for depth in (deepest + 1, 1_000, 12_000 // each):
        with pytest.raises(MalformedMessage, match=r"^nested too deeply$"):
            loads(opened * depth + "0" + closed * depth, limit=1_000_000)


@pytest.mark.parametrize("decode", [decode_outcome, decode_attempts, loads], ids=lambda decode: decode.__name__)
@pytest.mark.parametrize("damage", ['"' + '\\"' * 500_000, '"\\' * 300_000, '"' * 900_001])
def test_a_text_without_an_end_is_gone_through_once(decode: Callable[[str], object], damage: str) -> None:
    """A megabyte of quotes behind many brackets is refused as quickly as it is read, and does not stop a worker."""
    with pytest.raises(MalformedMessage):
        decode("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "[[" + damage)


@pytest.mark.parametrize("inner", ["[" * 9_000 + "]" * 9_000, '{"a":' * 9_000 + "1" + "}" * 9_000])
def test_a_deep_field_of_the_future_is_malformed(inner: str) -> None:
    """A field that nobody here reads can break the reading of a record no more than one that is read."""
    attempt = json.dumps(ATTEMPT.as_dict() | {"x": "?"}).replace('"?"', inner)
    for decode, text in (
        (decode_outcome, _record(x="?").replace('"?"', inner)),
        (decode_outcome, _record(attempts=["?"]).replace('"?"', attempt)),
        (decode_attempts, attempt),
    ):
        with pytest.raises(MalformedMessage, match=r"^nested too deeply$"):
            decode(text)


def test_the_whole_64_bits_are_read_exactly() -> None:
    """An id is never rounded: the least and the greatest 64-bit number and 2**53+1 come back digit by digit."""
    for number in (2**53 + 1, 2**63 - 1, -(2**63), 0):
        assert loads(str(number)) == number


def _record(**changes: Any) -> str:
    return json.dumps(OUTCOME.as_dict() | changes)


BAD_RECORDS: dict[str, str | bytes] = {
    "not JSON": "cancelled",
    "a list": "[]",
    "version 2": _record(v=2),
    "true as version": _record(v=True),
    "no version": "{}",
    "nothing but the version": '{"v":1}',
    "a kind of the future": _record(kind="postponed"),
    "a list as kind": _record(kind=[]),
    "a run that is no number": _record(run="first"),
    "null as run": _record(run=None),
    "an infinite time": _record().replace("1750485502076", "1e999"),
    "attempts as an object": _record(attempts={}),
    "an attempt that is no object": _record(attempts=[1]),
    "an attempt without its call": _record(attempts=[{"n": 1, "at_ms": 1}]),
    "an attempt by no call": _record(attempts=[ATTEMPT.as_dict() | {"call": None}]),
    "an attempt by a list": _record(attempts=[ATTEMPT.as_dict() | {"call": ["cancel"]}]),
    "an attempt by an unprintable call": _record(attempts=[ATTEMPT.as_dict() | {"call": "\x1b[31m"}]),
    "an attempt after half a one": _record(attempts=[ATTEMPT.as_dict() | {"counted_before": 0.5}]),
    "an attempt at an infinite time": _record().replace("1750485492076", "1e999"),
    "an object as account": _record(account={"a": [1]}),
    "text as algo id": _record(algo_id="1"),
    "a number as flag": _record(may_be_live=1),
    "a number as tag": _record(tag=5),
    "a number as listing": _record(orders=7),
    "a listing of numbers": _record(orders=[7]),
    "a listing without its order": _record(orders=[{"id": "x"}]),
    "text among those left alone": _record(orders=[], left_alone=["x"]),
    "text as moment": _record(before_ms="1"),
    "two megabytes": _record(error="x" * 2_000_000),
    "not UTF-8": b'{"v":1,"id":"\xff"}',
}


@pytest.mark.parametrize("record", BAD_RECORDS.values(), ids=BAD_RECORDS.keys())
def test_what_is_no_record_is_malformed(record: str | bytes) -> None:
    """A foreign or damaged value under an outcome's key is told apart from an outcome."""
    with pytest.raises(MalformedMessage):
        decode_outcome(record)


BAD_HISTORIES: dict[str, str] = {
    "cut off": "{",
    "a number": "1",
    "an empty object": "{}",
    "a text": '"x"',
    "a list": "[]",
    "fields missing": '{"n":1}',
    "a number that is none": json.dumps(ATTEMPT.as_dict() | {"n": "one"}),
    "a number that none can follow": json.dumps(ATTEMPT.as_dict() | {"n": 2**63 - 1}),
    "a number below all": json.dumps(ATTEMPT.as_dict() | {"n": -1}),
    "a count beyond all": json.dumps(ATTEMPT.as_dict() | {"counted_before": 10**9 + 1}),
    "a count below all": json.dumps(ATTEMPT.as_dict() | {"counted_before": -(10**18)}),
    "an infinite duration": json.dumps(ATTEMPT.as_dict()).replace('"ms": 12', '"ms": 1e999'),
    "a list's end": "]",
    "two lists": "],[",
    "a megabyte and more": "x" * 1_100_000,
}


@pytest.mark.parametrize("text", BAD_HISTORIES.values(), ids=BAD_HISTORIES.keys())
def test_what_is_no_history_is_malformed(text: str) -> None:
    """A damaged history is reported, never read as a shorter one: attempts lost are doubts lost."""
    with pytest.raises(MalformedMessage):
        decode_attempts(text)


def test_what_follows_the_largest_number_of_a_history_fits_in_a_record() -> None:
    """Whoever goes on from any history that is read records what everybody can read."""
    last = decode_attempts(json.dumps(ATTEMPT.as_dict() | {"n": MAX_ATTEMPT_N, "counted_before": MAX_ATTEMPT_N}))[0]
    next_ones = tuple(replace(last, n=last.n + more, counted_before=MAX_ATTEMPT_N + more) for more in (1, 1000))
    record = replace(OUTCOME, attempts=(last, *next_ones))

    assert decode_outcome(record.encode()) == record


# ---- what a stranger's words become ---------------------------------------------------------------------------------


@PROFILE
@given(texts(80, 0, PRINTABLE + UNPRINTABLE), st.integers(1, 40))
def test_clean_text_is_short_printable_and_stable(text: str, limit: int) -> None:
    """Any words of the exchange can stand in a log line, and cleaning them twice changes nothing."""
    cleaned = clean_text(text, limit)
    assert len(cleaned) <= limit
    assert not set(cleaned) & set(UNPRINTABLE)
    assert clean_text(cleaned, limit) == cleaned


def test_text_that_is_cut_says_so() -> None:
    """A message that was shortened ends in an ellipsis and is exactly as long as allowed."""
    assert clean_text("x" * 500) == "x" * (MAX_MSG_CHARS - 1) + "…"
    assert clean_text("  a\tb\n") == "a b"
