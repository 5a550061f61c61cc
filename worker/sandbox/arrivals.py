"""Requests about orders as they came in at the local exchange: when, by which connection, and what they named."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

#: So many are kept; the oldest go.
MAX_ARRIVALS = 50_000


@dataclass(frozen=True, slots=True)
class Arrival:
    """A DELETE or GET about an order, whatever became of it. Times are local, since the epoch."""

    at_ns: int
    method: str
    port: int  # of the caller's connection
    algo_id: int | None  # as the request named the order, like the next; for a child, its parent's
    client_algo_id: str | None
    signed_ms: int  # its timestamp, as far as the caller knew the exchange's clock
    order_id: int | None = None  # of the child that the request was about


class Arrivals:
    """The newest of them, in the order in which they came."""

    def __init__(self) -> None:
        self._kept: deque[Arrival] = deque(maxlen=MAX_ARRIVALS)

    def __iter__(self) -> Iterator[Arrival]:
        return iter(self._kept)

    def note(
        self,
        at_ns: int,
        method: str,
        port: int,
        said: Mapping[str, str],
        clock_skew_ms: int,
        parent: int | None = None,
    ) -> None:
        """Keep one; ``said`` are its parameters, ``clock_skew_ms`` is exchange time minus local time, ``parent`` the
        algo id of the order whose child it names.

        Raises:
            ValueError: a number of the parameters is none; nothing is kept.
        """
        algo_id = int(said["algoId"]) if "algoId" in said else parent
        order_id = int(said["orderId"]) if "orderId" in said else None
        signed_ms = int(said.get("timestamp", 0)) - clock_skew_ms
        self._kept.append(Arrival(at_ns, method, port, algo_id, said.get("clientAlgoId"), signed_ms, order_id))
