"""rBlocks that are fetched back: their creditors want the memory, and nothing should be computed again for it."""

from collections.abc import Sequence

from megatron_distkv import metrics
from megatron_distkv.clock import Clock
from megatron_distkv.log import get_logger
from megatron_distkv.pool import COOLDOWN_S, HeldLoan, Links, Loans, Quarantine
from megatron_distkv.rblock import LoanKey
from megatron_distkv.rmanager.move import Pull
from megatron_distkv.rmanager.request_tables import RequestTables

logger = get_logger(__name__)


class FetchBack:
    """Loans that leave, one at a time; a loan that no rBlock lies under any more ends. The engine's thread calls it."""

    def __init__(
        self,
        loans: Loans,
        links: Links,
        cooldown: Quarantine,
        tables: RequestTables,
        patience_s: float,
        clock: Clock,
    ) -> None:
        """`patience_s`: a recalled loan for which there is no room for so long is given up, and computed again."""
        self._loans = loans
        self._links = links
        self._cooldown = cooldown
        self._tables = tables
        self._patience_s = patience_s
        self._clock = clock
        self._pulls: list[Pull] = []
        self._arrived: list[tuple[HeldLoan, range]] = []

    def recall(self, key: LoanKey) -> None:
        """Heard again with every heartbeat until the loan has ended."""
        for loan in self._loans.all():
            if loan.key == key and not loan.is_recalled:
                metrics.LOANS_RECALLED.inc()
                loan.overdue_at_s = self._clock.monotonic_s() + self._patience_s
                self._cooldown.put(loan.creditor, COOLDOWN_S)

    def leave(self, creditor: str, num_spare: int) -> None:
        """It is busy: what lies there comes back, as far as `num_spare` rBlocks hold it."""
        self._cooldown.put(creditor, COOLDOWN_S)
        for loan in [x for x in self._loans.all() if x.creditor == creditor and not x.is_leaving]:
            num_spare -= self._num_under(loan)
            if num_spare >= 0:
                logger.info("%s is busy: fetching %d rBlocks back", creditor, loan.num_rblocks)
                self._fetch_when_there_is_room(loan)

    def find_early_ones(self, num_free: int) -> None:
        """rBlocks whose creditors do not mind, where asking for them costs more than fetching them back (paper: 5).

        Only where all that runs fits here until its end: what comes back will not have to leave again for it.
        """
        loans = list(self._loans.all())
        num_spare = num_free - self._tables.growth_until_the_end() if loans else 0
        for loan in loans if num_spare > 0 else ():
            request, count = self._tables.request(loan.request_id), self._num_under(loan)
            link = self._links.cost_of(loan.creditor)
            steps_left = request.max_total_tokens - request.num_tokens
            if link is not None and 0 < count <= num_spare and count * link.break_even_steps <= steps_left:
                self._fetch_when_there_is_room(loan)
                return

    def _fetch_when_there_is_room(self, loan: HeldLoan) -> None:
        """Nobody recalls this loan, but it would be better here: never overdue."""
        if not loan.is_leaving:
            loan.overdue_at_s = float("inf")

    def _num_under(self, loan: HeldLoan) -> int:
        return self._tables.of(loan.request_id).num_under(loan.loan_id)

    def next_loan(self) -> HeldLoan | None:
        """Recalled ones come first."""
        leaving = [loan for loan in self._loans.all() if loan.is_leaving]
        return min(leaving, key=lambda loan: not loan.is_recalled, default=None)

    def pull(self, loan: HeldLoan, block_ids: Sequence[int]) -> None:
        """Plan to fetch as many rBlocks of this loan back as there are `block_ids` for."""
        start = 0
        for span in self._tables.of(loan.request_id).make_local(loan.loan_id, block_ids):
            end = start + len(span.block_ids)
            local_ids = list(block_ids[start:end])
            self._pulls.append(Pull(loan.request_id, loan.peer, loan.loan_id, list(span.block_ids), local_ids))
            self._arrived.append((loan, range(span.first, span.first + len(span.block_ids))))
            start = end
        if block_ids and loan.is_recalled:
            loan.overdue_at_s = self._clock.monotonic_s() + self._patience_s

    def take_pulls(self) -> list[Pull]:
        pulls, self._pulls = self._pulls, []
        return pulls

    def arrived_from(self, creditor: str) -> list[tuple[str, range]]:
        """Requests and their rBlocks that this step was to fetch back from `creditor`."""
        return [(loan.request_id, rblocks) for loan, rblocks in self._arrived if loan.creditor == creditor]

    def end_step(self) -> None:
        """The pulls are done: loans with nothing left under them end."""
        self._arrived = []
        self._loans.drop(lambda loan: loan.is_leaving and self._num_under(loan) == 0)
