"""Room for a request that another instance hands over: its rBlocks, and a place for the one that is not full yet."""

import threading
from collections.abc import Sequence

import msgspec
import pytest

from megatron_distkv.attention import LoanTable
from megatron_distkv.clock import SystemClock
from megatron_distkv.errors import DistkvError
from megatron_distkv.handover import IncomingHandovers, incoming
from megatron_distkv.kvcache.open_slots import OpenSlots
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.messages import CommitHeader, InheritedSpan, PrepareHeader, Refusal, RequestKV
from megatron_distkv.rmanager import Followers, NoFollowers
from tests.pool.at_once import AtOnce
from tests.soon import SOON_S

RBLOCK_SIZE = 4


def open_handovers(
    allocator: RBlockAllocator, slots: OpenSlots | None = None, followers: Followers | None = None
) -> IncomingHandovers:
    ranks = followers or NoFollowers()
    slots = slots or OpenSlots(None)
    return IncomingHandovers(allocator, LoanTable(), ranks, RBLOCK_SIZE, slots, AtOnce(), SystemClock())


def test_as_many_may_come_as_there_are_places_and_who_does_not_come_leaves_its_place() -> None:
    # Given a successor with rBlocks for many requests, and places for two that come
    allocator, slots = RBlockAllocator(20, 0), OpenSlots(2)
    handovers = open_handovers(allocator, slots)
    for handover_id in ("x", "y", "x"):
        assert handovers.prepare(PrepareHeader(handover_id, 3), "p").refusal is None
    # When a third wants to come, then there is no room, and its rBlocks are free again
    assert handovers.prepare(PrepareHeader("z", 3), "p").refusal is Refusal.FULL
    assert allocator.num_free == 20 - 2 * 3
    # And when one of the first does not come after all, then there is
    assert handovers.give_up("x", "p")
    assert handovers.prepare(PrepareHeader("z", 3), "p").refusal is None
    with handovers.held() as held:
        slots.check_integrity(held.handover_ids)
        assert held.handover_ids == ["y", "z"]


def test_one_that_changes_its_mind_after_all_has_come_leaves_nothing() -> None:
    # Given a request that has come, and that nobody has asked for
    allocator = RBlockAllocator(8, 0)
    handovers = open_handovers(allocator)
    assert handovers.prepare(PrepareHeader("x", 1), "p").refusal is None
    (block_id,) = used(handovers)
    header = CommitHeader("x", 3, 1, 3, [], 1, 0.0, RequestKV(), {0: block_id}, [])
    assert handovers.commit(header, "p").refusal is None
    # When the one that leaves keeps it after all, then it is gone here
    assert handovers.give_up("x", "p")
    assert handovers.claim("x") is None
    assert allocator.num_free == 8


def used(handovers: IncomingHandovers) -> Sequence[int]:
    with handovers.held() as held:
        return held.block_ids


class SlowRanks:
    """Followers that take their time, as one that computes a long step."""

    def __init__(self) -> None:
        self.is_asked = threading.Event()
        self.may_answer = threading.Event()

    def grant(self, loan_id: str, debtor: str, block_ids: Sequence[int]) -> None:
        self.is_asked.set()
        assert self.may_answer.wait(SOON_S)

    def revoke(self, loan_id: str) -> None:
        pass


def test_the_engine_does_not_wait_while_other_ranks_are_told() -> None:
    # Given a handover that the other ranks of the successor are being told of, and are slow to hear
    ranks, allocator = SlowRanks(), RBlockAllocator(8, 0)
    handovers = open_handovers(allocator, followers=ranks)
    asking = threading.Thread(target=handovers.prepare, args=(PrepareHeader("x", 3), "p"))
    asking.start()
    assert ranks.is_asked.wait(SOON_S)

    # When the engine's thread does what it does in every step, then it does not wait for them
    done = threading.Event()

    def step() -> None:
        handovers.expire()
        assert handovers.claim("x") is None
        assert len(used(handovers)) == 3
        done.set()

    stepping = threading.Thread(target=step)
    stepping.start()
    went_on = done.wait(SOON_S / 3)
    # And what is given up meanwhile ends when they have heard
    if went_on:
        assert handovers.give_up("x", "p")
        assert allocator.num_free == 5
    ranks.may_answer.set()
    asking.join()
    stepping.join()
    assert went_on
    handovers.expire()
    assert allocator.num_free == 8
    allocator.check_integrity([])


def test_what_nobody_asks_for_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "PATIENCE_S", 0.0)
    allocator = RBlockAllocator(8, 0)
    handovers = open_handovers(allocator)
    assert handovers.prepare(PrepareHeader("x", 3), "p").refusal is None
    handovers.expire()
    assert allocator.num_free == 8
    assert list(used(handovers)) == []


# ------------------------------------------------------------------ what a stranger may say

SPAN = InheritedSpan(1, [3], "c", 1, "unix:c", "loan")
GOOD = CommitHeader("x", 10, 2, 11, [], 1, 0.0, RequestKV(), {0: 7, 2: 6}, [SPAN])


@pytest.fixture
def kept() -> IncomingHandovers:
    """Room for three rBlocks of `d`: 7, 6 and 5."""
    allocator = RBlockAllocator(8, 8)
    allocator.free(allocator.allocate_up_to(8))
    handovers = open_handovers(allocator)
    assert handovers.prepare(PrepareHeader("x", 3), "d").block_ids == [7, 6, 5]
    return handovers


def change(**fields: object) -> CommitHeader:
    return msgspec.structs.replace(GOOD, **fields)


@pytest.mark.parametrize(
    "header",
    [
        change(here={0: 7, 2: 4}),  # not prepared
        change(here={0: 7, 2: 7}),  # twice
        change(here={0: 7}),  # rBlock 2 lies nowhere
        change(here={0: 7, 1: 5, 2: 6}),  # rBlock 1 lies in two places
        change(num_computed_tokens=20),  # rBlocks 3 and 4 lie nowhere
        change(lost=[(4, 4)]),
        change(lost=[(5, 3)]),
        change(lost=[(4, 6), (6, 8)]),
        change(lost=[(8, 12)]),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(header: CommitHeader, kept: IncomingHandovers) -> None:
    with pytest.raises(DistkvError):
        kept.commit(header, "d")
    assert kept.claim("x") is None
    # And one that does is not
    assert kept.commit(GOOD, "d").refusal is None
    assert kept.claim("x") is not None


def test_nobody_hands_over_in_the_name_of_another(kept: IncomingHandovers) -> None:
    assert kept.commit(GOOD, "e").refusal is Refusal.UNKNOWN_LOAN
    assert kept.prepare(PrepareHeader("x", 4), "e").refusal is Refusal.CONFLICT
    assert not kept.give_up("x", "e")
    assert kept.prepare(PrepareHeader("y", 6), "e").refusal is Refusal.FULL
    assert kept.give_up("x", "d")
    with kept.held() as incoming:
        assert incoming.block_ids == []
