"""Both ends of the local exchange's control calls, its configuration, and its life as a child process.

`/_sandbox/...` calls are JSON over the exchange's own port, unsigned and outside its weight. They open orders, read the
book and the statistics, and move what a test or the sandbox wants moved.
"""

from __future__ import annotations

import http.client
import json
import selectors
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from inspect import signature
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import urlsplit

from producer.message import Call
from worker.sandbox.book import Child, Course, Order, OrderBook, OrderTerms
from worker.sandbox.edge import Incident
from worker.sandbox.fault_plan import EVERY_LIST
from worker.sandbox.faults import FAULT_SETS, Answer, Fault, FaultTiming
from worker.sandbox.wire import HOST

if TYPE_CHECKING:
    from worker.sandbox.server import ExchangeServer

PREFIX = "/_sandbox/"
START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 15.0


class ConfigError(ValueError):
    """A field of the exchange's configuration is missing or wrong; the text names it and never its secret value."""


class ControlError(RuntimeError):
    """The exchange did not start, is gone, or refused a control call."""


@dataclass(frozen=True, slots=True)
class ExchangeConfig:
    """How a local exchange is set up; `reset` goes back to this."""

    #: Name to API key and what checks its signatures: an HMAC secret, or a public key (RSA, Ed25519) as PEM text.
    accounts: Mapping[str, tuple[str, str]] = field(repr=False)
    faults: str = "none"  # a name in FAULT_SETS
    seed: int = 0
    fault_rate: float = 0.3  # probability for a call of an order, until its share is used up
    max_incidents: int = 4
    incidents: Sequence[str] | None = None  # names of faults instead of the set's own incidents
    faults_for_ms: int | None = None  # none are injected later than this after start or reset
    timing: FaultTiming = field(default_factory=FaultTiming)
    weight_limit_per_minute: int = 2_400
    latency_ms: float = 0.0  # between the arrival of a request, when it is executed, and its answer
    clock_skew_ms: int = 0  # exchange time minus local time
    port: int = 0  # 0: any free one
    tls_cert_path: str = ""
    tls_key_path: str = ""

    def __post_init__(self) -> None:
        """Raises ConfigError for what no exchange can be built from."""
        if not self.accounts:
            raise ConfigError("accounts: at least one is needed")
        if len({api_key for api_key, _ in self.accounts.values()}) < len(self.accounts):
            raise ConfigError("accounts: two have the same API key")
        if self.faults not in FAULT_SETS:
            raise ConfigError(f"faults: must be one of {', '.join(FAULT_SETS)}, not {self.faults!r}")
        if not 0 <= self.fault_rate <= 1:
            raise ConfigError(f"fault_rate: must be between 0 and 1, not {self.fault_rate}")
        for name in ("max_incidents", "weight_limit_per_minute", "latency_ms", "port"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: must not be negative, not {getattr(self, name)}")
        if bool(self.tls_cert_path) != bool(self.tls_key_path):
            raise ConfigError("tls_cert_path and tls_key_path: both or neither")
        for name in self.incidents or ():
            if name not in [fault for fault in Fault if fault.spec.pauses]:
                raise ConfigError(f"incidents: {name!r} is no fault that stops an address")

    def to_json(self) -> str:
        """One line of JSON; it holds the accounts' secrets."""
        return json.dumps(asdict(replace(self, accounts=dict(self.accounts))))

    @classmethod
    def from_json(cls, text: str | bytes) -> ExchangeConfig:
        """Read what `to_json` writes; fields may be left out.

        Raises:
            ConfigError: it cannot be used; the text quotes no value.
        """
        try:
            raw = json.loads(text)
            return cls(**raw | {"timing": FaultTiming(**raw.get("timing", {}))})
        except ConfigError:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"the configuration cannot be used: {error}") from None


# --- the server's end -------------------------------------------------------------------------------------------------


def answer(exchange: ExchangeServer, method: str, path: str, body: bytes) -> Answer:
    """Serve one control call; a bad one gets status 400 and `{"error": text}`."""
    name = path.removeprefix(PREFIX)
    handler = HANDLERS.get((method, name))
    if handler is None:
        return Answer.of({"error": f"no control call {method} {path}"}, 404)
    try:
        asked = json.loads(body or b"{}")
        takes = [each.name for each in signature(handler).parameters.values() if each.kind is each.KEYWORD_ONLY]
        if handler is not _move:  # it depends on the move what that takes
            _check_names(name, asked, takes)
        return Answer.of(handler(exchange, **asked))
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        return Answer.of({"error": f"{type(error).__name__}: {error}"}, 400)


def _check_names(what: str, asked: Mapping[str, Any], takes: Iterable[str]) -> None:
    if unknown := sorted(asked.keys() - set(takes)):
        takes_what = ", ".join(sorted(takes)) or "nothing"
        raise ValueError(f"{what} takes no {', '.join(map(repr, unknown))}; it takes {takes_what}")


def _add_orders(
    exchange: ExchangeServer, *, orders: Sequence[Mapping[str, Any]], account: str | None = None, age_ms: int = 0
) -> object:
    opened_ms = exchange.local_ms() - age_ms
    name = exchange.account(account)
    terms = [OrderTerms(**item) for item in orders]
    opened = [exchange.open_order(name, item, opened_ms) for item in terms]
    return [[order.algo_id, order.client_algo_id] for order in opened]


def _book(exchange: ExchangeServer, *, algo_ids: Sequence[int] | None = None) -> object:
    now_ms = exchange.local_ms()
    if algo_ids is None:
        return [_entry(exchange, order) for order in exchange.book.orders(now_ms)]
    found = [exchange.book.order(algo_id, now_ms) for algo_id in algo_ids]
    return [_entry(exchange, order) for order in found if order is not None]


def _entry(exchange: ExchangeServer, order: Order) -> dict[str, object]:
    child, told = order.child, None
    if child is not None:
        told = _fields(
            ChildEntry,
            child,
            order_id=str(child.order_id),
            executed_qty=child.as_cancel_answer()["executedQty"],
            avg_price=child.as_query_answer()["avgPrice"],
        )
    return _fields(
        BookEntry,
        order,
        symbol=order.terms.symbol,
        order_type=order.terms.order_type,
        faults=exchange.plan.met(order.algo_id),
        child=told,
    )


def _fields(entry: type[BookEntry | ChildEntry], of: Order | Child, **told: object) -> dict[str, object]:
    return {each.name: getattr(of, each.name) for each in fields(entry) if each.name not in told} | told


def _script(
    exchange: ExchangeServer,
    *,
    faults: Sequence[str | None],
    algo_id: int = EVERY_LIST,
    call: str = Call.CANCEL,
    repeat_last: bool = False,
) -> object:
    met_by = Call.LIST_OPEN if call == "list" else Call(call)
    key = EVERY_LIST if met_by is Call.LIST_OPEN else _known_order(exchange, algo_id).algo_id
    exchange.plan.script(
        key, met_by, [None if name is None else Fault(name) for name in faults], repeat_last=repeat_last
    )
    return {}


def _move(exchange: ExchangeServer, *, algo_id: int, move: str, **details: Any) -> object:
    if move not in MOVES:
        raise ValueError(f"no move {move!r}; there are {', '.join(MOVES)}")
    takes, do = MOVES[move]
    _check_names(move, details, takes)
    order = _known_order(exchange, algo_id)
    if not do(exchange.book, order, exchange.local_ms(), details):
        raise ValueError(f"order {order.algo_id} is {order.status}: too late to {move}")
    return {}


def _child_of(order: Order) -> Child:
    if order.child is None:
        raise ValueError(f"order {order.algo_id} is {order.status}: it has no child")
    return order.child


def _trigger(book: OrderBook, order: Order, now_ms: int, times: dict[str, Any]) -> bool:
    return book.trigger(order, now_ms, Course(**{"finished_after_ms": order.terms.fills_after_ms} | times))


def _fill(book: OrderBook, order: Order, now_ms: int, asked: dict[str, Any]) -> bool:
    return book.fill(_child_of(order), now_ms, asked.get("quantity"), asked.get("price"))


def _end_child(book: OrderBook, order: Order, now_ms: int, asked: dict[str, Any]) -> bool:
    return book.end(_child_of(order), asked.get("status", "CANCELED"), now_ms)


#: Each move: what it takes, and what it does; False where it is too late for that.
MOVES: dict[str, tuple[tuple[str, ...], Callable[[OrderBook, Order, int, dict[str, Any]], bool]]] = {
    "trigger": (("triggered_after_ms", "id_after_ms", "child_after_ms", "finished_after_ms"), _trigger),
    "fill": (("quantity", "price"), _fill),
    "end_child": (("status",), _end_child),
    "cancel": ((), lambda book, order, now_ms, _: book.end(order, "CANCELED", now_ms)),
    "expire": ((), lambda book, order, now_ms, _: book.end(order, "EXPIRED", now_ms)),
    "reject": ((), lambda book, order, now_ms, _: book.end(order, "REJECTED", now_ms)),
}


def _known_order(exchange: ExchangeServer, algo_id: int) -> Order:
    order = exchange.book.order(algo_id, exchange.local_ms())
    if order is None:
        raise ValueError(f"no order {algo_id}")
    return order


def _set(
    exchange: ExchangeServer,
    *,
    mark_price: str | None = None,
    symbol: str = "",
    hedge_mode: bool | None = None,
    account: str | None = None,
    clock_skew_ms: int | None = None,
    list_lag_ms: int | None = None,
    latency_ms: float | None = None,
    end_faults: bool = False,
) -> object:
    if mark_price is not None:
        exchange.set_price(symbol, mark_price)
    if hedge_mode is not None:
        exchange.dual[exchange.account(account)] = bool(hedge_mode)
    if clock_skew_ms is not None:
        exchange.book.clock_skew_ms = int(clock_skew_ms)
    if list_lag_ms is not None:
        exchange.list_lag_ms = int(list_lag_ms)
    if latency_ms is not None:
        exchange.latency_ms = float(latency_ms)
    if end_faults:
        exchange.plan.until_ms = 0
    return {}


def _incident(exchange: ExchangeServer, *, fault: str, duration_ms: int | None = None, peer: str = HOST) -> object:
    named = Fault(fault)
    if not named.spec.gates:
        raise ValueError(f"{named} does not stop an IP")
    exchange.edge.start(peer, named, exchange.local_ms(), duration_ms)
    return {}


def _reset(exchange: ExchangeServer) -> object:
    exchange.reset()
    return {}


#: Each control call; what it takes are its keywords.
HANDLERS: dict[tuple[str, str], Callable[..., object]] = {
    ("POST", "orders"): _add_orders,
    ("GET", "book"): _book,
    ("GET", "arrivals"): lambda exchange: [asdict(arrival) for arrival in exchange.arrivals],
    ("GET", "stats"): lambda exchange: asdict(exchange.statistics()),
    ("POST", "script"): _script,
    ("POST", "move"): _move,
    ("POST", "set"): _set,
    ("POST", "incident"): _incident,
    ("POST", "reset"): _reset,
}


# --- the caller's end -------------------------------------------------------------------------------------------------


class PlacedOrder(NamedTuple):
    """An order as the exchange named it."""

    algo_id: int
    client_algo_id: str


@dataclass(frozen=True, slots=True)
class ChildEntry:
    """The normal order that a triggered one has become; decimal numbers are strings, as on the wire."""

    order_id: str
    status: str
    executed_qty: str
    avg_price: str
    create_time_ms: int  # exchange time, like the next
    update_time_ms: int
    deletes: int
    deletes_effective: int
    gets: int


@dataclass(frozen=True, slots=True)
class BookEntry:
    """An order in the exchange's book. A decoy was made by a fault: a correct client leaves it NEW."""

    account: str
    algo_id: int
    client_algo_id: str
    symbol: str
    status: str
    actual_order_id: str
    create_time_ms: int  # exchange time, like the next
    update_time_ms: int
    decoy: bool
    deletes: int  # with a good signature and outside incidents
    deletes_effective: int
    gets: int
    faults: list[str]  # as its calls and its child's met them
    order_type: str = "STOP_MARKET"
    child: ChildEntry | None = None  # as it is, whether calls find it by now or not


#: So many requests about orders are kept; the oldest go.
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


@dataclass(frozen=True, slots=True)
class ExchangeStats:
    """What the exchange saw since its start or reset; control calls are left out."""

    requests: dict[str, dict[str, int]]  # "METHOD path" to HTTP status, or "none" where no answer was sent, to count
    bad_signatures: int
    in_flight: int
    peak_in_flight: int
    used_weight: int  # most of any IP, this minute
    peak_used_weight: int
    orders_by_status: dict[str, int]
    faults_injected: dict[str, int]
    incidents: list[Incident]

    @property
    def requests_during_incidents(self) -> int:
        """Requests that came although their IP had been told to stop."""
        return sum(len(incident.requests_ms) for incident in self.incidents)


class RunningExchange:
    """A local exchange in a child process: a context manager, and the control calls as methods.

    Every method raises ControlError when the exchange refuses the call or cannot be reached.
    """

    def __init__(self, config: ExchangeConfig) -> None:
        self.config = replace(
            config, tls_cert_path=_absolute(config.tls_cert_path), tls_key_path=_absolute(config.tls_key_path)
        )
        command = [sys.executable, "-m", "worker.sandbox.server"]
        # A session of its own: Ctrl-C belongs to the parent, which may still have requests in flight.
        self.process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
            start_new_session=True,
        )
        try:
            self.url = self._handshake()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the exchange; harmless when it has ended."""
        stdin, stdout = _pipes(self.process)
        with suppress(BrokenPipeError):  # a configuration that a dying child did not read
            stdin.close()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        stdout.close()

    def add_orders(
        self,
        count: int = 1,
        *,
        account: str | None = None,
        client_algo_ids: Iterable[str] | None = None,
        age_ms: int = 0,
        **terms: str,
    ) -> list[PlacedOrder]:
        """Open `count` orders, or one for each client id, for the first account or the one named.

        They rest since `age_ms`. `terms` are other fields of `OrderTerms`, such as symbol or order_type.
        """
        ids = [""] * count if client_algo_ids is None else list(client_algo_ids)
        orders = [terms | {"client_algo_id": client_algo_id} for client_algo_id in ids]
        return [
            PlacedOrder(*pair) for pair in self._call("POST", "orders", account=account, orders=orders, age_ms=age_ms)
        ]

    def book(self, algo_ids: Iterable[int] | None = None) -> dict[int, BookEntry]:
        """Every order that was ever opened, by algo id, oldest first; or those named, as far as there are such."""
        asked = {} if algo_ids is None else {"algo_ids": list(algo_ids)}
        entries = self._call("GET", "book", **asked)
        for entry in entries:
            entry["child"] = entry["child"] and ChildEntry(**entry["child"])
        return {entry["algo_id"]: BookEntry(**entry) for entry in entries}

    def arrivals(self) -> list[Arrival]:
        """Requests about orders in the order in which they came; the newest, if there were very many."""
        return [Arrival(**arrival) for arrival in self._call("GET", "arrivals")]

    def stats(self) -> ExchangeStats:
        """What the exchange saw so far."""
        raw = self._call("GET", "stats")
        raw["incidents"] = [Incident(**incident) for incident in raw["incidents"]]
        return ExchangeStats(**raw)

    def script_faults(
        self,
        algo_id: int,
        faults: Sequence[Fault | str | None],
        *,
        call: Call | str = Call.CANCEL,
        repeat_last: bool = False,
    ) -> None:
        """Have the order's next calls of this kind meet these faults in turn (None: no fault).

        With `repeat_last` the last one is met for ever. With `Call.LIST_OPEN` it is the next lists of open orders,
        whoever asks for them; the id does not matter.
        """
        self._call("POST", "script", algo_id=algo_id, faults=list(faults), call=call, repeat_last=repeat_last)

    def trigger(self, algo_id: int, **times: int | None) -> None:
        """Start the order's trigger; ``times`` as in `Course`. Left out, its child is there at once, and rests."""
        self._move(algo_id, "trigger", **({"finished_after_ms": None} | times))

    def fill(self, algo_id: int, quantity: str | None = None, price: str | None = None) -> None:
        """Execute so much of the order's child, or all that is left, at this price or at the order's."""
        self._move(algo_id, "fill", quantity=quantity, price=price)

    def end_child(self, algo_id: int, status: str = "CANCELED") -> None:
        """End the order's child as somebody else or the exchange would: CANCELED, EXPIRED, EXPIRED_IN_MATCH..."""
        self._move(algo_id, "end_child", status=status)

    def cancel(self, algo_id: int) -> None:
        """Cancel the order as if its owner had pressed a button."""
        self._move(algo_id, "cancel")

    def expire(self, algo_id: int) -> None:
        """Have the exchange drop the order."""
        self._move(algo_id, "expire")

    def reject(self, algo_id: int) -> None:
        """Have the matching engine refuse the order."""
        self._move(algo_id, "reject")

    def start_incident(self, fault: Fault | str, *, duration_ms: int | None = None, peer: str = HOST) -> None:
        """Stop every request of an IP with this fault's answer; without a duration, for the configured one."""
        self._call("POST", "incident", fault=fault, duration_ms=duration_ms, peer=peer)

    def end_faults(self) -> None:
        """Inject no more faults, scripted ones included; what has begun runs its course."""
        self._call("POST", "set", end_faults=True)

    def set_mark_price(self, symbol: str, price: str) -> None:
        """Set a symbol's price; orders whose condition it meets are triggered as the market does it."""
        self._call("POST", "set", symbol=symbol, mark_price=price)

    def set_hedge_mode(self, on: bool = True, *, account: str | None = None) -> None:
        """Set the position mode of the first account, or of the one named."""
        self._call("POST", "set", hedge_mode=on, account=account)

    def set_clock_skew_ms(self, skew_ms: int) -> None:
        """Set exchange time minus local time."""
        self._call("POST", "set", clock_skew_ms=skew_ms)

    def set_list_lag_ms(self, lag_ms: int) -> None:
        """Have lists of open orders show an order only so long after it was opened."""
        self._call("POST", "set", list_lag_ms=lag_ms)

    def set_latency_ms(self, latency_ms: float) -> None:
        """Set the time between a request's execution and its answer."""
        self._call("POST", "set", latency_ms=latency_ms)

    def reset(self) -> None:
        """Start over with an empty book, empty statistics and the configuration's settings; ids are not given again."""
        self._call("POST", "reset")

    def _move(self, algo_id: int, move: str, **details: object) -> None:
        self._call("POST", "move", algo_id=algo_id, move=move, **details)

    def _call(self, method: str, name: str, **asked: object) -> Any:
        parts = urlsplit(self.url)
        host, port = parts.hostname or "", parts.port
        connection = (
            http.client.HTTPSConnection(
                host, port, timeout=CALL_TIMEOUT_S, context=ssl.create_default_context(cafile=self.config.tls_cert_path)
            )
            if self.config.tls_cert_path
            else http.client.HTTPConnection(host, port, timeout=CALL_TIMEOUT_S)
        )
        try:
            connection.request(method, PREFIX + name, json.dumps(asked), {"Connection": "close"})
            response = connection.getresponse()
            result = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ControlError(f"the local exchange did not answer {name}: {type(error).__name__}") from error
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            raise ControlError(result["error"])
        return result

    def _handshake(self) -> str:
        stdin, stdout = _pipes(self.process)
        try:
            stdin.write(self.config.to_json().encode() + b"\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise ControlError("the local exchange did not start") from error
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            ready = selector.select(START_TIMEOUT_S)
        line = stdout.readline() if ready else b""
        if not line:
            raise ControlError("the local exchange did not start")
        return str(json.loads(line)["url"])


def start_exchange(config: ExchangeConfig) -> RunningExchange:
    """Start a local exchange in a child process and wait until it serves; it ends with `stop` or with its parent.

    Raises:
        ControlError: it did not start; it said why on stderr.
    """
    return RunningExchange(config)


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if path else ""


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    if process.stdin is None or process.stdout is None:
        raise ControlError("the local exchange has no pipes")
    return process.stdin, process.stdout
