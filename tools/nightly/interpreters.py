"""Lanes on every other Python that pyproject.toml names and this machine has."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tools.nightly.lane import ROOT, Lane

INSTALL_TIMEOUT_S, TEST_TIMEOUT_S = 3600, 3600
# By name, what pytest runs: the rooms that touch Megatron, torch and asyncio most, a pool of processes, a training.
SUITES = {
    "model": ["tests/model", "tests/cli"],
    "engine": ["tests/engine"],
    "server": ["tests/server"],
    "pool": ["tests/e2e/test_walk.py"],
    "training": ["tests/training/test_killed.py", "tests/training/test_passkey.py", "tests/training/test_corpus.py"],
}


def interpreter_lanes(venvs: Path) -> Iterator[Lane]:
    """Environments lie in `venvs` as py312, py313; one that is there already is used again."""
    for minor, python in sorted(other_pythons(venvs).items()):
        name, venv = f"interpreters/{minor}", venvs / f"py{minor.replace('.', '')}"
        install = [sys.executable, "-m", "tools.nightly.environment", str(python), str(venv)]
        yield Lane(f"{name}/install", install, INSTALL_TIMEOUT_S)
        inside = str(venv / "bin" / "python")
        for suite, paths in SUITES.items():
            pytest = [inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
            yield Lane(f"{name}/{suite}", pytest, TEST_TIMEOUT_S, needs=f"{name}/install")
        exchange = [sys.executable, "-m", "tools.nightly.exchange", inside]
        yield Lane(f"{name}/checkpoints of each other", exchange, TEST_TIMEOUT_S, needs=f"{name}/install")


def other_pythons(venvs: Path) -> dict[str, Path]:
    """By minor version, as "3.12": those that are supported, but not the one that runs this."""
    mine = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = {}
    for minor in supported_minors():
        if minor == mine:
            continue
        candidates = [venvs / f"py{minor.replace('.', '')}" / "bin" / "python", *_installed(minor)]
        working = next((path for path in candidates if _is_python(path, minor)), None)
        if working is not None:
            found[minor] = working
    return found


def supported_minors() -> list[str]:
    """As the classifiers say."""
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    return [found[1] for line in classifiers if (found := re.fullmatch(r".* :: (3\.\d+)", line))]


def _installed(minor: str) -> Iterator[Path]:
    on_path = shutil.which(f"python{minor}")
    if on_path is not None:
        yield Path(on_path)
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    yield from sorted(pyenv.glob(f"{minor}.*/bin/python"), reverse=True)


def _is_python(path: Path, minor: str) -> bool:
    """pyenv leaves commands on the path that only say that they are not chosen."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    except OSError:
        return False
    return done.stdout.strip() == minor
