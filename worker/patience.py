"""How long an answer of the exchange is waited for before its absence is called a silence: arithmetic alone.

RFC 6298 for calls in place of segments: the smoothed time that answers take and four times its variation. Every answer
is a sample, late ones too. While nothing at all is heard, what is waited doubles: once for each period of silence,
however many calls it met.
"""

from __future__ import annotations

from dataclasses import dataclass

from producer.message import Call

__all__ = ["FIRST_S", "FLOOR_S", "Patience"]

#: The least that is waited for an answer, s: a pause of the network, or of a collector of garbage, is no silence.
FLOOR_S = 0.25
#: What is waited while nothing is known yet, s (RFC 6298, 2.1).
FIRST_S = 1.0
_NS_PER_S = 1_000_000_000


@dataclass(slots=True)
class _Estimate:
    """What answers to one kind of call take, s (RFC 6298, 2.2 and 2.3)."""

    smoothed_s: float
    variation_s: float

    def add(self, took_s: float) -> None:
        self.variation_s += (abs(self.smoothed_s - took_s) - self.variation_s) / 4
        self.smoothed_s += (took_s - self.smoothed_s) / 8

    @property
    def bound_s(self) -> float:
        return self.smoothed_s + 4 * self.variation_s


class Patience:
    """What is waited for answers, at least and at most, s. Times are :func:`worker.clock.local_ns`."""

    def __init__(self, most_s: float, least_s: float = FLOOR_S) -> None:
        self._most_s, self._least_s = most_s, least_s
        self._estimates: dict[Call, _Estimate] = {}
        self._doublings = 0
        self._heard_ns = self._doubled_ns = 0

    def of(self, call: Call) -> float:
        """How long to wait for the answer to a ``call`` that is sent now, s.

        A kind of call that was never answered yet is judged by the others.
        """
        own = self._estimates.get(call)
        known = self._estimates.values() if own is None else (own,)
        bound_s = max((each.bound_s for each in known), default=FIRST_S)
        return min(max(bound_s, self._least_s) * (1 << self._doublings), self._most_s)

    def answered(self, call: Call, sent_ns: int, received_ns: int) -> None:
        """Take in an answer: what was silent is heard again."""
        took_s = (received_ns - sent_ns) / _NS_PER_S
        estimate = self._estimates.get(call)
        if estimate is None:
            self._estimates[call] = _Estimate(took_s, took_s / 2)
        else:
            estimate.add(took_s)
        self._heard_ns = max(self._heard_ns, received_ns)
        self._doublings = 0

    def silent(self, sent_ns: int, now_ns: int) -> None:
        """Take in that a call sent at ``sent_ns`` got no answer in the time that was waited for it."""
        if sent_ns > max(self._heard_ns, self._doubled_ns) and (1 << self._doublings) * self._least_s < self._most_s:
            self._doublings += 1
            self._doubled_ns = now_ns
