"""Hugging Face checkpoints in safetensors, one or many files: only slices are read, whole files are written.

| Hugging Face                       | Megatron-core                     |
|------------------------------------|-----------------------------------|
| q_proj, k_proj, v_proj             | linear_qkv: per KV head [q.. k v] |
| o_proj                             | linear_proj                       |
| gate_proj, up_proj                 | linear_fc1: [gate; up]            |
| down_proj                          | linear_fc2                        |
| q_norm, k_norm                     | q_layernorm, k_layernorm          |
| Gemma: post_attention_layernorm    | linear_proj.post_layernorm        |
| Gemma: pre_feedforward_layernorm   | pre_mlp_layernorm                 |
| Gemma: post_feedforward_layernorm  | linear_fc2.post_layernorm         |
| Mixtral: w1, w3, w2                | an expert's gate, up, down        |
| embed_tokens, lm_head              | word_embeddings, output_layer     |
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.weights.parameters import Parameter, Range
from megatron_distkv.model.weights.source import require_weights

_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
}
_GEMMA_NAMES = {
    "self_attention.linear_proj.post_layernorm.weight": "post_attention_layernorm.weight",
    "pre_mlp_layernorm.weight": "pre_feedforward_layernorm.weight",
    "mlp.linear_fc2.post_layernorm.weight": "post_feedforward_layernorm.weight",
}


class Piece:
    """One Hugging Face tensor of a parameter: `name`, `[num_rows, ...]`."""

    def __init__(self, name: str, num_rows: int) -> None:
        self.name = name
        self.num_rows = num_rows


def pieces(parameter: Parameter, c: ModelConfig) -> list[Piece]:
    """The Hugging Face tensors that make up `parameter`: three for linear_qkv, two for linear_fc1, else one."""
    if parameter.name in _NAMES:
        return [Piece(_NAMES[parameter.name], parameter.shape[0])]
    _, _, layer, rest = parameter.name.split(".", 3)
    prefix = f"model.layers.{layer}."
    kind = rest.rsplit(".", 1)[-1]
    if rest.startswith("self_attention.linear_qkv"):
        rows = {"q": c.num_attention_heads * c.head_dim, "k": c.num_kv_heads * c.head_dim}
        return [Piece(f"{prefix}self_attn.{x}_proj.{kind}", rows["q" if x == "q" else "k"]) for x in "qkv"]
    if rest == "mlp.router.weight":
        return [Piece(f"{prefix}{_mixture_prefix(c)}gate.weight", parameter.shape[0])]
    mlp, names = "mlp.", ("gate_proj", "up_proj", "down_proj")
    if ".local_experts." in rest:
        mlp = f"{_mixture_prefix(c)}experts.{rest.split('.')[3]}."
        names = names if c.family == "qwen3_moe" else ("w1", "w3", "w2")
    if rest.endswith("linear_fc1.weight"):
        return [Piece(f"{prefix}{mlp}{x}.weight", parameter.shape[0] // 2) for x in names[:2]]
    if rest.endswith("linear_fc2.weight"):
        return [Piece(f"{prefix}{mlp}{names[2]}.weight", parameter.shape[0])]
    names_here = _LAYER_NAMES if c.gemma is None else {**_LAYER_NAMES, **_GEMMA_NAMES}
    return [Piece(prefix + names_here[rest], parameter.shape[0])]


def _mixture_prefix(c: ModelConfig) -> str:
    return "mlp." if c.family == "qwen3_moe" else "block_sparse_moe."


class HfSource:
    """The safetensors files below `directory`."""

    def __init__(self, directory: Path, model: ModelConfig) -> None:
        self._model = model
        self._files = _Files(directory)

    def read(self, parameter: Parameter, wanted: Range) -> torch.Tensor:
        found = pieces(parameter, self._model)
        if len(found) == 3:
            return self._qkv(found, parameter, wanted)
        if len(found) == 2:
            return self._gated(found, parameter, wanted)
        return self._files.read(found[0].name, parameter.shape, parameter.dim, wanted)

    def _qkv(self, found: list[Piece], parameter: Parameter, wanted: Range) -> torch.Tensor:
        """Rows of whole KV heads: each head's queries, its key, its value."""
        num_heads = self._model.num_kv_heads
        rows_per_head = parameter.extent // num_heads
        first, last = wanted.start // rows_per_head, wanted.end // rows_per_head
        parts = []
        for piece in found:
            each = piece.num_rows // num_heads
            shape = (piece.num_rows, *parameter.shape[1:])
            rows = self._files.read(piece.name, shape, 0, Range(first * each, last * each))
            parts.append(rows.reshape(last - first, each, *parameter.shape[1:]))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def _gated(self, found: list[Piece], parameter: Parameter, wanted: Range) -> torch.Tensor:
        parts, begin = [], 0
        for piece in found:
            here = Range(max(wanted.start - begin, 0), min(wanted.end - begin, piece.num_rows))
            if here.start < here.end:
                parts.append(self._files.read(piece.name, (piece.num_rows, *parameter.shape[1:]), 0, here))
            begin += piece.num_rows
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Files:
    """The tensors of one or many safetensors files, by name; only slices are read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        index = directory / "model.safetensors.index.json"
        self._file_of: dict[str, str] = _read_index(index) if index.exists() else {}
        self._open = {name: _open(directory / name) for name in sorted(set(self._file_of.values()))}
        if not index.exists():
            self._open = {"model.safetensors": _open(directory / "model.safetensors")}
            self._file_of = dict.fromkeys(self._open["model.safetensors"].keys(), "model.safetensors")

    def read(self, name: str, shape: tuple[int, ...], dim: int, wanted: Range) -> torch.Tensor:
        """Rows (dim 0) or columns (dim 1) of tensor `name`, which must have `shape`."""
        if name not in self._file_of:
            raise CheckpointError(f"{self._directory}: the tensor {name} is missing")
        path = self._directory / self._file_of[name]
        try:
            handle = self._open[self._file_of[name]].get_slice(name)
            found = tuple(handle.get_shape())
            if found != shape:
                raise CheckpointError(f"{path}: the tensor {name} has shape {found}, the model needs {shape}")
            tensor: torch.Tensor = (
                handle[wanted.start : wanted.end] if dim == 0 else handle[:, wanted.start : wanted.end]
            )
        except SafetensorError as error:
            raise CheckpointError(f"{path}: the tensor {name} cannot be read: {error}") from None
        require_weights(tensor.dtype, path, name)
        return tensor


def _read_index(path: Path) -> dict[str, str]:
    try:
        return {str(name): Path(file).name for name, file in json.loads(path.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from None


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        others = sorted(x.name for pattern in ("*.bin", "*.gguf", "*.pth") for x in path.parent.glob(pattern))
        hint = f"; {others[0]} is not read: only safetensors are" if others and not path.exists() else ""
        raise CheckpointError(f"{path} cannot be read: {error}{hint}") from None
