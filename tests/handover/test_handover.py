"""An instance that leaves hands its running requests over, with their KV: the same tokens, nothing computed again."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from megatron_distkv.engine.instance import Instance
from megatron_distkv.engine.llm import LLM
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.messages import HandedOver, InstanceStatus, TokenLogprobs
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig
from tests.ledger.snapshot import snapshot
from tests.soon import SOON_S, wait_until

NAMES = ("d", "s", "c")
# Between two steps of a test: a model as small as these would be done before anybody has answered anything.
PAUSE_S = 0.02
SAMPLED = SamplingParams(max_tokens=30, temperature=0.8, top_p=0.9, seed=11, logprobs=2, ignore_eos=True)


@pytest.fixture
def pool(make_config: MakeConfig, server: EmbeddedServer) -> Iterator[dict[str, Instance]]:
    """Three instances of 16 rBlocks (128 tokens) each; d has host memory too."""
    with ExitStack() as stack:
        rooms = {"url": server.url, "scheduler": {"max_batched_tokens": 48}}
        cache = {"d": {"num_rblocks": 16, "rblock_size": 8, "num_host_rblocks": 3}}
        yield {
            name: stack.enter_context(
                LLM(
                    make_config(
                        name, **{"num_rblocks": 16, **rooms, **({"kv_cache": cache[name]} if name in cache else {})}
                    )
                )
            ).instance
            for name in NAMES
        }


def random_prompt(length: int) -> list[int]:
    return torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(length)).tolist()


class Client:
    """What a gateway does: follows a request from instance to instance, and keeps what comes out."""

    def __init__(self, pool: dict[str, Instance], prompt: list[int], sampling: SamplingParams) -> None:
        self.pool = pool
        self.prompt = prompt
        self.sampling = sampling
        self.at = "d"
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.notice: HandedOver | None = None
        self.request = Request("r", prompt, sampling)
        pool["d"].add(self.request)

    def step(self) -> None:
        instance = self.pool[self.at]
        for output in instance.step():
            self.token_ids += output.token_ids
            self.logprobs += output.logprobs or []
        for notice in instance.take_final_notices():
            assert isinstance(notice, HandedOver)
            self.notice = notice

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert self.request.finish_reason is None, "the request ended too early for this test"
            self.step()
            time.sleep(PAUSE_S)

    def follow(self) -> bool:
        """Ask where the notice says; whether the request goes on there with its KV."""
        assert self.notice is not None
        self.at = self.notice.successor
        self.request = Request("r2", self.prompt, self.sampling, output_token_ids=list(self.token_ids))
        is_received = self.pool[self.at].receive(self.request, self.notice.handover_id)
        if not is_received:
            self.pool[self.at].add(self.request)
        return is_received

    def finish(self) -> None:
        end_s = time.monotonic() + SOON_S
        while self.request.finish_reason is None:
            assert time.monotonic() < end_s, self.request
            self.step()


def assert_nothing_is_owed(pool: dict[str, Instance], server: EmbeddedServer) -> None:
    def is_so() -> bool:
        for instance in pool.values():
            instance.step()
            instance.check_integrity()
        accounts = [(x.free_rblocks, x.lent_rblocks, x.borrowed_rblocks, x.used_host_rblocks) for x in statuses()]
        return set(accounts) == {(16, 0, 0, 0)} and snapshot(server).loans == ()

    def statuses() -> list[InstanceStatus]:
        return [instance.status(0) for instance in pool.values()]

    wait_until(is_so, lambda: (statuses(), snapshot(server).loans))


@pytest.fixture
def expected(make_config: MakeConfig) -> Callable[[Client], None]:
    def check(client: Client) -> None:
        with LLM(make_config("enough", num_rblocks=256)) as enough:
            wanted = enough.generate([client.prompt], client.sampling)[0]
        assert client.token_ids == wanted.token_ids
        for got, one in zip(client.logprobs, wanted.logprobs, strict=True):
            assert got.chosen == pytest.approx(one.chosen, abs=1e-4)

    return check


Check = Callable[[Client], None]


@pytest.mark.parametrize(("length", "num_tokens"), [(60, 0), (61, 5), (130, 5), (200, 3), (200, 0)])
def test_a_request_goes_on_elsewhere_from_the_same_token(
    length: int, num_tokens: int, pool: dict[str, Instance], server: EmbeddedServer, expected: Check
) -> None:
    # Given a request in d, in its prefill or decoding, some of it in host memory and with creditors if it is long
    client = Client(pool, random_prompt(length), SAMPLED)
    client.until(
        lambda: client.request.num_computed_tokens > 48 if num_tokens == 0 else len(client.token_ids) == num_tokens
    )
    # When d is told to leave
    pool["d"].drain(within_s=60)
    client.until(lambda: client.notice is not None)
    assert pool["d"].scheduler.is_idle
    # Then another goes on, d is empty soon, and nothing was computed again
    assert client.follow()
    computed = client.request.num_computed_tokens
    client.finish()
    wait_until(lambda: pool["d"].step() == [] and pool["d"].is_drained)
    assert computed >= num_tokens
    assert (client.request.num_recomputed_tokens, client.request.num_preemptions) == (0, 0)
    assert client.request.max_local_rblocks > 0
    expected(client)
    assert_nothing_is_owed(pool, server)
