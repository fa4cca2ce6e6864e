"""A request in mid-flight goes from an instance that leaves to its successor: PREPARE, STORE, COMMIT, INHERIT."""

import msgspec

from megatron_distkv.messages.receipt import RequestKV
from megatron_distkv.messages.wire import BlockId, Count, Serial


class PrepareHeader(msgspec.Struct, frozen=True):
    """Room for `num_rblocks` in all. Asked again, more are added. Answer: `LendReply`, all of them in order."""

    handover_id: str
    num_rblocks: Count


class InheritedSpan(msgspec.Struct, frozen=True):
    """rBlocks `first ..` of the request at `creditor`, lent to the one that leaves as `loan_id`."""

    first: Count
    block_ids: list[BlockId]
    creditor: str
    epoch: Serial  # of the creditor
    address: str
    loan_id: str


class CommitHeader(msgspec.Struct, frozen=True):
    """A request in mid-flight, less its tokens: those come from the gateway, which knows them. Answer: `Acknowledge`.

    `here`: rBlock of the request -> physical id at the successor. `lost`: positions `[start, stop)` without their KV.
    """

    handover_id: str
    num_prompt_tokens: Count
    num_output_tokens: Count
    num_computed_tokens: Count
    lost: list[tuple[Count, Count]]
    sampling_seed: int
    age_s: float
    kv: RequestKV
    here: dict[Count, BlockId]
    elsewhere: list[InheritedSpan]


class InheritHeader(msgspec.Struct, frozen=True):
    """Who knows a loan's id may take it over. Answer: `LendReply`, all its rBlocks in order."""

    loan_id: str
    new_loan_id: str
    debtor_epoch: Serial
