"""Many running requests, many successors that say no: at most one question a step, and none that is known to fail."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from megatron_distkv.engine.llm import LLM
from megatron_distkv.ledger import InstanceReport
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.messages import Acknowledge, LendReply, MessageKind, PrepareHeader, Refusal, decode
from megatron_distkv.pool import MemberInfo, write_info
from megatron_distkv.rblock import InstanceId
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from megatron_distkv.transport import Answer, ChannelRequest, Handler, Hello, Listener
from tests.conftest import MakeConfig
from tests.soon import wait_until

NUM_REQUESTS, NUM_SUCCESSORS, NUM_RBLOCKS = 64, 20, 4096
LONG = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)


class FullSuccessors:
    """Members without room, whatever the ledger says; `asked` counts the PREPAREs of each."""

    def __init__(self, llm: LLM, url: str, run_dir: Path, stack: ExitStack) -> None:
        self.asked: dict[str, int] = {}
        self._epochs: dict[InstanceId, int] = {}
        self._ledger = open_ledger(url, "default")
        stack.callback(self._ledger.close)
        info = write_info(MemberInfo(shape=llm.instance.parts.rank.shape))
        for place in range(NUM_SUCCESSORS):
            name, address = InstanceId(f"full-{place}"), f"unix:{run_dir}/full-{place}.0.sock"
            stack.callback(Listener(address, "default", self._answer_as(name)).close)
            self.asked[name] = 0
            self._epochs[name] = self._ledger.register(name, address, NUM_RBLOCKS, 0, 600.0, info=info).epoch

    def say_so(self) -> None:
        """In the ledger."""
        for name, epoch in self._epochs.items():
            self._ledger.heartbeat(name, epoch, InstanceReport(NUM_RBLOCKS), 600.0)

    @property
    def num_asked(self) -> int:
        return sum(self.asked.values())

    def _answer_as(self, name: str) -> Handler:
        def answer(_: Hello, question: ChannelRequest) -> Answer:
            if question.kind == MessageKind.PREPARE:
                assert decode(question.header, PrepareHeader).num_rblocks > 0
                self.asked[name] += 1
                return Answer(msgspec.msgpack.encode(LendReply(refusal=Refusal.FULL)))
            return Answer(msgspec.msgpack.encode(Acknowledge()))

        return answer


@pytest.fixture
def leaving(make_config: MakeConfig, server: EmbeddedServer) -> Iterator[LLM]:
    """Runs 64 requests."""
    with LLM(make_config("d", num_rblocks=NUM_RBLOCKS, url=server.url)) as llm:
        for place in range(NUM_REQUESTS):
            llm.instance.add(Request(f"r{place}", [3 + place] * 8, LONG))
        wait_until(lambda: llm.instance.step() and len(llm.instance.scheduler.running) == NUM_REQUESTS)
        yield llm


@pytest.fixture
def successors(leaving: LLM, server: EmbeddedServer, tmp_path: Path) -> Iterator[FullSuccessors]:
    with ExitStack() as stack:
        yield FullSuccessors(leaving, server.url, tmp_path, stack)


def test_one_question_a_step_where_the_picture_is_old(leaving: LLM, successors: FullSuccessors) -> None:
    # Given successors that have filled up since the ledger was told of them
    leaving.instance.drain(within_s=600)
    num_steps = 0

    def step() -> bool:
        nonlocal num_steps
        assert len(leaving.instance.step()) == NUM_REQUESTS
        num_steps += 1
        assert successors.num_asked <= num_steps
        return all(successors.asked.values())

    # Then each is asked in some step, and every request makes a token in each
    wait_until(step, lambda: successors.asked)


def test_nobody_is_asked_who_is_known_to_be_full(leaving: LLM, successors: FullSuccessors) -> None:
    successors.say_so()
    leaving.instance.drain(within_s=600)
    wait_until(lambda: leaving.instance.step() and leaving.instance.parts.view.picture is not None)
    for _ in range(30):
        leaving.instance.step()
    assert successors.num_asked == 0
