"""An environment of another Python, made as the Makefile makes `.venv`, with this checkout installed in it.

usage: python -m tools.nightly.environment PYTHON VENV
One that is there already is used again: where another checkout is installed in it, this one takes its place.
"""

import subprocess
import sys
from pathlib import Path

from tools.nightly.lane import ROOT
from tools.wheel_check import TORCH


def main() -> int:
    python, venv = Path(sys.argv[1]), Path(sys.argv[2])
    inside = venv / "bin" / "python"
    pip = [inside, "-m", "pip", "install", "--quiet"]
    if not inside.exists():
        _run([python, "-m", "venv", venv])
        _run([*pip, "--upgrade", "pip"])
        _run([*pip, TORCH])
        _run([*pip, "ninja", "numpy", "-e", ".[dev]"])
    elif _installed_from(inside) != ROOT:
        _run([*pip, "--no-deps", "-e", "."])
    _run([inside, "-m", "pip", "list"])
    return 0


def _run(command: list[str | Path]) -> None:
    subprocess.run(command, cwd=ROOT, check=True)


def _installed_from(python: Path) -> Path | None:
    code = "import megatron_distkv; print(megatron_distkv.__path__[0])"
    done = subprocess.run([python, "-c", code], cwd="/", capture_output=True, text=True, check=False)
    return Path(done.stdout.strip()).parent if done.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(main())
