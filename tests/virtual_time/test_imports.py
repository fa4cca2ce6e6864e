"""What virtual time drives needs no tensors, sockets or threads; nobody but the clock knows the time."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import megatron_distkv

PACKAGE = Path(megatron_distkv.__file__).parent
DRIVEN = [
    "engine.admission", "engine.reporting", "engine.scheduler", "engine.unplaceable", "handover", "pool", "rmanager",
    "server.admission", "server.attempt", "server.capacity", "server.departures", "server.pool_view", "server.routing",
]  # fmt: skip
# Of threads they may know locks, which never wait for long, and the types of jobs that somebody else runs.
HARMLESS = {"threading": {"Lock", "RLock"}, "concurrent.futures": {"Executor", "Future"}}
# Where a process, or what stands for one, is put together: there the real clock is chosen, if nobody gives another.
COMPOSITION_ROOTS = {
    "cli/gateway.py", "engine/lender.py", "engine/rank.py", "ledger/memory_ledger.py", "ledger/opening.py",
}  # fmt: skip

LOOK = """
import importlib, json, sys, threading
for module in sys.argv[1:]:
    importlib.import_module(f"megatron_distkv.{module}")
print(json.dumps([sorted(sys.modules), threading.active_count()]))
"""


def look(*modules: str) -> tuple[list[str], int]:
    """What a process has imported after these, and how many threads run in it."""
    ran = subprocess.run([sys.executable, "-c", LOOK, *modules], capture_output=True, text=True, check=True)
    imported, num_threads = json.loads(ran.stdout)
    return imported, num_threads


def test_they_bring_no_tensors_sockets_or_threads() -> None:
    imported, num_threads = look(*DRIVEN)
    brought = {name.removeprefix("megatron_distkv.").partition(".")[0] for name in imported}
    # prometheus_client, which counts, imports sockets for servers that nobody starts: so of sockets those that are ours
    heavy = {"torch", "numpy", "asyncio", "redis", "transport", "attention", "ops", "model", "peers", "background"}
    assert not brought & (heavy | {"framing", "shortages"})
    assert num_threads == 1


def test_of_threads_they_know_locks_and_jobs_only() -> None:
    imported, _ = look(*DRIVEN)
    ours = [name for name in imported if name.startswith("megatron_distkv.")]
    found = {name: names for name in ours if (names := set(used_of_threads(source_of(name))))}
    assert "megatron_distkv.rmanager.lending" in found  # it sees them
    assert not {name: bad for name, names in found.items() if (bad := {x for x in names if not is_harmless(x)})}


def test_the_real_clock_is_chosen_in_composition_roots_only() -> None:
    named = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if path.name != "clock.py" and any(isinstance(x, ast.Name) and x.id == "SystemClock" for x in walk(path))
    }
    assert named == COMPOSITION_ROOTS


def source_of(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def walk(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


def used_of_threads(path: Path) -> Iterator[str]:
    for node in walk(path):
        if isinstance(node, ast.ImportFrom) and node.module in HARMLESS:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "threading":
            yield f"threading.{node.attr}"


def is_harmless(used: str) -> bool:
    module, _, name = used.rpartition(".")
    return name in HARMLESS[module]
