"""Everything that waits for a GPU, in one command: conformance of all GPU backends, then speed against the limits.

Needs torch, Triton and pytest, no network and no install: `python tools/gpu_check.py` in a checkout. Writes
`gpu_check.json` and `gpu_check.md` into --out (tools/bench/results). Ends with 1 where a backend is wrong.
`--dry-run` goes the same way on a CPU under Triton's interpreter, with sizes and figures that mean nothing.
usage: python tools/gpu_check.py [--out FOLDER] [--dry-run]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Backends over libraries, where they are here: one that is wrong is reported and left out, ours must be right.
LIBRARIES = ("flash_attn", "flashinfer")
CONFORMANCE = ["tests/ops/test_conformance.py", "tests/ops/test_micro_attention.py", "tests/ops/test_tile_backward.py"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "tools/bench/results", help="a folder")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch
    import triton

    if not args.dry_run and not torch.cuda.is_available():
        print("error: torch sees no GPU here; --dry-run goes the same way on a CPU", file=sys.stderr)
        return 2
    gpu = "none" if args.dry_run else torch.cuda.get_device_name()
    machine = f"{gpu}; Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}"
    print(machine, flush=True)
    libraries = [name for name in LIBRARIES if name in backends_here()]
    conforms = {name: run_conformance(name, args.dry_run) for name in ("ours", *libraries)}
    if conforms["ours"]:
        report(args.out, machine, [name for name in libraries if conforms[name]], args.dry_run)
    return 0 if all(conforms.values()) else 1


def backends_here() -> tuple[str, ...]:
    from tools import kernels_only

    kernels_only.make_importable()
    from megatron_distkv.ops import available_backends

    return available_backends()


def run_conformance(backend: str, is_dry: bool) -> bool:
    """The suite, in a process of its own: an illegal access on a GPU ends the process."""
    began = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tools.kernels_only",
        "--confcutdir",
        "tests/ops",
        *CONFORMANCE,
    ]
    tests = " and ".join(f"not {name}" for name in LIBRARIES) if backend == "ours" else backend
    dry = "triton and merge" if backend == "ours" else f"{backend} and full_rblocks"
    conforms = subprocess.run([*command, "-k", dry if is_dry else tests], cwd=ROOT).returncode == 0
    print(
        f"conformance of {backend}: {'passed' if conforms else 'FAILED'}, {time.monotonic() - began:.0f} s", flush=True
    )
    return conforms


def report(out: Path, machine: str, libraries: list[str], is_dry: bool) -> None:
    from megatron_distkv.ops import use_backend
    from tools.bench.gpu_attention import DRY, ON_A_GPU, GpuBench

    use_backend("triton")
    bench = GpuBench("cpu" if is_dry else "cuda", DRY if is_dry else ON_A_GPU, libraries)
    lines = ["| work | measured | limit | share | spread | peers (times as fast as) |", "|---|---|---|---|---|---|"]
    print("\n".join(lines))
    rows = []
    for row in bench.figures():
        rows.append(row._asdict())
        peers = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row.peers.items()) or "-"
        measured, limit = (f"{value:.1f} {row.unit}" for value in (row.value, row.ceiling))
        lines.append(f"| {row.work} | {measured} | {limit} | {row.share:.2f} | {row.spread:.0%} | {peers} |")
        print(lines[-1], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu_check.json").write_text(json.dumps({"machine": machine, "figures": rows}, indent=1) + "\n")
    head = (
        f"# Kernels on a GPU\n\n{machine}. bf16, 8 KV heads, group 4, head dim 128, rBlocks of 64, seed 0; medians.\n"
    )
    (out / "gpu_check.md").write_text(head + "\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
