"""One request on its way from an instance that leaves to its successor: what of it is where."""

from collections.abc import Container, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NamedTuple

from msgspec.structs import replace

from megatron_distkv.kvcache.block_table import BlockTable
from megatron_distkv.messages import CommitHeader, InheritedSpan, receipt_of
from megatron_distkv.pool import Member, Peer
from megatron_distkv.rblock import HOST, LocalSpan, Span
from megatron_distkv.request import Request, RequestStatus, gaps_before
from megatron_distkv.rmanager import Move

# Room for so many rBlocks more than there are: a request that grows is not asked for at every rBlock.
SLACK_RBLOCKS = 2


class Phase(Enum):
    """Of a handover, in order; a request that has outgrown its room goes back from COPYING to PREPARING."""

    PREPARING = auto()  # PREPARE is under way; the request goes on
    COPYING = auto()  # it goes on until one step can copy the rest
    COMMITTING = auto()  # COMMIT is under way; it stands still


class RBlockHere(NamedTuple):
    """An rBlock of the one that leaves: its physical id in the pool or in host memory."""

    block_id: int
    is_in_host: bool


@dataclass
class HandoverSession:
    """The request's rBlocks -> physical ids at the successor: `there` they have been copied to, `planned` they are now.

    `block_ids`: what the successor has room for. `question`: what it was asked last, and has not answered yet.
    `slack`: how much more room than needed it is asked for. `header`: what it was told, when COMMITTING.
    """

    request: Request
    successor: Member
    handover_id: str
    phase: Phase = Phase.PREPARING
    slack: int = SLACK_RBLOCKS
    question: "Future[Any] | None" = None
    header: CommitHeader | None = None
    block_ids: list[int] = field(default_factory=list)
    there: dict[int, int] = field(default_factory=dict)
    planned: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._setbacks = self._count_setbacks()

    @property
    def goes_on(self) -> bool:
        """The request has neither ended nor lost anything since its handover began."""
        is_running = self.request.status in (RequestStatus.RUNNING, RequestStatus.LEAVING)
        return is_running and self._count_setbacks() == self._setbacks

    @property
    def stands_still(self) -> bool:
        return self.request.status is RequestStatus.LEAVING

    def _count_setbacks(self) -> tuple[int, int]:
        return self.request.num_preemptions, self.request.num_recomputed_tokens

    # ------------------------------------------------------------------ copying

    def plan(self, left: Mapping[int, RBlockHere], count: int) -> list[Move]:
        """This step copies up to `count` of these, as far as there is room."""
        taken = set(self.there.values())
        free = [block_id for block_id in self.block_ids if block_id not in taken]
        chosen = dict(list(left.items())[: min(count, len(free))])
        self.planned = dict(zip(chosen, free, strict=False))
        return [*self._copies(chosen, from_host=False), *self._copies(chosen, from_host=True)]

    def _copies(self, chosen: Mapping[int, RBlockHere], *, from_host: bool) -> list[Move]:
        rblocks = [rblock for rblock, here in chosen.items() if here.is_in_host == from_host]
        if not rblocks:
            return []
        local_ids = [chosen[rblock].block_id for rblock in rblocks]
        remote_ids = [self.planned[rblock] for rblock in rblocks]
        return [Move(self.request.request_id, self.successor.peer, self.handover_id, local_ids, remote_ids, from_host)]

    def note_copied(self) -> None:
        """The step has done what was planned for it."""
        self.there.update(self.planned)
        self.planned = {}

    # ------------------------------------------------------------------ telling the successor

    def describe(
        self, table: BlockTable, peers: Mapping[str, Peer], kept: Sequence[range], now_s: float
    ) -> CommitHeader:
        """All of the request that is not tokens. `peers`: the creditor of each loan.

        `kept`: positions whose KV goes along; the successor computes the others again.
        """
        request, kv = self.request, receipt_of(self.request)
        num_left = request.num_computed_tokens - request.num_lost_tokens - sum(len(piece) for piece in kept)
        held = {rblock for span in table.spans for rblock in _rblocks(span)}
        return CommitHeader(
            self.handover_id,
            len(request.prompt_token_ids),
            len(request.output_token_ids),
            kept[-1].stop if kept else 0,
            [(lost.start, lost.stop) for lost in gaps_before(kept)],
            request.sampling_seed,
            now_s - request.arrival_s,
            replace(kv, num_recomputed_tokens=kv.num_recomputed_tokens + num_left),
            {rblock: block_id for rblock, block_id in self.there.items() if rblock in held},
            self._elsewhere(table, peers),
        )

    def _elsewhere(self, table: BlockTable, peers: Mapping[str, Peer]) -> list[InheritedSpan]:
        """Spans with creditors, less what has been copied before it went there."""
        return [
            InheritedSpan(
                first, block_ids, span.creditor, peers[span.loan_id].epoch, peers[span.loan_id].address, span.loan_id
            )
            for span in table.remote_spans()
            if span.creditor != HOST
            for first, block_ids in _runs(span, without=self.there)
        ]


def rblocks_here(table: BlockTable, rblocks: Sequence[range], without: Container[int]) -> dict[int, RBlockHere]:
    """Which of these rBlocks are in this instance's pool or host memory."""
    here: dict[int, RBlockHere] = {}
    for span in table.spans:
        if not isinstance(span, LocalSpan) and span.creditor != HOST:
            continue
        for rblock, block_id in enumerate(span.block_ids, start=span.first):
            if rblock not in without and any(rblock in some for some in rblocks):
                here[rblock] = RBlockHere(block_id, not isinstance(span, LocalSpan))
    return here


def _rblocks(span: Span) -> range:
    return range(span.first, span.first + len(span.block_ids))


def _runs(span: Span, without: Container[int]) -> list[tuple[int, list[int]]]:
    """The parts of a span that remain: first rBlock, physical ids."""
    runs: list[tuple[int, list[int]]] = []
    for rblock, block_id in zip(_rblocks(span), span.block_ids, strict=True):
        if rblock in without:
            continue
        if runs and runs[-1][0] + len(runs[-1][1]) == rblock:
            runs[-1][1].append(block_id)
        else:
            runs.append((rblock, [block_id]))
    return runs
