"""Who asks for cancels in a chaos run: producers that know nothing of each other, one that takes ids again, and one
that has all open orders of a symbol cancelled."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from producer import CancelClient, CancelRequest, OpenOutcome, OpenTicket, QueueUnavailable, WaitTimeout
from producer.message import Call
from producer.protocol import NotDurable, TicketFields
from tests.fault.ledger import Ask
from worker.sandbox.control import PlacedOrder, RunningExchange
from worker.sandbox.faults import FAULT_SETS, Fault

PRODUCERS = 4
#: The part of all orders whose client ids are taken again.
REOPENED_PART = 0.12
#: What half of their cancels meet at first: the order is off the book, and the worker is not told so.
_UNTOLD = (
    Fault.DROP_AFTER,
    Fault.RESET_AFTER,
    Fault.ANSWER_LATE,
    Fault.EXECUTE_LATE,
    Fault.UNKNOWN_503_EXECUTED,
    Fault.TIMEOUT_1007_EXECUTED,
    Fault.CANCELLED_BEFORE,
)
#: A part of them are asked for twice. What the second request means is the order that has the id then, as far as Redis
#: can know; for so long after it, s, it may be sent without a look at that order, and so the id is not taken again.
_TWICE_PART, _BLIND_S = 0.3, 0.4
#: How often a strategy looks what became of the orders whose ids it wants, s: before an answer can be back.
_LOOK_S = 0.015
#: The part of all requests that mean all open orders of a symbol, and their symbols: until the exchange's clock is set,
#: and from then on. (What it dated before cannot be compared with what it dates later.)
OPEN_PART = 0.03
SYMBOLS = (("ETHUSDT", "币安人生USDT"), ("SOLUSDT", "BNBUSDT"))
#: A part of them have one of these deadlines, s, and most of those miss it.
_HASTY_PART, _HASTY_S = 0.3, (0.05, 0.3, 1.5)
#: How often it is looked what became of them, s, and in which part of these looks another order is opened.
_LOOK_AT_OPEN_S, _OPENS_PART = 0.1, 0.2
#: Where a client id can be taken again, or cannot any more.
_FREE, _GONE = "CANCELED", ("FINISHED", "TRIGGERED", "EXPIRED", "REJECTED")


class Producer(threading.Thread):
    """Asks for cancels in batches, at a steady rate on average, and repeats every call that is not acknowledged."""

    def __init__(
        self, number: int, seed: int, url: str, requests: Sequence[CancelRequest], ids: Mapping[str, int], per_s: float
    ) -> None:
        super().__init__(name=f"producer-{number}", daemon=True)
        self._dice = random.Random(f"producer {seed} {number}")
        self._client = CancelClient.from_url(url, timeout_s=1.0)
        self._requests = requests
        self._ids = ids
        self._per_s = per_s
        self.asks: list[Ask] = []
        self.stopped = threading.Event()

    @property
    def has_asked(self) -> bool:
        """Whether all its requests are acknowledged."""
        return not self.is_alive()

    def run(self) -> None:
        """Work off the requests."""
        began, sent = time.monotonic(), 0
        with self._client:
            while sent < len(self._requests) and not self.stopped.is_set():
                batch = self._requests[sent : sent + self._dice.randint(1, 20)]
                self._ask(batch, durable=self._dice.random() < 0.1)
                sent += len(batch)
                self.stopped.wait(max(began + sent / self._per_s - time.monotonic(), 0))

    def _ask(self, batch: Sequence[CancelRequest], *, durable: bool) -> None:
        while not self.stopped.is_set():
            try:
                tickets: Sequence[TicketFields] = self._client.cancel_many(batch, durable=durable)
            except NotDurable as error:
                tickets = error.tickets
            except QueueUnavailable:
                self.asks += [Ask(self._order(request), None) for request in batch]
                self.stopped.wait(self._dice.uniform(0.05, 0.3))
                continue
            self.asks += [Ask(self._order(ticket.request), ticket.id) for ticket in tickets]
            return

    def _order(self, request: CancelRequest) -> int:
        return request.algo_id or self._ids[request.client_algo_id or ""]


class Strategy(threading.Thread):
    """One that asks for something at a steady rate on average, and looks after what it has asked for."""

    def __init__(self, seed: int, url: str, exchange: RunningExchange, per_s: float, look_s: float) -> None:
        super().__init__(name=type(self).__name__, daemon=True)
        self._dice = random.Random(f"{self.name} {seed}")
        self._client = CancelClient.from_url(url, timeout_s=1.0)
        self._exchange = exchange
        self._per_s = per_s
        self._look_s = look_s
        self._turn = threading.Lock()
        self._is_resting = False
        self.asks: list[Ask] = []
        self.stopped = threading.Event()

    @property
    def has_asked(self) -> bool:
        """Whether all its requests are acknowledged."""
        raise NotImplementedError

    def rest(self) -> list[str]:
        """Ask for nothing until told to go on; gives the ids of all requests so far."""
        with self._turn:
            self._is_resting = True
            return [ask.id for ask in self.asks if ask.id is not None]

    def go_on(self) -> None:
        """Ask again."""
        self._is_resting = False

    def run(self) -> None:
        """Ask for one thing after the other, and look after those that were asked for."""
        ask_at_s = time.monotonic()
        with self._client:
            while not self.stopped.is_set():
                if not self.has_asked and time.monotonic() >= ask_at_s:
                    with self._turn:
                        if not self._is_resting:
                            self._ask()
                            ask_at_s = time.monotonic() + self._dice.uniform(0.5, 1.5) / self._per_s
                self._look()
                self.stopped.wait(self._look_s)

    def _ask(self) -> None:
        raise NotImplementedError

    def _look(self) -> None:
        raise NotImplementedError


class Reopener(Strategy):
    """A strategy that asks by client id alone and, when the book shows that order CANCELED, opens another under the id.

    It keeps the new order. That is its right once the call has returned; a call that failed may be carried out at any
    later time, and would then mean whatever order has the id by that time: such an id is not taken again.
    """

    def __init__(
        self, seed: int, url: str, exchange: RunningExchange, orders: Sequence[PlacedOrder], per_s: float
    ) -> None:
        super().__init__(seed, url, exchange, per_s, _LOOK_S)
        self._to_ask = list(reversed(orders))
        self._in_doubt: set[int] = set()  # orders of calls that failed
        self._watched: dict[int, tuple[PlacedOrder, float]] = {}  # with the moment from which its id may be taken
        self.reopened: dict[int, int] = {}  # an order, and the one that bears its client id now

    @property
    def has_asked(self) -> bool:
        """See :class:`Strategy`."""
        return not self._to_ask

    def _ask(self) -> None:
        order = self._to_ask[-1]
        is_twice = self._dice.random() < _TWICE_PART
        try:
            tickets = [self._client.cancel(client_algo_id=order.client_algo_id) for _ in range(1 + is_twice)]
        except QueueUnavailable:
            self.asks.append(Ask(order.algo_id, None))
            self._in_doubt.add(order.algo_id)
            return
        self._to_ask.pop()
        self.asks += [Ask(order.algo_id, ticket.id) for ticket in tickets]
        if order.algo_id not in self._in_doubt:
            self._watched[order.algo_id] = order, time.monotonic() + is_twice * _BLIND_S

    def _look(self) -> None:
        if not self._watched:
            return
        for entry in self._exchange.book(self._watched).values():
            order, from_s = self._watched[entry.algo_id]
            if entry.status == _FREE and time.monotonic() >= from_s:
                del self._watched[entry.algo_id]
                (new,) = self._exchange.add_orders(client_algo_ids=[order.client_algo_id])
                self.reopened[entry.algo_id] = new.algo_id
            elif entry.status in _GONE:
                del self._watched[entry.algo_id]


class Sweeper(Strategy):
    """A strategy that goes on opening orders on a few symbols and now and then has all cancelled that are open on one.

    It waits for what becomes of them, and has tried again what failed. Some orders it cancels one by one as well.
    """

    def __init__(self, seed: int, url: str, exchange: RunningExchange, count: int, per_s: float) -> None:
        super().__init__(seed, url, exchange, per_s, _LOOK_AT_OPEN_S)
        self._to_ask = count
        self._symbols = list(SYMBOLS)
        self._faults = FAULT_SETS["all"].for_call(Call.LIST_OPEN)
        self.standing: list[tuple[OpenTicket, Ask]] = []
        self.ended: dict[str, OpenOutcome] = {}  # by the request's id

    @property
    def has_asked(self) -> bool:
        """See :class:`Strategy`."""
        return self._to_ask == 0

    def go_on(self) -> None:
        """Ask again, on other symbols."""
        del self._symbols[:-1]
        super().go_on()

    def _ask(self) -> None:
        dice, symbol = self._dice, self._dice.choice(self._symbols[0])
        orders = self._exchange.add_orders(dice.randint(0, 5), symbol=symbol)
        if faults := [dice.choice(self._faults) for _ in range(dice.randint(0, 2))]:
            self._exchange.script_faults(0, faults, call=Call.LIST_OPEN)
        self.stopped.wait(dice.choice((0.0, 0.03, 0.1)))
        for order in orders[:2]:
            self._cancel(order)
        deadline_s = dice.choice(_HASTY_S) if dice.random() < _HASTY_PART else None
        on_trigger = "cancel_child" if dice.random() < 0.3 else "report"
        how = {"urgent": dice.random() < 0.2, "deadline_s": deadline_s, "on_trigger": on_trigger}
        try:
            ticket = self._client.cancel_open(symbol, **how)  # type: ignore[arg-type]
        except QueueUnavailable:
            self.asks.append(Ask(symbol, None, is_hasty=deadline_s is not None))
            return
        ask = Ask(symbol, ticket.id, round(time.time() * 1000), deadline_s is not None)
        self._to_ask -= 1
        self.asks.append(ask)
        self.standing.append((ticket, ask))
        self._exchange.add_orders(dice.randint(1, 3), symbol=symbol)

    def _cancel(self, order: PlacedOrder) -> None:
        """Ask for one order that is to be open, and its request on its way, while all are listed."""
        self._exchange.script_faults(order.algo_id, [Fault.UNAVAILABLE_503] * self._dice.randint(1, 4))
        try:
            ticket_id = self._client.cancel(algo_id=order.algo_id).id
        except QueueUnavailable:
            ticket_id = None
        self.asks.append(Ask(order.algo_id, ticket_id))

    def _look(self) -> None:
        if self.standing and self._dice.random() < _OPENS_PART:
            self._exchange.add_orders(symbol=str(self._dice.choice(self.standing)[1].order))
        for ticket, ask in list(self.standing):
            self._pursue(ticket, ask)

    def _pursue(self, ticket: OpenTicket, ask: Ask) -> None:
        looks = len(ticket.looks)
        try:
            outcome = self._client.wait(ticket, 0)
            rows = [order.id for order in outcome.orders]
            if not self._client.retry([ticket.id, *(look.id for look in ticket.looks), *rows], missing_ok=True):
                self.ended[ticket.id] = outcome
                self.standing.remove((ticket, ask))
        except WaitTimeout:
            pass
        except QueueUnavailable:  # maybe of the second look
            self.asks.append(replace(ask, id=None, by_ms=None))
        self.asks += [replace(ask, id=look.id) for look in ticket.looks[looks:]]


def spoil_answers(orders: Sequence[PlacedOrder], exchange: RunningExchange, seed: int) -> None:
    """See to it that some of these orders are taken off the book without the worker hearing of it."""
    dice = random.Random(f"answers {seed}")
    for order in orders:
        if dice.random() < 0.5:
            exchange.script_faults(order.algo_id, [dice.choice(_UNTOLD)])


def requests_for(orders: Sequence[PlacedOrder], seed: int) -> list[list[CancelRequest]]:
    """Each producer's requests: most by algo id, some by client id, some for an order that another asks about too."""
    dice = random.Random(f"requests {seed}")
    shares: list[list[CancelRequest]] = [[] for _ in range(PRODUCERS)]
    for number, order in enumerate(orders):
        on_trigger = "cancel_child" if dice.random() < 0.3 else "report"
        request = CancelRequest(algo_id=order.algo_id, urgent=dice.random() < 0.1, on_trigger=on_trigger)
        if dice.random() < 0.1:
            request = CancelRequest(client_algo_id=order.client_algo_id, on_trigger=on_trigger)
        shares[number % PRODUCERS].append(request)
        if dice.random() < 0.05:
            shares[(number + 1) % PRODUCERS].append(request)
    return shares
