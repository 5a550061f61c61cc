"""``python -m producer metrics``: a real exporter process, scraped over HTTP, beside a real server and real workers."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from producer import CancelClient
from producer.keys import Band, Keys
from producer.message import OutcomeKind
from tests.exporting import Exporter, append, exporting, outcomes, record
from tests.holders import OpenHolder, ended, orders
from tests.servers import Valkey, Workers, eventually, free_port, running_valkey
from worker.sandbox.control import RunningExchange

KEYS = Keys()
CLOCK = "cancel_clock_offset_seconds"


@pytest.fixture
def exporter(valkey: Valkey) -> Iterator[Exporter]:
    """One on the server of the tests, from whose first scrape on it counts the ledger."""
    with exporting(valkey.url) as running:
        running.scrape()
        yield running


# --- counters -----------------------------------------------------------------------------------------------------


def test_real_outcomes_are_counted_exactly(
    exporter: Exporter, client: CancelClient, workers: Workers, exchange: RunningExchange
) -> None:
    """Outcomes by kind and account, attempts by verdict, replies by code, and the two times, each exactly once."""
    orders = [order.algo_id for order in exchange.add_orders(5)]
    exchange.trigger(orders[4])
    workers.start()
    tickets = [client.cancel(algo_id=algo_id) for algo_id in orders] + [client.cancel(algo_id=9, account="nobody")]
    ended = [ticket.wait(30) for ticket in tickets]

    exporter.scrape()  # what was counted once is not counted again
    seen = exporter.scrape()

    def total(name: str) -> dict[tuple[str, ...], float]:
        return {tuple(value for _, value in labels): n for (each, labels), n in seen.items() if each == name and n}

    assert total("cancel_outcomes_total") == {("cancelled",): 4, ("triggered",): 1, ("refused",): 1}
    assert total("cancel_account_outcomes_total") == {
        ("default", "cancelled"): 4,
        ("default", "triggered"): 1,
        ("nobody", "refused"): 1,
    }
    assert total("cancel_attempts_total") == {
        ("cancel", "confirmed"): 4,
        ("cancel", "no_such_order"): 1,
        ("query", "triggered"): 1,
        ("query_child", "open"): 1,
    }
    assert total("cancel_exchange_replies_total") == {
        ("cancel", "200", "200"): 4,
        ("cancel", "-2011", "400"): 1,
        ("query", "none", "200"): 1,
        ("query_child", "none", "200"): 1,
    }
    assert seen["cancel_first_attempt_seconds_count", ()] == 5
    assert seen["cancel_outcome_seconds_count", ()] == 6
    took_s = sum(outcome.finished_at_ms - (outcome.enqueued_at_ms or 0) for outcome in ended) / 1000
    assert seen["cancel_outcome_seconds_sum", ()] == pytest.approx(took_s)
    assert seen["cancel_outcome_seconds_bucket", (("le", "+Inf"),)] == 6
    assert (seen["cancel_ledger_unreadable_total", ()], seen["cancel_ledger_missed_total", ()]) == (0, 0)
    assert seen["cancel_up", ()] == 1


def test_each_kind_has_a_series_before_it_happens(exporter: Exporter, connection: redis.Redis) -> None:
    """Prometheus sees an increase only of what was there before: all kinds begin with 0, of each account too."""
    append(connection, record(account="desk2"))
    seen = exporter.scrape()

    for kind in OutcomeKind:
        assert seen["cancel_outcomes_total", (("kind", kind.value),)] == 0
        for account in ("default", "desk2"):
            expected = 1 if (account, kind) == ("desk2", OutcomeKind.CANCELLED) else 0
            assert seen["cancel_account_outcomes_total", (("account", account), ("kind", kind.value))] == expected


def counted(connection: redis.Redis, client: CancelClient, open_holder: OpenHolder, count: int) -> None:
    """Outcomes, recorded by the script."""
    orders(client, count)
    assert set(open_holder().complete(*map(ended, open_holder().claim(count)))) == {1}


def test_a_new_exporter_goes_on_where_the_last_one_stood(
    valkey: Valkey, client: CancelClient, open_holder: OpenHolder, connection: redis.Redis
) -> None:
    """A restart takes and adds nothing: no increase is seen that did not happen, and what happened meanwhile is. What
    the ledger told before is not counted again."""
    for before in (0, 3, 6):
        with exporting(valkey.url) as exporter:
            seen = exporter.scrape()
            assert (outcomes(seen, "cancel_outcomes_total"), outcomes(seen)) == (before, 0)
            assert seen["cancel_outcome_seconds_count", ()] == 0  # none of these tells when it was enqueued
            counted(connection, client, open_holder, 2)
            seen = exporter.scrape()
            assert (outcomes(seen, "cancel_outcomes_total"), outcomes(seen)) == (before + 2, 2)
            assert time.time() - 30 < seen["cancel_exporter_start_time_seconds", ()] <= time.time()
        counted(connection, client, open_holder, 1)


def test_counts_do_not_fall_with_a_failover(
    exporter: Exporter, client: CancelClient, open_holder: OpenHolder, connection: redis.Redis
) -> None:
    """An earlier state of the counts is no reset, which Prometheus would take for all of them once more; another one's,
    begun anew, are told as they are; a key that is gone or damaged makes none fall."""
    counted(connection, client, open_holder, 4)
    earlier = connection.get(KEYS.counts)
    counted(connection, client, open_holder, 2)

    def total() -> float:
        return outcomes(exporter.scrape(), "cancel_outcomes_total")

    assert (total(), type(earlier)) == (6, bytes)
    connection.set(KEYS.counts, earlier)  # type: ignore[arg-type]
    assert total() == 6
    counted(connection, client, open_holder, 3)
    assert total() == 7
    connection.delete(KEYS.counts)
    assert total() == 7
    connection.rpush(KEYS.counts, "x")
    assert total() == 7
    counted(connection, client, open_holder, 2)
    assert total() == 2


def test_entries_that_were_trimmed_unread_are_told(exporter: Exporter, connection: redis.Redis) -> None:
    """Between two scrapes the ledger may lose what nobody read: counted as missed, never as an outcome."""
    append(connection, *(record(number) for number in range(10)))
    assert outcomes(exporter.scrape()) == 10
    append(connection, *(record(number) for number in range(30)), maxlen=12, approximate=False)

    seen = exporter.scrape()

    assert (outcomes(seen), seen["cancel_ledger_missed_total", ()]) == (22, 18)
    append(connection, record())
    connection.xtrim(KEYS.outcomes, 0, approximate=False)
    seen = exporter.scrape()
    assert (outcomes(seen), seen["cancel_ledger_missed_total", ()]) == (22, 19)
    seen = exporter.scrape()
    assert (outcomes(seen), seen["cancel_ledger_missed_total", ()]) == (22, 19)


def test_a_ledger_that_begins_anew_is_counted_on(exporter: Exporter, connection: redis.Redis) -> None:
    """Deleted, seen or unseen, or with an older state: nothing twice, no step down, and what is trimmed is told."""
    append(connection, *(record(number) for number in range(7)))
    assert outcomes(exporter.scrape()) == 7
    connection.delete(KEYS.outcomes)
    append(connection, record(), record())
    seen = exporter.scrape()
    assert (outcomes(seen), seen["cancel_ledger_missed_total", ()]) == (9, 0)
    connection.delete(KEYS.outcomes)
    assert outcomes(exporter.scrape()) == 9
    append(connection, *(record(number) for number in range(30)), maxlen=12, approximate=False)
    seen = exporter.scrape()
    assert (outcomes(seen), seen["cancel_ledger_missed_total", ()]) == (21, 18)
    older = connection.dump(KEYS.outcomes)
    append(connection, *(record(number) for number in range(5)))
    assert outcomes(exporter.scrape()) == 26
    assert older is not None
    connection.restore(KEYS.outcomes, 0, older, replace=True)
    assert outcomes(exporter.scrape()) == 26
    append(connection, record(), record())
    seen = exporter.scrape()
    assert (outcomes(seen), seen["cancel_ledger_missed_total", ()]) == (28, 18)


def test_unreadable_entries_are_counted_and_passed(exporter: Exporter, connection: redis.Redis) -> None:
    """What is no outcome of this version neither stops the reading nor counts as one."""
    for fields in ({"outcome": "{"}, {"other": "x"}, {"outcome": b"\xff\xfe"}, {"outcome": record(v=2)}):
        connection.xadd(KEYS.outcomes, fields)  # type: ignore[arg-type]
    append(connection, record(attempts=[{"n": 1}]), record())

    seen = exporter.scrape()

    assert (outcomes(seen), seen["cancel_ledger_unreadable_total", ()]) == (1, 5)


def test_keys_of_the_wrong_type_are_counted(exporter: Exporter, connection: redis.Redis) -> None:
    """They cost their own figures, and neither the scrape nor what is counted of the ledger once it is one again."""
    append(connection, record())
    assert outcomes(exporter.scrape()) == 1
    connection.delete(KEYS.outcomes)
    connection.set(KEYS.outcomes, "no stream")
    connection.set(KEYS.claiming, "no list")
    connection.rpush(KEYS.waiting, "waits")

    seen = exporter.scrape()

    assert (seen["cancel_up", ()], seen["cancel_damaged_keys", ()], seen["cancel_queue_depth", ()]) == (1, 2, 1)
    connection.delete(KEYS.outcomes, KEYS.claiming)
    append(connection, record())
    seen = exporter.scrape()
    assert (outcomes(seen), seen["cancel_damaged_keys", ()]) == (2, 0)


# --- labels -------------------------------------------------------------------------------------------------------


def test_labels_are_bounded_and_well_formed(exporter: Exporter, connection: redis.Redis) -> None:
    """64 accounts have series of their own, the rest and whatever is no account is `other`; no id is a label."""
    hostile = ['x"} 1\nup 0', "x\\", "UPPER", "a" * 33, "", "\u202e"]
    append(connection, *(record(number, account=f"a{number}") for number in range(100)))
    append(connection, *(record(account=account) for account in hostile), record(account=None))
    attempt = json.loads(record())["attempts"][0]
    odd = [attempt | {"code": code, "http": http} for code, http in ((None, None), (10**12, 0), (0, 99_999), (-1, 200))]
    append(connection, record(attempts=odd), record(attempts=[attempt | {"verdict": 'v"\\'}]))
    append(connection, record(attempts=[attempt | {"code": number, "verdict": f"v{number}"} for number in range(1000)]))
    calls = [*hostile[1:], *(f"call{number}" for number in range(20))]
    append(connection, record(attempts=[attempt | {"call": call} for call in calls]))

    text, seen = exporter.text(), exporter.scrape()

    accounts = {dict(labels)["account"] for (name, labels) in seen if name == "cancel_account_outcomes_total"}
    assert len(accounts) == 64 + 2
    # `default`, which has its place from the start, is one of the 64, and the account of four records.
    assert seen["cancel_account_outcomes_total", (("account", "default"), ("kind", "cancelled"))] == 4
    assert seen["cancel_account_outcomes_total", (("account", "other"), ("kind", "cancelled"))] == 37 + 6
    assert seen["cancel_account_outcomes_total", (("account", "none"), ("kind", "cancelled"))] == 1
    replies = {labels: value for (name, labels), value in seen.items() if name == "cancel_exchange_replies_total"}
    assert len(replies) <= 256 + 9
    assert replies[("call", "cancel"), ("code", "none"), ("http", "none")] == 1
    assert replies[("call", "cancel"), ("code", "other"), ("http", "other")] > 700
    assert sum(replies.values()) == 107 + 4 + 1 + 1000 + 25
    labels = [dict(labels) for (name, labels) in seen if name == "cancel_attempts_total"]
    assert len({each["verdict"] for each in labels}) == 32 + 1
    assert len({each["call"] for each in labels}) == 8 + 1
    assert f"{7:032x}" not in text
    assert "\nup 0" not in text


# --- gauges -------------------------------------------------------------------------------------------------------


def test_gauges_are_the_status(exporter: Exporter, client: CancelClient, connection: redis.Redis) -> None:
    """Depth, latency, schedule, failures, suspension, gate and keys as a status shows them. What nobody tells is left
    out, and accounts of odd names share a label."""
    seen = exporter.scrape()
    idle = ("queue_depth", "queue_latency_seconds", "queue_gated_seconds", "suspended", "workers", "damaged_keys")
    assert [seen[f"cancel_{name}", ()] for name in idle] == [0] * len(idle)
    assert seen["cancel_gate_seconds", (("scope", "all"),)] == 0
    unknown = {"cancel_used_weight", "cancel_weight_limit", CLOCK, "cancel_key_held_back"}
    assert not {name for name, _ in seen} & unknown

    now_ms = int(connection.time()[0]) * 1000
    waiting, _ = (client.cancel(algo_id=number) for number in (1, 2))
    connection.zadd(KEYS.unfinished, {waiting.id: Band.WAITING + now_ms - 9_000})
    connection.zadd(KEYS.unfinished, {"x": now_ms + 60_000, "lost": 1, "lost too": now_ms - 1})
    connection.zadd(KEYS.unfinished, {"y": Band.RETRY + now_ms, "z": Band.RETRY + now_ms + 60_000})
    connection.zadd(KEYS.scheduled, {"y": 4e9, "z": 4e9})
    connection.zadd(KEYS.failed, {"f": 4e9})
    connection.set(KEYS.suspended, 1)
    connection.hset(Keys.gate("all"), mapping={"until_ms": now_ms + 60_000, "reason": "418"})
    held_back: dict[Any, Any] = {"since_ms": now_ms, "probe_at_ms": now_ms + 1}
    for account, fields in (("default", held_back), ("desk2", {}), ("X" * 50, {}), ("Y" * 50, held_back)):
        connection.sadd(KEYS.suspects, account)
        connection.hset(KEYS.breaker(account), mapping={"failures": 1, **fields})
    connection.sadd(KEYS.held("default"), "y", "z", "ended")

    seen = exporter.scrape()

    status = client.status().as_dict()
    names = ("in_flight", "scheduled", "failed", "suspended")
    assert [seen[f"cancel_{name}", ()] for name in names] == [status[name] for name in names] == [1, 2, 1, 1]
    assert (seen["cancel_queue_depth", ()], seen["cancel_expired_leases", ()]) == (2, 2)
    assert (seen["cancel_queue_latency_seconds", ()], seen["cancel_queue_gated_seconds", ()] > 9) == (0, True)
    assert seen["cancel_gate_seconds", (("scope", "all"),)] == pytest.approx(59, abs=2)
    told = {labels[0][1]: value for (name, labels), value in seen.items() if name == "cancel_key_held_back"}
    assert told == {"default": 1, "desk2": 0, "other": 1}
    assert seen["cancel_key_held_jobs", (("account", "default"),)] == 2
    connection.delete(KEYS.suspended, Keys.gate("all"), KEYS.suspects)
    connection.zrem(KEYS.unfinished, "lost", "lost too")
    seen = exporter.scrape()
    assert seen["cancel_queue_latency_seconds", ()] == pytest.approx(9.5, abs=5)
    assert seen["cancel_queue_gated_seconds", ()] == 0


def test_live_workers_alone_have_figures(
    exporter: Exporter, workers: Workers, client: CancelClient, connection: redis.Redis
) -> None:
    """Live workers are counted by the rule of the status, and the clock that is farthest off among theirs is told."""
    staying, leaving = workers.start(), workers.start()

    def clocks() -> list[float]:
        """Values of the metric: of one series without labels, or none."""
        return [value for (name, labels), value in exporter.scrape().items() if name == CLOCK and not labels]

    eventually(lambda: len(clocks()) == 1 and exporter.value("cancel_used_weight") is not None, what="a clock")
    eventually(lambda: exporter.value("cancel_workers") == 2, what="two workers")
    seen = exporter.scrape()
    assert [labels for name, labels in seen if name == CLOCK] == [()]
    assert (seen["cancel_workers", ()], seen["cancel_weight_limit", ()]) == (2, 2400)
    assert 0 <= seen["cancel_used_weight", ()] < 2400
    for name in ("silent", "stock"):
        connection.hset(KEYS.worker_prefix + name, "last_heartbeat", "2020-01-01T00:00:00.000000Z")
        connection.sadd("rq:workers:cancels", KEYS.worker_prefix + name)
    connection.hset(KEYS.worker_prefix + "silent", mapping={"c_concurrency": 64, "c_clock_offset_ms": 99000})
    # A stock RQ worker that waits is silent for minutes; one of ours that is silent is dead.
    assert exporter.value("cancel_workers") == 3
    assert abs(clocks()[0]) < 5
    connection.hset(KEYS.worker_prefix + "stock", "c_clock_offset_ms", -7500)
    assert clocks() == [-7.5]
    connection.srem("rq:workers:cancels", f"{KEYS.worker_prefix}silent", f"{KEYS.worker_prefix}stock")
    leaving.stop()
    assert exporter.value("cancel_workers") == client.status().live_workers == 1
    staying.stop()
    assert exporter.value("cancel_workers") == 0
    assert clocks() == []


# --- bad days -----------------------------------------------------------------------------------------------------


def test_a_scrape_tells_that_redis_is_away() -> None:
    """Killed: 200 with cancel_up 0, the counters as known, no gauge; back with its file: all, nothing twice."""
    with running_valkey("--appendonly", "yes", "--appendfsync", "always") as server, exporting(server.url) as exporter:
        with redis.Redis(port=server.port) as connection:
            exporter.scrape()
            append(connection, record(), record())
            assert outcomes(exporter.scrape()) == 2
            append(connection, record())
        server.stop(signal.SIGKILL)
        seen = exporter.scrape()
        assert (seen["cancel_up", ()], outcomes(seen)) == (0, 2)
        assert not {name for name, _ in seen} & {"cancel_queue_depth", "cancel_workers", "cancel_gate_seconds"}
        server.start()
        eventually(lambda: exporter.value("cancel_up") == 1, what="Redis is back")
        assert outcomes(exporter.scrape()) == 3
        assert server.process is not None
        server.process.send_signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            assert exporter.value("cancel_up") == 0
            assert time.monotonic() - began < 9  # Prometheus waits ten seconds
        finally:
            server.process.send_signal(signal.SIGCONT)
        eventually(lambda: exporter.value("cancel_up") == 1, what="Redis goes on")
        assert outcomes(exporter.scrape()) == 3


def test_an_exporter_starts_without_redis() -> None:
    """It waits for nobody: the first scrape says that Redis is away, and no password is told."""
    url = f"redis://user:secret-of-redis@127.0.0.1:{free_port()}/0"
    with exporting(url) as exporter:
        text = exporter.text()
        assert "cancel_outcomes_total{" not in text  # zeros would be an increase later
        assert 'cancel_up{queue="cancels"} 0.0' in text
        assert "secret-of-redis" not in text
        assert exporter.stop() == (0, "")


def test_a_scraper_that_hangs_up_or_says_nothing_harms_nobody(exporter: Exporter) -> None:
    """Connections that end in the middle, or bring no request, cost no traceback and keep nobody waiting."""
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.create_connection(("127.0.0.1", exporter.port)))
        for _ in range(5):
            hasty = socket.create_connection(("127.0.0.1", exporter.port))
            hasty.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            # Closed with a reset.
            hasty.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            hasty.close()
        assert exporter.value("cancel_up") == 1
        assert exporter.stop() == (0, "")
        silent.settimeout(5)
        assert silent.recv(1) == b""


# --- the command --------------------------------------------------------------------------------------------------


def test_signals_end_it_as_they_should(valkey: Valkey) -> None:
    """SIGTERM leaves with 0, also when it comes twice; Ctrl-C with 130; a closed terminal at once. The port is free."""
    port = str(free_port())
    with exporting(valkey.url, "--port", port) as exporter:
        assert exporter.url == f"http://127.0.0.1:{port}/metrics"
        exporter.process.terminate()
        assert exporter.stop() == (0, "")
    with exporting(valkey.url, "--port", port, "--host", "localhost") as exporter:
        assert exporter.url == f"http://localhost:{port}/metrics"
        assert exporter.value("cancel_up") == 1
        assert exporter.stop(signal.SIGINT) == (130, "")
    with exporting(valkey.url, "--port", port) as exporter:
        assert exporter.stop(signal.SIGHUP) == (-signal.SIGHUP, "")


@pytest.mark.parametrize(
    ("listens", "host", "status"),
    [
        *(("127.0.0.1", host, 200) for host in ("127.0.0.1", "localhost:9464", "[::1]:1", None)),
        *(
            ("127.0.0.1", host, 421)
            for host in ("evil.example", "evil.example:9464", "127.0.0.1.evil.example", "[", "")
        ),
        ("0.0.0.0", "metrics.example", 200),
    ],
)
def test_a_strangers_page_reads_nothing(listens: str, host: str | None, status: int, valkey: Valkey) -> None:
    """On loopback only who asks for this machine by a name of its own is answered: a browser there can be led to it by
    a stranger's name."""
    with exporting(valkey.url, "--host", listens) as exporter:
        asked = http.client.HTTPConnection("127.0.0.1", exporter.port, timeout=20)
        asked.putrequest("GET", "/metrics", skip_host=True)
        if host is not None:
            asked.putheader("Host", host)
        asked.endheaders()
        answer = asked.getresponse()
        assert (answer.status, b"cancel_up" in answer.read()) == (status, status == 200)
        asked.close()
