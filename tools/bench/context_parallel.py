"""Memory per rank and speed of context parallelism: a training step, and attention beside torch's own ring.

Every case runs in fresh processes (gloo, one thread each). Peaks are resident memory above what a warm process has.
The answer is checked first: what CP ranks compute must equal what one computes, and torch's ring what we do. More ranks
than cores share the cores: then only memory and CPU time tell something. "of torch ring": our CPU time and our peak,
each in shares of its.
usage: python -m tools.bench.context_parallel [--tokens 8192,16384] [--sizes 1,2,4] [--json FILE]
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

from tools.bench.context_ranks import SEED, Case, Measured, measure_rank
from tools.bench.machine import describe_machine

TOLERANCE = 1e-4
LIMIT_S = 1200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="8192,16384,32768,65536", help="sequence lengths")
    parser.add_argument("--sizes", default="1,2,4", help="ranks that share a sequence")
    parser.add_argument("--only", choices=("training step", "attention"), help="one kind of work")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--layers", type=int, default=1, help="of the GPT in the training step")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    shape = {"heads": args.heads, "kv_heads": args.kv_heads, "head_dim": args.head_dim, "num_layers": args.layers}
    print(describe_machine())
    print(f"{len(os.sched_getaffinity(0))} cores, seed {SEED}, fp32, gloo, {shape}")
    figures_of = f"{'peak MiB of a rank':>19} {'seconds':>8} {'CPU s':>8} {'of torch ring':>16}"
    print(f"{'work':14} {'tokens':>7} {'ranks':>5} {figures_of}")
    rows = []
    for what in ("training step", "attention"):
        if args.only in (None, what):
            for num_tokens in map(int, args.tokens.split(",")):
                sizes = [int(size) for size in args.sizes.split(",")]
                rows += compare([Case(what, num_tokens, size, **shape) for size in sizes])
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def compare(cases: list[Case]) -> list[dict[str, object]]:
    """The same work on more and more ranks; raises SystemExit for an answer that differs."""
    rows, first = [], None
    for case in cases:
        measured = run(case)
        first = first or measured[0].answers
        check(case, first, measured)
        row = {"work": case.what, "tokens": case.num_tokens, "ranks": case.size, **figures(measured)}
        if case.what == "attention":
            ring_case = Case(**{**vars(case), "what": "torch ring"})
            ring = run(ring_case)
            check(ring_case, first, ring)
            row["torch_ring"] = figures(ring)
        rows.append(row)
        show(row)
    return rows


def run(case: Case) -> list[Measured]:
    """Of each rank."""
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            spawn.Process(target=measure_rank, args=(rank, case, store, results), daemon=True)
            for rank in range(case.size)
        ]
        for process in ranks:
            process.start()
        measured = dict(results.get(timeout=LIMIT_S) for _ in ranks)
        for process in ranks:
            process.join()
    return [measured[rank] for rank in range(case.size)]


def check(case: Case, first: list[float], measured: list[Measured]) -> None:
    for mine in measured:
        worst = max(abs(x - y) / max(abs(y), 1e-3) for x, y in zip(mine.answers, first, strict=True))
        if worst > TOLERANCE:
            raise SystemExit(f"wrong answer: {case} differs by {worst:.1e} from one rank")


def figures(measured: list[Measured]) -> dict[str, float]:
    """Of the slowest and of the largest rank."""
    return {
        "peak_bytes": max(mine.peak_bytes for mine in measured),
        "seconds": round(max(mine.seconds for mine in measured), 3),
        "cpu_seconds": round(max(mine.cpu_seconds for mine in measured), 3),
    }


def show(row: dict[str, object]) -> None:
    ring = row.get("torch_ring")
    ratio = ""
    if isinstance(ring, dict):
        times, memory = (float(str(row[key])) / ring[key] for key in ("cpu_seconds", "peak_bytes"))
        ratio = f"{times:.2f} / {memory:.2f}"
    peak = int(str(row["peak_bytes"])) / 2**20
    times_s = f"{row['seconds']:>8} {row['cpu_seconds']:>8}"
    print(f"{row['work']:14} {row['tokens']:>7} {row['ranks']:>5} {peak:>19.0f} {times_s} {ratio:>16}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
