"""Takes requests in that another instance has handed over: their KV lies here, and with creditors, and they go on."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from megatron_distkv.clock import Clock
from megatron_distkv.handover.incoming import Incoming, IncomingHandover, IncomingHandovers, table_of
from megatron_distkv.kvcache.block_table import BlockTable
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.log import get_logger
from megatron_distkv.messages import CommitHeader, InheritedSpan, TokenOutput, continue_receipt, receipt_of
from megatron_distkv.pool import HeldLoan, Identity, Loans, Peer, RequestOwner
from megatron_distkv.rblock import LoanId
from megatron_distkv.request import FinishReason, Request
from megatron_distkv.rmanager import Lending, RManager

logger = get_logger(__name__)


class Entry(Protocol):
    """Where requests run (engine.Scheduler)."""

    def enter(self, request: Request) -> None:
        """It runs from now on; the rManager knows it."""


@dataclass(eq=False)
class Arrival:
    """A request whose loans are being taken over; then it runs, or ends if it was aborted meanwhile.

    `inherited`: loans by the ids that the one that leaves had for them. `kept`: those that were of this very instance.
    """

    request: Request
    table: BlockTable
    handover_id: str
    inherited: "dict[LoanId, Future[HeldLoan | None]]"
    kept: "dict[LoanId, Future[frozenset[int] | None]]"

    @property
    def is_complete(self) -> bool:
        return all(x.done() for x in self.inherited.values()) and all(x.done() for x in self.kept.values())

    @property
    def is_aborted(self) -> bool:
        return self.request.finish_reason is not None


class Receiver:
    """The engine's thread calls it; nothing waits."""

    def __init__(
        self,
        incoming: IncomingHandovers,
        identity: Identity,
        allocator: RBlockAllocator,
        lending: Lending,
        loans: Loans,
        rmanager: RManager,
        entry: Entry,
        clock: Clock,
    ) -> None:
        self._incoming = incoming
        self._identity = identity
        self._allocator = allocator
        self._lending = lending
        self._loans = loans
        self._rmanager = rmanager
        self._entry = entry
        self._clock = clock
        self._arrivals: dict[str, Arrival] = {}  # by request

    @property
    def is_idle(self) -> bool:
        """Nothing is on its way in."""
        return not self._arrivals

    def is_arriving(self, request_id: str) -> bool:
        return request_id in self._arrivals

    def receive(self, request: Request, handover_id: str) -> bool:
        """Let it go on from where the other stopped; False: nothing of it is here, so it is a request like any."""
        handover = self._incoming.claim(handover_id)
        if handover is None:
            return False
        header = handover.header
        if header is None or not _is_same(request, header):
            self._incoming.free(handover_id, handover.block_ids)
            return False
        self._free_unused(handover, header)
        request.arrive(self._clock)
        _restore(request, header)
        arrival = self._take_over(request, handover_id, header)
        self._arrivals[request.request_id] = arrival
        self._let_in(arrival)
        return True

    def begin_step(self) -> None:
        """Let those run whose loans have come, or cannot."""
        for arrival in list(self._arrivals.values()):
            self._let_in(arrival)
        self._incoming.expire()

    def abort(self, request_id: str) -> None:
        """What it holds is freed when all that was asked for it has been answered."""
        arrival = self._arrivals.get(request_id)
        if arrival is not None:
            arrival.request.finish(FinishReason.ABORT)

    def give_up_all(self) -> list[TokenOutput]:
        """This instance ends before they run: others go on, and this is its part of each, without tokens."""
        return [TokenOutput(x, [], kv=receipt_of(arrival.request)) for x, arrival in self._arrivals.items()]

    @contextmanager
    def held(self) -> Iterator[Incoming]:
        """All that lies here for requests that do not run yet; inside, none comes and none goes."""
        arrivals = self._arrivals.values()
        mine = [block_id for arrival in arrivals for block_id in arrival.table.local_block_ids()]
        with self._incoming.held() as held:
            yield Incoming([*held.block_ids, *mine], [*held.handover_ids, *(x.handover_id for x in arrivals)])

    # ------------------------------------------------------------------ inside

    def _free_unused(self, handover: IncomingHandover, header: CommitHeader) -> None:
        here = set(header.here.values())
        self._allocator.free([block_id for block_id in handover.block_ids if block_id not in here])

    def _take_over(self, request: Request, handover_id: str, header: CommitHeader) -> Arrival:
        """Ask for all its loans at once."""
        arrival = Arrival(request, table_of(header), handover_id, {}, {})
        owner = RequestOwner(request.request_id)
        for loan_id, span in _by_loan(header.elsewhere).items():
            if span.creditor == self._identity.instance:
                arrival.kept[loan_id] = self._lending.begin_keep(loan_id)
            else:
                peer, used = Peer(span.creditor, span.epoch, span.address), arrival.table.block_ids_under(loan_id)
                arrival.inherited[loan_id] = self._loans.inherit(owner, peer, loan_id, used)
        return arrival

    def _let_in(self, arrival: Arrival) -> None:
        if not arrival.is_complete:
            return
        request = arrival.request
        del self._arrivals[request.request_id]
        lost = [
            *(loan_id for loan_id, job in arrival.kept.items() if not self._keep(arrival, loan_id, job)),
            *(loan_id for loan_id, job in arrival.inherited.items() if not self._inherit(arrival, loan_id, job)),
        ]
        if arrival.is_aborted:
            self._loans.end(RequestOwner(request.request_id))
            self._incoming.free(arrival.handover_id, arrival.table.local_block_ids())
            return
        if lost:
            logger.warning("%d loans of %s do not come along: computing again", len(lost), request.request_id)
            self._rmanager.forget(request, arrival.table, lost)
        self._rmanager.enter(request, arrival.table, arrival.handover_id)
        self._entry.enter(request)
        logger.info("%s goes on here after %d tokens", request.request_id, request.num_computed_tokens)

    def _keep(self, arrival: Arrival, loan_id: LoanId, job: "Future[frozenset[int] | None]") -> bool:
        """What the other had borrowed from this very instance, if all that it names was stored there."""
        used, stored = arrival.table.block_ids_under(loan_id), job.result()
        if stored is None:
            return False
        has_it, kept = stored.issuperset(used), self._lending.keep(loan_id)
        self._allocator.free([block_id for block_id in kept if not has_it or block_id not in set(used)])
        if has_it:
            arrival.table.make_local(loan_id, used)
        return has_it

    def _inherit(self, arrival: Arrival, loan_id: LoanId, job: "Future[HeldLoan | None]") -> bool:
        loan = job.result()
        if loan is None:
            return False
        self._loans.take_over(loan)
        arrival.table.rename_loan(loan_id, loan.loan_id)
        return True


def _restore(request: Request, header: CommitHeader) -> None:
    continue_receipt(request, header.kv)
    request.num_computed_tokens = header.num_computed_tokens
    request.lost_ranges = [range(start, stop) for start, stop in header.lost]
    request.sampling_seed = header.sampling_seed
    request.arrival_s -= header.age_s


def _is_same(request: Request, header: CommitHeader) -> bool:
    """Both stopped at the same token."""
    lengths = len(request.prompt_token_ids), len(request.output_token_ids)
    return lengths == (header.num_prompt_tokens, header.num_output_tokens) and (
        header.num_computed_tokens < request.num_tokens
    )


def _by_loan(spans: Iterable[InheritedSpan]) -> dict[LoanId, InheritedSpan]:
    """Any span of each loan: all name its creditor."""
    return {LoanId(span.loan_id): span for span in spans}
