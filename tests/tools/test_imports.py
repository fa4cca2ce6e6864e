"""Every tool can be started: nothing that it imports has moved away."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORT_ALL = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"


def test_every_tool_finds_what_it_imports() -> None:
    files = [file.relative_to(ROOT) for file in (ROOT / "tools").rglob("*.py") if file.stem != "__main__"]
    names = sorted(".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files)
    assert "tools.demo.main" in names
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_ALL, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
