"""What is known of one request: from its outcome, its job, or both, as a page shows it.

Operators look when something is wrong, so nothing here raises for what stands in Redis: a record, job or id that is
not of this contract is shown with the reason why it cannot be read. Reading changes nothing.
"""

from __future__ import annotations

import binascii
import re
import zlib
from base64 import b64decode
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rq.job import JobStatus

from producer.keys import Band, JobField, Keys
from producer.message import (
    MAX_ATTEMPTS_BYTES,
    Attempt,
    CancelRequest,
    Outcome,
    OutcomeKind,
    decode_attempts,
    decode_call,
    decode_outcome,
)
from producer.protocol import Command, Conversation, good, is_requeued, pages, stream_entries, text
from producer.untrusted import MAX_PAYLOAD_BYTES, MalformedMessage, MessageError, clean_text
from producer.workers import number, stamp_s

#: What an id must look like to stand in an address or a form; RQ itself allows less.
USABLE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:~@+-]{0,199}")
#: States of a job whose outcome is still to come, in RQ's words: what the index of unfinished jobs says of it.
_STATES = {Band.HELD: JobStatus.STARTED, Band.WAITING: JobStatus.QUEUED, Band.RETRY: JobStatus.SCHEDULED}
_JOB_FIELDS = (
    *("status", "data", "created_at", "ended_at", JobField.ENQUEUED_AT_MS, JobField.DEADLINE_AT_MS),
    *(JobField.RUN, JobField.ATTEMPTS, JobField.OPEN_AT_MS, JobField.DONE),
)
#: What a strategy can write of any length, and how much of it is read of one job, bytes.
_MEASURED = {"data": MAX_PAYLOAD_BYTES, JobField.ATTEMPTS: MAX_ATTEMPTS_BYTES}
#: Of a thousand jobs so much more is read as of one.
_BUDGET = 8
#: Most attempts that are shown of a request, the newest: no worker keeps more.
MAX_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of one request: from its outcome, its job, or both. ``faults`` say what could not be read."""

    id: str
    entry: str | None = None  # the ledger's id of its outcome, where it was read there
    outcome: Outcome | None = None
    order: CancelRequest | None = None  # what the job asks for
    kind: OutcomeKind | None = None
    error: str | None = None
    status: str | None = None  # RQ's; None where there is no job (any more)
    state: str | None = None  # of a job whose outcome is still to come: queued, started or scheduled
    in_failed: bool = False  # it stands in the failed registry
    run: int | None = None
    attempts: tuple[Attempt, ...] = ()
    enqueued_at_ms: int | None = None
    ended_at_ms: int | None = None
    deadline_at_ms: int | None = None
    sent_at_ms: int | None = None  # since when an attempt may be out
    due_at_ms: int | None = None  # of the next attempt
    lease_ends_at_ms: int | None = None  # of whoever has it in hand
    faults: tuple[str, ...] = field(default=())

    @property
    def usable(self) -> bool:
        """Whether the id can stand in an address and be retried from a page."""
        return USABLE_ID.fullmatch(self.id) is not None

    @property
    def retryable(self) -> bool:
        """Whether a new run can be started: it is among the failed ones, and its job is still there."""
        return self.in_failed and self.status is not None and self.usable

    @property
    def open(self) -> bool:
        """Whether its outcome is still to come."""
        return self.state is not None

    def of_order(self, name: str) -> Any:
        """A field that the outcome and the request share; the outcome's says more (a symbol that was learned)."""
        value = None if self.outcome is None else getattr(self.outcome, name)
        return getattr(self.order, name) if value is None and self.order is not None else value


def requests_of(keys: Keys, job_ids: Sequence[str]) -> Conversation[list[Seen]]:
    """What is known of each of these, in their order: three round trips for each thousand."""
    found: list[Seen] = []
    for page in pages(job_ids):
        faults = yield from _too_large(keys, page)
        records, *rest = yield [
            ("MGET", *(keys.outcome_prefix + job_id for job_id in page)),
            *(command for job_id in page for command in _job_commands(keys, job_id, faults[job_id])),
        ]
        good([records])
        states = zip(page, records, rest[::3], rest[1::3], rest[2::3], strict=True)
        seen = [_seen(*words, faults[words[0]]) for words in states]
        found += yield from _with_results(keys, seen)
    return found


def _too_large(keys: Keys, job_ids: Sequence[str]) -> Conversation[dict[str, dict[str, str]]]:
    """The fields of each job that are not to be read, with the reason."""
    fields = [(job_id, name) for job_id in job_ids for name in _MEASURED]
    lengths = yield [("HSTRLEN", keys.job_prefix + job_id, name) for job_id, name in fields]
    found: dict[str, dict[str, str]] = {job_id: {} for job_id in job_ids}
    left = {name: _BUDGET * most for name, most in _MEASURED.items()}
    for (job_id, name), length in zip(fields, lengths, strict=True):
        size = 0 if isinstance(length, Exception) else int(length)
        if size > min(_MEASURED[name], left[name]):
            found[job_id][name] = f"its field {name} is not read: {size:,} bytes"
        else:
            left[name] -= size
    return found


def _job_commands(keys: Keys, job_id: str, unread: Container[str]) -> list[Command]:
    fields = [name for name in _JOB_FIELDS if name not in unread]
    return [
        ("HMGET", keys.job_prefix + job_id, *fields),
        ("ZSCORE", keys.failed, job_id),
        ("ZSCORE", keys.unfinished, job_id),
    ]


def _seen(job_id: str, record: Any, job: Any, failed: Any, index: Any, unread: Mapping[str, str]) -> Seen:
    faults = [*unread.values()]
    if not isinstance(job, Exception):
        told = iter(job)
        job = [None if name in unread else next(told) for name in _JOB_FIELDS]
    seen = replace(_with_job(Seen(job_id), job, faults), in_failed=_there(failed))
    done = None if isinstance(job, Exception) else job[-1]
    outcome = _decoded(record, faults)
    if outcome is not None and outcome.kind.failed and is_requeued((seen.status, done, seen.run), failed, outcome.run):
        seen = _with_state(seen, index)  # the record is of the run before
    elif outcome is not None:
        seen = with_outcome(seen, outcome)
    elif done is None and record is None:
        seen = _with_state(seen, index)
    if (made := len(seen.attempts)) > MAX_SHOWN:
        faults.append(f"it has {made:,} attempts: the last {MAX_SHOWN} are shown")
        seen = replace(seen, attempts=seen.attempts[-MAX_SHOWN:])
    return replace(seen, faults=tuple(faults))


def _decoded(record: Any, faults: list[str]) -> Outcome | None:
    try:
        return None if record is None else decode_outcome(record)
    except MalformedMessage as error:
        faults.append(f"its outcome cannot be read: {error}")
        return None


def _there(answer: Any) -> bool:
    return answer is not None and not isinstance(answer, Exception)


def _with_state(seen: Seen, index: Any) -> Seen:
    """Add where it stands: its score in the index tells, and RQ's status of what no worker has seen yet, or what has a
    score of no band."""
    if seen.status is None:
        return seen
    score = max(float(index), 0) if _there(index) else Band.END
    if score >= Band.END:
        return replace(seen, state=seen.status) if seen.status in _STATES.values() else seen
    band = max(band for band in _STATES if band <= score)
    due_at_ms = int(score) - band if band is Band.RETRY else None
    lease_ends_at_ms = int(score) if band is Band.HELD else None
    return replace(seen, state=_STATES[band].value, due_at_ms=due_at_ms, lease_ends_at_ms=lease_ends_at_ms)


def with_outcome(seen: Seen, outcome: Outcome) -> Seen:
    return replace(
        seen,
        outcome=outcome,
        kind=outcome.kind,
        error=outcome.error,
        run=outcome.run,
        attempts=outcome.history(),
        enqueued_at_ms=outcome.enqueued_at_ms,
        ended_at_ms=outcome.finished_at_ms,
    )


def _with_job(seen: Seen, job: Any, faults: list[str]) -> Seen:
    """Add what RQ's hash tells."""
    if isinstance(job, Exception):
        faults.append("its job is not a hash of RQ's")
        return seen
    status, data, created, ended, enqueued_ms, deadline_ms, run, attempts, sent_ms, _ = job
    if status is None:
        return seen
    order: CancelRequest | None = None
    tried: tuple[Attempt, ...] = ()
    try:
        order = decode_call(data or b"")
    except MessageError as error:
        faults.append(f"not a request of this contract: {error}")
    try:
        tried = decode_attempts(attempts)
    except MalformedMessage as error:
        faults.append(f"its attempts cannot be read: {error}")
    return replace(
        seen,
        status=clean_text(status),
        order=order,
        attempts=tried,
        run=number(run),
        enqueued_at_ms=number(enqueued_ms) or _stamp_ms(created),
        ended_at_ms=_stamp_ms(ended),
        deadline_at_ms=number(deadline_ms),
        sent_at_ms=number(sent_ms),
    )


def _stamp_ms(value: Any) -> int | None:
    at_s = stamp_s(value)
    return None if at_s is None else int(at_s * 1000)


def _with_results(keys: Keys, rows: Sequence[Seen]) -> Conversation[list[Seen]]:
    """Add what RQ's own result says where the record of an outcome has run out before the job."""
    bare = [seen for seen in rows if seen.outcome is None and seen.status is not None and not seen.open]
    if not bare:
        return list(rows)
    answers = yield [("XREVRANGE", keys.result_prefix + seen.id, "+", "-", "COUNT", 1) for seen in bare]
    told = {seen.id: _result(answer) for seen, answer in zip(bare, answers, strict=True)}
    return [_with_result(seen, told[seen.id]) if seen.id in told else seen for seen in rows]


def _result(answer: Any) -> str | None:
    """The text of a failure as RQ keeps it: packed."""
    if isinstance(answer, Exception) or not answer:
        return None
    try:
        fields = {text(name): value for name, value in stream_entries(answer)[0][1].items()}
        packed = b64decode(fields["exc_string"])
        return zlib.decompressobj().decompress(packed, MAX_PAYLOAD_BYTES).decode("utf-8", "replace")
    except (KeyError, TypeError, ValueError, binascii.Error, zlib.error):
        return None


def _with_result(seen: Seen, told: str | None) -> Seen:
    if not told:
        return seen
    line = told.strip().splitlines()[-1] if told.strip() else ""
    word, _, rest = line.partition(": ")
    if word in [kind.value for kind in OutcomeKind]:
        return replace(seen, kind=OutcomeKind(word), error=clean_text(rest) or None)
    return replace(seen, error=clean_text(line) or None)
