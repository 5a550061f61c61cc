"""Settings of accounts: which keys are found, what is wrong with them, and that no secret is ever said."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import traceback
from collections.abc import Mapping
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from tests.environments import ACCOUNT, CANARY, pem, problems, settings
from worker.settings import Settings, SettingsError


@pytest.fixture(scope="module")
def ed25519_pem() -> str:
    return pem(ed25519.Ed25519PrivateKey.generate())


# --- Accounts ----------------------------------------------------------------------------------------------------


def test_accounts_of_all_kinds_side_by_side(ed25519_pem: str, tmp_path: Path) -> None:
    """Each account has its own key, of its own kind, given as secret, PEM text, text with \\n, or path of a file."""
    rsa_pem = pem(rsa.generate_private_key(65537, 1024))
    key_file = tmp_path / "key.pem"
    key_file.write_text(rsa_pem)
    got = Settings.from_env(
        {
            "BINANCE_API_KEY": "key0",
            "BINANCE_API_SECRET": "secret0",
            "BINANCE_A_API_KEY": "key1",
            "BINANCE_A_PRIVATE_KEY": ed25519_pem,
            "BINANCE_DESK_A_API_KEY": "key2",
            "BINANCE_DESK_A_PRIVATE_KEY": ed25519_pem.replace("\n", "\\n"),
            "BINANCE_2_API_KEY": "key3",
            "BINANCE_2_PRIVATE_KEY": str(key_file),
            "BINANCE_CRLF_API_KEY": "key4",
            "BINANCE_CRLF_PRIVATE_KEY": rsa_pem.replace("\n", "\\r\\n"),
            "BINANCE_ONE_LINE_API_KEY": "key5",
            "BINANCE_ONE_LINE_PRIVATE_KEY": rsa_pem.replace("\n", " "),
        }
    )
    seen = {name: (c.account, c.api_key, c.kind) for name, c in got.credentials.items()}
    assert seen == {
        "default": ("default", "key0", "hmac"),
        "a": ("a", "key1", "ed25519"),
        "desk_a": ("desk_a", "key2", "ed25519"),
        "2": ("2", "key3", "rsa"),
        "crlf": ("crlf", "key4", "rsa"),
        "one_line": ("one_line", "key5", "rsa"),
    }
    assert got.credentials["a"].sign(b"x") == got.credentials["desk_a"].sign(b"x")
    assert (
        got.credentials["2"].sign(b"x") == got.credentials["crlf"].sign(b"x") == got.credentials["one_line"].sign(b"x")
    )


def test_an_account_is_found_by_its_name_in_requests() -> None:
    """A request's account finds its credential, hyphen and underscore being one; any other account finds none."""
    got = Settings.from_env({"BINANCE_DESK_A_API_KEY": "key", "BINANCE_DESK_A_API_SECRET": "secret"})
    assert got.credential_for("desk_a") is got.credential_for("desk-a") is got.credentials["desk_a"]
    for stranger in ("default", "desk", "desk_a_", "DESK_A", "", "a"):
        assert got.credential_for(stranger) is None


def test_credentials_cannot_be_changed_through_the_settings() -> None:
    """The mapping of accounts is read-only."""
    with pytest.raises(TypeError):
        settings().credentials["other"] = settings().credentials["default"]  # type: ignore[index]


@pytest.mark.parametrize("prefix", ["BINANCE", "BINANCE_DESK"])
@pytest.mark.parametrize(
    ("given", "starts", "says"),
    [
        ("K", "{}_API_KEY is set without a secret", "{}_PRIVATE_KEY"),
        ("S", "{}_API_KEY is not set", "{}_API_SECRET is"),
        ("P", "{}_API_KEY is not set", "{}_PRIVATE_KEY is"),
        ("KSP", "{}_API_SECRET and {}_PRIVATE_KEY are both set", "unset"),
        ("KS", None, None),
        ("KP", None, None),
    ],
)
def test_account_matrix(prefix: str, given: str, starts: str | None, says: str | None, ed25519_pem: str) -> None:
    """An account is an API key with either a secret or a private key; everything else is a problem that says so."""
    values = {"K": ("_API_KEY", "key"), "S": ("_API_SECRET", "secret"), "P": ("_PRIVATE_KEY", ed25519_pem)}
    environ = {prefix + name: value for name, value in (values[letter] for letter in given)}
    if starts is None or says is None:
        assert len(Settings.from_env(environ).credentials) == 1
        return
    (problem,) = problems(environ)
    assert problem.startswith(starts.replace("{}", prefix))
    assert says.replace("{}", prefix) in problem


@pytest.mark.parametrize(
    ("environ", "starts"),
    [
        ({}, ["BINANCE_API_KEY is not set, nor is BINANCE_<ACCOUNT>_API_KEY"]),
        (
            {"BINANCE_API_KEY": "k k", "BINANCE_API_SECRET": "s s"},
            ["BINANCE_API_KEY cannot", "BINANCE_API_SECRET cannot"],
        ),
        (
            {"BINANCE_API_SECRET": "s", "BINANCE_PRIVATE_KEY": "p"},
            [
                "BINANCE_API_KEY is not set, but",
                "BINANCE_API_SECRET and BINANCE_PRIVATE_KEY are both",
                "BINANCE_PRIVATE",
            ],
        ),
        ({"BINANCE_ACCOUNTS": "default"}, ["BINANCE_ACCOUNTS names default, but BINANCE_API_KEY is not set"]),
        ({"BINANCE_ACCOUNTS": "desk", "BINANCE_DESK_API_KEY": "k"}, ["BINANCE_DESK_API_KEY is set without a secret"]),
        (
            ACCOUNT | {"BINANCE_ACCOUNTS": "default,desk-a"},
            ["BINANCE_ACCOUNTS names desk_a, but BINANCE_DESK_A_API_KEY is not set: set it, or take the name out"],
        ),
        (
            ACCOUNT | {"BINANCE_DEFAULT_API_KEY": "key", "BINANCE_DEFAULT_API_SECRET": "secret"},
            ["BINANCE_DEFAULT_API_KEY and BINANCE_DEFAULT_API_SECRET must be named without _DEFAULT"],
        ),
        # A variable whose account no request could name is not silently another worker's business.
        *(
            (ACCOUNT | {name: "value"}, [name])
            for name in ("BINANCE_desk_API_KEY", "BINANCE__API_KEY_API_KEY", "BINANCE_DESK-A_API_KEY")
        ),
        (ACCOUNT | {f"BINANCE_{'A' * 33}_API_SECRET": "value"}, ["BINANCE_AAA"]),
        # What can name no account.
        *(
            (ACCOUNT | {"BINANCE_ACCOUNTS": text}, ["BINANCE_ACCOUNTS is "])
            for text in ("Desk", "a,,b", "a b", ",", "-a", "a" * 33)
        ),
    ],
)
def test_each_thing_that_is_wrong_with_accounts_is_named(environ: dict[str, str], starts: list[str]) -> None:
    """Everything that is wrong is a problem of its own, which names the variable that is missing or mistyped."""
    found = problems(environ)
    assert [problem[: len(start)] for problem, start in zip(found, starts, strict=True)] == starts


#: Another program's variables: a key without a secret, a name that is none, and a whole account.
STRANGERS = {"BINANCE_TESTNET_API_KEY": "t", "BINANCE__API_KEY": "x", "BINANCE_OTHER_API_KEY": "o"}
STRANGERS |= {"BINANCE_OTHER_API_SECRET": "os"}


@pytest.mark.parametrize("wanted", ["default", " default ,default", "default,desk-a", "desk_a"])
def test_only_the_accounts_that_are_named_are_read(wanted: str) -> None:
    """Keys of another program are neither adopted nor found fault with; which accounts were left out is known."""
    desk = {"BINANCE_DESK_A_API_KEY": "d", "BINANCE_DESK_A_API_SECRET": "ds"}
    got = settings(BINANCE_ACCOUNTS=wanted, **desk, **STRANGERS)
    named = {name.strip().replace("-", "_") for name in wanted.split(",")}
    assert got.credentials.keys() == named
    assert got.accounts_left_out == tuple(sorted({"default", "desk_a", "other", "testnet"} - named))
    assert (got.credential_for("other"), got.warnings) == (None, ())


@pytest.mark.parametrize("mark", ['"', "'"])
def test_quotation_marks_of_an_env_file_are_named(mark: str, ed25519_pem: str) -> None:
    """Marks that a reader of env files has left around a value are what is wrong, and no part of it is shown."""
    given = {"BINANCE_API_KEY": "k" * 64, "BINANCE_API_SECRET": CANARY, "CANCEL_QUEUE": "q", "REDIS_URL": "redis://h"}
    found = problems({name: f"{mark}{value}{mark}" for name, value in given.items()})
    assert sorted(problem.split()[0] for problem in found) == sorted(given)
    assert all("quotation marks stand around it, which an env file has kept" in problem for problem in found)
    assert CANARY not in repr(found)
    one = problems({"BINANCE_API_KEY": "k", "BINANCE_PRIVATE_KEY": f"{mark}{ed25519_pem}{mark}"})
    assert "BINANCE_PRIVATE_KEY cannot be used: quotation marks stand around it" in one[0]


@pytest.mark.parametrize(("mode", "is_warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_a_key_file_that_others_can_read_is_warned_of(
    mode: int, is_warned: bool, ed25519_pem: str, tmp_path: Path
) -> None:
    """It can be used all the same; the warning names variable, mode and way out, and not the file."""
    path = tmp_path / "key.pem"
    path.write_text(ed25519_pem)
    path.chmod(mode)
    got = Settings.from_env({"BINANCE_API_KEY": "k", "BINANCE_PRIVATE_KEY": str(path)})
    assert got.credentials.keys() == {"default"}
    says = f"BINANCE_PRIVATE_KEY names a file that others may use (mode {mode:04o}): chmod 600 is enough"
    assert got.warnings == ((says,) if is_warned else ())


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://localhost"])
def test_plain_http_goes_through_no_proxy(url: str) -> None:
    """A proxy would be given key and signature in clear: the pair is refused, and the login is not shown."""
    (problem,) = problems({**ACCOUNT, "BINANCE_BASE_URL": url, "EGRESS_PROXY_URL": f"http://u:{CANARY}@proxy:3128"})
    assert problem.startswith("EGRESS_PROXY_URL is 'http://***@proxy:3128': it must not be set while BINANCE_BASE_URL")
    assert settings(BINANCE_BASE_URL=url.replace("http:", "https:"), EGRESS_PROXY_URL="http://proxy:3128")


def test_other_variables_are_no_accounts() -> None:
    """Settings that start with BINANCE_, empty account variables and strangers' variables make no account."""
    got = settings(
        BINANCE_BASE_URL="https://demo-fapi.binance.com",
        BINANCE_RECV_WINDOW_MS="4000",
        BINANCE_ALLOWED_HOST="gateway.example",
        BINANCE_OLD_API_KEY="",
        BINANCE_OLD_API_SECRET="",
        OTHER_DESK_API_KEY="key",
        BINANCE_DESK_API_KEY_ID="key",
    )
    assert list(got.credentials) == ["default"]


@pytest.mark.parametrize(
    "value",
    [
        CANARY,
        f"/no/such/{CANARY}",
        CANARY * 300,
        f"{CANARY}\0",
        "/",
        f"-----BEGIN PRIVATE KEY-----\\n{CANARY}\\n-----END",
    ],
)
def test_a_private_key_that_cannot_be_read_is_refused_unseen(value: str) -> None:
    """A private key that is neither PEM text nor a readable file is refused without repeating it."""
    (problem,) = problems({"BINANCE_API_KEY": "key", "BINANCE_PRIVATE_KEY": value})
    assert problem.startswith("BINANCE_PRIVATE_KEY cannot be used: ")
    assert CANARY not in problem


def test_an_oversized_or_binary_key_file_is_refused(tmp_path: Path) -> None:
    """A file that cannot be a PEM key, by its size or its bytes, is refused."""
    for content in (b"x" * 70_000, bytes(range(256))):
        key_file = tmp_path / "key.pem"
        key_file.write_bytes(content)
        (problem,) = problems({"BINANCE_API_KEY": "key", "BINANCE_PRIVATE_KEY": str(key_file)})
        assert problem.startswith("BINANCE_PRIVATE_KEY cannot be used: ")


# --- Secrets -----------------------------------------------------------------------------------------------------


def everything_said(environ: Mapping[str, str]) -> str:
    """All text that settings made of ``environ``, or the error in their place, show of themselves."""
    try:
        got = Settings.from_env(environ)
    except SettingsError as error:
        return "".join([str(error), repr(error), *error.problems, *traceback.format_exception(error)])
    return "".join([repr(got), str(got), got.display_redis_url, repr(got.credentials), repr(got.redis_options())])


def test_good_settings_show_no_secret(ed25519_pem: str) -> None:
    """repr and str of settings hold neither API keys nor secrets nor private keys nor passwords."""
    said = everything_said(
        {
            "REDIS_URL": f"rediss://user:{CANARY}@redis.example:6380/0?password={CANARY}",
            "EGRESS_PROXY_URL": f"http://user:{CANARY}@proxy.example:9293",
            "BINANCE_API_KEY": CANARY,
            "BINANCE_API_SECRET": CANARY,
            "BINANCE_DESK_API_KEY": CANARY,
            "BINANCE_DESK_PRIVATE_KEY": ed25519_pem,
        }
    )
    assert CANARY not in said
    assert not any(line in said for line in ed25519_pem.splitlines() if line)
    assert "rediss://redis.example:6380/0" in said
    assert "http://***@proxy.example:9293" in said
    assert "'desk': ed25519" in said


@pytest.mark.parametrize(
    "environ",
    [
        *[
            {"REDIS_URL": text}
            for text in (
                *(f"redis://:{CANARY}", f"redis://{CANARY}:x@h/x", f"redis://:{CANARY}@h/x", f"redis://:a/{CANARY}@h"),
                *(f"redis://:a#{CANARY}@h", f"redis://:a?{CANARY}@h", f"redis://:1/{CANARY}@h:6379/0", CANARY),
                *(f"redis://h?password={CANARY}&x=1", f"redis://h?x=a@{CANARY}", f"http://:{CANARY}@h"),
                *(f"{CANARY}@h:6379", f":{CANARY}@h", f"redis://:{CANARY}@[h", f"redis://:{CANARY}\u2100@h/0"),
            )
        ],
        *[
            {"EGRESS_PROXY_URL": text}
            for text in (f"http://u:{CANARY}@h/path", f"socks5://u:{CANARY}@h", f"u:{CANARY}@h:1", f"http://u:{CANARY}")
        ],
        {"BINANCE_BASE_URL": f"https://u:{CANARY}@fapi.binance.com"},
        {"BINANCE_ALLOWED_HOST": f"u:{CANARY}@gateway.example"},
        {"CANCEL_QUEUE": f"redis://:{CANARY}@h"},
        {"BINANCE_API_KEY": f"{CANARY} "},
        {"BINANCE_API_SECRET": f"{CANARY}\n"},
        {"BINANCE_PRIVATE_KEY": CANARY},
        {"BINANCE_DESK_API_SECRET": CANARY},
        {"BINANCE_DEFAULT_API_SECRET": CANARY},
        {"BINANCE_desk_PRIVATE_KEY": CANARY},
    ],
)
def test_bad_settings_show_no_secret(environ: dict[str, str]) -> None:
    """Whatever is wrong with a variable that may hold a secret, no message and no traceback repeats the secret."""
    said = everything_said({**ACCOUNT, **environ})
    assert next(iter(environ)) in said
    assert CANARY not in said


@pytest.mark.parametrize(
    "text", ["redis://u:86421?x@h:6379/0", "redis://86421?x@h", "redis://:86421", "redis://:86421/x@h"]
)
def test_a_password_that_looks_like_host_or_port_is_not_shown(text: str) -> None:
    """Where it is unclear which part of a URL is the password, only the scheme is shown."""
    assert "86421" not in everything_said({**ACCOUNT, "REDIS_URL": text})


@given(
    st.text(max_size=12), st.text(max_size=12), st.sampled_from(["@redis.example:6379/0", "@h", "@h/0?db=1", "@h:x"])
)
def test_no_password_is_shown_whatever_stands_around_it(before: str, after: str, rest: str) -> None:
    """A URL's password, well or badly written, with any characters around it, is never shown."""
    for variable, scheme in (("REDIS_URL", "redis"), ("EGRESS_PROXY_URL", "http"), ("BINANCE_BASE_URL", "https")):
        said = everything_said({**ACCOUNT, variable: f"{scheme}://user:{before}{CANARY}{after}{rest}"})
        assert CANARY not in said


def test_settings_refuse_to_be_pickled_or_taken_apart() -> None:
    """Settings hold secrets, so they are neither pickled nor turned into a dictionary, and cannot be changed."""
    got = settings()
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(got)
    with pytest.raises(TypeError):
        copy.deepcopy(got)
    with pytest.raises(TypeError):
        vars(got)
    with pytest.raises(TypeError):
        dataclasses.asdict(got)
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.queue = "other"  # type: ignore[misc]
