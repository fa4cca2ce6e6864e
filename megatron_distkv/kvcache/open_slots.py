"""Which place in the model's dtype each running request has for its open rBlock: the one that is not full yet.

Only where full rBlocks are in another dtype (int8). A request has one such place, and needs no second: positions are
computed in order, and whatever loses KV loses the open rBlock too.

    slots = | free, for requests admitted here | in use | free, for requests that others hand over | in use |

Thread-safe: channel threads reserve room for what others hand over.
"""

import threading
from collections.abc import Collection

from megatron_distkv.errors import IntegrityError


class OpenSlots:
    """`num_own` places for requests admitted here, as many again for requests that others hand over.

    None: full rBlocks are in the model's dtype too; nobody needs a place, and everybody gets none.
    """

    def __init__(self, num_own: int | None) -> None:
        self.are_needed = num_own is not None
        self._num_own = num_own or 0
        self._own = list(range(self._num_own - 1, -1, -1))  # stacks: untouched places have no memory behind them
        self._handed_over = list(range(2 * self._num_own - 1, self._num_own - 1, -1))
        self._slots: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def num_slots(self) -> int:
        return 2 * self._num_own

    def take(self, request_id: str) -> None:
        """For a request admitted here; one that has a place keeps it. There are as many as may run."""
        with self._lock:
            if self.are_needed and request_id not in self._slots:
                if not self._own:
                    raise IntegrityError(f"more than {self._num_own} running requests have an open rBlock")
                self._slots[request_id] = self._own.pop()

    def reserve(self, handover_id: str) -> bool:
        """For a request that may be handed over to this instance; False: too many come at one time."""
        with self._lock:
            if not self.are_needed or handover_id in self._slots:
                return True
            if not self._handed_over:
                return False
            self._slots[handover_id] = self._handed_over.pop()
            return True

    def rename(self, owner: str, new_owner: str) -> None:
        """The request that was to come is here."""
        with self._lock:
            if self.are_needed:
                self._slots[new_owner] = self._slots.pop(owner)

    def slot_of(self, request_id: str) -> int | None:
        """None where nobody needs one."""
        return self._slots[request_id] if self.are_needed else None

    def give_back(self, owner: str) -> None:
        """Harmless for who has none."""
        with self._lock:
            slot = self._slots.pop(owner, None)
            if slot is not None:
                (self._own if slot < self._num_own else self._handed_over).append(slot)

    def check_integrity(self, owners: Collection[str]) -> None:
        """Every place is free, or of exactly one of the `owners`, who all have one."""
        if not self.are_needed:
            return
        with self._lock:
            everywhere = sorted([*self._own, *self._handed_over, *self._slots.values()])
            if everywhere != list(range(self.num_slots)):
                raise IntegrityError(f"places of open rBlocks: {everywhere} are not 0..{self.num_slots}")
            if self._slots.keys() != set(owners):
                raise IntegrityError(f"open rBlocks of {sorted(self._slots)}, but {sorted(owners)} run or are to come")
