"""Whom a debtor asks first: by what a query costs there, then lenders before instances, then the freest."""

from typing import Any

import pytest

from megatron_distkv.clock import SystemClock
from megatron_distkv.config.instance import LedgerConfig
from megatron_distkv.errors import PeerLost
from megatron_distkv.ledger import CreditorOffer, MemoryLedger
from megatron_distkv.pool import Candidates, Identity, LinkCost, Links, MemberInfo, Membership, Quarantine
from megatron_distkv.pool.links import NUM_PROBED
from megatron_distkv.rblock import InstanceId
from tests.pool.members import SHAPE, info

NEAR, FAR = LinkCost(20.0, 5000.0, 41.0, 0.3), LinkCost(2000.0, 100.0, 4002.0, 16.0)


class Pool:
    """What `me` knows of these members, given by their free rBlocks and what they say of themselves."""

    def __init__(
        self, me: dict[str, Any] | None = None, links: dict[str, LinkCost] | None = None, **members: tuple[int, Any]
    ) -> None:
        self.ledger, self.clock = MemoryLedger(), SystemClock(seed=1)
        self.cooldown, self.lost = Quarantine(self.clock), Quarantine(self.clock)
        for name, (free, facts) in members.items():
            said = facts if facts is None or "member" in facts else info(**facts)
            self.ledger.register(InstanceId(name), name, free, 0, 60.0, info=said)
        self._costs = links or {}
        membership = Membership(
            self.ledger, Identity(InstanceId("me")), LedgerConfig(), "me", 4, 0,
            MemberInfo(shape=SHAPE, **(me or {})), self.clock,
        )  # fmt: skip
        membership.join()
        membership.beat()
        self.links = Links(self.clock, self._measure, lambda _: None)
        self.candidates = Candidates(self.ledger, membership, self.links, self.cooldown, self.lost, enabled=True)
        self.candidates.probe_links()

    def _measure(self, creditor: CreditorOffer) -> LinkCost:
        if creditor.instance not in self._costs:
            raise PeerLost(creditor.instance, "nobody is there")
        return self._costs[creditor.instance]

    def order(self) -> list[str]:
        return [candidate.name for candidate in self.candidates.look(1 << 30)]


def test_alike_the_freest_first() -> None:
    costs = {"a": 5.0, "b": 9.0, "c": 19.9}
    assert Pool(**{name: (place, {"query_us": costs[name]}) for place, name in enumerate("abc", start=1)}).order() == [
        *"cba"
    ]


def test_a_lender_before_freer_instances() -> None:
    pool = Pool(a=(50, {"query_us": 5.0}), lender=(10, {"query_us": 6.0, "role": "lender"}))
    assert pool.order() == ["lender", "a"]


def test_a_slow_one_last_however_free() -> None:
    slow = {"query_us": 20.1, "role": "lender"}
    assert Pool(slow=(500, slow), a=(10, {"query_us": 5.0}), b=(20, {"query_us": 7.0})).order() == ["b", "a", "slow"]


def test_who_is_far_is_asked_last_however_free() -> None:
    # Given two creditors that compute alike, the freer one behind a slow link
    pool = Pool(links={"near": NEAR, "far": FAR}, near=(10, {"query_us": 5.0}), far=(500, {"query_us": 5.0}))
    assert pool.order() == ["near", "far"]


def test_a_link_not_measured_yet_makes_no_other_look_slow() -> None:
    # Given two creditors that compute alike; the freer one's link is known, of the other's nothing is
    pool = Pool(links={"known": NEAR}, new=(10, {"query_us": 0.1}), known=(500, {"query_us": 0.1}))
    assert pool.order() == ["known", "new"]


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"member": ""},
        {"member": "nonsense"},
        {"member": "[" * 100_000},
        {"member": '{"format": 999, "info": {}}'},
        {"member": '{"format": 1, "info": {"shape": 3}}'},
        {"role": "lender", "rblock_size": "8"},
    ],
)
def test_nobody_borrows_from_whom_nothing_is_understood(said: dict[str, str]) -> None:
    """Another version, or garbage; the rest of the pool is as good as ever."""
    ledger_says = {"odd": (99, {**said, "member": said.get("member", "")}), "a": (5, {})}
    pool = Pool(**ledger_says)  # type: ignore[arg-type]
    assert pool.order() == ["a"]


def test_who_is_in_quarantine_is_neither_asked_nor_counted() -> None:
    # Given three creditors
    pool = Pool(a=(5, {}), b=(7, {}), c=(11, {}))
    assert pool.candidates.borrowable_rblocks == 23
    # When one was lost, and another could not do what it was asked
    pool.lost.put("a", 60.0)
    pool.cooldown.put("b", 60.0)
    # Then only the third counts
    assert pool.order() == ["c"]
    assert pool.candidates.borrowable_rblocks == 11


def test_more_creditors_than_one_answer_names() -> None:
    """A request may need hundreds of small lenders."""
    pool = Pool(**{f"m{number:03}": (2, {}) for number in range(150)})
    assert len(pool.order()) == 150
    assert len(pool.candidates.look(10)) == 64
    assert pool.candidates.max_borrowable_rblocks == 300


@pytest.mark.parametrize(("own", "theirs", "free", "is_slow"), [(20.1, 5.0, 9, True), (19.9, 5.0, 9, False)])
def test_own_host_memory_comes_first_unless_others_are_much_quicker(
    own: float, theirs: float, free: int, is_slow: bool
) -> None:
    pool = Pool(me={"query_us": 1.0, "host_query_us": own}, a=(free, {"query_us": theirs}))
    assert pool.candidates.host_memory_is_slow() == is_slow


def test_without_a_creditor_host_memory_is_not_slow() -> None:
    assert not Pool(me={"query_us": 1.0, "host_query_us": 1e9}).candidates.host_memory_is_slow()


@pytest.mark.parametrize("num_known", [NUM_PROBED - 1, NUM_PROBED])
def test_the_ledger_is_asked_until_enough_links_are_known(monkeypatch: pytest.MonkeyPatch, num_known: int) -> None:
    names = [f"m{number}" for number in range(NUM_PROBED)]
    pool = Pool(links=dict.fromkeys(names[:num_known], NEAR), **dict.fromkeys(names, (10, {"query_us": 5.0})))
    asked: list[int] = []

    def recommend(debtor: InstanceId, limit: int, skip: int = 0) -> list[CreditorOffer]:
        asked.append(limit)
        return []

    monkeypatch.setattr(pool.ledger, "recommend", recommend)
    pool.candidates.probe_links()
    assert bool(asked) == (num_known < NUM_PROBED)
