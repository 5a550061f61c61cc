"""`python -m producer web` as operators run it: a real server process, real HTTP, a real worker's outcomes."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from producer import CancelClient
from tests.commands import Shell, one_line
from tests.servers import ROOT, Valkey, eventually, free_port, python, running_valkey, scrubbed
from tests.webpages import LARGEST, TOKEN, WebProcess

#: More than the server has threads.
_CROWD = 40
#: More than it has connections.
_VISITORS = 450


def test_the_server_says_little_of_itself(valkey: Valkey) -> None:
    """No name of a product, no redirect to a stranger's host, strict headers on every answer, errors too."""
    with WebProcess(valkey.url, WEB_TOKEN=TOKEN) as web:
        for path in ("/", "//evil.example/", "/failed/", "/nothing", "/style.css", "/healthz", "/%ff", "/login"):
            answer = web(path, Host="evil.example")
            assert answer.status in (200, 401)
            assert answer.headers.get("Location") is None
            assert answer.headers.get("Server") is None
            assert answer.headers["Cache-Control"] == "no-store"
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert web("/", method="TRACE").status in (401, 403, 405)
        assert web("/login", {"token": "x" * 600_000}).status == 413


def test_without_a_token_loopback_may_read(valkey: Valkey) -> None:
    """Nothing is asked for, nothing can be changed, and only names of this machine are answered."""
    with WebProcess(valkey.url) as web:
        assert (web("/failed").status, web("/retry/start", {"id": "x"}).status) == (200, 403)
        assert web("/", Host="evil.example").status == 421
    with WebProcess(valkey.url, "--public-read", "--host", "0.0.0.0") as web:
        assert web("/", Host="queue.example").status == 200


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_waits_neither_for_searches_nor_for_uploads(how: signal.Signals, code: int) -> None:
    """Searches that hang at Redis and a form that is half sent lose their connections; nothing is said."""
    search = b"GET /search?q=abc HTTP/1.1\r\nHost: localhost\r\n\r\n"
    upload = b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 900_000
    with running_valkey() as server, WebProcess(server.url) as web:
        assert web("/").status == 200
        assert server.process is not None
        server.process.send_signal(signal.SIGSTOP)
        others = [socket.create_connection(("127.0.0.1", web.port), timeout=10) for _ in range(5)]
        try:
            for other, request in zip(others, [upload] + [search] * 4, strict=True):
                other.sendall(request)
            assert web("/healthz").status == 200  # a later connection: the searches are under way
            for _ in range(2):
                web.process.send_signal(how)
            assert web.process.wait(30) == code
            assert web.stderr() == ""
            assert all(has_hung_up(other) for other in others)
        finally:
            for other in others:
                other.close()


def has_hung_up(other: socket.socket) -> bool:
    """Whether the other end is closed, without an answer."""
    try:
        return other.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_signal_among_many_visitors_leaves_nothing_open(valkey: Valkey) -> None:
    """Wherever the server is with their connections, it closes them: its last words would name one that it did not."""
    with WebProcess(valkey.url) as web:
        ended = threading.Event()
        crowd = [threading.Thread(target=visit_until, args=(web, ended)) for _ in range(4)]
        for visitor in crowd:
            visitor.start()
        assert web("/healthz").status == 200
        web.process.terminate()
        code = web.process.wait(30)
        ended.set()
        for visitor in crowd:
            visitor.join()
        assert (code, web.stderr()) == (0, "")


def visit_until(web: WebProcess, ended: threading.Event) -> None:
    """Come again and again; the server may end meanwhile."""
    while not ended.is_set():
        with contextlib.suppress(OSError, http.client.HTTPException):
            web("/healthz")


def test_many_searches_leave_the_others_their_turn(
    valkey: Valkey, client: CancelClient, connection: redis.Redis
) -> None:
    """However many search at a time, few of them wait; the others are told at once, and other pages are answered."""
    client.cancel(algo_id=LARGEST)
    with WebProcess(valkey.url) as web, ThreadPoolExecutor(_CROWD) as crowd:
        assert web("/").status == 200
        connection.execute_command("CLIENT", "PAUSE", 1000, "ALL")
        searches = [crowd.submit(web, f"/search?q={LARGEST}") for _ in range(_CROWD)]
        eventually(lambda: any(search.done() for search in searches), what="some are turned away")
        assert web("/healthz").status == 200
        assert web("/").status == 200
        answers = [search.result() for search in searches]
        assert web(f"/search?q={LARGEST}").status == 200
        assert web.stderr() == ""

    turned_away = [answer for answer in answers if answer.status == 503]
    served = [answer for answer in answers if answer.status == 200]
    assert len(served) >= 4
    assert len(served) + len(turned_away) == _CROWD
    assert {answer.headers["Retry-After"] for answer in turned_away} == {"2"}
    assert all("try again in a few seconds" in answer.text for answer in turned_away)
    assert all(str(LARGEST) in answer.text for answer in served)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
        b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 400000\r\n\r\ntoken=" + b"x" * 70_000,
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["silent", "half-a-head", "half-a-body", "answered-and-kept"],
)
def test_slow_visitors_keep_nobody_out(valkey: Valkey, client: CancelClient, sent: bytes) -> None:
    """However many connections say nothing, or the half of something, whoever comes after them is served."""
    with WebProcess(valkey.url) as web, contextlib.ExitStack() as crowd:
        for _ in range(_VISITORS):
            visitor = crowd.enter_context(socket.create_connection(("127.0.0.1", web.port), timeout=20))
            with contextlib.suppress(ConnectionError):  # it has made room already
                visitor.sendall(sent)
        for _ in range(3):
            assert web("/healthz").status == 200
            assert "Status" in web("/?refresh=0").text
        assert web.stderr() == ""


def test_wrong_tokens_are_alike_slow_and_logged_and_keep_nobody_out(valkey: Valkey) -> None:
    """Sixty guesses at a time, by form and header: one answer, as to no token, each after a second, and a line for
    each without the token; meanwhile the right token and other pages are served."""
    with WebProcess(valkey.url, WEB_TOKEN=TOKEN) as web, ThreadPoolExecutor(60) as crowd:

        def guess(number: int) -> tuple[float, int, str, str | None]:
            began = time.monotonic()
            if number % 2:
                answer = web("/login", {"token": f"{TOKEN}-{number}", "next": "/failed"}, X_Forwarded_For="é" * 500)
            else:
                answer = web("/failed", Authorization=f"Bearer {TOKEN}-{number}")
            return time.monotonic() - began, answer.status, answer.text, answer.headers.get("Retry-After")

        none = web("/failed")
        guesses = [crowd.submit(guess, number) for number in range(60)]
        assert web("/healthz").status == 200
        login = web("/login", {"token": TOKEN})
        assert login.status == 303
        answers = [each.result() for each in guesses]
        assert web("/", Authorization=f"Bearer {TOKEN}").status == 200
        assert {answer[1:] for answer in answers} == {(401, none.text, None)}
        assert min(took for took, *_ in answers) >= 1
        eventually(lambda: web.stderr().count("\n") == 60, what="each guess has its line")
        lines = set(web.stderr().splitlines())
        assert lines == {f"web: wrong token from 127.0.0.1{rest}" for rest in ("", f", which names {'é' * 99}…")}


def test_a_flood_of_guesses_does_not_lock_the_right_token_out(valkey: Valkey) -> None:
    """More guessers than there are connections, each with the next guess at once: the token and others are served."""
    with WebProcess(valkey.url, WEB_TOKEN=TOKEN) as web:
        ended = threading.Event()
        crowd = threading.Thread(target=lambda: asyncio.run(guess_until(ended, web.port)))
        crowd.start()
        try:
            eventually(lambda: web.stderr().count("wrong token") >= 200, what="the guessers are at work")
            for _ in range(3):
                assert web("/login", {"token": TOKEN}).status == 303
                assert web("/healthz").status == 200
        finally:
            ended.set()
            crowd.join()


async def guess_until(ended: threading.Event, port: int) -> None:
    """As many guessers as there are visitors; the server may hang up on each."""

    async def guess() -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer wrong\r\n\r\n")
                await reader.read()
                writer.close()

    await asyncio.gather(*(guess() for _ in range(_VISITORS)))


def test_a_log_that_nobody_reads_holds_up_no_page(valkey: Valkey) -> None:
    """With stderr a pipe that is full, guesses are answered as before, and the process ends when it is told to."""
    reading, writing = os.pipe()
    with contextlib.suppress(BlockingIOError), open(writing, "wb", buffering=0, closefd=False) as pipe:
        os.set_blocking(writing, False)
        while pipe.write(b"x" * 4096):
            pass
    os.set_blocking(writing, True)
    try:
        with WebProcess(valkey.url, stderr=writing, WEB_TOKEN=TOKEN) as web, ThreadPoolExecutor(40) as crowd:
            guesses = [crowd.submit(web, "/", Authorization="Bearer x") for _ in range(40)]
            assert {each.result().status for each in guesses} == {401}
            assert web("/login", {"token": TOKEN}).status == 303
            web.process.terminate()
            assert web.process.wait(30) == 0
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (("web", "--host", "0.0.0.0"), {}, "--public-read"),
        (("web",), {"WEB_TOKEN": "short"}, "16 characters"),
        (("web", "--host", "no.such.host.invalid"), {"WEB_TOKEN": TOKEN}, "cannot listen on no.such.host.invalid port"),
        (("metrics", "--host", "256.0.0.1"), {}, "cannot listen on 256.0.0.1 port 9464"),
        (("web",), {"REDIS_URL": "http://x"}, "REDIS_URL must be"),
        (("metrics",), {"REDIS_URL": "http://x"}, "REDIS_URL must be"),
    ],
)
def test_what_it_cannot_start_with_ends_with_2(
    valkey: Valkey, arguments: tuple[str, ...], environment: dict[str, str], said: str
) -> None:
    """One line names the way out, and no secret: page and exporter alike."""
    done = Shell(valkey.url)(*arguments, **environment)

    assert (done.returncode, done.stdout) == (2, "")
    assert said in one_line(done.stderr)
    assert "short" not in done.stderr


def test_a_port_in_use_ends_with_2(valkey: Valkey) -> None:
    """PORT, as platforms give it, is what the page listens on, and --port wins over it."""
    port = free_port()
    with WebProcess(valkey.url, "--port", str(port), PORT="1") as web:
        assert web.port == port
        for done in (Shell(valkey.url)("web", PORT=str(port)), Shell(valkey.url)("metrics", "--port", str(port))):
            assert done.returncode == 2
            assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("command", "missing", "told"),
    [
        ("web", "flask", "pip install flask waitress"),
        ("web", "waitress", "pip install flask waitress"),
        ("metrics", "prometheus_client", "pip install prometheus-client"),
    ],
)
def test_what_is_missing_is_named(valkey: Valkey, command: str, missing: str, told: str) -> None:
    """Without the extra one line says what to install."""
    code = (
        f"import sys; sys.modules[{missing!r}] = None; import producer.__main__ as p; sys.exit(p.main([{command!r}]))"
    )
    done = python("-c", code, REDIS_URL=valkey.url)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in one_line(done.stderr)


def test_the_worker_hands_over_without_the_exchanges_secrets(valkey: Valkey) -> None:
    """`python -m worker web` serves the same pages, and its process has no key of the exchange."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "worker", "web", "--port", str(port)],
        cwd=ROOT,
        env=scrubbed() | {"REDIS_URL": valkey.url, "BINANCE_API_SECRET": "a-secret-of-the-tests"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert f"http://127.0.0.1:{port}/ (read-only)" in process.stdout.readline()
        assert b"a-secret-of-the-tests" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    finally:
        process.terminate()
        process.communicate(timeout=10)
    assert process.returncode == 0
