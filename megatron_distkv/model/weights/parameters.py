"""Every parameter of a model under Megatron-core's names, and how tensor parallelism splits it.

This is the common tongue of all checkpoint formats: a format is read as *slices of whole parameters* (`source.py`), so
any source parallelism becomes any target parallelism without a copy of the model.

| Megatron-core      | whole                          | a rank holds                                   |
|--------------------|--------------------------------|------------------------------------------------|
| word_embeddings    | [vocabulary, hidden]           | rows; the last ranks' missing rows are zeros   |
| linear_qkv         | per KV head: [queries.. k v]   | the rows of its KV heads                       |
| linear_proj, fc2   | [hidden, in]                   | columns                                        |
| linear_fc1         | [gate; up]                     | [its rows of gate; its rows of up]             |
| norms, router      | [hidden], [experts, hidden]    | all                                            |

Experts are split like an MLP, each by itself: every rank holds a slice of every expert.
"""

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from megatron_distkv.config.model import ModelConfig


class Split(Enum):
    WHOLE = "whole"
    ROWS = "rows"
    COLUMNS = "columns"
    GATED = "gated"
    VOCABULARY = "vocabulary"


class Range(NamedTuple):
    """Indices `start .. end` along the split dimension of the whole parameter."""

    start: int
    end: int

    @property
    def extent(self) -> int:
        return self.end - self.start


class Parameter(NamedTuple):
    name: str
    shape: tuple[int, ...]
    split: Split

    @property
    def dim(self) -> int:
        """The dimension along which it is split, and read."""
        return 1 if self.split is Split.COLUMNS else 0

    @property
    def extent(self) -> int:
        return self.shape[self.dim]

    def shape_of(self, num_indices: int) -> tuple[int, ...]:
        """Shape of a slice of so many indices along the split dimension."""
        shape = list(self.shape)
        shape[self.dim] = num_indices
        return tuple(shape)

    def rank_extent(self, size: int) -> int:
        """Indices that each of `size` ranks holds, padding included."""
        if self.split is Split.WHOLE:
            return self.extent
        return -(-self.extent // size)

    def rank_ranges(self, rank: int, size: int) -> list[Range]:
        """What rank `rank` of `size` holds, in its order, padding not included."""
        if self.split is Split.WHOLE:
            return [Range(0, self.extent)]
        each = self.rank_extent(size)
        if self.split is Split.GATED:
            half = each // 2
            return [Range(x + rank * half, x + (rank + 1) * half) for x in (0, self.extent // 2)]
        return [Range(min(rank * each, self.extent), min((rank + 1) * each, self.extent))]


def model_parameters(c: ModelConfig) -> Iterator[Parameter]:
    """All of them, from the embedding to the output layer."""
    h, queries = c.hidden_size, c.num_attention_heads * c.head_dim
    qkv = queries + 2 * c.num_kv_heads * c.head_dim
    yield Parameter("embedding.word_embeddings.weight", (c.vocab_size, h), Split.VOCABULARY)
    for layer in range(c.num_layers):
        attention, mlp = f"decoder.layers.{layer}.self_attention.", f"decoder.layers.{layer}.mlp."
        yield Parameter(f"decoder.layers.{layer}.input_layernorm.weight", (h,), Split.WHOLE)
        yield Parameter(attention + "linear_qkv.weight", (qkv, h), Split.ROWS)
        if c.qkv_bias:
            yield Parameter(attention + "linear_qkv.bias", (qkv,), Split.ROWS)
        if c.qk_layernorm:
            yield Parameter(attention + "q_layernorm.weight", (c.head_dim,), Split.WHOLE)
            yield Parameter(attention + "k_layernorm.weight", (c.head_dim,), Split.WHOLE)
        yield Parameter(attention + "linear_proj.weight", (h, queries), Split.COLUMNS)
        if c.gemma is not None:
            yield Parameter(attention + "linear_proj.post_layernorm.weight", (h,), Split.WHOLE)
        yield Parameter(f"decoder.layers.{layer}.pre_mlp_layernorm.weight", (h,), Split.WHOLE)
        if c.mixture is None:
            yield from _mlp(mlp, h, c.ffn_hidden_size)
            if c.gemma is not None:
                yield Parameter(mlp + "linear_fc2.post_layernorm.weight", (h,), Split.WHOLE)
        else:
            yield Parameter(mlp + "router.weight", (c.mixture.num_experts, h), Split.WHOLE)
            for expert in range(c.mixture.num_experts):
                yield from _mlp(f"{mlp}experts.local_experts.{expert}.", h, c.mixture.ffn_hidden_size)
    yield Parameter("decoder.final_layernorm.weight", (h,), Split.WHOLE)
    if not c.tie_embeddings:
        yield Parameter("output_layer.weight", (c.vocab_size, h), Split.VOCABULARY)


def _mlp(prefix: str, hidden_size: int, ffn_hidden_size: int) -> Iterator[Parameter]:
    yield Parameter(prefix + "linear_fc1.weight", (2 * ffn_hidden_size, hidden_size), Split.GATED)
    yield Parameter(prefix + "linear_fc2.weight", (hidden_size, ffn_hidden_size), Split.COLUMNS)
