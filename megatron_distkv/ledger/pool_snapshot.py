"""The whole pool at one moment, as the ledger knows it."""

from dataclasses import dataclass

from megatron_distkv.ledger.records import InstanceRecord, InstanceState, Loan, RequestPlacementEntry
from megatron_distkv.rblock import HOST, InstanceId, loan_name


@dataclass(frozen=True)
class PoolSnapshot:
    """One atomic read. `placements` are keyed by the instance that owns the requests."""

    generation: str
    taken_at_ms: int
    instances: tuple[InstanceRecord, ...]
    loans: tuple[Loan, ...]
    placements: dict[InstanceId, tuple[RequestPlacementEntry, ...]]

    def find(self, instance: InstanceId) -> InstanceRecord | None:
        return next((record for record in self.instances if record.instance == instance), None)

    @property
    def live(self) -> tuple[InstanceRecord, ...]:
        return tuple(record for record in self.instances if record.lease_left_ms > 0)

    def lendable_to(self, instance: InstanceId) -> int:
        """rBlocks that all other live instances together lend at most, when none of them uses its own memory."""
        lenders = (record for record in self.live if record.instance != instance)
        return sum(record.lendable_at_most for record in lenders if record.state is InstanceState.UP)

    def used_host_rblocks(self, instance: InstanceId) -> int:
        return sum(entry.num_rblocks for entry in self.placements.get(instance, ()) if entry.holder == HOST)


def render_debts(snapshot: PoolSnapshot) -> str:
    """The debt ledger for a person: each instance's memory, then who owes how much to whom."""
    lines = [f"{'instance':<16}{'total':>7}{'used':>7}{'lent':>7}{'borrowed':>10}{'free':>7}  state"]
    for record in snapshot.instances:
        state = record.state.value if record.lease_left_ms > 0 else "dead"
        state += "" if record.takes_requests else ", memory only"
        state += _cost(record.query_us)
        if record.host_rblocks:
            state += f", {snapshot.used_host_rblocks(record.instance)} of {record.host_rblocks} used in host memory"
            state += _cost(record.host_query_us)
        lines.append(
            f"{record.instance:<16}{record.total:>7}{record.local_used:>7}{record.lent:>7}"
            f"{record.borrowed:>10}{record.free:>7}  {state}"
        )
    lines.append("")
    if not snapshot.loans:
        lines.append("no debts")
    for loan in snapshot.loans:
        name, state = loan_name(loan.loan_id), loan.state.value
        lines.append(f"{loan.debtor} owes {loan.creditor} {loan.num_rblocks} rBlocks  ({name}, {state})")
    return "\n".join(lines + _render_ways(snapshot))


def _render_ways(snapshot: PoolSnapshot) -> list[str]:
    """What members have measured of the ways to each other; nothing where nobody has."""
    ways = [(record.instance, *way) for record in snapshot.live for way in sorted(record.ways.items())]
    if not ways:
        return []
    head = f"{'way':<32}{'round trip':>12}{'MB/s':>8}{'a step asks':>13}{'rBlock home':>13}  breaks even after"
    return ["", head] + [
        f"{f'{debtor} to {creditor}':<32}{way.round_trip_us:>9.0f} us{way.megabytes_per_s:>8.0f}{way.ask_us:>10.0f} us"
        f"{way.home_us:>10.0f} us  {way.break_even_steps:.3g} steps per rBlock"
        for debtor, creditor, way in ways
    ]


def _cost(query_us: float | None) -> str:
    return "" if query_us is None else f" ({query_us:g} us per rBlock)"
