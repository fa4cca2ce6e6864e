"""How much the pool can give to a newcomer now."""

from collections import Counter

from megatron_distkv.pool.member import Member
from megatron_distkv.pool.picture import Picture
from megatron_distkv.rblock import num_rblocks_for


class PoolCapacity:
    """A picture less `promised`: what has been given away, by instance, since it was taken."""

    def __init__(self, picture: Picture, promised: Counter[str]) -> None:
        self._promised = promised
        # Who borrows itself does not lend: no chains
        self._lendable = {x.instance: max(0, x.free_to_lend) for x in picture.up if not x.borrowed}
        self._num_lendable = sum(self._lendable.values())
        self._host_free = {
            x.instance: max(0, x.host_rblocks - picture.used_host_rblocks(x.instance)) for x in picture.up
        }

    def has_room(self, member: Member, num_tokens: int, *, may_claim: bool) -> bool:
        """Whether `num_tokens` fit at this instance now, partly with others where there is no room there.

        `may_claim`: what it has lent counts as its own. It gets that back for its requests, but its debtors must then
        go elsewhere, or start over.
        """
        needed = num_rblocks_for(num_tokens, member.rblock_size)
        own = member.free + self._host_free.get(member.instance, 0)
        if needed <= own + (member.lent if may_claim else 0) - self._promised[member.instance]:
            return True
        others = self._num_lendable - self._lendable.get(member.instance, 0)
        return needed <= own + others - self._promised.total()

    def promise(self, member: Member, num_tokens: int) -> None:
        self._promised[member.instance] += num_rblocks_for(num_tokens, member.rblock_size)
