"""Whoever is lost in the middle of a handover: the same tokens, only what was lost is computed again, nothing stays."""

import time

import msgspec
import pytest

from megatron_distkv.engine.instance import Instance
from megatron_distkv.handover import incoming
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.messages import HandedOver
from megatron_distkv.pool import loans
from megatron_distkv.rblock import InstanceId
from megatron_distkv.rmanager.fetch_back import FetchBack
from tests.handover.test_handover import SAMPLED, Check, Client, expected, pool, random_prompt
from tests.ledger.snapshot import snapshot
from tests.soon import SOON_S

__all__ = ["expected", "pool"]
Pool = dict[str, Instance]


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "PATIENCE_S", 0.5)
    monkeypatch.setattr(loans, "TRANSFER_WITHIN_S", 0.5)


@pytest.fixture(autouse=True)
def what_is_lent_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would come back early, as there is room for all of it here."""
    monkeypatch.setattr(FetchBack, "find_early_ones", lambda *_: None)


def assert_all_comes_back(pool: Pool, server: EmbeddedServer) -> None:
    end = time.monotonic() + SOON_S
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
    """d has chosen a successor, which keeps room for the request, and has it not yet; returns its name."""
    sender = pool["d"].parts.sender
    pool["d"].drain(within_s=60)
    client.until(lambda: sender.successor and pool[sender.successor].status(0).used_rblocks > 0)
    assert client.notice is None
    return sender.successor


def test_a_successor_lost_before_it_has_all_costs_nothing(pool: Pool, server: EmbeddedServer, expected: Check) -> None:
    # Given a request that is being copied
    client = decoding(pool, 60)
    first = begin_to_leave(pool, client)
    # When nobody reaches the successor any more
    pool[first].parts.listeners.close()
    # Then another one gets it
    client.until(lambda: client.notice is not None)
    assert client.notice is not None
    assert client.notice.successor not in (first, "")
    assert client.follow()
    client.finish()
    assert client.request.num_recomputed_tokens == 0
    expected(client)
    assert_all_comes_back(pool, server)


def test_a_successor_lost_with_the_request_costs_its_kv(pool: Pool, server: EmbeddedServer, expected: Check) -> None:
    client = decoding(pool, 60)
    begin_to_leave(pool, client)
    client.until(lambda: client.notice is not None)
    # When nobody asks for it where it went, but elsewhere
    assert client.notice is not None
    other = "c" if client.notice.successor == "s" else "s"
    client.notice = msgspec.structs.replace(client.notice, successor=other)
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
    client.notice = HandedOver("r", successor)
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
    held = pool["d"].rmanager.table(client.request).remote_by_creditor
    client.until(lambda: held().get(InstanceId(third)) == lost)
    begin_to_leave(pool, client)
    client.until(lambda: client.notice is not None)
    assert client.notice is not None
    assert client.notice.successor == "s"
    # When that one is lost before the successor has taken over the loan
    pool[third].parts.listeners.close()
    assert client.follow()
    client.finish()
    # Then what lay there, and nothing else, is computed again
    assert client.request.num_recomputed_tokens == lost * 8
    expected(client)
    assert_all_comes_back(pool, server)


def test_a_gateway_that_has_other_tokens_is_served_as_any(pool: Pool, server: EmbeddedServer, expected: Check) -> None:
    client = decoding(pool, 60)
    begin_to_leave(pool, client)
    client.until(lambda: client.notice is not None)
    # When the last token of the answer has not reached the gateway
    client.token_ids.pop()
    client.logprobs.pop()
    assert not client.follow()
    client.finish()
    expected(client)
    assert_all_comes_back(pool, server)
