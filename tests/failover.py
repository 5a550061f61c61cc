"""Real failovers: a primary with a replica, and Sentinels that watch them."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.loopback import Peer, Server
from tests.servers import Valkey, eventually, free_port, running_valkey, server_binary

PATIENCE_S = 30.0
SERVICE = "mymaster"


@dataclass
class Pair:
    """A server and the one that follows it."""

    primary: Valkey
    replica: Valkey

    def fail_over(self) -> None:
        """As a managed service does: the replica becomes the primary with all that was written, and the old server
        stays up as its replica; nobody's connection is closed."""
        eventually(self._is_asked, PATIENCE_S, "the replica will do")
        eventually(lambda: role(self.replica) == "master" and role(self.primary) == "slave", PATIENCE_S, "a failover")
        self.primary, self.replica = self.replica, self.primary

    def _is_asked(self) -> bool:
        with direct(self.primary) as client:
            try:
                return bool(client.execute_command("FAILOVER", "TO", "127.0.0.1", self.replica.port))
            except redis.ResponseError:  # it is not in step, or a failover is under way
                return role(self.primary) == "slave"

    def in_step(self) -> None:
        """Wait until the replica follows."""
        eventually(lambda: _follows(self.replica), PATIENCE_S, "the replica is in step")


def direct(server: Valkey) -> redis.Redis:
    """A client that repeats nothing."""
    client: redis.Redis = redis.Redis(port=server.port, retry=Retry(NoBackoff(), 0), socket_timeout=10)
    return client


def role(server: Valkey) -> str:
    """What a server says that it is."""
    with direct(server) as client, contextlib.suppress(redis.RedisError):
        return str(client.info("replication")["role"])
    return "away"


def _follows(server: Valkey) -> bool:
    with direct(server) as client, contextlib.suppress(redis.RedisError):
        return bool(client.info("replication").get("master_link_status") == "up")
    return False


@contextlib.contextmanager
def running_pair(*options: str) -> Iterator[Pair]:
    """Both for the length of a block, in step."""
    quick = ("--repl-diskless-sync-delay", "0", *(options or ("--appendonly", "no")))
    with ExitStack() as stack:
        primary = stack.enter_context(running_valkey(*quick))
        replica = stack.enter_context(running_valkey(*quick))
        with direct(replica) as client:  # not an option: whichever is started again is the primary
            client.execute_command("REPLICAOF", "127.0.0.1", primary.port)
        pair = Pair(primary, replica)
        pair.in_step()
        yield pair


@dataclass
class Sentinel:
    """A Sentinel process that watches a primary by itself."""

    directory: Path
    pair: Pair
    options: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it knows the replica too."""
        lines = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"sentinel monitor {SERVICE} 127.0.0.1 {self.pair.primary.port} 1",
            f"sentinel down-after-milliseconds {SERVICE} 1000",
            f"sentinel failover-timeout {SERVICE} 3000",
            *self.options,
        ]
        conf = self.directory / f"sentinel-{self.port}.conf"
        conf.write_text("\n".join(lines) + "\n")
        command = [server_binary(), str(conf), "--sentinel"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=self.directory)
        eventually(lambda: len(self.ask("SENTINEL", "REPLICAS", SERVICE)) == 1, PATIENCE_S, "it knows the replica")

    def ask(self, *command: str) -> Any:
        """The answer to a command; nothing while it is not up."""
        password = next((each.split()[1] for each in self.options if each.startswith("requirepass")), None)
        with redis.Redis(port=self.port, password=password) as client, contextlib.suppress(redis.ConnectionError):
            return client.execute_command(*command)
        return []

    def fail_over(self) -> None:
        """Have the replica promoted; the old server stays up as its replica."""
        eventually(self._is_asked, PATIENCE_S, "it knows a replica that will do")

    def _is_asked(self) -> bool:
        try:
            return bool(self.ask("SENTINEL", "FAILOVER", SERVICE))
        except redis.ResponseError:  # NOGOODSLAVE
            return False

    def stop(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(30)
            self.process = None


@contextlib.contextmanager
def running_sentinel(pair: Pair, *options: str) -> Iterator[Sentinel]:
    """One for the length of a block."""
    with tempfile.TemporaryDirectory() as directory:
        sentinel = Sentinel(Path(directory), pair, options)
        try:
            sentinel.start()
            yield sentinel
        finally:
            sentinel.stop()


# ---- what cannot be used --------------------------------------------------------------------------------------------


def _bad_request(peer: Peer) -> None:
    peer.sock.recv(1000)
    peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@contextlib.contextmanager
def http_server() -> Iterator[str]:
    """A web server where a Redis should be: it answers at once, as to a bad request."""
    with Server(_bad_request) as server:
        yield f"redis://127.0.0.1:{server.port}/0"


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """A node of a Cluster."""
    with running_valkey("--cluster-enabled", "yes") as node:
        yield node.url


@contextlib.contextmanager
def bare_sentinel() -> Iterator[str]:
    """A Sentinel's port taken for Redis'."""
    with running_pair() as pair, running_sentinel(pair) as sentinel:
        yield f"redis://127.0.0.1:{sentinel.port}/0"


#: What may answer where a Redis should be, and what is said of it.
UNSUPPORTED: list[tuple[Any, str]] = [
    (http_server, "what answers there is no Redis"),
    (cluster, "it is a Redis Cluster, which is not supported"),
    (bare_sentinel, "it is a Sentinel: write redis+sentinel://host:port/service"),
]
