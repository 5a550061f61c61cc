"""One line for one event: logfmt, or JSON, with fixed event names and fields.

Values are strangers' words as often as not, so each is kept to one line. Secrets never come here: callers log ids,
codes and durations, never a request's URL.

Logging neither waits nor raises, whatever becomes of stdout (:mod:`worker.output`): what cannot be written is counted,
and `event=log_dropped count=…` tells of it as soon as it can.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from producer.untrusted import clean_text
from worker.output import Output, write_now

_MAX_VALUE_CHARS = 400
_PLAIN = re.compile(rf"[A-Za-z0-9._:/+#@-]{{1,{_MAX_VALUE_CHARS}}}")

#: How long last words are waited for, s.
_LAST_WORDS_S = 0.2

logger = logging.getLogger("cancel")
_stdout = Output(1)


def event(level: int, name: str, **fields: object) -> None:
    """Log ``name`` with its fields; a field that is None is left out."""
    if logger.isEnabledFor(level):
        logger.handle(_record(level, name, fields))


#: For who hunts a defect; for who watches normal work, or something that is wrong; what a person should look at.
debug, info = partial(event, logging.DEBUG), partial(event, logging.INFO)
warning, error = partial(event, logging.WARNING), partial(event, logging.ERROR)


def defect(raised: BaseException, **fields: object) -> None:
    """Log an error that nobody expected; what it says may hold what must not be logged."""
    error("defect", **fields, where=where(raised), error=type(raised).__name__)


def where(raised: BaseException) -> str:
    """The place in the code that an error came from."""
    frame = raised.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame is not None else "?"


def _value(value: object) -> str:
    if isinstance(value, str):
        if _PLAIN.fullmatch(value):
            return str(value)
    elif isinstance(value, bool):
        return "true" if value else "false"
    elif isinstance(value, int):
        return str(value)
    elif isinstance(value, float):
        return f"{value:.3f}"
    text = clean_text(str(value), _MAX_VALUE_CHARS)
    if _PLAIN.fullmatch(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


class Formatter(logging.Formatter):
    """`at=2026-01-31T12:00:00.123Z level=info event=outcome id=… kind=cancelled`, or the same fields as a JSON object.

    An exception is told by its type alone: a traceback may show what must not be shown.
    """

    def __init__(self, style: str = "logfmt") -> None:
        super().__init__()
        self._is_json = style == "json"

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        fields = _fields(record)
        if not self._is_json:
            return " ".join([f"{name}={_value(value)}" for name, value in fields.items()])
        for name, value in fields.items():
            if not isinstance(value, int | float):
                fields[name] = clean_text(str(value), _MAX_VALUE_CHARS)
        return json.dumps(fields, ensure_ascii=False)


@lru_cache(maxsize=8)
def _second(since_epoch: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(since_epoch))


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "at": f"{_second(int(record.created))}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
    }
    if record.name == logger.name:
        fields["event"] = record.msg
        for name, value in getattr(record, "fields", {}).items():
            if value is not None:
                fields[name] = value
    else:
        fields |= {"event": "library", "logger": record.name, "msg": clean_text(record.getMessage(), _MAX_VALUE_CHARS)}
    if record.exc_info and record.exc_info[0] is not None:
        fields["exception"] = record.exc_info[0].__name__
    return fields


_formatter = Formatter()


def _record(level: int, name: str, fields: dict[str, Any]) -> logging.LogRecord:
    # Made here, as logging's own way would first look for the caller's file and line, which nobody is shown.
    record = logger.makeRecord(logger.name, level, "", 0, name, (), None)
    record.fields = fields
    return record


def _line(record: logging.LogRecord) -> bytes:
    # Whatever the terminal's or the locale's encoding is: a line must not be lost because of one letter.
    return (_formatter.format(record) + "\n").encode("utf-8", "backslashreplace")


def _tell_lost(count: int) -> bytes:
    return _line(_record(logging.WARNING, "log_dropped", {"count": count}))


class _Handler(logging.Handler):
    """Hands each line over, made in the caller's thread: what it is made of may change."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = _line(record)
        except Exception as error:  # noqa: BLE001 - a line that cannot be made is a defect, and must do no harm
            fields = {"where": "log", "logger": record.name, "error": type(error).__name__}
            line = _line(_record(logging.ERROR, "defect", fields))
        _stdout.put(line)


def configure(level: str, style: str, *, wait_for_each: bool = False) -> None:
    """Send everything to stdout, where Heroku and containers look. ``style``: logfmt or json.

    ``wait_for_each`` is for a process that is ended by `os._exit`, as RQ's horses are: each line is written, or was
    waited for 0.2 s, before its call returns. A process that is forked after this does so without being told.
    """
    global _formatter
    # No line of ours names a thread or a process, and finding them out is a third of the cost of a line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    _formatter = Formatter(style)
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    logger.setLevel(level)
    for name in ("rq.worker", "rq.job", "rq.queue", "rq.registry", "urllib3"):
        library = logging.getLogger(name)
        # RQ tells each job at INFO in its own colours; our events say the same.
        library.setLevel(logging.WARNING)
        # Its command line gives it handlers of its own, which wait for stdout.
        library.handlers.clear()
        library.propagate = True
    if sys.__stdout__ is None:  # there was none at the start, and its number may be a connection's by now
        root.handlers[:] = [logging.NullHandler()]
    else:
        root.handlers[:] = [_Handler()]
        _stdout.start(_tell_lost, wait_for_each=wait_for_each)


def tell_warnings_on_stderr() -> None:
    """For a command that says on stdout what it does: events that somebody should look at, and nothing else."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter())
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)


def configure_unless_done(level: str, style: str, *, wait_for_each: bool = False) -> None:
    """The same where somebody else's command line (`rq worker -w …`) started the process and knows nothing of us."""
    if not logger.hasHandlers():
        configure(level, style, wait_for_each=wait_for_each)


def flush(timeout_s: float) -> bool:
    """Wait until every line is written, at most so long; whether all are. The end of a process does so for 0.5 s."""
    return _stdout.flush(timeout_s)


def last_words(name: str, **fields: object) -> None:
    """Write an error event to stderr at once, past the queue: for a process that is about to end itself.

    May be called in any thread and in a signal's handler; a stderr that takes nothing is left after 0.2 s.
    """
    if sys.__stderr__ is not None:
        write_now(2, _line(_record(logging.ERROR, name, fields)), _LAST_WORDS_S)
