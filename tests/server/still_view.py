"""A picture of a pool that changes when a test says so."""

from pathlib import Path

from megatron_distkv.ledger import InstanceRecord, InstanceState, MemoryLedger, PoolSnapshot, RequestPlacementEntry
from megatron_distkv.rblock import InstanceId
from megatron_distkv.server.pool_view import PoolView

RBLOCK_SIZE = 8


class StillView(PoolView):
    def __init__(self) -> None:
        super().__init__(MemoryLedger())

    def show(self, *members: InstanceRecord, held: dict[str, dict[str, int]] | None = None) -> None:
        """`held`: for each instance, how many rBlocks its requests hold."""
        placements = {
            InstanceId(owner): tuple(RequestPlacementEntry(x, InstanceId(owner), n, True) for x, n in requests.items())
            for owner, requests in (held or {}).items()
        }
        self.snapshot = PoolSnapshot("g", 0, members, (), placements)
        self.ledger_is_away = False
        self.look()

    def lose_ledger(self) -> None:
        self.ledger_is_away = True
        self.look()

    def look(self) -> None:
        for listener in self.when_looked:
            listener()


def member(
    name: str, total: int, used: int = 0, *, lent: int = 0, reserved: int = 0, borrowed: int = 0, epoch: int = 1,
    requests: Path | str = "", address: str = "", **info: str,
) -> InstanceRecord:  # fmt: skip
    """An instance; `role="lender"` makes it a memory-only lender."""
    said = {"requests": str(requests), "rblock_size": str(RBLOCK_SIZE), "eos_token_ids": "[]", **info}
    return InstanceRecord(
        InstanceId(name), epoch, address, total, reserved, used, lent, borrowed, InstanceState.UP, 0, 0, 0, 1000, said
    )
