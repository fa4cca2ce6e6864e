"""The successor's side of a handover: room for requests of an instance that leaves, until somebody asks for them.

prepare (allocate, let it write) -> commit (the request as it stands) -> claim, by the engine's thread
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from megatron_distkv.clock import Clock
from megatron_distkv.errors import DistkvError, IntegrityError
from megatron_distkv.kvcache.block_table import BlockTable
from megatron_distkv.kvcache.open_slots import OpenSlots
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.log import get_logger
from megatron_distkv.messages import Acknowledge, CommitHeader, Holder, LendReply, PrepareHeader, Refusal
from megatron_distkv.rblock import InstanceId, LoanId, num_rblocks_for
from megatron_distkv.rmanager import Followers, Grants

logger = get_logger(__name__)
# Who prepares a handover and is not heard of for this long, is gone; so is who should ask for a request that has come.
PATIENCE_S = 10.0


@dataclass
class IncomingHandover:
    """rBlocks of this pool for one request of `sender`; `header` says what it is, once all has come.

    `is_changing`: all ranks are being told of its rBlocks, and nobody else changes it meanwhile.
    """

    sender: Holder
    block_ids: list[int]
    until_s: float
    header: CommitHeader | None = None
    is_changing: bool = False


class Incoming(NamedTuple):
    """rBlocks that are used for requests to come, and the ids of their handovers."""

    block_ids: Sequence[int]
    handover_ids: Sequence[str]


class IncomingHandovers:
    """Channel threads prepare and commit; while `draining` it takes nothing. The rBlocks count as used at once.

    The lock is held for looking and writing down, never while the other ranks are told. What ends keeps its rBlocks
    until all ranks have revoked them.
    """

    def __init__(
        self,
        allocator: RBlockAllocator,
        grants: Grants,
        followers: Followers,
        rblock_size: int,
        open_slots: OpenSlots,
        jobs: Executor,
        clock: Clock,
    ) -> None:
        self._allocator = allocator
        self._grants = grants
        self._followers = followers
        self._rblock_size = rblock_size
        self._open_slots = open_slots
        self._jobs = jobs
        self._clock = clock
        self._handovers: dict[str, IncomingHandover] = {}
        self._lock = threading.Lock()
        self.draining = False

    # ------------------------------------------------------------------ what the one that leaves asks

    def prepare(self, header: PrepareHeader, sender: Holder) -> LendReply:
        with self._lock:
            handover = self._handovers.get(header.handover_id) or IncomingHandover(sender, [], 0.0)
            if self.draining:
                return LendReply(refusal=Refusal.DRAINING)
            is_its_own = handover.sender.is_proven_by(sender)
            if not is_its_own or handover.header is not None or handover.is_changing:
                return LendReply(refusal=Refusal.CONFLICT)
            if not self._add_room(header, handover):
                return LendReply(refusal=Refusal.FULL)
            self._handovers[header.handover_id] = handover
            handover.is_changing = True
        self._followers.grant(header.handover_id, handover.sender, handover.block_ids)
        self._grants.grant(header.handover_id, handover.sender, handover.block_ids)
        self._note_changed(handover)
        return LendReply(block_ids=list(handover.block_ids))

    def commit(self, header: CommitHeader, sender: Holder) -> Acknowledge:
        """All its rBlocks are stored: nobody writes them any more. Raises DistkvError when it makes no sense."""
        with self._lock:
            handover = self._handovers.get(header.handover_id)
            if handover is None or not handover.sender.is_proven_by(sender):
                return Acknowledge(Refusal.UNKNOWN_LOAN)
            if handover.is_changing:
                return Acknowledge(Refusal.CONFLICT)
            if handover.header is not None:  # a sender may ask twice
                return Acknowledge(None if handover.header == header else Refusal.CONFLICT)
            _check(header, handover, self._rblock_size)
            handover.is_changing = True
        if not self._revoke(header.handover_id).issuperset(header.here.values()):
            logger.warning("refusing a request of %s: not all of its KV was stored here", sender.name)
            self._drop(header.handover_id)
            return Acknowledge(Refusal.UNKNOWN_LOAN)
        self._note_changed(handover, header)
        return Acknowledge()

    def give_up(self, handover_id: str, sender: Holder) -> bool:
        """The one that leaves has changed its mind; False: there is no such handover of its."""
        with self._lock:
            handover = self._handovers.get(handover_id)
            if handover is None or not handover.sender.is_proven_by(sender):
                return False
            if handover.is_changing:
                handover.until_s = float("-inf")  # it ends as soon as it does not
                return True
            handover.is_changing = True
        self._end(handover_id)
        return True

    # ------------------------------------------------------------------ the engine's thread

    def claim(self, handover_id: str) -> IncomingHandover | None:
        """Take it over, with all its rBlocks; None: there is none, or not all of it has come."""
        with self._lock:
            handover = self._handovers.get(handover_id)
            if handover is None or handover.header is None or handover.is_changing:
                return None
            return self._handovers.pop(handover_id)

    def free(self, handover_id: str, block_ids: Sequence[int]) -> None:
        """Of one that was claimed: nobody can go on with it."""
        self._open_slots.give_back(handover_id)
        self._allocator.free(block_ids)

    def expire(self) -> None:
        """Free what nobody has asked for in time; never waits."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            overdue = [(x, y) for x, y in self._handovers.items() if y.until_s < now_s and not y.is_changing]
            for _, handover in overdue:
                handover.is_changing = True
        for handover_id, handover in overdue:
            logger.warning("nobody asked for a request of %s: freeing it", handover.sender.name)
            self._jobs.submit(self._end, handover_id)

    @contextmanager
    def held(self) -> Iterator[Incoming]:
        """All that lies here; inside, none comes and none goes."""
        with self._lock:
            block_ids = [block_id for handover in self._handovers.values() for block_id in handover.block_ids]
            yield Incoming(block_ids, list(self._handovers))

    # ------------------------------------------------------------------ inside

    def _add_room(self, header: PrepareHeader, handover: IncomingHandover) -> bool:
        num_missing = max(0, header.num_rblocks - len(handover.block_ids))
        more = self._allocator.allocate_up_to(num_missing)
        if len(more) < num_missing or not self._open_slots.reserve(header.handover_id):
            self._allocator.free(more)
            return False
        handover.block_ids = [*handover.block_ids, *more]
        return True

    def _note_changed(self, handover: IncomingHandover, header: CommitHeader | None = None) -> None:
        """All ranks know of it. One that was given up meanwhile stays so."""
        with self._lock:
            handover.is_changing = False
            handover.header = header
            if handover.until_s != float("-inf"):
                handover.until_s = self._clock.monotonic_s() + PATIENCE_S

    def _end(self, handover_id: str) -> None:
        """Revoke on every rank first, then free: no late write can reach a reused rBlock."""
        self._revoke(handover_id)
        self._drop(handover_id)

    def _drop(self, handover_id: str) -> None:
        with self._lock:
            self.free(handover_id, self._handovers.pop(handover_id).block_ids)

    def _revoke(self, handover_id: str) -> frozenset[int]:
        """What was stored for it on all ranks."""
        return self._grants.revoke(handover_id).intersection(*self._followers.revoke(handover_id))


def _check(header: CommitHeader, handover: IncomingHandover, rblock_size: int) -> None:
    named = set(header.here.values())
    if len(named) < len(header.here) or not named <= set(handover.block_ids):
        raise DistkvError("a handover names rBlocks that were not prepared for it")
    edges = [edge for piece in header.lost for edge in piece]
    if any(left >= right for left, right in pairwise([*edges, header.num_computed_tokens])):
        raise DistkvError("a handover's lost positions are in disorder")
    table = table_of(header)
    try:
        table.check_integrity()
    except IntegrityError as error:
        raise DistkvError(f"a handover's block table is in disorder: {error}") from None
    for rblock in table.missing(range(num_rblocks_for(header.num_computed_tokens, rblock_size))):
        start, stop = rblock * rblock_size, min((rblock + 1) * rblock_size, header.num_computed_tokens)
        if not any(first <= start and stop <= end for first, end in header.lost):
            raise DistkvError(f"a handover lacks rBlock {rblock}")


def table_of(header: CommitHeader) -> BlockTable:
    """Where its rBlocks lie as the one that leaves saw it, with what it has stored here as local rBlocks."""
    table = BlockTable()
    rblocks = sorted(header.here)
    table.add_local(rblocks, [header.here[rblock] for rblock in rblocks])
    for span in header.elsewhere:
        table.add_remote(span.first, span.block_ids, InstanceId(span.creditor), LoanId(span.loan_id))
    return table
