"""The composition root of an instance's leader: what it is made of, and in which order."""

import json
from dataclasses import dataclass

import torch.distributed as dist

from megatron_distkv.config.instance import LONELY_LEDGER
from megatron_distkv.engine.addresses import rank_address, request_socket
from megatron_distkv.engine.admission import Admission
from megatron_distkv.engine.adopting import Adopting
from megatron_distkv.engine.departure import Departure
from megatron_distkv.engine.doors import Doors, advertised_address, warn_of_open_doors
from megatron_distkv.engine.followers import FollowerRanks
from megatron_distkv.engine.handover import Handover
from megatron_distkv.engine.instance_secret import share_instance_secret
from megatron_distkv.engine.lender_desk import LenderDesk
from megatron_distkv.engine.membership import Membership
from megatron_distkv.engine.rank import Rank
from megatron_distkv.engine.rank_memory import num_own_open_slots
from megatron_distkv.engine.reporting import Reporting
from megatron_distkv.engine.scheduler import Scheduler
from megatron_distkv.engine.stranded import Stranded
from megatron_distkv.kvcache.open_slots import OpenSlots
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.ledger import HOST_RBLOCKS, WAYS, DebtLedger, write_ways
from megatron_distkv.rmanager import (
    Adoptions,
    Borrowing,
    Heartbeat,
    LateReleases,
    Lending,
    NoFollowers,
    PoolOutlook,
    RManager,
    SuccessorDesk,
    Ways,
)
from megatron_distkv.transport import OnFatal


@dataclass(frozen=True)
class Parts:
    """`allocator` has the pool's accounts, `host` those of own host memory."""

    allocator: RBlockAllocator
    host: RBlockAllocator
    membership: Membership
    followers: FollowerRanks | None
    borrowing: Borrowing
    lending: Lending
    adoptions: Adoptions
    rmanager: RManager
    scheduler: Scheduler
    admission: Admission
    reporting: Reporting
    adopting: Adopting
    departure: Departure
    stranded: Stranded
    doors: Doors
    heartbeat: Heartbeat
    ways: Ways


def assemble(rank: Rank, ledger: DebtLedger) -> Parts:
    """Everything but the first registration; others may call from now on. Raises UserError."""
    config, me, peers = rank.config, rank.identity, rank.peers
    cache, limits = config.kv_cache, config.lending
    allocator = RBlockAllocator(cache.num_rblocks, limits.max_lent(cache.num_rblocks))
    host = RBlockAllocator(cache.num_host_rblocks, max_lent=0)
    membership = _membership(rank, ledger, allocator)
    followers = _connect_followers(rank)
    revoker = followers or NoFollowers()
    ways = _ways(rank, ledger, membership)
    outlook = PoolOutlook(ledger, me, peers, enabled=limits.enabled, ways=ways)
    late_releases = LateReleases(ledger, me)
    borrowing = Borrowing(ledger, me, peers, outlook, late_releases, limits.deadline_s)
    lending = Lending(allocator, ledger, me, rank.loan_table, revoker, in_debt=lambda: borrowing.num_borrowed > 0)
    open_slots = OpenSlots(num_own_open_slots(config))
    adoptions = Adoptions(allocator, rank.loan_table, revoker, cache.rblock_size, open_slots)
    rmanager = RManager(allocator, host, borrowing, outlook, limits, cache.rblock_size, open_slots)
    scheduler = Scheduler(config.scheduler, rmanager)
    admission = Admission(rank.model, scheduler, rmanager)
    reporting = Reporting(me.instance, allocator, host, borrowing, rmanager, scheduler)
    adopting = Adopting(adoptions, me, allocator, lending, borrowing, rmanager, scheduler)
    desk = SuccessorDesk(peers, me, limits.deadline_s)
    handover = Handover(ledger, me, desk, borrowing, rmanager, scheduler, limits.max_moved_rblocks_per_step)
    departure = Departure(admission, reporting, lending, rmanager, allocator, scheduler, borrowing, adoptions, handover)
    doors = _open_doors(rank, LenderDesk(lending, rank.creditor, adoptions), on_fatal=None)
    heartbeat = Heartbeat(ledger, me, config.ledger, lending, late_releases, membership.join, lambda: reporting.report)
    return Parts(
        allocator, host, membership, followers, borrowing, lending, adoptions, rmanager, scheduler, admission,
        reporting, adopting, departure, Stranded(admission, scheduler), doors, heartbeat, ways,
    )  # fmt: skip


def _connect_followers(rank: Rank) -> FollowerRanks | None:
    if rank.parallel.size == 1:
        return None
    secret = share_instance_secret()
    dist.barrier()  # the followers listen before this
    config = rank.config
    return FollowerRanks(config.run_dir, rank.identity.instance, config.ledger.pool, rank.parallel.size, secret)


def _membership(rank: Rank, ledger: DebtLedger, allocator: RBlockAllocator) -> Membership:
    config = rank.config
    info = {
        "requests": str(request_socket(config.run_dir, config.instance_id)),
        "rblock_size": str(config.kv_cache.rblock_size),
        **rank.costs,
        HOST_RBLOCKS: str(config.kv_cache.num_host_rblocks),
        "tensor_parallel": str(config.tensor_parallel),
        "model": str(config.model.resolve()),
        "vocab_size": str(rank.model.vocab_size),
        "max_context_tokens": str(rank.model.max_context_tokens or ""),
        "eos_token_ids": json.dumps(rank.model.eos_token_ids),
    }
    address = advertised_address(config.network, config.run_dir, config.instance_id, rank.parallel.size)
    return Membership(ledger, rank.identity, config.ledger, address, allocator, rank.shape, info)


def _ways(rank: Rank, ledger: DebtLedger, membership: Membership) -> Ways:
    return Ways(
        ledger,
        rank.identity,
        rank.shape,
        rank.peers.dial,
        lambda ways: membership.describe(**{WAYS: write_ways(ways)}),
        rank.config.lending.deadline_s,
    )


def _open_doors(rank: Rank, desk: LenderDesk, on_fatal: OnFatal | None) -> Doors:
    """`on_fatal`: told, by a channel's thread, what this instance must end for."""
    config = rank.config
    if config.ledger.url != LONELY_LEDGER:
        warn_of_open_doors(config.network, rank.secret, config.ledger.pool)
    return Doors(
        config.network,
        rank_address(config.run_dir, config.instance_id, 0),
        0,
        config.ledger.pool,
        desk.answer,
        secret=rank.secret,
        on_disconnect=rank.creditor.forget,
        on_fatal=on_fatal,
    )
