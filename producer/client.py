"""The client for strategies that are not asyncio programs: enqueue cancels, learn what became of them.

Needs a Redis connection and nothing else: no exchange key, no HTTP. Errors: :class:`~producer.message.InvalidRequest`
before anything is sent, :class:`QueueUnavailable` when Redis does not answer in time, :class:`WaitTimeout` when an
outcome is not there yet.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha1
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq import Queue
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from producer.message import DEFAULT_ACCOUNT, DEFAULT_QUEUE, CancelRequest, Outcome, decode_outcome
from producer.wire import (
    DURABLE_WAIT_MS,
    ENQUEUE_SCRIPT,
    Enqueue,
    QueueUnavailable,
    UnknownRequest,
    WaitTimeout,
    check_durable,
    rows,
    text,
)

_SHA = sha1(ENQUEUE_SCRIPT.encode(), usedforsecurity=False).hexdigest()
#: An announcement can be lost with its connection, so a waiter looks for itself this often, s.
_LOOK_S = 1.0
#: Entries of the ledger read at a time.
_PAGE = 500


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request that is on the queue. ``duplicate``: it shares the job of an unfinished request for the same order."""

    id: str
    request: CancelRequest
    duplicate: bool
    _client: CancelClient = field(repr=False, compare=False)

    def wait(self, timeout_s: float | None = None) -> Outcome:
        """Block until the outcome is recorded, at most ``timeout_s`` seconds (None: as long as it takes).

        Raises:
            WaitTimeout: no outcome within that time; the request goes on.
            QueueUnavailable: Redis did not answer.
        """
        return self._client.wait(self.id, timeout_s)

    def as_dict(self) -> dict[str, object]:
        """The ticket as the command line prints it."""
        request = self.request
        return {
            "id": self.id,
            "algo_id": request.algo_id,
            "client_algo_id": request.client_algo_id,
            "account": request.account,
            "duplicate": self.duplicate,
        }


class CancelClient:
    """Puts cancel requests on a queue and reads their outcomes. Thread-safe; one for a process is enough."""

    def __init__(self, connection: redis.Redis, queue: str = DEFAULT_QUEUE) -> None:
        self._redis = connection
        self._enqueue = Enqueue(queue)
        self.keys = self._enqueue.keys

    @classmethod
    def from_url(cls, url: str, queue: str = DEFAULT_QUEUE, *, timeout_s: float = 2.0, **options: Any) -> Self:
        """A client with a connection of its own. ``timeout_s`` bounds every call; ``options`` go to ``redis.Redis``."""
        connection = redis.Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),  # a repeat is ours to decide, see _run
            **options,
        )
        return cls(connection, queue)

    def close(self) -> None:
        """Give the connections back."""
        self._redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cancel(
        self,
        *,
        algo_id: int | None = None,
        client_algo_id: str | None = None,
        account: str = DEFAULT_ACCOUNT,
        deadline_s: float | None = None,
        urgent: bool = False,
        symbol: str | None = None,
        tag: str | None = None,
        durable: bool = False,
    ) -> Ticket:
        """Enqueue one cancel and return at once. The fields are those of :class:`CancelRequest`.

        ``durable=True`` also waits until the server has the request in its append-only file.

        Raises:
            InvalidRequest: a field breaks its rule; nothing was enqueued.
            QueueUnavailable: Redis did not answer in time; calling again is safe.
            NotDurable: the request is on the queue, but this server cannot promise that it survives a crash.
        """
        request = CancelRequest(algo_id, client_algo_id, account, deadline_s, urgent, symbol, tag)
        return self.cancel_many([request], durable=durable)[0]

    def cancel_many(self, requests: Iterable[CancelRequest], *, durable: bool = False) -> list[Ticket]:
        """Enqueue many cancels, one round trip for each 1,000; tickets in the order of the requests.

        Requests for one order share a ticket. Raises like :meth:`cancel`.
        """
        tickets: dict[int, Ticket] = {}
        for chunk in rows(requests):
            answer = self._run(self._enqueue.words(chunk), durable)
            for row, job_id, duplicate in self._enqueue.answers(chunk, answer):
                tickets[row.position] = Ticket(job_id, row.request, duplicate, self)
        return [tickets[position] for position in range(len(tickets))]

    def outcome(self, job_id: str) -> Outcome | None:
        """The outcome of a request, or None while there is none (or no longer: it is kept for OUTCOME_TTL_S)."""
        with _availability():
            record = self._redis.get(self.keys.outcome_prefix + job_id)
        return None if record is None else decode_outcome(record)

    def outcomes_of(self, job_ids: list[str]) -> dict[str, Outcome]:
        """Those outcomes of ``job_ids`` that are there, by id, in one round trip."""
        if not job_ids:
            return {}
        with _availability():
            records: Any = self._redis.mget([self.keys.outcome_prefix + job_id for job_id in job_ids])
        return {i: decode_outcome(record) for i, record in zip(job_ids, records, strict=True) if record is not None}

    def outcomes(self, after: str = "0-0", *, follow: bool = False) -> Iterator[tuple[str, Outcome]]:
        """The ledger after a stream id: pairs of stream id and outcome, oldest first; ``follow`` waits for new ones.

        ``$`` stands for the newest entry. The ledger keeps about LEDGER_MAXLEN entries.
        """
        position = self._newest() if after == "$" else after
        while True:
            with _availability():
                page: Any = self._redis.xread(
                    {self.keys.outcomes: position}, count=_PAGE, block=1000 if follow else None
                )
            entries = _entries(page)
            if not entries and not follow:
                return
            for entry_id, fields in entries:
                position = text(entry_id)
                yield position, decode_outcome(fields.get(b"outcome") or fields.get("outcome"))

    def wait(self, job_id: str, timeout_s: float | None = None) -> Outcome:
        """Block until ``job_id`` has an outcome; see :meth:`Ticket.wait`."""
        ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        if (outcome := self.outcome(job_id)) is not None:
            return outcome
        with _availability(), self._redis.pubsub() as channel:
            channel.subscribe(self.keys.outcome_prefix + job_id)
            while True:
                if (outcome := self.outcome(job_id)) is not None:
                    return outcome
                left_s = _LOOK_S if ends_at is None else ends_at - time.monotonic()
                if left_s <= 0:
                    raise WaitTimeout(f"no outcome of {job_id} within {timeout_s} s; the request goes on")
                channel.get_message(timeout=min(left_s, _LOOK_S))

    def retry(self, job_ids: Iterable[str]) -> list[str]:
        """Start a new run, with a new deadline, of requests that ended in a failed kind; returns their ids.

        Raises:
            UnknownRequest: one of them is not among the failed ones; those before it were started.
        """
        registry = self._failed_registry()
        started = []
        for job_id in job_ids:
            with _availability():
                try:
                    registry.requeue(job_id)
                except (NoSuchJobError, InvalidJobOperation):
                    raise UnknownRequest(
                        f"{job_id} is not among the failed requests of queue {self.keys.queue}"
                    ) from None
                self._redis.delete(self.keys.outcome_prefix + job_id)
            started.append(job_id)
        return started

    def failed_ids(self) -> list[str]:
        """Ids of the requests that ended in a failed kind and can be retried, oldest first."""
        with _availability():
            return self._failed_registry().get_job_ids(cleanup=False)

    def job(self, ticket_or_id: Ticket | str) -> Job:
        """RQ's job of a request, for those who look at the queue through RQ."""
        job_id = ticket_or_id if isinstance(ticket_or_id, str) else ticket_or_id.id
        with _availability():
            return Job.fetch(job_id, connection=self._redis, serializer=JSONSerializer)

    def _failed_registry(self) -> FailedJobRegistry:
        return FailedJobRegistry(queue=Queue(self.keys.queue, connection=self._redis, serializer=JSONSerializer))

    def _newest(self) -> str:
        with _availability():
            newest: Any = self._redis.xrevrange(self.keys.outcomes, count=1)
        return text(newest[0][0]) if newest else "0-0"

    def _run(self, words: list[Any], durable: bool) -> Any:
        with _availability():
            try:
                return self._evaluate(words, durable)
            except redis.ConnectionError:
                # A kept connection that the server had closed. The ids are in the words: a repeat finds itself.
                return self._evaluate(words, durable)

    def _evaluate(self, words: list[Any], durable: bool) -> Any:
        try:
            return self._send(("EVALSHA", _SHA, *words), durable)
        except redis.exceptions.NoScriptError:
            return self._send(("EVAL", ENQUEUE_SCRIPT, *words), durable)

    def _send(self, command: tuple[Any, ...], durable: bool) -> Any:
        if not durable:
            return self._redis.execute_command(*command)
        # WAITAOF speaks of what its own connection has written, so both go through one.
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.execute_command(*command)
        pipeline.execute_command("WAITAOF", 1, 0, DURABLE_WAIT_MS)
        answer, written = pipeline.execute(raise_on_error=False)
        if isinstance(answer, Exception):
            raise answer
        check_durable(written)
        return answer


def _entries(page: Any) -> list[Any]:
    """Entries of a one-stream XREAD, in either shape that redis-py gives (list by RESP2, mapping by RESP3)."""
    if not page:
        return []
    stream = next(iter(page.values())) if isinstance(page, dict) else page[0][1]
    return stream[0] if stream and isinstance(stream[0], list) else stream


@contextlib.contextmanager
def _availability() -> Iterator[None]:
    """Redis' own errors as one of ours, saying what to do; the address with its password is left out."""
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise QueueUnavailable(f"Redis did not answer ({type(error).__name__}); repeating the call is safe") from error
