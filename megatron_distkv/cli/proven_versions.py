"""The versions that this package was proven with, by Python: pip's constraints files (configs/constraints)."""

import sys
from pathlib import Path

from megatron_distkv.cli.requirements import version_of
from megatron_distkv.config.shipped import SHIPPED

# Those whose releases have broken what builds on them; the rest of the files is for who wants the very same.
_WATCHED = ("torch", "megatron-core", "deepspeed", "transformers", "numpy")


def constraints_file() -> Path | None:
    """This Python's; None: nothing was proven on it."""
    path = SHIPPED / "constraints" / f"py{sys.version_info.major}{sys.version_info.minor}.txt"
    return path if path.is_file() else None


def read_constraints(path: Path) -> dict[str, str]:
    """Versions by name."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return dict(line.split("==", 1) for line in lines if "==" in line)


def what_would_work() -> str:
    """One clause: which of the installed versions are not the proven ones, and how to get those."""
    path = constraints_file()
    if path is None:
        known = ", ".join(sorted(f"3.{file.stem[3:]}" for file in (SHIPPED / "constraints").glob("py3*.txt")))
        return f"proven on Python {known or '3.11'}: use one of these"
    proven = read_constraints(path)
    here = {name: version for name in _WATCHED if (version := version_of(name)) is not None}
    others = [
        f"{name} {proven[name]} (here: {version})"
        for name, version in here.items()
        if name in proven and version.partition("+")[0] != proven[name]
    ]
    if not others:
        return "all versions are the proven ones: install this package again"
    names = " ".join(other.split()[0] for other in others)
    return f"proven with {', '.join(others)}: pip install -c {path} {names}"
