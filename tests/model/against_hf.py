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
    """Largest absolute differences of logits, and the reference's largest logit.

    `direct`: between the two ways in which serving computes layers, which give the same bits.
    """

    dense: float
    packed: float
    direct: float
    largest_logit: float


@torch.no_grad()
def compare(module: Any, config: ModelConfig, parallel: TensorParallel, reference: Path) -> Errors:
    hf = AutoModelForCausalLM.from_pretrained(reference, dtype=TORCH_DTYPES[config.dtype]).eval()
    texts = random_texts(config)
    expected = [hf(text[None]).logits[0].float() for text in texts]
    ids = torch.stack([text[:14] for text in texts])
    dense = gather_vocabulary(module.eval()(ids, None, None))[..., : config.vocab_size].float()
    dense_error = max(float((dense[i] - expected[i][:14]).abs().max()) for i in range(3))
    packed = packed_logits(GPT(module, config), config, parallel, texts)
    megatrons = packed_logits(GPT(module, config, "megatron"), config, parallel, texts)
    wanted = [torch.cat([expected[r][s:e] for r, s, e in step]) for step in STEPS]
    largest = max(float(x.abs().max()) for x in expected)
    return Errors(dense_error, largest_difference(packed, wanted), largest_difference(packed, megatrons), largest)


def random_texts(config: ModelConfig) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, config.vocab_size, (n,), generator=generator) for n in LENGTHS]


def packed_logits(
    gpt: GPT, config: ModelConfig, parallel: TensorParallel, texts: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Of each step's tokens, `[T, vocabulary]`, fp32."""
    kv_heads, dtype = config.num_kv_heads // parallel.size, TORCH_DTYPES[config.dtype]
    pool = RBlockPool(16, config.num_layers, kv_heads, N, config.head_dim, dtype)
    logits = []
    for step in STEPS:
        metadata = build_metadata([Slice(s, e, [LocalSpan(0, BLOCKS[r][: -(-e // N)])]) for r, s, e in step], N)
        tokens = torch.cat([texts[r][s:e] for r, s, e in step])
        with forward_context(ForwardContext(metadata, pool.tensor_BLK2ND)):
            logits.append(gpt(tokens, torch.arange(len(tokens))).float())
    return logits


def largest_difference(these: list[torch.Tensor], those: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(these, those, strict=True))
