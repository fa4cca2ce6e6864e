"""What a run measures at intervals on text that it is not trained on. Every rank takes part: a pass has collectives."""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_distkv.context_parallel import ContextShard
from megatron_distkv.training.batch import MicroBatch
from megatron_distkv.training.packing import PackedDocuments
from megatron_distkv.training.passkey import Bytes
from megatron_distkv.training.recall import Model, num_inputs, recall

NUM_PROMPTS = 16
PROMPT_SEED = 20_000


class Ranks(Protocol):
    """What a measurement asks of the trainer."""

    engine: Model

    def set_attention(self, num_tokens: int, document_starts: tuple[int, ...], temperature: float) -> ContextShard: ...
    def weighted_loss(self, batch: MicroBatch) -> torch.Tensor: ...


# Of the trainer, the figures by name
Measure = Callable[[Ranks], dict[str, float]]


def measure_recall(held_out: Bytes, length: int) -> Measure:
    """Share of passkey prompts of `length` tokens that are answered right."""

    def measure(ranks: Ranks) -> dict[str, float]:
        shard = ranks.set_attention(num_inputs(length), (0,), 1.0)
        return {"recall": recall(ranks.engine, held_out, length, NUM_PROMPTS, PROMPT_SEED, shard)}

    return measure


def measure_loss(held_out: PackedDocuments, most_sequences: int) -> Measure:
    """Mean over the labels of the first held-out sequences."""

    def measure(ranks: Ranks) -> dict[str, float]:
        count = min(most_sequences, held_out.num_whole_sequences)
        num_targets = sum(held_out.num_targets(number) for number in range(count))
        size, rank = (
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_data_parallel_rank(),
        )
        total = torch.zeros(())
        for number in range(rank, -(-count // size) * size, size):
            loss = ranks.weighted_loss(held_out.sequence(number, num_targets))
            total += loss if number < count else 0.0  # ranks without one left keep the others company
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return {"held_out_loss": float(total)}

    return measure
