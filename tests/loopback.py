"""Little servers on loopback that a test scripts byte by byte, and certificates for them."""

from __future__ import annotations

import atexit
import base64
import contextlib
import datetime
import ipaddress
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DONE = b'{"algoId":2146760,"clientAlgoId":"a:b/c.d_e-f","code":"200","msg":"success"}'


# ---- servers --------------------------------------------------------------------------------------------------------


def http_answer(body: bytes = DONE, status: str = "200 OK", /, **headers: str) -> bytes:
    """An answer with its length; underscores in header names become hyphens."""
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
        """Write it all."""
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
        self._peers: list[Peer] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def note(self, number: int, head: bytes) -> None:
        """Keep what a connection has asked for."""
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
            self._peers.append(Peer(self, self.connections, sock))
            thread = threading.Thread(target=self._serve, args=(self._peers[-1],))
            self._threads.append(thread)
            thread.start()

    def _serve(self, peer: Peer) -> None:
        try:
            peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                peer.sock = self._tls.wrap_socket(peer.sock, server_side=True, do_handshake_on_connect=False)
                peer.sock.do_handshake()
            self._behaviour(peer)
        except OSError:
            pass  # the client went away
        finally:
            peer.sock.close()

    def close(self) -> None:
        """End listener, connections and threads."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)
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


def relaying(user_and_password: str = "", late_s: float = 0) -> Behaviour:
    """A proxy for CONNECT, which may want a password."""
    wanted = "Basic " + base64.b64encode(user_and_password.encode()).decode()

    def behave(peer: Peer) -> None:
        head = peer.read_head().decode()
        if user_and_password and f"Proxy-Authorization: {wanted}" not in head:
            peer.send(b"HTTP/1.1 407 Who are you hunter2\r\nContent-Length: 0\r\n\r\n")
            return
        match = re.match(r"CONNECT 127\.0\.0\.1:(\d+) ", head)
        if match is None:
            return
        threading.Event().wait(late_s)
        with socket.create_connection(("127.0.0.1", int(match[1]))) as onward:
            peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
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


# ---- certificates ---------------------------------------------------------------------------------------------------


class Authority:
    """A certificate authority of the test's own."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self.key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._certificate = self._signed(self._name, self.key, x509.BasicConstraints(ca=True, path_length=0))
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
        return builder.sign(self.key, hashes.SHA256())

    def own(self, name: x509.GeneralName) -> x509.Certificate:
        """A certificate for ``name`` that is signed by its own key."""
        return self._signed(self._name, self.key, x509.SubjectAlternativeName([name]))

    def server_context(self, name: x509.GeneralName) -> ssl.SSLContext:
        """TLS for a server whose certificate is for ``name``."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
        certificate = self._signed(subject, key, x509.SubjectAlternativeName([name]))
        chain = self._directory / f"server-{certificate.serial_number}.pem"
        chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + _pem(key))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        return context


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def certificate(directory: Path) -> tuple[str, str]:
    """A certificate for loopback that nobody vouches for, and its key, as files."""
    cert_path, key_path = directory / "cert.pem", directory / "key.pem"
    authority = Authority(directory, "localhost")
    cert_path.write_bytes(authority.own(LOOPBACK).public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(_pem(authority.key))
    return str(cert_path), str(key_path)


class HandTls:
    """A server's side of TLS that hands out its records, for the test to send them when and how it wants."""

    def __init__(self, peer: Peer, context: ssl.SSLContext, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> None:
        """Shake hands. What ends it is kept back: the session tickets, with TLS 1.2 the server's last word too."""
        self._peer = peer
        self._from_client, self._to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        context.minimum_version = context.maximum_version = version
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


def free_port() -> int:
    """A port on which nobody listens, kept from everybody else until this process ends."""
    held = socket.socket()
    atexit.register(held.close)
    held.bind(("127.0.0.1", 0))
    return int(held.getsockname()[1])


def query_of(head: bytes) -> str:
    """The query of a request."""
    return head.split(b" ", 2)[1].partition(b"?")[2].decode()


def drip(data: bytes, pause_s: float, at_once: bytes = b"") -> Behaviour:
    """Send one byte at a time, each long before a time-out between two reads could end it."""

    def behave(peer: Peer) -> None:
        peer.read_head()
        peer.send(at_once)
        for byte in data:
            peer.send(bytes([byte]))
            time.sleep(pause_s)

    return behave


def drop_after_reading(peer: Peer) -> None:
    """Take a request and go away."""
    peer.read_head()


def not_http(peer: Peer) -> None:
    """Answer in another protocol."""
    peer.read_head()
    peer.send(b"SSH-2.0-OpenSSH\r\n\r\n")


def late_tls(tls: ssl.SSLContext, late_s: float) -> Behaviour:
    """Let the client wait for the handshake, then answer as if nothing had been."""

    def behave(peer: Peer) -> None:
        time.sleep(late_s)
        with tls.wrap_socket(peer.sock, server_side=True) as peer.sock:
            answering(http_answer())(peer)

    return behave
