"""Signing: published and recomputed vectors, key handling, and that no secret gets out."""

from __future__ import annotations

import base64
import copy
import dataclasses
import pickle
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import parse_qsl, unquote

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from worker.signing import Credential, CredentialError, encode_params, signed_query

# The pairs that the exchange publishes as examples; they open no account (exchange.md section 2.1).
FAPI_KEY = "dbefbc809e3e83c283a984c3a1459732ea7db1360ca80c5c2c8867408d28cc83"
FAPI_SECRET = "2b5eb11e18796d12d88f13dc27dbbd02c2cc51ff7059765ed9821957d82bb4d9"
SPOT_KEY = "vmPUZE6mv9SD5VNHk4HlWFsOr6aKE2zvsw0MuIgwCIPy6utIco14y7Ju91duEh8A"
SPOT_SECRET = "NhqPtmdSJYdKjVHjA7PZj4Mge3R5YNiP1e3UZjInClVN65XAbvqqM6A7H5fATj0j"

F3_PAYLOAD = (
    "symbol=BTCUSDT&side=BUY&type=LIMIT&timeInForce=GTCquantity=1&price=9000&recvWindow=5000&timestamp=1591702613943"
)
LTC_TAIL = "&side=BUY&type=LIMIT&timeInForce=GTC&quantity=1&price=0.1&recvWindow=5000&timestamp=1499827319559"
ED25519_SEED = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
#: Stands for a secret in the tests that look for leaks.
CANARY = "canary7SecretThatMustNeverBeSeen"

FAPI = Credential.from_secret("default", FAPI_KEY, FAPI_SECRET)
SPOT = Credential.from_secret("default", SPOT_KEY, SPOT_SECRET)
UNRESERVED = r"A-Za-z0-9._~\-"


def pem(
    key: PrivateKeyTypes,
    form: PrivateFormat = PrivateFormat.PKCS8,
    encryption: serialization.KeySerializationEncryption = NoEncryption(),  # noqa: B008 - it holds nothing
) -> str:
    return key.private_bytes(serialization.Encoding.PEM, form, encryption).decode()


def key_body(pem_text: str) -> list[str]:
    """The lines of a PEM that are the key itself."""
    return [line for line in pem_text.splitlines() if len(line) > 20 and "-----" not in line]


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.mark.parametrize(
    ("credential", "payload", "signature"),
    [
        pytest.param(
            FAPI,
            "symbol=BTCUSDT&side=BUY&type=LIMIT&quantity=1&price=9000&timeInForce=GTC&recvWindow=5000&timestamp=1591702613943",
            "3c661234138461fcc7a7d8746c6558c9842d4e10870d2ecbedf7777cad694af9",
            id="fapi F1 and F2",
        ),
        pytest.param(
            FAPI, F3_PAYLOAD, "30baaf0fab549bbeda7f5ef201898b34122da25fd23c646cac2c529aebe670a4", id="fapi F3, true"
        ),
        pytest.param(
            SPOT,
            f"symbol=LTCBTC{LTC_TAIL}",
            "c8db56825ae71d6d79447849e617115f4a920fa2acdcab2b053c4b2838bd6b71",
            id="spot",
        ),
        pytest.param(
            SPOT,
            f"symbol=%EF%BC%91%EF%BC%92%EF%BC%93%EF%BC%94%EF%BC%95%EF%BC%96{LTC_TAIL}",
            "e1353ec6b14d888f1164ae9af8228a3dbd508bc82eb867db8ab6046442f33ef3",
            id="spot, non-ASCII",
        ),
        pytest.param(
            SPOT,
            "timestamp=1578963600000",
            "d84e6641b1e328e7b418fff030caed655c266299c9355e36ce801ed14631eed4",
            id="spot, timestamp only",
        ),
    ],
)
def test_published_hmac_vectors(credential: Credential, payload: str, signature: str) -> None:
    """The exchange's published payloads get the exchange's published signatures (F3: the recomputed one)."""
    assert credential.sign(payload.encode()) == signature


def test_signed_query_encodes_like_the_published_vector() -> None:
    """Non-ASCII text is sent as the percent-encoded bytes of its UTF-8 form, and signed so."""
    fullwidth_digits = "".join(chr(0xFF11 + n) for n in range(6))
    names = ("symbol", "side", "type", "timeInForce", "quantity", "price")
    values = (fullwidth_digits, "BUY", "LIMIT", "GTC", 1, "0.1")
    query = signed_query(zip(names, values, strict=True), SPOT, 1499827319559, 5000)
    assert query.endswith("&signature=e1353ec6b14d888f1164ae9af8228a3dbd508bc82eb867db8ab6046442f33ef3")


@pytest.mark.parametrize(
    ("payload", "signature"),
    [
        (b"", "5VZDAMNgrHKQhuLMgG6CioSHfx645dl02HPgZSJJAVVfuIIVkKM7rMYeOXAc+bRr0lv18FlbviRlUUFDjnoQCw=="),
        (
            b"algoId=2146760&recvWindow=5000&timestamp=1591702613943",
            "KvABC9DEzhzI6hFK8UVCIanj7GfqilBoMcSGOLU+If+jzblbRhwPxMO+Zyhoy8jbDM4itl9+ypyj5/AwC/PqAA==",
        ),
    ],
)
def test_ed25519_vectors(payload: bytes, signature: str) -> None:
    """An Ed25519 key signs the payload itself (RFC 8032), and the base64 of that is percent-encoded for the wire."""
    key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes.fromhex(ED25519_SEED))
    credential = Credential.from_private_key("default", FAPI_KEY, pem(key))
    on_the_wire = credential.sign(payload)
    assert credential.kind == "ed25519"
    assert on_the_wire == signature.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_rsa_signature_verifies_with_the_public_key(rsa_key: rsa.RSAPrivateKey, form: PrivateFormat) -> None:
    """An RSA key, in either PEM form, signs by PKCS#1 v1.5 with SHA-256, as its public half confirms."""
    credential = Credential.from_private_key("default", FAPI_KEY, pem(rsa_key, form))
    query = signed_query([("algoId", 2146760)], credential, 1591702613943, 5000)
    payload, _, on_the_wire = query.rpartition("&signature=")
    assert credential.kind == "rsa"
    assert re.fullmatch(rf"[{UNRESERVED}%]+", on_the_wire)
    signature = base64.b64decode(unquote(on_the_wire), validate=True)
    rsa_key.public_key().verify(signature, payload.encode(), padding.PKCS1v15(), hashes.SHA256())


@given(st.lists(st.tuples(st.text(), st.text() | st.integers()), max_size=6))
def test_encoded_parameters_read_back_as_given(pairs: list[tuple[str, str | int]]) -> None:
    """Any names and values survive encoding, in their order, and only unreserved characters and % & = are left."""
    encoded = encode_params(pairs)
    assert parse_qsl(encoded, keep_blank_values=True) == [(name, str(value)) for name, value in pairs]
    assert re.fullmatch(rf"[{UNRESERVED}%&=]*", encoded)


def ed25519_pem(form: PrivateFormat = PrivateFormat.PKCS8, **more: Any) -> str:
    return pem(ed25519.Ed25519PrivateKey.generate(), form, **more)


def public_pem() -> str:
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def damaged_pem() -> str:
    lines = pem(rsa.generate_private_key(65537, 1024)).splitlines()
    return "\n".join([*lines[:3], *lines[5:]])


def unknown_kind_pem() -> str:
    """A well-formed PKCS#8 key whose algorithm, 1.2.3.4, exists nowhere."""
    der = bytes.fromhex("300e020100300506032a030404020400")
    return f"-----BEGIN PRIVATE KEY-----\n{base64.b64encode(der).decode()}\n-----END PRIVATE KEY-----\n"


def small_rsa_pem() -> str:
    """A key of 512 bits, from primes because the library makes none so small."""
    p = 0xFF45863C108EE1EBB1A5E4B15ECAB49DED82BD1604B46F69CD71FFD67F7AF72D
    q = 0xDD8E84E9CDC5463CB2353D2E81BDF49D794042F5D15B223BCAB90BF0448966FB
    d = pow(65537, -1, (p - 1) * (q - 1))
    exponents = (rsa.rsa_crt_dmp1(d, p), rsa.rsa_crt_dmq1(d, q), rsa.rsa_crt_iqmp(p, q))
    return pem(rsa.RSAPrivateNumbers(p, q, d, *exponents, rsa.RSAPublicNumbers(65537, p * q)).private_key())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ed25519_pem(encryption=BestAvailableEncryption(b"x")), "openssl pkey -in"),
        (lambda: ed25519_pem(PrivateFormat.OpenSSH), "OpenSSH's own format"),
        (public_pem, "not the private key"),
        (damaged_pem, "from -----BEGIN to -----END"),
        (small_rsa_pem, "512 bits and needs at least 1024"),
        (lambda: pem(ec.generate_private_key(ec.SECP256R1())), "kind EC"),
        (lambda: pem(ed448.Ed448PrivateKey.generate()), "kind Ed448"),
        (unknown_kind_pem, "of a kind that cannot be read"),
        (lambda: f"{CANARY} is no key {CANARY}", "not PEM text"),
        (lambda: f"-----BEGIN PRIVATE KEY-----\n{CANARY}\n-----END PRIVATE KEY-----\n", "damaged"),
        (
            lambda: "-----BEGIN PRIVATE KEY-----\n\udc80 not UTF-8 AAAAAAAAAAAAAAAA\n-----END PRIVATE KEY-----",
            "damaged",
        ),
        (lambda: "", "not PEM text"),
    ],
)
def test_unusable_private_keys_are_refused_with_the_way_out(make: Callable[[], str], says: str) -> None:
    """A key that cannot be used is refused with what to do, and no line of it is in text or traceback."""
    text = make()
    with pytest.raises(CredentialError, match=re.escape(says)) as caught:
        Credential.from_private_key("default", FAPI_KEY, text)
    report = "".join(traceback.format_exception(caught.value))
    assert not any(line in report for line in [*key_body(text), CANARY])
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("api_key", "secret", "says"),
    [
        ("", FAPI_SECRET, "API key is empty"),
        (FAPI_KEY, "", "API secret is empty"),
        (f"{CANARY}\r\nHost: x", FAPI_SECRET, "API key holds white space"),
        (FAPI_KEY, f"{CANARY}\n", "API secret holds white space"),
        (FAPI_KEY, f" {CANARY}", "API secret holds white space"),
        (FAPI_KEY, f"{CANARY}é", "non-ASCII"),
        (FAPI_KEY, f"-----BEGIN PRIVATE KEY-----\n{CANARY}", "give it as the private key"),
    ],
)
def test_unusable_secrets_are_refused_without_being_shown(api_key: str, secret: str, says: str) -> None:
    """An API key or secret that is empty or was pasted with something around it is refused, and is not repeated."""
    with pytest.raises(CredentialError, match=says) as caught:
        Credential.from_secret("default", api_key, secret)
    assert CANARY not in "".join(traceback.format_exception(caught.value))


def credentials_with_canaries() -> list[tuple[Credential, list[str]]]:
    """A credential of each kind, and the texts that must never be seen of it."""
    pems = [pem(rsa.generate_private_key(65537, 1024)), ed25519_pem()]
    return [
        (Credential.from_secret("desk", FAPI_KEY, CANARY), [CANARY]),
        *[(Credential.from_private_key("desk", FAPI_KEY, text), key_body(text)) for text in pems],
    ]


@pytest.mark.parametrize(("credential", "secrets"), credentials_with_canaries())
def test_a_credential_shows_account_kind_and_the_end_of_its_api_key(credential: Credential, secrets: list[str]) -> None:
    """repr, str and asdict of a credential hold no secret, and repr and str only four characters of the API key."""
    for text in (repr(credential), str(credential), f"{credential}", repr([credential])):
        assert "desk" in text
        assert credential.kind in text
        assert FAPI_KEY[-4:] in text
        assert FAPI_KEY[-5:] not in text
        assert not any(secret in text for secret in secrets)
    fields = dataclasses.asdict(credential)
    assert not any(secret in repr(fields) for secret in secrets)


@pytest.mark.parametrize(("credential", "secrets"), credentials_with_canaries())
def test_a_credential_cannot_be_taken_apart(credential: Credential, secrets: list[str]) -> None:
    """A credential has no instance dictionary, and refuses pickling, copies and change."""
    with pytest.raises(TypeError):
        vars(credential)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(credential, protocol)
    with pytest.raises(dataclasses.FrozenInstanceError):
        credential.api_key = "other"  # type: ignore[misc]
    with pytest.raises(TypeError, match="cannot be pickled"):
        copy.deepcopy({"a": credential})


@pytest.mark.parametrize(("credential", "secrets"), credentials_with_canaries())
def test_a_failing_signature_shows_no_secret(credential: Credential, secrets: list[str]) -> None:
    """Not even a traceback with all local variables, as error reporters send it, holds the secret."""
    with pytest.raises(TypeError) as caught:
        credential.sign(cast(bytes, "text instead of bytes"))
    stack = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    frames = "".join(entry for entry in stack.format() if "test_signing.py" not in entry)
    assert "signing.py" in frames
    assert not any(secret in frames for secret in secrets)


WITHOUT_CRYPTOGRAPHY = """
import sys
sys.modules["cryptography"] = None
from worker.signing import Credential, CredentialError
assert len(Credential.from_secret("default", "key", "secret").sign(b"x")) == 64
try:
    Credential.from_private_key("default", "key", sys.stdin.read())
except CredentialError as error:
    print(error)
"""


def test_hmac_works_and_private_keys_name_the_extra_without_cryptography() -> None:
    """Without the package cryptography HMAC signs, and a private key is answered with the extra to install."""
    key = ed25519_pem()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_CRYPTOGRAPHY], input=key, capture_output=True, text=True, timeout=60, check=True
    )
    assert "`pip install -e '.[signing]'` in the checkout" in done.stdout
    assert not any(line in done.stdout + done.stderr for line in key_body(key))
