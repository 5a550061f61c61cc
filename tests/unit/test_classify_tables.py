"""What each answer of the exchange means: exchange.md 4.1 and 4.2 row by row, as the bytes that arrive."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.message import Call
from producer.untrusted import MAX_MSG_CHARS, clean_text
from tests.examples import examples
from worker.classify import CODE_MEANS, HTTP_MEANS, NOT_DONE_STATUSES, Failure, Means, OrderRef, Reply, classify

PROFILE = examples(25)

ALGO_ID = 2146760
CLIENT_ID = "6B2I9XVcJpCjqPAJ4YoFX7"
BY_ALGO_ID = OrderRef(ALGO_ID)
BY_CLIENT_ID = OrderRef(None, CLIENT_ID)
#: The exchange's own samples of a cancel's and a query's answer.
CONFIRMATION: dict[str, Any] = json.loads(
    '{"algoId":2146760,"clientAlgoId":"6B2I9XVcJpCjqPAJ4YoFX7","code":"200","msg":"success"}'
)
ORDER: dict[str, Any] = json.loads(
    '{"algoId":2146760,"clientAlgoId":"6B2I9XVcJpCjqPAJ4YoFX7","algoType":"CONDITIONAL","orderType":"TAKE_PROFIT",'
    '"symbol":"BNBUSDT","side":"SELL","positionSide":"BOTH","timeInForce":"GTC","quantity":"0.01",'
    '"algoStatus":"CANCELED","actualOrderId":"","actualPrice":"0.00000","actualType":"LIMIT","actualQty":"0.01",'
    '"triggerPrice":"750.000","price":"750.000","icebergQuantity":null,"tpOrderType":"",'
    '"selfTradePreventionMode":"EXPIRE_MAKER","workingType":"CONTRACT_PRICE","priceMatch":"NONE",'
    '"closePosition":false,"priceProtect":false,"reduceOnly":false,"createTime":1750485492076,'
    '"updateTime":1750514545091,"triggerTime":0,"goodTillDate":0}'
)
UNKNOWN_503 = "Unknown error, please check your request or try again later."
UNAVAILABLE_503 = "Service Unavailable."
INTERNAL_503 = "Internal error; unable to process your request. Please try again."
THROTTLED_503 = "Request throttled by system-level protection. Reduce-only/close-position orders are exempt."
CLOUDFRONT = b"<!DOCTYPE HTML><HTML><HEAD><TITLE>ERROR: The request could not be satisfied</TITLE></HEAD></HTML>"
BAD_GATEWAY = b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n</html>\r\n"
UNAVAILABLE_PAGE = b"<html><head><title>503</title></head><body><h1>Service Unavailable.</h1></body></html>"
BAN = "Way too many requests; IP(203.0.113.9) banned until 1750485612076. Please use the websocket for live updates."


def confirmation(**changes: Any) -> bytes:
    """The answer to a cancel, with fields changed, or dropped where the change is ``...``."""
    return _body(CONFIRMATION, changes)


def order(**changes: Any) -> bytes:
    """The answer to a query, with fields changed, or dropped where the change is ``...``."""
    return _body(ORDER, changes)


def _body(sample: dict[str, Any], changes: dict[str, Any]) -> bytes:
    return json.dumps({name: value for name, value in (sample | changes).items() if value is not ...}).encode()


def refusal(code: int, msg: str = "") -> bytes:
    """The body of an error answer."""
    return json.dumps({"code": code, "msg": msg}).encode()


class Row(NamedTuple):
    """One answer and what it means to a cancel and to a query; None where the call cannot get it."""

    words: str
    answer: Reply | Failure
    cancel: Means | None
    query: Means | None


def both(words: str, answer: Reply | Failure, means: Means) -> Row:
    """An answer that means the same to both calls."""
    return Row(words, answer, means, means)


# ---- 4.1: HTTP level ------------------------------------------------------------------------------------------------

HTTP_ROWS = [
    # 200, JSON, code "200" (or 200), echoed id equals request: done
    Row("200 code '200', our id", Reply(200, confirmation()), Means.CONFIRMED, Means.UNCLEAR),
    Row("200 code 200, our id", Reply(200, confirmation(code=200)), Means.CONFIRMED, Means.UNCLEAR),
    Row("200 id as text", Reply(200, confirmation(algoId="2146760")), Means.CONFIRMED, Means.UNCLEAR),
    Row("200 fields of the future", Reply(200, confirmation(extra={"a": [1]})), Means.CONFIRMED, Means.UNCLEAR),
    # 200/2xx, not JSON / empty / missing code / other id: unknown
    both("200 not JSON", Reply(200, b"OK"), Means.UNCLEAR),
    both("200 HTML", Reply(200, CLOUDFRONT), Means.UNCLEAR),
    both("200 empty", Reply(200, b""), Means.UNCLEAR),
    both("200 a list", Reply(200, b"[" + confirmation() + b"]"), Means.UNCLEAR),
    both("200 not UTF-8", Reply(200, b'{"algoId":2146760,"code":"200","msg":"\xff"}'), Means.UNCLEAR),
    both("200 cut off", Reply(200, confirmation()[:-2]), Means.UNCLEAR),
    both("200 nested too deeply", Reply(200, b"[" * 60_000), Means.UNCLEAR),
    both("200 a number of 5,000 digits", Reply(200, b'{"algoId":' + b"9" * 5000 + b"}"), Means.UNCLEAR),
    Row("200 longer than we read", Reply(200, confirmation(), truncated=True), Means.UNCLEAR, None),
    Row("200 order longer than we read", Reply(200, order(), truncated=True), None, Means.UNCLEAR),
    Row("200 missing code", Reply(200, confirmation(code=...)), Means.UNCLEAR, Means.UNCLEAR),
    Row("200 code null", Reply(200, confirmation(code=None)), Means.UNCLEAR, Means.UNCLEAR),
    Row("200 code true", Reply(200, confirmation(code=True)), Means.UNCLEAR, Means.UNCLEAR),
    Row("200 code 200.0", Reply(200, confirmation(code=200.0)), Means.UNCLEAR, Means.UNCLEAR),
    Row("200 code 0", Reply(200, confirmation(code=0)), Means.UNCLEAR, Means.UNCLEAR),
    Row("200 code -2011, our id", Reply(200, confirmation(code=-2011)), Means.UNCLEAR, Means.UNCLEAR),
    both("200 code -2011 alone", Reply(200, refusal(-2011, "Unknown order sent.")), Means.UNCLEAR),
    Row("200 other id", Reply(200, confirmation(algoId=ALGO_ID + 1)), Means.UNCLEAR, Means.UNCLEAR),
    Row("200 missing id", Reply(200, confirmation(algoId=...)), Means.UNCLEAR, Means.UNCLEAR),
    Row("200 id true", Reply(200, confirmation(algoId=True)), Means.UNCLEAR, Means.UNCLEAR),
    Row("200 id with a fraction", Reply(200, confirmation(algoId=2146760.0)), Means.UNCLEAR, Means.UNCLEAR),
    Row("200 portfolio margin's answer", Reply(200, b'{"complete":true}'), Means.UNCLEAR, Means.UNCLEAR),
    Row("200 cancel-all's answer", Reply(200, b'{"code":200,"msg":"The operation is done."}'), Means.UNCLEAR, None),
    Row("201 with a confirmation", Reply(201, confirmation()), Means.UNCLEAR, None),
    Row("202 with a confirmation", Reply(202, confirmation()), Means.UNCLEAR, None),
    Row("202 with an order", Reply(202, order()), None, Means.UNCLEAR),
    both("202 empty", Reply(202, b""), Means.UNCLEAR),
    both("204", Reply(204, b""), Means.UNCLEAR),
    Row("200 order of another id", Reply(200, order(algoId=1)), None, Means.UNCLEAR),
    Row("200 order without status", Reply(200, order(algoStatus=...)), None, Means.UNCLEAR),
    Row("200 order with status null", Reply(200, order(algoStatus=None)), None, Means.UNCLEAR),
    Row("200 order with empty status", Reply(200, order(algoStatus="")), None, Means.UNCLEAR),
    # 202 with the firewall's challenge header: not done, like 403
    both("202 challenge", Reply(202, b"", challenge=True), Means.BLOCKED),
    both("405 challenge", Reply(405, CLOUDFRONT, challenge=True), Means.BLOCKED),
    # 400 + code: by code (4.2); without one nothing is known
    both("400 without a code", Reply(400, b"Bad Request"), Means.UNCLEAR),
    both("400 HTML", Reply(400, CLOUDFRONT), Means.UNCLEAR),
    both("400 empty", Reply(400, b""), Means.UNCLEAR),
    both("400 code longer than we read", Reply(400, refusal(-1102), truncated=True), Means.UNCLEAR),
    both("401 -2014", Reply(401, refusal(-2014, "API-key format invalid.")), Means.KEY_REFUSED),
    both("401 -2015", Reply(401, refusal(-2015, "Invalid API-key, IP, or permissions")), Means.KEY_REFUSED),
    both("401 of an edge", Reply(401, b"<html>401 Authorization Required</html>"), Means.BUSY),
    both("401 empty", Reply(401, b""), Means.BUSY),
    both("403 HTML", Reply(403, CLOUDFRONT), Means.BLOCKED),
    both("403 with a code", Reply(403, refusal(-2015)), Means.BLOCKED),
    both("404 HTML", Reply(404, CLOUDFRONT), Means.BUSY),
    both("404 with an unlisted code", Reply(404, refusal(-5000, "Path is invalid")), Means.BUSY),
    both("404 with a code that refuses", Reply(404, refusal(-1102)), Means.DENIED),
    both("404 with a known code", Reply(404, refusal(-1021)), Means.CLOCK),
    both("405 empty", Reply(405, b""), Means.BUSY),
    both("408 empty", Reply(408, b""), Means.UNCLEAR),
    both("408 with a code that would be a refusal", Reply(408, refusal(-1021)), Means.UNCLEAR),
    both("418 -1003", Reply(418, refusal(-1003, BAN)), Means.LIMITED),
    both("418 HTML", Reply(418, CLOUDFRONT), Means.LIMITED),
    both("429 -1003", Reply(429, refusal(-1003, "Too many requests.")), Means.LIMITED),
    both("429 empty", Reply(429, b""), Means.LIMITED),
    both("451 HTML", Reply(451, CLOUDFRONT), Means.BLOCKED),
    both("451 with a code", Reply(451, refusal(0, "restricted location")), Means.BLOCKED),
    # the four texts of 503
    both("503 Unknown error", Reply(503, refusal(-1000, UNKNOWN_503)), Means.UNCLEAR),
    both("503 Unknown error as -1001", Reply(503, refusal(-1001, UNKNOWN_503)), Means.UNCLEAR),
    both("503 Unknown error as text", Reply(503, UNKNOWN_503.encode()), Means.UNCLEAR),
    both("503 Service Unavailable", Reply(503, refusal(-1001, UNAVAILABLE_503)), Means.BUSY),
    both("503 Service Unavailable as text", Reply(503, UNAVAILABLE_503.encode()), Means.BUSY),
    both("503 Internal error", Reply(503, refusal(-1001, INTERNAL_503)), Means.BUSY),
    both("503 Internal error as text", Reply(503, INTERNAL_503.encode()), Means.BUSY),
    both("503 -1008", Reply(503, refusal(-1008, THROTTLED_503)), Means.BUSY),
    both("503 text in capitals", Reply(503, b"SERVICE UNAVAILABLE\r\n"), Means.BUSY),
    both("503 text cut off", Reply(503, UNAVAILABLE_503.encode(), truncated=True), Means.UNCLEAR),
    both("503 a page that holds the text", Reply(503, UNAVAILABLE_PAGE), Means.UNCLEAR),
    both("503 the text and more", Reply(503, refusal(-1001, f"{UNKNOWN_503} {UNAVAILABLE_503}")), Means.UNCLEAR),
    both("503 empty", Reply(503, b""), Means.UNCLEAR),
    both("503 -2011", Reply(503, refusal(-2011, "Unknown order sent.")), Means.UNCLEAR),
    both("503 -1003", Reply(503, refusal(-1003, "Too many requests.")), Means.LIMITED),
    both("503 -1016", Reply(503, refusal(-1016, "This service is no longer available.")), Means.BUSY),
    # any other 5xx: unknown
    both("500 Request occur unknown error", Reply(500, refusal(-1000, "Request occur unknown error.")), Means.UNCLEAR),
    both("500 Service Unavailable", Reply(500, UNAVAILABLE_503.encode()), Means.UNCLEAR),
    both("500 with a code that would be a refusal", Reply(500, refusal(-2011, "Unknown order sent.")), Means.UNCLEAR),
    both("502 HTML", Reply(502, BAD_GATEWAY), Means.UNCLEAR),
    both("502 with a code that would be a refusal", Reply(502, refusal(-2015)), Means.UNCLEAR),
    both("504 HTML", Reply(504, CLOUDFRONT), Means.UNCLEAR),
    both("504 -1007", Reply(504, refusal(-1007)), Means.UNCLEAR),
    both("599 empty", Reply(599, b""), Means.UNCLEAR),
    # no answer
    both("connection refused", Failure(False, "ConnectionRefusedError"), Means.NOT_SENT),
    both("name not resolved", Failure(False, "gaierror"), Means.NOT_SENT),
    both("TLS failed", Failure(False, "SSLCertVerificationError"), Means.NOT_SENT),
    both("timeout after sending", Failure(True, "ReadTimeout"), Means.UNCLEAR),
    both("reset after sending", Failure(True, "ConnectionResetError"), Means.UNCLEAR),
    # statuses that nobody announced
    both("100", Reply(100, b""), Means.UNCLEAR),
    both("302 elsewhere", Reply(302, b""), Means.UNCLEAR),
    both("409", Reply(409, b""), Means.UNCLEAR),
]

# ---- 4.2: codes -----------------------------------------------------------------------------------------------------

UNKNOWN_ORDER = "Unknown order sent."


def code(number: int, means: Means, msg: str = "", http: int = 400) -> Row:
    """A refusal by code and text; both calls read it alike."""
    return both(f"{number} {msg}".strip(), Reply(http, refusal(number, msg)), means)


CODE_ROWS = [
    code(-1000, Means.UNCLEAR, "An unknown error occurred while processing the request."),
    code(-1001, Means.BUSY, INTERNAL_503),
    code(-1001, Means.BUSY, UNAVAILABLE_503),
    code(-1001, Means.UNCLEAR, UNKNOWN_503),
    code(-1001, Means.UNCLEAR, "Internal error; try again."),
    code(-1001, Means.UNCLEAR),
    code(-1002, Means.DENIED, "You are not authorized to execute this request."),
    code(-1003, Means.LIMITED, "Too many requests queued."),
    code(-1003, Means.LIMITED, BAN),
    code(-1004, Means.DENIED, "This IP is already on the white list"),
    code(-1005, Means.DENIED, "No such IP has been white listed"),
    code(-1006, Means.UNCLEAR, "An unexpected response was received from the message bus. Execution status unknown."),
    code(-1007, Means.UNCLEAR, "Timeout waiting for response from backend server. Execution status unknown."),
    code(-1008, Means.BUSY, THROTTLED_503),
    code(-1010, Means.UNCLEAR, "ERROR_MSG_RECEIVED."),
    code(-1011, Means.DENIED, "This IP cannot access this route."),
    code(-1013, Means.DENIED, "INVALID_MESSAGE"),
    code(-1014, Means.DENIED, "Unsupported order combination."),
    code(-1015, Means.BUSY, "Too many new orders."),
    code(-1016, Means.BUSY, "This service is no longer available."),
    code(-1020, Means.DENIED, "This operation is not supported."),
    code(-1021, Means.CLOCK, "Timestamp for this request is outside of the recvWindow."),
    code(-1021, Means.CLOCK, "Timestamp for this request was 1000ms ahead of the server's time."),
    code(-1022, Means.KEY_REFUSED, "Signature for this request is not valid."),
    code(-1023, Means.DENIED, "Start time is greater than end time."),
    code(-1099, Means.DENIED, "Not found, unauthenticated, or unauthorized."),
    code(-1102, Means.DENIED, "Mandatory parameter was not sent, was empty/null, or malformed."),
    code(-1125, Means.DENIED, "This listenKey does not exist."),
    code(-1128, Means.DENIED, "Combination of optional parameters invalid."),
    code(-1130, Means.DENIED, "Invalid data sent for a parameter."),
    code(-2011, Means.NO_SUCH_ORDER, UNKNOWN_ORDER),
    code(-2011, Means.DENIED, "This action is disabled on this account."),
    code(-2011, Means.DENIED, "This account may not place or cancel orders."),
    code(-2011, Means.DENIED, "This symbol is not permitted for this account"),
    code(-2011, Means.DENIED, "This symbol is restricted for this account"),
    code(-2011, Means.DENIED, "This symbol is not permitted/restricted for this account"),
    code(-2011, Means.DENIED, "Order was not canceled due to cancel restrictions."),
    code(-2011, Means.NO_SUCH_ORDER, "A text that nobody has seen."),
    code(-2011, Means.NO_SUCH_ORDER),
    *(code(number, Means.BUSY, "Rest API trading is not enabled.") for number in (-2010, -2011)),
    code(-2010, Means.UNCLEAR, "NEW_ORDER_REJECTED"),
    code(-2008, Means.KEY_REFUSED, "Invalid Api-Key ID.", http=401),
    code(-2008, Means.KEY_REFUSED, "Invalid Api-Key ID."),
    code(-2012, Means.UNCLEAR, "CANCEL_ALL_FAIL"),
    code(-2013, Means.NO_SUCH_ORDER, "Order does not exist."),
    code(-2014, Means.KEY_REFUSED, "API-key format invalid."),
    code(-2015, Means.KEY_REFUSED, "Invalid API-key, IP, or permissions for action.", http=401),
    code(-2017, Means.KEY_REFUSED, "API Keys are locked on this account."),
    code(-4015, Means.DENIED, "Client order id length should be less than 36 chars"),
    code(-4056, Means.DENIED, "Invalid api key type."),
    code(-4057, Means.DENIED, "Invalid rsa public key"),
    code(-4084, Means.DENIED, "Method is not allowed currently. Coming soon."),
    code(-4088, Means.DENIED, "User can not place order currently"),
    code(-4109, Means.DENIED, "This account is inactive"),
    code(-4192, Means.DENIED, "Cooling-off period"),
    code(-4116, Means.UNCLEAR, "ClientOrderId is duplicated"),
    code(-4117, Means.TRIGGER_RACE, "Stop order is triggering"),
    code(-4120, Means.DENIED, "Order type not supported for this endpoint. Please use the Algo Order API endpoints."),
    code(-4141, Means.UNCLEAR, "Symbol is closed."),
    *(code(number, Means.UNCLEAR) for number in (-4400, -4401, -4402, -4403, -4531)),
    code(-5028, Means.CLOCK, "Timestamp for this request is outside of the ME recvWindow"),
    *(code(number, Means.UNCLEAR) for number in (-5021, -5022, -5041, -5043)),
    code(-20124, Means.NO_SUCH_ORDER, "Invalid algo id or it has been completed."),
    *(code(number, Means.UNCLEAR) for number in (-20121, -20130, -20132)),
    both("a code as text", Reply(400, b'{"code":"-2013","msg":"Order does not exist."}'), Means.NO_SUCH_ORDER),
    both("a code with a fraction", Reply(400, b'{"code":-2013.0,"msg":""}'), Means.UNCLEAR),
    both("a code beyond 64 bits", Reply(400, b'{"code":-99999999999999999999,"msg":""}'), Means.UNCLEAR),
    both("a positive code", Reply(400, refusal(2013)), Means.UNCLEAR),
    both("a message that is no text", Reply(400, b'{"code":-1102,"msg":{"a":1}}'), Means.DENIED),
]


#: The rows that 4.2 gives to whole ranges of codes.
PARAMETER_CODES = {"-1100..-1106": range(-1106, -1099), "-1108..-1127": range(-1127, -1107)}

# ---- 1.4: the order's state -----------------------------------------------------------------------------------------

STATES = {
    "NEW": Means.OPEN,
    "CANCELED": Means.CANCELED,
    "TRIGGERING": Means.TRIGGERING,
    "TRIGGERED": Means.TRIGGERED,
    "FINISHED": Means.FINISHED,
    "REJECTED": Means.REJECTED,
    "EXPIRED": Means.EXPIRED,
    "PENDING_CANCEL": Means.ODD_STATUS,
    "new": Means.ODD_STATUS,
}


@pytest.mark.parametrize("row", [pytest.param(row, id=row.words) for row in HTTP_ROWS + CODE_ROWS])
def test_a_row_of_the_tables(row: Row) -> None:
    """Each answer of exchange.md 4.1, and each code of 4.2, means to both calls what the table says."""
    for call, means in ((Call.CANCEL, row.cancel), (Call.QUERY, row.query)):
        if means is None:
            continue
        assert classify(call, BY_ALGO_ID, row.answer).means is means, call


@pytest.mark.parametrize("codes", PARAMETER_CODES.values(), ids=PARAMETER_CODES.keys())
def test_a_row_of_parameter_codes(codes: range) -> None:
    """The codes about parameters refuse both calls for good: the same request would be refused again."""
    for call in Call:
        meant = {number: classify(call, BY_ALGO_ID, Reply(400, refusal(number))).means for number in codes}
        assert meant == dict.fromkeys(codes, Means.DENIED)


@pytest.mark.parametrize(("status", "means"), STATES.items())
def test_a_query_reads_the_orders_state(status: str, means: Means) -> None:
    """Each state has a meaning of its own; one that is not known proves nothing."""
    verdict = classify(Call.QUERY, BY_ALGO_ID, Reply(200, order(algoStatus=status)))
    assert verdict.means is means
    assert (verdict.http, verdict.msg) == (200, status)
    assert verdict.order is not None
    assert verdict.order.status == status


@pytest.mark.parametrize("status", STATES)
def test_a_cancel_never_reads_a_state(status: str) -> None:
    """An order in a cancel's answer confirms nothing without the code."""
    assert classify(Call.CANCEL, BY_ALGO_ID, Reply(200, order(algoStatus=status))).means is Means.UNCLEAR


def _codes(rows: list[Row]) -> set[int]:
    bodies = [json.loads(row.answer.body) for row in rows if isinstance(row.answer, Reply)]
    return {body["code"] for body in bodies} | {number for codes in PARAMETER_CODES.values() for number in codes}


def test_a_code_that_is_not_listed_is_unclear() -> None:
    """No code without a row in 4.2 is taken for a refusal, let alone for success."""
    listed = _codes([row for row in CODE_ROWS if row.cancel is not Means.UNCLEAR])
    meant = {
        number: classify(Call.CANCEL, BY_ALGO_ID, Reply(400, b'{"code":%d}' % number)).means
        for number in (*range(-5100, -900), *range(-900, 1000, 50), *range(-20140, -20110))
        if number not in listed
    }
    assert {number: means for number, means in meant.items() if means is not Means.UNCLEAR} == {}


def test_a_status_that_is_not_listed_is_unclear() -> None:
    """No status without a row in 4.1 is taken for a refusal, let alone for success."""
    listed = {401, 403, 404, 405, 418, 429, 451}
    meant = {http: classify(Call.CANCEL, BY_ALGO_ID, Reply(http, b"?")).means for http in range(100, 600)}
    assert {http for http, means in meant.items() if means is not Means.UNCLEAR} == listed


def test_every_entry_of_the_tables_has_its_row() -> None:
    """A code or status that is added to the tables needs a row here."""
    statuses = {row.answer.http for row in HTTP_ROWS if isinstance(row.answer, Reply)}
    assert set(HTTP_MEANS) | NOT_DONE_STATUSES <= statuses
    assert set(CODE_MEANS) <= _codes(CODE_ROWS)


# ---- the echoed id --------------------------------------------------------------------------------------------------

BIG = 2**53 + 1


@pytest.mark.parametrize(
    ("asked", "echo", "means"),
    [
        (BIG, f"{BIG}", Means.CONFIRMED),
        (BIG, f'"{BIG}"', Means.CONFIRMED),
        (BIG, f"{BIG - 1}", Means.UNCLEAR),
        (BIG, f"{BIG}.0", Means.UNCLEAR),
        (BIG, "9007199254740993e0", Means.UNCLEAR),
        (1, "1", Means.CONFIRMED),
        (1, "true", Means.UNCLEAR),
        (2**63 - 1, f"{2**63 - 1}", Means.CONFIRMED),
        (2**63, f"{2**63}", Means.UNCLEAR),
    ],
)
def test_ids_are_compared_exactly(asked: int, echo: str, means: Means) -> None:
    """2**53+1 is not 2**53: an id is never compared as a floating-point number. To Python true equals 1; to the
    exchange it is no id, and its LONG is the limit of what is one."""
    body = confirmation(algoId=0).replace(b'"algoId": 0', f'"algoId": {echo}'.encode())
    verdict = classify(Call.CANCEL, OrderRef(asked), Reply(200, body))
    assert verdict.means is means
    if verdict.order is not None:
        assert verdict.order.algo_id == asked


@pytest.mark.parametrize(
    ("changes", "ours"),
    [
        ({}, True),
        ({"algoId": 77}, True),
        ({"clientAlgoId": "another"}, False),
        ({"clientAlgoId": CLIENT_ID.lower()}, False),
        ({"clientAlgoId": None}, False),
        ({"clientAlgoId": ...}, False),
        ({"algoId": ...}, False),
        ({"algoId": "x"}, False),
    ],
)
def test_by_client_id_the_echoed_client_id_must_be_ours(changes: dict[str, Any], ours: bool) -> None:
    """Without an algo id the client id is compared, and the answer must name the algo id to pin."""
    cancel = classify(Call.CANCEL, BY_CLIENT_ID, Reply(200, confirmation(**changes)))
    query = classify(Call.QUERY, BY_CLIENT_ID, Reply(200, order(algoStatus="NEW", **changes)))
    assert cancel.means is (Means.CONFIRMED if ours else Means.UNCLEAR)
    assert query.means is (Means.OPEN if ours else Means.UNCLEAR)


@pytest.mark.parametrize(
    ("changes", "is_ours"),
    [({}, True), ({"clientAlgoId": None}, True), ({"clientAlgoId": "another"}, False), ({"algoId": 1}, False)],
)
def test_what_a_client_id_was_found_to_mean_bears_it(changes: dict[str, Any], is_ours: bool) -> None:
    """Only the algo id is sent; the client id is compared where the answer tells it, as the two were brought together
    by what stood in Redis."""
    both_ids = OrderRef(ALGO_ID, CLIENT_ID)
    cancel = classify(Call.CANCEL, both_ids, Reply(200, confirmation(**changes)))
    assert cancel.means is (Means.CONFIRMED if is_ours else Means.UNCLEAR)


# ---- what else is read from an answer -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        ("88937381063", "88937381063"),
        (88937381063, "88937381063"),
        ("8" * 50, "8" * 39 + "…"),
        ("", None),
        (" ", None),
        ("0", None),
        (0, None),
        (None, None),
        (True, None),
        ({"id": 7}, None),
    ],
)
def test_the_child_orders_id_is_handed_on(sent: Any, read: str | None) -> None:
    """After the trigger the live thing is the child order; before it there is none."""
    verdict = classify(Call.QUERY, BY_ALGO_ID, Reply(200, order(algoStatus="TRIGGERED", actualOrderId=sent)))
    assert verdict.order is not None
    assert verdict.order.actual_order_id == read


def test_a_child_that_is_no_id_breaks_nothing() -> None:
    """An answer that puts a deep nest where an id belongs still shows the order's state."""
    for depth in range(50, 900, 50):
        nest = b"[" * depth + b"]" * depth
        body = order(algoStatus="TRIGGERED", actualOrderId="?").replace(b'"?"', nest)
        verdict = classify(Call.QUERY, BY_ALGO_ID, Reply(200, body))
        assert verdict.order is None or verdict.order.actual_order_id is None
        assert verdict.means in (Means.TRIGGERED, Means.UNCLEAR)


def test_an_order_is_read_whole() -> None:
    """Pinning, the record and the strategy need ids, symbol and time of creation as the exchange gave them."""
    verdict = classify(Call.QUERY, BY_CLIENT_ID, Reply(200, order()))
    assert verdict.order is not None
    assert verdict.order.algo_id == ALGO_ID
    assert verdict.order.client_algo_id == CLIENT_ID
    assert verdict.order.symbol == "BNBUSDT"
    assert verdict.order.create_time_ms == 1750485492076
    assert verdict.order.actual_order_id is None


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Reply(400, refusal(-2011, "Unknown\n order sent.")), (400, -2011, "Unknown  order sent.")),
        (Failure(True, "ReadTimeout\n"), (None, None, "ReadTimeout")),
        (Reply(202, b"", challenge=True), (202, None, "challenge by the firewall")),
        (Reply(405, b"Human?", challenge=True), (405, None, "Human?")),
    ],
)
def test_an_answer_is_quoted(answer: Reply | Failure, told: tuple[int | None, int | None, str]) -> None:
    """Status, code and words of the exchange, or a failure's name, stand in the verdict, and so in the record, fit for
    a log; an empty challenge is explained."""
    verdict = classify(Call.CANCEL, BY_ALGO_ID, answer)
    assert (verdict.http, verdict.code, verdict.msg) == told


# ---- total ----------------------------------------------------------------------------------------------------------

_WORDS = st.lists(st.sampled_from("NEW200-é\n\x00\ud800 .币"), max_size=8).map("".join)
_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | _WORDS | st.lists(st.integers(), max_size=2)
_BODIES = (
    st.binary(max_size=40)
    | st.dictionaries(st.sampled_from(("code", "msg", "algoId", "algoStatus", "createTime")), _VALUES).map(
        lambda body: json.dumps(body).encode()
    )
    | st.sampled_from(("code", "msg", "algoId", "clientAlgoId", "algoStatus", "actualOrderId", "createTime")).flatmap(
        lambda name: _VALUES.map(lambda value: json.dumps(CONFIRMATION | ORDER | {name: value}).encode())
    )
)
_REPLIES = st.builds(
    Reply,
    http=st.integers(100, 599) | st.sampled_from((200, 400, 503)),
    body=_BODIES,
    retry_after_ms=st.none() | st.integers(0, 10**7),
    challenge=st.booleans(),
    truncated=st.booleans(),
)
_FAILURES = st.builds(Failure, st.booleans(), _WORDS.map(lambda words: words * 40))


@PROFILE
@given(st.sampled_from(Call), st.sampled_from((BY_ALGO_ID, BY_CLIENT_ID)), _REPLIES | _FAILURES)
def test_any_answer_gets_a_verdict(call: Call, ref: OrderRef, answer: Reply | Failure) -> None:
    """Nothing that arrives can break the decision, and only a 200 about our order can confirm or show a state."""
    verdict = classify(call, ref, answer)
    assert clean_text(verdict.msg) == verdict.msg
    assert len(verdict.msg) <= MAX_MSG_CHARS
    assert verdict.http == (answer.http if isinstance(answer, Reply) else None)
    assert verdict.code is None or -(2**63) < verdict.code < 2**63
    if verdict.order is not None:
        assert verdict.http == 200
        assert verdict.order.algo_id == ALGO_ID or ref.algo_id is None
    if verdict.means in (Means.CONFIRMED, *set(STATES.values())):
        assert verdict.order is not None
        assert (verdict.means is Means.CONFIRMED) is (call is Call.CANCEL)


@pytest.mark.parametrize("quoted", ["signature=%s", "&signature=%s HTTP/1.1", 'signature": "%s"', "Signature%%3D%s"])
def test_an_answer_that_quotes_the_request_tells_no_signature(quoted: str) -> None:
    """An edge may show the request that it refuses: what is recorded of that has no signature."""
    secret = "3c661234138461fcc7a7d8746c6558c9842d4e10870d2ecbedf7777cad694af9"
    page = f"<p>DELETE /fapi/v1/algoOrder?algoId=7&{quoted % secret}</p>"
    answers = [Reply(502, page.encode()), Reply(400, json.dumps({"code": -1000, "msg": page}).encode())]

    for answer in answers:
        verdict = classify(Call.CANCEL, OrderRef(7), answer)
        assert secret[:16] not in verdict.msg
        assert "algoId=7" in verdict.msg


@pytest.mark.parametrize("key", ["Kd" * 32, "short-key"])
def test_an_answer_that_quotes_the_key_is_told_without_it(key: str) -> None:
    """Neither a page that shows the request's fields nor a refusal that names the key brings it into a record."""
    quoting = f"Invalid API-key {key}, IP, or permissions; X-MBX-APIKEY: {key}"
    answers = [
        Reply(502, f"<pre>{quoting}</pre>".encode(), api_key=key),
        Reply(401, json.dumps({"code": -2015, "msg": quoting}).encode(), api_key=key),
        Reply(200, json.dumps([quoting]).encode(), api_key=key),
    ]

    for answer in answers:
        verdict = classify(Call.CANCEL, OrderRef(7), answer)
        assert key not in verdict.msg
        assert "Invalid API-key ***" in verdict.msg
