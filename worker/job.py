"""One job in the hands of a holder: what is known of it, and the record of its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import uuid4

from producer.message import (
    Attempt,
    Call,
    CancelRequest,
    ListedOrder,
    OpenRequest,
    Outcome,
    OutcomeKind,
    Pin,
    decode_attempts,
    may_be_live,
)
from producer.untrusted import MalformedMessage
from worker import decide, listing, log
from worker.child import Child
from worker.classify import Means, OrderRef, Ref, SymbolRef, Verdict
from worker.clock import local_ns
from worker.decide import Again, Case, Stop, as_known, bounded, next_number, unread
from worker.hold import Held
from worker.signing import Credential
from worker.store import TOO_LARGE, Lease


class Rules(Protocol):
    """By what it is decided about a request: about its order (:mod:`worker.decide`), what that became
    (:mod:`worker.child`), or all of a symbol (:mod:`worker.listing`)."""

    def first_step(self, case: Case, history: Sequence[Attempt], now_ms: int) -> Stop | Again: ...

    def next_step(
        self, case: Case, history: Sequence[Attempt], verdict: Verdict, now_ms: int, roll: float
    ) -> Stop | Again: ...

    def bound(self, case: Case, history: Sequence[Attempt], now_ms: int, why: str) -> Stop: ...


@dataclass(slots=True, eq=False)
class CancelJob:
    """One request while it is worked on.

    ``silent`` are the numbers of attempts whose answer may still come, ``late`` the answers that came; ``told_to`` is
    the number of the last attempt that others made, as Redis tells.
    """

    lease: Lease
    hold: Held
    request: CancelRequest
    credential: Credential
    history: list[Attempt]
    algo_id: int | None
    symbol: str | None
    pinned: bool
    began_ns: int = 0  # the last attempt
    strikes_until_ns: int = 0  # a cancel by client id that left here may meet the id's next order, if it is unclear
    silent: set[int] = field(default_factory=set)
    late: deque[tuple[int, Call, Verdict]] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    child: Child | None = None  # what it became by triggering
    told_to: int = field(init=False)
    client_algo_id: str | None = field(init=False)

    def __post_init__(self) -> None:
        self.told_to = next_number(self.history) - 1
        self.client_algo_id = self.request.client_algo_id

    @property
    def rules(self) -> Rules:
        return self.child or (listing if isinstance(self.request, OpenRequest) else decide)

    @property
    def meant_at_ms(self) -> int:
        """The moment whose orders are meant; a retry means that of the first run."""
        asked_ms = self.request.before_ms if isinstance(self.request, OpenRequest) else None
        return self.lease.meant_at_ms if asked_ms is None else min(asked_ms, self.lease.meant_at_ms)

    def ref(self, call: Call) -> Ref:
        if call is Call.LIST_OPEN:
            return SymbolRef(self.request.symbol or "")
        if call.of_child and self.child is not None:
            return self.child.ref
        return OrderRef(self.algo_id, self.request.client_algo_id if self.request.algo_id is None else None)

    def is_only_told(self, step: Again) -> bool:
        """Whether the step is a look at a child on which nothing hangs: it is taken now, or not at all."""
        return step.call is Call.QUERY_CHILD and not self.lease.cancels_child

    def is_open(self) -> bool:
        """Whether a call of it may still be answered or, by client id, be accepted."""
        return bool(self.silent) or local_ns() < self.strikes_until_ns

    def learn(self, verdict: Verdict) -> None:
        """Keep what an answer told about the order: its algo id, so that a reused client id is never hit."""
        if verdict.order is not None:
            self.pinned = self.pinned or self.algo_id is None
            self.algo_id = verdict.order.algo_id
            self.symbol = self.symbol or verdict.order.symbol
            if self.client_algo_id is not None:  # what was asked for beside an algo id may be another order's
                self.client_algo_id = verdict.order.client_algo_id or self.client_algo_id

    def pin(self) -> str:
        return Pin(self.algo_id, self.symbol).encode() if self.pinned and self.algo_id is not None else ""

    def requests(self, stop: Stop) -> tuple[tuple[str, CancelRequest], ...]:
        """What a listing asks for, each with the id of its job."""
        asked = self.request
        common: dict[str, Any] = {"account": asked.account, "urgent": asked.urgent, "tag": asked.tag}
        return tuple(
            (uuid4().hex, CancelRequest(algo_id=order.algo_id, symbol=asked.symbol, **common))
            for order in stop.orders or ()
        )

    def outcome(
        self, stop: Stop, finished_at_ms: int, worker: str, requests: Sequence[tuple[str, CancelRequest]] = ()
    ) -> Outcome:
        """The record of its end."""
        request, child = self.request, stop.child
        is_live: bool | None = may_be_live(stop.kind, stop.order_status, child.status if child else None)
        listed: dict[str, Any] = {}
        if stop.orders is not None:
            orders = tuple(ListedOrder(each.algo_id or 0, job_id) for job_id, each in requests)
            is_live = True if orders or stop.left_alone else None
            listed = {"orders": orders, "left_alone": stop.left_alone, "before_ms": self.meant_at_ms}
        return _outcome(
            self.lease,
            self.history,
            kind=stop.kind,
            account=request.account,
            algo_id=self.algo_id,
            client_algo_id=self.client_algo_id,
            symbol=self.symbol,
            tag=request.tag,
            may_be_live=is_live,
            order_status=stop.order_status,
            actual_order_id=stop.actual_order_id,
            child_status=child.status if child else None,
            child_executed_qty=child.executed_qty if child else None,
            child_avg_price=child.avg_price if child else None,
            child_cancelled=stop.child_cancelled,
            finished_at_ms=finished_at_ms,
            worker=worker,
            error=stop.error,
            **listed,
        )

    def recalled(self) -> Stop:
        """The end of a job that a person took back through RQ: nothing more is sent for it."""
        status = self.lease.fault.partition(" ")[2]
        log.warning("recalled", id=self.lease.id, status=status)
        kind = OutcomeKind.UNKNOWN if _in_doubt(self.history, self.request) else OutcomeKind.GAVE_UP
        return Stop(kind, error=f"the job was {status} through RQ")


def refusal(
    lease: Lease, request: CancelRequest | None, latest_ms: int, finished_at_ms: int, worker: str, error: str
) -> Outcome:
    """The outcome of a job that this worker can do nothing for; nothing is known of a foreign job's order."""
    log.warning("refused", id=lease.id, error=error)
    history: Sequence[Attempt] = ()
    known: dict[str, Any] = {}
    if request is not None:
        with contextlib.suppress(MalformedMessage):
            history = history_of(lease, latest_ms)
        known = {"account": request.account, "algo_id": request.algo_id, "may_be_live": True}
        known |= {"client_algo_id": request.client_algo_id, "symbol": request.symbol, "tag": request.tag}
    kind = OutcomeKind.UNKNOWN if _in_doubt(history, request) else OutcomeKind.REFUSED
    return _outcome(lease, history, kind=kind, finished_at_ms=finished_at_ms, worker=worker, error=error, **known)


def history_of(lease: Lease, latest_ms: int) -> list[Attempt]:
    """What was done for the job so far; ``latest_ms``: the latest that Redis' clock can show.

    Raises:
        MalformedMessage: it is no history.
    """
    if lease.attempts != TOO_LARGE:
        return bounded(as_known(decode_attempts(lease.attempts)))
    log.warning("damaged", id=lease.id, field="c_attempts", reason="larger than any history: taken for a doubt")
    return unread(latest_ms)


def _outcome(lease: Lease, history: Sequence[Attempt], **known: Any) -> Outcome:
    of_child = [isinstance(attempt.call, Call) and attempt.call.of_child for attempt in history]
    return Outcome(
        id=lease.id,
        run=lease.run,
        attempts=tuple(attempt for attempt, is_childs in zip(history, of_child, strict=True) if not is_childs),
        child_attempts=tuple(attempt for attempt, is_childs in zip(history, of_child, strict=True) if is_childs),
        enqueued_at_ms=lease.enqueued_at_ms,
        **known,
    )


def _in_doubt(history: Sequence[Attempt], request: CancelRequest | None) -> bool:
    """A listing is a read, and leaves none."""
    return not isinstance(request, OpenRequest) and any(attempt.verdict == Means.UNCLEAR for attempt in history)
