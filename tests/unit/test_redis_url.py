"""What a Redis URL says, and what Redis' errors mean: tables."""

from __future__ import annotations

import ssl
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from redis import exceptions
from redis.sentinel import Sentinel

from producer.redis_url import Address, BadRedisUrl, Connection, NotPrimary, NotSupported, TlsConnection, passes, why

PASSWORD = "not-to-be-seen"


# --- addresses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown", "options"),
    [
        ("redis://localhost", "redis://localhost", {"host": "localhost"}),
        ("redis://:p%40@[::1]:1/2", "redis://[::1]:1/2", {"host": "::1", "port": 1, "db": 2, "password": "p@"}),
        (
            "rediss://user:p@example.com:6380/1?ssl_cert_reqs=none",
            "rediss://example.com:6380/1",
            {
                "host": "example.com",
                "port": 6380,
                "db": 1,
                "username": "user",
                "password": "p",
                "ssl_cert_reqs": "none",
            },
        ),
        ("redis://h/1?db=2", "redis://h/2", {"host": "h", "db": 2}),
        ("unix://user:p@/run/r.sock?db=1", "unix:///run/r.sock", {"path": "/run/r.sock", "db": 1}),
        ("redis+sentinel://a/svc", "redis+sentinel://a/svc", {"db": 0}),
        (
            "redis+sentinel://u:p%2F@a:1,b.example,[::1]:3/my%20svc/2",
            "redis+sentinel://a:1,b.example,[::1]:3/my%20svc/2",
            {"db": 2, "username": "u", "password": "p/"},
        ),
        ("redis+sentinel://a/svc/?db=3&password=p", "redis+sentinel://a/svc/3", {"db": 3, "password": "p"}),
    ],
)
def test_a_url_leads_somewhere(url: str, shown: str, options: dict[str, Any]) -> None:
    """Host, database, login and TLS are as the URL says; what is shown holds no user, password and option."""
    address = Address.parse(url)
    assert address.shown == shown
    assert {**address.options, **options} == dict(address.options)
    assert address.is_tls == url.startswith("rediss:")
    assert not address.others


def test_sentinels_have_names_and_a_login_of_their_own() -> None:
    """What stands before the @ is for the primary; the Sentinels' own login is an option."""
    url = f"redis+sentinel://u:p@a:1,b,[::1]:3/my%20svc?sentinel_username=s&sentinel_password={PASSWORD}"
    sentinels = Address.parse(url).sentinels
    assert sentinels is not None
    assert sentinels.service == "my svc"
    assert list(sentinels.places) == [("a", 1), ("b", 26379), ("::1", 3)]
    assert sentinels.login == {"username": "s", "password": PASSWORD}


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost:6379", f"http://:{PASSWORD}@h", f"redis://:{PASSWORD}@", f"redis://:{PASSWORD}@h:port/0"),
        *(
            f"redis://user:{PASSWORD}#x@h",
            f"redis://[{PASSWORD}",
            f"redis://u:{PASSWORD} @h",
            f"redis://:{PASSWORD}@h:0",
        ),
        *(f"unix://{PASSWORD}", "unix:///", f"redis://:{PASSWORD}@h/db", f"redis://h?db={PASSWORD}"),
        *(f"redis://h?ssl_cert_reqs={PASSWORD}", f"rediss://h?ssl_cert_reqs={PASSWORD}", "rediss://h?ssl_ca_certs="),
        *(f"rediss://h?ssl_check_hostname={PASSWORD}", f"redis://h?socket_timeout={PASSWORD}"),
        *(f"redis+sentinel://:{PASSWORD}@h", f"redis+sentinel://:{PASSWORD}@h/", f"redis+sentinel://:{PASSWORD}@/svc"),
        *("redis+sentinel://h:0/svc", "redis+sentinel://h:70000/svc", "redis+sentinel://a,,b/svc"),
        *("redis+sentinel://h/svc/x", "redis+sentinel://h/svc/1/2", f"redis+sentinel://h/svc?nonsense={PASSWORD}"),
        *("redis://a..b/0", f"rediss://:{PASSWORD}@{'x' * 64}.svc/0", "redis://.svc", "redis+sentinel://h,a..b/svc"),
        *("redis+sentinel://h/svc?db=x", "rediss+sentinel://h/svc", "redis-sentinel://h/svc"),
    ],
)
def test_a_bad_url_is_refused_without_being_shown(url: str) -> None:
    """What leads nowhere is refused before anything is tried; the reason holds nothing of the URL."""
    with pytest.raises(BadRedisUrl) as caught:
        Address.parse(url)
    assert PASSWORD not in repr(caught.value)


@given(st.text(max_size=20), st.sampled_from(["redis://{}@h", "redis+sentinel://u:{}@h/s", "unix://{}/x", "{}"]))
def test_any_text_is_an_address_or_refused(text: str, form: str) -> None:
    """No URL ends in another error."""
    try:
        Address.parse(form.format(text))
    except BadRedisUrl:
        return


def test_what_the_caller_says_wins_over_the_url() -> None:
    """A time-out in the URL does not override that of the call, and is told to whoever allows none."""
    address = Address.parse("redis://h?socket_timeout=30&socket_keepalive=0")
    with address.client(1.5, client_name="me") as client:
        options = client.connection_pool.connection_kwargs
        assert (options["socket_timeout"], options["socket_connect_timeout"]) == (1.5, 1.5)
        assert options["client_name"] == "me"
        assert options["socket_keepalive"] is True
    assert address.others == {"socket_timeout", "socket_keepalive"}


@pytest.mark.parametrize(
    ("client", "kind", "found"),
    [
        (redis.Redis(host="h", port=1, password="p"), Connection, {"host": "h", "port": 1, "password": "p"}),
        (redis.Redis(host="h", ssl=True, ssl_cert_reqs="none"), TlsConnection, {"host": "h", "ssl_cert_reqs": "none"}),
        (Sentinel([("s", 1)]).master_for("svc", password="p"), Connection, {"password": "p"}),
        (Address.parse("redis+sentinel://:p@s:1/svc").client(1), Connection, {"password": "p"}),
    ],
)
def test_the_address_of_another_client(client: redis.Redis, kind: type[Any], found: dict[str, Any]) -> None:
    """A client that RQ's command line made leads to the same server with the same login."""
    address = Address.of(client)
    with address.client(1.0) as ours:
        assert ours.connection_pool.connection_class is kind
        assert {**ours.connection_pool.connection_kwargs, **found} == ours.connection_pool.connection_kwargs
    if address.sentinels is not None:
        assert (address.sentinels.service, list(address.sentinels.places)) == ("svc", [("s", 1)])
    assert (address.sentinels is None) == ("host" in address.options)


# --- errors -------------------------------------------------------------------------------------------------------

SCRIPT = "Error running script (call to f_1): @user_script:27: -READONLY You can't write against a read only replica."


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (redis.ConnectionError("Error 111"), "ConnectionError"),
        (redis.TimeoutError("…"), "TimeoutError"),
        (exceptions.BusyLoadingError("…"), "BusyLoadingError: it is loading its data"),
        (exceptions.ReadOnlyError("…"), "ReadOnlyError: it is a replica, not the primary"),
        (exceptions.OutOfMemoryError("…"), "OutOfMemoryError: it is full"),
        (exceptions.MasterDownError("…"), "MasterDownError: it is a replica that has lost its primary"),
        (exceptions.TryAgainError("…"), "TryAgainError: it is being rearranged"),
        (redis.ResponseError("UNBLOCKED force unblock"), "UNBLOCKED: it has become a replica"),
        (redis.ResponseError("NOREPLICAS Not enough"), "NOREPLICAS: too few replicas follow it"),
        (redis.ResponseError("MISCONF Errors"), "MISCONF: it cannot write to its disk"),
        (redis.ResponseError("BUSY Redis is busy"), "BUSY: a script keeps it busy"),
        (redis.ResponseError("UNKILLABLE Sorry"), "UNKILLABLE: a script keeps it busy"),
        (redis.ResponseError(SCRIPT), "READONLY: it is a replica, not the primary"),
        (NotPrimary("it is a replica"), "NotPrimary: it is a replica"),
        (ConnectionRefusedError(111, "Connection refused"), "ConnectionRefusedError: Connection refused"),
    ],
)
def test_what_passes(error: BaseException, told: str) -> None:
    """No answer and a server that cannot serve now: the connection is left, and the call may be made again."""
    assert passes(error)
    assert why(error) == told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (redis.AuthenticationError(PASSWORD), "AuthenticationError: the login was refused"),
        (exceptions.AuthorizationError(PASSWORD), "AuthorizationError"),
        (
            exceptions.NoPermissionError(PASSWORD),
            "NoPermissionError: its user lacks a right: `python -m producer acl` prints what each part needs",
        ),
        (exceptions.ClusterCrossSlotError("…"), "ClusterCrossSlotError: it is a Redis Cluster, which is not supported"),
        (exceptions.MovedError("1 h:1"), "MovedError: it is a Redis Cluster, which is not supported"),
        (redis.InvalidResponse(PASSWORD), "InvalidResponse: what answers there is no Redis"),
        (redis.ResponseError(f"ERR unknown command {PASSWORD}"), "ERR"),
        (redis.ResponseError("WRONGTYPE Operation"), "WRONGTYPE"),
        (NotSupported("it is a Sentinel"), "NotSupported: it is a Sentinel"),
        (redis.DataError(PASSWORD), "DataError"),
        (ValueError(PASSWORD), "ValueError"),
    ],
)
def test_what_lasts(error: BaseException, told: str) -> None:
    """What repeating does not change; nothing that a server quotes is told."""
    assert not passes(error)
    assert why(error) == told


def test_the_cause_of_a_failed_connection_is_told() -> None:
    """A certificate that nobody vouches for points to the two settings; other causes speak the system's words."""
    bad = ssl.SSLCertVerificationError(1, "certificate verify failed")
    bad.verify_message = "self-signed certificate"
    wrapped = redis.ConnectionError("outer")
    wrapped.__cause__ = bad
    assert why(wrapped).endswith("self-signed certificate; see REDIS_TLS_CA and REDIS_TLS_VERIFY")

    refused = redis.ConnectionError("outer")
    refused.__context__ = ConnectionRefusedError(111, "Connection refused")
    assert why(refused) == "ConnectionError: Connection refused"
