"""A creditor whose tensor-parallel ranks are cut otherwise than ours: several of its ranks hold this rank's heads."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import torch

from megatron_distkv.attention.creditor_channel import CreditorChannel
from megatron_distkv.attention.debtor import wire_dtype
from megatron_distkv.clock import Clock
from megatron_distkv.errors import PeerLost
from megatron_distkv.messages import Acknowledge, FetchHeader, MessageKind, QueryHeader, decode
from megatron_distkv.transport import Reply, TensorSpec, pack_tensors, read_tensors

# In an rBlock `[M, L, K, 2, N, D]`; queries, outputs and LSE are `[T, H, ...]`.
_RBLOCK_HEADS, _ROW_HEADS = 2, 1


class Part(NamedTuple):
    """The creditor's rank behind `channel` holds these of this rank's KV heads."""

    channel: CreditorChannel
    kv_heads: slice


class SplitChannel:
    """Used like a channel to one rank: cuts what it sends by heads, joins the answers. The first part is the leader.

    `rblock`: one rBlock of this rank, `[L, K, 2, N, D]`. What fails on one part fails on all: the channel is closed.
    """

    def __init__(self, parts: Sequence[Part], rblock: TensorSpec, clock: Clock) -> None:
        self._parts = parts
        self._rblock = rblock
        self._clock = clock
        self._asked: Sequence[Part] = ()
        self._specs: tuple[TensorSpec, ...] = ()
        self._head_dim = _ROW_HEADS

    @property
    def is_open(self) -> bool:
        return all(part.channel.is_open for part in self._parts)

    def post(self, kind: int, header: bytes, payload: Sequence[torch.Tensor] = ()) -> None:
        """Loans are the leader's business; the rest goes to every part, with its heads of each tensor."""
        is_for_all = kind in (MessageKind.QUERY, MessageKind.STORE, MessageKind.FETCH)
        self._asked = self._parts if is_for_all else self._parts[:1]
        self._head_dim = _ROW_HEADS if kind == MessageKind.QUERY else _RBLOCK_HEADS
        self._specs = self._answer_specs(kind, header, payload)
        try:
            for part in self._asked:
                mine = [self._heads(tensor, part) for tensor in payload] if is_for_all else payload
                part.channel.post(kind, header, mine)
        except BaseException:
            self.close()
            raise

    def wait(self, deadline_s: float) -> Reply:
        """All answers as one; a refusal of one is that of all."""
        end_s = self._clock.monotonic_s() + deadline_s
        try:
            replies = [part.channel.wait(max(1e-3, end_s - self._clock.monotonic_s())) for part in self._asked]
            if len(replies) == 1:
                return replies[0]
            refused = [reply for reply in replies if decode(reply.header, Acknowledge).refusal is not None]
            return refused[0] if refused else self._join(replies)
        except BaseException:
            self.close()
            raise

    def is_answered(self, within_s: float) -> bool:
        """By all that were asked."""
        end_s = self._clock.monotonic_s() + within_s
        return all(part.channel.is_answered(max(0.0, end_s - self._clock.monotonic_s())) for part in self._asked)

    def give_up(self, reason: str) -> PeerLost:
        lost = self._parts[0].channel.give_up(reason)
        self.close()
        return lost

    def call(self, kind: int, header: bytes, payload: Sequence[torch.Tensor] = (), *, deadline_s: float) -> Reply:
        self.post(kind, header, payload)
        return self.wait(deadline_s)

    def close(self) -> None:
        for part in self._parts:
            part.channel.close()

    def _answer_specs(self, kind: int, header: bytes, payload: Sequence[torch.Tensor]) -> tuple[TensorSpec, ...]:
        """Of a whole answer, as this rank wants it."""
        if kind == MessageKind.QUERY:
            (q_THD,) = payload
            num_partials = decode(header, QueryHeader).num_partials
            shape = (num_partials or q_THD.shape[0], *q_THD.shape[1:])
            out = TensorSpec(shape, torch.float32 if num_partials else wire_dtype(q_THD.dtype))
            return out, TensorSpec(shape[:2], torch.float32)
        if kind == MessageKind.FETCH:
            num_rblocks = len(decode(header, FetchHeader).block_ids)
            return (TensorSpec((num_rblocks, *self._rblock.shape), self._rblock.dtype),)
        return ()

    def _rows_of(self, part: Part, num_heads: int) -> slice:
        """This part's heads among `num_heads`: KV heads, or query heads, of which each KV head has a group."""
        group = num_heads // self._rblock.shape[1]
        return slice(part.kv_heads.start * group, part.kv_heads.stop * group)

    def _heads(self, tensor: torch.Tensor, part: Part) -> torch.Tensor:
        rows = self._rows_of(part, tensor.shape[self._head_dim])
        return tensor.narrow(self._head_dim, rows.start, rows.stop - rows.start)

    def _join(self, replies: Sequence[Reply]) -> Reply:
        if not self._specs:
            return replies[0]
        wholes = [torch.empty(spec.shape, dtype=spec.dtype) for spec in self._specs]
        for part, reply in zip(self._asked, replies, strict=True):
            places = [self._heads(whole, part) for whole in wholes]
            tensors = read_tensors(reply.payload, [TensorSpec(tuple(x.shape), x.dtype) for x in places])
            for place, tensor in zip(places, tensors, strict=True):
                place.copy_(tensor)
        return Reply(msgspec.msgpack.encode(Acknowledge()), pack_tensors(wholes))
