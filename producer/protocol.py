"""What the two clients say to Redis and make of its answers, without doing either.

The synchronous and the asyncio client differ in how they wait for Redis and in nothing else, so the rest stands here.
A conversation is a generator: it yields the commands of one round trip, is sent their answers (an error as a value),
and returns what the caller wanted to know.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import time
import zlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeAlias, TypeVar

import redis.exceptions
from redis import Redis
from rq.defaults import RQ_KEY_PREFIX
from rq.job import Job, JobStatus, Retry
from rq.serializers import JSONSerializer

from producer.keys import ENDLESS_RETRIES, FAILURE_TTL_S, RESULT_TTL_S, JobField, Keys, Script
from producer.message import (
    TASK,
    CancelRequest,
    InvalidRequest,
    MalformedMessage,
    Outcome,
    check_queue_name,
    clean_text,
    decode_outcome,
    encode_call,
)
from producer.redis_url import why

T = TypeVar("T")
Command: TypeAlias = tuple[Any, ...]
#: What is sent in one round trip; it may be gone through again, and may be made while it is sent.
Commands: TypeAlias = Collection[Command]
Conversation: TypeAlias = Generator[Commands, list[Any], T]

#: Requests in one round trip, keys in one MGET: more would hold the server up for longer than a cancel should wait.
CHUNK = 1000
#: Requests in one call of the enqueue script: after each the server serves others, and workers begin.
_BATCH = 100
#: Entries of the ledger read at a time.
_PAGE = 500
#: An announcement can be lost with its connection, so a waiter looks for itself this often, s.
_LOOK_S = 1.0
#: How long one read of the ledger waits for a new entry, ms.
_FOLLOW_MS = 1000
#: How long a durable enqueue waits for the append-only file, ms: everysec syncs within a second.
_DURABLE_MS = 1500
#: How late the end of such a wait may come, ms: the server looks for it ten times a second.
_LATENESS_MS = 250
#: What a stock RQ worker allows one step, s: connect, send, answer, and a query after it.
_STEP_TIMEOUT_S = 60

#: RQ's status of a job that goes on only if somebody puts it back.
_ENDED = frozenset({JobStatus.FINISHED, JobStatus.FAILED, JobStatus.CANCELED, JobStatus.STOPPED})

_log = logging.getLogger("producer")

_STREAM_ID = re.compile(r"\$|[0-9]{1,20}(-[0-9]{1,20})?")


class CancelQueueError(Exception):
    """Base of the errors that the clients raise, beside :class:`producer.message.InvalidRequest`."""


class QueueUnavailable(CancelQueueError):
    """Redis did not answer in time, or refused. The call may have been carried out, or a part of it; repeating it is
    safe."""


class WaitTimeout(CancelQueueError, TimeoutError):
    """No outcome yet: the request goes on, and the same ticket can be waited for again."""


class NotDurable(CancelQueueError):
    """The requests are on the queue, but the server did not confirm that its append-only file holds them.

    ``tickets`` are those that the call would have returned.
    """

    tickets: Sequence[TicketFields] = ()


class UnknownRequest(CancelQueueError, LookupError):
    """No job of this id is there to be retried: it never was, still runs, ended well, or its record has expired.

    ``job_ids`` are all the ids that are so; none of the call's requests was retried.
    """

    def __init__(self, job_ids: Sequence[str], queue: str) -> None:
        named = ", ".join(clean_text(job_id, 80) for job_id in job_ids[:3])
        more = f" and {len(job_ids) - 3} more" if len(job_ids) > 3 else ""
        verb = "is" if len(job_ids) == 1 else "are"
        super().__init__(f"{named}{more} {verb} not among the failed requests of queue {queue}")
        self.job_ids = tuple(job_ids)


@dataclass(frozen=True, slots=True)
class TicketFields:
    """A request that is on the queue. ``duplicate``: it shares the job of an unfinished request for the same order."""

    id: str
    request: CancelRequest
    duplicate: bool

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


def call(script: Script, *words: Callable[[], Sequence[Any]], then: Sequence[Command] = ()) -> Conversation[list[Any]]:
    """Answers of the script, called once with each of ``words``, and of ``then`` on the same connection."""
    answers = yield Calls(("EVALSHA", script.sha, 0), words, then)
    unknown = [n for n in range(len(words)) if isinstance(answers[n], redis.exceptions.NoScriptError)]
    if unknown:
        again = yield Calls(("EVAL", script.source, 0), [words[n] for n in unknown], then)
        for n, answer in zip(unknown, again, strict=False):
            answers[n] = answer
        answers[len(words) :] = again[len(unknown) :]
    good(answers[: len(words)])
    return answers


class Calls(Collection[Command]):
    """Commands that begin alike. Each is made when its turn comes, so that the server works on the first meanwhile; the
    answers are taken as the server gives them."""

    def __init__(
        self, how: Command, words: Sequence[Callable[[], Sequence[Any]]], then: Sequence[Command] = ()
    ) -> None:
        self._how = how
        self._words = words
        self._then = then

    def __len__(self) -> int:
        return len(self._words) + len(self._then)

    def __iter__(self) -> Iterator[Command]:
        for words in self._words:
            yield (*self._how, *words())
        yield from self._then

    def __contains__(self, command: object) -> bool:
        return any(one == command for one in self)


@dataclass(frozen=True, slots=True)
class Row:
    """One request on its way into the script."""

    position: int  # in the caller's order
    id: str  # that of the job, if it makes one; all requests for one order have the same
    request: CancelRequest


def rows(requests: Iterable[CancelRequest]) -> Iterator[list[list[Row]]]:
    """Rows for one round trip after the other, each in batches; requests of one order stand side by side in one batch:
    the script then joins them whatever finishes meanwhile."""
    orders: dict[str, list[Row]] = {}
    for position, request in enumerate(requests):
        group = orders.setdefault(request.order_key, [])
        group.append(Row(position, group[0].id if group else os.urandom(16).hex(), request))
    chunk: list[list[Row]] = []
    batch: list[Row] = []
    rows_in_chunk = 0
    for group in orders.values():
        batch.extend(group)
        rows_in_chunk += len(group)
        if len(batch) >= _BATCH or rows_in_chunk >= CHUNK:
            chunk.append(batch)
            batch = []
        if rows_in_chunk >= CHUNK:
            yield chunk
            chunk, rows_in_chunk = [], 0
    if batch:
        chunk.append(batch)
    if chunk:
        yield chunk


@dataclass(frozen=True, slots=True)
class Accepted:
    """What an enqueue came to: id of the carrying job, request and duplicate, in the caller's order."""

    carried: list[tuple[str, CancelRequest, bool]]
    not_durable: NotDurable | None


class Wire:
    """The conversations about one queue. ``timeout_s`` is how long the connection lets the server take to answer."""

    def __init__(self, queue: str, timeout_s: float | None = None) -> None:
        self.keys = Keys(check_queue_name(queue), RQ_KEY_PREFIX)
        self._timeout_s = timeout_s
        #: What no call changes stands in the script itself: it is not made, packed, sent and parsed at each call.
        fields = [word for field in self._job_fields().items() for word in field]
        self.enqueue_script = Script(self.keys.lua() | {"JOB_FIELDS": fields}, "producer/enqueue.lua")
        self._retry_script = Script(self.keys.lua(), "producer/retry.lua")

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
            retry=Retry(max=ENDLESS_RETRIES),
            status=JobStatus.QUEUED,
            description="-",
        )
        fields = job.to_dict()
        for name in ("data", "description", "created_at"):
            del fields[name]
        known = {name: value.value if isinstance(value, JobStatus) else value for name, value in fields.items()}
        return {name: value for name, value in known.items() if value != ""}  # to RQ, what is absent is empty

    def enqueue(self, requests: Iterable[CancelRequest], durable: bool) -> Conversation[Accepted]:
        """Put requests on the queue, one round trip for each :data:`CHUNK`."""
        carried: dict[int, tuple[str, CancelRequest, bool]] = {}
        not_durable: NotDurable | None = None
        wait_ms = self._server_wait_ms(_DURABLE_MS)
        then: list[Command] = [("WAITAOF", 1, 0, wait_ms)] if durable else []
        for chunk in rows(requests):
            words = [partial(self._enqueue_words, batch) for batch in chunk]
            answers = yield from call(self.enqueue_script, *words, then=then)
            for batch, answer in zip(chunk, answers, strict=False):
                for row, job_id, duplicate in zip(batch, answer[::2], answer[1::2], strict=True):
                    carried[row.position] = (text(job_id), row.request, bool(int(duplicate)))
            if then:
                not_durable = not_durable or _not_durable(answers[-1], wait_ms)
        return Accepted([carried[position] for position in range(len(carried))], not_durable)

    def _enqueue_words(self, batch: Sequence[Row]) -> list[Any]:
        """ARGV of one call."""
        words: list[Any] = [_stamp()]
        for row in batch:
            request = row.request
            deadline_ms = "" if request.deadline_s is None else math.ceil(request.deadline_s * 1000)
            urgent = "1" if request.urgent else ""
            order = request.order_key if request.joins else ""
            words += (row.id, order, encode_call(request), request.describe(), deadline_ms, urgent)
        return words

    def outcome(self, job_id: str) -> Conversation[Outcome | None]:
        """One outcome, or None while there is none."""
        (record,) = good((yield Calls(("GET",), [lambda: (self.keys.outcome_prefix + job_id,)])))
        found = {} if record is None else {job_id: _outcome_of(job_id, record)}
        yield from _without_requeued(self.keys, found)
        return found.get(job_id)

    def outcomes_of(self, job_ids: Iterable[str]) -> Conversation[dict[str, Outcome]]:
        """As :func:`read_outcomes`; an unreadable one is left out and logged, the others are of use without it."""
        found, unreadable = yield from read_outcomes(self.keys, job_ids)
        for error in unreadable.values():
            _log.warning("%s", error)
        return found

    def newest(self) -> Conversation[str]:
        """The ledger's newest entry."""
        (newest,) = good((yield [("XREVRANGE", self.keys.outcomes, "+", "-", "COUNT", 1)]))
        return text(newest[0][0]) if newest else "0-0"

    def page(self, after: str, follow: bool) -> Conversation[list[tuple[str, Any]]]:
        """Stream id and record of the entries after one; ``follow`` lets the server wait for some."""
        block: Command = ("BLOCK", self._server_wait_ms(_FOLLOW_MS)) if follow else ()
        (page,) = good((yield [("XREAD", "COUNT", _PAGE, *block, "STREAMS", self.keys.outcomes, after)]))
        return [(text(entry_id), fields) for entry_id, fields in _entries(page)]

    def retry(self, job_ids: Iterable[str], missing_ok: bool) -> Conversation[list[str]]:
        """Start new runs; gives the ids that were started.

        Raises:
            UnknownRequest: ids are not among the failed ones; unless ``missing_ok``, nothing was started then.
        """
        chunks = list(pages(list(dict.fromkeys(job_ids))))
        if len(chunks) > 1 and not missing_ok:
            self._all_known((yield from self._each(chunks, "check")))
        started: list[str] = []
        for chunk in chunks:
            unknown = yield from self._each([chunk], "known" if missing_ok else "all")
            if not missing_ok:
                self._all_known(unknown)
            started += [job_id for job_id in chunk if job_id not in unknown]
        return started

    def _all_known(self, unknown: Iterable[str]) -> None:
        if named := list(unknown):
            raise UnknownRequest(named, self.keys.queue)

    def _each(self, chunks: Iterable[list[str]], what: str) -> Conversation[dict[str, None]]:
        unknown = dict[str, None]()
        for chunk in chunks:
            (answer,) = yield from call(
                self._retry_script, partial(tuple, (_stamp(), zlib.compress(b""), what, *chunk))
            )
            unknown |= dict.fromkeys(text(job_id) for job_id in answer)
        return unknown

    def failed_ids(self) -> Conversation[list[str]]:
        """Ids in RQ's FailedJobRegistry, oldest first."""
        (job_ids,) = good((yield [("ZRANGE", self.keys.failed, 0, -1)]))
        return [text(job_id) for job_id in job_ids]

    def statuses(self, job_ids: Sequence[str]) -> Conversation[list[str | None]]:
        """RQ's status of each job, None where there is no such job."""
        found: list[str | None] = []
        for page in pages(job_ids):
            answers = good((yield [("HGET", self.keys.job_prefix + job_id, "status") for job_id in page]))
            found += [None if status is None else text(status) for status in answers]
        return found

    def _server_wait_ms(self, most_ms: int) -> int:
        """How long the server may be asked to wait, so that its answer comes before the connection gives up."""
        if self._timeout_s is None:
            return most_ms
        return max(1, min(most_ms, int(self._timeout_s * 1000) - _LATENESS_MS))


def read_outcomes(
    keys: Keys, job_ids: Iterable[str]
) -> Conversation[tuple[dict[str, Outcome], dict[str, MalformedMessage]]]:
    """Those outcomes that are there, and the error for each record that cannot be read.

    One round trip for each :data:`CHUNK` ids, two where some have failed.
    """
    found: dict[str, Outcome] = {}
    unreadable: dict[str, MalformedMessage] = {}
    for page in pages(list(job_ids)):
        (records,) = good((yield [("MGET", *(keys.outcome_prefix + job_id for job_id in page))]))
        read: dict[str, Outcome] = {}
        for job_id, record in zip(page, records, strict=True):
            try:
                read |= {} if record is None else {job_id: _outcome_of(job_id, record)}
            except MalformedMessage as error:
                unreadable[job_id] = error
        yield from _without_requeued(keys, read)
        found |= read
    return found, unreadable


def _outcome_of(job_id: str, record: Any) -> Outcome:
    """What the record of a request says; the error names the request, since many are read at once."""
    try:
        return decode_outcome(record)
    except MalformedMessage as error:
        raise MalformedMessage(f"outcome of {clean_text(job_id)}: {error}") from None


def _without_requeued(keys: Keys, found: dict[str, Outcome]) -> Conversation[None]:
    """Take out what has no outcome yet: a failed request that RQ has put back belongs to its next run, though the
    earlier one's record stands until a worker or another request comes by."""
    failed = [job_id for job_id, outcome in found.items() if outcome.kind.failed]
    if not failed:
        return
    answers = yield [command for job_id in failed for command in requeue_commands(keys, job_id)]
    for job_id, state, score in zip(failed, answers[::2], answers[1::2], strict=True):
        if is_requeued(state, score):
            del found[job_id]


def _stamp() -> str:
    """Now as rq.utils.utcformat writes it, which takes three times as long."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def requeue_commands(keys: Keys, job_id: str) -> tuple[Command, Command]:
    """What :func:`is_requeued` has to know of a request that has failed."""
    return ("HMGET", keys.job_prefix + job_id, "status", JobField.DONE), ("ZSCORE", keys.failed, job_id)


def is_requeued(state: Any, score: Any) -> bool:
    """Whether RQ has put a failed job back, as `producer/scripts/job.lua` has it: its entry has left the registry of
    failed ones. A copy that RQ saved late over an ended job has not."""
    if isinstance(state, Exception) or score is not None:
        return False
    status, done = state
    return done is not None and (status is None or text(status) not in _ENDED)


def timeout_of(options: Mapping[str, Any]) -> float | None:
    """The socket time-out among the options of a connection pool, s."""
    timeout_s = options.get("socket_timeout")
    return None if timeout_s is None else float(timeout_s)


def patience(job_id: str, timeout_s: float | None) -> Callable[[], float]:
    """A function that says for how many seconds to listen before the next look.

    Calling it raises WaitTimeout once ``timeout_s`` seconds have passed since now (None: never).
    """
    ends_at = math.inf if timeout_s is None else time.monotonic() + timeout_s

    def listen_s() -> float:
        left_s = ends_at - time.monotonic()
        if left_s <= 0:
            raise WaitTimeout(f"no outcome of {job_id} within {timeout_s} s; the request goes on")
        return min(left_s, _LOOK_S)

    return listen_s


def check_position(after: str) -> str:
    """Return ``after`` if it can name a place in the ledger.

    Raises:
        InvalidRequest: it cannot.
    """
    if not _STREAM_ID.fullmatch(after):
        raise InvalidRequest("after", after, "must be a stream id such as 1700000000000-0, or $ for the newest entry")
    return after


def entry_outcome(entry_id: str, fields: Mapping[Any, Any]) -> Outcome:
    """The outcome that a ledger entry holds.

    Raises:
        MalformedMessage: it holds none of this version; the text names the entry.
    """
    try:
        return decode_outcome(fields.get(b"outcome") or fields.get("outcome") or b"")
    except MalformedMessage as error:
        raise MalformedMessage(f"ledger entry {clean_text(entry_id)}: {error}") from None


def readable_entries(page: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Outcome | None]]:
    """Stream id and outcome of each entry, None for one that cannot be read: it is logged, and the reading goes on."""
    for entry_id, fields in page:
        try:
            yield entry_id, entry_outcome(entry_id, fields)
        except MalformedMessage as error:
            _log.warning("%s", error)
            yield entry_id, None


def pages(job_ids: Sequence[str]) -> Iterator[list[str]]:
    """The ids, :data:`CHUNK` at a time."""
    for start in range(0, len(job_ids), CHUNK):
        yield list(job_ids[start : start + CHUNK])


@contextlib.contextmanager
def availability() -> Iterator[None]:
    """Redis' own errors as one of ours; the address with its password, and whatever quotes a command, is left out."""
    try:
        yield
    except redis.exceptions.AuthenticationError as error:
        raise QueueUnavailable(f"Redis refused the login ({type(error).__name__})") from None
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
        raise QueueUnavailable(f"Redis did not answer ({why(error)}); repeating the call is safe") from error
    except redis.exceptions.ResponseError as error:
        raise QueueUnavailable(f"Redis refused ({why(error)})") from None
    except redis.exceptions.RedisError as error:
        raise QueueUnavailable(f"Redis cannot be used ({why(error)})") from None


def good(answers: list[Any]) -> list[Any]:
    """The answers, once none of them is an error; raises the first that is."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def is_wrong_type(answer: Any) -> bool:
    """Whether it says that a key holds another type of value: the fault of that key alone, not of the server."""
    return isinstance(answer, redis.exceptions.ResponseError) and str(answer).startswith("WRONGTYPE")


def text(value: Any) -> str:
    """A word from Redis, whether the caller's connection decodes answers or not."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _not_durable(written: Any, wait_ms: int) -> NotDurable | None:
    """Read the answer of WAITAOF: how many local files, then replicas, hold the write.

    A server older than 7.2, or without an append-only file, answers with an error.
    """
    if isinstance(written, Exception):
        return NotDurable(f"enqueued, but this server cannot confirm it as durable: {clean_text(str(written))}")
    if int(written[0]) < 1:
        return NotDurable(f"enqueued, but not in the append-only file within {wait_ms} ms")
    return None


def _entries(page: Any) -> list[Any]:
    """Entries of a one-stream XREAD, in either shape that redis-py gives (list by RESP2, mapping by RESP3)."""
    if not page:
        return []
    stream = next(iter(page.values())) if isinstance(page, dict) else page[0][1]
    return list(stream[0] if stream and isinstance(stream[0], list) else stream)
