"""What the two clients send and read back, without doing either: the enqueue script's words and answers.

The synchronous and the asyncio client differ in how they wait for Redis and in nothing else, so the rest stands here.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from uuid import uuid4

from redis import Redis
from rq.defaults import RQ_KEY_PREFIX
from rq.job import Job, JobStatus, Retry
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat

from producer.message import TASK, CancelRequest, Keys, check_queue_name, encode_call

#: The enqueue script's source; both clients load it under its hash.
ENQUEUE_SCRIPT = files("producer").joinpath("scripts/enqueue.lua").read_text("utf-8")
#: Requests in one call of the script: more would hold the server up for longer than a cancel should wait.
CHUNK = 1000
#: Life of RQ's hash and result, s: short once finished (the outcome record lives on), a week where a person must look.
RESULT_TTL_S = 600
FAILURE_TTL_S = 7 * 86_400
#: A pointer outlives any deadline; it is removed with the outcome, and only a job that somebody deleted leaves one.
POINTER_LIFE_S = 8 * 86_400
#: RQ's clean-up requeues a job that has retries left and fails it otherwise; our own bounds decide, never RQ's.
_ENDLESS_RETRIES = 1_000_000
#: What a stock RQ worker allows one step, s: connect, send, answer, and a query after it.
_STEP_TIMEOUT_S = 60
#: How long a durable enqueue waits for the append-only file, ms: everysec syncs within a second.
DURABLE_WAIT_MS = 1500


class CancelQueueError(Exception):
    """Base of the errors that the clients raise, beside :class:`producer.message.InvalidRequest`."""


class QueueUnavailable(CancelQueueError):
    """Redis did not answer in time. The call may or may not have been carried out; repeating it is safe."""


class WaitTimeout(CancelQueueError, TimeoutError):
    """No outcome yet: the request goes on, and the same ticket can be waited for again."""


class NotDurable(CancelQueueError):
    """The request is on the queue, but the server did not confirm that its append-only file holds it."""


class UnknownRequest(CancelQueueError, LookupError):
    """No job of this id is there to be retried: it never was, still runs, ended well, or its record has expired."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request on its way into the script."""

    position: int  # in the caller's order
    id: str
    request: CancelRequest


def rows(requests: Iterable[CancelRequest]) -> Iterator[list[Row]]:
    """Chunks of rows, requests of one order side by side: the script then joins them whatever finishes meanwhile."""
    orders: dict[str, list[Row]] = {}
    for position, request in enumerate(requests):
        orders.setdefault(request.order_key, []).append(Row(position, uuid4().hex, request))
    chunk: list[Row] = []
    for group in orders.values():
        chunk.extend(group)
        if len(chunk) >= CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class Enqueue:
    """The words of the enqueue script for one queue."""

    def __init__(self, queue: str) -> None:
        self.keys = Keys(check_queue_name(queue), RQ_KEY_PREFIX)
        self._template = self._job_fields()

    def _job_fields(self) -> dict[str, Any]:
        """RQ's own hash of such a job, made by RQ, without what differs from request to request."""
        job = Job.create(
            func=TASK,
            connection=Redis(),  # RQ wants one; it is never opened
            serializer=JSONSerializer,
            origin=self.keys.queue,
            timeout=_STEP_TIMEOUT_S,
            result_ttl=RESULT_TTL_S,
            failure_ttl=FAILURE_TTL_S,
            retry=Retry(max=_ENDLESS_RETRIES),
            status=JobStatus.QUEUED,
            description="-",
        )
        job.enqueued_at = now()
        fields = job.to_dict()
        del fields["data"], fields["description"]
        return {name: value.value if isinstance(value, JobStatus) else value for name, value in fields.items()}

    def words(self, chunk: Sequence[Row]) -> list[Any]:
        """KEYS count, KEYS and ARGV of one call."""
        stamp = utcformat(now())
        shared: list[Any] = []
        for name, value in self._template.items():
            shared += (name, stamp if name in ("created_at", "enqueued_at") else value)
        keys = self.keys
        words: list[Any] = [2, keys.waiting, keys.queues]
        words += (keys.job_prefix, keys.order_prefix, keys.outcome_prefix, POINTER_LIFE_S, len(shared), *shared)
        for row in chunk:
            request = row.request
            deadline_ms = "" if request.deadline_s is None else math.ceil(request.deadline_s * 1000)
            data = zlib.compress(encode_call(request), 1)
            urgent = "1" if request.urgent else ""
            words += (row.id, request.order_key, data, request.describe(), deadline_ms, urgent)
        return words

    @staticmethod
    def answers(chunk: Sequence[Row], answer: Sequence[Any]) -> Iterator[tuple[Row, str, bool]]:
        """The row, the id of the job that carries it, and whether another request had made that job."""
        for row, job_id, duplicate in zip(chunk, answer[::2], answer[1::2], strict=True):
            yield row, text(job_id), bool(int(duplicate))


def check_durable(written: Any) -> None:
    """Read the answer of WAITAOF: how many local files, then replicas, hold the write.

    Raises:
        NotDurable: none does, or the server cannot tell (older than 7.2, or without an append-only file).
    """
    if isinstance(written, Exception):
        raise NotDurable(f"enqueued, but not confirmed as durable: {written}") from None
    if int(written[0]) < 1:
        raise NotDurable(f"enqueued, but not in the append-only file within {DURABLE_WAIT_MS} ms")


def text(value: Any) -> str:
    """A word from Redis, whether the caller's connection decodes answers or not."""
    return value.decode() if isinstance(value, bytes) else str(value)
