"""Activation checkpointing: a layer keeps its input, and is computed again in the backward pass.

torch's own: Megatron's and DeepSpeed's ask for CUDA's random numbers. Nothing here is random, and the ranks of a tensor
or context group compute a layer again together, so that its collectives meet.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recompute_layers(gpt: Any) -> None:
    """Wrap the forward pass of every transformer layer of Megatron's `gpt`."""
    for layer in gpt.decoder.layers:
        layer.forward = _computed_again(layer.forward)


def _computed_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(hidden_states: torch.Tensor, **rest: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(hidden_states, **rest)

        def layer(hidden: torch.Tensor) -> Any:
            return forward(hidden, **rest)

        # The reentrant kind: ZeRO-3 changes what a parameter holds, which the other takes for an error.
        return checkpoint(layer, hidden_states, use_reentrant=True, preserve_rng_state=False)

    return run
