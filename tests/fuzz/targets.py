"""What must hold for any bytes, as functions of them: no fuzzer here, so that each finding can be replayed alone."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from http.client import RemoteDisconnected

from producer.message import (
    MAX_MSG_CHARS,
    TASK,
    Attempt,
    Call,
    MessageError,
    Outcome,
    OutcomeKind,
    clean_text,
    decode_attempts,
    decode_call,
    decode_outcome,
    decode_request,
    encode_attempts,
    encode_call,
    encode_request,
)
from worker.classify import GATED, Failure, Means, OrderRef, Reply, Verdict, classify
from worker.decide import (
    LAST_TRY_MS,
    Again,
    Case,
    Policy,
    Span,
    Stop,
    first_step,
    in_doubt,
    next_number,
    next_step,
    pause_ms,
    read_history,
)
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
    kept, policy = read_history(data, T0), Policy()
    assert read_history(encode_attempts(kept), T0) == kept
    assert next_number(kept) > max((attempt.n for attempt in kept), default=0)
    for by_client_id in (False, True):
        step = first_step(Case(by_client_id, T0, T0 + 60_000), kept, policy, T0 + 10)
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


# ---- verdict --------------------------------------------------------------------------------------------------------

_REFUSALS: tuple[tuple[int, int, str], ...] = (
    (400, -2011, "Unknown order sent."),
    (400, -2013, "Order does not exist."),
    (400, -1021, "Timestamp for this request is outside of the recvWindow."),
    (429, -1003, "Too many requests."),
    (503, -1000, "Service Unavailable."),
    (400, -4117, "Order is in triggering."),
    (401, -2015, "Invalid API-key."),
)
_STATES = ("NEW", "CANCELED", "TRIGGERING", "TRIGGERED", "FINISHED", "EXPIRED", "REJECTED", "PENDING", "")


class _Source:
    """Choices read from bytes, and nothing but zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        piece = self._data[self._at : self._at + count]
        self._at += count
        return piece.ljust(count, b"\0")

    def number(self, bits: int = 8) -> int:
        return int.from_bytes(self.take(bits // 8), "big")

    def rest(self) -> bytes:
        return self._data[self._at :]


def verdict(data: bytes) -> None:
    """Any answer gets one verdict that fits into a record; any history of them one decision within the rules.

    The first bytes choose the request and the answers, what is left of them is the body of one answer.
    """
    source = _Source(data)
    policy = Policy(1 + source.number() % 30, 1 + source.number(16), 1 + source.number(16), source.number(16))
    deadline_ms = T0 + 1 + source.number(16) * 4
    chance = source.number()
    ahead = Span(-(chance >> 2), chance) if chance & 2 else None
    case = Case(bool(chance & 1), T0 - source.number(16), deadline_ms, ahead)
    history: list[Attempt] = []
    now_ms = T0
    for _ in range(1 + source.number() % 6):
        call = Call.QUERY if source.number() & 1 else Call.CANCEL
        told = _checked(call, case, _answer(source))
        took_ms, now_ms = source.number(16), now_ms + source.number(16)
        history.append(_as_recorded(len(history) + 1, now_ms, call, told, took_ms))
        now_ms += took_ms
        _decide(case, history, told, policy, now_ms, source.number())
    _checked(Call.CANCEL, case, Reply(200, source.rest()))
    _checked(Call.QUERY, case, Reply(200, source.rest()))


def _answer(source: _Source) -> Reply | Failure:
    kind, chance = source.number() % 5, source.number()
    if kind == 0:
        return Failure(bool(chance & 1), source.take(chance % 40).decode("latin-1"))
    retry_after_ms = source.number(24) if chance & 2 else None
    if kind == 1:
        http_status, code, msg = _REFUSALS[chance % len(_REFUSALS)]
        return Reply(http_status, json.dumps({"code": code, "msg": msg}).encode(), retry_after_ms)
    if kind == 2:
        body = {"algoId": ALGO_ID, "clientAlgoId": CLIENT_ID, "algoStatus": _STATES[chance % len(_STATES)]}
        return Reply(200, json.dumps({**body, "code": "200", "createTime": T0 - 5_000 + source.number(16)}).encode())
    http_status = 100 + source.number(16) % 900
    return Reply(http_status, source.take(chance), retry_after_ms, bool(chance & 4), bool(chance & 8))


def _checked(call: Call, case: Case, answer: Reply | Failure) -> Verdict:
    ref = OrderRef(None, CLIENT_ID) if case.by_client_id else OrderRef(ALGO_ID, CLIENT_ID)
    told = classify(call, ref, answer)
    assert told == classify(call, ref, answer)
    assert clean_text(told.msg) == told.msg
    assert len(told.msg) <= MAX_MSG_CHARS
    if isinstance(answer, Failure):
        assert told.means is (Means.UNCLEAR if answer.seen else Means.NOT_SENT)
    else:
        assert told.means is not Means.NOT_SENT
        cut_off = classify(call, ref, replace(answer, truncated=True))
        assert cut_off.order is None
        assert cut_off.means is not Means.CONFIRMED
    if told.order is not None:
        assert told.http == 200
        assert json.dumps([told.order.status, told.order.symbol, told.order.actual_order_id]).isprintable()
    return told


def _as_recorded(n: int, at_ms: int, call: Call, told: Verdict, took_ms: int) -> Attempt:
    """The attempt as it comes back out of Redis; nothing of it may be lost on the way."""
    attempt = Attempt(n, at_ms, call, told.http, told.code, told.msg, told.means.value, took_ms)
    (read,) = decode_attempts(encode_attempts([attempt]).encode())
    assert read == attempt
    return read


def _decide(case: Case, history: list[Attempt], told: Verdict, policy: Policy, now_ms: int, chance: int) -> None:
    roll = chance / 256
    step = next_step(case, history, told, policy, now_ms, roll)
    assert step == next_step(case, history, told, policy, now_ms, roll)
    if isinstance(step, Stop):
        _check_end(step, history, policy)
        return
    assert step.delay_ms >= 0
    assert now_ms + step.delay_ms < case.deadline_at_ms
    assert step.resync is (told.means is Means.CLOCK)
    assert told.means not in (Means.CONFIRMED, Means.DENIED, Means.KEY_REFUSED)
    if told.means in GATED:
        assert step.delay_ms >= min(
            pause_ms(told, policy, now_ms, case.ahead), case.deadline_at_ms - now_ms - LAST_TRY_MS
        )
    # Chance makes a wait longer or shorter, never another decision in the same moment.
    longest = next_step(case, history, told, policy, now_ms, 0.999)
    if isinstance(longest, Again):
        assert next_step(case, history, told, policy, now_ms, 0.0) != Stop(OutcomeKind.CANCELLED)
    if in_doubt(history, policy) and case.by_client_id and told.order is None:
        assert step.call is Call.QUERY


def _check_end(stop: Stop, history: list[Attempt], policy: Policy) -> None:
    """The end fits into a record, and a cancel that may have worked is never recorded as one that did not."""
    record = Outcome("i", 1, stop.kind, order_status=stop.order_status, actual_order_id=stop.actual_order_id)
    whole = replace(record, attempts=tuple(history), error=stop.error)
    assert decode_outcome(whole.encode().encode()) == whole
    if in_doubt(history, policy):
        assert stop.kind not in (OutcomeKind.REFUSED, OutcomeKind.GAVE_UP, OutcomeKind.NOT_FOUND, OutcomeKind.OVERDUE)
        assert stop.kind is not OutcomeKind.ALREADY_CANCELLED
    if stop.kind.failed:
        assert stop.error


TARGETS: dict[str, Callable[[bytes], None]] = {"decode": decode, "http": http, "verdict": verdict}


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
        "verdict": [bytes(range(60)) + body, b"\x09\0\x64\x3a\x98\x27\x10\xff\xff" + bytes(40) + body],
    }[name]
