"""`python -m tests.pictures`: makes the pictures of the operators' page anew, of real workers on a bad day.

They are rewritten in place, in tests/pictures; Chromium and chromedriver have to be there.
"""

from __future__ import annotations

import argparse
import random
import struct
import tempfile
import time
from pathlib import Path

import redis
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from producer import CancelClient, CancelRequest
from producer.counts import MINUTES_KEPT, POSITIONS, SIZE, counted
from producer.message import Attempt, Call, Outcome, OutcomeKind
from tests.browser import chromium, look
from tests.conftest import API_KEY, API_SECRET
from tests.servers import ROOT, Workers, eventually, running_valkey
from tests.webpages import KEYS, TOKEN, WebProcess
from worker.sandbox.control import ExchangeConfig, start_exchange

KINDS = [OutcomeKind.CANCELLED] * 60 + [OutcomeKind.TRIGGERED] * 3 + [OutcomeKind.EXPIRED, OutcomeKind.GAVE_UP]
PICTURES = {"web-status": "/?refresh=0", "web-failed": "/failed", "web-history": "/history"}


def main() -> None:
    """Draw each page at desk width."""
    config = ExchangeConfig(accounts={"default": (API_KEY, API_SECRET)}, faults="some", fault_rate=0.1, latency_ms=40)
    with tempfile.TemporaryDirectory() as directory, running_valkey() as valkey, start_exchange(config) as exchange:
        environment = {"REDIS_URL": valkey.url, "BINANCE_BASE_URL": exchange.url, "WORKER_CONCURRENCY": "12"}
        fleet = Workers(Path(directory), environment | {"BINANCE_API_KEY": API_KEY, "BINANCE_API_SECRET": API_SECRET})
        with redis.Redis(port=valkey.port) as connection, CancelClient.from_url(valkey.url) as client:
            write_a_day(connection)
            fleet.start(NOT_FOUND_HORIZON_S="10")
            fleet.start(NOT_FOUND_HORIZON_S="10")
            client.cancel_many([CancelRequest(client_algo_id=f"sl:{n}/BTC", tag="mm-eth") for n in range(9220, 9228)])
            client.cancel_many([CancelRequest(algo_id=5_041_681 + n, account="desk9") for n in range(5)])
            eventually(lambda: len(client.failed_ids()) >= 10, 60, "some requests fail")
            orders = exchange.add_orders(1500)
            client.cancel_many(
                [CancelRequest(algo_id=order.algo_id, symbol="BTCUSDT", tag="grid-7") for order in orders]
            )
            eventually(lambda: len(client.status().outcomes) > 2, 60, "orders are cancelled")
            with WebProcess(valkey.url, WEB_TOKEN=TOKEN) as web, chromium(Path(directory) / "chromium") as browser:
                look(browser, 1100, height=900)
                browser.get(web.url + "/login")
                browser.find_element(By.NAME, "token").send_keys(TOKEN, Keys.ENTER)
                eventually(lambda: browser.current_url == web.url + "/", what="the login is taken")
                for name, path in PICTURES.items():
                    browser.get(web.url + path)
                    browser.execute_script(
                        "const first = document.querySelector('.failed details'); if (first) first.open = true"
                    )
                    browser.save_screenshot(str(ROOT / "tests/pictures" / f"{name}.png"))
            fleet.stop()


def write_a_day(connection: redis.Redis) -> None:
    """What a worker of this version would have counted in the last day."""
    chance, now = random.Random(7), int(time.time()) // 60
    numbers, ring = [0] * POSITIONS, bytearray(SIZE * MINUTES_KEPT)
    numbers[-1] = (now - 1439) * 60_000
    for minute in range(now - 1439, now):
        numbers[0] = minute
        ring[SIZE * (minute % MINUTES_KEPT) : SIZE * (minute % MINUTES_KEPT + 1)] = struct.pack(
            f">{POSITIONS}q", *numbers
        )
        for _ in range(chance.randrange(100, 300) + (300 if minute % 480 < 20 else 0)):
            took = int(chance.lognormvariate(5 if minute % 480 < 20 else 2.5, 0.8))
            tried = (Attempt(1, took // 2, Call.CANCEL, 200, 200, "", "confirmed", 5),)
            ended = Outcome("x", 1, chance.choice(KINDS), attempts=tried, enqueued_at_ms=0, finished_at_ms=took)
            words = counted(ended).split()
            for position, number in zip(words[::2], words[1::2], strict=True):
                numbers[int(position)] += int(number)
    connection.set(KEYS.minutes, bytes(ring))
    connection.set(KEYS.counts, struct.pack(f">{POSITIONS}q", *numbers))


if __name__ == "__main__":
    argparse.ArgumentParser("python -m tests.pictures", description=__doc__).parse_args()
    main()
