"""What an answer of the exchange means: pure, total, by literal tables of its statuses, codes and texts.

:func:`classify` turns a reply or a failure into a :class:`Verdict`. The question behind every row is whether the
exchange can have *seen* and executed the call: an answer that leaves it open is UNCLEAR, whatever else it says.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from producer.message import CHILD_ENDED, Call
from producer.untrusted import clean_text


class Means(StrEnum):
    """What one answer, or the lack of one, means. The value stands in the record as the attempt's verdict."""

    # a cancel's answer
    CONFIRMED = "confirmed"  # the exchange says that it cancelled this very order
    TRIGGER_RACE = "trigger_race"  # not done: the order is being triggered right now
    # a query's answer: the order's state
    OPEN = "open"  # NEW
    CANCELED = "canceled"
    TRIGGERING = "triggering"
    TRIGGERED = "triggered"
    FINISHED = "finished"
    EXPIRED = "expired"
    REJECTED = "rejected"
    ODD_STATUS = "odd_status"  # a state that the exchange did not have when this was written
    # an answer about the order that a triggered one became (its child): open as above, confirmed as above, or
    ENDED = "ended"  # it rests no more
    # a listing's answer
    LISTED = "listed"  # the open orders of the symbol
    # either's
    NO_SUCH_ORDER = "no_such_order"  # not done, and no proof of anything: it must be asked again
    UNCLEAR = "unclear"  # a cancel may have been executed; a query told nothing
    NOT_SENT = "not_sent"  # no byte of it left
    BUSY = "busy"  # not done: overload, maintenance, or an edge that does not know the way
    CLOCK = "clock"  # not done: our timestamp was outside the window
    LIMITED = "limited"  # not done: too many requests from this address
    BLOCKED = "blocked"  # not done: the firewall or the edge in front of the exchange refuses this address
    DENIED = "denied"  # not done, and the same request will never be
    KEY_REFUSED = "key_refused"  # the same, for a reason that lies with the key


#: A query's answer by the state that it shows, in the exchange's spelling.
STATUS_MEANS: dict[str, Means] = {
    "NEW": Means.OPEN,
    "CANCELED": Means.CANCELED,
    "TRIGGERING": Means.TRIGGERING,
    "TRIGGERED": Means.TRIGGERED,
    "FINISHED": Means.FINISHED,
    "EXPIRED": Means.EXPIRED,
    "REJECTED": Means.REJECTED,
}
#: Verdicts that bring a pause for everybody on the address and count as no attempt.
GATED = frozenset({Means.LIMITED, Means.BLOCKED})
#: ... that repeating cannot change.
REFUSED = frozenset({Means.DENIED, Means.KEY_REFUSED})


@dataclass(frozen=True, slots=True)
class OrderRef:
    """Which order a call asks about. With both ids ``algo_id`` is sent: the client id was found to mean it."""

    algo_id: int | None
    client_algo_id: str | None = None


@dataclass(frozen=True, slots=True)
class ChildRef:
    """The order that a triggered one became, by the exchange's own words."""

    symbol: str
    order_id: int


@dataclass(frozen=True, slots=True)
class SymbolRef:
    """All conditional orders of a symbol."""

    symbol: str


#: Whatever a call can be about.
Ref = OrderRef | ChildRef | SymbolRef


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of the exchange, as far as a decision needs it."""

    http: int
    body: bytes
    retry_after_ms: int | None = None
    challenge: bool = False  # the firewall's challenge header was there
    truncated: bool = False  # the body was longer than we read
    api_key: str = field(default="", repr=False, compare=False)  # of the request: who quotes it is shown without it


@dataclass(frozen=True, slots=True)
class Failure:
    """No usable answer. ``seen``: whether a byte of the request may have reached the exchange."""

    seen: bool
    reason: str


@dataclass(frozen=True, slots=True)
class OrderView:
    """What an answer told about the order itself."""

    algo_id: int
    client_algo_id: str | None
    status: str
    symbol: str | None
    actual_order_id: str | None
    create_time_ms: int | None


@dataclass(frozen=True, slots=True)
class ChildView:
    """What an answer told about a child; None: it did not say. Amounts as the exchange writes them."""

    status: str
    executed_qty: str | None
    avg_price: str | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The meaning of one reply or failure."""

    means: Means
    http: int | None = None
    code: int | None = None
    msg: str = ""
    order: OrderView | None = None
    child: ChildView | None = None
    orders: tuple[OrderView, ...] = ()  # of a listing
    retry_after_ms: int | None = None
    banned_until_ms: int | None = None  # the exchange's clock, ms since the epoch


#: How the reason of a failure begins where a request left, or may have left, and no answer came.
NO_ANSWER = "no answer"
#: ... and the whole of it where nothing at all came back, for as long as was waited.
SILENCE = f"{NO_ANSWER}: TimeoutError"
#: Codes whose meaning does not hang on the text (exchange.md 4.2). What is not listed is UNCLEAR.
CODE_MEANS: dict[int, Means] = {
    -1000: Means.UNCLEAR,  # unknown
    -1002: Means.DENIED,  # unauthorized
    -1003: Means.LIMITED,  # too many requests; a ban's text holds its end
    -1004: Means.DENIED,  # this address is not on the key's list
    -1005: Means.DENIED,  # the same, older code
    -1006: Means.UNCLEAR,  # unexpected response, execution status unknown
    -1007: Means.UNCLEAR,  # timeout behind the gateway, execution status unknown
    -1008: Means.BUSY,  # throttled by system protection
    -1010: Means.UNCLEAR,  # error received, unexplained
    -1011: Means.DENIED,  # this address may not use the route
    -1013: Means.DENIED,  # invalid message
    -1014: Means.DENIED,  # unknown order composition
    -1015: Means.BUSY,  # too many orders
    -1016: Means.BUSY,  # service shutting down
    -1020: Means.DENIED,  # unsupported operation
    -1021: Means.CLOCK,  # timestamp outside the window, or ahead
    -1022: Means.KEY_REFUSED,  # invalid signature
    -1023: Means.DENIED,  # start after end
    -1099: Means.DENIED,  # not found, unauthenticated or unauthorized
    **dict.fromkeys(range(-1106, -1099), Means.DENIED),  # parameters: illegal, too many, missing, unread, empty
    **dict.fromkeys(range(-1127, -1107), Means.DENIED),  # parameters of other calls: asset, symbol, listen key
    -1128: Means.DENIED,  # combination of parameters
    -1130: Means.DENIED,  # value of a parameter
    -2008: Means.KEY_REFUSED,  # key's id
    -2013: Means.NO_SUCH_ORDER,
    -2014: Means.KEY_REFUSED,  # key's format
    -2015: Means.KEY_REFUSED,  # key, address or permission
    -2017: Means.KEY_REFUSED,  # keys locked
    -4015: Means.DENIED,  # client id
    -4056: Means.DENIED,  # key type
    -4057: Means.DENIED,  # RSA public key
    -4084: Means.DENIED,  # method not allowed yet
    -4088: Means.DENIED,  # account cannot place
    -4109: Means.DENIED,  # account inactive
    -4117: Means.TRIGGER_RACE,
    -4120: Means.DENIED,  # wrong endpoint
    -4192: Means.DENIED,  # cooling-off period
    -5028: Means.CLOCK,  # the matching engine's own window check
    -20124: Means.NO_SUCH_ORDER,  # algo id invalid or completed
}
#: Statuses that decide whatever the body says (exchange.md 4.1).
HTTP_MEANS: dict[int, Means] = {
    403: Means.BLOCKED,
    408: Means.UNCLEAR,
    418: Means.LIMITED,
    429: Means.LIMITED,
    451: Means.BLOCKED,  # where a network seems to be changes with an edge, and with a route
}
#: Statuses that say, where the body holds no listed code, that nothing was done: whoever knows none of the exchange's
#: codes is not the exchange, and what an edge says of a path or a login it says of no order and no key.
NOT_DONE_STATUSES = frozenset({401, 404, 405})
#: Most orders that a listing is believed to hold; the exchange allows 200 to be open (exchange.md 1.1).
MAX_LISTED = 1000
#: Codes that are believed in a 5xx answer; any other refusal from a failing server proves nothing.
_TRUSTED_IN_5XX = frozenset({-1003, -1008, -1016})
#: The whole texts, folded, by which a 503 or -1001 says that nothing was done.
NOT_DONE_TEXTS = frozenset({"service unavailable", "internal error; unable to process your request. please try again"})
#: Parts of the texts of -2011 that name the account or a permission, folded; any other text asks for a query.
_PERMANENT_2011 = (
    "action is disabled",
    "account may not",
    "symbol is not permitted",
    "symbol is restricted",
    "cancel restrictions",
)
#: Part of the text of -2010 and -2011 in maintenance, folded.
_MAINTENANCE = "trading is not enabled"
_AMOUNT = re.compile(r"[0-9]{1,20}(\.[0-9]{1,20})?")
#: Our bound may cut it off in the middle.
_SIGNATURE = re.compile(r"""(signature(?:["']?\s*[=:]\s*["']?|%3D))[\w%+/=-]+""", re.IGNORECASE)
_BAN_EPOCH = re.compile(r"banned until (\d{13})(?!\d)")


def classify(call: Call, ref: Ref, answer: Reply | Failure) -> Verdict:
    """What ``answer`` to ``call`` about ``ref`` means. Total: any answer gets a verdict (exchange.md 4.1, 4.2)."""
    if isinstance(answer, Failure):
        return Verdict(Means.UNCLEAR if answer.seen else Means.NOT_SENT, msg=clean_text(answer.reason))
    value = _json(answer)
    body = value if isinstance(value, dict) else None
    code, msg = _code_and_msg(answer, body)
    if answer.challenge:
        return Verdict(Means.BLOCKED, answer.http, code, msg or "challenge by the firewall")
    if 200 <= answer.http < 300:
        if isinstance(ref, ChildRef):
            return _classify_child(call, ref, answer, body, code, msg)
        if isinstance(ref, SymbolRef):
            return _classify_listing(ref, answer, value, code, msg)
        return _classify_success(call, ref, answer, body, code, msg)
    ban = _BAN_EPOCH.search(msg)
    return Verdict(
        means=_refusal(answer.http, code, msg),
        http=answer.http,
        code=code,
        msg=msg,
        retry_after_ms=answer.retry_after_ms,
        banned_until_ms=int(ban[1]) if ban else None,
    )


def _refusal(http: int, code: int | None, msg: str) -> Means:
    if http in HTTP_MEANS:
        return HTTP_MEANS[http]
    if http >= 500:
        return _server_error(http, code, msg)
    if code in (-2010, -2011) and _MAINTENANCE in msg.casefold():
        return Means.BUSY
    if code == -2011:
        text = msg.casefold()
        return Means.DENIED if any(part in text for part in _PERMANENT_2011) else Means.NO_SUCH_ORDER
    if code == -1001:
        return Means.BUSY if _folded(msg) in NOT_DONE_TEXTS else Means.UNCLEAR
    if code in CODE_MEANS:
        return CODE_MEANS[code]
    return Means.BUSY if http in NOT_DONE_STATUSES else Means.UNCLEAR


def _server_error(http: int, code: int | None, msg: str) -> Means:
    if code in _TRUSTED_IN_5XX:
        return CODE_MEANS[code]
    # Only a 503 is documented to say with these texts that nothing was done; HTML of a gateway is never equal to them.
    return Means.BUSY if http == 503 and _folded(msg) in NOT_DONE_TEXTS else Means.UNCLEAR


def _classify_success(
    call: Call, ref: OrderRef, answer: Reply, body: dict[str, Any] | None, code: int | None, msg: str
) -> Verdict:
    unclear = Verdict(Means.UNCLEAR, answer.http, code, msg)
    view = _order_view(body) if answer.http == 200 and body is not None else None
    if view is None or not _same_order(ref, view):
        return unclear
    if call is Call.CANCEL:
        return Verdict(Means.CONFIRMED, 200, code, msg, order=view) if code == 200 else unclear
    if not view.status:
        return unclear
    means = STATUS_MEANS.get(view.status, Means.ODD_STATUS)
    return Verdict(means, 200, code, clean_text(view.status), order=view)


def _classify_child(
    call: Call, ref: ChildRef, answer: Reply, body: dict[str, Any] | None, code: int | None, msg: str
) -> Verdict:
    """Both calls answer with the order itself, without a code (exchange.md 1.8). A state that nobody knows is a live
    one, and a cancel is confirmed by the state alone."""
    status = _text(body.get("status")) if body is not None and answer.http == 200 else None
    if (
        body is None
        or status is None
        or (_whole(body.get("orderId")), body.get("symbol")) != (ref.order_id, ref.symbol)
    ):
        return Verdict(Means.UNCLEAR, answer.http, code, msg)
    view = ChildView(status, _amount(body.get("executedQty")), _amount(body.get("avgPrice")))
    if call is Call.CANCEL_CHILD and status == "CANCELED":
        means = Means.CONFIRMED
    elif status in CHILD_ENDED:
        means = Means.ENDED
    else:
        means = Means.OPEN if call is Call.QUERY_CHILD else Means.UNCLEAR
    return Verdict(means, 200, code, status, child=view)


def _classify_listing(ref: SymbolRef, answer: Reply, value: object, code: int | None, msg: str) -> Verdict:
    """One entry that cannot be read, or is about another symbol, and the list proves nothing: an order that was open
    may be missing from it."""
    if isinstance(value, list) and len(value) <= MAX_LISTED and answer.http == 200:
        views = [view for row in value if isinstance(row, dict) and (view := _order_view(row))]
        if len(views) == len(value) and all(view.algo_id > 0 and view.symbol == ref.symbol for view in views):
            orders = {view.algo_id: view for view in views}
            return Verdict(Means.LISTED, 200, None, f"{len(orders)} open", orders=tuple(orders.values()))
        msg = "not a list of that symbol's orders"
    return Verdict(Means.UNCLEAR, answer.http, code, msg)


def _amount(value: object) -> str | None:
    return value if isinstance(value, str) and _AMOUNT.fullmatch(value) else None


def child_of(order: OrderView | None) -> ChildRef | None:
    """The child that an answer about a triggered order names, if it does."""
    if order is None or order.symbol is None or not re.fullmatch(r"[0-9]{1,19}", order.actual_order_id or ""):
        return None
    return ChildRef(order.symbol, int(order.actual_order_id or ""))


def _same_order(ref: OrderRef, view: OrderView) -> bool:
    if ref.algo_id is None:
        return view.client_algo_id == ref.client_algo_id
    # Which order a client id was found to mean has stood in Redis meanwhile.
    return view.algo_id == ref.algo_id and (
        ref.client_algo_id is None or view.client_algo_id in (ref.client_algo_id, None)
    )


def _json(answer: Reply) -> Any:
    if answer.truncated or not answer.body:
        return None
    try:
        return json.loads(answer.body)
    except (ValueError, RecursionError):
        return None


def without_signature(text: str) -> str:
    """A text without what is called a signature in it: an edge may quote the request that it refuses."""
    return _SIGNATURE.sub(r"\1***", text)


def _said(words: str, api_key: str) -> str:
    return clean_text(without_signature(words.replace(api_key, "***") if api_key else words))


def _code_and_msg(answer: Reply, body: dict[str, Any] | None) -> tuple[int | None, str]:
    if body is None:
        if answer.truncated:  # half a text may be equal to a whole one that says something else
            return None, ""
        return None, _said(answer.body[:1000].decode("utf-8", "replace"), answer.api_key)
    msg = body.get("msg")
    return _whole(body.get("code")), _said(msg, answer.api_key) if isinstance(msg, str) else ""


def _order_view(body: dict[str, Any]) -> OrderView | None:
    algo_id = _whole(body.get("algoId"))
    if algo_id is None:
        return None
    actual = body.get("actualOrderId")
    is_id = isinstance(actual, str | int) and not isinstance(actual, bool)
    return OrderView(
        algo_id=algo_id,
        client_algo_id=_text(body.get("clientAlgoId")),
        status=_text(body.get("algoStatus")) or "",
        symbol=_text(body.get("symbol")),
        actual_order_id=clean_text(str(actual), 40) or None if is_id and actual not in (0, "0") else None,
        create_time_ms=_whole(body.get("createTime")),
    )


def _text(value: object) -> str | None:
    return clean_text(value, 64) or None if isinstance(value, str) else None


def _whole(value: object) -> int | None:
    """A whole number that may stand as a JSON string: `code` is "200" on one endpoint and 200 on another."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value):
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def _folded(msg: str) -> str:
    return msg.strip().rstrip(".").casefold()
