"""`python -m worker check` against real servers: what is there is said to be, and what is not is named."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.conftest import API_KEY, API_SECRET
from tests.failover import UNSUPPORTED
from tests.loopback import LOOPBACK, Authority, Peer, Server, answering, http_answer, relaying
from tests.servers import Peek, Valkey, Workers, free_port, python, running_valkey
from worker.__main__ import EX_CONFIG, EX_OK, EX_UNAVAILABLE
from worker.sandbox.control import RunningExchange
from worker.sandbox.faults import Fault


@pytest.fixture(scope="module")
def _durable_process() -> Iterator[Valkey]:
    with running_valkey("--appendonly", "yes") as server:
        yield server


@pytest.fixture
def valkey(_durable_process: Valkey) -> Valkey:
    """A server that keeps what it is told."""
    with redis.Redis(port=_durable_process.port) as client:
        client.flushall()
    return _durable_process


@pytest.fixture
def environment(workers: Workers) -> dict[str, str]:
    """Settings with which everything is in order."""
    return workers.environment


def check(environment: dict[str, str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    done = python("-m", "worker", "check", **environment)
    return done.returncode, done.stdout, done.stderr


def line(said: str, start: str) -> str:
    """The one line of a report that starts so."""
    (found,) = [each for each in said.splitlines() if " ".join(each.split()).startswith(start)]
    return found


def test_everything_is_there(environment: dict[str, str], exchange: RunningExchange, peek: Peek) -> None:
    """With Redis, exchange and key in order each is said to be, the exit code is 0, and nothing was left or touched."""
    order = exchange.add_orders(1)[0]

    code, said, complaints = check(environment)

    assert (code, complaints) == (EX_OK, "")
    assert [each.split()[0] for each in said.splitlines()] == ["ok"] * 6
    assert re.search(r" answers, (Valkey|Redis) [0-9.]+$", line(said, "ok redis redis:"))
    assert "VALKEY_SERVER" in os.environ or "Valkey 9." in said
    assert "may trade" in line(said, "ok key of default")
    assert peek("DBSIZE") == 0
    assert "2400 weight a minute" in said
    assert API_SECRET not in said
    entry = exchange.book()[order.algo_id]
    assert (entry.status, entry.deletes) == ("NEW", 0)


def test_a_refused_key_is_a_bad_setting(environment: dict[str, str]) -> None:
    """A key that the exchange does not know is named with the exchange's words; the exit code is that of settings."""
    code, said, _ = check(environment | {"BINANCE_API_KEY": "nobody-knows-this-key"})

    assert code == EX_CONFIG
    assert "FAILED  key of default" in said
    assert "-2015" in said


def test_a_key_that_gets_no_clear_answer_is_not_called_good(
    environment: dict[str, str], exchange: RunningExchange
) -> None:
    """While the exchange refuses everybody, the key is neither accepted nor refused."""
    exchange.start_incident(Fault.LIMITED_429, duration_ms=60_000)

    code, said, _ = check(environment)

    assert code == EX_UNAVAILABLE
    assert "FAILED  exchange" in said


def test_redis_that_is_not_there_is_one_line(environment: dict[str, str]) -> None:
    """An unreachable Redis is said in one line with its address, not in a traceback."""
    port = free_port()

    code, said, complaints = check(environment | {"REDIS_URL": f"redis://:hunter2@127.0.0.1:{port}/0"})

    assert (code, complaints) == (EX_UNAVAILABLE, "")
    assert f"127.0.0.1:{port}" in said
    assert "hunter2" not in said


def test_redis_that_refuses_the_login_is_said(environment: dict[str, str]) -> None:
    """A wrong password is told apart from a server that is away, and not repeated."""
    with running_valkey("--requirepass", "right") as server:
        code, said, _ = check(environment | {"REDIS_URL": f"redis://:wrong-one@127.0.0.1:{server.port}/0"})

    assert code == EX_UNAVAILABLE
    assert "refused the login" in said
    assert "wrong-one" not in said


def test_an_exchange_that_is_not_there_is_said(environment: dict[str, str]) -> None:
    """Without the exchange's time nothing else of it is asked, and the exit code says unreachable."""
    code, said, _ = check(environment | {"BINANCE_BASE_URL": f"http://127.0.0.1:{free_port()}"})

    assert code == EX_UNAVAILABLE
    assert "the connection is refused" in line(said, "FAILED exchange")
    assert "key of" not in said


# ---- what Redis is ---------------------------------------------------------------------------------------------------


def redis_says(environment: dict[str, str], url: str) -> tuple[int, str]:
    """Exit code, and what is said of a Redis."""
    code, said, complaints = check(environment | {"REDIS_URL": url})
    assert complaints == ""
    return code, "\n".join(each for each in said.splitlines() if each.split()[1] == "redis")


def test_a_replica_is_named(environment: dict[str, str], valkey: Valkey) -> None:
    """A server that only copies is no place for a queue, and where to go instead is said."""
    with running_valkey("--replicaof", f"127.0.0.1 {valkey.port}") as replica:
        code, said = redis_says(environment, replica.url)
    assert code == EX_UNAVAILABLE
    assert "it is a replica, not the primary: REDIS_URL must lead to the primary, or name its Sentinels" in said


@pytest.mark.parametrize("may_ask", [True, False], ids=["with INFO", "without"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--maxmemory", "1"), "it is full (maxmemory)"),
        (("--min-replicas-to-write", "1"), "it takes no writes while it lacks replicas"),
    ],
    ids=["full", "lacking replicas"],
)
def test_a_server_that_takes_no_work_says_why(
    options: tuple[str, ...], says: str, may_ask: bool, environment: dict[str, str]
) -> None:
    """Its state and the way out are named, also to a user who may not ask INFO."""
    with running_valkey(*options) as server, redis.Redis(port=server.port) as connection:
        user = ["SETUSER", "worker", "on", "nopass", "~*", "&*", "+@all", *([] if may_ask else ["-@dangerous"])]
        connection.execute_command("ACL", *user)
        code, said = redis_says(environment, f"redis://worker:any@127.0.0.1:{server.port}/0")
    assert code == EX_UNAVAILABLE
    assert says in said


@pytest.mark.parametrize(("server", "says"), UNSUPPORTED)
def test_what_cannot_be_used_is_named(server: Any, says: str, environment: dict[str, str]) -> None:
    """A Cluster, a Sentinel's port and what is no Redis are said to be that, with the way out, in one line."""
    with server() as url:
        code, said = redis_says(environment, url)
    assert (code, len(said.splitlines())) == (EX_UNAVAILABLE, 1)
    assert says in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--appendonly", "yes", "--maxmemory-policy", "allkeys-lru"), "maxmemory-policy allkeys-lru"),
        (("--appendonly", "no"), "keeps no append-only file"),
    ],
)
def test_a_server_that_may_lose_requests_is_warned_of(
    options: tuple[str, ...], says: str, environment: dict[str, str]
) -> None:
    """A worker can start all the same: the exit code is 0, and the setting is named."""
    with running_valkey(*options) as server:
        code, said, _ = check(environment | {"REDIS_URL": server.url})
    assert code == EX_OK
    assert says in line(said, "warn redis")


@pytest.mark.parametrize(
    ("rights", "says"),
    [
        ("~* &* +@all -@scripting", "command EVALSHA"),
        ("~* &* +@all -blmove", "command BLMOVE"),
        ("~* &* +@all -hset -zadd", "command HSET, command ZADD"),
        ("~* &* +@all -subscribe", "command SUBSCRIBE"),
        ("~* resetchannels +@all", "channel *"),
        ("~rq:* ~cancels:* &* +@all", "key gate:*"),
        ("~cancels:* ~gate:* &* +@all", "key rq:job:*"),
    ],
)
def test_missing_rights_are_named(
    rights: str, says: str, environment: dict[str, str], valkey: Valkey, peek: Peek
) -> None:
    """Which command, key or channel a user lacks is said, whatever else is in order."""
    peek("ACL", "SETUSER", "worker", "reset", "on", "nopass", *rights.split())
    try:
        code, said, _ = check(environment | {"REDIS_URL": valkey.url.replace("//", "//worker:any@")})
    finally:
        peek("ACL", "DELUSER", "worker")
    assert code == EX_UNAVAILABLE
    assert says in line(said, "FAILED redis work")


def test_a_user_without_info_can_be_checked(environment: dict[str, str], valkey: Valkey, peek: Peek) -> None:
    """Rights that a worker does not need are not asked for: what cannot be looked at is a warning."""
    peek("ACL", "SETUSER", "worker", "reset", "on", "nopass", "~*", "&*", "+@all", "-@dangerous", "-@admin")
    try:
        code, said, _ = check(environment | {"REDIS_URL": valkey.url.replace("//", "//worker:any@")})
    finally:
        peek("ACL", "DELUSER", "worker")
    assert code == EX_OK
    assert "INFO is not answered to this user" in line(said, "warn redis")


def test_a_server_without_info_can_be_checked(environment: dict[str, str]) -> None:
    """The same where a hoster has taken the command away."""
    with running_valkey("--appendonly", "yes", "--rename-command", "INFO", "its-own-info") as server:
        code, said, _ = check(environment | {"REDIS_URL": server.url})
    assert code == EX_OK
    assert "INFO is not answered to this user" in line(said, "warn redis")


def test_damaged_keys_are_named(environment: dict[str, str], peek: Peek) -> None:
    """A key of another type than it should have, and one that was set aside, are said to be there."""
    peek("SET", peek.keys.unfinished, "x")
    peek("SET", f"{peek.keys.outcomes}:set-aside", "x")
    code, said, _ = check(environment)
    assert code == EX_OK
    assert "cancels:leases is damaged: a string instead of a zset" in said
    assert "cancels:outcomes:set-aside was damaged" in said


# ---- the way to the exchange, and its keys ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (http_answer(b"<html>", "451 Unavailable For Legal Reasons"), "this region is refused"),
        (http_answer(b"<html>Sign in</html>"), "a proxy or a login page stands in between (200 <html>Sign in</html>)"),
        (http_answer(b"<html>", "403 Forbidden"), "its firewall blocks this address"),
        (http_answer(b"<html>", "404 Not Found"), "is BINANCE_BASE_URL the host of USD-M futures?"),
        (http_answer(b'{"code":-1016,"msg":"no"}', "503 No"), "it does not tell its time (503 -1016 no)"),
    ],
    ids=["451", "HTML", "403", "404", "503"],
)
def test_an_answer_that_is_not_the_time_is_quoted(answer: bytes, says: str, environment: dict[str, str]) -> None:
    """Why the exchange cannot be used is said in its words, with the way out."""
    with Server(answering(answer)) as server:
        code, said, _ = check(environment | {"BINANCE_BASE_URL": server.url})
    assert code == EX_UNAVAILABLE
    assert says in line(said, "FAILED exchange")


#: The worker's own command line where no name has an address.
NO_NAMES = """
import socket, sys
from worker.__main__ import start

def getaddrinfo(host, *_, real=socket.getaddrinfo, **__):
    if not str(host)[0].isdigit():
        raise socket.gaierror(-2, "Name or service not known")
    return real(host, *_, **__)

socket.getaddrinfo = getaddrinfo
sys.argv = ["worker", "check"]
start()
"""


def test_a_name_without_an_address_is_named(environment: dict[str, str]) -> None:
    """That the exchange's name cannot be looked up is told apart from a refused connection."""
    more = {"BINANCE_BASE_URL": "https://nowhere.invalid", "BINANCE_ALLOWED_HOST": "nowhere.invalid"}
    done = python("-c", NO_NAMES, **environment | more)
    assert done.returncode == EX_UNAVAILABLE, done.stderr
    assert "its name has no address (DNS)" in line(done.stdout, "FAILED exchange")


def test_a_foreign_certificate_is_named_and_can_be_trusted(
    environment: dict[str, str], authority: Authority, stranger: Authority
) -> None:
    """Who it is that answers with another's certificate is for the operator to know; EXCHANGE_TLS_CA trusts it."""
    with Server(answering(http_answer(b"<html>")), authority.server_context(LOOPBACK)) as server:
        url = f"https://127.0.0.1:{server.port}"
        for more, says in (
            ({}, "its certificate is not trusted"),
            ({"EXCHANGE_TLS_CA": stranger.ca_file}, "its certificate is not trusted"),
            ({"EXCHANGE_TLS_CA": authority.ca_file}, "a proxy or a login page stands in between"),
        ):
            code, said, _ = check(environment | {"BINANCE_BASE_URL": url} | more)
            assert code == EX_UNAVAILABLE
            assert says in line(said, "FAILED exchange")
            assert says.startswith("a proxy") or "EXCHANGE_TLS_CA" in said


def test_a_proxy_that_wants_a_login_is_named(environment: dict[str, str]) -> None:
    """The proxy's 407 is told apart from a trouble of the exchange, and its password is not shown."""
    with Server(relaying("egress:right")) as proxy:
        more = {"BINANCE_BASE_URL": f"https://127.0.0.1:{free_port()}"}
        code, said, _ = check(
            environment | more | {"EGRESS_PROXY_URL": f"http://egress:hunter2@127.0.0.1:{proxy.port}"}
        )
    assert code == EX_UNAVAILABLE
    assert "the proxy wants a login" in line(said, "FAILED exchange")
    assert "hunter2" not in said


def test_a_key_that_may_only_read_is_refused(environment: dict[str, str]) -> None:
    """A query proves that a key may read; that it may trade is proven by a cancel of an order that cannot exist."""
    seen: list[str] = []
    refusal = http_answer(b'{"code":-2015,"msg":"Invalid API-key, IP, or permissions for action."}', "401 No")

    def behave(peer: Peer) -> None:
        while head := peer.read_head():
            seen.append(head.split(b"&")[0].decode())
            if head.startswith(b"DELETE "):
                peer.send(refusal)
            elif b"/time" in head:
                peer.send(http_answer(b'{"serverTime":1750485492076}'))
            else:
                peer.send(http_answer(b'{"code":-2013,"msg":"Order does not exist."}', "400 No"))

    with Server(behave) as server:
        code, said, _ = check(environment | {"BINANCE_BASE_URL": server.url})
    assert code == EX_CONFIG
    assert "may read but not trade: 401 -2015" in line(said, "FAILED key of default")
    assert seen[-1].startswith(f"DELETE /fapi/v1/algoOrder?algoId={2**63 - 1}")


def test_every_account_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    """Accounts that were found, those that BINANCE_ACCOUNTS leaves out, and key files that others can read are told."""
    path = tmp_path / "key.pem"
    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o644)
    found = {"BINANCE_DESK_API_KEY": "d", "BINANCE_DESK_PRIVATE_KEY": str(path)}
    code, said, _ = check(environment | found)
    assert code == EX_CONFIG
    says = "BINANCE_DESK_PRIVATE_KEY names a file that others may use (mode 0644)"
    assert says in line(said, "warn settings")
    assert says in python("-m", "worker", "rehearse", "--account", "nobody", **environment, **found).stderr
    assert "2 account(s): default, desk" in line(said, "ok settings")
    line(said, "FAILED key of desk")
    code, said, _ = check(environment | found | {"BINANCE_ACCOUNTS": "default"})
    assert code == EX_OK
    assert "1 account(s): default; left out by BINANCE_ACCOUNTS: desk" in line(said, "ok settings")


def test_quotation_marks_are_named(environment: dict[str, str]) -> None:
    """A key in the quotation marks of an env file stops the check with 78 before anybody is asked."""
    code, said, complaints = check(environment | {"BINANCE_API_KEY": f'"{API_KEY}"'})
    assert (code, said) == (EX_CONFIG, "")
    assert "BINANCE_API_KEY cannot be used: quotation marks stand around it" in complaints
    assert API_KEY not in complaints
