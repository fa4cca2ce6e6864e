"""The composition root of an instance's leader: what it is made of, and in which order."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch.distributed as dist

from megatron_distkv.background import Fatal, Periodic
from megatron_distkv.config.instance import LONELY_LEDGER
from megatron_distkv.engine.addresses import rank_address, request_socket
from megatron_distkv.engine.admission import InstanceAdmission
from megatron_distkv.engine.followers import FollowerRanks
from megatron_distkv.engine.host_lender import open_host_lender
from megatron_distkv.engine.instance_secret import share_instance_secret
from megatron_distkv.engine.lender import Lender
from megatron_distkv.engine.lender_handler import LenderHandler
from megatron_distkv.engine.listeners import Listeners, advertised_address, warn_of_open_listeners
from megatron_distkv.engine.rank import Rank
from megatron_distkv.engine.rank_memory import num_own_open_slots
from megatron_distkv.engine.reporting import Reporting
from megatron_distkv.engine.scheduler import Scheduler
from megatron_distkv.engine.unplaceable import Unplaceable
from megatron_distkv.errors import LedgerUnavailable
from megatron_distkv.handover import Drain, HandoverClient, IncomingHandovers, Receiver, Sender
from megatron_distkv.kvcache.open_slots import OpenSlots
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.peers import ControlChannels, LinkProbe
from megatron_distkv.pool import (
    Candidates,
    DebtLedger,
    EndedLoans,
    InstanceState,
    Links,
    LoanBook,
    Loans,
    MemberInfo,
    Membership,
    PoolView,
    Quarantine,
)
from megatron_distkv.rmanager import Lending, NoFollowers, RManager

# Jobs that may wait for the ledger or for another member at one time: beside them the engine goes on.
NUM_JOB_THREADS = 8
# Members whose links are not known are looked for this often.
PROBE_INTERVAL_S = 2.0
# An instance that leaves looks for successors in a picture of the pool that is at most so old.
LOOK_INTERVAL_S = 0.2


class Parts:
    """All parts of an instance, by name. Others may call from its making on; `start` lets its threads run."""

    def __init__(self, rank: Rank, ledger: DebtLedger) -> None:
        """Raises UserError."""
        cache = rank.config.kv_cache
        self.rank, self.ledger = rank, ledger
        self.clock = rank.clock
        self.fatal = Fatal()
        self.host_lender: Lender | None = None
        self.allocator = RBlockAllocator(cache.num_rblocks, rank.config.lending.max_lent(cache.num_rblocks))
        self.host = RBlockAllocator(cache.num_host_rblocks, max_lent=0)
        self.followers = _connect_followers(rank)
        self.jobs = ThreadPoolExecutor(NUM_JOB_THREADS, thread_name_prefix="pool-job")
        self._make_pool()
        self._make_rmanager()
        self._make_engine()
        self._make_handover()
        self.listeners = self._open_listeners()
        self.heartbeat = Periodic("heartbeat", self.membership.beat, self.membership.interval_s, self.fatal)
        self.link_probes = Periodic("links", self._probe_links, lambda: PROBE_INTERVAL_S, self.fatal)
        self.pool_looks = Periodic("pool view", self.view.look, lambda: LOOK_INTERVAL_S, self.fatal)

    def _make_pool(self) -> None:
        """What this process knows of the pool."""
        rank, limits, me = self.rank, self.rank.config.lending, self.rank.identity
        self.membership = self._membership()
        self.view = PoolView(self.ledger, self.clock)
        self.book = LoanBook(self.ledger, me)
        self.control = ControlChannels(rank.peers, limits.min_deadline_s, self.clock)
        probe = LinkProbe(rank.peers, rank.shape, limits.deadline_s, self.clock)
        self.links = Links(self.clock, probe, self.membership.publish_links)
        self.cooldown = Quarantine(self.clock)
        self.candidates = Candidates(
            self.ledger, self.membership, self.links, self.cooldown, rank.peers.lost, enabled=limits.enabled
        )
        self.ended_loans = EndedLoans(self.book, self.clock)
        self.loans = Loans(
            self.book, self.candidates, self.control, self.ended_loans, self.cooldown, self.jobs, self.clock,
            enabled=limits.enabled,
        )  # fmt: skip

    def _make_rmanager(self) -> None:
        """Who holds this instance's rBlocks."""
        rank, config = self.rank, self.rank.config
        revoker = self.followers or NoFollowers()
        self.lending = Lending(
            self.allocator, self.book, rank.loan_table, revoker, lambda: self.loans.num_borrowed > 0, self.jobs,
            self.clock,
        )  # fmt: skip
        open_slots = OpenSlots(num_own_open_slots(config))
        self.incoming = IncomingHandovers(
            self.allocator, rank.loan_table, revoker, config.kv_cache.rblock_size, open_slots, self.jobs, self.clock
        )
        self.rmanager = RManager(
            self.allocator, self.host, self.loans, self.candidates, self.links, self.cooldown, config.lending,
            config.kv_cache.rblock_size, open_slots, self.clock, self._want_totals, self.lending.ask_back,
        )  # fmt: skip

    def _make_engine(self) -> None:
        """What it computes, and for whom."""
        rank = self.rank
        self.scheduler = Scheduler(rank.config.scheduler, self.rmanager, self.clock)
        self.admission = InstanceAdmission(
            rank.model, self.scheduler, self.rmanager, lambda request_id: self.receiver.is_arriving(request_id)
        )
        self.reporting = Reporting(
            rank.identity.instance, self.allocator, self.host, self.loans, self.rmanager, self.scheduler,
            list if self.followers is None else self.followers.counted,
        )  # fmt: skip
        self.unplaceable = Unplaceable(self.admission, self.scheduler, self.clock)

    def _make_handover(self) -> None:
        """Requests that come from instances that leave, and go when this one leaves."""
        me, lost = self.rank.identity, self.rank.peers.lost
        self.receiver = Receiver(
            self.incoming, me, self.allocator, self.lending, self.loans, self.rmanager, self.scheduler, self.clock
        )
        self.sender = Sender(
            lambda: self.view.picture, me, HandoverClient(self.control, lost, me, self.jobs, self.clock),
            self.loans, self.rmanager, self.scheduler, self.rank.config.lending.max_moved_rblocks_per_step, self.clock,
        )  # fmt: skip
        self.drain = Drain(
            self.sender, self.rmanager, self.loans, lambda: self.is_idle and not self.allocator.num_lent,
            self._announce_drain, self.clock,
        )  # fmt: skip

    def start(self) -> None:
        """Join the pool, and stay in it. Raises UserError."""
        self.membership.report = lambda: self.reporting.report
        self.membership.follow_ups = (lambda _: self.ended_loans.tell(), self.lending.reconcile)
        self.membership.when_forgotten = self.lending.begin_restore
        self.membership.join()
        self.membership.beat()
        self.heartbeat.start()
        self.host_lender = open_host_lender(self.rank.config, self.rank.shape, self.fatal, self.clock)
        self.drain.host_lender = self.host_lender
        if self.rank.config.lending.enabled and not self.is_lonely:
            self.link_probes.start()

    @property
    def is_idle(self) -> bool:
        """No request runs, waits or arrives."""
        return self.scheduler.is_idle and self.receiver.is_idle

    def _announce_drain(self, is_draining: bool) -> None:
        self.admission.draining = self.lending.draining = self.incoming.draining = is_draining
        self.reporting.state = InstanceState.DRAINING if is_draining else InstanceState.UP
        self.reporting.update()
        if is_draining:
            self.pool_looks.start()
            self.pool_looks.hurry()

    @property
    def is_lonely(self) -> bool:
        return self.rank.config.ledger.url == LONELY_LEDGER

    def _want_totals(self) -> None:
        if not self.membership.is_recent:
            self.heartbeat.hurry()

    def _probe_links(self) -> None:
        with suppress(LedgerUnavailable):
            self.candidates.probe_links()

    def _membership(self) -> Membership:
        rank, config = self.rank, self.rank.config
        info = MemberInfo(
            shape=rank.shape,
            requests=str(request_socket(config.run_dir, config.instance_id)),
            query_us=rank.costs.query_us,
            host_query_us=rank.costs.host_query_us,
            host_rblocks=config.kv_cache.num_host_rblocks,
            model=str(config.model.resolve()),
            checkpoint=rank.fingerprint,
            vocab_size=rank.model.vocab_size,
            max_context_tokens=rank.model.max_context_tokens,
            eos_token_ids=tuple(rank.model.eos_token_ids),
        )
        address = advertised_address(config.network, config.run_dir, config.instance_id, rank.parallel.size)
        total = self.allocator.num_rblocks
        return Membership(
            self.ledger, rank.identity, config.ledger, address, total, total - self.allocator.max_lent, info, self.clock
        )

    def _open_listeners(self) -> Listeners:
        rank, config = self.rank, self.rank.config
        if not self.is_lonely:
            warn_of_open_listeners(config.network, rank.secret, config.ledger.pool)
        return Listeners(
            config.network,
            rank_address(config.run_dir, config.instance_id, 0),
            0,
            config.ledger.pool,
            LenderHandler(self.lending, rank.creditor, self.incoming).answer,
            secret=rank.secret,
            on_disconnect=rank.creditor.forget,
            on_fatal=self.fatal.report,
        )


def _connect_followers(rank: Rank) -> FollowerRanks | None:
    if rank.parallel.size == 1:
        return None
    secret = share_instance_secret()
    dist.barrier()  # the followers listen before this
    config = rank.config
    return FollowerRanks(config.run_dir, rank.identity.instance, config.ledger.pool, rank.parallel.size, secret)
