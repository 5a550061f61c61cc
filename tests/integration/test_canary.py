"""Secrets that are looked for everywhere after everything that can go wrong has: Redis, output, processes, pages."""

from __future__ import annotations

import base64
import contextlib
import re
import select
import socket
import ssl
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest
import redis
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key

from producer import CancelClient, CancelRequest
from producer.message import Call
from tests.environments import pem
from tests.exporting import exporting
from tests.loopback import LOOPBACK, Authority, Peer, Server
from tests.servers import ROOT, WORKER, Valkey, Workers, eventually, running_valkey, scrubbed
from tests.webpages import WebProcess
from worker.sandbox.control import ExchangeConfig, RunningExchange, start_exchange
from worker.sandbox.faults import Fault, FaultTiming

# Lower case and digits, so that they could even stand as an account's name where one goes astray.
HMAC = "canary1hmac7f3a9c"
OTHER_HMAC = "canary2hmac51d0be"
PROXY = "canary3proxy08ce4"
REDIS = "canary4redis96ab2"
WRONG_LOGIN = "canary5login3e7d1"
TOKEN = "canary6token40f8c"
BAD_SETTING = "canary7setting9d2e"


# ---- the search ----

#: What every secret and signature has at least, characters.
_PREFIX = 12
#: As long as the shortest signature.
_LONG_WORD = re.compile(rb"[0-9A-Za-z%+/=]{64,}")


@dataclass
class Needles:
    """What must not be found, in the forms in which it could be written."""

    secrets: set[str]
    signatures: set[str] = field(default_factory=set)

    def found_in(self, place: bytes) -> list[str]:
        """The secrets that stand in ``place`` as they are, percent-encoded, or base64-encoded at any offset."""
        found = ["signature="] * (b"signature=" in place.lower())
        found += [form.decode() for form in self._secret_forms if form in place]
        # There are thousands of signatures: words that are as long as one are looked up in a table.
        for word in _LONG_WORD.findall(place):
            for at in range(len(word) - _PREFIX + 1):
                found += [form.decode() for form in self._table.get(word[at : at + _PREFIX], ()) if form in word]
        return found

    @cached_property
    def _table(self) -> dict[bytes, set[bytes]]:
        table: dict[bytes, set[bytes]] = {}
        for text in self.signatures:
            for form in (text, quote(text, safe=""), unquote(text)):
                table.setdefault(form[:_PREFIX].encode(), set()).add(form.encode())
        return table

    @cached_property
    def _secret_forms(self) -> set[bytes]:
        forms = {form for text in self.secrets for form in (text, quote(text, safe=""), unquote(text))}
        for text in self.secrets:
            for lead in range(3):
                # What three bytes become does not hang on those before and after them.
                inner = base64.b64encode(b"\0" * lead + text.encode()).decode()[4 if lead else 0 :]
                forms.add(inner[: len(inner) // 4 * 4 - 4])
        assert min(map(len, forms)) >= _PREFIX, "too short to be told from chance"
        return {form.encode() for form in forms}


def redis_places(connection: redis.Redis) -> Iterator[tuple[str, bytes]]:
    """Every key with everything in it, and what can be unpacked of it (RQ packs payloads and failures' texts)."""
    for key in connection.scan_iter():
        for part in (key, *_parts(connection, key)):
            yield f"Redis {key!r}", part
            with contextlib.suppress(zlib.error):
                yield f"Redis {key!r}, unpacked", zlib.decompress(part)
            with contextlib.suppress(ValueError, zlib.error):
                yield f"Redis {key!r}, decoded and unpacked", zlib.decompress(base64.b64decode(part, validate=True))


def _parts(connection: redis.Redis, key: bytes) -> list[bytes]:
    # By command and with answers of RESP2: plain lists of bytes, however they are nested.
    kind = bytes(connection.execute_command("TYPE", key))
    whole = {
        b"string": ("GET", key),
        b"hash": ("HGETALL", key),
        b"list": ("LRANGE", key, 0, -1),
        b"set": ("SMEMBERS", key),
        b"zset": ("ZRANGE", key, 0, -1),
        b"stream": ("XRANGE", key, "-", "+"),
    }[kind]
    return list(_flat(connection.execute_command(*whole)))


def _flat(answer: Any) -> Iterator[bytes]:
    if isinstance(answer, bytes):
        yield answer
    elif isinstance(answer, dict):
        for pair in answer.items():
            yield from _flat(pair)
    elif isinstance(answer, list | tuple | set):
        for part in answer:
            yield from _flat(part)


def process_line(pid: int) -> bytes:
    """What `ps` shows of a process to every user of its host."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")


class Search:
    """Collects places and what was found in them."""

    def __init__(self, *secrets: str) -> None:
        self.needles = Needles(set(secrets))
        self.places: list[tuple[str, bytes]] = []

    def add(self, name: str, place: bytes | str) -> None:
        """One more place to look at."""
        self.places.append((name, place.encode("utf-8", "surrogateescape") if isinstance(place, str) else place))

    def findings(self) -> list[tuple[str, str]]:
        """Place and secret for each that was found."""
        if not self.needles.found_in(b"\n".join(place for _, place in self.places)):
            return []
        return [(name, needle) for name, place in self.places for needle in self.needles.found_in(place)]


# ---- a proxy between worker and exchange, which sees the signatures --------------------------------------------------


class SeeingProxy:
    """An HTTP proxy that wants a password, and ends the TLS that passes it, which keeps the signatures that it sees."""

    def __init__(self, target: str, password: str, tls: ssl.SSLContext) -> None:
        self._target, self._tls = urlsplit(target), tls
        self._login = b"Basic " + base64.b64encode(f"fixie:{password}".encode())
        self.signatures: set[str] = set()
        self._server = Server(self._serve)
        self.url = f"http://fixie:{password}@127.0.0.1:{self._server.port}"
        self.close = self._server.close

    @property
    def logins(self) -> int:
        """How many tunnels were asked for with the password."""
        return sum(self._login in head for head in list(self._server.heads))

    def _serve(self, peer: Peer) -> None:
        if not peer.read_head():
            return  # given up before it was used
        peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        target = (self._target.hostname, self._target.port)
        with socket.create_connection(target) as server, self._tls.wrap_socket(peer.sock, server_side=True) as inside:
            self._relay(inside, server)

    def _relay(self, client: ssl.SSLSocket, server: socket.socket) -> None:
        while True:
            for source in select.select((client, server), (), ())[0]:
                data = source.recv(1 << 16)
                if not data:
                    return
                # The worker writes each request in one piece, and the next one only after the answer.
                self.signatures |= {s.decode() for s in re.findall(rb"[?&]signature=([^ &]+)", data)}
                (server if source is client else client).sendall(data)


# ---- keys and servers ------------------------------------------------------------------------------------------------


@dataclass
class Accounts:
    """An account of each kind of key, for the exchange and for the worker's environment."""

    exchange: dict[str, tuple[str, str]]
    environment: dict[str, str]
    secrets: set[str]


def _public(key: RSAPrivateKey | Ed25519PrivateKey) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> Accounts:
    """HMAC; RSA as PEM text on one line; Ed25519 as the path of a file; and one whose key the exchange refuses."""
    rsa, ed = generate_private_key(65_537, 2048), Ed25519PrivateKey.generate()
    path = tmp_path_factory.mktemp("keys") / "ed25519.pem"
    path.write_text(pem(ed))
    lines = {line for key in (rsa, ed) for line in pem(key).splitlines() if line and not line.startswith("-----")}
    return Accounts(
        {"default": ("key-hmac", HMAC), "rsa": ("key-rsa", _public(rsa)), "ed": ("key-ed", _public(ed))},
        {
            "BINANCE_API_KEY": "key-hmac",
            "BINANCE_API_SECRET": HMAC,
            "BINANCE_RSA_API_KEY": "key-rsa",
            "BINANCE_RSA_PRIVATE_KEY": pem(rsa).replace("\n", "\\n"),
            "BINANCE_ED_API_KEY": "key-ed",
            "BINANCE_ED_PRIVATE_KEY": str(path),
            "BINANCE_LOST_API_KEY": "key-that-nobody-knows",
            "BINANCE_LOST_API_SECRET": OTHER_HMAC,
        },
        lines | {HMAC, OTHER_HMAC},
    )


@dataclass
class Scene:
    """Servers with passwords, and the places to be searched."""

    valkey: Valkey
    exchange: RunningExchange
    proxy: SeeingProxy
    accounts: Accounts
    workers: Workers
    search: Search

    @property
    def redis_url(self) -> str:
        """Redis with the password."""
        return f"redis://:{REDIS}@127.0.0.1:{self.valkey.port}/0"

    def run(self, *command: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
        """Run one command to its end; what it printed and what `ps` showed of it are searched."""
        given = scrubbed() | {"REDIS_URL": self.redis_url, "WEB_TOKEN": TOKEN} | environment
        words = [sys.executable, "-m", *command]
        with subprocess.Popen(words, cwd=ROOT, env=given, stdin=PIPE, stdout=PIPE, stderr=STDOUT) as process:
            name = " ".join(command)
            self.search.add(f"ps of {name}", process_line(process.pid))
            printed, _ = process.communicate(stdin.encode(), 40)
        self.search.add(f"output of {name}", printed)
        return subprocess.CompletedProcess(command, process.returncode, printed)


@pytest.fixture
def scene(accounts: Accounts, authority: Authority, tmp_path: Path) -> Iterator[Scene]:
    """Everything started, nothing done yet."""
    timing = FaultTiming(late_answer_ms=700, late_execution_ms=100, forgotten_ms=300, drip_interval_ms=10)
    with (
        running_valkey("--requirepass", REDIS) as valkey,
        start_exchange(ExchangeConfig(accounts=accounts.exchange, timing=timing)) as exchange,
        contextlib.closing(SeeingProxy(exchange.url, PROXY, authority.server_context(LOOPBACK))) as proxy,
    ):
        search = Search(*accounts.secrets, PROXY, REDIS, TOKEN, WRONG_LOGIN, BAD_SETTING)
        environment = {
            "REDIS_URL": f"redis://:{REDIS}@127.0.0.1:{valkey.port}/0",
            "BINANCE_BASE_URL": exchange.url.replace("http:", "https:"),
            "EXCHANGE_TLS_CA": authority.ca_file,
            "EGRESS_PROXY_URL": proxy.url,
            "BINANCE_RECV_WINDOW_MS": "600",
            "CANCEL_DEADLINE_S": "6",
            "BACKOFF_CAP_MS": "200",
            "NOT_FOUND_HORIZON_S": "0.3",
            "WAF_PAUSE_S": "1",
            "LEASE_S": "2",
            "LOG_LEVEL": "DEBUG",
            **accounts.environment,
        }
        fleet = Workers(tmp_path, environment)
        try:
            yield Scene(valkey, exchange, proxy, accounts, fleet, search)
        finally:
            fleet.stop()


def client_of(scene: Scene) -> CancelClient:
    """The producers' client with the password."""
    return CancelClient.from_url(scene.redis_url)


def trouble(scene: Scene) -> list[CancelRequest]:
    """A request for each fault of the exchange on each call that can meet it, with all kinds of keys."""
    accounts = ["default", "rsa", "ed"]
    requests = []
    # Those that stop an address stop every request: they come as incidents, below.
    faults = [fault for fault in Fault if not fault.spec.gates and not fault.spec.pauses]
    for number, fault in enumerate(faults):
        account = accounts[number % 3]
        for call in fault.spec.calls:
            (order,) = scene.exchange.add_orders(1, account=account)
            if call is Call.QUERY:
                scene.exchange.script_faults(order.algo_id, [Fault.DROP_AFTER])
            elif call is not Call.CANCEL:
                scene.exchange.trigger(order.algo_id)
            scene.exchange.script_faults(order.algo_id, [fault, fault][: 1 + (call is Call.QUERY)], call=call)
            requests.append(CancelRequest(algo_id=order.algo_id, account=account, on_trigger="cancel_child"))
    requests += [CancelRequest(algo_id=n, account="lost") for n in range(1, 8)]
    return [*requests, CancelRequest(algo_id=1, account="nobody")]


def hostile(scene: Scene, connection: redis.Redis) -> list[str]:
    """Jobs that are refused, with words of theirs in the log and the record."""
    payloads = {"pickle": b"\x80\x04.", "shell": b'["os.system",null,["true"],{}]', "cut": zlib.compress(b"x" * 99)[:5]}
    for name, data in payloads.items():
        connection.hset(f"rq:job:{name}", mapping={"status": "queued", "data": data, "created_at": "never"})
        connection.rpush("rq:queue:cancels", name)
    return list(payloads)


#: Runs the worker with a defect behind the answer to each third signed call, and prints it as no worker would: with
#: every variable of every frame, as collectors of errors do.
DEFECT = """
import contextvars, sys, traceback
import worker.__main__, worker.log, worker.transport_asyncio as module
send, decoded, error = module.AsyncioTransport.send, module.decoded, worker.log.error
is_signed, calls = contextvars.ContextVar("is_signed", default=False), [0]
async def noting(self, make, patience_s):
    def noted():
        request = make()
        is_signed.set(request is not None and bool(request.fields))
        return request
    return await send(self, noted, patience_s)
def breaking(*given):
    calls[0] += is_signed.get()
    if is_signed.get() and calls[0] % 3 == 0:
        raise RuntimeError("made by the test")
    return decoded(*given)
def telling(name, **fields):
    if sys.exc_info()[0] is not None:
        print("".join(traceback.TracebackException(*sys.exc_info(), capture_locals=True).format()), flush=True)
    error(name, **fields)
module.AsyncioTransport.send, module.decoded, worker.log.error = noting, breaking, telling
worker.__main__.start()
"""


def settled(client: CancelClient, ids: list[str]) -> None:
    """Wait until each has its outcome."""
    eventually(lambda: len(client.outcomes_of(ids)) == len(set(ids)), 60, "all have outcomes")


# ---- the tests -------------------------------------------------------------------------------------------------------


def test_every_failure_of_the_exchange_keeps_every_secret(scene: Scene) -> None:
    """After every fault, refused keys, pauses, strangers and defects no secret and no signature is anywhere."""
    with client_of(scene) as client, redis.Redis.from_url(scene.redis_url) as connection:
        late = client.cancel(client_algo_id="x", deadline_s=0.001)  # before there is a worker: one would be in time
        worker = scene.workers.start(command=WORKER)
        scene.search.add("ps of the worker", process_line(worker.process.pid))
        tickets = [late, *client.cancel_many(trouble(scene))]
        ids = [ticket.id for ticket in tickets] + hostile(scene, connection)
        settled(client, ids)
        for fault in (Fault.LIMITED_429, Fault.FORBIDDEN_403, Fault.BANNED_418, Fault.CHALLENGE_202):
            scene.exchange.start_incident(fault, duration_ms=200)
            (order,) = scene.exchange.add_orders(1)
            settled(client, [client.cancel(algo_id=order.algo_id).id])
        kinds = {outcome.kind.value for outcome in client.outcomes_of(ids).values()}
        worker.stop()
        broken = scene.workers.start(command=(sys.executable, "-c", DEFECT), LOG_FORMAT="json", RATE_LIMIT_SCOPE="dyno")
        requests = [
            CancelRequest(algo_id=order.algo_id, account=account)
            for account in ("default", "rsa", "ed")
            for order in scene.exchange.add_orders(2, account=account)
        ]
        settled(client, [ticket.id for ticket in client.cancel_many(requests)])
        eventually(lambda: "made by the test" in broken.output(), what="the defect")
        broken.stop()
        scene.search.places += redis_places(connection)
    for each in (worker, broken):
        scene.search.add("log", each.output())
    scene.search.needles.signatures |= scene.proxy.signatures

    assert kinds >= {"cancelled", "triggered", "refused", "overdue", "already_cancelled"}
    assert scene.proxy.logins > 100
    assert len(scene.proxy.signatures) > 100
    assert {len(unquote(signature)) for signature in scene.proxy.signatures} == {64, 88, 344}  # all three kinds
    assert "signer" in broken.output() or "credential" in broken.output()  # the variables are shown indeed
    assert scene.search.findings() == []


def test_no_command_shows_a_secret(scene: Scene, tmp_path: Path) -> None:
    """Each command, in good order, with wrong settings, and with a Redis that refuses the login or is not there."""
    scene.workers.start()
    with client_of(scene) as client:
        known = client.cancel(algo_id=scene.exchange.add_orders(1)[0].algo_id)
        failed = client.cancel(algo_id=1, account="nobody")
        settled(client, [known.id, failed.id])
    commands = [
        *(("cancel", "--algo-id", "1", "--wait", "0.1"), ("outcome", known.id, failed.id), ("outcomes",), ("status",)),
        *(("retry", failed.id), ("retry", "--failed"), ("cancel", "--from-file", "-")),
    ]
    exits = set()
    wrong = f"redis://:{WRONG_LOGIN}@127.0.0.1:{scene.valkey.port}/0"
    away = f"redis://:{REDIS}@127.0.0.1:1/0"
    for command in commands:
        for url in (scene.redis_url, wrong):
            exits.add(scene.run("producer", *command, "--json", stdin="7\n", REDIS_URL=url).returncode)
    for url in (scene.redis_url, away):
        exits.add(scene.run("producer", "status", REDIS_URL=url).returncode)
    for command in (("status",), ("web",), ("metrics",)):
        exits.add(scene.run("producer", *command, stdin="7\n", REDIS_URL=f"http://:{BAD_SETTING}@h").returncode)
    environment = scene.workers.environment
    for name, value in bad_settings(tmp_path).items():
        command = ("worker",) if name < "BINANCE_LOST" else ("worker", "check")
        assert scene.run(*command, **environment | {name: value}).returncode == 78, name
    for url in (wrong, away):
        checked = scene.run("worker", "check", **environment | {"REDIS_URL": url})
        assert checked.returncode in (69, 78)
    assert scene.run("worker", **environment | {"REDIS_URL": wrong}).returncode == 69
    assert b"refused" in scene.run("worker", "check", **environment).stdout
    scene.search.needles.signatures |= scene.proxy.signatures

    assert exits >= {0, 2, 4}
    assert scene.search.findings() == []


def bad_settings(directory: Path) -> dict[str, str]:
    """Settings that stop the start, with a secret in each."""
    damaged = f"-----BEGIN PRIVATE KEY-----\n{BAD_SETTING}\n-----END PRIVATE KEY-----\n"
    (directory / "damaged.pem").write_text(damaged)
    return {
        "BINANCE_RSA_PRIVATE_KEY": damaged,
        "BINANCE_ED_PRIVATE_KEY": str(directory / "damaged.pem"),
        "BINANCE_API_SECRET": f"{BAD_SETTING} ",
        "BINANCE_LOST_PRIVATE_KEY": BAD_SETTING,
        "EGRESS_PROXY_URL": f"socks5://u:{BAD_SETTING}@h",
        "REDIS_URL": f"redis://:{BAD_SETTING}@h:6379/0?socket_timeout=1",
        "BINANCE_BASE_URL": f"https://u:{BAD_SETTING}@fapi.binance.com",
    }


def test_pages_and_metrics_show_no_secret(scene: Scene) -> None:
    """Every page, with login and without, and the metrics, while Redis works and after it is gone."""
    scene.workers.start()
    with client_of(scene) as client:
        failed = client.cancel(algo_id=scene.exchange.add_orders(1)[0].algo_id, account="nobody")
        settled(client, [failed.id])
    with WebProcess(scene.redis_url, WEB_TOKEN=TOKEN) as web, exporting(scene.redis_url) as exporter:
        for process in (web.process, exporter.process):
            scene.search.add(f"ps of {process.args!s}", process_line(process.pid))
        assert web("/login", {"token": f"{TOKEN}x"}).status == 401
        login = web("/login", {"token": TOKEN})
        cookie = login.headers["Set-Cookie"].partition(";")[0]
        scene.search.add("the cookie", cookie)
        pages = (
            "/",
            "/failed",
            f"/requests/{failed.id}",
            f"/search?q={failed.id}",
            f"/retry?id={failed.id}",
            "/healthz",
        )
        for stage in ("Redis works", "Redis is gone"):
            for headers in (dict[str, Any](), {"Cookie": cookie}):
                for path in pages:
                    reply = web(path, **headers)
                    scene.search.add(f"page {path}, {stage}", f"{reply.headers}\n{reply.text}")
            scene.search.add(f"metrics, {stage}", exporter.text())
            scene.valkey.stop()
        scene.search.add("stderr of web", web.stderr())
        scene.search.add("stderr of metrics", exporter.stop()[1])

    assert any("cancel_up 1" in place.decode() or "cancel_up{" in place.decode() for _, place in scene.search.places)
    assert scene.search.findings() == []
