"""DistAttention: what takes the place of Megatron's core attention, and the only thing that does."""

from functools import lru_cache
from typing import Any

import torch

from megatron_distkv.attention.dense_attention import DenseAttention
from megatron_distkv.attention.fixed_order.fixed_attention import OwnKeys
from megatron_distkv.attention.forward_context import ForwardContext, current_context
from megatron_distkv.attention.open_rblocks import NewKeys
from megatron_distkv.attention.rotary import RotaryConfig, RotaryTable, rotary_table
from megatron_distkv.attention.sequence_attention import SequenceAttention
from megatron_distkv.messages import Scoring
from megatron_distkv.ops import apply_rope, micro_attention_out, store_kv


class DistAttention(torch.nn.Module):
    """Built by Megatron's SelfAttention with these keywords; `rotary`, `window` and `soft_cap` are bound by our spec.

    Inside a forward context: packed tokens of many requests, over rBlocks here and at creditors. Outside: causal
    attention with autograd as `sequence_attention` computes it, dense unless training sets another one.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        rotary: RotaryConfig,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__()
        if attention_type != "self":
            raise ValueError(f"DistAttention is self-attention, not {attention_type!r}")
        self.layer = layer_number - 1
        self.rotary = rotary
        self._sequence_attention: SequenceAttention = DenseAttention()
        self.head_dim: int = config.kv_channels
        self.scale = softmax_scale if softmax_scale is not None else self.head_dim**-0.5
        self.scoring = Scoring(softmax_scale, window, soft_cap)

    @property
    def sequence_attention(self) -> SequenceAttention:
        return self._sequence_attention

    @sequence_attention.setter
    def sequence_attention(self, attention: SequenceAttention) -> None:
        """Raises ConfigError, before anything is computed, where it does not know how this layer scores."""
        attention.check_scoring(self.scoring)
        self._sequence_attention = attention

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """q `[s, b, H, D]`, k and v `[s, b, K, D]` -> `[s, b, H * D]`; serving packs its T tokens as s = T, b = 1."""
        if attention_bias is not None or packed_seq_params is not None:
            raise NotImplementedError("DistAttention takes no attention bias and no packed_seq_params")
        context = current_context()
        if context is None:
            return self._whole(query, key, value)
        out_THD = self._paged(query.squeeze(1), key.squeeze(1), value.squeeze(1), context)
        return out_THD.to(query.dtype).reshape(query.shape[0], 1, -1)

    def _paged(
        self, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        """Ask every creditor, store the new tokens and compute what lies here meanwhile, merge."""
        metadata, debtor = context.metadata, context.debtor
        angles: RotaryTable | tuple[()] = ()
        if self.rotary.rotated_dims(self.head_dim):
            angles = metadata.rotary_table(self.rotary, self.head_dim)
            q_THD = apply_rope(q_THD, *angles)
        if context.fixed is not None:
            own = self._store(NewKeys(k_TKD, v_TKD, angles), context)
            return context.fixed.attend(q_THD, own, self.scale, self.scoring)
        if debtor is not None:
            debtor.ask(self.layer, q_THD, self.scoring)
        out_THD, lse_TH = self._here(q_THD, k_TKD, v_TKD, angles, context)
        if debtor is None:
            return out_THD
        return metadata.merges.merge(self.scoring, out_THD, lse_TH, debtor.answers())

    def _store(self, new: NewKeys, context: ForwardContext) -> OwnKeys:
        if context.open_rblocks is not None:
            return OwnKeys(context.open_rblocks.full, self.layer, *context.open_rblocks.store(self.layer, new))
        pool, slots_T = context.pool_BLK2ND, context.metadata.slot_mapping_T
        store_kv(new.k_TKD, new.v_TKD, pool, self.layer, slots_T, *new.angles)
        return OwnKeys(pool, self.layer)

    def _here(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        angles: RotaryTable | tuple[()],
        context: ForwardContext,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens; attention over all that lies in this rank's pool: out and lse."""
        metadata, pool, scoring = context.metadata, context.pool_BLK2ND, self.scoring
        if context.open_rblocks is not None:
            new = NewKeys(k_TKD, v_TKD, angles)
            return context.open_rblocks.attend(self.layer, q_THD, new, metadata.positions_T, self.scale, scoring)
        store_kv(k_TKD, v_TKD, pool, self.layer, metadata.slot_mapping_T, *angles)
        out_THD, lse_TH = metadata.results(q_THD)
        micro_attention_out(
            q_THD,
            pool,
            self.layer,
            metadata.block_ids_M,
            metadata.block_starts_M,
            metadata.cu_blocks,
            metadata.cu_queries,
            metadata.positions_T,
            self.scale,
            causal=True,
            window=scoring.window,
            soft_cap=scoring.soft_cap,
            out_THD=out_THD,
            lse_TH=lse_TH,
        )
        return out_THD, lse_TH

    def _whole(self, q_SBHD: torch.Tensor, k_SBKD: torch.Tensor, v_SBKD: torch.Tensor) -> torch.Tensor:
        num_tokens, batch = q_SBHD.shape[:2]
        attention = self._sequence_attention
        if self.rotary.rotated_dims(self.head_dim):
            table = _sequence_table(attention, num_tokens, self.rotary, self.head_dim, q_SBHD.device)
            q_SBHD, k_SBKD = _rotate(q_SBHD, table), _rotate(k_SBKD, table)
        out_SBHD = attention.attend(q_SBHD, k_SBKD, v_SBKD, self.scale, self.scoring)
        return out_SBHD.reshape(num_tokens, batch, -1)


@lru_cache(maxsize=8)
def _sequence_table(
    attention: SequenceAttention, num_tokens: int, rotary: RotaryConfig, head_dim: int, device: torch.device
) -> RotaryTable:
    """The same for all layers of a forward pass that are rotated alike."""
    return rotary_table(attention.positions(num_tokens).to(device), rotary, head_dim)


def _rotate(x_SBHD: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """RoPE with autograd, for `[s, b, heads, D]`."""
    rotated = table.cos_TR.shape[-1]
    cos, sin = (part[:, None, None].to(x_SBHD.dtype) for part in table)
    x, rest = x_SBHD[..., :rotated], x_SBHD[..., rotated:]
    left, right = x.chunk(2, dim=-1)
    return torch.cat((x * cos + torch.cat((-right, left), dim=-1) * sin, rest), dim=-1)
