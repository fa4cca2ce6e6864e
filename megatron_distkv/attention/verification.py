"""Does a creditor tell the truth? One rank's checks of what comes back, and the alarm."""

from collections.abc import Container, Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple

import msgspec
import torch

from megatron_distkv import metrics
from megatron_distkv.attention.creditor_channel import CreditorChannel
from megatron_distkv.attention.fixed_order.leaves import KV, index_in_fixed_order
from megatron_distkv.attention.partial import Partial
from megatron_distkv.attention.sent_rblocks import SentRBlocks
from megatron_distkv.attention.shares import ORDINARY, attend_shares, index_shares
from megatron_distkv.clock import Clock
from megatron_distkv.errors import PeerLost, PeerWrong
from megatron_distkv.log import get_logger
from megatron_distkv.messages import Acknowledge, FetchHeader, MessageKind, QueryShare, Scoring, decode
from megatron_distkv.ops import Int8RBlocks, merge, readable
from megatron_distkv.ops.int8_kv import LARGEST
from megatron_distkv.transport import TensorSpec, read_tensors

logger = get_logger(__name__)
# How far a true answer may be from ours, as a share of the largest value: rounding on the wire, and of other kernels.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3}


class Wrong(StrEnum):
    """What cannot be true, for metrics."""

    RBLOCKS = "rblocks"  # other bytes than were sent
    PARTIAL = "partial"  # another result than that of the bytes, or no numbers at all


class Question(NamedTuple):
    """What a creditor was asked: these query rows, in the model's dtype, over these rBlocks of one layer."""

    creditor: str
    layer: int
    q_RHD: torch.Tensor
    shares: list[QueryShare]
    wire_dtype: torch.dtype
    scoring: Scoring = ORDINARY
    num_partials: int = 0  # in fixed order


class Verification:
    """Answers are always checked for NaN and infinity. One in `one_in` (0: none) is computed again from a copy.

    A copy comes from the same creditor, so it is first compared with digests of what was sent there: an answer over
    rBlocks that somebody else has sent, as of a request that was handed over, is not computed again.
    """

    def __init__(
        self,
        one_in: int,
        rblock: TensorSpec,
        scale: float,
        rblocks_per_message: int,
        deadline_s: float,
        clock: Clock,
        head_dim: int | None = None,
    ) -> None:
        """`rblock`: one as it travels; in int8 it does not tell the `head_dim`."""
        self._head_dim = head_dim or rblock.shape[-1]
        self._rblock = rblock
        self._one_in = one_in
        self._scale = scale
        self._rblocks_per_message = rblocks_per_message
        self._deadline_s = deadline_s
        self._clock = clock
        self._sent = SentRBlocks()
        self._got_no_numbers: set[str] = set()
        self._wrong: set[str] = set()

    def note_sent(self, creditor: str, loan_id: str, block_ids: Sequence[int], data_MLK2ND: torch.Tensor) -> None:
        """These rBlocks lie at `creditor` now."""
        if not _has_numbers(readable(data_MLK2ND, self._head_dim)):
            self._got_no_numbers.add(creditor)  # from us: it may answer with none
        if self._one_in:
            self._sent.note(creditor, loan_id, block_ids, data_MLK2ND)

    def take_wrong(self) -> frozenset[str]:
        """The creditors that have failed a check since the last time."""
        wrong, self._wrong = frozenset(self._wrong), set()
        return wrong

    def forget_all_but(self, creditors: Container[str]) -> None:
        """What was sent to others is lost: one that comes back under its name has nothing of ours."""
        self._sent.forget_all_but(creditors)
        self._got_no_numbers = {creditor for creditor in self._got_no_numbers if creditor in creditors}

    def check_returned(self, creditor: str, block_ids: Sequence[int], data_MLK2ND: torch.Tensor) -> None:
        """Raises PeerWrong unless these are the bytes that were sent."""
        changed = self._sent.changed(creditor, block_ids, data_MLK2ND) if self._one_in else []
        if changed:
            raise self._alarm(creditor, Wrong.RBLOCKS, f"rBlocks {changed} are not as they were sent")

    def verified(self, channel: CreditorChannel, question: Question, partial: Partial) -> Partial:
        """The partial, good for longer than the mailbox; raises PeerWrong when it cannot be true, PeerLost."""
        self.check_numbers(question.creditor, question.q_RHD, partial.out_RHD, partial.lse_RH)
        if not self._is_next(question):
            return partial
        partial = partial._replace(out_RHD=partial.out_RHD.clone())
        out_RHD, lse_RH = self._compute(channel, question)
        share = TOLERANCE[question.wire_dtype]
        if not (_is_close(partial.out_RHD, out_RHD, share) and _is_close(partial.lse_RH, lse_RH, share)):
            raise self._alarm(question.creditor, Wrong.PARTIAL, f"it answers layer {question.layer} wrongly")
        return partial

    def verified_in_fixed_order(
        self, channel: CreditorChannel, question: Question, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for an answer in fixed order: not a bit may differ. No key need be seen there."""
        self.check_numbers(question.creditor, question.q_RHD, out, _without_infinity(lse))
        if not self._is_next(question):
            return out, lse
        out, lse = out.clone(), lse.clone()
        expected = self._compute_in_fixed_order(channel, question)
        if not (_is_same(out, expected[0]) and _is_same(lse, expected[1])):
            raise self._alarm(question.creditor, Wrong.PARTIAL, f"it answers layer {question.layer} in other bits")
        return out, lse

    def check_numbers(self, creditor: str, q_RHD: torch.Tensor, out_RHD: torch.Tensor, lse_RH: torch.Tensor) -> None:
        """Every query has keys there, so even an LSE of -inf is no answer, unless we sent such things ourselves."""
        if out_RHD.isfinite().all() and lse_RH.isfinite().all():
            return
        if creditor not in self._got_no_numbers and q_RHD.isfinite().all():
            raise self._alarm(creditor, Wrong.PARTIAL, "it answers with NaN or infinity")

    def _is_next(self, question: Question) -> bool:
        """Whether this is the one of so many, and all that it takes to compute it again was sent from here."""
        if not self._one_in or self._clock.random.randrange(self._one_in):
            return False
        asked = (block_id for share in question.shares for block_id in share.block_ids)
        return self._sent.knows(question.creditor, asked)

    def _compute(self, channel: CreditorChannel, question: Question) -> tuple[torch.Tensor, torch.Tensor]:
        outs, lses, first = [], [], 0
        for share in question.shares:
            q_THD = question.q_RHD[first : first + share.num_queries]
            parts = [
                self._attend(q_THD, copy, question, share, block_ids)
                for block_ids, copy in self._copies(channel, question.creditor, share.block_ids)
            ]
            out, lse = merge(torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]))
            outs.append(out)
            lses.append(lse)
            first += share.num_queries
        return torch.cat(outs), torch.cat(lses)

    def _compute_in_fixed_order(
        self, channel: CreditorChannel, question: Question
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From copies of one layer of all rBlocks that are asked about."""
        places: dict[int, int] = {}
        layers: list[torch.Tensor] = []
        wanted = list(dict.fromkeys(block_id for share in question.shares for block_id in share.block_ids))
        for block_ids, copy in self._copies(channel, question.creditor, wanted):
            places.update({block_id: place for place, block_id in enumerate(block_ids, start=len(places))})
            layers.append(copy[:, question.layer : question.layer + 1].clone())
        kv = readable(torch.cat(layers), self._head_dim)
        shares = [
            msgspec.structs.replace(share, block_ids=[places[block_id] for block_id in share.block_ids])
            for share in question.shares
        ]
        rblock_size = (kv.pool_BLK2ND if isinstance(kv, Int8RBlocks) else kv).shape[4]
        index = index_in_fixed_order(shares, question.scoring, rblock_size, question.num_partials)
        return attend_shares(question.q_RHD, kv, 0, index, self._scale)

    def _copies(
        self, channel: CreditorChannel, creditor: str, block_ids: Sequence[int]
    ) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
        """The rBlocks, a message at a time, with their ids there; each valid until the next."""
        for loan_id, ids in self._sent.by_loan(creditor, block_ids).items():
            for start in range(0, len(ids), self._rblocks_per_message):
                some = ids[start : start + self._rblocks_per_message]
                channel.post(MessageKind.FETCH, msgspec.msgpack.encode(FetchHeader(loan_id, some)))
                reply = channel.wait(self._deadline_s)
                refusal = decode(reply.header, Acknowledge).refusal
                if refusal is not None:
                    raise PeerLost(creditor, f"refused a copy: {refusal.value}")
                shape = (len(some), *self._rblock.shape)
                (copy,) = read_tensors(reply.payload, [TensorSpec(shape, self._rblock.dtype)])
                self.check_returned(creditor, some, copy)
                yield some, copy

    def _attend(
        self, q_THD: torch.Tensor, copy: torch.Tensor, question: Question, share: QueryShare, block_ids: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start_of = dict(zip(share.block_ids, share.block_starts, strict=False))  # none without a window
        starts = [start_of.get(block_id, 0) for block_id in block_ids]
        copied = QueryShare([], list(range(len(copy))), len(q_THD), starts, share.first_position)
        kv, index = readable(copy, self._head_dim), index_shares([copied], question.scoring)
        return attend_shares(q_THD, kv, question.layer, index, self._scale)

    def _alarm(self, creditor: str, what: Wrong, sentence: str) -> PeerWrong:
        self._wrong.add(creditor)
        metrics.WRONG_CREDITORS.labels(what.value).inc()
        logger.error("ALARM: %s cannot be trusted: %s", creditor, sentence)
        return PeerWrong(creditor, sentence)


def _has_numbers(kv: KV) -> bool:
    """None is NaN, infinite, or too large for an answer: those may travel in fp16."""
    largest = [scales * LARGEST for scales in kv[1:]] if isinstance(kv, Int8RBlocks) else [kv]
    return all(bool(x.to(torch.float16).isfinite().all()) for x in largest)


def _without_infinity(lse: torch.Tensor) -> torch.Tensor:
    return lse.masked_fill(lse == float("-inf"), 0.0)


def _is_same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(got, expected) or not _without_infinity(expected).isfinite().all()  # (our own doing)


def _is_close(got: torch.Tensor, expected: torch.Tensor, share: float) -> bool:
    if not expected.isfinite().all():  # our own doing: the bytes were those that we had sent
        return True
    return torch.allclose(got, expected, rtol=share, atol=share * float(expected.abs().max()))
