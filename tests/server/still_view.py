"""A picture of a pool that changes when a test says so."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_distkv.clock import SystemClock
from megatron_distkv.ledger import InstanceState, MemoryLedger, RequestPlacementEntry
from megatron_distkv.pool import Member, MemberInfo, Picture
from megatron_distkv.rblock import InstanceId
from megatron_distkv.server.pool_view import GatewayView
from tests.pool.members import SHAPE

RBLOCK_SIZE = SHAPE.rblock_size


class StillView(GatewayView):
    def __init__(self) -> None:
        super().__init__(MemoryLedger(), SystemClock())
        self._shown: Picture | None = None
        self._is_away = False

    @property
    def picture(self) -> Picture | None:
        return self._shown

    @property
    def ledger_is_away(self) -> bool:
        return self._is_away

    def show(self, *members: Member, held: dict[str, dict[str, int]] | None = None) -> None:
        """`held`: for each instance, how many rBlocks its requests hold."""
        placements = {
            InstanceId(owner): tuple(RequestPlacementEntry(x, InstanceId(owner), n, True) for x, n in requests.items())
            for owner, requests in (held or {}).items()
        }
        self._shown = Picture({member.instance: member for member in members}, (), placements, {})
        self._is_away = False
        self.tell()

    def lose_ledger(self) -> None:
        self._is_away = True
        self.tell()


def member(
    name: str, total: int, used: int = 0, *, lent: int = 0, reserved: int = 0, borrowed: int = 0, epoch: int = 1,
    requests: Path | str = "", address: str = "", eos_token_ids: Sequence[int] = (), running: int = 0,
    prefill_left: int = 0, **facts: Any,
) -> Member:  # fmt: skip
    """An instance; `role="lender"` makes it a memory-only lender."""
    info = MemberInfo(shape=SHAPE, requests=str(requests), eos_token_ids=tuple(eos_token_ids), **facts)
    return Member(
        InstanceId(name), epoch, address, total, reserved, used, lent, borrowed, InstanceState.UP, running, 0, 0,
        prefill_left, 1000, info,
    )  # fmt: skip
