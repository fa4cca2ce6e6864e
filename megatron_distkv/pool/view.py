"""The pool as gateways and planners see it: one reader of the ledger per process, a picture for everybody else."""

from collections.abc import Mapping

from megatron_distkv.clock import Clock
from megatron_distkv.errors import LedgerUnavailable
from megatron_distkv.ledger import DebtLedger, PoolReader
from megatron_distkv.log import get_logger
from megatron_distkv.pool.picture import Picture, picture_of
from megatron_distkv.rblock import InstanceId

logger = get_logger(__name__)


class PoolView:
    """One thread calls `look`, again and again; any other reads `picture`.

    While the ledger is away the last picture stays: instances are then tried, and found gone or not.
    """

    def __init__(self, ledger: DebtLedger, clock: Clock) -> None:
        self._reader = PoolReader(ledger.changes)
        self._clock = clock
        self.picture: Picture | None = None
        self.ledger_is_away = False
        self._looked_at_s = clock.monotonic_s()
        self._unreadable: Mapping[InstanceId, str] = {}

    @property
    def age_s(self) -> float:
        """Since the last look, also a vain one."""
        return self._clock.monotonic_s() - self._looked_at_s

    def look(self) -> None:
        """Never raises: a record that cannot be read is left out, and said once."""
        try:
            picture = picture_of(self._reader.snapshot())
            picture.work_out()
            self.picture = picture
            self.ledger_is_away = False
        except LedgerUnavailable as error:
            if not self.ledger_is_away:
                logger.warning("the ledger is away: %s", error)
            self.ledger_is_away = True
        else:
            self._say_unreadable(self.picture.unreadable)
        self._looked_at_s = self._clock.monotonic_s()

    def _say_unreadable(self, unreadable: Mapping[InstanceId, str]) -> None:
        for instance in unreadable.keys() - self._unreadable.keys():
            logger.warning("%s is left alone: %s", instance, unreadable[instance])
        self._unreadable = unreadable
