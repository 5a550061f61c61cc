"""`python -m tests.budgets`: how large the parts are beside what they may be.

Lines are those of all files of a part that people write: code, scripts, templates, styles. What a reader cannot hold in
mind is a fault (a file, a function, the README), and gives 1; the size of a part is a goal, which people judge.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.servers import ROOT

MAX_FILE_LINES = 600
MAX_BODY_LINES = 40
MAX_README_BYTES = 12_000
_WRITTEN = frozenset({".py", ".lua", ".html", ".css"})
_WEB, _SANDBOX = Path("producer/web"), Path("worker/sandbox")
#: Lines that each part may have.
PARTS = {"worker": 5_000, "sandbox": 3_300, "producer": 4_300, "web": 2_400, "tests": 23_000}


class Row(NamedTuple):
    """A figure and its limit; ``is_hard``: nothing may be above it."""

    what: str
    value: int
    limit: int
    is_hard: bool = False


def files() -> list[Path]:
    """Every file that counts, from the root of the checkout."""
    folders = ("producer", "worker", "tests")
    return sorted(path.relative_to(ROOT) for each in folders for path in written(ROOT / each))


def written(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix in _WRITTEN)


def lines(source: Path) -> int:
    """How many lines a file has."""
    return len((ROOT / source).read_text("utf-8").splitlines())


def bodies(source: Path) -> Iterator[tuple[str, int]]:
    """Each function of a module, and how many lines its body has without its docstring."""
    for node in ast.walk(ast.parse((ROOT / source).read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
            if ast.get_docstring(node) is not None and len(body) > 1:
                body = body[1:]
            yield f"{source}:{node.lineno} {node.name}", (body[-1].end_lineno or 0) - body[0].lineno + 1


def part_of(source: Path) -> str:
    """The part that a file belongs to."""
    if _WEB in source.parents:
        return "web"
    return "sandbox" if _SANDBOX in source.parents else source.parts[0]


def table() -> list[Row]:
    """All figures."""
    sizes = {source: lines(source) for source in files()}
    counts = dict.fromkeys(PARTS, 0)
    for source, count in sizes.items():
        counts[part_of(source)] += count
    longest = max(sizes, key=lambda source: sizes[source])
    product = (source for source in sizes if source.suffix == ".py" and source.parts[0] != "tests")
    functions = (each for source in product for each in bodies(source))
    name, body = max(functions, key=lambda each: each[1])
    return [
        *(Row(part, counts[part], limit) for part, limit in PARTS.items()),
        Row(f"longest file: {longest}", sizes[longest], MAX_FILE_LINES, is_hard=True),
        Row(f"longest function of the product: {name}", body, MAX_BODY_LINES, is_hard=True),
        Row("README, bytes", (ROOT / "README.md").stat().st_size, MAX_README_BYTES, is_hard=True),
    ]


def main() -> int:
    """Print the table; gives 1 where a hard limit is passed."""
    rows = table()
    for row in rows:
        over = "" if row.value <= row.limit else "  TOO LARGE" if row.is_hard else f"  {row.value - row.limit:,} over"
        print(f"{row.value:>7,} of {row.limit:>6,}  {row.what}{over}")  # noqa: T201
    return int(any(row.is_hard and row.value > row.limit for row in rows))


if __name__ == "__main__":
    argparse.ArgumentParser("python -m tests.budgets", description=__doc__).parse_args()
    sys.exit(main())
