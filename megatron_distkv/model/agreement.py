"""Do two checkpoints compute the same? Logits of given prompts, and how far they are apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_distkv.attention import ForwardContext, build_metadata, forward_context
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError, UserError
from megatron_distkv.kvcache.rblock_pool import RBlockPool
from megatron_distkv.model.gpt import GPT, TORCH_DTYPES, build_gpt
from megatron_distkv.model.parallel import TensorParallel
from megatron_distkv.model.weights import Checkpoint, CheckpointFormat, load_weights
from megatron_distkv.rblock import LocalSpan, Span, num_rblocks_for

RBLOCK_SIZE = 64


@dataclass(frozen=True)
class Agreement:
    """Of one prompt's logits, token by token; errors are relative: L2 of the difference over L2 of the reference."""

    max_error_T: torch.Tensor
    """Largest absolute difference of any logit."""
    relative_error_T: torch.Tensor
    same_top1_T: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.max_error_T)

    @property
    def max_error(self) -> float:
        return float(self.max_error_T.max())

    @property
    def relative_error(self) -> float:
        return float(self.relative_error_T.max())

    @property
    def num_same_top1(self) -> int:
        return int(self.same_top1_T.sum())

    def first_beyond(self, tolerance: float) -> int | None:
        """The first position whose relative error is larger (or no number). None: all agree."""
        beyond = (~(self.relative_error_T <= tolerance)).nonzero()
        return int(beyond[0]) if len(beyond) else None


def compare_logits(reference_TV: torch.Tensor, other_TV: torch.Tensor) -> Agreement:
    """Both `[T, vocabulary]`, compared in float64."""
    reference, difference = reference_TV.double(), (other_TV.double() - reference_TV.double())
    norm = reference.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    return Agreement(
        difference.abs().amax(dim=-1),
        difference.norm(dim=-1) / norm,
        reference_TV.argmax(dim=-1) == other_TV.argmax(dim=-1),
    )


def our_logits(
    checkpoint: Checkpoint, dtype: str, prompts: Sequence[list[int]], parallel: TensorParallel
) -> list[torch.Tensor]:
    """`[T, vocabulary]` fp32 per prompt, computed as serving computes them: packed, over rBlocks."""
    model = checkpoint.model.model_copy(update={"dtype": dtype})
    module = build_gpt(model, parallel)
    load_weights(module, checkpoint, model)
    gpt = GPT(module, model)
    return [_paged_logits(gpt, model, prompt, parallel).float() for prompt in prompts]


@dataclass
class _WholePrompt:
    end: int
    spans: list[Span]
    start: int = 0


def _paged_logits(gpt: GPT, model: ModelConfig, prompt: list[int], parallel: TensorParallel) -> torch.Tensor:
    num_rblocks = num_rblocks_for(len(prompt), RBLOCK_SIZE)
    pool = RBlockPool(
        num_rblocks,
        model.num_layers,
        model.num_kv_heads // parallel.size,
        RBLOCK_SIZE,
        model.head_dim,
        TORCH_DTYPES[model.dtype],
    )
    slices = [_WholePrompt(len(prompt), [LocalSpan(0, tuple(range(num_rblocks)))])]
    with forward_context(ForwardContext(build_metadata(slices, RBLOCK_SIZE), pool.tensor_BLK2ND)):
        return gpt(torch.tensor(prompt), torch.arange(len(prompt)))


@torch.inference_mode()
def transformers_logits(checkpoint: Checkpoint, dtype: str, prompts: Sequence[list[int]]) -> list[torch.Tensor]:
    """The same by Hugging Face's own code; raises UserError when it is not installed or cannot load the directory."""
    if checkpoint.format is not CheckpointFormat.HF:
        raise UserError(f"transformers reads no {checkpoint.format.value} checkpoints: {checkpoint.directory}")
    model = _pretrained(checkpoint, dtype)
    return [model(torch.tensor([prompt])).logits[0].float() for prompt in prompts]


def _pretrained(checkpoint: Checkpoint, dtype: str) -> Any:
    try:
        from transformers import AutoModelForCausalLM, __version__
        from transformers.utils import logging
    except ImportError:
        raise UserError(
            "transformers, the reference for Hugging Face checkpoints, is not here: pip install it"
        ) from None
    logging.disable_progress_bar()
    try:
        # Only this directory, only transformers' own classes, only safetensors.
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.directory,
            **{"torch_dtype" if __version__.startswith("4.") else "dtype": TORCH_DTYPES[dtype]},
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"transformers cannot load {checkpoint.directory}: {reason}") from None
    return model.eval()
