"""This rank's GPT against transformers, on the same weights: dense, and packed as serving does it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from megatron_distkv.attention import ForwardContext, build_metadata, forward_context
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.kvcache.rblock_pool import RBlockPool
from megatron_distkv.model import GPT, TensorParallel
from megatron_distkv.model.gpt import TORCH_DTYPES
from megatron_distkv.model.parallel import gather_vocabulary
from megatron_distkv.rblock import LocalSpan, Span

N = 8
# Requests as (tokens, scattered rBlocks); steps as (request, start, end): chunked prefill and decodes mixed.
LENGTHS = [37, 14, 50]
BLOCKS = [(9, 3, 14, 0, 7), (2, 11), (5, 1, 13, 4, 8, 6, 12)]
STEPS = [
    [(0, 0, 20), (1, 0, 12)],
    [(0, 20, 36), (1, 12, 13), (2, 0, 30)],
    [(0, 36, 37), (1, 13, 14), (2, 30, 48)],
    [(2, 48, 49)],
    [(2, 49, 50)],
]


@dataclass
class Slice:
    start: int
    end: int
    spans: list[Span]


class Errors(NamedTuple):
    """Largest absolute differences of logits, and the reference's largest logit."""

    dense: float
    packed: float
    largest_logit: float


@torch.no_grad()
def compare(module: Any, config: ModelConfig, parallel: TensorParallel, reference: Path) -> Errors:
    dtype = TORCH_DTYPES[config.dtype]
    hf = AutoModelForCausalLM.from_pretrained(reference, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, config.vocab_size, (n,), generator=generator) for n in LENGTHS]
    expected = [hf(text[None]).logits[0].float() for text in texts]
    ids = torch.stack([text[:14] for text in texts])
    dense = gather_vocabulary(module.eval()(ids, None, None))[..., : config.vocab_size].float()
    dense_error = max(float((dense[i] - expected[i][:14]).abs().max()) for i in range(3))
    pool = RBlockPool(16, config.num_layers, config.num_kv_heads // parallel.size, N, config.head_dim, dtype)
    gpt, packed_error = GPT(module, config), 0.0
    for step in STEPS:
        metadata = build_metadata([Slice(s, e, [LocalSpan(0, BLOCKS[r][: -(-e // N)])]) for r, s, e in step], N)
        tokens = torch.cat([texts[r][s:e] for r, s, e in step])
        with forward_context(ForwardContext(metadata, pool.tensor_BLK2ND)):
            logits = gpt(tokens, torch.arange(len(tokens))).float()
        wanted = torch.cat([expected[r][s:e] for r, s, e in step])
        packed_error = max(packed_error, float((logits - wanted).abs().max()))
    return Errors(dense_error, packed_error, max(float(x.abs().max()) for x in expected))
