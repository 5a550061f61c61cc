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

from tests.conftest import API_SECRET
from tests.failover import UNSUPPORTED
from tests.loopback import LOOPBACK, Authority, Peer, Server, answering, http_answer, relaying
from tests.servers import Peek, Valkey, Workers, free_port, python, running_valkey
from worker.__main__ import EX_CONFIG, EX_OK, EX_UNAVAILABLE
from worker.sandbox.control import RunningExchange


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


@pytest.mark.parametrize(
    ("more", "code", "start", "says"),
    [
        ({"BINANCE_API_KEY": "nobody-knows-this-key"}, EX_CONFIG, "FAILED key of default", "-2015"),
        ({"REDIS_URL": "redis://:hunter2@127.0.0.1:1/0"}, EX_UNAVAILABLE, "FAILED redis", "127.0.0.1:1"),
        ({"BINANCE_BASE_URL": "http://127.0.0.1:1"}, EX_UNAVAILABLE, "FAILED exchange", "the connection is refused"),
    ],
    ids=["key", "Redis", "exchange"],
)
def test_what_is_refused_or_away_is_one_line(
    more: dict[str, str], code: int, start: str, says: str, environment: dict[str, str]
) -> None:
    """A key that the exchange does not know, a Redis or an exchange that is not there, and which it is, by the exit
    code too."""
    ended, said, complaints = check(environment | more)

    assert (ended, complaints) == (code, "")
    assert says in line(said, start)
    assert line(said, "FAILED") == line(said, start)
    assert "hunter2" not in said


# ---- what Redis is ---------------------------------------------------------------------------------------------------


def redis_says(environment: dict[str, str], url: str) -> tuple[int, str]:
    """Exit code, and what is said of a Redis."""
    code, said, complaints = check(environment | {"REDIS_URL": url})
    assert complaints == ""
    return code, "\n".join(each for each in said.splitlines() if each.split()[1] == "redis")


@pytest.mark.parametrize(
    ("options", "login", "says"),
    [
        (("--requirepass", "right"), ":wrong-one@", "refused the login"),
        (
            ("--replicaof", "127.0.0.1 1"),
            "",
            "it is a replica, not the primary: REDIS_URL must lead to the primary, or name its Sentinels",
        ),
    ],
    ids=["password", "replica"],
)
def test_a_server_that_is_no_place_for_a_queue_is_named(
    options: tuple[str, ...], login: str, says: str, environment: dict[str, str]
) -> None:
    """A wrong password, which is not repeated, and a server that only copies are told apart from one that is away."""
    with running_valkey(*options) as server:
        code, said = redis_says(environment, server.url.replace("//", f"//{login}"))
    assert code == EX_UNAVAILABLE
    assert says in said
    assert "wrong-one" not in said


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
        ("~* &* +@all -@scripting", "command SCRIPT LOAD, command EVALSHA"),
        ("~* &* +@all -script|load", "command SCRIPT LOAD;"),
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


@pytest.mark.parametrize(
    ("options", "rights"),
    [((), "-@dangerous -@admin"), (("--rename-command", "INFO", "its-own-info"), "+@all")],
    ids=["forbidden", "gone"],
)
def test_a_server_that_tells_nothing_of_itself_can_be_checked(
    options: tuple[str, ...], rights: str, environment: dict[str, str]
) -> None:
    """A worker needs no INFO: where its user may not ask, or a hoster has taken it away, that is a warning."""
    with running_valkey("--appendonly", "yes", *options) as server, redis.Redis(port=server.port) as connection:
        connection.execute_command("ACL", "SETUSER", "worker", "on", "nopass", "~*", "&*", "+@all", *rights.split())
        code, said, _ = check(environment | {"REDIS_URL": server.url.replace("//", "//worker:any@")})
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
        (
            http_answer(b'{"code":-1003,"msg":"no"}', "429 No"),
            "too many requests from this address: wait (429 -1003 no)",
        ),
        (http_answer(b'{"code":-1016,"msg":"no"}', "503 No"), "it does not tell its time (503 -1016 no)"),
    ],
    ids=["451", "HTML", "403", "404", "429", "503"],
)
def test_an_answer_that_is_not_the_time_is_quoted(answer: bytes, says: str, environment: dict[str, str]) -> None:
    """Why the exchange cannot be used is said in its words, with the way out, and of no key is said that it is good."""
    with Server(answering(answer)) as server:
        code, said, _ = check(environment | {"BINANCE_BASE_URL": server.url})
    assert (code, "key of" in said) == (EX_UNAVAILABLE, False)
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
