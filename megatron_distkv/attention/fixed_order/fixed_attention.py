"""Attention whose bits do not depend on where rBlocks lie, nor on what else is in the batch (tree.py).

Every partial is fp32, also on the way from a creditor. The price: a partial per rBlock and query, and its merge.
"""

from collections.abc import Sequence
from itertools import groupby

import torch

from megatron_distkv.attention.debtor import Debtor
from megatron_distkv.attention.fixed_order.leaves import Buffer, carry_out
from megatron_distkv.attention.fixed_order.plan import Block, Question, plan_blocks
from megatron_distkv.attention.metadata import SequenceSlice
from megatron_distkv.messages import QueryHeader, Scoring


class FixedAttention:
    """One rank's, for all its steps; takes the place of one `micro_attention`, the debtor's answers and their merge."""

    def __init__(self, debtor: Debtor, rblock_size: int, most_answers: int) -> None:
        """`most_answers`: partials that a mailbox has room for."""
        self._debtor = debtor
        self._rblock_size = rblock_size
        self._most_answers = most_answers
        self._buffer = Buffer()
        self._slices: Sequence[SequenceSlice] = ()
        self._step = 0
        self._plans: dict[int | None, list[Block]] = {}  # by window
        self._told: dict[Scoring, int] = {}  # the layer that tells the shares to those that score alike

    def begin_step(self, step: int, slices: Sequence[SequenceSlice]) -> None:
        """After the debtor's."""
        self._step, self._slices = step, slices
        self._plans, self._told = {}, {}

    def attend(
        self, q_THD: torch.Tensor, pool_BLK2ND: torch.Tensor, layer: int, scale: float, scoring: Scoring
    ) -> torch.Tensor:
        """Out `[T, H, D]`, fp32, of all tokens of the step."""
        if scoring.window not in self._plans:
            self._plans[scoring.window] = plan_blocks(
                self._slices, self._rblock_size, scoring.window, self._most_answers
            )
        out_THD = torch.empty(q_THD.shape, dtype=torch.float32)
        for block in self._plans[scoring.window]:
            out_THD[block.rows_T] = self._block(block, q_THD, pool_BLK2ND, layer, scale, scoring)
        return out_THD

    def _block(
        self,
        block: Block,
        q_THD: torch.Tensor,
        pool_BLK2ND: torch.Tensor,
        layer: int,
        scale: float,
        scoring: Scoring,
    ) -> torch.Tensor:
        out, lse = self._buffer.take(block.merges.num_rows, *q_THD.shape[1:])
        rounds = _rounds(block.questions)
        asked = self._ask(rounds[0], q_THD, layer, scoring) if rounds else []
        here = slice(1, 1 + len(block.here.rows_P))
        block.here.attend(q_THD, pool_BLK2ND, layer, scale, scoring, out[here], lse[here])
        if len(block.host.rows_P):
            host = slice(here.stop, here.stop + len(block.host.rows_P))
            self._debtor.host_memory.attend(block.host, q_THD, layer, scoring, out[host], lse[host])
        out[block.asked], lse[block.asked] = 0.0, float("-inf")  # what a lost creditor leaves out
        self._take(asked, q_THD, out, lse)
        for questions in rounds[1:]:
            self._take(self._ask(questions, q_THD, layer, scoring), q_THD, out, lse)
        carry_out(block.merges, out, lse)
        return out[block.roots_T]

    def _ask(self, questions: list[Question], q_THD: torch.Tensor, layer: int, scoring: Scoring) -> list[Question]:
        """Those that have gone."""
        tells = self._told.setdefault(scoring, layer) == layer
        asked = []
        for question in questions:
            shares, count = (question.shares if tells else None), question.answer.stop - question.answer.start
            header = QueryHeader(self._step, layer, shares, scoring, question.part, count)
            if self._debtor.post(question.creditor, header, q_THD[question.rows_R]):
                asked.append(question)
        return asked

    def _take(self, asked: list[Question], q_THD: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
        for question in asked:
            shape = (question.answer.stop - question.answer.start, *q_THD.shape[1:])
            answer = self._debtor.partials_of(question.creditor, q_THD[question.rows_R], shape)
            if answer is not None:
                out[question.answer], lse[question.answer] = answer


def _rounds(questions: list[Question]) -> list[list[Question]]:
    """A creditor is asked one thing at a time; all of them at the same time."""
    of_creditor = [list(group) for _, group in groupby(questions, key=lambda question: question.creditor)]
    longest = max((len(group) for group in of_creditor), default=0)
    return [[group[number] for group in of_creditor if number < len(group)] for number in range(longest)]
