"""The debt ledger for a person."""

from megatron_distkv.pool.picture import Picture
from megatron_distkv.rblock import loan_name


def render_debts(picture: Picture) -> str:
    """The debt ledger for a person: each instance's memory, then who owes how much to whom."""
    lines = [f"{'instance':<16}{'total':>7}{'used':>7}{'lent':>7}{'borrowed':>10}{'free':>7}  state"]
    for record in picture.members.values():
        state = record.state.value if record.lease_left_ms > 0 else "dead"
        state += "" if record.takes_requests else ", memory only"
        state += _cost(record.info.query_us)
        if record.host_rblocks:
            state += f", {picture.used_host_rblocks(record.instance)} of {record.host_rblocks} used in host memory"
            state += _cost(record.info.host_query_us)
        lines.append(
            f"{record.instance:<16}{record.total:>7}{record.local_used:>7}{record.lent:>7}"
            f"{record.borrowed:>10}{record.free:>7}  {state}"
        )
    lines.append("")
    if not picture.loans:
        lines.append("no debts")
    for loan in picture.loans:
        name, state = loan_name(loan.key), loan.state.value
        lines.append(f"{loan.debtor} owes {loan.creditor} {loan.num_rblocks} rBlocks  ({name}, {state})")
    lines += [f"{name} cannot be read: {why}" for name, why in sorted(picture.unreadable.items())]
    return "\n".join(lines + _render_links(picture))


def _render_links(picture: Picture) -> list[str]:
    """What members have measured of the links that they have used last; nothing where nobody has."""
    links = [(member.instance, *link) for member in picture.live for link in sorted(member.info.links.items())]
    if not links:
        return []
    head = f"{'link':<32}{'round trip':>12}{'MB/s':>8}{'a step asks':>13}{'fetch back':>13}  breaks even after"
    return ["", head] + [
        f"{f'{debtor} to {creditor}':<32}{link.round_trip_us:>9.0f} us{link.megabytes_per_s:>8.0f}"
        f"{link.ask_us:>10.0f} us{link.fetch_us:>10.0f} us  {link.break_even_steps:.3g} steps per rBlock"
        for debtor, creditor, link in links
    ]


def _cost(query_us: float | None) -> str:
    return "" if query_us is None else f" ({query_us:.2g} us per rBlock)"
