"""TLS and proxies on the way to the exchange: who is trusted, who sees what, and what becomes of a call without."""

from __future__ import annotations

import logging
import ssl
import time
from pathlib import Path
from typing import Any

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
from tests.ways import API_KEY, BRIEF_MS, REF, TOTAL_S, Bench, bounded, failed, replied
from worker.classify import Failure, Reply
from worker.signing import Credential

# ---- TLS ------------------------------------------------------------------------------------------------------------


def test_tls_with_the_right_authority(bench: Bench, authority: Authority) -> None:
    """A certificate of the given authority for this host is accepted, and the connection kept."""
    server, client = bench.to(answering(http_answer()), secure=True)
    for _ in range(3):
        assert replied(client.ask()).body == DONE
    assert server.connections == 1


def in_pieces(peer: Peer, data: bytes, size: int) -> None:
    """Send ``size`` bytes at a time, each by itself."""
    for at in range(0, len(data), size):
        peer.send(data[at : at + size])
        time.sleep(0.001)


@pytest.mark.parametrize("piece", [3, 100_000])
def test_late_session_tickets_are_no_answer(bench: Bench, piece: int) -> None:
    """Tickets that come when the answer is waited for are passed over, whole or in pieces."""

    def behave(peer: Peer) -> None:
        tls = HandTls(peer, bench.tls())
        tickets = tls.tickets
        while tls.read_head():
            in_pieces(peer, tickets, piece)
            peer.send(tls.record(http_answer()))
            tickets = b""

    server, client = bench.over_tls(behave)
    for _ in range(2):
        assert client.ask() == Reply(http=200, body=DONE)
    assert server.used == [1, 1]


@pytest.mark.parametrize(("record", "piece"), [(1_000, 7), (9, 100_000), (9, 7)])
def test_records_of_any_cut_are_one_answer(bench: Bench, record: int, piece: int) -> None:
    """A record that comes in pieces, and an answer of many records, are read as if they had come in one."""

    def behave(peer: Peer) -> None:
        tls = HandTls(peer, bench.tls())
        peer.send(tls.tickets)
        answer = http_answer()
        while tls.read_head():
            records = [tls.record(answer[at : at + record]) for at in range(0, len(answer), record)]
            in_pieces(peer, b"".join(records), piece)

    server, client = bench.over_tls(behave)
    for _ in range(2):
        assert client.ask() == Reply(http=200, body=DONE)
    assert server.used == [1, 1]


@pytest.mark.parametrize("cut", [1, 20])
def test_cut_record_proves_nothing(bench: Bench, cut: int) -> None:
    """A record that breaks off is never read: its answer leaves the cancel in doubt."""

    def behave(peer: Peer) -> None:
        tls = HandTls(peer, bench.tls())
        tls.read_head()
        peer.send(tls.tickets + tls.record(http_answer())[:-cut])

    server, client = bench.over_tls(behave)
    answer = client.ask()
    assert isinstance(answer, Failure)
    assert answer.seen


def test_tls_of_a_stranger_is_refused_unseen(
    bench: Bench, authority: Authority, stranger: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate of another authority ends the attempt before a byte of it left, whatever the environment says."""
    server = bench.server(answering(http_answer()), stranger.server_context(LOOPBACK))
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, stranger.ca_file)
    trusts: list[dict[str, Any]] = [{"ca_file": authority.ca_file}, {}]
    for options in trusts:
        client = bench.client(server.url, **options)
        failed(client.ask(), seen=False, reason="no TLS session: SSLCertVerificationError")
    assert server.heads == []


def test_tls_for_another_host_is_refused_unseen(bench: Bench, authority: Authority) -> None:
    """A good certificate that names another host is none."""
    server = bench.server(answering(http_answer()), authority.server_context(x509.DNSName("fapi.binance.com")))
    client = bench.client(server.url)
    failed(client.ask(), seen=False, reason="no TLS session: SSLCertVerificationError")
    assert server.heads == []


def test_plain_text_where_tls_was_expected_is_unseen(loop_bench: Bench) -> None:
    """A server that does not speak TLS never gets the request."""
    server = loop_bench.server(lambda peer: peer.send(http_answer() * 4))
    client = loop_bench.client(f"https://127.0.0.1:{server.port}")
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


def test_given_authorities_replace_the_others(bench: Bench, authority: Authority) -> None:
    """With a CA file of one's own, no authority is trusted but those in it."""
    server, client = bench.to(answering(http_answer()), secure=True)
    assert replied(client.ask()).body == DONE
    assert client.route.tls is not None
    assert len(client.route.tls.get_ca_certs()) == 1


def test_word_that_comes_with_the_handshake_is_no_answer(loop_bench: Bench) -> None:
    """An exchange that speaks before it is asked gets no request, and no second connection for the same call."""

    def behave(peer: Peer) -> None:
        tls = HandTls(peer, loop_bench.tls(), ssl.TLSVersion.TLSv1_2)
        peer.send(tls.tickets + tls.record(http_answer()))
        peer.wait_until_closed()

    server, client = loop_bench.over_tls(behave)
    failed(client.ask(), seen=False, reason="not sent: ConnectionResetError")
    assert server.connections == 1


def test_hanging_handshake_is_bounded_and_unseen(loop_bench: Bench) -> None:
    """A server that accepts and says nothing costs half of the attempt's time."""
    server = loop_bench.server(Peer.wait_until_closed)
    client = loop_bench.client(f"https://127.0.0.1:{server.port}", recv_window_ms=BRIEF_MS)
    with bounded(TOTAL_S / 2):
        failed(client.ask(), seen=False, reason="no TLS session: TimeoutError")


def test_slow_steps_of_connecting_succeed(loop_bench: Bench) -> None:
    """A tunnel and a handshake that take more than a second each do no harm while half of the attempt is left."""
    server = loop_bench.server(late_tls(loop_bench.tls(), 1.2))
    proxy = loop_bench.server(relaying(late_s=1.2))
    client = loop_bench.client(f"https://127.0.0.1:{server.port}", recv_window_ms=10_000, egress_proxy_url=proxy.url)
    assert replied(client.ask()).body == DONE


@pytest.mark.parametrize("behaviour", [Peer.wait_until_closed, lambda peer: peer.send(http_answer() * 4)])
def test_handshake_of_unknown_fate_is_perhaps_seen(behaviour: Behaviour) -> None:
    """Where requests does not tell a handshake from an answer, the call is in doubt and its time is bounded."""
    bench = Bench("requests")
    try:
        server, client = bench.over_tls(behaviour, recv_window_ms=BRIEF_MS)
        with bounded():
            failed(client.ask(), seen=True, reason="no answer:")
    finally:
        bench.close()


def test_what_is_sent_has_time_to_be_answered(loop_bench: Bench) -> None:
    """Connecting may use half of the attempt, not all of it: then the request stays unsent, and out of doubt."""
    server = loop_bench.server(late_tls(loop_bench.tls(), 0.6 * TOTAL_S))
    client = loop_bench.client(f"https://127.0.0.1:{server.port}", recv_window_ms=BRIEF_MS)
    failed(client.ask(), seen=False, reason="no TLS session: TimeoutError")


def test_steps_of_connecting_share_one_bound(loop_bench: Bench) -> None:
    """A slow tunnel and a slow handshake, each within the bound, are not within it together."""
    server = loop_bench.server(late_tls(loop_bench.tls(), 0.6))
    proxy = loop_bench.server(relaying(late_s=0.6))
    client = loop_bench.client(
        f"https://127.0.0.1:{server.port}",
        recv_window_ms=2_500,
        egress_proxy_url=proxy.url,
    )
    failed(client.ask(), seen=False, reason="no TLS session: TimeoutError")


def test_no_session_keys_are_written(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment cannot make the client give its TLS keys away."""
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    server = bench.server(answering(http_answer()), bench.tls())
    assert isinstance(bench.client(server.url).cancel(credential, REF), Reply)
    assert not (tmp_path / "keys").exists()


# ---- through a proxy ------------------------------------------------------------------------------------------------

LOGIN = "egress:hunter2@/:%"


LOGIN_IN_URL = "egress:hunter2%40%2F%3A%25"


@pytest.mark.parametrize("proxy_tls", [False, True])
def test_tunnel_through_a_proxy(bench: Bench, proxy_tls: bool) -> None:
    """The proxy sees the host and its own password, the exchange sees the request, and the tunnel is kept."""
    server = bench.server(answering(http_answer()), bench.tls())
    proxy = bench.server(relaying(LOGIN), bench.tls() if proxy_tls else None)
    client = bench.client(
        server.url,
        egress_proxy_url=f"{proxy.url.replace('://', f'://{LOGIN_IN_URL}@')}",
    )
    for _ in range(3):
        assert replied(client.ask()).body == DONE
    # With TLS in TLS, requests' connection serves one call.
    assert len(proxy.heads) == (3 if proxy_tls and bench.way == "requests" else 1)
    assert proxy.heads[0].startswith(b"CONNECT 127.0.0.1:%d HTTP/1." % server.port)
    assert API_KEY.encode() not in proxy.heads[0]
    assert all(b"proxy" not in head.lower() for head in server.heads)
    assert server.heads[0].startswith(b"DELETE /fapi/v1/algoOrder?algoId=2146760&")


@pytest.mark.parametrize("proxy_tls", [False, True])
def test_end_of_a_tunnel_is_the_end_of_the_answer(bench: Bench, proxy_tls: bool) -> None:
    """An exchange that goes away without a good-bye looks the same through a tunnel: in doubt, by its name."""
    server = bench.server(drop_after_reading, bench.tls())
    proxy = bench.server(relaying(), bench.tls() if proxy_tls else None)
    client = bench.client(server.url, egress_proxy_url=proxy.url)
    failed(client.ask(), seen=True, reason="no answer: RemoteDisconnected")
    assert len(server.heads) == 1


def _proxy_hangs(peer: Peer) -> None:
    peer.read_head()
    peer.wait_until_closed()


def _proxy_drips(peer: Peer) -> None:
    drip(b"HTTP/1.1 200 Connection established\r\n" + b"X: y\r\n" * 99, TOTAL_S / 20)(peer)


@pytest.mark.parametrize(
    "behaviour", [relaying("someone:else"), _proxy_hangs, _proxy_drips, drop_after_reading, not_http]
)
def test_proxy_without_a_tunnel_is_unseen(
    loop_bench: Bench, behaviour: Behaviour, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the proxy does instead of opening the tunnel, the exchange saw nothing, and no password is shown."""
    caplog.set_level(logging.DEBUG)
    proxy = loop_bench.server(behaviour)
    client = loop_bench.client(
        f"https://127.0.0.1:{free_port()}",
        egress_proxy_url=f"http://{LOGIN_IN_URL}@127.0.0.1:{proxy.port}",
        recv_window_ms=BRIEF_MS,
    )
    with bounded():
        answer = client.ask()
    assert isinstance(answer, Failure)
    assert not answer.seen
    assert answer.reason.startswith("no tunnel through the proxy: ")
    for text in (repr(answer), repr(client), *caplog.messages):
        assert "hunter2" not in text


def test_refused_tunnel_is_named(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A proxy that wants another password is a proof that nothing left, and no password is shown."""
    caplog.set_level(logging.DEBUG)
    proxy = bench.server(relaying("someone:else"))
    client = bench.client(
        f"https://127.0.0.1:{free_port()}", egress_proxy_url=f"http://{LOGIN_IN_URL}@127.0.0.1:{proxy.port}"
    )
    answer = client.ask()
    failed(answer, seen=False, reason="no tunnel through the proxy: 407")
    for text in (repr(answer), *caplog.messages):
        assert "hunter2" not in text


def test_words_behind_a_tunnels_beginning_are_refused(loop_bench: Bench) -> None:
    """What comes together with the proxy's success is not the exchange's: nothing is sent."""

    def behave(peer: Peer) -> None:
        peer.read_head()
        peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n" + http_answer())
        peer.wait_until_closed()

    proxy = loop_bench.server(behave)
    client = loop_bench.client("https://127.0.0.1:9", egress_proxy_url=proxy.url)
    failed(client.ask(), seen=False, reason="no tunnel through the proxy: MalformedResponse")


def test_missing_proxy_is_unseen(bench: Bench) -> None:
    """A proxy that is not there leaves no doubt either."""
    client = bench.client("https://127.0.0.1:9", egress_proxy_url=f"http://egress:hunter2@127.0.0.1:{free_port()}")
    failed(client.ask(), seen=False, reason="could not connect: ConnectionRefusedError")
