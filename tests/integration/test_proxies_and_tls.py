"""TLS and proxies on the way to the exchange: who is trusted, who sees what, and what becomes of a call without."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import pytest
from cryptography import x509

from tests.loopback import (
    DONE,
    LOOPBACK,
    Authority,
    Behaviour,
    HandTls,
    Peer,
    answering,
    drip,
    drop_after_reading,
    free_port,
    http_answer,
    late_tls,
    not_http,
    relaying,
)
from tests.ways import API_KEY, BRIEF_MS, TOTAL_S, Bench, bounded, failed
from worker.classify import Reply

WELL = Reply(http=200, body=DONE)

# ---- TLS ------------------------------------------------------------------------------------------------------------


def test_given_authorities_replace_the_others(bench: Bench) -> None:
    """A certificate of the given authority for this host is accepted, the connection kept, and no other one trusted."""
    server, client = bench.to(answering(http_answer()), secure=True)
    for _ in range(3):
        assert client.ask() == WELL
    assert server.connections == 1
    assert client.route.tls is not None
    assert len(client.route.tls.get_ca_certs()) == 1


def test_late_session_tickets_are_no_answer(bench: Bench) -> None:
    """Tickets that come when the answer is waited for are passed over."""

    def behave(peer: Peer) -> None:
        tls = HandTls(peer, bench.tls())
        before = tls.tickets
        while tls.read_head():
            peer.send(before + tls.record(http_answer()))
            before = b""

    server, client = bench.over_tls(behave)
    for _ in range(2):
        assert client.ask() == WELL
    assert server.used == [1, 1]


def test_tls_of_a_stranger_is_refused_unseen(
    bench: Bench, stranger: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate of another authority ends the attempt before a byte of it left, whatever the environment says."""
    server = bench.server(answering(http_answer()), stranger.server_context(LOOPBACK))
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, stranger.ca_file)
    for ca_file in (bench.authority.ca_file, None):
        client = bench.client(server.url, ca_file=ca_file)
        failed(client.ask(), seen=False, reason="no TLS session: SSLCertVerificationError")
    assert server.heads == []


def test_tls_for_another_host_is_refused_unseen(bench: Bench) -> None:
    """A good certificate that names another host is none."""
    tls = bench.authority.server_context(x509.DNSName("fapi.binance.com"))
    server = bench.server(answering(http_answer()), tls)
    failed(bench.client(server.url).ask(), seen=False, reason="no TLS session: SSLCertVerificationError")
    assert server.heads == []


def test_plain_text_where_tls_was_expected_is_unseen(loop_bench: Bench) -> None:
    """A server that does not speak TLS never gets the request."""
    _, client = loop_bench.over_tls(lambda peer: peer.send(http_answer() * 4))
    failed(client.ask(), seen=False, reason="no TLS session: SSLError")


def in_clear(peer: Peer) -> None:
    """Answer whatever comes in plain text."""
    peer.sock.recv(1)
    peer.send(http_answer() * 4)


@pytest.mark.parametrize("foreign", [False, True])
def test_tls_that_fails_in_a_tunnel_is_unseen(loop_bench: Bench, stranger: Authority, foreign: bool) -> None:
    """Behind a tunnel neither a stranger's certificate nor plain text gets the request."""
    tls = stranger.server_context(LOOPBACK) if foreign else None
    server = loop_bench.server(answering(http_answer()) if foreign else in_clear, tls)
    proxy = loop_bench.server(relaying())
    client = loop_bench.client(f"https://127.0.0.1:{server.port}", egress_proxy_url=proxy.url)
    kind = "SSLCertVerificationError" if foreign else "SSLError"
    failed(client.ask(), seen=False, reason=f"no TLS session: {kind}")
    assert server.heads == []


def test_word_that_comes_with_the_handshake_is_no_answer(loop_bench: Bench) -> None:
    """An exchange that speaks before it is asked gets no request, and no second connection for the same call."""

    def behave(peer: Peer) -> None:
        tls = HandTls(peer, loop_bench.tls(), ssl.TLSVersion.TLSv1_2)
        peer.send(tls.tickets + tls.record(http_answer()))
        peer.wait_until_closed()

    server, client = loop_bench.over_tls(behave)
    failed(client.ask(), seen=False, reason="not sent: ConnectionResetError")
    assert server.connections == 1


@pytest.mark.parametrize("late_s", [0.6 * TOTAL_S, 30])
def test_slow_handshake_is_bounded_and_unseen(loop_bench: Bench, late_s: float) -> None:
    """Connecting may use half of the attempt, so that what is sent has time to be answered: the request stays unsent,
    and out of doubt."""

    def behave(peer: Peer) -> None:
        (late_tls(loop_bench.tls(), late_s) if late_s < 1 else Peer.wait_until_closed)(peer)

    _, client = loop_bench.over_tls(behave, recv_window_ms=BRIEF_MS)
    with bounded(TOTAL_S / 2):
        failed(client.ask(), seen=False, reason="no TLS session: TimeoutError")


@pytest.mark.parametrize("behaviour", [Peer.wait_until_closed, lambda peer: peer.send(http_answer() * 4)])
def test_handshake_of_unknown_fate_is_perhaps_seen(requests_bench: Bench, behaviour: Behaviour) -> None:
    """Where requests does not tell a handshake from an answer, the call is in doubt and its time is bounded."""
    _, client = requests_bench.over_tls(behaviour, recv_window_ms=BRIEF_MS)
    with bounded():
        failed(client.ask(), seen=True, reason="no answer:")


@pytest.mark.parametrize(("late_s", "recv_window_ms"), [(1.2, 10_000), (0.6, 2_500)])
def test_steps_of_connecting_share_one_bound(loop_bench: Bench, late_s: float, recv_window_ms: int) -> None:
    """A tunnel and a handshake that are slow do no harm while half of the attempt is left; each within that bound is
    not enough."""
    proxy = loop_bench.server(relaying(late_s=late_s))
    behaviour = late_tls(loop_bench.tls(), late_s)
    _, client = loop_bench.over_tls(behaviour, recv_window_ms=recv_window_ms, egress_proxy_url=proxy.url)
    answer = client.ask()
    if late_s > 1:
        assert answer == WELL
    else:
        failed(answer, seen=False, reason="no TLS session: TimeoutError")


def test_no_session_keys_are_written(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment cannot make the client give its TLS keys away."""
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    _, client = bench.to(answering(http_answer()), secure=True)
    assert client.ask() == WELL
    assert not (tmp_path / "keys").exists()


# ---- through a proxy ------------------------------------------------------------------------------------------------

LOGIN = "egress:hunter2@/:%"
LOGIN_IN_URL = "egress:hunter2%40%2F%3A%25"


@pytest.mark.parametrize("proxy_tls", [False, True])
def test_tunnel_through_a_proxy(bench: Bench, proxy_tls: bool) -> None:
    """The proxy sees the host and its own password, the exchange sees the request, and the tunnel is kept."""
    proxy = bench.server(relaying(LOGIN), bench.tls() if proxy_tls else None)
    proxy_url = proxy.url.replace("://", f"://{LOGIN_IN_URL}@")
    server, client = bench.to(answering(http_answer()), secure=True, egress_proxy_url=proxy_url)
    for _ in range(3):
        assert client.ask() == WELL
    # With TLS in TLS, requests' connection serves one call.
    assert len(proxy.heads) == (3 if proxy_tls and bench.way == "requests" else 1)
    assert proxy.heads[0].startswith(b"CONNECT 127.0.0.1:%d HTTP/1." % server.port)
    assert API_KEY.encode() not in proxy.heads[0]
    assert all(b"proxy" not in head.lower() for head in server.heads)
    assert server.heads[0].startswith(b"DELETE /fapi/v1/algoOrder?algoId=2146760&")


@pytest.mark.parametrize("proxy_tls", [False, True])
def test_end_of_a_tunnel_is_the_end_of_the_answer(bench: Bench, proxy_tls: bool) -> None:
    """An exchange that goes away without a good-bye looks the same through a tunnel: in doubt, by its name."""
    proxy = bench.server(relaying(), bench.tls() if proxy_tls else None)
    server, client = bench.to(drop_after_reading, secure=True, egress_proxy_url=proxy.url)
    failed(client.ask(), seen=True, reason="no answer: RemoteDisconnected")
    assert len(server.heads) == 1


def _proxy_hangs(peer: Peer) -> None:
    peer.read_head()
    peer.wait_until_closed()


def _proxy_drips(peer: Peer) -> None:
    drip(b"HTTP/1.1 200 Connection established\r\n" + b"X: y\r\n" * 99, TOTAL_S / 20)(peer)


def _speaks_for_the_exchange(peer: Peer) -> None:
    peer.read_head()
    peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n" + http_answer())
    peer.wait_until_closed()


def _no_tunnel(bench: Bench, behaviour: Behaviour, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    proxy = bench.server(behaviour)
    url = f"http://{LOGIN_IN_URL}@127.0.0.1:{proxy.port}"
    client = bench.client(f"https://127.0.0.1:{free_port()}", egress_proxy_url=url, recv_window_ms=BRIEF_MS)
    with bounded():
        answer = failed(client.ask(), seen=False, reason=f"no tunnel through the proxy: {reason}")
    for text in (repr(answer), repr(client), *caplog.messages):
        assert "hunter2" not in text


def test_refused_tunnel_is_named(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A proxy that wants another password is a proof that nothing left, and no password is shown."""
    _no_tunnel(bench, relaying("someone:else"), "407", caplog)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (_proxy_hangs, "TimeoutError"),
        (_proxy_drips, "TimeoutError"),
        (drop_after_reading, "RemoteDisconnected"),
        (not_http, "MalformedResponse"),
        (_speaks_for_the_exchange, "MalformedResponse"),
    ],
)
def test_proxy_without_a_tunnel_is_unseen(
    loop_bench: Bench, behaviour: Behaviour, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever else the proxy does instead of opening the tunnel, the exchange saw nothing."""
    _no_tunnel(loop_bench, behaviour, reason, caplog)


def test_missing_proxy_is_unseen(bench: Bench) -> None:
    """A proxy that is not there leaves no doubt either."""
    client = bench.client("https://127.0.0.1:9", egress_proxy_url=f"http://egress:hunter2@127.0.0.1:{free_port()}")
    failed(client.ask(), seen=False, reason="could not connect: ConnectionRefusedError")
