"""The accounts of the exchange that the environment holds keys for, and what is wrong with their variables."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from producer.message import DEFAULT_ACCOUNT
from worker.setting_values import is_quoted
from worker.signing import Credential, CredentialError, check_api_key

__all__ = ["Accounts", "read_accounts"]

T = TypeVar("T")

#: A PEM key has at most a few kilobytes; a path to anything larger is a mistake.
_MAX_KEY_FILE_BYTES = 64 * 1024
_VARIABLE = re.compile(r"BINANCE_(?P<account>.+)_(?:API_KEY|API_SECRET|PRIVATE_KEY)", re.DOTALL)
_NAME = re.compile(r"[A-Z0-9][A-Z0-9_]{0,31}")


@dataclass(slots=True)
class Accounts:
    """What was found. In names of accounts ``_`` stands for ``-`` too."""

    credentials: Mapping[str, Credential] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()  # accounts with keys that BINANCE_ACCOUNTS does not name
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # what a worker can start with all the same


def read_accounts(given: Mapping[str, str], wanted: tuple[str, ...]) -> Accounts:
    """The accounts in ``given``; ``wanted`` are those of BINANCE_ACCOUNTS, none if all that are found are meant.

    What is not wanted is not looked at: it may belong to another program.
    """
    found = Accounts()
    prefixes = {DEFAULT_ACCOUNT: "BINANCE", **_further_accounts(given, found, wanted)}
    is_there = {name: any(given.get(f"{prefix}_{part}") for part in _PARTS) for name, prefix in prefixes.items()}
    found.left_out = tuple(sorted(name for name in prefixes if is_there[name] and wanted and name not in wanted))
    usable: dict[str, Credential] = {}
    for name in wanted or prefixes:
        prefix = prefixes.get(name)
        if prefix is None or (wanted and not is_there[name]):
            key = f"{prefix or f'BINANCE_{name.upper()}'}_API_KEY"
            found.problems.append(f"BINANCE_ACCOUNTS names {name}, but {key} is not set: set it, or take the name out")
        elif is_there[name] and (credential := _read_credential(given, found, prefix, name)):
            usable[name] = credential
    if not usable and not found.problems:
        found.problems.append(
            "BINANCE_API_KEY is not set, nor is BINANCE_<ACCOUNT>_API_KEY: a worker must have at least one account; "
            "set BINANCE_API_KEY with BINANCE_API_SECRET or BINANCE_PRIVATE_KEY"
        )
    found.credentials = MappingProxyType(usable)
    return found


_PARTS = ("API_KEY", "API_SECRET", "PRIVATE_KEY")


def _further_accounts(given: Mapping[str, str], found: Accounts, wanted: tuple[str, ...]) -> dict[str, str]:
    """Further accounts with their variables' prefix; a name that is none is a problem, unless others are wanted."""
    variables: dict[str, list[str]] = {}
    for name in sorted(given):
        shape = _VARIABLE.fullmatch(name)
        if shape and given[name]:
            variables.setdefault(shape["account"], []).append(name)
    prefixes = {}
    for part, names in variables.items():
        named = " and ".join(ascii(name)[1:-1] for name in names)
        if not _NAME.fullmatch(part):
            rule = "must name its account in 1 to 32 characters out of A-Z 0-9 and _, the first not _; rename it"
        elif part.lower() == DEFAULT_ACCOUNT:
            rule = "must be named without _DEFAULT, as BINANCE_API_KEY is; rename it"
        else:
            prefixes[part.lower()] = f"BINANCE_{part}"
            continue
        if not wanted:
            found.problems.append(f"{named} {rule}")
    return prefixes


def _read_credential(given: Mapping[str, str], found: Accounts, prefix: str, account: str) -> Credential | None:
    key_name, secret_name, pem_name = (f"{prefix}_{part}" for part in _PARTS)
    given_key, secret, pem = (given.get(name, "") for name in (key_name, secret_name, pem_name))
    before = len(found.problems)
    for name in (key_name, secret_name, pem_name):
        if is_quoted(given.get(name, "")):
            found.problems.append(
                f"{name} cannot be used: quotation marks stand around it, which an env file has kept; remove them"
            )
    if len(found.problems) > before:
        return None
    # The secret is looked at even beside a bad API key, so that both are reported; hence the stand-in.
    api_key = "-"
    if given_key:
        api_key = _usable(found, key_name, lambda: check_api_key(given_key)) or api_key
    else:
        other = secret_name if secret else pem_name
        found.problems.append(f"{key_name} is not set, but {other} is: set the API key that belongs to it, or unset it")
    if secret and pem:
        found.problems.append(
            f"{secret_name} and {pem_name} are both set: unset the one that does not belong to the key"
        )
    elif not (secret or pem):
        found.problems.append(
            f"{key_name} is set without a secret: set {secret_name} (HMAC) or {pem_name} (RSA, Ed25519)"
        )
    credential = None
    if secret:
        credential = _usable(found, secret_name, lambda: Credential.from_secret(account, api_key, secret))
    if pem:
        credential = _usable(
            found, pem_name, lambda: Credential.from_private_key(account, api_key, _pem_text(found, pem_name, pem))
        )
    return credential if len(found.problems) == before else None


def _usable(found: Accounts, variable: str, build: Callable[[], T]) -> T | None:
    """What ``build`` makes of the key in ``variable``, or None and a problem more."""
    try:
        return build()
    except CredentialError as error:
        found.problems.append(f"{variable} cannot be used: {error}")
        return None


def _pem_text(found: Accounts, variable: str, given: str) -> str:
    """PEM text from a variable's value, which is that text or the path of the file that holds it."""
    if "-----BEGIN" in given:
        # Where a variable holds one line only, people and tools write line breaks as backslash and letter.
        return given.replace("\\r", "").replace("\\n", "\n")
    try:
        path = Path(given)
        if path.is_file() and path.stat().st_size <= _MAX_KEY_FILE_BYTES:
            mode = path.stat().st_mode
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                said = f"{variable} names a file that others may use (mode {mode & 0o777:04o}): chmod 600 is enough"
                found.warnings.append(said)
            return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        # The error names the path, which is the key itself if someone pasted it without its first line.
        pass
    raise CredentialError("it is neither PEM text (-----BEGIN PRIVATE KEY-----) nor the path of a key file to be read")
