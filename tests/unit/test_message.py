"""The contract: what survives the wire, what is refused and how, and which Redis keys are RQ's."""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
import pickle
import re
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import rq.registry
from hypothesis import given, settings
from hypothesis import strategies as st
from rq.defaults import RQ_KEY_PREFIX
from rq.exceptions import DeserializationError
from rq.executions import Execution, ExecutionRegistry
from rq.job import Job
from rq.queue import Queue
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.suspension import WORKERS_SUSPENDED
from rq.worker import BaseWorker

from producer.keys import JobField, Keys
from producer.message import (
    DEFAULT_ACCOUNT,
    MAX_ALGO_ID,
    MAX_DEADLINE_S,
    MAX_DEPTH,
    MAX_MSG_CHARS,
    MAX_PAYLOAD_BYTES,
    TASK,
    VERSION,
    Attempt,
    Call,
    CancelRequest,
    InvalidRequest,
    MalformedMessage,
    MessageError,
    Outcome,
    OutcomeKind,
    Pin,
    check_queue_name,
    clean_text,
    decode_attempts,
    decode_call,
    decode_outcome,
    decode_pin,
    decode_request,
    encode_attempts,
    encode_call,
    encode_request,
    loads,
    may_be_live,
)

PROFILE = settings(derandomize=True, deadline=None, max_examples=25)

# ---- any valid value ------------------------------------------------------------------------------------------------

#: One of each kind that JSON, UTF-8 or a log could stumble over; drawing from all of Unicode costs seconds at first.
_PRINTABLE = "aZ09 _-.:/,'\"\\{}[]%\u00a0é币\u202e\ufeff\ufffd🙂\U0010ffff"
_UNPRINTABLE = "\x00\t\n\r\x1b\x7f\x85\x9f\u2028\u2029\ud800\udfff"
_ALGO_IDS = st.integers(1, MAX_ALGO_ID)
_INT64 = st.integers(-(2**63), 2**63 - 1)


def _texts(most: int = 8, least: int = 1, chars: str = _PRINTABLE) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(chars), min_size=least, max_size=most).map("".join)


_CLIENT_IDS = _texts(chars=".:/_-ABCXYZabcxyz0189")

REQUESTS = st.builds(
    lambda ids, **rest: CancelRequest(algo_id=ids[0], client_algo_id=ids[1], **rest),
    ids=st.one_of(
        st.tuples(_ALGO_IDS, st.none()),
        st.tuples(st.none(), _CLIENT_IDS),
        st.tuples(_ALGO_IDS, _CLIENT_IDS),
    ),
    account=st.sampled_from((DEFAULT_ACCOUNT, "0", "a" * 32, "hedge-2_b")),
    deadline_s=st.none()
    | st.integers(1, MAX_DEADLINE_S)
    | st.floats(0, MAX_DEADLINE_S, exclude_min=True, allow_subnormal=False),
    urgent=st.booleans(),
    symbol=st.none() | _texts(),
    tag=st.none() | _texts(),
)
ATTEMPTS = st.builds(
    Attempt,
    n=_INT64,
    at_ms=_INT64,
    call=st.sampled_from((*Call, "cancel_all", "")),
    http=st.none() | st.integers(100, 599),
    code=st.none() | _INT64,
    msg=_texts(least=0),
    verdict=_texts(least=0),
    ms=_INT64,
    counted_before=st.none() | _INT64,
)
OUTCOMES = st.builds(
    Outcome,
    id=_texts(),
    run=_INT64,
    kind=st.sampled_from(OutcomeKind),
    account=st.none() | _texts(),
    algo_id=st.none() | _ALGO_IDS,
    client_algo_id=st.none() | _CLIENT_IDS,
    symbol=st.none() | _texts(),
    tag=st.none() | _texts(),
    may_be_live=st.none() | st.booleans(),
    order_status=st.none() | _texts(),
    actual_order_id=st.none() | _texts(),
    attempts=st.lists(ATTEMPTS, max_size=3).map(tuple),
    enqueued_at_ms=st.none() | _INT64,
    finished_at_ms=_INT64,
    worker=_texts(least=0),
    error=st.none() | _texts(least=0),
)
#: Any JSON, a little of the contract mixed in so that the search gets past the first checks.
_NAMES = st.sampled_from(
    (
        "v",
        "algo_id",
        "client_algo_id",
        "account",
        "deadline_s",
        "tag",
        "id",
        "run",
        "kind",
        "attempts",
        "finished_at_ms",
    )
)
_LEAVES = st.none() | st.booleans() | _INT64 | st.floats() | st.sampled_from((TASK, VERSION, 10**30, "", "cancelled"))
ANY_JSON = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_NAMES, inner, max_size=4), max_leaves=8
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


@PROFILE
@given(REQUESTS)
def test_any_valid_request_survives_the_job(request_: CancelRequest) -> None:
    """What a strategy asks is what a worker reads, compressed as RQ stores it or not."""
    data = encode_call(request_)
    assert decode_call(data) == request_
    assert decode_call(zlib.compress(data)) == request_
    assert decode_request(encode_request(request_)) == request_


@PROFILE
@given(st.lists(ATTEMPTS, max_size=4))
def test_any_attempts_survive_the_job_hash(attempts: list[Attempt]) -> None:
    """The history that a crash leaves behind is read back whole, as text and as bytes."""
    text = encode_attempts(attempts)
    assert decode_attempts(text) == tuple(attempts)
    assert decode_attempts(text.encode()) == tuple(attempts)


def test_one_attempt_can_be_appended_with_a_comma() -> None:
    """A script adds an attempt to those recorded by joining texts, without parsing them."""
    second = dataclasses.replace(ATTEMPT, n=2, call=Call.QUERY)
    appended = encode_attempts([ATTEMPT]) + "," + encode_attempts([second])
    assert decode_attempts(appended) == (ATTEMPT, second)


@pytest.mark.parametrize("nothing", [None, "", b""])
def test_no_attempts_are_an_empty_history(nothing: str | bytes | None) -> None:
    """A job whose hash holds no attempts yet has an empty history, not a broken one."""
    assert decode_attempts(nothing) == ()


@PROFILE
@given(OUTCOMES)
def test_any_outcome_survives_its_record(outcome: Outcome) -> None:
    """A waiter reads the outcome that the worker recorded, field by field."""
    record = outcome.encode()
    assert decode_outcome(record) == outcome
    assert decode_outcome(record.encode()) == outcome


def test_the_record_has_exactly_the_documented_fields() -> None:
    """People and scripts parse the record: its names and their order are part of the contract."""
    assert OUTCOME.encode() == (
        '{"v":1,"id":"j1","run":1,"account":null,"algo_id":null,"client_algo_id":null,"symbol":null,"tag":null,'
        '"kind":"not_found","may_be_live":null,"order_status":null,"actual_order_id":null,"attempts":['
        '{"n":1,"at_ms":1750485492076,"call":"cancel","http":400,"code":-2011,"msg":"Unknown","verdict":"no_such_order",'
        '"ms":12}],"enqueued_at_ms":null,"finished_at_ms":1750485502076,"worker":"","error":null}'
    )


def test_a_record_of_another_version_is_read() -> None:
    """Fields that came later are passed over, a call that did is kept as text, and fields not there yet are unset."""
    later = OUTCOME.as_dict() | {"child": {"status": "NEW"}}
    later["attempts"] = [ATTEMPT.as_dict() | {"call": "cancel_child", "verdict": "new_word", "weight": 1}]
    earlier = {"v": 1, "id": "j1", "run": 1, "kind": "not_found", "attempts": [ATTEMPT.as_dict()]}

    (attempt,) = decode_outcome(json.dumps(later)).attempts
    read = decode_outcome(json.dumps(earlier))

    assert attempt == dataclasses.replace(ATTEMPT, call="cancel_child", verdict="new_word")
    assert decode_attempts(encode_attempts([attempt])) == (attempt,)
    assert read == dataclasses.replace(OUTCOME, finished_at_ms=0)
    assert decode_outcome(json.dumps({name: earlier[name] for name in ("v", "id", "run", "kind")})).attempts == ()


def test_a_known_call_is_read_as_such() -> None:
    """A call that this version makes is its own value again after the wire, not merely an equal text."""
    for call in Call:
        (attempt,) = decode_attempts(encode_attempts([dataclasses.replace(ATTEMPT, call=call)]))
        assert attempt.call is call


def test_what_came_later_is_not_written_while_it_says_nothing() -> None:
    """A record without left-out attempts is, byte for byte, what every version has written."""
    assert "counted_before" not in ATTEMPT.as_dict()
    assert dataclasses.replace(ATTEMPT, counted_before=0).as_dict() == ATTEMPT.as_dict() | {"counted_before": 0}


def test_a_job_holds_only_what_was_set() -> None:
    """A plain request costs a few bytes: unset fields and defaults stay out of Redis."""
    assert encode_request(CancelRequest(algo_id=7)) == {"v": 1, "account": DEFAULT_ACCOUNT, "algo_id": 7}
    assert encode_request(REQUEST)["urgent"] is True


@pytest.mark.parametrize("value", [REQUEST, ATTEMPT, OUTCOME, Keys()], ids=lambda value: type(value).__name__)
def test_messages_are_frozen(value: Any) -> None:
    """What was checked or recorded cannot be changed afterwards."""
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, 5)


def test_a_long_history_survives() -> None:
    """A request with a thousand attempts behind it, far more than a request's own size, is still read."""
    attempts = (ATTEMPT,) * 1_000
    assert decode_attempts(encode_attempts(attempts)) == attempts
    assert decode_outcome(dataclasses.replace(OUTCOME, attempts=attempts).encode()).attempts == attempts


def test_words_beyond_ascii_stay_readable_in_redis() -> None:
    """A record holds text as text: who reads Redis by hand sees the symbol, not its escapes."""
    assert '"symbol":"币安USDT"' in encode_call(REQUEST).decode()


def test_the_order_key_is_the_id_that_the_exchange_is_asked_by() -> None:
    """Two requests are the same order by account and algo id, else by account and client id."""
    assert CancelRequest(algo_id=5, client_algo_id="x").order_key == "default:a:5"
    assert CancelRequest(client_algo_id="a:5", account="b").order_key == "b:c:a:5"


def test_the_description_names_the_order() -> None:
    """RQ's views show which order a job is about."""
    assert CancelRequest(algo_id=5, client_algo_id="x").describe() == "cancel algo_id=5 account=default"
    assert CancelRequest(client_algo_id="x").describe() == "cancel client_algo_id=x account=default"


# ---- refused before Redis, by one exception that names the field, the value and the rule ----------------------------

BAD_REQUESTS: list[tuple[str, str, dict[str, Any], str]] = [
    ("no id at all", "algo_id", {}, "give algo_id or client_algo_id"),
    ("algo id zero", "algo_id", {"algo_id": 0}, "from 1 to 9223372036854775807"),
    ("algo id negative", "algo_id", {"algo_id": -5}, "from 1 to 9223372036854775807"),
    ("algo id beyond a LONG", "algo_id", {"algo_id": 2**63}, "from 1 to 9223372036854775807"),
    ("algo id of 5,000 digits", "algo_id", {"algo_id": 10**5000}, "from 1 to 9223372036854775807"),
    ("algo id true", "algo_id", {"algo_id": True}, "whole number"),
    ("algo id as text", "algo_id", {"algo_id": "2146760"}, "whole number"),
    ("algo id with a fraction", "algo_id", {"algo_id": 1.0}, "whole number"),
    ("client id empty", "client_algo_id", {"client_algo_id": ""}, "{1,36}"),
    ("client id of 37", "client_algo_id", {"client_algo_id": "x" * 37}, "{1,36}"),
    ("client id with a space", "client_algo_id", {"client_algo_id": "a b"}, "^[.A-Z:/a-z0-9_-]"),
    ("client id with a line end", "client_algo_id", {"client_algo_id": "abc\n"}, "^[.A-Z:/a-z0-9_-]"),
    ("client id beyond ASCII", "client_algo_id", {"client_algo_id": "é"}, "^[.A-Z:/a-z0-9_-]"),
    ("client id as a number", "client_algo_id", {"client_algo_id": 5}, "^[.A-Z:/a-z0-9_-]"),
    ("bad client id beside a good algo id", "client_algo_id", {"algo_id": 1, "client_algo_id": "?"}, "must match"),
    ("account empty", "account", {"algo_id": 1, "account": ""}, "^[a-z0-9]"),
    ("account upper case", "account", {"algo_id": 1, "account": "Main"}, "^[a-z0-9]"),
    ("account of 33", "account", {"algo_id": 1, "account": "a" * 33}, "{0,31}"),
    ("account none", "account", {"algo_id": 1, "account": None}, "^[a-z0-9]"),
    ("deadline zero", "deadline_s", {"algo_id": 1, "deadline_s": 0}, "more than 0"),
    ("deadline negative", "deadline_s", {"algo_id": 1, "deadline_s": -1.5}, "more than 0"),
    ("deadline beyond a week", "deadline_s", {"algo_id": 1, "deadline_s": 604801}, "at most 604800 seconds"),
    ("deadline infinite", "deadline_s", {"algo_id": 1, "deadline_s": math.inf}, "at most 604800 seconds"),
    ("deadline not a number", "deadline_s", {"algo_id": 1, "deadline_s": math.nan}, "at most 604800 seconds"),
    ("deadline beyond any float", "deadline_s", {"algo_id": 1, "deadline_s": 10**400}, "at most 604800 seconds"),
    ("deadline true", "deadline_s", {"algo_id": 1, "deadline_s": True}, "more than 0"),
    ("deadline as text", "deadline_s", {"algo_id": 1, "deadline_s": "5"}, "more than 0"),
    ("urgent as a number", "urgent", {"algo_id": 1, "urgent": 1}, "true or false"),
    ("symbol empty", "symbol", {"algo_id": 1, "symbol": ""}, "1 to 32 characters"),
    ("symbol of 33", "symbol", {"algo_id": 1, "symbol": "S" * 33}, "1 to 32 characters"),
    ("symbol as a number", "symbol", {"algo_id": 1, "symbol": 5}, "must be text"),
    ("tag of 65", "tag", {"algo_id": 1, "tag": "t" * 65}, "1 to 64 characters"),
    ("tag with NUL", "tag", {"algo_id": 1, "tag": "a\x00b"}, "without control characters"),
    ("tag with a line end", "tag", {"algo_id": 1, "tag": "a\nb"}, "without control characters"),
    ("tag with an escape", "tag", {"algo_id": 1, "tag": "\x1b[31m"}, "without control characters"),
    ("tag with U+2028", "tag", {"algo_id": 1, "tag": "\u2028"}, "without control characters"),
    ("tag with a lone surrogate", "tag", {"algo_id": 1, "tag": "\ud800"}, "without control characters"),
]


@pytest.mark.parametrize(
    ("field", "given_", "rule"), [row[1:] for row in BAD_REQUESTS], ids=[r[0] for r in BAD_REQUESTS]
)
def test_a_bad_request_is_refused_by_field_value_and_rule(field: str, given_: dict[str, Any], rule: str) -> None:
    """The caller learns which field was wrong, what stood there, and what it must be."""
    with pytest.raises(InvalidRequest) as caught:
        CancelRequest(**given_)
    error = caught.value
    assert error.field == field
    assert error.value is given_.get(field)
    assert rule in error.rule
    assert str(error).startswith(f"{field}=")
    assert str(error).endswith(error.rule)
    _assert_fit_for_a_log(str(error))


def test_the_extremes_are_accepted() -> None:
    """Each limit is itself allowed."""
    greatest = CancelRequest(MAX_ALGO_ID, "z" * 36, "a" * 32, MAX_DEADLINE_S, symbol="S" * 32, tag="t" * 64)
    assert decode_call(encode_call(greatest)) == greatest
    assert (MAX_ALGO_ID, MAX_DEADLINE_S) == (9223372036854775807, 604_800)
    assert CancelRequest(algo_id=1, deadline_s=0.001, symbol="S", tag="t").algo_id == 1


def test_the_refused_value_is_shown() -> None:
    """The text of the refusal quotes the value, so that a log line alone is enough."""
    with pytest.raises(InvalidRequest, match=r"^account='Main': must match"):
        CancelRequest(algo_id=1, account="Main")


@PROFILE
@given(_texts(80, 0, _PRINTABLE + _UNPRINTABLE) | st.integers() | st.lists(_texts(3)))
def test_any_tag_is_accepted_or_refused_readably(tag: Any) -> None:
    """Whatever a caller passes, he gets a request or one short line of printable text."""
    try:
        CancelRequest(algo_id=1, tag=tag)
    except InvalidRequest as error:
        _assert_fit_for_a_log(str(error))


@pytest.mark.parametrize("name", ["cancels", "a", "A.b_c-9", "q" * 64])
def test_a_queue_name_is_accepted(name: str) -> None:
    """A name of plain characters is returned as it is."""
    assert check_queue_name(name) == name


@pytest.mark.parametrize("name", ["", "a:b", "a b", "q\n", "é", "q" * 65, None, 5])
def test_a_queue_name_that_could_collide_is_refused(name: Any) -> None:
    """A colon or a space in a queue's name could make one queue's keys look like another's."""
    with pytest.raises(InvalidRequest, match=r"^queue="):
        check_queue_name(name)


# ---- decoding a stranger's bytes ------------------------------------------------------------------------------------


def _assert_fit_for_a_log(text: str) -> None:
    assert len(text) <= 2 * MAX_MSG_CHARS
    assert clean_text(text, len(text)) == text
    text.encode()  # no lone surrogate


def _message_or_error(decode: Callable[[Any], object], data: Any) -> object:
    """The decoded message, or the one kind of exception that a decoder may raise."""
    try:
        return decode(data)
    except MessageError as error:
        _assert_fit_for_a_log(str(error))
        return error


def _damage(data: bytes, at: int, instead: bytes) -> bytes:
    at %= len(data)
    return data[:at] + instead + data[at + max(len(instead), 1) :]


BYTES = st.binary(max_size=64) | ANY_JSON.map(lambda value: json.dumps(value).encode())
DAMAGED = st.builds(
    _damage,
    st.sampled_from((encode_call(REQUEST), zlib.compress(encode_call(REQUEST)), OUTCOME.encode().encode())),
    st.integers(0, 2000),
    st.binary(max_size=3) | st.sampled_from((b"1e999", b"NaN", b"null", b"[", b"{}", b'"')),
)


@PROFILE
@given(BYTES | DAMAGED | ANY_JSON.map(lambda value: json.dumps([TASK, None, [value], {}]).encode()))
def test_any_bytes_are_a_request_or_one_error(data: bytes) -> None:
    """No payload on the queue can stop a worker: it is a request, or a MessageError says why not."""
    assert isinstance(_message_or_error(decode_call, data), CancelRequest | MessageError)


@PROFILE
@given(BYTES | DAMAGED)
def test_any_bytes_are_an_outcome_or_one_error(data: bytes) -> None:
    """A damaged record reaches the waiter as one kind of error."""
    assert isinstance(_message_or_error(decode_outcome, data), Outcome | MessageError)


@PROFILE
@given(BYTES | DAMAGED)
def test_any_bytes_are_attempts_or_one_error(data: bytes) -> None:
    """A damaged history reaches the worker as one kind of error."""
    assert isinstance(_message_or_error(decode_attempts, data), tuple | MessageError)


def _call(request_json: str, *, function: str = TASK, kwargs: str = "{}") -> bytes:
    return f'["{function}",null,[{request_json}],{kwargs}]'.encode()


def _foreign() -> None:
    """What a strategy's own job would name."""


_BOMB = zlib.compress(b"[" * 10_000_000, 1)
NASTY_JOBS: dict[str, bytes] = {
    "a pickled job": pickle.dumps((_foreign, None, (1,), {})),
    "a pickled job, compressed": zlib.compress(pickle.dumps(("os.system", None, ("true",), {}))),
    "another function": _call('{"v":1,"algo_id":1}', function="os.system"),
    "a function that is no text": b'[7,null,[{"v":1,"algo_id":1}],{}]',
    "an instance": f'["{TASK}",{{}},[{{"v":1,"algo_id":1}}],{{}}]'.encode(),
    "args by name": f'["{TASK}",null,[],{{"request":{{"v":1,"algo_id":1}}}}]'.encode(),
    "an argument by name too": _call('{"v":1,"algo_id":1}', kwargs='{"x":1}'),
    "two arguments": _call('{"v":1,"algo_id":1},{"v":1,"algo_id":2}'),
    "args as an object": f'["{TASK}",null,{{"0":{{"v":1,"algo_id":1}}}},{{}}]'.encode(),
    "kwargs as a list": _call('{"v":1,"algo_id":1}', kwargs="[]"),
    "three parts": f'["{TASK}",null,[]]'.encode(),
    "an object instead of a call": b'{"v":1,"algo_id":1}',
    "ten megabytes": b"x" * 10_000_000,
    "ten megabytes of JSON": _call('{"v":1,"algo_id":1,"tag":"' + "t" * 10_000_000 + '"}'),
    "one byte too many": b" " * (MAX_PAYLOAD_BYTES + 1),
    "a zip bomb": _BOMB,
    "a bomb in a bomb": zlib.compress(_BOMB),
    "compressed twice": zlib.compress(zlib.compress(_call('{"v":1,"algo_id":1}'))),
    "cut off while compressed": zlib.compress(_call('{"v":1,"algo_id":1}'))[:-2],
    "depth 10,000": b"[" * 10_000 + b"]" * 10_000,
    "depth 10,000 of objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "NaN": _call('{"v":1,"algo_id":1,"deadline_s":NaN}'),
    "Infinity": _call('{"v":1,"algo_id":1,"deadline_s":Infinity}'),
    "-Infinity": _call('{"v":1,"algo_id":1,"deadline_s":-Infinity}'),
    "a float beyond floats": _call('{"v":1,"algo_id":1,"deadline_s":1e999}'),
    "2**63": _call('{"v":1,"algo_id":9223372036854775808}'),
    "-2**63-1": _call('{"v":1,"algo_id":-9223372036854775809}'),
    "a number of 5,000 digits": _call('{"v":1,"algo_id":' + "9" * 5000 + "}"),
    "control characters": _call('{"v":1,"algo_id":1,"tag":"\\u0000\\u001b"}'),
    "raw control characters": _call('{"v":1,"algo_id":1,"tag":"\x00"}'),
    "a lone surrogate": _call('{"v":1,"algo_id":1,"symbol":"\\ud800"}'),
    "a lone surrogate as a field": _call('{"v":1,"algo_id":1,"\\udfff":1}'),
    "version 2": _call('{"v":2,"algo_id":1}'),
    "version as text": _call('{"v":"1","algo_id":1}'),
    "true as version": _call('{"v":true,"algo_id":1}'),
    "no version": _call('{"algo_id":1}'),
    "an unknown field": _call('{"v":1,"algo_id":1,"symbols":[]}'),
    "no id": _call('{"v":1}'),
    "null as account": _call('{"v":1,"algo_id":1,"account":null}'),
    "a list as request": _call("[1]"),
    "null as request": _call("null"),
    "empty": b"",
    "empty, compressed": zlib.compress(b""),
    "not UTF-8": b'["\xff\xfe"]',
    "a byte order mark": b"\xef\xbb\xbf" + _call('{"v":1,"algo_id":1}'),
    "two values": _call('{"v":1,"algo_id":1}') * 2,
}


@pytest.mark.parametrize("data", NASTY_JOBS.values(), ids=NASTY_JOBS.keys())
def test_a_nasty_job_is_refused_by_one_readable_error(data: bytes) -> None:
    """Nothing but the contract's own call is accepted, and the refusal fits into one log line."""
    with pytest.raises(MessageError) as caught:
        decode_call(data)
    _assert_fit_for_a_log(str(caught.value))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("another function", "'os.system' is not allowed here"),
        ("args by name", "not 0 arguments and 1 by name"),
        ("ten megabytes", "10000000 bytes are too many; 65536 is the most"),
        ("a zip bomb", "inflates beyond 65536 bytes"),
        ("depth 10,000", "nested too deeply"),
        ("NaN", "NaN is not a number of JSON"),
        ("2**63", "'9223372036854775808' does not fit in 64 bits"),
        ("-2**63-1", "'-9223372036854775809' does not fit in 64 bits"),
        ("a number of 5,000 digits", "does not fit in 64 bits"),
        ("control characters", "tag="),
        ("version 2", "v=2: this side speaks version 1"),
        ("true as version", "v=True: this side speaks version 1"),
        ("an unknown field", "unknown field 'symbols'"),
        ("a list as request", "a cancel request is a JSON object, not [1]"),
        ("empty", "not JSON"),
        ("not UTF-8", "not JSON"),
        ("a pickled job", "not JSON"),
    ],
)
def test_the_refusal_of_a_job_says_what_was_wrong(name: str, words: str) -> None:
    """Whoever reads the refused outcome can tell a foreign job from a damaged one."""
    with pytest.raises(MessageError) as caught:
        decode_call(NASTY_JOBS[name])
    assert words in str(caught.value)


def test_a_payload_of_the_largest_size_is_read() -> None:
    """64 KiB are allowed, compressed or not; the next byte is not."""
    largest = _call('{"v":1,"algo_id":1}').ljust(MAX_PAYLOAD_BYTES)
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
            decode_call(NASTY_JOBS["a zip bomb"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * MAX_PAYLOAD_BYTES


DEEP: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "as tag": (decode_call, _call('{"v":1,"algo_id":1,"tag":%s}')),
    "as algo id": (decode_call, _call('{"v":1,"algo_id":%s}')),
    "as version": (decode_call, _call('{"v":%s,"algo_id":1}')),
    "as request": (decode_call, _call("%s")),
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


def test_brackets_of_a_text_nest_nothing() -> None:
    """Words of the exchange may be full of brackets and quotes, and a long record of shallow values is no deep one."""
    words = '[{"\\' * 60 + '"[[['
    attempts = (dataclasses.replace(ATTEMPT, msg=words),) * 50
    assert decode_attempts(encode_attempts(attempts)) == attempts


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


def test_the_last_of_duplicate_keys_holds_as_it_does_for_rq() -> None:
    """A worker and RQ's own serializer never read two different orders out of the same job."""
    data = _call('{"v":1,"algo_id":1,"algo_id":2}')
    assert decode_call(data).algo_id == 2
    assert JSONSerializer.loads(data)[2][0]["algo_id"] == 2


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


# ---- what a stranger's words become ---------------------------------------------------------------------------------


@PROFILE
@given(_texts(80, 0, _PRINTABLE + _UNPRINTABLE), st.integers(1, 40))
def test_clean_text_is_short_printable_and_stable(text: str, limit: int) -> None:
    """Any words of the exchange can stand in a log line, and cleaning them twice changes nothing."""
    cleaned = clean_text(text, limit)
    assert len(cleaned) <= limit
    assert not set(cleaned) & set(_UNPRINTABLE)
    assert clean_text(cleaned, limit) == cleaned


def test_text_that_is_cut_says_so() -> None:
    """A message that was shortened ends in an ellipsis and is exactly as long as allowed."""
    assert clean_text("x" * 500) == "x" * (MAX_MSG_CHARS - 1) + "…"
    assert clean_text("  a\tb\n") == "a b"


# ---- kinds ----------------------------------------------------------------------------------------------------------

#: kind, order status, may_be_live, off the book, failed: design's table of outcomes, row by row.
KINDS: list[tuple[str, str | None, bool, bool, bool]] = [
    ("cancelled", "CANCELED", False, True, False),
    ("already_cancelled", "CANCELED", False, True, False),
    ("triggered", "TRIGGERED", True, False, False),
    ("triggered", None, True, False, False),
    ("triggered", "FINISHED", False, False, False),
    ("expired", "EXPIRED", False, True, False),
    ("rejected", "REJECTED", False, True, False),
    ("not_found", None, True, False, True),
    ("refused", None, True, False, True),
    ("overdue", None, True, False, True),
    ("gave_up", "NEW", True, False, True),
    ("gave_up", "TRIGGERING", True, False, True),
    ("unknown", None, True, False, True),
    ("unknown", "FINISHED", True, False, True),
]


@pytest.mark.parametrize(("kind", "status", "live", "gone", "failed"), KINDS, ids=[f"{k[0]}-{k[1]}" for k in KINDS])
def test_what_a_kind_says(kind: str, status: str | None, live: bool, gone: bool, failed: bool) -> None:
    """Each kind says whether the order may still act, whether it is off the book, and how RQ files it."""
    outcome_kind = OutcomeKind(kind)
    assert may_be_live(outcome_kind, status) is live
    assert outcome_kind.off_the_book is gone
    assert outcome_kind.failed is failed
    assert Outcome(id="j", run=1, kind=outcome_kind).off_the_book is gone


def test_every_kind_has_its_row() -> None:
    """A kind that is added must say in the table what it means."""
    assert {row[0] for row in KINDS} == {kind.value for kind in OutcomeKind}


# ---- RQ reads what we write, and the reverse ------------------------------------------------------------------------


@pytest.fixture
def unconnected() -> Iterator[redis.Redis]:
    """A client for RQ's classes that need one to be built; nothing here makes it connect."""
    with redis.Redis(host="127.0.0.1", port=1) as client:
        yield client


@PROFILE
@given(REQUESTS)
def test_rqs_serializer_and_we_read_each_other(request_: CancelRequest) -> None:
    """A stock worker gets the function and its one argument, and a job made by plain RQ is a request like any other."""
    function, instance, args, kwargs = JSONSerializer.loads(encode_call(request_))
    assert (function, instance, kwargs) == (TASK, None, {})
    assert args == [encode_request(request_)]
    assert decode_call(JSONSerializer.dumps((TASK, None, (encode_request(request_),), {}))) == request_


def test_rqs_job_reads_our_call(unconnected: redis.Redis) -> None:
    """RQ's Job shows our function and argument, from the compressed and from the plain hash field."""
    for stored in (zlib.compress(encode_call(REQUEST)), encode_call(REQUEST)):
        job = Job("j1", connection=unconnected, serializer=JSONSerializer)
        job.restore({b"data": stored, b"created_at": b"2025-06-21T05:58:12.076000Z"})
        assert job.func_name == TASK
        assert job.instance is None
        assert job.kwargs == {}
        assert decode_request(job.args[0]) == REQUEST


def test_we_read_rqs_job(unconnected: redis.Redis) -> None:
    """What Job.create stores in the hash is what the worker decodes."""
    job = Job.create(TASK, args=[encode_request(REQUEST)], connection=unconnected, serializer=JSONSerializer)
    assert decode_call(job.data) == REQUEST
    assert decode_call(job.to_dict()["data"]) == REQUEST


def test_a_job_that_rq_cannot_read_is_not_read_by_us_either(unconnected: redis.Redis) -> None:
    """A stock worker and ours agree about a compressed field that lost its end: both refuse it."""
    cut = zlib.compress(encode_call(REQUEST))[:-2]
    job = Job("j1", connection=unconnected, serializer=JSONSerializer)
    job.restore({b"data": cut})
    with pytest.raises(DeserializationError):
        _ = job.func_name
    with pytest.raises(MalformedMessage):
        decode_call(cut)


def test_our_job_fields_are_none_of_rqs(unconnected: redis.Redis) -> None:
    """Our fields of the job hash cannot overwrite RQ's: none has a name that RQ writes."""
    job = Job.create(TASK, args=[{}], connection=unconnected, serializer=JSONSerializer, meta={"a": 1})
    assert not [field for field in job.to_dict() if field.startswith("c_")]


def test_the_scripts_use_the_fields_that_are_named_here() -> None:
    """Every field of ours that a script reads or writes stands in the contract, and the contract has no other."""
    ours = {value for name, value in vars(JobField).items() if not name.startswith("_")}
    scripts = [path.read_text() for side in ("producer", "worker") for path in Path(side, "scripts").glob("*.lua")]

    assert {field for script in scripts for field in re.findall(r"'(c_[a-z_]+)'", script)} == ours


# ---- key names ------------------------------------------------------------------------------------------------------

KEYS = Keys("stops", RQ_KEY_PREFIX)


def test_key_of_the_waiting_list(unconnected: redis.Redis) -> None:
    """Job ids wait where RQ's Queue keeps them."""
    assert Queue("stops", connection=unconnected).key == KEYS.waiting
    assert Keys().waiting == "rq:queue:cancels"


def test_key_of_the_queues() -> None:
    """The queue is listed in RQ's set of queues."""
    assert Queue.redis_queues_keys == KEYS.queues
    assert Keys().queues == "rq:queues"


def test_key_of_a_job() -> None:
    """Job hashes stand where Job.fetch looks."""
    assert Job.key_for("j1") == KEYS.job_prefix + "j1"
    assert Keys().job_prefix == "rq:job:"


def test_key_of_the_started_registry() -> None:
    """Jobs in flight stand in RQ's StartedJobRegistry."""
    assert rq.registry.StartedJobRegistry("stops").key == KEYS.started
    assert Keys().started == "rq:wip:cancels"


def test_key_of_the_scheduled_registry() -> None:
    """Retries wait in RQ's ScheduledJobRegistry."""
    assert rq.registry.ScheduledJobRegistry("stops").key == KEYS.scheduled
    assert Keys().scheduled == "rq:scheduled:cancels"


def test_key_of_the_finished_registry() -> None:
    """Finished jobs stand in RQ's FinishedJobRegistry."""
    assert rq.registry.FinishedJobRegistry("stops").key == KEYS.finished
    assert Keys().finished == "rq:finished:cancels"


def test_key_of_the_failed_registry() -> None:
    """Failed kinds stand in RQ's FailedJobRegistry."""
    assert rq.registry.FailedJobRegistry("stops").key == KEYS.failed
    assert Keys().failed == "rq:failed:cancels"


def test_key_of_a_result_stream() -> None:
    """Results stand in RQ's result stream of the job."""
    assert Result.get_key("j1") == KEYS.result_prefix + "j1"
    assert Keys().result_prefix == "rq:results:"


def test_key_of_an_execution(unconnected: redis.Redis) -> None:
    """An execution's hash is RQ's, by job and execution id."""
    assert Execution("e1", "j1", connection=unconnected).key == KEYS.execution_prefix + "j1:e1"
    assert Keys().execution_prefix == "rq:execution:"


def test_key_of_a_jobs_executions(unconnected: redis.Redis) -> None:
    """A job's executions stand in RQ's ExecutionRegistry of that job."""
    assert ExecutionRegistry("j1", connection=unconnected).key == KEYS.executions_prefix + "j1"
    assert Keys().executions_prefix == "rq:executions:"


def test_key_of_a_worker() -> None:
    """A worker's hash is found under RQ's worker namespace."""
    assert BaseWorker.redis_worker_namespace_prefix == KEYS.worker_prefix
    assert Keys().worker_prefix == "rq:worker:"


def test_key_of_a_workers_executions(unconnected: redis.Redis) -> None:
    """The index of what a worker executes hangs under the worker's own key."""
    execution = Execution("e1", "j1", connection=unconnected, worker_name="w1")
    assert execution.worker_executions_key == KEYS.worker_prefix + "w1:executions"


def test_key_of_the_suspension() -> None:
    """`rq suspend` is noticed."""
    assert KEYS.suspended == WORKERS_SUSPENDED
    assert Keys().suspended == "rq:suspended"


def test_keys_of_our_own() -> None:
    """Our keys begin with the queue's name, so that two queues never share a lease or an outcome."""
    assert (KEYS.claiming, KEYS.leases, KEYS.outcomes) == ("stops:claiming", "stops:leases", "stops:outcomes")
    assert (KEYS.outcome_prefix, KEYS.order_prefix) == ("stops:outcome:", "stops:order:")
    assert (KEYS.breaker("hedge-2"), KEYS.held("hedge-2")) == ("stops:key:hedge-2", "stops:held:hedge-2")
    assert (Keys.gate("all"), Keys.gate("worker.1")) == ("gate:all", "gate:worker.1")


def test_a_prefix_of_rq_moves_rqs_keys_only() -> None:
    """With another RQ_KEY_PREFIX every key of RQ's moves and none of ours does."""
    names = [name for name, value in vars(Keys).items() if isinstance(value, property)]
    moved = {name for name in names if getattr(Keys(rq="app"), name) != getattr(Keys(), name)}
    assert moved == set(names) - {"claiming", "leases", "outcomes", "outcome_prefix", "order_prefix", "suspects"}
    assert all(getattr(Keys(rq="app"), name).startswith("app:") for name in moved)


@pytest.mark.parametrize(("name", "value"), [("account", {"a": [1]}), ("algo_id", "1"), ("may_be_live", 1), ("tag", 5)])
def test_an_outcome_of_other_types_is_malformed(name: str, value: object) -> None:
    """A record whose fields are not of their types is no outcome, and is said so by one error."""
    record = json.loads(Outcome("id", 1, OutcomeKind.CANCELLED).encode()) | {name: value}

    with pytest.raises(MalformedMessage):
        decode_outcome(json.dumps(record))


def test_a_refused_request_can_be_handed_to_another_process() -> None:
    """The error keeps field, value and rule when it is pickled, as multiprocessing does."""
    with pytest.raises(InvalidRequest) as caught:
        CancelRequest(algo_id=0)

    copy = pickle.loads(pickle.dumps(caught.value))

    assert (copy.field, copy.value, copy.rule) == (caught.value.field, caught.value.value, caught.value.rule)


@pytest.mark.parametrize("pin", [Pin(7), Pin(2**63 - 1, "BTCUSDT")])
def test_a_pin_is_read_back(pin: Pin) -> None:
    """What a request by client id was found to mean survives from one attempt to the next."""
    assert decode_pin(pin.encode()) == decode_pin(pin.encode().encode()) == pin
    assert decode_pin(b"") is None


@pytest.mark.parametrize(
    "text",
    [
        *("7", "[7]", "{}", '{"algo_id":7}', '{"algo_id":null,"symbol":null}', '{"algo_id":7,"symbol":null,"x":1}'),
        *('{"algo_id":0,"symbol":null}', '{"algo_id":true,"symbol":null}', '{"algo_id":"7","symbol":null}'),
        *('{"algo_id":7,"symbol":7}', '{"algo_id":7,"symbol":"\\u0000"}', "garbage"),
    ],
)
def test_what_is_no_pin_is_said_so(text: str) -> None:
    """A pin that somebody damaged is never taken for an order."""
    with pytest.raises(MessageError):
        decode_pin(text)
