"""Requests, attempts and outcomes for tests of the contract: one of each, and any."""

from __future__ import annotations

import pickle
import zlib

from hypothesis import strategies as st

from producer.message import (
    DEFAULT_ACCOUNT,
    MAX_ALGO_ID,
    MAX_ATTEMPT_N,
    MAX_DEADLINE_S,
    TASK,
    Attempt,
    Call,
    CancelRequest,
    Outcome,
    OutcomeKind,
)
from producer.untrusted import MAX_MSG_CHARS, MAX_PAYLOAD_BYTES, clean_text
from tests.examples import examples

PROFILE = examples(25)

#: One of each kind that JSON, UTF-8 or a log could stumble over; drawing from all of Unicode costs seconds at first.
PRINTABLE = "aZ09 _-.:/,'\"\\{}[]%\u00a0é币\u202e\ufeff\ufffd🙂\U0010ffff"
UNPRINTABLE = "\x00\t\n\r\x1b\x7f\x85\x9f\u2028\u2029\ud800\udfff"
ALGO_IDS = st.integers(1, MAX_ALGO_ID)
INT64 = st.integers(-(2**63), 2**63 - 1)


def texts(most: int = 8, least: int = 1, chars: str = PRINTABLE) -> st.SearchStrategy[str]:
    """Texts of these letters, so many at the least and the most."""
    return st.lists(st.sampled_from(chars), min_size=least, max_size=most).map("".join)


CLIENT_IDS = texts(chars=".:/_-ABCXYZabcxyz0189")

REQUESTS = st.builds(
    lambda ids, **rest: CancelRequest(algo_id=ids[0], client_algo_id=ids[1], **rest),
    ids=st.one_of(st.tuples(ALGO_IDS, st.none()), st.tuples(st.none(), CLIENT_IDS), st.tuples(ALGO_IDS, CLIENT_IDS)),
    account=st.sampled_from((DEFAULT_ACCOUNT, "0", "a" * 32, "hedge-2_b")),
    deadline_s=st.none()
    | st.integers(1, MAX_DEADLINE_S)
    | st.floats(0, MAX_DEADLINE_S, exclude_min=True, allow_subnormal=False),
    urgent=st.booleans(),
    symbol=st.none() | texts(),
    tag=st.none() | texts(),
)
ATTEMPTS = st.builds(
    Attempt,
    n=st.integers(0, MAX_ATTEMPT_N),
    at_ms=INT64,
    call=st.sampled_from((*Call, "cancel_all", "")),
    http=st.none() | st.integers(100, 599),
    code=st.none() | INT64,
    msg=texts(least=0),
    verdict=texts(least=0),
    ms=INT64,
    counted_before=st.none() | st.integers(0, MAX_ATTEMPT_N),
)
OUTCOMES = st.builds(
    Outcome,
    id=texts(),
    run=INT64,
    kind=st.sampled_from(OutcomeKind),
    account=st.none() | texts(),
    algo_id=st.none() | ALGO_IDS,
    client_algo_id=st.none() | CLIENT_IDS,
    symbol=st.none() | texts(),
    tag=st.none() | texts(),
    may_be_live=st.none() | st.booleans(),
    order_status=st.none() | texts(),
    actual_order_id=st.none() | texts(),
    attempts=st.lists(ATTEMPTS, max_size=3).map(tuple),
    enqueued_at_ms=st.none() | INT64,
    finished_at_ms=INT64,
    worker=texts(least=0),
    error=st.none() | texts(least=0),
    child_status=st.none() | texts(),
    child_executed_qty=st.none() | texts(),
    child_avg_price=st.none() | texts(),
    child_cancelled=st.none() | st.booleans(),
    child_attempts=st.lists(ATTEMPTS, max_size=2).map(tuple),
)

REQUEST = CancelRequest(
    algo_id=2146760,
    client_algo_id="6B2I9XVcJpCjqPAJ4YoFX7",
    account="hedge-2",
    deadline_s=2.5,
    urgent=True,
    symbol="币安USDT",
    tag="grid 7",
)
ATTEMPT = Attempt(
    n=1, at_ms=1750485492076, call=Call.CANCEL, http=400, code=-2011, msg="Unknown", verdict="no_such_order", ms=12
)
OUTCOME = Outcome(id="j1", run=1, kind=OutcomeKind.NOT_FOUND, attempts=(ATTEMPT,), finished_at_ms=1750485502076)


def assert_fit_for_a_log(text: str) -> None:
    """One line that any log can hold."""
    assert len(text) <= 2 * MAX_MSG_CHARS
    assert clean_text(text, len(text)) == text
    text.encode()  # no lone surrogate


def call_of(request_json: str, *, function: str = TASK, kwargs: str = "{}") -> bytes:
    """A job's payload."""
    return f'["{function}",null,[{request_json}],{kwargs}]'.encode()


def _foreign() -> None:
    """What a strategy's own job would name."""


_BOMB = zlib.compress(b"[" * 10_000_000, 1)
#: Payloads that are no request of ours, by what is wrong with them, and words of the refusal.
NASTY_JOBS: dict[str, tuple[bytes, str]] = {
    "a pickled job": (pickle.dumps((_foreign, None, (1,), {})), "not JSON"),
    "a pickled job, compressed": (zlib.compress(pickle.dumps(("os.system", None, ("true",), {}))), ""),
    "another function": (call_of('{"v":1,"algo_id":1}', function="os.system"), "'os.system' is not allowed here"),
    "a function that is no text": (b'[7,null,[{"v":1,"algo_id":1}],{}]', ""),
    "an instance": (f'["{TASK}",{{}},[{{"v":1,"algo_id":1}}],{{}}]'.encode(), ""),
    "args by name": (
        f'["{TASK}",null,[],{{"request":{{"v":1,"algo_id":1}}}}]'.encode(),
        "not 0 arguments and 1 by name",
    ),
    "an argument by name too": (call_of('{"v":1,"algo_id":1}', kwargs='{"x":1}'), ""),
    "two arguments": (call_of('{"v":1,"algo_id":1},{"v":1,"algo_id":2}'), ""),
    "args as an object": (f'["{TASK}",null,{{"0":{{"v":1,"algo_id":1}}}},{{}}]'.encode(), ""),
    "kwargs as a list": (call_of('{"v":1,"algo_id":1}', kwargs="[]"), ""),
    "three parts": (f'["{TASK}",null,[]]'.encode(), ""),
    "an object instead of a call": (b'{"v":1,"algo_id":1}', ""),
    "ten megabytes": (b"x" * 10_000_000, "10000000 bytes are too many; 65536 is the most"),
    "ten megabytes of JSON": (call_of('{"v":1,"algo_id":1,"tag":"' + "t" * 10_000_000 + '"}'), ""),
    "one byte too many": (b" " * (MAX_PAYLOAD_BYTES + 1), ""),
    "a zip bomb": (_BOMB, "inflates beyond 65536 bytes"),
    "a bomb in a bomb": (zlib.compress(_BOMB), ""),
    "compressed twice": (zlib.compress(zlib.compress(call_of('{"v":1,"algo_id":1}'))), ""),
    "cut off while compressed": (zlib.compress(call_of('{"v":1,"algo_id":1}'))[:-2], ""),
    "depth 10,000": (b"[" * 10_000 + b"]" * 10_000, "nested too deeply"),
    "depth 10,000 of objects": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, ""),
    "NaN": (call_of('{"v":1,"algo_id":1,"deadline_s":NaN}'), "NaN is not a number of JSON"),
    "Infinity": (call_of('{"v":1,"algo_id":1,"deadline_s":Infinity}'), ""),
    "-Infinity": (call_of('{"v":1,"algo_id":1,"deadline_s":-Infinity}'), ""),
    "a float beyond floats": (call_of('{"v":1,"algo_id":1,"deadline_s":1e999}'), ""),
    "2**63": (call_of('{"v":1,"algo_id":9223372036854775808}'), "'9223372036854775808' does not fit in 64 bits"),
    "-2**63-1": (call_of('{"v":1,"algo_id":-9223372036854775809}'), "'-9223372036854775809' does not fit in 64 bits"),
    "a number of 5,000 digits": (call_of('{"v":1,"algo_id":' + "9" * 5000 + "}"), "does not fit in 64 bits"),
    "control characters": (call_of('{"v":1,"algo_id":1,"tag":"\\u0000\\u001b"}'), "tag="),
    "raw control characters": (call_of('{"v":1,"algo_id":1,"tag":"\x00"}'), ""),
    "a lone surrogate": (call_of('{"v":1,"algo_id":1,"symbol":"\\ud800"}'), ""),
    "a lone surrogate as a field": (call_of('{"v":1,"algo_id":1,"\\udfff":1}'), ""),
    "version 2": (call_of('{"v":2,"algo_id":1}'), "v=2: this side speaks version 1"),
    "version as text": (call_of('{"v":"1","algo_id":1}'), ""),
    "true as version": (call_of('{"v":true,"algo_id":1}'), "v=True: this side speaks version 1"),
    "no version": (call_of('{"algo_id":1}'), ""),
    "an unknown field": (call_of('{"v":1,"algo_id":1,"symbols":[]}'), "unknown field 'symbols'"),
    "no id": (call_of('{"v":1}'), ""),
    "null as account": (call_of('{"v":1,"algo_id":1,"account":null}'), ""),
    "a list as request": (call_of("[1]"), "a cancel request is a JSON object, not [1]"),
    "null as request": (call_of("null"), ""),
    "empty": (b"", "not JSON"),
    "empty, compressed": (zlib.compress(b""), ""),
    "not UTF-8": (b'["\xff\xfe"]', "not JSON"),
    "a byte order mark": (b"\xef\xbb\xbf" + call_of('{"v":1,"algo_id":1}'), ""),
    "two values": (call_of('{"v":1,"algo_id":1}') * 2, ""),
}
