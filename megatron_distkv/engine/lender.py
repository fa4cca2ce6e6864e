"""A memory-only lender: host memory, and the CPU that computes MicroAttention over it. No model, no requests."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from megatron_distkv.attention import Creditor, LoanTable
from megatron_distkv.background import Fatal, Periodic
from megatron_distkv.clock import Clock, SystemClock
from megatron_distkv.config.lender import LenderConfig
from megatron_distkv.engine.addresses import rank_address
from megatron_distkv.engine.closing import close_in_order
from megatron_distkv.engine.lender_handler import LenderHandler
from megatron_distkv.engine.listeners import Listeners, advertised_address, warn_of_open_listeners
from megatron_distkv.errors import LedgerUnavailable, UserError
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.kvcache.rblock_pool import rank_pool, torch_dtype
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.log import get_logger
from megatron_distkv.messages import Counted
from megatron_distkv.pool import (
    DebtLedger,
    Identity,
    InstanceReport,
    InstanceState,
    LoanBook,
    MemberInfo,
    Membership,
    picture_of,
)
from megatron_distkv.rblock import InstanceId
from megatron_distkv.rmanager import Lending, NoFollowers
from megatron_distkv.transport import read_secret

logger = get_logger(__name__)
# How often the main thread, which has nothing else to do, looks for the word to stop.
WATCH_INTERVAL_S = 0.25
# A lender that is told to end gives its debtors this long to fetch back what lies here.
DRAIN_WITHIN_S = 5.0


def shape_of_pool(ledger: DebtLedger, stop: threading.Event) -> RBlockShape | None:
    """Waits for a pool's first member that says how its rBlocks look; None when `stop` came before."""
    while not stop.is_set():
        with suppress(LedgerUnavailable):
            for member in picture_of(ledger.snapshot()).live:
                return member.info.shape
        stop.wait(WATCH_INTERVAL_S)
    return None


def num_rblocks_to_lend(config: LenderConfig, shape: RBlockShape) -> int:
    """Raises UserError when not even one rBlock fits."""
    if config.num_rblocks is not None:
        return config.num_rblocks
    assert config.memory is not None
    if config.memory < shape.rblock_bytes:
        raise UserError(f"{config.memory} bytes of memory are less than one rBlock of {shape.rblock_bytes} bytes")
    return config.memory // shape.rblock_bytes


class Lender:
    """A creditor like any instance, of one rank that holds all heads: it serves debtors of any tensor parallelism.

    It never borrows.
    """

    def __init__(
        self,
        config: LenderConfig,
        shape: RBlockShape,
        ledger: DebtLedger,
        fatal: Fatal | None = None,
        counted: Callable[[], tuple[Counted, ...]] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`fatal`: hears what this process must end for, where nobody calls `run`, which raises it.

        `counted`: what this process has counted. None: it is another member's, which tells that itself.
        """
        self._ledger = ledger
        self.fatal = fatal or Fatal()
        clock, identity = clock or SystemClock(), Identity(InstanceId(config.lender_id))
        self._clock = clock
        self.num_rblocks = num_rblocks_to_lend(config, shape)
        self.allocator = RBlockAllocator(self.num_rblocks, self.num_rblocks)
        self.loan_table = LoanTable()
        shape = shape.of_one_rank()
        creditor = self._make_creditor(shape)
        info = MemberInfo(shape=shape, role="lender", query_us=creditor.warm_up())
        address = advertised_address(config.network, config.run_dir, config.lender_id, 1)
        membership = Membership(ledger, identity, config.ledger, address, self.num_rblocks, 0, info, clock)
        self._membership = membership
        self._jobs = ThreadPoolExecutor(1, thread_name_prefix="pool-job")
        self.lending = Lending(
            self.allocator, LoanBook(ledger, identity), self.loan_table, NoFollowers(), lambda: False, self._jobs, clock
        )
        self._listeners = self._open_listeners(config, creditor)
        self._counted = counted
        membership.report = self._report
        membership.follow_ups = (self.lending.reconcile,)
        membership.when_forgotten = self.lending.begin_restore
        self._heartbeat = Periodic("heartbeat", membership.beat, membership.interval_s, self.fatal)
        membership.join()
        self._heartbeat.start()

    @property
    def num_lent(self) -> int:
        """rBlocks."""
        return self.allocator.num_lent

    def run(self, stop: threading.Event) -> None:
        """Until `stop`; raises what ends it: that another has come under its name, or that a thread has failed."""
        while not stop.wait(WATCH_INTERVAL_S):
            self.fatal.raise_if_any()
        self.drain(DRAIN_WITHIN_S)

    def drain(self, within_s: float) -> None:
        """Lend nothing new and ask for everything back; returns when it has come, or the time is over."""
        until_s = self._clock.monotonic_s() + within_s
        self.ask_back()
        while self.allocator.num_lent > 0 and self._clock.monotonic_s() < until_s:
            self._clock.sleep(WATCH_INTERVAL_S)
            self.ask_back()

    def ask_back(self) -> None:
        """Lend nothing new, and recall all that is still lent."""
        self.lending.draining = True
        self.lending.ask_back(self.allocator.num_lent)

    def check_integrity(self) -> None:
        self.allocator.check_integrity([])

    def close(self) -> None:
        """Leave the pool: debtors compute again what lay here."""
        close_in_order(
            [
                self._heartbeat.stop,
                self._membership.leave,
                self._listeners.close,
                lambda: self._jobs.shutdown(wait=False, cancel_futures=True),
                self._ledger.close,
            ]
        )

    def _report(self) -> InstanceReport:
        state = InstanceState.DRAINING if self.lending.draining else InstanceState.UP
        return InstanceReport(0, state=state, counted=None if self._counted is None else self._counted())

    def _make_creditor(self, shape: RBlockShape) -> Creditor:
        pool = rank_pool(shape, self.num_rblocks)
        logger.info("pool of %s", pool.describe())
        scale = shape.head_dim**-0.5
        num_heads, dtype, head_dim = shape.query_heads_per_rank, torch_dtype(shape), shape.head_dim
        return Creditor(pool.tensor_BLK2ND, self.loan_table, num_heads, dtype, scale, self._clock, head_dim=head_dim)

    def _open_listeners(self, config: LenderConfig, creditor: Creditor) -> Listeners:
        secret = read_secret(config.ledger.secret_file)
        warn_of_open_listeners(config.network, secret, config.ledger.pool)
        return Listeners(
            config.network,
            rank_address(config.run_dir, config.lender_id, 0),
            0,
            config.ledger.pool,
            LenderHandler(self.lending, creditor).answer,
            secret=secret,
            on_disconnect=creditor.forget,
            on_fatal=self.fatal.report,
        )
