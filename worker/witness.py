"""Shows each request to the exchange and each answer as they happen, without what would let anybody repeat them.

A transport around another one, for `rehearse`: what a person sees is what was sent, and nothing is sent that is not
shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from producer.untrusted import clean_text
from worker.classify import without_signature
from worker.clock import local_ns
from worker.transport import Failed, Raw, Request, Transport

__all__ = ["Transcript", "Witness"]

#: Parameters that every signed request has; they tell nothing of what it asks.
_NOISE = frozenset({"recvWindow", "timestamp", "signature"})
#: Longest body that is shown whole, characters, and how much is shown of a longer one.
_WHOLE, _BEGINNING = 2_000, 200


@dataclass(slots=True)
class Transcript:
    """All that was sent and came back, in order; ``say`` is given a line for each."""

    say: Callable[[str], None]
    calls: list[dict[str, Any]] = field(default_factory=list)
    _hidden: set[str] = field(default_factory=set)

    def hide(self, secrets: Iterable[str]) -> None:
        """Show none of these from now on."""
        self._hidden |= {secret for secret in secrets if secret}

    def without_secrets(self, text: str) -> str:
        """A text without what is hidden, and without anything that is called a signature."""
        for secret in self._hidden:
            text = text.replace(secret, "***")
        return without_signature(text)

    def shown(self, text: str) -> str:
        """A stranger's words without secrets, fit for a terminal."""
        return clean_text(self.without_secrets(text), _WHOLE)

    def note(self, text: str) -> None:
        """Say something of our own, in which a stranger's words may stand."""
        self.say(self.shown(text))

    def asked(self, request: Request) -> dict[str, Any]:
        """Show a request that is about to be written; gives its entry."""
        path, _, query = request.target.partition("?")
        pairs = parse_qsl(query, keep_blank_values=True)
        self.hide(value for name, value in pairs if name == "signature")
        self.hide(part[10:] for part in query.split("&") if part.startswith("signature="))
        params = {name: value for name, value in pairs if name not in _NOISE}
        call = {"n": len(self.calls) + 1, "method": request.method, "path": path, "params": params}
        self.calls.append(call)
        words = " ".join(f"{name}={value}" for name, value in params.items())
        self.say(self.shown(f"#{call['n']} > {request.method} {path} {words}"))
        return call

    def answered(self, call: dict[str, Any], came: Raw | Failed, took_ms: int, *, is_late: bool = False) -> None:
        """Show what came of it."""
        if isinstance(came, Failed):
            call |= {"status": None, "body": None, "failure": came.reason}
            words = f"no answer ({came.reason})"
        else:
            body = came.body.decode("utf-8", "replace")
            rest = f" … ({len(came.body)} bytes)" if len(body) > _WHOLE else "" if came.whole else " … (it breaks off)"
            call |= {"status": came.status, "body": self.shown(body[:_BEGINNING] if rest else body) + rest}
            words = f"{came.status} {call['body']}"
        call["ms"] = took_ms
        self.say(f"#{call['n']} < {words}  [{took_ms} ms{', late' if is_late else ''}]")


class Witness:
    """A transport that shows what another one sends; see :class:`worker.transport.Transport`."""

    def __init__(self, transport: Transport, transcript: Transcript) -> None:
        self._transport = transport
        self._transcript = transcript

    async def send(self, make: Callable[[], Request | None], patience_s: float) -> Raw | Failed | None:
        """See :meth:`worker.transport.Transport.send`."""
        call: dict[str, Any] = {}
        began_ns = local_ns()

        def shown() -> Request | None:
            nonlocal call
            if (request := make()) is None:
                return None
            call = self._transcript.asked(request)
            return request

        def shown_late(late: asyncio.Future[Raw | Failed]) -> None:
            if not late.cancelled():
                self._transcript.answered(call, late.result(), _ms_since(began_ns), is_late=True)

        came = await self._transport.send(shown, patience_s)
        if came is not None and call:
            self._transcript.answered(call, came, _ms_since(began_ns))
        if isinstance(came, Failed) and came.late is not None:
            came.late.add_done_callback(shown_late)
        return came

    def close(self) -> None:
        """See :meth:`worker.transport.Transport.close`."""
        self._transport.close()


def _ms_since(began_ns: int) -> int:
    return (local_ns() - began_ns) // 1_000_000
