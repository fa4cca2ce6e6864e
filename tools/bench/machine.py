"""One line about the machine and the versions that a figure was measured with."""

import platform
from pathlib import Path

import torch


def describe_machine() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    cpu = f"{len(models)} x {models[0]}" if models else platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cpu}, {device}; Python {platform.python_version()}, torch {torch.__version__}"
