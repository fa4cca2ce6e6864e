"""Packed sequences over one pool, as a forward step has them, and what attention over them is in float64."""

import random
from typing import NamedTuple

import torch

from megatron_distkv.ops import micro_attention, micro_attention_out, store_kv
from tests.ops.dense import dense_attention, relative_error

OUT_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
LSE_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.float16: 1e-4}
LAYER, LAYERS = 1, 2


def int64(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


class Sequence(NamedTuple):
    num_keys: int
    num_queries: int  # the last of them


class Case(NamedTuple):
    dtype: torch.dtype
    kv_heads: int
    group: int
    head_dim: int
    rblock_size: int
    sequences: list[Sequence]


class Batch:
    """Sequences scattered over one pool whose other slots hold NaN, as a broken request might have left there."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        torch.manual_seed(seed)
        rng = random.Random(seed)
        self.case, size = case, case.rblock_size
        counts = [-(-s.num_keys // size) for s in case.sequences]
        shape = (sum(counts) + 2, LAYERS, case.kv_heads, 2, size, case.head_dim)
        self.pool = torch.full(shape, float("nan")).to(case.dtype)
        free = rng.sample(range(shape[0]), shape[0])
        self.k, self.v, ids, starts = [], [], [], []
        for sequence, count in zip(case.sequences, counts, strict=True):
            mine = [free.pop() for _ in range(count)]
            k, v = torch.randn(2, sequence.num_keys, case.kv_heads, case.head_dim).to(case.dtype).unbind()
            slots = int64(*(mine[t // size] * size + t % size for t in range(sequence.num_keys)))
            store_kv(k, v, self.pool, LAYER, slots)
            self.k.append(k)
            self.v.append(v)
            ids.extend(mine)
            starts.extend(range(0, count * size, size))
        self.ids, self.starts = int64(*ids), int64(*starts)
        queries = [s.num_queries for s in case.sequences]
        self.cu_blocks = int64(0, *torch.tensor(counts).cumsum(0).tolist())
        self.cu_queries = int64(0, *torch.tensor(queries).cumsum(0).tolist())
        self.positions = torch.cat([torch.arange(s.num_keys - s.num_queries, s.num_keys) for s in case.sequences])
        # a view with other strides than its own, as Megatron's split of q, k and v gives
        heads = case.kv_heads * case.group
        self.q = torch.randn(sum(queries), heads + 2, case.head_dim).to(case.dtype)[:, 1:-1]
        self.scale = case.head_dim**-0.5

    def attend(
        self, causal: bool = True, window: int | None = None, soft_cap: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        indices = (self.ids, self.starts, self.cu_blocks, self.cu_queries, self.positions)
        return micro_attention(self.q, self.pool, LAYER, *indices, self.scale, causal, window=window, soft_cap=soft_cap)

    def attend_into(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        indices = (self.ids, self.starts, self.cu_blocks, self.cu_queries, self.positions)
        micro_attention_out(self.q, self.pool, LAYER, *indices, self.scale, True, None, None, out, lse)

    def expected(self, window: int | None = None, soft_cap: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """In float64."""
        parts = []
        for s, (k, v) in enumerate(zip(self.k, self.v, strict=True)):
            rows = slice(int(self.cu_queries[s]), int(self.cu_queries[s + 1]))
            parts.append(dense_attention(self.q[rows], k, v, self.positions[rows], self.scale, window, soft_cap))
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs), torch.cat(lses)

    def check(
        self, out: torch.Tensor, lse: torch.Tensor, window: int | None = None, soft_cap: float | None = None
    ) -> None:
        expected, expected_lse = self.expected(window, soft_cap)
        assert relative_error(out, expected) < OUT_LIMIT[self.case.dtype]
        torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=LSE_LIMIT[self.case.dtype])
