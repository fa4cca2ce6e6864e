"""What the pool could give a newcomer now, and what it could ever give."""

from collections import Counter

from megatron_distkv.ledger import InstanceRecord, InstanceState, PoolSnapshot
from megatron_distkv.rblock import num_rblocks_for

# In an instance's registration: tokens that its model can attend to, if it has such a limit.
MAX_CONTEXT_TOKENS = "max_context_tokens"


class PoolMemory:
    """The ledger's picture less `promised`: what has been given away, by instance, since it was taken."""

    def __init__(self, snapshot: PoolSnapshot, promised: Counter[str]) -> None:
        self._promised = promised
        members = [record for record in snapshot.live if record.state is InstanceState.UP]
        # Who borrows itself does not lend: no chains
        self._lendable = {x.instance: max(0, x.free_to_lend) for x in members if not x.borrowed}
        self._num_lendable = sum(self._lendable.values())
        self._host_free = {x.instance: max(0, x.host_rblocks - snapshot.used_host_rblocks(x.instance)) for x in members}

    def has_room(self, record: InstanceRecord, num_tokens: int, *, may_claim: bool) -> bool:
        """Whether `num_tokens` fit at this instance now, partly with others where there is no room there.

        `may_claim`: what it has lent counts as its own. It gets that back for its requests, but its debtors must then
        go elsewhere, or start over.
        """
        needed = num_rblocks_for(num_tokens, int(record.info["rblock_size"]))
        own = record.free + self._host_free.get(record.instance, 0)
        if needed <= own + (record.lent if may_claim else 0) - self._promised[record.instance]:
            return True
        others = self._num_lendable - self._lendable.get(record.instance, 0)
        return needed <= own + others - self._promised.total()

    def promise(self, record: InstanceRecord, num_tokens: int) -> None:
        self._promised[record.instance] += num_rblocks_for(num_tokens, int(record.info["rblock_size"]))


def longest_context_tokens(snapshot: PoolSnapshot, record: InstanceRecord) -> int:
    """The longest context that a request of this instance can have, when nobody else uses any memory."""
    num_rblocks = record.total + record.host_rblocks + snapshot.lendable_to(record.instance)
    longest = num_rblocks * int(record.info["rblock_size"])
    limit = record.info.get(MAX_CONTEXT_TOKENS, "")
    return min(longest, int(limit)) if limit.isdecimal() else longest
