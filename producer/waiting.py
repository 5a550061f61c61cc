"""How callers wait for outcomes: what ends a wait, and all who wait on a client.

As in :mod:`producer.protocol` nothing here talks to Redis: a client carries the conversations.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from producer.door import checked_id, checked_ids
from producer.keys import Band, JobField, Keys
from producer.message import CancelRequest, OpenRequest, Outcome, decode_outcome
from producer.protocol import (
    ENDED,
    Conversation,
    QueueUnavailable,
    UnknownRequest,
    Wire,
    good,
    is_requeued,
    pages,
    requeue_commands,
    text,
)
from producer.status import Status, is_served, read_status
from producer.untrusted import InvalidRequest, MalformedMessage, clean_text

#: What ends a wait for one request.
End: TypeAlias = Outcome | Exception

#: Between two looks at all that is waited for, s: a hint can be lost, and a request can vanish without any.
LOOK_S = 1.0
#: For so long after the last one who waited the listener stays, s: the next one may come at once.
_LINGER_S = 5.0


class Waited(NamedTuple):
    """What a wait for many came to, by the requests' ids."""

    ended: dict[str, Outcome]
    standing: dict[str, Exception]  # with what `wait` would have raised


# --- What ends a wait ---------------------------------------------------------------------------------------------


def look(keys: Keys, job_ids: Iterable[str], *, for_the_gone: bool = True) -> Conversation[dict[str, End]]:
    """What ends the wait for each of these requests; those that stand are left out.

    A record may be an outcome or unreadable; ``for_the_gone``: a request that nobody knows (any more) ends it too.
    """
    ends: dict[str, End] = {}
    for page in pages(list(job_ids)):
        (records,) = good((yield [("MGET", *(keys.outcome_prefix + job_id for job_id in page))]))
        found = {job_id: _read(job_id, record) for job_id, record in zip(page, records, strict=True) if record}
        ends |= yield from _without_requeued(keys, found)
        if for_the_gone:
            ends |= yield from _gone(keys, [job_id for job_id in page if job_id not in found])
    return ends


def _read(job_id: str, record: Any) -> Outcome | MalformedMessage:
    """What the record of a request says; the error names the request, since many are read at once."""
    try:
        outcome = decode_outcome(record)
        if outcome.id != job_id:
            raise MalformedMessage(f"it is about another request, {clean_text(outcome.id, 80)}")
    except MalformedMessage as error:
        return MalformedMessage(f"outcome of {clean_text(job_id)}: {error}")
    return outcome


def _without_requeued(keys: Keys, found: Mapping[str, End]) -> Conversation[dict[str, End]]:
    """Leave out what has no outcome yet: a failed request that RQ has put back belongs to its next run, though the
    earlier one's record stands until a worker or another request comes by."""
    failed = {job_id: end.run for job_id, end in found.items() if isinstance(end, Outcome) and end.kind.failed}
    if not failed:
        return dict(found)
    answers = yield [command for job_id in failed for command in requeue_commands(keys, job_id)]
    states = zip(failed.items(), answers[::2], answers[1::2], strict=True)
    requeued = {job_id for (job_id, run), state, score in states if is_requeued(state, score, run)}
    return {job_id: end for job_id, end in found.items() if job_id not in requeued}


def _gone(keys: Keys, job_ids: list[str]) -> Conversation[dict[str, End]]:
    """Those without a record that will get none.

    The record is looked for once more behind the job: it may have come in between. A job that was removed while a
    worker has it in hand still gets one.
    """
    ends: dict[str, End] = {}
    if not job_ids:
        return ends
    answers = yield [
        command
        for job_id in job_ids
        for command in (
            ("HMGET", keys.job_prefix + job_id, "status", JobField.DONE),
            ("ZSCORE", keys.unfinished, job_id),
            ("GET", keys.outcome_prefix + job_id),
        )
    ]
    for job_id, job, score, record in zip(job_ids, answers[::3], answers[1::3], answers[2::3], strict=True):
        if isinstance(record, bytes):
            ends[job_id] = _read(job_id, record)
            continue
        status, done = (None, None) if isinstance(job, Exception) else job
        is_held = isinstance(score, bytes) and float(score) < Band.WAITING
        is_there = status is not None and (done is None or text(status) not in ENDED)
        if not is_there and not (is_held and status is None):
            ends[job_id] = UnknownRequest([job_id], keys.queue, "requests (any more)")
    return ends


def proven(end: End, request: CancelRequest | None) -> End:
    """The end of a wait, once it is about the order of the request that was asked for, if one is known.

    Only a failure may leave the order unsaid: a job that was damaged is refused without it.
    """
    if not isinstance(end, Outcome) or request is None:
        return end
    name = "algo_id" if request.joins else "client_algo_id"
    if isinstance(request, OpenRequest):
        name = "symbol"
    for field_name in ("account", name):
        said, asked = getattr(end, field_name), getattr(request, field_name)
        if said != asked and not (said is None and end.kind.failed):
            words = f"it is about another order: {field_name}={clean_text(said, 80)}, not {asked}"
            return MalformedMessage(f"outcome of {end.id}: {words}")
    return end


def wanted_of(values: Any) -> dict[str, CancelRequest | None]:
    """The ids of tickets and ids, each with the request of its ticket.

    Raises:
        InvalidRequest: one of them is neither.
    """
    tickets = list(values) if isinstance(values, Iterable) and not isinstance(values, str | bytes) else values
    return dict(zip(checked_ids(tickets), (getattr(each, "request", None) for each in tickets), strict=True))


def one_wanted(value: Any) -> dict[str, CancelRequest | None]:
    """As :func:`wanted_of` for one ticket or id."""
    return {checked_id(value): getattr(value, "request", None)}


def closed(client: object) -> InvalidRequest:
    """What a closed client answers."""
    return InvalidRequest("client", client, "it is closed: make a new one")


def unheard(error: BaseException) -> QueueUnavailable:
    """What whoever waits is told when a defect, or a lack of memory, has ended the listener."""
    return QueueUnavailable(f"nobody listens for outcomes any more ({type(error).__name__}): wait again")


def who_serves(served: bool | None, queue: str) -> str:
    """Whether a live worker serves the queue, in words."""
    who = {True: "a live worker serves", False: "NO LIVE WORKER serves", None: "nobody can tell who serves"}[served]
    return f"{who} queue {queue}"


# --- Who waits -------------------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Waiter:
    """Somebody who waits: for all of ``wanted``, or for news of the ledger."""

    wanted: set[str]
    wake: Callable[[], object]  # called, from whatever thread listens, when something has come
    number: int = 0  # in the order in which they came
    ends: dict[str, End] = field(default_factory=dict)


class QueueWire(Wire):
    """All conversations of a client about one queue."""

    _served: tuple[float, bool | None] = (-LOOK_S, None)

    def look(self, job_ids: Iterable[str], *, for_the_gone: bool = True) -> Conversation[dict[str, End]]:
        """See :func:`look`."""
        return look(self.keys, job_ids, for_the_gone=for_the_gone)

    def served(self) -> Conversation[bool | None]:
        """Whether a live worker serves the queue, as of the last second; None where nobody can tell."""
        at_s, told = self._served
        if time.monotonic() - at_s > LOOK_S:
            told = yield from is_served(self.keys)
            self._served = (time.monotonic(), told)
        return told

    def status(self) -> Conversation[Status]:
        """See :func:`producer.status.read_status`."""
        return read_status(self.keys)


class Waiters:
    """All who wait on one client. ``tell`` and the like are called by its listener."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._all: set[Waiter] = set()
        self._by_id: dict[str, set[Waiter]] = {}
        self._left_s = time.monotonic()
        self._is_closed = False
        #: How many have come so far.
        self.came = 0

    @contextlib.contextmanager
    def waiting(self, wanted: Iterable[str], wake: Callable[[], object]) -> Iterator[Waiter]:
        """Wait for the length of the block."""
        waiter = Waiter(set(wanted), wake)
        with self._lock:
            self.came += 1
            waiter.number = self.came
            self._all.add(waiter)
            for job_id in waiter.wanted:
                self._by_id.setdefault(job_id, set()).add(waiter)
        try:
            yield waiter
        finally:
            with self._lock:
                self._all.discard(waiter)
                for job_id in waiter.wanted:
                    self._by_id[job_id].discard(waiter)
                    if not self._by_id[job_id]:
                        del self._by_id[job_id]
                self._left_s = time.monotonic()

    def are_few(self) -> bool:
        """Whether a listener may leave."""
        with self._lock:
            return self._is_closed or (not self._all and time.monotonic() - self._left_s > _LINGER_S)

    def wanted(self) -> list[str]:
        """All ids that somebody waits for."""
        with self._lock:
            return list(self._by_id)

    def tell(self, ends: Mapping[str, End], came: int) -> None:
        """Hand out what was asked for when so many had ``came``. Who came later may wait for a later run of the job."""
        told: set[Waiter] = set()
        with self._lock:
            for job_id, end in ends.items():
                for waiter in self._by_id.get(job_id, ()):
                    if waiter.number <= came:
                        waiter.ends[job_id] = end
                        told.add(waiter)
        for waiter in told:
            if waiter.ends.keys() >= waiter.wanted:
                waiter.wake()

    def fail(self, error: Exception) -> None:
        """Nothing can be heard any more: everybody is told why."""
        with self._lock:
            everybody = list(self._all)
        for waiter in everybody:
            waiter.ends = {job_id: waiter.ends.get(job_id, error) for job_id in waiter.wanted}
            waiter.wake()

    def close(self, error: Exception) -> None:
        """As :meth:`fail`, and nobody listens any more."""
        self._is_closed = True
        self.fail(error)

    def news(self) -> None:
        """Wake those who wait for news of the ledger."""
        with self._lock:
            readers = [waiter for waiter in self._all if not waiter.wanted]
        for waiter in readers:
            waiter.wake()
