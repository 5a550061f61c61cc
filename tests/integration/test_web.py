"""The operators' pages over a real server: what they show, and what nobody may put on them."""

from __future__ import annotations

import re
import zlib
from base64 import b64encode
from datetime import UTC, datetime
from typing import Any

import pytest
import redis
from flask.testing import FlaskClient

from producer import CancelClient
from producer.message import ListedOrder, OutcomeKind
from producer.web import queries
from tests.holders import OpenHolder, ended, later, requeue
from tests.servers import Workers
from tests.strategies import fail
from tests.webpages import KEYS, LARGEST, NOW_MS, cells, found, outcome, page, settle
from worker.sandbox.control import RunningExchange

# --- what is shown ------------------------------------------------------------------------------------------------


def test_status_shows_the_queue_its_workers_and_what_they_did(
    reader: FlaskClient, client: CancelClient, workers: Workers, exchange: RunningExchange
) -> None:
    """The same figures as `status`, and below them the newest outcomes with their whole order ids."""
    worker = workers.start()
    (order,) = exchange.add_orders()
    client.cancel(algo_id=order.algo_id, symbol="BTCUSDT", tag="grid-7").wait(30)
    (failed,) = fail(client, workers)

    shown = page(reader, "/")

    words = cells(shown)
    assert f"{worker.process.pid}" in words
    assert re.search(r"failed 1 look", words)
    assert re.search(r"cancelled 1 .*refused 1 ", words)
    assert f"{order.algo_id} default BTCUSDT grid-7 not live" in words
    assert f'href="/requests/{failed}"' in shown
    assert [reader.get(path).headers.get("Refresh") for path in ("/", "/?live=1", "/?refresh=0")] == [None, "5", None]
    frame = reader.get("/", headers={"Upgrade-Insecure-Requests": "1"}).text
    assert 'src="/?live=1"' in frame
    assert cells(frame).count("Status") == 3  # title, bar and heading; the rest comes in the frame


def test_what_stands_still_is_told_first(reader: FlaskClient, client: CancelClient, connection: redis.Redis) -> None:
    """No worker, a closed gate, a suspension and a refused key are alerts, with the exchange's words."""
    client.cancel(algo_id=17)
    seconds, _ = connection.time()
    connection.hset(KEYS.gate("all"), mapping={"until_ms": (seconds + 60) * 1000, "reason": "429 <b>", "by": "host.1"})
    connection.set(KEYS.suspended, 1)
    connection.sadd(KEYS.suspects, "desk2")
    connection.hset(
        KEYS.breaker("desk2"),
        mapping={
            "failures": 5,
            "reason": "401 -2015 Invalid API-key",
            "since_ms": (seconds - 90) * 1000,
            "probe_at_ms": (seconds + 30) * 1000,
        },
    )

    words = cells(page(reader, "/"))

    assert "No live worker, and work is waiting" in words
    assert re.search(r"Gate all is closed for (60\.0|5\d\.\d) s: 429 &lt;b&gt; \(by host\.1 \)", words)
    assert "Suspended. No worker takes anything until rq resume" in words
    assert re.search(r"desk2 held back 5 0 9\d\.\d s in [\d.]+ s 401 -2015 Invalid API-key", words)


def test_a_dead_worker_is_shown_as_such(reader: FlaskClient, client: CancelClient, connection: redis.Redis) -> None:
    """One that went silent is dimmed and named so; without another one the work that waits is an alarm."""
    stamp = datetime.fromtimestamp(connection.time()[0] - 34, UTC).strftime("%Y-%m-%dT%H:%M:%S.000000Z")
    beat: dict[Any, Any] = {"last_heartbeat": stamp, "state": "busy", "hostname": "h", "c_concurrency": 64}
    connection.hset(KEYS.worker_prefix + "dead", mapping=beat)
    connection.sadd("rq:workers:cancels", KEYS.worker_prefix + "dead")
    assert "No live worker. Nothing is cancelled until one runs" in cells(page(reader, "/"))
    connection.zadd(KEYS.unfinished, {"lost": 1})

    shown = page(reader, "/")

    assert re.search(r'<tr class="stale"><th scope="row" class="id"><bdi>dead</bdi>', shown)
    words = cells(shown)
    assert re.search(r"silent for 3[4-9] s", words)
    assert "Workers (0 live, 1 silent)" in words
    assert "No live worker, and work is waiting." in words
    assert "in flight 0 1 to be taken over" in words
    client.cancel(algo_id=1)
    connection.hset(KEYS.worker_prefix + "stock", mapping={**beat, "c_concurrency": ""})
    connection.sadd("rq:workers:cancels", KEYS.worker_prefix + "stock")
    words = cells(page(reader, "/"))
    assert "Workers (1 live, 1 silent)" in words
    assert "No live worker" not in words


def test_failed_requests_are_shown_with_their_history(
    reader: FlaskClient, client: CancelClient, workers: Workers, exchange: RunningExchange
) -> None:
    """Kind, error, exact ids and each attempt of a request that a real worker gave up."""
    workers.start(NOT_FOUND_HORIZON_S="0.2")
    client.cancel(algo_id=LARGEST, client_algo_id="sl:1/BTC", symbol="ETHUSDT", tag="hedge").wait(30)

    shown = page(reader, "/failed")

    assert f">{LARGEST}<" in shown
    words = cells(shown)
    assert "not_found" in words
    assert "sl:1/BTC default ETHUSDT hedge may be live" in words
    assert "unknown to the exchange: 400 -2013 Order does not exist." in words
    assert re.search(r"\d+ attempts, enqueued \d s ago", words)
    assert re.search(r" 1 \d{4}-\d\d-\d\d [\d:.]+ cancel 400 -2011 Unknown order sent\. no_such_order \d+ ", words)
    assert "<details>" in shown


def test_failed_requests_are_paged_and_filtered(reader: FlaskClient, connection: redis.Redis) -> None:
    """Newest first, fifty to a page; kind and account choose, and the links keep the choice."""
    for number in range(120):
        kind = OutcomeKind.REFUSED if number % 3 == 0 else OutcomeKind.GAVE_UP
        account = "desk2" if number % 2 == 0 else "default"
        ended = outcome(f"r{number:03}", kind=kind, account=account, finished_at_ms=NOW_MS + 1000 * number)
        settle(connection, ended)

    def ids(path: str) -> list[str]:
        return list(dict.fromkeys(re.findall(r'href="/requests/(r\d+)"', page(reader, path))))

    assert ids("/failed") == [f"r{number:03}" for number in range(119, 69, -1)]
    assert ids("/failed?page=3") == [f"r{number:03}" for number in range(19, -1, -1)]
    assert ids("/failed?page=4") == []
    assert ids("/failed?account=desk2&page=2") == [f"r{number:03}" for number in range(18, -1, -2)]
    assert "account=desk2&amp;page=2" in page(reader, "/failed?account=desk2")
    assert "120 kept for a week; 20 match" in cells(page(reader, "/failed?kind=refused&account=desk2"))
    assert ids("/failed?account=nobody") == []
    assert "kind=&#39;cancelled&#39;: must be one of not_found, " in page(reader, "/failed?kind=cancelled", 400)


def test_a_request_is_shown_while_it_is_open_and_when_it_has_ended(
    reader: FlaskClient, client: CancelClient, workers: Workers, exchange: RunningExchange
) -> None:
    """State and deadline first, and the page looks again by itself; outcome and attempts afterwards."""
    (order,) = exchange.add_orders()
    ticket = client.cancel(algo_id=order.algo_id, deadline_s=60)

    shown = page(reader, f"/requests/{ticket.id}?live=1")
    assert "queued Waits for a worker." in cells(shown)
    assert re.search(r"deadline \S+ \S+ UTC, in 60\.0 s|deadline \S+ \S+ UTC, in 59\.\d s", cells(shown))
    assert reader.get(f"/requests/{ticket.id}?live=1").headers["Refresh"] == "5"
    workers.start()
    ticket.wait(30)
    shown = page(reader, f"/requests/{ticket.id}?live=1")
    assert "cancelled Our cancel took the order off the book." in cells(shown)
    assert re.search(r" 1 \S+ \S+ cancel 200 200? ?.* confirmed \d+ ", cells(shown))
    assert "Refresh" not in reader.get(f"/requests/{ticket.id}?live=1").headers


def test_a_listing_leads_to_the_requests_that_it_made(reader: FlaskClient, connection: redis.Redis) -> None:
    """By the id of each order, whatever stands in the place of the requests' ids."""
    listed = (ListedOrder(LARGEST, "r7"), ListedOrder(8, '"><script>'), ListedOrder(9, ""))
    settle(connection, outcome("r1", kind=OutcomeKind.LISTED, algo_id=None, symbol="BTCUSDT", orders=listed))

    shown = page(reader, "/requests/r1")

    assert f"open orders, each with a request 3: {LARGEST} , 8 , 9" in cells(shown)
    assert f'href="/requests/r7">{LARGEST}</a>' in shown
    assert "<script" not in shown


def test_a_request_whose_records_have_run_out_is_found_in_the_ledger(
    reader: FlaskClient, connection: redis.Redis
) -> None:
    """The ledger outlives job and record; what it has not either is unknown, with 404."""
    settle(connection, outcome("r1", kind=OutcomeKind.CANCELLED, may_be_live=False, error=None))
    connection.delete(KEYS.outcome_prefix + "r1")

    assert "cancelled" in cells(page(reader, "/requests/r1"))
    assert "Nobody knows this request" in page(reader, "/requests/r2", 404)


def test_a_failed_request_outlives_its_record(reader: FlaskClient, connection: redis.Redis) -> None:
    """A job stays failed for a week, its record a day: kind and error then come from RQ's own result."""
    settle(connection, outcome("r1", kind=OutcomeKind.REFUSED))
    connection.delete(KEYS.outcome_prefix + "r1", KEYS.outcomes)
    packed = b64encode(zlib.compress(b"refused: 401 -2015 Invalid API-key"))
    connection.xadd(KEYS.result_prefix + "r1", {"type": 2, "exc_string": packed})

    words = cells(page(reader, "/failed"))

    assert re.search(r"refused .*17 .*default", words)
    assert "401 -2015 Invalid API-key" in words
    assert "No attempt is on record" in words
    assert 'href="/requests/r1"' in page(reader, "/failed?kind=refused")


@pytest.mark.parametrize("status", ["failed", "canceled", "finished"])
def test_a_request_is_shown_by_where_it_stands_whatever_rq_says(
    status: str, reader: FlaskClient, client: CancelClient, open_holder: OpenHolder, connection: redis.Redis
) -> None:
    """RQ's clean-up may call a request failed whose outcome is still to come: the index of unfinished ones tells."""
    ticket = client.cancel(client_algo_id="tp-1")
    holder = open_holder()

    def shown() -> str:
        connection.hset(KEYS.job_prefix + ticket.id, "status", status)
        assert found(reader, "tp-1") == [ticket.id]
        return cells(page(reader, f"/requests/{ticket.id}?live=1"))

    assert "queued Waits for a worker." in shown()
    (lease,) = holder.claim()
    assert "started A worker has it in hand." in shown()
    holder.complete(later(lease, 90_000))
    words = shown()
    assert "scheduled Waits for its next attempt." in words
    assert re.search(r"next attempt \S+ \S+ UTC, in (89|90)\.\d s", words), words
    assert f"RQ&#39;s status {status}" in words


# --- search -------------------------------------------------------------------------------------------------------


def test_an_order_is_found_by_each_of_its_ids(
    reader: FlaskClient, client: CancelClient, connection: redis.Redis
) -> None:
    """Open requests of any account, and ended ones in ledger and registry."""
    open_one = client.cancel(algo_id=LARGEST, account="desk3")
    unknown = client.cancel(algo_id=6, account="quiet")
    by_name = client.cancel(client_algo_id="sl:1/BTC", account="quiet")
    by_both = client.cancel(algo_id=5, client_algo_id="sl:1/ETH", symbol="ETHUSDT")
    settle(connection, outcome("r1", account="desk3", algo_id=LARGEST - 1))
    ended = outcome("r2", kind=OutcomeKind.TRIGGERED, algo_id=None, client_algo_id="tp-1", actual_order_id="8886774")
    settle(connection, ended)

    assert found(reader, str(LARGEST)) == [open_one.id]
    assert found(reader, str(LARGEST - 1)) == ["r1"]
    assert found(reader, "sl:1/BTC") == found(reader, "sl:1/BTC", "quiet") == [by_name.id]
    assert found(reader, "sl:1/BTC", "desk3") == []
    assert found(reader, "6") == [unknown.id]
    assert found(reader, "sl:1/ETH") == found(reader, "5") == [by_both.id]
    assert found(reader, "tp-1") == ["r2"]
    assert found(reader, "8886774") == ["r2"]
    assert found(reader, "r2") == ["r2"]
    assert found(reader, open_one.id) == [open_one.id]
    assert found(reader, " r2 ") == ["r2"]
    assert found(reader, "922337203685477580") == []
    assert found(reader, "tp") == []
    assert str(LARGEST) in cells(page(reader, f"/search?q={LARGEST}"))


def test_a_search_reads_a_long_ledger_in_parts_and_ends_at_a_bound(
    reader: FlaskClient, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries of every part are found, fifty are shown, and the page says how far it looked."""
    pipeline = connection.pipeline()
    for number in range(2500):
        record = outcome(f"r{number}", kind=OutcomeKind.CANCELLED, algo_id=1 + number % 25).encode()
        pipeline.xadd(KEYS.outcomes, {"outcome": record})
    pipeline.execute()

    assert len(found(reader, "7")) == 50
    words = cells(page(reader, "/search?q=7"))
    assert "There are more than these." in words
    assert "and 2,500 entries of the ledger" in words
    assert found(reader, "r0") == ["r0"]
    monkeypatch.setattr(queries, "DEPTH", 1200)
    assert found(reader, "r0") == []
    assert found(reader, "r1300") == ["r1300"]
    assert "the newest 1,200 entries of the ledger" in cells(page(reader, "/search?q=r0"))


# --- what cannot be read ------------------------------------------------------------------------------------------


def test_foreign_things_are_shown_as_such(reader: FlaskClient, connection: redis.Redis) -> None:
    """Records, jobs and ids of nobody's contract appear with the reason why they cannot be read; no page breaks."""
    connection.xadd(KEYS.outcomes, {"outcome": '{"v":2}'})
    connection.xadd(KEYS.outcomes, {"else": b"\xff\xfe"})
    settle(connection, outcome("bad-record"), raw="[]")
    settle(connection, outcome("pickle"), data=b"\x80\x04K\x01.", raw="{")
    connection.set(KEYS.job_prefix + "string", "no hash")
    connection.hset(KEYS.outcome_prefix + "hash", "a", "b")
    connection.zadd(KEYS.failed, {"string": 3, "hash": 2, "gone": 4, "../../etc": 5})
    connection.zadd(KEYS.failed, {b"\xff\xfe/../x": 1})

    words = cells(page(reader, "/"))
    assert words.count("cannot be read") >= 4
    words = cells(page(reader, "/failed"))
    assert "not an outcome record of version 1" in words
    assert "not a request of this contract: not JSON" in words
    assert "its job is not a hash of RQ&#39;s" in words
    assert "Its job has run out, so it cannot be retried." in words
    assert "../../etc" in words
    assert cells(page(reader, "/failed?kind=unreadable")).count("unreadable") >= 6
    page(reader, "/requests/pickle")
    page(reader, "/requests/string")
    page(reader, "/requests/..%2f..%2fetc", 404)
    page(reader, "/search?q=bad-record")
    page(reader, "/search?q=%ff%fe")
    assert "an id has 200 characters at most." in page(reader, "/search?q=" + "x" * 300)


def test_a_request_that_rq_has_put_back_is_open_again(
    reader: FlaskClient, client: CancelClient, open_holder: OpenHolder, connection: redis.Redis
) -> None:
    """From the requeue on the run before counts no more; a copy that RQ saved late over an end changes nothing."""
    over, back = (client.cancel(algo_id=number) for number in (1, 2))
    holder = open_holder()
    holder.complete(*(ended(lease, OutcomeKind.REFUSED) for lease in holder.claim()))
    connection.hset(KEYS.job_prefix + over.id, "status", "queued")
    requeue(connection, back.id)

    assert "refused" in cells(page(reader, f"/requests/{over.id}"))
    assert "queued Waits for a worker." in cells(page(reader, f"/requests/{back.id}?live=1"))
    assert found(reader, "2")[0] == back.id


@pytest.mark.parametrize("key", [KEYS.failed, KEYS.outcomes, KEYS.unfinished, KEYS.waiting])
@pytest.mark.parametrize(
    "page", ["/failed", "/failed?kind=refused", "/search?q=7", "/search?q=stop-1", "/retry", "/?live=1", "/queued"]
)
def test_a_key_of_the_wrong_type_is_a_fault_of_its_own(
    operator: FlaskClient, connection: redis.Redis, key: str, page: str
) -> None:
    """A page shows what other keys tell, and names the one that it would have read."""
    pipeline = connection.pipeline()
    settle(pipeline, outcome("r1", algo_id=7))
    pipeline.execute()
    connection.delete(key)
    connection.set(key, "of the wrong type")

    answer = operator.get(page)

    assert answer.status_code == 200
    if key == KEYS.failed and page != "/queued":
        assert f"{key}</bdi>" in answer.text
        assert "is of the wrong type" in answer.text
    elif page == "/?live=1":
        assert f"<strong>Damaged key:</strong> <code><bdi>{key}</bdi>" in answer.text
        assert ("The ledger cannot be read." in answer.text) == (key == KEYS.outcomes)
    elif page.startswith("/search?q=7"):
        assert "r1" in answer.text
