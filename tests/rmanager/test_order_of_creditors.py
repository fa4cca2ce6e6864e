"""Whom a debtor asks first: by what a query costs there, then lenders before instances, then the freest."""

import pytest

from megatron_distkv.attention import Line
from megatron_distkv.errors import PeerLost
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger import HOST_QUERY_US, LENDER, QUERY_US, ROLE, MemoryLedger
from megatron_distkv.rblock import InstanceId
from megatron_distkv.rmanager import Identity, MailboxSizes, Peers, PoolOutlook, Ways

SHAPE = RBlockShape(2, 4, 2, 16, 8, "fp32")


def unreachable(peer: str, address: str, sizes: MailboxSizes) -> Line:
    raise PeerLost(peer, "nobody is there")


def outlook(**members: tuple[int, dict[str, str]]) -> PoolOutlook:
    """That of `me` on these members, given by their free rBlocks and their info."""
    ledger, me = MemoryLedger(), Identity(InstanceId("me"))
    for name, (free, info) in members.items():
        ledger.register(InstanceId(name), name, free, 0, 60.0, info=info)
    peers = Peers("pool", me, 0, MailboxSizes(1, 1), deadline_s=1.0)
    ways = Ways(ledger, me, SHAPE, unreachable, lambda _: None, deadline_s=1.0)
    ways.look()
    return PoolOutlook(ledger, me, peers, enabled=True, ways=ways)


def order(**members: tuple[int, dict[str, str]]) -> list[str]:
    return [creditor.instance for creditor in outlook(**members).creditors()]


def test_alike_the_freest_first() -> None:
    costs = {"a": "5.0", "b": "9.0", "c": "19.9"}
    assert order(**{name: (place, {QUERY_US: costs[name]}) for place, name in enumerate("abc", start=1)}) == [*"cba"]


def test_a_lender_before_freer_instances() -> None:
    assert order(a=(50, {QUERY_US: "5"}), lender=(10, {QUERY_US: "6", ROLE: LENDER})) == ["lender", "a"]


def test_a_dear_one_last_however_free() -> None:
    slow = {QUERY_US: "20.1", ROLE: LENDER}
    assert order(slow=(500, slow), a=(10, {QUERY_US: "5"}), b=(20, {QUERY_US: "7"})) == ["b", "a", "slow"]


def test_who_says_nothing_that_can_be_read_is_not_dear() -> None:
    infos = {"nan": {QUERY_US: "nan"}, "text": {QUERY_US: "fast"}, "nothing": {}, "minus": {QUERY_US: "-1"}}
    members = {name: (place, info) for place, (name, info) in enumerate(infos.items(), start=10)}
    assert order(a=(1, {QUERY_US: "5"}), **members) == ["minus", "nothing", "text", "nan", "a"]


@pytest.mark.parametrize(
    ("own", "theirs", "free", "is_dear"),
    [("20.1", "5", 9, True), ("19.9", "5", 9, False), ("20.1", "5", 0, False), ("nan", "5", 9, False)],
)
def test_own_host_memory_comes_first_unless_others_are_much_quicker(
    own: str, theirs: str, free: int, is_dear: bool
) -> None:
    members = {"me": (4, {QUERY_US: "1", HOST_QUERY_US: own}), "a": (free, {QUERY_US: theirs})}
    assert outlook(**members).host_memory_is_dear() == is_dear
