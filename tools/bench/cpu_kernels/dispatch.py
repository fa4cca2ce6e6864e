"""What a decode call costs beside its work."""

import statistics
from collections.abc import Iterator

import torch

from megatron_distkv.ops import micro_attention_out
from tools.bench.cpu_kernels.figure import Figure, Run, device
from tools.bench.rblock_sequence import LAYER, SIZE, Sequence, Shape

CALLS = 2000
# What we allow it: microseconds.
CEILING_US = 3.0


def dispatch(run: Run) -> Iterator[Figure]:
    """One token, one key, one head."""
    case = Sequence(Shape(1, 1, 64, torch.bfloat16), SIZE, 1)
    case.positions = torch.zeros(1, dtype=torch.int64)
    out, lse = case.attend()
    indices = (case.ids, case.starts, case.cu_blocks, case.cu_queries, case.positions)

    def new_results() -> None:
        for _ in range(CALLS):
            case.attend()

    def results_at_hand() -> None:
        for _ in range(CALLS):
            micro_attention_out(case.q, case.pool, LAYER, *indices, case.scale, True, None, None, out, lse)

    times = run.times({"new results": new_results, "results at hand": results_at_hand})
    for name, took in times.items():
        value = statistics.median(took) / CALLS * 1e6
        work = f"dispatch of a decode call, {name}"
        yield Figure(work, device(), run.threads, value, "us", CEILING_US, CEILING_US / value, {})
