"""Hugging Face Llama checkpoints in safetensors, one or many files: only this rank's slices are read.

| Hugging Face                       | Megatron-core                    | split over ranks              |
|------------------------------------|----------------------------------|-------------------------------|
| q_proj, k_proj, v_proj             | linear_qkv: per KV head [q.. k v] | by KV head                    |
| o_proj                             | linear_proj                      | by input column               |
| gate_proj, up_proj                 | linear_fc1: per rank [gate; up]  | by row                        |
| down_proj                          | linear_fc2                       | by input column               |
| embed_tokens, lm_head              | word_embeddings, output_layer    | by row, padded with zeros     |
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from safetensors import SafetensorError, safe_open

from megatron_distkv.config.base import parse_config
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError

_ARCHITECTURES = {"LlamaForCausalLM"}


def read_config(directory: Path) -> ModelConfig:
    """config.json as a ModelConfig; raises CheckpointError naming what this model needs and we lack."""
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    _require_known(values, path)
    rope = values.get("rope_parameters") or {}
    heads = values["num_attention_heads"]
    eos = values.get("eos_token_id")
    dtype = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    return parse_config(
        ModelConfig,
        {
            "num_layers": values["num_hidden_layers"],
            "hidden_size": values["hidden_size"],
            "ffn_hidden_size": values["intermediate_size"],
            "num_attention_heads": heads,
            "num_kv_heads": values.get("num_key_value_heads") or heads,
            "head_dim": values.get("head_dim") or values["hidden_size"] // heads,
            "vocab_size": values["vocab_size"],
            "rotary_percent": rope.get("partial_rotary_factor", values.get("partial_rotary_factor") or 1.0),
            "rotary_base": rope.get("rope_theta", values.get("rope_theta") or 10000.0),
            "norm_epsilon": values.get("rms_norm_eps", 1e-6),
            "tie_embeddings": bool(values.get("tie_word_embeddings")),
            "max_context_tokens": values.get("max_position_embeddings"),
            "dtype": "fp32" if dtype == "float32" else "bf16",
            "eos_token_ids": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        },
        str(path),
    )


def _require_known(values: dict[str, Any], path: Path) -> None:
    names = values.get("architectures") or ["(none)"]
    if names[0] not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise CheckpointError(f"{path}: architecture {names[0]} is not supported yet; known: {known}")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise CheckpointError(f"{path}: RoPE scaling {kind!r} is not supported yet; only unscaled RoPE is")
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key):
            raise CheckpointError(f"{path}: {key} is not supported yet; only layers without bias are")
    missing = [key for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size",
                               "intermediate_size") if key not in values]  # fmt: skip
    if missing:
        raise CheckpointError(f"{path}: the key {missing[0]!r} is missing")


class _Files:
    """The tensors of one or many safetensors files, by name; only slices are read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        index = directory / "model.safetensors.index.json"
        try:
            if index.exists():
                self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
                names = sorted(set(self._file_of.values()))
            else:
                names = ["model.safetensors"]
            self._open = {name: safe_open(directory / name, framework="pt") for name in names}
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"the safetensors files in {directory} cannot be read: {error}") from None
        if not index.exists():
            self._file_of = dict.fromkeys(self._open["model.safetensors"].keys(), "model.safetensors")

    def slice(self, name: str, shape: tuple[int, ...], dim: int, start: int, end: int) -> torch.Tensor:
        """Rows (dim 0) or columns (dim 1) `start .. end` of tensor `name`, which must have `shape`."""
        if name not in self._file_of:
            raise CheckpointError(f"{self._directory}: the tensor {name} is missing")
        path = self._directory / self._file_of[name]
        try:
            handle = self._open[self._file_of[name]].get_slice(name)
            found = tuple(handle.get_shape())
            if found != shape:
                raise CheckpointError(f"{path}: the tensor {name} has shape {found}, the model needs {shape}")
            return handle[start:end] if dim == 0 else handle[:, start:end]
        except SafetensorError as error:
            raise CheckpointError(f"{path}: the tensor {name} cannot be read: {error}") from None


def load(gpt: GPTModel, config: ModelConfig, directory: Path) -> None:
    """Copy this rank's slices into `gpt`."""
    rank, size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    parameters = dict(gpt.named_parameters())
    with torch.no_grad():
        for name, value in _slices(_Files(directory), config, rank, size):
            parameters.pop(name).copy_(value)
    if parameters:
        raise CheckpointError(f"{directory} has nothing for {', '.join(parameters)}")


def _slices(files: _Files, c: ModelConfig, rank: int, size: int) -> Iterator[tuple[str, torch.Tensor]]:
    h, f, hq, hk = c.hidden_size, c.ffn_hidden_size, c.num_attention_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def part(name: str, shape: tuple[int, ...], dim: int = 0) -> torch.Tensor:
        each = shape[dim] // size
        return files.slice(name, shape, dim, rank * each, (rank + 1) * each)

    def whole(name: str) -> torch.Tensor:
        return files.slice(name, (h,), 0, 0, h)

    yield "embedding.word_embeddings.weight", _vocabulary(files, "model.embed_tokens.weight", c, rank, size)
    for layer in range(c.num_layers):
        source, target = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        q, k, v = (
            part(f"{source}self_attn.{name}_proj.weight", (rows, h)) for name, rows in (("q", hq), ("k", hk), ("v", hk))
        )
        kv_heads = c.num_kv_heads // size
        qkv = torch.cat([x.view(kv_heads, -1, h) for x in (q, k, v)], dim=1).reshape(-1, h)
        gate, up = (part(f"{source}mlp.{name}_proj.weight", (f, h)) for name in ("gate", "up"))
        yield target + "self_attention.linear_qkv.weight", qkv
        yield target + "self_attention.linear_proj.weight", part(f"{source}self_attn.o_proj.weight", (h, hq), dim=1)
        yield target + "mlp.linear_fc1.weight", torch.cat((gate, up))
        yield target + "mlp.linear_fc2.weight", part(f"{source}mlp.down_proj.weight", (h, f), dim=1)
        yield target + "input_layernorm.weight", whole(f"{source}input_layernorm.weight")
        yield target + "pre_mlp_layernorm.weight", whole(f"{source}post_attention_layernorm.weight")
    yield "decoder.final_layernorm.weight", whole("model.norm.weight")
    if not c.tie_embeddings:
        yield "output_layer.weight", _vocabulary(files, "lm_head.weight", c, rank, size)


def _vocabulary(files: _Files, name: str, c: ModelConfig, rank: int, size: int) -> torch.Tensor:
    each = -(-c.vocab_size // size)
    start, end = min(rank * each, c.vocab_size), min((rank + 1) * each, c.vocab_size)
    rows = files.slice(name, (c.vocab_size, c.hidden_size), 0, start, end)
    return torch.cat((rows, rows.new_zeros(each - len(rows), c.hidden_size)))
