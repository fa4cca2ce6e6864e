"""Decode and prefill over a pool in int8, against bf16 in the same rounds: the ratio is that of tokens per second."""

from collections.abc import Iterator
from functools import partial

import torch

from tools.bench.ceilings import Work, matrix_product, read_probe
from tools.bench.cpu_kernels.figure import CHECKED, Amount, Figure, Run
from tools.bench.rblock_sequence import LAYER, Sequence, Shape, cache_bytes
from tools.bench.reference_attention import attention_in_float64

TOLERANCE = 1e-2
Pool = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def int8(run: Run) -> Iterator[Figure]:
    """The ceiling is that of int8's bytes in decode, of bf16's products in prefill."""
    for group in (4, 1):
        case = Sequence(Shape(8, group, 128, torch.bfloat16), 32768, 1, cache_bytes() * 4)
        pool = case.int8_pool()
        probe = read_probe(pool[0], LAYER, case.ids, run.threads)
        yield _figure(run, "decode", case, pool, probe, Amount(case.bytes_read / 2 / 1e9, "GB/s"))
    for chunk in (2048, 8192):
        case = Sequence(Shape(2, 4, 128, torch.bfloat16), chunk, chunk)
        product, operations = matrix_product(torch.bfloat16)
        amount = Amount(2.0 * case.q[0].numel() * chunk * (chunk + 1) / 1e9, "GFLOP/s", operations / 1e9)
        yield _figure(run, "prefill", case, case.int8_pool(), product, amount)


def _figure(run: Run, kind: str, case: Sequence, pool: Pool, ceiling: Work, amount: Amount) -> Figure:
    rows = torch.arange(0, len(case.q), CHECKED)
    wanted, _ = attention_in_float64(case.q[rows], *case.dense_kv(), case.positions[rows], case.scale)
    error = float((case.attend_int8(pool)[0][rows] - wanted).norm() / wanted.norm())
    if not error <= TOLERANCE:
        raise SystemExit(f"wrong answer: int8 {kind}, error {error:.1e}")
    works: dict[str, Work] = {"ours": partial(case.attend_int8, pool), "ceiling": ceiling, "ours in bf16": case.attend}
    kv_heads, group = case.shape.kv_heads, case.shape.group
    work = f"{kind} int8 kv {kv_heads} group {group} D 128 context {case.num_keys}, error {error:.1e}"
    return run.figure(work, works, amount)
