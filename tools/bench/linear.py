"""Linear layers of serving (ops/linear.py) beside torch's, in bf16, for several numbers of rows.

Weights of many layers in turn, more than a cache holds, as a decode step reads them. Checked before anything is
reported: results against float64. The ceilings are measured in the same rounds: reading the weights for few rows,
torch's square product in fp32 for many.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron_distkv.kernels import cpu
from tqdm import tqdm

from megatron_distkv.ops import linear
from tools.bench.ceilings import Work, in_turn, matrix_product, median_ratio, read_probe
from tools.bench.machine import describe_machine

WEIGHT_BYTES = 128 << 20  # of all layers together
ALLOWED = 2.0**-8  # of a result rounded once to bf16, relative
ALLOWED_SUM = 2.0**-20  # of all magnitudes that are summed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 128])
    parser.add_argument("--inputs", type=int, default=1024)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--isa", help="instruction set of the C++ kernels (default: the best here)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    args = parser.parse_args()
    if args.isa and not cpu.use_instruction_set(args.isa):
        parser.error(f"this machine or build lacks {args.isa}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    report = _measure(args)
    print(report["machine"])
    print(", ".join(f"{name} {value}" for name, value in report["config"].items()))
    print(
        f"{'rows':>5} {'ms':>8} {'GB/s':>6} {'of read':>8} {'GFLOP/s':>8} {'of fp32 product':>16} {'times torch':>12}"
    )
    for row in report["rows"]:
        print(
            f"{row['rows']:5d} {row['ms']:8.3f} {row['gb_per_s']:6.1f} {row['of_read']:8.2f} {row['gflops']:8.1f} "
            f"{row['of_product']:16.2f} {row['times_torch']:12.2f}"
        )
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1))


@torch.inference_mode()
def _measure(args: argparse.Namespace) -> dict[str, Any]:
    num_layers = max(1, WEIGHT_BYTES // (2 * args.inputs * args.outputs))
    weights_LNK = torch.randn(num_layers, args.outputs, args.inputs).bfloat16()
    names = ("inputs", "outputs", "threads", "runs", "seed")
    return {
        "machine": describe_machine(),
        "config": {"isa": cpu.instruction_set(), **{name: getattr(args, name) for name in names}},
        "rows": [_row(args, weights_LNK, num_rows) for num_rows in tqdm(args.rows, "rows")],
    }


def _row(args: argparse.Namespace, weights_LNK: torch.Tensor, num_rows: int) -> dict[str, float]:
    x_MK = torch.randn(num_rows, args.inputs).bfloat16()
    _check(x_MK, weights_LNK[0])
    product, product_flops = matrix_product(torch.float32)
    pool = weights_LNK[:, None]  # as rBlocks of one layer
    works: dict[str, Work] = {
        "ours": partial(_all_layers, linear, x_MK, weights_LNK),
        "torch": partial(_all_layers, F.linear, x_MK, weights_LNK),
        "read": read_probe(pool, 0, torch.arange(len(pool)), args.threads),
        "product": product,
    }
    times = in_turn(works, args.threads, args.runs)
    weight_bytes, flops = weights_LNK.numel() * 2, 2.0 * num_rows * weights_LNK.numel()
    ours_s, product_s = statistics.median(times["ours"]), statistics.median(times["product"])
    return {
        "rows": num_rows,
        "ms": 1e3 * ours_s / len(weights_LNK),
        "gb_per_s": weight_bytes / ours_s / 1e9,
        "of_read": median_ratio(times["ours"], times["read"]),
        "gflops": flops / ours_s / 1e9,
        "of_product": flops / ours_s / (product_flops / product_s),
        "times_torch": median_ratio(times["ours"], times["torch"]),
    }


def _all_layers(multiply: Any, x_MK: torch.Tensor, weights_LNK: torch.Tensor) -> None:
    for w_NK in weights_LNK:
        multiply(x_MK, w_NK)


def _check(x_MK: torch.Tensor, w_NK: torch.Tensor) -> None:
    exact_MN = x_MK.double() @ w_NK.double().T
    allowed_MN = ALLOWED * exact_MN.abs() + ALLOWED_SUM * (x_MK.double().abs() @ w_NK.double().abs().T)
    if not bool(((linear(x_MK, w_NK).double() - exact_MN).abs() <= 1.01 * allowed_MN).all()):
        raise SystemExit(f"{len(x_MK)} rows: the results are wrong, nothing to report")


if __name__ == "__main__":
    main()
