"""The exchange client against real servers on loopback: what goes over the wire, and what every break-down becomes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import email.utils
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from producer.message import Call
from tests.ways import WAYS, made
from worker.classify import Failure, Means, OrderRef, Reply, classify
from worker.clock import BEHIND_MS, ServerClock
from worker.exchange import BODY_LIMIT, MAX_RETRY_AFTER_MS, Exchange, Pending, _BoundedSocket
from worker.signing import Credential

SECRET = "s3cr3t-canary-of-the-account"
API_KEY = "key-of-the-account"
REF = OrderRef(2146760, "a:b/c.d_e-f")
DONE = b'{"algoId":2146760,"clientAlgoId":"a:b/c.d_e-f","code":"200","msg":"success"}'
#: Bound of an attempt in tests of break-downs, seconds; and by how much a busy machine may overrun it.
TOTAL_S = 0.4
SLACK_S = 1.5


# ---- servers --------------------------------------------------------------------------------------------------------


def http_answer(body: bytes = DONE, status: str = "200 OK", /, **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Peer:
    """One connection that a client made, on the server's side."""

    def __init__(self, server: Server, number: int, sock: socket.socket) -> None:
        self.server = server
        self.number = number
        self.sock = sock
        self._buffer = b""

    def read_head(self) -> bytes:
        """The next request up to its empty line; b"" when the client has closed."""
        while b"\r\n\r\n" not in self._buffer:
            data = self.sock.recv(65536)
            if not data:
                return b""
            self._buffer += data
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        self.server.note(self.number, head)
        return head

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def wait_until_closed(self) -> None:
        """Stay silent until the client gives up."""
        while self.sock.recv(65536):
            pass

    def reset(self) -> None:
        """Close so that the client gets a reset in place of an end."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


Behaviour = Callable[[Peer], None]


class Server:
    """A listener on loopback that runs ``behaviour`` in a thread for each connection."""

    def __init__(self, behaviour: Behaviour, tls: ssl.SSLContext | None = None) -> None:
        self._behaviour = behaviour
        self._tls = tls
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.heads: list[bytes] = []
        self.used: list[int] = []  # which connection brought each head
        self.connections = 0
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def note(self, number: int, head: bytes) -> None:
        with self._lock:
            self.heads.append(head)
            self.used.append(number)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._sockets.append(sock)
            thread = threading.Thread(target=self._serve, args=(sock, self.connections))
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
                self._sockets.append(sock)
            self._behaviour(Peer(self, number, sock))
        except OSError:
            pass  # the client went away
        finally:
            sock.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()


def answering(*answers: bytes) -> Behaviour:
    """Answer each request of a connection, the last answer again and again."""

    def behave(peer: Peer) -> None:
        turn = 0
        while peer.read_head():
            peer.send(answers[min(turn, len(answers) - 1)])
            turn += 1

    return behave


def relaying(user_and_password: str = "", tunnels: bool = True, late_s: float = 0) -> Behaviour:
    """A proxy for CONNECT and for whole URLs, which may want a password."""
    wanted = "Basic " + base64.b64encode(user_and_password.encode()).decode()

    def behave(peer: Peer) -> None:
        head = peer.read_head().decode()
        if user_and_password and f"Proxy-Authorization: {wanted}" not in head:
            peer.send(b"HTTP/1.1 407 Who are you hunter2\r\nContent-Length: 0\r\n\r\n")
            return
        match = re.match(r"CONNECT 127\.0\.0\.1:(\d+) " if tunnels else r"\w+ http://127\.0\.0\.1:(\d+)/", head)
        assert match is not None
        threading.Event().wait(late_s)
        with socket.create_connection(("127.0.0.1", int(match[1]))) as onward:
            if tunnels:
                peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                onward.sendall(head.encode() + b"\r\n\r\n")
            back = threading.Thread(target=_pump, args=(onward, peer.sock))
            back.start()
            _pump(peer.sock, onward)
            back.join()

    return behave


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for sock in (source, sink):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    ends_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_at, "not in time"
        time.sleep(0.002)


# ---- certificates ---------------------------------------------------------------------------------------------------


class Authority:
    """A certificate authority of the test's own."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._certificate = self._signed(self._name, self._key, x509.BasicConstraints(ca=True, path_length=0))
        self.ca_file = str(directory / f"{name}.pem")
        Path(self.ca_file).write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def _signed(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *extensions: x509.ExtensionType
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(self._key, hashes.SHA256())

    def server_context(self, name: x509.GeneralName) -> ssl.SSLContext:
        """TLS for a server whose certificate is for ``name``."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
        certificate = self._signed(subject, key, x509.SubjectAlternativeName([name]))
        chain = self._directory / f"server-{certificate.serial_number}.pem"
        chain.write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        return context


class HandTls:
    """A server's side of TLS 1.3 that hands out its records, for the test to send them when and how it wants."""

    def __init__(self, peer: Peer, context: ssl.SSLContext) -> None:
        """Shake hands. The session tickets, which end it, are kept back."""
        self._peer = peer
        self._from_client, self._to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._tls = context.wrap_bio(self._from_client, self._to_client, server_side=True)
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._peer.send(self._to_client.read())
                self._hear()
        self.tickets = self._to_client.read()

    def _hear(self) -> bool:
        data = self._peer.sock.recv(65536)
        self._from_client.write(data)
        return bool(data)

    def read_head(self) -> bytes:
        """The next request up to its empty line; b"" when the client has closed."""
        text = b""
        while not text.endswith(b"\r\n\r\n"):
            try:
                data = self._tls.read(65536)
            except ssl.SSLWantReadError:
                data = b""
                if not self._hear():
                    return b""
            text += data
        self._peer.server.note(self._peer.number, text[:-4])
        return text

    def record(self, data: bytes) -> bytes:
        """``data`` as one record."""
        self._tls.write(data)
        return self._to_client.read()


LOOPBACK = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "authority")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "stranger")


# ---- fixtures -------------------------------------------------------------------------------------------------------


class Bench:
    """Starts servers and clients of one way, and closes them all."""

    def __init__(self, way: type[Exchange] = Exchange) -> None:
        self._way = way
        self._open = contextlib.ExitStack()

    def server(self, behaviour: Behaviour, tls: ssl.SSLContext | None = None) -> Server:
        server = Server(behaviour, tls)
        self._open.callback(server.close)
        return server

    def client(self, url: str, clock: ServerClock | None = None, **options: Any) -> Exchange:
        options.setdefault("recv_window_ms", 5_000)
        client = self._way(url, clock=clock or ServerClock(), **options)
        self._open.callback(client.close)
        return client

    def to(self, behaviour: Behaviour, **options: Any) -> tuple[Server, Exchange]:
        server = self.server(behaviour)
        return server, self.client(server.url, **options)

    def impatient(self, behaviour: Behaviour) -> tuple[Server, Exchange]:
        return self.to(behaviour, total_timeout_s=TOTAL_S)

    def close(self) -> None:
        self._open.close()


@pytest.fixture(params=WAYS)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Its clients make signed calls in the one way and in the other: the rules are the same."""
    one = Bench(request.param)
    yield one
    one.close()


@pytest.fixture
def lone_bench() -> Iterator[Bench]:
    """For what there is one way of."""
    one = Bench()
    yield one
    one.close()


@pytest.fixture(scope="module")
def credential() -> Credential:
    return Credential.from_secret("default", API_KEY, SECRET)


@contextlib.contextmanager
def bounded(seconds: float = TOTAL_S) -> Iterator[None]:
    """What runs inside may take ``seconds`` and the slack of a busy machine."""
    started_at = time.monotonic()
    yield
    assert time.monotonic() - started_at < seconds + SLACK_S


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def failed(answer: Reply | Failure, *, seen: bool, reason: str) -> None:
    assert isinstance(answer, Failure)
    assert (answer.seen, answer.reason) == (seen, reason)


def replied(answer: Reply | Failure) -> Reply:
    assert isinstance(answer, Reply)
    return answer


def query_of(head: bytes) -> str:
    return head.split(b" ", 2)[1].partition(b"?")[2].decode()


# ---- on the wire ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ref", "pair"),
    [
        (OrderRef(None, "a:b/c.d_e-f"), "clientAlgoId=a%3Ab%2Fc.d_e-f"),
        (OrderRef(None, "..%2F/../x"), "clientAlgoId=..%252F%2F..%2Fx"),
        (OrderRef(9223372036854775807), "algoId=9223372036854775807"),
        (REF, "algoId=2146760"),
    ],
)
def test_signed_bytes_are_the_sent_bytes(bench: Bench, credential: Credential, ref: OrderRef, pair: str) -> None:
    """The request line holds, byte for byte, the encoded string that was signed, and the signature last."""
    server, client = bench.to(answering(http_answer()))
    client.cancel(credential, ref)
    head = server.heads[0].decode("ascii")
    line = re.fullmatch(
        r"DELETE /fapi/v1/algoOrder\?((?:algoId|clientAlgoId)=[^&]+&recvWindow=5000&timestamp=\d{13})"
        r"&signature=([0-9a-f]{64}) HTTP/1\.1",
        head.split("\r\n")[0],
    )
    assert line is not None
    assert line[1].startswith(pair + "&")
    assert line[2] == hmac.new(SECRET.encode(), line[1].encode(), hashlib.sha256).hexdigest()


def test_base64_signature_is_sent_encoded(bench: Bench) -> None:
    """An Ed25519 signature arrives with its base64 percent-encoded once, and verifies against the rest of the query."""
    key = ed25519.Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    server, client = bench.to(answering(http_answer()))
    client.cancel(Credential.from_private_key("default", API_KEY, pem.decode()), REF)
    payload, _, signature = query_of(server.heads[0]).partition("&signature=")
    assert re.fullmatch(r"[A-Za-z0-9%]+", signature)
    key.public_key().verify(base64.b64decode(unquote(signature), validate=True), payload.encode())


def test_headers_are_few_and_there_is_no_body(
    bench: Bench, credential: Credential, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only the expected headers are sent: no cookie, no login from a netrc, nothing that the environment suggests."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password hunter2\n")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("NO_PROXY", "")
    server, client = bench.to(answering(http_answer(Set_Cookie="session=1; Path=/")))
    for _ in range(2):
        assert replied(client.cancel(credential, REF)).http == 200
    assert server.heads[1].decode().split("\r\n")[1:] == [
        f"Host: 127.0.0.1:{server.port}",
        "User-Agent: algo-cancel-queue",
        "Accept: application/json",
        "Accept-Encoding: identity",
        f"X-MBX-APIKEY: {API_KEY}",
    ]


def test_query_reads_the_same_order(bench: Bench, credential: Credential) -> None:
    """A query is a signed GET of the same path, and the answer's body is handed over as it came."""
    server, client = bench.to(answering(http_answer(DONE + b"\n")))
    assert client.query(credential, REF) == Reply(http=200, body=DONE + b"\n")
    assert server.heads[0].startswith(b"GET /fapi/v1/algoOrder?algoId=2146760&recvWindow=")


def test_path_of_the_base_url_is_kept(bench: Bench, credential: Credential) -> None:
    """A base URL with a path puts it before the exchange's own."""
    server = bench.server(answering(http_answer()))
    client = bench.client(f"{server.url}/gateway/", recv_window_ms=60_000)
    client.cancel(credential, REF)
    assert server.heads[0].startswith(b"DELETE /gateway/fapi/v1/algoOrder?algoId=2146760&recvWindow=60000&")


def test_each_attempt_has_its_own_timestamp_and_signature(bench: Bench, credential: Credential) -> None:
    """Two attempts for one order never share a signature."""
    ticks = iter(range(1_760_000_000_000, 1_760_000_001_000))
    server, client = bench.to(answering(http_answer()), clock=ServerClock(wall_ms=lambda: next(ticks)))
    for _ in range(3):
        client.cancel(credential, REF)
    queries = [query_of(head) for head in server.heads]
    assert len({re.search(r"timestamp=(\d+)", query)[1] for query in queries}) == 3  # type: ignore[index]
    assert len({query.partition("&signature=")[2] for query in queries}) == 3


def test_timestamp_is_taken_after_the_handshake(bench: Bench, credential: Credential, authority: Authority) -> None:
    """The time that connecting takes does not age the timestamp: it is read when the request line is written."""
    wall = [1_760_000_000_000]
    server: list[Server] = []

    def slow_handshake(peer: Peer) -> None:
        wall[0] += 4_000
        peer.sock = authority.server_context(LOOPBACK).wrap_socket(peer.sock, server_side=True)
        with peer.sock:
            answering(http_answer())(peer)

    server.append(bench.server(slow_handshake))
    client = bench.client(
        f"https://127.0.0.1:{server[0].port}", ServerClock(wall_ms=lambda: wall[0]), ca_file=authority.ca_file
    )
    assert replied(client.cancel(credential, REF)).http == 200
    assert b"timestamp=1760000004000&" in server[0].heads[0]


# ---- connections ----------------------------------------------------------------------------------------------------


def test_connection_is_used_again(bench: Bench, credential: Credential) -> None:
    """Calls of one thread share one connection."""
    server, client = bench.to(answering(http_answer()))
    for _ in range(5):
        assert replied(client.cancel(credential, REF)).http == 200
    assert server.connections == 1
    assert client.requests_sent == 5


def test_threads_share_the_pool_and_get_their_own_answers(bench: Bench, credential: Credential) -> None:
    """With as many connections as threads, every caller gets the answer to its own request."""

    def echo(peer: Peer) -> None:
        while head := peer.read_head():
            algo_id = re.search(rb"algoId=(\d+)", head)
            assert algo_id is not None
            peer.send(http_answer(b'{"algoId":%b,"clientAlgoId":"x","code":"200"}' % algo_id[1]))

    server, client = bench.to(echo)
    wrong: list[int] = []

    def work(first: int) -> None:
        for algo_id in range(first, first + 40):
            answer = client.cancel(credential, OrderRef(algo_id))
            if classify(Call.CANCEL, OrderRef(algo_id), answer).means is not Means.CONFIRMED:
                wrong.append(algo_id)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(1_000, 9_000, 1_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert server.connections <= 8
    assert client.requests_sent == 320


@pytest.mark.parametrize("secure", [False, True])
def test_closed_idle_connection_is_replaced_unnoticed(
    bench: Bench, credential: Credential, authority: Authority, secure: bool
) -> None:
    """A pooled connection that the server closed meanwhile costs a new one, not an attempt."""
    closed = threading.Event()

    def once(peer: Peer) -> None:
        peer.read_head()
        peer.send(http_answer())
        if isinstance(peer.sock, ssl.SSLSocket):
            peer.sock.settimeout(0.05)  # say good-bye, but do not wait for the client's
            with contextlib.suppress(OSError):
                peer.sock.unwrap()
        peer.sock.close()
        closed.set()

    server = bench.server(once, authority.server_context(LOOPBACK) if secure else None)
    client = bench.client(server.url, ca_file=authority.ca_file)
    for turn in range(1, 4):
        assert replied(client.cancel(credential, REF)).http == 200
        assert closed.wait(5)
        closed.clear()
        assert (server.connections, len(server.heads), client.requests_sent) == (turn, turn, turn)


def test_request_on_a_dying_connection_is_not_sent_again(bench: Bench, credential: Credential) -> None:
    """If the pooled connection breaks once writing began, the attempt is in doubt and stays the only one."""

    def second_is_dropped(peer: Peer) -> None:
        peer.read_head()
        peer.send(http_answer())
        peer.read_head()

    server, client = bench.to(second_is_dropped)
    assert replied(client.cancel(credential, REF)).http == 200
    failed(client.cancel(credential, REF), seen=True, reason="no answer: RemoteDisconnected")
    assert len(server.heads) == 2
    assert replied(client.cancel(credential, REF)).http == 200
    assert server.used == [1, 1, 2]


def test_every_address_is_tried(bench: Bench, credential: Credential, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of which some addresses are dead or of no use here is reached through the living one."""
    server = bench.server(answering(http_answer()))
    real = socket.getaddrinfo

    def addresses(host: str, port: int, *args: Any, **options: Any) -> list[Any]:
        if host != "exchange.test":
            return real(host, port, *args, **options)
        if options.get("flags"):
            raise socket.gaierror(socket.EAI_NONAME, "a name")
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        unsupported = (socket.AF_INET, socket.SOCK_STREAM, 255, "")  # as IPv6 is where the kernel has none
        dead, living = ("127.0.0.1", free_port()), ("127.0.0.1", server.port)
        return [(*unsupported, living), (*kind, dead), (*kind, living)]

    monkeypatch.setattr(socket, "getaddrinfo", addresses)
    assert replied(bench.client("http://exchange.test:1").cancel(credential, REF)).http == 200


def test_early_hint_is_not_taken_for_the_next_answer(bench: Bench, credential: Credential) -> None:
    """After an interim answer the connection is given up, so that the true one cannot answer another request."""
    server, client = bench.to(
        answering(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + http_answer(b'{"algoId":1}'), http_answer())
    )
    first = client.cancel(credential, REF)
    assert classify(Call.CANCEL, REF, first).means is Means.UNCLEAR
    assert replied(client.query(credential, REF)).http == 103
    assert server.used == [1, 2]


def test_continue_is_no_answer(bench: Bench, credential: Credential) -> None:
    """A "100 Continue" that nobody asked for is passed over, and the connection kept."""
    server, client = bench.to(answering(b"HTTP/1.1 100 Continue\r\n\r\n" + http_answer()))
    for _ in range(2):
        assert client.cancel(credential, REF) == Reply(http=200, body=DONE)
    assert server.used == [1, 1]


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_unasked_answer_is_not_taken_for_the_next(
    bench: Bench, credential: Credential, authority: Authority, secure: bool, late: bool
) -> None:
    """A second answer to one request, together with the first or after it, is nobody's: the connection is given up."""
    unasked = http_answer(b"unasked")
    sent = threading.Event()

    def behave(peer: Peer) -> None:
        while peer.read_head():
            peer.send(http_answer() + (b"" if late else unasked))
            if late:
                peer.send(unasked)
            sent.set()

    server = bench.server(behave, authority.server_context(LOOPBACK) if secure else None)
    client = bench.client(server.url, ca_file=authority.ca_file)
    for _ in range(2):
        assert client.cancel(credential, REF) == Reply(http=200, body=DONE)
        assert sent.wait(5)
        sent.clear()
    assert server.used == [1, 2]


def test_unasked_answer_in_a_tunnel_over_tls_is_not_taken_for_the_next(
    bench: Bench, credential: Credential, authority: Authority
) -> None:
    """Nor is one that lies behind the answer in the proxy's own TLS record, where no look at the socket finds it."""

    def behave(peer: Peer) -> None:
        tls = HandTls(peer, authority.server_context(LOOPBACK))
        while tls.read_head():
            peer.send(tls.tickets + tls.record(http_answer()) + tls.record(http_answer(b"unasked")))

    server = bench.server(behave)
    proxy = bench.server(relaying(), authority.server_context(LOOPBACK))
    client = bench.client(f"https://127.0.0.1:{server.port}", ca_file=authority.ca_file, egress_proxy_url=proxy.url)
    for _ in range(2):
        assert client.cancel(credential, REF) == Reply(http=200, body=DONE)
    assert server.used == [1, 2]


@pytest.mark.parametrize("cut", [0, 20, len(http_answer()) - 10])
def test_late_answer_is_not_taken_for_the_next(bench: Bench, credential: Credential, cut: int) -> None:
    """An attempt that ran out of time closes its connection, however much of the answer had come."""
    given_up = threading.Event()
    late = http_answer(b"late".ljust(len(DONE)))

    def behave(peer: Peer) -> None:
        while peer.read_head():
            if peer.number == 1:
                peer.send(late[:cut])
                assert given_up.wait(5)
                peer.send(late[cut:])
            else:
                peer.send(http_answer())

    server, client = bench.impatient(behave)
    first = client.cancel(credential, REF)
    if cut < late.index(b"late"):
        failed(first, seen=True, reason="no answer: TimeoutError")
    else:
        assert replied(first).truncated
    given_up.set()
    for _ in range(2):
        assert client.query(credential, REF) == Reply(http=200, body=DONE)
    assert server.used == [1, 2, 2]
    assert client.requests_sent == 3


def test_last_used_connection_is_used_first(bench: Bench, credential: Credential) -> None:
    """Of several idle connections the warmest serves the next call."""
    both_asked = threading.Barrier(2)
    first_is_done = threading.Event()

    def behave(peer: Peer) -> None:
        while head := peer.read_head():
            if b"algoId=1&" in head:
                both_asked.wait(5)
                assert peer.number == 1 or first_is_done.wait(5)
            peer.send(http_answer())

    server, client = bench.to(behave)
    threads = [threading.Thread(target=client.cancel, args=(credential, OrderRef(1))) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: not all(thread.is_alive() for thread in threads))
    first_is_done.set()
    for thread in threads:
        thread.join()
    for _ in range(3):
        client.cancel(credential, REF)
    assert server.used[2:] == [2, 2, 2]


@pytest.mark.parametrize("proxied", [False, True])
def test_small_packets_are_not_held_back(
    bench: Bench, credential: Credential, monkeypatch: pytest.MonkeyPatch, proxied: bool
) -> None:
    """Every connection has Nagle's algorithm off, the one to a proxy too, and a request is one write."""
    server = bench.server(answering(http_answer()))
    proxy = bench.server(relaying(tunnels=False))
    options: list[int] = []
    real = _BoundedSocket.sendall

    def watch(sock: _BoundedSocket, *args: Any) -> None:
        options.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        real(sock, *args)

    monkeypatch.setattr(_BoundedSocket, "sendall", watch)
    client = bench.client(server.url, egress_proxy_url=proxy.url if proxied else None)
    assert replied(client.cancel(credential, REF)).http == 200
    assert options == [1]


def test_closed_client_sends_nothing(bench: Bench, credential: Credential) -> None:
    """After close() calls fail as not sent."""
    server, client = bench.to(answering(http_answer()))
    client.cancel(credential, REF)
    client.close()
    failed(client.cancel(credential, REF), seen=False, reason="could not connect: ClosedPoolError")
    assert len(server.heads) == 1


# ---- no connection: not seen ----------------------------------------------------------------------------------------


def test_unknown_host_is_not_seen(bench: Bench, credential: Credential) -> None:
    """A name that does not resolve, or not in time, leaves no doubt."""
    client = bench.client("https://fapi.exchange.invalid", connect_timeout_s=TOTAL_S)
    with bounded():
        answer = client.cancel(credential, REF)
    assert isinstance(answer, Failure)
    assert not answer.seen
    assert answer.reason in ("could not connect: gaierror", "could not connect: TimeoutError")
    assert client.requests_sent == 0


def test_hanging_resolver_is_bounded(bench: Bench, credential: Credential, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that does not answer holds nobody longer than connecting may take, and is asked once for all."""
    release = threading.Event()
    asked: list[str] = []
    real = socket.getaddrinfo

    def hang(host: str, port: int, *args: Any, **options: Any) -> list[Any]:
        if host != "exchange.test" or options.get("flags"):
            return real(host, port, *args, **options)
        asked.append(host)
        release.wait(10)
        return real("127.0.0.1", server.port, *args, **options)

    server = bench.server(answering(http_answer()))
    client = bench.client("http://exchange.test:1", connect_timeout_s=0.1)
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with bounded():
        for _ in range(3):
            failed(client.cancel(credential, REF), seen=False, reason="could not connect: TimeoutError")
    assert asked == ["exchange.test"]
    release.set()
    until(lambda: isinstance(client.cancel(credential, REF), Reply))


def test_full_backlog_is_bounded(bench: Bench, credential: Credential) -> None:
    """A host that accepts no connection costs the connect time-out, and no doubt."""
    with socket.socket() as full, contextlib.ExitStack() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):  # what the kernel queues beyond the backlog
            sock = waiting.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        client = bench.client(f"http://127.0.0.1:{full.getsockname()[1]}", connect_timeout_s=0.2)
        with bounded(0.2):
            failed(client.cancel(credential, REF), seen=False, reason="could not connect: TimeoutError")


# ---- broken off: perhaps seen ---------------------------------------------------------------------------------------


def _drop_unread(peer: Peer) -> None:
    """Close at once."""


def _drop_after_reading(peer: Peer) -> None:
    peer.read_head()


def _reset_after_reading(peer: Peer) -> None:
    peer.read_head()
    peer.reset()


def _not_http(peer: Peer) -> None:
    peer.read_head()
    peer.send(b"SSH-2.0-OpenSSH\r\n\r\n")


def _contradicting_lengths(peer: Peer) -> None:
    peer.read_head()
    peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef")


@pytest.mark.parametrize(
    "behaviour",
    [_drop_unread, _drop_after_reading, _reset_after_reading, _not_http, _contradicting_lengths],
)
def test_break_after_the_first_byte_is_perhaps_seen(bench: Bench, credential: Credential, behaviour: Behaviour) -> None:
    """However the exchange goes away once writing began, the cancel is in doubt, and it is sent once."""
    server, client = bench.to(behaviour)
    answer = client.cancel(credential, REF)
    assert isinstance(answer, Failure)
    assert answer.seen
    assert classify(Call.CANCEL, REF, answer).means is Means.UNCLEAR
    assert len(server.heads) <= 1
    assert client.requests_sent == server.connections == 1


@pytest.mark.parametrize("size", [12, 14, 20, 40])
def test_cut_head_proves_nothing(bench: Bench, credential: Credential, size: int) -> None:
    """A head that breaks off, even behind a status of 200, is no success."""

    def behave(peer: Peer) -> None:
        peer.read_head()
        peer.send(http_answer(Server="x" * 40)[:size])

    _, client = bench.to(behave)
    assert classify(Call.CANCEL, REF, client.cancel(credential, REF)).means is Means.UNCLEAR


def test_silence_is_bounded(bench: Bench, credential: Credential) -> None:
    """An answer that does not come ends the attempt at its bound, in doubt."""
    _, client = bench.impatient(Peer.wait_until_closed)
    with bounded():
        failed(client.cancel(credential, REF), seen=True, reason="no answer: TimeoutError")


def test_bound_follows_recv_window(bench: Bench, credential: Credential) -> None:
    """Unless it is given, the bound is eight tenths of recvWindow."""
    _, client = bench.to(Peer.wait_until_closed, recv_window_ms=500)
    started_at = time.monotonic()
    with bounded(0.4):
        assert isinstance(client.cancel(credential, REF), Failure)
    assert time.monotonic() - started_at >= 0.39


def drip(data: bytes) -> Behaviour:
    """Send one byte at a time, each long before a time-out between two reads could end it."""

    def behave(peer: Peer) -> None:
        peer.read_head()
        for byte in data:
            peer.send(bytes([byte]))
            time.sleep(TOTAL_S / 20)

    return behave


@pytest.mark.parametrize("secure", [False, True])
def test_dripping_head_is_bounded(bench: Bench, credential: Credential, authority: Authority, secure: bool) -> None:
    """A byte now and then does not prolong an attempt."""
    server = bench.server(drip(http_answer() * 9), authority.server_context(LOOPBACK) if secure else None)
    client = bench.client(server.url, ca_file=authority.ca_file, total_timeout_s=TOTAL_S)
    with bounded():
        failed(client.cancel(credential, REF), seen=True, reason="no answer: TimeoutError")


def test_dripping_body_is_bounded(bench: Bench, credential: Credential) -> None:
    """The same after the head: what is there is handed over as broken off, which proves nothing."""

    def behave(peer: Peer) -> None:
        head, _, body = http_answer().partition(b"\r\n\r\n")
        peer.send(head + b"\r\n\r\n")
        drip(body)(peer)

    _, client = bench.impatient(behave)
    with bounded():
        answer = replied(client.cancel(credential, REF))
    assert (answer.http, answer.truncated) == (200, True)
    assert classify(Call.CANCEL, REF, answer).means is Means.UNCLEAR


def _flood(peer: Peer) -> None:
    """For much longer than an attempt may take, send what is no answer."""
    peer.read_head()
    # Many in one write, which needs no turn of this process' threads.
    continues = b"HTTP/1.1 100 Continue\r\n\r\n" * 2**19
    ends_at = time.monotonic() + 5
    while time.monotonic() < ends_at:
        peer.send(continues)


def test_flood_without_an_answer_is_bounded(bench: Bench, credential: Credential) -> None:
    """Nor does a server that never stops sending, and never comes to its answer."""
    server, client = bench.impatient(_flood)
    with bounded():
        failed(client.cancel(credential, REF), seen=True, reason="no answer: TimeoutError")
    assert client.requests_sent == len(server.heads) == 1


def _cut_body(status: str, **headers: str) -> Behaviour:
    def behave(peer: Peer) -> None:
        peer.read_head()
        peer.send(http_answer(DONE, status, **headers)[:-10])

    return behave


def test_cut_body_proves_nothing(bench: Bench, credential: Credential) -> None:
    """A success whose body is not whole is no success."""
    _, client = bench.to(_cut_body("200 OK"))
    answer = replied(client.cancel(credential, REF))
    assert answer == Reply(http=200, body=DONE[:-10], truncated=True)
    assert classify(Call.CANCEL, REF, answer).means is Means.UNCLEAR


def test_cut_chunk_proves_nothing(bench: Bench, credential: Credential) -> None:
    """The same for a body in chunks that ends before its last one."""

    def behave(peer: Peer) -> None:
        peer.read_head()
        peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(DONE), DONE))

    _, client = bench.to(behave)
    answer = replied(client.cancel(credential, REF))
    assert answer.truncated
    assert classify(Call.CANCEL, REF, answer).means is Means.UNCLEAR


def test_cut_body_keeps_the_pause(bench: Bench, credential: Credential) -> None:
    """A ban whose text is lost is still a ban, with its length."""
    _, client = bench.to(_cut_body("418 I'm a teapot", Retry_After="120"))
    answer = replied(client.cancel(credential, REF))
    assert (answer.http, answer.retry_after_ms, answer.truncated) == (418, 120_000, True)


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_huge_body_is_read_in_part(
    bench: Bench, credential: Credential, authority: Authority, framing: str, secure: bool
) -> None:
    """At most 64 KiB are read, the rest is not waited for, and its connection is not used again."""
    size = 4 * BODY_LIMIT
    head = {
        "length": b"Content-Length: %d\r\n\r\n" % size,
        "chunked": b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % size,
        "close": b"Connection: close\r\n\r\n",
    }[framing]
    behaviour = answering(b"HTTP/1.1 200 OK\r\n" + head + b"x" * (BODY_LIMIT + 1))
    server = bench.server(behaviour, authority.server_context(LOOPBACK) if secure else None)
    client = bench.client(server.url, ca_file=authority.ca_file)
    for _ in range(2):
        answer = replied(client.cancel(credential, REF))
        assert (answer.body, answer.truncated) == (b"x" * BODY_LIMIT, True)
    assert server.used == [1, 2]


@pytest.mark.parametrize("secure", [False, True])
def test_largest_whole_body_is_whole(bench: Bench, credential: Credential, authority: Authority, secure: bool) -> None:
    """A body of exactly the limit is not called broken off."""
    behaviour = answering(http_answer(b"x" * BODY_LIMIT))
    server = bench.server(behaviour, authority.server_context(LOOPBACK) if secure else None)
    client = bench.client(server.url, ca_file=authority.ca_file)
    for _ in range(2):
        assert client.cancel(credential, REF) == Reply(http=200, body=b"x" * BODY_LIMIT)
    assert server.used == [1, 1]


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirect_is_not_followed(bench: Bench, credential: Credential, status: str) -> None:
    """A redirect is an answer like any other: neither key nor signature goes where it points."""
    elsewhere = bench.server(answering(http_answer()))
    _, client = bench.to(answering(http_answer(b"", status, Location=f"{elsewhere.url}/fapi/v1/algoOrder")))
    answer = replied(client.cancel(credential, REF))
    assert answer.http == int(status[:3])
    assert elsewhere.connections == 0


VALID = http_answer(Retry_After="3", X_MBX_USED_WEIGHT_1M="5")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, len(VALID)), junk=st.binary(max_size=12), resume=st.integers(0, len(VALID)))
def test_any_bytes_are_an_answer_or_a_failure(
    bench: Bench, credential: Credential, cut: int, junk: bytes, resume: int
) -> None:
    """Whatever a server sends before it closes, nothing is raised, and success needs the whole, true answer."""

    def behave(peer: Peer) -> None:
        peer.read_head()
        peer.send(VALID[:cut] + junk + VALID[resume:])

    server, client = bench.to(behave)
    answer = client.cancel(credential, REF)
    if isinstance(answer, Failure):
        assert answer.seen
    elif classify(Call.CANCEL, REF, answer).means is Means.CONFIRMED:
        assert (answer.http, answer.truncated) == (200, False)
        assert json.loads(answer.body)["algoId"] == REF.algo_id
    assert len(server.heads) == 1


# ---- TLS ------------------------------------------------------------------------------------------------------------


def test_tls_with_the_right_authority(bench: Bench, credential: Credential, authority: Authority) -> None:
    """A certificate of the given authority for this host is accepted, and the connection kept."""
    server = bench.server(answering(http_answer()), authority.server_context(LOOPBACK))
    client = bench.client(server.url, ca_file=authority.ca_file)
    for _ in range(3):
        assert replied(client.cancel(credential, REF)).body == DONE
    assert server.connections == 1


def in_pieces(peer: Peer, data: bytes, size: int) -> None:
    """Send ``size`` bytes at a time, each by itself."""
    for at in range(0, len(data), size):
        peer.send(data[at : at + size])
        time.sleep(0.001)


@pytest.mark.parametrize("piece", [3, 100_000])
def test_late_session_tickets_are_no_answer(
    bench: Bench, credential: Credential, authority: Authority, piece: int
) -> None:
    """Tickets that come when the answer is waited for are passed over, whole or in pieces."""

    def behave(peer: Peer) -> None:
        tls = HandTls(peer, authority.server_context(LOOPBACK))
        tickets = tls.tickets
        while tls.read_head():
            in_pieces(peer, tickets, piece)
            peer.send(tls.record(http_answer()))
            tickets = b""

    server = bench.server(behave)
    client = bench.client(f"https://127.0.0.1:{server.port}", ca_file=authority.ca_file)
    for _ in range(2):
        assert client.cancel(credential, REF) == Reply(http=200, body=DONE)
    assert server.used == [1, 1]


@pytest.mark.parametrize(("record", "piece"), [(1_000, 7), (9, 100_000), (9, 7)])
def test_records_of_any_cut_are_one_answer(
    bench: Bench, credential: Credential, authority: Authority, record: int, piece: int
) -> None:
    """A record that comes in pieces, and an answer of many records, are read as if they had come in one."""

    def behave(peer: Peer) -> None:
        tls = HandTls(peer, authority.server_context(LOOPBACK))
        peer.send(tls.tickets)
        answer = http_answer()
        while tls.read_head():
            records = [tls.record(answer[at : at + record]) for at in range(0, len(answer), record)]
            in_pieces(peer, b"".join(records), piece)

    server = bench.server(behave)
    client = bench.client(f"https://127.0.0.1:{server.port}", ca_file=authority.ca_file)
    for _ in range(2):
        assert client.cancel(credential, REF) == Reply(http=200, body=DONE)
    assert server.used == [1, 1]


@pytest.mark.parametrize("cut", [1, 20])
def test_cut_record_proves_nothing(bench: Bench, credential: Credential, authority: Authority, cut: int) -> None:
    """A record that breaks off is never read: its answer leaves the cancel in doubt."""

    def behave(peer: Peer) -> None:
        tls = HandTls(peer, authority.server_context(LOOPBACK))
        tls.read_head()
        peer.send(tls.tickets + tls.record(http_answer())[:-cut])

    server = bench.server(behave)
    client = bench.client(f"https://127.0.0.1:{server.port}", ca_file=authority.ca_file)
    answer = client.cancel(credential, REF)
    assert isinstance(answer, Failure)
    assert answer.seen
    assert client.requests_sent == 1


def test_tls_of_a_stranger_is_refused_unseen(
    bench: Bench, credential: Credential, authority: Authority, stranger: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate of another authority ends the attempt before a byte of it left, whatever the environment says."""
    server = bench.server(answering(http_answer()), stranger.server_context(LOOPBACK))
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, stranger.ca_file)
    trusts: list[dict[str, Any]] = [{"ca_file": authority.ca_file}, {}]
    for options in trusts:
        client = bench.client(server.url, **options)
        failed(client.cancel(credential, REF), seen=False, reason="no TLS session: SSLCertVerificationError")
    assert server.heads == []


def test_tls_for_another_host_is_refused_unseen(bench: Bench, credential: Credential, authority: Authority) -> None:
    """A good certificate that names another host is none."""
    server = bench.server(answering(http_answer()), authority.server_context(x509.DNSName("fapi.binance.com")))
    client = bench.client(server.url, ca_file=authority.ca_file)
    failed(client.cancel(credential, REF), seen=False, reason="no TLS session: SSLCertVerificationError")
    assert server.heads == []


def test_plain_text_where_tls_was_expected_is_unseen(bench: Bench, credential: Credential) -> None:
    """A server that does not speak TLS never gets the request."""
    server = bench.server(lambda peer: peer.send(http_answer() * 4))
    client = bench.client(f"https://127.0.0.1:{server.port}")
    failed(client.cancel(credential, REF), seen=False, reason="no TLS session: SSLError")


def test_hanging_handshake_is_bounded_and_unseen(bench: Bench, credential: Credential) -> None:
    """A server that accepts and says nothing costs the connect time-out."""
    server = bench.server(Peer.wait_until_closed)
    client = bench.client(f"https://127.0.0.1:{server.port}", connect_timeout_s=0.2)
    with bounded(0.2):
        failed(client.cancel(credential, REF), seen=False, reason="no TLS session: TimeoutError")


def late_tls(tls: ssl.SSLContext, late_s: float) -> Behaviour:
    """Let the client wait for the handshake, then answer as if nothing had been."""

    def behave(peer: Peer) -> None:
        threading.Event().wait(late_s)
        with tls.wrap_socket(peer.sock, server_side=True) as peer.sock:
            answering(http_answer())(peer)

    return behave


def test_what_is_sent_has_time_to_be_answered(bench: Bench, credential: Credential, authority: Authority) -> None:
    """Connecting may use half of the attempt, not all of it: then the request stays unsent, and out of doubt."""
    server = bench.server(late_tls(authority.server_context(LOOPBACK), 0.6 * TOTAL_S))
    client = bench.client(
        f"https://127.0.0.1:{server.port}", ca_file=authority.ca_file, connect_timeout_s=5, total_timeout_s=TOTAL_S
    )
    failed(client.cancel(credential, REF), seen=False, reason="no TLS session: TimeoutError")


def test_steps_of_connecting_share_one_bound(bench: Bench, credential: Credential, authority: Authority) -> None:
    """A slow tunnel and a slow handshake, each within the bound, are not within it together."""
    server = bench.server(late_tls(authority.server_context(LOOPBACK), 0.6 * TOTAL_S))
    proxy = bench.server(relaying(late_s=0.6 * TOTAL_S))
    client = bench.client(
        f"https://127.0.0.1:{server.port}",
        ca_file=authority.ca_file,
        connect_timeout_s=5,
        total_timeout_s=2 * TOTAL_S,
        egress_proxy_url=proxy.url,
    )
    failed(client.cancel(credential, REF), seen=False, reason="no TLS session: TimeoutError")


def test_no_session_keys_are_written(
    bench: Bench, credential: Credential, authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The environment cannot make the client give its TLS keys away."""
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    server = bench.server(answering(http_answer()), authority.server_context(LOOPBACK))
    assert isinstance(bench.client(server.url, ca_file=authority.ca_file).cancel(credential, REF), Reply)
    assert not (tmp_path / "keys").exists()


# ---- through a proxy ------------------------------------------------------------------------------------------------

LOGIN = "egress:hunter2@/:%"
LOGIN_IN_URL = "egress:hunter2%40%2F%3A%25"


@pytest.mark.parametrize("proxy_tls", [False, True])
def test_tunnel_through_a_proxy(bench: Bench, credential: Credential, authority: Authority, proxy_tls: bool) -> None:
    """The proxy sees the host and its own password, the exchange sees the request, and the tunnel is kept."""
    server = bench.server(answering(http_answer()), authority.server_context(LOOPBACK))
    proxy = bench.server(relaying(LOGIN), authority.server_context(LOOPBACK) if proxy_tls else None)
    client = bench.client(
        server.url,
        ca_file=authority.ca_file,
        egress_proxy_url=f"{proxy.url.replace('://', f'://{LOGIN_IN_URL}@')}",
    )
    for _ in range(3):
        assert replied(client.cancel(credential, REF)).body == DONE
    assert len(proxy.heads) == 1
    assert proxy.heads[0].startswith(b"CONNECT 127.0.0.1:%d HTTP/1." % server.port)
    assert API_KEY.encode() not in proxy.heads[0]
    assert all(b"proxy" not in head.lower() for head in server.heads)
    assert server.heads[0].startswith(b"DELETE /fapi/v1/algoOrder?algoId=2146760&")


def test_plain_request_through_a_proxy(bench: Bench, credential: Credential) -> None:
    """A plain exchange is asked for by its whole URL, and the signed bytes are untouched."""
    server = bench.server(answering(http_answer()))
    proxy = bench.server(relaying(LOGIN, tunnels=False))
    client = bench.client(server.url, egress_proxy_url=f"http://{LOGIN_IN_URL}@127.0.0.1:{proxy.port}")
    assert replied(client.cancel(credential, OrderRef(None, "a:b/c"))).body == DONE
    assert proxy.heads[0].startswith(b"DELETE %b/fapi/v1/algoOrder?clientAlgoId=a%%3Ab%%2Fc&" % server.url.encode())
    payload, _, signature = query_of(proxy.heads[0]).partition("&signature=")
    assert signature == hmac.new(SECRET.encode(), payload.encode(), hashlib.sha256).hexdigest()


@pytest.mark.parametrize("proxy_tls", [False, True])
def test_end_of_a_tunnel_is_the_end_of_the_answer(
    bench: Bench, credential: Credential, authority: Authority, proxy_tls: bool
) -> None:
    """An exchange that goes away without a good-bye looks the same through a tunnel: in doubt, by its name."""
    server = bench.server(_drop_after_reading, authority.server_context(LOOPBACK))
    proxy = bench.server(relaying(), authority.server_context(LOOPBACK) if proxy_tls else None)
    client = bench.client(server.url, ca_file=authority.ca_file, egress_proxy_url=proxy.url)
    failed(client.cancel(credential, REF), seen=True, reason="no answer: RemoteDisconnected")
    assert client.requests_sent == len(server.heads) == 1


def _proxy_hangs(peer: Peer) -> None:
    peer.read_head()
    peer.wait_until_closed()


def _proxy_drips(peer: Peer) -> None:
    drip(b"HTTP/1.1 200 Connection established\r\n" + b"X: y\r\n" * 99)(peer)


def _proxy_drops(peer: Peer) -> None:
    peer.read_head()


@pytest.mark.parametrize("behaviour", [relaying("someone:else"), _proxy_hangs, _proxy_drips, _proxy_drops, _not_http])
def test_proxy_without_a_tunnel_is_unseen(
    bench: Bench, credential: Credential, behaviour: Behaviour, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the proxy does instead of opening the tunnel, the exchange saw nothing, and no password is shown."""
    caplog.set_level(logging.DEBUG)
    proxy = bench.server(behaviour)
    client = bench.client(
        f"https://127.0.0.1:{free_port()}",
        egress_proxy_url=f"http://{LOGIN_IN_URL}@127.0.0.1:{proxy.port}",
        connect_timeout_s=0.2,
        total_timeout_s=TOTAL_S,
    )
    with bounded():
        answer = client.cancel(credential, REF)
    assert isinstance(answer, Failure)
    assert not answer.seen
    assert answer.reason.startswith("no tunnel through the proxy: ")
    for text in (repr(answer), repr(client), *caplog.messages):
        assert "hunter2" not in text
    assert client.requests_sent == 0


def test_missing_proxy_is_unseen(bench: Bench, credential: Credential) -> None:
    """A proxy that is not there leaves no doubt either."""
    client = bench.client("https://127.0.0.1:9", egress_proxy_url=f"http://egress:hunter2@127.0.0.1:{free_port()}")
    failed(client.cancel(credential, REF), seen=False, reason="could not connect: ConnectionRefusedError")


# ---- what an answer tells beside its body ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "expected_ms"),
    [
        ("35", 35_000),
        (" 35 ", 35_000),
        ("0", 0),
        ("1.5", 1_500),
        ("9" * 400, MAX_RETRY_AFTER_MS),
        ("604800", MAX_RETRY_AFTER_MS),
        ("-5", None),
        ("soon", None),
        ("", None),
        ("0x10", None),
        ("1e9", None),
        ("Fri, 99 Foo 2026 99:99:99 GMT", None),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", MAX_RETRY_AFTER_MS),
    ],
)
def test_retry_after(bench: Bench, credential: Credential, header: str, expected_ms: int | None) -> None:
    """Seconds and dates become milliseconds within bounds; anything else is as if it were not there."""
    _, client = bench.to(answering(http_answer(b"{}", "429 Too Many Requests", Retry_After=header)))
    assert replied(client.cancel(credential, REF)).retry_after_ms == expected_ms


@pytest.mark.parametrize("zone", ["GMT", "-0000", "+0000"])
def test_retry_after_a_date_counts_by_the_exchanges_clock(bench: Bench, credential: Credential, zone: str) -> None:
    """A date is the exchange's: it is measured against its clock, however wrong the host's is."""
    clock = ServerClock(wall_ms=lambda: 0)
    exchange_s = 1_760_000_000
    date = email.utils.formatdate(exchange_s + 90).replace("-0000", zone)
    _, client = bench.to(answering(http_answer(b"{}", "418 Banned", Retry_After=date)), clock=clock)
    now_ns = time.monotonic_ns()
    clock.add_sample(now_ns, now_ns, exchange_s * 1000)
    answer = replied(client.cancel(credential, REF))
    assert answer.retry_after_ms is not None
    assert 85_000 <= answer.retry_after_ms <= 90_000 + BEHIND_MS


@pytest.mark.parametrize(("action", "challenge"), [("challenge", True), ("CHALLENGE", True), ("captcha", False)])
def test_challenge_of_the_firewall(bench: Bench, credential: Credential, action: str, challenge: bool) -> None:
    """The header alone marks the firewall's challenge; its body is empty."""
    _, client = bench.to(answering(http_answer(b"", "202 Accepted", x_amzn_waf_action=action)))
    assert client.cancel(credential, REF) == Reply(http=202, body=b"", challenge=challenge)


def test_used_weight_is_noted_from_every_answer(bench: Bench, credential: Credential) -> None:
    """Refusals tell the weight too; garbage does not overwrite it, and with the minute it is over."""
    wall = [1_760_000_000_000]
    answers = [
        http_answer(x_mbx_used_weight_1m="7"),
        http_answer(b"{}", "400 Bad Request", X_MBX_USED_WEIGHT_1M="2399"),
        http_answer(x_mbx_used_weight_1m="many"),
        http_answer(),
    ]
    _, client = bench.to(answering(*answers), clock=ServerClock(wall_ms=lambda: wall[0]))
    assert client.last_used_weight() == 0
    assert client.used_weight is None
    weights = []
    for _ in answers:
        client.cancel(credential, REF)
        weights.append(client.last_used_weight())
    assert weights == [7, 2399, 2399, 2399]
    assert client.used_weight is not None
    assert client.used_weight.minute == wall[0] // 60_000
    assert time.monotonic() - client.used_weight.seen_mono_s < 5
    wall[0] += 60_000
    assert client.last_used_weight() == 0


def test_late_weight_belongs_to_the_minute_of_its_request(bench: Bench, credential: Credential) -> None:
    """An answer that arrives after the minute has turned does not fill the new one, nor hide a newer answer."""
    minute_ms = 1_760_000_040_000
    started_ns = time.monotonic_ns()

    def wall_ms() -> int:  # the minute turns soon after the start
        return minute_ms - 300 + (time.monotonic_ns() - started_ns) // 1_000_000

    newer = threading.Event()
    answered = threading.Event()

    def behave(peer: Peer) -> None:
        while head := peer.read_head():
            if head.startswith(b"DELETE"):
                until(lambda: wall_ms() > minute_ms + 20)
                answered.set()
                assert newer.wait(5)
            peer.send(http_answer(x_mbx_used_weight_1m="2300" if head.startswith(b"DELETE") else "3"))

    _, client = bench.to(behave, clock=ServerClock(wall_ms=wall_ms))
    late = threading.Thread(target=client.cancel, args=(credential, REF))
    late.start()
    assert answered.wait(5)
    client.query(credential, REF)
    newer.set()
    late.join()
    assert client.last_used_weight() == 3


def test_weight_noted_by_a_wrong_clock_is_replaced(bench: Bench, credential: Credential) -> None:
    """When a clock that ran ahead is put right, the next answer's weight counts at once."""
    wall = [1_760_000_000_000]
    answers = [http_answer(x_mbx_used_weight_1m="2000"), http_answer(x_mbx_used_weight_1m="4")]
    _, client = bench.to(answering(*answers), clock=ServerClock(wall_ms=lambda: wall[0]))
    client.cancel(credential, REF)
    wall[0] -= 3_600_000
    client.cancel(credential, REF)
    assert client.last_used_weight() == 4


# ---- time, warmth, limits -------------------------------------------------------------------------------------------


def time_answer(server_time_ms: object) -> bytes:
    return http_answer(json.dumps({"serverTime": server_time_ms}).encode())


def test_sync_time_measures_the_exchanges_clock(lone_bench: Bench) -> None:
    """After asking, the clock shows the exchange's time, though the host's is hours off."""
    ahead_ms = 7_200_000

    def behave(peer: Peer) -> None:
        while peer.read_head():
            peer.send(time_answer(time.time_ns() // 1_000_000 + ahead_ms))

    clock = ServerClock()
    server, client = lone_bench.to(behave, clock=clock)
    assert client.sync_time()
    assert [head.split(b"\r\n")[0] for head in server.heads] == [b"GET /fapi/v1/time HTTP/1.1"] * 3
    assert b"APIKEY" not in server.heads[0].upper()
    assert clock.measured
    assert abs(clock.offset_ms - ahead_ms) <= 20
    assert -BEHIND_MS - 20 <= clock.now_ms() - ahead_ms - time.time_ns() // 1_000_000 <= 20


def test_time_needed_to_connect_does_not_spoil_the_sample(lone_bench: Bench, authority: Authority) -> None:
    """The round trip begins when the request is written, not when the connection is asked for."""
    slow_s = 0.3
    tls = authority.server_context(LOOPBACK)

    def behave(peer: Peer) -> None:
        threading.Event().wait(slow_s)
        with tls.wrap_socket(peer.sock, server_side=True) as peer.sock:
            peer.read_head()
            peer.send(time_answer(time.time_ns() // 1_000_000))

    server = lone_bench.server(behave)
    clock = ServerClock()
    client = lone_bench.client(f"https://127.0.0.1:{server.port}", clock, ca_file=authority.ca_file)
    assert client.sync_time(samples=1)
    # Counted from the start, half of the slow part would be taken for an offset.
    assert abs(clock.offset_ms) < slow_s * 1000 / 4


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"serverTime":"1760000000000"}',
        b'{"serverTime":true}',
        b'{"serverTime":1760000000}',
        b'{"serverTime":1760000000000000}',
        b'{"serverTime":1760000000000',
        b"[" * 60_000,
        b"\xff\xfe",
    ],
)
def test_sync_time_believes_no_nonsense(lone_bench: Bench, body: bytes) -> None:
    """An answer without a time in milliseconds teaches nothing, and nothing is raised."""
    clock = ServerClock()
    server, client = lone_bench.to(answering(http_answer(body)), clock=clock)
    assert not client.sync_time()
    assert not clock.measured
    assert len(server.heads) == 1
    assert client.take_refusal() is None


def test_sync_time_without_the_exchange(lone_bench: Bench) -> None:
    """Without a connection the clock stays as it was."""
    clock = ServerClock()
    client = lone_bench.client(f"http://127.0.0.1:{free_port()}", clock)
    assert (client.sync_time(), client.keep_warm(), client.weight_limit()) == (False, 0, None)
    assert not clock.measured


def test_keep_warm_uses_different_connections(bench: Bench, credential: Credential) -> None:
    """Two connections are in use at once, are those that cancels get, and the clock learns from both."""
    together = threading.Barrier(2)

    def behave(peer: Peer) -> None:
        peer.read_head()
        peer.send(time_answer(1_760_000_000_000)[:-1])  # held open: not whole until both were asked
        together.wait(5)
        peer.send(b"}")
        while head := peer.read_head():
            peer.send(time_answer(1_760_000_000_000) if b"/time" in head else http_answer())

    clock = ServerClock()
    server, client = bench.to(behave, clock=clock)
    assert client.keep_warm() == 2
    assert sorted(server.used) == [1, 2]
    assert clock.measured
    assert client.keep_warm() == 2
    assert sorted(server.used) == [1, 1, 2, 2]
    assert replied(client.cancel(credential, REF)).http == 200
    assert server.connections == 2
    assert client.requests_sent == 5


def test_keep_warm_survives_closed_connections(lone_bench: Bench) -> None:
    """Connections that the exchange closed while idle are opened anew."""
    closed: list[int] = []

    def once(peer: Peer) -> None:
        peer.read_head()
        peer.send(time_answer(1_760_000_000_000))
        peer.sock.close()
        closed.append(peer.number)

    server, client = lone_bench.to(once)
    for connections in (2, 4, 6):
        assert client.keep_warm() == 2
        assert server.connections == connections
        until(lambda expected=connections: len(closed) == expected)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("answer", "http"),
    [
        (http_answer(b"{}", "418 Banned", Retry_After="120"), 418),
        (http_answer(b"{}", "429 Too Many", Retry_After="3"), 429),
        (http_answer(b"<html>", "403 Forbidden"), 403),
        (http_answer(b"", "202 Accepted", x_amzn_waf_action="challenge"), 202),
    ],
)
def test_refusal_of_an_unsigned_call_is_kept_for_the_gate(lone_bench: Bench, answer: bytes, http: int) -> None:
    """A ban that only a keep-warm call met is not overlooked: it is handed over once, and calls stop at the first."""
    server, client = lone_bench.to(answering(answer))
    for call in (client.sync_time, lambda: client.keep_warm(1), client.weight_limit):
        assert not call()
        refusal = client.take_refusal()
        assert refusal is not None
        assert refusal.http == http
        assert classify(Call.QUERY, REF, refusal).means in (Means.LIMITED, Means.BLOCKED)
        assert client.take_refusal() is None
    assert len(server.heads) == 3


LIMITS = [
    {"rateLimitType": "ORDERS", "interval": "MINUTE", "intervalNum": 1, "limit": 1200},
    {"rateLimitType": "REQUEST_WEIGHT", "interval": "SECOND", "intervalNum": 10, "limit": 300},
    {"rateLimitType": "REQUEST_WEIGHT", "interval": "MINUTE", "intervalNum": 1, "limit": 6000},
]


@pytest.mark.parametrize("symbols", [0, 3_000])
def test_weight_limit(lone_bench: Bench, symbols: int) -> None:
    """The limit for a minute is found, also where the list of symbols is too long to be read."""
    body = {"timezone": "UTC", "rateLimits": LIMITS, "symbols": [{"symbol": f"COIN{n}USDT"} for n in range(symbols)]}
    server, client = lone_bench.to(answering(http_answer(json.dumps(body, indent=1).encode())))
    assert client.weight_limit() == 6000
    assert server.heads[0].startswith(b"GET /fapi/v1/exchangeInfo HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"rateLimits":',
        b'{"rateLimits": 5}',
        b'{"rateLimits":[1]}',
        b'{"rateLimits":[{"rateLimitType":"REQUEST_WEIGHT"}]}',
        b'{"rateLimits":' + b"[" * 60_000,
        json.dumps({"rateLimits": LIMITS[:2]}).encode(),
        *[json.dumps({"rateLimits": [{**LIMITS[2], "limit": limit}]}).encode() for limit in (0, -1, "6000", True)],
    ],
)
def test_weight_limit_is_unknown_rather_than_wrong(lone_bench: Bench, body: bytes) -> None:
    """Where the answer does not say it, there is no limit to go by, and nothing is raised."""
    _, client = lone_bench.to(answering(http_answer(body)))
    assert client.weight_limit() is None


# ---- secrets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "behaviour",
    [
        answering(http_answer()),
        answering(http_answer(b"", "302 Found", Location="http://127.0.0.1/")),
        answering(b"HTTP/1.1 200 OK\r\nno colon here\r\nContent-Length: 2\r\n\r\n{}"),
        answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n"),
        _drop_after_reading,
        _reset_after_reading,
        _contradicting_lengths,
        _flood,
        _cut_body("200 OK"),
        Peer.wait_until_closed,
    ],
)
def test_no_secret_in_logs_or_answers(
    bench: Bench, credential: Credential, behaviour: Behaviour, caplog: pytest.LogCaptureFixture
) -> None:
    """With every logger at its most talkative, neither the signature nor the signed URL nor the secret is shown."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "urllib3")
    server, client = bench.impatient(behaviour)
    answers = [client.cancel(credential, REF), client.query(credential, REF)]
    formatter = logging.Formatter("%(message)s %(args)s %(exc_text)s")
    shown = [formatter.format(record) for record in caplog.records]
    assert any("Starting new HTTP connection" in text for text in shown)
    signatures = [query_of(head).partition("&signature=")[2] for head in server.heads]
    pending = client.prepare(Call.CANCEL, credential, REF)
    for text in [*shown, *map(repr, answers), repr(client), repr(credential), repr(pending)]:
        assert SECRET not in text
        assert API_KEY not in text
        assert "signature" not in text
        assert "timestamp=" not in text
        assert not any(signature and signature in text for signature in signatures)


# ---- one call in steps ----------------------------------------------------------------------------------------------


def prepared(client: Exchange, credential: Credential, ref: OrderRef = REF) -> Pending:
    return client.prepare(Call.CANCEL, credential, ref)


def begun(client: Exchange, credential: Credential) -> Pending:
    """A call whose request has been written, on a new connection if there was none."""
    pending = prepared(client, credential)
    assert pending.begin() is None
    if not pending.sent:
        assert pending.connect() is None
        assert pending.begin() is None
    assert pending.sent
    return pending


def received(pending: Pending) -> Reply | Failure:
    """What comes of a call that has begun; only the socket is waited for."""
    ends_at = time.monotonic() + 5
    while True:
        assert select.select([pending.fileno], [], [], max(ends_at - time.monotonic(), 0))[0], "not in time"
        answer = pending.receive()
        if answer is not None:
            return answer


def without_tickets(context: ssl.SSLContext) -> ssl.SSLContext:
    context.num_tickets = 0
    return context


@pytest.mark.parametrize("secure", [False, True])
def test_dropped_connection_serves_the_next_call(
    lone_bench: Bench, credential: Credential, authority: Authority, secure: bool
) -> None:
    """A call that is dropped when its connection stands has sent nothing, and the next one need not connect."""
    tls = without_tickets(authority.server_context(LOOPBACK)) if secure else None
    server = lone_bench.server(answering(http_answer()), tls)
    client = lone_bench.client(server.url, ca_file=authority.ca_file)
    dropped = prepared(client, credential)
    assert dropped.begin() is None
    assert not dropped.sent
    assert dropped.connect() is None
    dropped.drop()
    assert (client.requests_sent, server.heads) == (0, [])
    following = prepared(client, credential)
    assert following.begin() is None
    assert following.sent
    assert received(following) == Reply(http=200, body=DONE)
    assert (server.connections, len(server.heads), client.requests_sent) == (1, 1, 1)


def test_call_can_be_dropped_at_any_step(lone_bench: Bench, credential: Credential) -> None:
    """Before its connection stands, and on one that stood already, a drop costs nothing either."""
    server, client = lone_bench.to(answering(http_answer()))
    prepared(client, credential).drop()
    unconnected = prepared(client, credential)
    assert unconnected.begin() is None
    unconnected.drop()
    assert server.connections == 0
    assert received(begun(client, credential)) == Reply(http=200, body=DONE)
    prepared(client, credential).drop()
    assert received(begun(client, credential)) == Reply(http=200, body=DONE)
    assert (server.used, client.requests_sent) == ([1, 1], 2)


def test_begin_does_not_connect(lone_bench: Bench, credential: Credential) -> None:
    """Where nobody listens begin() does not find out; connect() does, and nothing counts as sent."""
    client = lone_bench.client(f"http://127.0.0.1:{free_port()}")
    pending = prepared(client, credential)
    assert pending.begin() is None
    assert not pending.sent
    failure = pending.connect()
    assert failure is not None
    failed(failure, seen=False, reason="could not connect: ConnectionRefusedError")
    pending.drop()
    assert client.requests_sent == 0


@pytest.mark.parametrize("secure", [False, True])
def test_begin_never_waits(lone_bench: Bench, credential: Credential, authority: Authority, secure: bool) -> None:
    """A server that does not read holds nobody: a request that the socket does not take whole is in doubt at once."""
    over = threading.Event()

    def ignore(peer: Peer) -> None:
        over.wait(10)

    tls = authority.server_context(LOOPBACK) if secure else None
    server = lone_bench.server(ignore, tls)
    clients = {size: lone_bench.client(f"{server.url}/{'x' * size}", ca_file=authority.ca_file) for size in (1, 2**24)}
    pendings = {size: prepared(client, credential) for size, client in clients.items()}
    for pending in pendings.values():
        assert pending.begin() is None
        assert pending.connect() is None
    with bounded(0):
        assert pendings[1].begin() is None
        assert pendings[1].sent
        assert pendings[1].receive() is None
        failure = pendings[2**24].begin()
    assert failure is not None
    error = "SSLWantWriteError" if secure else "BlockingIOError"
    failed(failure, seen=True, reason=f"sending broke off: {error}")
    failed(pendings[1].expire(), seen=True, reason="no answer: TimeoutError")
    assert [client.requests_sent for client in clients.values()] == [1, 1]
    over.set()


@pytest.mark.parametrize("secure", [False, True])
def test_begin_notices_a_connection_that_was_closed_while_idle(
    lone_bench: Bench, credential: Credential, authority: Authority, secure: bool
) -> None:
    """It sends nothing into it, and asks for a new one."""
    closed = threading.Event()

    def once(peer: Peer) -> None:
        peer.read_head()
        peer.send(http_answer())
        peer.sock.close()
        closed.set()

    server = lone_bench.server(once, authority.server_context(LOOPBACK) if secure else None)
    client = lone_bench.client(server.url, ca_file=authority.ca_file)
    assert received(begun(client, credential)) == Reply(http=200, body=DONE)
    assert closed.wait(5)
    second = prepared(client, credential)
    assert second.begin() is None
    assert not second.sent
    assert client.requests_sent == 1
    assert second.connect() is None
    assert second.begin() is None
    assert received(second) == Reply(http=200, body=DONE)
    assert (server.used, client.requests_sent) == ([1, 2], 2)


def test_request_is_signed_when_it_is_written(lone_bench: Bench, credential: Credential) -> None:
    """However long a call waited for its connection, its timestamp is that of the sending."""
    wall = [1_760_000_000_000]
    server, client = lone_bench.to(answering(http_answer()), clock=ServerClock(wall_ms=lambda: wall[0]))
    pending = prepared(client, credential)
    assert pending.begin() is None
    assert pending.connect() is None
    wall[0] += 2_000
    assert pending.begin() is None
    assert isinstance(received(pending), Reply)
    assert b"timestamp=1760000002000&" in server.heads[0]


def test_time_of_a_call_begins_when_it_is_prepared(lone_bench: Bench, credential: Credential) -> None:
    """A call that was kept waiting for all its time is not sent any more, with a connection or without."""
    server, client = lone_bench.impatient(answering(http_answer()))
    pendings = [prepared(client, credential) for _ in range(2)]
    assert pendings[1].begin() is None
    assert received(begun(client, credential)) == Reply(http=200, body=DONE)
    until(lambda: time.monotonic() > max(pending.deadline_s for pending in pendings))
    with_connection, without = pendings[0].begin(), pendings[1].connect()
    assert with_connection == without == Failure(seen=False, reason="could not connect: TimeoutError")
    assert len(server.heads) == client.requests_sent == 1


def test_receive_never_waits(lone_bench: Bench, credential: Credential) -> None:
    """It takes what is there, and says nothing until the answer is whole."""
    answer = http_answer()
    go = threading.Semaphore(0)

    def behave(peer: Peer) -> None:
        peer.read_head()
        for at in range(0, len(answer), 30):
            go.acquire(timeout=5)
            peer.send(answer[at : at + 30])

    _, client = lone_bench.to(behave)
    pending = begun(client, credential)
    for _ in range(0, len(answer) - 30, 30):
        assert pending.receive() is None
        go.release()
        assert select.select([pending.fileno], [], [], 5)[0]
        assert pending.receive() is None
    go.release()
    assert received(pending) == Reply(http=200, body=DONE)


def test_tickets_alone_are_nothing_yet(lone_bench: Bench, credential: Credential, authority: Authority) -> None:
    """A socket that is readable for session tickets alone has no answer, and does not make receive() wait for one."""
    go_on = threading.Event()

    def behave(peer: Peer) -> None:
        tls = HandTls(peer, authority.server_context(LOOPBACK))
        tls.read_head()
        peer.send(tls.tickets)
        assert go_on.wait(5)
        peer.send(tls.record(http_answer()))

    server = lone_bench.server(behave)
    client = lone_bench.client(f"https://127.0.0.1:{server.port}", ca_file=authority.ca_file)
    pending = begun(client, credential)
    assert select.select([pending.fileno], [], [], 5)[0]
    assert pending.receive() is None
    go_on.set()
    assert received(pending) == Reply(http=200, body=DONE)


def test_expiry_comes_second_to_an_answer_that_is_there(lone_bench: Bench, credential: Credential) -> None:
    """Where the loop hears of the time before it has read, the answer counts, and its connection is kept."""
    server, client = lone_bench.impatient(answering(http_answer()))
    pending = begun(client, credential)
    assert select.select([pending.fileno], [], [], 5)[0]
    assert pending.expire() == Reply(http=200, body=DONE)
    assert received(begun(client, credential)) == Reply(http=200, body=DONE)
    assert (server.used, client.requests_sent) == ([1, 1], 2)


def test_calls_of_one_loop_get_their_own_answers(lone_bench: Bench, credential: Credential) -> None:
    """Many calls in flight at once, in rounds that share their connections: each gets the answer to its own."""

    def echo(peer: Peer) -> None:
        while head := peer.read_head():
            algo_id = re.search(rb"algoId=(\d+)", head)
            assert algo_id is not None
            peer.send(http_answer(algo_id[1]))

    server, client = lone_bench.to(echo)

    async def rounds() -> None:
        for first in (100, 200, 300):
            refs = [OrderRef(first + n) for n in range(20)]
            answers = await asyncio.gather(*[made(prepared(client, credential, ref)) for ref in refs])
            assert answers == [Reply(http=200, body=b"%d" % ref.algo_id) for ref in refs if ref.algo_id is not None]

    asyncio.run(rounds())
    assert server.connections <= 20
    assert client.requests_sent == 60


def test_flood_does_not_hold_up_the_loop(lone_bench: Bench, credential: Credential) -> None:
    """While one server floods its call, the loop's other calls are answered."""
    server, flooded = lone_bench.to(_flood, total_timeout_s=1.5)
    _, client = lone_bench.to(answering(http_answer()))

    async def both() -> None:
        flood = asyncio.create_task(made(prepared(flooded, credential)))
        while not (server.heads or flood.done()):
            await asyncio.sleep(0)
        for _ in range(5):
            assert await made(prepared(client, credential)) == Reply(http=200, body=DONE)
        assert not flood.done()
        failed(await flood, seen=True, reason="no answer: TimeoutError")

    asyncio.run(both())


@pytest.mark.parametrize("route", ["plain", "tls", "tunnel over tls"])
def test_both_ways_share_the_connections(
    lone_bench: Bench, credential: Credential, authority: Authority, route: str
) -> None:
    """A connection serves calls that wait and calls that do not in turn, each in its own way."""

    def behave(peer: Peer) -> None:
        while head := peer.read_head():
            peer.send(time_answer(1_760_000_000_000) if b"/time" in head else http_answer())

    server = lone_bench.server(behave, None if route == "plain" else authority.server_context(LOOPBACK))
    proxy = lone_bench.server(relaying(), authority.server_context(LOOPBACK))
    client = lone_bench.client(
        server.url, ca_file=authority.ca_file, egress_proxy_url=proxy.url if "tunnel" in route else None
    )
    for _ in range(2):
        assert client.keep_warm(1) == 1
        assert received(begun(client, credential)) == Reply(http=200, body=DONE)
        assert client.cancel(credential, REF) == Reply(http=200, body=DONE)
        assert received(begun(client, credential)) == Reply(http=200, body=DONE)
    assert server.used == [1] * 8
    assert client.requests_sent == 8
