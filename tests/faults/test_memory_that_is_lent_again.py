"""rBlocks are lent with what their last user left in them: nobody reads it, and nobody computes with it."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_distkv.config.lender import LenderConfig
from megatron_distkv.engine.lender import Lender
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger import DebtLedger
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.messages import Refusal
from megatron_distkv.metrics import INSTANCE_REGISTRY
from megatron_distkv.rblock import new_loan_id
from tests.faults.visitor import Visitor, Way, borrow, join

NUM_RBLOCKS = 8
REFUSED = (Refusal.UNKNOWN_LOAN, b"")


class Used(NamedTuple):
    """A lender whose every rBlock holds the KV of a request that has ended."""

    ledger: DebtLedger
    way: Way

    def visitor(self, name: str, rank: int = 0, num_ranks: int = 1) -> Visitor:
        return Visitor(self.way, name, join(self.ledger, name), rank, num_ranks)


@pytest.fixture(params=["auto", "int8"])
def used(request: pytest.FixtureRequest, server: EmbeddedServer, tmp_path: Path) -> Iterator[Used]:
    shape = RBlockShape(2, 4, 2, 16, 8, "fp32", kv_dtype=request.param)
    config = LenderConfig.model_validate(
        {
            "lender_id": "lender", "run_dir": tmp_path, "num_rblocks": NUM_RBLOCKS,
            "ledger": {"url": server.url, "heartbeat_interval_s": 0.1, "lease_s": 60.0},
        }
    )  # fmt: skip
    with ExitStack() as stack:
        lender = Lender(config, shape, open_ledger(server.url, "default"))
        stack.callback(lender.close)
        ledger = open_ledger(server.url, "default")
        stack.callback(ledger.close)
        (address,) = (x.address for x in ledger.snapshot().instances)
        used = Used(ledger, Way(address, shape))
        with used.visitor("first") as first:
            loan_id, block_ids = borrow(ledger, first, "lender", NUM_RBLOCKS)
            data = first.kv(NUM_RBLOCKS)
            assert first.store(loan_id, block_ids, data) is None
            assert first.fetch(loan_id, block_ids)[1] == bytes(data.numpy().data)
            assert first.release(loan_id) is None
        yield used
        lender.check_integrity()


def num_refused(kind: str) -> float:
    labels = {"kind": kind, "reason": "unwritten"}
    return INSTANCE_REGISTRY.get_sample_value("distkv_refused_accesses_total", labels) or 0.0


def test_nothing_is_read_before_it_was_stored(used: Used) -> None:
    # Given a loan of memory that another's request has used
    with used.visitor("next") as debtor:
        loan_id, block_ids = borrow(used.ledger, debtor, "lender", NUM_RBLOCKS)
        fetches, queries = num_refused("fetch"), num_refused("query")

        # When its debtor reads what it has not written, then it gets nothing, and that is counted
        for block_id in block_ids:
            assert debtor.fetch(loan_id, [block_id]) == REFUSED
            assert debtor.query([loan_id], [block_id]) == REFUSED
        assert (num_refused("fetch"), num_refused("query")) == (fetches + NUM_RBLOCKS, queries + NUM_RBLOCKS)

        # And when it has stored some, then it reads those and no others
        mine, theirs, data = block_ids[:3], block_ids[3:], debtor.kv(3, seed=1)
        assert debtor.store(loan_id, mine, data) is None
        assert debtor.fetch(loan_id, mine) == (None, bytes(data.numpy().data))
        refusal, answer = debtor.query([loan_id], mine)
        assert refusal is None
        assert answer
        assert debtor.fetch(loan_id, [*mine, theirs[0]]) == REFUSED
        assert debtor.query([loan_id], [*mine, theirs[0]]) == REFUSED
        debtor.release(loan_id)


def test_nor_of_two_loans_at_once(used: Used) -> None:
    with used.visitor("next") as debtor:
        one, ones = borrow(used.ledger, debtor, "lender", 2)
        two, twos = borrow(used.ledger, debtor, "lender", 2)
        assert debtor.store(one, ones, debtor.kv(2)) is None
        assert debtor.store(two, twos[:1], debtor.kv(1)) is None
        assert debtor.query([one, two], [*ones, twos[0]])[0] is None
        assert debtor.query([one, two], [*ones, twos[1]]) == REFUSED
        assert debtor.query([one, two], [*ones, (set(range(NUM_RBLOCKS)) - {*ones, *twos}).pop()]) == REFUSED
        for loan_id in (one, two):
            debtor.release(loan_id)


def test_a_rank_that_has_stored_its_heads_opens_no_others(used: Used) -> None:
    # Given a debtor of two ranks, each with one of the two KV heads
    with ExitStack() as stack:
        leader = stack.enter_context(used.visitor("next", 0, 2))
        other = stack.enter_context(Visitor(used.way, "next", leader.epoch, 1, 2))
        whole = stack.enter_context(Visitor(used.way, "next", leader.epoch))
        loan_id, block_ids = borrow(used.ledger, leader, "lender", 2)

        # When one of them has stored its head, then it reads that one, and nobody reads the other
        mine = leader.kv(2, seed=1)
        assert leader.store(loan_id, block_ids, mine) is None
        assert leader.fetch(loan_id, block_ids) == (None, bytes(mine.numpy().data))
        assert leader.query([loan_id], block_ids)[0] is None
        for asker in (other, whole):
            assert asker.fetch(loan_id, block_ids) == REFUSED
            assert asker.query([loan_id], block_ids) == REFUSED

        # And when the other has, then all of it is there, for who asks for all of it
        theirs = other.kv(1, seed=2)
        assert other.store(loan_id, block_ids[:1], theirs) is None
        both = torch.cat([mine[:1], theirs], dim=2)
        assert whole.fetch(loan_id, block_ids[:1]) == (None, bytes(both.numpy().data))
        assert whole.fetch(loan_id, block_ids) == REFUSED
        leader.release(loan_id)


def test_who_inherits_a_loan_reads_what_was_stored_and_nothing_else(used: Used) -> None:
    # Given a loan whose debtor has stored one of two rBlocks
    with used.visitor("next") as debtor, used.visitor("heir") as heir:
        loan_id, (stored, not_stored) = borrow(used.ledger, debtor, "lender", 2)
        data = debtor.kv(1, seed=1)
        assert debtor.store(loan_id, [stored], data) is None

        # When another takes it over
        new_id = new_loan_id(heir.name, heir.epoch, 1)
        assert heir.inherit(loan_id, new_id).block_ids == [stored, not_stored]

        # Then it reads that one, and who had it reads nothing
        assert heir.fetch(new_id, [stored]) == (None, bytes(data.numpy().data))
        assert heir.fetch(new_id, [not_stored]) == REFUSED
        assert debtor.fetch(loan_id, [stored]) == REFUSED
        assert debtor.fetch(new_id, [stored]) == REFUSED
        assert heir.release(new_id) is None
