"""The exchange's REST API as far as cancelling needs it: paths, headers, signing, weights and pauses.

The bytes are a transport's (:mod:`worker.transport`). It asks for the request when it is about to write it, so a
timestamp is as young as it can be, and whether the call may still go is looked at last.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime

from producer.message import Call
from worker.classify import ChildRef, Failure, OrderRef, Ref, Reply, SymbolRef
from worker.clock import ServerClock, local_ns
from worker.decide import AHEAD_MS, MAX_PAUSE_MS
from worker.patience import FIRST_S, FLOOR_S, Patience
from worker.signing import Credential, signed_query
from worker.transport import BODY_LIMIT, Failed, Raw, Request, Transport

__all__ = ["Answer", "Exchange", "Sent", "is_challenge"]

#: How much of recvWindow an attempt may take: an answer that is later than that comes to a request that the exchange
#: would no longer accept, and was most likely lost.
_PART_OF_RECV_WINDOW = 0.8

_ORDER_PATH = "/fapi/v1/algoOrder"
_CHILD_PATH = "/fapi/v1/order"
_PATHS = {
    Call.CANCEL_CHILD: _CHILD_PATH,
    Call.QUERY_CHILD: _CHILD_PATH,
    Call.LIST_OPEN: "/fapi/v1/openAlgoOrders",
}
#: Most bytes of a list of open orders that are read: 200 orders, the most that the exchange allows, take 150 kB.
_LIST_LIMIT = 512 * 1024
_TIME_PATH = "/fapi/v1/time"
_INFO_PATH = "/fapi/v1/exchangeInfo"
_SECONDS = re.compile(r"[0-9]+(\.[0-9]*)?(, *[0-9]+(\.[0-9]*)?)*")
_WEIGHTS = re.compile(r"[0-9]{1,9}(, *[0-9]{1,9})*")  # a proxy may add what is there already
_RATE_LIMITS = re.compile(rb'"rateLimits"\s*:\s*')
#: Statuses that concern every request of this address.
_GATE_STATUSES = frozenset({403, 418, 429})

Answer = Reply | Failure


def _always() -> bool:
    return True


@dataclass(slots=True)
class Sent:
    """What is told of a signed call that is waited for only as long as answers take.

    ``late`` is given the answer that comes after that, or the failure when none came, if ``is_open`` says so.
    ``accepted_until_ns``: from then on (:func:`worker.clock.local_ns`) the exchange accepts the request no more; 0 as
    long as it was not written.
    """

    late: Callable[[Answer], None]
    is_open: bool = False
    accepted_until_ns: int = 0


class Exchange:
    """Calls to the exchange over ``transport``; belongs to the thread, or the event loop, that the transport does.

    No method raises for anything that the network, the exchange or a library does: a call that was not answered is a
    :class:`~worker.classify.Failure`, whose ``seen`` says whether a byte of the request may have left. An answer that
    breaks off is a reply that is marked as truncated: its status and its Retry-After count all the same.

    An attempt takes 0.8 x ``recv_window_ms`` at the most, and connecting half of that. How long the answer to a signed
    call is waited for follows what answers take (:mod:`worker.patience`), but is not less than ``least_patience_s``.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        recv_window_ms: int,
        clock: ServerClock,
        least_patience_s: float = FLOOR_S,
    ) -> None:
        self._transport = transport
        self._recv_window_ms = recv_window_ms
        self._clock = clock
        self._patience_s = _PART_OF_RECV_WINDOW * recv_window_ms / 1000
        self._patience = Patience(self._patience_s, least_patience_s)
        self._refusal: Reply | None = None
        self._used_weight, self._used_in = 0, 0  # as told last, and in which minute of the exchange's clock

    async def call(
        self,
        call: Call,
        credential: Credential,
        ref: Ref,
        may_go: Callable[[], bool] = _always,
        sent: Sent | None = None,
    ) -> Answer | None:
        """A signed call about ``ref``, an order by its algo id if there is one, or all conditional orders of a symbol
        (exchange.md 1.2, 1.8; weight 1).

        ``may_go`` is asked right before the request is written, on a connection that stands. If it says no, nothing
        is sent and None is returned. Without ``sent`` the answer is waited for until the attempt's end.

        A cancel by client id is accepted no longer than its answer is waited for: it must not meet a later order.
        """
        written_ns = 0

        def make() -> Request | None:
            nonlocal written_ns
            if not may_go():
                return None
            timestamp_ms, window_ms = self._clock.now_ms(), self._recv_window_ms
            patience_s = None if sent is None else self._patience.of(call)
            if patience_s is not None and call is Call.CANCEL and isinstance(ref, OrderRef) and ref.algo_id is None:
                window_ms = min(window_ms, round(patience_s * 1000))
            query = signed_query(_id_of(ref), credential, timestamp_ms, window_ms)
            fields = (("X-MBX-APIKEY", credential.api_key),)
            written_ns = local_ns()
            if sent is not None:
                sent.accepted_until_ns = self._accepted_until_ns(timestamp_ms, window_ms)
            limit = _LIST_LIMIT if call is Call.LIST_OPEN else BODY_LIMIT
            target = f"{_PATHS.get(call, _ORDER_PATH)}?{query}"
            return Request("DELETE" if call.cancels else "GET", target, fields, patience_s, limit)

        def came_late(late: asyncio.Future[Raw | Failed]) -> None:
            answer = None if late.cancelled() else self._answered(late.result(), call, credential.api_key)
            if sent is not None and answer is not None:
                sent.late(answer)

        came = await self._transport.send(make, self._patience_s)
        if sent is not None and isinstance(came, Failed) and came.late is not None:
            sent.is_open = True
            came.late.add_done_callback(came_late)
            self._patience.silent(written_ns, local_ns())
        return self._answered(came, call, credential.api_key)

    def _accepted_until_ns(self, timestamp_ms: int, window_ms: int) -> int:
        moments = self._clock.moments(timestamp_ms + window_ms) if self._clock.measured else None
        return moments[1] if moments else local_ns() + (window_ms + AHEAD_MS) * 1_000_000

    async def ask_time(self, may_go: Callable[[], bool] = _always, patience_s: float | None = None) -> Answer | None:
        """``GET /fapi/v1/time``, from which the clock learns (weight 1); None if ``may_go`` said no."""
        came, answer = await self._unsigned(_TIME_PATH, may_go, patience_s)
        if isinstance(came, Raw) and (server_time_ms := _server_time_ms(answer)) is not None:
            self._clock.observe(came.sent_ns, came.received_ns, server_time_ms)
        return answer

    async def sync_time(self, may_go: Callable[[], bool] = _always) -> bool:
        """Ask for the exchange's time three times, one after the other; whether the clock learned anything.

        Stops at the first call without a good answer, and when ``may_go`` says so. Weight: one for each call.
        """
        for learned in range(3):
            if _server_time_ms(await self.ask_time(may_go)) is None:
                return learned > 0
        return True

    async def keep_warm(self, connections: int = 2) -> int:
        """Use as many different connections for ``GET /fapi/v1/time``, opening what is missing; how many answered.

        They are the most recently used ones, hence those that the next cancels will get; one that does not answer is
        replaced. Feeds the clock. Weight: one for each connection. (A transport that makes one call at a time uses its
        one connection as often.)
        """

        async def warmed() -> bool:
            answer = await self.ask_time(patience_s=max(self._patience.of(Call.QUERY), FIRST_S))
            if isinstance(answer, Failure) and answer.seen:
                answer = await self.ask_time()
            return _server_time_ms(answer) is not None

        return sum(await asyncio.gather(*[warmed() for _ in range(connections)]))

    async def weight_limit(self) -> int | None:
        """The weight that an address may use in a minute, from ``GET /fapi/v1/exchangeInfo``; None if unknown."""
        _, answer = await self._unsigned(_INFO_PATH)
        return _minute_limit(answer.body) if isinstance(answer, Reply) and answer.http == 200 else None

    def last_used_weight(self) -> int:
        """The weight used in the present minute of the exchange's clock, as far as an answer told."""
        return self._used_weight if self._used_in == self._clock.now_ms() // 60_000 else 0

    def take_refusal(self) -> Reply | None:
        """The latest 403, 418, 429, 451 or challenge that an unsigned call got, once: it closes the gate too."""
        refusal, self._refusal = self._refusal, None
        return refusal

    def close(self) -> None:
        """Close all idle connections; those in use are closed when their call ends, and later calls fail unsent."""
        self._transport.close()

    # -- one request and its answer

    async def _unsigned(
        self, path: str, may_go: Callable[[], bool] = _always, patience_s: float | None = None
    ) -> tuple[Raw | Failed | None, Answer | None]:
        came = await self._transport.send(
            lambda: Request("GET", path, patience_s=patience_s) if may_go() else None, self._patience_s
        )
        answer = self._answered(came)
        if isinstance(answer, Reply) and (answer.http in _GATE_STATUSES or answer.challenge):
            self._refusal = answer
        return came, answer

    def _answered(self, came: Raw | Failed | None, call: Call | None = None, api_key: str = "") -> Answer | None:
        """What came, and what there is to learn of it; ``call``: the signed one that it answers, with ``api_key``."""
        if isinstance(came, Failed):
            return Failure(came.seen, came.reason)
        if came is None:
            return None
        if call is not None:
            self._patience.answered(call, came.sent_ns, came.received_ns)
        self._note_weight(came)
        return Reply(
            http=came.status,
            body=came.body,
            retry_after_ms=self._retry_after_ms(came.headers.get("retry-after")),
            challenge=is_challenge(came),
            truncated=not came.whole,
            api_key=api_key,
        )

    def _note_weight(self, raw: Raw) -> None:
        header = raw.headers.get("x-mbx-used-weight-1m", "")
        if not _WEIGHTS.fullmatch(header):
            return
        # By the minute of sending: a late answer to a request of the last minute must not fill the new one.
        now_ms = self._clock.now_ms()
        minute = (now_ms - (local_ns() - raw.sent_ns) // 1_000_000) // 60_000
        # A minute that is still to come was noted by a clock that has been put right since.
        if not minute < self._used_in <= now_ms // 60_000:
            self._used_weight, self._used_in = max(map(int, header.split(","))), minute

    def _retry_after_ms(self, header: str | None) -> int | None:
        """Retry-After in either form, ms from now; None if absent or neither."""
        if header is None:
            return None
        text = header.strip()
        if _SECONDS.fullmatch(text):
            return min(round(max(float(each[:20]) for each in text.split(",")) * 1000), MAX_PAUSE_MS)
        try:
            until = parsedate_to_datetime(text)
            until = until if until.tzinfo else until.replace(tzinfo=UTC)  # "-0000" is UTC too
            asked_ms = int(until.timestamp() * 1000) - self._clock.now_ms()
        except (ValueError, TypeError, OverflowError):
            return None
        return min(max(asked_ms, 0), MAX_PAUSE_MS)


def is_challenge(raw: Raw) -> bool:
    """Whether the firewall answered, with a riddle for browsers (exchange.md 3)."""
    return raw.headers.get("x-amzn-waf-action", "").lower() == "challenge"


def _id_of(ref: Ref) -> list[tuple[str, str | int]]:
    if isinstance(ref, SymbolRef):
        return [("symbol", ref.symbol)]
    if isinstance(ref, ChildRef):
        return [("symbol", ref.symbol), ("orderId", ref.order_id)]
    if ref.algo_id is not None:
        return [("algoId", ref.algo_id)]
    if ref.client_algo_id is not None:
        return [("clientAlgoId", ref.client_algo_id)]
    raise ValueError("an order is named by its algo id or its client algo id")


def _server_time_ms(answer: Answer | None) -> int | None:
    """The time that the exchange tells, ms since the epoch; None if it does not."""
    if not isinstance(answer, Reply) or answer.http != 200:
        return None
    try:
        value = json.loads(answer.body)["serverTime"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    # Milliseconds of this century, not seconds or microseconds.
    return value if type(value) is int and 10**12 <= value < 5 * 10**12 else None


def _minute_limit(body: bytes) -> int | None:
    """REQUEST_WEIGHT for one minute. The body may break off after its first part, in which the limits stand."""
    found = _RATE_LIMITS.search(body)
    if found is None:
        return None
    try:
        limits, _ = json.JSONDecoder().raw_decode(body[found.end() :].decode("utf-8", "replace"))
        for limit in limits:
            kind = (limit["rateLimitType"], limit["interval"], limit["intervalNum"])
            if kind == ("REQUEST_WEIGHT", "MINUTE", 1) and type(limit["limit"]) is int and limit["limit"] > 0:
                return limit["limit"]
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    return None
