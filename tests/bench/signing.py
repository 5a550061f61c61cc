"""The signed DELETE as a plain program makes it; what every system of the comparison but the project sends."""

from __future__ import annotations

import hashlib
import hmac
import time
from urllib.parse import urlencode

CANCEL_PATH = "/fapi/v1/algoOrder"
RECV_WINDOW_MS = 5000


def signed_target(algo_id: int, secret: bytes) -> str:
    """Path and signed query of a cancel of ``algo_id``, stamped now (exchange.md 2)."""
    query = urlencode({"algoId": algo_id, "recvWindow": RECV_WINDOW_MS, "timestamp": time.time_ns() // 1_000_000})
    return f"{CANCEL_PATH}?{query}&signature={hmac.new(secret, query.encode(), hashlib.sha256).hexdigest()}"
