"""What a request's memory was and cost in all instances that had it."""

from collections import Counter
from typing import NamedTuple

from megatron_distkv.messages import RequestKV


class Receipt(NamedTuple):
    """`instances`, in order, the one that ended it last; `num_untold` of them could not tell: killed, or hung."""

    kv: RequestKV = RequestKV()
    instances: tuple[str, ...] = ()
    num_untold: int = 0

    def add(self, instance: str, kv: RequestKV | None) -> "Receipt":
        """Another instance has had it, and told its part, or nothing."""
        whole = self.kv if kv is None else _sum(self.kv, kv)
        return Receipt(whole, (*self.instances, instance), self.num_untold + (kv is None))


def _sum(one: RequestKV, other: RequestKV) -> RequestKV:
    """A request is at one instance at a time: its peaks are the greater ones, all else adds up."""
    lenders = one.max_borrowed_rblocks.keys() | other.max_borrowed_rblocks.keys()
    return RequestKV(
        kv_dtype=other.kv_dtype or one.kv_dtype,
        max_local_rblocks=max(one.max_local_rblocks, other.max_local_rblocks),
        max_host_rblocks=max(one.max_host_rblocks, other.max_host_rblocks),
        max_borrowed_rblocks={
            x: max(one.max_borrowed_rblocks.get(x, 0), other.max_borrowed_rblocks.get(x, 0)) for x in lenders
        },
        num_preemptions=one.num_preemptions + other.num_preemptions,
        num_recomputed_tokens=one.num_recomputed_tokens + other.num_recomputed_tokens,
        num_tokens_at_losses=one.num_tokens_at_losses + other.num_tokens_at_losses,
        local_rblock_s=one.local_rblock_s + other.local_rblock_s,
        host_rblock_s=one.host_rblock_s + other.host_rblock_s,
        borrowed_rblock_s=dict(Counter(one.borrowed_rblock_s) + Counter(other.borrowed_rblock_s)),
        remote_attention_s=one.remote_attention_s + other.remote_attention_s,
    )
