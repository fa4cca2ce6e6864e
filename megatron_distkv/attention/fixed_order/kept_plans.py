"""Plans that outlive a step: while all requests decode in the rBlocks of the last step, nothing but positions moves."""

from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from megatron_distkv.attention.fixed_order.leaves import Leaves
from megatron_distkv.attention.fixed_order.plan import Block, OpenPlaces, Question, plan_blocks
from megatron_distkv.attention.metadata import SequenceSlice


class KeptPlans:
    """One plan for each window that layers have."""

    def __init__(self, rblock_size: int, most_answers: int) -> None:
        self._rblock_size = rblock_size
        self._most_answers = most_answers
        self._kept: dict[int | None, tuple[list[Any], list[Block]]] = {}

    def blocks(
        self, slices: Sequence[SequenceSlice], window: int | None, open_places: OpenPlaces | None
    ) -> list[Block]:
        """As `plan_blocks` says."""
        if any(some.end - some.start > 1 for some in slices):
            return plan_blocks(slices, self._rblock_size, window, self._most_answers, open_places)
        lie = [self._where(some, window) for some in slices] + [open_places]
        kept, blocks = self._kept.get(window, ([], []))
        if lie == kept:
            positions_T = torch.tensor([some.start for some in slices])
            blocks = [_moved(block, positions_T) for block in blocks]
        else:
            blocks = plan_blocks(slices, self._rblock_size, window, self._most_answers, open_places)
        self._kept[window] = lie, blocks
        return blocks

    def _where(self, some: SequenceSlice, window: int | None) -> tuple[Any, ...]:
        """All that a plan for one token depends on, but for its position within its rBlock."""
        first = 0 if window is None else max(0, some.start - window + 1) // self._rblock_size
        return first, some.start // self._rblock_size, tuple(some.spans)


def _moved(block: Block, positions_T: torch.Tensor) -> Block:
    here, opened, host = (_leaves_at(leaves, positions_T) for leaves in (block.here, block.open, block.host))
    questions = [_question_at(question, positions_T) for question in block.questions]
    return block._replace(here=here, open=opened, host=host, questions=questions)


def _leaves_at(leaves: Leaves, positions_T: torch.Tensor) -> Leaves:
    return leaves._replace(positions_P=positions_T[leaves.rows_P])


def _question_at(question: Question, positions_T: torch.Tensor) -> Question:
    """Each of its shares has one query."""
    positions = positions_T[question.rows_R].tolist()
    shares = [
        msgspec.structs.replace(share, first_position=position)
        for share, position in zip(question.shares, positions, strict=True)
    ]
    return question._replace(shares=shares)
