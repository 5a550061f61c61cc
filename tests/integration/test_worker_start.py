"""A worker's first moments: a Redis that cannot serve yet, one that never will, and a signal that comes too early."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from producer import CancelClient, OutcomeKind
from tests.failover import UNSUPPORTED, direct
from tests.integration.conftest import NewFleet
from tests.orders import cancel_all, events, opened
from tests.servers import (
    Valkey,
    Worker,
    busy_with_a_script,
    eventually,
    free_port,
    members,
    refuses,
    running_valkey,
    stopped,
)
from worker.sandbox.control import RunningExchange

# ---- a Redis that cannot serve now ----------------------------------------------------------------------------------

Trouble = Callable[[Valkey, redis.Redis], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def a_replica(server: Valkey, connection: redis.Redis) -> Iterator[None]:
    """READONLY."""
    connection.execute_command("REPLICAOF", "127.0.0.1", free_port())
    yield
    connection.execute_command("REPLICAOF", "NO", "ONE")


@contextlib.contextmanager
def a_replica_that_lost_its_primary(server: Valkey, connection: redis.Redis) -> Iterator[None]:
    """MASTERDOWN."""
    connection.config_set("replica-serve-stale-data", "no")
    with a_replica(server, connection):
        yield


@contextlib.contextmanager
def without_replicas(server: Valkey, connection: redis.Redis) -> Iterator[None]:
    """NOREPLICAS."""
    connection.config_set("min-replicas-to-write", 1)
    yield
    connection.config_set("min-replicas-to-write", 0)


@contextlib.contextmanager
def unable_to_write_its_disk(server: Valkey, connection: redis.Redis) -> Iterator[None]:
    """MISCONF."""
    connection.config_set("save", "3600 1")
    shutil.rmtree(server.directory)
    with contextlib.suppress(redis.ResponseError):
        connection.bgsave()
    eventually(lambda: connection.info("persistence")["rdb_last_bgsave_status"] == "err", 20, "it could not save")
    yield
    connection.config_set("stop-writes-on-bgsave-error", "no")
    server.directory.mkdir()


def busy(server: Valkey, connection: redis.Redis) -> contextlib.AbstractContextManager[None]:
    """BUSY."""
    return busy_with_a_script(connection)


@contextlib.contextmanager
def loading(server: Valkey, connection: redis.Redis) -> Iterator[None]:
    """LOADING."""
    for option, value in {"key-load-delay": 5000, "loading-process-events-interval-bytes": 1024}.items():
        connection.config_set(option, value)
    connection.execute_command("DEBUG", "POPULATE", 4000, "ballast", 200)
    connection.save()
    server.stop(signal.SIGKILL)
    server.options += ("--key-load-delay", "5000", "--loading-process-events-interval-bytes", "1024")
    server.start(wait=False)
    eventually(lambda: refuses(connection, "loading"), 20, "it is loading")
    yield
    connection.config_set("key-load-delay", 0)


def standing_still(server: Valkey, connection: redis.Redis) -> contextlib.AbstractContextManager[None]:
    """No answer, though connections are taken."""
    return stopped(server)


@contextlib.contextmanager
def out_of_clients(server: Valkey, connection: redis.Redis) -> Iterator[None]:
    """Connections are refused with an error of its own."""
    connection.config_set("maxclients", 1)
    yield
    connection.config_set("maxclients", 1000)


TROUBLES: list[Trouble] = [
    *(a_replica, a_replica_that_lost_its_primary, without_replicas, unable_to_write_its_disk, busy),
    *(loading, standing_still, out_of_clients),
]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_worker_waits_for_what_passes(new_fleet: NewFleet, exchange: RunningExchange, trouble: Trouble) -> None:
    """Started into a state that passes, a worker says once that Redis is away, works when it can, and RQ knows it."""
    options = ("--appendonly", "no", "--enable-debug-command", "yes")
    with running_valkey(*options) as server, direct(server) as connection, CancelClient.from_url(server.url) as client:
        (ticket,) = cancel_all(client, opened(exchange, 1))
        with trouble(server, connection):
            worker = new_fleet(REDIS_URL=server.url).start(wait=False)
            eventually(lambda: events(worker, "redis"), 30, "it says that Redis is away")
            assert worker.process.poll() is None
        eventually(lambda: events(worker, "started"), 30, "it starts")
        if trouble is not loading:  # what it loads is as it was before
            assert ticket.wait(30).kind is OutcomeKind.CANCELLED
        eventually(lambda: connection.scard("rq:workers") == 1, 20, "it is registered")
        assert worker.stop() == 0
        assert [event["state"] for event in events(worker, "redis")] == ["away", "back"], worker.output()
        assert "Traceback" not in worker.output()


# ---- one that never will --------------------------------------------------------------------------------------------


def refused(worker: Worker) -> str:
    """What a worker that left with 69 has said: one line."""
    assert worker.process.wait(30) == 69
    assert "Traceback" not in worker.output()
    (event,) = events(worker, "redis")
    assert event["state"] == "refused"
    return worker.output()


@pytest.mark.parametrize(("server", "told"), UNSUPPORTED)
def test_a_worker_leaves_what_cannot_be_used(new_fleet: NewFleet, server: Any, told: str) -> None:
    """A Cluster, a Sentinel's port and what is no Redis are named in one line, and the exit code is 69."""
    with server() as url:
        assert told in refused(new_fleet(REDIS_URL=url).start(wait=False))


@pytest.mark.parametrize("missing", ["-evalsha", "resetkeys"])
def test_a_user_who_lacks_a_right(new_fleet: NewFleet, valkey: Valkey, connection: redis.Redis, missing: str) -> None:
    """Rights that are missing are no outage: the worker says what Redis said, and leaves with 69."""
    connection.execute_command("ACL", "SETUSER", "poor", "reset", "on", ">not-to-be-seen", "+@all", "~*", "&*", missing)
    try:
        url = valkey.url.replace("://", "://poor:not-to-be-seen@")
        said = refused(new_fleet(REDIS_URL=url).start(wait=False))
        assert "said=" in said
        assert "not-to-be-seen" not in said
    finally:
        connection.execute_command("ACL", "DELUSER", "poor")


def test_a_user_of_any_name_works(
    new_fleet: NewFleet, valkey: Valkey, connection: redis.Redis, client: CancelClient
) -> None:
    """A user whose name redis-py cannot read in an answer starts a worker like any other."""
    connection.execute_command("ACL", "SETUSER", "desk=a", "reset", "on", ">x", "+@all", "~*", "&*")
    try:
        new_fleet(REDIS_URL=valkey.url.replace("://", "://desk%3Da:x@")).start()
        assert client.cancel(algo_id=1, account="nobody").wait(20).kind is OutcomeKind.REFUSED
    finally:
        connection.execute_command("ACL", "DELUSER", "desk=a")


# ---- a signal that comes too early ----------------------------------------------------------------------------------

UNSHARE = ("unshare", "--pid", "--fork", "--kill-child")


def can_be_the_first() -> bool:
    """Whether this user may start a process with the id 1."""
    return shutil.which("unshare") is not None and subprocess.run([*UNSHARE, "true"], check=False).returncode == 0


#: Comes in place of one of the first modules that a worker imports, and does not come to an end.
SLOW = """
import pathlib, time
pathlib.Path({mark!r}).touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("is_first", [False, True], ids=["any process", "the first process of a container"])
def test_a_signal_in_the_first_moments(
    new_fleet: NewFleet, tmp_path: Path, number: signal.Signals, is_first: bool
) -> None:
    """A worker that is told to stop while it still imports leaves with 0, whatever its process id."""
    if is_first and not can_be_the_first():
        pytest.skip("no right to make a process with the id 1")
    mark = tmp_path / "mark"
    (tmp_path / "click.py").write_text(SLOW.format(mark=str(mark)))
    command = (*(UNSHARE if is_first else ()), sys.executable, "-m", "worker")
    fleet = new_fleet(PYTHONPATH=str(tmp_path), REDIS_URL=Valkey(tmp_path).url)
    worker = fleet.start(command=command, wait=False)
    eventually(mark.exists, 30, "it imports")
    os.kill(members(worker.process.pid)[-1], number)

    assert worker.process.wait(20) == 0
    assert worker.output() == ""
