"""What this instance may expect from the pool: how much it could borrow now, and at most. Asks the ledger sparingly."""

import contextlib
import time

from megatron_distkv.errors import LedgerUnavailable
from megatron_distkv.ledger import Creditor, DebtLedger, InstanceRecord, WayCost
from megatron_distkv.rmanager.identity import Identity
from megatron_distkv.rmanager.peers import Peers
from megatron_distkv.rmanager.ways import Ways

# A view of the pool this old is still good enough to admit requests by.
VIEW_AGE_S = 0.2
# What a member measured when it started does not change: this often new ones are looked for.
RECORDS_AGE_S = 2.0
# A creditor whose MicroAttention takes this many times as long as the quickest one's is asked last.
DEAR = 4.0
# How much is asked of a creditor at a time, for comparisons.
ASKED_RBLOCKS = 16
# After a refusal the same question is not asked again at every step.
RETRY_S = 0.05
# Debtors need a heartbeat to hear of a reclaim: asking more often only repeats it.
RECLAIM_INTERVAL_S = 1.0
MAX_CREDITORS = 64
# A creditor that wants memory back, or cannot answer, is not asked for more in this time.
LEFT_ALONE_S = 2.0
# More rBlocks than any pool has: `recommend` then names every creditor.
EVERYTHING = 1 << 40


class PoolOutlook:
    """Only the engine's thread calls it. With `enabled` False nothing is ever borrowed."""

    def __init__(
        self, ledger: DebtLedger, identity: Identity, peers: Peers, *, enabled: bool, ways: Ways | None = None
    ) -> None:
        self._ways = ways
        self._enabled = enabled
        self._ledger = ledger
        self._identity = identity
        self._peers = peers
        self._left_alone_until_s: dict[str, float] = {}
        self._members: dict[str, InstanceRecord] = {}
        self._records_read_at_s = float("-inf")
        self._borrowable = 0
        self._most_borrowable = 0
        self._viewed_at_s = float("-inf")
        self._most_viewed_at_s = float("-inf")
        self._ask_again_at_s = float("-inf")
        self._reclaim_again_at_s = float("-inf")

    def creditors(self) -> list[Creditor]:
        """Who would lend now, best first; none while the ledger is away. Those lost a moment ago are left alone.

        Those whose answers would take much longer than the quickest one's, the way there and back included, come last;
        before them lenders, which have no requests of their own to slow down, then instances; the freest of each first.
        """
        try:
            recommended = self._ledger.recommend(self._identity.instance, EVERYTHING, MAX_CREDITORS)
        except LedgerUnavailable:
            return []
        now_s = time.monotonic()
        left_alone = {name for name, until_s in self._left_alone_until_s.items() if until_s > now_s}
        able = [x for x in recommended if x.instance not in left_alone and not self._peers.shuns(x.instance)]
        records = self._records()
        costs = {name: self._answer_us(record) for name, record in records.items() if record.query_us is not None}
        dear_us = DEAR * min((costs[x.instance] for x in able if x.instance in costs), default=float("inf"))

        def rank(creditor: Creditor) -> tuple[bool, bool]:
            name = creditor.instance
            return costs.get(name, 0.0) > dear_us, name not in records or records[name].takes_requests

        return sorted(able, key=rank)

    def host_memory_is_dear(self) -> bool:
        """Whether own host memory answers so much later than a member of the pool that it comes after creditors.

        By the last look at the ways to them, in a thread of its own: moves to own memory never wait for the ledger.
        """
        members = {} if self._ways is None else self._ways.members
        own = members.get(self._identity.instance)
        if own is None or own.host_query_us is None:
            return False
        others = [x for x in members.values() if x is not own and x.query_us is not None and x.free_to_lend > 0]
        return ASKED_RBLOCKS * own.host_query_us > DEAR * min(map(self._answer_us, others), default=float("inf"))

    def _answer_us(self, record: InstanceRecord) -> float:
        """Of one decode step, with a few rBlocks there."""
        way = self.way_to(record.instance)
        return ASKED_RBLOCKS * (record.query_us or 0.0) + (0.0 if way is None else way.ask_us)

    def way_to(self, creditor: str) -> WayCost | None:
        return None if self._ways is None else self._ways.of(creditor)

    def _records(self) -> dict[str, InstanceRecord]:
        """What members have said of themselves, a while ago at most."""
        if time.monotonic() - self._records_read_at_s > RECORDS_AGE_S:
            with contextlib.suppress(LedgerUnavailable):
                self._members = {record.instance: record for record in self._ledger.snapshot().live}
            self._records_read_at_s = time.monotonic()
        return self._members

    def leave_alone(self, creditor: str) -> None:
        self._left_alone_until_s[creditor] = time.monotonic() + LEFT_ALONE_S

    def borrowable_rblocks(self) -> int:
        """rBlocks that all creditors together would lend now; 0 while the ledger is away."""
        if self._enabled and time.monotonic() - self._viewed_at_s > VIEW_AGE_S:
            self._borrowable = sum(creditor.free_rblocks for creditor in self.creditors())
            self._viewed_at_s = time.monotonic()
        return self._borrowable

    def most_borrowable_rblocks(self) -> int:
        """rBlocks that all others together may lend at most; the last known figure while the ledger is away."""
        if self._enabled and time.monotonic() - self._most_viewed_at_s > VIEW_AGE_S:
            with contextlib.suppress(LedgerUnavailable):
                self._most_borrowable = self._ledger.snapshot().lendable_to(self._identity.instance)
            self._most_viewed_at_s = time.monotonic()
        return self._most_borrowable

    def may_ask(self) -> bool:
        return self._enabled and time.monotonic() >= self._ask_again_at_s

    def note_answer(self, *, got_all: bool) -> None:
        self._viewed_at_s = float("-inf")
        if not got_all:
            self._ask_again_at_s = time.monotonic() + RETRY_S

    def reclaim(self, num_rblocks: int) -> None:
        """Ask this instance's debtors for `num_rblocks` back, through the ledger."""
        if num_rblocks <= 0 or time.monotonic() < self._reclaim_again_at_s:
            return
        self._reclaim_again_at_s = time.monotonic() + RECLAIM_INTERVAL_S
        with contextlib.suppress(LedgerUnavailable):
            self._ledger.reclaim(self._identity.instance, self._identity.epoch, num_rblocks)
