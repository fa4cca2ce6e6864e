"""A memory-only lender: host memory, and the CPU that computes MicroAttention over it. No model, no requests."""

import threading
import time
from contextlib import suppress

from megatron_distkv.attention import Creditor, LoanTable
from megatron_distkv.config.lender import LenderConfig
from megatron_distkv.engine.addresses import rank_address
from megatron_distkv.engine.closing import close_in_order
from megatron_distkv.engine.doors import Doors, advertised_address, warn_of_open_doors
from megatron_distkv.engine.fatal_event import FatalEvent
from megatron_distkv.engine.lender_desk import LenderDesk
from megatron_distkv.engine.membership import Membership, published_shape
from megatron_distkv.errors import LedgerUnavailable, UserError
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger import LENDER, QUERY_US, ROLE, DebtLedger, InstanceReport, InstanceState
from megatron_distkv.log import get_logger
from megatron_distkv.rblock import InstanceId
from megatron_distkv.rmanager import Heartbeat, Identity, LateReleases, Lending, NoFollowers
from megatron_distkv.transport import OnFatal, read_secret

logger = get_logger(__name__)
# How often the main thread, which has nothing else to do, looks for the word to stop.
WATCH_INTERVAL_S = 0.25
# A lender that is told to end gives its debtors this long to bring home what lies here.
DRAIN_WITHIN_S = 5.0


def shape_of_pool(ledger: DebtLedger, stop: threading.Event) -> RBlockShape | None:
    """Waits for a pool's first member that says how its rBlocks look; None when `stop` came before."""
    while not stop.is_set():
        with suppress(LedgerUnavailable):
            for record in ledger.snapshot().live:
                shape = published_shape(record)
                if shape is not None:
                    return shape
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
        self, config: LenderConfig, shape: RBlockShape, ledger: DebtLedger, on_fatal: OnFatal | None = None
    ) -> None:
        """`on_fatal`: told what this process must end for, where nobody calls `run`, which raises it."""
        self._ledger = ledger
        self._fatal = FatalEvent()
        self._on_fatal = on_fatal or self._fatal.note
        self._asked_back_s = 0.0
        self.num_rblocks = num_rblocks_to_lend(config, shape)
        self.allocator = RBlockAllocator(self.num_rblocks, self.num_rblocks)
        self.loan_table = LoanTable()
        self._identity = identity = Identity(InstanceId(config.lender_id))
        address = advertised_address(config.network, config.run_dir, config.lender_id, 1)
        self.lending = Lending(self.allocator, ledger, identity, self.loan_table, NoFollowers(), in_debt=lambda: False)
        shape = shape.of_one_rank()
        creditor = self._make_creditor(shape)
        info = {ROLE: LENDER, QUERY_US: f"{creditor.warm_up():.1f}"}
        membership = Membership(ledger, identity, config.ledger, address, self.allocator, shape, info)
        self._membership = membership
        self._doors = self._open_doors(config, creditor)
        self._heartbeat = Heartbeat(
            ledger,
            identity,
            config.ledger,
            self.lending,
            LateReleases(ledger, identity),  # of loans that it took: there are none
            membership.join,
            lambda: InstanceReport(0, state=InstanceState.DRAINING if self.lending.draining else InstanceState.UP),
        )
        membership.join()
        self._heartbeat.start()

    def run(self, stop: threading.Event) -> None:
        """Until `stop`; raises SupersededError when another has come under the same name, or what broke it."""
        while not stop.wait(WATCH_INTERVAL_S):
            self._fatal.raise_if_noted()
            if self._heartbeat.superseded is not None:
                raise self._heartbeat.superseded
        self.drain(DRAIN_WITHIN_S)

    def drain(self, within_s: float) -> None:
        """Lend nothing new and ask for everything back; returns when it has come, or the time is over."""
        until_s = time.monotonic() + within_s
        self.ask_back()
        while self.allocator.num_lent > 0 and time.monotonic() < until_s:
            time.sleep(WATCH_INTERVAL_S)
            self.ask_back()

    def ask_back(self) -> None:
        """Lend nothing new, and ask for all that is still lent; not more often than a debtor could hear of it."""
        self.lending.draining = True
        if self.allocator.num_lent > 0 and time.monotonic() > self._asked_back_s + WATCH_INTERVAL_S:
            self._asked_back_s = time.monotonic()
            with suppress(LedgerUnavailable):
                self._ledger.reclaim(self._identity.instance, self._identity.epoch, self.allocator.num_lent)

    def check_integrity(self) -> None:
        self.allocator.check_integrity([])

    def close(self) -> None:
        """Leave the pool: debtors compute again what lay here."""
        close_in_order(
            [
                self._heartbeat.stop,
                self._membership.leave,
                self._doors.close,
                self._ledger.close,
            ]
        )

    def _make_creditor(self, shape: RBlockShape) -> Creditor:
        pool = shape.rank_pool(self.num_rblocks)
        logger.info("pool of %s", pool.describe())
        scale = shape.head_dim**-0.5
        num_heads, dtype, head_dim = shape.query_heads_per_rank, shape.torch_dtype, shape.head_dim
        return Creditor(pool.tensor_BLK2ND, self.loan_table, num_heads, dtype, scale, head_dim=head_dim)

    def _open_doors(self, config: LenderConfig, creditor: Creditor) -> Doors:
        secret = read_secret(config.ledger.secret_file)
        warn_of_open_doors(config.network, secret, config.ledger.pool)
        return Doors(
            config.network,
            rank_address(config.run_dir, config.lender_id, 0),
            0,
            config.ledger.pool,
            LenderDesk(self.lending, creditor).answer,
            secret=secret,
            on_disconnect=creditor.forget,
            on_fatal=self._on_fatal,
        )
