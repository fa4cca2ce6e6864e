"""A pool with the real scheduler, rManager, lending and ledger; its time, its channels and its model are not."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TypeVar, cast

import msgspec

from megatron_distkv.config.instance import LedgerConfig, LendingConfig, SchedulerConfig
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.engine.admission import InstanceAdmission
from megatron_distkv.engine.reporting import Reporting
from megatron_distkv.engine.sampled_token import SampledToken
from megatron_distkv.engine.scheduler import Scheduler
from megatron_distkv.engine.unplaceable import Unplaceable
from megatron_distkv.errors import PeerLost
from megatron_distkv.kvcache.open_slots import OpenSlots
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger import MemoryLedger
from megatron_distkv.messages import (
    Acknowledge,
    Holder,
    LendHeader,
    MessageKind,
    ReleaseHeader,
    RequestRefused,
    TokenOutput,
)
from megatron_distkv.pool import (
    Candidates,
    EndedLoans,
    Identity,
    LinkCost,
    Links,
    LoanBook,
    Loans,
    MemberInfo,
    Membership,
    MoveOrder,
    Peer,
    Quarantine,
)
from megatron_distkv.rblock import InstanceId, LoanId
from megatron_distkv.request import Request
from megatron_distkv.rmanager import Lending, NoFollowers, RManager
from megatron_distkv.sampling_params import SamplingParams
from tests.pool.at_once import AtOnce
from tests.virtual_time.clock import VirtualClock

SHAPE = RBlockShape(2, 4, 2, 16, 16, "fp32")
STEP_S = 0.1
LINK = LinkCost(20.0, 5000.0, 41.0, 0.3)
_Reply = TypeVar("_Reply")


class NoTensors:
    """What a loan table keeps away from strangers."""

    def grant(self, loan_id: str, holder: Holder, block_ids: Sequence[int]) -> None:
        pass

    def transfer(self, loan_id: str, new_loan_id: str, holder: Holder) -> None:
        pass

    def revoke(self, loan_id: str) -> frozenset[int]:
        return frozenset()


class VirtualPool:
    """Its instances step together, `STEP_S` apart."""

    def __init__(self, seed: int = 1, **sizes: int) -> None:
        """By instance, how many rBlocks it has."""
        self.clock = VirtualClock(seed=seed)
        self.ledger = MemoryLedger(self.clock.unix_ms)
        self.instances: dict[str, VirtualInstance] = {}
        self.lent_at_s: list[float] = []  # when somebody was given memory
        for name, num_rblocks in sizes.items():
            self.instances[name] = VirtualInstance(self, name, num_rblocks)
        for instance in self.instances.values():
            instance.membership.beat()  # all have joined

    def __getitem__(self, name: str) -> "VirtualInstance":
        return self.instances[name]

    def run(self, until: Callable[[], bool], within_s: float = 1000.0) -> float:
        """Let time pass until this is so; returns the time."""
        end_s = self.clock.now_s + within_s
        while not until():
            assert self.clock.now_s < end_s, "it never happens"
            for instance in self.instances.values():
                instance.step()
            self.clock.now_s += STEP_S
        return self.clock.now_s

    def run_for(self, seconds: float) -> None:
        end_s = self.clock.now_s + seconds
        self.run(lambda: self.clock.now_s >= end_s)


class Direct:
    """Questions to other members, answered at once, in the same thread."""

    def __init__(self, pool: VirtualPool, me: Identity) -> None:
        self._pool = pool
        self._me = Holder(me.instance)

    def ask(self, peer: Peer, kind: MessageKind, header: msgspec.Struct, answer: type[_Reply]) -> _Reply:
        other = self._pool.instances[peer.instance]
        if other.is_dead:
            raise PeerLost(peer.instance, "it is dead")
        if isinstance(header, LendHeader):
            reply: msgspec.Struct = other.lending.lend(header, self._me)
            self._pool.lent_at_s.append(self._pool.clock.now_s)
        else:
            assert isinstance(header, ReleaseHeader)
            reply = Acknowledge(other.lending.release(LoanId(header.loan_id), self._me))
        return cast(_Reply, reply)


class VirtualInstance:
    """What engine.Instance and engine.assembly.Parts do, without a model: each token is the same one."""

    def __init__(self, pool: VirtualPool, name: str, num_rblocks: int) -> None:
        clock, limits, me = pool.clock, LendingConfig(), Identity(InstanceId(name))
        self._clock, self.config = clock, LedgerConfig()
        self.is_dead = False
        self.refused: list[RequestRefused] = []
        self.outputs: list[TokenOutput] = []
        self.allocator = RBlockAllocator(num_rblocks, limits.max_lent(num_rblocks))
        host, jobs = RBlockAllocator(0, 0), AtOnce()
        reserved, info = num_rblocks - self.allocator.max_lent, MemberInfo(shape=SHAPE)
        self.membership = Membership(pool.ledger, me, self.config, name, num_rblocks, reserved, info, clock)
        book = LoanBook(pool.ledger, me)
        links = Links(clock, lambda _: LINK, self.membership.publish_links)
        self.cooldown = Quarantine(clock)
        candidates = Candidates(pool.ledger, self.membership, links, self.cooldown, Quarantine(clock), enabled=True)
        ended = EndedLoans(book, clock)
        self.loans = Loans(
            book, candidates, Direct(pool, me), ended, self.cooldown, jobs, clock, enabled=True
        )  # fmt: skip
        self.lending = Lending(
            self.allocator, book, NoTensors(), NoFollowers(), lambda: self.loans.num_borrowed > 0, jobs, clock
        )
        self.rmanager = RManager(
            self.allocator, host, self.loans, candidates, links, self.cooldown, limits, SHAPE.rblock_size,
            OpenSlots(None), clock, self.membership.beat, self.lending.ask_back,
        )  # fmt: skip
        self.scheduler = Scheduler(SchedulerConfig(), self.rmanager, clock)
        model = cast(ModelConfig, SimpleNamespace(max_context_tokens=None, vocab_size=1 << 30))
        self.admission = InstanceAdmission(model, self.scheduler, self.rmanager, lambda _: False)
        self._unplaceable = Unplaceable(self.admission, self.scheduler, clock)
        self._reporting = Reporting(me.instance, self.allocator, host, self.loans, self.rmanager, self.scheduler, list)
        self.membership.report = lambda: self._reporting.report
        self.membership.follow_ups = (lambda _: ended.tell(), self.lending.reconcile)
        self.membership.join()
        self._next_beat_s = clock.now_s

    def add(self, name: str, num_prompt_tokens: int, max_tokens: int) -> Request:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = Request(name, [5] * num_prompt_tokens, sampling)
        assert self.admission.refuse(request) is None
        self.scheduler.add(request)
        return request

    def step(self) -> None:
        if self.is_dead:
            return
        if self._clock.now_s >= self._next_beat_s:
            self._next_beat_s = self._clock.now_s + self.membership.interval_s()
            self.membership.beat()
        while not self.membership.orders.empty():
            order = self.membership.orders.get()
            if isinstance(order, MoveOrder):
                self.rmanager.move_to(order.request_id, order.num_rblocks, order.destination)
            else:
                self.rmanager.recall(order.key)
        scheduled = self.scheduler.schedule()
        self.rmanager.take_moves()
        self.rmanager.note_step(STEP_S, {})
        self.rmanager.end_step()
        sampled = {x.request.request_id: SampledToken(7, None) for x in scheduled if x.needs_logits}
        self.outputs += self.scheduler.update(scheduled, sampled)
        self.refused += self._unplaceable.give_up()
        self._reporting.update()
        self.rmanager.check_integrity()
