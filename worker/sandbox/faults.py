"""What can go wrong between a cancel and its answer, as data.

A fault is a row: what happens to the order, what the exchange answers and how that answer travels. The rows follow
exchange.md 4.1 and 4.2 and what has been seen on the wire.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto
from functools import partial
from typing import Literal, Self

from producer.message import Call


class Effect(StrEnum):
    """What a DELETE that meets the fault does to its order or child; a GET never does anything."""

    NONE = auto()
    CANCEL = auto()
    CANCEL_LATER = auto()
    CANCEL_AND_REUSE_CLIENT_ID = auto()
    SOMEBODY_CANCELS = "CANCELED"  # these four: as the status is called
    EXPIRE = "EXPIRED"
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


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer. `from_edge`: made in front of the exchange, so it carries none of its headers."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    from_edge: bool = False

    @classmethod
    def of(cls, body: object, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> Answer:
        """A JSON answer."""
        return cls(status, json.dumps(body, separators=(",", ":")).encode(), headers=headers)

    @classmethod
    def error(cls, code: int, msg: str, status: int = 400, headers: tuple[tuple[str, str], ...] = ()) -> Answer:
        """The exchange's error body."""
        return cls.of({"code": code, "msg": msg}, status, headers)


_error = Answer.error


def _page(status: int, title: str) -> Answer:
    html = f"<html><head><title>{title}</title></head><body><center><h1>{title}</h1></center></body></html>"
    return Answer(status, html.encode(), "text/html", (("Server", "CloudFront"),), from_edge=True)


UNKNOWN_ORDER = _error(-2011, "Unknown order sent.")
NO_SUCH_ORDER = _error(-2013, "Order does not exist.")
CLOCK_AHEAD = _error(-1021, "Timestamp for this request was 1000ms ahead of the server's time.")
CLOCK_OUTSIDE = _error(-1021, "Timestamp for this request is outside of the recvWindow.")
BAD_SIGNATURE = _error(-1022, "Signature for this request is not valid.")
KEY_FORMAT = _error(-2014, "API-key format invalid.", 401)
KEY_REFUSED = _error(-2015, "Invalid API-key, IP, or permissions for action.", 401)


_UNKNOWN = "Unknown error, please check your request or try again later."
_UNAVAILABLE = "Service Unavailable."
_INTERNAL = "Internal error; unable to process your request. Please try again."
_THROTTLED = "Request throttled by system-level protection. Please try again."
_TIMEOUT = "Timeout waiting for response from backend server. Send status unknown; execution status unknown."
_RETRY = (("Retry-After", "1"),)

CANCELS = frozenset({Call.CANCEL, Call.CANCEL_CHILD})
QUERIES = frozenset({Call.QUERY, Call.QUERY_CHILD})
ABOUT_ONE = CANCELS | QUERIES
ANY = frozenset(Call)
PARENT = frozenset({Call.CANCEL})
CHILD = frozenset({Call.CANCEL_CHILD})


#: Where a fault is known from: any network (NET), or exchange.md's tags: official documents (D), a client's source (C),
#: a live probe (P), reports (I), deduced (INFERRED); UNCONFIRMED where no source has this answer for this call.
Evidence = Literal["NET", "D", "C", "P", "I", "INFERRED", "UNCONFIRMED"]


@dataclass(frozen=True, slots=True)
class FaultSpec:
    """One fault. Without an `answer` the exchange gives its own, true or, if nothing was done, as if it had been."""

    evidence: Evidence
    answer: Answer | None
    calls: frozenset[Call]
    effect: Effect
    delivery: Delivery
    reach: Reach
    gates: bool  # starts an incident: every request from the IP gets this answer for a while
    pauses: bool  # a correct client pauses all its requests, so that a run can bear only a few

    @property
    def executes(self) -> bool:
        """Whether a DELETE that meets the fault cancels its order, at once or later."""
        cancelled = {Effect.CANCEL, Effect.CANCEL_LATER, Effect.CANCEL_AND_REUSE_CLIENT_ID}
        return self.effect in cancelled | {Effect.FILL_PART_AND_CANCEL}


_Row = tuple[str, FaultSpec]


def _row(
    reach: Reach,
    name: str,
    evidence: Evidence,
    answer: Answer | None = None,
    *,
    on: frozenset[Call] = ANY,
    does: Effect = Effect.NONE,
    how: Delivery = Delivery.WHOLE,
    gates: bool = False,
    pauses: bool = False,
) -> _Row:
    return name, FaultSpec(evidence, answer, on, does, how, reach, gates, pauses or gates)


_common, _rare, _scripted = (partial(_row, reach) for reach in (Reach.COMMON, Reach.RARE, Reach.SCRIPTED))


def _executed(row: _Row) -> _Row:
    """The same after the order was cancelled: an answer that leaves a cancel open comes both ways, so that guessing
    cannot pass."""
    return f"{row[0]}_executed", replace(row[1], calls=CANCELS, effect=Effect.CANCEL)


class Fault(StrEnum):
    """The table of all faults: name, where it is known from, answer, which calls meet it, what it does to the order
    (nothing, where the row does not say), and how the answer travels."""

    spec: FaultSpec

    def __new__(cls, name: str, *row: FaultSpec) -> Self:
        """One row; whoever looks a fault up gives its name alone."""
        fault = str.__new__(cls, name)
        fault._value_ = name
        (fault.spec,) = row
        return fault

    DROP_BEFORE = _common("drop_before", "NET", how=Delivery.CLOSED)
    DROP_AFTER = _common("drop_after", "NET", on=CANCELS, does=Effect.CANCEL, how=Delivery.CLOSED)
    RESET_BEFORE = _common("reset_before", "NET", how=Delivery.RESET)
    RESET_AFTER = _common("reset_after", "NET", on=CANCELS, does=Effect.CANCEL, how=Delivery.RESET)
    ANSWER_LATE = _rare("answer_late", "NET", does=Effect.CANCEL, how=Delivery.LATE)
    EXECUTE_LATE = _common("execute_late", "NET", on=CANCELS, does=Effect.CANCEL, how=Delivery.HELD)
    EXECUTE_AFTER_503 = _rare(
        "execute_after_503", "D", _error(-1000, _UNKNOWN, 503), on=CANCELS, does=Effect.CANCEL_LATER
    )
    EXECUTE_AFTER_DROP = _rare("execute_after_drop", "NET", on=CANCELS, does=Effect.CANCEL_LATER, how=Delivery.CLOSED)
    BODY_CUT = _rare("body_cut", "NET", how=Delivery.CUT_SHORT)
    BODY_CUT_EXECUTED = _executed(BODY_CUT)
    DRIP = _rare("drip", "NET", on=ABOUT_ONE, does=Effect.CANCEL, how=Delivery.DRIPPED)
    HUGE_BODY = _rare("huge_body", "NET", on=ABOUT_ONE, does=Effect.CANCEL, how=Delivery.HUGE)
    GZIP = _rare("gzip", "NET", does=Effect.CANCEL, how=Delivery.COMPRESSED)
    NOT_HTTP = _rare("not_http", "NET", how=Delivery.NOT_HTTP)
    CLOSE_AFTER_ANSWER = _common("close_after_answer", "NET", does=Effect.CANCEL, how=Delivery.THEN_CLOSED)

    # Answers of 200 and the like that do not say what they should; nothing is done.
    EMPTY_200 = _rare("empty_200", "C", Answer(200, from_edge=True))
    EMPTY_200_EXECUTED = _executed(EMPTY_200)
    HTML_200 = _rare("html_200", "C", _page(200, "Please wait"))
    HTML_200_EXECUTED = _executed(HTML_200)
    NO_CODE_200 = _rare("no_code_200", "INFERRED", on=ABOUT_ONE, how=Delivery.UNDECIDED)
    NO_CODE_200_EXECUTED = _executed(NO_CODE_200)
    WRONG_ID_200 = _rare("wrong_id_200", "INFERRED", on=ABOUT_ONE, how=Delivery.WRONG_ID)
    WRONG_ID_200_EXECUTED = _executed(WRONG_ID_200)
    DEEP_JSON_200 = _rare("deep_json_200", "INFERRED", Answer(200, b"[" * 20_000 + b"]" * 20_000))
    UNKNOWN_STATUS_200 = _rare("unknown_status_200", "INFERRED", on=QUERIES, how=Delivery.UNKNOWN_STATUS)
    REDIRECT_302 = _rare(
        "redirect_302", "INFERRED", Answer(302, headers=(("Location", "/redirected/algoOrder"),), from_edge=True)
    )

    # What stops an address: the firewall, a ban, a limit; -1003 without a 429 asks for a pause as well.
    CHALLENGE_202 = _rare(
        "challenge_202", "P", Answer(202, headers=(("x-amzn-waf-action", "challenge"),), from_edge=True), gates=True
    )
    FORBIDDEN_403 = _rare("forbidden_403", "D", _page(403, "403 ERROR"), gates=True)
    BANNED_418 = _rare("banned_418", "D", _error(-1003, "Way too many requests.", 418), gates=True)
    LIMITED_429 = _common("limited_429", "D", _error(-1003, "Too many requests; please slow down.", 429), gates=True)
    LIMITED_1003 = _rare("limited_1003", "D", _error(-1003, "Too many requests queued.", 400, _RETRY), pauses=True)

    # The server's side. Four texts of 503 mean two opposite things (exchange.md 4.1).
    TIMEOUT_408 = _rare("timeout_408", "D", _error(-1007, _TIMEOUT, 408))
    TIMEOUT_408_EXECUTED = _executed(TIMEOUT_408)
    HTML_500 = _rare("html_500", "I", _page(500, "500 Internal Server Error"))
    HTML_500_EXECUTED = _executed(HTML_500)
    RETRY_500 = _rare("retry_500", "D", _error(-1000, "Request occur unknown error.", 500))
    RETRY_500_EXECUTED = _executed(RETRY_500)
    BAD_GATEWAY_502 = _common("bad_gateway_502", "I", _page(502, "502 Bad Gateway"))
    BAD_GATEWAY_502_EXECUTED = _executed(BAD_GATEWAY_502)
    UNKNOWN_503 = _common("unknown_503", "D", _error(-1000, _UNKNOWN, 503))
    UNKNOWN_503_EXECUTED = _executed(UNKNOWN_503)
    UNAVAILABLE_503 = _common("unavailable_503", "D", _error(-1001, _UNAVAILABLE, 503))
    INTERNAL_503 = _common("internal_503", "D", _error(-1001, _INTERNAL, 503))
    THROTTLED_503 = _rare("throttled_503", "D", _error(-1008, _THROTTLED, 503))
    RETRY_AFTER_503 = _rare("retry_after_503", "INFERRED", _error(-1001, _UNAVAILABLE, 503, _RETRY))
    GATEWAY_TIMEOUT_504 = _common("gateway_timeout_504", "I", _page(504, "504 Gateway Time-out"))
    GATEWAY_TIMEOUT_504_EXECUTED = _executed(GATEWAY_TIMEOUT_504)

    # Codes with status 400; the two texts of -1001 mean opposite things, as those of 503.
    UNKNOWN_1000 = _rare("unknown_1000", "D", _error(-1000, "An unknown error occurred while processing the request."))
    UNKNOWN_1000_EXECUTED = _executed(UNKNOWN_1000)
    DISCONNECTED_1001 = _rare("disconnected_1001", "D", _error(-1001, _INTERNAL))
    DISCONNECTED_1001_UNKNOWN = _rare("disconnected_1001_unknown", "D", _error(-1001, _UNKNOWN))
    DISCONNECTED_1001_UNKNOWN_EXECUTED = _executed(DISCONNECTED_1001_UNKNOWN)
    UNEXPECTED_1006 = _rare(
        "unexpected_1006", "D", _error(-1006, "An unexpected response was received. Execution status unknown.")
    )
    UNEXPECTED_1006_EXECUTED = _executed(UNEXPECTED_1006)
    TIMEOUT_1007 = _common("timeout_1007", "D", _error(-1007, _TIMEOUT))
    TIMEOUT_1007_EXECUTED = _executed(TIMEOUT_1007)
    THROTTLED_1008 = _rare("throttled_1008", "D", _error(-1008, _THROTTLED))
    MESSAGE_1010 = _rare("message_1010", "D", _error(-1010, "ERROR_MSG_RECEIVED."))
    MESSAGE_1010_EXECUTED = _executed(MESSAGE_1010)
    TOO_MANY_ORDERS_1015 = _rare("too_many_orders_1015", "D", _error(-1015, "Too many new orders."))
    SHUTTING_DOWN_1016 = _rare("shutting_down_1016", "D", _error(-1016, "This service is no longer available."))
    AHEAD_1021 = _common("ahead_1021", "D", CLOCK_AHEAD)
    OUTSIDE_1021 = _common("outside_1021", "D", CLOCK_OUTSIDE)
    WINDOW_5028 = _rare(
        "window_5028", "D", _error(-5028, "Timestamp for this request is outside of the ME recvWindow.")
    )
    ALGO_20124 = _rare("algo_20124", "C", _error(-20124, "Algo order not found or already completed."), on=ABOUT_ONE)
    UNLISTED_CODE = _rare("unlisted_code", "INFERRED", _error(-7999, "Something that is in no document."))
    UNLISTED_CODE_EXECUTED = _executed(UNLISTED_CODE)

    # What an order can be found as: it stays, is forgotten, triggers, was ended by others, or has a namesake.
    FALSE_2011 = _common("false_2011", "I", UNKNOWN_ORDER, on=CANCELS)
    OTHER_TEXT_2011 = _rare("other_text_2011", "INFERRED", _error(-2011, "Cancel is not possible now."), on=CANCELS)
    NOT_FOUND_2013 = _rare("not_found_2013", "I", NO_SUCH_ORDER, on=ABOUT_ONE)
    MAINTENANCE_2011 = _rare("maintenance_2011", "I", _error(-2011, "Rest API trading is not enabled."))
    FORGOTTEN = _rare("forgotten", "I", UNKNOWN_ORDER, on=CANCELS, does=Effect.FORGET)
    LATE_BOOK = _scripted("late_book", "I", UNKNOWN_ORDER, on=CANCELS, does=Effect.HIDE)
    FALSE_4117 = _rare("false_4117", "INFERRED", _error(-4117, "Stop order is triggering."), on=PARENT)
    TRIGGER_4117 = _rare(
        "trigger_4117", "UNCONFIRMED", _error(-4117, "Stop order is triggering."), on=PARENT, does=Effect.TRIGGER
    )
    TRIGGER_2011 = _common("trigger_2011", "I", UNKNOWN_ORDER, on=PARENT, does=Effect.TRIGGER)
    TRIGGER_503 = _rare("trigger_503", "INFERRED", _error(-1000, _UNKNOWN, 503), on=PARENT, does=Effect.TRIGGER)
    TRIGGER_REJECTED = _rare("trigger_rejected", "D", UNKNOWN_ORDER, on=PARENT, does=Effect.TRIGGER_REJECTED)
    TRIGGER_STUCK = _scripted("trigger_stuck", "I", UNKNOWN_ORDER, on=PARENT, does=Effect.TRIGGER_STUCK)
    TRIGGERED_BEFORE = _rare("triggered_before", "I", UNKNOWN_ORDER, on=PARENT, does=Effect.TRIGGER_AT_ONCE)
    CANCELLED_BEFORE = _common("cancelled_before", "I", UNKNOWN_ORDER, on=CANCELS, does=Effect.SOMEBODY_CANCELS)
    EXPIRED_BEFORE = _common("expired_before", "UNCONFIRMED", UNKNOWN_ORDER, on=CANCELS, does=Effect.EXPIRE)
    REJECTED_BEFORE = _rare("rejected_before", "UNCONFIRMED", UNKNOWN_ORDER, on=CANCELS, does=Effect.REJECT)
    CLIENT_ID_REUSED = _rare(
        "client_id_reused", "D", on=PARENT, does=Effect.CANCEL_AND_REUSE_CLIENT_ID, how=Delivery.CLOSED
    )

    # What only a child can be found as.
    FILLED_BEFORE = _common("filled_before", "UNCONFIRMED", UNKNOWN_ORDER, on=CHILD, does=Effect.FILL)
    PARTLY_FILLED_BEFORE = _common("partly_filled_before", "INFERRED", on=CHILD, does=Effect.FILL_PART_AND_CANCEL)
    MATCH_EXPIRED_BEFORE = _common(
        "match_expired_before", "UNCONFIRMED", UNKNOWN_ORDER, on=CHILD, does=Effect.EXPIRE_IN_MATCH
    )

    # The edge, which knows nothing of orders.
    LOGIN_401 = _rare("login_401", "INFERRED", _page(401, "401 Authorization Required"))
    PATH_404 = _rare("path_404", "INFERRED", _page(404, "404 Not Found"))
    METHOD_405 = _rare("method_405", "INFERRED", _page(405, "405 Not Allowed"))
    REGION_451 = _rare(
        "region_451", "I", _error(0, "Service unavailable from a restricted location.", 451), pauses=True
    )

    # Refusals for good: of the request, the key, the account.
    UNAUTHORIZED_1002 = _scripted(
        "unauthorized_1002", "D", _error(-1002, "You are not authorized to execute this request.", 401)
    )
    IP_1004 = _scripted("ip_1004", "D", _error(-1004, "This IP is not on the whitelist."))
    INVALID_1013 = _scripted("invalid_1013", "D", _error(-1013, "Invalid message."))
    UNSUPPORTED_1020 = _scripted("unsupported_1020", "D", _error(-1020, "This operation is not supported."))
    SIGNATURE_1022 = _scripted("signature_1022", "D", BAD_SIGNATURE)
    NOT_FOUND_1099 = _scripted("not_found_1099", "D", _error(-1099, "Not found, unauthenticated, or unauthorized."))
    CHARACTERS_1100 = _scripted(
        "characters_1100", "D", _error(-1100, "Illegal characters found in parameter 'algoId'.")
    )
    MISSING_1102 = _scripted("missing_1102", "D", _error(-1102, "Mandatory parameter 'algoId' was not sent."))
    DISABLED_2011 = _scripted("disabled_2011", "C", _error(-2011, "This action is disabled on this account."))
    ACCOUNT_2011 = _scripted("account_2011", "C", _error(-2011, "This account may not place or cancel orders."))
    SYMBOL_2011 = _scripted("symbol_2011", "C", _error(-2011, "This symbol is not permitted for this account."))
    RESTRICTED_2011 = _scripted(
        "restricted_2011", "C", _error(-2011, "Order was not canceled due to cancel restrictions.")
    )
    KEY_ID_2008 = _scripted("key_id_2008", "I", _error(-2008, "Invalid Api-Key ID.", 401))
    KEY_FORMAT_2014 = _scripted("key_format_2014", "D", KEY_FORMAT)
    KEY_2015 = _scripted("key_2015", "D", KEY_REFUSED)
    KEY_LOCKED_2017 = _scripted("key_locked_2017", "D", _error(-2017, "API Keys are locked on this account.", 401))
    CLIENT_ID_4015 = _scripted("client_id_4015", "D", _error(-4015, "Client order id is not valid."))
    KEY_TYPE_4056 = _scripted("key_type_4056", "D", _error(-4056, "Invalid API key type."))
    METHOD_4084 = _scripted("method_4084", "UNCONFIRMED", _error(-4084, "Method is not allowed currently."))
    INACTIVE_4109 = _scripted("inactive_4109", "UNCONFIRMED", _error(-4109, "This account is inactive."))
    QUANTITATIVE_4400 = _scripted(
        "quantitative_4400", "UNCONFIRMED", _error(-4400, "Futures Trading Quantitative Rules violated.")
    )


@dataclass(frozen=True, slots=True)
class FaultSet:
    """What a seeded plan draws from: faults of single calls, and incidents that stop a whole IP."""

    faults: tuple[Fault, ...] = ()
    incidents: tuple[Fault, ...] = ()

    def for_call(self, call: Call) -> tuple[Fault, ...]:
        """The faults that this call can meet."""
        return tuple(fault for fault in self.faults if call in fault.spec.calls)


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

    def incident_ms(self, fault: Fault) -> int:
        """How long the incident that this fault starts lasts."""
        if fault is Fault.LIMITED_429:
            return self.retry_after_s * 1_000
        return self.ban_s * 1_000 if fault is Fault.BANNED_418 else self.firewall_ms
