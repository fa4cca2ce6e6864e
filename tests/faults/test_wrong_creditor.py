"""A creditor that does not tell the truth: silent corruption, wrong answers, and what is no number."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_distkv.launch.commands import command_line

from megatron_distkv.engine.batch import StepPlan
from megatron_distkv.engine.instance import DISTRUST_S
from megatron_distkv.engine.llm import LLM
from megatron_distkv.engine.model_runner import StepResult
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.metrics import INSTANCE_REGISTRY
from megatron_distkv.rblock import RemoteSpan, loan_key
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from megatron_distkv.transport import Answer, ChannelRequest, Hello
from tests.conftest import MakeConfig

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
PROMPT = [3 + i * i % 120 for i in range(150)]
Forge = Callable[[torch.Tensor, torch.Tensor], object]


def num_alarms(what: str) -> float:
    return INSTANCE_REGISTRY.get_sample_value("distkv_wrong_creditors_total", {"what": what}) or 0.0


class Pool:
    """Instance a, too small for its request, in the middle of its answer; b and c lend."""

    def __init__(self, make_config: MakeConfig, url: str, stack: ExitStack) -> None:
        self._make_config = make_config
        self._url = url
        self._stack = stack

    def begin(self, verify_one_in: int, **rooms: Any) -> RemoteSpan:
        """Returns some rBlocks that a has borrowed."""
        self.start(verify_one_in, **rooms)
        self.add()
        while len(self.request.output_token_ids) < 4:
            self.a.instance.step()
        return self.borrowed()[0]

    def start(self, verify_one_in: int, **rooms: Any) -> None:
        """Instance a alone, without its request."""
        lending = {"verify_one_in": verify_one_in}
        config = self._make_config("a", num_rblocks=16, url=self._url, lending=lending, **rooms)
        self.a = self._stack.enter_context(LLM(config))

    def add(self) -> None:
        self.request = Request("long", PROMPT, GREEDY)
        self.a.instance.add(self.request)

    def borrowed(self) -> list[RemoteSpan]:
        if self.request.num_computed_tokens == 0:
            return []
        return list(self.a.instance.rmanager.table(self.request).remote_spans())

    def lender(self, name: str) -> LLM:
        return self.lenders[name]

    def memory_of(self, name: str) -> torch.Tensor:
        return self.lenders[name].instance.parts.rank.memory.pool.tensor_BLK2ND

    def start_lenders(self) -> None:
        self.lenders = {
            name: self._stack.enter_context(LLM(self._make_config(name, url=self._url))) for name in ("b", "c")
        }

    def finish(self) -> list[int]:
        while not self.a.instance.scheduler.is_idle:
            self.a.instance.step()
        self.a.instance.check_integrity()
        return self.request.output_token_ids

    def distrusts(self, name: str) -> bool:
        """For much longer than somebody that was only lost."""
        peers = self.a.instance.parts.rank.peers
        return peers.lost.left_s(name) > DISTRUST_S / 2


@pytest.fixture
def pool(make_config: MakeConfig, server: EmbeddedServer) -> Iterator[Pool]:
    with ExitStack() as stack:
        made = Pool(make_config, server.url, stack)
        made.start_lenders()
        yield made


@pytest.fixture
def expected(make_config: MakeConfig) -> list[int]:
    with LLM(make_config("enough", num_rblocks=256)) as enough:
        return enough.generate([PROMPT], GREEDY)[0].token_ids


def test_honest_creditors_pass_every_check(pool: Pool, expected: list[int]) -> None:
    span = pool.begin(verify_one_in=1)
    before = [num_alarms(what) for what in ("rblocks", "partial")]
    assert pool.finish() == expected
    assert [num_alarms(what) for what in ("rblocks", "partial")] == before
    assert not pool.a.instance.parts.rank.peers.lost.holds(span.creditor)
    assert pool.request.num_recomputed_tokens == 0


def test_rounding_on_the_wire_is_no_alarm(make_config: MakeConfig, server: EmbeddedServer) -> None:
    before = num_alarms("partial")
    lending = {"verify_one_in": 1}
    with (
        LLM(make_config("a", num_rblocks=16, url=server.url, dtype="bf16", lending=lending)) as a,
        LLM(make_config("b", url=server.url, dtype="bf16")),
    ):
        request = Request("long", PROMPT, GREEDY)
        a.instance.add(request)
        while not a.instance.scheduler.is_idle:
            a.instance.step()
    assert request.max_borrowed_rblocks["b"] > 0
    assert request.num_recomputed_tokens == 0
    assert num_alarms("partial") == before


@pytest.mark.parametrize("command", ["up", "serve"])
def test_the_command_line_asks_for_checks(command: str, tmp_path: Path, make_config: MakeConfig) -> None:
    # Given a value that nothing is started with
    told = command_line(command, "--model", str(tmp_path), "--verify", "-50")
    done = subprocess.run(told, capture_output=True, text=True, timeout=120, check=False)
    # Then it has reached its key, which without the option asks for no checks
    assert done.returncode == 2
    assert "lending.verify_one_in: Input should be greater than or equal to 0 (got -50)" in done.stderr
    assert make_config().lending.verify_one_in == 0


@pytest.mark.parametrize("is_last_layer", [False, True])
def test_one_changed_value_in_a_creditors_pool_is_an_alarm(
    pool: Pool, expected: list[int], is_last_layer: bool
) -> None:
    # Given one value of one borrowed rBlock, in a layer and a place that no answer need show, changed by a little
    span = pool.begin(verify_one_in=1)
    before, held = num_alarms("rblocks"), len(span.block_ids)
    pool.memory_of(span.creditor)[span.block_ids[-1], -1 if is_last_layer else 0, 0, 1, 3, 5] += 1e-3
    # When the request goes on
    tokens = pool.finish()
    # Then there is an alarm, what lay there is computed again, and nothing of it reaches the client
    assert num_alarms("rblocks") == before + 1
    assert tokens == expected
    assert pool.request.num_recomputed_tokens >= 8 * held
    assert pool.request.num_preemptions == 0
    assert pool.distrusts(span.creditor)


def test_without_checks_a_changed_value_goes_unnoticed(pool: Pool, expected: list[int]) -> None:
    """The fault is real: with values as wrong as here the answer is another."""
    span = pool.begin(verify_one_in=0)
    pool.memory_of(span.creditor)[list(span.block_ids), :, :, 1] *= -3
    assert pool.finish() != expected


def test_rblocks_that_come_home_changed_are_not_taken(pool: Pool, expected: list[int]) -> None:
    # Given a value changed at a creditor that then wants its memory back
    span = pool.begin(verify_one_in=10**9)
    before = num_alarms("rblocks")
    pool.memory_of(span.creditor)[span.block_ids[0], 1, 0, 0, 0, 0] += 1e-3
    pool.a.instance.rmanager.recall(loan_key(span.loan_id))
    # When they come home, then they are compared, and computed again
    assert pool.finish() == expected
    assert num_alarms("rblocks") == before + 1
    assert pool.distrusts(span.creditor)


def forge_answers(pool: Pool, name: str, forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on its true answers go through `forge`; its memory stays as it is."""
    creditor = pool.lender(name).instance.parts.rank.creditor
    honest = creditor.query

    def forged(hello: Hello, request: ChannelRequest) -> Answer:
        answer = honest(hello, request)
        if answer.payload:
            forge(*answer.payload)
        return answer

    monkeypatch.setattr(creditor, "query", forged)


@pytest.mark.parametrize(
    "forge",
    [lambda out, _: out.mul_(1.02), lambda _, lse: lse.add_(0.01), lambda out, _: out[0, 0].copy_(out[0, 1].clone())],
    ids=["output", "lse", "one head"],
)
def test_a_wrong_answer_from_right_memory_is_an_alarm(
    pool: Pool, expected: list[int], forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    span = pool.begin(verify_one_in=1)
    before = num_alarms("partial")
    forge_answers(pool, span.creditor, forge, monkeypatch)
    assert pool.finish() == expected
    assert num_alarms("partial") == before + 1
    assert pool.distrusts(span.creditor)


def add_one_bit(x: torch.Tensor) -> None:
    place = x.view(-1)[:1]
    place.copy_(place.nextafter(torch.tensor(float("inf"))))


@pytest.mark.parametrize("forge", [lambda out, _: add_one_bit(out), lambda _, lse: add_one_bit(lse)])
def test_one_wrong_bit_is_an_alarm_where_bits_are_promised(
    pool: Pool, expected: list[int], forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a deterministic instance, and true answers, which pass every check
    span = pool.begin(verify_one_in=1, deterministic=True)
    before = num_alarms("partial")
    for _ in range(3):
        pool.a.instance.step()
    assert num_alarms("partial") == before
    # When the lowest bit of one number of an answer is another
    forge_answers(pool, span.creditor, forge, monkeypatch)
    # Then there is an alarm (without `deterministic` this is rounding)
    assert pool.finish() == expected
    assert num_alarms("partial") == before + 1
    assert pool.distrusts(span.creditor)


@pytest.mark.parametrize(
    "forge",
    [
        lambda out, _: out[-1, -1, -1].fill_(float("nan")),
        lambda out, _: out[0, 0, 0].fill_(float("inf")),
        lambda _, lse: lse[0, 0].fill_(float("-inf")),
    ],
    ids=["nan", "inf", "no keys"],
)
def test_no_numbers_are_an_alarm_even_without_checks(
    pool: Pool, expected: list[int], forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    span = pool.begin(verify_one_in=0)
    before = num_alarms("partial")
    forge_answers(pool, span.creditor, forge, monkeypatch)
    assert pool.finish() == expected
    assert num_alarms("partial") == before + 1
    assert pool.distrusts(span.creditor)


def test_a_creditor_is_not_blamed_for_what_its_debtor_sent(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a debtor whose own KV holds a NaN when it moves out
    pool.start(verify_one_in=1)
    rank = pool.a.instance.parts.rank
    carry_out = rank.runner.run
    before = [num_alarms(what) for what in ("rblocks", "partial")]

    moved: list[int] = []

    def poison_and_carry_out(plan: StepPlan) -> StepResult:
        for move in plan.moves:
            moved.extend(move.remote_ids)
            rank.memory.pool.tensor_BLK2ND[move.local_ids, 1, 0, 1, 2, 2] = float("nan")
        return carry_out(plan)

    monkeypatch.setattr(rank.runner, "run", poison_and_carry_out)
    # When it asks for attention over it
    pool.add()
    while not pool.a.instance.scheduler.is_idle:
        pool.a.instance.step()
    # Then its own request ends with an error, and nobody else is to blame
    assert moved
    assert [failed.code for failed in pool.a.instance.take_failed()] == ["bad_logits"]
    assert [num_alarms(what) for what in ("rblocks", "partial")] == before
