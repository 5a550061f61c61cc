"""The local exchange: a loopback HTTP server that treats conditional orders as Binance USD-M Futures does.

`python -m worker.sandbox.server` reads one JSON object (`ExchangeConfig`) from a line of stdin, prints `{"url": ...}`
on a line of stdout, and serves until SIGTERM, SIGINT or the end of stdin, so that it dies with its parent. Rules and
texts: exchange.md 1.2 to 1.4, 2, 3 and 4; where those leave a choice, a comment says which one was made.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import signal
import ssl
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from functools import partial
from http import HTTPStatus
from os import read
from typing import Any

from producer.message import Call
from worker.sandbox import control
from worker.sandbox.book import AlgoStatus, Child, Course, Order, OrderBook, OrderTerms
from worker.sandbox.control import MAX_ARRIVALS, Arrival, ConfigError, ExchangeConfig
from worker.sandbox.edge import Edge
from worker.sandbox.endpoints import ENDPOINTS, OPEN_ALGO_ORDERS, Asked, Security
from worker.sandbox.fault_plan import EVERY_LIST, FaultPlan
from worker.sandbox.faults import (
    BAD_SIGNATURE,
    FAULT_SETS,
    NO_SUCH_ORDER,
    UNKNOWN_ORDER,
    Answer,
    Delivery,
    Effect,
    Fault,
    FaultSet,
)
from worker.sandbox.market import SYMBOLS
from worker.sandbox.signed import (
    Account,
    Refusal,
    authenticated,
    keyed,
    read_child,
    read_order_ids,
    read_parameters,
)
from worker.sandbox.wire import HOST, Reply, Request, listen

EXIT_OK = 0
EXIT_BAD_CONFIG = 78

ALGO_ORDER = "/fapi/v1/algoOrder"
CHILD_ORDER = "/fapi/v1/order"
#: The calls that faults are for.
ORDER_CALLS = {
    ("DELETE", ALGO_ORDER): Call.CANCEL,
    ("GET", ALGO_ORDER): Call.QUERY,
    ("DELETE", CHILD_ORDER): Call.CANCEL_CHILD,
    ("GET", CHILD_ORDER): Call.QUERY_CHILD,
}

MAX_LABELS = 200
_SILENT = frozenset({Delivery.CLOSED, Delivery.RESET, Delivery.NOT_HTTP})


class ExchangeServer:
    """The exchange: start it inside a running event loop, with which it ends."""

    def __init__(self, config: ExchangeConfig) -> None:
        """Raises ConfigError for keys and certificates that cannot be used."""
        self.config = config
        self.in_flight = 0
        self._accounts = {api_key: Account.of(name, secret) for name, (api_key, secret) in config.accounts.items()}
        self._tls = _tls_context(config)
        self.book = OrderBook()
        self.reset()

    def reset(self) -> None:
        """Empty the book and all counters and take the configuration's settings again. Algo ids are not given twice."""
        config = self.config
        self.latency_ms = config.latency_ms
        self.book = OrderBook(self.book, clock_skew_ms=config.clock_skew_ms)
        self.edge = Edge(config.weight_limit_per_minute, config.timing)
        # Mark price and last price are one here, so `workingType` makes no difference.
        self.prices = {name: Decimal(symbol.price) for name, symbol in SYMBOLS.items()}
        self.dual: dict[str, bool] = {}  # by account: hedge mode
        self.list_lag_ms = 0  # open orders stand in their list only so long after they were opened
        self.listen_keys: dict[str, str] = {}  # by account
        self.requests: dict[str, Counter[str]] = {}
        self.bad_signatures = self.peak_in_flight = 0
        self.arrivals: deque[Arrival] = deque(maxlen=MAX_ARRIVALS)
        fault_set = FAULT_SETS[config.faults]
        if config.incidents is not None:
            fault_set = FaultSet(fault_set.faults, tuple(Fault(name) for name in config.incidents))
        until_ms = None if config.faults_for_ms is None else self.local_ms() + config.faults_for_ms
        self.plan = FaultPlan(fault_set, config.seed, config.fault_rate, config.max_incidents, until_ms)

    async def start(self) -> str:
        """Listen on loopback; gives the URL.

        Raises:
            OSError: the port is taken.
        """
        server = await listen(self, self.config.port, self._tls)
        port = server.sockets[0].getsockname()[1]
        return f"{'http' if self._tls is None else 'https'}://{HOST}:{port}"

    def local_ms(self) -> int:
        """Local time in milliseconds since the epoch; exchange time is `book.clock_skew_ms` later."""
        return time.time_ns() // 1_000_000

    def handle(self, request: Request) -> Reply:
        """The reply to one request; `request_ended` must follow when it has been delivered or the client is gone."""
        if request.path.startswith(control.PREFIX):
            return Reply(control.answer(self, request.method, request.path, request.body))
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        self._note(request)
        reply = self._reply(request)
        known = request.label in self.requests or len(self.requests) < MAX_LABELS
        answers = self.requests.setdefault(request.label if known else "other", Counter())
        answers["none" if reply.delivery in _SILENT else str(reply.answer.status)] += 1
        reply.used_weight = self.edge.used_weight(request.peer, self._server_ms())
        reply.delay_ms += self.latency_ms
        return reply

    def _note(self, request: Request) -> None:
        if (request.method, request.path) not in ORDER_CALLS:
            return
        with suppress(Refusal, ValueError):
            said = read_parameters(request)
            order_id = int(said["orderId"]) if "orderId" in said else None
            algo_id = int(said["algoId"]) if "algoId" in said else None
            if order_id is not None:
                algo_id = self.book.parent(order_id)
            signed_ms = int(said.get("timestamp", 0)) - self.book.clock_skew_ms
            client_id = said.get("clientAlgoId")
            self.arrivals.append(
                Arrival(request.arrival_ns, request.method, request.port, algo_id, client_id, signed_ms, order_id)
            )

    def request_ended(self, request: Request) -> None:
        """A request that `handle` was given is over."""
        self.in_flight -= not request.path.startswith(control.PREFIX)

    def open_order(self, account: str, terms: OrderTerms, now_ms: int) -> Order:
        """Open an order and tell the fault plan of it.

        Raises:
            DuplicateClientId: an open order of the account has this client id.
        """
        order = self.book.add(account, terms, now_ms)
        self.plan.admit(order.algo_id)
        return order

    def set_price(self, symbol: str, price: str) -> None:
        """Set a symbol's price and trigger the orders whose condition it meets.

        Raises:
            ValueError: no such symbol, or no price.
        """
        value = Decimal(price) if price.replace(".", "", 1).isdecimal() else Decimal(0)
        if symbol not in self.prices or value <= 0:
            raise ValueError(f"symbol {symbol!r} or mark_price {price!r}: a symbol of exchangeInfo and a price above 0")
        self.prices[symbol] = value
        now_ms = self.local_ms()
        for order in self.book.orders(now_ms):
            if order.terms.symbol == symbol and order.status is AlgoStatus.NEW and order.sees(value):
                self.book.trigger(order, now_ms, self._course(finished_after_ms=order.terms.fills_after_ms))

    def _course(self, **more: Any) -> Course:
        """A trigger as the configuration has it, but for ``more``."""
        timing = self.config.timing
        usual = Course(timing.triggering_ms, timing.child_id_lag_ms, timing.child_lag_ms, timing.finished_after_ms)
        return replace(usual, **more)

    def account(self, name: str | None) -> str:
        """The account of this name, or the first one.

        Raises:
            ValueError: there is none of this name.
        """
        name = name or next(iter(self.config.accounts))
        if name not in self.config.accounts:
            raise ValueError(f"no account {name!r}")
        return name

    def statistics(self) -> control.ExchangeStats:
        """What came since the start or reset."""
        return control.ExchangeStats(
            requests={label: dict(answers) for label, answers in self.requests.items()},
            bad_signatures=self.bad_signatures,
            in_flight=self.in_flight,
            peak_in_flight=self.peak_in_flight,
            used_weight=self.edge.most_used_weight(self._server_ms()),
            peak_used_weight=self.edge.peak_used_weight,
            orders_by_status=dict(Counter(order.status for order in self.book.orders(self.local_ms()))),
            faults_injected=dict(self.plan.injected),
            incidents=self.edge.incidents,
        )

    def _server_ms(self) -> int:
        return self.local_ms() + self.book.clock_skew_ms

    def _reply(self, request: Request) -> Reply:
        now_ms = self.local_ms()
        skew_ms = self.book.clock_skew_ms
        route = (request.method, request.path)
        endpoint, weight = ENDPOINTS.get(route), 1
        if endpoint is not None:
            is_of_all = b"symbol=" not in request.query + request.body and endpoint.weight_of_all is not None
            weight = endpoint.weight_of_all or 1 if is_of_all else endpoint.weight
        incident = self.edge.admit(request.peer, now_ms, now_ms + skew_ms, weight)
        if incident is not None:
            return Reply(self.edge.answer(incident, now_ms, skew_ms))
        try:
            if (call := ORDER_CALLS.get(route)) is not None:
                return self._about_order(call, request, now_ms)
            if endpoint is not None:
                answer = Answer.of(endpoint.answer(self._asked(endpoint.security, request, now_ms)))
                lists = route == ("GET", OPEN_ALGO_ORDERS)
                fault = self.plan.meet(EVERY_LIST, Call.LIST_OPEN, now_ms) if lists else None
                return self._met(request.peer, fault, lambda _: answer)
        except Refusal as refusal:
            return Reply(refusal.answer)
        return Reply(Answer.error(-5000, f"Path {request.path}, Method {request.method} is invalid", 404))

    def _asked(self, security: Security, request: Request, now_ms: int) -> Asked:
        if security is Security.SIGNED:
            account, said = self._authenticated(request, now_ms)
            return Asked(self, account.name, said, now_ms)
        name = keyed(request, self._accounts).name if security is Security.KEYED else ""
        return Asked(self, name, read_parameters(request), now_ms)

    def _authenticated(self, request: Request, now_ms: int) -> tuple[Account, dict[str, str]]:
        try:
            return authenticated(request, self._accounts, now_ms + self.book.clock_skew_ms)
        except Refusal as refusal:
            self.bad_signatures += refusal.answer is BAD_SIGNATURE
            raise

    def _about_order(self, call: Call, request: Request, now_ms: int) -> Reply:
        account, parameters = self._authenticated(request, now_ms)
        target = self._meant(call, account.name, parameters, now_ms)
        if target is not None and call.cancels:
            target.deletes, target.unseen = target.deletes + 1, False
        elif target is not None:
            target.gets += 1
        if target is None or target.is_hidden(now_ms):
            return Reply(UNKNOWN_ORDER if call.cancels else NO_SUCH_ORDER)
        algo_id = target.algo_id if isinstance(target, Order) else target.order.algo_id
        fault = self.plan.meet(algo_id, call, now_ms, by_client_id="algoId" not in parameters)
        return self._met(request.peer, fault, partial(self._own_answer, call, target))

    def _meant(self, call: Call, account: str, parameters: dict[str, str], now_ms: int) -> Order | Child | None:
        if call.of_child:
            symbol, name = read_child(parameters)
            return self.book.find_child(account, symbol, name, now_ms)
        algo_id, client_algo_id = read_order_ids(parameters)
        return self.book.find(account, now_ms, algo_id=algo_id, client_algo_id=client_algo_id)

    def _met(self, peer: str, fault: Fault | None, own: Callable[[Effect], Answer]) -> Reply:
        """The reply to a call that meets this fault, if any; ``own`` is the exchange's true answer after an effect."""
        timing, now_ms = self.config.timing, self.local_ms()
        if fault is None:
            return Reply(own(Effect.CANCEL))
        if fault.spec.gates:
            incident = self.edge.start(peer, fault, now_ms)
            return Reply(self.edge.answer(incident, now_ms, self.book.clock_skew_ms))
        delivery = fault.spec.delivery
        if delivery is Delivery.HELD:
            held = Reply(UNKNOWN_ORDER, delay_ms=timing.late_execution_ms)
            held.resume = lambda: Reply(own(Effect.CANCEL), used_weight=held.used_weight)
            return held
        true = own(fault.spec.effect)  # called in any case: this is what carries the effect out
        answer = fault.spec.answer or _twisted(true, delivery, timing.huge_body_bytes)
        if delivery is Delivery.COMPRESSED:
            answer = replace(answer, body=gzip.compress(answer.body), headers=(("Content-Encoding", "gzip"),))
        return Reply(answer, delivery, timing.late_answer_ms if delivery is Delivery.LATE else 0.0)

    def _own_answer(self, call: Call, target: Order | Child, effect: Effect) -> Answer:
        """The exchange's true answer after the effect; with no effect on a cancel, the success that it was not."""
        now_ms = self.local_ms()
        if not call.cancels:
            return Answer.of(target.as_query_answer())
        # What DELETE answers for a child that has ended is UNCONFIRMED; for a conditional order it has been seen.
        return Answer.of(target.as_cancel_answer()) if self._cancel_with(target, effect, now_ms) else UNKNOWN_ORDER

    def _cancel_with(self, target: Order | Child, effect: Effect, now_ms: int) -> bool:
        book, timing = self.book, self.config.timing
        match effect:
            case Effect.NONE:
                return True
            case Effect.CANCEL:
                return book.cancel(target, now_ms)
            case Effect.CANCEL_LATER:
                delay_s = timing.late_execution_ms / 1_000
                asyncio.get_running_loop().call_later(delay_s, lambda: book.cancel(target, self.local_ms()))
            case Effect.SOMEBODY_CANCELS | Effect.EXPIRE | Effect.REJECT | Effect.EXPIRE_IN_MATCH:
                book.end(target, effect.value, now_ms)
            case Effect.HIDE:
                target.unseen = True
            case Effect.FORGET:
                target.hidden_until_ms = now_ms + timing.forgotten_ms
            case _ if isinstance(target, Child):
                return self._execute(target, effect, now_ms)
            case Effect.CANCEL_AND_REUSE_CLIENT_ID:
                if book.cancel(target, now_ms):
                    terms = OrderTerms(target.terms.symbol, client_algo_id=target.client_algo_id)
                    # A millisecond later: a client that pins ids by time can tell the two apart.
                    book.add(target.account, terms, now_ms + 1, decoy=True)
            case Effect.TRIGGER:
                book.trigger(target, now_ms, self._course())
            case Effect.TRIGGER_AT_ONCE:
                book.trigger(target, now_ms, self._course(triggered_after_ms=0))
            case Effect.TRIGGER_STUCK:
                book.trigger(target, now_ms, self._course(triggered_after_ms=None))
            case Effect.TRIGGER_REJECTED:
                book.trigger(target, now_ms, self._course(rejected=True))
        return False

    def _execute(self, child: Child, effect: Effect, now_ms: int) -> bool:
        """Fill the child, or a half of what is left and then cancel it."""
        if effect is Effect.FILL:
            self.book.fill(child, now_ms)
            return False
        half = (child.orig_qty - child.executed_qty) / 2
        return self.book.fill(child, now_ms, str(half)) and self.book.cancel(child, now_ms)


def _twisted(answer: Answer, delivery: Delivery, huge_body_bytes: int) -> Answer:
    """The exchange's own answer, with the one thing wrong that the delivery stands for."""
    if answer.status != HTTPStatus.OK:
        return answer
    shown = json.loads(answer.body)
    match delivery:
        case Delivery.HUGE:
            shown["padding"] = "x" * huge_body_bytes
        case Delivery.WRONG_ID:
            name = "algoId" if "algoId" in shown else "orderId"
            shown |= {name: shown[name] + 1, "clientAlgoId": "somebody-elses"}
        case Delivery.UNDECIDED:
            for name in ("code", "algoStatus", "status"):
                shown.pop(name, None)
        case Delivery.UNKNOWN_STATUS:
            shown["algoStatus" if "algoStatus" in shown else "status"] = "PAUSED"
        case _:
            return answer
    return Answer.of(shown)


def _tls_context(config: ExchangeConfig) -> ssl.SSLContext | None:
    if not config.tls_cert_path:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.tls_cert_path, config.tls_key_path)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tls_cert_path or tls_key_path: cannot be used ({type(error).__name__})") from error
    return context


# --- the process ------------------------------------------------------------------------------------------------------


def _watch_stdin(ended: Callable[[], object]) -> None:
    # A bare read on the descriptor: a thread that waits inside sys.stdin holds a lock that exiting needs.
    while read(0, 65_536):
        pass
    ended()


async def _serve(exchange: ExchangeServer) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    url = await exchange.start()
    sys.stdout.write(json.dumps({"url": url}) + "\n")
    sys.stdout.flush()
    stop = partial(loop.call_soon_threadsafe, stopped.set)
    threading.Thread(target=_watch_stdin, args=(stop,), name="stdin", daemon=True).start()
    await stopped.wait()


def main() -> int:
    """Serve as the module's text says; the exit code is 0, or 78 when the configuration cannot be used."""
    try:
        exchange = ExchangeServer(ExchangeConfig.from_json(sys.stdin.buffer.readline()))
    except ConfigError as error:
        sys.stderr.write(f"local exchange: {error}\n")
        return EXIT_BAD_CONFIG
    try:
        asyncio.run(_serve(exchange))
    except OSError as error:
        sys.stderr.write(f"local exchange: port {exchange.config.port}: {error.strerror}\n")
        return EXIT_BAD_CONFIG
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
