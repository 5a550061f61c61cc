"""Which request meets which fault, by script or by seed. Pure: no clock, no random generator, no sockets."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from worker.sandbox.faults import Call, Fault, FaultSet

#: Seeded plans leave an order alone after this many calls of a kind, so that every order comes to an end.
LAST_SEEDED_TURN = 8
#: What stands for the algo id where lists of open orders meet faults: they are about no order of their own.
EVERY_LIST = 0
#: One incident for every so many orders, up to the plan's maximum: a small run is not one long ban.
ORDERS_PER_INCIDENT = 50


@dataclass(slots=True)
class _Script:
    """Faults still to come for one order and call; None is a call without a fault."""

    faults: deque[Fault | None]
    repeat_last: bool = False

    def take(self) -> Fault | None:
        if self.repeat_last and len(self.faults) == 1:
            return self.faults[0]
        return self.faults.popleft()


@dataclass(slots=True)
class FaultPlan:
    """Which fault the n-th cancel or query of an order meets.

    A script for an order comes first. Beyond it, the draw for a call depends on (seed, algo id, call, n) alone, so that
    a seed replays however requests are interleaved. An incident strikes the first cancel of those orders whose hash is
    lowest among all that were admitted. `rate` is the probability for a call, until the order has had its share of
    `max_per_order`. From `until_ms` on (local time) nothing happens.
    """

    fault_set: FaultSet = field(default_factory=FaultSet)
    seed: int = 0
    rate: float = 0.3
    max_per_order: int = 3
    max_incidents: int = 4
    until_ms: int | None = None
    injected: Counter[str] = field(default_factory=Counter)
    _incidents: int = 0
    _met: dict[int, list[Fault]] = field(default_factory=dict)
    _scripts: dict[tuple[int, Call], _Script] = field(default_factory=dict)
    _turns: Counter[tuple[int, Call]] = field(default_factory=Counter)
    _by_client_id: set[int] = field(default_factory=set)  # orders that a request has named by client id alone
    _admitted: int = 0
    _struck: list[tuple[int, int]] = field(default_factory=list)  # a heap of the lowest hashes, negated, with ids

    def admit(self, algo_ids: Iterable[int]) -> None:
        """Tell the plan of orders that were opened; incidents are spread over them."""
        for algo_id in algo_ids:
            self._admitted += 1
            if not self.fault_set.incidents or self.max_incidents == 0:
                continue
            entry = (-_draw(self.seed, algo_id, "incident", 0)[0], algo_id)
            if len(self._struck) < self.max_incidents:
                heapq.heappush(self._struck, entry)
            else:
                heapq.heappushpop(self._struck, entry)

    def script(self, algo_id: int, call: Call, faults: Sequence[Fault | None], *, repeat_last: bool = False) -> None:
        """Have the order's next calls meet these faults in turn; with `repeat_last` the last one for ever.

        Raises:
            ValueError: a fault does not exist for this call, or there is nothing to repeat.
        """
        for fault in faults:
            if fault is not None and call not in fault.spec.calls:
                raise ValueError(f"{fault} is not a fault of a {call}")
        if not faults:
            raise ValueError("a script needs at least one entry")
        self._scripts[algo_id, call] = _Script(deque(faults), repeat_last)

    def meet(self, algo_id: int, call: Call, now_ms: int, *, by_client_id: bool = False) -> Fault | None:
        """The fault that this call meets, noted as injected; each call of an order must be shown here once.

        `by_client_id`: the request named the order by client id alone, so that a reused client id would leave even a
        correct client without a definite outcome; a seeded plan spares it that, and all further calls for the order,
        as another request by client id may be on its way.
        """
        self._turns[algo_id, call] += 1
        if by_client_id:
            self._by_client_id.add(algo_id)
        if self.until_ms is not None and now_ms >= self.until_ms:
            return None
        script = self._scripts.get((algo_id, call))
        if script is not None and script.faults:
            fault = script.take()
        else:
            fault = self._allowed(self.seeded(algo_id, call, self._turns[algo_id, call]), algo_id)
        if fault is not None:
            self.injected[fault] += 1
            self._met.setdefault(algo_id, []).append(fault)
        return fault

    def met(self, algo_id: int) -> tuple[Fault, ...]:
        """The faults that the order's calls have met so far, oldest first."""
        return tuple(self._met.get(algo_id, ()))

    def seeded(self, algo_id: int, call: Call, turn: int) -> Fault | None:
        """What the seed holds for the `turn`-th such call (from 1) of an order; scripts and time do not matter here."""
        choices = self.fault_set.for_call(call)
        struck = call is Call.CANCEL and self._is_struck(algo_id)
        if turn > LAST_SEEDED_TURN or not (choices or struck):
            return None
        chance, choice = _draw(self.seed, algo_id, call, turn)
        strikes = struck and turn == 1
        if not strikes and chance >= self.rate * _RANGE:
            return None
        earlier = [_draw(self.seed, algo_id, call, n)[0] < self.rate * _RANGE for n in range(1, turn)]
        if struck and turn > 1:
            earlier[0] = True
        if sum(earlier) >= self._share(algo_id, call):
            return None
        if strikes:
            choices = self.fault_set.incidents
        return choices[choice % len(choices)] if choices else None

    def _allowed(self, fault: Fault | None, algo_id: int) -> Fault | None:
        if fault is None or (fault is Fault.CLIENT_ID_REUSED and algo_id in self._by_client_id):
            return None
        if fault.spec.pauses:
            self._incidents += 1
            # Orders that are opened during a run change which ones are struck, and could add up to more.
            return fault if self._incidents <= self.max_incidents else None
        return fault

    def _share(self, algo_id: int, call: Call) -> int:
        """How many of the order's faults its cancels may meet; the rest is for its queries. A child has as many."""
        if self.max_per_order == 0:
            return 0
        for_queries = _draw(self.seed, algo_id, "share", 0)[0] % self.max_per_order
        return self.max_per_order - for_queries if call.cancels else for_queries

    def _is_struck(self, algo_id: int) -> bool:
        allowed = min(self.max_incidents, self._admitted // ORDERS_PER_INCIDENT)
        if allowed == 0:
            return False
        return any(algo_id == struck for _, struck in heapq.nlargest(allowed, self._struck))


_RANGE = 2**64


def _draw(seed: int, algo_id: int, purpose: str, turn: int) -> tuple[int, int]:
    """Two numbers below 2^64 that depend on the arguments alone."""
    digest = blake2b(f"{seed}:{algo_id}:{purpose}:{turn}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
