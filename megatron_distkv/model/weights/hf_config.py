"""Hugging Face's config.json to a ModelConfig and back, as the model's family (families/) says."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_distkv.config.base import parse_config
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.families import Family, family_of, family_of_architecture, known_architectures, options_of

# What well-known others need beyond ours.
_LACKING = {
    "GemmaForCausalLM": "norms of 1 + weight without the norms after each part that Gemma 2 has",
    "Gemma3ForConditionalGeneration": "an image encoder (Gemma3ForCausalLM, its text part alone, is known)",
    "Qwen2MoeForCausalLM": "shared experts beside the routed ones",
    "DeepseekV3ForCausalLM": "latent attention and mixture-of-experts layers",
    "GPT2LMHeadModel": "learned positions, LayerNorm and biases",
    "Phi3ForCausalLM": "fused projections in Hugging Face's own layout",
}
# What a config.json may have no place for, and what others would then compute without a word.
_NOT_EVERYWHERE = ("qkv_bias", "qk_layernorm", "mixture", "rotary_percent")


def read_config(directory: Path) -> ModelConfig:
    """config.json as a ModelConfig; raises CheckpointError naming what this model needs and we lack."""
    path = directory / "config.json"
    values = _read(path)
    name = str((values.get("architectures") or ["(none)"])[0])
    family = family_of_architecture(name)
    if family is None:
        lacking = f": it needs {_LACKING[name]}" if name in _LACKING else ""
        known = ", ".join(known_architectures())
        raise CheckpointError(f"{path}: architecture {name} is not supported yet{lacking}; known: {known}")
    return _model(family, values, path)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} cannot be read: it holds no mapping of keys to values")
    return values


def _model(family: Family, values: Mapping[str, Any], path: Path) -> ModelConfig:
    named = {"family": family.name} if family.matches is None else {}
    return parse_config(ModelConfig, {**family.read(values, path), **named}, str(path))


def config_text(model: ModelConfig, path: Path) -> str:
    """What is to stand in the config.json at `path`, as transformers' own classes read it.

    Raises CheckpointError where the family's config.json cannot say what the model computes.
    """
    family = family_of(model)
    values = {"architectures": [family.architecture], "model_type": family.name, **family.write(model)}
    again = _model(family, values, path)
    lost = [key for key in _NOT_EVERYWHERE if getattr(again, key) != getattr(model, key)]
    if options_of(again, family.options) != options_of(model, family.options):
        lost.append("family_options")
    if _windows(again) != _windows(model):
        lost.append("sliding windows")
    if lost:
        raise CheckpointError(f"a {family.name} config.json has no place for this model's {', '.join(lost)}")
    return json.dumps(values, indent=2) + "\n"


def _windows(model: ModelConfig) -> list[int | None]:
    """By layer; one that is longer than any context is none."""
    windows = [model.window_of(layer) for layer in range(model.num_layers)]
    longest = model.max_context_tokens
    return [None if size is None or (longest and longest < size) else size for size in windows]
