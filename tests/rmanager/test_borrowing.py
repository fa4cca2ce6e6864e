"""Instances that lend each other memory, over a real ledger and real channels: same tokens, everything comes back."""

import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from megatron_distkv.engine.llm import LLM
from megatron_distkv.errors import UserError
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.messages import TokenOutput
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig
from tests.ledger.snapshot import snapshot
from tests.soon import wait_until

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
Pool = dict[str, LLM]
LONGEST = (16 + 14 + 14) * 8


def random_prompt(length: int, seed: int = 3) -> list[int]:
    return torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture
def pool(make_config: MakeConfig, server: EmbeddedServer) -> Iterator[Pool]:
    """Three instances of 16 rBlocks (128 tokens) each."""
    with ExitStack() as stack:
        pool = {
            name: stack.enter_context(
                LLM(make_config(name, num_rblocks=16, url=server.url, scheduler={"max_batched_tokens": 48}))
            )
            for name in ("a", "b", "c")
        }
        # Each has heard of the others: 16 rBlocks of its own and 14 (the lending cap of 90 %) of each of the two
        for llm in pool.values():
            wait_until(lambda llm=llm: llm.instance.rmanager.longest_context_tokens() == LONGEST)  # type: ignore[misc]
        yield pool


@pytest.fixture
def reference(make_config: MakeConfig) -> Iterator[LLM]:
    with LLM(make_config("enough", num_rblocks=256)) as llm:
        yield llm


def assert_nothing_is_owed(pool: Pool, server: EmbeddedServer) -> None:
    wait_until(lambda: snapshot(server).loans == (), lambda: snapshot(server).loans)
    for llm in pool.values():
        wait_until(lambda llm=llm: llm.instance.status(0).lent_rblocks == 0)  # type: ignore[misc]
        status = llm.instance.status(0)
        assert (status.free_rblocks, status.lent_rblocks, status.borrowed_rblocks) == (16, 0, 0)
        llm.instance.check_integrity()


def run(llm: LLM, request: Request) -> list[TokenOutput]:
    outputs: list[TokenOutput] = []
    llm.instance.add(request)
    while not llm.instance.scheduler.is_idle:
        outputs += llm.instance.step()
    return outputs


@pytest.mark.parametrize("length", [100, 128, 200, 300])
def test_a_prompt_longer_than_the_instance_gives_the_same_tokens(
    length: int, pool: Pool, reference: LLM, server: EmbeddedServer
) -> None:
    # Given one instance with enough memory, and a prompt of up to nearly three pools
    prompt = random_prompt(length)
    (expected,) = reference.generate([prompt], GREEDY)

    # When instance a, which holds 128 tokens alone, is asked
    outputs = run(pool["a"], Request("long", prompt, GREEDY))

    # Then the tokens are the same, and what did not fit lay with others
    assert [token for output in outputs for token in output.token_ids] == expected.token_ids
    kv = outputs[-1].kv
    assert kv is not None
    assert kv.num_preemptions == 0
    assert kv.max_local_rblocks <= 16
    assert bool(kv.max_borrowed_rblocks) == (length > 100)
    assert_nothing_is_owed(pool, server)


def test_short_requests_on_the_lender_run_beside_the_loan(pool: Pool, reference: LLM, server: EmbeddedServer) -> None:
    # Given a long request in a, in the middle of its decoding
    prompt, short = random_prompt(240), random_prompt(20, seed=9)
    many = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    expected_long, expected_short = (reference.generate([x], many)[0].token_ids for x in (prompt, short))
    a, b = pool["a"].instance, pool["b"].instance
    a.add(Request("long", prompt, many))
    got: list[int] = []
    while len(got) < 5:
        got += [token for output in a.step() for token in output.token_ids]
    assert snapshot(server).loans

    # When b computes a request of its own between a's steps
    b.add(Request("short", short, many))
    got_short: list[int] = []
    while not (a.scheduler.is_idle and b.scheduler.is_idle):
        got += [token for output in a.step() for token in output.token_ids]
        got_short += [token for output in b.step() for token in output.token_ids]

    # Then neither notices the other
    assert got == expected_long
    assert got_short == expected_short
    assert_nothing_is_owed(pool, server)


def test_a_lender_that_needs_its_memory_gets_it_back(pool: Pool, reference: LLM, server: EmbeddedServer) -> None:
    # Given a long request in a that has borrowed nearly everything of b and c
    many = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    prompt, other = random_prompt(310), random_prompt(90, seed=5)
    expected = [reference.generate([x], many)[0].token_ids for x in (prompt, other)]
    a, b = pool["a"].instance, pool["b"].instance
    a.add(Request("long", prompt, many))
    got: list[list[int]] = [[], []]
    while not got[0]:
        got[0] += [token for output in a.step() for token in output.token_ids]

    # When b gets a prompt that needs most of its own memory
    b.add(Request("other", other, many))
    end = time.monotonic() + 60
    while not (a.scheduler.is_idle and b.scheduler.is_idle):
        assert time.monotonic() < end, "the two instances wait for each other"
        for place, instance in enumerate((a, b)):
            got[place] += [token for output in instance.step() for token in output.token_ids]

    # Then both end with the right tokens
    assert got == expected
    assert_nothing_is_owed(pool, server)


def test_a_request_that_waits_for_lent_memory_asks_for_it_back(pool: Pool, server: EmbeddedServer) -> None:
    # Given a long request in a, which has borrowed nearly everything of b and c and is nowhere near its end
    a, b = pool["a"].instance, pool["b"].instance
    long = Request("long", random_prompt(310), GREEDY)
    a.add(long)
    while not long.output_token_ids:
        a.step()

    # When b gets a request that its own memory would hold, and a computes nothing more by itself
    short = Request("short", random_prompt(90, seed=5), GREEDY)
    b.add(short)
    end = time.monotonic() + 20
    while a.parts.membership.orders.empty():
        assert time.monotonic() < end, "b waits until a is done"
        assert b.step() == []

    # Then a hears of it, gives the loan back, for which it has no room, and both end
    while not long.num_lost_tokens:
        a.step()
    assert 0 < long.num_lost_tokens < len(long.prompt_token_ids)
    while not (a.scheduler.is_idle and b.scheduler.is_idle):
        a.step()
        b.step()
    assert len(short.output_token_ids) == len(long.output_token_ids) == GREEDY.max_tokens
    b.step()
    assert_nothing_is_owed(pool, server)


def test_what_a_creditor_wants_back_goes_elsewhere_and_is_not_computed_again(
    pool: Pool, reference: LLM, server: EmbeddedServer
) -> None:
    # Given a request in a with rBlocks at one creditor, and room at the other
    many = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    prompt = random_prompt(130)
    expected = reference.generate([prompt], many)[0].token_ids
    a = pool["a"].instance
    request = Request("r", prompt, many)
    a.add(request)
    while len(request.output_token_ids) < 4:
        a.step()
    (creditor, count), *_ = a.rmanager.table(request).remote_by_creditor().items()
    lender = pool[creditor].instance

    # When that creditor wants everything back, for good
    lender.drain(within_s=60)
    while not lender.is_drained:
        lender.step()
        a.step()
        time.sleep(0.01)
        assert not a.scheduler.is_idle, "the request ended first"

    # Then its rBlocks lie elsewhere, the request goes on, and nothing was computed again
    assert count > 0
    assert creditor not in a.rmanager.table(request).remote_by_creditor()
    while not a.scheduler.is_idle:
        a.step()
    assert request.output_token_ids == expected
    assert (request.num_recomputed_tokens, request.num_preemptions) == (0, 0)
    assert_nothing_is_owed(pool, server)


def test_an_aborted_request_gives_everything_back(pool: Pool, server: EmbeddedServer) -> None:
    a = pool["a"].instance
    a.add(Request("long", random_prompt(300), GREEDY))
    while not snapshot(server).loans:
        a.step()
    a.abort("long")
    assert a.scheduler.is_idle
    assert_nothing_is_owed(pool, server)


def test_a_prompt_beyond_the_whole_pool_is_refused_with_the_longest(pool: Pool) -> None:
    with pytest.raises(UserError, match=f"the longest that the pool's memory holds now is {LONGEST}"):
        pool["a"].generate([random_prompt(400)], GREEDY)


def test_with_lending_off_nothing_is_borrowed(make_config: MakeConfig, server: EmbeddedServer, pool: Pool) -> None:
    with LLM(make_config("d", num_rblocks=16, url=server.url, lending={"enabled": False})) as alone:
        with pytest.raises(UserError, match="the longest that the pool's memory holds now is 128"):
            alone.generate([random_prompt(200)], GREEDY)
        record = snapshot(server).find(alone.instance.config.instance_id)  # type: ignore[arg-type]
        assert record is not None
        assert record.lendable_at_most == 0


def test_the_ledger_comes_back_empty_and_is_rebuilt(pool: Pool, reference: LLM, server: EmbeddedServer) -> None:
    # Given a request with loans
    many = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    prompt = random_prompt(260)
    expected = reference.generate([prompt], many)[0].token_ids
    a = pool["a"].instance
    a.add(Request("long", prompt, many))
    got: list[int] = []
    while not got:
        got += [token for output in a.step() for token in output.token_ids]
    before = {(x.key, x.debtor, x.creditor, x.num_rblocks) for x in snapshot(server).loans}
    assert before

    # When the ledger server dies and comes back without its data
    server.kill()
    got += [token for output in a.step() for token in output.token_ids]
    server.start()

    # Then the rManagers tell it everything again, and the request never noticed
    end = time.monotonic() + 15
    while {(x.key, x.debtor, x.creditor, x.num_rblocks) for x in snapshot(server).loans} != before:
        assert time.monotonic() < end, snapshot(server)
        time.sleep(0.05)
    while not a.scheduler.is_idle:
        got += [token for output in a.step() for token in output.token_ids]
    assert got == expected
    assert_nothing_is_owed(pool, server)
