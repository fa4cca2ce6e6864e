"""What must be true of every picture of a pool, and of the ledger beside its instances: a list of what is not."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from megatron_distkv.ledger import Loan
from megatron_distkv.pool.member import Member
from megatron_distkv.pool.picture import Picture
from megatron_distkv.rblock import HOST, InstanceId, loan_name


class Accounts(Protocol):
    """What an instance says of itself (messages.InstanceStatus)."""

    @property
    def free_rblocks(self) -> int: ...
    @property
    def used_rblocks(self) -> int: ...
    @property
    def lent_rblocks(self) -> int: ...
    @property
    def borrowed_rblocks(self) -> int: ...


def check_picture(picture: Picture) -> list[str]:
    """Sentences, each naming an instance or a loan; none when the books are in order."""
    found = [sentence for loan in picture.loans for sentence in _check_loan(picture, loan)]
    for record in picture.members.values():
        found += _check_sums(record, picture.loans)
        found += _check_placements(picture, record)
    return found


def check_instance(record: Member, says: Accounts) -> list[str]:
    """The ledger beside the instance's own accounts."""
    found = []
    if record.lent != says.lent_rblocks:
        found.append(f"{record.instance} lends {says.lent_rblocks} rBlocks, the ledger says {record.lent}")
    if record.borrowed != says.borrowed_rblocks:
        found.append(f"{record.instance} borrows {says.borrowed_rblocks} rBlocks, the ledger says {record.borrowed}")
    in_all = says.free_rblocks + says.used_rblocks + says.lent_rblocks
    if in_all != record.total:
        found.append(f"{record.instance} has {in_all} rBlocks free, used and lent, of {record.total}")
    return found


def _check_loan(picture: Picture, loan: Loan) -> Iterable[str]:
    name = f"loan {loan_name(loan.key)} of {loan.debtor} from {loan.creditor}"
    if loan.num_rblocks < 1:
        yield f"{name} is of {loan.num_rblocks} rBlocks"
    if loan.debtor == loan.creditor:
        yield f"{name} is with itself"
    for side, epoch in ((loan.debtor, loan.debtor_epoch), (loan.creditor, loan.creditor_epoch)):
        record = picture.find(side)
        if record is None:
            yield f"{name}: {side} is not in the pool"
        elif record.epoch != epoch:
            yield f"{name}: {side} is at epoch {record.epoch}, the loan at {epoch}"


def _check_sums(record: Member, loans: Iterable[Loan]) -> Iterable[str]:
    lent = sum(loan.num_rblocks for loan in loans if loan.creditor == record.instance)
    borrowed = sum(loan.num_rblocks for loan in loans if loan.debtor == record.instance)
    if lent != record.lent:
        yield f"{record.instance} lends {lent} rBlocks by its loans, {record.lent} by its record"
    if borrowed != record.borrowed:
        yield f"{record.instance} borrows {borrowed} rBlocks by its loans, {record.borrowed} by its record"
    if lent > record.lendable_at_most:
        yield f"{record.instance} lends {lent} rBlocks and may lend {record.lendable_at_most}"
    if record.local_used + lent > record.total:
        yield f"{record.instance} uses {record.local_used} rBlocks and lends {lent}, of {record.total}"


def _check_placements(picture: Picture, record: Member) -> Iterable[str]:
    placed: dict[InstanceId, int] = {}
    for entry in picture.placements.get(record.instance, ()):
        if not entry.is_local:
            placed[entry.holder] = placed.get(entry.holder, 0) + entry.num_rblocks
    in_host_memory = placed.pop(HOST, 0)
    if in_host_memory > record.host_rblocks:
        yield f"{record.instance} has {in_host_memory} rBlocks in host memory, of {record.host_rblocks}"
    borrowed = _borrowed_by(record.instance, picture.loans)
    for holder, count in placed.items():
        if count > borrowed.get(holder, 0):
            yield f"{record.instance} has {count} rBlocks at {holder} and borrowed {borrowed.get(holder, 0)}"


def _borrowed_by(debtor: InstanceId, loans: Iterable[Loan]) -> Mapping[InstanceId, int]:
    borrowed: dict[InstanceId, int] = {}
    for loan in loans:
        if loan.debtor == debtor:
            borrowed[loan.creditor] = borrowed.get(loan.creditor, 0) + loan.num_rblocks
    return borrowed
