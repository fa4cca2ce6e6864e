"""An attention layer of Megatron's with its gradients, over the ranks of a layout."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_distkv.config.train import TrainConfig
from megatron_distkv.context_parallel import ContextShard, RingAttention, ZigzagLayout
from megatron_distkv.model import build_gpt, init_tensor_parallel
from megatron_distkv.model.gpt import TORCH_DTYPES
from megatron_distkv.training.deepspeed_engine import init_distributed

# Documents of one token, of many, and over the ends of chunks; a length that two ranks cannot cut in four equal parts.
NUM_TOKENS, NUM_ROWS, STARTS = 53, 2, (0, 1, 9, 26, 27)


class Given(NamedTuple):
    x_TBh: torch.Tensor
    d_out_TBh: torch.Tensor


def given(hidden_size: int, dtype: torch.dtype) -> Given:
    rng = torch.Generator().manual_seed(3)
    shape = (NUM_TOKENS, NUM_ROWS, hidden_size)
    return Given(*(torch.randn(shape, generator=rng).to(dtype) for _ in range(2)))


def run_attention(config: TrainConfig, output: Path, _: str | None) -> None:
    """Writes initial-R.pt and gradients-R.pt of tensor-parallel rank R, and out-G.pt of each rank G."""
    init_distributed()
    output.mkdir(parents=True, exist_ok=True)
    parallel = init_tensor_parallel(config.tensor_parallel, config.context_parallel)
    torch.manual_seed(0)
    gpt = build_gpt(config.model, parallel, init_std=0.1)
    layer = gpt.decoder.layers[0].self_attention
    shard = _shard(config.context_parallel)
    layer.core_attention.sequence_attention = RingAttention(shard)

    # Data-parallel ranks share rows, a context group tokens.
    size = parallel_state.get_data_parallel_world_size()
    rows = torch.arange(parallel_state.get_data_parallel_rank(), NUM_ROWS, size)
    tokens = shard.tokens
    x, d_out = (each[tokens][:, rows] for each in given(config.model.hidden_size, TORCH_DTYPES[config.model.dtype]))
    out, _bias = layer(x.requires_grad_(), None)
    out.backward(d_out)

    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in gpt.named_parameters()}
    for gradient in gradients.values():
        dist.all_reduce(gradient, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        rank = parallel_state.get_tensor_model_parallel_rank()
        torch.save(dict(gpt.named_parameters()), output / f"initial-{rank}.pt")
        torch.save(gradients, output / f"gradients-{rank}.pt")
    found = {"tokens": tokens, "rows": rows, "out": out.detach(), "d_x": x.grad}
    torch.save(found, output / f"out-{dist.get_rank()}.pt")
    dist.barrier()


def _shard(size: int) -> ContextShard:
    layout = ZigzagLayout(NUM_TOKENS, size, STARTS)
    if size == 1:
        return ContextShard(layout)
    return ContextShard(layout, parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_group())
