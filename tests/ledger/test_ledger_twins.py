"""One stateful test drives the Redis ledger and its in-memory twin: same answers, and the invariants hold all the time.

Readers follow the pool from any version that they ever had, page by page, and have the whole of it each time.
Messages come twice, late, with stale epochs and from instances that never were; time is injected; the data get lost.
"""

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from megatron_distkv.errors import SupersededError
from megatron_distkv.ledger import (
    InstanceReport,
    InstanceState,
    LoanState,
    MemberChange,
    MemoryLedger,
    MoveOrder,
    PoolSnapshot,
    RequestPlacementEntry,
)
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.redis_ledger import RedisLedger
from megatron_distkv.messages import Counted
from megatron_distkv.rblock import InstanceId, LoanId

INSTANCES = [InstanceId(name) for name in ("a", "b", "c", "d")]
LEASE_S = 10.0
PENDING_S = 3.0
who = st.sampled_from(INSTANCES)
loan_ids = st.sampled_from([LoanId(f"loan-{number}") for number in range(6)])
amounts = st.integers(0, 12)
counts = st.sampled_from([None, None, (), (Counted("distkv_loans_made_total", {}, 2.0),),
                          (Counted("distkv_refused_channels_total", {"reason": "pool"}, 1.0),)])  # fmt: skip
stale = st.sampled_from([0, 0, 0, 0, -1])
pools = itertools.count()


class LedgerTwins(RuleBasedStateMachine):
    server: EmbeddedServer

    def __init__(self) -> None:
        super().__init__()
        self.now_ms = self.latest_ms = 1_763_700_000_000
        self.memory = MemoryLedger(clock_ms=lambda: self.now_ms)
        pool = f"twin-{next(pools)}"
        self.redis = RedisLedger(self.server.url, pool, timeout_s=30.0, clock_ms=lambda: self.now_ms)
        self.raw, self.keys = redis.Redis.from_url(self.server.url), f"{{{pool}}}*"
        self.readings: list[tuple[int, dict[InstanceId, MemberChange]]] = [(0, {})]
        self.reserved_at_ms: dict[LoanId, int] = {}
        self.epochs: dict[InstanceId, int] = {}
        self.generations: dict[InstanceId, str] = {}
        self.given_epochs: list[int] = []
        self.terms: dict[LoanId, tuple[Any, ...]] = {}
        self.invented: set[LoanId] = set()

    def both(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        answers = [self._answer(ledger, operation, *args, **kwargs) for ledger in (self.memory, self.redis)]
        assert answers[0] == answers[1], f"{operation}{args}: twin says {answers[0]}, Redis {answers[1]}"
        return answers[0]

    @staticmethod
    def _answer(ledger: Any, operation: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(ledger, operation)(*args, **kwargs)
        except SupersededError:
            return "superseded"

    def epoch(self, instance: InstanceId, off: int = 0) -> int:
        return self.epochs.get(instance, 7) + off

    @initialize()
    def three_instances_join(self) -> None:
        for instance in INSTANCES[:3]:
            self.register(instance, 16, 2, False)

    @rule(instance=who, total=st.integers(4, 20), reserved=st.integers(0, 3), survives=st.booleans())
    def register(self, instance: InstanceId, total: int, reserved: int, survives: bool) -> None:
        hint = self.epochs.get(instance, 0) if survives else 0
        before = self.redis.snapshot().generation
        answer = self.both(
            "register", instance, f"at:{instance}", total, reserved, LEASE_S,
            epoch=hint, generation=self.generations.get(instance, ""), info={"socket": f"{instance}.sock"},
        )  # fmt: skip
        kept = hint > 0 and self.generations[instance] != before
        assert kept or all(answer.epoch > given for given in self.given_epochs), "epochs strictly increase"
        assert not kept or answer.epoch == hint
        self.given_epochs.append(answer.epoch)
        self.epochs[instance], self.generations[instance] = answer.epoch, answer.generation

    @rule(instance=who, off=st.sampled_from([-1, -2]))
    def register_late_twin(self, instance: InstanceId, off: int) -> None:
        live = next((r for r in self.memory.snapshot().instances if r.instance == instance), None)
        if live is not None:
            before = self.memory.snapshot()
            assert self.both("register", instance, "late", 9, 0, LEASE_S, epoch=live.epoch + off) == "superseded"
            assert self.memory.snapshot() == before

    @rule(instance=who, used=st.integers(0, 15), off=stale, draining=st.booleans(), num=st.integers(-1, 3),
          counted=counts)  # fmt: skip
    def heartbeat(
        self, instance: InstanceId, used: int, off: int, draining: bool, num: int, counted: tuple[Counted, ...] | None
    ) -> None:
        state = InstanceState.DRAINING if draining and used > 12 else InstanceState.UP
        placed = [RequestPlacementEntry(f"req|{n}", instance, n, n == 1) for n in range(num, -1, -1)]
        report = InstanceReport(used, state, 1, 2, 300, tuple(placed) if num >= 0 else None, counted)
        reply = self.both("heartbeat", instance, self.epoch(instance, off), report, LEASE_S)
        assert off == 0 or not reply.known

    @rule(instance=who, counted=counts)
    def report_the_same_again(self, instance: InstanceId, counted: tuple[Counted, ...] | None) -> None:
        report = InstanceReport(3, InstanceState.UP, 1, 2, 300, counted=counted)
        self.both("heartbeat", instance, self.epoch(instance), report, LEASE_S)
        version = self.both("changes", 0).version
        self.both("heartbeat", instance, self.epoch(instance), report, LEASE_S)
        again = self.both("changes", version)
        assert (again.version, again.members, again.is_whole) == (version, (), version == 0)

    @rule(debtor=who, limit=st.integers(1, 4), skip=st.integers(0, 3))
    def recommend(self, debtor: InstanceId, limit: int, skip: int) -> None:
        found = self.both("recommend", debtor, limit, skip)
        assert len(found) <= limit
        assert debtor not in [creditor.instance for creditor in found]
        assert all(creditor.free_rblocks > 0 for creditor in found)
        pages = [self.both("recommend", debtor, limit, first) for first in range(0, 4, limit)]
        assert [x for page in pages for x in page] == self.both("recommend", debtor, 4)

    @rule(asked=st.lists(loan_ids))
    def known_loans(self, asked: list[LoanId]) -> None:
        there = {loan.key for loan in self.memory.snapshot().loans}
        assert self.both("known_loans", asked) == there & set(asked)

    @rule(reading=st.integers(0, 99), limit=st.integers(1, 5), pages=st.integers(1, 9))
    def follow_the_changes(self, reading: int, limit: int, pages: int) -> None:
        """From any version ever had, also from the middle of a read; what is left open is read on from later."""
        version, members = self.readings[reading % len(self.readings)]
        for _ in range(pages):
            page = self.both("changes", version, limit)
            assert len(page.members) <= limit
            version, members = page.version, {} if page.is_whole else dict(members)
            for member in page.members:
                members.pop(member.instance, None)
                if not member.has_left:
                    members[member.instance] = member
            self.readings.append((version, members))
            if not page.has_more:
                assert without_leases(members.values()) == without_leases(self.both("changes", 0).members)
                return

    @rule(with_loans=st.booleans(), with_placements=st.booleans())
    def read_some_kinds(self, with_loans: bool, with_placements: bool) -> None:
        page = self.both("changes", 0, with_loans=with_loans, with_placements=with_placements)
        assert with_loans or not any(member.loans for member in page.members)
        assert with_placements or not any(member.placements for member in page.members)

    @rule(loan=loan_ids, debtor=who, creditor=who, num=amounts, d_off=stale, c_off=stale)
    def borrow(self, loan: LoanId, debtor: InstanceId, creditor: InstanceId, num: int, d_off: int, c_off: int) -> None:
        free_before = {r.instance: r.free_to_lend for r in self.memory.snapshot().instances}
        known = loan in {x.key for x in self.memory.snapshot().loans}
        args = (loan, debtor, self.epoch(debtor, d_off), creditor, self.epoch(creditor, c_off), num, PENDING_S)
        refusal = self.both("borrow", *args)
        if refusal is None:
            self.terms[loan] = args
            if not known:
                self.reserved_at_ms[loan] = self.memory.snapshot().taken_at_ms
            self.invented -= set() if known else {loan}
            assert known or (free_before[creditor] >= num > 0 and debtor != creditor and d_off == c_off == 0)
            assert self.both("borrow", *args) is None, "a repeated message changes nothing"

    @rule(loan=loan_ids)
    def borrow_again_late(self, loan: LoanId) -> None:
        if loan in self.terms:
            self.both("borrow", *self.terms[loan])

    @rule(loan=loan_ids, creditor=who, off=stale)
    def accept(self, loan: LoanId, creditor: InstanceId, off: int) -> None:
        self.both("accept", loan, creditor, self.epoch(creditor, off))

    @rule(loan=loan_ids, instance=who, off=stale)
    def release(self, loan: LoanId, instance: InstanceId, off: int) -> None:
        sides = {s for x in self.memory.snapshot().loans if x.key == loan for s in (x.debtor, x.creditor)}
        given_back = self.both("release", loan, instance, self.epoch(instance, off))
        assert given_back == 0 or (instance in sides and off == 0)

    @rule(creditor=who, num=amounts, off=stale)
    def reclaim(self, creditor: InstanceId, num: int, off: int) -> None:
        recalls = self.both("reclaim", creditor, self.epoch(creditor, off), num)
        assert off == 0 or not recalls

    @rule(loan=loan_ids, debtor=who, creditor=who, num=amounts, off=stale)
    def restore(self, loan: LoanId, debtor: InstanceId, creditor: InstanceId, num: int, off: int) -> None:
        """`restore` trusts the creditor, who repeats what was granted; this one may be invented."""
        known = {x.key for x in self.memory.snapshot().loans}
        refusal = self.both("restore", loan, debtor, self.epoch(debtor), creditor, self.epoch(creditor, off), num)
        if refusal is None and loan not in known:
            self.invented.add(loan)

    @rule(loan=loan_ids, new=loan_ids, new_debtor=who, creditor=who, off=stale)
    def transfer(self, loan: LoanId, new: LoanId, new_debtor: InstanceId, creditor: InstanceId, off: int) -> None:
        loans = {x.key: x for x in self.memory.snapshot().loans}
        args = (loan, new, new_debtor, self.epoch(new_debtor, off), creditor, self.epoch(creditor))
        if self.both("transfer", *args) is None:
            assert self.both("transfer", *args) is None, "a repeated message changes nothing"
            if new not in loans:
                now = {x.key: x for x in self.memory.snapshot().loans}
                assert off == 0
                assert loan not in now
                assert (now[new].debtor, now[new].creditor) == (new_debtor, loans[loan].creditor)
                assert now[new].num_rblocks == loans[loan].num_rblocks
                self.invented |= {new} if loan in self.invented else set()
                self.invented -= {new} if loan not in self.invented else set()

    @rule(instance=who, off=stale)
    def deregister(self, instance: InstanceId, off: int) -> None:
        self.both("deregister", instance, self.epoch(instance, off))

    @rule(instance=who, off=stale, said=st.sampled_from(["x", "y"]))
    def describe(self, instance: InstanceId, off: int, said: str) -> None:
        assert not self.both("describe", instance, self.epoch(instance, off), {"ways": said}) or off == 0

    @rule(passed_ms=st.sampled_from([1, 500, 2_999, 3_000, 5_000, 5_000, 5_000]))
    def time_passes(self, passed_ms: int) -> None:
        self.now_ms += passed_ms

    @rule(jump_ms=st.sampled_from([-3_600_000, -5_000, 5_001, 3_600_000]))
    def the_clock_jumps(self, jump_ms: int) -> None:
        """Costs the living half a lease at most."""
        self.latest_ms = max(self.latest_ms, self.now_ms)
        before = {x.instance for x in self.memory.snapshot().instances if x.lease_left_ms > LEASE_S * 1000 / 2}
        self.now_ms += jump_ms
        assert before <= {x.instance for x in self.redis.snapshot().live}
        self.memory.snapshot()  # the twin hears of the time as often

    @rule(limit=st.integers(1, 3))
    def expire(self, limit: int) -> None:
        self.both("expire", limit)

    @rule(candidate=st.sampled_from(["g1", "g2"]), source=who, destination=who)
    def plan(self, candidate: str, source: InstanceId, destination: InstanceId) -> None:
        self.both("lead", candidate, 2.0)
        self.both("publish_moves", candidate, [MoveOrder("req|1", source, destination, 2)])

    @rule()
    def lose_everything(self) -> None:
        # Epochs grow by one, and begin at the time: one per ms at most, and no loss while the clock is behind
        self.now_ms = max(self.now_ms, self.latest_ms) + 1 + len(self.given_epochs)
        before = self.memory.snapshot()
        self.memory.lose_everything()
        self._wipe_redis()
        self._survivors_come_back(before)

    def _wipe_redis(self) -> None:
        for key in self.raw.scan_iter(self.keys):
            self.raw.delete(key)

    def _survivors_come_back(self, before: PoolSnapshot) -> None:
        """Live instances register with their old epoch, creditors restore: the debts are what they were."""
        for record in before.live:
            self.both(
                "register", record.instance, record.address, record.total, record.reserved, LEASE_S,
                epoch=record.epoch, generation=before.generation, info=record.info,
            )  # fmt: skip
            self.generations[record.instance] = self.memory.snapshot().generation
        live = {record.instance for record in before.live}
        expected = [x for x in before.loans if x.debtor in live and x.creditor in live]
        for loan in expected:
            terms = (loan.key, loan.debtor, loan.debtor_epoch, loan.creditor, loan.creditor_epoch)
            assert self.both("restore", *terms, loan.num_rblocks) is None
        rebuilt = self.memory.snapshot()
        assert [(x.key, x.num_rblocks) for x in rebuilt.loans] == [(x.key, x.num_rblocks) for x in expected]

    @invariant()
    def twins_hold_the_same(self) -> None:
        assert self.memory.snapshot() == self.redis.snapshot()

    @invariant()
    def accounts_are_conserved(self) -> None:
        pool = self.redis.snapshot()
        for record in pool.instances:
            lent = sum(x.num_rblocks for x in pool.loans if x.creditor == record.instance)
            borrowed = sum(x.num_rblocks for x in pool.loans if x.debtor == record.instance)
            assert (record.lent, record.borrowed) == (lent, borrowed)
            assert 0 <= record.lent <= record.lendable_at_most
        assert all(x.debtor != x.creditor for x in pool.loans)

    @invariant()
    def debts_have_no_cycle(self) -> None:
        loans = (x for x in self.redis.snapshot().loans if x.key not in self.invented)
        edges = {(x.debtor, x.creditor) for x in loans}
        alive = {x for edge in edges for x in edge}
        while leaves := {node for node in alive if not any(a == node and b in alive for a, b in edges)}:
            alive -= leaves
        assert not alive, f"{alive} owe each other in a circle"

    @invariant()
    def pending_never_outlives_its_deadline(self) -> None:
        self.memory.expire(64)
        self.redis.expire(64)
        pending = {x.key for x in self.memory.snapshot().loans if x.state is LoanState.PENDING}
        now_ms = self.memory.snapshot().taken_at_ms
        assert all(self.reserved_at_ms[loan] + PENDING_S * 1000 > now_ms for loan in pending)

    def teardown(self) -> None:
        told = [[{**event, "at_ms": ""} for event in ledger.events(9999)] for ledger in (self.memory, self.redis)]
        assert told[0] == told[1]
        self._wipe_redis()
        self.raw.close()
        self.redis.close()


def without_leases(members: Iterable[MemberChange]) -> list[MemberChange]:
    """Renewing a lease is no change. By name."""
    assert all(member.record is not None for member in members)
    bare = [replace(x, record=replace(x.record, lease_left_ms=0)) for x in members if x.record is not None]
    return sorted(bare, key=lambda member: member.instance)


def test_redis_and_memory_ledgers_agree_and_keep_the_books(server: EmbeddedServer) -> None:
    LedgerTwins.server = server
    config = settings(
        max_examples=60,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    run_state_machine_as_test(LedgerTwins, settings=config)


@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_an_instance_in_debt_lends_nothing(kind: str, server: EmbeddedServer) -> None:
    # Given b, which has borrowed from c
    ledger: Any = MemoryLedger() if kind == "memory" else RedisLedger(server.url, "in-debt")
    a, b, c = (ledger.register(InstanceId(name), name, 10, 1, LEASE_S).epoch for name in "abc")
    assert ledger.borrow(LoanId("1"), InstanceId("b"), b, InstanceId("c"), c, 4, PENDING_S) is None

    # When a wants to borrow from b, and c from b
    refusals = [
        ledger.borrow(LoanId("2"), InstanceId("a"), a, InstanceId("b"), b, 1, PENDING_S),
        ledger.borrow(LoanId("3"), InstanceId("c"), c, InstanceId("b"), b, 1, PENDING_S),
    ]

    # Then both are refused, and b is not recommended
    assert [refusal.value for refusal in refusals] == ["in_debt", "in_debt"]
    assert [x.instance for x in ledger.recommend(InstanceId("a"), 9)] == ["c"]
