"""Whoever is lost in the middle of a handover: the same tokens, only what was lost is computed again, nothing stays."""

import time

import msgspec
import pytest

from megatron_distkv.attention import LoanTable
from megatron_distkv.engine.instance import Instance
from megatron_distkv.errors import DistkvError
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.messages import AdoptHeader, HandedOver, Holder, InheritedSpan, PrepareHeader, Refusal, RequestKV
from megatron_distkv.rmanager import Adoptions, NoFollowers, adoptions, bequests
from tests.engine.test_handover import SAMPLED, Check, Client, expected, pool, random_prompt
from tests.ledger.snapshot import snapshot

__all__ = ["expected", "pool"]
Pool = dict[str, Instance]


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoptions, "PATIENCE_S", 0.5)
    monkeypatch.setattr(bequests, "PATIENCE_S", 0.5)


def assert_all_comes_back(pool: Pool, server: EmbeddedServer) -> None:
    end = time.monotonic() + 10
    while any(x.status(0).free_rblocks < 16 for x in pool.values()) or snapshot(server).loans:
        assert time.monotonic() < end, ([x.status(0) for x in pool.values()], snapshot(server).loans)
        for instance in pool.values():
            instance.step()
        time.sleep(0.02)
    for instance in pool.values():
        instance.check_integrity()


def decoding(pool: Pool, length: int) -> Client:
    client = Client(pool, random_prompt(length), SAMPLED)
    client.until(lambda: len(client.token_ids) == 3)
    return client


def begin_to_leave(pool: Pool, client: Client) -> str:
    """d has chosen a successor, and has not yet said good-bye; returns its name."""
    handover = pool["d"]._departure._handover
    pool["d"].drain(within_s=60)
    client.until(lambda: handover._passage is not None)
    assert handover._passage is not None
    assert client.farewell is None
    return str(handover._passage.successor.instance)


def test_a_successor_lost_before_it_has_all_costs_nothing(pool: Pool, server: EmbeddedServer, expected: Check) -> None:
    # Given a request that is being copied
    client = decoding(pool, 60)
    first = begin_to_leave(pool, client)
    # When nobody reaches the successor any more
    pool[first]._doors.close()
    # Then another one gets it
    client.until(lambda: client.farewell is not None)
    assert client.farewell is not None
    assert client.farewell.successor not in (first, "")
    assert client.follow()
    client.finish()
    assert client.request.num_recomputed_tokens == 0
    expected(client)
    assert_all_comes_back(pool, server)


def test_a_successor_lost_with_the_request_costs_its_kv(pool: Pool, server: EmbeddedServer, expected: Check) -> None:
    client = decoding(pool, 60)
    begin_to_leave(pool, client)
    client.until(lambda: client.farewell is not None)
    # When nobody asks for it where it went, but elsewhere
    assert client.farewell is not None
    other = "c" if client.farewell.successor == "s" else "s"
    client.farewell = msgspec.structs.replace(client.farewell, successor=other)
    assert not client.follow()
    client.finish()
    # Then it is computed again, and what was kept for it is freed
    assert client.request.num_recomputed_tokens > 60
    expected(client)
    assert_all_comes_back(pool, server)


def test_one_that_dies_while_it_leaves(pool: Pool, server: EmbeddedServer, expected: Check) -> None:
    # Given a request that is being copied
    client = decoding(pool, 150)
    successor = begin_to_leave(pool, client)
    assert pool[successor].status(0).used_rblocks > 0
    # When the one that leaves is gone, and the gateway asks another with the tokens that it has
    pool["d"].close()
    client.farewell = HandedOver("r", successor)
    assert not client.follow()
    client.finish()
    # Then it is computed again there, and nothing stays
    expected(client)
    left = {name: instance for name, instance in pool.items() if name != "d"}
    assert_all_comes_back(left, server)


def test_a_creditor_lost_before_the_successor_has_its_loan(pool: Pool, server: EmbeddedServer, expected: Check) -> None:
    # Given a request that has been handed over, with rBlocks at a third instance
    client = decoding(pool, 60)
    pool["d"].rmanager.move_to("r", 3, "c")
    third, lost = "c", 3
    begin_to_leave(pool, client)
    client.until(lambda: client.farewell is not None)
    assert client.farewell is not None
    assert client.farewell.successor == "s"
    # When that one is lost before the successor has taken over the loan
    pool[third]._doors.close()
    assert client.follow()
    client.finish()
    # Then what lay there, and nothing else, is computed again
    assert client.request.num_recomputed_tokens == lost * 8
    expected(client)
    assert_all_comes_back(pool, server)


def test_a_gateway_that_has_other_tokens_is_served_as_any(pool: Pool, server: EmbeddedServer, expected: Check) -> None:
    client = decoding(pool, 60)
    begin_to_leave(pool, client)
    client.until(lambda: client.farewell is not None)
    # When the last token of the answer has not reached the gateway
    client.token_ids.pop()
    client.logprobs.pop()
    assert not client.follow()
    client.finish()
    expected(client)
    assert_all_comes_back(pool, server)


# ------------------------------------------------------------------ what a stranger may say

RBLOCK_SIZE = 4
SPAN = InheritedSpan(1, [3], "c", "unix:c", "loan")
PARENT, OTHER = Holder("d"), Holder("e")
GOOD = AdoptHeader("x", 10, 2, 11, [], 1, 0.0, RequestKV(), {0: 7, 2: 6}, [SPAN])


@pytest.fixture
def kept() -> Adoptions:
    """Room for three rBlocks of `d`: 7, 6 and 5."""
    allocator = RBlockAllocator(8, 8)
    assert allocator.allocate_up_to(0) == []
    allocator._free.reverse()
    table = LoanTable()
    adoptions = Adoptions(allocator, table, NoFollowers(), RBLOCK_SIZE)
    assert adoptions.prepare(PrepareHeader("x", 3), PARENT).block_ids == [7, 6, 5]
    table.note_stored("x", [7, 6], slice(0, 1), 1)
    return adoptions


def change(**fields: object) -> AdoptHeader:
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
def test_a_request_that_makes_no_sense_is_refused(header: AdoptHeader, kept: Adoptions) -> None:
    with pytest.raises(DistkvError):
        kept.hand_over(header, PARENT)
    assert kept.claim("x") is None
    # And one that does is not
    assert kept.hand_over(GOOD, PARENT).refusal is None
    assert kept.claim("x") is not None


def test_nobody_hands_over_in_the_name_of_another(kept: Adoptions) -> None:
    assert kept.hand_over(GOOD, OTHER).refusal is Refusal.UNKNOWN_LOAN
    assert kept.prepare(PrepareHeader("x", 4), OTHER).refusal is Refusal.CONFLICT
    assert not kept.give_up("x", OTHER)
    assert kept.prepare(PrepareHeader("y", 6), OTHER).refusal is Refusal.FULL
    assert kept.give_up("x", PARENT)
    with kept.held() as block_ids:
        assert block_ids == []
