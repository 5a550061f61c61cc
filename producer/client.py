"""The client for strategies that are not asyncio programs: enqueue cancels, learn what became of them.

Needs a Redis connection and nothing else: no exchange key, no HTTP. Errors: :class:`~producer.message.InvalidRequest`
before anything is sent, :class:`QueueUnavailable` when Redis does not answer in time, :class:`WaitTimeout` when an
outcome is not there yet.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self, cast

import redis
from rq.job import Job
from rq.serializers import JSONSerializer

from producer.message import DEFAULT_ACCOUNT, DEFAULT_QUEUE, CancelRequest, Outcome
from producer.protocol import (
    Calls,
    Commands,
    Conversation,
    T,
    TicketFields,
    Wire,
    availability,
    check_position,
    patience,
    readable_entries,
    timeout_of,
)
from producer.redis_url import Address, is_refused
from producer.status import Status, read_status


@dataclass(frozen=True, slots=True)
class Ticket(TicketFields):
    """A request that is on the queue. ``duplicate``: it shares the job of an unfinished request for the same order."""

    _client: CancelClient = field(repr=False, compare=False)

    def wait(self, timeout_s: float | None = None) -> Outcome:
        """Block until the outcome is recorded, at most ``timeout_s`` seconds (None: as long as it takes).

        Raises:
            WaitTimeout: no outcome within that time; the request goes on.
            MalformedMessage: its record is not an outcome of this version; the text names the id.
            QueueUnavailable: Redis did not answer.
        """
        return self._client.wait(self.id, timeout_s)


class _Line:
    """The shortest way to Redis: on a connection that stays at hand between two calls.

    A pool looks whether a connection still stands each time that it lends it, which costs an idle strategy a tenth of
    a call. Here that shows when it is used; whoever uses this repeats the commands then. Each is sent as soon as it is
    made.
    """

    def __init__(self, connection: redis.Redis, timeout_s: float) -> None:
        self._redis = connection
        self._timeout_s = timeout_s
        self._at_hand: list[Any] = []
        self._pid = os.getpid()

    def round_trip(self, commands: Commands) -> list[Any]:
        """Send ``commands`` and read their answers, as the server gives them; an error answer stands in its place."""
        if self._pid != os.getpid():  # a fork shares its parent's sockets
            self._at_hand, self._pid = [], os.getpid()  # in this order: another thread may come by
        try:
            connection = self._at_hand.pop()
        except IndexError:
            connection = self._redis.connection_pool.get_connection()
        try:
            connection.make_ready()
            ends_at = time.monotonic() + self._timeout_s
            for command in commands:
                connection.send_command(*command)
            answers = [self._answer(connection, ends_at) for _ in range(len(commands))]
        except BaseException:
            connection.disconnect()
            self._redis.connection_pool.release(connection)
            raise
        if is_refused(answers):
            connection.disconnect()
        self._at_hand.append(connection)
        return answers

    @staticmethod
    def _answer(connection: Any, ends_at: float) -> Any:
        if time.monotonic() > ends_at:  # each wait has its bound; all of them together have one as well
            raise redis.TimeoutError("no answer in time")
        try:
            return connection.read_response()
        except redis.ResponseError as error:
            return error

    def hang_up(self) -> None:
        """Give back what is at hand."""
        while True:
            try:
                connection = self._at_hand.pop()
            except IndexError:
                return
            self._redis.connection_pool.release(connection)


class CancelClient:
    """Puts cancel requests on a queue and reads their outcomes. Thread-safe; one for a process is enough.

    A ``connection`` of yours should have a ``socket_timeout``: it is what bounds each call.
    """

    def __init__(self, connection: redis.Redis, queue: str = DEFAULT_QUEUE) -> None:
        self._redis = connection
        self._line: _Line | None = None
        self._wire = Wire(queue, timeout_of(connection.connection_pool.connection_kwargs))
        self.keys = self._wire.keys

    @classmethod
    def from_url(cls, url: str, queue: str = DEFAULT_QUEUE, *, timeout_s: float = 2.0, **options: Any) -> Self:
        """A client with a connection of its own. ``timeout_s`` bounds every wait; ``options`` go to redis-py's pool.

        Raises:
            BadRedisUrl: ``url`` is none of :data:`producer.redis_url.FORMS`.
        """
        connection = Address.parse(url).client(timeout_s, **options)
        client = cls(connection, queue)
        client._line = _Line(connection, timeout_s)
        return client

    def close(self) -> None:
        """Give the connections back."""
        if self._line is not None:
            self._line.hang_up()
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
            QueueUnavailable: Redis did not answer in time; calling again is safe (by client id alone it makes a second
                job, which means the order that has the id then).
            NotDurable: the request is on the queue, but this server cannot promise that it survives a crash.
        """
        request = CancelRequest(algo_id, client_algo_id, account, deadline_s, urgent, symbol, tag)
        return self.cancel_many([request], durable=durable)[0]

    def cancel_many(self, requests: Iterable[CancelRequest], *, durable: bool = False) -> list[Ticket]:
        """Enqueue many cancels, one round trip for each 1,000; tickets in the order of the requests.

        Requests for one order share a ticket, also by client id alone. Raises like :meth:`cancel`.
        """
        accepted = self.converse(self._wire.enqueue(requests, durable))
        tickets = [Ticket(*carried, self) for carried in accepted.carried]
        if accepted.not_durable is not None:
            accepted.not_durable.tickets = tickets
            raise accepted.not_durable
        return tickets

    def outcome(self, job_id: str) -> Outcome | None:
        """The outcome of a request, or None while there is none (or no longer: it is kept for OUTCOME_TTL_S)."""
        return self.converse(self._wire.outcome(job_id))

    def outcomes_of(self, job_ids: Iterable[str]) -> dict[str, Outcome]:
        """Those outcomes of ``job_ids`` that are there, by id; one round trip for each 1,000, two where some failed.

        A record that is no outcome of this version is left out and logged with its id.
        """
        return self.converse(self._wire.outcomes_of(job_ids))

    def outcomes(self, after: str = "0-0", *, follow: bool = False) -> Iterator[tuple[str, Outcome]]:
        """The ledger after a stream id: pairs of stream id and outcome, oldest first; ``follow`` waits for new ones.

        ``$`` stands for the newest entry. The ledger keeps about LEDGER_MAXLEN entries. An entry that is no outcome of
        this version is passed over and logged with its stream id. An error ends the iteration: go on with a new one
        after the last stream id that came.

        Raises:
            InvalidRequest: ``after`` is no stream id.
            QueueUnavailable: Redis did not answer.
        """
        position = check_position(after)
        return self._entries(position, follow)

    def _entries(self, position: str, follow: bool) -> Iterator[tuple[str, Outcome]]:
        if position == "$":
            position = self.converse(self._wire.newest())
        while (page := self.converse(self._wire.page(position, follow))) or follow:
            for position, outcome in readable_entries(page):
                if outcome is not None:
                    yield position, outcome

    def wait(self, job_id: str, timeout_s: float | None = None) -> Outcome:
        """Block until ``job_id`` has an outcome; see :meth:`Ticket.wait`."""
        listen_s = patience(job_id, timeout_s)
        if (outcome := self.outcome(job_id)) is not None:
            return outcome
        with availability(), self._redis.pubsub() as channel:
            channel.subscribe(self.keys.outcome_prefix + job_id)
            while (outcome := self.outcome(job_id)) is None:
                channel.get_message(timeout=listen_s())
        return outcome

    def retry(self, job_ids: Iterable[str], *, missing_ok: bool = False) -> list[str]:
        """Start a new run, with a new deadline, of requests that ended in a failed kind; returns their ids.

        ``missing_ok`` leaves out the ids that cannot be retried (any more) instead of raising.

        Raises:
            UnknownRequest: some are not among the failed ones; none was started.
            QueueUnavailable: Redis did not answer; those that it started meanwhile are no longer among the failed ones.
        """
        return self.converse(self._wire.retry(job_ids, missing_ok), repeat=False)

    def failed_ids(self) -> list[str]:
        """Ids of the requests that ended in a failed kind and can be retried, oldest first."""
        return self.converse(self._wire.failed_ids())

    def statuses(self, job_ids: Iterable[str]) -> list[str | None]:
        """RQ's status of each job, None where there is no such job; one round trip for each 1,000."""
        return self.converse(self._wire.statuses(list(job_ids)))

    def status(self) -> Status:
        """How the queue stands, in three round trips; see :class:`producer.status.Status`."""
        return self.converse(read_status(self.keys))

    def job(self, ticket_or_id: Ticket | str) -> Job:
        """RQ's job of a request, for those who look at the queue through RQ.

        RQ needs a connection that does not decode answers.
        """
        job_id = ticket_or_id if isinstance(ticket_or_id, str) else ticket_or_id.id
        if self._line is not None:
            self._line.hang_up()
        with availability():
            return Job.fetch(job_id, connection=self._redis, serializer=JSONSerializer)

    def converse(self, conversation: Conversation[T], *, repeat: bool = True) -> T:
        """Carry a conversation with Redis to its end; ``repeat``: its commands may be sent again if an answer is lost.

        Raises:
            QueueUnavailable: Redis did not answer, or refused.
        """
        with availability():
            try:
                commands = next(conversation)
                while True:
                    commands = conversation.send(self._answers(commands, repeat))
            except StopIteration as end:
                return cast(T, end.value)

    def _answers(self, commands: Commands, repeat: bool) -> list[Any]:
        try:
            answers = self._at_first(commands, repeat)
        except redis.AuthenticationError:
            raise
        except redis.ConnectionError:
            if not repeat:
                raise
            # A kept connection that the server had closed. The ids are in the words: a repeat finds itself.
            return self._round_trip(commands)
        return self._round_trip(commands) if is_refused(answers) else answers

    def _at_first(self, commands: Commands, repeat: bool) -> list[Any]:
        if self._line is not None:
            if repeat and isinstance(commands, Calls):
                return self._line.round_trip(commands)
            self._line.hang_up()  # one connection serves both ways
        answers = self._round_trip(commands)
        if is_refused(answers):  # the server may not be the primary any more
            self._redis.connection_pool.disconnect(inuse_connections=False)
        return answers

    def _round_trip(self, commands: Commands) -> list[Any]:
        if len(commands) > 1:
            # One connection for all: WAITAOF speaks of what its own connection has written.
            with self._redis.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                return pipeline.execute(raise_on_error=False)
        try:
            return [self._redis.execute_command(*command) for command in commands]
        except redis.ResponseError as error:
            return [error]
