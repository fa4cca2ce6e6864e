"""A member of the pool, with its secret and any name it likes, gives orders to a follower rank of an instance."""

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import pytest

from megatron_distkv.attention import Access
from megatron_distkv.engine import worker
from megatron_distkv.engine.addresses import control_address, rank_address
from megatron_distkv.engine.batch import StepPlan, StepReply
from megatron_distkv.engine.instance_secret import share_instance_secret
from megatron_distkv.engine.plan_stream import PlanSender
from megatron_distkv.engine.rank import Rank, build_rank
from megatron_distkv.errors import DistkvError, PeerLost
from megatron_distkv.messages import (
    Acknowledge,
    GrantHeader,
    Holder,
    MessageKind,
    Revoked,
    RevokeHeader,
    TransferHeader,
)
from megatron_distkv.model import init_tensor_parallel
from megatron_distkv.transport import Channel, connect, read_secret, write_new_secret
from tests.conftest import MakeConfig
from tests.transport.raw_peer import hello

IDLE = StepPlan(7, [], [], [], [], [], [])
ORDERS = [
    (MessageKind.STEP, IDLE),
    (MessageKind.GRANT, GrantHeader("loan", Holder("thief"), [1])),
    (MessageKind.REVOKE, RevokeHeader("a loan of somebody")),
    (MessageKind.TRANSFER, TransferHeader("a loan of somebody", "loan of mine", Holder("thief"))),
    (MessageKind.STOP, RevokeHeader("")),
]


class Follower(NamedTuple):
    """A rank that takes orders (of an instance of one rank: it is its own leader's only follower here)."""

    rank: Rank
    thread: threading.Thread
    pool_secret: bytes
    instance_secret: bytes

    def channel(self, secret: bytes, *, control: bool) -> Channel:
        config = self.rank.config
        address = (control_address if control else rank_address)(config.run_dir, config.instance_id, 0)
        said = hello(instance_id=config.instance_id, pool="default", request_bytes=1 << 16)
        return connect(address, said, peer="follower", timeout_s=10, secret=secret)


@pytest.fixture
def follower(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Follower]:
    run_dir = make_config().run_dir
    write_new_secret(run_dir / "secret")
    init_tensor_parallel(1)
    secret = share_instance_secret()
    monkeypatch.setattr(worker, "share_instance_secret", lambda: secret)
    config = make_config("i", ledger={"secret_file": run_dir / "secret"})
    rank = build_rank(config, init_tensor_parallel(1))
    thread = threading.Thread(target=worker.Worker(rank).run)
    thread.start()
    one = Follower(rank, thread, read_secret(run_dir / "secret"), secret)
    yield one
    with contextlib.suppress(PeerLost):  # it has ended before
        one.channel(secret, control=True).close()  # its leader, which it does not outlive
    thread.join(10)


def give(channel: Channel, kind: MessageKind, order: msgspec.Struct) -> bytes:
    header = PlanSender().encode(order) if isinstance(order, StepPlan) else msgspec.msgpack.encode(order)
    return channel.call(kind, header, deadline_s=10).header


def test_the_pools_secret_and_the_instances_name_are_not_enough(follower: Follower) -> None:
    # Given a loan, and a member of the pool that says it is the instance itself
    follower.rank.loan_table.grant("a loan of somebody", Holder("somebody"), [0])
    thief = follower.channel(follower.pool_secret, control=False)
    # When it gives orders where other instances ask, then none is followed
    for kind, order in ORDERS:
        with pytest.raises(DistkvError, match="takes no"):
            give(thief, kind, order)
    # And where orders are taken it is not let in
    with pytest.raises(PeerLost, match="does not know"):
        follower.channel(follower.pool_secret, control=True)
    # And when it leaves, nobody takes that for the leader's end
    thief.close()
    leader, table = follower.channel(follower.instance_secret, control=True), follower.rank.loan_table
    assert msgspec.msgpack.decode(give(leader, MessageKind.STEP, IDLE), type=StepReply) == StepReply({})
    assert table.may_write(Holder("somebody"), ["a loan of somebody"], [0]) is Access.GRANTED
    assert table.may_write(Holder("thief"), ["loan"], [1]) is not Access.GRANTED
    leader.close()


def test_the_leader_is_obeyed(follower: Follower) -> None:
    leader = follower.channel(follower.instance_secret, control=True)
    table = follower.rank.loan_table
    for kind, order in ORDERS[1:3]:
        assert msgspec.msgpack.decode(give(leader, kind, order), type=Acknowledge) == Acknowledge()
    assert table.may_write(Holder("thief"), ["loan"], [1]) is Access.GRANTED
    with contextlib.suppress(PeerLost):  # it may be gone before its answer is out
        give(leader, *ORDERS[-1])
    follower.thread.join(10)
    assert not follower.thread.is_alive()
    leader.close()


def test_a_follower_says_what_was_stored_under_a_loan_that_ends(follower: Follower) -> None:
    # Given a loan of two rBlocks, one of which was stored here
    leader = follower.channel(follower.instance_secret, control=True)
    give(leader, MessageKind.GRANT, GrantHeader("loan", Holder("debtor"), [1, 2]))
    follower.rank.loan_table.note_stored("loan", [2], slice(0, 2), 2)

    # When it becomes another's, and ends
    give(leader, MessageKind.TRANSFER, TransferHeader("loan", "new", Holder("heir")))
    reply = give(leader, MessageKind.REVOKE, RevokeHeader("new"))

    # Then the leader hears of that one
    assert msgspec.msgpack.decode(reply, type=Revoked) == Revoked([2])
    leader.close()


def test_a_leader_that_is_gone_ends_its_follower(follower: Follower) -> None:
    follower.channel(follower.instance_secret, control=True).close()
    follower.thread.join(10)
    assert not follower.thread.is_alive()
