"""One line for one event: logfmt, or JSON, with fixed event names and fields.

Values are strangers' words as often as not, so each is kept to one line. Secrets never come here: callers log ids,
codes and durations, never a request's URL.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from functools import lru_cache
from typing import Any

from producer.message import clean_text

_MAX_VALUE_CHARS = 400
_PLAIN = re.compile(rf"[A-Za-z0-9._:/+#@-]{{1,{_MAX_VALUE_CHARS}}}")

logger = logging.getLogger("cancel")


def event(level: int, name: str, **fields: object) -> None:
    """Log ``name`` with its fields; a field that is None is left out."""
    if logger.isEnabledFor(level):
        # Made here, as logging's own way would first look for the caller's file and line, which nobody is shown.
        record = logger.makeRecord(logger.name, level, "", 0, name, (), None)
        record.fields = fields
        logger.handle(record)


def info(name: str, **fields: object) -> None:
    """What an operator wants to see of normal work."""
    event(logging.INFO, name, **fields)


def warning(name: str, **fields: object) -> None:
    """What an operator wants to see if something is wrong."""
    event(logging.WARNING, name, **fields)


def error(name: str, **fields: object) -> None:
    """What a person should look at."""
    event(logging.ERROR, name, **fields)


def debug(name: str, **fields: object) -> None:
    """What only somebody who hunts a defect wants to see."""
    event(logging.DEBUG, name, **fields)


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


class LogfmtFormatter(logging.Formatter):
    """`at=2026-01-31T12:00:00.123Z level=info event=outcome id=… kind=cancelled`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, exceptions included by their type alone: a traceback may show what must not be shown."""
        return " ".join([f"{name}={_value(value)}" for name, value in _fields(record).items()])


class JsonFormatter(logging.Formatter):
    """The same fields as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        fields = {
            name: value if isinstance(value, int | float) else clean_text(str(value), _MAX_VALUE_CHARS)
            for name, value in _fields(record).items()
        }
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


def configure(level: str, style: str) -> None:
    """Send everything to stdout, where Heroku and containers look. ``style``: logfmt or json."""
    # No line of ours names a thread or a process, and finding them out is a third of the cost of a line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter() if style == "json" else LogfmtFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logger.setLevel(level)
    # RQ tells each job at INFO in its own colours; our events say the same.
    for name in ("rq.worker", "rq.job", "rq.queue", "rq.registry", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)


def configure_unless_done(level: str, style: str) -> None:
    """The same where somebody else's command line (`rq worker -w …`) started the process and knows nothing of us."""
    if not logger.hasHandlers():
        configure(level, style)
