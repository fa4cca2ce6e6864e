"""Everything that waits for a GPU, in one command: speed against the limits, then conformance of all GPU backends.

Needs torch, Triton and pytest, no network and no install: `python tools/gpu_check.py` in a checkout. Every answer is
checked before it is timed. After each work `gpu_check.json` and `gpu_check.md` are written anew into --out
(tools/bench/results), so stopping it loses nothing; it stops by itself after --minutes. Works and tests have processes
of their own: one that crashes, hangs or runs out of memory is reported, and the rest goes on.
Ends with 1 where ours is wrong or fails, 0 else, also where time ran out (the report says what did not run).
`--dry-run` goes the same way on a CPU under Triton's interpreter, with sizes and figures that mean nothing.
usage: python tools/gpu_check.py [--out FOLDER] [--minutes 8] [--dry-run]
"""

import argparse
import os
import platform
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.gpu.conformance import conformance  # noqa: E402
from tools.gpu.report import HEAD, Report  # noqa: E402
from tools.gpu.works import measure  # noqa: E402

# Backends over libraries, where they are here: one that is wrong is reported and left out, ours must be right.
LIBRARIES = ("flash_attn", "flashinfer")
# Of the time: what works may take before conformance begins, and what ours may take of the rest before the libraries.
SHARE_OF_WORKS, SHARE_OF_OURS = 0.55, 0.8
MARGIN_S = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "tools/bench/results", help="a folder")
    parser.add_argument("--minutes", type=float, default=8.0, help="how long it may take (8)")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the processes of works end with it
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
    report = Report(args.out, machine)
    libraries = [name for name in LIBRARIES if name in backends_here()]
    end = began + max(0.0, args.minutes * 60 - MARGIN_S)
    print("\n".join(HEAD), flush=True)
    options = [*["--dry-run"] * args.dry_run, "--libraries", *libraries]
    measure(report, work_names(args.dry_run), options, began + SHARE_OF_WORKS * (end - began))
    check(report, libraries, args.dry_run, end)
    print(f"took {time.monotonic() - began:.0f} s; wrote {args.out / 'gpu_check.md'}", flush=True)
    return 1 if report.faults else 0


def check(report: Report, libraries: list[str], is_dry: bool, end: float) -> None:
    """Whether a library is right decides nothing about us: only its verdict is told."""
    now = time.monotonic()
    deadlines = {"ours": now + SHARE_OF_OURS * (end - now), **dict.fromkeys(libraries, end)}
    for backend, deadline in deadlines.items():
        if time.monotonic() >= deadline:
            report.add_not_run(f"conformance of {backend}")
            continue
        tests = " and ".join(f"not {name}" for name in LIBRARIES) if backend == "ours" else backend
        if is_dry:
            tests = "triton and (merge_of_many or packed)" if backend == "ours" else f"{backend} and full_rblocks"
        verdict = conformance(backend, tests, report.out, deadline)
        report.add_conformance(backend, verdict.told)
        if backend == "ours" and not verdict.is_right:
            report.add_fault("conformance of ours")


def backends_here() -> tuple[str, ...]:
    from tools import kernels_only

    kernels_only.make_importable()
    from megatron_distkv.ops import available_backends

    return available_backends()


def work_names(is_dry: bool) -> list[str]:
    from tools.bench.gpu_attention import DRY, ON_A_GPU, works_of

    return [name for name, _ in works_of(DRY if is_dry else ON_A_GPU)]


if __name__ == "__main__":
    sys.exit(main())
