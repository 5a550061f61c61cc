"""What a signed request says: whose it is, whether its signature and its time are right, and the order that it names.

Rules and texts: exchange.md 1.2, 2 and 3.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple
from urllib.parse import unquote

from worker.sandbox.control import ConfigError
from worker.sandbox.faults import BAD_SIGNATURE, CLOCK_AHEAD, CLOCK_OUTSIDE, KEY_FORMAT, KEY_REFUSED, Answer
from worker.sandbox.market import SYMBOLS
from worker.sandbox.wire import Request

DEFAULT_RECV_WINDOW_MS = 5_000
MAX_RECV_WINDOW_MS = 60_000
MAX_ALGO_ID = 2**63 - 1

#: What a query may consist of once names and values are percent-encoded as RFC 3986 says.
_ENCODED = re.compile(rb"(?:(?:[\w.~-]++|%[0-9A-Fa-f]{2})++=(?:[\w.~-]++|%[0-9A-Fa-f]{2})*+(?:&|$))++")
_CLIENT_ALGO_ID = re.compile(r"[.A-Z:/a-z0-9_-]{1,36}")


class Refusal(Exception):
    """The exchange refuses a request before it looks at any order."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer

    @classmethod
    def of(cls, code: int, msg: str) -> Refusal:
        """A refusal with status 400."""
        return cls(Answer.error(code, msg))


class Account(NamedTuple):
    """Whose an API key is, and whether that key's secret, or private key, made the signature of exactly these bytes."""

    name: str
    signed: Callable[[bytes, str], bool]

    @classmethod
    def of(cls, name: str, secret_or_public_key: str) -> Account:
        """An account. Raises ConfigError for a public key that cannot be read or is of an unknown kind."""
        check = _public_key_check if secret_or_public_key.startswith("-----BEGIN ") else _hmac_check
        return cls(name, check(name, secret_or_public_key.encode()))


def _hmac_check(_name: str, secret: bytes) -> Callable[[bytes, str], bool]:
    def check(payload: bytes, signature: str) -> bool:
        wanted = hmac.digest(secret, payload, "sha256").hex()
        return hmac.compare_digest(wanted.encode(), signature.lower().encode())

    return check


def _public_key_check(name: str, pem: bytes) -> Callable[[bytes, str], bool]:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(pem)
    except ValueError:
        raise ConfigError(f"accounts: the key of {name} is no public key") from None
    if not isinstance(key, rsa.RSAPublicKey | ed25519.Ed25519PublicKey):
        raise ConfigError(f"accounts: the key of {name} is neither RSA nor Ed25519")

    def check(payload: bytes, signature: str) -> bool:
        try:
            raw = base64.b64decode(signature, validate=True)
            if isinstance(key, rsa.RSAPublicKey):
                key.verify(raw, payload, padding.PKCS1v15(), SHA256())
            else:
                key.verify(raw, payload)
        except (InvalidSignature, binascii.Error):
            return False
        return True

    return check


def keyed(request: Request, accounts: Mapping[str, Account]) -> Account:
    """Whose request it is, by API key alone.

    Raises:
        Refusal: there is none, or an unknown one.
    """
    api_key = request.headers.get(b"x-mbx-apikey", b"").decode("latin-1")
    if not api_key:
        raise Refusal(KEY_FORMAT)
    account = accounts.get(api_key)
    if account is None:
        raise Refusal(KEY_REFUSED)
    return account


def authenticated(request: Request, accounts: Mapping[str, Account], server_ms: int) -> tuple[Account, dict[str, str]]:
    """Whose request it is, by API key, and what it says, once its key, signature and time are right.

    Raises:
        Refusal: they are not.
    """
    account = keyed(request, accounts)
    payload, signature = _split_signature(request)
    if not payload or not signature:
        raise Refusal.of(-1102, "Mandatory parameter 'signature' was not sent, was empty/null, or malformed.")
    parts = [part for part in (request.query, request.body) if part]
    well_formed = b"&" not in signature and all(map(_ENCODED.fullmatch, parts))
    if not well_formed or not account.signed(payload, unquote(signature, errors="replace")):
        raise Refusal(BAD_SIGNATURE)
    parameters = read_parameters(request)
    check_time(parameters, server_ms)
    return account, parameters


def _split_signature(request: Request) -> tuple[bytes, bytes]:
    """The signed bytes, which are the query and then the body, and the signature that ends the query or the body."""
    query, body = request.query, request.body
    if body and b"&signature=" in query:
        query, _, signature = query.rpartition(b"&signature=")
        return query + body, signature
    payload, _, signature = (query + body).rpartition(b"&signature=")
    return payload, signature


def read_parameters(request: Request) -> dict[str, str]:
    """Parameters of body and query; where both have one, the query's holds.

    Raises:
        Refusal: a name twice, or what is no ASCII text.
    """
    parameters: dict[str, str] = {}
    for part in (request.body, request.query):
        pairs = [pair.partition(b"=") for pair in part.split(b"&") if pair]
        try:
            decoded = {_text(name): _text(value) for name, _, value in pairs}
        except UnicodeDecodeError:
            raise Refusal.of(-1100, "Illegal characters found in a parameter.") from None
        if len(decoded) != len(pairs):
            raise Refusal.of(-1101, "Duplicate values for a parameter detected.")
        parameters |= decoded
    return parameters


def _text(raw: bytes) -> str:
    return unquote(raw, errors="strict") if b"%" in raw else raw.decode("ascii")


def mandatory(parameters: dict[str, str], name: str) -> str:
    """The parameter's value. Raises Refusal where it was not sent or is empty."""
    value = parameters.get(name, "")
    if not value:
        raise Refusal.of(-1102, f"Mandatory parameter '{name}' was not sent, was empty/null, or malformed.")
    return value


def known_symbol(parameters: dict[str, str]) -> str:
    """The symbol that a call must name. Raises Refusal where it does not, or where the exchange does not list it."""
    if (name := mandatory(parameters, "symbol")) not in SYMBOLS:
        raise Refusal.of(-1121, "Invalid symbol.")
    return name


def integer(name: str, value: str) -> int:
    """A parameter's value as a number. Raises Refusal where it is none."""
    if not (value.isascii() and value.isdigit() and len(value) <= 20):
        raise Refusal.of(-1100, f"Illegal characters found in parameter '{name}'; legal range is '^[0-9]{{1,20}}$'.")
    return int(value)


def check_time(parameters: dict[str, str], server_ms: int) -> None:
    """Refuse a timestamp that is ahead of the exchange's clock or outside its window (exchange.md 2).

    Raises:
        Refusal: -1021 with one of its two texts, or -1102, -1100 or -1130 for parameters that are missing or wrong.
    """
    timestamp = integer("timestamp", mandatory(parameters, "timestamp"))
    window_ms = integer("recvWindow", parameters.get("recvWindow", str(DEFAULT_RECV_WINDOW_MS)))
    if not 1 <= window_ms <= MAX_RECV_WINDOW_MS:
        raise Refusal.of(-1130, "Invalid data sent for parameter 'recvWindow'.")
    if timestamp >= server_ms + 1_000:
        raise Refusal(CLOCK_AHEAD)
    if server_ms - timestamp > window_ms:
        raise Refusal(CLOCK_OUTSIDE)


def read_client_algo_id(value: str) -> str:
    """The client's id for an order. Raises Refusal where it may not be one."""
    if len(value) > 36:
        raise Refusal.of(-4015, "Client order id length should be less than 36 chars.")
    if not _CLIENT_ALGO_ID.fullmatch(value):
        raise Refusal.of(-1100, "Illegal characters found in parameter 'clientAlgoId'.")
    return value


def read_order_ids(parameters: dict[str, str]) -> tuple[int | None, str | None]:
    """The ids that name an order. Which one wins when both are sent is not documented: here it is algoId."""
    algo_id = client_algo_id = None
    if "algoId" in parameters:
        algo_id = integer("algoId", parameters["algoId"])
        if not 1 <= algo_id <= MAX_ALGO_ID:
            raise Refusal.of(-1100, "Illegal characters found in parameter 'algoId'.")
    if "clientAlgoId" in parameters:
        client_algo_id = read_client_algo_id(parameters["clientAlgoId"])
    if algo_id is None and client_algo_id is None:
        raise Refusal.of(-1102, "Param 'algoId' or 'clientAlgoId' must be sent, but both were empty/null!")
    return algo_id, client_algo_id


def read_child(parameters: dict[str, str]) -> tuple[str, int | str]:
    """Symbol and id, or client order id, of a normal order. Which id wins when both are sent: here it is orderId.

    Raises:
        Refusal: as the exchange words it.
    """
    symbol = known_symbol(parameters)
    if "orderId" in parameters:
        return symbol, integer("orderId", parameters["orderId"])
    if not parameters.get("origClientOrderId"):
        raise Refusal.of(-1102, "Param 'origClientOrderId' or 'orderId' must be sent, but both were empty/null!")
    return symbol, parameters["origClientOrderId"]
