"""rBlocks that come home: their creditors want the memory back, and nothing should be computed again for it."""

import time
from collections.abc import Sequence

from megatron_distkv.log import get_logger
from megatron_distkv.rmanager.borrowing import Borrowing
from megatron_distkv.rmanager.held_loan import HeldLoan
from megatron_distkv.rmanager.move import Pull
from megatron_distkv.rmanager.pool_outlook import PoolOutlook
from megatron_distkv.rmanager.request_tables import RequestTables

logger = get_logger(__name__)


class Homecoming:
    """Recalled loans, one at a time; a loan that no rBlock lies under any more ends. The engine's thread calls it."""

    def __init__(self, borrowing: Borrowing, outlook: PoolOutlook, tables: RequestTables, patience_s: float) -> None:
        self._borrowing = borrowing
        self._outlook = outlook
        self._tables = tables
        self._patience_s = patience_s
        self._pulls: list[Pull] = []
        self._arrived: list[tuple[HeldLoan, range]] = []

    def recall(self, loan_id: str) -> None:
        """Heard again with every heartbeat until the loan has ended."""
        for loan in self._borrowing.loans():
            if loan.loan_id == loan_id and not loan.is_asked_for:
                loan.overdue_at_s = time.monotonic() + self._patience_s
                self._outlook.leave_alone(loan.creditor)

    def leave(self, creditor: str, num_spare: int) -> None:
        """It is busy: it lends nothing more, and what lies there comes home as far as `num_spare` rBlocks hold."""
        self._outlook.leave_alone(creditor)
        for loan in [x for x in self._borrowing.loans() if x.creditor == creditor and not x.is_recalled]:
            num_spare -= self._num_under(loan)
            if num_spare >= 0:
                logger.info("%s is busy: bringing %d rBlocks home", creditor, loan.num_rblocks)
                self._bring_when_there_is_room(loan)

    def find_early_ones(self, num_free: int) -> None:
        """rBlocks whose creditors do not mind, where asking for them costs more than bringing them home (paper: 5).

        Only where all that runs fits here until its end: what comes home will not have to leave again for it.
        """
        for loan in self._borrowing.loans():
            request, count = self._tables.request(loan.request_id), self._num_under(loan)
            way = self._outlook.way_to(loan.creditor)
            steps_left = request.max_total_tokens - request.num_tokens
            if way is None or count == 0 or count * way.break_even_steps > steps_left:
                continue
            if count + self._tables.growth_until_the_end() <= num_free:
                self._bring_when_there_is_room(loan)
                return

    def _bring_when_there_is_room(self, loan: HeldLoan) -> None:
        """Nobody asks for this loan, but it would be better at home: never overdue."""
        if not loan.is_recalled:
            loan.overdue_at_s = float("inf")

    def _num_under(self, loan: HeldLoan) -> int:
        return self._tables.of(loan.request_id).num_under(loan.loan_id)

    def next_loan(self) -> HeldLoan | None:
        """Those that are asked for come first."""
        recalled = [loan for loan in self._borrowing.loans() if loan.is_recalled]
        return min(recalled, key=lambda loan: not loan.is_asked_for, default=None)

    def pull(self, loan: HeldLoan, block_ids: Sequence[int]) -> None:
        """Plan to bring as many rBlocks of this loan home as there are `block_ids` for."""
        start = 0
        for span in self._tables.of(loan.request_id).bring_home(loan.loan_id, block_ids):
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

    def end_step(self) -> None:
        """The pulls are done: loans with nothing left under them end."""
        self._arrived = []
        self._borrowing.drop_loans(lambda loan: loan.is_recalled and self._num_under(loan) == 0)
