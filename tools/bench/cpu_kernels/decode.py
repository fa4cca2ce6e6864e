"""Decode of one long sequence: how fast its KV is read."""

from collections.abc import Iterator

import torch

from tools.bench.ceilings import Work, read_probe
from tools.bench.cpu_kernels.figure import DTYPE_NAMES, TOLERANCES, Amount, Figure, Run
from tools.bench.rblock_sequence import LAYER, Sequence, Shape, cache_bytes
from tools.bench.reference_attention import attention_in_float64, check

USUAL, CONTEXT = Shape(8, 4, 128, torch.bfloat16), 32768
CASES = [
    (USUAL, CONTEXT),
    (USUAL, CONTEXT * 2),
    (USUAL._replace(group=8), CONTEXT),
    (USUAL._replace(group=1), CONTEXT),
    (USUAL._replace(kv_heads=1, group=8), CONTEXT * 8),
    (USUAL._replace(kv_heads=1, group=16), CONTEXT * 8),
    (USUAL._replace(dtype=torch.float32), CONTEXT),
]
torch_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def decode(run: Run) -> Iterator[Figure]:
    for shape, context in CASES:
        work = f"decode {DTYPE_NAMES[shape.dtype]} kv {shape.kv_heads} group {shape.group} D {shape.head_dim}"
        case = Sequence(shape, context, 1, cache_bytes() * 4)
        yield _decode(run, f"{work} context {context}", case, has_peer=shape == USUAL)


def _decode(run: Run, work: str, case: Sequence, *, has_peer: bool) -> Figure:
    k, v = case.dense_kv()
    wanted = attention_in_float64(case.q, k, v, case.positions, case.scale)
    check(case.attend(), wanted, TOLERANCES[k.dtype])
    folded = case.q.view(1, case.shape.kv_heads, case.shape.group, case.shape.head_dim)
    works: dict[str, Work] = {
        "ours": case.attend,
        "ceiling": read_probe(case.pool, LAYER, case.ids, run.threads),
        "torch flash, dense KV": lambda: torch_flash(folded, k, v),
        **(run.peers(case.q, k, v, torch.arange(1), wanted) if has_peer else {}),
    }
    return run.figure(work, works, Amount(case.bytes_read / 1e9, "GB/s"))
