"""Parts of a pool run with what a chaos run injects, and without it as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_distkv.transport import PROTOCOL_VERSION
from tools.bench.chaos import seam

SAYS_VERSION = "from megatron_distkv.transport import handshake; print(handshake.PROTOCOL_VERSION)"


def said(code: str, env: dict[str, str]) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_a_child_speaks_another_version_in_all_its_modules(tmp_path: Path) -> None:
    changed = seam.environment("tools.bench.chaos.other_version", tmp_path / "seam")
    assert said(SAYS_VERSION, changed) == str(PROTOCOL_VERSION + 1)
    assert said(SAYS_VERSION, {}) == str(PROTOCOL_VERSION)


@pytest.mark.parametrize("name", ["leak", "scaled_partials"])
def test_what_is_injected_finds_its_place(name: str, tmp_path: Path) -> None:
    """Else a change of the product would make the tool blind in silence."""
    module = f"tools.bench.chaos.{name}"
    code = (
        f"import importlib, {module} as injected\n"
        "for name in injected.PATCHES: importlib.import_module(name)\n"
        "print('patched')"
    )
    assert said(code, seam.environment(module, tmp_path / "seam")) == "patched"
