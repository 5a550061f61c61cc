"""The two ways of a signed call: one that waits, and the steps of an event loop, as the worker's loop makes them."""

from __future__ import annotations

import asyncio

from producer.message import Call
from worker.classify import Failure, OrderRef, Reply
from worker.exchange import Exchange, Pending
from worker.signing import Credential

__all__ = ["WAYS", "Stepwise", "made"]


async def made(pending: Pending) -> Reply | Failure:
    """The answer to ``pending``: only connecting is left to a thread, nothing else waits."""
    failure = pending.begin()
    if failure is None and not pending.sent:
        failure = await asyncio.to_thread(pending.connect) or pending.begin()
    if failure is not None:
        return failure
    loop = asyncio.get_running_loop()
    came: asyncio.Future[Reply | Failure] = loop.create_future()
    fileno = pending.fileno

    def receive() -> None:
        answer = pending.receive()
        if answer is not None:
            came.set_result(answer)

    def expire() -> None:
        if not came.done():
            came.set_result(pending.expire())

    loop.add_reader(fileno, receive)
    came.add_done_callback(lambda _: loop.remove_reader(fileno))
    alarm = loop.call_at(pending.deadline_s, expire)  # the loop's clock is the monotonic one
    try:
        return await came
    finally:
        alarm.cancel()


class Stepwise(Exchange):
    """A client whose signed calls are each made in an event loop."""

    def cancel(self, credential: Credential, ref: OrderRef) -> Reply | Failure:
        return asyncio.run(made(self.prepare(Call.CANCEL, credential, ref)))

    def query(self, credential: Credential, ref: OrderRef) -> Reply | Failure:
        return asyncio.run(made(self.prepare(Call.QUERY, credential, ref)))


#: The client's classes, for parametrized fixtures.
WAYS = (Exchange, Stepwise)
