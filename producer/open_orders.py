"""All open conditional orders of a symbol: what becomes of each, and the conversation that both clients have about it.

As in :mod:`producer.protocol` nothing here talks to Redis. A client carries :func:`pursue`: it waits for what is asked
to be waited for, and puts on the queue what is asked to be put there.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

from producer.message import CancelRequest, ListedOrder, OpenRequest, Outcome, OutcomeKind
from producer.protocol import QueueUnavailable, TicketFields, WaitTimeout
from producer.untrusted import InvalidRequest, MalformedMessage, clean_text
from producer.waiting import End, proven, who_serves

#: What whoever asks for it is to know.
WARNING = "this removes protection; positions and normal orders stay"
#: What is said of a call that may have been carried out though it failed.
OPEN_IN_DOUBT = "; it may have been carried out. A repeat means the orders that are open then"
#: What a request may come to, the worst first: it decides what is said of them all.
_BY_BADNESS = (
    OutcomeKind.UNKNOWN,
    OutcomeKind.GAVE_UP,
    OutcomeKind.REFUSED,
    OutcomeKind.OVERDUE,
    OutcomeKind.NOT_FOUND,
    OutcomeKind.TRIGGERED,
    OutcomeKind.EXPIRED,
    OutcomeKind.REJECTED,
    OutcomeKind.ALREADY_CANCELLED,
    OutcomeKind.CANCELLED,
    OutcomeKind.LISTED,
)
_CHILD_FIELDS = ("child_status", "child_executed_qty", "child_avg_price", "child_cancelled")
#: The second look may take so long, s, however little is left of the deadline: it is a read.
_LEAST_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class OpenOrder:
    """One order that was open, and what became of its request: ``kind`` is None while it stands.

    The fields are those of :class:`~producer.message.Outcome`; ``error`` says why.
    """

    algo_id: int
    id: str
    kind: OutcomeKind | None
    order_status: str | None = None
    actual_order_id: str | None = None
    may_be_live: bool = True
    off_the_book: bool = False
    child_status: str | None = None
    child_executed_qty: str | None = None
    child_avg_price: str | None = None
    child_cancelled: bool | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, object]:
        """The row as the command line prints it."""
        names = ("algo_id", "id", "kind", "order_status", "actual_order_id", "may_be_live", "off_the_book")
        child = {name: getattr(self, name) for name in _CHILD_FIELDS if getattr(self, name) is not None}
        return {name: getattr(self, name) for name in names} | child


@dataclass(frozen=True, slots=True)
class OpenOutcome:
    """What became of the conditional orders of a symbol that were open when it was asked.

    ``kind`` is the worst of the orders' and of the listings', `listed` where no order was seen, None while something
    stands. ``left_alone`` are algo ids of orders of which the clocks cannot tell whether they were open then: then
    ``kind`` is `unknown`. ``listings``: how often the orders were listed. ``error``: why a listing failed.
    """

    id: str
    kind: OutcomeKind | None
    may_be_live: bool
    orders: tuple[OpenOrder, ...] = ()
    left_alone: tuple[int, ...] = ()
    listings: int = 1
    error: str | None = None

    @property
    def off_the_book(self) -> bool:
        """Whether of all that was seen nothing rests and nothing was executed; so it is where nothing was seen."""
        is_known = self.kind is not None and self.error is None and not self.left_alone
        return is_known and all(order.off_the_book for order in self.orders)

    def as_dict(self) -> dict[str, object]:
        """It as the command line prints it."""
        names = ("id", "kind", "may_be_live", "off_the_book", "orders", "left_alone", "listings", "error")
        lists = {"orders": [order.as_dict() for order in self.orders], "left_alone": list(self.left_alone)}
        return {name: getattr(self, name) for name in names} | lists


@dataclass(frozen=True, slots=True)
class OpenTicketFields(TicketFields):
    """A request for all open orders of a symbol; ``asked_ms``: when it was put on the queue, by Redis' clock."""

    asked_ms: int = field(default=0, repr=False, compare=False, kw_only=True)
    looks: list[OpenTicketFields] = field(default_factory=list, repr=False, compare=False, kw_only=True)  # later ones

    def as_dict(self) -> dict[str, object]:
        """The ticket as the command line prints it."""
        return {"id": self.id, "symbol": self.request.symbol, "account": self.request.account}

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return partial(type(self), asked_ms=self.asked_ms), (self.id, self.request, self.duplicate)


#: What a client is asked for: to wait for these requests (and give their ends), or to make one (and give its ticket).
Step: TypeAlias = Mapping[str, CancelRequest | None] | OpenRequest


@dataclass(frozen=True, slots=True)
class _Look:
    """One listing: its end, and what became of the orders that it names."""

    end: End
    orders: Mapping[int, OpenOrder] = field(default_factory=dict)
    standing: Sequence[Exception] = ()
    ended_at_ms: int = 0  # when the last of all had ended

    @property
    def is_whole(self) -> bool:
        return isinstance(self.end, Outcome) and not self.end.kind.failed and not self.standing


def pursue(ticket: TicketFields, queue: str) -> Generator[Step, Any, OpenOutcome]:
    """Wait for the listing and all its requests, and look once more for what the first list lagged behind.

    Raises:
        WaitTimeout: something stands; it says what, and has in ``so_far`` what is known.
        UnknownRequest, MalformedMessage: nobody knows the first listing (any more), or its record is none.
        QueueUnavailable: Redis did not answer.
    """
    request = ticket.request
    looks = [(yield from _look(ticket.id, request, getattr(ticket, "asked_ms", 0)))]
    if not isinstance(looks[0].end, Outcome | WaitTimeout):
        raise looks[0].end
    later: list[OpenTicketFields] = getattr(ticket, "looks", [])
    if looks[0].is_whole and isinstance(request, OpenRequest):
        narrowed = _narrowed(request, looks[0])
        if not later:
            later.append((yield narrowed))
        # Redis' clock may have been set back since: then the later request is the older one by it.
        moments_ms = [ms for ms in (narrowed.before_ms, later[0].asked_ms) if ms]
        looks.append((yield from _look(later[0].id, request, min(moments_ms, default=0))))
    so_far = _outcome(ticket.id, looks)
    standing = [error for look in looks for error in (*look.standing, look.end) if isinstance(error, Exception)]
    for error in standing:
        if isinstance(error, QueueUnavailable):
            raise error
    served = [error.is_served for error in standing if isinstance(error, WaitTimeout)]
    if served:
        raise _timed_out(request, so_far, served[0], queue)
    return so_far


def _look(job_id: str, request: CancelRequest, asked_ms: int) -> Generator[Step, Any, _Look]:
    end: End = (yield {job_id: request})[job_id]
    if not isinstance(end, Outcome) or end.kind.failed:
        return _Look(end)
    try:
        listed = end.orders if end.kind is OutcomeKind.LISTED else None
        if listed is None:
            raise MalformedMessage(f"outcome of {clean_text(job_id)}: it is no listing")
        if (end.before_ms or 0) < asked_ms:  # it would leave out what was opened since
            words = f"it lists what was open at {end.before_ms}, before it was asked for at {asked_ms}"
            raise MalformedMessage(f"outcome of {clean_text(job_id)}: {words}")
        wanted = _wanted(end)
    except MalformedMessage as error:
        return _Look(error)
    ends: Mapping[str, End] = (yield wanted) if wanted else {}
    rows, standing, ended_at_ms = {}, [], end.finished_at_ms
    for order in listed:
        row_end = proven(ends[order.id], wanted[order.id])
        rows[order.algo_id] = _row(order, row_end)
        if isinstance(row_end, WaitTimeout | QueueUnavailable):
            standing.append(row_end)
        elif isinstance(row_end, Outcome):
            ended_at_ms = max(ended_at_ms, row_end.finished_at_ms)
    return _Look(end, rows, standing, ended_at_ms)


def _wanted(listing: Outcome) -> dict[str, CancelRequest]:
    """What a listing has asked for, by the requests' ids."""
    try:
        account = listing.account or ""
        return {order.id: CancelRequest(order.algo_id, account=account) for order in listing.orders or ()}
    except InvalidRequest as error:
        raise MalformedMessage(f"outcome of {clean_text(listing.id)}: {error}") from None


def followed(listing: Outcome, ends: Mapping[str, End]) -> OpenOutcome:
    """What has become so far of the orders that a listing named; ``ends`` by their requests' ids, of those that ended.

    Raises:
        MalformedMessage: it names what no request can be for.
    """
    wanted, standing = _wanted(listing), WaitTimeout()
    ends = {job_id: proven(ends.get(job_id, standing), request) for job_id, request in wanted.items()}
    rows = {order.algo_id: _row(order, ends[order.id]) for order in listing.orders or ()}
    return _outcome(listing.id, [_Look(listing, rows)])


def _narrowed(request: OpenRequest, look: _Look) -> OpenRequest:
    """The second look: what was open at the first request's moment, within what is left of its time."""
    first = look.end
    assert isinstance(first, Outcome)
    moments_ms = [ms for ms in (first.before_ms, request.before_ms) if ms is not None]
    before_ms = min(moments_ms, default=0)  # without any nothing can be told to have been there
    left_s = request.deadline_s
    if left_s is not None and first.enqueued_at_ms is not None:
        used_s = (look.ended_at_ms - first.enqueued_at_ms) / 1000
        left_s = min(max(left_s - used_s, _LEAST_LOOK_S), left_s)
    return replace(request, before_ms=before_ms, deadline_s=left_s)


def _row(order: ListedOrder, end: End) -> OpenOrder:
    if not isinstance(end, Outcome):
        is_standing = isinstance(end, WaitTimeout | QueueUnavailable)
        return OpenOrder(order.algo_id, order.id, None if is_standing else OutcomeKind.UNKNOWN, error=str(end))
    names = ("kind", "order_status", "actual_order_id", "off_the_book", "error", *_CHILD_FIELDS)
    known = {name: getattr(end, name) for name in names}
    return OpenOrder(order.algo_id, order.id, may_be_live=end.may_be_live is not False, **known)


def _outcome(job_id: str, looks: Sequence[_Look]) -> OpenOutcome:
    orders: dict[int, OpenOrder] = {}
    for look in looks:
        for algo_id, order in look.orders.items():
            before = orders.get(algo_id)
            if before is None or not before.off_the_book:  # a late list shows what is gone already
                orders[algo_id] = order
    lists = [look.end for look in looks if isinstance(look.end, Outcome)]
    left_alone = next((each.left_alone for each in reversed(lists) if each.orders is not None), ())
    left_alone = tuple(algo_id for algo_id in left_alone if algo_id not in orders)
    kinds = [order.kind for order in orders.values()] + ([OutcomeKind.UNKNOWN] if left_alone else [])
    errors: list[str] = []
    for end in (look.end for look in looks):
        if isinstance(end, WaitTimeout | QueueUnavailable):
            kinds.append(None)
        elif not isinstance(end, Outcome):
            kinds.append(OutcomeKind.UNKNOWN)
            errors.append(str(end))
        else:
            kinds.append(end.kind)
            errors += [end.error or end.kind] if end.kind.failed else []
    known = [kind for kind in kinds if kind is not None]
    kind = min(known, key=_BY_BADNESS.index) if len(known) == len(kinds) else None
    is_live = kind is None or bool(errors or left_alone) or any(order.may_be_live for order in orders.values())
    return OpenOutcome(
        job_id, kind, is_live, tuple(orders.values()), left_alone, len(looks), errors[0] if errors else None
    )


def _timed_out(request: CancelRequest, so_far: OpenOutcome, served: bool | None, queue: str) -> WaitTimeout:
    standing = [order.algo_id for order in so_far.orders if order.kind is None]
    what = f"{len(standing)} of {len(so_far.orders)} orders ({', '.join(map(str, standing[:3]))}, ...)"
    if not standing:
        what = "the list of open orders"
    error = WaitTimeout(f"{what} of {clean_text(request.symbol)} stands; it goes on: {who_serves(served, queue)}")
    error.is_served, error.so_far = served, so_far
    return error
