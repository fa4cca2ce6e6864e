"""Prefill of one chunk: how many operations a second."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from tools.bench.ceilings import Work, matrix_product
from tools.bench.cpu_kernels.figure import CHECKED, DTYPE_NAMES, TOLERANCES, Amount, Figure, Run
from tools.bench.rblock_sequence import Sequence, Shape
from tools.bench.reference_attention import attention_in_float64, check

CASES = ((torch.bfloat16, 2048), (torch.bfloat16, 8192), (torch.float32, 2048))
KV_HEADS, GROUP, HEAD_DIM = 2, 4, 128


def prefill(run: Run) -> Iterator[Figure]:
    for dtype, chunk in CASES:
        work = f"prefill {DTYPE_NAMES[dtype]} kv {KV_HEADS} group {GROUP} D {HEAD_DIM} chunk {chunk}"
        yield _prefill(run, work, Sequence(Shape(KV_HEADS, GROUP, HEAD_DIM, dtype), chunk, chunk))


def _prefill(run: Run, work: str, case: Sequence) -> Figure:
    k, v = case.dense_kv()
    chunk, dtype = case.num_keys, case.shape.dtype
    rows = torch.arange(0, chunk, CHECKED)
    wanted = attention_in_float64(case.q[rows], k, v, rows, case.scale)
    out, lse = case.attend()
    check((out[rows], lse[rows]), wanted, TOLERANCES[dtype])
    q, wide_k, wide_v = case.q.transpose(0, 1)[None], *(x.repeat_interleave(GROUP, 1) for x in (k, v))
    product, operations = matrix_product(dtype)
    works: dict[str, Work] = {
        "ours": case.attend,
        "ceiling": product,
        "torch sdpa, dense KV": lambda: F.scaled_dot_product_attention(q, wide_k, wide_v, is_causal=True),
        **(run.peers(case.q, k, v, rows, wanted) if dtype is torch.bfloat16 else {}),
    }
    amount = 2.0 * HEAD_DIM * KV_HEADS * GROUP * chunk * (chunk + 1) / 1e9
    return run.figure(work, works, Amount(amount, "GFLOP/s", operations / 1e9))
