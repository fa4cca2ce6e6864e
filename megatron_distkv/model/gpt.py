"""From a ModelConfig to Megatron-core's GPTModel, and its forward pass over a packed batch."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_distkv.config.instance import Layers
from megatron_distkv.config.model import MixtureConfig, ModelConfig
from megatron_distkv.errors import ConfigError
from megatron_distkv.log import get_logger
from megatron_distkv.model.families import family_of
from megatron_distkv.model.layer_spec import layers_of
from megatron_distkv.model.megatron_gpt import MegatronGPT, new_gpt
from megatron_distkv.model.parallel import TensorParallel, gather_vocabulary
from megatron_distkv.model.serving_layers import ServingLayers, can_walk, output_by_own_forward, output_product

logger = get_logger(__name__)
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_gpt(config: ModelConfig, parallel: TensorParallel, *, init_std: float | None = None) -> MegatronGPT:
    """This rank's part of the model, random (the same on every layout for one torch seed) with `init_std`.

    Without it, matrices are left as the memory was, for a checkpoint to fill: random ones cost time and memory.

    Raises ConfigError when heads or MLPs cannot be split over the ranks.
    """
    if config.num_kv_heads % parallel.size:
        raise ConfigError(
            f"tensor_parallel {parallel.size} does not divide the model's {config.num_kv_heads} KV heads; "
            f"use {math.gcd(config.num_kv_heads, parallel.size)}"
        )
    if config.mlp_hidden_size % parallel.size:
        raise ConfigError(
            f"tensor_parallel {parallel.size} does not divide the model's ffn_hidden_size {config.mlp_hidden_size}"
        )
    parts = family_of(config).parts
    gpt = new_gpt(
        _transformer_config(config, parallel, init_std),
        layers_of(config),
        last_norm=parts.last_norm,
        vocab_size=padded_vocab_size(config, parallel.size),
        max_context_tokens=config.max_context_tokens or 1,  # read by learned positions only
        tie_embeddings=config.tie_embeddings,
    )
    dtype = TORCH_DTYPES[config.dtype]
    parts.change_model(gpt, config, dtype)
    return gpt.to(dtype)  # params_dtype alone leaves the norms in fp32


def padded_vocab_size(config: ModelConfig, tensor_parallel: int) -> int:
    """Every rank holds the same number of rows."""
    return -(-config.vocab_size // tensor_parallel) * tensor_parallel


def _transformer_config(config: ModelConfig, parallel: TensorParallel, init_std: float | None) -> TransformerConfig:
    settings: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": config.qkv_bias,
        "qk_layernorm": config.qk_layernorm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": init_std or 0.0,
        "perform_initialization": init_std is not None,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "params_dtype": TORCH_DTYPES[config.dtype],
        "bf16": config.dtype == "bf16",
        "tensor_model_parallel_size": parallel.size,
        **({} if config.mixture is None else _mixture_settings(config.mixture, parallel)),
    }
    return TransformerConfig(**{**settings, **family_of(config).parts.settings(config)})


def _mixture_settings(mixture: MixtureConfig, parallel: TensorParallel) -> dict[str, Any]:
    return {
        "num_moe_experts": mixture.num_experts,
        "moe_router_topk": mixture.experts_per_token,
        "moe_ffn_hidden_size": mixture.ffn_hidden_size,
        "moe_router_pre_softmax": not mixture.normalize_weights,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "expert_tensor_parallel_size": parallel.size,
    }


class GPT:
    """The forward pass of serving: packed tokens in, logits of the wanted rows out, inside a forward context."""

    def __init__(self, gpt: MegatronGPT, config: ModelConfig, layers: Layers = "direct") -> None:
        """`layers`: whether the decoder is walked by ServingLayers or by Megatron's own forward."""
        self._gpt = gpt.eval()
        self._vocab_size = config.vocab_size
        tied = gpt.shared_embedding_or_output_weight() if config.tie_embeddings else None
        self._layers, self._output = self._megatrons, output_by_own_forward(gpt.output_layer, tied)
        if layers == "direct" and can_walk(gpt.decoder):
            self._layers, self._output = ServingLayers(gpt.decoder), output_product(gpt.output_layer, tied)
        elif layers == "direct":
            logger.info("layers: Megatron's own forward serves, as this family's are not all Megatron's")

    @torch.inference_mode()
    def __call__(self, ids_T: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
        """Logits `[R, vocabulary]`, on every rank. R = 0 still runs the layers: they write KV."""
        hidden_Th = self._layers(self._gpt.embedding(ids_T[None], None)[:, 0])
        return gather_vocabulary(self._output(hidden_Th[rows_R]))[:, : self._vocab_size]

    def _megatrons(self, hidden_Th: torch.Tensor) -> torch.Tensor:
        hidden_T1h: torch.Tensor = self._gpt.decoder(hidden_states=hidden_Th[:, None], attention_mask=None)
        return hidden_T1h[:, 0]
