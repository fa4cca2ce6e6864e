"""MicroAttention where the KV lies: one layer's queries to a creditor, and what comes back."""

from typing import Annotated

import msgspec

from megatron_distkv.messages.wire import BlockId, Count, Positive, Serial


class Scoring(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a layer makes its scores, where it is not the ordinary way (contract: ops.micro_attention)."""

    scale: Positive | None = None  # None: 1 / sqrt(head_dim)
    window: Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)] | None = None
    soft_cap: Positive | None = None


class QueryShare(msgspec.Struct, frozen=True, omit_defaults=True):
    """One sequence of a query: `num_queries` query rows against these rBlocks, which are full and in the past of all.

    For a window also the position of each rBlock's first token, and of the first query; the others follow it.
    """

    loan_ids: list[str]
    block_ids: list[BlockId]
    num_queries: Count
    block_starts: list[Count] = []
    first_position: Count = 0


# Questions that a step may ask of one creditor for one layer, in fixed order.
MOST_PARTS = 1 << 14


class QueryHeader(msgspec.Struct, frozen=True):
    """MicroAttention of one layer. `shares` come with the step's first layer that makes scores in this way, and hold
    for its other layers that do: with a window only what some query sees is asked for.

    Payload: q `[T, query_heads, head_dim]` in the model's dtype, T = sum of num_queries. Reply payload: the normalised
    output `[T, query_heads, head_dim]` in the wire dtype, then LSE `[T, query_heads]` fp32 (natural log; empty = -inf).

    In fixed order (`num_partials` > 0; attention/fixed_order) the answer has, for each share, its rows for each node
    that covers its rBlocks, `num_partials` rows in all, in fp32; a step may ask several `part`s for a layer, and shares
    have all positions.
    """

    step: Serial
    layer: Count
    shares: list[QueryShare] | None = None
    scoring: Scoring = Scoring()
    part: Annotated[int, msgspec.Meta(ge=0, lt=MOST_PARTS)] = 0
    num_partials: Count = 0
