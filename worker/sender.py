"""Calls to the exchange in an event loop: each is one signed request and its answer, on a connection that stands.

A call that finds none waits until one falls free or has been opened, which a few helper threads do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from worker.cancel import Ask
from worker.classify import Failure, Reply
from worker.exchange import Exchange, Pending
from worker.helpers import Aside

__all__ = ["OPENERS", "Sender"]

#: Connections opened at once at the most: a burst finds few open, and no exchange likes 64 handshakes in one moment.
OPENERS = 8


class Then(Protocol):
    """Is told how a call ended."""

    def __call__(self, answer: Reply | Failure | None, error: BaseException | None = None, /) -> None:
        """``answer``: None if the call might not go (any more), and nothing was sent; or there is an ``error``, which
        is a defect: what became of the call is not known then."""


@dataclass(slots=True, eq=False)
class _Calling:
    """A call that is being made."""

    pending: Pending
    may_go: Callable[[], bool]
    then: Then


class Sender:
    """Makes calls. Used by the thread of ``loop`` alone; ``aside`` opens connections."""

    def __init__(self, loop: asyncio.AbstractEventLoop, exchange: Exchange, aside: Aside) -> None:
        self._loop = loop
        self._exchange = exchange
        self._aside = aside
        self._unopened: deque[_Calling] = deque()
        self._opening = 0
        self._is_sending_unopened = False

    def send(self, ask: Ask, may_go: Callable[[], bool], then: Then) -> None:
        """Make a call. ``may_go`` is asked right before its request is written."""
        calling = _Calling(self._exchange.prepare(ask.call, ask.credential, ask.ref), may_go, then)
        if self._unopened:  # those who wait are served first
            self._unopened.append(calling)
            self._send_unopened()
        else:
            self._send(calling)

    def _send(self, calling: _Calling) -> bool:
        """Send it if a connection stands, or have one opened; whether it has to wait for either."""
        pending = calling.pending
        if not calling.may_go():
            pending.drop()
            calling.then(None)
            return False
        try:
            failure = pending.begin()
        except Exception as error:  # noqa: BLE001 - whoever asked must hear of it
            self._broke(calling, error)
            return False
        if failure is not None:
            calling.then(failure)
        elif pending.sent:
            expiry = self._loop.call_at(pending.deadline_s, self._expire, calling)
            self._loop.add_reader(pending.fileno, self._receive, calling, expiry)
        elif self._opening < OPENERS:
            self._opening += 1
            self._aside(pending.connect, partial(self._opened, calling))
        else:
            self._unopened.append(calling)
            return True
        return False

    def _opened(self, calling: _Calling, failure: Failure | None, error: BaseException | None) -> None:
        self._opening -= 1
        if error is not None:  # no thread could be made
            failure = Failure(seen=False, reason=f"could not connect: {type(error).__name__}")
        if failure is not None:
            calling.then(failure)
        else:
            self._send(calling)
        self._send_unopened()

    def _send_unopened(self) -> None:
        """A connection is free, or a place among those who open one. (A call that fails at once does not send the next
        one.)"""
        if self._is_sending_unopened:
            return
        self._is_sending_unopened = True
        try:
            while self._unopened:
                if self._send(self._unopened.popleft()):
                    self._unopened.rotate(1)
                    break
        finally:
            self._is_sending_unopened = False

    def _receive(self, calling: _Calling, expiry: asyncio.TimerHandle) -> None:
        fileno = calling.pending.fileno
        try:
            answer = calling.pending.receive()
        except Exception as error:  # noqa: BLE001 - as above
            self._loop.remove_reader(fileno)
            expiry.cancel()
            self._broke(calling, error)
            return
        if answer is not None:
            self._loop.remove_reader(fileno)
            expiry.cancel()
            self._answered(calling, answer)

    def _expire(self, calling: _Calling) -> None:
        self._loop.remove_reader(calling.pending.fileno)
        try:
            answer = calling.pending.expire()
        except Exception as error:  # noqa: BLE001 - as above
            self._broke(calling, error)
        else:
            self._answered(calling, answer)

    def _broke(self, calling: _Calling, error: Exception) -> None:
        calling.pending.abandon()
        calling.then(None, error)

    def _answered(self, calling: _Calling, answer: Reply | Failure) -> None:
        calling.then(answer)  # first: it may say that nothing more may be sent
        self._send_unopened()
