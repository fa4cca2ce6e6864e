"""What a family of models is: all that is special about it, so that nothing else has to know it by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from megatron_distkv.config.base import FrozenConfig, parse_config
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.model.megatron_gpt import LocalLayer, MegatronGPT
from megatron_distkv.model.parameter import Parameter

TensorNames: TypeAlias = Mapping[str, tuple[str, ...]]
"""Megatron-core's name of a parameter to Hugging Face's names of the tensors that make it up, both without `.weight`
or `.bias`: three for linear_qkv, two for linear_fc1, else one. `*` is a number, of a layer or an expert."""


@dataclass(frozen=True)
class Parts:
    """What a family's layers have that Megatron's do not, with the fields of ModelConfig alone. By default: nothing."""

    settings: Callable[[ModelConfig], dict[str, Any]] = lambda model: {}
    """Keywords of Megatron's TransformerConfig."""
    change_layer: Callable[[LocalLayer, ModelConfig, int], None] = lambda layer, model, number: None
    """Exchanges parts of layer 0, 1 ... in place. `attention.core_attention` is a partial of DistAttention, whose
    `rotary`, `window` and `soft_cap` may be bound anew."""
    last_norm: type[torch.nn.Module] | None = None
    """The norm after the last layer; None: Megatron's RMSNorm."""
    change_model: Callable[[MegatronGPT, ModelConfig, torch.dtype], None] = lambda gpt, model, dtype: None
    """Changes the built model in place, before its weights are in it; `dtype` is that of its activations."""
    parameters: Callable[[ModelConfig, list[Parameter]], list[Parameter]] = lambda model, layer: layer
    """One layer's parameters under Megatron's names, from those that ModelConfig's fields bring."""
    megatron_args: Mapping[str, Any] = field(default_factory=dict)
    """What Megatron-LM's args must say of these layers, so that others who read them compute nothing else."""


@dataclass(frozen=True)
class Family:
    name: str
    """`model_type` in config.json, and the family's name everywhere."""
    architecture: str
    """The class of transformers in config.json's `architectures`."""
    read: Callable[[Mapping[str, Any], Path], dict[str, Any]]
    """config.json's values to those of a ModelConfig (without `family`); raises CheckpointError, with the file in
    front, for what cannot be computed."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """The way back (without `architectures` and `model_type`). What it cannot say needs no check: what is written is
    read again before it counts."""
    tensor_names: TensorNames
    matches: Callable[[ModelConfig], bool] | None = None
    """For families whose layers are Megatron's own: whether ModelConfig's fields mean this one, and no other that is
    here. None, for all new ones: fields do not tell it, so `ModelConfig.family` and Megatron's args name it."""
    options: type[FrozenConfig] = FrozenConfig
    """What `ModelConfig.family_options` holds; FrozenConfig itself has no keys."""
    parts: Parts = Parts()


OptionsT = TypeVar("OptionsT", bound=FrozenConfig)


def options_of(model: ModelConfig, kind: type[OptionsT]) -> OptionsT:
    """`model.family_options`, typed; raises ConfigError, one sentence."""
    return parse_config(kind, model.family_options, "model.family_options")
