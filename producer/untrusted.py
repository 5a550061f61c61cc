"""What comes from outside, and how it is taken: JSON within bounds, checked values, and words fit to be shown.

Requests come from strategies, records and jobs from Redis, texts from the exchange: whoever wrote them may be wrong or
an enemy. Standard library only.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from typing import Any, SupportsFloat

#: Largest payload that is decoded, bytes, after decompression too: a request is a few hundred bytes.
MAX_PAYLOAD_BYTES = 64 * 1024
#: Deepest nesting that is parsed: no message of this contract has more than five levels, and what a parser, a `repr` or
#: a comparison does with thousands of them differs from one Python to the next.
MAX_DEPTH = 32
#: Longest text kept of what the exchange said, characters.
MAX_MSG_CHARS = 200
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
#: A JSON text's brackets, and its strings as wholes: a bracket inside a string nests nothing. A string without an end
#: is taken up to the end of the text, so that no text is gone through twice.
_BRACKETS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)


class MessageError(ValueError):
    """Base of what this module raises."""


class InvalidRequest(MessageError):
    """A request breaks a rule of the contract; nothing was enqueued or sent.

    ``field`` names the offending field and ``value`` holds what was given.
    """

    def __init__(self, field: str, value: object, rule: str) -> None:
        super().__init__(f"{field}={shown(value)}: {rule}")
        self.field = field
        self.value = value
        self.rule = rule

    def __reduce__(self) -> tuple[type[InvalidRequest], tuple[str, object, str]]:
        """Strategies hand errors from process to process."""
        return InvalidRequest, (self.field, self.value, self.rule)


class MalformedMessage(MessageError):
    """Bytes from Redis are not a message of this contract (foreign job, other version, damaged, too large)."""


def not_a(value: object, wanted: type, cure: str) -> str:
    """What a rule adds where a value has not the type that it should have: which it has, and the way out."""
    if type(value) is wanted:
        return ""
    return f", not {type(value).__name__}" + (f": {cure}" if cure else "")


def checked_seconds(name: str, value: object, most_s: float, *, or_zero: bool = False) -> float:
    """A length of time, s: of a number of any kind, or of a timedelta.

    Raises:
        InvalidRequest: it is none, or not within its bounds.
    """
    bounds = f"more than 0 and at most {most_s}"
    if or_zero:
        bounds = "0 or more" if most_s == math.inf else f"from 0 to {most_s}"
    rule = f"must be {bounds} seconds"
    if callable(span := getattr(value, "total_seconds", None)):
        number = span()
    elif isinstance(value, bool | str | bytes) or not isinstance(value, SupportsFloat):
        raise InvalidRequest(name, value, f"{rule}, not {type(value).__name__}: give a number or a timedelta")
    else:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
    if not 0 <= number <= most_s or (number == 0 and not or_zero):
        raise InvalidRequest(name, value, rule)
    return value if type(value) in (int, float) else number  # type: ignore[return-value]


def checked_flag(name: str, value: object) -> bool:
    """``value``, if it is true or false; raises InvalidRequest if it is neither."""
    if not isinstance(value, bool):
        raise InvalidRequest(name, value, "must be true or false" + not_a(value, bool, "give True or False"))
    return value


def check_text(name: str, value: object, limit: int) -> None:
    if value is None:
        return
    if not isinstance(value, str) or not 1 <= len(value) <= limit or CONTROL.search(value):
        rule = f"must be text of 1 to {limit} characters without control characters"
        raise InvalidRequest(name, value, rule + not_a(value, str, ""))


def loads(text: str | bytes, limit: int = MAX_PAYLOAD_BYTES, *, once: bool = False) -> Any:
    """Parse JSON from a stranger: bounded in size and depth, no NaN, no number beyond 64 bits.

    ``once``: no field may stand in an object twice. Else the last one holds, as for RQ.

    Raises:
        MalformedMessage: any of that, or not JSON.
    """
    if len(text) > limit:
        raise MalformedMessage(f"{len(text)} bytes are too many; {limit} is the most")
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        _check_depth(decoded)
        return (_ONCE if once else _DECODER).decode(decoded)
    except MalformedMessage:
        raise
    except ValueError as error:
        raise MalformedMessage(f"not JSON: {shown(str(error))}") from None


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for token in _BRACKETS.finditer(text):
        if token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
        if depth > MAX_DEPTH:
            raise MalformedMessage("nested too deeply")


def _constant(name: str) -> float:
    raise MalformedMessage(f"{name} is not a number of JSON")


def _int64(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (number := int(digits)) < 2**63:
        raise MalformedMessage(f"{shown(digits)} does not fit in 64 bits")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise MalformedMessage(f"field {shown(twice)} stands there twice")
    return fields


_DECODER = json.JSONDecoder(parse_constant=_constant, parse_int=_int64)


_ONCE = json.JSONDecoder(parse_constant=_constant, parse_int=_int64, object_pairs_hook=_once)


def inflate(data: bytes) -> bytes:
    """RQ compresses a job's data and reads it uncompressed too; a small bomb must not become a large string."""
    if data.startswith(b"["):  # no zlib stream begins so
        return data
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(data, MAX_PAYLOAD_BYTES + 1)
    except zlib.error:
        return data
    if len(plain) > MAX_PAYLOAD_BYTES:
        raise MalformedMessage(f"the payload inflates beyond {MAX_PAYLOAD_BYTES} bytes")
    if data and not inflater.eof:
        raise MalformedMessage("the compressed payload is cut off")
    return plain


def clean_text(words: object, limit: int = MAX_MSG_CHARS) -> str:
    """A stranger's words made fit for records, logs and terminals, the one way for all of them: one line of at most
    ``limit`` characters, a blank in the place of each that cannot be printed or turns the line around."""
    text = words.decode("utf-8", "replace") if isinstance(words, bytes) else str(words)
    cleaned = text[: 4 * limit]
    if not cleaned.isprintable():
        cleaned = "".join(character if character.isprintable() else " " for character in cleaned)
    cleaned = cleaned.strip()
    return cleaned if len(cleaned) <= limit else cleaned[: limit - 1] + "…"


def shown(value: object) -> str:
    try:
        return clean_text(repr(value), 80)
    except (ValueError, RecursionError):  # a whole number too long for Python to print, or a caller's endless list
        return f"<{type(value).__name__}>"


_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def dumps(value: object) -> str:
    return _ENCODER.encode(value)
