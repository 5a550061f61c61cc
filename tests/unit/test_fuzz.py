"""The fuzz targets on damaged everyday inputs: what `python -m tests.fuzz` looks for at length, a little each time."""

from __future__ import annotations

import contextlib
import tracemalloc
from http.client import RemoteDisconnected

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.message import MessageError, decode_outcome
from tests.fuzz import targets
from tests.fuzz.mutations import damaged
from worker.http1 import FRAMING_LIMIT, MalformedResponse, ResponseReader

PROFILE = settings(max_examples=300, deadline=None, derandomize=True, database=None)


@PROFILE
@given(damaged("decode"))
def test_what_is_decoded_can_be_encoded(data: bytes) -> None:
    """Whatever a decoder accepts of strangers' bytes comes back unchanged from its record; all else is refused."""
    targets.decode(data)


@PROFILE
@given(damaged("http"))
def test_no_cut_of_the_bytes_changes_an_answer(data: bytes) -> None:
    """From the wire to the verdict the same comes of the same bytes, in bounded memory, however they arrive."""
    targets.http(data)


@PROFILE
@given(damaged("verdict"))
def test_any_answers_lead_to_a_decision_that_can_be_recorded(data: bytes) -> None:
    """Any answers in any order: one verdict each, a decision within the rules, and a record that can be read."""
    targets.verdict(data)


ATTEMPT = '{"n":%s,"at_ms":%s,"call":"cancel","http":%s,"code":%s,"msg":%s,"verdict":%s,"ms":%s}'
SOUND = ("1", "2", "503", "-1000", '"busy"', '"busy"', "3")
VALUES = (
    *("1e999", "-1e999", "1e300", "1.5", '"7"', f'"{"9" * 30}"', "true", "null", "[]", "{}", "[[1]]"),
    *('"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', "9223372036854775807", '""'),
)


@PROFILE
@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from(VALUES)), max_size=3))
def test_a_history_of_other_types_is_refused_or_recorded(changes: list[tuple[int, str]]) -> None:
    """A history that cannot stand in an outcome's record is refused when it is read, not when it is written."""
    values = list(SOUND)
    for at, value in changes:
        values[at] = value
    targets.decode((ATTEMPT % tuple(values)).encode())
    record = '{"v":1,"id":"i","run":%s,"kind":"refused","attempts":[%s],"finished_at_ms":%s,"account":%s,"algo_id":%s,'
    record += '"client_algo_id":null,"symbol":null,"tag":null,"may_be_live":null,"order_status":null,'
    record += '"actual_order_id":null,"enqueued_at_ms":null,"worker":"w","error":null}'
    with contextlib.suppress(MessageError):
        outcome = decode_outcome(record % (values[0], ATTEMPT % SOUND, values[1], values[4], values[2]))
        assert decode_outcome(outcome.encode()) == outcome


@pytest.mark.parametrize(
    "endless",
    [
        b"x",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"z" * 1000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"3\r\nabc\r\n" * 100,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 100_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"T: x\r\n" * 10_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;" + b"e" * 100_000,
    ],
)
def test_an_endless_answer_takes_little_memory(endless: bytes) -> None:
    """However much a server sends, reading it ends by itself, and keeps no more than its limits."""
    limit = 64 * 1024
    tracemalloc.start()
    try:
        reader = ResponseReader(limit)
        with contextlib.suppress(MalformedResponse, RemoteDisconnected):
            for _ in range(2_000):
                reader.feed(endless[:16_384] if not reader.status else endless[-16_384:])
                if reader.ended:
                    break
            else:
                assert endless.startswith(b"HTTP/1.1 100")  # each of them is passed over and forgotten
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 8 * (limit + FRAMING_LIMIT)
