"""The call for all open orders of a symbol, over either transport: what is asked, and how much of it is read."""

from __future__ import annotations

import gzip
import json

import pytest

from producer.message import Call
from tests.loopback import answering, http_answer
from tests.ways import Bench
from worker.classify import Means, SymbolRef, classify
from worker.signing import Credential

#: What the exchange shows of an order (exchange.md 1.3), and most of what it does not need to.
SHOWN = {"symbol": "币安USDT", "algoStatus": "NEW", "createTime": 1750514941540, "rest": "x" * 650}


@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_a_list_of_200_orders_is_read_whole(bench: Bench, coding: str) -> None:
    """200 open orders, the most that the exchange allows, are more than other answers may hold; the symbol goes out
    percent-encoded."""
    orders = [SHOWN | {"algoId": 1 + n, "clientAlgoId": f"id-{n}"} for n in range(200)]
    body = json.dumps(orders).encode()
    assert len(body) > 128 * 1024
    plain = {} if coding == "identity" else {"Content_Encoding": coding}
    server, client = bench.to(answering(http_answer(gzip.compress(body) if plain else body, **plain)))
    ref = SymbolRef("币安USDT")

    answer = client.call(Call.LIST_OPEN, credential, ref)

    verdict = classify(Call.LIST_OPEN, ref, answer)
    assert (verdict.means, len(verdict.orders)) == (Means.LISTED, 200)
    (head,) = server.heads
    assert head.startswith(b"GET /fapi/v1/openAlgoOrders?symbol=%E5%B8%81%E5%AE%89USDT&recvWindow=")


def test_a_list_without_end_is_no_list(bench: Bench) -> None:
    """What is longer than any list may be is not read to its end, and tells nothing."""
    orders = [SHOWN | {"algoId": 1 + n, "rest": "x" * 6000} for n in range(200)]
    _, client = bench.to(answering(http_answer(json.dumps(orders).encode())))
    ref = SymbolRef("币安USDT")

    assert classify(Call.LIST_OPEN, ref, client.call(Call.LIST_OPEN, credential, ref)).means is Means.UNCLEAR
