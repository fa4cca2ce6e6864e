"""Shape of a model, in Megatron-core's words. Read from a checkpoint, or given for training."""

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_distkv.config.base import FrozenConfig


class ModelConfig(FrozenConfig):
    """A Llama-style GPT: RMSNorm, SwiGLU, grouped-query attention, rotary or no position embedding, no biases."""

    num_layers: int = Field(ge=1)
    """Transformer layers."""
    hidden_size: int = Field(ge=1)
    """Width of the residual stream."""
    ffn_hidden_size: int = Field(ge=1)
    """Width of SwiGLU's gate and up projections."""
    num_attention_heads: int = Field(ge=1)
    """Query heads."""
    num_kv_heads: int = Field(ge=1)
    """KV heads (Megatron: query groups): equal to the query heads for MHA, 1 for MQA."""
    head_dim: int = Field(ge=1)
    """Dims per head (Megatron: kv_channels)."""
    vocab_size: int = Field(ge=1)
    """Rows of the embedding that mean a token."""
    rotary_percent: float = Field(1.0, ge=0.0, le=1.0)
    """Share of each head's dims that RoPE rotates; 0 is no position embedding at all."""
    rotary_base: float = Field(10000.0, gt=0)
    """RoPE's theta."""
    norm_epsilon: float = Field(1e-5, gt=0)
    """RMSNorm's epsilon."""
    tie_embeddings: bool = False
    """The output layer uses the embedding's weights."""
    max_context_tokens: int | None = Field(None, ge=1)
    """The longest context that the model is said to understand; None: no limit of its own."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of weights, activations and KV."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Any:
        if self.num_attention_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_kv_heads"
                f" ({self.num_kv_heads})"
            )
        return self

    def kv_bytes_per_token(self) -> int:
        """K and V of all layers, over all tensor-parallel ranks."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * (4 if self.dtype == "fp32" else 2)
