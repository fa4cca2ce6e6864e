"""Random Hugging Face Llamas, saved as a user would have them."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def save_llama(
    directory: Path, *, dtype: torch.dtype = torch.float32, shard: str = "5GB", seed: int = 0, **changes: Any
) -> Path:
    """Big weights, so that attention and RoPE really matter."""
    values: dict[str, Any] = {
        "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}, "tie_word_embeddings": False,
        "max_position_embeddings": 2048, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**values, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * 0.15 if parameter.dim() > 1 else 1 + 0.1 * noise)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    return directory
