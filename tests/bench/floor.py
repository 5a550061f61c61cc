"""The floor: the least that takes an order id off a list and sends its DELETE. No record, no retry, one at a time."""

from __future__ import annotations

import os
from http.client import HTTPConnection
from urllib.parse import urlsplit

import redis

from tests.bench.signing import signed_target

LIST = "floor"


def main() -> None:
    """Serve the list until killed."""
    base = urlsplit(os.environ["BINANCE_BASE_URL"])
    secret = os.environ["BINANCE_API_SECRET"].encode()
    headers = {"X-MBX-APIKEY": os.environ["BINANCE_API_KEY"]}
    exchange = HTTPConnection(base.hostname or "", base.port)
    with redis.Redis.from_url(os.environ["REDIS_URL"]) as client:
        while True:
            if popped := client.blpop([LIST], 1):
                exchange.request("DELETE", signed_target(int(popped[1]), secret), headers=headers)
                exchange.getresponse().read()


if __name__ == "__main__":
    main()
