"""Shape of a model, in Megatron-core's words. Read from a checkpoint, or given for training."""

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_distkv.config.base import FrozenConfig


class RopeScaling(FrozenConfig):
    """How RoPE's frequencies are stretched for contexts longer than those of pre-training."""

    kind: Literal["linear", "llama3", "yarn"]
    """linear: all alike. llama3, yarn: low frequencies fully, high ones not at all, a ramp between."""
    factor: float = Field(gt=0)
    """Low frequencies are divided by this."""
    original_context_tokens: int = Field(8192, ge=1)
    """The context of pre-training; the ramps are placed by it."""
    low_freq_factor: float = Field(1.0, gt=0)
    """llama3: waves longer than the original context over this are stretched fully ..."""
    high_freq_factor: float = Field(4.0, gt=0)
    """... and waves shorter than the original context over this, not at all."""
    beta_fast: float = Field(32.0, gt=0)
    """yarn: dims that turn more often than this in the original context are not stretched ..."""
    beta_slow: float = Field(1.0, gt=0)
    """... and dims that turn less often than this, fully."""
    truncate: bool = True
    """yarn: the ramp begins and ends at whole dims."""
    attention_factor: float = Field(1.0, gt=0)
    """yarn: cos and sin are multiplied by this, and so the scores by its square."""

    @model_validator(mode="after")
    def _ramp_rises(self) -> Any:
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be larger than low_freq_factor")
        return self


class MixtureConfig(FrozenConfig):
    """A mixture of experts in place of every layer's MLP (no dense layers, no shared experts)."""

    num_experts: int = Field(ge=1)
    """Experts per layer."""
    experts_per_token: int = Field(ge=1)
    """The router's best experts compute a token."""
    ffn_hidden_size: int = Field(ge=1)
    """Width of an expert's gate and up projections."""
    normalize_weights: bool = True
    """The chosen experts' weights sum to 1; else they are their shares among all experts."""

    @model_validator(mode="after")
    def _enough(self) -> Any:
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token ({self.experts_per_token}) must not exceed num_experts ({self.num_experts})"
            )
        return self


class ModelConfig(FrozenConfig):
    """A Llama-style GPT: RMSNorm, a gated MLP, grouped-query attention, rotary or no position embedding."""

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
    mixture: MixtureConfig | None = None
    """Mixture-of-experts layers; None: one dense MLP per layer."""
    rotary_percent: float = Field(1.0, ge=0.0, le=1.0)
    """Share of each head's dims that RoPE rotates; 0 is no position embedding at all."""
    rotary_base: float = Field(10000.0, gt=0)
    """RoPE's theta."""
    rope_scaling: RopeScaling | None = None
    """Stretched frequencies; None: as they are."""
    qkv_bias: bool = False
    """Queries, keys and values have a bias (Qwen2)."""
    qk_layernorm: bool = False
    """Each head's queries and keys are RMS-normalised before RoPE (Qwen3)."""
    sliding_window: int | None = Field(None, ge=1)
    """A token sees no more than this many of the last ones, itself included; None: all."""
    windowed_layers: tuple[bool, ...] | None = None
    """Which layers have the sliding window, one entry a layer; None: all, if there is a window."""
    family: str | None = None
    """Whose layers these are, where the other keys do not tell: a name of model/families. None: they do."""
    family_options: dict[str, Any] = Field({})
    """What that family alone has, by keys of its own: `options` in its file."""
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
        if self.windowed_layers is not None and len(self.windowed_layers) != self.num_layers:
            raise ValueError(f"windowed_layers has {len(self.windowed_layers)} entries for {self.num_layers} layers")
        return self

    def window_of(self, layer: int) -> int | None:
        """The sliding window of layer 0, 1 ..."""
        if self.sliding_window is None or (self.windowed_layers is not None and not self.windowed_layers[layer]):
            return None
        return self.sliding_window

    @property
    def mlp_hidden_size(self) -> int:
        """Width of the MLPs that there are: an expert's, or the dense one's."""
        return self.ffn_hidden_size if self.mixture is None else self.mixture.ffn_hidden_size
