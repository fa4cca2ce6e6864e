"""Megatron-core's GPTModel and its local layer spec: the one file that names them; a port touches nothing else.

Megatron-core 0.19 calls GPTModel deprecated (bug fixes only); HybridModel follows. What the rest of this package asks
of a model: `embedding`, `decoder`, `output_layer`, `shared_embedding_or_output_weight()`, `sharded_state_dict()`,
a call with labels, and parameters under the names of weights/parameters.py.
"""

import logging
from functools import partial
from typing import Any, TypeAlias

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

MegatronGPT: TypeAlias = GPTModel


class LocalLayer:
    """Megatron's local spec of one decoder layer, and the parts of it that we exchange."""

    def __init__(self, *, qk_layernorm: bool, num_experts: int | None) -> None:
        self.spec = get_gpt_layer_local_spec(
            normalization="RMSNorm", qk_layernorm=qk_layernorm, num_experts=num_experts
        )

    @property
    def parts(self) -> Any:
        """Norms, attention, MLP; may be changed in place."""
        return self.spec.submodules

    @property
    def attention(self) -> Any:
        """Core attention, projections and norms of q and k; may be changed in place."""
        return self.spec.submodules.self_attention.submodules

    @property
    def mlp(self) -> Any:
        """Linear layers, or router and experts; may be changed in place. A partial since Megatron-core 0.18."""
        mlp = self.spec.submodules.mlp
        return mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules

    def use_mlp(self, module: type) -> None:
        """Another class for the same parts."""
        mlp = self.spec.submodules.mlp
        if isinstance(mlp, partial):
            self.spec.submodules.mlp = partial(module, *mlp.args, **mlp.keywords)
        else:
            mlp.module = module


def new_gpt(
    config: TransformerConfig,
    layers: list[LocalLayer],
    *,
    last_norm: type | None,
    vocab_size: int,
    max_context_tokens: int,
    tie_embeddings: bool,
) -> MegatronGPT:
    """This rank's part of a model without positions of its own; its logits stay split over the tensor ranks.

    `last_norm`: None takes torch's RMSNorm, also beside an installed Apex or Transformer Engine.
    """
    return GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            [layer.spec for layer in layers], last_norm or WrappedTorchNorm
        ),
        vocab_size=vocab_size,
        max_sequence_length=max_context_tokens,
        position_embedding_type="none",
        parallel_output=True,
        share_embeddings_and_output_weights=tie_embeddings,
    )


def _is_for_users(record: logging.LogRecord) -> bool:
    """The deprecation is a task for this file, not for who trains or serves."""
    return not record.getMessage().startswith("GPTModel IS DEPRECATED")


logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(_is_for_users)
