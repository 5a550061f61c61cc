"""The worker's settings: the one module of the worker that reads the environment.

Every variable stands once, in the table :data:`SETTINGS`; :meth:`Settings.from_env` reads all of them and reports
all that is wrong in one :class:`SettingsError`, so that a deploy is corrected in one go. A variable that is set to
nothing counts as not set. Numbers are plain decimals: what ``float`` would take beyond that (``nan``, ``1e3``,
``1_000``, blanks, other scripts' digits) is a typing mistake more often than a wish.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Literal, NoReturn, TypeVar

from producer.message import DEFAULT_ACCOUNT, DEFAULT_QUEUE, check_queue_name
from producer.redis_url import FORMS, OPTIONS, Address, BadRedisUrl
from worker.signing import Credential, CredentialError, check_api_key

__all__ = ["SETTINGS", "LogFormat", "LogLevel", "RateLimitScope", "Setting", "Settings", "SettingsError", "TlsVerify"]

TlsVerify = Literal["required", "none"]
RateLimitScope = Literal["all", "dyno"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LogFormat = Literal["logfmt", "json"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
ChoiceT = TypeVar("ChoiceT", bound=str)

#: The exchange's own domains: production, demo-fapi.binance.com and testnet.binancefuture.com (exchange.md section 5).
EXCHANGE_DOMAINS = ("binance.com", "binancefuture.com")
#: A PEM key has at most a few kilobytes; a path to anything larger is a mistake.
_MAX_KEY_FILE_BYTES = 64 * 1024
_TLS_OPTIONS: tuple[TlsVerify, ...] = ("required", "none")

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"\[[0-9A-Fa-f:.]+\]|{_LABEL}(?:\.{_LABEL})*"
_BASE_URL_SHAPE = re.compile(rf"(?P<scheme>https?)://(?P<host>{_HOST})(?::(?P<port>[0-9]+))?/?")
_PROXY_URL_SHAPE = re.compile(
    r"https?://(?:(?:(?![@/?#\\])[!-~])*@)?(?:\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::(?P<port>[0-9]+))?/?", re.ASCII
)
_BLANK_OR_CONTROL = re.compile(r"[\x00-\x20\x7f-\xa0\u2028\u2029]")
# A colon without a host before it may stand before a password whose host was forgotten.
_HARMLESS_PLACE = re.compile(r"(?:(?:\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::[0-9]{1,5})?)?(?:/[\w./~+-]*)?", re.ASCII)
_ACCOUNT_VARIABLE = re.compile(r"BINANCE_(?P<account>.+)_(?:API_KEY|API_SECRET|PRIVATE_KEY)", re.DOTALL)
_ACCOUNT_IN_VARIABLE = re.compile(r"[A-Z0-9][A-Z0-9_]{0,31}")


class SettingsError(ValueError):
    """The worker cannot start with these settings.

    ``problems`` holds one line for each, naming the variable (or command line option), what was given unless it may
    be secret, what it must be, and the way out.
    """

    def __init__(self, problems: tuple[str, ...]) -> None:
        count = "1 bad setting" if len(problems) == 1 else f"{len(problems)} bad settings"
        super().__init__("".join([f"{count}:", *(f"\n  {problem}" for problem in problems)]))
        self.problems = problems


class _RefusedError(ValueError):
    """A value is not acceptable; the text, if any, is a reason that may be shown beside the setting's rule."""


def _reason(error: ValueError) -> str:
    # Other errors' texts quote what was given, which may be a secret.
    return str(error) if isinstance(error, _RefusedError) else ""


# --- What a value may look like, and how it is shown -------------------------------------------------------------


def _shown(text: str) -> str:
    """A given value, fit for a message: escaped, shortened, and without what may be a password."""
    if "@" in text or "://" in text:
        return _shown_url(text)
    return ascii(text if len(text) <= 80 else text[:79] + "~")


def _shown_url(text: str) -> str:
    return ascii(_without_secrets(text)) if "://" in text else "(not shown: no URL, and it may hold a password)"


def _without_secrets(url: str) -> str:
    """``url`` without user, password, query and fragment, and without the rest too if it cannot be told from them."""
    scheme, _, rest = url.partition("://")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]{0,15}", scheme):
        return "***"
    before_query, question_mark, query = rest.partition("?")
    _, at, place = before_query.rpartition("@")
    place = place.partition("#")[0]
    # An @ behind a question mark: the password holds the one or the query holds the other, so nothing is certain.
    if "@" in query or not _HARMLESS_PLACE.fullmatch(place):
        return f"{scheme}://***"
    return f"{scheme}://{'***@' if at else ''}{place}{'?***' if question_mark else ''}"


def _whole_number(text: str, low: int, high: int) -> int:
    if not re.fullmatch(r"0|[1-9][0-9]{0,11}", text) or not low <= int(text) <= high:
        raise _RefusedError
    return int(text)


def _decimal_number(text: str, low: float, high: float) -> float:
    if not re.fullmatch(r"(?:0|[1-9][0-9]{0,11})(?:\.[0-9]{1,6})?", text) or not low <= float(text) <= high:
        raise _RefusedError
    return float(text)


def _one_of(text: str, options: tuple[ChoiceT, ...]) -> ChoiceT:
    for option in options:
        if text == option:
            return option
    raise _RefusedError


def _queue_name(text: str) -> str:
    if re.search(r"[,;\s]", text):
        raise _RefusedError("one worker serves one queue: start a worker process for each, each with one name")
    return check_queue_name(text)


def _process_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]{0,64}", text):
        raise _RefusedError
    return text


def _ca_file(text: str) -> str | None:
    if not text:
        return None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=text)
    except ssl.SSLError:
        raise _RefusedError("the file holds no PEM certificate") from None
    except (OSError, ValueError):
        raise _RefusedError("there is no such file, or it cannot be read") from None
    return text


def _port_in_range(port: str | None) -> bool:
    return port is None or (len(port) <= 5 and 1 <= int(port) <= 65535)


@dataclass(frozen=True, slots=True)
class _BaseUrl:
    url: str
    scheme: str
    host: str

    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    def is_the_exchange(self) -> bool:
        return any(self.host == domain or self.host.endswith(f".{domain}") for domain in EXCHANGE_DOMAINS)


def _base_url(text: str) -> _BaseUrl:
    shape = _BASE_URL_SHAPE.fullmatch(text)
    if not shape or not _port_in_range(shape["port"]):
        raise _RefusedError
    host = shape["host"].lower()
    port = f":{shape['port']}" if shape["port"] else ""
    base_url = _BaseUrl(f"{shape['scheme']}://{host}{port}", shape["scheme"], host)
    if base_url.scheme == "http" and not base_url.is_loopback():
        raise _RefusedError("plain http goes to loopback hosts only (localhost, 127.0.0.1, [::1]); use https")
    return base_url


def _host_name(text: str) -> str:
    if text and not re.fullmatch(_HOST, text):
        raise _RefusedError
    return text.lower()


def _proxy_url(text: str) -> str | None:
    if not text:
        return None
    shape = _PROXY_URL_SHAPE.fullmatch(text)
    if not shape or not _port_in_range(shape["port"]):
        raise _RefusedError
    return text


@dataclass(frozen=True, slots=True, repr=False)
class _RedisUrl:
    """REDIS_URL and what its query says about TLS; None where it says nothing."""

    url: str
    tls: bool
    cert_reqs: TlsVerify | None
    ca_file: str | None
    check_hostname: bool | None


def _redis_url(text: str) -> _RedisUrl:
    try:
        address = Address.parse(text)
    except BadRedisUrl as error:
        raise _RefusedError(str(error)) from None
    if address.others:
        raise _RefusedError(f"after the question mark only {', '.join(sorted(OPTIONS))} may be set")
    options = address.options
    cert_reqs, check_hostname = options.get("ssl_cert_reqs"), options.get("ssl_check_hostname")
    return _RedisUrl(text, address.is_tls, cert_reqs, options.get("ssl_ca_certs"), check_hostname)


# --- The table ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting(Generic[T_co]):
    """One row of the table of settings.

    ``default`` is the text that would mean the same if it were set ("" for none), ``accepts`` what the value must be,
    with its unit, and ``meaning`` what it does. In the names of the rows for further accounts ``<ACCOUNT>`` stands
    for the account's name in upper case.
    """

    variable: str
    default: str
    accepts: str
    meaning: str
    parse: Callable[[str], T_co] = dataclasses.field(repr=False)
    show: Callable[[str], str] = dataclasses.field(default=_shown, repr=False)

    def problem(self, text: str, reason: str, option: str | None = None) -> str:
        """The line that reports ``text`` as unacceptable, given as the variable or as a command line ``option``."""
        way_out = "leave it out" if option else "unset it"
        default = f"for the default {self.default}" if self.default and not option else ""
        rule = f"{reason}; it must be {self.accepts}" if reason else f"it must be {self.accepts}"
        return f"{option or self.variable} is {self.show(text)}: {rule}, or {way_out} {default}".rstrip()


def _whole(variable: str, default: int, low: int, high: int, unit: str, meaning: str) -> Setting[int]:
    accepts = f"a whole number of {unit} from {low} to {high}"
    return Setting(variable, str(default), accepts, meaning, lambda text: _whole_number(text, low, high))


def _decimal(variable: str, default: int, low: int, high: int, unit: str, meaning: str) -> Setting[float]:
    accepts = f"a number of {unit} from {low} to {high}, fractions as in 1.5"
    return Setting(variable, str(default), accepts, meaning, lambda text: _decimal_number(text, low, high))


def _choice(variable: str, options: tuple[ChoiceT, ...], default: ChoiceT, meaning: str) -> Setting[ChoiceT]:
    accepts = f"{', '.join(options[:-1])} or {options[-1]}"
    return Setting(variable, default, accepts, meaning, lambda text: _one_of(text, options))


def _secret(variable: str, accepts: str, meaning: str) -> Setting[str]:
    return Setting(variable, "", accepts, meaning, str, lambda _: "(not shown)")


_REDIS_URL = Setting(
    "REDIS_URL",
    "redis://localhost:6379/0",
    FORMS,
    "the Redis that holds queue and outcomes",
    _redis_url,
    _shown_url,
)
_REDIS_TLS_VERIFY = _choice(
    "REDIS_TLS_VERIFY", _TLS_OPTIONS, "required", "whether a rediss:// server must prove who it is; none on Heroku"
)
_REDIS_TLS_CA = Setting(
    "REDIS_TLS_CA", "", "the path of a PEM file", "the authorities that may vouch for a rediss:// server", _ca_file
)
_CANCEL_QUEUE = Setting(
    "CANCEL_QUEUE",
    DEFAULT_QUEUE,
    "one name of 1 to 64 characters out of A-Z a-z 0-9 _ . -",
    "the queue that this worker serves",
    _queue_name,
)
_BINANCE_BASE_URL = Setting(
    "BINANCE_BASE_URL",
    "https://fapi.binance.com",
    "https://host[:port] without user, path and query",
    "the exchange; http is accepted for loopback hosts",
    _base_url,
    _shown_url,
)
_BINANCE_ALLOWED_HOST = Setting(
    "BINANCE_ALLOWED_HOST",
    "",
    "a host name without scheme, port and path",
    "the one host outside binance.com and binancefuture.com that BINANCE_BASE_URL may name",
    _host_name,
)
_API_KEY = "visible ASCII characters, as the exchange's API management page shows them"
_PRIVATE_KEY = (
    "an unencrypted RSA or Ed25519 key as PEM text (line breaks may be written as \\n), or the path of its file"
)
_ACCOUNT_SETTINGS = (
    _secret("BINANCE_API_KEY", _API_KEY, "API key of the account 'default'"),
    _secret("BINANCE_API_SECRET", _API_KEY, "its HMAC secret; set this or the private key"),
    _secret("BINANCE_PRIVATE_KEY", _PRIVATE_KEY, "its private key; set this or the secret"),
    _secret("BINANCE_<ACCOUNT>_API_KEY", _API_KEY, "API key of a further account; a - in its name is written _"),
    _secret("BINANCE_<ACCOUNT>_API_SECRET", _API_KEY, "that account's HMAC secret"),
    _secret("BINANCE_<ACCOUNT>_PRIVATE_KEY", _PRIVATE_KEY, "that account's private key"),
)
_BINANCE_RECV_WINDOW_MS = _whole(
    "BINANCE_RECV_WINDOW_MS", 5000, 1, 60_000, "milliseconds", "how old a request may be when the exchange reads it"
)
_EGRESS_PROXY_URL = Setting(
    "EGRESS_PROXY_URL",
    "",
    "http://[user:password@]host[:port] or the same with https://, user and password percent-encoded",
    "the proxy with a fixed address, for API keys bound to one",
    _proxy_url,
    _shown_url,
)
_SCOPES: tuple[RateLimitScope, ...] = ("all", "dyno")
_RATE_LIMIT_SCOPE = _choice("RATE_LIMIT_SCOPE", _SCOPES, "all", "all: workers share one gate; dyno: each has its own")
_WORKER_CONCURRENCY = _whole("WORKER_CONCURRENCY", 64, 1, 512, "requests", "requests in flight in this process")
_CANCEL_MAX_ATTEMPTS = _whole(
    "CANCEL_MAX_ATTEMPTS",
    200,
    1,
    1000,
    "attempts",
    "most attempts that were answered about the order or may have been carried out; the deadline alone bounds the rest",
)
_CANCEL_DEADLINE_S = _decimal("CANCEL_DEADLINE_S", 300, 1, 86_400, "seconds", "longest try, if the request names none")
_BACKOFF_BASE_MS = _whole("BACKOFF_BASE_MS", 100, 1, 60_000, "milliseconds", "bound of the first delay before a retry")
_BACKOFF_CAP_MS = _whole("BACKOFF_CAP_MS", 15_000, 1, 3_600_000, "milliseconds", "bound of any delay before a retry")
_NOT_FOUND_HORIZON_S = _decimal(
    "NOT_FOUND_HORIZON_S", 10, 0, 86_400, "seconds", "how long 'no such order' is asked again before it is believed"
)
_LEASE_S = _decimal("LEASE_S", 8, 1, 300, "seconds", "how long a silent worker keeps its jobs from the others")
# Heroku kills what is left 30 s after SIGTERM. The last outcomes may have to wait out one Redis time-out (3 s) after
# the last request ended, and Python needs a moment to leave: 25 s is the longest grace that is sure to end by itself.
_SHUTDOWN_GRACE_S = _whole("SHUTDOWN_GRACE_S", 20, 1, 25, "seconds", "longest time from SIGTERM to exit")
_OUTCOME_TTL_S = _whole(
    "OUTCOME_TTL_S", 86_400, 60, 30 * 86_400, "seconds", "how long an outcome can be read by its id"
)
_LEDGER_MAXLEN = _whole("LEDGER_MAXLEN", 20_000, 100, 10_000_000, "entries", "outcomes that the ledger keeps")
_LEVELS: tuple[LogLevel, ...] = ("DEBUG", "INFO", "WARNING", "ERROR")
_LOG_LEVEL = _choice("LOG_LEVEL", _LEVELS, "INFO", "the least severe lines that are logged")
_FORMATS: tuple[LogFormat, ...] = ("logfmt", "json")
_LOG_FORMAT = _choice("LOG_FORMAT", _FORMATS, "logfmt", "form of a log line")
_WAF_PAUSE_S = _whole(
    "WAF_PAUSE_S",
    300,
    1,
    3600,
    "seconds",
    "first pause after a 403 or a firewall's challenge; it doubles when repeated",
)
_DYNO = Setting(
    "DYNO",
    "",
    "at most 64 characters out of A-Z a-z 0-9 _ . -",
    "this process's name, as Heroku sets it",
    _process_name,
)

#: Every variable that the worker reads, in the order in which ``--help`` prints them.
SETTINGS: tuple[Setting[object], ...] = (
    _REDIS_URL,
    _REDIS_TLS_VERIFY,
    _REDIS_TLS_CA,
    _CANCEL_QUEUE,
    _BINANCE_BASE_URL,
    _BINANCE_ALLOWED_HOST,
    *_ACCOUNT_SETTINGS,
    _BINANCE_RECV_WINDOW_MS,
    _EGRESS_PROXY_URL,
    _RATE_LIMIT_SCOPE,
    _WORKER_CONCURRENCY,
    _CANCEL_MAX_ATTEMPTS,
    _CANCEL_DEADLINE_S,
    _BACKOFF_BASE_MS,
    _BACKOFF_CAP_MS,
    _NOT_FOUND_HORIZON_S,
    _LEASE_S,
    _SHUTDOWN_GRACE_S,
    _OUTCOME_TTL_S,
    _LEDGER_MAXLEN,
    _LOG_LEVEL,
    _LOG_FORMAT,
    _WAF_PAUSE_S,
    _DYNO,
)


# --- Reading -----------------------------------------------------------------------------------------------------


class _Reader:
    """Reads settings from a mapping and collects what is wrong with them instead of stopping at the first."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._refused: set[str] = set()
        self.problems: list[str] = []

    def names(self) -> list[str]:
        return sorted(self._environ)

    def raw(self, variable: str) -> str:
        return self._environ.get(variable, "")

    def sound(self, *settings: Setting[object]) -> bool:
        """Whether all of these were acceptable, so that it makes sense to compare them."""
        return self._refused.isdisjoint(setting.variable for setting in settings)

    def read(self, setting: Setting[T]) -> T:
        """The setting's value; after a problem its default, so that reading can go on."""
        text = self.raw(setting.variable)
        try:
            return setting.parse(text or setting.default)
        except ValueError as error:
            self._refused.add(setting.variable)
            self.problems.append(setting.problem(text, _reason(error)))
            return setting.parse(setting.default)

    def usable(self, variable: str, build: Callable[[], T]) -> T | None:
        """What ``build`` makes of the key in ``variable``, or None and a problem more."""
        try:
            return build()
        except CredentialError as error:
            self.problems.append(f"{variable} cannot be used: {error}")
            return None


def _read_base_url(reader: _Reader) -> str:
    base_url, allowed_host = reader.read(_BINANCE_BASE_URL), reader.read(_BINANCE_ALLOWED_HOST)
    known = base_url.is_the_exchange() or base_url.is_loopback() or base_url.host == allowed_host
    if not known and reader.sound(_BINANCE_BASE_URL, _BINANCE_ALLOWED_HOST):
        reader.problems.append(
            f"BINANCE_BASE_URL is '{base_url.url}': it must be a host under {' or '.join(EXCHANGE_DOMAINS)}, because "
            f"keys must not go elsewhere; if this host is meant, set BINANCE_ALLOWED_HOST={base_url.host}"
        )
    return base_url.url


def _read_redis(reader: _Reader) -> tuple[str, TlsVerify, str | None]:
    """The Redis URL with how its server is verified.

    redis-py lets the URL's query win over every argument, so what it says about TLS is adopted, and refused where a
    variable says otherwise: nobody shall believe in a verification that does not take place.
    """
    url, verify, ca_file = reader.read(_REDIS_URL), reader.read(_REDIS_TLS_VERIFY), reader.read(_REDIS_TLS_CA)
    if not reader.sound(_REDIS_URL, _REDIS_TLS_VERIFY, _REDIS_TLS_CA):
        return url.url, verify, ca_file
    if url.cert_reqs:
        if url.cert_reqs != verify and reader.raw("REDIS_TLS_VERIFY"):
            reader.problems.append(
                f"REDIS_TLS_VERIFY is '{verify}': it must not contradict REDIS_URL, which says "
                f"ssl_cert_reqs={url.cert_reqs}; remove one of the two"
            )
        verify = url.cert_reqs
    if url.ca_file is not None:
        ca_file = _ca_file_of_url(reader, url.ca_file, ca_file)
    if ca_file and verify == "none":
        reader.problems.append(
            f"REDIS_TLS_CA (or ssl_ca_certs in REDIS_URL) is {_shown(ca_file)}: it must not be set while certificates "
            "are not checked; unset it, or set REDIS_TLS_VERIFY=required"
        )
    return url.url, verify, ca_file


def _ca_file_of_url(reader: _Reader, in_url: str, in_variable: str | None) -> str | None:
    if in_variable and in_variable != in_url:
        reader.problems.append(
            f"REDIS_TLS_CA is {_shown(in_variable)}: it must not contradict REDIS_URL, which names another file as "
            "ssl_ca_certs; remove one of the two"
        )
    try:
        return _ca_file(in_url)
    except _RefusedError as error:
        reader.problems.append(_REDIS_URL.problem(reader.raw("REDIS_URL"), f"ssl_ca_certs: {error}"))
        return in_variable


def _read_backoff(reader: _Reader) -> tuple[int, int]:
    base_ms, cap_ms = reader.read(_BACKOFF_BASE_MS), reader.read(_BACKOFF_CAP_MS)
    if cap_ms < base_ms and reader.sound(_BACKOFF_BASE_MS, _BACKOFF_CAP_MS):
        by_default = "" if reader.raw("BACKOFF_CAP_MS") else " by default"
        reader.problems.append(
            f"BACKOFF_CAP_MS is '{cap_ms}'{by_default}: it must be at least BACKOFF_BASE_MS, which is '{base_ms}'; "
            "raise the one or lower the other"
        )
    return base_ms, cap_ms


def _read_credentials(reader: _Reader) -> Mapping[str, Credential]:
    """All accounts' credentials by account name, in which ``_`` stands for ``-`` too."""
    before = len(reader.problems)
    credentials = {DEFAULT_ACCOUNT: _read_credential(reader, "BINANCE", DEFAULT_ACCOUNT)}
    for part, variables in _account_variables(reader).items():
        named = " and ".join(ascii(variable)[1:-1] for variable in variables)
        if not _ACCOUNT_IN_VARIABLE.fullmatch(part):
            rule = "must name its account in 1 to 32 characters out of A-Z 0-9 and _, the first not _; rename it"
            reader.problems.append(f"{named} {rule}")
        elif part.lower() == DEFAULT_ACCOUNT:
            rule = "must be named without _DEFAULT, as BINANCE_API_KEY is; rename it"
            reader.problems.append(f"{named} {rule}")
        else:
            credentials[part.lower()] = _read_credential(reader, f"BINANCE_{part}", part.lower())
    usable = {account: credential for account, credential in credentials.items() if credential}
    if not usable and len(reader.problems) == before:
        reader.problems.append(
            "BINANCE_API_KEY is not set, nor is BINANCE_<ACCOUNT>_API_KEY: a worker must have at least one account; "
            "set BINANCE_API_KEY with BINANCE_API_SECRET or BINANCE_PRIVATE_KEY"
        )
    return MappingProxyType(usable)


def _account_variables(reader: _Reader) -> dict[str, list[str]]:
    """The variables of further accounts that are set, by the part of their names that names the account."""
    found: dict[str, list[str]] = {}
    for name in reader.names():
        shape = _ACCOUNT_VARIABLE.fullmatch(name)
        if shape and reader.raw(name):
            found.setdefault(shape["account"], []).append(name)
    return found


def _read_credential(reader: _Reader, prefix: str, account: str) -> Credential | None:
    key_name, secret_name, pem_name = f"{prefix}_API_KEY", f"{prefix}_API_SECRET", f"{prefix}_PRIVATE_KEY"
    given_key, secret, pem = reader.raw(key_name), reader.raw(secret_name), reader.raw(pem_name)
    if not (given_key or secret or pem):
        return None
    before = len(reader.problems)
    # The secret is looked at even beside a bad API key, so that both are reported; hence the stand-in.
    api_key = "-"
    if given_key:
        api_key = reader.usable(key_name, lambda: check_api_key(given_key)) or api_key
    else:
        given = secret_name if secret else pem_name
        reader.problems.append(
            f"{key_name} is not set, but {given} is: set the API key that belongs to it, or unset it"
        )
    if secret and pem:
        reader.problems.append(
            f"{secret_name} and {pem_name} are both set: unset the one that does not belong to the key"
        )
    elif not (secret or pem):
        reader.problems.append(
            f"{key_name} is set without a secret: set {secret_name} (HMAC) or {pem_name} (RSA, Ed25519)"
        )
    credential = None
    if secret:
        credential = reader.usable(secret_name, lambda: Credential.from_secret(account, api_key, secret))
    if pem:
        credential = reader.usable(
            pem_name, lambda: Credential.from_private_key(account, api_key, _private_key_text(pem))
        )
    return credential if len(reader.problems) == before else None


def _private_key_text(given: str) -> str:
    """PEM text from a variable's value, which is that text or the path of the file that holds it."""
    if "-----BEGIN" in given:
        # Where a variable holds one line only, people and tools write line breaks as backslash and letter.
        return given.replace("\\r", "").replace("\\n", "\n")
    try:
        path = Path(given)
        if path.is_file() and path.stat().st_size <= _MAX_KEY_FILE_BYTES:
            return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        # The error names the path, which is the key itself if someone pasted it without its first line.
        pass
    raise CredentialError("it is neither PEM text (-----BEGIN PRIVATE KEY-----) nor the path of a key file to be read")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class Settings:
    """All that the worker was told at its start. Names end in their unit; see :data:`SETTINGS` for the meanings.

    The repr shows no password and no key, and pickling is refused. ``redis_url`` and ``egress_proxy_url`` may hold
    passwords: log :attr:`display_redis_url` instead, and the proxy not at all.
    """

    redis_url: str
    redis_tls_verify: TlsVerify
    redis_tls_ca: str | None
    queue: str
    base_url: str
    credentials: Mapping[str, Credential]
    recv_window_ms: int
    egress_proxy_url: str | None
    rate_limit_scope: RateLimitScope
    concurrency: int
    max_attempts: int
    deadline_s: float
    backoff_base_ms: int
    backoff_cap_ms: int
    not_found_horizon_s: float
    lease_s: float
    shutdown_grace_s: int
    outcome_ttl_s: int
    ledger_maxlen: int
    log_level: LogLevel
    log_format: LogFormat
    waf_pause_s: int
    process_name: str

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """The settings in ``environ``, by default the process's environment.

        Raises:
            SettingsError: with everything that is wrong.
        """
        reader = _Reader(os.environ if environ is None else environ)
        settings = cls._read(reader)
        if reader.problems:
            raise SettingsError(tuple(reader.problems))
        return settings

    @classmethod
    def _read(cls, reader: _Reader) -> Settings:
        redis_url, redis_tls_verify, redis_tls_ca = _read_redis(reader)
        backoff_base_ms, backoff_cap_ms = _read_backoff(reader)
        return cls(
            redis_url=redis_url,
            redis_tls_verify=redis_tls_verify,
            redis_tls_ca=redis_tls_ca,
            queue=reader.read(_CANCEL_QUEUE),
            base_url=_read_base_url(reader),
            credentials=_read_credentials(reader),
            recv_window_ms=reader.read(_BINANCE_RECV_WINDOW_MS),
            egress_proxy_url=reader.read(_EGRESS_PROXY_URL),
            rate_limit_scope=reader.read(_RATE_LIMIT_SCOPE),
            concurrency=reader.read(_WORKER_CONCURRENCY),
            max_attempts=reader.read(_CANCEL_MAX_ATTEMPTS),
            deadline_s=reader.read(_CANCEL_DEADLINE_S),
            backoff_base_ms=backoff_base_ms,
            backoff_cap_ms=backoff_cap_ms,
            not_found_horizon_s=reader.read(_NOT_FOUND_HORIZON_S),
            lease_s=reader.read(_LEASE_S),
            shutdown_grace_s=reader.read(_SHUTDOWN_GRACE_S),
            outcome_ttl_s=reader.read(_OUTCOME_TTL_S),
            ledger_maxlen=reader.read(_LEDGER_MAXLEN),
            log_level=reader.read(_LOG_LEVEL),
            log_format=reader.read(_LOG_FORMAT),
            waf_pause_s=reader.read(_WAF_PAUSE_S),
            process_name=reader.read(_DYNO),
        )

    def overridden(self, *, queue: str | None = None, concurrency: int | str | None = None) -> Settings:
        """A copy with what the command line says; None leaves the setting as it is.

        Raises:
            SettingsError: by the rules of the variables, naming the options.
        """
        rows = (("queue", _CANCEL_QUEUE, queue), ("concurrency", _WORKER_CONCURRENCY, concurrency))
        changes: dict[str, Any] = {}
        problems = []
        for name, setting, value in rows:
            if value is None:
                continue
            try:
                changes[name] = setting.parse(str(value))
            except ValueError as error:
                problems.append(setting.problem(str(value), _reason(error), option=f"--{name}"))
        if problems:
            raise SettingsError(tuple(problems))
        return dataclasses.replace(self, **changes)

    def credential_for(self, account: str) -> Credential | None:
        """The credential of a request's ``account``, or None if this worker has none.

        Names of variables cannot hold a hyphen, so ``desk-a`` and ``desk_a`` are one account, BINANCE_DESK_A_API_KEY.
        """
        return self.credentials.get(account.replace("-", "_"))

    def redis_options(self) -> dict[str, object]:
        """What redis-py must be told about TLS beside the URL; empty unless the URL is ``rediss://``."""
        url = _redis_url(self.redis_url)
        if not url.tls:
            return {}
        check_hostname = self.redis_tls_verify == "required" and url.check_hostname is not False
        options: dict[str, object] = {"ssl_cert_reqs": self.redis_tls_verify, "ssl_check_hostname": check_hostname}
        return options | ({"ssl_ca_certs": self.redis_tls_ca} if self.redis_tls_ca else {})

    @property
    def display_redis_url(self) -> str:
        """The Redis URL fit for logs: without user, password and options."""
        return Address.parse(self.redis_url).shown

    def __repr__(self) -> str:
        shown = {field.name: repr(getattr(self, field.name)) for field in dataclasses.fields(self)}
        shown["redis_url"] = repr(self.display_redis_url)
        shown["egress_proxy_url"] = repr(self.egress_proxy_url and _without_secrets(self.egress_proxy_url))
        shown["credentials"] = "{" + ", ".join(f"{a!r}: {c.kind}" for a, c in self.credentials.items()) + "}"
        return f"Settings({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("settings cannot be pickled: they hold secrets")


def environment_for_readers(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a command that only reads the queue: all of it but what belongs to the exchange."""
    given = os.environ if environ is None else environ
    return {name: value for name, value in given.items() if not name.startswith(("BINANCE_", "EGRESS_PROXY_URL"))}


def sandbox_server(environ: Mapping[str, str] | None = None) -> tuple[str | None, dict[str, str]]:
    """What the sandbox is told by ``environ``, by default the process's environment.

    The Redis server that VALKEY_SERVER names (None: the embedded one), and the environment without any setting of the
    worker's, for processes that get settings of their own: no key of a person reaches the sandbox.
    """
    given = os.environ if environ is None else environ
    ours = {setting.variable for setting in SETTINGS}
    rest = {name: value for name, value in given.items() if name not in ours and not name.startswith("BINANCE_")}
    return given.get("VALKEY_SERVER") or None, rest
