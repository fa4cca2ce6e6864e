"""The kernels against this machine's ceilings: decode, prefill, merge, store, moves, sampling, and what a call costs.

Every answer is checked against float64 first; a wrong one ends the run. rBlocks lie in random order in a pool of at
least four times the last-level cache; the ceiling is measured in turn with the work. Figures are medians; shares and
ratios are medians over the rounds. With one thread times are this thread's CPU time, with more they are wall time.
usage: python -m tools.bench.micro_attention [--threads 1] [--only decode] [--json FILE] [--vllm-python PATH]
"""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from megatron_distkv.kernels import cpu

from tools.bench.cpu_kernels.decode import decode
from tools.bench.cpu_kernels.dispatch import dispatch
from tools.bench.cpu_kernels.figure import Figure, Run, device
from tools.bench.cpu_kernels.int8 import int8
from tools.bench.cpu_kernels.moves import moves
from tools.bench.cpu_kernels.prefill import prefill
from tools.bench.cpu_kernels.sampling import sampling
from tools.bench.machine import describe_machine
from tools.bench.vllm_peer import VllmPeer

WORKS = {"decode": decode, "int8": int8, "prefill": prefill, "moves": moves, "dispatch": dispatch, "sampling": sampling}


def measure(run: Run, only: str | None) -> list[Figure]:
    """Every figure, printed as it comes."""
    figures = []
    for name, work in WORKS.items():
        if only in (None, name):
            for row in work(run):
                figures.append(row)
                peers = "  ".join(f"{ratio:.1f}x {peer}" for peer, ratio in row.peers.items())
                print(f"{row.work:48} {row.value:8.1f} {row.unit:8} of {row.ceiling:7.1f} = {row.share:4.2f}  {peers}")
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--only", choices=WORKS, help="one kind of work")
    parser.add_argument("--isa", help="an instruction set of the C++ kernels other than the best")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--vllm-python", type=Path, help="a Python with vLLM on CPU: its op is a peer in bf16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.isa and not cpu.use_instruction_set(args.isa):
        parser.error(f"no instruction set {args.isa} here")
    print(f"{describe_machine()}; {device()}")
    with VllmPeer(args.vllm_python, args.threads) if args.vllm_python else nullcontext() as vllm:
        figures = measure(Run(args.threads, args.runs, vllm), args.only)
    if args.json is not None:
        args.json.write_text(json.dumps([row._asdict() for row in figures], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
