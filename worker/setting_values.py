"""What the value of a setting may look like, and how a given one is shown without what may be secret in it.

Each parser takes the text of a variable and gives its value.

Raises:
    ValueError: the value is not acceptable. The text of a :class:`RefusedError` may be shown; others quote what was
        given.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from typing import Literal, TypeVar
from urllib.parse import urlsplit

from producer.message import check_queue_name
from producer.redis_url import OPTIONS, Address, BadRedisUrl

TlsVerify = Literal["required", "none"]
ChoiceT = TypeVar("ChoiceT", bound=str)

#: The exchange's own domains: production, demo-fapi.binance.com and testnet.binancefuture.com (exchange.md section 5).
EXCHANGE_DOMAINS = ("binance.com", "binancefuture.com")
TLS_OPTIONS: tuple[TlsVerify, ...] = ("required", "none")

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"\[[0-9A-Fa-f:.]+\]|{_LABEL}(?:\.{_LABEL})*"
_BASE_URL_SHAPE = re.compile(rf"(?P<scheme>https?)://(?P<host>{_HOST})(?::(?P<port>[0-9]+))?/?")
_PROXY_URL_SHAPE = re.compile(
    r"https?://(?:(?:(?![@/?#\\])[!-~])*@)?(?:\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::(?P<port>[0-9]+))?/?", re.ASCII
)
# A colon without a host before it may stand before a password whose host was forgotten.
_HARMLESS_PLACE = re.compile(r"(?:(?:\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::[0-9]{1,5})?)?(?:/[\w./~+-]*)?", re.ASCII)


class RefusedError(ValueError):
    """A value is not acceptable; the text, if any, is a reason that may be shown beside the setting's rule."""


def reason_of(error: ValueError) -> str:
    """Why a parser refused, fit to be shown: other errors' texts quote what was given, which may be a secret."""
    return str(error) if isinstance(error, RefusedError) else ""


def is_quoted(text: str) -> bool:
    """Whether quotation marks stand around it, as some readers of env files leave them there."""
    return len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"


def shown(text: str) -> str:
    """A given value, fit for a message: escaped, shortened, and without what may be a password."""
    if "@" in text or "://" in text:
        return shown_url(text)
    return ascii(text if len(text) <= 80 else text[:79] + "~")


def shown_url(text: str) -> str:
    """The same for what should be a URL."""
    return ascii(without_secrets(text)) if "://" in text else "(not shown: no URL, and it may hold a password)"


def without_secrets(url: str) -> str:
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


def whole_number(text: str, low: int, high: int) -> int:
    """A plain whole number between two bounds."""
    if not re.fullmatch(r"0|[1-9][0-9]{0,11}", text) or not low <= int(text) <= high:
        raise RefusedError
    return int(text)


def decimal_number(text: str, low: float, high: float) -> float:
    """A plain number between two bounds."""
    if not re.fullmatch(r"(?:0|[1-9][0-9]{0,11})(?:\.[0-9]{1,6})?", text) or not low <= float(text) <= high:
        raise RefusedError
    return float(text)


def one_of(text: str, options: tuple[ChoiceT, ...]) -> ChoiceT:
    """One of some words."""
    for option in options:
        if text == option:
            return option
    raise RefusedError


def queue_name(text: str) -> str:
    """The name of one queue."""
    if re.search(r"[,;\s]", text):
        raise RefusedError("one worker serves one queue: start a worker process for each, each with one name")
    return check_queue_name(text)


def process_name(text: str) -> str:
    """The name of a process, or nothing."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{0,64}", text):
        raise RefusedError
    return text


def ca_file(text: str) -> str | None:
    """The path of a PEM file of certificates, which is looked into; None for an empty text."""
    if not text:
        return None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=text)
    except ssl.SSLError:
        raise RefusedError("the file holds no PEM certificate") from None
    except (OSError, ValueError):
        raise RefusedError("there is no such file, or it cannot be read") from None
    return text


def _port_in_range(port: str | None) -> bool:
    return port is None or (len(port) <= 5 and 1 <= int(port) <= 65535)


def _leads_somewhere(url: str) -> bool:
    """Whether it can be taken apart (in brackets stands an IPv6 address alone; those of a password are to be
    percent-encoded), and its host is a name that resolvers take."""
    try:
        str(urlsplit(url).hostname).encode("idna")
    except ValueError:
        return False
    return True


def base_url(text: str) -> str:
    """The exchange's address, its host in lower case, its port where it is not the scheme's own."""
    shape = _BASE_URL_SHAPE.fullmatch(text)
    if not shape or not _port_in_range(shape["port"]) or not _leads_somewhere(text):
        raise RefusedError
    own_port = {"http": 80, "https": 443}[shape["scheme"]]
    port = int(shape["port"] or own_port)
    url = f"{shape['scheme']}://{shape['host'].lower()}" + (f":{port}" if port != own_port else "")
    if shape["scheme"] == "http" and not is_loopback(url):
        raise RefusedError("plain http goes to loopback hosts only (localhost, 127.0.0.1, [::1]); use https")
    return url


def host_of(base_url: str) -> str:
    """The host that it names, an IPv6 address in its brackets."""
    parts = urlsplit(base_url)
    return parts.netloc.removesuffix(f":{parts.port}")


def is_loopback(base_url: str) -> bool:
    """Whether it leads to this machine."""
    host = host_of(base_url)
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_the_exchange(base_url: str) -> bool:
    """Whether its host is under one of the exchange's own domains."""
    return f".{host_of(base_url)}".endswith(tuple(f".{domain}" for domain in EXCHANGE_DOMAINS))


def host_name(text: str) -> str:
    """The name of a host, or nothing."""
    if text and not re.fullmatch(_HOST, text):
        raise RefusedError
    return text.lower()


def proxy_url(text: str) -> str | None:
    """The address of a proxy; None for an empty text."""
    if not text:
        return None
    shape = _PROXY_URL_SHAPE.fullmatch(text)
    if not shape or not _port_in_range(shape["port"]) or not _leads_somewhere(text):
        raise RefusedError
    return text


def redis_url(text: str) -> str:
    """The address of Redis."""
    try:
        address = Address.parse(text)
    except BadRedisUrl as error:
        raise RefusedError(str(error)) from None
    if address.others:
        raise RefusedError(f"after the question mark only {', '.join(sorted(OPTIONS))} may be set")
    return text


_ACCOUNT = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


def account_names(text: str) -> tuple[str, ...]:
    """Names of accounts, separated by commas; none for an empty text. A ``-`` in a name stands for ``_``."""
    names = [name.strip() for name in text.split(",")] if text else []
    if not all(map(_ACCOUNT.fullmatch, names)):
        raise RefusedError
    return tuple(dict.fromkeys(name.replace("-", "_") for name in names))
