"""What attention on a GPU is measured with: sequences over scattered rBlocks, and their answers in float64."""

import torch

from megatron_distkv.ops import micro_attention, micro_attention_int8, micro_attention_out, quantize_rblocks

SIZE, SEED, GROUP, HEAD_DIM = 64, 0, 4, 128
TOLERANCE, LSE_TOLERANCE, GRADIENT_TOLERANCE = 4e-3, 1e-4, 1e-2
# int8 costs 9e-3 over all heads and up to 1.1e-2 in one of them, against the numbers before; our own rounding little.
INT8_TOLERANCE, INT8_LSE_TOLERANCE = 1.5e-2, 1e-2


class WrongAnswerError(Exception):
    """No speed is reported for a wrong answer."""


class Batch:
    """`batch` sequences of `context` tokens, the last `num_queries` of each as queries."""

    def __init__(self, kv_heads: int, context: int, batch: int, num_queries: int, device: str) -> None:
        torch.manual_seed(SEED)
        self.kv_heads, self.count, self.context, self.batch = kv_heads, context // SIZE, context, batch
        options = {"dtype": torch.bfloat16, "device": device}
        self.pool = torch.randn(batch * self.count + 1, 1, kv_heads, 2, SIZE, HEAD_DIM, **options)
        self.q = torch.randn(batch * num_queries, kv_heads * GROUP, HEAD_DIM, **options)
        self.ids = torch.randperm(len(self.pool), device=device)[: batch * self.count].contiguous()
        self.starts = (torch.arange(self.count, device=device) * SIZE).repeat(batch)
        self.cu_blocks = torch.arange(batch + 1, device=device) * self.count
        self.cu_queries = torch.arange(batch + 1, device=device) * num_queries
        self.positions = torch.arange(context - num_queries, context, device=device).repeat(batch)
        self.indices = (self.ids, self.starts, self.cu_blocks, self.cu_queries, self.positions)

    def attend(self) -> tuple[torch.Tensor, torch.Tensor]:
        return micro_attention(self.q, self.pool, 0, *self.indices, HEAD_DIM**-0.5, True)

    def attend_into(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        micro_attention_out(self.q, self.pool, 0, *self.indices, HEAD_DIM**-0.5, True, None, None, out, lse)

    def dense_kv(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`[batch, K, X, D]` each."""
        kv = self.pool[self.ids, 0].unflatten(0, (self.batch, self.count))
        k, v = (kv[:, :, :, part].transpose(1, 2).flatten(2, 3).contiguous() for part in (0, 1))
        return k, v

    def check(
        self,
        found: tuple[torch.Tensor, torch.Tensor],
        tolerance: float = TOLERANCE,
        lse_tolerance: float = LSE_TOLERANCE,
    ) -> None:
        """Some rows of the first and last sequence in float64."""
        per_sequence = len(self.q) // self.batch
        for s in {0, self.batch - 1}:
            kv = self.pool[self.ids[s * self.count : (s + 1) * self.count], 0]
            k, v = (kv[:, :, part].transpose(0, 1).flatten(1, 2) for part in (0, 1))
            rows = s * per_sequence + torch.arange(0, per_sequence, 97, device=k.device)
            for head in range(self.kv_heads):
                heads = slice(head * GROUP, (head + 1) * GROUP)
                scores = self.q[rows, heads].double() @ k[head].double().T * HEAD_DIM**-0.5
                is_future = torch.arange(self.context, device=k.device) > self.positions[rows, None, None]
                scores.masked_fill_(is_future, float("-inf"))
                wanted = scores.softmax(-1) @ v[head].double()
                same(found[0][rows, heads], wanted, tolerance)
                error = float((found[1][rows, heads].double() - scores.logsumexp(-1)).abs().max())
                if not error < lse_tolerance:
                    raise WrongAnswerError(f"LSE is off by {error:.1e}")


class Int8Batch:
    """The same sequences over int8 rBlocks, with their scales."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        # some rBlocks at a time: they are fp32 in between
        parts = [quantize_rblocks(part) for part in batch.pool.split(1 << 10)]
        self.rblocks = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]

    def attend(self) -> tuple[torch.Tensor, torch.Tensor]:
        pool, k_scales, v_scales = self.rblocks
        given = (pool, k_scales, v_scales, 0, *self.batch.indices)
        return micro_attention_int8(self.batch.q, *given, HEAD_DIM**-0.5, True)

    def check(self) -> None:
        self.batch.check(self.attend(), INT8_TOLERANCE, INT8_LSE_TOLERANCE)


def same(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    error = float(((found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
    if not error < tolerance:
        raise WrongAnswerError(f"relative error {error:.1e}, not below {tolerance:.0e}")
