"""Rounds of visits between the ranks of a context group: what travels next does so while this round is computed."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from megatron_distkv.attention.visits import Visit

Goods = list[torch.Tensor]
# (why, what, to or from which rank)
_Message = tuple[Visit, Goods, int]


class Travel(Protocol):
    """One direction of a pass. What a guest brings and what it takes home have shapes that both ranks know."""

    def goods(self, visit: Visit) -> Goods: ...
    def room_for_goods(self, visit: Visit) -> Goods: ...
    def work(self, visit: Visit, goods: Goods) -> Goods:
        """At the host (or at home): compute; returns what the guest takes home, in contiguous tensors."""
        ...

    def room_for_answer(self, visit: Visit) -> Goods: ...
    def take(self, visit: Visit, answer: Goods) -> None:
        """At the guest, back home."""
        ...


class _UnderWay(NamedTuple):
    """Messages under way: tensors are held here until they have gone or come."""

    works: list[dist.Work]
    leaving: list[Goods]
    coming: list[tuple[Visit, Goods]]

    def arrived(self) -> Iterator[tuple[Visit, Goods]]:
        for work in self.works:
            work.wait()
        return iter(self.coming)


def exchange(travel: Travel, rounds: list[list[Visit]], rank: int, group: dist.ProcessGroup | None) -> None:
    """Run all rounds; a collective of `group`, None for a rank alone."""
    ways = rounds[1:]
    under = _send_goods(travel, ways[0], rank, group) if ways else None
    for visit in rounds[0]:
        travel.work(visit, travel.goods(visit))
    for number, visits in enumerate(ways, start=1):
        assert under is not None
        arrived = under.arrived()
        under = _send_goods(travel, ways[number], rank, group) if number < len(ways) else None
        answers = [(visit, travel.work(visit, goods), visit.guest) for visit, goods in arrived]
        _send_answers(travel, visits, answers, rank, group)


def _send_goods(travel: Travel, visits: list[Visit], rank: int, group: dist.ProcessGroup | None) -> _UnderWay:
    leaving = [(visit, travel.goods(visit), visit.host) for visit in visits if visit.guest == rank]
    coming = [(visit, travel.room_for_goods(visit), visit.guest) for visit in visits if visit.host == rank]
    return _post(leaving, coming, group)


def _send_answers(
    travel: Travel, visits: list[Visit], answers: list[_Message], rank: int, group: dist.ProcessGroup | None
) -> None:
    coming = [(visit, travel.room_for_answer(visit), visit.host) for visit in visits if visit.guest == rank]
    for visit, answer in _post(answers, coming, group).arrived():
        travel.take(visit, answer)


def _post(leaving: list[_Message], coming: list[_Message], group: dist.ProcessGroup | None) -> _UnderWay:
    operations = [
        dist.P2POp(way, tensor, group=group, group_peer=peer)
        for way, messages in ((dist.isend, leaving), (dist.irecv, coming))
        for _, goods, peer in messages
        for tensor in goods
    ]
    works = dist.batch_isend_irecv(operations) if operations else []
    return _UnderWay(works, [goods for _, goods, _ in leaving], [(visit, goods) for visit, goods, _ in coming])
