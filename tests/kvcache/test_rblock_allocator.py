"""free + used + lent == pool, whatever is asked in whatever order."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from megatron_distkv.errors import IntegrityError
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.rblock import LoanId

POOL, CAP = 12, 8


class AllocatorMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.allocator = RBlockAllocator(POOL, CAP)
        self.held: list[list[int]] = []
        self.loans: dict[LoanId, int] = {}

    @property
    def expected_free(self) -> int:
        used = {block_id for block_ids in self.held for block_id in block_ids}
        return POOL - len(used) - sum(self.loans.values())

    @rule(count=st.integers(0, POOL + 2))
    def allocate(self, count: int) -> None:
        expected = self.expected_free
        got = self.allocator.allocate_up_to(count)
        assert len(got) == min(count, expected)
        if got:
            self.held.append(got)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.allocator.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block_ids = data.draw(st.sampled_from(self.held))
        self.allocator.share(block_ids)
        self.held.append(list(block_ids))

    @rule(number=st.integers(0, 3), count=st.integers(0, CAP + 1))
    def lend(self, number: int, count: int) -> None:
        loan = LoanId(f"loan-{number}")
        possible = 1 <= count <= self.expected_free and sum(self.loans.values()) + count <= CAP
        got = self.allocator.lend(loan, count)
        if loan in self.loans:
            assert (got is not None) == (self.loans[loan] == count)
        else:
            assert (got is not None) == possible
            if got is not None:
                self.loans[loan] = count

    @rule(number=st.integers(0, 3))
    def end_loan(self, number: int) -> None:
        loan = LoanId(f"loan-{number}")
        assert self.allocator.end_loan(loan) == self.loans.pop(loan, 0)

    @invariant()
    def conserved(self) -> None:
        self.allocator.check_integrity([block_id for block_ids in self.held for block_id in block_ids])
        assert self.allocator.num_free == self.expected_free
        assert self.allocator.loans() == self.loans


AllocatorMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestAllocatorMachine = AllocatorMachine.TestCase


def test_freeing_twice_is_refused_and_changes_nothing() -> None:
    allocator = RBlockAllocator(4, 2)
    block_ids = allocator.allocate_up_to(2)
    allocator.free(block_ids)
    with pytest.raises(IntegrityError, match="not in use"):
        allocator.free(block_ids)
    allocator.check_integrity([])
    assert allocator.num_free == 4


def test_check_integrity_sees_a_leak() -> None:
    allocator = RBlockAllocator(4, 2)
    allocator.allocate_up_to(1)
    with pytest.raises(IntegrityError, match="differ"):
        allocator.check_integrity([])
