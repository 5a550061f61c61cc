"""The contract between strategies and workers: what is asked, what is recorded, and under which Redis keys.

Producer and worker share this module (and :mod:`producer.untrusted` below it) and nothing else, so it imports the
standard library only, reads no clock and talks to nobody. Every value is frozen once built, and every decoder answers
bad input with one exception (:class:`InvalidRequest` or :class:`MalformedMessage`) that says what was wrong.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from producer.untrusted import (
    CONTROL,
    MAX_PAYLOAD_BYTES,
    InvalidRequest,
    MalformedMessage,
    check_text,
    checked_flag,
    checked_seconds,
    clean_text,
    dumps,
    inflate,
    loads,
    not_a,
    shown,
)

VERSION = 1
#: What RQ imports and calls for each job; a string, so that a producer never loads worker code.
TASK = "worker.task.cancel_algo_order"
DEFAULT_QUEUE = "cancels"
DEFAULT_ACCOUNT = "default"
#: Largest algo id: the exchange documents a LONG.
MAX_ALGO_ID = 2**63 - 1
#: Longest deadline, seconds (a week); a stop that nobody wanted gone for a week was wanted.
MAX_DEADLINE_S = 7 * 86_400
#: Longest id of a job, bytes: RQ's have 36. What is longer is dropped unread.
MAX_ID_BYTES = 256
#: Largest number, and count, of an attempt in a job's history: far more than are made, and those that follow fit in a
#: record.
MAX_ATTEMPT_N = 10**9
#: Longest history of attempts that is read out of a job, bytes; what a worker keeps is far smaller.
MAX_ATTEMPTS_BYTES = 512 * 1024

#: What an attempt says whose worker never came back with its answer (`worker/scripts/common.lua` writes it).
WORKER_LOST = "worker lost"

_CLIENT_ALGO_ID = re.compile(r"[.A-Z:/a-z0-9_-]{1,36}")
_ACCOUNT = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_QUEUE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class OutcomeKind(StrEnum):
    """What became of a request. The value is what records, logs and the command line show."""

    CANCELLED = "cancelled"  # our cancel took the order off the book
    ALREADY_CANCELLED = "already_cancelled"  # it was cancelled before any request of ours could have done it
    TRIGGERED = "triggered"  # too late: the live thing is the child order now
    EXPIRED = "expired"  # the exchange dropped it
    REJECTED = "rejected"  # the exchange refused it when it triggered
    NOT_FOUND = "not_found"  # the exchange does not know it, and kept saying so until the horizon
    REFUSED = "refused"  # a refusal that repeating cannot change
    OVERDUE = "overdue"  # the deadline passed before anything was sent
    GAVE_UP = "gave_up"  # a bound was reached and no cancel of ours can have worked
    UNKNOWN = "unknown"  # a bound was reached while a cancel of ours may have worked
    LISTED = "listed"  # the open orders of a symbol were read, and a request made for each; it says nothing of them

    @property
    def failed(self) -> bool:
        """Whether RQ files the job as failed: these kinds want a person or a strategy to look."""
        return self in _FAILED

    @property
    def off_the_book(self) -> bool:
        """Whether the order is known to be gone without having become another order."""
        return self in _OFF_THE_BOOK


_FAILED = frozenset(
    {OutcomeKind.NOT_FOUND, OutcomeKind.REFUSED, OutcomeKind.OVERDUE, OutcomeKind.GAVE_UP, OutcomeKind.UNKNOWN}
)
_OFF_THE_BOOK = frozenset(
    {OutcomeKind.CANCELLED, OutcomeKind.ALREADY_CANCELLED, OutcomeKind.EXPIRED, OutcomeKind.REJECTED}
)


#: States in which a child order rests no more, in the exchange's spelling (exchange.md 1.8). Any other may be live.
CHILD_ENDED = frozenset({"FILLED", "CANCELED", "EXPIRED", "EXPIRED_IN_MATCH", "REJECTED"})
_NOTHING = re.compile(r"0+(\.0*)?")


def may_be_live(kind: OutcomeKind, order_status: str | None = None, child_status: str | None = None) -> bool:
    """Whether the order, or the order it turned into, may still act in the market."""
    if kind is not OutcomeKind.TRIGGERED:
        return not kind.off_the_book
    return order_status != "FINISHED" if child_status is None else child_status not in CHILD_ENDED


class OnTrigger(StrEnum):
    """What is done where the order turns out to have triggered: the order that it became is its child."""

    REPORT = "report"  # the child is read once, and told
    CANCEL_CHILD = "cancel_child"  # the child is cancelled, too


class Call(StrEnum):
    """The signed calls that an attempt can be."""

    CANCEL = "cancel"  # DELETE /fapi/v1/algoOrder
    QUERY = "query"  # GET /fapi/v1/algoOrder
    CANCEL_CHILD = "cancel_child"  # DELETE /fapi/v1/order
    QUERY_CHILD = "query_child"  # GET /fapi/v1/order
    LIST_OPEN = "list_open"  # GET /fapi/v1/openAlgoOrders

    @property
    def of_child(self) -> bool:
        """Whether it is about the order that a triggered one became."""
        return self in (Call.CANCEL_CHILD, Call.QUERY_CHILD)

    @property
    def cancels(self) -> bool:
        """Whether it asks for a cancel; else it asks for a state."""
        return self in (Call.CANCEL, Call.CANCEL_CHILD)


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """One order that a strategy no longer wants.

    Needs ``algo_id`` or ``client_algo_id``; with both, ``algo_id`` is what the exchange is asked by. ``deadline_s`` is
    how long the request is worth pursuing, in seconds (or a timedelta) from the enqueueing (None: the worker's
    ``CANCEL_DEADLINE_S``). ``symbol`` and ``tag`` are carried into the outcome; the exchange needs neither.

    ``on_trigger`` says what to do where the order has triggered: ``"report"`` the child order that it became, or
    ``"cancel_child"``. *A triggered stop is your exit in progress: cancelling its child leaves the position open. This
    is for entries.*

    Raises:
        InvalidRequest: a field breaks its rule.
    """

    algo_id: int | None = None
    client_algo_id: str | None = None
    account: str = DEFAULT_ACCOUNT
    deadline_s: float | None = None
    urgent: bool = False
    symbol: str | None = None
    tag: str | None = None
    on_trigger: OnTrigger | str = OnTrigger.REPORT

    def __post_init__(self) -> None:
        object.__setattr__(self, "algo_id", self._checked_ids())
        if not isinstance(self.account, str) or not _ACCOUNT.fullmatch(self.account):
            raise InvalidRequest("account", self.account, "must match ^[a-z0-9][a-z0-9_-]{0,31}$")
        if self.deadline_s is not None:
            object.__setattr__(self, "deadline_s", checked_seconds("deadline_s", self.deadline_s, MAX_DEADLINE_S))
        checked_flag("urgent", self.urgent)
        check_text("symbol", self.symbol, 32)
        check_text("tag", self.tag, 64)
        if self.on_trigger not in tuple(OnTrigger):
            raise InvalidRequest("on_trigger", self.on_trigger, 'must be "report" or "cancel_child"')
        object.__setattr__(self, "on_trigger", OnTrigger(self.on_trigger))

    def _checked_ids(self) -> int | None:
        """The algo id as Python's own whole number; numpy has others."""
        algo_id, client_algo_id = self.algo_id, self.client_algo_id
        if algo_id is None and client_algo_id is None:
            raise InvalidRequest("algo_id", None, "give algo_id or client_algo_id")
        if client_algo_id is not None and (
            not isinstance(client_algo_id, str) or not _CLIENT_ALGO_ID.fullmatch(client_algo_id)
        ):
            rule = "must match ^[.A-Z:/a-z0-9_-]{1,36}$"
            raise InvalidRequest("client_algo_id", client_algo_id, rule + not_a(client_algo_id, str, "give text"))
        if algo_id is None:
            return None
        rule = f"must be a whole number from 1 to {MAX_ALGO_ID}"
        try:
            number = operator.index(algo_id)
        except TypeError:
            number = None
        if number is None or isinstance(algo_id, bool):
            cure = "give int(...) of the exchange's own digits"  # a float has lost some of them
            raise InvalidRequest("algo_id", algo_id, rule + not_a(algo_id, int, cure))
        if not 1 <= number <= MAX_ALGO_ID:
            raise InvalidRequest("algo_id", algo_id, rule)
        return number

    @property
    def order_key(self) -> str:
        """What makes two requests the same order: the account and the id that the exchange is asked by. Empty: no two
        requests are."""
        by = f"a:{self.algo_id}" if self.algo_id is not None else f"c:{self.client_algo_id}"
        return f"{self.account}:{by}"

    @property
    def joins(self) -> bool:
        """Whether it may share the job of an earlier call: by then a client id alone may mean another order."""
        return self.algo_id is not None

    def describe(self) -> str:
        """One line for RQ's job description; it holds no secret because a request holds none."""
        by = f"algo_id={self.algo_id}" if self.algo_id is not None else f"client_algo_id={self.client_algo_id}"
        return f"cancel {by} account={self.account}"


#: A symbol may hold letters of any script (exchange.md 2), and nothing that is not shown.
_SYMBOL = re.compile(r"\S{1,32}")


@dataclass(frozen=True, slots=True)
class OpenRequest(CancelRequest):
    """All conditional orders of ``symbol`` that were open when it was made: a worker lists them, and makes a request
    for each.

    ``before_ms``: or at an earlier moment, ms by Redis' clock: it only ever narrows.

    Raises:
        InvalidRequest: a field breaks its rule.
    """

    before_ms: int | None = field(default=None, kw_only=True)

    def _checked_ids(self) -> int | None:
        if self.algo_id is not None or self.client_algo_id is not None:
            raise InvalidRequest("algo_id", self.algo_id, "all orders of a symbol are meant: give no id")
        symbol = self.symbol
        if not isinstance(symbol, str) or not _SYMBOL.fullmatch(symbol) or not symbol.isprintable():
            rule = "must be the name of one symbol, as BTCUSDT: text of 1 to 32 characters without blanks"
            raise InvalidRequest("symbol", symbol, rule + not_a(symbol, str, "give text"))
        moment_ms = self.before_ms
        if moment_ms is not None and (type(moment_ms) is not int or not 0 <= moment_ms < 10**14):
            raise InvalidRequest("before_ms", moment_ms, "must be ms since the epoch")
        return None

    @property
    def order_key(self) -> str:
        """See :attr:`CancelRequest.order_key`: each call means the orders of its own moment."""
        return ""

    def describe(self) -> str:
        """See :meth:`CancelRequest.describe`."""
        return f"cancel open orders of {clean_text(self.symbol)} account={self.account}"


def check_queue_name(name: str) -> str:
    """``name``, if it can name a queue; raises InvalidRequest if it cannot."""
    if not isinstance(name, str) or not _QUEUE.fullmatch(name):
        raise InvalidRequest("queue", name, "must match ^[A-Za-z0-9_.-]{1,64}$")
    return name


@dataclass(frozen=True, slots=True)
class Attempt:
    """One signed call and what came of it, as the history of an outcome keeps it."""

    n: int  # 1 for the first call of the run
    at_ms: int  # when it was sent, Redis' clock, ms since the epoch
    call: Call | str  # text: a call that a newer worker makes and this version does not know
    http: int | None  # status of the answer; None where none came
    code: int | None  # the exchange's code; None where the answer held none
    msg: str  # the exchange's words, or the failure's name
    verdict: str  # a worker.classify.Means value, or a newer worker's
    ms: int  # how long the call took
    counted_before: int | None = None  # how many before it counted; told once where attempts were left out

    def as_dict(self) -> dict[str, object]:
        """The record's form of this attempt."""
        record = {name: getattr(self, name) for name in ("n", "at_ms", "call", "http", "code", "msg", "verdict", "ms")}
        record["call"] = str(self.call)
        if self.counted_before is not None:
            record["counted_before"] = self.counted_before
        return record


@dataclass(frozen=True, slots=True)
class ListedOrder:
    """An order that was open, and the id of the request that carries its cancel."""

    algo_id: int
    id: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of one request: recorded once for each id and run, never changed."""

    id: str
    run: int
    kind: OutcomeKind
    account: str | None = None
    algo_id: int | None = None
    client_algo_id: str | None = None
    symbol: str | None = None
    tag: str | None = None
    may_be_live: bool | None = None
    order_status: str | None = None
    actual_order_id: str | None = None
    attempts: tuple[Attempt, ...] = field(default=())
    enqueued_at_ms: int | None = None
    finished_at_ms: int = 0
    worker: str = ""
    error: str | None = None
    child_status: str | None = None  # of the order that it became by triggering; what was not proven is None
    child_executed_qty: str | None = None  # as the exchange writes it
    child_avg_price: str | None = None
    child_cancelled: bool | None = None  # by us; False: it ended otherwise
    child_attempts: tuple[Attempt, ...] = field(default=())  # the calls about it, numbered along with the others
    orders: tuple[ListedOrder, ...] | None = None  # of a listing: what was open when it was asked for
    left_alone: tuple[int, ...] = ()  # ... and algo ids of which the clocks cannot tell whether they were
    before_ms: int | None = None  # ... that is: before this moment, Redis' clock

    @property
    def off_the_book(self) -> bool:
        """Whether nothing rests and nothing was executed: the order is gone, or what it became is, unfilled. What a
        listing named, or was too early for, is not known by it."""
        if self.kind is not OutcomeKind.TRIGGERED:
            return self.kind.off_the_book
        is_unfilled = _NOTHING.fullmatch(self.child_executed_qty or "") is not None
        return is_unfilled and self.child_status in CHILD_ENDED

    @property
    def first_attempt_ms(self) -> int | None:
        """From the enqueue to the first attempt, ms; None where one of them is not known, or there was none."""
        if self.enqueued_at_ms is None or not self.attempts:
            return None
        return max(0, self.attempts[0].at_ms - self.enqueued_at_ms)

    @property
    def took_ms(self) -> int | None:
        """From the enqueue to the outcome, ms; None where the enqueue is not known."""
        return None if self.enqueued_at_ms is None else max(0, self.finished_at_ms - self.enqueued_at_ms)

    def history(self) -> tuple[Attempt, ...]:
        """All calls, in their order."""
        return tuple(sorted((*self.attempts, *self.child_attempts), key=lambda attempt: attempt.n))

    def as_dict(self) -> dict[str, object]:
        """The record: one JSON object, version first."""
        record: dict[str, object] = {"v": VERSION, **{name: getattr(self, name) for name in _RECORD_FIELDS}}
        record |= {"kind": self.kind.value, "attempts": [attempt.as_dict() for attempt in self.attempts]}
        record |= {name: getattr(self, name) for name in _CHILD_FIELDS if getattr(self, name) is not None}
        if self.child_attempts:
            record["child_attempts"] = [attempt.as_dict() for attempt in self.child_attempts]
        if self.orders is not None:
            record["orders"] = [{"algo_id": order.algo_id, "id": order.id} for order in self.orders]
            record |= {"left_alone": list(self.left_alone), "before_ms": self.before_ms}
        return record

    def encode(self) -> str:
        """The record as it stands in Redis and on the command line's stdout."""
        return dumps(self.as_dict())


def encode_request(request: CancelRequest) -> dict[str, object]:
    """The one argument of the job function: only what is set, so that a job stays small.

    What to do with a child is a field of the job, as requests for one order share a job (``c_on_trigger``).
    """
    payload: dict[str, object] = {"v": VERSION, "account": request.account}
    is_open = isinstance(request, OpenRequest)
    for name in ("algo_id", "client_algo_id", "deadline_s", "symbol", "tag", *(("before_ms",) if is_open else ())):
        value = getattr(request, name)
        if value is not None:
            payload["cancel_open" if is_open and name == "symbol" else name] = value
    if request.urgent:
        payload["urgent"] = True
    return payload


def _is_ours(record: Mapping[Any, Any]) -> bool:
    version = record.get("v")
    return version == VERSION and type(version) is int  # to Python, true is 1


_COMMON_FIELDS = frozenset({"v", "account", "deadline_s", "tag", "urgent"})
_REQUEST_FIELDS = _COMMON_FIELDS | {"algo_id", "client_algo_id", "symbol"}
_OPEN_FIELDS = _COMMON_FIELDS | {"cancel_open", "before_ms"}


def decode_request(payload: object) -> CancelRequest:
    """Rebuild the request for one order from the job function's argument.

    Raises:
        MalformedMessage: not an object of this version, or with fields that this version does not have.
        InvalidRequest: a field breaks its rule.
    """
    return CancelRequest(**_fields(payload, _REQUEST_FIELDS))


def _decode_any(payload: object) -> CancelRequest:
    if not isinstance(payload, Mapping) or "cancel_open" not in payload:
        return decode_request(payload)
    fields = _fields(payload, _OPEN_FIELDS)
    return OpenRequest(symbol=fields.pop("cancel_open"), **fields)


def _fields(payload: object, known: frozenset[str]) -> dict[str, Any]:
    if not isinstance(payload, Mapping):
        raise MalformedMessage(f"a cancel request is a JSON object, not {shown(payload)}")
    if not _is_ours(payload):
        raise MalformedMessage(f"v={shown(payload.get('v'))}: this side speaks version {VERSION}")
    extra = sorted(str(name) for name in payload if name not in known)
    if extra:
        raise MalformedMessage(f"unknown field {shown(extra[0])}")
    return {name: value for name, value in payload.items() if name != "v"}


def encode_call(request: CancelRequest) -> bytes:
    """The job's `data` as RQ's JSONSerializer writes it: function, instance, args, kwargs.

    RQ reads it uncompressed as well as compressed (rq.job.Job.restore), and so short a text does not shrink.
    """
    return dumps([TASK, None, [encode_request(request)], {}]).encode()


def decode_call(data: bytes) -> CancelRequest:
    """Read a job's `data` (compressed or not), accepting the contract's function alone. Of all orders of a symbol it
    gives an :class:`OpenRequest`.

    Raises:
        MalformedMessage: too large, not JSON (a pickle, say), another function, other arguments.
        InvalidRequest: a field of the request breaks its rule.
    """
    call = loads(inflate(data))
    if not isinstance(call, list) or len(call) != 4 or not isinstance(call[2], list) or not isinstance(call[3], dict):
        raise MalformedMessage("the job is not a call of this contract")
    function, instance, args, kwargs = call
    if function != TASK or instance is not None:
        raise MalformedMessage(f"function {shown(function)} is not allowed here; only {TASK} is")
    if kwargs or len(args) != 1:
        raise MalformedMessage(f"{TASK} takes one request, not {len(args)} arguments and {len(kwargs)} by name")
    return _decode_any(args[0])


def encode_attempts(attempts: Iterable[Attempt]) -> str:
    """Attempts as the job hash keeps them: JSON objects joined by commas, so that a script can append one."""
    return ",".join(dumps(attempt.as_dict()) for attempt in attempts)


def decode_attempts(text: str | bytes | None) -> tuple[Attempt, ...]:
    """Read what :func:`encode_attempts` wrote.

    Raises:
        MalformedMessage: it is something else, or numbered beyond :data:`MAX_ATTEMPT_N`.
    """
    if not text:
        return ()
    joined = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    attempts = _attempts(loads(f"[{joined}]", limit=16 * MAX_PAYLOAD_BYTES))
    numbers = (number for attempt in attempts for number in (attempt.n, attempt.counted_before or 0))
    if (beyond := next((number for number in numbers if not 0 <= number <= MAX_ATTEMPT_N), None)) is not None:
        raise MalformedMessage(f"no attempt has the number {beyond}")
    return attempts


def decode_outcome(text: str | bytes) -> Outcome:
    """Read an outcome record. Fields that this version does not know are passed over, absent ones read as unset, and an
    unknown call is kept as text: workers and strategies need not be of one version.

    Raises:
        MalformedMessage: it is not one of this version.
    """
    record = loads(text, limit=16 * MAX_PAYLOAD_BYTES)
    if not isinstance(record, dict) or not _is_ours(record):
        raise MalformedMessage(f"not an outcome record of version {VERSION}")
    try:
        return Outcome(
            id=str(record["id"]),
            run=_int(record["run"]),
            kind=OutcomeKind(record["kind"]),
            attempts=_attempts(record.get("attempts", [])),
            child_attempts=_attempts(record.get("child_attempts", [])),
            orders=_listed(record.get("orders")),
            left_alone=tuple(_int(algo_id) for algo_id in record.get("left_alone", [])),
            finished_at_ms=_int(record.get("finished_at_ms", 0)),
            **{name: _typed(record[name], kind) for name, kind in _PLAIN_OUTCOME_FIELDS.items() if name in record},
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise MalformedMessage(f"not an outcome record: {type(error).__name__} {shown(str(error))}") from None


#: What stands in every record, in this order.
_RECORD_FIELDS = (
    *("id", "run", "account", "algo_id", "client_algo_id", "symbol", "tag", "kind", "may_be_live", "order_status"),
    *("actual_order_id", "attempts", "enqueued_at_ms", "finished_at_ms", "worker", "error"),
)
_CHILD_FIELDS: dict[str, type] = {
    **dict.fromkeys(("child_status", "child_executed_qty", "child_avg_price"), str),
    "child_cancelled": bool,
}
_PLAIN_OUTCOME_FIELDS: dict[str, type] = {
    **_CHILD_FIELDS,
    **dict.fromkeys(("account", "client_algo_id", "symbol", "tag"), str),
    **dict.fromkeys(("order_status", "actual_order_id", "worker", "error"), str),
    **{"algo_id": int, "enqueued_at_ms": int, "may_be_live": bool, "before_ms": int},
}


def _typed(value: Any, kind: type) -> Any:
    if value is not None and type(value) is not kind:
        raise TypeError(f"{shown(value)} is not {kind.__name__}")
    if isinstance(value, str):
        value.encode()  # JSON can spell half a character, which nobody could write again
    return value


def _listed(rows: object) -> tuple[ListedOrder, ...] | None:
    if rows is None:
        return None
    if not isinstance(rows, list):
        raise TypeError("orders must be a list")
    return tuple(ListedOrder(_int(row["algo_id"]), _plain_text(row["id"])) for row in rows)


_CALLS: dict[object, Call] = {call.value: call for call in Call}


def _attempts(rows: object) -> tuple[Attempt, ...]:
    if not isinstance(rows, list):
        raise MalformedMessage("attempts must be a list")
    try:
        return tuple(
            Attempt(
                n=_int(row["n"]),
                at_ms=_int(row["at_ms"]),
                call=_CALLS.get(row["call"]) or _plain_text(row["call"]),
                http=_typed(row["http"], int),
                code=_typed(row["code"], int),
                msg=_plain_text(row["msg"]),
                verdict=_plain_text(row["verdict"]),
                ms=_int(row["ms"]),
                counted_before=_typed(row.get("counted_before"), int),
            )
            for row in rows
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise MalformedMessage(f"not an attempt: {type(error).__name__} {shown(str(error))}") from None


def _int(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{shown(value)} is not a whole number")
    return value


def _plain_text(value: Any) -> str:
    if not isinstance(value, str) or CONTROL.search(value):
        raise TypeError(f"{shown(value)} is not text without control characters")
    return value


@dataclass(frozen=True, slots=True)
class Pin:
    """The order that a request by client id alone was found to mean; kept, so that no later one is hit."""

    algo_id: int
    symbol: str | None = None

    def encode(self) -> str:
        """As the job hash keeps it."""
        return dumps({"algo_id": self.algo_id, "symbol": self.symbol})


def decode_pin(text: str | bytes | None) -> Pin | None:
    """Read what :meth:`Pin.encode` wrote; None where there is nothing.

    Raises:
        MalformedMessage: it is something else.
        InvalidRequest: an algo id or a symbol breaks its rule.
    """
    if not text:
        return None
    fields = loads(text)
    if not isinstance(fields, dict) or set(fields) != {"algo_id", "symbol"} or fields["algo_id"] is None:
        raise MalformedMessage("not the pin of an order")
    CancelRequest(**fields)  # one rule for both
    return Pin(**fields)
