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
from enum import StrEnum
from typing import Any

from worker.exchange import Exchange
from worker.store import Settlement, Store

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


def _before(owner: type, name: str, die: Crash, when: Callable[..., bool]) -> None:
    def make(method: Method) -> Method:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if when(*args):
                die()
            return method(*args, **kwargs)

        return wrapped

    _wrap(owner, name, make)


def _after(owner: type, name: str, die: Crash, when: Callable[[Any, tuple[Any, ...]], bool]) -> None:
    def make(method: Method) -> Method:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            if when(result, args):
                die()
            return result

        return wrapped

    _wrap(owner, name, make)


def _always(*_: Any) -> bool:
    return True


def _moved(die: Crash) -> None:
    """Send the two halves of the claim's pipeline one after the other, and die between them."""

    def make(method: Method) -> Method:
        def wrapped(store: Store, *commands: tuple[Any, ...]) -> list[Any]:
            if commands[0][0] != "BLMOVE":
                return list(method(store, *commands))
            popped = method(store, commands[0])
            if popped[0] is not None:
                die()
            return [*popped, *method(store, *commands[1:])]

        return wrapped

    _wrap(Store, "_wait", make)


def _sent(die: Crash) -> None:
    """Die in place of the hook that is called when the bytes are out."""

    def make(method: Method) -> Method:
        def wrapped(exchange: Exchange, credential: Any, ref: Any, on_sent: Any = None) -> Any:
            return method(exchange, credential, ref, die)

        return wrapped

    _wrap(Exchange, "cancel", make)


def _given(result: Any, args: tuple[Any, ...]) -> bool:
    return bool(result.grants)


def _given_again(result: Any, args: tuple[Any, ...]) -> bool:
    return any(grant.attempts for grant in result.grants)


def _of(what: Callable[[Settlement], bool]) -> Callable[[Any, tuple[Any, ...]], bool]:
    return lambda result, args: any(map(what, args[1]))


def _is_outcome(settlement: Settlement) -> bool:
    return settlement.outcome is not None


def _is_retry(settlement: Settlement) -> bool:
    return settlement.outcome is None and settlement.delay_ms is not None


def _is_handing_back(settlement: Settlement) -> bool:
    return settlement.outcome is None and settlement.delay_ms is None


def _in_retry_wait(die: Crash) -> None:
    def later(result: Any, args: tuple[Any, ...]) -> bool:
        waits = [settlement.delay_ms for settlement in args[1] if _is_retry(settlement)]
        if waits:
            threading.Timer((waits[0] or 0) / 1000 * _IN_THE_WAIT, die).start()
        return False

    _after(Store, "settle", die, later)


INSTALL: dict[Point, Callable[[Crash], None]] = {
    Point.MOVED: _moved,
    Point.CLAIMED: lambda die: _after(Store, "claim", die, _given),
    Point.BEFORE_SEND: lambda die: _before(Exchange, "cancel", die, _always),
    Point.SENT: _sent,
    Point.ANSWERED: lambda die: _after(Exchange, "cancel", die, _always),
    Point.BEFORE_QUERY: lambda die: _before(Exchange, "query", die, _always),
    Point.QUERIED: lambda die: _after(Exchange, "query", die, _always),
    Point.SETTLED: lambda die: _after(Store, "settle", die, _of(_is_outcome)),
    Point.SCHEDULED: lambda die: _after(Store, "settle", die, _of(_is_retry)),
    Point.IN_RETRY_WAIT: _in_retry_wait,
    Point.RETRY_CLAIMED: lambda die: _after(Store, "claim", die, _given_again),
    Point.BEFORE_HANDING_BACK: lambda die: _before(
        Store, "settle", die, lambda _, group: any(map(_is_handing_back, group))
    ),
    Point.HANDED_BACK: lambda die: _after(Store, "settle", die, _of(_is_handing_back)),
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
