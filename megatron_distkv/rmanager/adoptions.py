"""The successor's side of a handover: room for requests of an instance that leaves, until somebody asks for them.

prepare (allocate, let it write) -> hand_over (the request as it stands) -> claim, by the engine's thread
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from megatron_distkv.attention import LoanTable
from megatron_distkv.errors import DistkvError, IntegrityError
from megatron_distkv.kvcache.block_table import BlockTable
from megatron_distkv.kvcache.open_slots import OpenSlots
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.log import get_logger
from megatron_distkv.messages import Acknowledge, AdoptHeader, Holder, LendReply, PrepareHeader, Refusal
from megatron_distkv.rblock import InstanceId, LoanId, num_rblocks_for
from megatron_distkv.rmanager.lending import Followers

logger = get_logger(__name__)
# Who prepares a handover and is not heard of for this long, is gone; so is who should ask for an adopted request.
PATIENCE_S = 10.0


@dataclass
class Adoption:
    """rBlocks of this pool for one request of `parent`; `header` says what it is, once all has come."""

    parent: Holder
    block_ids: list[int]
    until_s: float
    header: AdoptHeader | None = None


class Adoptions:
    """Channel threads prepare and fill it; while `draining` it takes nothing. The rBlocks count as used at once."""

    def __init__(
        self,
        allocator: RBlockAllocator,
        loan_table: LoanTable,
        followers: Followers,
        rblock_size: int,
        open_slots: OpenSlots | None = None,
    ) -> None:
        self._open_slots = open_slots or OpenSlots(None)
        self._allocator = allocator
        self._loan_table = loan_table
        self._followers = followers
        self._rblock_size = rblock_size
        self._adoptions: dict[str, Adoption] = {}
        self._lock = threading.RLock()
        self.draining = False

    def prepare(self, header: PrepareHeader, parent: Holder) -> LendReply:
        with self._lock:
            adoption = self._adoptions.get(header.adoption_id)
            if self.draining:
                return LendReply(refusal=Refusal.DRAINING)
            if adoption is not None and (not adoption.parent.is_proven_by(parent) or adoption.header is not None):
                return LendReply(refusal=Refusal.CONFLICT)
            had = adoption.block_ids if adoption is not None else []
            more = self._allocator.allocate_up_to(max(0, header.num_rblocks - len(had)))
            if len(had) + len(more) < header.num_rblocks or not self._open_slots.reserve(header.adoption_id):
                self._allocator.free(more)
                return LendReply(refusal=Refusal.FULL)
            block_ids = [*had, *more]
            holder = parent if adoption is None else adoption.parent
            self._adoptions[header.adoption_id] = Adoption(holder, block_ids, _patience())
            self._followers.grant(header.adoption_id, holder, block_ids)
            self._loan_table.grant(header.adoption_id, holder, block_ids)
        return LendReply(block_ids=block_ids)

    def hand_over(self, header: AdoptHeader, parent: Holder) -> Acknowledge:
        """All its rBlocks are stored: nobody writes them any more. Raises DistkvError when it makes no sense."""
        with self._lock:
            adoption = self._adoptions.get(header.adoption_id)
            if adoption is None or not adoption.parent.is_proven_by(parent):
                return Acknowledge(Refusal.UNKNOWN_LOAN)
            _check(header, adoption, self._rblock_size)
            if not self._revoke(header.adoption_id).issuperset(header.here.values()):
                self.free(header.adoption_id, self._adoptions.pop(header.adoption_id))
                logger.warning("refusing a request of %s: not all of its KV was stored here", parent.name)
                return Acknowledge(Refusal.UNKNOWN_LOAN)
            adoption.header = header
            adoption.until_s = _patience()
        return Acknowledge()

    def give_up(self, adoption_id: str, parent: Holder) -> bool:
        """The one that leaves has changed its mind; False: there is no such handover of its."""
        with self._lock:
            adoption = self._adoptions.get(adoption_id)
            if adoption is None or not adoption.parent.is_proven_by(parent) or adoption.header is not None:
                return False
            self._drop(adoption_id)
            return True

    def claim(self, adoption_id: str) -> Adoption | None:
        """The engine's thread takes it over, with all its rBlocks; None: there is none, or not all of it has come."""
        with self._lock:
            adoption = self._adoptions.get(adoption_id)
            return self._adoptions.pop(adoption_id) if adoption is not None and adoption.header is not None else None

    def expire(self) -> None:
        """Free what nobody has asked for in time."""
        with self._lock:
            overdue = [x for x, adoption in self._adoptions.items() if adoption.until_s < time.monotonic()]
            for adoption_id in overdue:
                logger.warning("nobody asked for a request of %s: freeing it", self._adoptions[adoption_id].parent.name)
                self._drop(adoption_id)

    @property
    def ids(self) -> list[str]:
        """Of those that lie here."""
        with self._lock:
            return list(self._adoptions)

    @contextmanager
    def held(self) -> Iterator[Sequence[int]]:
        """All rBlocks that lie here; inside, none comes and none goes."""
        with self._lock:
            yield [block_id for adoption in self._adoptions.values() for block_id in adoption.block_ids]

    def _drop(self, adoption_id: str) -> None:
        self._revoke(adoption_id)
        self.free(adoption_id, self._adoptions.pop(adoption_id))

    def free(self, adoption_id: str, adoption: Adoption) -> None:
        """Of one that was claimed: nobody can go on with it."""
        self._open_slots.give_back(adoption_id)
        self._allocator.free(adoption.block_ids)

    def _revoke(self, adoption_id: str) -> frozenset[int]:
        """What was stored for it on all ranks."""
        return self._loan_table.revoke(adoption_id).intersection(*self._followers.revoke(adoption_id))


def _patience() -> float:
    return time.monotonic() + PATIENCE_S


def _check(header: AdoptHeader, adoption: Adoption, rblock_size: int) -> None:
    named = set(header.here.values())
    if len(named) < len(header.here) or not named <= set(adoption.block_ids):
        raise DistkvError("a handover names rBlocks that were not prepared for it")
    edges = [edge for piece in header.lost for edge in piece]
    if any(left >= right for left, right in pairwise([*edges, header.num_computed_tokens])):
        raise DistkvError("a handover's lost positions are in disorder")
    table = adopted_table(header)
    try:
        table.check_integrity()
    except IntegrityError as error:
        raise DistkvError(f"a handover's block table is in disorder: {error}") from None
    for rblock in table.missing(range(num_rblocks_for(header.num_computed_tokens, rblock_size))):
        start, stop = rblock * rblock_size, min((rblock + 1) * rblock_size, header.num_computed_tokens)
        if not any(first <= start and stop <= end for first, end in header.lost):
            raise DistkvError(f"a handover lacks rBlock {rblock}")


def adopted_table(header: AdoptHeader) -> BlockTable:
    """Where its rBlocks lie as the one that leaves saw it, with what it has stored here as local rBlocks."""
    table = BlockTable()
    rblocks = sorted(header.here)
    table.add_local(rblocks, [header.here[rblock] for rblock in rblocks])
    for span in header.elsewhere:
        table.add_remote(span.first, span.block_ids, InstanceId(span.creditor), LoanId(span.loan_id))
    return table
