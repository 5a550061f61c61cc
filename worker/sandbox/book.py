"""The local exchange's book of conditional orders and of their children: states, and what requests did to them.

Pure: no clock, no random, no sockets. Methods take `now_ms`, the local time in milliseconds since the epoch; times that
an order shows are exchange time, `now_ms + clock_skew_ms`. A trigger runs its course lazily: a state is brought up to
date when somebody looks at the order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum

#: 16 digits, as production ids have, and above 2^50: an id that went through 32 bits or a float32 would show.
FIRST_ALGO_ID = 2_000_000_000_000_001

#: Id of the first order that a trigger puts into the matching engine.
FIRST_CHILD_ORDER_ID = 88_937_381_001

#: What a closing order closes. There are no positions here; what the real answer says is UNCONFIRMED.
POSITION_QTY = "0.01"


class AlgoStatus(StrEnum):
    """States of a conditional order (exchange.md 1.4)."""

    NEW = "NEW"  # resting, the only state that a cancel can end
    CANCELED = "CANCELED"  # final
    TRIGGERING = "TRIGGERING"  # on its way into the matching engine
    TRIGGERED = "TRIGGERED"  # a normal order lives under actualOrderId
    FINISHED = "FINISHED"  # that order was filled or cancelled; final
    REJECTED = "REJECTED"  # refused by the matching engine; final
    EXPIRED = "EXPIRED"  # dropped by the exchange; final


class ChildStatus(StrEnum):
    """States of the normal order that a trigger makes (exchange.md 1.8); the first two are live."""

    NEW = "NEW"
    PARTIALLY_FILLED = "PARTIALLY_FILLED"
    FILLED = "FILLED"
    CANCELED = "CANCELED"
    EXPIRED = "EXPIRED"
    EXPIRED_IN_MATCH = "EXPIRED_IN_MATCH"
    REJECTED = "REJECTED"

    @property
    def live(self) -> bool:
        """Whether it rests in the book."""
        return self in {ChildStatus.NEW, ChildStatus.PARTIALLY_FILLED}


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
    price: str = ""  # of a LIMIT child; empty: the trigger price
    position_side: str = "BOTH"
    time_in_force: str = "GTC"
    working_type: str = "CONTRACT_PRICE"
    price_match: str = "NONE"
    close_position: bool = False  # then there is no quantity
    price_protect: bool = False
    reduce_only: bool = False
    activate_price: str = ""  # these two: of a trailing order, which has no trigger price
    callback_rate: str = ""
    stp_mode: str = "EXPIRE_MAKER"
    good_till_date: int = 0

    @property
    def at_market(self) -> bool:
        """Whether it becomes a MARKET order, which fills at once, and not a LIMIT order, which can rest."""
        return self.order_type.endswith("MARKET")

    @property
    def trailing(self) -> bool:
        """Whether the price that triggers it follows the market."""
        return self.order_type == "TRAILING_STOP_MARKET"

    @property
    def fills_after_ms(self) -> int | None:
        """How its child fares where nobody says otherwise: at market it fills at once, with a limit it rests."""
        return 0 if self.at_market else None

    @property
    def limit_price(self) -> str:
        """What its child is filled at, unless somebody says otherwise; empty for a trailing order."""
        return self.price or self.trigger_price

    def is_met_by(self, price: Decimal) -> bool:
        """Whether this price triggers it; a trailing order is not asked."""
        if self.trailing:
            return False
        # A stop to sell and a target to buy wait for a price below.
        below = self.order_type.startswith("STOP") == (self.side == "SELL")
        return price <= Decimal(self.trigger_price) if below else price >= Decimal(self.trigger_price)

    def shown(self) -> dict[str, object]:
        """The part of an order's JSON that its creator chose, as it was sent."""
        return {
            "symbol": self.symbol,
            "side": self.side,
            "positionSide": self.position_side,
            "timeInForce": self.time_in_force,
            "selfTradePreventionMode": self.stp_mode,
            "workingType": self.working_type,
            "priceMatch": self.price_match,
            "closePosition": self.close_position,
            "priceProtect": self.price_protect,
            "reduceOnly": self.reduce_only,
            "goodTillDate": self.good_till_date,
        }


@dataclass(frozen=True, slots=True)
class Course:
    """What follows on a trigger, ms.

    TRIGGERED (or REJECTED) comes so long after TRIGGERING, or never where that is None; the other times count from
    there: the order names its child, calls find the child, and it is filled (None: it rests).
    """

    triggered_after_ms: int | None = 0
    id_after_ms: int = 0
    child_after_ms: int = 0
    finished_after_ms: int | None = None
    rejected: bool = False


@dataclass(slots=True, eq=False)
class _Counted:
    """What requests did to an order or a child, and whether they see it."""

    create_time_ms: int
    update_time_ms: int
    hidden_until_ms: int = field(default=0, kw_only=True)
    unseen: bool = field(default=False, kw_only=True)  # by queries, until the next DELETE
    deletes: int = field(default=0, kw_only=True)
    deletes_effective: int = field(default=0, kw_only=True)
    gets: int = field(default=0, kw_only=True)

    def is_hidden(self, now_ms: int) -> bool:
        """Whether the exchange does not know it for now, and answers as if it did not exist."""
        return self.unseen or now_ms < self.hidden_until_ms


@dataclass(slots=True, eq=False)
class Child(_Counted):
    """The normal order that a triggered one has become. Read it of an order just taken from the book."""

    order: Order = field(repr=False)
    order_id: int
    orig_qty: Decimal
    status: ChildStatus = ChildStatus.NEW
    executed_qty: Decimal = Decimal(0)
    cum_quote: Decimal = Decimal(0)

    @property
    def client_order_id(self) -> str:
        """An id of its own: whether the real child inherits its parent's is UNCONFIRMED."""
        return f"child-{self.order_id}"

    @property
    def avg_price(self) -> Decimal:
        """Of what was executed; 0 where nothing was."""
        return self.cum_quote / self.executed_qty if self.executed_qty else Decimal(0)

    def as_cancel_answer(self) -> dict[str, object]:
        """The JSON object that DELETE /fapi/v1/order answers (exchange.md 1.8); there is no `code` in it."""
        return self._shown() | {"cumQty": _plain(self.executed_qty)}

    def as_query_answer(self) -> dict[str, object]:
        """The JSON object that GET /fapi/v1/order answers."""
        return self._shown() | {"avgPrice": f"{self.avg_price:.5f}", "time": self.create_time_ms}

    def _shown(self) -> dict[str, object]:
        terms = self.order.terms
        order_type = "MARKET" if terms.at_market else "LIMIT"
        return terms.shown() | {
            "clientOrderId": self.client_order_id,
            "cumQuote": f"{self.cum_quote:.5f}",
            "executedQty": _plain(self.executed_qty),
            "orderId": self.order_id,
            "origQty": _plain(self.orig_qty),
            "origType": order_type,  # or the parent's type, as before the algo service: UNCONFIRMED
            "price": "0" if terms.at_market else terms.limit_price,
            "status": self.status.value,
            "stopPrice": "0",
            "type": order_type,
            "updateTime": self.update_time_ms,
        }


def _plain(number: Decimal) -> str:
    return f"{number.normalize():f}"


@dataclass(slots=True, eq=False)
class Order(_Counted):
    """One conditional order and what was asked of it. Read `status` of an order just taken from the book."""

    account: str
    algo_id: int
    client_algo_id: str
    terms: OrderTerms
    status: AlgoStatus = AlgoStatus.NEW
    trigger_time_ms: int = 0
    actual_order_id: str = ""  # as queries show it, which may be later than the child exists
    decoy: bool = False  # made by a fault, nobody's request: a correct client leaves it NEW
    course: Course | None = field(default=None, repr=False)
    triggered_at_ms: int = 0  # local time
    child: Child | None = None
    extreme: Decimal | None = None  # the best price since a trailing order was activated

    def as_cancel_answer(self) -> dict[str, object]:
        """The JSON object that DELETE /fapi/v1/algoOrder answers: `code` is a string."""
        return {"algoId": self.algo_id, "clientAlgoId": self.client_algo_id, "code": "200", "msg": "success"}

    def as_query_answer(self) -> dict[str, object]:
        """The JSON object that GET /fapi/v1/algoOrder answers (exchange.md 1.3, "Query one")."""
        terms = self.terms
        # What a trailing order shows of these, and a closing one as its quantity, is UNCONFIRMED.
        trail = {"activatePrice": terms.activate_price, "callbackRate": terms.callback_rate} if terms.trailing else {}
        shown = {
            "algoId": self.algo_id,
            "clientAlgoId": self.client_algo_id,
            "algoType": "CONDITIONAL",
            "orderType": terms.order_type,
            "quantity": terms.quantity or "0",
            "algoStatus": self.status.value,
            "actualOrderId": self.actual_order_id,
            "actualPrice": f"{self.child.avg_price if self.child else 0:.5f}",
            "actualType": "MARKET" if terms.at_market else "LIMIT",
            "actualQty": terms.quantity or "0",
            "triggerPrice": terms.trigger_price,
            "price": "0.00000" if terms.at_market else terms.limit_price,
            "icebergQuantity": None,
            "tpOrderType": "",
            "createTime": self.create_time_ms,
            "updateTime": self.update_time_ms,
            "triggerTime": self.trigger_time_ms,
        }
        return terms.shown() | shown | trail

    def sees(self, price: Decimal) -> bool:
        """Take note of a price of the symbol; whether it triggers the order."""
        terms = self.terms
        if not terms.trailing:
            return terms.is_met_by(price)
        sells = terms.side == "SELL"
        if self.extreme is None and terms.activate_price:
            activates = Decimal(terms.activate_price)
            if price < activates if sells else price > activates:
                return False
        best = max if sells else min
        self.extreme = price if self.extreme is None else best(self.extreme, price)
        distance = self.extreme * Decimal(terms.callback_rate) / 100
        return price <= self.extreme - distance if sells else price >= self.extreme + distance


class OrderBook:
    """All conditional orders of all accounts. The exchange's limit of 200 open ones is not enforced."""

    def __init__(self, before: OrderBook | None = None, *, clock_skew_ms: int = 0) -> None:
        """An empty book; ids that the one `before` has given are not given again."""
        self.clock_skew_ms = clock_skew_ms
        self._next_algo_id: int = before._next_algo_id if before else FIRST_ALGO_ID
        self._next_child_id: int = before._next_child_id if before else FIRST_CHILD_ORDER_ID
        self._by_id: dict[int, Order] = {}
        self._newest_by_client_id: dict[tuple[str, str], Order] = {}
        self._children: dict[int | str, Child] = {}  # under both their ids

    def add(self, account: str, terms: OrderTerms, now_ms: int, *, decoy: bool = False) -> Order:
        """Open an order.

        Raises:
            DuplicateClientId: an open order of the account has this client id.
        """
        algo_id = self._next_algo_id
        client_algo_id = terms.client_algo_id or f"auto-{algo_id}"
        namesake = self._newest_by_client_id.get((account, client_algo_id))
        if namesake is not None and self._settled(namesake, now_ms).status in OPEN_STATES:
            raise DuplicateClientId(client_algo_id)
        self._next_algo_id += 1
        created_ms = now_ms + self.clock_skew_ms
        order = Order(created_ms, created_ms, account, algo_id, client_algo_id, terms, decoy=decoy)
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

    def find_child(self, account: str, symbol: str, name: int | str, now_ms: int) -> Child | None:
        """The account's child on this symbol with this order id or client order id; None when there is none."""
        child = self._children.get(name)
        if child is None or (child.order.account, child.order.terms.symbol) != (account, symbol):
            return None
        self._settled(child.order, now_ms)
        return child

    def parent(self, order_id: int) -> int | None:
        """The algo id of the order whose child this is, whoever owns it."""
        child = self._children.get(order_id)
        return None if child is None else child.order.algo_id

    def order(self, algo_id: int, now_ms: int) -> Order | None:
        """The order with this algo id, whoever owns it."""
        order = self._by_id.get(algo_id)
        return None if order is None else self._settled(order, now_ms)

    def orders(self, now_ms: int) -> Iterable[Order]:
        """Every order that was ever opened, oldest first."""
        return (self._settled(order, now_ms) for order in self._by_id.values())

    def cancel(self, target: Order | Child, now_ms: int) -> bool:
        """Have a DELETE cancel an order that is NEW or a child that is live; False, without a change, for any other."""
        if not self.end(target, "CANCELED", now_ms):
            return False
        target.deletes_effective += 1
        return True

    def end(self, target: Order | Child, status: str, now_ms: int) -> bool:
        """Have a live child, a NEW order, or one that is TRIGGERING and now REJECTED, go on to this status; else False.

        So the exchange EXPIRES a reducing order without a position, the matching engine REJECTS what it refuses, and
        somebody else cancels.

        Raises:
            ValueError: no such status, or one in which a child lives on.
        """
        if isinstance(target, Child):
            self._settled(target.order, now_ms)
            if not target.status.live:
                return False
            if ChildStatus(status).live:
                raise ValueError(f"{status} ends nothing")
            self._end_child(target, ChildStatus(status), now_ms)
            return True
        leaves = OPEN_STATES if status == AlgoStatus.REJECTED else {AlgoStatus.NEW}
        if self._settled(target, now_ms).status not in leaves:
            return False
        target.course = None
        self._enter(target, AlgoStatus(status), now_ms)
        return True

    def fill(self, child: Child, now_ms: int, quantity: str | None = None, price: str | None = None) -> bool:
        """Execute so much of the child, or all that is left, at this price or its own; False unless it is live.

        Raises:
            ValueError: more than is left, nothing, or what is no number.
        """
        self._settled(child.order, now_ms)
        if not child.status.live:
            return False
        self._fill(child, now_ms, quantity, price)
        return True

    def trigger(self, order: Order, now_ms: int, course: Course) -> bool:
        """Start the trigger: TRIGGERING now, and then as the course says; False unless NEW."""
        if not self.end(order, AlgoStatus.TRIGGERING, now_ms):
            return False
        order.trigger_time_ms, order.course = order.update_time_ms, course
        order.triggered_at_ms = now_ms + (course.triggered_after_ms or 0)
        self._settled(order, now_ms)
        return True

    def _enter(self, order: Order, status: AlgoStatus, at_ms: int) -> None:
        order.status = status
        order.update_time_ms = at_ms + self.clock_skew_ms

    def _settled(self, order: Order, now_ms: int) -> Order:
        course, at_ms = order.course, order.triggered_at_ms
        if course is None or course.triggered_after_ms is None or now_ms < at_ms:
            return order
        if order.status is AlgoStatus.TRIGGERING:
            self._leave_triggering(order, course, at_ms)
        if order.child is None:
            return order
        if now_ms >= at_ms + course.id_after_ms:
            order.actual_order_id = str(order.child.order_id)
        filled_after_ms = course.finished_after_ms
        if filled_after_ms is not None and now_ms >= at_ms + filled_after_ms and order.child.status.live:
            self._fill(order.child, at_ms + filled_after_ms)
        return order

    def _leave_triggering(self, order: Order, course: Course, at_ms: int) -> None:
        if course.rejected:
            self._enter(order, AlgoStatus.REJECTED, at_ms)
            return
        self._enter(order, AlgoStatus.TRIGGERED, at_ms)
        quantity = Decimal(order.terms.quantity or POSITION_QTY)
        child = Child(order.update_time_ms, order.update_time_ms, order, self._next_child_id, quantity)
        child.hidden_until_ms = at_ms + course.child_after_ms
        self._children[child.order_id] = self._children[child.client_order_id] = order.child = child
        self._next_child_id += 1

    def _fill(self, child: Child, at_ms: int, quantity: str | None = None, price: str | None = None) -> None:
        terms, left = child.order.terms, child.orig_qty - child.executed_qty
        executed = left if quantity is None else Decimal(quantity)
        if not 0 < executed <= left:
            raise ValueError(f"{left} of {child.orig_qty} are left to fill, not {executed}")
        child.executed_qty += executed
        child.cum_quote += executed * Decimal(price or terms.limit_price or child.order.extreme or 1)
        if executed == left:
            self._end_child(child, ChildStatus.FILLED, at_ms)
        else:
            child.status = ChildStatus.PARTIALLY_FILLED
            child.update_time_ms = at_ms + self.clock_skew_ms

    def _end_child(self, child: Child, status: ChildStatus, at_ms: int) -> None:
        child.status = status
        child.update_time_ms = at_ms + self.clock_skew_ms
        self._enter(child.order, AlgoStatus.FINISHED, at_ms)
