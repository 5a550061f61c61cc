"""Prometheus metrics of one queue, read from Redis when Prometheus asks; needs prometheus-client.

One exporter speaks for all workers, so a scrape is true whatever process died. Outcomes and times come from the counts
that the completing script keeps: nothing is missed, and a restart changes nothing. What only the ledger tells is
counted from the first scrape on. Gauges are one look at the queue, and are left out while Redis is away, because an old
depth is worse than none.
"""

from __future__ import annotations

import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import accumulate
from socketserver import ThreadingMixIn
from typing import Any, TypeAlias
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from producer.client import CancelClient
from producer.counts import BUCKETS_MS, Counts, Times
from producer.message import DEFAULT_ACCOUNT, Attempt, OutcomeKind
from producer.protocol import (
    Conversation,
    QueueUnavailable,
    Wire,
    entry_outcome,
    entry_parts,
    fields_of,
    good,
    is_wrong_type,
    text,
)
from producer.shell import names_this_machine, wait_for_end
from producer.status import Status
from producer.timeline import read_counts
from producer.untrusted import MalformedMessage

#: Distinct accounts, verdicts, and answers of the exchange that get series of their own; further ones are `other`.
MAX_ACCOUNTS = 64
MAX_VERDICTS = 32
MAX_CALLS = 8
MAX_REPLIES = 256
OTHER = "other"
NONE = "none"
#: How long one scrape reads the ledger, s: what is left then is read by the next one. Prometheus waits 10 s.
_READ_S = 4.0

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


class Ledger:
    """What the ledger told since the first look at it, each entry once. Nothing in it ever goes down."""

    def __init__(self, client: CancelClient, account: Labels) -> None:
        self._client = client
        self._wire = Wire(client.keys.queue)
        self._added: int | None = (
            None  # entries ever added, at the last look; None before Redis 7.0, which does not count
        )
        self._position = ""  # of the last entry that was read, or need not be; none before the first look
        self._owed = 0  # entries that were added and are not read yet, or never will be: they were trimmed
        self._missed: int | None = None  # None: the server does not count what it adds
        self._account = account
        self._verdict = Labels(MAX_VERDICTS)
        self._call = Labels(MAX_CALLS)
        self._outcomes: Counter[tuple[str, ...]] = Counter()
        self._expect(self._account(DEFAULT_ACCOUNT))
        self._attempts: Counter[tuple[str, ...]] = Counter()
        self._replies: Counter[tuple[str, ...]] = Counter()
        self._unreadable = 0

    def read(self, until_s: float) -> None:
        """Count what came since the last call, as far as that goes until ``until_s`` (monotonic).

        Raises:
            QueueUnavailable: Redis did not answer; what was read is counted, and the next call goes on there.
        """
        newest, added = self._client.converse(_ledger_end(self._client.keys.outcomes))
        if not self._position or entry_parts(newest) < entry_parts(self._position):
            # The first look; or the ledger is gone, or a server came back with an older state: what is there was read.
            self._position, self._owed = newest, 0
        elif added is not None and self._added is not None:
            self._owed += added - self._added if added >= self._added else added
        self._added = added
        while entry_parts(self._position) < entry_parts(newest):
            if time.monotonic() >= until_s:
                return
            page = self._client.converse(self._wire.page(self._position, gaps=False))
            for entry_id, fields in page:
                self._add(entry_id, fields)
                self._position = entry_id
                self._owed -= 1
            if not page:  # the newest entry was deleted
                self._position = newest
        if added is not None:
            self._missed = (self._missed or 0) + max(0, self._owed)
            self._owed = min(0, self._owed)

    def _add(self, entry_id: str, fields: Mapping[Any, Any]) -> None:
        try:
            outcome = entry_outcome(entry_id, fields)
        except MalformedMessage:
            self._unreadable += 1
            return
        account = NONE if outcome.account is None else self._account(outcome.account)
        self._expect(account)
        self._outcomes[outcome.kind.value, account] += 1
        for attempt in outcome.history():
            self._attempts[self._call(str(attempt.call)), self._verdict(attempt.verdict)] += 1
            self._replies[self._reply(attempt)] += 1

    def _expect(self, account: str) -> None:
        """Series of all kinds: what first appears with a 1 is no increase to Prometheus."""
        for kind in OutcomeKind:
            self._outcomes[kind.value, account] += 0

    def _reply(self, attempt: Attempt) -> tuple[str, str, str]:
        """Call, HTTP status and code; a record says what an exchange sent, which may be anything."""
        call = self._call(str(attempt.call))
        reply = call, _number(attempt.http), _number(attempt.code)
        if reply in self._replies or len(self._replies) < MAX_REPLIES:
            return reply
        return call, OTHER, OTHER

    def families(self, queue: str) -> Iterator[Metric]:
        """All of it for Prometheus."""
        since = "since the exporter's first scrape"
        yield _counter("account_outcomes", f"Outcomes {since}.", queue, ("kind", "account"), self._outcomes)
        yield _counter("attempts", f"Signed calls of what ended {since}.", queue, ("call", "verdict"), self._attempts)
        labels = ("call", "http", "code")
        yield _counter("exchange_replies", "Answers to these calls, none among them.", queue, labels, self._replies)
        yield _counter("ledger_unreadable", "Entries that hold no outcome.", queue, (), {(): self._unreadable})
        if self._missed is not None:
            words = "Entries that left the ledger before the exporter read them."
            yield _counter("ledger_missed", words, queue, (), {(): self._missed})


def totals(counts: Counts, queue: str) -> Iterator[Metric]:
    """All that was ever counted, for Prometheus."""
    kinds: dict[tuple[str, ...], int] = {(kind.value,): count for kind, count in counts.kinds.items()}
    yield _counter("outcomes", "Outcomes recorded.", queue, ("kind",), kinds)
    yield _histogram("first_attempt", "From enqueue to first attempt.", queue, counts.first_attempt)
    yield _histogram("outcome", "From enqueue to outcome.", queue, counts.outcome)


def _histogram(name: str, documentation: str, queue: str, times: Times) -> Metric:
    """Cumulated, as Prometheus wants it."""
    bounds = [*(str(bound / 1000) for bound in BUCKETS_MS), "+Inf"]
    family = HistogramMetricFamily(f"cancel_{name}_seconds", documentation, labels=["queue"])
    upto = list(zip(bounds, accumulate(times.buckets), strict=True))
    family.add_metric([queue], upto, times.sum_ms / 1000)
    return family


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


def _ledger_end(ledger: str) -> Conversation[tuple[str, int | None]]:
    """The newest entry that was ever added, and how many were; the beginning where there is no ledger, or a key of
    another type in its place."""
    there, told = yield [("EXISTS", ledger), ("XINFO", "STREAM", ledger)]
    if not good([there])[0] or is_wrong_type(told):
        return "0-0", 0
    (told,) = good([told])
    known = {text(name): value for name, value in fields_of(told).items()}
    return text(known["last-generated-id"]), known.get("entries-added")


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
    words = "For how long a request has waited for a worker since it was due, the oldest; 0: none waits."
    yield _gauge("queue_latency_seconds", words, queue, status.oldest_queued_s or 0)
    words = (
        "The same of those that nobody may send now: gate closed, queue suspended, key refused; 0: none is held back."
    )
    yield _gauge("queue_gated_seconds", words, queue, status.gated_s or 0)
    yield _gauge("in_flight", "Requests that a worker holds.", queue, status.in_flight)
    words = "Requests whose lease ran out, because their worker died or was cut off: to be taken over."
    yield _gauge("expired_leases", words, queue, status.to_be_taken_over)
    yield _gauge("scheduled", "Requests that wait for their next attempt.", queue, status.scheduled)
    yield _gauge("failed", "Requests that ended in a failed kind and are kept for a retry.", queue, status.failed)
    words = "Keys of the wrong type: what they should tell counts as nothing in the other gauges."
    yield _gauge("damaged_keys", words, queue, len(status.damaged))
    yield _gauge("suspended", "1 while `rq suspend` holds.", queue, status.suspended)
    closed: Series = {}
    for gate in status.gates:
        closed[(gate.scope,)] = max(closed.get((gate.scope,), 0), gate.closed_for_s or 0)
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

    def __init__(self, client: CancelClient) -> None:
        self._client = client
        self._queue = client.keys.queue
        self._account = Labels(MAX_ACCOUNTS)
        self._ledger = Ledger(client, self._account)
        self._counts: Counts | None = None
        self._began_s = time.time()
        self._one_at_a_time = threading.Lock()

    def collect(self) -> list[Metric]:
        """Read counts, ledger and queue; what could be read before Redis went away is told."""
        with self._one_at_a_time:
            seen: Status | None = None
            try:
                self._counts = self._client.converse(read_counts(self._client.keys)).after(self._counts)
                self._ledger.read(time.monotonic() + _READ_S)
                seen = self._client.status()
            except QueueUnavailable:
                pass
            up = "1 if Redis answered this scrape; 0: it did not answer, or refused."
            began = "When this process began: what the ledger told before is not counted."
            return [
                _gauge("up", up, self._queue, seen is not None),
                _gauge("exporter_start_time_seconds", began, self._queue, self._began_s),
                *([] if self._counts is None else totals(self._counts, self._queue)),
                *self._ledger.families(self._queue),
                *([] if seen is None else gauges(seen, self._account)),
            ]


# --- HTTP ---------------------------------------------------------------------------------------------------------


class _Handler(WSGIRequestHandler):
    timeout = 10  # s; a client that says nothing keeps no thread

    def log_message(self, *_: Any) -> None:
        """A scrape is no event."""


def _for_this_machine(answer: Any) -> Any:
    """Answers no browser that a stranger's page has led here by a name of its own."""

    def guarded(request: dict[str, Any], start_response: Any) -> Any:
        if names_this_machine(request.get("HTTP_HOST", "localhost")):
            return answer(request, start_response)
        start_response("421 Misdirected Request", [("Content-Type", "text/plain")])
        return [b"send Host: localhost: on loopback no other name is answered\n"]

    return guarded


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(listener.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.server_name, self.server_port = listener.getsockname()[:2]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no error."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def serve(client: CancelClient, listener: socket.socket, *, local_names_only: bool) -> bool:
    """Answer scrapes until SIGTERM or SIGINT; whether it was SIGINT. ``local_names_only`` turns away requests that name
    another host than this machine (for a listener on loopback)."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(QueueCollector(client))
    with _Server(listener) as server:
        answer = make_wsgi_app(registry)
        server.set_app(_for_this_machine(answer) if local_names_only else answer)
        thread = threading.Thread(target=server.serve_forever, name="http", daemon=True)
        thread.start()
        is_interrupted = wait_for_end()
        server.shutdown()
        thread.join()
    return is_interrupted
