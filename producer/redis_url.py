"""How Redis is reached: what a URL says, which server is the primary, and which of its errors pass.

The one place for it: clients, commands, page, exporter and worker connect through it. One primary is spoken to, behind
an address of its own (a name, a proxy, a virtual address) or found by Sentinels; a Cluster is refused.

After a failover the old server often stays up as a replica. So each new connection asks its server what it is (HELLO,
which needs no right) and is closed if that is no primary. A connection that is kept is told by an error where it
writes (:func:`passes`: close it, and repeat what was refused); where it only reads, :meth:`Connection.make_ready` asks
again now and then. The next connection looks the name up anew, or asks the Sentinels anew.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import redis
import redis.asyncio as aio
from redis import exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import SentinelConnectionPool as AsyncSentinelConnectionPool
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool

from producer.untrusted import clean_text

T = TypeVar("T")

FORMS = (
    "redis://[user:password@]host[:port][/database], the same with rediss:// for TLS, unix:///path, or "
    "redis+sentinel://[user:password@]host:port,host:port/service[/database]"
)
#: Options that a URL of the worker and of the commands may carry; others would override what these set themselves.
OPTIONS = frozenset({"db", "username", "password", "ssl_cert_reqs", "ssl_ca_certs", "ssl_check_hostname"})
#: Options of a URL that names Sentinels; those that begin so log in there.
SENTINEL_OPTIONS = frozenset({"db", "username", "password", "sentinel_username", "sentinel_password"})

#: For so long, s, a kept connection's server is taken for what it last said that it is.
SURE_S = 5.0
#: How long a kept connection is given to say so, s, before another one is opened.
PROBE_S = 0.5
#: A connection that nobody uses stays known to whatever stands between us and the server, and shows that it is dead:
#: after so many s without a word, then every so many s, so many times.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}

_SENTINEL = "redis+sentinel"
_SENTINEL_PORT = "26379"
_PLACE = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[\w.-]+))(?::(?P<port>[0-9]{1,5}))?")
_SERVICE = re.compile(r"/(?P<service>[^/]+)(?:/(?P<db>[0-9]{1,6})?)?")
_DATABASE = re.compile(r"[0-9]{1,6}")
_TRUTH = ("true", "yes", "1", "false", "no", "0")


class BadRedisUrl(ValueError):
    """A URL that leads to no Redis. The text is the reason, may be empty, and holds nothing of the URL."""


class NotPrimary(redis.ConnectionError):
    """What was reached is not the primary (any more), or nobody can say which server is. It passes."""


class NotSupported(redis.RedisError):
    """What was reached cannot be used, now or later."""


# --- Addresses ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Address:
    """Where a Redis is and how to log in there. ``shown`` is fit for logs: without user, password and options."""

    shown: str
    is_tls: bool
    options: Mapping[str, Any]  # of a connection, as redis-py names them
    others: frozenset[str] = frozenset()  # names of options in the URL that are beyond OPTIONS
    sentinels: Sentinels | None = None

    @classmethod
    def parse(cls, url: str) -> Address:
        """What ``url`` says.

        Raises:
            BadRedisUrl: it is none of :data:`FORMS`.
        """
        parts = _parts(url)
        options = dict(reversed(parse_qsl(parts.query, keep_blank_values=True)))  # the first one counts
        path = parts.path
        if "db" in options and parts.scheme != "unix":  # it wins over the one in the path
            path = f"{'/'.join(path.split('/')[: 2 if parts.scheme == _SENTINEL else 1])}/{options['db']}"
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"
        if not _DATABASE.fullmatch(options.get("db", "0")):
            raise BadRedisUrl("the option db must be a number")
        if parts.scheme == _SENTINEL:
            told, sentinels = _behind_sentinels(parts, options)
            return cls(shown, False, told, sentinels=sentinels)
        _check_tls(parts.scheme, options)
        try:
            found: dict[str, Any] = parse_url(url)
        except (ValueError, TypeError):
            raise BadRedisUrl("the value of an option cannot be used") from None
        found.pop("connection_class", None)
        return cls(shown, parts.scheme == "rediss", found, frozenset(options) - OPTIONS)

    @classmethod
    def of(cls, client: redis.Redis | aio.Redis) -> Address:
        """Where another client leads: the one that RQ's command line made, or somebody's own."""
        pool: Any = client.connection_pool
        given = pool.connection_kwargs
        names = {"host", "port", "path", "db", "username", "password", "credential_provider", "client_name"}
        options = {name: value for name, value in given.items() if name in names or name.startswith("ssl_")}
        sentinels = given.get("sentinels")
        if isinstance(pool, SentinelConnectionPool | AsyncSentinelConnectionPool):
            places = [each.connection_pool.connection_kwargs for each in pool.sentinel_manager.sentinels]
            login = {name: places[0][name] for name in ("username", "password") if places[0].get(name)}
            sentinels = Sentinels(pool.service_name, [(each["host"], int(each["port"])) for each in places], login)
        is_tls = issubclass(pool.connection_class, redis.SSLConnection | aio.SSLConnection)
        return cls(_shown(options, is_tls, sentinels), is_tls, options, sentinels=sentinels)

    def client(self, timeout_s: float, **more: Any) -> redis.Redis:
        """A client that waits up to ``timeout_s`` for each answer and never repeats a command.

        ``more`` goes to the pool and its connections, and wins over the URL.
        """
        kind = self._kind(SocketConnection, TlsConnection, Connection)
        return redis.Redis.from_pool(_Pool(connection_class=kind, **self._given(timeout_s, Retry, more)))

    def async_client(self, timeout_s: float, **more: Any) -> aio.Redis:
        """The same for asyncio."""
        kind = self._kind(AsyncSocketConnection, AsyncTlsConnection, AsyncConnection)
        return aio.Redis.from_pool(_AsyncPool(connection_class=kind, **self._given(timeout_s, AsyncRetry, more)))

    def async_connection(self, timeout_s: float | None, **more: Any) -> Any:
        """One connection of an event loop, not opened yet."""
        kind = self._kind(AsyncSocketConnection, AsyncTlsConnection, AsyncConnection)
        return kind(**self._given(timeout_s, AsyncRetry, more))

    def _kind(self, socket_: type[Any], tls: type[Any], plain: type[Any]) -> type[Any]:
        return socket_ if "path" in self.options else tls if self.is_tls else plain

    def _given(self, timeout_s: float | None, retry: type[Any], more: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a connection."""
        options = {**self.options, "socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
        if "path" not in options:
            keepalive = {getattr(socket, name): n for name, n in _KEEPALIVE.items() if hasattr(socket, name)}
            options |= {"socket_keepalive": True, "socket_keepalive_options": keepalive, "sentinels": self.sentinels}
        return {**options, "retry": retry(NoBackoff(), 0), **more}


def _shown(options: Mapping[str, Any], is_tls: bool, sentinels: Sentinels | None) -> str:
    if sentinels is not None:
        return f"{_SENTINEL}://{','.join(f'{host}:{port}' for host, port in sentinels.places)}/{sentinels.service}"
    if "path" in options:
        return f"unix://{options['path']}"
    host = options.get("host") or "localhost"
    place = f"[{host}]" if ":" in host else host
    return f"{'rediss' if is_tls else 'redis'}://{place}:{options.get('port') or 6379}/{options.get('db') or 0}"


def _parts(url: str) -> SplitResult:
    """The parts of a URL that redis-py would not take for something else."""
    if not url.isprintable() or " " in url:
        raise BadRedisUrl("it holds white space or control characters")
    if not url.startswith(("redis://", "rediss://", "unix://", f"{_SENTINEL}://")):
        raise BadRedisUrl
    try:
        parts = urlsplit(url)
        is_place = parts.scheme == _SENTINEL or (bool(parts.hostname) and parts.port != 0)
    except ValueError:
        raise BadRedisUrl("host and port cannot be told; percent-encode what is special in the password") from None
    if "#" in url:
        raise BadRedisUrl("a # has no place in it; write %23 if it belongs to the password")
    if parts.scheme == "unix":
        if parts.hostname or parts.path in ("", "/"):
            raise BadRedisUrl("a socket needs its absolute path after three slashes, as in unix:///run/redis.sock")
    elif not is_place or (parts.scheme != _SENTINEL and not re.fullmatch(r"/?|/[0-9]{1,6}", parts.path)):
        raise BadRedisUrl
    elif parts.scheme != _SENTINEL:
        _check_name(str(parts.hostname))
    return parts


def _check_name(host: str) -> None:
    """A name that no resolver takes would fail at each try, and not as an error of the network."""
    try:
        host.encode("idna")
    except UnicodeError:
        raise BadRedisUrl("its host is no name: between two dots stand 1 to 63 letters") from None


def _check_tls(scheme: str, options: Mapping[str, str]) -> None:
    if scheme != "rediss" and any(name.startswith("ssl_") for name in options):
        raise BadRedisUrl("options for TLS need rediss://")
    if options.get("ssl_ca_certs") == "":
        raise BadRedisUrl("ssl_ca_certs names no file")
    is_known = options.get("ssl_cert_reqs", "none") in ("required", "none")
    if not is_known or options.get("ssl_check_hostname", "no").lower() not in _TRUTH:
        raise BadRedisUrl("ssl_cert_reqs is required or none, ssl_check_hostname true or false")


def _behind_sentinels(parts: SplitResult, options: Mapping[str, str]) -> tuple[dict[str, Any], Sentinels]:
    if not options.keys() <= SENTINEL_OPTIONS:
        raise BadRedisUrl(f"after the question mark only {', '.join(sorted(SENTINEL_OPTIONS))} may be set")
    login, _, hosts = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    path = _SERVICE.fullmatch(parts.path)
    if path is None:
        raise BadRedisUrl("after the Sentinels the name of the service is missing, as in /mymaster or /mymaster/0")
    places = []
    for host in hosts.split(","):
        place = _PLACE.fullmatch(host)
        port = int(place["port"] or _SENTINEL_PORT) if place else 0
        if place is None or not 0 < port < 65536:
            raise BadRedisUrl("the Sentinels must be host:port, separated by commas")
        _check_name(place["address"] or place["name"])
        places.append((place["address"] or place["name"], port))
    told: dict[str, Any] = {"username": unquote(user), "password": unquote(password), "db": path["db"] or "0"}
    told |= {name: value for name, value in options.items() if name in told}
    own = {name.removeprefix("sentinel_"): value for name, value in options.items() if name.startswith("sentinel_")}
    told["db"] = int(told["db"])
    return {name: value for name, value in told.items() if value != ""}, Sentinels(
        unquote(path["service"]), places, own
    )


@dataclass(slots=True, repr=False, eq=False)
class Sentinels:
    """Those who know which server is the primary of a service. The one that was right last is asked first."""

    service: str
    places: Sequence[tuple[str, int]]
    login: Mapping[str, str] = field(default_factory=dict)  # of the Sentinels themselves

    @property
    def question(self) -> tuple[str, str, str]:
        """The command that asks for the primary's host and port."""
        return "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service

    def ways(self, timeout_s: float | None) -> list[dict[str, Any]]:
        """Options of a connection to each; all of them together take no longer than ``timeout_s``."""
        each_s = None if timeout_s is None else timeout_s / (len(self.places) + 1)
        more = {"socket_timeout": each_s, "socket_connect_timeout": each_s, "protocol": 2, **self.login}
        return [{"host": host, "port": port, **more} for host, port in self.places]

    def pass_over(self, place: tuple[str, int]) -> None:
        """It was of no help: ask the others first from now on."""
        self.places = [*(each for each in self.places if each != place), place]

    def in_vain(self, errors: Sequence[BaseException]) -> redis.RedisError:
        """Why nobody named a server."""
        if errors and all(isinstance(error, redis.AuthenticationError) for error in errors):
            return redis.AuthenticationError("the Sentinels refused the login")
        if errors and not any(passes(error) for error in errors):
            return NotSupported(f"no Sentinel answers at the address of one ({why(errors[-1])})")
        reason = f"no Sentinel answers ({why(errors[-1])})" if errors else "the Sentinels know no such service"
        return NotPrimary(f"the primary of {clean_text(self.service, 80)} is not known: {reason}")


# --- Connections --------------------------------------------------------------------------------------------------


def _judge(told: Any) -> None:
    """Look at a server's answer to HELLO.

    Raises:
        NotPrimary, NotSupported: it is another than it should be.
    """
    pairs = told.items() if isinstance(told, Mapping) else zip(told[::2], told[1::2], strict=False)
    said = {text(name): text(value) for name, value in pairs}
    if said.get("mode") == "cluster":
        raise NotSupported("it is a Redis Cluster, which is not supported: one primary is needed")
    if said.get("mode") == "sentinel":
        raise NotSupported(f"it is a Sentinel: write {_SENTINEL}://host:port/service")
    if said.get("role") in ("replica", "slave"):
        raise NotPrimary("it is a replica, not the primary")


def text(value: Any) -> str:
    """A word from Redis, whatever bytes it is made of."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def at_once(course: Coroutine[Any, Any, T]) -> T:
    """What a coroutine comes to that never waits: one which what it calls has an answer for when it returns.

    So what is the same for callers with and without an event loop is written once.
    """
    try:
        course.send(None)
    except StopIteration as end:
        return cast(T, end.value)
    raise RuntimeError("it waits for an event loop")


async def given(value: Any) -> Any:
    """What a connection's method gives, be it there already or to be awaited."""
    return await value if isinstance(value, Awaitable) else value


#: It is mixed into redis-py's connections, which are not annotated.
_Base: Any = object


class _Primary(_Base):  # type: ignore[misc]
    """What is added to redis-py's connections: the way to the primary, and a look whether it is one."""

    _run: Callable[[Coroutine[Any, Any, None]], Any] = staticmethod(at_once)
    _plain: type[Any] = redis.Connection  # leads to a Sentinel
    _promptly: Mapping[str, bool] = {}  # closes without a wait for the other side

    def __init__(self, *, sentinels: Sentinels | None = None, **options: Any) -> None:
        self._sentinels = sentinels
        self._looked_s: float | None = None  # None: not connected
        super().__init__(redis_connect_func=type(self).greet, **options)

    def connect(self) -> Any:
        """Connect to the primary, as far as anybody knows which server that is.

        Raises:
            NotPrimary, NotSupported: what was reached is none.
        """
        return self._run(self._reach())

    async def _reach(self) -> None:
        if self._sentinels is not None and self._looked_s is None:
            self.host, self.port = await self._find(self._sentinels)
        await given(super().connect())

    def make_ready(self) -> Any:
        """Before the use of a connection that is kept: open it, or ask its server again what it is if that was
        :data:`SURE_S` ago; if there is no good answer soon, open another one. Nothing may be under way on it.

        Raises:
            redis.RedisError: none can be opened.
        """
        return self._run(self._look_again())

    async def _look_again(self) -> None:
        if self._looked_s is not None and time.monotonic() - self._looked_s > SURE_S:
            try:
                await self._probe()
            except (redis.RedisError, OSError):
                await given(self.disconnect(**self._promptly))
        await self._reach()

    async def _probe(self) -> None:
        self.send_command("HELLO", check_health=False)
        if not self.can_read(PROBE_S):
            raise redis.TimeoutError("no answer in time")
        await self._hear()

    def greet(self) -> None:
        """Log in, and ask the server what it is."""
        at_once(self._greet())

    async def _greet(self) -> None:
        await given(self.on_connect())
        await given(self.send_command("HELLO", check_health=False))
        await self._hear()

    async def _hear(self) -> None:
        try:
            _judge(await given(self.read_response()))
        except redis.ResponseError as error:
            if passes(error):  # else it knows no HELLO, as a proxy may not; what it is shows later
                raise
        except NotPrimary:
            if self._sentinels is not None:
                self._sentinels.pass_over(self._sentinels.places[0])
            raise
        self._looked_s = time.monotonic()

    async def _find(self, sentinels: Sentinels) -> tuple[str, int]:
        errors: list[BaseException] = []
        for options in sentinels.ways(self.socket_connect_timeout):
            sentinel = self._plain(**options)
            try:
                await given(sentinel.connect())
                await given(sentinel.send_command(*sentinels.question))
                if found := await given(sentinel.read_response()):
                    return text(found[0]), int(found[1])
            except (redis.RedisError, OSError) as error:
                errors.append(error)
            finally:
                await given(sentinel.disconnect(**self._promptly))
            sentinels.pass_over((options["host"], options["port"]))
        raise sentinels.in_vain(errors)

    def disconnect(self, *arguments: Any, **options: Any) -> Any:
        """Close it, if it is open."""
        self._looked_s = None
        return super().disconnect(*arguments, **options)


class _AsyncPrimary(_Primary):
    """The same for event loops: what gives nothing is a coroutine."""

    _run = staticmethod(given)
    _plain = aio.Connection
    _promptly: Mapping[str, bool] = {"nowait": True}

    async def greet(self) -> None:  # type: ignore[override]
        """See :meth:`_Primary.greet`."""
        await self._greet()

    async def _probe(self) -> None:
        async with asyncio.timeout(PROBE_S):
            await self.send_command("HELLO", check_health=False)
            await self._hear()


class Connection(_Primary, redis.Connection):
    """To a host and port."""


class TlsConnection(_Primary, redis.SSLConnection):
    """The same over TLS."""


class SocketConnection(_Primary, redis.UnixDomainSocketConnection):
    """To a socket of this host."""


class AsyncConnection(_AsyncPrimary, aio.Connection):
    """To a host and port, for event loops."""


class AsyncTlsConnection(_AsyncPrimary, aio.SSLConnection):
    """The same over TLS."""


class AsyncSocketConnection(_AsyncPrimary, aio.UnixDomainSocketConnection):
    """To a socket of this host."""


class _Pool(redis.ConnectionPool):
    """Lends connections that are ready."""

    def get_connection(self, *arguments: Any, **options: Any) -> Any:
        """See :class:`redis.ConnectionPool`."""
        connection: Any = super().get_connection(*arguments, **options)
        try:
            connection.make_ready()
        except BaseException:
            self.release(connection)
            raise
        return connection


class _AsyncPool(aio.ConnectionPool):
    """The same for event loops."""

    async def get_connection(self, *arguments: Any, **options: Any) -> Any:
        """See :class:`redis.asyncio.ConnectionPool`."""
        connection: Any = await super().get_connection(*arguments, **options)  # type: ignore[no-untyped-call]
        try:
            await connection.make_ready()
        except BaseException:
            await self.release(connection)
            raise
        return connection


# --- Errors -------------------------------------------------------------------------------------------------------

#: What a server refuses for now with, and what that means.
_PASSING = {
    "BUSY": "a script keeps it busy",
    "LOADING": "it is loading its data",
    "MASTERDOWN": "it is a replica that has lost its primary",
    "MISCONF": "it cannot write to its disk",
    "NOREPLICAS": "too few replicas follow it",
    "OOM": "it is full",
    "READONLY": "it is a replica, not the primary",
    "TRYAGAIN": "it is being rearranged",
    "UNBLOCKED": "it has become a replica",
    "UNKILLABLE": "a script keeps it busy",
}
#: ... and for good.
_LASTING = {
    "ASK": "it is a Redis Cluster, which is not supported",
    "CLUSTERDOWN": "it is a Redis Cluster, which is not supported",
    "CROSSSLOT": "it is a Redis Cluster, which is not supported",
    "MOVED": "it is a Redis Cluster, which is not supported",
    "NOPERM": "its user lacks a right: `python -m producer acl` prints what each part needs",
}
_WORDS = _PASSING | _LASTING
_CODE = re.compile(rf"\b({'|'.join(_WORDS)})\b")
#: How servers tell a script of a right that its user lacks.
_NO_RIGHT = re.compile(r"ACL failure in script|user executing the script|can't run this command")
_FIRST = re.compile(r"[A-Z]{3,}\b")
#: redis-py has classes for some of them, whose text is without the code.
_CLASSES = {
    exceptions.BusyLoadingError: "LOADING",
    exceptions.MasterDownError: "MASTERDOWN",
    exceptions.OutOfMemoryError: "OOM",
    exceptions.ReadOnlyError: "READONLY",
    exceptions.TryAgainError: "TRYAGAIN",
    exceptions.AskError: "ASK",
    exceptions.MovedError: "MOVED",
    exceptions.ClusterDownError: "CLUSTERDOWN",
    exceptions.ClusterCrossSlotError: "CROSSSLOT",
    exceptions.NoPermissionError: "NOPERM",
}


def code_of(error: BaseException) -> str:
    """What a server calls its own state in an error (READONLY, OOM …), also in a script's; empty: nothing known."""
    if (known := _CLASSES.get(type(error))) is not None:
        return known
    found = _CODE.search(str(error)) if isinstance(error, redis.ResponseError) else None
    return found[0] if found else ""


def passes(error: BaseException) -> bool:
    """Whether an error tells of what passes: no answer, or a server that cannot serve now.

    The server may not be the one any more that the address leads to: a connection that heard this is to be closed, and
    what was asked may be asked again on another one. What was refused so wrote nothing.
    """
    if isinstance(error, redis.ResponseError):
        return code_of(error) in _PASSING
    is_away = isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError)
    return is_away and not isinstance(error, redis.AuthenticationError | exceptions.AuthorizationError)


def is_refused(answers: Iterable[Any]) -> bool:
    """Whether one of the answers is an error that passes."""
    return any(isinstance(answer, redis.RedisError) and passes(answer) for answer in answers)


def why(error: BaseException) -> str:
    """An error of Redis in a line for people: its kind and, where it is known, the reason and the way out.

    Nothing else of its text: that can hold the address with its password, and what a server says of a command can quote
    the command.
    """
    code, kind = code_of(error), type(error).__name__
    if type(error) is redis.ResponseError:
        first = _FIRST.match(str(error))
        kind = code or (first[0] if first else kind)
    reason = _reason(error, code)
    return f"{kind}: {reason}" if reason else kind


def _reason(error: BaseException, code: str) -> str:
    if isinstance(error, NotPrimary | NotSupported):
        return str(error)
    if isinstance(error, redis.AuthenticationError):
        return "the login was refused"
    if isinstance(error, redis.InvalidResponse):
        return "what answers there is no Redis"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            said = clean_text(cause.verify_message)
            return f"certificate refused: {said}; see REDIS_TLS_CA and REDIS_TLS_VERIFY"
        if isinstance(cause, ConnectionResetError) and cause.errno is None:  # asyncio's own: what was said is lost
            return "it closed the connection, as it does where its own limit, maxclients, is reached"
        if isinstance(cause, OSError) and cause.strerror:
            # asyncio puts its own words, and the address, in the place of the system's.
            return clean_text(os.strerror(cause.errno) if cause.errno and cause.errno > 0 else cause.strerror)
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, redis.ResponseError) and _NO_RIGHT.search(str(error)):
        code = "NOPERM"
    return _WORDS.get(code, "")
