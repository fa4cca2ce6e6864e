"""Megatron's mixture-of-experts layer where every tensor rank has all tokens and a slice of every expert.

Megatron's own dispatchers expect the sequence to be sharded over the tensor ranks and gather it on CUDA; here each rank
routes all tokens alike, computes its slices, and the partial outputs are summed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher


class ExpertRouter(TopKRouter):
    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Megatron's moves the weight to CUDA and multiplies by Transformer Engine."""
        return F.linear(input, self.weight)


class ReplicatedDispatcher(MoEAllGatherTokenDispatcher):
    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens are here."""
        return hidden_states, probs

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Each rank's experts gave a partial sum."""
        if self.tp_size == 1:
            return hidden_states
        return reduce_from_tensor_model_parallel_region(hidden_states, group=self.tp_ep_group)


class Mixture(MoELayer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        groups = kwargs.get("pg_collection") or get_default_pg_collection()
        self.token_dispatcher = ReplicatedDispatcher(
            self.num_local_experts, self.local_expert_indices, config=self.config, pg_collection=groups
        )
