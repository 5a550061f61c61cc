"""The synchronous client's connections: few, shared by all threads, none of them across a fork.

A thread takes a free connection, or queues. Whoever gets the next one to become free sends with its own commands all
that queue by then, and hands out the answers: nothing waits for company, and no caller more makes a connection more.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import redis

from producer.lines import BaseLines, is_unsent
from producer.place import Place
from producer.protocol import CHUNK, UNSENT, Commands, NoConnectionFree, Slow, Wire, packets, weight
from producer.redis_url import at_once, is_refused
from producer.waiting import unheard


class _Trip:
    """One round trip of one caller."""

    def __init__(self, commands: Commands, ends_at: float) -> None:
        self.commands = commands
        self.ends_at = ends_at
        self.came: threading.Event | None = None  # of one that queues: the answers, an error, or a connection
        self.answers: list[Any] = []
        self.error: Exception | None = None
        self.link: Link | None = None


class Link:
    """One connection, opened when it is needed and anew when it broke."""

    def __init__(self, connection: Any, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._opened_at: float | None = None
        self._bound_s = 0.0  # of one read, since it was opened

    def ask(self, trips: Sequence[Commands], ends_at: float, distrusted_at: float = 0.0) -> list[list[Any]]:
        """The answers to several round trips at once; an error answer stands in its place.

        Raises:
            redis.RedisError: no answer; the connection is closed.
        """
        try:
            try:
                self._prepare(ends_at, distrusted_at)
            except redis.RedisError as error:
                error.add_note(UNSENT)
                raise
            for packed in packets(self._connection, trips):
                self._connection.send_packed_command([packed])
            return [[self._answer(ends_at) for _ in range(len(commands))] for commands in trips]
        except OSError as error:
            self.close()
            raise redis.ConnectionError(type(error).__name__) from error
        except BaseException:
            self.close()
            raise

    def _prepare(self, ends_at: float, distrusted_at: float) -> None:
        if self._opened_at is not None and self._opened_at < distrusted_at:
            self.close()
        connection = self._connection
        if self._opened_at is None:
            left_s = max(ends_at - time.monotonic(), 0.001)
            self._bound_s = max(left_s, self._timeout_s / 4)
            connection.socket_connect_timeout, connection.socket_timeout = left_s, self._bound_s
        # A connection of ours looks whether one that was idle still leads to the primary; others are as they are.
        getattr(connection, "make_ready", connection.connect)()
        self._opened_at = self._opened_at or time.monotonic()

    def _answer(self, ends_at: float) -> Any:
        left_s = ends_at - time.monotonic()
        # Where the connection's own bound says as much, that spares a look.
        if left_s < 0.9 * self._bound_s and not self._connection.can_read(timeout=max(0.0, left_s)):
            raise redis.TimeoutError("no answer in time")
        try:
            return self._connection.read_response()
        except redis.ResponseError as error:
            return error

    def close(self) -> None:
        """Part with the server."""
        self._opened_at = None
        self._connection.disconnect()


class Line:
    """Some connections, and the queue for them."""

    def __init__(self, make: Callable[[], Link], most: int) -> None:
        self._make = make
        self._most = most
        self._lock = threading.RLock()  # a signal's handler may cancel too, in whatever its thread is doing
        self._links: list[Link] = []
        self._free: list[Link] = []
        self._queue: deque[_Trip] = deque()
        self._distrusted_at = 0.0
        self._closed = False

    def carry(self, commands: Commands, ends_at: float) -> list[Any]:
        """The answers to the commands of one round trip.

        Raises:
            NoConnectionFree: the call's time was up before one was.
            redis.RedisError: no answer; what was asked may have been carried out.
        """
        trip = _Trip(commands, ends_at)
        with self._lock:
            if self._free:
                trip.link = self._free.pop()
            elif len(self._links) < self._most:
                trip.link = self._make()
                self._links.append(trip.link)
            else:
                trip.came = threading.Event()
                self._queue.append(trip)
        if trip.came is not None:
            self._wait(trip, trip.came)
        if trip.link is not None:
            self._lead(trip, trip.link)
        if trip.error is not None:
            raise trip.error
        return trip.answers

    def _wait(self, trip: _Trip, came: threading.Event) -> None:
        is_here = False
        try:
            is_here = came.wait(max(0.0, trip.ends_at - time.monotonic()))
        finally:
            if not is_here:
                with self._lock:
                    was_queued = trip in self._queue
                    if was_queued:
                        self._queue.remove(trip)
                    link, trip.link = trip.link, None
                if link is not None:  # it came just now
                    self._pass_on(link)
                if was_queued or link is not None:
                    trip.error = NoConnectionFree(self._most)
                else:
                    trip.error = redis.TimeoutError("no answer in time")

    def _lead(self, trip: _Trip, link: Link) -> None:
        """Carry one's own round trip, and with it what is queued."""
        batch, room = [trip], CHUNK - weight(trip.commands)
        with self._lock:
            while self._queue and (room := room - weight(self._queue[0].commands)) >= 0:
                batch.append(self._queue.popleft())
        try:
            if isinstance(trip.commands, Slow):  # they ask alike
                told = link.ask([trip.commands], trip.ends_at, self._distrusted_at) * len(batch)
            else:
                told = link.ask([each.commands for each in batch], trip.ends_at, self._distrusted_at)
            for each, answers in zip(batch, told, strict=True):
                each.answers = answers
            if any(map(is_refused, told)):
                self.distrust()
        except BaseException as error:
            self.distrust()
            for each in batch[1:]:  # who of them may repeat it has time left for that
                each.error = redis.ConnectionError("the connection was lost")
                each.error.__cause__ = error
                if is_unsent(error):
                    each.error.add_note(UNSENT)
            raise
        finally:
            for each in batch:
                if each is not trip and each.came is not None:
                    each.came.set()
            self._pass_on(link)

    def _pass_on(self, link: Link) -> None:
        with self._lock:
            if self._queue:
                following = self._queue.popleft()
                following.link = link
                assert following.came is not None
                following.came.set()
            else:
                self._free.append(link)
            is_closed = self._closed
        if is_closed:
            link.close()

    def distrust(self) -> None:
        """What was open until now may lead to nobody, or to another server than it should."""
        self._distrusted_at = time.monotonic()

    def close(self) -> None:
        """Part with the server; what is under way comes to its end."""
        with self._lock:
            self._closed = True
            links, self._free = self._free, []
        for link in links:
            link.close()

    def leave_behind(self) -> None:
        """In a forked child: give up its copies of connections that belong to its parent."""
        for link in self._links:
            link.close()


class Lines(BaseLines):
    """All connections of a client in one process, and the thread that listens for whoever waits."""

    event = threading.Event
    _now = staticmethod(time.monotonic)

    def __init__(self, place: Place, wire: Wire) -> None:
        super().__init__(place, wire, lambda: Link(place.make(), wire.timeout_s), Line)
        self._start = threading.RLock()
        self._ready: threading.Event | None = None  # of the thread that listens

    @staticmethod
    def wait(event: threading.Event, timeout_s: float | None) -> bool:
        """See :meth:`BaseLines.wait`."""
        return event.wait(timeout_s)

    def listener(self) -> bool:
        """See :meth:`BaseLines.listener`."""
        with self._start:
            if self._ready is None:
                self._ready = threading.Event()
                thread = threading.Thread(target=self._listen, args=(self._ready,), name="cancel-outcomes", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    self._ready = None
                    return False
            ready = self._ready
        ready.wait(self._wire.timeout_s)
        return True

    def _listen(self, ready: threading.Event) -> None:
        link = self._link()
        try:
            while True:
                at_once(self._hear(link, ready.set))
                with self._start:
                    if self.waiters.are_few():
                        self._ready = None
                        return
        except BaseException as error:
            with self._start:  # the next one who waits starts another
                self._ready = None
            self.waiters.fail(unheard(error))
            raise
        finally:
            link.close()

    def close(self, why: Exception) -> None:
        """Part with the server: calls at once, the listener when it next looks up. Whoever waits is told."""
        self.waiters.close(why)
        for line in (self._calls, self._slow):
            line.close()

    def leave_behind(self) -> None:
        """See :meth:`Line.leave_behind`."""
        for line in (self._calls, self._slow):
            line.leave_behind()
