"""Command lines that start the parts of a pool."""

import contextlib
import random
import socket
import sys
from pathlib import Path
from typing import Literal

from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.errors import UserError

Launcher = Literal["deepspeed", "python"]


def instance_command(config: InstanceConfig, config_file: Path, launcher: Launcher) -> list[str]:
    """One serving instance from `config_file`; raises UserError for many ranks without the deepspeed launcher."""
    if launcher == "deepspeed":
        return [
            *deepspeed(config.tensor_parallel),
            str(Path(__file__).with_name("serve.py")),
            "--config",
            str(config_file),
        ]
    if config.tensor_parallel > 1:
        raise UserError("the python launcher starts one rank; tensor_parallel > 1 needs the deepspeed launcher")
    return [sys.executable, "-m", "megatron_distkv.launch.serve", "--config", str(config_file)]


def train_command(
    config_file: Path, output: Path, num_ranks: int, *, text: Path | None = None, resume: bool = False
) -> list[str]:
    """A training run of `num_ranks` ranks."""
    script = str(Path(__file__).with_name("train.py"))
    options = [*(["--text", str(text)] if text else []), *(["--resume"] if resume else [])]
    return [*deepspeed(num_ranks), script, "--config", str(config_file), "--output", str(output), *options]


def deepspeed(num_ranks: int) -> list[str]:
    """The deepspeed launcher on this host, on a port of its own, so that many jobs run side by side."""
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(num_ranks),
        "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--no_local_rank",
    ]  # fmt: skip


def free_port() -> int:
    """Outside of the range of outgoing connections: one of them might take it a moment later."""
    while True:
        port = random.randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def command_line(name: str, *arguments: str) -> list[str]:
    """A subcommand of `distkv`."""
    return [sys.executable, "-m", "megatron_distkv.cli.main", name, *arguments]
