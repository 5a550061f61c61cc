"""What the two clients do alike: coroutines, which :func:`~producer.redis_url.at_once` runs for the synchronous one."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, ClassVar, Self, cast

from producer.door import checked_timeout, checked_wait
from producer.message import DEFAULT_QUEUE, CancelRequest, OpenRequest, Outcome
from producer.open_orders import OPEN_IN_DOUBT, OpenOutcome, OpenTicketFields, pursue
from producer.place import checked_url
from producer.protocol import IN_DOUBT, TIMEOUT_S, Conversation, QueueUnavailable, T, TicketFields, WaitTimeout
from producer.redis_url import Address, given
from producer.untrusted import InvalidRequest, MalformedMessage
from producer.waiting import LOOK_S, End, QueueWire, Waited, one_wanted, proven, wanted_of, who_serves

_log = logging.getLogger("producer")


#: The first pause of who waits without a listener, s; the next ones double up to LOOK_S.
_FIRST_LOOK_S = 0.05


def _outcome_of(end: End) -> Outcome:
    if isinstance(end, Outcome):
        return end
    raise end.with_traceback(None)


class BaseClient:
    """A client that is a :class:`~producer.client.CancelClient` or its counterpart for event loops."""

    _ticket: ClassVar[type[Any]]
    _open_ticket: ClassVar[type[Any]]
    _wire: QueueWire

    @classmethod
    def from_url(
        cls, url: str, queue: str = DEFAULT_QUEUE, *, timeout_s: float | timedelta | None = None, **options: Any
    ) -> Self:
        """A client for the Redis at ``url``; ``options`` go to redis-py's connections.

        ``timeout_s`` bounds each call (each thousand of `cancel_many`), waiting for a connection and a repeat included;
        left out, the URL's ``socket_timeout`` does, else 2 s.

        Raises:
            InvalidRequest: ``url``, ``timeout_s`` or ``queue`` cannot be used.
        """
        address = checked_url(url)
        call_s = checked_timeout(address.options.get("socket_timeout", TIMEOUT_S) if timeout_s is None else timeout_s)
        return cls._at(address, call_s, options, queue)

    @classmethod
    def _at(cls, address: Address, call_s: float, options: dict[str, Any], queue: str) -> Self:
        raise NotImplementedError

    def converse(self, conversation: Conversation[T], *, repeat: bool = True, doubt: str = "") -> Any:
        """Carry a conversation with Redis to its end; ``repeat``: its commands may be sent again if an answer is lost.

        ``doubt`` is what the error says of a call that may have been carried out.

        Raises:
            InvalidRequest: the client is closed.
            QueueUnavailable: Redis did not answer, or refused.
        """
        raise NotImplementedError

    def _mine(self) -> Any:
        """The connections that serve the caller."""
        raise NotImplementedError

    async def _told(self, conversation: Conversation[T], doubt: str = "") -> T:
        return cast(T, await given(self.converse(conversation, doubt=doubt)))

    async def _enqueue(self, requests: Iterable[CancelRequest], durable: bool) -> list[Any]:
        accepted = await self._told(self._wire.enqueue(requests, durable), IN_DOUBT)
        tickets = [self._ticket(*carried, self) for carried in accepted.carried]
        if accepted.not_durable is not None:
            accepted.not_durable.tickets = tickets
            raise accepted.not_durable
        return tickets

    async def _list_open(self, request: OpenRequest) -> Any:
        accepted = await self._told(self._wire.enqueue([request], durable=False), OPEN_IN_DOUBT)
        return self._open_ticket(*accepted.carried[0], _client=self, asked_ms=accepted.asked_ms)

    async def _outcome(self, ticket_or_id: TicketFields | str) -> Outcome | None:
        ((job_id, request),) = one_wanted(ticket_or_id).items()
        ends = await self._told(self._wire.look([job_id], for_the_gone=False))
        return _outcome_of(proven(ends[job_id], request)) if job_id in ends else None

    async def _outcomes_of(self, tickets_or_ids: Iterable[TicketFields | str]) -> dict[str, Outcome]:
        wanted = wanted_of(tickets_or_ids)
        ends = await self._told(self._wire.look(wanted, for_the_gone=False))
        ends = {job_id: proven(end, wanted[job_id]) for job_id, end in ends.items()}
        for end in ends.values():
            if isinstance(end, MalformedMessage):
                _log.warning("%s", end)
        return {job_id: end for job_id, end in ends.items() if isinstance(end, Outcome)}

    async def _wait(self, ticket_or_id: Any, timeout_s: float | timedelta | None) -> Any:
        if isinstance(ticket_or_id, OpenTicketFields):
            return await self._wait_for_open(ticket_or_id, checked_wait(timeout_s))
        return _outcome_of(*(await self._ends(one_wanted(ticket_or_id), timeout_s)).values())

    async def _wait_many(self, tickets_or_ids: Iterable[Any], timeout_s: float | timedelta | None) -> Waited:
        wanted = wanted_of(tickets_or_ids)
        for job_id, request in wanted.items():
            if isinstance(request, OpenRequest):  # it has no outcome of its own
                rule = "is for all open orders of a symbol: wait for it alone, as client.wait(ticket)"
                raise InvalidRequest("ids", job_id, rule)
        ended: dict[str, Outcome] = {}
        standing: dict[str, Exception] = {}
        for job_id, end in (await self._ends(wanted, timeout_s)).items():
            if isinstance(end, Outcome):
                ended[job_id] = end
            else:
                standing[job_id] = end
        return Waited(ended, standing)

    async def _wait_for_open(self, ticket: OpenTicketFields, timeout_s: float | None) -> OpenOutcome:
        began_at = time.monotonic()
        conversation = pursue(ticket, self._wire.keys.queue)
        try:
            step = next(conversation)
            while True:
                if isinstance(step, OpenRequest):
                    step = conversation.send(await self._list_open(step))
                else:
                    left_s = None if timeout_s is None else max(began_at + timeout_s - time.monotonic(), 0.0)
                    step = conversation.send(await self._ends(dict(step), left_s))
        except StopIteration as end:
            return cast(OpenOutcome, end.value)

    async def _ends(self, wanted: dict[str, CancelRequest | None], timeout: object) -> dict[str, End]:
        timeout_s = checked_wait(timeout)
        began_at = time.monotonic()
        ends: dict[str, End] = {}
        try:
            ends = await self._told(self._wire.look(wanted))
            if ends.keys() != wanted.keys() and timeout_s != 0:
                ends |= await self._listen_for([job_id for job_id in wanted if job_id not in ends], timeout_s, began_at)
            if standing := [job_id for job_id in wanted if job_id not in ends]:
                served: bool | None = None
                with contextlib.suppress(QueueUnavailable):
                    served = await self._told(self._wire.served())
                who = who_serves(served, self._wire.keys.queue)
                for job_id in standing:
                    late = WaitTimeout(f"no outcome of {job_id} within {timeout_s} s; the request goes on: {who}")
                    late.is_served = served
                    ends[job_id] = late
        except QueueUnavailable as error:
            ends = dict.fromkeys(wanted, error) | ends
        return {job_id: proven(ends[job_id], request) for job_id, request in wanted.items()}

    async def _listen_for(self, job_ids: list[str], timeout_s: float | None, began_at: float) -> dict[str, End]:
        lines = self._mine()
        came = lines.event()
        with lines.waiters.waiting(job_ids, came.set) as waiter:
            somebody_listens, look_s = await given(lines.listener()), _FIRST_LOOK_S
            while True:
                # What came before the listener was there, it does not hear of.
                asked = lines.waiters.came
                lines.waiters.tell(await self._told(self._wire.look(job_ids)), asked)
                left_s = math.inf if timeout_s is None else max(0.0, began_at + timeout_s - time.monotonic())
                pause_s, look_s = left_s if somebody_listens else min(left_s, look_s), min(2 * look_s, LOOK_S)
                if await given(lines.wait(came, None if pause_s == math.inf else pause_s)) or not left_s:
                    return dict(waiter.ends)

    @contextlib.contextmanager
    def _news(self) -> Iterator[Callable[[str], Any]]:
        """A coroutine that waits for news of the ledger, and says whether it goes on after an entry or may do so."""
        lines = self._mine()
        news = lines.event()

        async def goes_on_after(_: str) -> bool:
            await given(lines.listener())
            await given(lines.wait(news, LOOK_S))
            news.clear()
            return True

        with lines.waiters.waiting((), news.set):
            yield goes_on_after
