"""`python -m worker check`: is everything that a worker needs there, and does the exchange accept its keys?

Sends nothing that could change an order: the exchange's time, its limits, and for each account a signed query and a
signed cancel of an order that cannot exist: that the key may read does not mean that it may trade.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import redis
from rq.defaults import RQ_KEY_PREFIX

from producer.keys import Keys
from producer.message import MAX_ALGO_ID, Call
from producer.untrusted import clean_text
from worker.check_redis import Fault, Finding, look_at_redis
from worker.classify import Failure, Means, OrderRef, Reply, Verdict, classify
from worker.clock import ServerClock
from worker.exchange import Answer, Exchange
from worker.secrecy import keep_memory_private
from worker.settings import Settings
from worker.signing import Credential
from worker.wiring import gate_scope, open_exchange, open_redis

__all__ = ["KEY_CODES", "Fault", "Finding", "check", "why_no_answer", "words_of"]

#: An id that no order has: the largest that the field can hold.
_NO_ORDER = OrderRef(MAX_ALGO_ID)
#: Why a call never got an answer, by the class of the error or the status of the proxy: what it means, and the way out.
_FAILURES = {
    **dict.fromkeys(
        ("gaierror", "NameResolutionError"),
        "its name has no address (DNS): check BINANCE_BASE_URL, or EGRESS_PROXY_URL, and the resolver",
    ),
    "ConnectionRefusedError": "the connection is refused: nothing listens there, or a firewall forbids it",
    "SSLCertVerificationError": (
        "its certificate is not trusted: something on the way answers for it, such as a company's proxy; if that is "
        "meant, EXCHANGE_TLS_CA names the file of its authority"
    ),
    **dict.fromkeys(
        ("MalformedResponse", "BadStatusLine"),
        "what answers there speaks no HTTP: check scheme and port of BINANCE_BASE_URL",
    ),
    "SSLError": "no TLS is spoken there: check scheme and port of BINANCE_BASE_URL",
    "407": "the proxy wants a login: EGRESS_PROXY_URL=http://user:password@host:port, percent-encoded",
    "403": "the proxy forbids it: allow the exchange's host and port 443 there",
    "TimeoutError": "no answer in time: a firewall drops it, or the way there is too slow",
    "ConnectTimeoutError": "no connection in time: a firewall drops it, or the address is wrong",
    "OSError": "the network cannot be reached: see the host's routes",
}
#: What an answer means that is not the exchange's time, by its status.
_STATUSES = {
    **dict.fromkeys(
        (200, 204, 301, 302, 303, 307, 308, 401, 511),
        "not the exchange's answer but something else: a proxy or a login page stands in between",
    ),
    403: "its firewall blocks this address: wait some minutes, and do not repeat this in a loop",
    404: "no such path there: is BINANCE_BASE_URL the host of USD-M futures?",
    407: "a proxy wants a login: EGRESS_PROXY_URL=http://user:password@host:port, percent-encoded",
    418: "this address is banned for having ignored a limit: wait, and do not repeat this in a loop",
    429: "too many requests from this address: wait",
    451: "this region is refused: let the worker run elsewhere, or send through EGRESS_PROXY_URL",
}
#: What to mend where a key is refused, by the exchange's code.
KEY_CODES = {
    -1022: "the secret (or private key) does not belong to this API key",
    -2008: "the exchange does not know this API key: is it one of this host's (production and demo have their own)?",
    -2014: "this is no API key: paste it again",
    -2015: "see this API key at the exchange: does it exist, is this address allowed, is futures trading enabled?",
    -2017: "the keys of this account are locked",
}


def check(settings: Settings) -> Iterator[Finding]:
    """Look at one thing after the other; each finding is given as soon as it is known."""
    keep_memory_private()
    names = ", ".join(sorted(settings.credentials))
    left_out = f"; left out by BINANCE_ACCOUNTS: {', '.join(settings.accounts_left_out)}"
    out = left_out if settings.accounts_left_out else ""
    yield Finding("settings", f"queue {settings.queue}, {len(settings.credentials)} account(s): {names}{out}")
    for warning in settings.warnings:
        yield Finding("settings", warning, Fault.WARNING)
    connection = open_redis(settings)
    try:
        yield from look_at_redis(connection, settings.display_redis_url, settings.queue)
        pause = _pause(connection, Keys(settings.queue, RQ_KEY_PREFIX).gate(gate_scope(settings)))
    finally:
        connection.close()
    if pause is not None:
        yield pause
        return
    exchange, clock = open_exchange(settings, one_at_a_time=True)
    try:
        time = _time(settings, exchange, clock)
        yield time
        if time.fault is not Fault.NONE:
            return
        limit = asyncio.run(exchange.weight_limit())
        yield Finding("limits", f"{limit} weight a minute" if limit else "not told by the exchange; 2400 is assumed")
        for account, credential in sorted(settings.credentials.items()):
            yield _key(account, credential, exchange)
    finally:
        exchange.close()


def _pause(connection: redis.Redis, gate: str) -> Finding | None:
    """A pause that an answer of the exchange asked all of this address for: a ban grows with each request in it."""
    try:
        (until, reason), (now_s, _) = connection.hmget(gate, "until_ms", "reason"), connection.time()
    except redis.RedisError:
        return None
    left_s = int(until) // 1000 - int(now_s) if until and until.isdigit() and len(until) <= 16 else 0
    if left_s <= 0:
        return None
    said = (
        f"not asked: all requests pause for another {left_s} s ({clean_text(reason or b'no reason is told')}); wait, "
        f"or open the gate if its cause is mended: HSET {gate} until_ms 0"
    )
    return Finding("exchange", said, Fault.UNREACHABLE)


def _time(settings: Settings, exchange: Exchange, clock: ServerClock) -> Finding:
    answer = asyncio.run(exchange.ask_time())
    if clock.measured:
        asyncio.run(exchange.sync_time())
        said = f"{settings.base_url} answers; its clock is {clock.offset_ms:+d} ms from this host's"
        return Finding("exchange", said)
    return Finding(
        "exchange", f"{settings.base_url}: {why_no_answer(answer, 'it does not tell its time')}", Fault.UNREACHABLE
    )


def why_no_answer(answer: Answer | None, otherwise: str) -> str:
    """Why the exchange does not tell what it was asked, in its words or the network's, with the way out; ``otherwise``:
    what is said of an answer that means nothing in particular."""
    if isinstance(answer, Reply):
        verdict = classify(Call.QUERY, _NO_ORDER, answer)
        meaning = _STATUSES.get(answer.http, otherwise)
        return f"{meaning} ({words_of(verdict)})"
    reason = answer.reason if isinstance(answer, Failure) else "not sent"
    return f"{_FAILURES.get(reason.rpartition(': ')[2], 'it cannot be reached')} ({reason})"


def _key(account: str, credential: Credential, exchange: Exchange) -> Finding:
    what = f"key of {account}"
    for call in (Call.QUERY, Call.CANCEL):
        answer = asyncio.run(exchange.call(call, credential, _NO_ORDER))
        assert answer is not None  # nothing kept it from going
        verdict = classify(call, _NO_ORDER, answer)
        if verdict.means is not Means.NO_SUCH_ORDER:
            return _bad_key(what, verdict, may_read=call is Call.CANCEL)
    return Finding(what, f"accepted, may trade ({credential.kind}, …{credential.api_key[-4:]})")


def _bad_key(what: str, verdict: Verdict, *, may_read: bool) -> Finding:
    said = words_of(verdict)
    if verdict.means not in (Means.KEY_REFUSED, Means.DENIED):
        return Finding(what, f"not answered as expected: {verdict.means} {said}", Fault.UNREACHABLE)
    if may_read and verdict.means is Means.KEY_REFUSED:
        return Finding(what, f"may read but not trade: {said}; enable futures for this API key", Fault.SETTINGS)
    advice = KEY_CODES.get(verdict.code or 0)
    return Finding(what, f"refused: {said}" + (f"; {advice}" if advice else ""), Fault.SETTINGS)


def words_of(verdict: Verdict) -> str:
    """Status, code and text of an answer."""
    return " ".join(str(part) for part in (verdict.http, verdict.code, verdict.msg) if part not in (None, ""))
