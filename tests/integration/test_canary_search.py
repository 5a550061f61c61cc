"""The search for secrets finds one that was left on purpose, in each place and each form."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

import pytest
import redis

from producer import CancelClient
from producer.keys import Keys
from tests.canary import Needles, Search, add_page, http_get, process_line, redis_places
from tests.servers import ROOT, Valkey, scrubbed
from tests.webpages import WebProcess, outcome, settle

PLANTED = "canary0planted5ee"


@pytest.mark.parametrize("place", ["key", "string", "hash", "list", "set", "zset", "stream", "packed", "failure"])
def test_the_search_finds_what_was_left_in_redis(place: str, connection: redis.Redis) -> None:
    """A secret is found in a key of each type, in its name, and where RQ packs it."""
    text = f"x{PLANTED}y"
    if place == "key":
        connection.set(text, "x")
    elif place == "string":
        connection.set("k", text)
    elif place == "hash":
        connection.hset("k", text, "x")
    elif place == "list":
        connection.rpush("k", text)
    elif place == "set":
        connection.sadd("k", text)
    elif place == "zset":
        connection.zadd("k", {text: 1})
    elif place == "stream":
        connection.xadd("k", {"f": text})
    elif place == "packed":
        connection.hset("k", "data", zlib.compress(text.encode()))
    else:
        connection.xadd("k", {"exc_string": base64.b64encode(zlib.compress(text.encode()))})

    assert _found(redis_places(connection))


@pytest.mark.parametrize("how", ["plain", "quoted", "base64", "base64-behind-another", "signed-url", "signature"])
def test_the_search_finds_each_form(how: str) -> None:
    """A secret or a signature is found as it is, percent-encoded, base64-encoded, and as a part of a URL."""
    secret = "canary+/=0-of-some-length"
    said = {
        "plain": secret,
        "quoted": quote(secret, safe=""),
        "base64": base64.b64encode(f"{secret}-and-more".encode()).decode(),
        "base64-behind-another": base64.b64encode(f"fixie:{secret}".encode()).decode(),
        "signed-url": "DELETE /fapi/v1/algoOrder?algoId=1&Signature=ab",
        "signature": "sig: 9f%2Bx0123456789",
    }[how]
    needles = Needles({secret}, {"9f%2Bx0123456789"})

    assert needles.found_in(said.encode())
    assert not needles.found_in(b"nothing of that")


def test_the_search_finds_what_a_process_shows(tmp_path: Path) -> None:
    """A secret is found in a process' line and in its output, a traceback's too."""
    code = "import sys; print('ready', flush=True); sys.stdin.read(); raise ValueError(sys.argv[1])"
    with subprocess.Popen(
        [sys.executable, "-c", code, PLANTED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert _found([("ps", process_line(process.pid))])
        printed, _ = process.communicate(b"")
    assert _found([("output", printed)])


def test_the_search_finds_what_pages_and_metrics_show(connection: redis.Redis, valkey: Valkey) -> None:
    """A secret is found on a page of the operators' and among the metrics."""
    settle(connection, outcome("planted", tag=PLANTED, account=PLANTED))
    search = Search(PLANTED)
    with WebProcess(valkey.url) as web:
        add_page(search, "planted", web, "/requests/planted", {})
    assert search.findings()
    connection.sadd(Keys().suspects, PLANTED)
    connection.hset(
        Keys().breaker(PLANTED), mapping={"failures": 9, "since_ms": 1, "probe_at_ms": 1, "reason": PLANTED}
    )
    command = [sys.executable, "-m", "producer", "metrics", "--port", "0"]
    environment = scrubbed() | {"REDIS_URL": valkey.url}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            with http_get(process.stdout.readline().split()[-1]) as text:
                assert _found([("metrics", text.encode())])
        finally:
            process.kill()


def _found(places: Iterable[tuple[str, bytes]]) -> bool:
    search = Search(PLANTED)
    search.places += places
    return any(needle == PLANTED for _, needle in search.findings())


def test_the_search_finds_nothing_where_nothing_is(client: CancelClient, connection: redis.Redis) -> None:
    """An ordinary request leaves nothing that the search takes for a secret."""
    client.cancel(algo_id=7)
    assert json.dumps([name for name, _ in redis_places(connection)])
    assert not _found(redis_places(connection))
