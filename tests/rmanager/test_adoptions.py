"""Room for a request that another instance hands over: its rBlocks, and a place for the one that is not full yet."""

from collections.abc import Sequence

import pytest

from megatron_distkv.attention import LoanTable
from megatron_distkv.kvcache.open_slots import OpenSlots
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.messages import AdoptHeader, Holder, PrepareHeader, Refusal, RequestKV
from megatron_distkv.rmanager import Adoptions, NoFollowers

PARENT = Holder("p")


def test_as_many_may_come_as_there_are_places_and_who_does_not_come_leaves_its_place() -> None:
    # Given a successor with rBlocks for many requests, and places for two that come
    allocator, slots = RBlockAllocator(20, 0), OpenSlots(2)
    adoptions = Adoptions(allocator, LoanTable(), NoFollowers(), 8, slots)
    for adoption_id in ("x", "y", "x"):
        assert adoptions.prepare(PrepareHeader(adoption_id, 3), PARENT).refusal is None
    # When a third wants to come, then there is no room, and its rBlocks are free again
    assert adoptions.prepare(PrepareHeader("z", 3), PARENT).refusal is Refusal.FULL
    assert allocator.num_free == 20 - 2 * 3
    # And when one of the first does not come after all, then there is
    assert adoptions.give_up("x", PARENT)
    assert adoptions.prepare(PrepareHeader("z", 3), PARENT).refusal is None
    slots.check_integrity(adoptions.ids)
    assert adoptions.ids == ["y", "z"]


class OtherRank:
    """A follower with a table of its own."""

    def __init__(self) -> None:
        self.table = LoanTable()

    def grant(self, loan_id: str, holder: Holder, block_ids: Sequence[int]) -> None:
        self.table.grant(loan_id, holder, block_ids)

    def transfer(self, loan_id: str, new_loan_id: str, holder: Holder) -> None:
        self.table.transfer(loan_id, new_loan_id, holder)

    def revoke(self, loan_id: str) -> list[frozenset[int]]:
        return [self.table.revoke(loan_id)]


@pytest.mark.parametrize(("here", "there", "is_taken"), [(2, 2, True), (1, 2, False), (2, 1, False)])
def test_a_request_whose_kv_was_not_stored_on_all_ranks_is_not_taken(here: int, there: int, is_taken: bool) -> None:
    # Given room for two rBlocks, of which so many are stored on this rank and on the other
    allocator, table, other = RBlockAllocator(4, 0), LoanTable(), OtherRank()
    adoptions = Adoptions(allocator, table, other, 8)
    first = adoptions.prepare(PrepareHeader("x", 1), PARENT).block_ids
    for rank, count in ((table, here), (other.table, there)):
        rank.note_stored("x", first, slice(0, 1), 1)
        if count == 2:
            (more,) = set(adoptions.prepare(PrepareHeader("x", 2), PARENT).block_ids) - set(first)
            rank.note_stored("x", [more], slice(0, 1), 1)
    block_ids = adoptions.prepare(PrepareHeader("x", 2), PARENT).block_ids

    # When the request is handed over with both
    header = AdoptHeader("x", 16, 0, 16, [], 1, 0.0, RequestKV(), dict(enumerate(block_ids)), [])
    refusal = adoptions.hand_over(header, PARENT).refusal

    # Then nobody computes with what an earlier request has left in one of them
    assert refusal is (None if is_taken else Refusal.UNKNOWN_LOAN)
    assert (adoptions.claim("x") is not None) == is_taken
    assert allocator.num_free == (2 if is_taken else 4)
