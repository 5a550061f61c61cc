"""A search for secrets: in every key of Redis, in output, in what `ps` shows, on pages, whatever form they have."""

from __future__ import annotations

import base64
import contextlib
import socket
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import redis

from tests.webpages import WebProcess

#: What every secret and signature has at least, characters.
_PREFIX = 12


@dataclass
class Needles:
    """What must not be found, in the forms in which it could be written."""

    secrets: set[str]
    signatures: set[str] = field(default_factory=set)

    def found_in(self, place: bytes) -> list[str]:
        """The secrets that stand in ``place`` as they are, percent-encoded, or base64-encoded at any offset."""
        found = ["signature="] * (b"signature=" in place.lower())
        # Thousands of signatures: each place of the text is looked up in a table instead.
        for at in range(len(place) - _PREFIX + 1):
            for form in self._table.get(place[at : at + _PREFIX], ()):
                if place.startswith(form, at):
                    found.append(form.decode())
        return found

    @cached_property
    def _table(self) -> dict[bytes, set[bytes]]:
        table: dict[bytes, set[bytes]] = {}
        for form in self._forms():
            assert len(form) >= _PREFIX, "too short to be told from chance"
            table.setdefault(form[:_PREFIX].encode(), set()).add(form.encode())
        return table

    def _forms(self) -> Iterator[str]:
        for text in self.secrets | self.signatures:
            yield from {text, quote(text, safe=""), unquote(text)}
        for text in self.secrets:
            for lead in range(3):
                # What three bytes become does not hang on those before and after them.
                inner = base64.b64encode(b"\0" * lead + text.encode()).decode()[4 if lead else 0 :]
                yield inner[: len(inner) // 4 * 4 - 4]


def redis_places(connection: redis.Redis) -> Iterator[tuple[str, bytes]]:
    """Every key with everything in it, and what can be unpacked of it (RQ packs payloads and failures' texts)."""
    for key in connection.scan_iter():
        for part in (key, *_parts(connection, key)):
            yield f"Redis {key!r}", part
            with contextlib.suppress(zlib.error):
                yield f"Redis {key!r}, unpacked", zlib.decompress(part)
            with contextlib.suppress(ValueError, zlib.error):
                yield f"Redis {key!r}, decoded and unpacked", zlib.decompress(base64.b64decode(part, validate=True))


def _parts(connection: redis.Redis, key: bytes) -> list[bytes]:
    # By command and with answers of RESP2: plain lists of bytes, however they are nested.
    kind = bytes(connection.execute_command("TYPE", key))
    whole = {
        b"string": ("GET", key),
        b"hash": ("HGETALL", key),
        b"list": ("LRANGE", key, 0, -1),
        b"set": ("SMEMBERS", key),
        b"zset": ("ZRANGE", key, 0, -1),
        b"stream": ("XRANGE", key, "-", "+"),
    }[kind]
    return list(_flat(connection.execute_command(*whole)))


def _flat(answer: Any) -> Iterator[bytes]:
    if isinstance(answer, bytes):
        yield answer
    elif isinstance(answer, dict):
        for pair in answer.items():
            yield from _flat(pair)
    elif isinstance(answer, list | tuple | set):
        for part in answer:
            yield from _flat(part)


def process_line(pid: int) -> bytes:
    """What `ps` shows of a process to every user of its host."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")


class Search:
    """Collects places and what was found in them."""

    def __init__(self, *secrets: str) -> None:
        self.needles = Needles(set(secrets))
        self.places: list[tuple[str, bytes]] = []

    def add(self, name: str, place: bytes | str) -> None:
        """One more place to look at."""
        self.places.append((name, place.encode("utf-8", "surrogateescape") if isinstance(place, str) else place))

    def findings(self) -> list[tuple[str, str]]:
        """Place and secret for each that was found."""
        if not self.needles.found_in(b"\n".join(place for _, place in self.places)):
            return []
        return [(name, needle) for name, place in self.places for needle in self.needles.found_in(place)]


def add_page(search: Search, name: str, web: WebProcess, path: str, headers: dict[str, Any]) -> None:
    """One page, its headers included."""
    reply = web(path, **headers)
    search.add(f"page {name}", f"{reply.headers}\n{reply.text}")


@contextlib.contextmanager
def http_get(url: str) -> Iterator[str]:
    """The body of one page."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), 20) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")
        with connection.makefile("rb") as answer:
            yield answer.read().decode()
