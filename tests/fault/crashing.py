"""A worker that dies by SIGKILL at a named step: `python -m tests.fault.crashing POINT[@N] -- worker's arguments`.

Between popping a job and settling it a worker passes the steps below, in this order. None of them knows of its crash
point: this launcher wraps the real classes' methods in its own process, and kills that process when the step is passed
for the N-th time (the first, if N is left out).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any, cast

from worker.line import Line

from producer.message import Call
from worker.classify import Failure, Reply
from worker.exchange import Exchange, Pending
from worker.store import Claimed, Request, Settlement, Store

Method = Callable[..., Any]

#: When the process dies that waits for its own retry, as a part of the wait.
_IN_THE_WAIT = 0.5


class Point(StrEnum):
    """Steps from the pop to the settlement."""

    MOVED = "moved"  # the BLMOVE ran, the claim did not: the id stands in the claiming list alone
    CLAIMED = "claimed"  # the claim ran, its reply is lost: a lease that nobody renews
    BEFORE_SEND = "before_send"  # in a sender's hands, not a byte is out
    SENT = "sent"  # the DELETE is out, its answer is not here
    ANSWERED = "answered"  # the exchange has answered, nothing of it is recorded
    BEFORE_QUERY = "before_query"  # a DELETE was unclear, the query that is to settle it is not out
    QUERIED = "queried"  # the query is answered, nothing of it is recorded
    SETTLED = "settled"  # the outcome is recorded, the reply that says so is lost
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


def _asked(name: str, die: Crash, when: Callable[[Any], bool]) -> None:
    """Die when the store is asked for a request of this kind, of which nothing is sent yet.

    ``when`` is told what it is for.
    """

    def make(method: Method) -> Method:
        def wrapped(store: Store, what: Any, **options: Any) -> Request[Any]:
            if when(what):
                die()
            return cast("Request[Any]", method(store, what, **options))

        return wrapped

    _wrap(Store, name, make)


def _heard(name: str, die: Crash, when: Callable[[Any, Any], bool]) -> None:
    """Die when the answer to a request of this kind has been read, before anybody makes use of it.

    ``when`` is told what it was for and what came of it.
    """

    def make(method: Method) -> Method:
        def wrapped(store: Store, what: Any, **options: Any) -> Request[Any]:
            request = method(store, what, **options)

            def read(answers: list[Any]) -> Any:
                result = request.read(answers)
                if when(what, result):
                    die()
                return result

            return replace(request, read=read)

        return wrapped

    _wrap(Store, name, make)


def _moved(die: Crash) -> None:
    """Send the two halves of the claim's pipeline one after the other, and die between them."""

    def make(method: Method) -> Method:
        def wrapped(line: Line, request: Request[Any], on_answer: Method, on_error: Method) -> None:
            if request.commands[0][0] != "BLMOVE":
                method(line, request, on_answer, on_error)
                return

            def popped(answers: list[Any]) -> None:
                if isinstance(answers[0], bytes):
                    die()
                rest = replace(request, commands=request.commands[1:], read=lambda more: request.read(answers + more))
                method(line, rest, on_answer, on_error)

            method(line, replace(request, commands=request.commands[:1], read=list), popped, on_error)

        return wrapped

    _wrap(Line, "ask", make)


def _given(_: int, claimed: Claimed) -> bool:
    return bool(claimed.grants)


def _given_again(_: int, claimed: Claimed) -> bool:
    return any(grant.attempts for grant in claimed.grants)


def _settled(die: Crash, what: Callable[[Settlement], bool]) -> None:
    _heard("settle_request", die, lambda group, _: any(map(what, group)))


def _is_outcome(settlement: Settlement) -> bool:
    return settlement.outcome is not None


def _is_retry(settlement: Settlement) -> bool:
    return settlement.outcome is None and settlement.delay_ms is not None


def _is_handing_back(settlement: Settlement) -> bool:
    return settlement.outcome is None and settlement.delay_ms is None


def _in_retry_wait(die: Crash) -> None:
    def later(group: Sequence[Settlement], _: Any) -> bool:
        waits = [settlement.delay_ms for settlement in group if _is_retry(settlement)]
        if waits:
            threading.Timer((waits[0] or 0) / 1000 * _IN_THE_WAIT, die).start()
        return False

    _heard("settle_request", die, later)


# ---- calls to the exchange ------------------------------------------------------------------------------------------


class _Watched(Pending):
    """A call that says how far it has got."""

    __slots__ = ("_passed",)

    def __init__(self, pending: Pending, passed: Callable[[str], None]) -> None:
        super().__init__(pending._exchange, pending._attempt)
        self._passed = passed

    def begin(self) -> Failure | None:
        self._passed("before")
        failure = super().begin()
        if self.sent:
            self._passed("sent")
        return failure

    def receive(self) -> Reply | Failure | None:
        answer = super().receive()
        if isinstance(answer, Reply):
            self._passed("answered")
        return answer


def _call(die: Crash, watched: Call, step: str) -> None:
    """Die at a step of such a call: ``before`` it is written, when it is ``sent``, when it is ``answered``."""

    def passed(reached: str) -> None:
        if reached == step:
            die()

    def make(method: Method) -> Method:
        def wrapped(exchange: Exchange, call: Call, credential: Any, ref: Any) -> Pending:
            pending: Pending = method(exchange, call, credential, ref)
            return _Watched(pending, passed) if call is watched else pending

        return wrapped

    _wrap(Exchange, "prepare", make)


INSTALL: dict[Point, Callable[[Crash], None]] = {
    Point.MOVED: _moved,
    Point.CLAIMED: lambda die: _heard("claim_request", die, _given),
    Point.BEFORE_SEND: lambda die: _call(die, Call.CANCEL, "before"),
    Point.SENT: lambda die: _call(die, Call.CANCEL, "sent"),
    Point.ANSWERED: lambda die: _call(die, Call.CANCEL, "answered"),
    Point.BEFORE_QUERY: lambda die: _call(die, Call.QUERY, "before"),
    Point.QUERIED: lambda die: _call(die, Call.QUERY, "answered"),
    Point.SETTLED: lambda die: _settled(die, _is_outcome),
    Point.SCHEDULED: lambda die: _settled(die, _is_retry),
    Point.IN_RETRY_WAIT: _in_retry_wait,
    Point.RETRY_CLAIMED: lambda die: _heard("claim_request", die, _given_again),
    Point.BEFORE_HANDING_BACK: lambda die: _asked(
        "settle_request", die, lambda group: any(map(_is_handing_back, group))
    ),
    Point.HANDED_BACK: lambda die: _settled(die, _is_handing_back),
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
