"""The operators' pages over a real server: lists of open requests, the ledger with its filter, banners, history."""

from __future__ import annotations

import json
import math
import re
from html import unescape

import pytest
import redis
from flask.testing import FlaskClient

from producer import CancelClient, CancelRequest
from producer.message import MAX_ATTEMPTS_BYTES, OutcomeKind, encode_attempts, encode_call
from producer.web import queries
from tests.holders import OpenHolder, ended, later, orders
from tests.servers import Workers
from tests.webpages import KEYS, NOW_MS, attempt, cells, outcome, page, settle
from worker.sandbox.control import RunningExchange

PAGES = (
    "/?refresh=0",
    "/queued",
    "/scheduled",
    "/in-flight",
    "/outcomes",
    "/failed",
    "/history",
    "/search?q=1",
)


def ids(text: str) -> list[str]:
    """The requests that a page links, in its order."""
    return list(dict.fromkeys(re.findall(r'href="/requests/([^"?]+)"', text)))


# --- open requests ------------------------------------------------------------------------------------------------


def test_open_requests_are_listed_by_where_they_stand(
    reader: FlaskClient, client: CancelClient, open_holder: OpenHolder, connection: redis.Redis
) -> None:
    """Who waits longest, is due next, or whose lease ends first comes first, with order, deadline and attempts."""
    first, second, third, fourth = orders(client, 4, tag="grid-7", symbol="BTCUSDT", deadline_s=600)
    for number, ticket in enumerate((first, second, third, fourth)):
        connection.zincrby(KEYS.unfinished, 1000 * number - 60_000, ticket.id)
    assert ids(page(reader, "/queued")) == [ticket.id for ticket in (first, second, third, fourth)]
    assert re.search(r"1 default BTCUSDT grid-7 0 in 10\.0 min", cells(page(reader, "/queued")))
    leases = {lease.id: lease for lease in open_holder(lease_ms=90_000).claim(3)}
    short = {lease.id: lease for lease in open_holder(lease_ms=20_000).claim(1)}

    shown = page(reader, "/in-flight")
    assert ids(shown)[0] == fourth.id
    assert sorted(ids(shown)) == sorted([*leases, *short])
    assert re.search(r"lease ends deadline request \d s ago 4 default BTCUSDT grid-7 0 in (20|1\d) s", cells(shown))
    holder = open_holder()
    holder.complete(later(leases[first.id], 90_000), later(leases[second.id], 30_000))
    shown = page(reader, "/scheduled")
    assert ids(shown) == [second.id, first.id]
    assert re.search(r"2 default BTCUSDT grid-7 0 in (30|2\d) s in (10\.0|9\.\d) min", cells(shown))
    assert ids(page(reader, "/queued")) == []
    for address in ("/queued", "/scheduled", "/in-flight"):
        assert f'href="{address}"' in page(reader, "/?refresh=0")


def test_long_lists_are_paged_and_bounded(
    reader: FlaskClient, client: CancelClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty to a page, each request once; beyond the bound the page says so."""
    tickets = orders(client, 120)

    pages = [page(reader, f"/queued?page={number}") for number in (1, 2, 3, 4)]

    assert [len(ids(text)) for text in pages] == [50, 50, 20, 0]
    assert sorted(job_id for text in pages for job_id in ids(text)) == sorted(ticket.id for ticket in tickets)
    assert 'href="/queued?page=2"' in pages[0]
    assert "page=4" not in pages[2]
    assert "120 in the index" in cells(pages[0])
    monkeypatch.setattr(queries, "DEPTH", 100)
    assert ids(page(reader, "/queued?page=99999")) == ids(pages[1])
    assert "100 are listed at most" in page(reader, "/queued?page=2")


def test_what_no_worker_has_seen_is_listed_too(
    reader: FlaskClient, client: CancelClient, connection: redis.Redis, open_holder: OpenHolder
) -> None:
    """What another program enqueued or scheduled, what stands in the index without a job, and what is none of ours;
    a list's entry of a request that has ended is none."""
    ticket = client.cancel(algo_id=1)
    over = client.cancel(algo_id=2)
    holder = open_holder()
    taken = {lease.id: lease for lease in holder.claim()}
    holder.complete(ended(taken[over.id]), later(taken[ticket.id], 0))
    connection.rpush(KEYS.waiting, over.id, "foreign", "pickle")
    connection.hset(KEYS.job_prefix + "foreign", mapping={"status": "queued", "data": encode_call(CancelRequest(77))})
    connection.hset(KEYS.job_prefix + "pickle", mapping={"status": "queued", "data": b"\x80\x04K\x01."})
    connection.hset(KEYS.job_prefix + "later", mapping={"status": "scheduled", "data": encode_call(CancelRequest(78))})
    connection.zadd(KEYS.scheduled, {"later": 2**31})
    connection.zadd(KEYS.unfinished, {"deleted": 10**13 + 5})

    assert ids(page(reader, "/queued")) == ["deleted", "foreign", "pickle"]
    words = cells(page(reader, "/queued"))
    assert "its job is gone; a worker that looks for it drops it from the index" in words
    assert "not a request of this contract: not JSON" in words
    assert " 77 " in words
    assert ids(page(reader, "/scheduled")) == [ticket.id, "later"]


def test_no_forged_number_takes_a_page_away(
    operator: FlaskClient, client: CancelClient, connection: redis.Redis
) -> None:
    """Whatever stands in a record, or is written by a strategy where a time or a place in the index is expected: each
    page is there, and the others' rows are on it."""
    tickets = orders(client, 6)
    fields = ("c_deadline_at_ms", "c_enqueued_at_ms", "c_open_at_ms", "c_run")
    for ticket, value in zip(tickets, ("9" * 400, "9" * 5000, "-" + "9" * 400, "9" * 19, "x"), strict=False):
        connection.hset(KEYS.job_prefix + ticket.id, mapping=dict.fromkeys(fields, value))
    settle(connection, outcome("r1"))
    scores = {"endless": math.inf, "negative": -math.inf, "late": 1e300, "of-no-band": 3e13, "nearly": 3e13 - 1}
    for job_id, score in scores.items():
        settle(connection, outcome(job_id))
        connection.hdel(KEYS.job_prefix + job_id, "c_done")
        connection.zadd(KEYS.unfinished, {job_id: score})
    for number, ms in enumerate(("9" * 400, "-" + "9" * 400, 2**63 - 1, -(2**63), 10**15)):
        raw = {**outcome(f"odd{number}").as_dict(), "finished_at_ms": ms}
        settle(connection, outcome(f"odd{number}"), raw=json.dumps(raw))
        page(operator, f"/requests/odd{number}")

    for address in (*PAGES, "/retry?id=r1&id=endless&id=late", *(f"/requests/{each}" for each in scores)):
        page(operator, address)
    for ticket in tickets:
        page(operator, f"/requests/{ticket.id}")
    assert set(ids(page(operator, "/queued"))) >= {ticket.id for ticket in tickets}
    assert set(ids(page(operator, "/failed"))) == {"r1", *scores, *(f"odd{number}" for number in range(5))}
    assert "r1" in ids(page(operator, "/retry?id=r1&id=endless&id=late"))


def test_no_forged_history_floods_a_page(operator: FlaskClient, client: CancelClient, connection: redis.Redis) -> None:
    """What is larger than a worker reads is measured and left where it is; of the rest of them so many attempts are
    shown, and so many bytes read."""
    tickets = orders(client, 50)
    one = encode_attempts([attempt(1)])
    huge, long = ",".join([one] * 10_000), ",".join([one] * 3_000)
    for ticket in tickets[:40]:
        connection.hset(KEYS.job_prefix + ticket.id, mapping={"c_attempts": huge, "status": "x" * 1_000_000})
    for ticket in tickets[40:49]:
        connection.hset(KEYS.job_prefix + ticket.id, "c_attempts", long)
    connection.hset(KEYS.job_prefix + tickets[0].id, "data", "x" * 1_000_000)
    assert len(long) < MAX_ATTEMPTS_BYTES < len(huge)

    shown = page(operator, "/queued")

    assert set(ids(shown)) == {ticket.id for ticket in tickets}
    assert shown.count("its field c_attempts is not read") >= 40
    assert "it has 3,000 attempts: the last 200 are shown" in shown
    assert "its field data is not read: 1,000,000 bytes" in shown
    for ticket in (tickets[0], tickets[40], tickets[49]):
        assert len(page(operator, f"/requests/{ticket.id}")) < 200_000


# --- the ledger ---------------------------------------------------------------------------------------------------


def test_the_ledger_is_filtered_by_each_of_its_words_and_by_time(reader: FlaskClient, connection: redis.Redis) -> None:
    """Tag, symbol, account, kind, from and until choose alone and together; `/failed` takes the same filter."""
    for number in range(8):
        fields = {
            "kind": OutcomeKind.REFUSED if number & 1 else OutcomeKind.GAVE_UP,
            "account": "desk2" if number & 2 else "default",
            "symbol": "ETHUSDT" if number & 4 else "BTCUSDT",
            "tag": f"für {number & 3}",
            "finished_at_ms": NOW_MS + 60_000 * number,
        }
        settle(connection, outcome(f"r{number}", **fields))
    settle(connection, outcome("gone", kind=OutcomeKind.CANCELLED, finished_at_ms=NOW_MS))

    for address in ("/outcomes", "/failed"):

        def numbers(query: str, address: str = address) -> list[str]:
            return [job_id[1:] for job_id in ids(page(reader, f"{address}?{query}")) if job_id != "gone"]

        assert numbers("") == list("76543210")
        assert numbers("kind=refused") == list("7531")
        assert numbers("account=desk2&kind=gave_up") == list("62")
        assert numbers("symbol=ETHUSDT&tag=f%C3%BCr+1") == ["5"]
        for part in ("tag=f%C3%BCr", "symbol=BTC", "account=desk", "kind=unreadable", "until=2025-11-21"):
            assert numbers(part) == []
        assert numbers("from=2025-11-22+10:32") == list("765432")
        assert numbers("from=2025-11-22+10:32&until=2025-11-22T10:33Z") == list("32")
    assert ids(page(reader, "/outcomes?kind=cancelled")) == ["gone"]
    assert "Retry all 2" not in page(reader, "/failed?tag=f%C3%BCr+1")


def test_what_a_record_leaves_unsaid_is_told_by_the_job(reader: FlaskClient, connection: redis.Redis) -> None:
    """A failed request whose record knows nothing of its order is found by what its job says, as it is shown."""
    data = encode_call(CancelRequest(algo_id=17, account="desk2", tag="grid"))
    settle(connection, outcome("r1", kind=OutcomeKind.REFUSED, account=None, algo_id=None), data)
    for query in ("", "tag=grid", "account=desk2", "account=desk2&tag=grid"):
        assert ids(page(reader, f"/failed?{query}")) == ["r1"]
    assert ids(page(reader, "/failed?tag=other")) == []


def test_the_ledger_is_paged_with_its_filter_kept(reader: FlaskClient, connection: redis.Redis) -> None:
    """From page to page none is lost or told twice, however many come meanwhile, and each link keeps the filter."""
    for number in range(260):
        settle(
            connection, outcome(f"r{number}", kind=OutcomeKind.CANCELLED, account="desk2" if number % 2 else "desk1")
        )
    address, seen = "/outcomes?account=desk2&tag=", list[str]()

    while address:
        text = page(reader, address)
        seen += ids(text)
        settle(connection, outcome("new", kind=OutcomeKind.CANCELLED, account="desk2"))
        link = re.search(r'rel="next" href="([^"]+)"', text)
        address = unescape(link[1]) if link else ""
        assert "account=desk2" in address or not address

    assert seen == [f"r{number}" for number in range(259, 0, -2)]


def test_a_filter_says_how_far_it_has_looked_and_goes_on(
    reader: FlaskClient, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many entries in one go; what is further back is one click away, and a time leads there at once."""
    settle(connection, outcome("old", tag="lost", finished_at_ms=NOW_MS))
    for number in range(1500):
        connection.xadd(KEYS.outcomes, {"outcome": outcome(f"r{number}", kind=OutcomeKind.CANCELLED).encode()})
    monkeypatch.setattr(queries, "DEPTH", 1200)

    text = page(reader, "/outcomes?tag=lost")
    words = cells(text)
    assert "No outcome that matches is in this part of the ledger." in words
    assert re.search(
        r"Looked at 1,200 entries of the ledger, back to \S+ \S+ UTC; there are older ones, and no more than", words
    )
    link = re.search(r'rel="next" href="([^"]+)">look further back', text)
    assert link is not None
    assert ids(page(reader, unescape(link[1]))) == ["old"]


@pytest.mark.parametrize("address", ["/outcomes", "/failed"])
def test_wrong_input_is_answered_with_all_that_was_typed(
    reader: FlaskClient, connection: redis.Redis, address: str
) -> None:
    """400 with the field, the value and the way out; the fields stay as they were typed."""
    settle(connection, outcome("r1"))
    typed = {"kind": "gone", "account": "desk2", "symbol": "BTCUSDT", "tag": '<b>"x"', "from": "noon", "until": "2026"}

    answer = reader.get(address, query_string=typed | {"kind": ""})
    assert answer.status_code == 400
    assert "from='noon': must be a time in UTC, as 2026-11-29 or 2026-11-29 09:30." in unescape(answer.text)
    for value in [*typed.values()][1:]:
        assert f'value="{value}"' in unescape(answer.text).replace('<b>"x"', '<b>"x"')
    answer = reader.get(address, query_string=typed)
    assert "kind='gone': must be one of " in unescape(answer.text)
    assert "<option selected>gone</option>" in answer.text
    assert reader.get("/outcomes?before=x").status_code == 400


# --- banners ------------------------------------------------------------------------------------------------------


def test_every_page_says_that_the_queue_is_suspended_and_that_no_worker_lives(
    operator: FlaskClient, client: CancelClient, connection: redis.Redis, workers: Workers
) -> None:
    """In red, on errors too, until it is over; whoever has not logged in is not told."""
    (ticket,) = orders(client, 1)
    settle(connection, outcome("r1"))
    everywhere = [(path, 200) for path in (*PAGES, "/retry?id=r1", f"/requests/{ticket.id}?live=1", "/?live=1")]
    everywhere += [("/nothing", 404), ("/requests/unknown", 404), ("/failed?kind=x", 400)]
    connection.set(KEYS.suspended, 1)

    for path, code in everywhere:
        alerts = re.findall(r'<p class="alert bad" role="alert">(.*?)</p>', page(operator, path, code))
        assert [alert for alert in alerts if "<strong>Suspended.</strong>" in alert], path
        assert [alert for alert in alerts if "<strong>No live worker" in alert], path
    connection.delete(KEYS.suspended)
    workers.start()
    for path, code in everywhere:
        text = page(operator, path, code)
        assert "Suspended." not in text, path
        assert "No live worker" not in text, path
    connection.set(KEYS.suspended, 1)
    operator.delete_cookie("cancel_queue_login")
    assert "Suspended." not in page(operator, "/queued", 401)


# --- history ------------------------------------------------------------------------------------------------------


def test_history_draws_what_workers_have_counted(
    reader: FlaskClient, client: CancelClient, workers: Workers, exchange: RunningExchange
) -> None:
    """Outcomes and latencies of the last hour and day, as drawings with words and as tables; the status has one."""
    workers.start()
    (order,) = exchange.add_orders()
    client.cancel(algo_id=order.algo_id).wait(30)
    client.cancel(algo_id=5, account="nobody").wait(30)

    text = page(reader, "/history")

    words = cells(text)
    assert words.count("1 off the book, 0 triggered, 1 failed; ") == 2
    assert len(re.findall(r"In the last (?:hour|day): p50 [\d.]+ m?s, p99 [\d.]+ m?s", words)) == 4
    assert text.count("<svg") == text.count("<desc ") == 6
    rows = re.findall(r" \d\d:\d\d:\d\d (\d+) (\d+) (\d+) ", words)
    assert [sum(map(int, column)) for column in zip(*rows, strict=True)] == [2, 0, 2]  # the hour's and the day's
    assert "1 off the book, 0 triggered, 1 failed; " in cells(page(reader, "/?refresh=0"))
    assert "<script" not in text


def test_without_counts_history_says_so(reader: FlaskClient, connection: redis.Redis) -> None:
    """On a queue that workers of an older version serve, and where a key is of the wrong type."""
    assert "Nothing has been counted yet" in page(reader, "/history")
    connection.rpush(KEYS.counts, "x")
    connection.rpush(KEYS.minutes, "x")
    text = page(reader, "/history")
    assert "Nothing has been counted yet" in text
    assert f"<bdi>{KEYS.counts}</bdi> is of the wrong type" in text
    assert f"<bdi>{KEYS.minutes}</bdi> is of the wrong type" in text
