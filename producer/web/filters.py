"""Filters of ended requests: what an address or a form may ask for, and which requests meet it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from producer.untrusted import InvalidRequest
from producer.web.seen import Seen

#: Stands for the kind of a request whose outcome nobody can read.
UNREADABLE = "unreadable"
#: What a filter can name, and the longest value of each, characters.
_LENGTHS = {"kind": 20, "account": 32, "symbol": 32, "tag": 64, "from": 30, "until": 30}
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(:\d\d)?)?Z?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which ended requests are meant; None means any. ``typed``: the filter as it was given, without what is empty."""

    kind: str | None = None  # an OutcomeKind value, or UNREADABLE
    account: str | None = None
    symbol: str | None = None
    tag: str | None = None
    since_ms: int | None = None  # when it ended, the first and the last ms
    until_ms: int | None = None
    typed: Mapping[str, str] = field(default_factory=dict)
    fault: str | None = None  # what is wrong with the filter, and the way out; then it means nothing

    @property
    def all(self) -> bool:
        """Whether nothing is filtered out."""
        return not self.typed

    @property
    def words(self) -> str:
        """What stands, as it is, in each record that is meant; a look at the raw record spares reading most."""
        kind = None if self.kind == UNREADABLE else self.kind
        return next((word for word in (self.symbol, self.tag, kind) if word and word.isascii()), "")

    def meets(self, seen: Seen) -> bool:
        """Whether this one is meant."""
        if self.kind is not None and self.kind != (seen.kind.value if seen.kind else UNREADABLE):
            return False
        words = (("account", self.account), ("symbol", self.symbol), ("tag", self.tag))
        if any(value is not None and seen.of_order(name) != value for name, value in words):
            return False
        if self.since_ms is None and self.until_ms is None:
            return True
        at_ms = seen.ended_at_ms
        return at_ms is not None and (self.since_ms or 0) <= at_ms and (self.until_ms is None or at_ms <= self.until_ms)


def wanted_of(given: Mapping[str, str], kinds: Iterable[str]) -> Wanted:
    """The filter that an address or a form gives, where ``kinds`` can be chosen; with a ``fault`` if it is none."""
    typed = {name: value for name in _LENGTHS if (value := given.get(name, "").strip())}
    try:
        for name, value in typed.items():
            if len(value) > _LENGTHS[name]:
                raise InvalidRequest(name, value, f"give at most {_LENGTHS[name]} characters, or leave it empty")
        if typed.get("kind", UNREADABLE) not in (*kinds, UNREADABLE):
            raise InvalidRequest("kind", typed["kind"], f"must be one of {', '.join(kinds)}; or leave it empty")
        since, until = (_moments(name, typed.get(name)) for name in ("from", "until"))
        if since and until and until[1] < since[0]:
            raise InvalidRequest("until", typed["until"], f"is before from={typed['from']!r}: give a later time")
    except InvalidRequest as error:
        return Wanted(typed=typed, fault=f"{error}.")
    words = {name: typed.get(name) for name in ("kind", "account", "symbol", "tag")}
    return Wanted(**words, since_ms=since and since[0], until_ms=until and until[1], typed=typed)


def _moments(name: str, value: str | None) -> tuple[int, int] | None:
    """The first and the last millisecond of the day, minute or second that was typed; None if nothing was."""
    if value is None:
        return None
    shape = _TIME.fullmatch(value)
    day, minute, second = shape.groups() if shape else ("", None, None)
    try:
        start = datetime.fromisoformat(f"{day}T{minute or '00:00'}{second or ''}+00:00")
    except ValueError:
        raise InvalidRequest(name, value, "must be a time in UTC, as 2026-11-29 or 2026-11-29 09:30") from None
    unit_s = 1 if second else 60 if minute else 86_400
    first_ms = max(0, int(start.timestamp()) * 1000)
    return first_ms, first_ms + unit_s * 1000 - 1
