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

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.model.families import family_of
from megatron_distkv.model.parameter import Parameter, Split


def model_parameters(c: ModelConfig) -> Iterator[Parameter]:
    """All of them, from the embedding to the output layer."""
    parts = family_of(c).parts
    yield Parameter("embedding.word_embeddings.weight", (c.vocab_size, c.hidden_size), Split.VOCABULARY)
    for layer in range(c.num_layers):
        yield from parts.parameters(c, list(_layer(c, f"decoder.layers.{layer}.")))
    yield Parameter("decoder.final_layernorm.weight", (c.hidden_size,), Split.WHOLE)
    if not c.tie_embeddings:
        yield Parameter("output_layer.weight", (c.vocab_size, c.hidden_size), Split.VOCABULARY)


def _layer(c: ModelConfig, prefix: str) -> Iterator[Parameter]:
    h, queries = c.hidden_size, c.num_attention_heads * c.head_dim
    qkv = queries + 2 * c.num_kv_heads * c.head_dim
    attention, mlp = prefix + "self_attention.", prefix + "mlp."
    yield Parameter(prefix + "input_layernorm.weight", (h,), Split.WHOLE)
    yield Parameter(attention + "linear_qkv.weight", (qkv, h), Split.ROWS)
    if c.qkv_bias:
        yield Parameter(attention + "linear_qkv.bias", (qkv,), Split.ROWS)
    if c.qk_layernorm:
        yield Parameter(attention + "q_layernorm.weight", (c.head_dim,), Split.WHOLE)
        yield Parameter(attention + "k_layernorm.weight", (c.head_dim,), Split.WHOLE)
    yield Parameter(attention + "linear_proj.weight", (h, queries), Split.COLUMNS)
    yield Parameter(prefix + "pre_mlp_layernorm.weight", (h,), Split.WHOLE)
    if c.mixture is None:
        yield from _mlp(mlp, h, c.ffn_hidden_size)
        return
    yield Parameter(mlp + "router.weight", (c.mixture.num_experts, h), Split.WHOLE)
    for expert in range(c.mixture.num_experts):
        yield from _mlp(f"{mlp}experts.local_experts.{expert}.", h, c.mixture.ffn_hidden_size)


def _mlp(prefix: str, hidden_size: int, ffn_hidden_size: int) -> Iterator[Parameter]:
    yield Parameter(prefix + "linear_fc1.weight", (2 * ffn_hidden_size, hidden_size), Split.GATED)
    yield Parameter(prefix + "linear_fc2.weight", (hidden_size, ffn_hidden_size), Split.COLUMNS)
