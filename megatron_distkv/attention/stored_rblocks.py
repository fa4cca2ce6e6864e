"""Which rBlocks of a loan have been stored under it, and so hold nothing of whoever used that memory before."""

from collections.abc import Collection, Sequence


class StoredRBlocks:
    """rBlocks that lie here with all heads of this rank are one set: what is asked is asked of it first.

    A debtor of another tensor parallelism stores a part of the heads at a time, so of the others each head counts.
    """

    def __init__(self) -> None:
        self.whole: set[int] = set()
        self._heads: dict[int, int] = {}  # of those that are not whole: bit h is head h

    def add(self, block_ids: Sequence[int], heads: slice, num_heads: int) -> None:
        """`heads` of the `num_heads` here have come."""
        new, every = _bits(heads), _bits(slice(0, num_heads))
        if new == every:
            self.whole.update(block_ids)
        for block_id in block_ids if new != every else ():
            self._heads[block_id] = self._heads.get(block_id, 0) | new
            if self._heads[block_id] == every:
                del self._heads[block_id]
                self.whole.add(block_id)

    def holds(self, block_ids: Collection[int], heads: slice) -> bool:
        if self.whole.issuperset(block_ids):
            return True
        wanted = _bits(heads)
        return all(x in self.whole or self._heads.get(x, 0) & wanted == wanted for x in block_ids)


def _bits(heads: slice) -> int:
    return (1 << heads.stop) - (1 << heads.start)
