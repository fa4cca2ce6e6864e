"""What a request's receipt says of its memory: rBlock-seconds, lenders, and the time it waited for them."""

import time
from pathlib import Path

import pytest
import torch

from megatron_distkv.engine.kv_meter import KVMeter
from megatron_distkv.engine.llm import LLM
from megatron_distkv.kvcache.block_table import BlockTable
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.messages import RequestKV, TokenOutput
from megatron_distkv.rblock import HOST, InstanceId, LoanId
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig
from tests.virtual_time.clock import VirtualClock

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
Meter = tuple[KVMeter, VirtualClock]


@pytest.fixture
def meter() -> Meter:
    """With a clock that a test sets."""
    clock = VirtualClock()
    return KVMeter(clock), clock


def request(name: str = "r") -> Request:
    return Request(name, [1, 2, 3], GREEDY)


def table(num_rblocks: int, *lent: tuple[str, int]) -> BlockTable:
    """The oldest rBlocks at these lenders, the others here."""
    made, first = BlockTable(), 0
    made.add_local(range(num_rblocks), range(num_rblocks))
    for lender, count in lent:
        made.move_to_creditor(first, range(count), InstanceId(lender), LoanId(f"loan-{lender}"))
        first += count
    return made


def test_each_count_holds_until_the_next_one(meter: Meter) -> None:
    # Given a request that holds 4 rBlocks here for 2 s, then 3 here, 4 in own host memory, 2 at b and 1 at c for 5 s
    clocked, clock = meter
    one = request()
    clocked.note(one, table(4))
    clock.now_s += 2
    clocked.note(one, table(10, ("b", 2), ("c", 1), (HOST, 4)))
    clock.now_s += 5
    clocked.settle(one)
    # And then nothing, for a while (it is preempted), and 1 here again for 3 s
    clock.now_s += 1000
    clocked.note(one, table(1))
    clock.now_s += 3
    clocked.settle(one)
    clocked.settle(one)
    assert one.local_rblock_s == 4 * 2 + 3 * 5 + 1 * 3
    assert one.host_rblock_s == 4 * 5
    assert one.borrowed_rblock_s == {"b": 10, "c": 5}


def test_a_steps_wait_is_divided_by_the_work_at_creditors(meter: Meter) -> None:
    # Given a prompt of 30 tokens and a decode with rBlocks at creditors, and one request that borrows nothing
    clocked, _ = meter
    prompt, decode, local = request("prompt"), request("decode"), request("local")
    clocked.note(prompt, table(8, ("b", 2)))
    clocked.note(decode, table(20, ("b", 12), ("c", 3)))
    clocked.note(local, table(9, (HOST, 4)))
    clocked.charge_wait([(prompt, 30), (decode, 1), (local, 64)], 1.5)
    assert prompt.remote_attention_s == pytest.approx(1.5 * 60 / 75)
    assert decode.remote_attention_s == pytest.approx(1.5 * 15 / 75)
    assert local.remote_attention_s == 0.0
    # And when nobody borrows, nobody pays
    clocked.charge_wait([(local, 64)], 1.5)
    assert local.remote_attention_s == 0.0


def run(llm: LLM, prompt_tokens: int) -> tuple[RequestKV, float]:
    """The receipt of a random prompt, and how long it took."""
    generator = torch.Generator().manual_seed(3)
    asked = Request("r", torch.randint(3, 131, (prompt_tokens,), generator=generator).tolist(), GREEDY)
    began_s = time.monotonic()
    llm.instance.add(asked)
    outputs: list[TokenOutput] = []
    while not llm.instance.scheduler.is_idle:
        outputs += llm.instance.step()
    receipt = outputs[-1].kv
    assert receipt is not None
    return receipt, time.monotonic() - began_s


def test_without_a_loan_all_is_local(make_config: MakeConfig) -> None:
    with LLM(make_config(num_rblocks=64)) as alone:
        receipt, elapsed_s = run(alone, 150)
    assert 0 < receipt.local_rblock_s <= receipt.max_local_rblocks * elapsed_s
    assert receipt.borrowed_rblock_s == {}
    assert receipt.remote_attention_s == 0.0


def test_a_loan_shows_with_its_lender_and_its_price(
    make_config: MakeConfig, server: EmbeddedServer, tmp_path: Path
) -> None:
    # Given a prompt longer than a's memory
    with LLM(make_config("a", num_rblocks=16, url=server.url)) as a, LLM(make_config("b", url=server.url)):
        receipt, elapsed_s = run(a, 150)
    # Then the receipt says who lent, and no more than the most that was held for the whole time
    assert receipt.borrowed_rblock_s.keys() == {"b"} == receipt.max_borrowed_rblocks.keys()
    assert 0 < receipt.borrowed_rblock_s["b"] <= receipt.max_borrowed_rblocks["b"] * elapsed_s
    assert 0 < receipt.local_rblock_s <= 16 * elapsed_s
    assert 0 < receipt.remote_attention_s < elapsed_s
