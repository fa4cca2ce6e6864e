"""What one engine step does, as every tensor-parallel rank of the instance is told."""

import msgspec

from megatron_distkv.pool import Peer
from megatron_distkv.rblock import Span
from megatron_distkv.rmanager import Move, Pull


class Slice(msgspec.Struct, frozen=True):
    """Tokens at positions `[start, end)` of one request; `spans` already covers them."""

    request_id: str
    start: int
    end: int
    spans: list[Span]
    needs_logits: bool  # the last row is sampled from
    open_slot: int | None = None  # of the request, where rBlocks that are not full lie apart


class StepPlan(msgspec.Struct, frozen=True):
    """One step: the moves, the pulls, the pushes, then a forward pass over the slices' tokens, one after the other."""

    step: int
    token_ids: list[int]
    slices: list[Slice]
    moves: list[Move]
    pulls: list[Pull]
    pushes: list[Move]  # copies for a successor
    creditors: list[Peer]  # those that some span names

    @property
    def logit_rows(self) -> list[int]:
        """Rows of the packed batch whose logits are wanted: the last row of each slice that needs them."""
        rows, end = [], 0
        for piece in self.slices:
            end += piece.end - piece.start
            if piece.needs_logits:
                rows.append(end - 1)
        return rows


class StepReply(msgspec.Struct, frozen=True):
    """A follower's answer to a step: creditors that it lost, with the reason, and those of them that failed a check."""

    lost: dict[str, str]
    wrong: list[str] = []
