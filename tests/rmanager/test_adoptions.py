"""Room for a request that another instance hands over: its rBlocks, and a place for the one that is not full yet."""

from megatron_distkv.attention import LoanTable
from megatron_distkv.kvcache.open_slots import OpenSlots
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.messages import PrepareHeader, Refusal
from megatron_distkv.rmanager import Adoptions, NoFollowers


def test_as_many_may_come_as_there_are_places_and_who_does_not_come_leaves_its_place() -> None:
    # Given a successor with rBlocks for many requests, and places for two that come
    allocator, slots = RBlockAllocator(20, 0), OpenSlots(2)
    adoptions = Adoptions(allocator, LoanTable(), NoFollowers(), 8, slots)
    for adoption_id in ("x", "y", "x"):
        assert adoptions.prepare(PrepareHeader(adoption_id, 3), "p").refusal is None
    # When a third wants to come, then there is no room, and its rBlocks are free again
    assert adoptions.prepare(PrepareHeader("z", 3), "p").refusal is Refusal.FULL
    assert allocator.num_free == 20 - 2 * 3
    # And when one of the first does not come after all, then there is
    assert adoptions.give_up("x", "p")
    assert adoptions.prepare(PrepareHeader("z", 3), "p").refusal is None
    slots.check_integrity(adoptions.ids)
    assert adoptions.ids == ["y", "z"]
