"""The pause that all requests of one egress address share, and the budget that keeps it from being needed.

Redis holds the truth about the pause; each process looks at its own memory right before each send, which a claim or a
renewal refreshes each second. The exchange tells the weight that the address has used with every answer.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Awaitable, Callable

import redis

from producer.message import Call
from worker import log
from worker.classify import Means, Verdict
from worker.clock import local_ns
from worker.decide import Policy, Span, pause_ms

#: After a pause the requests in flight grow from one to all within this time, ms.
RAMP_MS = 2_000
#: The share of the weight limit at which queries end, so that the rest is for cancels.
NO_QUERIES_AT = 0.75
#: What of the limit is left unused, as a share, and in weight at the least where that is no larger share: for the time
#: calls of all workers, and for what others on the address send meanwhile.
RESERVE_PART, RESERVE_LEAST, RESERVE_MOST_PART = 0.01, 10, 0.1
#: The part of the weight that is left which one worker may have in flight: what the others have is not known.
_PART_IN_FLIGHT = 4
#: The part of the weight that is left, and of the flight, that may go into looking orders up after a silence.
LOOK_UPS_PART = 4
#: ... of the flight where most of it is silent.
FEW_LOOK_UPS_PART = 16
#: The weight that an address may use in a minute where exchangeInfo could not be read (exchange.md 3).
DEFAULT_WEIGHT_LIMIT = 2_400
_MINUTE_MS = 60_000
#: A closing that moves a pause's end by no more than this, ms, is told to Redis at the next :meth:`Gate.share`: the
#: requests that were in flight are refused one after another.
_SAME_PAUSE_MS = 1_000
#: ... unless the pause ends before the others would hear of it, ms.
_HEARD_WITHIN_MS = 2_000

#: Publishes a closing: pause in ms, reason, doubling; gives the gate's end (:meth:`worker.store.Store.close_gate`).
Publish = Callable[[int, str, bool], Awaitable[int]]


class Gate:
    """One worker's view of the gate. Times are Redis' clock, ms."""

    def __init__(self, publish: Publish) -> None:
        self._publish = publish
        self._unshared: tuple[int, str, bool] | None = None
        self._reason = "as another worker told before Redis forgot"
        self._news_at_ns = -math.inf  # when Redis last heard of a closing of ours, or we of another's
        self._left = (0, 0)  # until when it was told, and the weight that was left then
        self.until_ms = 0
        self.weight_limit = DEFAULT_WEIGHT_LIMIT
        self.looked_up: Counter[int] = Counter()  # how often an order was looked up after a silence, by minute

    def closed(self, now_ms: int) -> bool:
        """Whether nothing may be sent now."""
        return now_ms < self.until_ms

    def ceiling(self, size: int, now_ms: int) -> int:
        """Requests in flight at the most: ``size``, but few at first after a pause, and near the weight limit."""
        since_ms = now_ms - self.until_ms
        ramped = size if since_ms >= RAMP_MS else size * max(since_ms, 0) // RAMP_MS
        told_until_ms, left = self._left
        return max(1, ramped if now_ms >= told_until_ms else min(ramped, left // _PART_IN_FLIGHT))

    def observe(self, until_ms: int) -> None:
        """Note what Redis says; an end that is later here has not reached Redis yet, and holds."""
        if until_ms > self.until_ms:
            self.until_ms, self._news_at_ns = until_ms, local_ns()

    def told(self, until_ms: int | None, now_ms: int, asked_at_ns: int) -> None:
        """Note what Redis' own record said when asked at ``asked_at_ns``; None: it has no record.

        A person may open it there (`HSET gate:all until_ms 0`). A record that is gone, or holds an earlier end, says
        nothing: a Redis that lost its data, or its last second, must not end a ban, and is told of it again.
        """
        is_fresh = self._unshared is None and asked_at_ns > self._news_at_ns
        if until_ms != 0 or not self.closed(now_ms):
            self.observe(until_ms or 0)
            if is_fresh and self.closed(now_ms) and (until_ms or 0) + _SAME_PAUSE_MS < self.until_ms:
                self._unshared = (self.until_ms, self._reason, False)
        elif is_fresh:
            self.until_ms = now_ms  # from now on it ramps up
            log.warning("gate", state="opened", reason="by its record in Redis")

    def close_for(self, verdict: Verdict, policy: Policy, now_ms: int, ahead: Span | None) -> bool:
        """Close it as long as a gated ``verdict`` asks for; whether Redis should hear of it now (:meth:`share`)."""
        reason = f"{verdict.http} {verdict.msg}".strip()
        is_firewall = verdict.means is Means.BLOCKED and verdict.http != 451
        return self._close(pause_ms(verdict, policy, now_ms, ahead), reason, now_ms, doubling=is_firewall)

    def spend(self, used: int, in_flight: int, server_now_ms: int, now_ms: int) -> bool:
        """Close it until the exchange's next minute if the weight used, with what is under way, leaves the reserve
        alone; whether Redis should hear of it now."""
        minute_ms = ms_to_next_minute(server_now_ms)
        reserve = min(max(RESERVE_PART * self.weight_limit, RESERVE_LEAST), RESERVE_MOST_PART * self.weight_limit)
        left = math.floor(self.weight_limit - reserve) - used
        self._left = (now_ms + minute_ms, left)
        if in_flight < left or self.closed(now_ms):
            return False
        reason = f"weight {used} used and {in_flight} under way of {self.weight_limit} a minute"
        return self._close(minute_ms, reason, now_ms, doubling=False)

    def allows(self, call: Call, used: int) -> bool:
        """Whether the budget has room for ``call``: cancels have the last quarter to themselves."""
        return call.cancels or used < NO_QUERIES_AT * self.weight_limit

    def allows_look_up(self, used: int, minute: int) -> bool:
        """Whether it has room for a query that only a silence asks for: they have a part of what is left.

        ``minute`` is the exchange's, for which :meth:`note_look_up` has counted them.
        """
        return self.looked_up[minute] < (self.weight_limit - used) // LOOK_UPS_PART

    def note_look_up(self, minute: int) -> None:
        """Count one."""
        self.looked_up = Counter({minute: self.looked_up[minute] + 1})

    async def share(self, now_ms: int) -> None:
        """Tell Redis of a closing that it has not heard of; called again until it has."""
        if self._unshared is None:
            return
        unshared = until_ms, reason, doubling = self._unshared
        try:
            self.observe(await self._publish(max(until_ms - now_ms, 0), reason, doubling))
        except redis.RedisError as error:
            log.error("gate", state="not_shared", reason=reason, error=type(error).__name__)
            return
        self._news_at_ns = local_ns()
        if self._unshared == unshared:
            self._unshared = None

    def _close(self, pause_ms: int, reason: str, now_ms: int, *, doubling: bool) -> bool:
        until_ms = now_ms + pause_ms
        before_ms, self.until_ms = self.until_ms, max(self.until_ms, until_ms)
        if until_ms <= before_ms:
            return False
        self._unshared, self._reason = (until_ms, reason, doubling), reason
        is_news = now_ms + _HEARD_WITHIN_MS > before_ms or until_ms > before_ms + _SAME_PAUSE_MS
        if is_news:
            log.warning("gate", state="closed", reason=reason, **{"measure#cancel.gate_ms": pause_ms})
        return is_news


class LookUps:
    """Who of a flight may look an order up because a call about it was silent: a part, and few where most are silent.

    ``waiting`` are the events by which those are told that were refused.
    """

    def __init__(self, flight: int) -> None:
        self.part, self._few = max(1, flight // LOOK_UPS_PART), max(2, flight // FEW_LOOK_UPS_PART)
        self.waiting: deque[asyncio.Event] = deque()
        self._under_way = 0

    def begin(self, silent: int, flight: int) -> bool:
        """Whether one more may; it is to :meth:`end`. ``silent`` of ``flight`` have a call that is not answered."""
        may = self._under_way < (self._few if 2 * silent > flight else self.part)
        self._under_way += may
        return may

    def end(self) -> None:
        """One is done: two others may try, so that there are more and more of them while the exchange answers."""
        self._under_way -= 1
        for event in list(self.waiting)[:2]:
            event.set()


def ms_to_next_minute(server_now_ms: int) -> int:
    """How long until the exchange counts weight from nothing again, ms, with a little to be sure."""
    return _MINUTE_MS - server_now_ms % _MINUTE_MS + 250
