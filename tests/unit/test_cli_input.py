"""What the command line reads: ids as people type them, files of orders, and settings of the connection."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from producer.__main__ import main
from producer.console import SHOWN_BAD_LINES, BadFile, BadSetting, algo_id_of, connect, read_requests
from producer.message import CancelRequest
from producer.untrusted import MAX_PAYLOAD_BYTES, InvalidRequest

DEFAULTS: dict[str, Any] = {"account": "desk2", "symbol": "BTCUSDT", "tag": None, "urgent": True, "deadline_s": 30.0}
PASSWORD = "password-of-the-tests"


def read(text: str | bytes, **defaults: Any) -> list[CancelRequest]:
    """The requests of a file with this content."""
    raw = text.encode() if isinstance(text, str) else text
    return read_requests(io.BytesIO(raw), "ids.txt", defaults)


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "+1", "1.0", "1e3", "1_000", "007", " 1", "0x10", "٣", "²", "9" * 20, "9" * 5000]
)
def test_what_only_looks_like_an_algo_id_is_refused(text: str) -> None:
    """Python's own reading of numbers is more generous than a cancel may be: none of its spellings is taken."""
    with pytest.raises(InvalidRequest, match="algo_id="):
        algo_id_of(text)


def test_a_file_may_mix_every_kind_of_line() -> None:
    """Digits are algo ids, objects have the fields of a request, the rest are client ids; comments and blanks go."""
    lines = [
        "\ufeff# ids of tonight",
        "",
        "2146760",
        "  2146761\t\r",
        "stop-17",
        '{"algo_id": 5, "client_algo_id": "x", "tag": "t"}',
        '{"client_algo_id": "007", "deadline_s": 1.5, "urgent": true}',
        "   # indented comment",
        "8",
    ]
    assert read("\n".join(lines)) == [
        CancelRequest(algo_id=2146760),
        CancelRequest(algo_id=2146761),
        CancelRequest(client_algo_id="stop-17"),
        CancelRequest(algo_id=5, client_algo_id="x", tag="t"),
        CancelRequest(client_algo_id="007", deadline_s=1.5, urgent=True),
        CancelRequest(algo_id=8),
    ]


def test_options_are_the_defaults_of_a_line() -> None:
    """What a line says itself wins over the command line, in both directions."""
    said = '{"algo_id": 3, "account": "desk3", "symbol": "ETHUSDT", "tag": "t", "urgent": false, "deadline_s": 1}'

    assert read(f"1\nstop\n{said}\n", **DEFAULTS) == [
        CancelRequest(1, None, "desk2", 30.0, True, "BTCUSDT", None),
        CancelRequest(None, "stop", "desk2", 30.0, True, "BTCUSDT", None),
        CancelRequest(3, None, "desk3", 1, False, "ETHUSDT", "t"),
    ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("0", "algo_id='0': must be a whole number from 1 to 9223372036854775807"),
        ("007", "algo_id='007': must be a whole number"),
        ("9223372036854775808", "algo_id=9223372036854775808: must be a whole number"),
        ("two words", "client_algo_id='two words': must match"),
        ("x" * 37, "must match"),
        ("[1]", "client_algo_id='[1]': must match"),
        ('{"algo_id": "5"}', "algo_id='5': must be a whole number"),
        ('{"algo_id": 5, "account": "Desk"}', "account='Desk': must match"),
        ('{"algo_id": 5, "deadline_s": -1}', "deadline_s=-1: must be more than 0"),
        ('{"symbol": "BTCUSDT"}', "algo_id=None: give algo_id or client_algo_id"),
        ('{"algo_id": 5, "price": 1}', "unknown field 'price'"),
        ('{"algo_id": 5, "v": 2}', "v=2: this side speaks version 1"),
        ('{"algo_id": 5', """'{"algo_id": 5': not JSON"""),
        ('{"algo_id": 5, "algo_id": 6}', "field 'algo_id' stands there twice"),
        ('{"algo_id": NaN}', "NaN is not a number of JSON"),
        ('{"algo_id": 1e400}', "must be a whole number"),
        ('{"algo_id": ' + "9" * 30 + "}", "does not fit in 64 bits"),
        ('{"a":' * 10_000, "nested too deeply"),
        ("a\x1bb", "client_algo_id="),
    ],
)
def test_a_bad_line_is_told_with_its_place_value_and_rule(line: str, told: str) -> None:
    """The report begins with file and line, repeats the value without its control characters, and names the rule."""
    with pytest.raises(BadFile) as caught:
        read(f"1\n\n{line}\n2\n")

    first, last = str(caught.value).splitlines()
    assert first.startswith("ids.txt:3: ")
    assert told in first
    assert last == "nothing was enqueued"
    assert first.isprintable()
    assert len(first) < 300


def test_a_line_without_an_end_does_not_fill_the_memory() -> None:
    """A line longer than a request can be is one bad line, and the lines after it keep their numbers."""
    with pytest.raises(BadFile) as caught:
        read(b"x" * (3 * MAX_PAYLOAD_BYTES) + b"\n1\nno good\n" + b"y" * (MAX_PAYLOAD_BYTES + 1))

    assert [line.split(": ")[0] for line in str(caught.value).splitlines()[:-1]] == [
        "ids.txt:1",
        "ids.txt:3",
        "ids.txt:4",
    ]
    assert f"longer than {MAX_PAYLOAD_BYTES} bytes" in str(caught.value)


def test_many_bad_lines_are_counted_after_the_first_ones() -> None:
    """Twenty are shown one by one, the rest by number."""
    with pytest.raises(BadFile) as caught:
        read("no good\n" * 1234)

    lines = str(caught.value).splitlines()
    assert len(lines) == SHOWN_BAD_LINES + 2
    assert lines[SHOWN_BAD_LINES - 1].startswith(f"ids.txt:{SHOWN_BAD_LINES}: ")
    assert lines[SHOWN_BAD_LINES] == "ids.txt: 1,214 more bad lines"


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing today\n"])
def test_a_file_without_an_id_is_an_error(text: str) -> None:
    """Whoever pipes ids here and lost them on the way must hear of it."""
    with pytest.raises(BadFile, match="there is no id in it"):
        read(text)


# --- connecting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "verify", "ca"),
    [
        ("rediss://localhost", "perhaps", ""),
        ("rediss://localhost?ssl_cert_reqs=none", "required", ""),
        ("rediss://localhost", "", "/nowhere/ca.pem"),
    ],
)
def test_settings_that_cannot_hold_are_refused(url: str, verify: str, ca: str) -> None:
    """A setting that the URL would silently override, and a file that is not there, stop the command."""
    with pytest.raises(BadSetting, match="REDIS_TLS_"):
        connect(url, "cancels", verify, ca)


# --- usage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "Usage:"),
        (("cancle",), "No such command 'cancle'"),
        (("cancel", "--algoid", "1"), "--algo-id"),
        (("cancel",), "give --algo-id, --client-algo-id or --from-file"),
        (("cancel", "--algo-id", "1", "--deadline", "soon"), "'soon' is not a valid float"),
        (("cancel", "--algo-id", "1", "--deadline", "nan"), "deadline_s=nan: must be more than 0"),
        (("cancel", "--algo-id", "1", "--wait", "-1"), "0 or more"),
        (("cancel", "--algo-id", "1", "--algo-id", "1e3"), "algo_id='1e3': must be a whole number"),
        (("cancel", "--client-algo-id", "a b"), "client_algo_id='a b': must match"),
        (("cancel", "--algo-id", "1", "--account", "Desk"), "account='Desk': must match"),
        *(
            (("cancel", "--algo-id", "1", "--queue", each), f"queue={each!r}: must match")
            for each in ("", "a b", "a:b")
        ),
        (("cancel", "--from-file", "nowhere.txt"), "nowhere.txt: No such file or directory"),
        (("outcome",), "Missing argument"),
        (("outcomes", "--after", "yesterday"), "after='yesterday': must be a stream id"),
        (("retry",), "give ids or --failed"),
        (("retry", "x", "--failed"), "and not both"),
        (("status", "--redis-url", f"http://:{PASSWORD}@localhost"), "REDIS_URL must be redis://"),
    ],
)
def test_bad_usage_is_told_before_anything_is_tried(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], told: str
) -> None:
    """The exit code is 2 and not that of the server which is not there; stdout stays empty, a password unseen."""
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")

    assert main(arguments) == 2

    said = capsys.readouterr()
    assert said.out == ""
    assert told in said.err
    assert PASSWORD not in said.err


ABOUT_ORDERS = "0 1 2 3 4 130"


@pytest.mark.parametrize(
    ("command", "codes"),
    [
        ("cancel", ABOUT_ORDERS),
        ("cancel-open", ABOUT_ORDERS),
        ("outcome", ABOUT_ORDERS),
        *((command, "0 2 4 130") for command in ("outcomes", "retry", "status")),
        *((command, "0 2 130") for command in ("metrics", "web")),
        ("acl", "0 2"),
    ],
)
def test_help_ends_with_examples_and_the_codes_that_apply(
    capsys: pytest.CaptureFixture[str], command: str, codes: str
) -> None:
    """And says where settings come from, and where a password belongs."""
    assert main([command, "--help"]) == 0

    told = capsys.readouterr().out
    assert re.findall(r"^ +(\d+) +[a-zR]", told.partition("Exit codes:")[2], re.MULTILINE) == codes.split()
    assert f"python -m producer {command}" in told.partition("Examples:")[2]
    assert ("visible in ps" in " ".join(told.split())) == ("REDIS_TLS_VERIFY" in told) == (command != "acl")
