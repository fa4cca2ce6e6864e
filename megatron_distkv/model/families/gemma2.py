"""Gemma 2: norms of 1 + weight, also after attention and MLP; a GELU gate, scaled embeddings, soft-capped scores and
logits, a scale of scores of its own, windows in every other layer.

The norms lie where NVIDIA's NeMo has them, so that names agree: `linear_proj.post_layernorm` and
`linear_fc2.post_layernorm`.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from pydantic import Field

from megatron_distkv.attention import RotaryConfig
from megatron_distkv.config.base import FrozenConfig, parse_config
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.config_json import (
    read_layer_types,
    read_shared,
    read_windows,
    write_layer_types,
    write_shared,
)
from megatron_distkv.model.families.family import Family, Parts, TensorNames, options_of
from megatron_distkv.model.families.llama import NAMES as LLAMA_NAMES
from megatron_distkv.model.families.registry import register
from megatron_distkv.model.megatron_gpt import LocalLayer, MegatronGPT
from megatron_distkv.model.parameter import Parameter, Split

ACTIVATION = ("hidden_activation", "gelu_pytorch_tanh")
NAMES: TensorNames = {
    **LLAMA_NAMES,
    "decoder.layers.*.self_attention.linear_proj.post_layernorm": ("model.layers.*.post_attention_layernorm",),
    "decoder.layers.*.pre_mlp_layernorm": ("model.layers.*.pre_feedforward_layernorm",),
    "decoder.layers.*.mlp.linear_fc2.post_layernorm": ("model.layers.*.post_feedforward_layernorm",),
}
# What transformers takes absent keys for.
_DEFAULTS_OF_ALL = {
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "head_dim": 256,
    "num_key_value_heads": 4,
}
_DEFAULTS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "max_position_embeddings": 8192}


class GemmaOptions(FrozenConfig):
    """`model.family_options` of Gemma 2 and 3."""

    score_scale_dims: float = Field(gt=0)
    """Scores are divided by the square root of this (query_pre_attn_scalar), not of head_dim."""
    score_soft_cap: float | None = Field(None, gt=0)
    """Scores x become cap * tanh(x / cap); None: as they are."""
    logit_soft_cap: float | None = Field(None, gt=0)
    """The same of the output's logits."""
    window_rotary_base: float | None = Field(None, gt=0)
    """RoPE's theta in layers with a sliding window, whose frequencies are not stretched; None: as in all layers."""


def completed(values: Mapping[str, Any], path: Path, defaults: Mapping[str, Any]) -> dict[str, Any]:
    if values.get("use_bidirectional_attention"):
        raise CheckpointError(f"{path}: use_bidirectional_attention is not supported; tokens see the past alone")
    return {**_DEFAULTS_OF_ALL, **defaults, **values}


def read_layers_with_window(values: Mapping[str, Any], *, every: int) -> dict[str, Any]:
    """By `layer_types`, or all but every so manieth. Kept where contexts are shorter: the base of RoPE goes by them."""
    layers = read_layer_types(values) or [number % every != 0 for number in range(1, values["num_hidden_layers"] + 1)]
    return read_windows(values.get("sliding_window", 4096), layers)


def read(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    values = completed(values, path, _DEFAULTS)
    options = {
        "score_scale_dims": values["query_pre_attn_scalar"],
        "score_soft_cap": values["attn_logit_softcapping"],
        "logit_soft_cap": values["final_logit_softcapping"],
    }
    return {
        **read_shared(values, path, activation=ACTIVATION),
        **read_layers_with_window(values, every=2),
        "family_options": parse_config(GemmaOptions, options, str(path)).model_dump(),
    }


def write(model: ModelConfig) -> dict[str, Any]:
    options = options_of(model, GemmaOptions)
    return {**write_gemma(model, options), "attn_logit_softcapping": options.score_soft_cap}


def write_gemma(model: ModelConfig, options: GemmaOptions) -> dict[str, Any]:
    """What Gemma 2 and 3 share."""
    scale = options.score_scale_dims
    return {
        **write_shared(model),
        "hidden_activation": ACTIVATION[1],
        "query_pre_attn_scalar": int(scale) if scale == int(scale) else scale,
        "final_logit_softcapping": options.logit_soft_cap,
        "sliding_window": model.sliding_window,
        "layer_types": write_layer_types(model),
    }


class Norm(torch.nn.Module):
    """RMSNorm times 1 + weight, in fp32; the weight is stored as it is in Gemma's checkpoints, around 0."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self._eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self._eps)
        return (normed * (1.0 + self.weight.float())).to(x.dtype)


class NormedRowParallelLinear(RowParallelLinear):
    """Its output is whole on every rank, so the norm after it needs no more communication."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = Norm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(input_)
        return self.post_layernorm(output), bias


def _settings(model: ModelConfig) -> dict[str, Any]:
    scale = options_of(model, GemmaOptions).score_scale_dims ** -0.5
    return {"activation_func": partial(F.gelu, approximate="tanh"), "softmax_scale": scale}


def _change_layer(layer: LocalLayer, model: ModelConfig, number: int) -> None:
    options, attention = options_of(model, GemmaOptions), layer.attention
    layer.parts.input_layernorm = layer.parts.pre_mlp_layernorm = Norm
    attention.linear_proj = layer.mlp.linear_fc2 = NormedRowParallelLinear
    if attention.q_layernorm not in (None, IdentityOp):
        attention.q_layernorm = attention.k_layernorm = Norm
    attention.core_attention = partial(attention.core_attention, soft_cap=options.score_soft_cap)
    if options.window_rotary_base and model.window_of(number) is not None:
        rotary = RotaryConfig(model.rotary_percent, options.window_rotary_base)
        attention.core_attention = partial(attention.core_attention, rotary=rotary)


def _scale_and_cap(gpt: MegatronGPT, model: ModelConfig, dtype: torch.dtype) -> None:
    """Hooks at both ends of the model, for serving and training alike."""
    scale = float(torch.tensor(model.hidden_size**0.5).to(dtype))  # rounded as Gemma's own code does
    gpt.embedding.register_forward_hook(lambda _, __, hidden: hidden * scale)
    cap = options_of(model, GemmaOptions).logit_soft_cap
    if cap is not None:
        gpt.output_layer.register_forward_hook(lambda _, __, out: (_capped(out[0], cap), out[1]))


def _capped(logits: torch.Tensor, cap: float) -> torch.Tensor:
    return (cap * torch.tanh(logits.float() / cap)).to(logits.dtype)


def _parameters(model: ModelConfig, layer: list[Parameter]) -> list[Parameter]:
    """With a norm behind attention's output projection and the MLP's."""
    found = []
    for parameter in layer:
        found.append(parameter)
        if parameter.name.endswith(("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")):
            name = parameter.name.removesuffix("weight") + "post_layernorm.weight"
            found.append(Parameter(name, (model.hidden_size,), Split.WHOLE))
    return found


PARTS = Parts(
    settings=_settings,
    change_layer=_change_layer,
    last_norm=Norm,
    change_model=_scale_and_cap,
    parameters=_parameters,
    megatron_args={"apply_layernorm_1p": True, "swiglu": False},
)

register(
    Family(
        name="gemma2",
        architecture="Gemma2ForCausalLM",
        read=read,
        write=write,
        tensor_names=NAMES,
        options=GemmaOptions,
        parts=PARTS,
    )
)
