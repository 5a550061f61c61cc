"""What an answer means, and what to do next: pure decisions about one order.

Two questions, each answered by a value. :func:`classify` turns a reply or a failure into a :class:`Verdict` by literal
tables of the exchange's statuses, codes and texts. :func:`next_step` turns the history of a request into :class:`Stop`
(with the outcome's kind) or :class:`Again` (with a delay and the call to make).

Nothing here reads a clock, draws a random number, or talks to anybody: time and chance are arguments, so that every
decision can be replayed from the attempts that an outcome records.

The rule above all others: whether the exchange can have *seen* a cancel is asked before whether to try again. An
attempt that may have worked stays in doubt until a query settles it; no later refusal does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from producer.message import Attempt, Call, OutcomeKind, clean_text

#: A request by client id alone is sent without a look-up only this soon after it was asked, ms; it is also how much
#: later than the request an order may claim to be created and still be the one that was meant (two hosts' clocks).
CLIENT_ID_GRACE_MS = 1000
#: Clock refusals in a row that are answered at once, by a fresh clock and signature.
MAX_RESYNCS = 3
#: First wait before an order that is just being triggered is looked at again, ms: a trigger takes about ten.
TRIGGER_POLL_MS = 10
#: The last try starts at least this long before the deadline, ms, so that there is time for its answer.
LAST_TRY_MS = 1000
#: How far ahead of the exchange's clock a timestamp may be, ms (exchange.md 2).
AHEAD_MS = 1000
#: Pauses where the exchange names none, ms: after 429, and after 418 (its shortest ban is two minutes).
LIMIT_PAUSE_MS = 10_000
BAN_PAUSE_MS = 120_000
#: No pause is shorter, ms: one of nothing would ask a closed exchange again and again, and count no attempt.
LEAST_PAUSE_MS = 1_000


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
    # either's
    NO_SUCH_ORDER = "no_such_order"  # not done, and no proof of anything: it must be asked again
    UNCLEAR = "unclear"  # a cancel may have been executed; a query told nothing
    NOT_SENT = "not_sent"  # no byte of it left
    BUSY = "busy"  # not done: overload, maintenance
    CLOCK = "clock"  # not done: our timestamp was outside the window
    LIMITED = "limited"  # not done: too many requests from this address
    BLOCKED = "blocked"  # not done: the firewall in front of the exchange
    DENIED = "denied"  # not done, and the same request will never be
    KEY_REFUSED = "key_refused"  # the same, for a reason that lies with the key


_STATUS_MEANS = {
    "NEW": Means.OPEN,
    "CANCELED": Means.CANCELED,
    "TRIGGERING": Means.TRIGGERING,
    "TRIGGERED": Means.TRIGGERED,
    "FINISHED": Means.FINISHED,
    "EXPIRED": Means.EXPIRED,
    "REJECTED": Means.REJECTED,
}
_MEANS_STATUS = {means.value: status for status, means in _STATUS_MEANS.items()}
#: Verdicts that bring a pause for everybody on the address and count as no attempt.
GATED = frozenset({Means.LIMITED, Means.BLOCKED})
_REFUSED = frozenset({Means.DENIED, Means.KEY_REFUSED})


@dataclass(frozen=True, slots=True)
class OrderRef:
    """Which order a call asks about; with both ids, ``algo_id`` is the one that is sent."""

    algo_id: int | None
    client_algo_id: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of the exchange, as far as a decision needs it."""

    http: int
    body: bytes
    retry_after_ms: int | None = None
    challenge: bool = False  # the firewall's challenge header was there
    truncated: bool = False  # the body was longer than we read


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
class Verdict:
    """The meaning of one reply or failure."""

    means: Means
    http: int | None = None
    code: int | None = None
    msg: str = ""
    order: OrderView | None = None
    retry_after_ms: int | None = None
    banned_until_ms: int | None = None  # the exchange's clock, ms since the epoch

    def pause_ms(self, now_ms: int, policy: Policy) -> int:
        """How long nobody on this address may send, ms from ``now_ms``, after a gated verdict."""
        if self.means is Means.BLOCKED:
            return policy.waf_pause_ms
        asked = self.retry_after_ms
        if self.banned_until_ms is not None:
            asked = max(asked or 0, self.banned_until_ms - now_ms)
        if asked is None:
            return BAN_PAUSE_MS if self.http == 418 else LIMIT_PAUSE_MS
        return max(asked, LEAST_PAUSE_MS)


@dataclass(frozen=True, slots=True)
class Policy:
    """The bounds of a request, from the worker's settings."""

    max_attempts: int = 25
    backoff_base_ms: int = 100
    backoff_cap_ms: int = 15_000
    not_found_horizon_ms: int = 10_000
    recv_window_ms: int = 5_000
    waf_pause_ms: int = 300_000


@dataclass(frozen=True, slots=True)
class Case:
    """What a decision needs to know of the request; times by Redis' clock, ms since the epoch."""

    by_client_id: bool  # only a client id is known: nothing pinned it to an algo id yet
    meant_at_ms: int  # when the request was first made: an order created later is not the one that was meant
    deadline_at_ms: int


@dataclass(frozen=True, slots=True)
class Stop:
    """The request is over."""

    kind: OutcomeKind
    order_status: str | None = None
    actual_order_id: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Again:
    """Make ``call`` in ``delay_ms``; ``resync``: with the exchange's clock measured anew before."""

    call: Call
    delay_ms: int = 0
    resync: bool = False


# ---- classify -------------------------------------------------------------------------------------------------------

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
    451: Means.DENIED,
}
#: Statuses that decide where the body holds no listed code.
HTTP_FALLBACK: dict[int, Means] = {401: Means.KEY_REFUSED, 404: Means.DENIED, 405: Means.DENIED}
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
_BAN_EPOCH = re.compile(r"banned until (\d{13})(?!\d)")


def classify(call: Call, ref: OrderRef, answer: Reply | Failure) -> Verdict:
    """What ``answer`` to ``call`` about ``ref`` means. Total: any answer gets a verdict (exchange.md 4.1, 4.2)."""
    if isinstance(answer, Failure):
        return Verdict(Means.UNCLEAR if answer.seen else Means.NOT_SENT, msg=clean_text(answer.reason))
    body = _json_object(answer)
    code, msg = _code_and_msg(answer, body)
    if answer.challenge:
        return Verdict(Means.BLOCKED, answer.http, code, msg or "challenge by the firewall")
    if 200 <= answer.http < 300:
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
    if code == -2011:
        text = msg.casefold()
        return Means.DENIED if any(part in text for part in _PERMANENT_2011) else Means.NO_SUCH_ORDER
    if code == -1001:
        return Means.BUSY if _folded(msg) in NOT_DONE_TEXTS else Means.UNCLEAR
    if code in CODE_MEANS:
        return CODE_MEANS[code]
    return HTTP_FALLBACK.get(http, Means.UNCLEAR)


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
    means = _STATUS_MEANS.get(view.status, Means.ODD_STATUS)
    return Verdict(means, 200, code, clean_text(view.status), order=view)


def _same_order(ref: OrderRef, view: OrderView) -> bool:
    if ref.algo_id is not None:
        return view.algo_id == ref.algo_id
    return view.client_algo_id == ref.client_algo_id


def _json_object(answer: Reply) -> dict[str, Any] | None:
    if answer.truncated or not answer.body:
        return None
    try:
        value = json.loads(answer.body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _code_and_msg(answer: Reply, body: dict[str, Any] | None) -> tuple[int | None, str]:
    if body is None:
        if answer.truncated:  # half a text may be equal to a whole one that says something else
            return None, ""
        return None, clean_text(answer.body[:1000].decode("utf-8", "replace"))
    msg = body.get("msg")
    return _whole(body.get("code")), clean_text(msg) if isinstance(msg, str) else ""


def _order_view(body: dict[str, Any]) -> OrderView | None:
    algo_id = _whole(body.get("algoId"))
    if algo_id is None:
        return None
    actual = body.get("actualOrderId")
    return OrderView(
        algo_id=algo_id,
        client_algo_id=_text(body.get("clientAlgoId")),
        status=_text(body.get("algoStatus")) or "",
        symbol=_text(body.get("symbol")),
        actual_order_id=clean_text(str(actual), 40) if actual not in (None, "", 0, "0") else None,
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


def as_known(history: Sequence[Attempt]) -> list[Attempt]:
    """A history out of Redis; a verdict that this version does not know (a newer worker's) is read as unclear."""
    return [a if a.verdict in _KNOWN else replace(a, verdict=Means.UNCLEAR.value) for a in history]


_KNOWN = frozenset(means.value for means in Means)


# ---- decide ---------------------------------------------------------------------------------------------------------


def first_step(case: Case, history: Sequence[Attempt], policy: Policy, now_ms: int) -> Stop | Again:
    """What a worker does with a request that it was just given: nothing was sent yet, or a retry is due."""
    if now_ms >= case.deadline_at_ms:
        if not history:
            return Stop(OutcomeKind.OVERDUE, error="the deadline passed before anything was sent")
        return _bound(history, policy, "the deadline passed")
    call = call_for(case, history, policy, now_ms)
    return _attempts_left(history, policy, call) or Again(call)


def next_step(
    case: Case, history: Sequence[Attempt], verdict: Verdict, policy: Policy, now_ms: int, roll: float
) -> Stop | Again:
    """What follows the attempt that ends ``history`` and got ``verdict``.

    ``roll`` is a random number in [0, 1): the jitter of a delay. The delay never ends at or past the deadline.
    """
    stop = _final(case, history, verdict, policy, now_ms)
    if stop is not None:
        return stop
    if verdict.order is not None:
        case = replace(case, by_client_id=False)  # the answer told the algo id, and the caller pins it
    if now_ms >= case.deadline_at_ms:
        return _bound(history, policy, "the deadline passed")
    delay_ms = _delay(history, verdict, policy, now_ms, roll)
    if (stop := _attempts_left(history, policy, call_for(case, history, policy, now_ms + delay_ms))) is not None:
        return stop
    left_ms = case.deadline_at_ms - now_ms
    if delay_ms >= left_ms:
        if verdict.means in GATED or left_ms <= LAST_TRY_MS:
            return _bound(history, policy, "the deadline comes before the next try")
        delay_ms = left_ms - LAST_TRY_MS
    call = call_for(case, history, policy, now_ms + delay_ms)
    return Again(call, delay_ms, resync=verdict.means is Means.CLOCK)


def call_for(case: Case, history: Sequence[Attempt], policy: Policy, at_ms: int) -> Call:
    """Which call comes next at ``at_ms``: a query wherever a cancel would be a guess."""
    last = history[-1] if history else None
    if last is not None and last.verdict != Means.OPEN and (last.call is Call.QUERY or last.verdict in _ASK_AFTER):
        return Call.QUERY  # it was not answered for good, or there is something to ask
    stale = at_ms - case.meant_at_ms > CLIENT_ID_GRACE_MS or in_doubt(history, policy)
    return Call.QUERY if case.by_client_id and stale else Call.CANCEL


#: After these answers to a cancel the order's state must be read before anything else is tried.
_ASK_AFTER = frozenset({Means.UNCLEAR, Means.NO_SUCH_ORDER, Means.TRIGGER_RACE})


def in_doubt(history: Sequence[Attempt], policy: Policy) -> bool:
    """Whether a cancel of ours may have worked, or may still work, without a query having settled it.

    A query that shows the order open settles only those cancels whose time window had closed when it was asked: no
    request is newly accepted once its timestamp is older than recvWindow (exchange.md 4.4).
    """
    open_at_ms = max((a.at_ms for a in history if a.verdict == Means.OPEN), default=None)
    window_ms = policy.recv_window_ms + AHEAD_MS
    return any(
        attempt.call is Call.CANCEL
        and attempt.verdict == Means.UNCLEAR
        and (open_at_ms is None or attempt.at_ms + attempt.ms + window_ms > open_at_ms)
        for attempt in history
    )


def counted(history: Sequence[Attempt]) -> int:
    """How many attempts count against the bound.

    Not counted: what brought a pause for everybody (LIMITED, BLOCKED); clock refusals as far as they are answered at
    once; and a repeated "no such order", whose own bound is the horizon.
    """
    total = clocks = 0
    for attempt in history:
        means = attempt.verdict
        clocks = clocks + 1 if means == Means.CLOCK else 0
        free = means in GATED or 0 < clocks <= MAX_RESYNCS
        free = free or (means == Means.NO_SUCH_ORDER and attempt.call is Call.QUERY)
        total += not free
    return total


def last_status(history: Sequence[Attempt]) -> str | None:
    """The order's state as last seen by a query, in the exchange's spelling."""
    for attempt in reversed(history):
        if attempt.verdict in _MEANS_STATUS:
            return _MEANS_STATUS[attempt.verdict]
        if attempt.verdict == Means.ODD_STATUS:
            return attempt.msg
    return None


def _final(case: Case, history: Sequence[Attempt], verdict: Verdict, policy: Policy, now_ms: int) -> Stop | None:
    means, order = verdict.means, verdict.order
    if means is Means.CONFIRMED:
        return Stop(OutcomeKind.CANCELLED, "CANCELED")
    if order is not None and _is_newer_order(case, order):
        return Stop(
            OutcomeKind.UNKNOWN, error="the client id belongs to an order created after the request: left alone"
        )
    if means is Means.CANCELED:
        ours = any(a.call is Call.CANCEL and a.verdict == Means.UNCLEAR for a in history)
        return Stop(OutcomeKind.CANCELLED if ours else OutcomeKind.ALREADY_CANCELLED, "CANCELED")
    if means in (Means.TRIGGERED, Means.FINISHED):
        return Stop(OutcomeKind.TRIGGERED, verdict.msg, order.actual_order_id if order else None)
    if means is Means.EXPIRED:
        return Stop(OutcomeKind.EXPIRED, verdict.msg)
    if means is Means.REJECTED:
        return Stop(OutcomeKind.REJECTED, verdict.msg)
    if means in _REFUSED:
        kind = OutcomeKind.UNKNOWN if in_doubt(history, policy) else OutcomeKind.REFUSED
        return Stop(kind, last_status(history), error=f"refused: {_quoted(verdict)}")
    if means is Means.NO_SUCH_ORDER and now_ms >= _horizon_ends(history, policy, now_ms):
        kind = OutcomeKind.UNKNOWN if in_doubt(history, policy) else OutcomeKind.NOT_FOUND
        return Stop(kind, last_status(history), error=f"unknown to the exchange: {_quoted(verdict)}")
    return None


def _is_newer_order(case: Case, order: OrderView) -> bool:
    created = order.create_time_ms
    return case.by_client_id and (created is None or created > case.meant_at_ms + CLIENT_ID_GRACE_MS)


def _horizon_ends(history: Sequence[Attempt], policy: Policy, now_ms: int) -> int:
    """When "no such order" is believed: a horizon after its first time, but never on a cancel's word alone."""
    if history[-1].call is Call.CANCEL:
        return now_ms + 1
    first_ms = history[-1].at_ms
    for attempt in reversed(history):
        if attempt.verdict in _MEANS_STATUS or attempt.verdict == Means.ODD_STATUS:
            break
        if attempt.verdict == Means.NO_SUCH_ORDER:
            first_ms = attempt.at_ms
    return first_ms + policy.not_found_horizon_ms


def _attempts_left(history: Sequence[Attempt], policy: Policy, call: Call) -> Stop | None:
    """The bound on attempts; the last one is kept for the query that tells what the cancels before it did."""
    used = counted(history)
    spare = 1 if call is Call.CANCEL and used > 0 else 0
    return _bound(history, policy, f"{used} attempts were made") if used + spare >= policy.max_attempts else None


def _bound(history: Sequence[Attempt], policy: Policy, why: str) -> Stop:
    kind = OutcomeKind.UNKNOWN if in_doubt(history, policy) else OutcomeKind.GAVE_UP
    said = f"; last: {history[-1].verdict} {history[-1].msg}".rstrip() if history else ""
    return Stop(kind, last_status(history), error=f"{why}{said}")


def _delay(history: Sequence[Attempt], verdict: Verdict, policy: Policy, now_ms: int, roll: float) -> int:
    means, call = verdict.means, history[-1].call
    if means in GATED:
        return verdict.pause_ms(now_ms, policy)
    if means is Means.CLOCK and _trailing(history, Means.CLOCK) <= MAX_RESYNCS:
        return 0
    if call is Call.CANCEL and means in (Means.UNCLEAR, Means.NO_SUCH_ORDER):
        return 0
    if means is Means.OPEN and not any(a.call is Call.CANCEL for a in history):
        return 0
    if means in (Means.TRIGGER_RACE, Means.TRIGGERING):
        doublings = min(_trailing(history, Means.TRIGGERING), 32)
        return int(min(TRIGGER_POLL_MS << doublings, policy.backoff_cap_ms) * (0.5 + roll / 2))
    delay_ms = backoff_ms(len(history), policy, roll)
    if means is Means.NO_SUCH_ORDER:  # one more look just when it would be believed
        return min(delay_ms, _horizon_ends(history, policy, now_ms) - now_ms)
    return delay_ms


def backoff_ms(attempts: int, policy: Policy, roll: float) -> int:
    """Exponential backoff with full jitter after ``attempts`` (1 or more), ms: uniform from 0 to the doubled base."""
    ceiling = min(policy.backoff_base_ms << min(attempts - 1, 32), policy.backoff_cap_ms)
    return int(ceiling * roll)


def _trailing(history: Sequence[Attempt], means: Means) -> int:
    count = 0
    for attempt in reversed(history):
        if attempt.verdict != means:
            break
        count += 1
    return count


def _quoted(verdict: Verdict) -> str:
    return " ".join(str(part) for part in (verdict.http, verdict.code, verdict.msg) if part not in (None, ""))
