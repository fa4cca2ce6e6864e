"""Whether the parts of this package import here, tried in a process of its own: what breaks there takes nobody down."""

import json
import subprocess
import sys
from typing import NamedTuple

# What each kind of process imports; instances are started by DeepSpeed's launcher.
PARTS = {
    "serving": (
        "megatron_distkv.model",
        "megatron_distkv.engine.serving",
        "megatron_distkv.engine.worker",
        "deepspeed.launcher.launch",
    ),
    "gateway": ("megatron_distkv.server.app",),
    "training": ("megatron_distkv.training.train",),
}
# A cold file system takes half a minute for torch, Megatron and DeepSpeed.
TIMEOUT_S = 300

_CHILD = """
import importlib, json, os, sys, traceback
sys.path[:], parts = json.loads(sys.argv[1])
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for part, modules in parts.items():
    failure = None
    for module in modules:
        try:
            importlib.import_module(module)
        except BaseException as error:
            frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
            inner = [name for name in frames if name.startswith("megatron_distkv.")]
            words = (str(error).strip().splitlines() or [type(error).__name__])[0]
            failure = [inner[-1] if inner else module, words]
            break
    print(json.dumps([part, failure]), file=answer, flush=True)
os._exit(0)
"""


class Failure(NamedTuple):
    """`module`: the one of this package whose import statement failed."""

    module: str
    reason: str


def check_imports() -> dict[str, Failure | None]:
    """By part, what keeps it from being imported; None: nothing does."""
    command = [sys.executable, "-c", _CHILD, json.dumps([sys.path, PARTS])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        answers, ended = done.stdout, f"Python ended with status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        answers, ended = _text(error.stdout), f"not imported after {TIMEOUT_S} s"
    found = {part: failure and Failure(*failure) for part, failure in map(json.loads, answers.splitlines())}
    return {part: found[part] if part in found else Failure(modules[0], ended) for part, modules in PARTS.items()}


def _text(output: bytes | str | None) -> str:
    """What subprocess keeps of a process that it ended is bytes, whatever was asked for."""
    return output.decode() if isinstance(output, bytes) else output or ""
