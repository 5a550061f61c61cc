"""What the pages ask of Redis, as conversations in the manner of :mod:`producer.protocol`.

Operators look when something is wrong, so nothing here raises for what stands in Redis: a record, job or id that is
not of this contract is shown with the reason why it cannot be read. Reading changes nothing.
"""

from __future__ import annotations

import binascii
import json
import re
import zlib
from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from rq.job import JobStatus
from rq.utils import utcparse

from producer.keys import Band, JobField, Keys
from producer.message import (
    DEFAULT_ACCOUNT,
    Attempt,
    CancelRequest,
    Outcome,
    OutcomeKind,
    decode_attempts,
    decode_call,
    decode_outcome,
)
from producer.protocol import Command, Conversation, good, is_requeued, pages, stream_entries, text
from producer.status import readable
from producer.untrusted import MAX_PAYLOAD_BYTES, InvalidRequest, MalformedMessage, MessageError, clean_text

#: Rows of one page.
PAGE = 50
#: Results of one search at most.
RESULTS = 50
#: Entries of the ledger, and ids of the failed registry, that a search or a filter looks at, newest first; and open
#: requests of each state (waiting, to be retried, held) that a search looks at.
DEPTH = 20_000
#: Accounts whose pointers a search tries at most.
_ACCOUNTS = 200
#: Entries of the ledger read at a time.
_ENTRIES = 1000
#: Outcomes of one reading that are kept at most, newest first: far more than a page shows.
_KEPT = 20 * RESULTS

#: What an id must look like to stand in an address or a form; RQ itself allows less.
USABLE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:~@+-]{0,199}")
#: States of a job whose outcome is still to come, in RQ's words: what the index of unfinished jobs says of it.
_STATES = {Band.HELD: JobStatus.STARTED, Band.WAITING: JobStatus.QUEUED, Band.RETRY: JobStatus.SCHEDULED}
#: Stands for the kind of a failed request whose outcome nobody can read.
UNREADABLE = "unreadable"
_ACCOUNT = re.compile(rb'"account":"([a-z0-9][a-z0-9_-]{0,31})"')
_JOB_FIELDS = (
    "status",
    "data",
    "created_at",
    "ended_at",
    JobField.ENQUEUED_AT_MS,
    JobField.DEADLINE_AT_MS,
    JobField.RUN,
    JobField.ATTEMPTS,
    JobField.OPEN_AT_MS,
    JobField.DONE,
)


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


def _field(name: str, value: str) -> bytes:
    """A field as records hold it."""
    return f'"{name}":{json.dumps(value)}'.encode()


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which failed requests are meant; None means any."""

    kind: str | None = None  # an OutcomeKind value, or UNREADABLE
    account: str | None = None

    @property
    def all(self) -> bool:
        """Whether nothing is filtered out."""
        return self.kind is None and self.account is None

    def glance(self, record: bytes | None) -> bool | None:
        """Whether the raw record is of one that is meant, which spares reading most of them; None if it cannot tell.

        Inside a JSON text quotes are escaped, so nothing in it can look like a field.
        """
        if record is None:
            return None
        if self.account is not None and _field("account", self.account) not in record:
            return False
        if self.kind == UNREADABLE:
            return False if any(_field("kind", kind.value) in record for kind in OutcomeKind) else None
        return self.kind is None or _field("kind", self.kind) in record

    def meets(self, seen: Seen) -> bool:
        """Whether this one is meant."""
        if self.kind is not None and self.kind != (seen.kind.value if seen.kind else UNREADABLE):
            return False
        return self.account is None or seen.of_order("account") == self.account


@dataclass(frozen=True, slots=True)
class Failed:
    """A part of the failed requests, newest first."""

    now_ms: int
    rows: tuple[Seen, ...]
    total: int  # in the registry
    matching: int  # that meet the filter, among those that were looked at
    partial: bool  # the registry is longer than what was looked at
    damaged: tuple[str, ...] = ()  # keys of the wrong type, which count as empty


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to."""

    now_ms: int
    rows: tuple[Seen, ...]
    entries: int  # of the ledger that were looked at
    partial: bool  # the ledger or the registry is longer than what was looked at
    more: bool  # there are more than RESULTS
    damaged: tuple[str, ...] = ()  # keys of the wrong type, which count as empty


# --- One request --------------------------------------------------------------------------------------------------


def requests_of(keys: Keys, job_ids: Sequence[str]) -> Conversation[list[Seen]]:
    """What is known of each of these, in their order: two round trips for each thousand."""
    found: list[Seen] = []
    for page in pages(job_ids):
        records, *rest = yield [
            ("MGET", *(keys.outcome_prefix + job_id for job_id in page)),
            *(command for job_id in page for command in _job_commands(keys, job_id)),
        ]
        good([records])
        states = zip(page, records, rest[::3], rest[1::3], rest[2::3], strict=True)
        seen = [_seen(*words) for words in states]
        found += yield from _with_results(keys, seen)
    return found


def _job_commands(keys: Keys, job_id: str) -> list[Command]:
    return [
        ("HMGET", keys.job_prefix + job_id, *_JOB_FIELDS),
        ("ZSCORE", keys.failed, job_id),
        ("ZSCORE", keys.unfinished, job_id),
    ]


def _seen(job_id: str, record: Any, job: Any, failed: Any, index: Any) -> Seen:
    faults: list[str] = []
    seen = replace(_with_job(Seen(job_id), job, faults), in_failed=_there(failed))
    done = None if isinstance(job, Exception) else job[-1]
    outcome = _decoded(record, faults)
    if outcome is not None and outcome.kind.failed and is_requeued((seen.status, done, seen.run), failed):
        seen = _with_state(seen, index)  # the record is of the run before
    elif outcome is not None:
        seen = _with_outcome(seen, outcome)
    elif done is None and record is None:
        seen = _with_state(seen, index)
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
    """Add where it stands: its score in the index tells, and RQ's status of what no worker has seen yet."""
    if seen.status is None:
        return seen
    if not _there(index):
        return replace(seen, state=seen.status) if seen.status in _STATES.values() else seen
    score = max(float(index), 0)
    band = max(band for band in _STATES if band <= score)
    return replace(seen, state=_STATES[band].value, due_at_ms=int(score) - band if band is Band.RETRY else None)


def _with_outcome(seen: Seen, outcome: Outcome) -> Seen:
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
        status=text(status),
        order=order,
        attempts=tried,
        run=_whole(run),
        enqueued_at_ms=_whole(enqueued_ms) or _stamp_ms(created),
        ended_at_ms=_stamp_ms(ended),
        deadline_at_ms=_whole(deadline_ms),
        sent_at_ms=_whole(sent_ms),
    )


def _whole(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _stamp_ms(value: Any) -> int | None:
    """RQ's own stamp, by the clock of the host that wrote it."""
    try:
        return int(utcparse(text(value)).timestamp() * 1000) if value else None
    except (ValueError, OverflowError):
        return None


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


# --- The ledger ---------------------------------------------------------------------------------------------------


def newest(keys: Keys, count: int) -> Conversation[list[Seen]]:
    """The newest outcomes, newest first; none of a ledger of the wrong type, which the status names."""
    (entries,) = yield from readable([("XREVRANGE", keys.outcomes, "+", "-", "COUNT", count)], {})
    return [_of_entry(entry_id, fields) for entry_id, fields in stream_entries(entries)]


def _of_entry(entry: str, fields: Mapping[Any, Any]) -> Seen:
    try:
        outcome = decode_outcome(_record(fields))
    except MalformedMessage as error:
        return Seen("", entry, faults=(f"ledger entry {entry} cannot be read: {error}",))
    return _with_outcome(Seen(outcome.id, entry), outcome)


def _record(fields: Mapping[Any, Any]) -> bytes:
    return bytes(fields.get(b"outcome", b""))


def _ledger(
    keys: Keys, look: Callable[[bytes], bool], meant: Callable[[Seen], bool], damaged: dict[str, None]
) -> Conversation[tuple[list[Seen], int]]:
    """Outcomes that are ``meant`` among the newest :data:`DEPTH`, newest first, and how many entries there were.

    That number is one more than :data:`DEPTH` where there are more. ``look`` is given each raw record and says whether
    it may be meant; the others are neither read nor kept.
    """
    found: list[Seen] = []
    read = 0
    before = "+"
    while read <= DEPTH:
        command = ("XREVRANGE", keys.outcomes, before, "-", "COUNT", _ENTRIES)
        entries = stream_entries((yield from readable([command], damaged))[0])
        for entry_id, fields in entries[: DEPTH - read]:
            if look(_record(fields)) and len(found) < _KEPT and meant(seen := _of_entry(entry_id, fields)):
                found.append(seen)
        read += len(entries)
        if len(entries) < _ENTRIES:
            break
        before = f"({entries[-1][0]}"
    return found, min(read, DEPTH + 1)


# --- Failed requests ----------------------------------------------------------------------------------------------


def failed(keys: Keys, wanted: Wanted, start: int = 0, count: int = PAGE) -> Conversation[Failed]:
    """The failed requests that meet ``wanted``, newest first, ``count`` of them from ``start`` on.

    With a filter the newest :data:`DEPTH` of the registry are looked at.
    """
    first, last = (start, start + count - 1) if wanted.all else (0, DEPTH - 1)
    damaged: dict[str, None] = {}
    commands: list[Command] = [("TIME",), ("ZCARD", keys.failed), ("ZREVRANGE", keys.failed, first, last)]
    time, total, members = yield from readable(commands, damaged)
    job_ids = [text(member) for member in members]
    matching = total
    if not wanted.all:
        met = yield from _meeting(keys, job_ids, wanted)
        matching, job_ids = len(met), met[start : start + count]
    rows = yield from requests_of(keys, job_ids)
    # RQ scores the registry in whole seconds; within one, the records know better.
    rows.sort(key=lambda seen: seen.ended_at_ms or 0, reverse=True)
    return Failed(_now_ms(time), tuple(rows), total, matching, not wanted.all and total > DEPTH, tuple(damaged))


def _meeting(keys: Keys, job_ids: Sequence[str], wanted: Wanted) -> Conversation[list[str]]:
    """Those that meet a filter, in their order."""
    met: list[str] = []
    for page in pages(job_ids):
        glances = [wanted.glance(record) for record in (yield from _records(keys, page))]
        doubtful = [job_id for job_id, glance in zip(page, glances, strict=True) if glance is None]
        read = yield from requests_of(keys, doubtful)
        sure = {seen.id for seen in read if wanted.meets(seen)}
        met += [job_id for job_id, glance in zip(page, glances, strict=True) if glance or job_id in sure]
    return met


def _records(keys: Keys, job_ids: Sequence[str]) -> Conversation[list[bytes | None]]:
    """The raw outcome records of at most a thousand requests."""
    (records,) = good((yield [("MGET", *(keys.outcome_prefix + job_id for job_id in job_ids))]))
    return [_raw(record) for record in records]


def _raw(answer: Any) -> bytes | None:
    """A text from Redis; None where there is none, or an error stands for it."""
    return answer if isinstance(answer, bytes) else None


def _now_ms(time: Sequence[Any]) -> int:
    return int(time[0]) * 1000 + int(time[1]) // 1000


def clock() -> Conversation[int]:
    """Redis' time, ms since the epoch."""
    (time,) = good((yield [("TIME",)]))
    return _now_ms(time)


# --- Search -------------------------------------------------------------------------------------------------------


def search(keys: Keys, words: str, account: str | None = None) -> Conversation[Found]:
    """Requests that have ``words`` as algo id, client algo id, id of the order it became, or id of their own.

    Open ones are found through the pointers of the accounts that the ledger and the failed registry know, ``default``,
    and ``account``, and by client algo id among the first :data:`DEPTH` of each state; ended ones in the newest
    :data:`DEPTH` of ledger and registry. Newest first, open ones before them.
    """
    damaged: dict[str, None] = {}
    time, total = yield from readable([("TIME",), ("ZCARD", keys.failed)], damaged)
    accounts = dict.fromkeys([DEFAULT_ACCOUNT, *([account] if account else [])])

    def look(record: bytes) -> bool:
        accounts.update(dict.fromkeys(name.decode() for name in _ACCOUNT.findall(record)))
        return _may_hold(record, words)

    def meant(seen: Seen) -> bool:
        return _is_of(seen, account) and (bool(seen.faults) or _meant(seen, words))

    ended, entries = yield from _ledger(keys, look, meant, damaged)
    failed_ones = yield from _failed_with(keys, words, account, accounts)
    named = yield from _open_of(keys, words, list(accounts)[:_ACCOUNTS])
    by_client_id = yield from _open_with_client_id(keys, words, damaged)
    found = _merged([*named, *by_client_id, *ended, *failed_ones], account)
    partial = entries > DEPTH or total > DEPTH
    looked_at = min(entries, DEPTH)
    return Found(_now_ms(time), tuple(found[:RESULTS]), looked_at, partial, len(found) > RESULTS, tuple(damaged))


def _failed_with(keys: Keys, words: str, account: str | None, accounts: dict[str, None]) -> Conversation[list[Seen]]:
    """Failed requests that are meant; the accounts of all are added to ``accounts``."""
    (members,) = yield from readable([("ZREVRANGE", keys.failed, 0, DEPTH - 1)], {})
    found: list[Seen] = []
    for page in pages([text(member) for member in members]):
        likely: list[str] = []
        for job_id, record in zip(page, (yield from _records(keys, page)), strict=True):
            accounts |= dict.fromkeys(name.decode() for name in _ACCOUNT.findall(record or b""))
            if record is None or _may_hold(record, words):
                likely.append(job_id)
        rows = yield from requests_of(keys, likely)
        accounts |= dict.fromkeys(seen.of_order("account") for seen in rows if seen.of_order("account"))
        meant = [seen for seen in rows if _is_of(seen, account) and _meant(seen, words)]
        found += meant[: _KEPT - len(found)]
    return found


def _is_of(seen: Seen, account: str | None) -> bool:
    """Whether it is of this account, or may be; None stands for all accounts."""
    return account is None or seen.of_order("account") in (None, account)


def _open_of(keys: Keys, words: str, accounts: Iterable[str]) -> Conversation[list[Seen]]:
    """The request of this id, and the open ones that an order's pointer names."""
    pointers = [keys.order_prefix + key for account in accounts for key in order_keys(words, account)]
    ids = [words] if USABLE_ID.fullmatch(words) else []
    if pointers:
        (named,) = good((yield [("MGET", *pointers)]))
        ids += [text(job_id) for job_id in named if job_id is not None]
    rows = yield from requests_of(keys, list(dict.fromkeys(ids)))
    return [seen for seen in rows if (seen.open or seen.id == words) and (seen.status or seen.outcome or seen.faults)]


def _open_with_client_id(keys: Keys, words: str, damaged: dict[str, None]) -> Conversation[list[Seen]]:
    """The open requests that name ``words`` as client algo id: no pointer leads to them."""
    # The list as well: what another program enqueued is in the index only when a worker has seen it.
    bands = [(int(band), f"({int(end)}") for band, end in pairwise(Band)]
    places: list[Command] = [("ZRANGEBYSCORE", keys.unfinished, *band, "LIMIT", 0, DEPTH) for band in bands]
    states = yield from readable([*places, ("LRANGE", keys.waiting, 0, DEPTH - 1)], damaged)
    named, likely = _field("client_algo_id", words), list[str]()
    for page in pages(list(dict.fromkeys(text(job_id) for state in states for job_id in state))):
        calls = yield [("HGET", keys.job_prefix + job_id, "data") for job_id in page]
        likely += [job_id for job_id, call in zip(page, map(_raw, calls), strict=True) if call and named in call]
    return [seen for seen in (yield from requests_of(keys, likely)) if seen.open]


def order_keys(words: str, account: str) -> list[str]:
    """The keys of the orders that ``words`` can mean for an account; none where it breaks the contract."""
    if not (words.isascii() and words.isdigit() and len(words) <= 19):
        return []
    try:
        return [CancelRequest(algo_id=int(words), account=account).order_key]
    except InvalidRequest:
        return []


def _may_hold(record: bytes, words: str) -> bool:
    """Whether ``words`` stand in a record as a text or as a number; a look at the raw record spares reading most."""
    quoted = json.dumps(words, ensure_ascii=False).encode("utf-8", "replace")
    return quoted in record or (words.isascii() and words.isdigit() and f":{words},".encode() in record)


def _meant(seen: Seen, words: str) -> bool:
    order = (seen.of_order("algo_id"), seen.of_order("client_algo_id"))
    became = None if seen.outcome is None else seen.outcome.actual_order_id
    return words in (seen.id, became, *(str(word) for word in order if word is not None))


def _merged(rows: Iterable[Seen], account: str | None) -> list[Seen]:
    """Each run once, open requests first, then newest first; of two views of a run the one that knows the job."""
    found: dict[tuple[str, int | None, str], Seen] = {}
    for seen in rows:
        if not _is_of(seen, account):
            continue
        key = (seen.id, seen.run, "" if seen.id else str(seen.entry))
        if key not in found or (found[key].status is None and seen.status is not None):
            found[key] = seen
    return sorted(found.values(), key=lambda seen: (not seen.open, -(seen.ended_at_ms or seen.enqueued_at_ms or 0)))


def history(keys: Keys, job_id: str) -> Conversation[list[Seen]]:
    """All outcomes of one request in the newest :data:`DEPTH` of the ledger, newest first."""
    found, _ = yield from _ledger(keys, lambda record: _may_hold(record, job_id), lambda seen: seen.id == job_id, {})
    return found
