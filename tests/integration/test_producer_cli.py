"""``python -m producer`` as a shell meets it: real processes, exit codes, stdout and stderr apart."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from producer import CancelClient, CancelRequest
from producer.keys import Keys
from producer.message import decode_outcome
from tests.commands import Shell, one_line
from tests.exporting import append, record
from tests.fault.proxy import Proxy
from tests.loopback import certificate
from tests.servers import ROOT, Peek, Valkey, Workers, eventually, running_valkey
from tests.strategies import PASSWORD, blocked, calls, fail
from worker.sandbox.control import RunningExchange

KEYS = Keys()
LARGEST = 2**63 - 1


@pytest.fixture
def shell(valkey: Valkey) -> Shell:
    """The command line on the server of the tests."""
    return Shell(valkey.url)


def objects(stdout: str) -> list[dict[str, Any]]:
    """One JSON object for each line, and nothing else."""
    return [json.loads(line) for line in stdout.splitlines()]


@pytest.mark.parametrize(
    ("words", "streams", "code"),
    [
        ("cancel --algo-id 7", ">/dev/full", 0),
        ("cancel --algo-id 7 --json", ">/dev/full 2>/dev/full", 0),
        ("cancel --algo-id 7", "<&- >&- 2>&-", 0),
        ("cancel --algo-id 7 --wait 0.1 --json", ">/dev/full", 3),
        ("cancel --algo-id seven", "2>/dev/full", 2),
        ("cancel --from-file -", "<&-", 2),
        ("status", ">/dev/full", 0),
        ("outcome nobody-knows", "2>&-", 1),
        ("status --redis-url redis://127.0.0.1:1/0", ">&- 2>/dev/full", 4),
        ("status --watch", ">/dev/full", 1),  # what goes on ends with its reader
        ("metrics --host a..b", "", 2),
        ("web --host a..b --public-read", "", 2),
    ],
)
def test_streams_that_take_nothing(words: str, streams: str, code: int, shell: Shell, peek: Peek) -> None:
    """Where what is said can reach nobody, the exit code is what it would have been, and what was asked is done."""
    call = f"exec {shlex.join(shell.command(*words.split()))} {streams}"
    done = subprocess.run(
        ["bash", "-c", call], cwd=ROOT, env=shell.environment, capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert len(peek.waiting()) == words.startswith("cancel --algo-id 7")


# --- cancel -------------------------------------------------------------------------------------------------------


def test_cancel_prints_a_ticket_for_each_request_in_the_order_given(
    shell: Shell, client: CancelClient, connection: redis.Redis, tmp_path: Path
) -> None:
    """Ids of both kinds and files come out as they were mixed, duplicates too, 64 bits exact."""
    file = tmp_path / "ids.txt"
    file.write_text(f'# tonight\n3\n{{"algo_id": {LARGEST}, "account": "desk3"}}\n')
    done = shell(
        *("cancel", "--json", "--client-algo-id", "stop-1", "--algo-id", "1", "--from-file", str(file)),
        *("--algo-id", "3", "--client-algo-id", "stop-2", "--account", "desk2", "--deadline", "60"),
        *("--symbol", "BTCUSDT"),
    )

    assert (done.returncode, done.stderr) == (0, "")
    tickets = objects(done.stdout)
    assert [list(ticket) for ticket in tickets] == [["id", "algo_id", "client_algo_id", "account", "duplicate"]] * 6
    assert [tuple(ticket.values())[1:] for ticket in tickets] == [
        (None, "stop-1", "desk2", False),
        (1, None, "desk2", False),
        (3, None, "desk2", False),
        (LARGEST, None, "desk3", False),
        (3, None, "desk2", True),
        (None, "stop-2", "desk2", False),
    ]
    assert str(LARGEST) in done.stdout
    assert tickets[4]["id"] == tickets[2]["id"]
    assert connection.llen(KEYS.waiting) == 5
    assert client.job(tickets[5]["id"]).args == [
        {"v": 1, "account": "desk2", "client_algo_id": "stop-2", "deadline_s": 60.0, "symbol": "BTCUSDT"}
    ]


def test_cancel_reads_ids_from_a_pipe_and_speaks_to_people(shell: Shell) -> None:
    """`--from-file -` takes stdin; without --json the lines are aligned words."""
    done = shell("cancel", "--from-file", "-", "--urgent", stdin="17\r\nstop-17\n\n17\n")

    assert (done.returncode, done.stderr) == (0, "")
    rows = [re.split(r" {2,}", line) for line in done.stdout.splitlines()]
    assert [row[1:] for row in rows] == [
        ["algo_id=17", "account=default", "accepted"],
        ["client_algo_id=stop-17", "account=default", "accepted"],
        ["algo_id=17", "account=default", "joined an open request"],
    ]
    assert len({line.index("account=") for line in done.stdout.splitlines()}) == 1


def test_one_bad_line_and_nothing_of_the_call_is_enqueued(shell: Shell, connection: redis.Redis) -> None:
    """Bad lines are told with number, value and rule; good ones and the other options' ids are not enqueued either."""
    done = shell("cancel", "--algo-id", "1", "--from-file", "-", stdin='2\n0\n{"algo_id": "x"}\n3\n')

    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.removeprefix("Error: ").splitlines()
    assert [line.split(": ")[0] for line in lines] == ["stdin:2", "stdin:3", "nothing was enqueued"]
    assert "algo_id='x': must be a whole number" in lines[1]
    assert connection.dbsize() == 0


def test_waiting_for_orders_that_go_ends_with_0(shell: Shell, workers: Workers, exchange: RunningExchange) -> None:
    """With --wait the records come out, in the order given, and 0 says that all orders are off the book."""
    first, second = (order.algo_id for order in exchange.add_orders(2))
    exchange.cancel(second)
    workers.start()

    done = shell("cancel", "--json", "--wait", "10", *(f"--algo-id={i}" for i in (second, first, second)))

    assert (done.returncode, done.stderr) == (0, "")
    records = [decode_outcome(line) for line in done.stdout.splitlines()]
    assert [(record.algo_id, record.kind.value) for record in records] == [
        (second, "already_cancelled"),
        (first, "cancelled"),
        (second, "already_cancelled"),
    ]
    assert records[0] == records[2]


def test_an_order_that_is_not_off_the_book_ends_with_1(
    shell: Shell, workers: Workers, exchange: RunningExchange
) -> None:
    """A triggered order, even a FINISHED one, and a refused request are 1, also when another one has no outcome yet."""
    triggered, cancelled = (order.algo_id for order in exchange.add_orders(2))
    exchange.trigger(triggered, finished_after_ms=0)
    workers.start()

    done = shell("cancel", "--wait", "0.8", f"--algo-id={triggered}", f"--algo-id={cancelled}", "--algo-id=5")

    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert re.search(
        r"triggered +not live +now order \d+ BTCUSDT, status FINISHED, which is FILLED, executed 0.01$", lines[0]
    )
    assert re.search(r"cancelled +not live", lines[1])
    assert re.search(r"algo_id=5 +- +MAY BE LIVE +no outcome yet$", lines[2])


def test_no_outcome_in_time_ends_with_3(shell: Shell, connection: redis.Redis) -> None:
    """The wait takes its time and no longer, looks in one MGET, and what is missing has kind null."""
    connection.config_resetstat()
    began = time.monotonic()
    done = shell("cancel", "--json", "--wait", "0.3", "--algo-id", "1", "--client-algo-id", "x")

    assert 0.3 <= time.monotonic() - began < 5
    assert (done.returncode, done.stderr) == (3, "")
    assert [list(row.items())[1:] for row in objects(done.stdout)] == [[("kind", None)]] * 2
    assert connection.llen(KEYS.waiting) == 2
    assert calls(connection, "mget") < 60


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP)]
)
def test_a_wait_that_is_interrupted_gives_the_ids(
    number: signal.Signals, code: int, shell: Shell, connection: redis.Redis
) -> None:
    """Ctrl-C (130), a supervisor's signal and a closed terminal end the waiting; the requests go on, and their ids are
    printed all the same."""
    connection.config_resetstat()
    with shell.running("cancel", "--json", "--wait", "60", "--algo-id", "1") as process:
        eventually(lambda: calls(connection, "mget"), what="it waits")
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=10)

    assert process.returncode == code
    assert [objects(stdout)[0][name] for name in ("kind", "error")] == [None, "interrupted; the request goes on"]
    assert one_line(stderr) == "interrupted; the requests go on"


def test_a_server_that_dies_during_the_wait_ends_with_4() -> None:
    """What was enqueued is printed with its id, the one line on stderr says why there is no more."""
    with (
        running_valkey() as server,
        redis.Redis(port=server.port) as connection,
        Shell(server.url).running("cancel", "--json", "--wait", "60", "--algo-id", "1") as process,
    ):
        eventually(lambda: calls(connection, "mget"), what="it waits")
        server.stop(signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=10)

    assert process.returncode == 4
    assert len(objects(stdout)[0]["id"]) == 32
    assert "Redis did not answer" in one_line(stderr)


def test_a_long_wait_shows_progress_on_a_terminal(shell: Shell) -> None:
    """On a terminal a bar is drawn on stderr; stdout stays clean."""
    leader, follower = pty.openpty()
    with shell.running("cancel", "--json", "--wait", "0.4", "--algo-id", "1", stderr=follower) as process:
        os.close(follower)
        stdout, _ = process.communicate(timeout=10)
    drawn = b""
    with contextlib.suppress(OSError):  # the terminal's other end is closed
        while chunk := os.read(leader, 65536):
            drawn += chunk
    os.close(leader)

    assert b"0/1" in drawn
    assert objects(stdout)[0]["kind"] is None


# --- outcome, outcomes, retry -------------------------------------------------------------------------------------


def test_a_listing_that_names_nonsense_costs_itself_alone(shell: Shell, connection: redis.Redis) -> None:
    """Of several outcomes the others are told."""
    bad = {"kind": "listed", "account": "not an account!", "symbol": "BTCUSDT", "orders": [{"algo_id": 1, "id": "o1"}]}
    connection.set(KEYS.outcome_prefix + "listing", record(1, id="listing", **bad))
    connection.set(KEYS.outcome_prefix + "good", record(2, id="good"))

    done = shell("outcome", "--json", "good", "listing")

    assert [(each["id"], each["kind"]) for each in objects(done.stdout)] == [("good", "cancelled"), ("listing", None)]
    assert (done.returncode, "account" in one_line(done.stderr)) == (1, True)


def test_outcome_tells_ended_from_open_from_unknown(
    shell: Shell, client: CancelClient, workers: Workers, exchange: RunningExchange
) -> None:
    """0 for an order off the book, 3 while there is no outcome yet, 1 for a failed kind and for an unknown id."""
    (order,) = exchange.add_orders()
    workers.start()
    ended = client.cancel(algo_id=order.algo_id)
    ended.wait(10)
    (failed,) = fail(client, workers)
    workers.all[0].stop(signal.SIGKILL)
    waiting = client.cancel(algo_id=99)

    done = shell("outcome", ended.id)
    assert (done.returncode, done.stderr) == (0, "")
    done = shell("outcome", "--json", ended.id, waiting.id)
    assert done.returncode == 3
    assert objects(done.stdout)[0]["kind"] == "cancelled"
    assert objects(done.stdout)[1] == {"id": waiting.id, "kind": None, "status": "queued"}
    done = shell("outcome", waiting.id, "nobody", failed)
    assert (done.returncode, done.stderr) == (1, "")
    words = [re.split(r" {2,}", line) for line in done.stdout.splitlines()]
    assert words[0] == [waiting.id, "-", "-", "MAY BE LIVE", "no outcome yet, queued"]
    assert words[1] == ["nobody", "-", "-", "-", "unknown id"]
    assert words[2][:4] == [failed, "algo_id=1", "refused", "MAY BE LIVE"]


def test_retry_starts_all_or_none(shell: Shell, client: CancelClient, workers: Workers) -> None:
    """An unknown id is named and ends with 2; --failed takes what there is, and nothing is no error."""
    first, second = fail(client, workers, 2)
    workers.all[0].stop(signal.SIGKILL)

    refused = shell("retry", first, "nobody")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "nobody is not among the failed requests" in one_line(refused.stderr)
    assert client.failed_ids() == [first, second]
    started = shell("retry", "--failed", "--json")
    assert (started.returncode, objects(started.stdout), started.stderr) == (0, [{"id": first}, {"id": second}], "")
    nothing = shell("retry", "--failed")
    assert (nothing.returncode, nothing.stdout) == (0, "")
    assert one_line(nothing.stderr) == "there is nothing to retry"


def test_outcomes_lists_and_follows_the_ledger(
    shell: Shell, client: CancelClient, workers: Workers, exchange: RunningExchange
) -> None:
    """Past entries come at once, new ones as they are recorded; the stream id leads back; Ctrl-C ends with 130."""
    orders = [order.algo_id for order in exchange.add_orders(2)]
    workers.start()
    client.cancel(algo_id=orders[0]).wait(10)
    with shell.running("outcomes", "--follow", "--json") as process:
        assert process.stdout is not None
        past = json.loads(process.stdout.readline())
        eventually(lambda: blocked(client) >= 2, what="it follows")
        client.cancel(algo_id=orders[1]).wait(10)
        new = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=10)

    assert (process.returncode, stdout, stderr.strip()) == (130, "", "")
    assert [past["algo_id"], new["algo_id"]] == orders
    plain = shell("outcomes", "--after", past["entry"])
    assert (plain.returncode, plain.stderr) == (0, "")
    assert re.split(r" {2,}", plain.stdout.strip())[:5] == [
        *(new["entry"], new["id"], f"algo_id={orders[1]}", "cancelled", "not live")
    ]


def test_a_reader_that_leaves_is_no_error_to_speak_of(shell: Shell, connection: redis.Redis) -> None:
    """`| head` gets its line; the command ends without a word."""
    append(connection, *(record(number) for number in range(3000)))
    for arguments in (("outcomes",), ("status",)):
        with shell.running(*arguments) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            if arguments == ("outcomes",):
                assert process.stdout.readline().endswith("not live\n")
            process.stdout.close()
            assert process.stderr.read() == ""
            assert process.wait(10) == 1


def test_what_cannot_be_read_of_the_ledger_is_named(shell: Shell, connection: redis.Redis) -> None:
    """One line on stderr says which entry, or after which one some were trimmed; the others are listed."""
    append(connection, record(1))
    entry: Any = connection.xadd(KEYS.outcomes, {"outcome": '{"v":2}'})
    append(connection, record(2), record(3))

    done = shell("outcomes", "--json")

    told = objects(done.stdout)
    assert (done.returncode, [each["algo_id"] for each in told]) == (0, [1, 2, 3])
    assert all(each["off_the_book"] for each in told)
    assert entry.decode() in one_line(done.stderr)
    connection.xtrim(KEYS.outcomes, maxlen=1, approximate=False)
    done = shell("outcomes", "--json", "--after", told[0]["entry"])
    assert (done.returncode, [each["algo_id"] for each in objects(done.stdout)]) == (0, [3])
    assert "the ledger was trimmed beyond" in one_line(done.stderr)


def test_json_is_ascii_and_terminals_are_safe(shell: Shell, client: CancelClient, connection: redis.Redis) -> None:
    """Words of strangers, wherever they stand, neither act on a terminal nor turn its lines around."""
    evil = "x\x1b]0;owned\x07\u202egnol\u2066\x9b2J"
    connection.zadd(KEYS.failed, {evil: 4e9})
    append(connection, record(1, worker=evil, error=evil, symbol=evil))
    connection.hset(KEYS.job_prefix + "job", "status", evil)
    for arguments in (("outcomes",), ("outcome", "job"), ("status",), ("retry", "--failed")):
        for option in ((), ("--json",)):
            done = shell(*arguments, *option)
            assert all(line.isprintable() for line in (done.stdout + done.stderr).splitlines())
            assert not option or done.stdout.isascii()


def test_durable_is_an_option(shell: Shell, connection: redis.Redis) -> None:
    """Without an append-only file the request is enqueued, and the exit code and a line say what is missing."""
    done = shell("cancel", "--algo-id", "1", "--durable", "--json")

    assert (done.returncode, objects(done.stdout)[0]["algo_id"]) == (1, 1)
    assert "enqueued, but this server cannot confirm it as durable" in one_line(done.stderr)
    assert connection.llen(KEYS.waiting) == 1


def test_a_record_that_cannot_be_read_is_named(shell: Shell, connection: redis.Redis) -> None:
    """It hides no other outcome, of those asked for or waited for; nobody can say that its order is off the book."""
    connection.set(KEYS.outcome_prefix + f"{1:032x}", record(1))
    connection.set(KEYS.outcome_prefix + "bad", '{"v":2}')

    done = shell("outcome", "bad", f"{1:032x}")

    assert done.returncode == 1
    assert objects(shell("outcome", "bad", "--json").stdout) == [
        {"id": "bad", "kind": None, "status": None, "error": "its record cannot be read"}
    ]
    bad, good = done.stdout.splitlines()
    assert bad.endswith("MAY BE LIVE  its record cannot be read")
    assert "cancelled" in good
    assert "outcome of bad" in one_line(done.stderr)


def test_waiting_ends_with_a_record_that_cannot_be_read(
    shell: Shell, client: CancelClient, connection: redis.Redis
) -> None:
    """Nothing better can come of it, nor of one about another order, so nobody waits until the time is up, and the
    other tickets get their outcomes."""
    tickets = [client.cancel(algo_id=number) for number in (1, 2, 3)]
    for ticket, text in zip(
        tickets, ('{"v":2}', record(2, id=tickets[1].id), record(4, id=tickets[2].id)), strict=True
    ):
        connection.set(KEYS.outcome_prefix + ticket.id, text)
    began = time.monotonic()

    done = shell("cancel", *(f"--algo-id={number}" for number in (1, 2, 3)), "--wait", "20")

    assert time.monotonic() - began < 15
    assert done.returncode == 1
    assert ["its record cannot be read" in line for line in done.stdout.splitlines()] == [True, False, True]
    assert "cancelled" in done.stdout.splitlines()[1]
    assert [f"outcome of {ticket.id}" in done.stderr for ticket in tickets] == [True, False, True]
    assert "it is about another order: algo_id=4, not 3" in done.stderr


# --- status -------------------------------------------------------------------------------------------------------


def test_status_is_one_object_or_a_page(shell: Shell, client: CancelClient, workers: Workers) -> None:
    """--json gives every figure on one line; without it each has its labelled line, workers a row each."""
    workers.start()
    fail(client, workers)
    eventually(lambda: client.status().workers[0].failed == 1, 5, "the worker has told of its jobs")
    done = shell("status", "--json")

    assert (done.returncode, done.stderr) == (0, "")
    (seen,) = objects(done.stdout)
    assert set(seen) == {
        *("queue", "at_ms", "queued", "oldest_queued_s", "gated_s", "in_flight", "to_be_taken_over", "scheduled"),
        *("failed", "suspended", "gates", "keys", "used_weight", "weight_limit", "outcomes_last_minute"),
        *("outcomes_partial", "latency_ms", "workers", "damaged"),
    }
    assert (seen["queue"], seen["queued"], seen["failed"]) == ("cancels", 0, 1)
    assert seen["outcomes_last_minute"] == {"refused": 1}
    (worker,) = seen["workers"]
    assert (worker["pid"], worker["failed"]) == (workers.all[0].process.pid, 1)
    page = shell("status", CANCEL_QUEUE="elsewhere").stdout
    assert re.search(r"^queue +elsewhere$", page, re.MULTILINE)
    assert re.search(r"^workers +0$", page, re.MULTILINE)


def test_watching_goes_on_through_an_outage_until_it_is_interrupted() -> None:
    """A new status each second; while Redis refuses a line on stderr says so; Ctrl-C ends with 130."""
    with (
        running_valkey() as server,
        redis.Redis(port=server.port) as connection,
        Shell(server.url).running("status", "--watch", "--json") as process,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        first = json.loads(process.stdout.readline())
        connection.config_set("requirepass", "another")
        connection.client_kill_filter(skipme=True, _type="normal")
        assert "Redis refused the login" in process.stderr.readline()
        connection.config_set("requirepass", "")
        second = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=10)

    assert second["at_ms"] >= first["at_ms"] + 1000
    assert process.returncode == 130
    assert "Traceback" not in stderr


# --- bad days -----------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_ends_with_4(valkey: Valkey, connection: redis.Redis) -> None:
    """One line: what failed, where, why; no traceback, and of the URL neither user nor password."""
    with Proxy(valkey.port) as proxy:
        port = proxy.port
    gone = Shell(f"redis://user:{PASSWORD}@127.0.0.1:{port}/0")("cancel", "--algo-id", "1")
    assert (gone.returncode, gone.stdout) == (4, "")
    assert "(ConnectionError: Connection refused)" in one_line(gone.stderr)
    assert f"[redis://127.0.0.1:{port}/0]" in gone.stderr
    refused = Shell(f"redis://user:{PASSWORD}@127.0.0.1:{valkey.port}/0")("status")
    assert (refused.returncode, refused.stdout) == (4, "")
    assert "Redis refused the login" in one_line(refused.stderr)
    assert PASSWORD not in gone.stderr + refused.stderr
    assert connection.dbsize() == 0


def test_tls_is_verified_unless_the_settings_say_otherwise(valkey: Valkey, tmp_path: Path) -> None:
    """A self-signed server is refused with a hint; REDIS_TLS_CA vouches for it, REDIS_TLS_VERIFY=none does not ask."""
    cert_path, key_path = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert_path, key_path)
    with Proxy(valkey.port, context) as proxy:
        shell = Shell(proxy.redis_url)
        refused = shell("status")
        assert refused.returncode == 4
        assert "see REDIS_TLS_CA and REDIS_TLS_VERIFY" in one_line(refused.stderr)
        assert shell("status", REDIS_TLS_CA=cert_path).returncode == 0
        assert shell("status", REDIS_TLS_VERIFY="none").returncode == 0
        assert shell("status", "--redis-url", f"{proxy.redis_url}?ssl_cert_reqs=none").returncode == 0
        for verify in ("required", ""):
            assert shell("status", REDIS_TLS_VERIFY=verify).returncode == 4


def test_nothing_of_the_worker_is_needed(shell: Shell) -> None:
    """The command line runs where neither the worker's code nor an HTTP client can be imported."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('worker', 'requests', 'rich')));"
        "from producer.__main__ import main; sys.exit(main(['cancel', '--algo-id', '1', '--wait', '0']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=shell.environment, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (3, "")


def test_a_plain_terminal_gets_plain_progress(client: CancelClient, capsys: pytest.CaptureFixture[str]) -> None:
    """Where stderr is no terminal a line every few seconds says how far the waiting has come."""
    from producer import console

    tickets = client.cancel_many(CancelRequest(algo_id=number) for number in range(1, 1202))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "PROGRESS_S", 0.1)
        with console.progress(len(tickets)) as shown:
            console.collect(client, {ticket.id: ticket.request for ticket in tickets}, 0.3, {}, shown)

    assert re.search(r"^0 of 1,201 have an outcome after \d+ s$", capsys.readouterr().err, re.MULTILINE)
