"""A job in a holder's hands, and for how long its lease can be trusted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from worker.clock import RedisClock, SleepWatch, local_ns
from worker.store import Lease

__all__ = ["Held", "Trust"]


class Trust:
    """Since when what Redis says of leases holds here.

    After a sleep of this host that the clock of leases does not count, and after a step of Redis' clock (it was set, or
    is another server's), leases are renewed before anything more is sent.
    """

    def __init__(self, redis_clock: RedisClock, sleep: SleepWatch | None = None) -> None:
        self._clock, self._sleep = redis_clock, sleep or SleepWatch()
        self._steps = redis_clock.steps
        self._since_ns = self._stepped_ns = 0

    def stepped_ns(self) -> int:
        """When Redis' clock stepped last (:func:`worker.clock.local_ns`)."""
        if self._clock.steps != self._steps:
            self._steps = self._clock.steps
            self._since_ns = self._stepped_ns = local_ns()
        return self._stepped_ns

    def since_ns(self) -> int:
        """What was asked before (:func:`worker.clock.local_ns`) says nothing of a lease's end."""
        self.stepped_ns()
        if self._sleep.moved():
            self.doubt()
        return self._since_ns

    def doubt(self) -> None:
        """Something else tells that this host may have stood still: a virtual machine can, with no clock showing it."""
        self._since_ns = local_ns()


@dataclass(slots=True, eq=False)
class Held:
    """A job in our hands, with its lease as far as we know it."""

    lease: Lease
    asked_ns: int  # when its claim, or its last renewal, was asked for
    trust: Trust
    ask: Callable[[], Awaitable[None]]  # has Redis tell whose it is, and trusts nothing that was asked before
    until_ns: int = field(init=False)
    claimed_ns: int = field(default_factory=local_ns)
    is_over: bool = False  # somebody else has it, or waits for us to leave: nothing more is sent for it
    is_ending: bool = False

    def __post_init__(self) -> None:
        self.until_ns = self.lease.until_ns

    def is_valid(self) -> bool:
        """Whether more may be sent: a process that was paused may wake up long after somebody else took the job."""
        is_trusted = self.asked_ns >= self.trust.since_ns()
        return is_trusted and not self.is_over and local_ns() < self.until_ns

    def renewed(self, asked_ns: int, until_ns: int) -> None:
        """Take in a renewal that was asked for then."""
        if asked_ns >= self.asked_ns:
            self.asked_ns, self.until_ns = asked_ns, until_ns

    async def renew(self) -> None:
        """Trust no lease that was given so far, as this host may have stood still, and ask Redis whose the job is."""
        if not self.is_over:
            await self.ask()
