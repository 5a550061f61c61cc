"""A breaker for each API key: a key that the exchange refuses again and again is left in peace.

The healthy path asks nobody. Only a worker that has seen the key refused looks at Redis, where all of them meet; one
that has not costs the exchange a single request before it knows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import redis

from worker import log
from worker.classify import Means, Verdict

#: Refusals of a key in a row that open its breaker, and the time between probes while it is open, ms.
FAILURES = 5
PROBE_EVERY_MS = 60_000
#: Verdicts that say nothing of the key: its check may not have been reached.
_SILENT = frozenset({Means.UNCLEAR, Means.NOT_SENT, Means.BUSY, Means.CLOCK, Means.LIMITED, Means.BLOCKED})


#: Tells of an answer (`failed`, `answered`) or asks to send (`ask`): account, what, reason or job id; gives when to ask
#: again, ms, or 0 (:meth:`worker.store.Store.key`).
Ask = Callable[[str, str, str | bytes], Awaitable[int]]


class KeyBreaker:
    """The breakers of one worker's accounts."""

    def __init__(self, ask: Ask) -> None:
        self._ask_redis = ask
        self._reasons: dict[str, str] = {}  # accounts whose last answer refused the key

    def reason(self, account: str) -> str | None:
        """Why the key of ``account`` is suspected, or None."""
        return self._reasons.get(account)

    async def wait_until_ms(self, account: str, job_id: bytes) -> int:
        """When ``job_id`` may ask again (Redis' clock), or 0 if it may send now."""
        return 0 if account not in self._reasons else await self._ask(account, "ask", job_id)

    def concerns(self, account: str, verdict: Verdict) -> bool:
        """Whether an answer to a signed call is to be told; most say nothing new."""
        return verdict.means is Means.KEY_REFUSED or (account in self._reasons and verdict.means not in _SILENT)

    async def tell(self, account: str, verdict: Verdict) -> None:
        """Take note of an answer to a signed call."""
        if verdict.means is Means.KEY_REFUSED:
            reason = " ".join(str(part) for part in (verdict.http, verdict.code, verdict.msg) if part not in (None, ""))
            self._reasons[account] = reason
            if (probe_at_ms := await self._ask(account, "failed", reason)) > 0:
                log.error("key", account=account, state="held_back", probe_at_ms=probe_at_ms, reason=reason)
        elif self.concerns(account, verdict):
            self._reasons.pop(account, None)
            await self._ask(account, "answered", "")
            log.info("key", account=account, state="accepted")

    async def _ask(self, account: str, what: str, word: str | bytes) -> int:
        try:
            return await self._ask_redis(account, what, word)
        except redis.RedisError as error:
            log.warning("key", account=account, state="not_shared", error=type(error).__name__)
            return 0
