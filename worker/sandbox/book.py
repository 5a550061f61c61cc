"""The local exchange's book of conditional orders: their states, and what requests did to them.

Pure: no clock, no random, no sockets. Methods take `now_ms`, the local time in milliseconds since the epoch; times that
an order shows are exchange time, `now_ms + clock_skew_ms`. A trigger runs its course lazily: a state is brought up to
date when somebody looks at the order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

#: 16 digits, as production ids have, and above 2^50: an id that went through 32 bits or a float32 would show.
FIRST_ALGO_ID = 2_000_000_000_000_001

#: Id of the first order that a trigger puts into the matching engine.
FIRST_CHILD_ORDER_ID = 88_937_381_001

#: Arrival times kept per order; the count goes on beyond it.
MAX_ARRIVALS = 32


class AlgoStatus(StrEnum):
    """States of a conditional order (exchange.md 1.4)."""

    NEW = "NEW"  # resting, the only state that a cancel can end
    CANCELED = "CANCELED"  # final
    TRIGGERING = "TRIGGERING"  # on its way into the matching engine
    TRIGGERED = "TRIGGERED"  # a normal order lives under actualOrderId
    FINISHED = "FINISHED"  # that order was filled or cancelled; final
    REJECTED = "REJECTED"  # refused by the matching engine; final
    EXPIRED = "EXPIRED"  # dropped by the exchange; final


#: While an order is in one of these, its client id cannot be given to another order of the account.
OPEN_STATES = frozenset({AlgoStatus.NEW, AlgoStatus.TRIGGERING})


class DuplicateClientId(ValueError):
    """An open order of the account has this client id already (code -4116 on the wire)."""


@dataclass(frozen=True, slots=True)
class OrderTerms:
    """What the creator of an order chooses; decimal numbers are strings, as on the wire."""

    symbol: str = "BTCUSDT"
    side: str = "SELL"
    order_type: str = "STOP_MARKET"
    quantity: str = "0.01"
    trigger_price: str = "9000.0"
    client_algo_id: str = ""  # empty: the exchange makes one


@dataclass(frozen=True, slots=True)
class _Trigger:
    """What a started trigger will do, in local time; None means never."""

    triggered_at_ms: int | None
    finished_at_ms: int | None
    rejected: bool


@dataclass(slots=True, eq=False)
class Order:
    """One conditional order and what was asked of it. Read `status` of an order just taken from the book."""

    account: str
    algo_id: int
    client_algo_id: str
    terms: OrderTerms
    create_time_ms: int
    update_time_ms: int
    status: AlgoStatus = AlgoStatus.NEW
    trigger_time_ms: int = 0
    actual_order_id: str = ""
    decoy: bool = False  # made by a fault, nobody's request: a correct client leaves it NEW
    hidden_until_ms: int = 0
    unseen: bool = False  # by queries, until the next DELETE
    deletes: int = 0
    delete_arrivals_ns: list[int] = field(default_factory=list)
    deletes_effective: int = 0
    gets: int = 0
    trigger: _Trigger | None = field(default=None, repr=False)

    def is_hidden(self, now_ms: int) -> bool:
        """Whether the exchange has forgotten the order for now, and answers as if it did not exist."""
        return now_ms < self.hidden_until_ms

    def note_delete(self, arrival_ns: int) -> None:
        """Count a DELETE that named this order; `arrival_ns` is its local arrival time since the epoch."""
        self.deletes += 1
        if len(self.delete_arrivals_ns) < MAX_ARRIVALS:
            self.delete_arrivals_ns.append(arrival_ns)

    def as_query_answer(self) -> dict[str, object]:
        """The JSON object that GET /fapi/v1/algoOrder answers (exchange.md 1.3, "Query one")."""
        market = self.terms.order_type.endswith("MARKET")
        return {
            "algoId": self.algo_id,
            "clientAlgoId": self.client_algo_id,
            "algoType": "CONDITIONAL",
            "orderType": self.terms.order_type,
            "symbol": self.terms.symbol,
            "side": self.terms.side,
            "positionSide": "BOTH",
            "timeInForce": "GTC",
            "quantity": self.terms.quantity,
            "algoStatus": self.status.value,
            "actualOrderId": self.actual_order_id,
            "actualPrice": "0.00000",
            "actualType": "MARKET" if market else "LIMIT",
            "actualQty": self.terms.quantity,
            "triggerPrice": self.terms.trigger_price,
            "price": "0.00000" if market else self.terms.trigger_price,
            "icebergQuantity": None,
            "tpOrderType": "",
            "selfTradePreventionMode": "EXPIRE_MAKER",
            "workingType": "CONTRACT_PRICE",
            "priceMatch": "NONE",
            "closePosition": False,
            "priceProtect": False,
            "reduceOnly": False,
            "createTime": self.create_time_ms,
            "updateTime": self.update_time_ms,
            "triggerTime": self.trigger_time_ms,
            "goodTillDate": 0,
        }


class OrderBook:
    """All conditional orders of all accounts. The exchange's limit of 200 open ones is not enforced."""

    def __init__(self, *, first_algo_id: int = FIRST_ALGO_ID, clock_skew_ms: int = 0) -> None:
        self.clock_skew_ms = clock_skew_ms
        self.next_algo_id = first_algo_id
        self._next_child_id = FIRST_CHILD_ORDER_ID
        self._by_id: dict[int, Order] = {}
        self._newest_by_client_id: dict[tuple[str, str], Order] = {}

    def add(self, account: str, terms: OrderTerms, now_ms: int, *, decoy: bool = False) -> Order:
        """Open an order.

        Raises:
            DuplicateClientId: an open order of the account has this client id.
        """
        algo_id = self.next_algo_id
        client_algo_id = terms.client_algo_id or f"auto-{algo_id}"
        namesake = self._newest_by_client_id.get((account, client_algo_id))
        if namesake is not None and self._settled(namesake, now_ms).status in OPEN_STATES:
            raise DuplicateClientId(client_algo_id)
        self.next_algo_id += 1
        created_ms = now_ms + self.clock_skew_ms
        order = Order(account, algo_id, client_algo_id, terms, created_ms, created_ms, decoy=decoy)
        self._by_id[algo_id] = order
        self._newest_by_client_id[account, client_algo_id] = order
        return order

    def find(
        self, account: str, now_ms: int, *, algo_id: int | None = None, client_algo_id: str | None = None
    ) -> Order | None:
        """The account's order with this algo id, or else the newest with this client id; None when there is none."""
        if algo_id is not None:
            order = self._by_id.get(algo_id)
        else:
            order = self._newest_by_client_id.get((account, client_algo_id or ""))
        if order is None or order.account != account:
            return None
        return self._settled(order, now_ms)

    def order(self, algo_id: int, now_ms: int) -> Order | None:
        """The order with this algo id, whoever owns it."""
        order = self._by_id.get(algo_id)
        return None if order is None else self._settled(order, now_ms)

    def orders(self, now_ms: int) -> Iterable[Order]:
        """Every order that was ever opened, oldest first."""
        return (self._settled(order, now_ms) for order in self._by_id.values())

    def open_orders(self, account: str, now_ms: int, symbol: str | None = None) -> list[Order]:
        """The account's orders that rest in the book and are not forgotten for now."""
        return [
            order
            for order in self.orders(now_ms)
            if order.account == account
            and order.status is AlgoStatus.NEW
            and (symbol is None or order.terms.symbol == symbol)
            and not order.is_hidden(now_ms)
        ]

    def cancel(self, order: Order, now_ms: int, *, by_request: bool = True) -> bool:
        """Cancel the order; False, without a change, unless it was NEW.

        A cancel that is not `by_request` (somebody pressed a button) does not count among the effective DELETEs.
        """
        if not self._leave_new(order, AlgoStatus.CANCELED, now_ms):
            return False
        order.deletes_effective += by_request
        return True

    def expire(self, order: Order, now_ms: int) -> bool:
        """Drop the order as the exchange does, for instance when the position is gone; False unless it was NEW."""
        return self._leave_new(order, AlgoStatus.EXPIRED, now_ms)

    def reject(self, order: Order, now_ms: int) -> bool:
        """Have the matching engine refuse the order; False unless it was NEW or TRIGGERING."""
        if self._settled(order, now_ms).status not in OPEN_STATES:
            return False
        order.trigger = None
        self._enter(order, AlgoStatus.REJECTED, now_ms)
        return True

    def trigger(
        self,
        order: Order,
        now_ms: int,
        *,
        triggered_after_ms: int | None = 0,
        finished_after_ms: int | None = None,
        rejected: bool = False,
    ) -> bool:
        """Start the trigger: TRIGGERING now, TRIGGERED (or REJECTED) later, and then FINISHED; False unless NEW.

        `triggered_after_ms` None leaves it TRIGGERING for ever, `finished_after_ms` (counted from TRIGGERED) None
        leaves it TRIGGERED.
        """
        if not self._leave_new(order, AlgoStatus.TRIGGERING, now_ms):
            return False
        order.trigger_time_ms = order.update_time_ms
        triggered_at_ms = None if triggered_after_ms is None else now_ms + triggered_after_ms
        finishes = triggered_at_ms is not None and finished_after_ms is not None
        finished_at_ms = (triggered_at_ms or 0) + (finished_after_ms or 0) if finishes else None
        order.trigger = _Trigger(triggered_at_ms, finished_at_ms, rejected)
        self._settled(order, now_ms)
        return True

    def forget(self, order: Order, until_ms: int) -> None:
        """Behave as if the order did not exist until `until_ms` (local time); it stays what it is."""
        order.hidden_until_ms = until_ms

    def _leave_new(self, order: Order, status: AlgoStatus, now_ms: int) -> bool:
        if self._settled(order, now_ms).status is not AlgoStatus.NEW:
            return False
        self._enter(order, status, now_ms)
        return True

    def _enter(self, order: Order, status: AlgoStatus, at_ms: int) -> None:
        order.status = status
        order.update_time_ms = at_ms + self.clock_skew_ms

    def _settled(self, order: Order, now_ms: int) -> Order:
        trigger = order.trigger
        if trigger is None:
            return order
        if order.status is AlgoStatus.TRIGGERING and trigger.triggered_at_ms is not None:
            if now_ms < trigger.triggered_at_ms:
                return order
            self._leave_triggering(order, trigger, trigger.triggered_at_ms)
        finished_at_ms = trigger.finished_at_ms
        if order.status is AlgoStatus.TRIGGERED and finished_at_ms is not None and now_ms >= finished_at_ms:
            self._enter(order, AlgoStatus.FINISHED, finished_at_ms)
        return order

    def _leave_triggering(self, order: Order, trigger: _Trigger, at_ms: int) -> None:
        if trigger.rejected:
            self._enter(order, AlgoStatus.REJECTED, at_ms)
            return
        order.actual_order_id = str(self._next_child_id)
        self._next_child_id += 1
        self._enter(order, AlgoStatus.TRIGGERED, at_ms)
