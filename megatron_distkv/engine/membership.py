"""Membership of a pool, for instances and lenders alike: what the ledger knows of them."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import msgspec

from megatron_distkv.config.instance import LedgerConfig
from megatron_distkv.errors import LedgerUnavailable, UserError
from megatron_distkv.kvcache.rblock_allocator import RBlockAllocator
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger import DebtLedger, InstanceRecord
from megatron_distkv.log import get_logger
from megatron_distkv.rmanager import Identity

logger = get_logger(__name__)
_SHAPE = "rblock_shape"
# Of who joins, with a ledger that was there a moment ago: it may be restarted, or its machine busy.
JOIN_PATIENCE_S = 10.0
_RETRY_AFTER_S = 0.2


def published_shape(record: InstanceRecord) -> RBlockShape | None:
    """The shape of this member's rBlocks; None where it says nothing that can be read."""
    try:
        return msgspec.json.decode(record.info.get(_SHAPE, ""), type=RBlockShape)
    except msgspec.MsgspecError:
        return None


class Membership:
    """Raises UserError in a pool whose rBlocks have another shape than `shape`, or whose ledger stays silent."""

    def __init__(
        self,
        ledger: DebtLedger,
        identity: Identity,
        config: LedgerConfig,
        address: str,
        allocator: RBlockAllocator,
        shape: RBlockShape,
        info: Mapping[str, str],
    ) -> None:
        self._ledger = ledger
        self._identity = identity
        self._config = config
        self._address = address
        self._allocator = allocator
        self._shape = shape
        self._info = {**info, _SHAPE: msgspec.json.encode(shape).decode()}
        self._has_joined = False
        self._patiently(self._require_same_shape)

    def join(self) -> None:
        """Register, and again where the ledger has forgotten (then it raises LedgerUnavailable at once).

        Two members may come at the same moment, each before the other is in the ledger: the later one leaves again.
        """
        if self._has_joined:
            self._register()
            return
        self._patiently(self._register)
        try:
            self._patiently(lambda: self._require_same_shape(before_epoch=self._identity.epoch))
        except UserError:
            with suppress(LedgerUnavailable):
                self.leave()
            raise
        self._has_joined = True

    def _patiently(self, ask: Callable[[], None]) -> None:
        until_s = time.monotonic() + JOIN_PATIENCE_S
        while True:
            try:
                ask()
                return
            except LedgerUnavailable as error:
                if time.monotonic() > until_s:
                    raise UserError(
                        f"{self._identity.instance} cannot join pool {self._config.pool!r}: {error}"
                    ) from error
                time.sleep(_RETRY_AFTER_S)

    def _register(self) -> None:
        identity, allocator = self._identity, self._allocator
        registration = self._ledger.register(
            identity.instance,
            self._address,
            allocator.num_rblocks,
            allocator.num_rblocks - allocator.max_lent,
            self._config.lease_s,
            epoch=identity.epoch,
            generation=identity.generation,
            info=self._info,
        )
        identity.epoch, identity.generation = registration.epoch, registration.generation

    def describe(self, **facts: str) -> None:
        """Say more of this member than at its registration; raises LedgerUnavailable. Any thread may call it."""
        self._info = {**self._info, **facts}
        self._ledger.describe(self._identity.instance, self._identity.epoch, self._info)

    def leave(self) -> None:
        self._ledger.deregister(self._identity.instance, self._identity.epoch)

    def _require_same_shape(self, before_epoch: int | None = None) -> None:
        """As that of all members, or of those that came before this epoch."""
        live = self._ledger.snapshot().live
        for record in (x for x in live if before_epoch is None or x.epoch < before_epoch):
            theirs = published_shape(record)
            if record.instance == self._identity.instance or theirs is None:
                continue
            if differences := self._shape.differences(theirs):
                raise UserError(
                    f"{self._identity.instance} cannot join pool {self._config.pool!r}: its rBlocks have"
                    f" {'; '.join(differences)} as those of {record.instance}"
                )
