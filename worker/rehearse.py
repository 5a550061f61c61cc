"""`python -m worker rehearse`: place a stop on the exchange's demo host, cancel it through a queue, and show it all.

The one command that places an order. What it sends, it sends to the exchange's demo hosts or to loopback, whatever the
settings say; nothing that works on a queue imports it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import redis

from producer import CancelQueueError, Outcome
from producer.keys import Keys
from producer.redis_url import why
from producer.untrusted import MessageError, shown
from worker.check_redis import Fault, look_at_redis
from worker.classify import Means, OrderRef
from worker.interrupts import Interrupted, Interrupts
from worker.rehearse_exchange import DemoExchange, Ended, Exit
from worker.rehearse_order import Stop, Unusable, far_stop, verdict
from worker.rehearse_queue import NAME, OwnQueue, cancelled
from worker.setting_values import is_loopback
from worker.settings import Settings
from worker.signing import Credential
from worker.transport_asyncio import AsyncioTransport
from worker.wiring import route_of
from worker.witness import Transcript, Witness

__all__ = ["rehearse", "why_not_there"]

#: The exchange's demo hosts, which are one backend (exchange.md 5).
_DEMO_HOSTS = ("demo-fapi.binance.com", "testnet.binancefuture.com")


def why_not_there(settings: Settings) -> str | None:
    """Why no order is placed at the exchange of these settings; None: it is a demo host, or on this machine."""
    url, is_here = settings.base_url, is_loopback(settings.base_url)
    if is_here and settings.egress_proxy_url is not None:
        return f"BINANCE_BASE_URL is '{url}': behind EGRESS_PROXY_URL that is another machine; unset one of the two"
    if is_here or url in {f"https://{host}" for host in _DEMO_HOSTS}:
        return None
    hosts = " and ".join(f"https://{host}" for host in _DEMO_HOSTS)
    return (
        f"BINANCE_BASE_URL is '{url}': a rehearsal places an order, so it goes to {hosts} or to loopback, and "
        f"nowhere else; export BINANCE_BASE_URL=https://{_DEMO_HOSTS[0]}, with keys of the demo site"
    )


def rehearse(
    settings: Settings, symbol: str, account: str, *, say: Callable[[str], None], tell: Callable[[str], None] | None
) -> int:
    """Rehearse once; gives the exit code. ``say`` is given lines for people, ``tell`` (if any) the whole as JSON."""
    transcript = Transcript(say)
    report: dict[str, Any] = {"exchange": settings.base_url, "account": account, "symbol": symbol}
    with Interrupts() as interrupts:
        try:
            with contextlib.closing(_Rehearsal(settings, transcript, report, interrupts)) as rehearsal:
                word, said = rehearsal.run()
            code = int(Exit[word.upper()])
        except Interrupted:
            word, said, code = "interrupted", "what it had begun is taken back", interrupts.exit_code
        except Ended as end:
            word, said, code = end.code.name.lower(), str(end), int(end.code)
        except (redis.RedisError, CancelQueueError) as error:
            reason = f"Redis: {why(error)}" if isinstance(error, redis.RedisError) else str(error)
            word, said, code = "unreachable", reason, int(Exit.UNREACHABLE)
        except MessageError as error:
            word, said, code = "failed", f"the outcome's record is damaged: {error}", int(Exit.FAILED)
    said = transcript.shown(said)
    say(f"{word}: {said}")
    if tell is not None:
        whole = {"result": word, "exit_code": code, "said": said, **report, "calls": transcript.calls}
        tell(transcript.without_secrets(json.dumps(whole)))
    return code


def _credential(settings: Settings, account: str) -> Credential:
    """The key that may be used, where an order may be placed.

    Raises:
        Ended: there is none, or it may not.
    """
    if (reason := why_not_there(settings)) is not None:
        raise Ended(Exit.SETTINGS, reason)
    if (credential := settings.credential_for(account)) is None:
        names = ", ".join(sorted(settings.credentials))
        way_out = "set its BINANCE_<ACCOUNT>_API_KEY, or choose one of these"
        raise Ended(Exit.SETTINGS, f"--account {shown(account)} has no key here; {way_out}: {names}")
    return credential


class _Rehearsal:
    """One rehearsal, from the first look to the verdict; ``report`` names account and symbol, and is filled.

    Raises:
        Ended: the settings do not let an order be placed.
    """

    def __init__(
        self, settings: Settings, transcript: Transcript, report: dict[str, Any], interrupts: Interrupts
    ) -> None:
        credential = _credential(settings, report["account"])
        transcript.hide([credential.api_key])
        self._settings, self._transcript, self._report, self._interrupts = settings, transcript, report, interrupts
        self._is_leaving = False
        self._symbol: str = report["symbol"]
        self._queue = OwnQueue(settings)
        self._exchange = DemoExchange(settings, credential, self._symbol, transcript, self._check)
        report |= {"rehearsal": self._queue.name, "leftovers": []}

    def _check(self) -> None:
        if not self._is_leaving:
            self._interrupts.check()

    def run(self) -> tuple[str, str]:
        """Go through all of it; gives the verdict in a word and in a sentence."""
        where = f"{self._settings.base_url}, account {self._report['account']}, {self._symbol}"
        self._transcript.note(f"rehearsal {self._queue.name} at {where}")
        self._meet_redis()
        self._exchange.meet()
        self._clear_leftovers()
        stop = self._stop()
        algo_id = self._exchange.place(stop, self._queue.name)
        placed_s = time.monotonic()
        self._report["algo_id"] = algo_id
        outcome = self._cancelled(algo_id)
        seen = self._exchange.state(OrderRef(algo_id))
        self._report["order_status"] = seen.order.status if seen.order is not None else None
        if seen.means is not Means.OPEN and seen.order is not None:  # nobody can cancel one that is TRIGGERING
            self._exchange.open_order = None
        if self._exchange.is_gated:
            raise Ended(Exit.UNREACHABLE, f"the order could not be looked at: {seen.means} {seen.msg}")
        if self._exchange.lists(self._queue.name):
            return "failed", f"the order still stands among the open ones; the outcome is {outcome and outcome.kind}"
        return verdict(outcome, seen.means, seen.msg, time.monotonic() - placed_s)

    def close(self) -> None:
        """Leave nothing behind: neither the order nor keys.

        Raises:
            Ended: an order may be left.
        """
        self._is_leaving = True
        try:
            self._take_back()
        finally:
            self._exchange.close()
            try:
                self._queue.close()
            except redis.RedisError as error:
                name = self._queue.name
                self._transcript.note(f"keys of {name} are left ({why(error)}): the next rehearsal removes them")

    def _take_back(self) -> None:
        if (ref := self._exchange.open_order) is None:
            return
        self._transcript.note("taking the order back")
        seen = self._exchange.state(ref, cancels=True)
        which = f"client id {self._queue.name}, algo id {ref.algo_id or 'unknown'}"
        if seen.order is None or seen.means in (Means.OPEN, Means.TRIGGERING):
            way_out = "look at the account's open orders; the next rehearsal on this symbol tries again"
            raise Ended(Exit.FAILED, f"the order may still be open ({which}; {seen.means} {seen.msg}): {way_out}")
        self._transcript.note(f"it is {seen.msg} now ({which})")

    # -- before the order

    def _meet_redis(self) -> None:
        """See that a worker can work there, and be known to live."""
        queue, connection = self._queue, self._queue.connection
        for finding in look_at_redis(connection, self._settings.display_redis_url, queue.name):
            if finding.fault is Fault.UNREACHABLE:
                raise Ended(Exit.UNREACHABLE, finding.said)
        if connection.exists(Keys().suspended):
            raise Ended(Exit.UNREACHABLE, "`rq suspend` holds on this Redis: `rq resume`, or set another REDIS_URL")
        queue.open()

    def _clear_leftovers(self) -> None:
        """Cancel what killed rehearsals have left on the symbol, or on any symbol if their queue is left too."""
        queues = self._queue.left_behind()
        open_orders = self._exchange.open_orders()
        for name in dict.fromkeys([*queues, *filter(NAME.fullmatch, open_orders)]):
            if self._queue.lives(name):
                self._transcript.note(f"{name} is the order of another rehearsal, which is at work: left alone")
                continue
            entry = {"rehearsal": name, "order_status": self._clear_order(name, name in open_orders)}
            if name in queues:
                self._queue.remove(name)
            self._transcript.note(f"leftover of a killed rehearsal: {name}, its order is {entry['order_status']} now")
            self._report["leftovers"].append(entry)

    def _clear_order(self, name: str, is_listed: bool) -> str | None:
        """Cancel a leftover order if it is there; gives its status, if it is known."""
        ref = OrderRef(None, name)
        seen = self._exchange.look(ref)
        if is_listed or seen.means in (Means.OPEN, Means.TRIGGERING):
            seen = self._exchange.state(ref, cancels=True)
            if seen.order is None or seen.means is Means.OPEN:
                said = f"{name}, the order of a killed rehearsal, could not be cancelled ({seen.means} {seen.msg})"
                raise Ended(Exit.FAILED, f"{said}: cancel it at the exchange")
        if seen.order is None and seen.means is not Means.NO_SUCH_ORDER:
            said = f"{name}, the order of a killed rehearsal, could not be looked up ({seen.means} {seen.msg})"
            raise Ended(Exit.UNREACHABLE, f"{said}: repeat")
        return seen.order.status if seen.order is not None else None

    def _stop(self) -> Stop:
        exchange = self._exchange
        is_hedged, rules, mark = exchange.is_hedged(), exchange.rules(), exchange.mark()
        try:
            stop = far_stop(rules, mark, is_hedged)
        except Unusable as error:
            raise Ended(Exit.FAILED, f"no order fits the rules of the symbol: {error}") from None
        self._report |= {"is_hedge_mode": is_hedged, "order": dict(stop.parameters(self._queue.name))}
        mode = "hedge" if is_hedged else "one-way"
        self._transcript.note(
            f"order: sell {stop.quantity} {stop.symbol} at {stop.trigger_price}, mark price {mark:f}, {mode} mode, "
            f"reducing only (tick {rules.tick:f}, step {rules.step:f}, least {rules.least_quantity:f}, "
            f"notional {rules.least_notional:f})"
        )
        return stop

    # -- the cancel

    def _cancelled(self, algo_id: int) -> Outcome | None:
        """Cancel the order as a strategy does, by a worker on a queue of its own."""
        self._transcript.note(f"queue {self._queue.name}: cancel {algo_id}")
        transport = Witness(AsyncioTransport(route_of(self._settings), pool_size=4), self._transcript)
        outcome = asyncio.run(
            cancelled(
                algo_id,
                self._report["account"],
                self._settings,
                self._queue,
                transport,
                self._exchange.clock,
                self._check,
            )
        )
        self._report["outcome"] = None if outcome is None else outcome.as_dict()
        if outcome is not None:
            error = f" ({outcome.error})" if outcome.error else ""
            self._transcript.note(
                f"outcome: {outcome.kind}{error}, after {len(outcome.attempts)} calls in {outcome.took_ms} ms, "
                f"order_status {outcome.order_status}"
            )
        return outcome
