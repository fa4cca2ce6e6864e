"""A memory-only lender, over a real ledger and real channels: same tokens, and everything comes back."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from megatron_distkv.config.lender import LenderConfig
from megatron_distkv.engine.lender import Lender, num_rblocks_to_lend, shape_of_pool
from megatron_distkv.engine.llm import LLM
from megatron_distkv.errors import IntegrityError, SupersededError, UserError
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.pool import picture_of, render_debts
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
SMALL = RBlockShape(num_layers=2, num_query_heads=4, num_kv_heads=2, head_dim=16, rblock_size=8, dtype="bf16")


def random_prompt(length: int) -> list[int]:
    return torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(3)).tolist()


def lender_config(server: EmbeddedServer, run_dir: Path, name: str = "lender", num_rblocks: int = 40) -> LenderConfig:
    ledger = {"url": server.url, "heartbeat_interval_s": 0.1, "lease_s": 2.0}
    return LenderConfig.model_validate(
        {"lender_id": name, "run_dir": run_dir, "num_rblocks": num_rblocks, "ledger": ledger}
    )


@pytest.fixture
def a(make_config: MakeConfig, server: EmbeddedServer) -> Iterator[LLM]:
    """An instance of 16 rBlocks (128 tokens)."""
    with LLM(make_config("a", num_rblocks=16, url=server.url, scheduler={"max_batched_tokens": 48})) as llm:
        yield llm


@pytest.fixture
def start(server: EmbeddedServer, tmp_path: Path) -> Iterator["Start"]:
    with ExitStack() as stack:
        yield Start(server, tmp_path, stack)


class Start:
    def __init__(self, server: EmbeddedServer, run_dir: Path, stack: ExitStack) -> None:
        self.server, self.run_dir, self.stack = server, run_dir, stack

    def __call__(self, name: str = "lender", num_rblocks: int = 40, shape: RBlockShape | None = None) -> Lender:
        ledger = open_ledger(self.server.url, "default")
        shape = shape or shape_of_pool(ledger, threading.Event())
        assert shape is not None
        lender = Lender(lender_config(self.server, self.run_dir, name, num_rblocks), shape, ledger)
        self.stack.callback(lender.close)
        return lender


def tokens_of(make_config: MakeConfig, prompt: list[int], sampling: SamplingParams = GREEDY) -> list[int]:
    with LLM(make_config("enough", num_rblocks=256)) as enough:
        return enough.generate([prompt], sampling)[0].token_ids


def test_a_prompt_that_only_fits_thanks_to_the_lender(a: LLM, start: Start, make_config: MakeConfig) -> None:
    # Given an instance of 128 tokens that is told so, and a lender of 320 tokens more
    prompt = random_prompt(350)
    with pytest.raises(UserError, match="the longest that the pool's memory holds now is 128"):
        a.generate([prompt], GREEDY)
    lender = start()
    time.sleep(0.3)  # longer than the instance's view of the pool lasts

    # When the prompt comes
    request = Request("long", prompt, GREEDY)
    a.instance.add(request)
    ledger = a.instance.parts.ledger
    while not request.output_token_ids:
        a.instance.step()

    # Then most of it lies with the lender, and the ledger shows who lends what to whom
    assert a.instance.rmanager.table(request).remote_by_creditor()["lender"] > 16
    printed = render_debts(picture_of(ledger.snapshot()))
    assert "up, memory only" in printed
    assert "a owes lender" in printed
    while not a.instance.scheduler.is_idle:
        a.instance.step()

    # And its tokens are those of one instance with enough memory, and everything comes back
    assert request.output_token_ids == tokens_of(make_config, prompt)
    assert request.num_preemptions == request.num_recomputed_tokens == 0
    assert ledger.snapshot().loans == ()
    assert lender.allocator.num_free == 40
    lender.check_integrity()
    a.instance.check_integrity()


def test_a_lost_lender_costs_what_it_held(a: LLM, start: Start, make_config: MakeConfig) -> None:
    # Given a request with rBlocks at one of two lenders (the nearer, as measured), each with room for all of it
    prompt = random_prompt(200)
    lenders = {"smaller": start("smaller", num_rblocks=40), "larger": start("larger", num_rblocks=100)}
    time.sleep(0.3)
    request = Request("long", prompt, GREEDY)
    a.instance.add(request)
    while len(request.output_token_ids) < 4:
        a.instance.step()
    held = a.instance.rmanager.table(request).remote_by_creditor()
    lost = max(held, key=held.__getitem__)

    # When that lender is gone in the middle of it
    lenders[lost].close()
    while not a.instance.scheduler.is_idle:
        a.instance.step()

    # Then what it held is computed again, and no more
    assert request.num_recomputed_tokens == held[lost] * 8
    assert request.num_preemptions == 0
    assert request.output_token_ids == tokens_of(make_config, prompt)


def test_a_lender_that_ends_gives_back_without_recomputing(a: LLM, start: Start, make_config: MakeConfig) -> None:
    # Given a request with rBlocks at one of two lenders (the nearer, as measured)
    prompt = random_prompt(200)
    lenders = [start("smaller", num_rblocks=40), start("larger", num_rblocks=100)]
    time.sleep(0.3)
    request = Request("long", prompt, LONG)
    a.instance.add(request)
    while len(request.output_token_ids) < 4:
        a.instance.step()
    leaving = max(lenders, key=lambda lender: lender.allocator.num_lent)
    assert leaving.allocator.num_lent > 0

    # When that lender is told to end while the request goes on
    draining = threading.Thread(target=leaving.drain, args=(20.0,))
    draining.start()
    while draining.is_alive() and not a.instance.scheduler.is_idle:
        a.instance.step()

    # Then all it held is elsewhere before the request ends, and nothing was computed again
    assert not a.instance.scheduler.is_idle
    assert leaving.allocator.num_lent == 0
    draining.join()
    while not a.instance.scheduler.is_idle:
        a.instance.step()
    assert request.num_recomputed_tokens == 0
    assert request.output_token_ids == tokens_of(make_config, prompt, LONG)


def test_a_lender_of_another_shape_cannot_join(a: LLM, start: Start) -> None:
    with pytest.raises(UserError, match=r"lender cannot join .*dtype bf16, not fp32.* as those of a"):
        start(shape=SMALL)


def test_a_second_lender_of_the_same_name_replaces_the_first(a: LLM, start: Start) -> None:
    first = start()
    start()
    with pytest.raises(SupersededError):
        first.run(threading.Event())


def test_a_broken_account_ends_a_lender(a: LLM, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a lender whose accounts break when a message comes
    lender = start()

    def break_it(*_: object) -> None:
        raise IntegrityError("rBlock 7 is free and lent")

    monkeypatch.setattr(lender.lending, "lend", break_it)
    # When a prompt comes that needs it
    a.instance.add(Request("long", random_prompt(140), GREEDY))
    stop = threading.Event()
    with ThreadPoolExecutor() as threads:
        ended = threads.submit(lender.run, stop)
        end_s = time.monotonic() + 30
        while not ended.done() and time.monotonic() < end_s:
            a.instance.step()
        stop.set()
    # Then the lender ends; its debtor has only lost a creditor
    with pytest.raises(IntegrityError, match="free and lent"):
        ended.result()


def test_memory_is_as_many_whole_rblocks_as_fit(tmp_path: Path) -> None:
    # an rBlock: K and V, 2 layers, 2 heads of 16, 8 tokens, 2 bytes
    assert SMALL.rblock_bytes == 2 * 2 * 2 * 16 * 8 * 2
    config = LenderConfig.model_validate({"run_dir": tmp_path, "memory": "1MiB"})
    assert num_rblocks_to_lend(config, SMALL) == (1 << 20) // 2048
    config = LenderConfig.model_validate({"run_dir": tmp_path, "memory": "2 kB"})
    with pytest.raises(UserError, match="2000 bytes of memory are less than one rBlock of 2048 bytes"):
        num_rblocks_to_lend(config, SMALL)
