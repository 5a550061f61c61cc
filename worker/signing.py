"""Signing of requests: pure functions over a key, with no clock, no network and no environment.

What is signed is the percent-encoded query string, byte for byte as it is sent (exchange.md section 2). Only the
standard library is imported; ``cryptography`` is loaded when the first private key is, since HMAC does without it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Literal, NoReturn
from urllib.parse import quote

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

__all__ = [
    "Credential",
    "CredentialError",
    "KeyKind",
    "check_api_key",
    "encode_params",
    "signed_query",
]

KeyKind = Literal["hmac", "rsa", "ed25519"]
Signer = Callable[[bytes], str]

#: Shortest RSA modulus accepted, bits: the exchange's own published example is of this size, below it keys are broken.
MIN_RSA_BITS = 1024

#: SHA-256's block, bytes: what HMAC pads its key to.
_BLOCK_BYTES = 64
_VISIBLE_ASCII = re.compile(r"[!-~]+")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]*")
_PEM = re.compile(r"\s*(-----BEGIN [^-]+-----)([^-]*)(-----END [^-]+-----)\s*")
#: An API key shorter than this is not abbreviated but hidden: its last characters would be most of it.
_ABBREVIATED_FROM = 16

_MAKE_A_KEY = (
    "make a key with `openssl genpkey -algorithm ed25519 -out key.pem` and register its public half "
    "(`openssl pkey -in key.pem -pubout`) at the exchange"
)
_ENCRYPTED = "the private key is encrypted; remove the passphrase with `openssl pkey -in key.pem -out plain.pem`"


class CredentialError(ValueError):
    """A key cannot be used for signing. The text says what to do and never holds any part of the key."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Credential:
    """One account's key at the exchange, ready to sign.

    ``account`` is the name that requests use, ``api_key`` goes into the header ``X-MBX-APIKEY`` and ``kind`` is
    ``hmac``, ``rsa`` or ``ed25519``. ``sign`` gives the signature of some bytes exactly as it goes on the wire after
    ``signature=``: HMAC 64 lower-case hex digits, RSA and Ed25519 base64, percent-encoded (exchange.md section 2).

    The secret can be used through ``sign`` only; it is in no field and in no repr, and a credential refuses to be
    pickled. Two credentials are equal only if they are the same object.

    Built by :meth:`from_secret` or :meth:`from_private_key`. Safe to share between threads.
    """

    account: str
    api_key: str
    kind: KeyKind
    sign: Signer

    @property
    def fingerprint(self) -> str:
        """What tells this API key from others, in Redis too, and gives no part of it away."""
        return sha256(b"algo-cancel-queue " + self.api_key.encode()).hexdigest()[:16]

    @classmethod
    def from_secret(cls, account: str, api_key: str, secret: str) -> Credential:
        """A credential that signs with HMAC-SHA256.

        Raises:
            CredentialError: the API key or the secret is empty, or holds white space or non-ASCII characters.
        """
        check_api_key(api_key)
        if "-----BEGIN" in secret:
            raise CredentialError("the API secret is a PEM key; give it as the private key instead")
        if not _VISIBLE_ASCII.fullmatch(secret):
            raise CredentialError(_paste_again("API secret", secret))
        return cls(account, api_key, "hmac", _hmac_signer(secret.encode("ascii")))

    @classmethod
    def from_private_key(cls, account: str, api_key: str, pem_text: str) -> Credential:
        """A credential that signs with the RSA (PKCS#1 v1.5, SHA-256) or Ed25519 key in ``pem_text``.

        Which of the two it is, is read from the key.

        Raises:
            CredentialError: not an unencrypted PEM private key, of another kind, or RSA below ``MIN_RSA_BITS``; or the
                extra ``signing`` is not installed.
        """
        check_api_key(api_key)
        kind, signer = _private_key_signer(_load_private_key(pem_text))
        return cls(account, api_key, kind, signer)

    def __repr__(self) -> str:
        tail = self.api_key[-4:] if len(self.api_key) >= _ABBREVIATED_FROM else ""
        return f"Credential(account={self.account!r}, kind={self.kind!r}, api_key='…{tail}')"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a credential cannot be pickled: its secret stays in the process that read it")


def encode_params(pairs: Iterable[tuple[str, str | int]]) -> str:
    """Names and values percent-encoded (RFC 3986, UTF-8) and joined with ``&`` in the order given.

    Only ``A-Za-z0-9-_.~`` stay as they are, so a space becomes ``%20``, never ``+``.

    Raises:
        TypeError: a value is neither text nor a whole number (``bool`` and ``None`` included).
        UnicodeEncodeError: a text holds a lone surrogate, which UTF-8 cannot express.
    """
    return "&".join([f"{_encode(name)}={_encode(value)}" for name, value in pairs])


def signed_query(
    pairs: Iterable[tuple[str, str | int]], credential: Credential, timestamp_ms: int, recv_window_ms: int
) -> str:
    """The whole query string: ``pairs``, then recvWindow, timestamp and, last as the exchange demands, signature.

    ``timestamp_ms`` is the exchange's clock in milliseconds; the request is valid for ``recv_window_ms`` from it.
    The result holds a signature and must not be logged.
    """
    query = encode_params([*pairs, ("recvWindow", recv_window_ms), ("timestamp", timestamp_ms)])
    return f"{query}&signature={credential.sign(query.encode('ascii'))}"


def _encode(value: str | int) -> str:
    if type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise TypeError(f"a parameter must be text or a whole number, not {type(value).__name__}")
    # Ids, symbols and digits need no encoding, and finding that out costs a fraction of what quote() does.
    return value if _UNRESERVED.fullmatch(value) else quote(value, safe="")


def check_api_key(api_key: str) -> str:
    """Return ``api_key`` if it can go into a header.

    Raises:
        CredentialError: it is empty, or holds white space (a line break would end the header) or non-ASCII characters.
    """
    if not _VISIBLE_ASCII.fullmatch(api_key):
        raise CredentialError(_paste_again("API key", api_key))
    return api_key


def _paste_again(what: str, text: str) -> str:
    if not text:
        return f"the {what} is empty; paste it from the exchange's API management page"
    return f"the {what} holds white space, control or non-ASCII characters; paste it again without them"


def _hmac_signer(secret: bytes) -> Signer:
    """HMAC-SHA-256 (RFC 2104) with the key's two halves hashed once.

    `hmac.digest` looks its hash up in OpenSSL anew at each call: 52 against 7 microseconds in a process that was idle.
    """
    key = (sha256(secret).digest() if len(secret) > _BLOCK_BYTES else secret).ljust(_BLOCK_BYTES, b"\0")
    inner = sha256(bytes(byte ^ 0x36 for byte in key))
    outer = sha256(bytes(byte ^ 0x5C for byte in key))

    def sign(payload: bytes) -> str:
        first, second = inner.copy(), outer.copy()
        first.update(payload)
        second.update(first.digest())
        return second.hexdigest()

    return sign


def _load_private_key(pem_text: str) -> PrivateKeyTypes:
    problem = _pem_problem(pem_text)
    if problem:
        raise CredentialError(problem)
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise CredentialError(
            "RSA and Ed25519 keys need the package cryptography: `pip install -e '.[signing]'` in the checkout"
        ) from error
    try:
        return load_pem_private_key(_in_lines(pem_text).encode(), password=None)
    except TypeError:
        problem = _ENCRYPTED
    except (UnsupportedAlgorithm, ValueError):  # which of the two depends on the library's version
        problem = (
            "the PEM private key is damaged, or of a kind that cannot be read; give the whole file from -----BEGIN to "
            f"-----END, or {_MAKE_A_KEY}"
        )
    # Raised here and not above: an exception raised while another is handled carries that one, and what it holds.
    raise CredentialError(problem)


def _in_lines(pem_text: str) -> str:
    """The PEM in lines as they should be: a variable often holds blanks instead, which not every version reads."""
    shape = _PEM.fullmatch(pem_text)
    if shape is None or ":" in shape[2]:
        return pem_text
    body = "".join(shape[2].split())
    return "\n".join([shape[1], *(body[at : at + 64] for at in range(0, len(body), 64)), shape[3], ""])


def _pem_problem(pem_text: str) -> str | None:
    """What is wrong with the text around the key, as far as it can be told without reading the key."""
    if "-----BEGIN" not in pem_text:
        return "the private key is not PEM text, which starts with -----BEGIN PRIVATE KEY-----"
    if "-----BEGIN OPENSSH PRIVATE KEY-----" in pem_text:
        return f"the private key is in OpenSSH's own format, which is not read; {_MAKE_A_KEY}"
    if "PRIVATE KEY-----" not in pem_text:
        return "this is not the private key but a public key or a certificate; give the private key that belongs to it"
    return None


def _private_key_signer(key: PrivateKeyTypes) -> tuple[KeyKind, Signer]:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.hazmat.primitives.hashes import SHA256

    if isinstance(key, Ed25519PrivateKey):
        return "ed25519", lambda payload: _base64_on_the_wire(key.sign(payload))
    if not isinstance(key, RSAPrivateKey):
        name = type(key).__name__.removesuffix("PrivateKey")
        raise CredentialError(f"the private key is of kind {name}, and only RSA and Ed25519 can be used; {_MAKE_A_KEY}")
    if key.key_size < MIN_RSA_BITS:
        raise CredentialError(
            f"the RSA key has {key.key_size} bits and needs at least {MIN_RSA_BITS} (2048 are advised); {_MAKE_A_KEY}"
        )
    padding, digest = PKCS1v15(), SHA256()
    return "rsa", lambda payload: _base64_on_the_wire(key.sign(payload, padding, digest))


def _base64_on_the_wire(signature: bytes) -> str:
    return quote(base64.b64encode(signature), safe="")
