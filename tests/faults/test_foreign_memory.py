"""A member of the pool that asks for memory lent to another: refused, counted, nothing read and nothing written."""

from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import pytest
import torch

from megatron_distkv.engine.llm import LLM
from megatron_distkv.errors import PeerLost
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.messages import Acknowledge, MessageKind, QueryHeader, QueryShare, Refusal, StoreHeader
from megatron_distkv.metrics import INSTANCE_REGISTRY
from megatron_distkv.pool import HeldLoan, RequestOwner
from megatron_distkv.rblock import new_loan_id
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from megatron_distkv.transport import Channel, connect, read_secret, write_new_secret
from tests.conftest import MakeConfig
from tests.soon import wait_until
from tests.transport.raw_peer import hello

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPT = [3 + i % 100 for i in range(150)]  # 19 rBlocks and some


class Debt(NamedTuple):
    """`debtor` holds a loan of `creditor`, in the middle of a request."""

    debtor: LLM
    creditor: LLM
    loan: HeldLoan
    block_ids: list[int]
    secret: bytes

    @property
    def pool(self) -> torch.Tensor:
        return self.creditor.instance.parts.rank.memory.pool.tensor_BLK2ND


@pytest.fixture
def debt(make_config: MakeConfig, server: EmbeddedServer) -> Iterator[Debt]:
    run_dir = make_config().run_dir
    write_new_secret(run_dir / "secret")
    ledger = {"url": server.url, "heartbeat_interval_s": 0.1, "lease_s": 5.0, "secret_file": run_dir / "secret"}
    scheduler = {"max_batched_tokens": 48}
    with (
        LLM(make_config("b", num_rblocks=64, ledger=ledger, scheduler=scheduler)) as creditor,
        LLM(make_config("a", num_rblocks=16, ledger=ledger, scheduler=scheduler)) as debtor,
    ):
        request = Request("long", PROMPT, GREEDY)
        debtor.instance.add(request)
        while not request.output_token_ids:
            debtor.instance.step()
        (loan, *_) = debtor.instance.parts.loans.of(RequestOwner("long"))
        spans = debtor.instance.rmanager.table(request).remote_spans()
        block_ids = [block for span in spans if span.loan_id == loan.loan_id for block in span.block_ids]
        yield Debt(debtor, creditor, loan, block_ids, read_secret(run_dir / "secret"))
        while not debtor.instance.scheduler.is_idle:
            debtor.instance.step()
        debtor.instance.check_integrity()
        creditor.instance.check_integrity()


def channel(debt: Debt, name: str, secret: bytes | None = None) -> Channel:
    """Of who knows the pool's secret, or this one."""
    epoch = debt.debtor.instance.parts.rank.identity.epoch
    return connect(
        debt.loan.peer.address.format(rank=0),
        hello(instance_id=name, epoch=epoch, pool="default", request_bytes=1 << 20),
        peer="b",
        timeout_s=5,
        secret=debt.secret if secret is None else secret,
    )


def num_refused(kind: str, reason: str) -> float:
    labels = {"kind": kind, "reason": reason}
    return INSTANCE_REGISTRY.get_sample_value("distkv_refused_accesses_total", labels) or 0.0


def query(debt: Debt, thief: Channel, loan_id: str, block_ids: list[int]) -> tuple[Refusal | None, int]:
    """What the creditor says, and how many bytes it gives."""
    num_heads = debt.creditor.instance.parts.rank.shape.query_heads_per_rank
    q = torch.zeros(1, num_heads, debt.pool.shape[-1], dtype=debt.pool.dtype)
    header = QueryHeader(0, 0, [QueryShare([loan_id], block_ids, 1)])
    reply = thief.call(MessageKind.QUERY, msgspec.msgpack.encode(header), [q], deadline_s=5)
    return msgspec.msgpack.decode(reply.header, type=Acknowledge).refusal, len(reply.payload)


def store(debt: Debt, thief: Channel, loan_id: str, block_ids: list[int]) -> Refusal | None:
    header = msgspec.msgpack.encode(StoreHeader(loan_id, block_ids))
    data = torch.zeros(len(block_ids), *debt.pool.shape[1:], dtype=debt.pool.dtype)
    reply = thief.call(MessageKind.STORE, header, [data], deadline_s=5)
    return msgspec.msgpack.decode(reply.header, type=Acknowledge).refusal


def test_another_debtors_rblocks_are_neither_read_nor_written(debt: Debt) -> None:
    # Given a member of the pool who knows everything of a loan, but is not its debtor
    thief, before = channel(debt, "thief"), debt.pool.clone()
    queries, stores = num_refused("query", "foreign"), num_refused("store", "foreign")

    # When it asks for the debtor's rBlocks, and writes to them
    assert query(debt, thief, debt.loan.loan_id, debt.block_ids[:1]) == (Refusal.UNKNOWN_LOAN, 0)
    assert store(debt, thief, debt.loan.loan_id, debt.block_ids[:1]) is Refusal.UNKNOWN_LOAN

    # Then it is refused and counted, and the memory is as it was
    assert (num_refused("query", "foreign"), num_refused("store", "foreign")) == (queries + 1, stores + 1)
    assert torch.equal(debt.pool, before)
    thief.close()


def test_a_false_name_does_not_help_without_the_loans_unguessable_end(debt: Debt) -> None:
    # Given somebody who calls himself the debtor, and counts loans as the debtor does
    thief, before = channel(debt, "a"), debt.pool.clone()
    guess = debt.loan.loan_id.rpartition(".")[0]
    refused = num_refused("query", "ended")
    for loan_id in (guess, f"{guess}.", f"{guess}.{'0' * 32}"):
        assert query(debt, thief, loan_id, debt.block_ids[:1]) == (Refusal.UNKNOWN_LOAN, 0)
        assert store(debt, thief, loan_id, debt.block_ids[:1]) is Refusal.UNKNOWN_LOAN
    assert num_refused("query", "ended") == refused + 3

    # Then the later layers of the real debtor's question are not his either
    header = msgspec.msgpack.encode(QueryHeader(debt.debtor.instance.status(0).num_steps - 1, 1))

    reply = thief.call(MessageKind.QUERY, header, deadline_s=5)
    assert msgspec.msgpack.decode(reply.header, type=Acknowledge).refusal is Refusal.UNKNOWN_LOAN
    assert torch.equal(debt.pool, before)
    thief.close()


def test_a_debtor_does_not_get_beyond_its_loan(debt: Debt) -> None:
    me, before = channel(debt, "a"), debt.pool.clone()
    others = sorted(set(range(len(debt.pool))) - set(debt.block_ids) - set(debt.loan.unused))[:2]
    assert query(debt, me, debt.loan.loan_id, others) == (Refusal.UNKNOWN_LOAN, 0)
    assert store(debt, me, debt.loan.loan_id, [debt.block_ids[0], others[0]]) is Refusal.UNKNOWN_LOAN
    assert torch.equal(debt.pool, before)
    me.close()


def test_a_stranger_gets_no_channel_to_a_real_instance(debt: Debt) -> None:
    with pytest.raises(PeerLost, match="does not know this pool's secret"):
        channel(debt, "a", b"guess" * 8)


def test_loans_cannot_be_told_from_their_number(debt: Debt) -> None:
    ends = {debt.loan.loan_id.rpartition(".")[2]} | {new_loan_id("a", 1, 1).rpartition(".")[2] for _ in range(20)}
    assert len(ends) == 21
    assert all(len(end) == 32 for end in ends)


def test_two_instances_with_different_secrets_do_not_lend(
    make_config: MakeConfig, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = {"url": server.url, "heartbeat_interval_s": 0.1, "lease_s": 5.0}
    monkeypatch.setenv("DISTKV_SECRET", "the secret of this pool")
    with LLM(make_config("b", ledger=ledger)) as creditor:
        monkeypatch.setenv("DISTKV_SECRET", "the secret of another")
        with LLM(make_config("a", ledger=ledger)) as debtor:
            # When one asks the other, which the ledger recommends
            loans, owner = debtor.instance.parts.loans, RequestOwner("r")
            loans.wish(owner, 4)
            loans.flush(30.0)

            # Then there is none, and no loan is left anywhere
            assert loans.of(owner) == []
            assert creditor.instance.status(0).lent_rblocks == 0
            wait_until(lambda: debtor.instance.parts.ledger.snapshot().loans == ())
