"""What an rBlock's size costs: decode attention over scattered rBlocks, and moving them, by tokens per rBlock.

Every figure is checked against dense float64 attention first. Prints medians of several runs with their spread, as
ratios to reading (copying) the same bytes in one contiguous piece in the same run, because machines are noisy.
usage: python -m tools.bench.rblock_size [--context 16384] [--json FILE]
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_distkv.ops import backend_in_use, gather_rblocks, micro_attention
from tools.bench.machine import describe_machine

SIZES = (8, 16, 32, 64, 128, 256)
LAYERS, KV_HEADS, GROUP, HEAD_DIM, SEED, RUNS = 2, 8, 4, 128, 0, 9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=16384, help="tokens of the one sequence")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    print(describe_machine())
    print(f"backend {backend_in_use()}, fp32, context {args.context}, {KV_HEADS} KV heads, group {GROUP}, D {HEAD_DIM}")
    print(f"{'rBlock':>7} {'MiB/rBlock':>11} {'decode ms':>10} {'+-':>6} {'of copy':>8} {'gather of copy':>15}")
    rows = [measure(size, args.context) for size in SIZES]
    for row in rows:
        print(
            f"{row['rblock_size']:>7} {row['rblock_mib']:>11.2f} {row['decode_ms']:>10.2f} {row['decode_spread']:>6.0%}"
            f" {row['decode_share']:>8.2f} {row['gather_share']:>15.2f}"
        )
    if args.json is not None:
        args.json.write_text(
            json.dumps({"machine": describe_machine(), "context": args.context, "rows": rows}, indent=1)
        )
    return 0


def measure(size: int, context: int) -> dict[str, float]:
    count = context // size
    pool = torch.randn(count, LAYERS, KV_HEADS, 2, size, HEAD_DIM)
    ids = torch.randperm(count)
    q = torch.randn(1, KV_HEADS * GROUP, HEAD_DIM)
    ends = [torch.tensor([0, n]) for n in (count, 1)]
    position = torch.tensor([context - 1])

    def decode() -> torch.Tensor:
        starts = torch.arange(count) * size
        return micro_attention(q, pool, 1, ids, starts, *ends, position, HEAD_DIM**-0.5, causal=True)[0]

    check(decode(), q, pool[ids, 1])
    contiguous, copy = pool[:, 1].contiguous(), torch.empty_like(pool[:, 1])
    decode_s, spread = seconds(decode)
    copy_s, _ = seconds(lambda: copy.copy_(contiguous))
    half = ids[: count // 2]
    gather_s, _ = seconds(lambda: gather_rblocks(pool, half))
    whole, whole_copy = pool[: count // 2], torch.empty_like(pool[: count // 2])
    whole_s, _ = seconds(lambda: whole_copy.copy_(whole))
    return {
        "rblock_size": size,
        "rblock_mib": pool[0].numel() * 4 / 2**20,
        "decode_ms": decode_s * 1e3,
        "decode_spread": spread,
        "decode_share": copy_s / decode_s,
        "gather_share": whole_s / gather_s,
    }


def check(out: torch.Tensor, q: torch.Tensor, kv_MK2ND: torch.Tensor) -> None:
    """Against float64, from the definition."""
    k, v = (kv_MK2ND[:, :, part].transpose(0, 1).flatten(1, 2).double() for part in (0, 1))
    q_KGD = q.view(KV_HEADS, GROUP, HEAD_DIM).double()
    weights = (q_KGD @ k.transpose(1, 2) * HEAD_DIM**-0.5).softmax(-1)
    expected = (weights @ v).reshape_as(q)
    error = float((out.double() - expected).norm() / expected.norm())
    if error > 1e-5:
        raise SystemExit(f"wrong answer: relative error {error:.1e}")


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Median of several runs, and their spread (largest minus smallest, as a share of the median)."""
    work()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


if __name__ == "__main__":
    sys.exit(main())
