"""The worker's settings: the one module of the worker that reads the environment.

Every variable stands once, at the field of :class:`Settings` that it sets; :meth:`Settings.from_env` reads all of them
and reports all that is wrong in one :class:`SettingsError`, so that a deploy is corrected in one go. A variable that is
set to nothing counts as not set. Numbers are plain decimals: what ``float`` would take beyond that (``nan``, ``1e3``,
``1_000``, blanks, other scripts' digits) is a typing mistake more often than a wish.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, NoReturn, TypeVar, cast

from producer.keys import MAX_LEASE_S
from producer.message import DEFAULT_QUEUE
from producer.redis_url import FORMS, Address
from worker import setting_values as values
from worker.accounts import read_accounts
from worker.setting_values import ChoiceT, TlsVerify
from worker.signing import Credential

__all__ = [
    "SETTINGS",
    "QueuePlace",
    "Setting",
    "Settings",
    "SettingsError",
    "environment_for_readers",
    "sandbox_server",
]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class SettingsError(ValueError):
    """The worker cannot start with these settings.

    ``problems`` holds one line for each, naming the variable (or command line option), what was given unless it may
    be secret, what it must be, and the way out.
    """

    def __init__(self, problems: tuple[str, ...]) -> None:
        count = "1 bad setting" if len(problems) == 1 else f"{len(problems)} bad settings"
        super().__init__("".join([f"{count}:", *(f"\n  {problem}" for problem in problems)]))
        self.problems = problems


# --- One variable ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting(Generic[T_co]):
    """What a variable may be.

    ``default`` is the text that would mean the same if it were set ("" for none), ``accepts`` what the value must be,
    with its unit, and ``meaning`` what it does. In the names of the variables for further accounts ``<ACCOUNT>`` stands
    for the account's name in upper case.
    """

    variable: str
    default: str
    accepts: str
    meaning: str
    parse: Callable[[str], T_co] = dataclasses.field(repr=False)
    show: Callable[[str], str] = dataclasses.field(default=values.shown, repr=False)

    def problem(self, text: str, reason: str, option: str | None = None) -> str:
        """The line that reports ``text`` as unacceptable, given as the variable or as a command line ``option``."""
        way_out = "leave it out" if option else "unset it"
        default = f"for the default {self.default}" if self.default and not option else ""
        rule = f"{reason}; it must be {self.accepts}" if reason else f"it must be {self.accepts}"
        return f"{option or self.variable} is {self.show(text)}: {rule}, or {way_out} {default}".rstrip()


def _set_by(setting: Setting[T], *more: Setting[object]) -> T:
    """A field of :class:`Settings` that this variable sets, with ``more`` that have a part in it."""
    return cast(T, dataclasses.field(metadata={"settings": (setting, *more)}))


def _whole(variable: str, default: int, low: int, high: int, unit: str, meaning: str) -> int:
    accepts = f"a whole number of {unit} from {low} to {high}"
    return _set_by(Setting(variable, str(default), accepts, meaning, lambda text: values.whole_number(text, low, high)))


def _decimal(variable: str, default: int, low: int, high: int, unit: str, meaning: str) -> float:
    accepts = f"a number of {unit} from {low} to {high}, fractions as in 1.5"
    return _set_by(
        Setting(variable, str(default), accepts, meaning, lambda text: values.decimal_number(text, low, high))
    )


def _choice(variable: str, options: tuple[ChoiceT, ...], default: ChoiceT, meaning: str) -> Setting[ChoiceT]:
    accepts = f"{', '.join(options[:-1])} or {options[-1]}"
    return Setting(variable, default, accepts, meaning, lambda text: values.one_of(text, options))


def _ca_file(variable: str, meaning: str) -> Setting[str | None]:
    return Setting(variable, "", "the path of a PEM file", meaning, values.ca_file)


def _secret(variable: str, accepts: str, meaning: str) -> Setting[str]:
    return Setting(variable, "", accepts, meaning, str, lambda _: "(not shown)")


# Those that are held against each other, or read without the rest.
_REDIS_URL = Setting(
    "REDIS_URL",
    "redis://localhost:6379/0",
    FORMS,
    "the Redis that holds queue and outcomes (the Sentinels' own login: ?sentinel_password=)",
    values.redis_url,
    values.shown_url,
)
_REDIS_TLS_VERIFY = _choice(
    "REDIS_TLS_VERIFY",
    values.TLS_OPTIONS,
    "required",
    "whether a rediss:// server must prove who it is; none on Heroku",
)
_REDIS_TLS_CA = _ca_file("REDIS_TLS_CA", "the authorities that may vouch for a rediss:// server")
_CANCEL_QUEUE = Setting(
    "CANCEL_QUEUE",
    DEFAULT_QUEUE,
    "one name of 1 to 64 characters out of A-Z a-z 0-9 _ . -",
    "the queue that this worker serves",
    values.queue_name,
)
_BINANCE_BASE_URL = Setting(
    "BINANCE_BASE_URL",
    "https://fapi.binance.com",
    "https://host[:port] without user, path and query",
    "the exchange; http is accepted for loopback hosts",
    values.base_url,
    values.shown_url,
)
_BINANCE_ALLOWED_HOST = Setting(
    "BINANCE_ALLOWED_HOST",
    "",
    "a host name without scheme, port and path",
    "the one host outside binance.com and binancefuture.com that BINANCE_BASE_URL may name",
    values.host_name,
)
_BINANCE_ACCOUNTS = Setting(
    "BINANCE_ACCOUNTS",
    "",
    "names of accounts as requests use them, separated by commas (default, desk-a)",
    "the accounts that this worker serves, and no key of another program; unset: all that are found",
    values.account_names,
)
_EGRESS_PROXY_URL = Setting(
    "EGRESS_PROXY_URL",
    "",
    "http://[user:password@]host[:port] or the same with https://, user and password percent-encoded",
    "the proxy with a fixed address, for API keys bound to one; not beside a BINANCE_BASE_URL of plain http",
    values.proxy_url,
    values.shown_url,
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


# --- All of them -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class Settings:
    """All that the worker was told at its start, in the order in which ``--help`` tells of it. Names end in their unit.

    The repr shows no password and no key, and pickling is refused. ``redis_url`` and ``egress_proxy_url`` may hold
    passwords: log :attr:`display_redis_url` instead, and the proxy not at all.
    """

    redis_url: str = _set_by(_REDIS_URL)
    redis_tls_verify: Literal["required", "none"] = _set_by(_REDIS_TLS_VERIFY)
    redis_tls_ca: str | None = _set_by(_REDIS_TLS_CA)
    queue: str = _set_by(_CANCEL_QUEUE)
    base_url: str = _set_by(_BINANCE_BASE_URL, _BINANCE_ALLOWED_HOST)
    credentials: Mapping[str, Credential] = dataclasses.field(
        metadata={"settings": (*_ACCOUNT_SETTINGS, _BINANCE_ACCOUNTS)}
    )
    accounts_left_out: tuple[str, ...]  # keys were found, but BINANCE_ACCOUNTS does not name them
    exchange_tls_ca: str | None = _set_by(
        _ca_file(
            "EXCHANGE_TLS_CA",
            "the authorities that may vouch for the exchange (and an https proxy), instead of the usual ones",
        )
    )
    recv_window_ms: int = _whole(
        "BINANCE_RECV_WINDOW_MS",
        5000,
        1,
        60_000,
        "milliseconds",
        "how old a request may be when the exchange reads it; an attempt may take 0.8 of it",
    )
    egress_proxy_url: str | None = _set_by(_EGRESS_PROXY_URL)
    rate_limit_scope: Literal["all", "dyno"] = _set_by(
        _choice("RATE_LIMIT_SCOPE", ("all", "dyno"), "all", "whose address it is: all workers' or each host's")
    )
    concurrency: int = _whole("WORKER_CONCURRENCY", 64, 1, 512, "requests", "requests in flight in this process")
    max_attempts: int = _whole(
        "CANCEL_MAX_ATTEMPTS",
        200,
        1,
        1000,
        "attempts",
        "most attempts that were answered about the order or may have been carried out; the deadline alone bounds the "
        "rest",
    )
    deadline_s: float = _decimal(
        "CANCEL_DEADLINE_S", 300, 1, 86_400, "seconds", "longest try, if the request names none"
    )
    backoff_base_ms: int = _whole(
        "BACKOFF_BASE_MS",
        100,
        1,
        60_000,
        "milliseconds",
        "bound of the first retry's delay, which doubles and is drawn by chance",
    )
    backoff_cap_ms: int = _whole(
        "BACKOFF_CAP_MS", 15_000, 1, 3_600_000, "milliseconds", "bound of any delay before a retry"
    )
    not_found_horizon_s: float = _decimal(
        "NOT_FOUND_HORIZON_S", 10, 0, 86_400, "seconds", "how long 'no such order' is asked again before it is believed"
    )
    lease_s: float = _decimal(
        "LEASE_S", 8, 1, MAX_LEASE_S, "seconds", "how long a silent worker keeps its jobs from the others"
    )
    # Heroku kills what is left 30 s after SIGTERM. The last outcomes may have to wait out one Redis time-out (3 s)
    # after the last request ended, and Python needs a moment to leave: 25 s is the longest grace that is sure to end by
    # itself.
    shutdown_grace_s: int = _whole("SHUTDOWN_GRACE_S", 20, 1, 25, "seconds", "longest time from SIGTERM to exit")
    outcome_ttl_s: int = _whole(
        "OUTCOME_TTL_S", 86_400, 60, 30 * 86_400, "seconds", "how long an outcome can be read by its id"
    )
    ledger_maxlen: int = _whole("LEDGER_MAXLEN", 20_000, 100, 10_000_000, "entries", "outcomes that the ledger keeps")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = _set_by(
        _choice("LOG_LEVEL", ("DEBUG", "INFO", "WARNING", "ERROR"), "INFO", "the least severe lines that are logged")
    )
    log_format: Literal["logfmt", "json"] = _set_by(
        _choice("LOG_FORMAT", ("logfmt", "json"), "logfmt", "form of a log line")
    )
    waf_pause_s: int = _whole(
        "WAF_PAUSE_S",
        300,
        1,
        3600,
        "seconds",
        "first pause after a 403 or a firewall's challenge; it doubles when repeated",
    )
    process_name: str = _set_by(
        Setting(
            "DYNO",
            "",
            "at most 64 characters out of A-Z a-z 0-9 _ . -",
            "this process's name, as Heroku sets it",
            values.process_name,
        )
    )
    warnings: tuple[str, ...]  # what it can start with, but should not

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """The settings in ``environ``, by default the process's environment.

        Raises:
            SettingsError: with everything that is wrong.
        """
        reader = _Reader(os.environ if environ is None else environ)
        url, verify, ca_file = _read_redis(reader)
        base_url, proxy_url = _read_exchange(reader)
        accounts = read_accounts(reader.environ, reader.read(_BINANCE_ACCOUNTS))
        reader.problems += accounts.problems
        given: dict[str, Any] = {
            **{"redis_url": url, "redis_tls_verify": verify, "redis_tls_ca": ca_file},
            **{"base_url": base_url, "egress_proxy_url": proxy_url},
            **{"credentials": accounts.credentials, "accounts_left_out": accounts.left_out},
            "warnings": tuple(accounts.warnings),
        }
        given |= {name: reader.read(_SETTING_OF[name]) for name in _SETTING_OF if name not in given}
        settings = cls(**given)
        _check_backoff(reader, settings)
        if reader.problems:
            raise SettingsError(tuple(reader.problems))
        return settings

    def overridden(self, *, queue: str | None = None, concurrency: int | str | None = None) -> Settings:
        """A copy with what the command line says; None leaves the setting as it is.

        Raises:
            SettingsError: by the rules of the variables, naming the options.
        """
        changes: dict[str, Any] = {}
        problems = []
        for name, value in (("queue", queue), ("concurrency", concurrency)):
            if value is None:
                continue
            try:
                changes[name] = _SETTING_OF[name].parse(str(value))
            except ValueError as error:
                problems.append(_SETTING_OF[name].problem(str(value), values.reason_of(error), option=f"--{name}"))
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
        return _redis_options(self.redis_url, self.redis_tls_verify, self.redis_tls_ca)

    @property
    def display_redis_url(self) -> str:
        """The Redis URL fit for logs: without user, password and options."""
        return Address.parse(self.redis_url).shown

    def __repr__(self) -> str:
        shown = {field.name: repr(getattr(self, field.name)) for field in dataclasses.fields(self)}
        shown["redis_url"] = repr(self.display_redis_url)
        shown["egress_proxy_url"] = repr(self.egress_proxy_url and values.without_secrets(self.egress_proxy_url))
        shown["credentials"] = "{" + ", ".join(f"{a!r}: {c.kind}" for a, c in self.credentials.items()) + "}"
        return f"Settings({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("settings cannot be pickled: they hold secrets")


#: The variables of each field that has any, the one that sets it first.
_BY_FIELD: dict[str, tuple[Setting[object], ...]] = {
    field.name: field.metadata["settings"] for field in dataclasses.fields(Settings) if field.metadata
}
_SETTING_OF = {name: settings[0] for name, settings in _BY_FIELD.items()}
#: Every variable that the worker reads, in the order in which ``--help`` prints them.
SETTINGS: tuple[Setting[object], ...] = tuple(setting for settings in _BY_FIELD.values() for setting in settings)


# --- Reading -----------------------------------------------------------------------------------------------------


class _Reader:
    """Reads settings from a mapping and collects what is wrong with them instead of stopping at the first."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self._refused: set[str] = set()
        self.problems: list[str] = []

    def raw(self, variable: str) -> str:
        return self.environ.get(variable, "")

    def sound(self, *variables: str) -> bool:
        """Whether all of these were acceptable, so that it makes sense to compare them."""
        return self._refused.isdisjoint(variables)

    def read(self, setting: Setting[T]) -> T:
        """The setting's value; after a problem its default, so that reading can go on."""
        text = self.raw(setting.variable)
        try:
            return setting.parse(text or setting.default)
        except ValueError as error:
            self._refused.add(setting.variable)
            reason = "quotation marks stand around it, which an env file has kept" if values.is_quoted(text) else ""
            self.problems.append(setting.problem(text, reason or values.reason_of(error)))
            return setting.parse(setting.default)


def _read_exchange(reader: _Reader) -> tuple[str, str | None]:
    """Base URL and egress proxy."""
    url, allowed_host = reader.read(_BINANCE_BASE_URL), reader.read(_BINANCE_ALLOWED_HOST)
    known = values.is_the_exchange(url) or values.is_loopback(url) or values.host_of(url) == allowed_host
    if not known and reader.sound("BINANCE_BASE_URL", "BINANCE_ALLOWED_HOST"):
        reader.problems.append(
            f"BINANCE_BASE_URL is '{url}': it must be a host under {' or '.join(values.EXCHANGE_DOMAINS)}, because "
            f"keys must not go elsewhere; if this host is meant, set BINANCE_ALLOWED_HOST={values.host_of(url)}"
        )
    proxy_url = reader.read(_EGRESS_PROXY_URL)
    if proxy_url and url.startswith("http:") and reader.sound("BINANCE_BASE_URL", "EGRESS_PROXY_URL"):
        reader.problems.append(
            f"EGRESS_PROXY_URL is {values.shown_url(proxy_url)}: it must not be set while BINANCE_BASE_URL is plain "
            f"http ('{url}'), as the proxy would read key and signature; unset it, or use https"
        )
    return url, proxy_url


def _read_redis(reader: _Reader) -> tuple[str, TlsVerify, str | None]:
    """The Redis URL with how its server is verified.

    redis-py lets the URL's query win over every argument, so what it says about TLS is adopted, and refused where a
    variable says otherwise: nobody shall believe in a verification that does not take place.
    """
    url, verify, ca_file = reader.read(_REDIS_URL), reader.read(_REDIS_TLS_VERIFY), reader.read(_REDIS_TLS_CA)
    if not reader.sound("REDIS_URL", "REDIS_TLS_VERIFY", "REDIS_TLS_CA"):
        return url, verify, ca_file
    in_url = Address.parse(url).options
    if told := in_url.get("ssl_cert_reqs"):
        if told != verify and reader.raw("REDIS_TLS_VERIFY"):
            reader.problems.append(
                f"REDIS_TLS_VERIFY is '{verify}': it must not contradict REDIS_URL, which says "
                f"ssl_cert_reqs={told}; remove one of the two"
            )
        verify = told
    if "ssl_ca_certs" in in_url:
        ca_file = _ca_file_of_url(reader, in_url["ssl_ca_certs"], ca_file)
    if ca_file and verify == "none":
        reader.problems.append(
            f"REDIS_TLS_CA (or ssl_ca_certs in REDIS_URL) is {values.shown(ca_file)}: it must not be set while "
            "certificates are not checked; unset it, or set REDIS_TLS_VERIFY=required"
        )
    return url, verify, ca_file


def _ca_file_of_url(reader: _Reader, in_url: str, in_variable: str | None) -> str | None:
    if in_variable and in_variable != in_url:
        reader.problems.append(
            f"REDIS_TLS_CA is {values.shown(in_variable)}: it must not contradict REDIS_URL, which names another file "
            "as ssl_ca_certs; remove one of the two"
        )
    try:
        return values.ca_file(in_url)
    except values.RefusedError as error:
        reader.problems.append(_REDIS_URL.problem(reader.raw("REDIS_URL"), f"ssl_ca_certs: {error}"))
        return in_variable


def _check_backoff(reader: _Reader, got: Settings) -> None:
    if got.backoff_cap_ms < got.backoff_base_ms and reader.sound("BACKOFF_BASE_MS", "BACKOFF_CAP_MS"):
        by_default = "" if reader.raw("BACKOFF_CAP_MS") else " by default"
        reader.problems.append(
            f"BACKOFF_CAP_MS is '{got.backoff_cap_ms}'{by_default}: it must be at least BACKOFF_BASE_MS, which is "
            f"'{got.backoff_base_ms}'; raise the one or lower the other"
        )


def _redis_options(redis_url: str, verify: TlsVerify, ca_file: str | None) -> dict[str, object]:
    address = Address.parse(redis_url)
    if not address.is_tls:
        return {}
    check_hostname = verify == "required" and address.options.get("ssl_check_hostname") is not False
    options: dict[str, object] = {"ssl_cert_reqs": verify, "ssl_check_hostname": check_hostname}
    return options | ({"ssl_ca_certs": ca_file} if ca_file else {})


@dataclass(frozen=True, slots=True, repr=False)
class QueuePlace:
    """Where a queue is, for a command that needs nothing else: no key is looked at. ``url`` may hold a password."""

    url: str
    options: Mapping[str, object]
    queue: str

    @classmethod
    def from_env(cls, queue: str | None = None) -> QueuePlace:
        """As the process' environment has it; ``queue`` wins over its CANCEL_QUEUE.

        Raises:
            SettingsError: with everything that is wrong.
        """
        reader = _Reader(os.environ if queue is None else {**os.environ, _CANCEL_QUEUE.variable: queue})
        url, verify, ca_file = _read_redis(reader)
        name = reader.read(_CANCEL_QUEUE)
        if reader.problems:
            raise SettingsError(tuple(reader.problems))
        return cls(url, _redis_options(url, verify, ca_file), name)


def environment_for_readers() -> dict[str, str]:
    """The environment for a command that only reads the queue: all of it but what belongs to the exchange."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("BINANCE_", "EGRESS_PROXY_URL"))}


def sandbox_server() -> tuple[str | None, dict[str, str]]:
    """What the sandbox is told by the process's environment.

    The Redis server that VALKEY_SERVER names (None: the embedded one), and the environment without any setting of the
    worker's, for processes that get settings of their own: no key of a person reaches the sandbox.
    """
    ours = {setting.variable for setting in SETTINGS}
    rest = {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("BINANCE_")}
    return os.environ.get("VALKEY_SERVER") or None, rest
