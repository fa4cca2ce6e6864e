"""Attention whose bits do not depend on where rBlocks lie, nor on what else is in the batch (tree.py).

Every partial is fp32, also on the way from a creditor. The price: a partial per rBlock and query, and its merge.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from megatron_distkv.attention.debtor import Debtor
from megatron_distkv.attention.fixed_order.kept_plans import KeptPlans
from megatron_distkv.attention.fixed_order.leaves import KV, Buffer
from megatron_distkv.attention.fixed_order.plan import Block, OpenPlaces, Question
from megatron_distkv.attention.metadata import SequenceSlice
from megatron_distkv.attention.verification import Question as Asked
from megatron_distkv.messages import QueryHeader, Scoring


class OwnKeys(NamedTuple):
    """What a rank's pool shows to layer `layer`, and, of a pool in int8, what is not in it yet: layer `of_layer`."""

    kv: KV
    layer: int
    open_PLK2ND: torch.Tensor | None = None
    of_layer: int = 0


class FixedAttention:
    """One rank's, for all its steps; takes the place of one `micro_attention`, the debtor's answers and their merge."""

    def __init__(self, debtor: Debtor, rblock_size: int, most_answers: int) -> None:
        """`most_answers`: partials that a mailbox has room for."""
        self._debtor = debtor
        self._kept_plans = KeptPlans(rblock_size, most_answers)
        self._buffer = Buffer()
        self._slices: Sequence[SequenceSlice] = ()
        self._open_places: OpenPlaces | None = None
        self._step = 0
        self._plans: dict[int | None, list[Block]] = {}  # by window
        self._told: dict[Scoring, int] = {}  # the layer that tells the shares to those that score alike

    def begin_step(self, step: int, slices: Sequence[SequenceSlice], open_places: OpenPlaces | None = None) -> None:
        """After the debtor's, and that of OpenRBlocks, whose places these are."""
        self._step, self._slices, self._open_places = step, slices, open_places
        self._plans, self._told = {}, {}

    def attend(self, q_THD: torch.Tensor, own: OwnKeys, scale: float, scoring: Scoring) -> torch.Tensor:
        """Out `[T, H, D]`, fp32, of all tokens of the step; the new ones' keys are written."""
        window = scoring.window
        if window not in self._plans:
            self._plans[window] = self._kept_plans.blocks(self._slices, window, self._open_places)
        out_THD = torch.empty(q_THD.shape, dtype=torch.float32)
        for block in self._plans[window]:
            self._block(block, q_THD, own, scale, scoring, out_THD[block.rows])
        return out_THD

    def _block(
        self, block: Block, q_THD: torch.Tensor, own: OwnKeys, scale: float, scoring: Scoring, to_RHD: torch.Tensor
    ) -> None:
        out, lse = self._buffer.take(block.merges.num_rows, *q_THD.shape[1:])
        rounds = _rounds(block.questions)
        asked = self._ask(rounds[0], q_THD, own.layer, scoring) if rounds else []
        block.here.attend(q_THD, own.kv, own.layer, scale, scoring, out, lse)
        if own.open_PLK2ND is not None:
            block.open.attend(q_THD, own.open_PLK2ND, own.of_layer, scale, scoring, out, lse)
        if block.host.place.start < block.host.place.stop:
            self._debtor.host_memory.attend(block.host, q_THD, own.layer, scoring, out, lse)
        if rounds:
            out[block.asked], lse[block.asked] = 0.0, float("-inf")  # what a lost creditor leaves out
            self._take(asked, q_THD, own.layer, scoring, out, lse)
        for questions in rounds[1:]:
            asked = self._ask(questions, q_THD, own.layer, scoring)
            self._take(asked, q_THD, own.layer, scoring, out, lse)
        self._buffer.carry_out(block.merges)
        torch.index_select(out, 0, block.roots_T, out=to_RHD)

    def _ask(self, questions: list[Question], q_THD: torch.Tensor, layer: int, scoring: Scoring) -> list[Question]:
        """Those that have gone."""
        tells = self._told.setdefault(scoring, layer) == layer
        asked = []
        for question in questions:
            shares = question.shares if tells else None
            header = QueryHeader(self._step, layer, shares, scoring, question.part, question.num_partials)
            if self._debtor.post(question.creditor, header, q_THD[question.rows_R]):
                asked.append(question)
        return asked

    def _take(
        self,
        asked: list[Question],
        q_THD: torch.Tensor,
        layer: int,
        scoring: Scoring,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        for question in asked:
            q_RHD = q_THD[question.rows_R]
            answer = self._debtor.partials_of(
                Asked(question.creditor, layer, q_RHD, question.shares, torch.float32, scoring, question.num_partials)
            )
            if answer is not None:
                out[question.answer], lse[question.answer] = answer


def _rounds(questions: list[Question]) -> list[list[Question]]:
    """A creditor is asked one thing at a time; all of them at the same time."""
    of_creditor = [list(group) for _, group in groupby(questions, key=lambda question: question.creditor)]
    longest = max((len(group) for group in of_creditor), default=0)
    return [[group[number] for group in of_creditor if number < len(group)] for number in range(longest)]
