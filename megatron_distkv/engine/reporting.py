"""What an instance says of itself: to the ledger with each heartbeat, and to who asks."""

from collections.abc import Callable, Sequence

from megatron_distkv.engine.scheduler import Scheduler
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.messages import Counted, InstanceStatus, counted_here
from megatron_distkv.pool import InstanceReport, InstanceState, Loans, RequestPlacementEntry
from megatron_distkv.rblock import InstanceId
from megatron_distkv.request import Request
from megatron_distkv.rmanager import RManager


class Reporting:
    """The engine's thread writes `report` anew; the heartbeat's thread reads it."""

    def __init__(
        self,
        instance: InstanceId,
        allocator: RBlockAllocator,
        host: RBlockAllocator,
        loans: Loans,
        rmanager: RManager,
        scheduler: Scheduler,
        counted_by_followers: Callable[[], Sequence[Counted]],
    ) -> None:
        """`counted_by_followers`: asks them; raises RankLost."""
        self._instance = instance
        self._allocator = allocator
        self._host = host
        self._loans = loans
        self._rmanager = rmanager
        self._scheduler = scheduler
        self._counted_by_followers = counted_by_followers
        self.state = InstanceState.UP
        self.num_steps = 0
        self.num_computed_tokens = 0
        self.report = InstanceReport(0)

    def update(self) -> None:
        """Let the next heartbeat say what is true now."""
        running = self._scheduler.running
        self.report = InstanceReport(
            local_used_rblocks=self._allocator.num_used,
            state=self.state,
            num_running=len(running),
            num_waiting=len(self._scheduler.waiting),
            max_request_tokens=max((request.num_computed_tokens for request in running), default=0),
            prefill_tokens_left=sum(x.num_prefill_tokens_left for x in (*running, *self._scheduler.waiting)),
            placements=tuple(entry for request in running for entry in self._placements(request)),
        )

    def status(self, query_id: int) -> InstanceStatus:
        """Raises RankLost: a follower is asked, too."""
        return InstanceStatus(
            query_id=query_id,
            instance_id=self._instance,
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            free_rblocks=self._allocator.num_free,
            used_rblocks=self._allocator.num_used,
            lent_rblocks=self._allocator.num_lent,
            borrowed_rblocks=self._loans.num_borrowed,
            used_host_rblocks=self._host.num_used,
            num_steps=self.num_steps,
            num_preemptions=self._scheduler.num_preemptions,
            num_computed_tokens=self.num_computed_tokens,
            counted=[*counted_here(), *self._counted_by_followers()],
        )

    def _placements(self, request: Request) -> list[RequestPlacementEntry]:
        table = self._rmanager.table(request)
        here = RequestPlacementEntry(request.request_id, self._instance, table.num_local, True)
        elsewhere = table.remote_by_creditor().items()
        return [here, *(RequestPlacementEntry(request.request_id, x, n, False) for x, n in elsewhere)]
