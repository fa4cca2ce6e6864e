"""One rank of tools/bench/context_parallel.py: what it computes, how long it takes and how much memory it needs."""

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_distkv.attention import DistAttention
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.context_parallel import ContextShard, RingAttention, ZigzagLayout, ring_attention

SEED = 0


@dataclass(frozen=True)
class Case:
    """`what`: a training step of a GPT, or attention forward and backward, by us or by torch's ring."""

    what: str
    num_tokens: int
    size: int
    heads: int
    kv_heads: int
    head_dim: int
    num_layers: int

    @property
    def layout(self) -> ZigzagLayout:
        return ZigzagLayout(self.num_tokens, self.size)


class Measured(NamedTuple):
    """`answers` are numbers that do not depend on how many ranks computed them."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    answers: list[float]


def measure_rank(rank: int, case: Case, store: str, results: Any) -> None:
    """The body of a process."""
    warnings.filterwarnings("ignore")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=case.size)
    prepare = {"training step": _training_step, "attention": _attention, "torch ring": _torch_ring}[case.what]
    _prepared(prepare, case, rank, num_tokens=64)()  # what is loaded or started once is no cost of the work
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    work = _prepared(prepare, case, rank, num_tokens=case.num_tokens)
    dist.barrier()
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    sums = work()
    seconds, cpu_seconds = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    peak = _status("VmHWM") - before
    results.put((rank, Measured(seconds, cpu_seconds, peak, _answers(sums))))
    dist.barrier()
    dist.destroy_process_group()


Work = Callable[[], list[torch.Tensor]]


def _prepared(prepare: Callable[[Case, ContextShard], Work], case: Case, rank: int, num_tokens: int) -> Work:
    layout = ZigzagLayout(num_tokens, case.size)
    return prepare(case, ContextShard(layout, rank, dist.group.WORLD))


def _answers(sums: list[torch.Tensor]) -> list[float]:
    """Norms of what all ranks have together: whole sums where each has a part."""
    numbers = []
    for part in sums:
        total = part.detach().double()
        dist.all_reduce(total)
        numbers.append(float(total.norm()))
    return numbers


def _training_step(case: Case, shard: ContextShard) -> Work:
    """Sums: the loss, and every weight's gradient."""
    from megatron_distkv.model import build_gpt, init_tensor_parallel

    parallel = init_tensor_parallel(1, case.size)
    torch.manual_seed(SEED)
    hidden = case.heads * case.head_dim
    model = ModelConfig(
        num_layers=case.num_layers, hidden_size=hidden, ffn_hidden_size=2 * hidden, num_attention_heads=case.heads,
        num_kv_heads=case.kv_heads, head_dim=case.head_dim, vocab_size=272,
    )  # fmt: skip
    gpt = build_gpt(model, parallel, init_std=0.05)
    for module in gpt.modules():
        if isinstance(module, DistAttention):
            module.sequence_attention = RingAttention(shard)
    ids = torch.randint(272, (1, shard.layout.num_tokens + 1), generator=torch.Generator().manual_seed(SEED))
    tokens = shard.tokens

    def work() -> list[torch.Tensor]:
        loss = gpt(ids[:, tokens], None, None, labels=ids[:, tokens + 1]).sum() / shard.layout.num_tokens
        loss.backward()
        return [loss, *(p.grad for p in gpt.parameters() if p.grad is not None)]

    return work


def _leaves(case: Case, shard: ContextShard) -> list[torch.Tensor]:
    """This rank's q, k, v and gradient of out, `[S, 1, heads, D]`; drawn rank after rank, the whole is never here."""
    tokens = shard.tokens
    shapes = [(case.heads, 0), (case.kv_heads, 1), (case.kv_heads, 2), (case.heads, 3)]
    # A cheap function of place and head, so that all numbers of ranks see the same sequence
    return [
        torch.sin(tokens[:, None, None, None] * 0.37 + torch.arange(n * case.head_dim).view(n, -1) * (1.1 + seed))
        for n, seed in shapes
    ]


def _attention(case: Case, shard: ContextShard) -> Work:
    q, k, v, d_out = _leaves(case, shard)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def work() -> list[torch.Tensor]:
        out = ring_attention(*leaves, shard, case.head_dim**-0.5)
        out.backward(d_out)
        return _summed(out, *(leaf.grad for leaf in leaves))

    return work


def _torch_ring(case: Case, shard: ContextShard) -> Work:
    """torch's templates of ring attention, zig-zag as ours; `context_parallel` itself does not know CPUs' kernels.

    The kernel wants as many KV heads as query heads: they are repeated.
    """
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    group = case.heads // case.kv_heads
    q, k, v, d_out = _leaves(case, shard)
    q, k, v, d_out = (x.permute(1, 2, 0, 3) for x in (q, k, v, d_out))
    scale = case.head_dim**-0.5

    def backward(query: Any, key: Any, value: Any, out: Any, logsumexp: Any, is_causal: bool, **rest: Any) -> Any:
        return flash_backward(
            rest["grad_out"], query, key, value, out, logsumexp, 0.0, is_causal, scale=scale
        )  # fmt: skip

    def work() -> list[torch.Tensor]:
        wide_k, wide_v = (x.repeat_interleave(group, 1) for x in (k, v))
        out, lse, *_ = ring._templated_ring_attention(
            shard.cp_group, 2, flash, q, wide_k, wide_v, is_causal=True, dropout_p=0.0, scale=scale
        )
        gradients = ring._templated_ring_attention_backward(
            shard.cp_group, 2, backward, d_out, "grad_out", q, wide_k, wide_v, out, lse, True
        )[:3]
        d_k, d_v = (x.unflatten(1, (-1, group)).sum(2) for x in gradients[1:])
        return _summed(*(x.permute(2, 0, 1, 3) for x in (out, gradients[0], d_k, d_v)))

    return work


def _summed(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """Over tokens, as absolute values: numbers that any sharding must reach, and no cancellation hides errors in."""
    return [x.detach().abs().sum(0) for x in tensors if x is not None]


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
