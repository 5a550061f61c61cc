"""Settings: what each variable accepts, and what is said when it is wrong."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis import ConnectionPool, SSLConnection

from tests.environments import ACCOUNT, CA_FILE, settings, the_problem
from worker.settings import SETTINGS, Settings, SettingsError, environment_for_readers

# --- Every variable ----------------------------------------------------------------------------------------------

DEFAULTS: dict[str, object] = {
    "redis_url": "redis://localhost:6379/0",
    "redis_tls_verify": "required",
    "redis_tls_ca": None,
    "queue": "cancels",
    "base_url": "https://fapi.binance.com",
    "recv_window_ms": 5000,
    "egress_proxy_url": None,
    "rate_limit_scope": "all",
    "concurrency": 64,
    "max_attempts": 200,
    "deadline_s": 300.0,
    "backoff_base_ms": 100,
    "backoff_cap_ms": 15000,
    "not_found_horizon_s": 10.0,
    "lease_s": 8.0,
    "shutdown_grace_s": 20,
    "outcome_ttl_s": 86400,
    "ledger_maxlen": 20000,
    "log_level": "INFO",
    "log_format": "logfmt",
    "waf_pause_s": 300,
    "process_name": "",
    "exchange_tls_ca": None,
    "accounts_left_out": (),
    "warnings": (),
}


@pytest.mark.parametrize("empty", [{}, {setting.variable: "" for setting in SETTINGS if "<" not in setting.variable}])
def test_defaults(empty: dict[str, str]) -> None:
    """A variable that is not set, or set to nothing, has the documented default."""
    got = Settings.from_env({**empty, **ACCOUNT})
    assert {name: getattr(got, name) for name in DEFAULTS} == DEFAULTS
    assert DEFAULTS.keys() | {"credentials"} == {field.name for field in dataclasses.fields(got)}
    assert list(got.credentials) == ["default"]


#: The field of each number with its type, values that are good, the ends of its range included, and bad ones.
NUMBERS: dict[str, tuple[str, Callable[[str], object], tuple[str, ...], tuple[str, ...]]] = {
    "BINANCE_RECV_WINDOW_MS": ("recv_window_ms", int, ("1", "60000"), ("0", "60001", "2.5")),
    "WORKER_CONCURRENCY": ("concurrency", int, ("1", "512"), ("0", "513", "2.5")),
    "CANCEL_MAX_ATTEMPTS": ("max_attempts", int, ("1", "1000"), ("0", "1001", "2.5")),
    "CANCEL_DEADLINE_S": ("deadline_s", float, ("1", "1.5", "86400"), ("0", "0.9", "86400.1")),
    "BACKOFF_BASE_MS": ("backoff_base_ms", int, ("1", "15000"), ("0", "60001", "2.5")),
    "BACKOFF_CAP_MS": ("backoff_cap_ms", int, ("100", "3600000"), ("0", "3600001", "200.5")),
    "NOT_FOUND_HORIZON_S": ("not_found_horizon_s", float, ("0", "0.25", "86400"), ("86400.5", "86401", "-0")),
    "LEASE_S": ("lease_s", float, ("1", "2.125", "300"), ("0", "0.99", "300.01")),
    "SHUTDOWN_GRACE_S": ("shutdown_grace_s", int, ("1", "25"), ("0", "26", "2.5")),
    "OUTCOME_TTL_S": ("outcome_ttl_s", int, ("60", "2592000"), ("59", "2592001", "60.5")),
    "LEDGER_MAXLEN": ("ledger_maxlen", int, ("100", "10000000"), ("99", "10000001", "100.5")),
    "WAF_PAUSE_S": ("waf_pause_s", int, ("1", "3600"), ("0", "3601", "2.5")),
}
GOOD: list[tuple[str, str, str, object]] = [
    ("REDIS_URL", "redis://10.0.0.1", "redis_url", "redis://10.0.0.1"),
    ("REDIS_URL", "rediss://:p%40ss@host.example:6380/3", "redis_url", "rediss://:p%40ss@host.example:6380/3"),
    ("REDIS_URL", "redis://[::1]:6379/0?db=2", "redis_url", "redis://[::1]:6379/0?db=2"),
    ("REDIS_URL", "unix:///run/redis.sock?db=1", "redis_url", "unix:///run/redis.sock?db=1"),
    ("REDIS_URL", "unix://user@/run/redis.sock", "redis_url", "unix://user@/run/redis.sock"),
    ("REDIS_TLS_VERIFY", "none", "redis_tls_verify", "none"),
    ("REDIS_TLS_CA", CA_FILE, "redis_tls_ca", CA_FILE),
    ("CANCEL_QUEUE", "Cancels.eu-1_b", "queue", "Cancels.eu-1_b"),
    ("CANCEL_QUEUE", "q" * 64, "queue", "q" * 64),
    ("BINANCE_BASE_URL", "https://demo-fapi.binance.com", "base_url", "https://demo-fapi.binance.com"),
    ("BINANCE_BASE_URL", "https://testnet.binancefuture.com/", "base_url", "https://testnet.binancefuture.com"),
    ("BINANCE_BASE_URL", "https://FAPI.Binance.com:8443", "base_url", "https://fapi.binance.com:8443"),
    ("BINANCE_BASE_URL", "https://fapi.binance.com:443/", "base_url", "https://fapi.binance.com"),
    ("BINANCE_BASE_URL", "https://fapi.binance.com:0443", "base_url", "https://fapi.binance.com"),
    ("BINANCE_BASE_URL", "https://binance.com", "base_url", "https://binance.com"),
    ("BINANCE_BASE_URL", "http://127.0.0.2:1", "base_url", "http://127.0.0.2:1"),
    ("BINANCE_BASE_URL", "http://[::1]:65535/", "base_url", "http://[::1]:65535"),
    ("BINANCE_BASE_URL", "https://127.0.0.1:9443", "base_url", "https://127.0.0.1:9443"),
    ("BINANCE_ALLOWED_HOST", "gateway.example", "base_url", "https://fapi.binance.com"),
    ("EXCHANGE_TLS_CA", CA_FILE, "exchange_tls_ca", CA_FILE),
    ("EGRESS_PROXY_URL", "http://proxy_1:3128", "egress_proxy_url", "http://proxy_1:3128"),
    ("EGRESS_PROXY_URL", "https://u:p%40@h.example:1/", "egress_proxy_url", "https://u:p%40@h.example:1/"),
    ("RATE_LIMIT_SCOPE", "dyno", "rate_limit_scope", "dyno"),
    *[(variable, text, field, kind(text)) for variable, (field, kind, good, _) in NUMBERS.items() for text in good],
    *[("LOG_LEVEL", level, "log_level", level) for level in ("DEBUG", "INFO", "WARNING", "ERROR")],
    ("LOG_FORMAT", "json", "log_format", "json"),
    ("DYNO", "worker.12", "process_name", "worker.12"),
]


@pytest.mark.parametrize(("variable", "text", "field", "value"), GOOD)
def test_good_values(variable: str, text: str, field: str, value: object) -> None:
    """Each variable's acceptable values, the ends of its range included, arrive in its field with its type."""
    got = getattr(settings(**{variable: text}), field)
    assert got == value
    assert type(got) is type(value)


#: What Python's own number parsers, or a reader, might take for a number, whole or with a fraction.
NO_PLAIN_DECIMALS = (
    *("nan", "NaN", "inf", "-inf", "Infinity", "1e3", "0x10", "1_0", "+5", "-5", " 5 ", "5 ", "5\n", "\t5", "5.", ".5"),
    *("1,5", "05", "five", "5s", "\uff15", "\u0665", "\u00b2", "5\u00a0", "9" * 5000, "1.0000000", "true", "--5"),
)
BAD: list[tuple[str, str]] = [
    *[(variable, text) for variable, (_, _, _, bad) in NUMBERS.items() for text in bad],
    *[(variable, text) for variable in ("WORKER_CONCURRENCY", "LEASE_S") for text in NO_PLAIN_DECIMALS],
    *[
        ("REDIS_URL", text)
        for text in (
            *("localhost:6379", "http://localhost:6379", "REDIS://localhost", "redis:localhost", "redis:///0"),
            *(
                "redis://",
                "redis://h:0",
                "redis://h:65536",
                "redis://h:x",
                "redis://[::1",
                "redis://h/cancels",
                "redis://h/-1",
            ),
            *("redis://h/0#x", "redis://h/0 ", " redis://h/0", "redis://h/0\n", "redis://h?db=x", "redis://h/0/1"),
            *("redis://h?socket_timeout=1", "redis://h?ssl_cert_reqs=none", "rediss://h?ssl_cert_reqs=optional"),
            *("rediss://h?ssl_cert_reqs=", "rediss://h?ssl_check_hostname=off", "rediss://h?ssl_ca_certs="),
            *("rediss://h?ssl_ca_certs=/no/such/file", "unix://", "unix:///", "unix://run/redis.sock", "unix:/run/x"),
        )
    ],
    *[("REDIS_TLS_VERIFY", text) for text in ("None", "false", "0", "optional", "required ")],
    *[("REDIS_TLS_CA", text) for text in ("/no/such/file.pem", "/", __file__, "x" * 5000, "a\0b")],
    *[("CANCEL_QUEUE", text) for text in ("q" * 65, "a:b", "a/b", "ümlaut", "a\n", "*", "{a}")],
    *[
        ("BINANCE_BASE_URL", text)
        for text in (
            *("fapi.binance.com", "ftp://fapi.binance.com", "https:fapi.binance.com", "https:///fapi.binance.com"),
            *("https://fapi.binance.com/fapi/v1", "https://fapi.binance.com//", "https://fapi.binance.com?x=1"),
            *("https://fapi.binance.com#x", "https://user@fapi.binance.com", "https://fapi.binance.com\\@evil.example"),
            *("https://fapi.binance.com:0", "https://fapi.binance.com:65536", "https://fapi.binance.com:", "https://"),
            *("https://fapi.binance.com ", "https://fapi.binance.com\n", "https://fapi.bin\nance.com", "https://[::1"),
            *("https://fapi.binance.com.", "https://fapi..binance.com", "https://.binance.com"),
            *("https://-a.binance.com", "https://fapi.b\u0131nance.com", "https://[::::]", "https://[127.0.0.1]"),
        )
    ],
    *[
        ("BINANCE_ALLOWED_HOST", text)
        for text in ("https://a.example", "a.example/", "a.example:1", "*.example", "a b")
    ],
    *[
        ("EGRESS_PROXY_URL", text)
        for text in (
            *("proxy:3128", "socks5://proxy:1080", "http://", "http://:3128", "http://proxy:0", "http://proxy:65536"),
            *("http://proxy:3128/path", "http://proxy?x", "http://proxy#x", "http://u:p@ss@proxy", "http://u:p/@proxy"),
            *("http://u:p @proxy", "http://proxy ", "http://proxy:3128\n", "http://[::::]:3128", "http://u:p[@proxy"),
            *("http://u:p@proxy..local:80", f"http://{'x' * 64}.local"),
        )
    ],
    *[("RATE_LIMIT_SCOPE", text) for text in ("ALL", "worker", "all,dyno")],
    *[("LOG_LEVEL", text) for text in ("info", "TRACE", "20", "INFO ")],
    *[("LOG_FORMAT", text) for text in ("JSON", "text", "logfmt\n")],
    *[("DYNO", text) for text in ("worker 1", "worker:1", "w" * 65, "worker.1\n")],
]


@pytest.mark.parametrize(("variable", "text"), BAD)
def test_bad_values(variable: str, text: str) -> None:
    """Each unacceptable value is one problem of one line that names its variable and says what it must be."""
    problem = the_problem(**{variable: text})
    assert problem.startswith(f"{variable} is ")
    assert "must be" in problem
    assert "unset it" in problem or "BINANCE_ALLOWED_HOST=" in problem
    assert problem.isprintable()
    assert len(problem) < 500


def test_a_problem_shows_what_was_given_and_the_way_out() -> None:
    """A problem's line can be acted upon without the manual: variable, value, range, unit, default."""
    assert the_problem(BINANCE_RECV_WINDOW_MS="99999") == (
        "BINANCE_RECV_WINDOW_MS is '99999': it must be a whole number of milliseconds from 1 to 60000, "
        "or unset it for the default 5000"
    )


def test_all_problems_are_reported_together() -> None:
    """One start reports everything that is wrong, accounts and contradictions included, in problems and text alike."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(
            {
                "REDIS_URL": "http://x",
                "CANCEL_QUEUE": "a,b",
                "BINANCE_BASE_URL": "http://fapi.binance.com",
                "BINANCE_DESK_API_KEY": "key",
                "BINANCE_ARB_API_SECRET": "secret",
                "WORKER_CONCURRENCY": "many",
                "BACKOFF_BASE_MS": "2000",
                "BACKOFF_CAP_MS": "1000",
                "LOG_LEVEL": "loud",
            }
        )
    error = caught.value
    starts = (
        *("REDIS_URL is", "CANCEL_QUEUE is", "BINANCE_BASE_URL is", "BINANCE_DESK_API_KEY is set without"),
        *("BINANCE_ARB_API_KEY is not set", "WORKER_CONCURRENCY is", "BACKOFF_CAP_MS is", "LOG_LEVEL is"),
    )
    assert len(error.problems) == len(starts)
    assert all(any(problem.startswith(start) for problem in error.problems) for start in starts)
    named = [problem.split()[0] for problem in error.problems]
    in_the_help = ["CANCEL_QUEUE", "WORKER_CONCURRENCY", "LOG_LEVEL"]
    assert [name for name in named if name in in_the_help] == in_the_help
    assert str(error).splitlines() == ["8 bad settings:", *(f"  {problem}" for problem in error.problems)]


@pytest.mark.parametrize("text", ["cancels,urgent", "cancels urgent", "cancels;urgent"])
def test_several_queues_are_answered_with_one_worker_each(text: str) -> None:
    """Several names in CANCEL_QUEUE are refused with the reason: one worker serves one queue."""
    assert "one worker serves one queue" in the_problem(CANCEL_QUEUE=text)


@pytest.mark.parametrize(
    ("environ", "given"),
    [
        ({"BACKOFF_BASE_MS": "200", "BACKOFF_CAP_MS": "199"}, "'199': "),
        ({"BACKOFF_BASE_MS": "20000"}, "'15000' by default: "),
    ],
)
def test_backoff_cap_is_not_below_its_base(environ: dict[str, str], given: str) -> None:
    """A cap below the base is refused, also when it is the default that is too low."""
    problem = the_problem(**environ)
    assert problem.startswith(f"BACKOFF_CAP_MS is {given}")
    assert "BACKOFF_BASE_MS" in problem


# --- Where keys may be sent --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        *("https://fapi.binance.com.evil.example", "https://evil.example", "https://binance.com.evil.example"),
        *("https://fapi-binance.com", "https://evilbinance.com", "https://binance.us", "https://10.0.0.1"),
        *("https://evil.example:443", "https://binance.co", "https://0.0.0.0", "https://169.254.169.254"),
    ],
)
def test_foreign_hosts_need_to_be_allowed_by_name(url: str) -> None:
    """A host outside the exchange's domains gets no keys unless BINANCE_ALLOWED_HOST names exactly that host."""
    host = url.removeprefix("https://").partition(":")[0]
    assert f"BINANCE_ALLOWED_HOST={host}" in the_problem(BINANCE_BASE_URL=url)
    for near_miss in (f"x.{host}", f"{host}.example", "binance.com", "example"):
        assert "BINANCE_ALLOWED_HOST" in the_problem(BINANCE_BASE_URL=url, BINANCE_ALLOWED_HOST=near_miss)
    assert settings(BINANCE_BASE_URL=url, BINANCE_ALLOWED_HOST=host.upper()).base_url == url.removesuffix(":443")


PLAIN_ELSEWHERE = (
    *("fapi.binance.com", "127.0.0.1.evil.example", "localhost.evil.example", "0.0.0.0", "128.0.0.1", "10.0.0.1"),
    *("127.1", "2130706433", "[::2]", "[::]", "127.0.0.1@evil.example", "localhost:80@evil.example", "0x7f.0.0.1"),
    *("evil.example#@localhost", "evil.example/127.0.0.1", "127.0.0.1\\.evil.example", "127.0.0.01"),
)


@pytest.mark.parametrize("place", PLAIN_ELSEWHERE)
def test_plain_http_goes_to_loopback_only(place: str) -> None:
    """Plain http is refused for everything that is not plainly a loopback host, even if that host is allowed."""
    for allowed in ("", "evil.example"):
        problem = the_problem(BINANCE_BASE_URL=f"http://{place}", BINANCE_ALLOWED_HOST=allowed)
        assert problem.startswith("BINANCE_BASE_URL is ")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.2", "127.255.255.254", "[::1]", "LOCALHOST"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_loopback_hosts_are_accepted(scheme: str, host: str) -> None:
    """Every form of a loopback host is accepted with and without TLS."""
    assert settings(BINANCE_BASE_URL=f"{scheme}://{host}:8080").base_url == f"{scheme}://{host.lower()}:8080"


def test_userinfo_cannot_disguise_a_host() -> None:
    """The exchange's name in front of an @ does not make another host the exchange, and the user is not repeated."""
    problem = the_problem(BINANCE_BASE_URL="https://fapi.binance.com@evil.example", BINANCE_ALLOWED_HOST="evil.example")
    assert "'https://***@evil.example'" in problem


# --- Redis over TLS ----------------------------------------------------------------------------------------------


def connection_for(got: Settings) -> object:
    """A connection, not opened, as redis-py makes it of these settings."""
    pool = ConnectionPool.from_url(got.redis_url, **got.redis_options())
    return pool.make_connection()


@pytest.mark.parametrize(
    ("environ", "verify", "ca_file", "check_hostname"),
    [
        ({}, "required", None, True),
        ({"REDIS_TLS_VERIFY": "none"}, "none", None, False),
        ({"REDIS_TLS_CA": CA_FILE}, "required", CA_FILE, True),
        ({"REDIS_URL": "rediss://h?ssl_cert_reqs=none"}, "none", None, False),
        ({"REDIS_URL": "rediss://h?ssl_cert_reqs=none", "REDIS_TLS_VERIFY": "none"}, "none", None, False),
        ({"REDIS_URL": f"rediss://h?ssl_ca_certs={CA_FILE}"}, "required", CA_FILE, True),
        ({"REDIS_URL": "rediss://h?ssl_check_hostname=False", "REDIS_TLS_CA": CA_FILE}, "required", CA_FILE, False),
        ({"REDIS_URL": "rediss://h?ssl_cert_reqs=required&ssl_check_hostname=yes"}, "required", None, True),
    ],
)
def test_tls_options_are_those_that_redis_py_uses(
    environ: dict[str, str], verify: str, ca_file: str | None, check_hostname: bool
) -> None:
    """What the settings say about verifying a rediss:// server is what a connection of redis-py then does."""
    got = settings(**{"REDIS_URL": "rediss://:pw@redis.example:6380/0", **environ})
    assert (got.redis_tls_verify, got.redis_tls_ca) == (verify, ca_file)
    expected = {"ssl_cert_reqs": verify, "ssl_check_hostname": check_hostname}
    assert got.redis_options() == expected | ({"ssl_ca_certs": ca_file} if ca_file else {})
    connection = connection_for(got)
    assert isinstance(connection, SSLConnection)
    assert connection.cert_reqs.name == f"CERT_{verify.upper()}"
    assert connection.check_hostname is check_hostname
    assert connection.ca_certs == ca_file


@pytest.mark.parametrize("url", ["redis://localhost:6379/0", "unix:///run/redis.sock"])
def test_without_tls_there_are_no_tls_options(url: str) -> None:
    """A URL without TLS gets no option, which its connection would not understand."""
    got = settings(REDIS_URL=url, REDIS_TLS_VERIFY="none")
    assert got.redis_options() == {}
    assert not isinstance(connection_for(got), SSLConnection)


@pytest.mark.parametrize(
    ("environ", "variable"),
    [
        ({"REDIS_URL": "rediss://h?ssl_cert_reqs=none", "REDIS_TLS_VERIFY": "required"}, "REDIS_TLS_VERIFY"),
        ({"REDIS_URL": "rediss://h?ssl_cert_reqs=required", "REDIS_TLS_VERIFY": "none"}, "REDIS_TLS_VERIFY"),
        ({"REDIS_URL": "rediss://h", "REDIS_TLS_CA": CA_FILE, "REDIS_TLS_VERIFY": "none"}, "REDIS_TLS_CA"),
        ({"REDIS_URL": "rediss://h?ssl_cert_reqs=none", "REDIS_TLS_CA": CA_FILE}, "REDIS_TLS_CA"),
    ],
)
def test_contradictions_about_tls_are_refused(environ: dict[str, str], variable: str) -> None:
    """Nobody believes in a verification that does not take place: URL and variables may not contradict each other."""
    assert the_problem(**environ).startswith(variable)


def test_two_different_authorities_are_refused(tmp_path: Path) -> None:
    """REDIS_URL and REDIS_TLS_CA may not name different files."""
    other = tmp_path / "ca.pem"
    other.write_bytes(Path(CA_FILE).read_bytes())
    assert "ssl_ca_certs" in the_problem(REDIS_URL=f"rediss://h?ssl_ca_certs={other}", REDIS_TLS_CA=CA_FILE)


# --- Table, environment, command line ----------------------------------------------------------------------------


def test_the_table_lists_exactly_what_is_read() -> None:
    """Every variable of the table is read, and every variable that is read stands in the table, once."""
    asked: set[str] = set()

    class Recorder(dict[str, str]):
        def get(self, name: str, default: Any = None) -> Any:
            asked.add(name)
            return super().get(name, default)

    given = ACCOUNT | {"BINANCE_DESK_API_KEY": "key", "BINANCE_DESK_API_SECRET": "secret", "PATH": "/bin"}
    Settings.from_env(Recorder(given))
    assert sorted(setting.variable.replace("<ACCOUNT>", "DESK") for setting in SETTINGS) == sorted(asked)


def test_the_table_tells_the_defaults_that_hold() -> None:
    """Setting every variable to the default that the table shows changes nothing."""
    shown = {setting.variable: setting.default for setting in SETTINGS if setting.default}
    got, expected = settings(**shown), settings()
    assert all(getattr(got, name) == getattr(expected, name) for name in DEFAULTS)


def test_command_line_values_override() -> None:
    """Values from the command line replace those of the environment in a copy, and leave the rest and the original."""
    original = settings(LEASE_S="5")
    got = original.overridden(queue="urgent", concurrency=3)
    assert (got.queue, got.concurrency, got.lease_s, original.queue) == ("urgent", 3, 5.0, "cancels")
    assert got.credential_for("default") is original.credential_for("default")
    assert original.overridden().queue == "cancels"


def test_command_line_values_obey_the_same_rules() -> None:
    """A bad command line value is refused by its variable's rule, naming the option, all of them together."""
    with pytest.raises(SettingsError) as caught:
        settings().overridden(queue="a,b", concurrency="1_0")
    queue, concurrency = caught.value.problems
    assert queue.startswith("--queue is 'a,b': one worker serves one queue")
    assert concurrency == "--concurrency is '1_0': it must be a whole number of requests from 1 to 512, or leave it out"
    with pytest.raises(SettingsError, match=re.escape("--queue is ''")):
        settings().overridden(queue="")


# ---- environments of other processes --------------------------------------------------------------------------------


def test_a_reader_gets_nothing_of_the_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only reads the queue runs without keys, secrets and the proxy's password."""
    for name in ("REDIS_URL", "BINANCE_API_KEY", "BINANCE_DESK_API_SECRET", "EGRESS_PROXY_URL"):
        monkeypatch.setenv(name, "x")
    left = environment_for_readers()
    assert left["REDIS_URL"] == "x"
    assert not [name for name in left if name.startswith(("BINANCE", "EGRESS"))]
