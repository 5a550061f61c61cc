"""Worker processes from start to end: bad starts, stops, kills, pauses, --burst, Ctrl-C."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import sys
from pathlib import Path

import pytest
import redis
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from producer import CancelClient, OutcomeKind
from tests.conftest import API_KEY, API_SECRET
from tests.integration.conftest import NewFleet
from tests.loopback import Server, certificate
from tests.orders import cancel_all, events, once_each, opened, outcomes, steps
from tests.servers import Peek, Valkey, Workers, eventually, members, python, running_valkey
from worker.sandbox.control import ExchangeConfig, RunningExchange, start_exchange
from worker.sandbox.faults import Fault


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LEASE_S", "soon"),
        ("BINANCE_DESK_A_API_KEY", "key-without-its-hunter2"),
        ("EGRESS_PROXY_URL", "http://u:hunter2@127.0.0.1:9"),  # beside an exchange over plain http
    ],
)
def test_bad_setting_stops_the_start(variable: str, value: str, new_fleet: NewFleet) -> None:
    """A bad setting ends the start with 78 and a line that names the variable: no traceback, no secret."""
    worker = new_fleet(**{variable: value}).start(wait=False)

    assert worker.process.wait(10) == 78
    assert variable in worker.output()
    assert not {"Traceback", "hunter2"} & set(re.findall(r"\w+", worker.output()))


def test_refused_login(new_fleet: NewFleet) -> None:
    """A login that Redis refuses ends the worker with 69, at the start and in the middle of its work."""
    with running_valkey("--requirepass", "right") as server:
        wrong = new_fleet(REDIS_URL=f"redis://:wrong-password@127.0.0.1:{server.port}/0").start(wait=False)
        none = new_fleet(REDIS_URL=server.url).start(wait=False)
        working = new_fleet(REDIS_URL=f"redis://:right@127.0.0.1:{server.port}/0")
        worker = working.start(wait=False)
        with redis.Redis(port=server.port, password="right") as connection:
            eventually(lambda: connection.scard("rq:workers"), 20, "the good one works")
            connection.config_set("requirepass", "other")
            for kind in ("normal", "pubsub"):
                connection.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
            assert worker.process.wait(15) == 69
        assert (wrong.process.wait(15), none.process.wait(15)) == (69, 69)
        for each in (wrong, none, worker):
            assert "Traceback" not in each.output()
            assert not {"wrong-password", "right@", ":right"} & set(re.split(r"[\s\"]", each.output()))
            assert "wrong-password" not in each.output()


def test_sigkill_under_load(workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek) -> None:
    """The jobs of a killed worker are taken over within a lease and 1.5 s; each still ends in one outcome."""
    victim = workers.start(LEASE_S="1", WORKER_CONCURRENCY="16")
    survivor = workers.start(LEASE_S="1", WORKER_CONCURRENCY="16")
    exchange.set_latency_ms(250)
    tickets = cancel_all(client, opened(exchange, 200))
    eventually(lambda: len(peek.ledger()) > 40, what="both are at work")

    killed_ms = peek.now_ms()
    victim.stop(signal.SIGKILL)
    (name,) = (event["worker"] for event in events(victim, "started"))
    orphans = [job_id for job_id in peek.held() if peek.job(job_id)["worker_name"] == name]
    assert orphans

    found = {outcome.id: outcome for outcome in outcomes(client, tickets, 30)}
    assert once_each(peek, tickets)
    assert {outcome.kind for outcome in found.values()} == {OutcomeKind.CANCELLED}
    for orphan in orphans:
        lost, *after = found[orphan].attempts
        assert (lost.verdict, lost.msg) == ("unclear", "worker lost")
        assert after[0].at_ms - killed_ms <= 1000 + 1500
    assert {event["id"] for event in events(survivor, "recovered")} >= set(orphans)
    assert {entry.deletes_effective for entry in exchange.book().values()} == {1}


def test_burst_leaves_when_all_is_done(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """With --burst a worker works off queue and retries, then leaves with 0."""
    ids = opened(exchange, 30)
    for algo_id in ids[:5]:
        exchange.script_faults(algo_id, [Fault.UNAVAILABLE_503] * 3)
    tickets = cancel_all(client, ids)

    worker = workers.start("--burst", wait=False)

    assert worker.process.wait(20) == 0
    assert once_each(peek, tickets)
    assert peek.kinds() == {"cancelled": 30}


# ---- health ----------------------------------------------------------------------------------------------------------


def health(workers: Workers, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of the command for probes, which is given no key."""
    given = {name: value for name, value in workers.environment.items() if not name.startswith("BINANCE_")}
    done = python("-m", "worker", "health", *arguments, **given | environment)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_probe_follows_a_workers_life(workers: Workers, peek: Peek) -> None:
    """It says 0 while a worker of this host beats, and 1 with one line before and while its loop stands still."""
    code, said = health(workers)
    assert (code, said.count("\n")) == (1, 1)
    assert "no worker of this host" in said

    worker = workers.start("--queue", "others")
    peek("HSET", "rq:worker:odd", "hostname", socket.gethostname(), "c_beat_at_ms", "9" * 5_000)
    peek("SET", "rq:worker:no-hash", "x")
    peek("SADD", "rq:workers:others", "rq:worker:odd", "rq:worker:no-hash")
    eventually(lambda: health(workers, "--queue", "others") == (0, ""), 20, "it beats, whatever else stands there")
    peek("SREM", "rq:workers:others", "rq:worker:odd", "rq:worker:no-hash")
    assert health(workers)[0] == 1
    worker.process.send_signal(signal.SIGSTOP)
    (key,) = peek("SMEMBERS", "rq:workers:others")
    peek("HSET", key, "c_beat_at_ms", peek.now_ms() - 11_000_000)
    code, said = health(workers, CANCEL_QUEUE="others")
    assert code == 1
    assert re.fullmatch(r"the last beat of a worker of this host was 11[0-9]{3} s ago\n", said)
    worker.process.send_signal(signal.SIGCONT)
    eventually(lambda: health(workers, CANCEL_QUEUE="others") == (0, ""), 20, "it beats again")
    peek("HSET", key, "hostname", "another")
    assert health(workers, CANCEL_QUEUE="others")[0] == 1


def test_a_probe_needs_redis_and_says_so(workers: Workers) -> None:
    """While Redis is away nobody knows, and the line holds no password."""
    code, said = health(workers, REDIS_URL="redis://:hunter2@127.0.0.1:1/0")
    assert (code, said.count("\n"), "hunter2" in said) == (1, 1, False)
    assert said.startswith("Redis does not answer (ConnectionError: ")


# ---- what a start tells and keeps ------------------------------------------------------------------------------------

#: Before a command line of the project's, or of RQ's: each process, asked by a signal, tells whether others may look
#: into its memory.
TELLS_DUMPABLE = (
    "import ctypes, os, signal, sys; "
    "signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b'%d dumpable=%d\\n' % (os.getpid(), "
    "ctypes.CDLL(None).prctl(3)))); "
)
WORKER, RQ = "from worker.__main__ import start; start()", "from rq.cli import main; main()"
STOCK = ("worker", "cancels", "--serializer", "json", "--url")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux' own ways")
@pytest.mark.parametrize("arguments", [(), ("check",), ("rehearse",), STOCK], ids=lambda words: " ".join(words[:1]))
def test_what_holds_a_key_keeps_it(
    arguments: tuple[str, ...], workers: Workers, valkey: Valkey, client: CancelClient, exchange: RunningExchange
) -> None:
    """Worker, check, rehearsal and the process that a stock worker forks for a job write no core file, let no other
    process of their user look into their memory, and go past whatever proxies the environment names."""
    (order,) = exchange.add_orders(1)
    exchange.set_latency_ms(20_000)
    is_stock = arguments == STOCK
    words = (*arguments, valkey.url) if is_stock else arguments
    proxy = Server(lambda peer: peer.wait_until_closed())
    names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
    workers.environment |= dict.fromkeys(names, proxy.url) | {
        "NO_PROXY": "",
        "no_proxy": "",
        "BINANCE_RECV_WINDOW_MS": "30000",
    }
    code = TELLS_DUMPABLE + (RQ if is_stock else WORKER)
    try:
        process = workers.start(*words, command=(sys.executable, "-c", code), wait=False)
        if is_stock:
            client.cancel(algo_id=order.algo_id)
        eventually(lambda: exchange.stats().in_flight, 30, "it asks the exchange")
        pids = members(process.process.pid)
        for pid in pids:
            os.kill(pid, signal.SIGUSR1)
        eventually(lambda: process.output().count("dumpable=") == len(pids), 20, "each tells")
        told = dict(re.findall(r"^(\d+) dumpable=(\d)$", process.output(), re.MULTILINE))
        assert told[str(pids[-1])] == "0"
        assert resource.prlimit(pids[-1], resource.RLIMIT_CORE) == (0, 0)
        assert proxy.connections == 0
    finally:
        workers.stop()
        proxy.close()


def test_a_start_names_accounts_and_what_is_unsafe(workers: Workers, tmp_path: Path) -> None:
    """Which accounts are served and which are left out is logged, and that others can read a key's file."""
    path = tmp_path / "key.pem"
    key = Ed25519PrivateKey.generate()
    form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, none))
    path.chmod(0o644)
    worker = workers.start(
        BINANCE_ACCOUNTS="default,desk",
        BINANCE_DESK_API_KEY="d",
        BINANCE_DESK_PRIVATE_KEY=str(path),
        BINANCE_TESTNET_API_KEY="t",
    )
    (started,) = events(worker, "started")
    assert (started["accounts"], started["accounts_left_out"]) == ('"default,desk"', "testnet")
    (warning,) = events(worker, "setting")
    assert "BINANCE_DESK_PRIVATE_KEY names a file that others may use (mode 0644)" in warning["problem"]


def test_an_authority_of_ones_own(new_fleet: NewFleet, client: CancelClient, tmp_path: Path) -> None:
    """EXCHANGE_TLS_CA lets a worker trust an exchange (or what speaks for it) that only this authority vouches for."""
    cert_path, key_path = certificate(tmp_path)
    accounts = {"default": (API_KEY, API_SECRET)}
    config = ExchangeConfig(accounts=accounts, tls_cert_path=cert_path, tls_key_path=key_path)
    with start_exchange(config) as exchange:
        fleet = new_fleet(BINANCE_BASE_URL=exchange.url)
        stranger = fleet.start()
        (order,) = exchange.add_orders(1)
        refused = client.cancel(algo_id=order.algo_id, deadline_s=2).wait(20)
        assert set(steps(refused)) == {"not_sent"}
        stranger.stop()
        fleet.start(EXCHANGE_TLS_CA=cert_path)
        assert client.cancel(algo_id=order.algo_id).wait(20).kind is OutcomeKind.CANCELLED
