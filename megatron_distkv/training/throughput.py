"""Tokens per second, and what share of the devices' best they are (MFU)."""

import time

import torch

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.model.gpt import TORCH_DTYPES

_PROBE_SIZE, _PROBE_RUNS = 512, 5
# Forward once, backward twice: each multiply-add of the forward pass costs 2 x 3 operations.
_PER_MULTIPLY_ADD = 6


def train_flops(model: ModelConfig, num_tokens: int, num_seen: int) -> float:
    """Operations that a training step of `num_tokens` needs; its queries see `num_seen` keys altogether.

    What is computed again (recompute) does not count, and the embedding is a table, not a product.
    """
    attention = model.num_attention_heads * model.head_dim
    kv = model.num_kv_heads * model.head_dim
    projections = model.hidden_size * (2 * attention + 2 * kv)
    experts = 1 if model.mixture is None else model.mixture.experts_per_token
    mlp = 3 * model.hidden_size * model.mlp_hidden_size * experts
    per_token = model.num_layers * (projections + mlp) + model.hidden_size * model.vocab_size
    return float(_PER_MULTIPLY_ADD * (per_token * num_tokens + model.num_layers * 2 * attention * num_seen))


def keys_seen(num_tokens: int, document_starts: tuple[int, ...]) -> int:
    """By all queries of a packed row together: each sees itself and what stands before it in its document."""
    ends = (*document_starts[1:], num_tokens)
    lengths = [end - start for start, end in zip(document_starts, ends, strict=True)]
    return sum(length * (length + 1) // 2 for length in lengths)


def measure_peak_flops(dtype: str) -> float:
    """Of this process's device, per second: the best of a few products of square matrices."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = _PROBE_SIZE if device == "cpu" else 16 * _PROBE_SIZE
    a, b = torch.ones(2, size, size, dtype=TORCH_DTYPES[dtype], device=device)
    best_s = min(_timed(a, b) for _ in range(_PROBE_RUNS))
    return 2.0 * size**3 / best_s


def _timed(a: torch.Tensor, b: torch.Tensor) -> float:
    start_s = time.perf_counter()
    product = a @ b
    float(product[0, 0])  # waits for the device
    return time.perf_counter() - start_s
