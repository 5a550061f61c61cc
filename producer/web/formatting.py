"""How values look on a page. Everything goes through Jinja's escaping; what is Markup here is made of numbers alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from producer.message import OutcomeKind

_DAY_S = 86_400
#: What cannot be sent as UTF-8, or would act in a terminal when copied.
_UNFIT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

MEANINGS: Mapping[OutcomeKind, str] = {
    OutcomeKind.CANCELLED: "Our cancel took the order off the book.",
    OutcomeKind.ALREADY_CANCELLED: "It was cancelled before any cancel of ours can have done it.",
    OutcomeKind.TRIGGERED: "Too late: it became a normal order. Read that one, and cancel it there or handle its fill.",
    OutcomeKind.EXPIRED: "The exchange dropped it.",
    OutcomeKind.REJECTED: "The exchange dropped it.",
    OutcomeKind.NOT_FOUND: "The exchange does not know it, and kept saying so. Check id and account, look at the open "
    "orders, then retry.",
    OutcomeKind.REFUSED: "A refusal that repeating cannot change. Mend what the error names, then retry.",
    OutcomeKind.GAVE_UP: "Deadline or attempts ran out; no cancel of ours can have worked. Treat it as live; retry.",
    OutcomeKind.UNKNOWN: "Deadline or attempts ran out, or a refusal came, while a cancel of ours may have worked. "
    "Treat it as live until you have looked.",
    OutcomeKind.OVERDUE: "The deadline passed before anything was sent. Treat it as live; see why no worker was there.",
    OutcomeKind.LISTED: "The open orders of the symbol were read, and each has a request of its own.",
}


def fit(value: Any) -> Any:
    """What a page is given, without characters that cannot be shown."""
    if isinstance(value, str) and not isinstance(value, Markup) and _UNFIT.search(value):
        return _UNFIT.sub("\N{REPLACEMENT CHARACTER}", value)
    return value


def when(ms: int | None) -> Markup | str:
    """A moment in UTC, ms since the epoch."""
    return _time(ms, lambda at: f"{at:%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03d}")


def clock(ms: int | None, now_ms: int) -> Markup | str:
    """The same in short: the time alone if less than twelve hours lie between it and ``now_ms``."""
    is_near = ms is not None and abs(now_ms - ms) < _DAY_S * 500
    return _time(ms, lambda at: f"{at:%H:%M:%S}" if is_near else f"{at:%m-%d %H:%M}")


def minute(ms: int) -> Markup | str:
    """The minute of the day alone."""
    return _time(ms, lambda at: f"{at:%H:%M}")


def _time(ms: int | None, shown: Callable[[datetime], str]) -> Markup | str:
    if ms is None:
        return "-"
    try:
        at = datetime.fromtimestamp(ms / 1000, UTC)
    except (ValueError, OverflowError, OSError):  # of a year that no calendar has
        return str(ms)
    stamp = at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return Markup('<time datetime="{0}" title="{0}">{1}</time>').format(stamp, shown(at))


def span(seconds: float | None, coarse: bool = False) -> str:
    """A time, s, in the unit that fits; ``coarse``: not finer than a second."""
    if seconds is None:
        return "-"
    if coarse and abs(seconds) < 59.5:
        return f"{seconds:.0f} s"
    for limit, unit, size in ((0.9995, "ms", 0.001), (119.5, "s", 1), (7170, "min", 60), (2 * _DAY_S, "h", 3600)):
        if abs(seconds) < limit:
            return f"{seconds / size:.{0 if unit == 'ms' or abs(seconds / size) >= 99.5 else 1}f} {unit}"
    return f"{seconds / _DAY_S:.1f} days"


def ago(ms: int | None, now_ms: int) -> str:
    """How long ago a moment was, or how far off it is."""
    if ms is None:
        return "-"
    gap_s = (now_ms - ms) / 1000
    return f"in {span(-gap_s, True)}" if gap_s < 0 else f"{span(gap_s, True)} ago"


def between(start_ms: int | None, end_ms: int | None) -> str:
    """How long it took from one moment to another."""
    return "-" if start_ms is None or end_ms is None else span((end_ms - start_ms) / 1000)


def count(value: int | None) -> str:
    """A number for people; a dash for none."""
    return "-" if value is None else f"{value:,}"


def dash(value: Any) -> Any:
    """A value, or a dash where there is none."""
    return "-" if value is None or value == "" else value


def tone(kind: str) -> str:
    """The class that colours a kind: good, late or bad; plain for what is none."""
    try:
        known = OutcomeKind(kind)
    except ValueError:
        return "plain"
    if known is OutcomeKind.LISTED:
        return "plain"
    return "good" if known.off_the_book else "bad" if known.failed else "late"


def meaning(kind: Any) -> str:
    """What a kind says of the order, and what to do."""
    return MEANINGS.get(kind, "")


#: What templates call by name.
FILTERS = {each.__name__: each for each in (when, clock, minute, span, ago, between, count, dash, tone, meaning)}
