"""A plain client of the local exchange, without any of the project's own code."""

from __future__ import annotations

import hmac
import http.client
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import quote, urlencode, urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from worker.sandbox.control import ChildEntry, RunningExchange
from worker.sandbox.faults import FaultTiming

KEY, SECRET = "key-of-the-tests", "secret-of-the-tests"
OTHER_KEY, OTHER_SECRET = "other-key-of-the-tests", "other-secret-of-the-tests"
DOCS_KEY = "dbefbc809e3e83c283a984c3a1459732ea7db1360ca80c5c2c8867408d28cc83"
DOCS_SECRET = "2b5eb11e18796d12d88f13dc27dbbd02c2cc51ff7059765ed9821957d82bb4d9"
DOCS_TIMESTAMP_MS = 1_591_702_613_943
ED25519_SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
ED25519_KEY = "ed25519-key-of-the-tests"

ACCOUNTS = {
    "default": (KEY, SECRET),
    "other": (OTHER_KEY, OTHER_SECRET),
    "docs": (DOCS_KEY, DOCS_SECRET),
    "ed25519": (
        ED25519_KEY,
        Ed25519PrivateKey.from_private_bytes(ED25519_SEED)
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        .decode(),
    ),
}
TIMING = FaultTiming(
    late_answer_ms=150,
    late_execution_ms=150,
    forgotten_ms=150,
    triggering_ms=60,
    finished_after_ms=60,
    retry_after_s=1,
    ban_s=1,
    firewall_ms=200,
    ban_after_ms=150,
    drip_interval_ms=1,
)
ALGO_ORDER = "/fapi/v1/algoOrder"
CHILD_ORDER = "/fapi/v1/order"
OPEN_ORDERS = "/fapi/v1/openAlgoOrders"


@dataclass
class Seen:
    """What a caller saw of one answer."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes
    elapsed_s: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, int, str]:
        return self.status, self.json["code"], self.json["msg"]


@dataclass
class Caller:
    """A plain client of one account over one connection, without any of the project's own code."""

    url: str
    key: str = KEY
    secret: str = SECRET
    timeout_s: float = 5.0
    source: str = "127.0.0.1"
    tls: ssl.SSLContext | None = None
    connection: http.client.HTTPConnection = field(init=False)

    def __post_init__(self) -> None:
        port = urlsplit(self.url).port or 0
        if self.tls is not None:
            self.connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=self.timeout_s, context=self.tls)
        else:
            self.connection = http.client.HTTPConnection(
                "127.0.0.1", port, timeout=self.timeout_s, source_address=(self.source, 0)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def send(self, method: str, target: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> Seen:
        """Send exactly this and read the whole answer."""
        started_s = time.monotonic()
        self.connection.request(method, target, body, headers or {})
        response = self.connection.getresponse()
        return Seen(response.status, response.headers, response.read(), time.monotonic() - started_s)

    def query(self, ahead_ms: int = 0, **parameters: Any) -> str:
        """A signed query; its timestamp is so much ahead of the local clock."""
        parameters = {"recvWindow": 5000} | parameters | {"timestamp": int(time.time() * 1000) + ahead_ms}
        payload = urlencode(parameters, quote_via=quote, safe="")
        return f"{payload}&signature={hmac.new(self.secret.encode(), payload.encode(), 'sha256').hexdigest()}"

    def call(self, method: str, path: str = ALGO_ORDER, ahead_ms: int = 0, **parameters: Any) -> Seen:
        """A signed call."""
        return self.send(method, f"{path}?{self.query(ahead_ms, **parameters)}", {"X-MBX-APIKEY": self.key})

    def cancel(self, algo_id: int, **parameters: Any) -> Seen:
        return self.call("DELETE", algoId=algo_id, **parameters)

    def status(self, algo_id: int) -> str:
        return str(self.call("GET", algoId=algo_id).json["algoStatus"])


def child_of(exchange: RunningExchange, algo_id: int) -> ChildEntry:
    """The child of a triggered order, as it stands in the book."""
    child = exchange.book([algo_id])[algo_id].child
    assert child is not None
    return child
