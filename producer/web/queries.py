"""What the pages ask of Redis, as conversations in the manner of :mod:`producer.protocol`. Reading changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from producer.console import algo_id_of
from producer.keys import Band, Keys
from producer.message import DEFAULT_ACCOUNT, CancelRequest, decode_outcome
from producer.protocol import Command, Conversation, good, pages, stream_entries, text
from producer.status import is_served, ms_of, readable
from producer.untrusted import InvalidRequest, MalformedMessage, dumps
from producer.web.filters import Wanted
from producer.web.seen import USABLE_ID, Seen, requests_of, with_outcome

#: Rows of one page.
PAGE = 50
#: Results of one search at most.
RESULTS = 50
#: Entries of the ledger, and ids of the failed registry, that a search or a filter looks at, newest first; and open
#: requests of each state (waiting, to be retried, held) that a search or a list looks at.
DEPTH = 20_000
#: An outcome is recorded when Redis can be reached: how long after its end one is looked for in a longer ledger, ms.
_LATE_MS = 600_000
#: Entries of the ledger read at a time.
_ENTRIES = 1000
#: Results that a search chooses from at most, newest first.
_KEPT = 20 * RESULTS


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a list, and what was looked at for it."""

    rows: tuple[Seen, ...]
    damaged: tuple[str, ...] = ()  # keys of the wrong type, which count as empty
    total: int = 0  # in the registry, or of this state in the index
    matching: int = 0  # failed ones that meet the filter, among those that were looked at
    read: int = 0  # entries of the ledger that were looked at
    last: str | None = None  # the oldest of them, where older ones may be meant too
    partial: bool = False  # ledger or registry are longer than what was looked at
    more: bool = False  # there are more than these


@dataclass(frozen=True, slots=True)
class Standing:
    """What holds up everything, and when that was seen, ms by Redis' clock."""

    at_ms: int
    suspended: bool
    unserved: bool  # there is no live worker
    waiting: bool = False  # and there is work


# --- The ledger ---------------------------------------------------------------------------------------------------


def _of_entry(entry: str, fields: Mapping[Any, Any]) -> Seen:
    try:
        outcome = decode_outcome(_record(fields))
    except MalformedMessage as error:
        fault = f"ledger entry {entry} cannot be read: {error}"
        return Seen("", entry, ended_at_ms=int(entry.partition("-")[0]), faults=(fault,))
    return with_outcome(Seen(outcome.id, entry), outcome)


def _record(fields: Mapping[Any, Any]) -> bytes:
    return bytes(fields.get(b"outcome", b""))


def _ledger(
    keys: Keys,
    meant: Callable[[Seen], bool],
    damaged: dict[str, None],
    *,
    words: str = "",
    bounds: tuple[str, str] = ("+", "-"),
    most: int = _KEPT,
    size: int = _ENTRIES,
) -> Conversation[tuple[list[Seen], int, str | None]]:
    """Outcomes that are ``meant``, newest first: up to ``most``, among the newest :data:`DEPTH` entries between bounds.

    With them comes how many entries were looked at, ``size`` at a time, and the last of those unless there is none
    after it. Records that do not hold ``words`` are neither read nor kept.
    """
    found: list[Seen] = []
    read, last = 0, None
    newest, oldest = bounds
    while True:
        command = ("XREVRANGE", keys.outcomes, newest, oldest, "COUNT", size)
        entries = stream_entries((yield from readable([command], damaged))[0])
        for entry_id, fields in entries:
            if read == DEPTH:
                return found, read, last
            if (not words or _may_hold(_record(fields), words)) and meant(seen := _of_entry(entry_id, fields)):
                if len(found) == most:
                    return found, read, last
                found.append(seen)
            read, last = read + 1, entry_id
        if len(entries) < size:
            return found, read, None
        newest = f"({last}"


def outcomes(keys: Keys, wanted: Wanted, before: str | None = None) -> Conversation[Part]:
    """The newest outcomes that meet ``wanted``, of those before an entry if one is named: :data:`PAGE` at most, among
    :data:`DEPTH` entries."""
    damaged: dict[str, None] = {}
    (length,) = yield [("XLEN", keys.outcomes)]
    newest = f"({before}" if before else "+"
    if wanted.until_ms is not None and not before and isinstance(length, int) and length > DEPTH:
        newest = str(wanted.until_ms + _LATE_MS)
    bounds = (newest, str(wanted.since_ms or 0))
    size = PAGE + 1 if wanted.all else _ENTRIES
    words = wanted.words
    rows, read, last = yield from _ledger(keys, wanted.meets, damaged, words=words, bounds=bounds, most=PAGE, size=size)
    return Part(tuple(rows), tuple(damaged), read=read, last=last)


# --- Open requests ------------------------------------------------------------------------------------------------


def open_requests(keys: Keys, band: Band, start: int = 0) -> Conversation[Part]:
    """:data:`PAGE` open requests of a state from ``start`` on, by how the index orders them: who waits longest, is due
    next, or whose lease ends first. Those that no worker has put into the index yet follow."""
    damaged: dict[str, None] = {}
    bounds = (int(band), f"({int(dict(pairwise(Band))[band])}")
    listed = ("ZRANGEBYSCORE", keys.unfinished, *bounds, "LIMIT", start, PAGE)
    total, known = yield from readable([("ZCOUNT", keys.unfinished, *bounds), listed], damaged)
    rows = yield from requests_of(keys, [text(job_id) for job_id in known])
    gone = ("its job is gone; a worker that looks for it drops it from the index",)
    rows = [seen if seen.status or seen.outcome or seen.faults else replace(seen, faults=gone) for seen in rows]
    more = total > start + PAGE
    if not more:
        others = yield from _unindexed(keys, band, damaged)
        first, count = max(0, start - total), PAGE - len(rows)
        hinted = yield from requests_of(keys, others[first : first + count])
        rows += [seen for seen in hinted if seen.open or seen.faults]
        more = len(others) > first + count
    return Part(tuple(rows), tuple(damaged), total, more=more)


def _unindexed(keys: Keys, band: Band, damaged: dict[str, None]) -> Conversation[list[str]]:
    """Ids in RQ's own lists that the index does not know: what another program put there."""
    commands: list[Command] = []
    if band is Band.WAITING:
        commands = [("LRANGE", key, 0, DEPTH - 1) for key in (keys.claiming, keys.waiting)]
    elif band is Band.RETRY:
        commands = [("ZRANGEBYSCORE", keys.scheduled, "-inf", "+inf", "LIMIT", 0, DEPTH)]
    ids = dict.fromkeys(job_id for found in (yield from readable(commands, damaged)) for job_id in found)
    others: list[str] = []
    for page in pages(list(ids)):
        scores = yield [("ZSCORE", keys.unfinished, job_id) for job_id in page]
        unknown = [score is None or isinstance(score, Exception) for score in scores]
        others += [text(job_id) for job_id, is_unknown in zip(page, unknown, strict=True) if is_unknown]
    return others


def standing(keys: Keys) -> Conversation[Standing]:
    """Whether anything holds up everything."""
    time, suspended = good((yield [("TIME",), ("EXISTS", keys.suspended)]))
    return Standing(ms_of(time), bool(suspended), (yield from is_served(keys)) is False)


# --- Failed requests ----------------------------------------------------------------------------------------------


def failed(keys: Keys, wanted: Wanted, start: int = 0, count: int = PAGE) -> Conversation[Part]:
    """The failed requests that meet ``wanted``, newest first, ``count`` of them from ``start`` on.

    With a filter the newest :data:`DEPTH` of the registry are looked at.
    """
    first, last = (start, start + count - 1) if wanted.all else (0, DEPTH - 1)
    damaged: dict[str, None] = {}
    commands: list[Command] = [("ZCARD", keys.failed), ("ZREVRANGE", keys.failed, first, last)]
    total, members = yield from readable(commands, damaged)
    job_ids = [text(member) for member in members]
    matching = total
    if not wanted.all:
        met = yield from _meeting(keys, job_ids, wanted.meets)
        matching, job_ids = len(met), met[start : start + count]
    rows = yield from requests_of(keys, job_ids)
    # RQ scores the registry in whole seconds; within one, the records know better.
    rows.sort(key=lambda seen: seen.ended_at_ms or 0, reverse=True)
    partial = not wanted.all and total > DEPTH
    return Part(tuple(rows), tuple(damaged), total, matching, partial=partial)


def _meeting(
    keys: Keys, job_ids: Sequence[str], meets: Callable[[Seen], bool], words: str = ""
) -> Conversation[list[str]]:
    """Those that are meant, in their order: by their record, or where none can be read by all that is known of them.
    Records that do not hold ``words`` are not read."""
    met: list[str] = []
    for page in pages(job_ids):
        (records,) = good((yield [("MGET", *(keys.outcome_prefix + job_id for job_id in page))]))
        told = {
            job_id: Seen(job_id) if words and record and not _may_hold(record, words) else _of_record(job_id, record)
            for job_id, record in zip(page, records, strict=True)
        }
        # Only a failure may leave its order unsaid: then the job tells it.
        others = yield from requests_of(keys, [job_id for job_id, seen in told.items() if _is_unsaid(seen)])
        known = {seen.id: seen for seen in [*told.values(), *others] if seen is not None}
        met += [job_id for job_id in page if meets(known[job_id])]
    return met


def _is_unsaid(seen: Seen | None) -> bool:
    return seen is None or (seen.outcome is not None and seen.outcome.account is None)


def _of_record(job_id: str, record: Any) -> Seen | None:
    try:
        return with_outcome(Seen(job_id), decode_outcome(record or b""))
    except MalformedMessage:
        return None


# --- Search -------------------------------------------------------------------------------------------------------


def search(keys: Keys, words: str, account: str | None = None) -> Conversation[Part]:
    """Requests that have ``words`` as algo id, client algo id, id of the order it became, or id of their own.

    Open ones are found among the first :data:`DEPTH` of each state, and beyond by an algo id of ``account`` or
    ``default``; ended ones in the newest :data:`DEPTH` of ledger and registry. Newest first, open ones before them.
    """
    damaged: dict[str, None] = {}
    commands: list[Command] = [("ZCARD", keys.failed), ("ZREVRANGE", keys.failed, 0, DEPTH - 1)]
    total, failed_ids = yield from readable(commands, damaged)

    def meant(seen: Seen) -> bool:
        return _is_of(seen, account) and (bool(seen.faults) or _meant(seen, words))

    ended, read, last = yield from _ledger(keys, meant, damaged, words=words)
    met = yield from _meeting(keys, [text(each) for each in failed_ids], lambda seen: _meant(seen, words), words)
    named = yield from _open_with(keys, words, dict.fromkeys([DEFAULT_ACCOUNT, account or DEFAULT_ACCOUNT]), damaged)
    known = yield from requests_of(keys, list(dict.fromkeys([*named, *met[:_KEPT]])))
    known = [
        seen for seen in known if seen.open or seen.in_failed or (seen.id == words and (seen.status or seen.outcome))
    ]
    found = _merged([*known, *ended], account)
    partial = last is not None or total > DEPTH
    rows, more = tuple(found[:RESULTS]), len(found) > RESULTS
    return Part(rows, tuple(damaged), read=read, partial=partial, more=more)


def _is_of(seen: Seen, account: str | None) -> bool:
    """Whether it is of this account, or may be; None stands for all accounts."""
    return account is None or seen.of_order("account") in (None, account)


def _open_with(keys: Keys, words: str, accounts: Iterable[str], damaged: dict[str, None]) -> Conversation[list[str]]:
    """The request of this id, those that an order's pointer names, and the open ones in whose call ``words`` stand."""
    ids = [words] if USABLE_ID.fullmatch(words) else []
    with contextlib.suppress(InvalidRequest):
        orders = [CancelRequest(algo_id_of(words), account=account).order_key for account in accounts]
        (named,) = good((yield [("MGET", *(keys.order_prefix + order for order in orders))]))
        ids += [text(job_id) for job_id in named if job_id is not None]
    # The list as well: what another program enqueued is in the index only when a worker has seen it.
    bands = [(int(band), f"({int(end)}") for band, end in pairwise(Band)]
    places: list[Command] = [("ZRANGEBYSCORE", keys.unfinished, *band, "LIMIT", 0, DEPTH) for band in bands]
    states = yield from readable([*places, ("LRANGE", keys.waiting, 0, DEPTH - 1)], damaged)
    for page in pages(list(dict.fromkeys(text(job_id) for state in states for job_id in state))):
        calls = yield [("HGET", keys.job_prefix + job_id, "data") for job_id in page]
        ids += [job_id for job_id, call in zip(page, calls, strict=True) if _may_hold(call, words)]
    return ids


def _may_hold(record: Any, words: str) -> bool:
    """Whether ``words`` stand in a record as a text or as a number; a look at the raw record spares reading most."""
    if not isinstance(record, bytes):
        return False
    quoted = dumps(words).encode("utf-8", "replace")
    is_number = words.isascii() and words.isdigit()
    return quoted in record or (is_number and (f":{words},".encode() in record or f":{words}}}".encode() in record))


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
    return (yield from _ledger(keys, lambda seen: seen.id == job_id, {}, words=job_id))[0]
