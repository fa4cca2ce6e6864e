"""The global debt ledger: who lent how many rBlocks to whom.

The ledger is the promise, each creditor's allocator the truth. Every operation is atomic, idempotent under retry and
fenced: a message that carries another epoch than the live one of its instance changes nothing. Any operation may raise
`LedgerUnavailable`.

    borrow (reserve) -> accept | release -> release        by loan id
    register -> heartbeat* -> deregister | expire          by (instance, epoch), kept alive by its lease
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from megatron_distkv.ledger.pool_snapshot import PoolChanges, PoolSnapshot
from megatron_distkv.ledger.records import (
    CreditorOffer,
    HeartbeatReply,
    InstanceReport,
    Loan,
    MoveOrder,
    Recall,
    Registration,
)
from megatron_distkv.messages import Refusal
from megatron_distkv.rblock import InstanceId, LoanKey


class DebtLedger(Protocol):
    def register(
        self,
        instance: InstanceId,
        address: str,
        total_rblocks: int,
        reserved_rblocks: int,
        lease_s: float,
        *,
        epoch: int = 0,
        generation: str = "",
        info: Mapping[str, str] | None = None,
    ) -> Registration:
        """Begin or renew a life of `instance`; `reserved_rblocks` are never lent.

        Who was registered before passes its old epoch and generation: it keeps the epoch when the ledger has lost its
        data since (so its loans can be restored), else gets a new one and its loans are void. Epochs only ever grow.
        Raises SupersededError when a newer incarnation of the same id is registered.
        """

    def heartbeat(self, instance: InstanceId, epoch: int, report: InstanceReport, lease_s: float) -> HeartbeatReply:
        """Renew the lease and report; brings back recalls (until released) and planned moves (once).

        `known` False also where somebody else has written into this member's record: registering again heals it.
        """

    def recommend(self, debtor: InstanceId, limit: int, skip: int = 0) -> list[CreditorOffer]:
        """Up to `limit` live, debt-free instances that would lend, freest first.

        After the first `skip` of them: whoever wants more than one answer holds asks again for the rest.
        """

    def borrow(
        self,
        loan_id: LoanKey,
        debtor: InstanceId,
        debtor_epoch: int,
        creditor: InstanceId,
        creditor_epoch: int,
        num_rblocks: int,
        pending_s: float,
    ) -> Refusal | None:
        """Reserve; the creditor must accept within `pending_s`. An instance in debt is refused as a creditor.

        So the debt graph has no cycles: the edge that would close one leads to an instance in debt.
        """

    def accept(self, loan_id: LoanKey, creditor: InstanceId, creditor_epoch: int) -> Refusal | None:
        """The creditor has really allocated."""

    def release(self, loan_id: LoanKey, instance: InstanceId, epoch: int) -> int:
        """End a loan, by either side; returns the rBlocks given back (0: it had ended, or a stale epoch asked)."""

    def reclaim(self, creditor: InstanceId, epoch: int, num_rblocks: int) -> list[Recall]:
        """Ask debtors for `num_rblocks` back, whole loans, largest first; they hear of it with their next heartbeat."""

    def restore(
        self,
        loan_id: LoanKey,
        debtor: InstanceId,
        debtor_epoch: int,
        creditor: InstanceId,
        creditor_epoch: int,
        num_rblocks: int,
    ) -> Refusal | None:
        """After a loss of the ledger: the creditor says what it lends. Debtors must be registered (STALE_DEBTOR)."""

    def transfer(
        self,
        loan_id: LoanKey,
        new_loan_id: LoanKey,
        new_debtor: InstanceId,
        new_debtor_epoch: int,
        creditor: InstanceId,
        creditor_epoch: int,
    ) -> Refusal | None:
        """The creditor has another debtor for a loan that it has granted: it ends, and `new_loan_id` begins, at once.

        Without a new cycle: the creditor is debt-free, or nobody owes `new_debtor` anything (else IN_DEBT).
        """

    def loans_of(self, creditor: InstanceId, epoch: int) -> list[Loan]:
        """What `creditor` lends. Raises LedgerUnavailable when the ledger does not know this epoch (any more).

        A ledger that has just lost its data must not look like one where all loans have ended.
        """

    def known_loans(self, loan_ids: Collection[LoanKey]) -> set[LoanKey]:
        """Which of these the ledger has now."""

    def expire(self, limit: int = 64) -> list[InstanceId]:
        """Bury instances whose lease has ended (debts void, credits returned) and drop overdue reservations."""

    def describe(self, instance: InstanceId, epoch: int, info: Mapping[str, str]) -> bool:
        """Replace what the registration said of this member; False: a stale epoch asked."""

    def deregister(self, instance: InstanceId, epoch: int) -> None:
        """Leave: as if the lease had ended now."""

    def changes(
        self, since: int, limit: int = 256, *, with_loans: bool = True, with_placements: bool = True
    ) -> PoolChanges:
        """Members whose record, credits or placements have changed since `since`, at most `limit`, the oldest first.

        `since` is the `version` of the answer before, 0 for all of them. Renewing a lease is no change; who is dead
        leaves with a later answer, or this one. One that cannot be read spoils no other.
        """

    def snapshot(self) -> PoolSnapshot:
        """All of it, by `changes` from 0: for a look. Whoever looks again and again follows the changes."""

    def lead(self, candidate: str, lease_s: float) -> bool:
        """Take or keep the gManager's leader lease."""

    def publish_moves(self, leader: str, moves: Sequence[MoveOrder]) -> bool:
        """Hand moves to their sources' next heartbeats; False when `leader` does not lead."""

    def events(self, count: int) -> list[dict[str, str]]:
        """The last `count` events, oldest first; `at_ms` is the server's clock."""

    def close(self) -> None: ...
