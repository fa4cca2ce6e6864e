"""rBlocks that come home: their creditors want the memory back, and nothing should be computed again for it."""

import time
from collections.abc import Mapping, Sequence

from megatron_distkv.kvcache.block_table import BlockTable
from megatron_distkv.rmanager.borrowing import Borrowing
from megatron_distkv.rmanager.held_loan import HeldLoan
from megatron_distkv.rmanager.move import Pull
from megatron_distkv.rmanager.pool_outlook import PoolOutlook


class Homecoming:
    """Recalled loans, one at a time; a loan that no rBlock lies under any more ends. The engine's thread calls it."""

    def __init__(self, borrowing: Borrowing, outlook: PoolOutlook, patience_s: float) -> None:
        self._borrowing = borrowing
        self._outlook = outlook
        self._patience_s = patience_s
        self._pulls: list[Pull] = []
        self._arrived: list[tuple[HeldLoan, range]] = []

    def recall(self, loan_id: str) -> None:
        """Heard again with every heartbeat until the loan has ended."""
        for loan in self._borrowing.loans():
            if loan.loan_id == loan_id and not loan.is_asked_for:
                loan.overdue_at_s = time.monotonic() + self._patience_s
                self._outlook.leave_alone(loan.creditor)

    def bring_when_there_is_room(self, loan: HeldLoan) -> None:
        """Nobody asks for this loan, but it would be better at home: never overdue."""
        if not loan.is_recalled:
            loan.overdue_at_s = float("inf")

    def next_loan(self) -> HeldLoan | None:
        """Those that are asked for come first."""
        recalled = [loan for loan in self._borrowing.loans() if loan.is_recalled]
        return min(recalled, key=lambda loan: not loan.is_asked_for, default=None)

    def pull(self, loan: HeldLoan, table: BlockTable, block_ids: Sequence[int]) -> None:
        """Plan to bring as many rBlocks of this loan home as there are `block_ids` for."""
        start = 0
        for span in table.bring_home(loan.loan_id, block_ids):
            end = start + len(span.block_ids)
            local_ids = list(block_ids[start:end])
            self._pulls.append(
                Pull(loan.request_id, loan.creditor, loan.address, loan.loan_id, list(span.block_ids), local_ids)
            )
            self._arrived.append((loan, range(span.first, span.first + len(span.block_ids))))
            start = end
        if block_ids and loan.is_asked_for:
            loan.overdue_at_s = time.monotonic() + self._patience_s

    def take_pulls(self) -> list[Pull]:
        pulls, self._pulls = self._pulls, []
        return pulls

    def arrived_from(self, creditor: str) -> list[tuple[str, range]]:
        """Requests and their rBlocks that this step was to bring home from `creditor`."""
        return [(loan.request_id, rblocks) for loan, rblocks in self._arrived if loan.creditor == creditor]

    def end_step(self, tables: Mapping[str, BlockTable]) -> None:
        """The pulls are done: loans with nothing left under them end."""
        self._arrived = []
        self._borrowing.drop_loans(
            lambda loan: loan.is_recalled and tables[loan.request_id].num_under(loan.loan_id) == 0
        )
