"""Takes requests in that another instance has handed over: their KV lies here, and with creditors, and they go on."""

from collections.abc import Iterable

from megatron_distkv.engine.receipt import continue_receipt
from megatron_distkv.engine.scheduler import Scheduler
from megatron_distkv.kvcache.block_table import BlockTable
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.log import get_logger
from megatron_distkv.messages import AdoptHeader, InheritedSpan
from megatron_distkv.pool import Identity, Loans, Peer, RequestOwner
from megatron_distkv.rblock import LoanId
from megatron_distkv.request import Request
from megatron_distkv.rmanager import Adoption, Adoptions, Lending, RManager, adopted_table

logger = get_logger(__name__)


class Adopting:
    """The engine's thread calls it."""

    def __init__(
        self,
        adoptions: Adoptions,
        identity: Identity,
        allocator: RBlockAllocator,
        lending: Lending,
        loans: Loans,
        rmanager: RManager,
        scheduler: Scheduler,
    ) -> None:
        self._adoptions = adoptions
        self._identity = identity
        self._allocator = allocator
        self._lending = lending
        self._loans = loans
        self._rmanager = rmanager
        self._scheduler = scheduler

    def adopt(self, request: Request, adoption_id: str) -> bool:
        """Let it go on from where the other stopped; False: nothing of it is here, so it is a request like any."""
        adoption = self._adoptions.claim(adoption_id)
        if adoption is None:
            return False
        header = adoption.header
        if header is None or not _is_same(request, header):
            self._adoptions.free(adoption_id, adoption)
            return False
        self._restore(request, header)
        table = self._take_memory(request, adoption, header)
        self._rmanager.adopt(request, table, adoption_id)
        self._scheduler.adopt(request)
        logger.info("%s goes on here after %d tokens", request.request_id, request.num_computed_tokens)
        return True

    @staticmethod
    def _restore(request: Request, header: AdoptHeader) -> None:
        continue_receipt(request, header.kv)
        request.num_computed_tokens = header.num_computed_tokens
        request.lost_ranges = [range(start, stop) for start, stop in header.lost]
        request.sampling_seed = header.sampling_seed
        request.arrival_s -= header.age_s

    def _take_memory(self, request: Request, adoption: Adoption, header: AdoptHeader) -> BlockTable:
        here = set(header.here.values())
        self._allocator.free([block_id for block_id in adoption.block_ids if block_id not in here])
        table = adopted_table(header)
        for loan_id, spans in _by_loan(header.elsewhere).items():
            is_mine = spans[0].creditor == self._identity.instance
            has_it = self._keep(table, loan_id) if is_mine else self._inherit(request, table, loan_id, spans[0])
            if not has_it:
                logger.warning("%s does not come along: computing it again", spans[0].creditor)
                self._rmanager.forget(request, table, [loan_id])
        return table

    def _keep(self, table: BlockTable, loan_id: LoanId) -> bool:
        """What the other had borrowed from this very instance."""
        used, kept = table.block_ids_under(loan_id), self._lending.keep(loan_id)
        has_it = kept.stored.issuperset(used)
        self._allocator.free([block_id for block_id in kept.block_ids if not has_it or block_id not in set(used)])
        if has_it:
            table.bring_home(loan_id, used)
        return has_it

    def _inherit(self, request: Request, table: BlockTable, loan_id: LoanId, span: InheritedSpan) -> bool:
        used, peer = table.block_ids_under(loan_id), Peer(span.creditor, span.epoch, span.address)
        loan = self._loans.inherit(RequestOwner(request.request_id), peer, loan_id, used).result()
        if loan is not None:
            self._loans.take_over(loan)
            table.rename_loan(loan_id, loan.loan_id)
        return loan is not None


def _is_same(request: Request, header: AdoptHeader) -> bool:
    """Both stopped at the same token."""
    lengths = len(request.prompt_token_ids), len(request.output_token_ids)
    return lengths == (header.num_prompt_tokens, header.num_output_tokens) and (
        header.num_computed_tokens < request.num_tokens
    )


def _by_loan(spans: Iterable[InheritedSpan]) -> dict[LoanId, list[InheritedSpan]]:
    grouped: dict[LoanId, list[InheritedSpan]] = {}
    for span in spans:
        grouped.setdefault(LoanId(span.loan_id), []).append(span)
    return grouped
