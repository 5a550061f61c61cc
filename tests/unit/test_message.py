"""The contract: what survives the wire, and what is refused and how."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import pickle
import re
import zlib
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rq.serializers import JSONSerializer

from producer.keys import JobField
from producer.message import (
    DEFAULT_ACCOUNT,
    MAX_ALGO_ID,
    MAX_DEADLINE_S,
    TASK,
    Attempt,
    Call,
    CancelRequest,
    Outcome,
    OutcomeKind,
    Pin,
    check_queue_name,
    decode_attempts,
    decode_call,
    decode_outcome,
    decode_pin,
    decode_request,
    encode_attempts,
    encode_call,
    encode_request,
    may_be_live,
)
from producer.untrusted import InvalidRequest, MessageError
from tests.messages import ATTEMPT, ATTEMPTS, OUTCOME, OUTCOMES, PROFILE, REQUEST, REQUESTS, assert_fit_for_a_log

# ---- any valid value ------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("kind", "status", "executed", "is_gone"),
    [
        ("triggered", "CANCELED", "0", True),
        ("triggered", "EXPIRED", "0.000", True),
        ("triggered", "CANCELED", "0.4", False),
        ("triggered", "FILLED", "1", False),
        ("triggered", "NEW", "0", False),
        ("triggered", "CANCELED", None, False),
        ("triggered", None, None, False),
        ("cancelled", None, None, True),
        ("gave_up", "CANCELED", "0", False),
    ],
)
def test_off_the_book_is_what_neither_rests_nor_was_executed(
    kind: str, status: str | None, executed: str | None, is_gone: bool
) -> None:
    """Of a triggered order that takes its child's proven end, and that nothing of it was executed."""
    outcome = Outcome("j1", 1, OutcomeKind(kind), child_status=status, child_executed_qty=executed)

    assert outcome.off_the_book is is_gone


def test_only_two_calls_are_about_a_child() -> None:
    """And two of all calls ask for a cancel."""
    assert {call for call in Call if call.of_child} == {Call.CANCEL_CHILD, Call.QUERY_CHILD}
    assert {call for call in Call if call.cancels} == {Call.CANCEL, Call.CANCEL_CHILD}


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


def test_a_job_holds_only_what_was_set() -> None:
    """A plain request costs a few bytes: unset fields and defaults stay out of Redis."""
    assert encode_request(CancelRequest(algo_id=7)) == {"v": 1, "account": DEFAULT_ACCOUNT, "algo_id": 7}
    assert encode_request(REQUEST)["urgent"] is True


def test_a_long_history_survives() -> None:
    """A request with a thousand attempts behind it, far more than a request's own size, is still read."""
    attempts = (ATTEMPT,) * 1_000
    assert decode_attempts(encode_attempts(attempts)) == attempts
    assert decode_outcome(dataclasses.replace(OUTCOME, attempts=attempts).encode()).attempts == attempts


def test_the_order_key_is_the_id_that_the_exchange_is_asked_by() -> None:
    """Two requests are the same order by account and algo id, else by account and client id."""
    assert CancelRequest(algo_id=5, client_algo_id="x").order_key == "default:a:5"
    assert CancelRequest(client_algo_id="a:5", account="b").order_key == "b:c:a:5"
    assert CancelRequest(algo_id=5, client_algo_id="x").joins
    assert not CancelRequest(client_algo_id="x").joins


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
    (
        "algo id true",
        "algo_id",
        {"algo_id": True},
        "whole number from 1 to 9223372036854775807, not bool: give int(...)",
    ),
    ("algo id as text", "algo_id", {"algo_id": "2146760"}, "not str: give int(...)"),
    ("algo id with a fraction", "algo_id", {"algo_id": 1.0}, "not float: give int(...)"),
    ("algo id as a Decimal", "algo_id", {"algo_id": Decimal(7)}, "not Decimal: give int(...)"),
    ("client id empty", "client_algo_id", {"client_algo_id": ""}, "{1,36}"),
    ("client id of 37", "client_algo_id", {"client_algo_id": "x" * 37}, "{1,36}"),
    ("client id with a space", "client_algo_id", {"client_algo_id": "a b"}, "^[.A-Z:/a-z0-9_-]"),
    ("client id with a line end", "client_algo_id", {"client_algo_id": "abc\n"}, "^[.A-Z:/a-z0-9_-]"),
    ("client id beyond ASCII", "client_algo_id", {"client_algo_id": "é"}, "^[.A-Z:/a-z0-9_-]"),
    ("client id as a number", "client_algo_id", {"client_algo_id": 5}, "not int: give text"),
    ("client id as bytes", "client_algo_id", {"client_algo_id": b"x"}, "not bytes: give text"),
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
    ("deadline as text", "deadline_s", {"algo_id": 1, "deadline_s": "5"}, "not str: give a number or a timedelta"),
    ("deadline gone by", "deadline_s", {"algo_id": 1, "deadline_s": datetime.timedelta(-1)}, "more than 0"),
    ("no such way", "on_trigger", {"algo_id": 1, "on_trigger": "cancel"}, "report"),
    ("a flag as a way", "on_trigger", {"algo_id": 1, "on_trigger": True}, "cancel_child"),
    ("urgent as a number", "urgent", {"algo_id": 1, "urgent": 1}, "true or false, not int: give True or False"),
    ("symbol empty", "symbol", {"algo_id": 1, "symbol": ""}, "1 to 32 characters"),
    ("symbol of 33", "symbol", {"algo_id": 1, "symbol": "S" * 33}, "1 to 32 characters"),
    ("symbol as a number", "symbol", {"algo_id": 1, "symbol": 5}, "without control characters, not int"),
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
    assert_fit_for_a_log(str(error))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # strategies hand errors from process to process


def test_the_extremes_are_accepted() -> None:
    """Each limit is itself allowed."""
    greatest = CancelRequest(MAX_ALGO_ID, "z" * 36, "a" * 32, MAX_DEADLINE_S, symbol="S" * 32, tag="t" * 64)
    assert decode_call(encode_call(greatest)) == greatest
    assert (MAX_ALGO_ID, MAX_DEADLINE_S) == (9223372036854775807, 604_800)
    assert CancelRequest(algo_id=1, deadline_s=0.001, symbol="S", tag="t").algo_id == 1
    assert CancelRequest(algo_id=1, deadline_s=datetime.timedelta(seconds=2)).deadline_s == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "a:b", "a b", "q\n", "é", "q" * 65, None, 5])
def test_a_queue_name_that_could_collide_is_refused(name: Any) -> None:
    """A colon or a space in a queue's name could make one queue's keys look like another's."""
    assert check_queue_name("A.b_c-9" + "q" * 57) == "A.b_c-9" + "q" * 57
    with pytest.raises(InvalidRequest, match=r"^queue="):
        check_queue_name(name)


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


# ---- RQ reads what we write, and the reverse ------------------------------------------------------------------------


@PROFILE
@given(REQUESTS)
def test_rqs_serializer_and_we_read_each_other(request_: CancelRequest) -> None:
    """A stock worker gets the function and its one argument, and a job made by plain RQ is a request like any other."""
    function, instance, args, kwargs = JSONSerializer.loads(encode_call(request_))
    assert (function, instance, kwargs) == (TASK, None, {})
    assert args == [encode_request(request_)]
    assert decode_call(JSONSerializer.dumps((TASK, None, (encode_request(request_),), {}))) == request_


def test_the_scripts_use_the_fields_that_are_named_here() -> None:
    """Every field of ours that a script reads or writes stands in the contract, and the contract has no other."""
    ours = {value for name, value in vars(JobField).items() if not name.startswith("_")}
    scripts = [path.read_text() for side in ("producer", "worker") for path in Path(side, "scripts").glob("*.lua")]

    assert {field for script in scripts for field in re.findall(r"'(c_[a-z_]+)'", script)} == ours


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
