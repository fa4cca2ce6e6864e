"""Room for a request that another instance hands over: its rBlocks, and a place for the one that is not full yet."""

import threading
from collections.abc import Sequence

import msgspec
import pytest

from megatron_distkv.attention import Access, LoanTable
from megatron_distkv.clock import SystemClock
from megatron_distkv.errors import DistkvError
from megatron_distkv.handover import IncomingHandovers, incoming
from megatron_distkv.kvcache.open_slots import OpenSlots
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.messages import CommitHeader, Holder, InheritedSpan, PrepareHeader, Refusal, RequestKV
from megatron_distkv.rmanager import Followers, NoFollowers
from tests.pool.at_once import AtOnce
from tests.soon import SOON_S

RBLOCK_SIZE = 4
SENDER, OTHER = Holder("p"), Holder("e")


def open_handovers(
    allocator: RBlockAllocator,
    slots: OpenSlots | None = None,
    followers: Followers | None = None,
    table: LoanTable | None = None,
) -> IncomingHandovers:
    ranks = followers or NoFollowers()
    slots = slots or OpenSlots(None)
    return IncomingHandovers(allocator, table or LoanTable(), ranks, RBLOCK_SIZE, slots, AtOnce(), SystemClock())


def test_as_many_may_come_as_there_are_places_and_who_does_not_come_leaves_its_place() -> None:
    # Given a successor with rBlocks for many requests, and places for two that come
    allocator, slots = RBlockAllocator(20, 0), OpenSlots(2)
    handovers = open_handovers(allocator, slots)
    for handover_id in ("x", "y", "x"):
        assert handovers.prepare(PrepareHeader(handover_id, 3), SENDER).refusal is None
    # When a third wants to come, then there is no room, and its rBlocks are free again
    assert handovers.prepare(PrepareHeader("z", 3), SENDER).refusal is Refusal.FULL
    assert allocator.num_free == 20 - 2 * 3
    # And when one of the first does not come after all, then there is
    assert handovers.give_up("x", SENDER)
    assert handovers.prepare(PrepareHeader("z", 3), SENDER).refusal is None
    with handovers.held() as held:
        slots.check_integrity(held.handover_ids)
        assert held.handover_ids == ["y", "z"]


def test_one_that_changes_its_mind_after_all_has_come_leaves_nothing() -> None:
    # Given a request that has come, and that nobody has asked for
    allocator, table = RBlockAllocator(8, 0), LoanTable()
    handovers = open_handovers(allocator, table=table)
    assert handovers.prepare(PrepareHeader("x", 1), SENDER).refusal is None
    (block_id,) = used(handovers)
    table.note_stored("x", [block_id], slice(0, 1), 1)
    header = CommitHeader("x", 3, 1, 3, [], 1, 0.0, RequestKV(), {0: block_id}, [])
    assert handovers.commit(header, SENDER).refusal is None
    # When the one that leaves keeps it after all, then it is gone here
    assert handovers.give_up("x", SENDER)
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

    def grant(self, loan_id: str, holder: Holder, block_ids: Sequence[int]) -> None:
        self.is_asked.set()
        assert self.may_answer.wait(SOON_S)

    def transfer(self, loan_id: str, new_loan_id: str, holder: Holder) -> None:
        pass

    def revoke(self, loan_id: str) -> Sequence[frozenset[int]]:
        return ()


def test_the_engine_does_not_wait_while_other_ranks_are_told() -> None:
    # Given a handover that the other ranks of the successor are being told of, and are slow to hear
    ranks, allocator = SlowRanks(), RBlockAllocator(8, 0)
    handovers = open_handovers(allocator, followers=ranks)
    asking = threading.Thread(target=handovers.prepare, args=(PrepareHeader("x", 3), SENDER))
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
        assert handovers.give_up("x", SENDER)
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
    assert handovers.prepare(PrepareHeader("x", 3), SENDER).refusal is None
    handovers.expire()
    assert allocator.num_free == 8
    assert list(used(handovers)) == []


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
    handovers = open_handovers(allocator, followers=other, table=table)
    (first,) = handovers.prepare(PrepareHeader("x", 1), SENDER).block_ids
    for rank in (table, other.table):
        rank.note_stored("x", [first], slice(0, 1), 1)
    block_ids = handovers.prepare(PrepareHeader("x", 2), SENDER).block_ids
    for rank, count in ((table, here), (other.table, there)):
        rank.note_stored("x", block_ids[1:count], slice(0, 1), 1)

    # When the request is handed over with both
    header = CommitHeader("x", 8, 0, 8, [], 1, 0.0, RequestKV(), dict(enumerate(block_ids)), [])
    refusal = handovers.commit(header, SENDER).refusal

    # Then nobody computes with what an earlier request has left in one of them
    assert refusal is (None if is_taken else Refusal.UNKNOWN_LOAN)
    assert (handovers.claim("x") is not None) == is_taken
    assert allocator.num_free == (2 if is_taken else 4)


def test_a_handover_that_was_begun_with_a_certificate_goes_on_with_it() -> None:
    # Given a handover of a sender that has shown a certificate
    allocator, table = RBlockAllocator(8, 0), LoanTable()
    handovers, sender = open_handovers(allocator, table=table), Holder("p", "of its host")
    assert handovers.prepare(PrepareHeader("x", 1), sender).refusal is None
    # When others come in its name, then in vain
    for thief in (Holder("p", "of another host"), Holder("p")):
        assert handovers.prepare(PrepareHeader("x", 2), thief).refusal is Refusal.CONFLICT
        assert not handovers.give_up("x", thief)
    # And the room stays the sender's, when it asks for more
    block_ids = handovers.prepare(PrepareHeader("x", 2), sender).block_ids
    assert table.may_write(sender, ["x"], block_ids) is Access.GRANTED
    assert table.may_write(Holder("p"), ["x"], block_ids) is Access.FOREIGN


def test_the_first_holder_is_kept_when_it_asks_for_more() -> None:
    # Given a handover that was begun over a channel that shows no certificate
    table = LoanTable()
    handovers = open_handovers(RBlockAllocator(8, 0), table=table)
    assert handovers.prepare(PrepareHeader("x", 1), SENDER).refusal is None
    # When its sender asks for more over one that does, then it may use both
    block_ids = handovers.prepare(PrepareHeader("x", 2), Holder("p", "of its host")).block_ids
    assert table.may_write(SENDER, ["x"], block_ids) is Access.GRANTED


def test_what_has_come_stays_when_the_sender_says_so_twice(kept: IncomingHandovers) -> None:
    assert kept.commit(GOOD, SENDER).refusal is None
    assert kept.commit(GOOD, SENDER).refusal is None
    assert kept.commit(change(sampling_seed=2), SENDER).refusal is Refusal.CONFLICT
    assert kept.claim("x") is not None


# ------------------------------------------------------------------ what a stranger may say

SPAN = InheritedSpan(1, [3], "c", 1, "unix:c", "loan")
GOOD = CommitHeader("x", 10, 2, 11, [], 1, 0.0, RequestKV(), {0: 7, 2: 6}, [SPAN])


@pytest.fixture
def kept() -> IncomingHandovers:
    """Room for three rBlocks of `p`: 7, 6 and 5."""
    allocator = RBlockAllocator(8, 8)
    allocator.free(allocator.allocate_up_to(8))
    table = LoanTable()
    handovers = open_handovers(allocator, table=table)
    assert handovers.prepare(PrepareHeader("x", 3), SENDER).block_ids == [7, 6, 5]
    table.note_stored("x", [7, 6], slice(0, 1), 1)
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
        kept.commit(header, SENDER)
    assert kept.claim("x") is None
    # And one that does is not
    assert kept.commit(GOOD, SENDER).refusal is None
    assert kept.claim("x") is not None


def test_nobody_hands_over_in_the_name_of_another(kept: IncomingHandovers) -> None:
    assert kept.commit(GOOD, OTHER).refusal is Refusal.UNKNOWN_LOAN
    assert kept.prepare(PrepareHeader("x", 4), OTHER).refusal is Refusal.CONFLICT
    assert not kept.give_up("x", OTHER)
    assert kept.prepare(PrepareHeader("y", 6), OTHER).refusal is Refusal.FULL
    assert kept.give_up("x", SENDER)
    with kept.held() as incoming:
        assert incoming.block_ids == []
