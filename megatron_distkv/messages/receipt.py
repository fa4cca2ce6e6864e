"""What a request's KV has cost, as its client is told it."""

import msgspec

from megatron_distkv.request import Request


class RequestKV(msgspec.Struct, frozen=True):
    """A request's receipt: where its rBlocks lay in one instance, and what that cost.

    rBlock-seconds are the sum over time of the rBlocks that held its KV. `remote_attention_s` is its part of the time
    that steps waited for creditors' answers after their own work was done: a step's wait is divided among the requests
    that asked, in proportion to tokens times borrowed rBlocks. (With tensor parallelism: as the leader waited.)
    """

    kv_dtype: str = ""  # of K and V in full rBlocks: fp32, bf16 or int8; empty: nobody told
    max_local_rblocks: int = 0
    max_host_rblocks: int = 0  # in the instance's own host memory
    max_borrowed_rblocks: dict[str, int] = {}  # by creditor
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    num_tokens_at_losses: int = 0  # what starting over at each loss would have computed again
    local_rblock_s: float = 0.0
    host_rblock_s: float = 0.0
    borrowed_rblock_s: dict[str, float] = {}  # by lender
    remote_attention_s: float = 0.0


def receipt_of(request: Request) -> RequestKV:
    return RequestKV(**{name: getattr(request, name) for name in RequestKV.__struct_fields__})


def continue_receipt(request: Request, kv: RequestKV) -> None:
    """Another instance has computed this request so far."""
    for name, value in msgspec.structs.asdict(kv).items():
        setattr(request, name, value)
