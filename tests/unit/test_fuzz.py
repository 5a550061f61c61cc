"""Arbitrary bytes, and damaged everyday ones, against everything that reads what strangers wrote."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import RemoteDisconnected

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.message import (
    TASK,
    Attempt,
    Call,
    Outcome,
    OutcomeKind,
    decode_attempts,
    decode_call,
    decode_outcome,
    decode_request,
    encode_attempts,
    encode_call,
    encode_request,
)
from producer.untrusted import MessageError, clean_text
from tests.examples import examples
from worker.classify import OrderRef, Reply, classify
from worker.decide import Again, Case, Stop, as_known, bounded, first_step, next_number
from worker.http1 import FRAMING_LIMIT, MalformedResponse, ResponseReader

#: Longest text of an error: it goes into the record of a refused job and into a log line.
LONGEST_ERROR = 300
BODY_LIMIT = 512
ALGO_ID, CLIENT_ID = 2146760, "stop-1"
T0 = 1_763_807_442_123


# ---- decode ---------------------------------------------------------------------------------------------------------


def decode(data: bytes) -> None:
    """Every decoder gives a value that survives its own encoding, or one readable MessageError."""
    _call_or_error(data)
    _call_or_error(zlib.compress(data, 1))
    _call_or_error(b'["' + TASK.encode() + b'",null,[' + data + b"],{}]")
    _outcome_or_error(data)
    _attempts_or_error(data)


def _refused(error: MessageError) -> None:
    text = str(error)
    assert len(text) <= LONGEST_ERROR, len(text)
    assert clean_text(text, LONGEST_ERROR) == text.strip(), ascii(text)
    text.encode()


def _call_or_error(data: bytes) -> None:
    try:
        request = decode_call(data)
    except MessageError as error:
        _refused(error)
    else:
        assert decode_call(encode_call(request)) == request
        assert decode_request(encode_request(request)) == request
        request.order_key.encode()
        assert clean_text(request.describe()) == request.describe()


def _outcome_or_error(data: bytes) -> None:
    try:
        outcome = decode_outcome(data)
    except MessageError as error:
        _refused(error)
    else:
        again = decode_outcome(outcome.encode())
        assert again == outcome


def _attempts_or_error(data: bytes) -> None:
    try:
        attempts = decode_attempts(data)
    except MessageError as error:
        _refused(error)
        return
    again = encode_attempts(attempts)
    assert decode_attempts(again.encode()) == attempts
    # A worker decides by this history and records it: strategies must be able to read that record.
    record = Outcome("i", 1, OutcomeKind.GAVE_UP, attempts=attempts).encode()
    assert decode_outcome(record.encode()).attempts == attempts
    kept = bounded(as_known(attempts))
    assert bounded(as_known(decode_attempts(encode_attempts(kept)))) == kept
    assert next_number(kept) > max((attempt.n for attempt in kept), default=0)
    for by_client_id in (False, True):
        step = first_step(Case(by_client_id, T0, T0 + 60_000), kept, T0 + 10)
        assert isinstance(step, Stop | Again)


# ---- http -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a client makes of the bytes of a connection."""

    refused: bool
    status: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    whole: bool = False


def fed(pieces: Sequence[bytes]) -> Seen:
    """What is read from ``pieces`` and the end of the connection; it never holds more than its limits and a piece."""
    reader = ResponseReader(BODY_LIMIT)
    for piece in (*[piece for piece in pieces if piece], b""):
        try:
            reader.feed(piece)
        except (MalformedResponse, RemoteDisconnected):
            return Seen(True)
        held = len(reader._buffer) + len(reader.body)
        assert held <= 2 * BODY_LIMIT + FRAMING_LIMIT + 4 + len(piece), held
        assert len(reader.body) <= BODY_LIMIT
        assert not reader.reusable or (reader.whole and reader.ended)
        if reader.ended:
            return Seen(False, reader.status, tuple(reader.headers.items()), reader.body, reader.whole)
    raise AssertionError("the end of the connection did not end the answer")


def http(data: bytes) -> None:
    """The same answer or refusal comes of the same bytes however the network cuts them, within bounded memory.

    The first two bytes say how they are cut.
    """
    seed, stream = int.from_bytes(data[:2], "big"), data[2:]
    for answer in (stream, b"HTTP/1.1 200 OK\r\n" + stream):
        whole = fed([answer])
        assert fed(cut(answer, seed)) == whole
        if len(answer) <= 2048:
            assert fed([answer[at : at + 1] for at in range(len(answer))]) == whole
        if not whole.refused:
            _judge(whole)


def cut(data: bytes, seed: int) -> list[bytes]:
    """``data`` in pieces of 1 to 256 bytes, the same ones for the same seed."""
    pieces, at = [], 0
    while at < len(data):
        seed = (seed * 75 + 74) % 65_537
        size = 1 + seed % (256 if seed % 3 else 4)
        pieces.append(data[at : at + size])
        at += size
    return pieces


def _judge(seen: Seen) -> None:
    """From the wire to the verdict: only a whole answer that names our order can confirm a cancel or show a state."""
    for call in Call:
        verdict = classify(call, OrderRef(ALGO_ID), Reply(seen.status, seen.body, truncated=not seen.whole))
        if verdict.order is not None:
            assert seen.whole
            assert seen.status == 200
            assert isinstance(json.loads(seen.body), dict)


def seeds(name: str) -> list[bytes]:
    """Inputs from which a fuzzer finds its way: what the target reads in everyday work."""
    attempt = Attempt(1, T0, Call.CANCEL, 400, -2011, "Unknown order sent.", "no_such_order", 12)
    order = {"algoId": ALGO_ID, "clientAlgoId": CLIENT_ID, "algoStatus": "NEW", "code": "200", "createTime": T0}
    body = json.dumps(order).encode()
    request = {"v": 1, "account": "default", "algo_id": ALGO_ID, "deadline_s": 1.5, "symbol": "BTCUSDT", "tag": "é"}
    outcome = Outcome("i", 1, OutcomeKind.GAVE_UP, "default", ALGO_ID, attempts=(attempt,), error="none")
    head = b"\0\7Server: x\r\nContent-Type: application/json\r\n"
    return {
        "decode": [json.dumps(request).encode(), outcome.encode().encode(), encode_attempts([attempt] * 2).encode()],
        "http": [
            head + b"Content-Length: %d\r\n\r\n" % len(body) + body,
            head + b"Transfer-Encoding: chunked\r\n\r\n%x;a=b\r\n%s\r\n0\r\nX: y\r\n\r\n" % (len(body), body),
            head + b"Connection: close\r\n\r\n" + body,
            b"\1\2HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 503 Busy\r\nX: a\r\n b\r\nRetry-After: 3\r\n\r\n",
        ],
    }[name]


#: What has broken readers elsewhere.
_PIECES = (
    *(b"NaN", b"1e999", b"-1", b"null", b"true", b"[", b"]", b"{}", b'"', b"\\ud800", b"\\u0000", b"\xff", b",", b"\0"),
    *(
        b"\r\n",
        b"\r\n\r\n",
        b"0\r\n",
        b"\r\n ",
        b"chunked",
        b"Content-Length: 3\r\n",
        b"Transfer-Encoding: chunked\r\n",
    ),
    *(b"9223372036854775808", b"1e30", b"0.5", b'"7"', b"[" * 1000, b'{"a":' * 1000),
)


def damaged(name: str) -> st.SearchStrategy[bytes]:
    """Seeds with pieces put in, taken out and swapped, and bytes that are nobody's."""
    cuts = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 7), _piece()), max_size=6)
    return st.binary(max_size=200) | st.builds(_put, st.sampled_from(seeds(name)), cuts)


def _piece() -> st.SearchStrategy[bytes]:
    return st.binary(max_size=12) | st.sampled_from(_PIECES)


def _put(data: bytes, cuts: list[tuple[int, int, bytes]]) -> bytes:
    for place, length, instead in cuts:
        at = place % (len(data) + 1)
        data = data[:at] + instead + data[at + length :]
    return data


PROFILE = examples(300)


@PROFILE
@given(damaged("decode"))
def test_what_is_decoded_can_be_encoded(data: bytes) -> None:
    """Whatever a decoder accepts of strangers' bytes comes back unchanged from its record; all else is refused."""
    decode(data)


@PROFILE
@given(damaged("http"))
def test_no_cut_of_the_bytes_changes_an_answer(data: bytes) -> None:
    """From the wire to the verdict the same comes of the same bytes, in bounded memory, however they arrive."""
    http(data)


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
    decode((ATTEMPT % tuple(values)).encode())
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
