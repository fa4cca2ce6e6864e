"""What the ways to other members cost: measured once for each, when this one or the other joins, beside the engine."""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Protocol

import torch

from megatron_distkv.attention import Line
from megatron_distkv.errors import DistkvError
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger import DebtLedger, InstanceRecord, WayCost
from megatron_distkv.log import get_logger
from megatron_distkv.messages import MessageKind
from megatron_distkv.rmanager.identity import Identity
from megatron_distkv.rmanager.peers import MailboxSizes

logger = get_logger(__name__)
# New members are looked for this often.
LOOK_INTERVAL_S = 2.0
# The best of so many: what the way costs, not what else the other side did.
ROUND_TRIPS, LOADS = 20, 4
LOAD_BYTES = 1 << 20
STOP_WITHIN_S = 1.0
# A member that cannot be measured is tried so often.
ATTEMPTS = 3


_SIZES = MailboxSizes(LOAD_BYTES + 4096, 4096)


class Dial(Protocol):
    def __call__(self, peer: str, address: str, sizes: MailboxSizes) -> Line:
        """A new channel to a member's leader; raises PeerLost."""
        ...


class Ways:
    """A thread. `publish` gets all that is known, each time that something new is. Any thread may ask `of`."""

    def __init__(
        self,
        ledger: DebtLedger,
        identity: Identity,
        shape: RBlockShape,
        dial: Dial,
        publish: Callable[[dict[str, WayCost]], None],
        deadline_s: float,
    ) -> None:
        self._ledger = ledger
        self._identity = identity
        self._shape = shape
        self._dial = dial
        self._publish = publish
        self._deadline_s = deadline_s
        self.members: dict[str, InstanceRecord] = {}
        """This one too, as the ledger told of them at the last look."""
        self._costs: dict[str, WayCost] = {}
        self._attempts: dict[tuple[str, int], int] = {}  # by member and epoch
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ways", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Does not wait for a member that hangs."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(STOP_WITHIN_S)

    def of(self, creditor: str) -> WayCost | None:
        """None: not measured (yet)."""
        return self._costs.get(creditor)

    def look(self) -> None:
        """Measure the members that have joined since the last time; raises LedgerUnavailable."""
        self.members = {record.instance: record for record in self._ledger.snapshot().live}
        new = [record for record in self.members.values() if self._is_new(record)]
        found: dict[str, WayCost] = {
            record.instance: cost for record in new if (cost := self._measure(record)) is not None
        }
        if found:
            self._costs = self._costs | found
            self._publish(self._costs)

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(DistkvError):  # the ledger is away: later
                self.look()
            self._stop.wait(LOOK_INTERVAL_S)

    def _is_new(self, record: InstanceRecord) -> bool:
        is_other = record.instance != self._identity.instance
        return is_other and self._attempts.get((record.instance, record.epoch), 0) < ATTEMPTS

    def _measure(self, record: InstanceRecord) -> WayCost | None:
        life = (record.instance, record.epoch)
        try:
            line = self._dial(record.instance, record.address, _SIZES)
            try:
                cost = measure_way(line, self._shape, self._deadline_s)
            finally:
                line.close()
        except DistkvError as error:
            logger.info("the way to %s cannot be measured: %s", record.instance, error)
            self._attempts[life] = self._attempts.get(life, 0) + 1
            return None
        self._attempts[life] = ATTEMPTS
        return cost


def measure_way(line: Line, shape: RBlockShape, deadline_s: float) -> WayCost:
    """Round trips without a load and with one, the best of several; raises DistkvError.

    On a quick way the two differ by less than round trips do among themselves: the load is taken to need half of its
    round trip at least, so that the bandwidth told is at most twice what was really seen.
    """
    nothing, load = torch.empty(0), torch.zeros(LOAD_BYTES, dtype=torch.uint8)
    round_trip_s = min(_call_s(line, nothing, deadline_s) for _ in range(ROUND_TRIPS))
    loaded_s = min(_call_s(line, load, deadline_s) for _ in range(LOADS))
    load_s = max(loaded_s - round_trip_s, loaded_s / 2)
    bytes_per_us = LOAD_BYTES / (load_s * 1e6)
    return way_cost(round_trip_s * 1e6, bytes_per_us, shape)


def way_cost(round_trip_us: float, bytes_per_us: float, shape: RBlockShape) -> WayCost:
    """What follows for one rank of `shape`; a byte per microsecond is a megabyte per second."""
    asked_us = shape.query_bytes_per_rank / bytes_per_us
    return WayCost(
        round_trip_us,
        bytes_per_us,
        shape.num_layers * (round_trip_us + asked_us),
        shape.rblock_bytes / shape.tensor_parallel / bytes_per_us,
    )


def _call_s(line: Line, payload: torch.Tensor, deadline_s: float) -> float:
    began_s = time.perf_counter()
    line.call(MessageKind.PROBE, b"", [payload], deadline_s=deadline_s)
    return time.perf_counter() - began_s
