"""Activation checkpointing: the same gradients from less memory, over packed documents as well."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from megatron_distkv.attention import DistAttention
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.context_parallel import ContextShard, RingAttention, ZigzagLayout
from megatron_distkv.model import build_gpt, init_tensor_parallel
from megatron_distkv.training.recompute import recompute_layers

NUM_LAYERS, NUM_TOKENS = 4, 96
MODEL = ModelConfig(
    num_layers=NUM_LAYERS, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_kv_heads=2, head_dim=8,
    vocab_size=64,
)  # fmt: skip


@contextmanager
def counted_bytes() -> Iterator[dict[int, int]]:
    """What autograd keeps, by storage, without the parameters."""
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.nn.Parameter) and x.grad_fn is not None:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield kept


def trained_once(shard: ContextShard | None, *, recompute: bool) -> tuple[int, list[torch.Tensor]]:
    """(bytes that the forward pass leaves for the backward pass, gradients)"""
    torch.manual_seed(0)
    gpt = build_gpt(MODEL, init_tensor_parallel(1), init_std=0.1)
    for module in gpt.modules():
        if isinstance(module, DistAttention) and shard is not None:
            module.sequence_attention = RingAttention(shard)
    if recompute:
        recompute_layers(gpt)
    ids = torch.randint(64, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    with counted_bytes() as kept:
        loss = gpt(ids, None, None, labels=ids.roll(-1, 1)).mean()
    held = sum(kept.values())
    loss.backward()
    return held, [p.grad for p in gpt.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "shard", [None, ContextShard(ZigzagLayout(NUM_TOKENS, 1, (0, 30, 31)))], ids=["plain", "packed"]
)
def test_recomputed_layers_have_the_same_gradients_from_less_memory(shard: ContextShard | None) -> None:
    whole, wanted = trained_once(shard, recompute=False)
    less, gradients = trained_once(shard, recompute=True)
    assert len(gradients) == len(wanted) > 0
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients, wanted, strict=True))
    # Then a layer keeps its input only: the rest is the head's
    inputs = NUM_LAYERS * NUM_TOKENS * MODEL.hidden_size * 4
    assert less < whole / 3
    assert less > inputs / 2


def test_without_gradients_nothing_is_kept() -> None:
    gpt = build_gpt(MODEL, init_tensor_parallel(1), init_std=0.1)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with torch.no_grad():
        before = gpt(ids, None, None)
        recompute_layers(gpt)
        assert gpt(ids, None, None).equal(before)
