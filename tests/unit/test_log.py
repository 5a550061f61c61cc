"""Log lines: one event, one line, nothing that breaks it and nothing that must not be shown."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.message import MAX_ALGO_ID, OutcomeKind
from worker import log

Captured = pytest.CaptureFixture[str]
_PAIR = re.compile(r'([^\s="]+)=("(?:[^"\\]|\\.)*"|[^\s"]*)(?: |$)')


@pytest.fixture
def configured() -> Iterator[Callable[..., None]]:
    """Sets logging up as a worker does, and puts it back afterwards."""
    names = ("", "cancel", "rq.worker", "rq.job", "rq.queue", "rq.registry", "urllib3")
    levels = {name: logging.getLogger(name).level for name in names}
    handlers = logging.getLogger().handlers[:]

    def configure(level: str = "INFO", style: str = "logfmt") -> None:
        log.configure(level, style)

    yield configure
    logging.getLogger().handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def printed(capfd: Captured) -> tuple[str, str]:
    """What stands on stdout and stderr once every line is written."""
    assert log.flush(10)
    return capfd.readouterr()


def parsed(line: str) -> dict[str, str]:
    """A logfmt line's fields, quotes taken off; fails if it is not one."""
    fields: dict[str, str] = {}
    at = 0
    while at < len(line):
        pair = _PAIR.match(line, at)
        assert pair, line[at:]
        name, value = pair.groups()
        assert name not in fields, line
        fields[name] = re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value
        at = pair.end()
    return fields


def record_of(event: str, fields: dict[str, object]) -> logging.LogRecord:
    """What the formatter gets."""
    record = log.logger.makeRecord(log.logger.name, logging.INFO, "", 0, event, (), None)
    record.fields = fields
    return record


def test_line_of_an_event(configured: Callable[..., None], capfd: Captured) -> None:
    """An event is one line on stdout: when, how grave, which event, then its fields in the order given."""
    configured()

    log.info("outcome", id="ab12", kind=OutcomeKind.CANCELLED, attempts=2, **{"measure#cancel.first_ms": 7})

    out, err = printed(capfd)
    assert err == ""
    at, rest = out.split(" ", 1)
    assert rest == "level=info event=outcome id=ab12 kind=cancelled attempts=2 measure#cancel.first_ms=7\n"
    moment = datetime.strptime(at, "at=%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - moment) < timedelta(seconds=5)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (True, "true"),
        (False, "false"),
        (0, "0"),
        (MAX_ALGO_ID, "9223372036854775807"),
        (1.5, "1.500"),
        ("", '""'),
        ("two words", '"two words"'),
        ('say "hi"', '"say \\"hi\\""'),
        ("back\\slash", '"back\\\\slash"'),
        ("a=b", '"a=b"'),
        ("rediss://h:1/0", "rediss://h:1/0"),
        ("line\nfeed\r\0", '"line feed"'),
        ("ümläut …", '"ümläut …"'),
    ],
)
def test_values_are_spelt_so_that_they_can_be_read_back(value: object, shown: str) -> None:
    """Numbers and plain words stand as they are, anything else in quotes."""
    line = log.Formatter().format(record_of("e", {"x": value}))

    assert line.endswith(f" event=e x={shown}")


@pytest.mark.parametrize("formatter", [log.Formatter(), log.Formatter("json")], ids=["logfmt", "json"])
@given(text=st.text(st.characters()))
def test_any_text_stays_in_its_field(formatter: logging.Formatter, text: str) -> None:
    """A stranger's words can neither begin a new line nor forge a field, and can always be written."""
    line = formatter.format(record_of("e", {"msg": text, "end": "here"}))

    line.encode("utf-8")
    assert len(line.splitlines()) == 1
    fields = json.loads(line) if line.startswith("{") else parsed(line)
    assert list(fields) == ["at", "level", "event", "msg", "end"]
    assert (fields["event"], fields["end"]) == ("e", "here")


@pytest.mark.parametrize("formatter", [log.Formatter(), log.Formatter("json")], ids=["logfmt", "json"])
def test_long_values_are_cut(formatter: logging.Formatter) -> None:
    """No value makes a line that a log service would split."""
    assert len(formatter.format(record_of("e", {"msg": "x" * 100_000}))) < 1000


def test_json_line_has_the_same_fields(configured: Callable[..., None], capfd: Captured) -> None:
    """With LOG_FORMAT=json the same fields come as one object, numbers exact."""
    configured(style="json")

    log.warning("again", id="x", algo_id=MAX_ALGO_ID, ok=True, missing=None)

    fields = json.loads(printed(capfd)[0])
    del fields["at"]
    assert fields == {"level": "warning", "event": "again", "id": "x", "algo_id": MAX_ALGO_ID, "ok": True}


@pytest.mark.parametrize("style", ["logfmt", "json"])
def test_exception_shows_its_kind_alone(style: str, configured: Callable[..., None], capfd: Captured) -> None:
    """A library's traceback and its text, which may hold a signed URL, are never printed."""
    configured(style=style)
    try:
        raise ValueError("https://host/path?signature=secret")
    except ValueError:
        logging.getLogger("some.library").exception("it failed")

    out, err = printed(capfd)
    assert err == ""
    assert len(out.splitlines()) == 1
    assert "ValueError" in out
    assert "some.library" in out
    assert "it failed" in out
    for hidden in ("secret", "Traceback", "signature"):
        assert hidden not in out


def test_levels(configured: Callable[..., None], capfd: Captured) -> None:
    """Less grave events than LOG_LEVEL are left out, and libraries speak from warnings on, RQ's too."""
    configured("WARNING")
    for speak in (log.debug, log.info, log.warning, log.error):
        speak("said")
    for name in ("rq.worker", "urllib3.connectionpool", "some.library"):
        logging.getLogger(name).info("chatter")
        logging.getLogger(name).warning("trouble with %s", "x")

    lines = [parsed(line) for line in printed(capfd)[0].splitlines()]

    assert [line["level"] for line in lines if line["event"] == "said"] == ["warning", "error"]
    assert [line["msg"] for line in lines if line["event"] == "library"] == ["trouble with x"] * 3


class Unspeakable:
    """Cannot be shown."""

    def __str__(self) -> str:
        raise RuntimeError("a secret")


@pytest.mark.parametrize("style", ["logfmt", "json"])
def test_line_that_cannot_be_made_is_one_line(style: str, configured: Callable[..., None], capfd: Captured) -> None:
    """A library's wrong call or a value that cannot be shown costs its line alone, and names the logger."""
    configured(style=style)

    logging.getLogger("some.library").warning("%d of %d", "one")
    log.info("outcome", id=Unspeakable())

    out, err = printed(capfd)
    assert err == ""
    lines = [json.loads(line) if style == "json" else parsed(line) for line in out.splitlines()]
    shown = [(line["event"], line["where"], line["logger"], line["error"]) for line in lines]
    assert shown == [("defect", "log", "some.library", "TypeError"), ("defect", "log", "cancel", "RuntimeError")]


def test_library_handlers_are_replaced(configured: Callable[..., None], capfd: Captured) -> None:
    """A handler that RQ's command line gave its loggers, and that waits for stdout, is used no more."""
    waiting = logging.StreamHandler(sys.stderr)
    logging.getLogger("rq.worker").addHandler(waiting)
    logging.getLogger("rq.worker").propagate = False

    configured()
    logging.getLogger("rq.worker").warning("trouble")

    out, err = printed(capfd)
    assert err == ""
    assert [parsed(line)["msg"] for line in out.splitlines()] == ["trouble"]
