"""Environments of workers, and what the settings make of them."""

from __future__ import annotations

from collections.abc import Mapping

import certifi
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from worker.settings import Settings, SettingsError

ACCOUNT = {"BINANCE_API_KEY": "k" * 64, "BINANCE_API_SECRET": "s" * 64}
#: Stands for a secret in the tests that look for leaks.
CANARY = "canary7SecretThatMustNeverBeSeen"
CA_FILE = certifi.where()


def settings(**environ: str) -> Settings:
    return Settings.from_env({**ACCOUNT, **environ})


def problems(environ: Mapping[str, str]) -> tuple[str, ...]:
    """What is wrong with ``environ``; fails if nothing is."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(environ)
    return caught.value.problems


def the_problem(**environ: str) -> str:
    """The one thing that is wrong with these variables beside a good account."""
    (problem,) = problems({**ACCOUNT, **environ})
    return problem


def pem(key: PrivateKeyTypes) -> str:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()
