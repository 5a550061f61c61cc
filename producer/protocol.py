"""What the two clients say to Redis and make of its answers, without doing either.

The synchronous and the asyncio client differ in how they wait for Redis and in nothing else, so the rest stands here.
A conversation is a generator: it yields the commands of one round trip, is sent their answers (an error as a value),
and returns what the caller wanted to know.
"""

from __future__ import annotations

import logging
import math
import os
import zlib
from collections.abc import Awaitable, Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Self, TypeAlias, TypeVar, cast

import redis.exceptions
from rq.defaults import RQ_KEY_PREFIX
from rq.job import JobStatus

from producer.door import checked_ids, checked_requests
from producer.job_fields import words_of_job
from producer.keys import JobField, Keys, Script
from producer.message import CancelRequest, OnTrigger, Outcome, check_queue_name, decode_outcome, encode_call
from producer.redis_url import text as text  # whoever reads an answer takes it from here
from producer.redis_url import why
from producer.untrusted import InvalidRequest, MalformedMessage, checked_flag, clean_text

T = TypeVar("T")
C = TypeVar("C")
Command: TypeAlias = tuple[Any, ...]
#: What is sent in one round trip; it may be gone through again, and may be made while it is sent.
Commands: TypeAlias = Collection[Command]
Conversation: TypeAlias = Generator[Commands, list[Any], T]
Ask: TypeAlias = Callable[[Commands], Awaitable[list[Any]]]

#: Requests in one round trip, keys in one MGET: more would hold the server up for longer than a cancel should wait.
CHUNK = 1000
#: Requests in one call of the enqueue script: after each the server serves others, and workers begin.
_BATCH = 100
#: Bytes that are sent at a time, about.
_PACKET_BYTES = 16 * 1024
#: Entries of the ledger read at a time.
_PAGE = 500
#: How long a call may take, s, if nothing else is said.
TIMEOUT_S = 2.0
#: How long a durable enqueue waits for the append-only file, ms: everysec syncs within a second.
_DURABLE_MS = 1500
#: How late the end of such a wait may come, ms: the server looks for it ten times a second.
_LATENESS_MS = 250
#: RQ's status of a job that goes on only if somebody puts it back.
ENDED = frozenset({JobStatus.FINISHED, JobStatus.FAILED, JobStatus.CANCELED, JobStatus.STOPPED})

_log = logging.getLogger("producer")

#: What is said of a call that may have been carried out though it failed.
IN_DOUBT = (
    "; it may have been carried out. Repeating it is safe by algo id; by client id alone a repeat makes a second job, "
    "which means the order that has the id then"
)


class CancelQueueError(Exception):
    """Base of the errors that the clients raise, beside :class:`producer.message.InvalidRequest`."""


class QueueUnavailable(CancelQueueError):
    """Redis did not answer in time, or refused. The text names its address and the reason, and says of a call that
    writes what a repeat would do: it may have been carried out, or a part of it.

    ``nothing_sent``: surely not, as no connection could be opened, or none was free, before anything of it had left.
    """

    nothing_sent: bool = False


class WaitTimeout(CancelQueueError, TimeoutError):
    """No outcome yet: the request stands, and the same ticket can be waited for again.

    ``is_served`` says whether a live worker serves the queue; None where nobody could tell. ``so_far``: of all open
    orders of a symbol, what is known (:class:`producer.open_orders.OpenOutcome`).
    """

    is_served: bool | None = None
    so_far: Any = None


class NotDurable(CancelQueueError):
    """The requests are on the queue, but the server did not confirm that its append-only file holds them.

    ``tickets`` are those that the call would have returned.
    """

    tickets: Sequence[TicketFields] = ()


class UnknownRequest(CancelQueueError, LookupError):
    """There is no such request: it never was, was removed, or what is known of it has expired; for a retry also: it
    still runs, or ended well.

    ``job_ids`` are all the ids that are so; none of the call's requests was retried.
    """

    def __init__(self, job_ids: Sequence[str], queue: str, kind: str = "failed requests") -> None:
        named = ", ".join(clean_text(job_id, 80) for job_id in job_ids[:3])
        more = f" and {len(job_ids) - 3} more" if len(job_ids) > 3 else ""
        verb = "is" if len(job_ids) == 1 else "are"
        super().__init__(f"{named}{more} {verb} not among the {kind} of queue {queue}")
        self.job_ids = tuple(job_ids)
        self._told = (self.job_ids, queue, kind)

    def __reduce__(self) -> tuple[type[UnknownRequest], tuple[tuple[str, ...], str, str]]:
        return UnknownRequest, self._told  # strategies hand errors from process to process


class LedgerGap(CancelQueueError):
    """Entries of the ledger were trimmed before they were read: the reader fell behind LEDGER_MAXLEN.

    ``after`` is the last position read, ``first`` the oldest entry that is left. To go on there, read after ``resume``.
    """

    def __init__(self, after: str, first: str) -> None:
        missed = f"what stood between it and {first} was not read"
        super().__init__(f"the ledger was trimmed beyond {after}: {missed}; see LEDGER_MAXLEN")
        self.after, self.first = after, first
        ms, number = entry_parts(first)
        self.resume = f"{ms}-{number - 1}" if number else f"{ms - 1}-{2**64 - 1}"

    def __reduce__(self) -> tuple[type[LedgerGap], tuple[str, str]]:
        return LedgerGap, (self.after, self.first)


class NotOurs(redis.exceptions.RedisError):
    """An answer is not about what was asked: whoever gets this trusts no connection that was open."""


#: What comes of an answer that is none to what was asked.
NO_ANSWER = (TypeError, ValueError, LookupError, AttributeError)


#: The note on an error that came before anything of a call was sent.
UNSENT = "nothing was sent"


class NoConnectionFree(redis.exceptions.RedisError):
    """All connections of this client, so ``many``, were taken for as long as the call could wait."""

    def __init__(self, many: int) -> None:
        super().__init__(
            f"all {many} connections of this client were taken until the call's time was up: its own limit, Redis was "
            "not asked"
        )
        self.add_note(UNSENT)


#: The same of a retry.
RETRY_IN_DOUBT = "; it may have been carried out: what was started is no longer among the failed requests"


@dataclass(frozen=True, slots=True)
class TicketFields:
    """A request that is on the queue. ``duplicate``: it shares the job of an unfinished request for the same order."""

    id: str
    request: CancelRequest
    duplicate: bool

    def as_dict(self) -> dict[str, object]:
        """The ticket as the command line prints it."""
        order = {name: getattr(self.request, name) for name in ("algo_id", "client_algo_id", "account")}
        return {"id": self.id, **order, "duplicate": self.duplicate}

    def __reduce__(self) -> tuple[type[Any], tuple[object, ...]]:
        return type(self), (self.id, self.request, self.duplicate)

    @staticmethod
    def needed(client: C | None) -> C:
        """The ticket's client.

        Raises:
            InvalidRequest: it is a copy from another process and has none.
        """
        if client is None:
            raise InvalidRequest("ticket", None, "has no client in this process: use client.wait(ticket)")
        return client

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: object) -> Self:
        return self


def call(script: Script, *words: Callable[[], Sequence[Any]]) -> Conversation[list[Any]]:
    """Answers of the script, called once with each of ``words``."""
    answers = yield Calls(("EVALSHA", script.sha, 0), words)
    unknown = [n for n in range(len(words)) if isinstance(answers[n], redis.exceptions.NoScriptError)]
    if unknown:
        again = yield Calls(("EVAL", script.source, 0), [words[n] for n in unknown])
        for n, answer in zip(unknown, again, strict=True):
            answers[n] = answer
    return good(answers)


class Calls(Collection[Command]):
    """Commands that begin alike. Each is made when its turn comes, so that the server works on the first meanwhile."""

    def __init__(self, how: Command, words: Sequence[Callable[[], Sequence[Any]]]) -> None:
        self._how = how
        self._words = words

    def __len__(self) -> int:
        return len(self._words)

    def __iter__(self) -> Iterator[Command]:
        for words in self._words:
            yield (*self._how, *words())

    def __contains__(self, command: object) -> bool:
        return command in list(self)


class Slow(list[Command]):
    """Commands that keep a connection waiting, so they have one of their own; those who ask alike while it is taken are
    answered together. An error takes the place of each answer."""


async def carried(conversation: Conversation[T], ask: Ask) -> T:
    """What a conversation comes to, by somebody who gives the answers of a round trip."""
    try:
        commands = next(conversation)
        while True:
            commands = conversation.send(await ask(commands))
    except StopIteration as end:
        return cast(T, end.value)


def weight(commands: Commands) -> int:
    """How much of the room of a common write they take; :data:`CHUNK` is the most."""
    is_batch = isinstance(commands, Calls) and len(commands) > 1
    return 0 if isinstance(commands, Slow) else len(commands) * (_BATCH if is_batch else 1)


def packets(connection: Any, trips: Iterable[Commands]) -> Iterator[bytes]:
    """What is to be sent, as it gets made: the server works on the first meanwhile."""
    packet: list[bytes] = []
    size = 0
    for commands in trips:
        for command in commands:
            packed = connection.pack_command(*command)
            packet += packed
            size += sum(map(len, packed))
            if size > _PACKET_BYTES:
                yield b"".join(packet)
                packet, size = [], 0
    if packet:
        yield b"".join(packet)


class Row(NamedTuple):
    """One request on its way into the script."""

    position: int  # in the caller's order
    id: str  # that of the job, if it makes one; all requests for one order have the same
    request: CancelRequest


def rows(requests: Iterable[CancelRequest]) -> Iterator[list[list[Row]]]:
    """Rows for one round trip after the other, each in batches; requests of one order stand side by side in one batch:
    the script then joins them whatever finishes meanwhile."""
    orders: dict[str, list[Row]] = {}
    for position, request in enumerate(requests):
        group = orders.setdefault(request.order_key or f"{position}", [])
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


class Accepted(NamedTuple):
    """What an enqueue came to: id of the carrying job, request and duplicate, in the caller's order; for a single
    request when it was made by Redis' clock, ms, 0 if that is not known."""

    carried: list[tuple[str, CancelRequest, bool]]
    not_durable: NotDurable | None
    asked_ms: int = 0


class Wire:
    """The conversations about one queue. ``timeout_s`` is how long a call may take."""

    def __init__(self, queue: str, timeout_s: float = TIMEOUT_S) -> None:
        self.keys = Keys(check_queue_name(queue), RQ_KEY_PREFIX)
        self.timeout_s = timeout_s
        #: What no call changes stands in the script itself: it is not made, packed, sent and parsed at each call.
        constants = self.keys.lua() | words_of_job(queue)
        self.enqueue_script = Script(constants, "producer/place.lua", "producer/enqueue.lua")
        self._retry_script = Script(self.keys.lua(), "producer/retry.lua")

    def enqueue(self, requests: Iterable[CancelRequest], durable: bool) -> Conversation[Accepted]:
        """Put requests on the queue, one round trip for each :data:`CHUNK`."""
        checked_flag("durable", durable)
        carried: dict[int, tuple[str, CancelRequest, bool]] = {}
        asked_ms = 0
        for chunk in rows(checked_requests(requests)):
            answers = yield from call(self.enqueue_script, *(partial(self._enqueue_words, batch) for batch in chunk))
            for batch, answer in zip(chunk, answers, strict=True):
                if not isinstance(answer, list) or len(answer) != 2 * len(batch) + 1:
                    raise NotOurs
                first_id, _, at_ms = text(answer[0]).partition(" ")
                if first_id != batch[0].id or not at_ms.isdigit():
                    raise NotOurs
                asked_ms = int(at_ms)
                for row, job_id, duplicate in zip(batch, answer[1::2], answer[2::2], strict=True):
                    carried[row.position] = (text(job_id), row.request, bool(int(duplicate)))
        not_durable = (yield from self._to_file()) if durable and carried else None
        return Accepted([carried[position] for position in range(len(carried))], not_durable, asked_ms)

    def _to_file(self) -> Conversation[NotDurable | None]:
        """Wait until the server's append-only file holds what was written.

        WAITAOF waits for what its own connection has written, and for all that was written before that.
        """
        wait_ms = self.server_wait_ms(_DURABLE_MS)
        marked, held = yield Slow([("SET", self.keys.durable, "1", "PX", wait_ms), ("WAITAOF", 1, 0, wait_ms)])
        for answer in (marked, held):
            if isinstance(answer, Exception):  # older than 7.2, without such a file, or it does not answer
                said = f"{why(answer)} {clean_text(answer)}".strip()
                return NotDurable(f"enqueued, but this server cannot confirm it as durable: {said}")
        if int(held[0]) < 1:
            return NotDurable(f"enqueued, but not in the append-only file within {wait_ms} ms")
        return None

    def _enqueue_words(self, batch: Sequence[Row]) -> list[Any]:
        """ARGV of one call."""
        words: list[Any] = [_stamp()]
        for row in batch:
            request = row.request
            deadline_ms = "" if request.deadline_s is None else math.ceil(request.deadline_s * 1000)
            urgent = "1" if request.urgent else ""
            order = request.order_key if request.joins else ""
            child = "1" if request.on_trigger == OnTrigger.CANCEL_CHILD else ""
            words += (row.id, order, encode_call(request), request.describe(), deadline_ms, urgent, child)
        return words

    def newest(self) -> Conversation[str]:
        """The ledger's newest entry."""
        (newest,) = good((yield [("XREVRANGE", self.keys.outcomes, "+", "-", "COUNT", 1)]))
        return text(newest[0][0]) if newest else "0-0"

    def page(self, after: str, *, gaps: bool = True) -> Conversation[list[tuple[str, Any]]]:
        """Stream id and record of some entries after one.

        Raises:
            LedgerGap: others after that one were trimmed (unless ``gaps`` is false: who counts them knows better).
        """
        page, told = yield [
            ("XREAD", "COUNT", _PAGE, "STREAMS", self.keys.outcomes, after),
            ("XINFO", "STREAM", self.keys.outcomes),
        ]
        entries = stream_entries(page[0][1] if good([page])[0] else [])
        if not is_rising([after, *(entry_id for entry_id, _ in entries)]):
            raise NotOurs
        if gaps and not isinstance(told, Exception) and (first := _oldest_after_gap(after, told)) is not None:
            raise LedgerGap(after, first)
        return entries

    def retry(self, job_ids: Iterable[object], missing_ok: bool) -> Conversation[list[str]]:
        """Start new runs; gives the ids that were started.

        Raises:
            UnknownRequest: ids are not among the failed ones; unless ``missing_ok``, nothing was started then.
        """
        chunks = list(pages(list(dict.fromkeys(checked_ids(job_ids)))))
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

    def statuses(self, job_ids: Iterable[object]) -> Conversation[list[str | None]]:
        """RQ's status of each job, None where there is no such job."""
        found: list[str | None] = []
        for page in pages(checked_ids(job_ids)):
            answers = good((yield [("HGET", self.keys.job_prefix + job_id, "status") for job_id in page]))
            found += [None if status is None else text(status) for status in answers]
        return found

    def job_fields(self, job_id: str) -> Conversation[dict[bytes, bytes]]:
        """RQ's hash of a job; empty where there is none."""
        (words,) = good((yield [("HGETALL", self.keys.job_prefix + job_id)]))
        return fields_of(words)

    def server_wait_ms(self, most_ms: int) -> int:
        """How long the server may be asked to wait, so that its answer comes before the call is given up."""
        return max(1, min(most_ms, int(self.timeout_s * 1000) - _LATENESS_MS))


def _stamp() -> str:
    """Now as rq.utils.utcformat writes it, which takes three times as long."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def requeue_commands(keys: Keys, job_id: str) -> tuple[Command, Command]:
    """What :func:`is_requeued` has to know of a request that has failed."""
    fields = ("status", JobField.DONE, JobField.RUN)
    return ("HMGET", keys.job_prefix + job_id, *fields), ("ZSCORE", keys.failed, job_id)


def is_requeued(state: Any, score: Any, recorded_run: int) -> bool:
    """Whether a failed job's record is of the run before: a new run has begun (and no claim has removed the record
    yet), or ended since the record was read, or RQ has put the job back, as `producer/scripts/job.lua` has it: its
    entry has left the registry of failed ones. A copy that RQ saved late over an ended job has not."""
    if isinstance(state, Exception):
        return False
    status, done, run = state
    if done is None:
        return run is not None
    if (number := text(run)[:20]).isdecimal() and int(number) > recorded_run:
        return True
    return score is None and (status is None or text(status) not in ENDED)


def entry_parts(entry_id: str) -> tuple[int, int]:
    """A stream id as the two numbers that order it."""
    ms, _, number = entry_id.partition("-")
    return int(ms), int(number or 0)


def is_rising(entry_ids: Sequence[str]) -> bool:
    """Whether each of these stream ids comes after the one before it."""
    parts = [entry_parts(entry_id) for entry_id in entry_ids]
    return all(one < other for one, other in pairwise(parts))


def _oldest_after_gap(after: str, told: Any) -> str | None:
    """The ledger's oldest entry, if entries between ``after`` and it were trimmed, by what XINFO STREAM says.

    Where a position is no entry any more, nobody knows how many there were between it and the oldest that is left.
    """
    known = {text(name): value for name, value in fields_of(told).items()}
    oldest = known.get("first-entry")
    is_whole = known.get("entries-added") == known.get("length")  # before Redis 7 it does not count them
    if not oldest or is_whole or entry_parts(after)[0] == 0:
        return None
    first = text(oldest[0])
    gap = LedgerGap(after, first)
    return first if entry_parts(after) < entry_parts(gap.resume) else None


def entry_outcome(entry_id: str, fields: Mapping[Any, Any]) -> Outcome:
    """The outcome that a ledger entry holds.

    Raises:
        MalformedMessage: it holds none of this version; the text names the entry.
    """
    try:
        return decode_outcome(fields.get(b"outcome", b""))
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


def good(answers: list[Any]) -> list[Any]:
    """The answers, once none of them is an error; raises the first that is."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def is_wrong_type(answer: Any) -> bool:
    """Whether it says that a key holds another type of value: the fault of that key alone, not of the server."""
    return isinstance(answer, redis.exceptions.ResponseError) and str(answer).startswith("WRONGTYPE")


def fields_of(answer: Sequence[Any]) -> dict[Any, Any]:
    """What Redis gives as names and values one after the other."""
    return dict(zip(answer[::2], answer[1::2], strict=True))


def stream_entries(entries: Iterable[Any]) -> list[tuple[str, dict[Any, Any]]]:
    """Stream ids and fields."""
    return [(text(entry_id), fields_of(fields or ())) for entry_id, fields in entries]
