"""A worker that dies by SIGKILL at a named step: `python -m tests.fault.crashing POINT[@N] -- worker's arguments`.

Between popping a job and completing it a worker passes the steps below, in this order. None of them knows of its crash
point: this launcher wraps the real classes' methods in its own process, and kills that process when the step is passed
for the N-th time (the first, if N is left out).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any, cast

from worker.redis_link import AsyncLink
from worker.store import Claimed, Done, Release, Request, Retry, Row, Store
from worker.transport import Failed, Raw
from worker.transport import Request as Call
from worker.transport_asyncio import AsyncioTransport

Method = Callable[..., Any]

#: When the process dies that waits for its own retry, as a part of the wait.
_IN_THE_WAIT = 0.5


class Point(StrEnum):
    """Steps from the pop to the completion."""

    MOVED = "moved"  # the BLMOVE ran, the claim did not: the id stands in the claiming list alone
    CLAIMED = "claimed"  # the claim ran, its reply is lost: a lease that nobody renews
    BEFORE_SEND = "before_send"  # it has a connection, not a byte is out
    SENT = "sent"  # the DELETE is out, its answer is not here
    ANSWERED = "answered"  # the exchange has answered, nothing of it is recorded
    BEFORE_QUERY = "before_query"  # a DELETE was unclear, the query that is to settle it is not out
    QUERIED = "queried"  # the query is answered, nothing of it is recorded
    COMPLETED = "completed"  # the outcome is recorded, the reply that says so is lost
    SCHEDULED = "scheduled"  # a retry is scheduled, the reply that says so is lost
    IN_RETRY_WAIT = "in_retry_wait"  # the retry's due time is known to this process alone, and is not here yet
    RETRY_CLAIMED = "retry_claimed"  # the retry was claimed when due, its reply is lost
    BEFORE_HANDING_BACK = "before_handing_back"  # stopping: a job that was not started is still ours
    HANDED_BACK = "handed_back"  # stopping: it is back on the queue, the reply that says so is lost


class Crash:
    """Dies when it has been asked ``nth`` times."""

    def __init__(self, nth: int) -> None:
        self._left = nth
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def _wrap(owner: type, name: str, make: Callable[[Method], Method]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


# ---- requests to Redis ----------------------------------------------------------------------------------------------


def _heard(name: str, die: Crash, when: Callable[[Any, Any], bool]) -> None:
    """Die when the answer to a request of this kind has been read, before anybody makes use of it.

    ``when`` is told what it was for and what came of it.
    """

    def make(method: Method) -> Method:
        def wrapped(store: Store, what: Any, **options: Any) -> Request[Any]:
            request = method(store, what, **options)

            def read(answers: list[Any], stamps: Any) -> Any:
                result = request.read(answers, stamps)
                if when(what, result):
                    die()
                return result

            return cast("Request[Any]", replace(request, read=read))

        return wrapped

    _wrap(Store, name, make)


def _moved(die: Crash) -> None:
    """Send the two halves of the claim's pipeline one after the other, and die between them."""

    def make(method: Method) -> Method:
        async def wrapped(link: AsyncLink, make_request: Callable[[], Request[Any]]) -> Any:
            request = make_request()
            if request.commands[0][0] != "BLMOVE":
                return await method(link, lambda: request)
            (moved,) = await method(link, lambda: Request(request.commands[:1], None, lambda answers, _: answers))
            if isinstance(moved, bytes):
                die()
            rest = replace(
                request,
                commands=request.commands[1:],
                read=lambda answers, stamps: request.read([moved, *answers], stamps),
            )
            return await method(link, lambda: rest)

        return wrapped

    _wrap(AsyncLink, "ask", make)


def _claimed(_: int, claimed: Claimed) -> bool:
    return bool(claimed.leases)


def _claimed_again(_: int, claimed: Claimed) -> bool:
    return any(lease.attempts for lease in claimed.leases)


def _completed(die: Crash, kind: type[Row]) -> None:
    _heard("complete", die, lambda rows, _: any(isinstance(row, kind) for row in rows))


def _before_handing_back(die: Crash) -> None:
    """Die when it is to be sent, of which nothing is sent yet."""

    def make(method: Method) -> Method:
        def wrapped(store: Store, rows: Sequence[Row]) -> Request[Any]:
            if any(isinstance(row, Release) for row in rows):
                die()
            return cast("Request[Any]", method(store, rows))

        return wrapped

    _wrap(Store, "complete", make)


def _in_retry_wait(die: Crash) -> None:
    def later(rows: Sequence[Row], _: Any) -> bool:
        waits = [row.delay_ms for row in rows if isinstance(row, Retry)]
        if waits:
            threading.Timer(waits[0] / 1000 * _IN_THE_WAIT, die).start()
        return False

    _heard("complete", die, later)


# ---- calls to the exchange ------------------------------------------------------------------------------------------


def _call(die: Crash, http_method: str, step: str) -> None:
    """Die at a step of such a signed call: ``before`` its first byte, when it is ``sent``, when it is ``answered``."""

    def make(method: Method) -> Method:
        async def wrapped(
            transport: AsyncioTransport, make_call: Callable[[], Call | None], patience_s: float
        ) -> Raw | Failed | None:
            made: list[Call] = []

            def noted() -> Call | None:
                call = make_call()
                if call is not None and call.fields and call.method == http_method:
                    made.append(call)
                    if step == "before":
                        die()
                    elif step == "sent":  # it is written before anything else has its turn
                        asyncio.get_running_loop().call_soon(die)
                return call

            came = cast("Raw | Failed | None", await method(transport, noted, patience_s))
            if made and step == "answered" and isinstance(came, Raw):
                die()
            return came

        return wrapped

    _wrap(AsyncioTransport, "send", make)


INSTALL: dict[Point, Callable[[Crash], None]] = {
    Point.MOVED: _moved,
    Point.CLAIMED: lambda die: _heard("claim", die, _claimed),
    Point.BEFORE_SEND: lambda die: _call(die, "DELETE", "before"),
    Point.SENT: lambda die: _call(die, "DELETE", "sent"),
    Point.ANSWERED: lambda die: _call(die, "DELETE", "answered"),
    Point.BEFORE_QUERY: lambda die: _call(die, "GET", "before"),
    Point.QUERIED: lambda die: _call(die, "GET", "answered"),
    Point.COMPLETED: lambda die: _completed(die, Done),
    Point.SCHEDULED: lambda die: _completed(die, Retry),
    Point.IN_RETRY_WAIT: _in_retry_wait,
    Point.RETRY_CLAIMED: lambda die: _heard("claim", die, _claimed_again),
    Point.BEFORE_HANDING_BACK: _before_handing_back,
    Point.HANDED_BACK: lambda die: _completed(die, Release),
}


def main(arguments: Sequence[str]) -> None:
    """Install the crash point and become a worker."""
    name, _, nth = arguments[0].partition("@")
    INSTALL[Point(name)](Crash(int(nth or 1)))
    sys.argv = ["worker", *arguments[2:]]
    from worker.__main__ import start

    start()


if __name__ == "__main__":
    main(sys.argv[1:])
