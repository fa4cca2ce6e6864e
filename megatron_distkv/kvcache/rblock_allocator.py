"""Which rBlocks of this instance's pool are free, used by own requests, or lent to others.

    pool = | free | used (reference-counted) | lent (one loan each) |

Thread-safe: the engine allocates while creditor threads lend. Every change is checked whole before it is made.
"""

import threading
from collections.abc import Iterable, Sequence

from megatron_distkv.errors import IntegrityError
from megatron_distkv.rblock import LoanId


class RBlockAllocator:
    """Accounts of `num_rblocks` rBlocks; at most `max_lent` of them may be lent at one time (the lending cap)."""

    def __init__(self, num_rblocks: int, max_lent: int) -> None:
        if num_rblocks < 0 or not 0 <= max_lent <= num_rblocks:
            raise ValueError(f"need num_rblocks >= 0 and 0 <= max_lent <= num_rblocks, got {num_rblocks}, {max_lent}")
        self.num_rblocks = num_rblocks
        self.max_lent = max_lent
        self._free = list(range(num_rblocks - 1, -1, -1))  # a stack: the warmest block is used again first
        self._refs: dict[int, int] = {}
        self._lent: dict[LoanId, tuple[int, ...]] = {}
        self._num_lent = 0
        self._lock = threading.Lock()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._refs)

    @property
    def num_lent(self) -> int:
        return self._num_lent

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate_up_to(self, count: int) -> list[int]:
        """Take as many of `count` rBlocks as are free, each with one reference."""
        with self._lock:
            block_ids = [self._free.pop() for _ in range(min(count, len(self._free)))]
            self._refs.update(dict.fromkeys(block_ids, 1))
            return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Add one reference to each rBlock: another request reads it too."""
        with self._lock:
            for block_id in self._checked_used(block_ids):
                self._refs[block_id] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Drop one reference of each rBlock; those without any left are free again."""
        with self._lock:
            for block_id in self._checked_used(block_ids):
                self._refs[block_id] -= 1
                if self._refs[block_id] == 0:
                    del self._refs[block_id]
                    self._free.append(block_id)

    def can_lend(self, count: int) -> bool:
        return self.can_allocate(count) and self._num_lent + count <= self.max_lent

    def lend(self, loan_id: LoanId, count: int) -> tuple[int, ...] | None:
        """Give `count` free rBlocks to a loan; asked for twice, it gets the same rBlocks. None: not possible."""
        with self._lock:
            if loan_id in self._lent:
                return self._lent[loan_id] if len(self._lent[loan_id]) == count else None
            if count < 1 or not self.can_lend(count):
                return None
            block_ids = tuple(self._free.pop() for _ in range(count))
            self._lent[loan_id] = block_ids
            self._num_lent += count
            return block_ids

    def end_loan(self, loan_id: LoanId) -> int:
        """Take a loan's rBlocks back; returns how many (0: no such loan, so a repeated release is harmless)."""
        with self._lock:
            block_ids = self._lent.pop(loan_id, ())
            self._free.extend(block_ids)
            self._num_lent -= len(block_ids)
            return len(block_ids)

    def rename_loan(self, loan_id: LoanId, new_loan_id: LoanId) -> tuple[int, ...]:
        """The same rBlocks, lent to another; returns them."""
        with self._lock:
            self._lent[new_loan_id] = self._lent.pop(loan_id)
            return self._lent[new_loan_id]

    def keep_lent(self, loan_id: LoanId) -> tuple[int, ...]:
        """A loan's rBlocks are used by an own request from now on; returns them (none: no such loan)."""
        with self._lock:
            block_ids = self._lent.pop(loan_id, ())
            self._num_lent -= len(block_ids)
            self._refs.update(dict.fromkeys(block_ids, 1))
            return block_ids

    def loans(self) -> dict[LoanId, int]:
        """rBlocks per loan now."""
        with self._lock:
            return {loan_id: len(block_ids) for loan_id, block_ids in self._lent.items()}

    def check_integrity(self, used_block_ids: Sequence[int] | None = None) -> None:
        """free + used + lent == pool, no rBlock twice; with `used_block_ids` (every request's) also the references."""
        with self._lock:
            lent = [block_id for block_ids in self._lent.values() for block_id in block_ids]
            everywhere = sorted([*self._free, *self._refs, *lent])
            if everywhere != list(range(self.num_rblocks)) or len(lent) != self._num_lent:
                raise IntegrityError(
                    f"free {len(self._free)} + used {len(self._refs)} + lent {len(lent)}"
                    f" is not the pool of {self.num_rblocks}"
                )
            if used_block_ids is not None:
                self._check_references(used_block_ids)

    def _check_references(self, used_block_ids: Sequence[int]) -> None:
        counted: dict[int, int] = {}
        for block_id in used_block_ids:
            counted[block_id] = counted.get(block_id, 0) + 1
        if counted != self._refs:
            raise IntegrityError(f"references of requests {counted} differ from the allocator's {self._refs}")

    def _checked_used(self, block_ids: Iterable[int]) -> list[int]:
        checked = list(block_ids)
        unknown = [block_id for block_id in checked if block_id not in self._refs]
        if unknown or len(set(checked)) != len(checked):
            raise IntegrityError(f"rBlocks {unknown or checked} are not in use, or named twice")
        return checked
