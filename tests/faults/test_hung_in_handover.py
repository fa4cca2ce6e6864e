"""A member that hangs (SIGSTOP) while it is asked in a handover: nobody's engine waits for it."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_distkv.launch.commands import command_line, instance_command
from megatron_distkv.launch.processes import Child

from megatron_distkv.config.lender import LenderConfig
from megatron_distkv.engine.instance import Instance
from megatron_distkv.engine.llm import LLM
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.messages import HandedOver, TokenOutput
from megatron_distkv.rblock import InstanceId
from megatron_distkv.request import Request
from megatron_distkv.rmanager.fetch_back import FetchBack
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig
from tests.ledger.snapshot import snapshot
from tests.soon import wait_until

# An engine that waited for an answer would take the whole deadline for one step; many steps together take much less,
# also on a busy machine.
DEADLINE_S, NUM_STEPS = 30.0, 20
PAUSE_S = 0.01
NUM_LENT = 5
LONG = SamplingParams(max_tokens=1500, temperature=0.0, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
ENVIRONMENT = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def prompt(length: int) -> list[int]:
    return torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.fixture(autouse=True)
def what_is_lent_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would come back early, as there is room for all of it here."""
    monkeypatch.setattr(FetchBack, "find_early_ones", lambda *_: None)


@pytest.fixture
def rooms(server: EmbeddedServer) -> dict[str, Any]:
    return {
        "num_rblocks": 512,
        "ledger": {"url": server.url, "heartbeat_interval_s": 0.1, "lease_s": 120.0},
        "lending": {"deadline_s": DEADLINE_S, "min_deadline_s": DEADLINE_S},
    }


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str, list[str], str], Child]]:
    """A member in a process of its own, when it serves."""
    with ExitStack() as stack:

        def start(name: str, command: list[str], config: str) -> Child:
            (tmp_path / f"{name}.json").write_text(config)
            child = Child(
                name, [*command, "--config", str(tmp_path / f"{name}.json")], tmp_path / f"{name}.log", ENVIRONMENT
            )
            stack.callback(child.end, grace_s=0.0)
            end_s = time.monotonic() + 180
            while child.ready_line() is None:
                assert child.is_running, child.log.read_text()[-2000:]
                assert time.monotonic() < end_s, child.log.read_text()[-2000:]
                time.sleep(0.1)
            return child

        yield start


@contextlib.contextmanager
def hung(child: Child) -> Iterator[None]:
    os.killpg(child.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # a test may have killed it
            os.killpg(child.process.pid, signal.SIGCONT)


def paced(instance: Instance) -> list[TokenOutput]:
    """A step, and time for others: a model as small as this would be done before anybody has answered."""
    time.sleep(PAUSE_S)
    return instance.step()


def assert_goes_on(instance: Instance, num_requests: int) -> None:
    """Each of them gets a token in each step, and nobody waits for who hangs."""
    began_s = time.monotonic()
    for _ in range(NUM_STEPS):
        assert sum(len(output.token_ids) for output in paced(instance)) == num_requests
        instance.check_integrity()
    assert time.monotonic() - began_s < DEADLINE_S


def test_a_successor_that_hangs_while_it_is_asked(
    make_config: MakeConfig, rooms: dict[str, Any], start: Callable[..., Child]
) -> None:
    # Given an instance with two requests, and one to which they could go
    with LLM(make_config("d", **rooms)) as llm:
        config = make_config("s", **rooms)
        successor = start("s", instance_command(config, Path("s"), "python")[:-2], config.model_dump_json())
        d = llm.instance
        requests = [Request(name, prompt(40), LONG) for name in ("r1", "r2")]
        for request in requests:
            d.add(request)
        wait_until(lambda: d.step() and all(len(x.output_token_ids) > 3 for x in requests))

        # When that one hangs while the first leaves
        with hung(successor):
            d.drain(within_s=600)
            # Then both requests go on meanwhile
            assert_goes_on(d, num_requests=2)
            assert d.take_final_notices() == []

        # And they go over when it is back
        notices: list[HandedOver] = []

        def step() -> bool:
            paced(d)
            notices.extend(x for x in d.take_final_notices() if isinstance(x, HandedOver))
            return len(notices) == 2

        wait_until(step)
        assert {x.successor for x in notices} == {"s"}
        d.check_integrity()


class Handed:
    """A request that d has handed over to s, some of it with a lender c that a test may stop; s runs one of its own."""

    def __init__(self, d: LLM, s: LLM, lender: Child, own: Request) -> None:
        self.d, self.s, self.lender = d.instance, s.instance, lender
        self.prompt = prompt(100)
        request = Request("r", self.prompt, GREEDY)
        self.d.add(request)
        wait_until(lambda: self.d.step() and len(request.output_token_ids) > 3)
        self.d.rmanager.move_to("r", NUM_LENT, "c")
        held = self.d.rmanager.table(request).remote_by_creditor
        wait_until(lambda: paced(self.d) and held().get(InstanceId("c")) == NUM_LENT)
        self.s.add(own)
        wait_until(lambda: self.s.step() and own.output_token_ids)
        self.d.drain(within_s=600)
        self.notice = self._notice()
        self.request = Request("r2", self.prompt, GREEDY, output_token_ids=list(request.output_token_ids))

    def _notice(self) -> HandedOver:
        notices: list[Any] = []

        def step() -> bool:
            paced(self.d)
            notices.extend(self.d.take_final_notices())
            return bool(notices)

        wait_until(step)
        assert notices[0].successor == "s"
        return notices[0]


@pytest.fixture
def handed(
    make_config: MakeConfig, rooms: dict[str, Any], start: Callable[..., Child], tmp_path: Path
) -> Iterator[Handed]:
    with LLM(make_config("d", **rooms)) as d, LLM(make_config("s", **rooms)) as s:
        lender = LenderConfig.model_validate(
            {"lender_id": "c", "run_dir": tmp_path, "num_rblocks": 64, "ledger": rooms["ledger"]}
        )
        child = start("c", command_line("lend"), lender.model_dump_json())
        yield Handed(d, s, child, Request("own", prompt(30), LONG))


@pytest.fixture
def expected(make_config: MakeConfig, handed: Handed) -> list[int]:
    with LLM(make_config("enough", num_rblocks=256)) as enough:
        return enough.generate([handed.prompt], GREEDY)[0].token_ids


def test_a_creditor_that_hangs_while_its_loan_is_taken_over(handed: Handed, expected: list[int]) -> None:
    # When the creditor hangs for less than its deadline, after the request was handed over
    with hung(handed.lender):
        assert handed.s.receive(handed.request, handed.notice.handover_id)
        # Then the successor's other request goes on, and nobody may come under the name of the one that arrives
        assert_goes_on(handed.s, num_requests=1)
        refused = handed.s.refuse(Request("r2", [5, 6], GREEDY))
        assert refused is not None
        assert "not finished yet" in refused.message
    # And the one that arrives goes on when it answers, with nothing computed again
    wait_until(lambda: handed.s.step() is not None and handed.request.finish_reason is not None)
    assert handed.request.output_token_ids == expected
    assert handed.request.num_recomputed_tokens == 0


def test_a_creditor_that_never_answers_costs_what_it_held(handed: Handed, expected: list[int]) -> None:
    with hung(handed.lender):
        assert handed.s.receive(handed.request, handed.notice.handover_id)
        assert_goes_on(handed.s, num_requests=1)
        handed.lender.process.kill()
    wait_until(lambda: handed.s.step() is not None and handed.request.finish_reason is not None)
    assert handed.request.output_token_ids == expected
    assert handed.request.num_recomputed_tokens == NUM_LENT * 8


def test_one_that_is_aborted_while_it_arrives_leaves_nothing(handed: Handed, server: EmbeddedServer) -> None:
    with hung(handed.lender):
        assert handed.s.receive(handed.request, handed.notice.handover_id)
        handed.s.abort("r2")
        handed.s.abort("own")
        assert not handed.s.is_idle
        handed.s.check_integrity()

    def is_clean() -> bool:
        handed.d.step()
        handed.s.step()
        handed.s.check_integrity()
        status = handed.s.status(0)
        return (status.free_rblocks, status.borrowed_rblocks) == (512, 0) and not snapshot(server).loans

    wait_until(lambda: is_clean() and handed.s.is_idle, lambda: (handed.s.status(0), snapshot(server).loans))
