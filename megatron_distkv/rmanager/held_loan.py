"""A loan as its debtor has it."""

from collections import deque
from dataclasses import dataclass, field

from megatron_distkv.rblock import InstanceId, LoanId


@dataclass(eq=False)
class HeldLoan:
    """A loan of `num_rblocks` rBlocks; those not used yet wait in `unused`.

    A loan that its creditor wants back has a time at which it is overdue, and takes nothing in any more. One that is to
    come home without being asked for is never overdue (infinity).
    """

    loan_id: LoanId
    request_id: str
    creditor: InstanceId
    address: str
    num_rblocks: int
    unused: deque[int] = field(default_factory=deque)
    overdue_at_s: float | None = None

    @property
    def is_recalled(self) -> bool:
        return self.overdue_at_s is not None

    @property
    def is_asked_for(self) -> bool:
        return self.overdue_at_s is not None and self.overdue_at_s != float("inf")

    def take(self, count: int) -> list[int]:
        """Up to `count` physical ids in the creditor's pool, to be filled now."""
        return [self.unused.popleft() for _ in range(min(count, len(self.unused)))]
