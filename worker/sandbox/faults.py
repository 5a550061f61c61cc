"""What can go wrong between a cancel and its answer, as data.

A fault is a row: what happens to the order, what the exchange answers
and how that answer travels. The rows follow exchange.md 4.1 and 4.2 and what has been seen on the wire.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum, auto


class Call(StrEnum):
    """The calls that a canceller makes about an order, and about the child that a triggered one has become."""

    CANCEL = "cancel"  # DELETE /fapi/v1/algoOrder
    QUERY = "query"  # GET /fapi/v1/algoOrder
    CANCEL_CHILD = "cancel_child"  # DELETE /fapi/v1/order
    QUERY_CHILD = "query_child"  # GET /fapi/v1/order

    @property
    def cancels(self) -> bool:
        """Whether it is one of the DELETEs."""
        return self in CANCELS


class Effect(StrEnum):
    """What a DELETE that meets the fault does to its order or child; a GET never does anything."""

    NONE = auto()
    CANCEL = auto()
    CANCEL_LATER = auto()
    CANCEL_AND_REUSE_CLIENT_ID = auto()
    SOMEBODY_CANCELS = auto()
    EXPIRE = "EXPIRED"  # these three: as the status is called
    REJECT = "REJECTED"
    EXPIRE_IN_MATCH = "EXPIRED_IN_MATCH"
    FORGET = auto()
    HIDE = auto()  # from queries, until the next DELETE
    TRIGGER = auto()
    TRIGGER_AT_ONCE = auto()
    TRIGGER_STUCK = auto()
    TRIGGER_REJECTED = auto()
    FILL = auto()
    FILL_PART_AND_CANCEL = auto()


#: The effects by which the requested cancel is carried out, now or later.
EXECUTING = frozenset(
    {Effect.CANCEL, Effect.CANCEL_LATER, Effect.CANCEL_AND_REUSE_CLIENT_ID, Effect.FILL_PART_AND_CANCEL}
)


class Delivery(Enum):
    """How the answer travels."""

    WHOLE = auto()
    CLOSED = auto()  # no byte of it, the connection is closed
    RESET = auto()  # no byte of it, TCP reset
    LATE = auto()  # after FaultTiming.late_answer_ms
    HELD = auto()  # the request itself lies FaultTiming.late_execution_ms before anything is done
    CUT_SHORT = auto()  # half of the body that Content-Length announces, then closed
    DRIPPED = auto()  # byte by byte
    COMPRESSED = auto()  # with gzip, which nobody asked for
    HUGE = auto()  # padded beyond what a client should read
    WRONG_ID = auto()  # about another order
    UNDECIDED = auto()  # without the field that decides: code, or algoStatus
    UNKNOWN_STATUS = auto()  # with an algoStatus that nobody knows
    NOT_HTTP = auto()  # bytes that are no HTTP
    THEN_CLOSED = auto()  # whole and right, and then the connection is closed without notice


class Reach(Enum):
    """Which seeded plans may use the fault."""

    COMMON = auto()  # 'some' and 'all'
    RARE = auto()  # 'all'
    SCRIPTED = auto()  # none: a correct client stops for good, or waits for a person


_compact_json = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer. `from_edge`: made in front of the exchange, so it carries none of its headers."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    from_edge: bool = False

    @classmethod
    def of(cls, body: object, status: int = 200) -> Answer:
        """A JSON answer."""
        return cls(status, _compact_json(body).encode())

    @classmethod
    def error(cls, status: int, code: int, msg: str) -> Answer:
        """The exchange's error body."""
        return cls.of({"code": code, "msg": msg}, status)


def _page(status: int, title: str) -> Answer:
    html = f"<html><head><title>{title}</title></head><body><center><h1>{title}</h1></center></body></html>"
    return Answer(status, html.encode(), "text/html", (("Server", "CloudFront"),), from_edge=True)


UNKNOWN_ORDER = Answer.error(400, -2011, "Unknown order sent.")
NO_SUCH_ORDER = Answer.error(400, -2013, "Order does not exist.")
CLOCK_AHEAD = Answer.error(400, -1021, "Timestamp for this request was 1000ms ahead of the server's time.")
CLOCK_OUTSIDE = Answer.error(400, -1021, "Timestamp for this request is outside of the recvWindow.")
BAD_SIGNATURE = Answer.error(400, -1022, "Signature for this request is not valid.")
KEY_FORMAT = Answer.error(401, -2014, "API-key format invalid.")
KEY_REFUSED = Answer.error(401, -2015, "Invalid API-key, IP, or permissions for action.")

_TEXT_UNKNOWN = "Unknown error, please check your request or try again later."
_TEXT_UNAVAILABLE = "Service Unavailable."
_TEXT_INTERNAL = "Internal error; unable to process your request. Please try again."
_TEXT_THROTTLED = "Request throttled by system-level protection. Please try again."
_TEXT_TIMEOUT = "Timeout waiting for response from backend server. Send status unknown; execution status unknown."
_UNKNOWN_503 = Answer.error(503, -1000, _TEXT_UNKNOWN)

OF_CHILD = frozenset({Call.CANCEL_CHILD, Call.QUERY_CHILD})
CANCELS = frozenset({Call.CANCEL, Call.CANCEL_CHILD})
QUERIES = frozenset(Call) - CANCELS
BOTH = frozenset(Call)
PARENT = frozenset({Call.CANCEL})
CHILD = frozenset({Call.CANCEL_CHILD})


@dataclass(frozen=True, slots=True)
class FaultSpec:
    """One fault. Without an `answer` the exchange gives its own, true or, if nothing was done, as if it had been."""

    meaning: str
    answer: Answer | None = None
    calls: frozenset[Call] = BOTH
    effect: Effect = Effect.NONE
    delivery: Delivery = Delivery.WHOLE
    reach: Reach = Reach.RARE
    gates: bool = False  # starts an incident: every request from the IP gets this answer for a while
    pauses: bool = False  # a correct client pauses all its requests, so that a run can bear only a few

    @property
    def executes(self) -> bool:
        """Whether a DELETE that meets the fault cancels its order, at once or later."""
        return self.effect in EXECUTING


class Fault(StrEnum):
    """Every fault; `SPECS` says what each one means. `X_EXECUTED` is `X` after the order was cancelled."""

    DROP_BEFORE = "drop_before"
    DROP_AFTER = "drop_after"
    RESET_BEFORE = "reset_before"
    RESET_AFTER = "reset_after"
    ANSWER_LATE = "answer_late"
    EXECUTE_LATE = "execute_late"
    EXECUTE_AFTER_503 = "execute_after_503"
    EXECUTE_AFTER_DROP = "execute_after_drop"
    BODY_CUT = "body_cut"
    BODY_CUT_EXECUTED = "body_cut_executed"
    DRIP = "drip"
    HUGE_BODY = "huge_body"
    GZIP = "gzip"
    NOT_HTTP = "not_http"
    CLOSE_AFTER_ANSWER = "close_after_answer"

    EMPTY_200 = "empty_200"
    EMPTY_200_EXECUTED = "empty_200_executed"
    HTML_200 = "html_200"
    HTML_200_EXECUTED = "html_200_executed"
    NO_CODE_200 = "no_code_200"
    NO_CODE_200_EXECUTED = "no_code_200_executed"
    WRONG_ID_200 = "wrong_id_200"
    WRONG_ID_200_EXECUTED = "wrong_id_200_executed"
    DEEP_JSON_200 = "deep_json_200"
    UNKNOWN_STATUS_200 = "unknown_status_200"
    REDIRECT_302 = "redirect_302"

    CHALLENGE_202 = "challenge_202"
    FORBIDDEN_403 = "forbidden_403"
    BANNED_418 = "banned_418"
    LIMITED_429 = "limited_429"
    LIMITED_1003 = "limited_1003"

    TIMEOUT_408 = "timeout_408"
    TIMEOUT_408_EXECUTED = "timeout_408_executed"
    HTML_500 = "html_500"
    HTML_500_EXECUTED = "html_500_executed"
    RETRY_500 = "retry_500"
    RETRY_500_EXECUTED = "retry_500_executed"
    BAD_GATEWAY_502 = "bad_gateway_502"
    BAD_GATEWAY_502_EXECUTED = "bad_gateway_502_executed"
    UNKNOWN_503 = "unknown_503"
    UNKNOWN_503_EXECUTED = "unknown_503_executed"
    UNAVAILABLE_503 = "unavailable_503"
    INTERNAL_503 = "internal_503"
    THROTTLED_503 = "throttled_503"
    RETRY_AFTER_503 = "retry_after_503"
    GATEWAY_TIMEOUT_504 = "gateway_timeout_504"
    GATEWAY_TIMEOUT_504_EXECUTED = "gateway_timeout_504_executed"

    UNKNOWN_1000 = "unknown_1000"
    UNKNOWN_1000_EXECUTED = "unknown_1000_executed"
    DISCONNECTED_1001 = "disconnected_1001"
    DISCONNECTED_1001_UNKNOWN = "disconnected_1001_unknown"
    DISCONNECTED_1001_UNKNOWN_EXECUTED = "disconnected_1001_unknown_executed"
    UNEXPECTED_1006 = "unexpected_1006"
    UNEXPECTED_1006_EXECUTED = "unexpected_1006_executed"
    TIMEOUT_1007 = "timeout_1007"
    TIMEOUT_1007_EXECUTED = "timeout_1007_executed"
    THROTTLED_1008 = "throttled_1008"
    MESSAGE_1010 = "message_1010"
    MESSAGE_1010_EXECUTED = "message_1010_executed"
    TOO_MANY_ORDERS_1015 = "too_many_orders_1015"
    SHUTTING_DOWN_1016 = "shutting_down_1016"
    AHEAD_1021 = "ahead_1021"
    OUTSIDE_1021 = "outside_1021"
    WINDOW_5028 = "window_5028"
    ALGO_20124 = "algo_20124"
    UNLISTED_CODE = "unlisted_code"
    UNLISTED_CODE_EXECUTED = "unlisted_code_executed"

    FALSE_2011 = "false_2011"
    OTHER_TEXT_2011 = "other_text_2011"
    NOT_FOUND_2013 = "not_found_2013"
    MAINTENANCE_2011 = "maintenance_2011"
    FORGOTTEN = "forgotten"
    LATE_BOOK = "late_book"
    FALSE_4117 = "false_4117"
    TRIGGER_4117 = "trigger_4117"
    TRIGGER_2011 = "trigger_2011"
    TRIGGER_503 = "trigger_503"
    TRIGGER_REJECTED = "trigger_rejected"
    TRIGGER_STUCK = "trigger_stuck"
    TRIGGERED_BEFORE = "triggered_before"
    CANCELLED_BEFORE = "cancelled_before"
    EXPIRED_BEFORE = "expired_before"
    REJECTED_BEFORE = "rejected_before"
    CLIENT_ID_REUSED = "client_id_reused"
    FILLED_BEFORE = "filled_before"
    PARTLY_FILLED_BEFORE = "partly_filled_before"
    MATCH_EXPIRED_BEFORE = "match_expired_before"

    PATH_404 = "path_404"
    METHOD_405 = "method_405"
    REGION_451 = "region_451"
    UNAUTHORIZED_1002 = "unauthorized_1002"
    IP_1004 = "ip_1004"
    INVALID_1013 = "invalid_1013"
    UNSUPPORTED_1020 = "unsupported_1020"
    SIGNATURE_1022 = "signature_1022"
    NOT_FOUND_1099 = "not_found_1099"
    CHARACTERS_1100 = "characters_1100"
    MISSING_1102 = "missing_1102"
    DISABLED_2011 = "disabled_2011"
    ACCOUNT_2011 = "account_2011"
    SYMBOL_2011 = "symbol_2011"
    RESTRICTED_2011 = "restricted_2011"
    KEY_ID_2008 = "key_id_2008"
    KEY_FORMAT_2014 = "key_format_2014"
    KEY_2015 = "key_2015"
    KEY_LOCKED_2017 = "key_locked_2017"
    CLIENT_ID_4015 = "client_id_4015"
    KEY_TYPE_4056 = "key_type_4056"
    METHOD_4084 = "method_4084"
    INACTIVE_4109 = "inactive_4109"
    QUANTITATIVE_4400 = "quantitative_4400"

    @property
    def spec(self) -> FaultSpec:
        """The fault's row."""
        return SPECS[self]


def _code(code: int, msg: str, meaning: str, reach: Reach = Reach.RARE, status: int = 400) -> FaultSpec:
    """A refusal with the exchange's own error body; nothing is done."""
    return FaultSpec(f"{status} {code}: {meaning}", Answer.error(status, code, msg), reach=reach)


def _gate(meaning: str, answer: Answer, reach: Reach = Reach.RARE) -> FaultSpec:
    return FaultSpec(meaning, answer, reach=reach, gates=True, pauses=True)


def _on_cancel(
    meaning: str,
    effect: Effect,
    answer: Answer | None = UNKNOWN_ORDER,
    reach: Reach = Reach.RARE,
    calls: frozenset[Call] = CANCELS,
) -> FaultSpec:
    """Something happens to the order around the time of its DELETE."""
    return FaultSpec(meaning, answer, calls, effect, reach=reach)


def _on_parent(
    meaning: str, effect: Effect, answer: Answer | None = UNKNOWN_ORDER, reach: Reach = Reach.RARE
) -> FaultSpec:
    return _on_cancel(meaning, effect, answer, reach, PARENT)


def _on_child(meaning: str, effect: Effect, answer: Answer | None = UNKNOWN_ORDER) -> FaultSpec:
    return _on_cancel(meaning, effect, answer, Reach.COMMON, CHILD)


_CONNECTION = {
    Fault.DROP_BEFORE: FaultSpec(
        "closed without an answer, nothing done", delivery=Delivery.CLOSED, reach=Reach.COMMON
    ),
    Fault.DROP_AFTER: FaultSpec(
        "cancelled, then closed without an answer", None, CANCELS, Effect.CANCEL, Delivery.CLOSED, Reach.COMMON
    ),
    Fault.RESET_BEFORE: FaultSpec("TCP reset, nothing done", delivery=Delivery.RESET, reach=Reach.COMMON),
    Fault.RESET_AFTER: FaultSpec(
        "cancelled, then TCP reset", None, CANCELS, Effect.CANCEL, Delivery.RESET, Reach.COMMON
    ),
    Fault.ANSWER_LATE: FaultSpec(
        "done at once, answered after the client's patience", effect=Effect.CANCEL, delivery=Delivery.LATE
    ),
    Fault.EXECUTE_LATE: FaultSpec(
        "neither done nor answered for a while", None, CANCELS, Effect.CANCEL, Delivery.HELD, Reach.COMMON
    ),
    Fault.EXECUTE_AFTER_503: _on_cancel("503 that leaves it open, cancelled later", Effect.CANCEL_LATER, _UNKNOWN_503),
    Fault.EXECUTE_AFTER_DROP: FaultSpec(
        "closed without an answer, cancelled later", None, CANCELS, Effect.CANCEL_LATER, Delivery.CLOSED
    ),
    Fault.BODY_CUT: FaultSpec("half of a good answer, nothing done", delivery=Delivery.CUT_SHORT),
    Fault.DRIP: FaultSpec("done, answered byte by byte", effect=Effect.CANCEL, delivery=Delivery.DRIPPED),
    Fault.HUGE_BODY: FaultSpec("done, answer beyond 64 KiB", effect=Effect.CANCEL, delivery=Delivery.HUGE),
    Fault.GZIP: FaultSpec("done, answer compressed", effect=Effect.CANCEL, delivery=Delivery.COMPRESSED),
    Fault.NOT_HTTP: FaultSpec("bytes that are no HTTP, nothing done", delivery=Delivery.NOT_HTTP),
    Fault.CLOSE_AFTER_ANSWER: FaultSpec(
        "done and answered, then closed without notice",
        effect=Effect.CANCEL,
        delivery=Delivery.THEN_CLOSED,
        reach=Reach.COMMON,
    ),
}

_SUCCESS_STATUS = {
    Fault.EMPTY_200: FaultSpec("200 without a body, nothing done", Answer(200, from_edge=True)),
    Fault.HTML_200: FaultSpec("200 with HTML, nothing done", _page(200, "Please wait")),
    Fault.NO_CODE_200: FaultSpec("200 that says neither code nor status, nothing done", delivery=Delivery.UNDECIDED),
    Fault.WRONG_ID_200: FaultSpec("200 about another order, nothing done", delivery=Delivery.WRONG_ID),
    Fault.DEEP_JSON_200: FaultSpec(
        "200 nested deeper than a parser's stack, nothing done", Answer(200, b"[" * 20_000 + b"]" * 20_000)
    ),
    Fault.UNKNOWN_STATUS_200: FaultSpec(
        "a state that is not in the documents", calls=QUERIES, delivery=Delivery.UNKNOWN_STATUS
    ),
    Fault.REDIRECT_302: FaultSpec(
        "redirect to another path, nothing done",
        Answer(302, headers=(("Location", "/redirected/algoOrder"),), from_edge=True),
    ),
}

_PAUSES = {
    Fault.CHALLENGE_202: _gate(
        "202 without a body: the firewall wants a browser's proof",
        Answer(202, headers=(("x-amzn-waf-action", "challenge"),), from_edge=True),
    ),
    Fault.FORBIDDEN_403: _gate("403 HTML: the firewall blocks the IP", _page(403, "403 ERROR")),
    Fault.BANNED_418: _gate(
        "418: the IP is banned until the time in the text", Answer.error(418, -1003, "Way too many requests.")
    ),
    Fault.LIMITED_429: _gate(
        "429 with Retry-After", Answer.error(429, -1003, "Too many requests; please slow down."), Reach.COMMON
    ),
    Fault.LIMITED_1003: FaultSpec(
        "400 -1003: slow down, without a 429, nothing done",
        replace(Answer.error(400, -1003, "Too many requests queued."), headers=(("Retry-After", "1"),)),
        pauses=True,
    ),
}

_SERVER_SIDE = {
    Fault.TIMEOUT_408: _code(-1007, _TEXT_TIMEOUT, "the backend did not answer in time", status=408),
    Fault.HTML_500: FaultSpec("500 HTML, nothing done", _page(500, "500 Internal Server Error")),
    Fault.RETRY_500: _code(-1000, "Request occur unknown error.", "retry later", status=500),
    Fault.BAD_GATEWAY_502: FaultSpec("502 HTML, nothing done", _page(502, "502 Bad Gateway"), reach=Reach.COMMON),
    Fault.UNKNOWN_503: FaultSpec("503 whose text leaves it open, nothing done", _UNKNOWN_503, reach=Reach.COMMON),
    Fault.UNAVAILABLE_503: _code(-1001, _TEXT_UNAVAILABLE, "service unavailable, a failure", Reach.COMMON, 503),
    Fault.INTERNAL_503: _code(-1001, _TEXT_INTERNAL, "internal error, a failure", Reach.COMMON, 503),
    Fault.THROTTLED_503: _code(-1008, _TEXT_THROTTLED, "overload protection", status=503),
    Fault.RETRY_AFTER_503: FaultSpec(
        "503 with Retry-After, a failure",
        replace(Answer.error(503, -1001, _TEXT_UNAVAILABLE), headers=(("Retry-After", "1"),)),
    ),
    Fault.GATEWAY_TIMEOUT_504: FaultSpec(
        "504 HTML, nothing done", _page(504, "504 Gateway Time-out"), reach=Reach.COMMON
    ),
}

_CODES = {
    Fault.UNKNOWN_1000: _code(-1000, "An unknown error occurred while processing the request.", "leaves it open"),
    Fault.DISCONNECTED_1001: _code(-1001, _TEXT_INTERNAL, "by this text, not done"),
    Fault.DISCONNECTED_1001_UNKNOWN: _code(-1001, _TEXT_UNKNOWN, "by this text, left open"),
    Fault.UNEXPECTED_1006: _code(-1006, "An unexpected response was received. Execution status unknown.", "left open"),
    Fault.TIMEOUT_1007: _code(-1007, _TEXT_TIMEOUT, "left open", Reach.COMMON),
    Fault.THROTTLED_1008: _code(-1008, _TEXT_THROTTLED, "overload protection"),
    Fault.MESSAGE_1010: _code(-1010, "ERROR_MSG_RECEIVED.", "says nothing, left open"),
    Fault.TOO_MANY_ORDERS_1015: _code(-1015, "Too many new orders.", "order limit"),
    Fault.SHUTTING_DOWN_1016: _code(-1016, "This service is no longer available.", "maintenance"),
    Fault.AHEAD_1021: FaultSpec("-1021: the clock is ahead, nothing done", CLOCK_AHEAD, reach=Reach.COMMON),
    Fault.OUTSIDE_1021: FaultSpec("-1021: the request came too late, nothing done", CLOCK_OUTSIDE, reach=Reach.COMMON),
    Fault.WINDOW_5028: _code(-5028, "Timestamp for this request is outside of the ME recvWindow.", "late for matching"),
    Fault.ALGO_20124: _code(-20124, "Algo order not found or already completed.", "decides nothing"),
    Fault.UNLISTED_CODE: _code(-7999, "Something that is in no document.", "an unlisted code, left open"),
}

_ORDER_STATES = {
    Fault.FALSE_2011: _on_cancel("-2011 about an order that stays NEW", Effect.NONE, reach=Reach.COMMON),
    Fault.OTHER_TEXT_2011: _on_cancel(
        "-2011 with a new text, nothing done", Effect.NONE, Answer.error(400, -2011, "Cancel is not possible now.")
    ),
    Fault.NOT_FOUND_2013: FaultSpec("-2013 about an order that exists, nothing done", NO_SUCH_ORDER),
    Fault.MAINTENANCE_2011: _code(-2011, "Rest API trading is not enabled.", "maintenance"),
    Fault.LATE_BOOK: _on_cancel(
        "-2011, and unknown to queries until the next DELETE", Effect.HIDE, reach=Reach.SCRIPTED
    ),
    Fault.FORGOTTEN: _on_cancel("the order is unknown to every call for a while", Effect.FORGET),
    Fault.FALSE_4117: _on_parent(
        "-4117 about an order that stays NEW", Effect.NONE, Answer.error(400, -4117, "Stop order is triggering.")
    ),
    Fault.TRIGGER_4117: _on_parent(
        "-4117: the order triggers", Effect.TRIGGER, Answer.error(400, -4117, "Stop order is triggering.")
    ),
    Fault.TRIGGER_2011: _on_parent("-2011: the order triggers", Effect.TRIGGER, reach=Reach.COMMON),
    Fault.TRIGGER_503: _on_parent("503 that leaves it open: the order triggers", Effect.TRIGGER, _UNKNOWN_503),
    Fault.TRIGGER_REJECTED: _on_parent("-2011: triggers, then refused by the engine", Effect.TRIGGER_REJECTED),
    Fault.TRIGGER_STUCK: _on_parent("-2011: TRIGGERING for ever", Effect.TRIGGER_STUCK, reach=Reach.SCRIPTED),
    Fault.TRIGGERED_BEFORE: _on_parent("-2011: triggered just before", Effect.TRIGGER_AT_ONCE),
    Fault.CANCELLED_BEFORE: _on_cancel(
        "-2011: cancelled by somebody else", Effect.SOMEBODY_CANCELS, reach=Reach.COMMON
    ),
    Fault.EXPIRED_BEFORE: _on_cancel("-2011: expired just before", Effect.EXPIRE, reach=Reach.COMMON),
    Fault.REJECTED_BEFORE: _on_cancel("-2011: rejected just before", Effect.REJECT),
    Fault.CLIENT_ID_REUSED: FaultSpec(
        "cancelled without an answer, and a new order bears the same client id",
        None,
        PARENT,
        Effect.CANCEL_AND_REUSE_CLIENT_ID,
        Delivery.CLOSED,
    ),
    Fault.FILLED_BEFORE: _on_child("-2011: the child was filled just before", Effect.FILL),
    Fault.PARTLY_FILLED_BEFORE: _on_child(
        "a half of the child is filled, the rest cancelled", Effect.FILL_PART_AND_CANCEL, None
    ),
    Fault.MATCH_EXPIRED_BEFORE: _on_child("-2011: the child expired in match", Effect.EXPIRE_IN_MATCH),
}

_EDGE = {
    Fault.PATH_404: FaultSpec("404 HTML: the edge does not know the path", _page(404, "404 Not Found")),
    Fault.METHOD_405: FaultSpec("405 HTML: the edge does not know the method", _page(405, "405 Not Allowed")),
    Fault.REGION_451: FaultSpec(
        "451: the edge refuses the region",
        Answer.error(451, 0, "Service unavailable from a restricted location."),
        pauses=True,
    ),
}

_FINAL = Reach.SCRIPTED
_PERMANENT = {
    Fault.UNAUTHORIZED_1002: _code(-1002, "You are not authorized to execute this request.", "key", _FINAL, 401),
    Fault.IP_1004: _code(-1004, "This IP is not on the whitelist.", "address", _FINAL),
    Fault.INVALID_1013: _code(-1013, "Invalid message.", "request", _FINAL),
    Fault.UNSUPPORTED_1020: _code(-1020, "This operation is not supported.", "request", _FINAL),
    Fault.SIGNATURE_1022: FaultSpec("-1022: signature refused", BAD_SIGNATURE, reach=_FINAL),
    Fault.NOT_FOUND_1099: _code(-1099, "Not found, unauthenticated, or unauthorized.", "key", _FINAL),
    Fault.CHARACTERS_1100: _code(-1100, "Illegal characters found in parameter 'algoId'.", "parameter", _FINAL),
    Fault.MISSING_1102: _code(-1102, "Mandatory parameter 'algoId' was not sent.", "parameter", _FINAL),
    Fault.DISABLED_2011: _code(-2011, "This action is disabled on this account.", "cancelling is disabled", _FINAL),
    Fault.ACCOUNT_2011: _code(-2011, "This account may not place or cancel orders.", "account barred", _FINAL),
    Fault.SYMBOL_2011: _code(-2011, "This symbol is not permitted for this account.", "symbol barred", _FINAL),
    Fault.RESTRICTED_2011: _code(-2011, "Order was not canceled due to cancel restrictions.", "restricted", _FINAL),
    Fault.KEY_ID_2008: _code(-2008, "Invalid Api-Key ID.", "key", _FINAL, 401),
    Fault.KEY_FORMAT_2014: FaultSpec("-2014: malformed key", KEY_FORMAT, reach=_FINAL),
    Fault.KEY_2015: FaultSpec("-2015: key, address or permission refused", KEY_REFUSED, reach=_FINAL),
    Fault.KEY_LOCKED_2017: _code(-2017, "API Keys are locked on this account.", "key", _FINAL, 401),
    Fault.CLIENT_ID_4015: _code(-4015, "Client order id is not valid.", "parameter", _FINAL),
    Fault.KEY_TYPE_4056: _code(-4056, "Invalid API key type.", "key", _FINAL),
    Fault.METHOD_4084: _code(-4084, "Method is not allowed currently.", "account", _FINAL),
    Fault.INACTIVE_4109: _code(-4109, "This account is inactive.", "account", _FINAL),
    Fault.QUANTITATIVE_4400: _code(-4400, "Futures Trading Quantitative Rules violated.", "account", _FINAL),
}


def _executed_twins(specs: dict[Fault, FaultSpec]) -> dict[Fault, FaultSpec]:
    twins = {}
    for fault in Fault:
        if fault.endswith("_executed"):
            base = specs[Fault(fault.removesuffix("_executed"))]
            meaning = base.meaning.removesuffix(", nothing done") + ", after cancelling"
            twins[fault] = replace(base, meaning=meaning, calls=CANCELS, effect=Effect.CANCEL)
    return twins


_WRITTEN = {
    **_CONNECTION,
    **_SUCCESS_STATUS,
    **_PAUSES,
    **_SERVER_SIDE,
    **_CODES,
    **_ORDER_STATES,
    **_EDGE,
    **_PERMANENT,
}
SPECS: dict[Fault, FaultSpec] = {**_WRITTEN, **_executed_twins(_WRITTEN)}


@dataclass(frozen=True, slots=True)
class FaultSet:
    """What a seeded plan draws from: faults of single calls, and incidents that stop a whole IP."""

    faults: tuple[Fault, ...] = ()
    incidents: tuple[Fault, ...] = ()
    _by_call: dict[Call, tuple[Fault, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_call = {call: tuple(fault for fault in self.faults if call in fault.spec.calls) for call in Call}
        object.__setattr__(self, "_by_call", by_call)

    def for_call(self, call: Call) -> tuple[Fault, ...]:
        """The faults that this call can meet."""
        return self._by_call[call]


def _set(*reaches: Reach) -> FaultSet:
    wanted = [fault for fault in Fault if fault.spec.reach in reaches]
    return FaultSet(
        tuple(fault for fault in wanted if not fault.spec.pauses), tuple(fault for fault in wanted if fault.spec.pauses)
    )


#: 'all' holds every fault from which a correct client gets to a definite outcome; final refusals are only scripted.
FAULT_SETS = {"none": FaultSet(), "some": _set(Reach.COMMON), "all": _set(Reach.COMMON, Reach.RARE)}


@dataclass(frozen=True, slots=True)
class FaultTiming:
    """How long faults last, so that a run can be scaled to a client with other time-outs."""

    late_answer_ms: int = 5_000  # beyond the 4 s that a client with recvWindow 5000 waits
    late_execution_ms: int = 1_000
    forgotten_ms: int = 1_500
    triggering_ms: int = 10  # seen live (exchange.md 1.5)
    finished_after_ms: int | None = 1_000  # then the child is filled; None: it rests
    child_id_lag_ms: int = 0  # after TRIGGERED the order names no child, and calls for it do not find it, for so long
    child_lag_ms: int = 0
    retry_after_s: int = 1
    ban_s: int = 2
    firewall_ms: int = 1_000
    ban_after_ms: int = 5_000  # a 429 that is ignored for so long becomes a ban
    drip_interval_ms: int = 50
    huge_body_bytes: int = 70_000

    def __post_init__(self) -> None:
        """Raises ValueError for a negative time, or for a whole-second one below a second."""
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            lowest = 1 if name.endswith("_s") else 0
            if value is not None and value < lowest:
                raise ValueError(f"{name} must be at least {lowest}, not {value}")

    def scaled(self, factor: float) -> FaultTiming:
        """The same with every time multiplied; whole-second ones stay at least a second."""

        def times(value: int, lowest: int = 0) -> int:
            return max(lowest, round(value * factor))

        return FaultTiming(
            late_answer_ms=times(self.late_answer_ms),
            late_execution_ms=times(self.late_execution_ms),
            forgotten_ms=times(self.forgotten_ms),
            triggering_ms=times(self.triggering_ms),
            finished_after_ms=None if self.finished_after_ms is None else times(self.finished_after_ms),
            child_id_lag_ms=times(self.child_id_lag_ms),
            child_lag_ms=times(self.child_lag_ms),
            retry_after_s=times(self.retry_after_s, 1),
            ban_s=times(self.ban_s, 1),
            firewall_ms=times(self.firewall_ms),
            ban_after_ms=times(self.ban_after_ms),
            drip_interval_ms=times(self.drip_interval_ms, 1),
            huge_body_bytes=self.huge_body_bytes,
        )

    def incident_ms(self, fault: Fault) -> int:
        """How long the incident that this fault starts lasts."""
        if fault is Fault.LIMITED_429:
            return self.retry_after_s * 1_000
        return self.ban_s * 1_000 if fault is Fault.BANNED_418 else self.firewall_ms
