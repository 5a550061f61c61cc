"""Prometheus metrics of one queue, read from Redis when Prometheus asks; needs prometheus-client.

One exporter speaks for all workers, so a scrape is true whatever process died. Counters add up the ledger: each scrape
reads the entries that came since the last one. Gauges are one look at the queue, and are left out while Redis is away,
because an old depth is worse than none.
"""

from __future__ import annotations

import re
import signal
import socket
import sys
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, TypeAlias
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from producer.client import CancelClient
from producer.message import DEFAULT_ACCOUNT, Attempt, Outcome, OutcomeKind
from producer.protocol import (
    Conversation,
    QueueUnavailable,
    entry_outcome,
    entry_parts,
    fields_of,
    good,
    is_wrong_type,
    pages,
    text,
)
from producer.status import Gate, Status
from producer.untrusted import MalformedMessage

#: Distinct accounts, verdicts, and answers of the exchange that get series of their own; further ones are `other`.
MAX_ACCOUNTS = 64
MAX_VERDICTS = 32
MAX_CALLS = 8
MAX_REPLIES = 256
OTHER = "other"
NONE = "none"
#: Upper bounds of the histograms' buckets, s.
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
#: How long one scrape reads the ledger, s: what is left then is read by the next one. Prometheus waits 10 s.
_READ_S = 4.0
#: Counted entries that are remembered, to tell an older state of the ledger from another ledger.
_REMEMBERED = 5000
#: Longest time that is measured, ms: a record may hold anything.
_LONGEST_MS = 10**12

_BEGINNING = "0-0"

#: Values by the values of the labels beside `queue`.
Series: TypeAlias = dict[tuple[str, ...], float]

_LABEL = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


class Labels:
    """Values of a label: the first ``limit`` distinct ones that are well formed, `other` for the rest."""

    def __init__(self, limit: int) -> None:
        self._known: set[str] = set()
        self._limit = limit

    def __call__(self, value: str) -> str:
        """What stands for ``value`` in a series."""
        if value in self._known:
            return value
        if len(self._known) >= self._limit or not _LABEL.fullmatch(value):
            return OTHER
        self._known.add(value)
        return value


class Histogram:
    """Counts of times by bucket, and their sum."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS_S) + 1)
        self._sum_s = 0.0

    def observe(self, ms: int) -> None:
        """Add one time; two clocks that disagree make none that is negative."""
        seconds = min(max(0, ms), _LONGEST_MS) / 1000
        self._counts[bisect_left(BUCKETS_S, seconds)] += 1
        self._sum_s += seconds

    def family(self, name: str, documentation: str, queue: str) -> Metric:
        """The exposition, cumulated as Prometheus wants it."""
        bounds = [*map(str, map(float, BUCKETS_S)), "+Inf"]
        family = HistogramMetricFamily(name, documentation, labels=["queue"])
        family.add_metric([queue], list(zip(bounds, accumulate(self._counts), strict=True)), self._sum_s)
        return family


class Tally:
    """What has been counted of the ledger since the exporter began. Nothing in it ever goes down."""

    def __init__(self, account: Labels) -> None:
        self._account = account
        self._verdict = Labels(MAX_VERDICTS)
        self._call = Labels(MAX_CALLS)
        self._outcomes: Counter[tuple[str, ...]] = Counter()
        self._expect(self._account(DEFAULT_ACCOUNT))
        self._attempts: Counter[tuple[str, ...]] = Counter()
        self._replies: Counter[tuple[str, ...]] = Counter()
        self._first_attempt = Histogram()
        self._outcome = Histogram()
        self.unreadable = 0
        self.missed: int | None = None  # None: the server does not count what it adds

    def add(self, entry_id: str, fields: Mapping[Any, Any]) -> None:
        """Count one entry of the ledger."""
        try:
            outcome = entry_outcome(entry_id, fields)
        except MalformedMessage:
            self.unreadable += 1
            return
        account = NONE if outcome.account is None else self._account(outcome.account)
        self._expect(account)
        self._outcomes[outcome.kind.value, account] += 1
        for attempt in outcome.history():
            self._attempts[self._call(str(attempt.call)), self._verdict(attempt.verdict)] += 1
            self._replies[self._reply(attempt)] += 1
        self._time(outcome)

    def _expect(self, account: str) -> None:
        """Series of all kinds: what first appears with a 1 is no increase to Prometheus, and would alert nobody."""
        for kind in OutcomeKind:
            self._outcomes[kind.value, account] += 0

    def _time(self, outcome: Outcome) -> None:
        if outcome.enqueued_at_ms is None:
            return
        self._outcome.observe(outcome.finished_at_ms - outcome.enqueued_at_ms)
        if outcome.attempts:
            self._first_attempt.observe(outcome.attempts[0].at_ms - outcome.enqueued_at_ms)

    def _reply(self, attempt: Attempt) -> tuple[str, str, str]:
        """Call, HTTP status and code; a record says what an exchange sent, which may be anything."""
        call = self._call(str(attempt.call))
        reply = call, _number(attempt.http), _number(attempt.code)
        if reply in self._replies or len(self._replies) < MAX_REPLIES:
            return reply
        return call, OTHER, OTHER

    def families(self, queue: str) -> Iterator[Metric]:
        """All of it for Prometheus."""
        yield _counter("outcomes", "Outcomes recorded.", queue, ("kind", "account"), self._outcomes)
        yield _counter("attempts", "Signed calls of ended requests.", queue, ("call", "verdict"), self._attempts)
        labels = ("call", "http", "code")
        yield _counter("exchange_replies", "Answers to these calls, none among them.", queue, labels, self._replies)
        yield self._first_attempt.family("cancel_first_attempt_seconds", "From enqueue to first attempt.", queue)
        yield self._outcome.family("cancel_outcome_seconds", "From enqueue to outcome.", queue)
        yield _counter("ledger_unreadable", "Entries that hold no outcome.", queue, (), {(): self.unreadable})
        if self.missed is not None:
            words = "Entries that left the ledger before the exporter read them."
            yield _counter("ledger_missed", words, queue, (), {(): self.missed})


def _number(value: object) -> str:
    if value is None:
        return NONE
    return str(value) if type(value) is int else OTHER


def _counter(
    name: str, documentation: str, queue: str, labels: tuple[str, ...], counts: Mapping[tuple[str, ...], int]
) -> Metric:
    family = CounterMetricFamily(f"cancel_{name}", documentation, labels=["queue", *labels])
    for values, count in sorted(counts.items()):
        family.add_metric([queue, *values], count)
    return family


@dataclass(frozen=True, slots=True)
class LedgerEnd:
    """Where the ledger ends now."""

    newest: str  # stream id of the newest entry that was ever added
    length: int
    added: int | None  # entries ever added; None before Redis 7.0, which does not count them


class LedgerClient(CancelClient):
    """A client that can also read the ledger for those who count it."""

    def ledger_end(self) -> LedgerEnd | None:
        """The ledger's end, None where there is no ledger, or a key of another type in its place."""
        return self.converse(_ledger_end(self.keys.outcomes))

    def ledger_page(self, after: str) -> list[tuple[str, Any]]:
        """Stream id and fields of some entries after one, without waiting; none where there is none."""
        return self.converse(self._wire.page(after, gaps=False))

    def newest_held(self, entry_ids: Iterable[str]) -> str | None:
        """The first of ``entry_ids`` that the ledger holds; one round trip for each 1,000."""
        return self.converse(_newest_held(self.keys.outcomes, list(entry_ids)))


def _ledger_end(ledger: str) -> Conversation[LedgerEnd | None]:
    there, told = yield [("EXISTS", ledger), ("XINFO", "STREAM", ledger)]
    if not good([there])[0] or is_wrong_type(told):
        return None
    (told,) = good([told])
    known = {text(name): value for name, value in fields_of(told).items()}
    return LedgerEnd(text(known["last-generated-id"]), int(known["length"]), known.get("entries-added"))


def _newest_held(ledger: str, entry_ids: list[str]) -> Conversation[str | None]:
    for page in pages(entry_ids):
        found = good((yield [("XRANGE", ledger, entry_id, entry_id) for entry_id in page]))
        if held := next((entry_id for entry_id, entries in zip(page, found, strict=True) if entries), None):
            return held
    return None


class LedgerReader:
    """Feeds a tally with each entry of the ledger once, from the oldest that is still there."""

    def __init__(self, client: LedgerClient, tally: Tally) -> None:
        self._client = client
        self._tally = tally
        self._position = _BEGINNING
        self._is_sure = True  # that the position belongs to the ledger that is there now
        #: Entries ever added at some earlier end, and entries read since; what the two miss was trimmed unread.
        self._added: int | None = None
        self._read = 0
        self._is_new = True
        #: Newest entries that were counted: a server that comes back with an older state still holds some of them.
        self._counted: deque[str] = deque(maxlen=_REMEMBERED)

    def read(self, until_s: float) -> None:
        """Count what came since the last call, as far as that goes until ``until_s`` (monotonic).

        Raises:
            QueueUnavailable: Redis did not answer; what was read is counted, and the next call goes on there.
        """
        end = self._client.ledger_end()
        if end is None:
            # Nothing yet, deleted, or Redis came back empty; whatever appears is counted from its first entry.
            self._is_sure, self._is_new, self._added, self._read = False, False, 0, 0
            return
        if self._is_new:
            self._is_new = False
            self._added = None if end.added is None else end.added - end.length
        if entry_parts(end.newest) < entry_parts(self._position) or (end.added or 0) < (self._added or 0) + self._read:
            self._is_sure = end.added is None and entry_parts(end.newest) >= entry_parts(self._position)
        if not self._is_sure:
            self._find_position()
        if self._read_to(entry_parts(end.newest), until_s):
            self._account_for(end)

    def _find_position(self) -> None:
        """Go on after the newest counted entry that is there, or from the beginning of what is another ledger."""
        held = self._client.newest_held(reversed(self._counted))
        self._position = held or _BEGINNING
        self._added = 0 if held is None else None
        self._read = 0
        self._is_sure = True

    def _read_to(self, newest: tuple[int, int], until_s: float) -> bool:
        """Whether all entries up to ``newest`` are counted."""
        while entry_parts(self._position) < newest and time.monotonic() < until_s:
            page = self._client.ledger_page(self._position)
            for entry_id, fields in page:
                if entry_parts(entry_id) > newest:
                    return True
                self._tally.add(entry_id, fields)
                self._counted.append(entry_id)
                self._position = entry_id
                self._read += 1
            if not page:  # the newest entry was deleted
                return True
        return entry_parts(self._position) >= newest

    def _account_for(self, end: LedgerEnd) -> None:
        if end.added is not None:
            lost = 0 if self._added is None else max(0, end.added - self._added - self._read)
            self._tally.missed = (self._tally.missed or 0) + lost
        self._added, self._read = end.added, 0


# --- Gauges -------------------------------------------------------------------------------------------------------


def _gauge(name: str, documentation: str, queue: str, values: float | Series, *labels: str) -> Metric:
    family = GaugeMetricFamily(f"cancel_{name}", documentation, labels=["queue", *labels])
    for names, value in (values if isinstance(values, dict) else {(): values}).items():
        family.add_metric([queue, *names], value)
    return family


def gauges(status: Status, account: Labels) -> Iterator[Metric]:
    """One look at the queue for Prometheus. Series of keys are there while the key is refused."""
    queue = status.queue
    yield _gauge("queue_depth", "Requests that wait for a worker.", queue, status.queued)
    yield _gauge(
        "queue_latency_seconds",
        "For how long the oldest has waited; 0: none waits.",
        queue,
        status.oldest_queued_s or 0,
    )
    yield _gauge("in_flight", "Requests that a worker holds.", queue, status.in_flight)
    words = "Requests whose lease ran out, because their worker died or was cut off: to be taken over."
    yield _gauge("expired_leases", words, queue, status.to_be_taken_over)
    yield _gauge("scheduled", "Requests that wait for their next attempt.", queue, status.scheduled)
    yield _gauge("failed", "Requests that ended in a failed kind and are kept for a retry.", queue, status.failed)
    words = "Keys of the wrong type: what they should tell counts as nothing in the other gauges."
    yield _gauge("damaged_keys", words, queue, len(status.damaged))
    yield _gauge("suspended", "1 while `rq suspend` holds.", queue, status.suspended)
    closed: Series = {(gate.scope,): gate.closed_for_s or 0.0 for gate in sorted(status.gates, key=_closed_for_s)}
    yield _gauge("gate_seconds", "How long the gate stays closed; 0: it is open.", queue, closed, "scope")
    yield from _key_gauges(status, account)
    if status.used_weight is not None:
        words = "Request weight used in the present minute, the most that a worker saw."
        yield _gauge("used_weight", words, queue, status.used_weight)
    if status.weight_limit is not None:
        yield _gauge("weight_limit", "Request weight that the exchange allows in a minute.", queue, status.weight_limit)
    yield _gauge("workers", "Live workers.", queue, status.live_workers)
    offsets_ms = [row.clock_offset_ms for row in status.workers if row.live and row.clock_offset_ms is not None]
    if offsets_ms:
        # A name of a worker is new with each start, and would leave a series behind each time.
        words = "The exchange's clock minus that of the live worker whose clock is farthest off."
        yield _gauge("clock_offset_seconds", words, queue, max(offsets_ms, key=abs) / 1000)


def _closed_for_s(gate: Gate) -> float:
    return gate.closed_for_s or 0.0


def _key_gauges(status: Status, account: Labels) -> Iterator[Metric]:
    """Accounts that share a label are told together."""
    held_back: Series = {}
    jobs: Series = {}
    for key in status.keys:
        name = (account(key.account),)
        held_back[name] = max(held_back.get(name, 0), key.open)
        jobs[name] = jobs.get(name, 0) + key.held
    words = "1 while jobs wait because the exchange refuses the key; 0: refused last, still tried; absent: accepted."
    yield _gauge("key_held_back", words, status.queue, held_back, "account")
    yield _gauge("key_held_jobs", "Jobs that wait for that key.", status.queue, jobs, "account")


class QueueCollector(Collector):
    """All metrics of one queue, collected when asked for."""

    def __init__(self, client: LedgerClient) -> None:
        self._client = client
        self._queue = client.keys.queue
        self._account = Labels(MAX_ACCOUNTS)
        self._tally = Tally(self._account)
        self._ledger = LedgerReader(client, self._tally)
        self._began_s = time.time()
        self._one_at_a_time = threading.Lock()

    def collect(self) -> list[Metric]:
        """Read the ledger and the queue; what could be read before Redis went away is told."""
        with self._one_at_a_time:
            seen: Status | None = None
            try:
                self._ledger.read(time.monotonic() + _READ_S)
                seen = self._client.status()
            except QueueUnavailable:
                pass
            now = [] if seen is None else list(gauges(seen, self._account))
            up = "1 if Redis answered this scrape; 0: it did not answer, or refused."
            return [
                _gauge("up", up, self._queue, seen is not None),
                _gauge("exporter_start_time_seconds", "When the counters began.", self._queue, self._began_s),
                *self._tally.families(self._queue),
                *now,
            ]


# --- HTTP ---------------------------------------------------------------------------------------------------------


_ENDS = frozenset({signal.SIGTERM, signal.SIGINT})


class _Handler(WSGIRequestHandler):
    timeout = 10  # s; a client that says nothing keeps no thread

    def log_message(self, *_: Any) -> None:
        """A scrape is no event."""


class Server(ThreadingMixIn, WSGIServer):
    """Answers scrapes from the end of its construction until it is closed."""

    daemon_threads = True

    def __init__(self, collector: QueueCollector, host: str, port: int) -> None:
        """Listen.

        Raises:
            OSError: the address cannot be listened on.
        """
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = family
        super().__init__((str(where[0]), int(where[1])), _Handler)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(collector)
        self.set_app(make_wsgi_app(registry))
        shown_host = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown_host}:{self.server_port}/metrics"
        self._thread = threading.Thread(target=self.serve_forever, name="http", daemon=True)

    def server_bind(self) -> None:
        """Without the look-up of the host's name that the standard library's does: nobody needs it."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no error."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def start(self) -> None:
        """Begin to answer. From here on SIGTERM and SIGINT only end :meth:`wait`, however often they come."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)  # before the thread, which inherits it
        self._thread.start()

    def wait(self) -> bool:
        """Answer until SIGTERM or SIGINT, then no more; whether it was SIGINT."""
        ended_by = signal.sigwait(_ENDS)
        self.shutdown()
        self._thread.join()
        return ended_by == signal.SIGINT
