"""Rehearsals of a test, and what stands between them and the sandbox's exchange."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from tests.conftest import API_KEY, API_SECRET
from tests.loopback import Peer, Server, http_answer
from tests.servers import Valkey
from worker.rehearse import rehearse
from worker.sandbox.control import BookEntry, RunningExchange
from worker.settings import Settings

ORDER, OPEN_ORDERS, TIME = "/fapi/v1/algoOrder", "/fapi/v1/openAlgoOrders", "/fapi/v1/time"
MODE, INFO, MARK = "/fapi/v1/positionSide/dual", "/fapi/v1/exchangeInfo", "/fapi/v1/premiumIndex"
NAME = re.compile(r"acq-rehearsal-[0-9a-f]{16}")
LEFT = "acq-rehearsal-0123456789abcdef"
SYMBOL = {"symbol": "BTCUSDT", "status": "TRADING", "filters": []}

GoOn = Callable[[], bytes]
Hook = Callable[[GoOn], bytes]


def said(body: object, status: str = "200 OK") -> bytes:
    """An answer of the exchange."""
    return http_answer(json.dumps(body).encode(), status)


def refusal(code: int, msg: str = "No.", status: str = "400 Bad Request") -> bytes:
    """A refusal of the exchange."""
    return said({"code": code, "msg": msg}, status)


@dataclass
class Relay:
    """Stands in front of the exchange. A hook answers in its place; it may ask the exchange first."""

    exchange: RunningExchange
    hooks: dict[tuple[str, str], Hook] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.server = Server(self._serve)

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.server.url

    def answer(self, method: str, path: str, answer: bytes) -> None:
        """Answer each such request so."""
        self.hooks[method, path] = lambda _: answer

    def once(self, method: str, path: str, hook: Hook) -> None:
        """Let a hook answer the first such request alone."""
        first = iter([hook])
        self.hooks[method, path] = lambda go_on: next(first, pass_on)(go_on)

    def before(self, method: str, path: str, do: Callable[[], object]) -> None:
        """Do something once before the first such request goes on."""

        def hook(go_on: GoOn) -> bytes:
            do()
            return go_on()

        self.once(method, path, hook)

    def asked(self, method: str) -> list[str]:
        """The targets of all such requests."""
        heads = [head.decode().split(" ", 2) for head in list(self.server.heads)]
        return [target for verb, target, _ in heads if verb == method]

    def order(self) -> BookEntry:
        """The newest order that was placed."""
        return list(self.exchange.book().values())[-1]

    def _serve(self, peer: Peer) -> None:
        port = int(self.exchange.url.rpartition(":")[2])
        while head := peer.read_head().decode():
            line, *fields = head.split("\r\n")
            method, target, _ = line.split(" ", 2)

            def go_on(method: str = method, target: str = target, fields: list[str] = fields) -> bytes:
                onward = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                try:
                    onward.request(method, target, headers=dict(each.split(": ", 1) for each in fields))
                    response = onward.getresponse()
                    return http_answer(response.read(), f"{response.status} {response.reason}")
                finally:
                    onward.close()

            peer.send(self.hooks.get((method, target.partition("?")[0]), pass_on)(go_on))


def pass_on(go_on: GoOn) -> bytes:
    return go_on()


def lost(go_on: GoOn) -> bytes:
    """The exchange does it, and its answer is lost."""
    go_on()
    raise ConnectionResetError


@pytest.fixture
def relay(exchange: RunningExchange) -> Iterator[Relay]:
    """Between the rehearsal and the local exchange."""
    relay = Relay(exchange)
    yield relay
    relay.server.close()


@pytest.fixture
def demo(valkey: Valkey, relay: Relay) -> dict[str, str]:
    """Settings with which everything is in order."""
    return {
        "REDIS_URL": valkey.url,
        "BINANCE_BASE_URL": relay.url,
        "BINANCE_API_KEY": API_KEY,
        "BINANCE_API_SECRET": API_SECRET,
    }


def run(demo: dict[str, str], symbol: str = "BTCUSDT", account: str = "default") -> tuple[int, str]:
    """Exit code and what is said, of one rehearsal in this process."""
    lines: list[str] = []
    code = rehearse(Settings.from_env(demo), symbol, account, say=lines.append, tell=lines.append)
    text = "\n".join(lines)
    assert_no_secret(text)
    return code, "\n".join(lines[:-1])


def assert_no_secret(text: str) -> None:
    """Neither key nor secret nor signature of a request is shown."""
    assert API_SECRET not in text
    assert API_KEY not in text
    assert not re.search(r"signature=[0-9a-f]|Traceback", text)
