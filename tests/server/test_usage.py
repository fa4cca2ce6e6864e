"""What `usage` says of an answer's memory."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

from megatron_distkv.clock import SystemClock
from megatron_distkv.messages import RequestKV
from megatron_distkv.server.answer import Answer
from megatron_distkv.server.generation import Piece
from megatron_distkv.server.receipt import Receipt
from megatron_distkv.server.tokenizer import Tokenizer

RECEIPT = RequestKV(
    kv_dtype="int8",
    max_local_rblocks=4,
    max_borrowed_rblocks={"c": 1, "b": 2},
    local_rblock_s=8.25,
    borrowed_rblock_s={"c": 0.5, "b": 1.5},
    remote_attention_s=0.125,
)


class BareShape:
    object_name = chunk_name = id_prefix = "bare"

    def choice(self, *_: object) -> dict[str, Any]:
        return {}


async def one_piece(choice: int, receipt: Receipt | None) -> AsyncGenerator[Piece, None]:
    yield Piece(choice, "x", [7], finish_reason="length", receipt=receipt)


def test_each_choice_has_a_receipt() -> None:
    # Given two choices, one with loans, one whose instance sent no receipt
    async def usage() -> dict[str, Any]:
        streams = [one_piece(0, Receipt().add("a", RECEIPT)), one_piece(1, None)]
        answer = Answer(cast(Any, BareShape()), cast(Tokenizer, None), "m", 5, streams, SystemClock())
        body: dict[str, Any] = (await answer.whole())["usage"]
        return body

    borrower, other = asyncio.run(usage())["kv"]
    # Then its lenders are named, and their rBlock-seconds summed
    assert (borrower["instance"], borrower["num_untold_parts"]) == ("a", 0)
    assert (borrower["kv_dtype"], other["kv_dtype"]) == ("int8", "")
    assert borrower["lenders"] == ["b", "c"]
    assert borrower["borrowed_rblock_s"] == 2.0
    assert borrower["local_rblock_s"] == 8.25
    assert borrower["remote_attention_s"] == 0.125
    assert (other["instance"], other["num_untold_parts"]) == ("", 0)
    assert (other["lenders"], other["borrowed_rblock_s"], other["remote_attention_s"]) == ([], 0.0, 0.0)


def test_a_receipt_sums_the_parts_of_all_instances() -> None:
    # Given a request that three instances had, of which the second was killed
    other = RequestKV(
        max_local_rblocks=3,
        max_borrowed_rblocks={"b": 5, "d": 1},
        num_recomputed_tokens=7,
        local_rblock_s=1.0,
        borrowed_rblock_s={"b": 2.0},
    )
    kv, instances, num_untold = Receipt().add("x", RECEIPT).add("y", None).add("z", other)
    # Then peaks are the greater ones, and all else adds up
    assert (instances, num_untold) == (("x", "y", "z"), 1)
    assert kv.kv_dtype == "int8"
    assert (kv.max_local_rblocks, kv.max_borrowed_rblocks) == (4, {"b": 5, "c": 1, "d": 1})
    assert (kv.local_rblock_s, kv.borrowed_rblock_s) == (9.25, {"b": 3.5, "c": 0.5})
    assert (kv.remote_attention_s, kv.num_recomputed_tokens) == (0.125, 7)
