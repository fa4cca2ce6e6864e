"""Decode over a pool in int8."""

from collections.abc import Iterator

import torch

from tools.bench.ceilings import Work, read_probe
from tools.bench.cpu_kernels.figure import Amount, Figure, Run
from tools.bench.rblock_sequence import LAYER, Sequence, Shape, cache_bytes
from tools.bench.wanted import attention_in_float64

TOLERANCE = 1e-2


def int8(run: Run) -> Iterator[Figure]:
    """Against bf16 in the same rounds: the ratio is that of tokens per second. The ceiling is that of int8's bytes."""
    case = Sequence(Shape(8, 4, 128, torch.bfloat16), 32768, 1, cache_bytes() * 4)
    pool = case.int8_pool()
    wanted, _ = attention_in_float64(case.q, *case.dense_kv(), case.positions, case.scale)
    error = float((case.attend_int8(pool)[0] - wanted).norm() / wanted.norm())
    if error > TOLERANCE:
        raise SystemExit(f"wrong answer: int8 decode, error {error:.1e}")
    works: dict[str, Work] = {
        "ours": lambda: case.attend_int8(pool),
        "ceiling": read_probe(pool[0], LAYER, case.ids, run.threads),
        "ours in bf16": case.attend,
    }
    work = f"decode int8 kv 8 group 4 D 128 context 32768, error {error:.1e}"
    yield run.figure(work, works, Amount(case.bytes_read / 2 / 1e9, "GB/s"))
