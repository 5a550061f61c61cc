"""Which request meets which fault, by script or by seed. Pure: no clock, no random generator, no sockets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain, repeat

from producer.message import Call
from worker.sandbox.faults import Fault, FaultSet

#: What stands for the algo id where lists of open orders meet faults: they are about no order of their own.
EVERY_LIST = 0
#: One incident for every so many orders, up to the plan's maximum: a small run is not one long ban.
ORDERS_PER_INCIDENT = 50
#: Most seeded faults that an order's calls of one kind meet, so that every order comes to an end.
MOST_FOR_A_CALL = 3


@dataclass(slots=True)
class FaultPlan:
    """Which fault the n-th cancel or query of an order meets.

    A script for an order comes first. Beyond it, the draw for a call depends on (seed, algo id, call, n) alone, so that
    a seed replays however requests are interleaved. `rate` is the probability for a call. An incident strikes the first
    cancel of one order in `ORDERS_PER_INCIDENT`. From `until_ms` on (local time) nothing happens.
    """

    fault_set: FaultSet = field(default_factory=FaultSet)
    seed: int = 0
    rate: float = 0.3
    max_incidents: int = 4
    until_ms: int | None = None
    injected: Counter[str] = field(default_factory=Counter)
    _met: dict[int, list[Fault]] = field(default_factory=dict)
    _scripts: dict[tuple[int, Call], Iterator[Fault | None]] = field(default_factory=dict)
    _turns: Counter[tuple[int, Call]] = field(default_factory=Counter)
    _drawn: Counter[tuple[int, Call]] = field(default_factory=Counter)
    _by_client_id: set[int] = field(default_factory=set)  # orders that a request has named by client id alone
    _admitted: int = 0
    _struck: set[int] = field(default_factory=set)

    def admit(self, algo_id: int) -> None:
        """Tell the plan of an order that was opened; incidents are spread over them."""
        self._admitted += 1
        if self._admitted % ORDERS_PER_INCIDENT == 0 and len(self._struck) < self.max_incidents:
            self._struck.add(algo_id)

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
        self._scripts[algo_id, call] = chain(faults, repeat(faults[-1])) if repeat_last else iter(faults)

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
        try:
            fault = next(self._scripts.get((algo_id, call), iter(())))
        except StopIteration:
            fault = self._seeded(algo_id, call)
        if fault is not None:
            self.injected[fault] += 1
            self._met.setdefault(algo_id, []).append(fault)
        return fault

    def met(self, algo_id: int) -> tuple[Fault, ...]:
        """The faults that the order's calls have met so far, oldest first."""
        return tuple(self._met.get(algo_id, ()))

    def _seeded(self, algo_id: int, call: Call) -> Fault | None:
        turn = self._turns[algo_id, call]
        chance, choice = _draw(self.seed, algo_id, call, turn)
        choices = self.fault_set.for_call(call)
        if turn == 1 and call is Call.CANCEL and algo_id in self._struck:
            choices, chance = self.fault_set.incidents or choices, 0
        if chance >= self.rate or self._drawn[algo_id, call] == MOST_FOR_A_CALL or not choices:
            return None
        self._drawn[algo_id, call] += 1
        fault = choices[choice % len(choices)]
        return None if fault is Fault.CLIENT_ID_REUSED and algo_id in self._by_client_id else fault


def _draw(seed: int, algo_id: int, purpose: str, turn: int) -> tuple[float, int]:
    """A number below 1 and another one below 2^64 that depend on the arguments alone."""
    digest = blake2b(f"{seed}:{algo_id}:{purpose}:{turn}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big") / 2**64, int.from_bytes(digest[8:], "big")
