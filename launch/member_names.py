"""Whether the names that a new pool wants are free in its ledger."""

import threading
from collections.abc import Callable, Sequence

from megatron_distkv.errors import UserError
from megatron_distkv.ledger import DebtLedger

LOOK_INTERVAL_S = 0.1


def require_free_names(
    ledger: DebtLedger, names: Sequence[str], where: str, say: Callable[[str], None], stop: threading.Event
) -> None:
    """Returns when no live member has one of `names`; raises UserError when one of them renews its lease.

    A member takes the place of a live one of its name, which then ends: right for a member that is started again, and
    wrong for another pool's. What a killed pool left behind does not renew its leases: it is waited for.
    """
    first = _lease_ends(ledger, names)
    if first:
        say(f"waiting for {', '.join(first)} in {where}: alive, or killed less than a lease ago")
    now = first
    while now and not stop.is_set():
        alive = [name for name, ends_ms in now.items() if ends_ms > first.get(name, 0)]
        if alive:
            raise UserError(
                f"{where} has live members called {', '.join(alive)} already, perhaps of another `distkv up`: end that "
                "one, or give this pool another name by --pool"
            )
        stop.wait(LOOK_INTERVAL_S)
        now = _lease_ends(ledger, names)


def _lease_ends(ledger: DebtLedger, names: Sequence[str]) -> dict[str, int]:
    """By the pool's own clock, of those that live."""
    snapshot = ledger.snapshot()
    live = (record for record in snapshot.live if record.instance in names)
    return {str(record.instance): snapshot.taken_at_ms + record.lease_left_ms for record in live}
