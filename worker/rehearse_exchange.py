"""What a rehearsal asks the exchange, one call after the other: the symbol's rules, the order, and what became of it.

The one place that sends POST. Nothing that works on a queue may import it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from decimal import Decimal
from enum import IntEnum
from typing import Any, TypeVar

from producer.message import MAX_ALGO_ID, Call
from producer.untrusted import MalformedMessage, loads, shown
from worker.check import KEY_CODES, why_no_answer, words_of
from worker.classify import GATED, STATUS_MEANS, Failure, Means, OrderRef, Reply, Verdict, classify
from worker.clock import ServerClock
from worker.exchange import Answer, Exchange, is_challenge
from worker.rehearse_order import REFUSALS, Stop, SymbolRules, Unusable, mark_price, rules_of
from worker.settings import Settings
from worker.signing import Credential, check_api_key, encode_params, signed_query
from worker.transport import Raw, Request
from worker.transport_requests import RequestsTransport
from worker.wiring import route_of
from worker.witness import Transcript, Witness

__all__ = ["DemoExchange", "Ended", "Exit"]

_ALGO_ORDER = "/fapi/v1/algoOrder"
#: Most bytes of an answer that are read: exchangeInfo, with all symbols, has a few million.
_BODY_LIMIT = 32 * 1024 * 1024
_INFO, _MARK = "/fapi/v1/exchangeInfo", "/fapi/v1/premiumIndex"
#: How long an answer may take, and that long one, s.
_PATIENCE_S, _INFO_PATIENCE_S = 10.0, 60.0
#: How often what failed in passing is asked again, and after how long, s.
_TRIES, _PAUSE_S = 5, 0.5
#: How long an order is looked for whose placing was refused, and how long after its window one whose placing got no
#: clear answer, s.
_GRACE_S = 1.0
#: How long the end of an order is waited for, and how long its removal is tried, s.
_SETTLE_S, _REMOVE_S = 3.0, 10.0
#: The states in which an order is over here; a triggered one lives on as another.
_OVER = frozenset(STATUS_MEANS.values()) - {Means.OPEN, Means.TRIGGERING}
#: The exchange has not done what it was asked, and may do it in a moment.
_PASSING = frozenset({Means.CLOCK, Means.BUSY, Means.NOT_SENT})
_NO_ORDER = OrderRef(MAX_ALGO_ID)

T = TypeVar("T")


class Exit(IntEnum):
    """How a rehearsal ends."""

    PASSED = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 69  # sysexits.h
    INCONCLUSIVE = 75
    SETTINGS = 78


class Ended(Exception):
    """A rehearsal goes no further; the text says why, with the way out."""

    def __init__(self, code: Exit, said: str) -> None:
        super().__init__(said)
        self.code = code


class DemoExchange:
    """The exchange for one rehearsal on one symbol.

    ``check`` is asked before calls whether to go on. All methods but :meth:`look` and :meth:`state`, which see to it
    that nothing is left, raise :class:`Ended` and what ``check`` raises.
    """

    def __init__(
        self,
        settings: Settings,
        credential: Credential,
        symbol: str,
        transcript: Transcript,
        check: Callable[[], None],
    ) -> None:
        self._settings, self._credential, self._symbol, self._check = settings, credential, symbol, check
        self._transport = Witness(RequestsTransport(route_of(settings)), transcript)
        self.clock = ServerClock()
        self._exchange = Exchange(self._transport, recv_window_ms=settings.recv_window_ms, clock=self.clock)
        #: The order that may be there, and is not known to be over.
        self.open_order: OrderRef | None = None
        #: This address was told to be quiet: a ban is not made worse, not even for an order.
        self.is_gated = False

    def close(self) -> None:
        """Part with it."""
        self._transport.close()

    # -- reading

    def meet(self) -> None:
        """Measure its clock."""
        answer = asyncio.run(self._exchange.ask_time())
        if not self.clock.measured:
            said = why_no_answer(answer, "it does not tell its time")
            raise Ended(Exit.UNREACHABLE, f"{self._settings.base_url}: {said}")

    def is_hedged(self) -> bool:
        """Whether the account holds long and short positions apart."""

        def take(told: Any) -> bool:
            mode = told.get("dualSidePosition") if isinstance(told, dict) else None
            if not isinstance(mode, bool):
                raise Unusable(f"the position mode is {shown(mode)}, neither true nor false")
            return mode

        return self._asked("/fapi/v1/positionSide/dual", [], take)

    def rules(self) -> SymbolRules:
        """What orders on the symbol must keep to."""
        rules = self._asked(_INFO, [], lambda told: rules_of(told, self._symbol))
        if rules is None:
            raise Ended(Exit.USAGE, f"--symbol {shown(self._symbol)}: the exchange does not know it")
        return rules

    def mark(self) -> Decimal:
        """The symbol's mark price."""
        return self._asked(_MARK, [("symbol", self._symbol)], lambda told: mark_price(told, self._symbol))

    def open_orders(self) -> list[str]:
        """Client ids of the symbol's open conditional orders."""

        def take(told: Any) -> list[str]:
            if not isinstance(told, list) or not all(isinstance(order, dict) for order in told):
                raise Unusable("the open orders are no list")
            return [str(order.get("clientAlgoId")) for order in told]

        return self._asked("/fapi/v1/openAlgoOrders", [("symbol", self._symbol)], take)

    def lists(self, client_algo_id: str) -> bool:
        """Whether an order stands among the open ones, and does not leave them within some seconds."""
        for _ in range(_TRIES):
            if client_algo_id not in self.open_orders():
                return False
            time.sleep(_PAUSE_S)
        return True

    def _asked(self, path: str, pairs: list[tuple[str, str]], take: Callable[[Any], T]) -> T:
        """What an answer tells, asked again where it fails in passing."""
        said = ""
        for turn in range(_TRIES):
            if turn:
                time.sleep(_PAUSE_S)
            self._check()
            answer = self._send("GET", path, pairs)
            if isinstance(answer, Reply) and answer.http == 200 and not answer.truncated:
                try:
                    return take(loads(answer.body, _BODY_LIMIT))
                except MalformedMessage as error:  # demo has answered so (exchange.md 4.1)
                    said = f"GET {path}: {error}"
                except Unusable as error:
                    raise Ended(Exit.FAILED, f"GET {path}: {error}") from None
                continue
            verdict = self._passing(f"GET {path}", _NO_ORDER, answer)
            if verdict.code == -1121:
                raise Ended(Exit.USAGE, f"--symbol {shown(self._symbol)}: the exchange does not know it")
            if verdict.means is Means.DENIED:
                raise Ended(Exit.FAILED, f"GET {path} is refused: {words_of(verdict)}")
            said = f"GET {path}: {why_no_answer(answer, 'not answered as expected')}"
        raise Ended(Exit.UNREACHABLE, said)

    # -- the order

    def place(self, stop: Stop, client_algo_id: str) -> int:
        """Place a stop; gives its algo id. Whether it is there is looked up wherever the answer leaves that open."""
        ref, verdict = OrderRef(None, client_algo_id), Verdict(Means.NOT_SENT)
        for _ in range(_TRIES):
            self._check()
            self.open_order = ref
            answer = self._send("POST", _ALGO_ORDER, stop.parameters(client_algo_id))
            window_ends_s = time.monotonic() + self._settings.recv_window_ms / 1000
            verdict = classify(Call.QUERY, ref, answer)
            if verdict.order is not None:
                return self._placed(verdict.order.algo_id, client_algo_id)
            if verdict.means in _PASSING | GATED | {Means.KEY_REFUSED}:
                self.open_order = None
                self._passing("POST", ref, answer)
                time.sleep(_PAUSE_S)
                continue
            return self._found(ref, verdict, window_ends_s)
        raise Ended(Exit.UNREACHABLE, f"the order could not be placed: {verdict.means} {words_of(verdict)}")

    def _found(self, ref: OrderRef, verdict: Verdict, window_ends_s: float) -> int:
        """The order that was refused, or may have been placed: a refusal is not believed before it is not there."""
        code = verdict.code or 0
        is_refusal = verdict.means is Means.DENIED or (verdict.http == 400 and code <= -2000)
        ends_at_s = (time.monotonic() if is_refusal else window_ends_s) + _GRACE_S
        while (seen := self.look(ref)).order is None and time.monotonic() < ends_at_s:
            time.sleep(_PAUSE_S)
        if seen.order is not None:
            return self._placed(seen.order.algo_id, ref.client_algo_id or "")
        # What can be accepted no more hardly comes, and cancels of nothing get an address blocked (exchange.md 3).
        self.open_order = None
        said = words_of(verdict)
        if is_refusal:
            way_out = REFUSALS.get(code, "look it up in the exchange's list of errors")
            raise Ended(Exit.FAILED, f"the order is refused: {said}; {way_out}")
        raise Ended(
            Exit.UNREACHABLE,
            f"placing the order got no clear answer ({said}), and it has not shown up; the next rehearsal looks again",
        )

    def _placed(self, algo_id: int, client_algo_id: str) -> int:
        self.open_order = OrderRef(algo_id, client_algo_id)
        return algo_id

    def look(self, ref: OrderRef) -> Verdict:
        """What a query shows."""
        return self._call(Call.QUERY, ref)

    def state(self, ref: OrderRef, *, cancels: bool = False) -> Verdict:
        """What a query shows as soon as the order is over, or after some seconds; with ``cancels`` it is cancelled
        before each look."""
        ends_at_s, pause_s = time.monotonic() + (_REMOVE_S if cancels else _SETTLE_S), _PAUSE_S / 4
        while True:
            if cancels:
                self._call(Call.CANCEL, ref)
            verdict = self.look(ref)
            if self.is_gated or verdict.means in _OVER or time.monotonic() > ends_at_s:
                return verdict
            time.sleep(pause_s)
            pause_s *= 2

    def _call(self, call: Call, ref: OrderRef) -> Verdict:
        if self.is_gated:
            return Verdict(Means.LIMITED, msg="nothing is sent as long as this address is to be quiet")
        answer = asyncio.run(self._exchange.call(call, self._credential, ref))
        verdict = classify(call, ref, answer or Failure(False, "not sent"))
        self.is_gated = verdict.means in GATED
        if verdict.means is Means.CLOCK:
            asyncio.run(self._exchange.sync_time())
        return verdict

    # -- one request

    def _passing(self, what: str, ref: OrderRef, answer: Answer) -> Verdict:
        """What an answer means that may be another one next time; raises where it will not."""
        verdict = classify(Call.QUERY, ref, answer)
        if verdict.means in GATED:
            self.is_gated = True
            raise Ended(Exit.UNREACHABLE, f"{what}: {why_no_answer(answer, 'this address is blocked: wait')}")
        if verdict.means is Means.KEY_REFUSED:
            advice = KEY_CODES.get(verdict.code or 0, "it must be a key of this host, which may trade futures")
            whose = f"the key of {self._credential.account}"
            raise Ended(Exit.SETTINGS, f"{what}: {whose} is refused: {words_of(verdict)}; {advice}")
        if verdict.means is Means.CLOCK:
            asyncio.run(self._exchange.sync_time())
        return verdict

    def _send(self, method: str, path: str, pairs: list[tuple[str, str]]) -> Answer:
        def make() -> Request:
            if path in (_INFO, _MARK):  # of which anybody may ask
                target = f"{path}?{encode_params(pairs)}" if pairs else path
                return Request(method, target, body_limit=_BODY_LIMIT)
            query = signed_query(pairs, self._credential, self.clock.now_ms(), self._settings.recv_window_ms)
            fields = (("X-MBX-APIKEY", check_api_key(self._credential.api_key)),)
            return Request(method, f"{path}?{query}", fields, body_limit=_BODY_LIMIT)

        came = asyncio.run(self._transport.send(make, _INFO_PATIENCE_S if path == _INFO else _PATIENCE_S))
        if not isinstance(came, Raw):
            return Failure(came.seen, came.reason) if came is not None else Failure(False, "not sent")
        return Reply(came.status, came.body, challenge=is_challenge(came), truncated=not came.whole)
