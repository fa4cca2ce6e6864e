"""Three instances that lend each other memory, driven at random: no error, nothing lost, the same tokens, no debts.

The driver is seeded; only the heartbeats' timing differs between two runs of one seed.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_distkv.attention import Access
from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.engine import unplaceable
from megatron_distkv.engine.addresses import rank_address
from megatron_distkv.engine.instance import Instance
from megatron_distkv.engine.llm import LLM
from megatron_distkv.engine.rank import build_rank
from megatron_distkv.ledger import DebtLedger
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.messages import HandedOver, Holder, TokenOutput
from megatron_distkv.model import init_tensor_parallel
from megatron_distkv.rblock import HOST, RemoteSpan, loan_key
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.transport.connections import break_a_connection

NUM_RBLOCKS = 16
RBLOCK_SIZE = 8
# Some have host memory beside their pool.
HOST_RBLOCKS = {"a": 5}
# What a driver may need to finish all that it has begun.
STUCK_AFTER_S = 60.0
# Heartbeats come every 0.1 s: accounts that differ for longer than this stay different.
SETTLED_WITHIN_S = 3.0


def assert_soon(condition: Callable[[], bool], otherwise: Callable[[], str]) -> None:
    end = time.monotonic() + SETTLED_WITHIN_S
    while not condition():
        assert time.monotonic() < end, otherwise()
        time.sleep(0.02)


class Debt(NamedTuple):
    loan_id: str
    debtor: str
    creditor: str
    num_rblocks: int


class Pool:
    """The instances, the ledger they share, and one instance with enough memory to compare with."""

    def __init__(self, instances: dict[str, Instance], server: EmbeddedServer, ledger: DebtLedger, enough: LLM) -> None:
        self.instances = instances
        self.server = server
        self.ledger = ledger
        self.enough = enough

    def debts_in_ledger(self) -> set[Debt]:
        return {Debt(x.key, x.debtor, x.creditor, x.num_rblocks) for x in self.ledger.snapshot().loans}

    def debts_held_by_debtors(self) -> set[Debt]:
        return {
            Debt(loan.key, name, loan.creditor, loan.num_rblocks)
            for name, instance in self.instances.items()
            for loan in instance.parts.loans.all()
        }

    def debts_lent_by_creditors(self) -> set[Debt]:
        return {
            Debt(loan_key(loan_id), instance.parts.lending.lent[loan_id].debtor, name, num_rblocks)
            for name, instance in self.instances.items()
            for loan_id, num_rblocks in instance.parts.allocator.loans().items()
        }

    def accounts_agree(self) -> bool:
        for instance in self.instances.values():
            instance.parts.loans.take_results()
        return self.debts_in_ledger() == self.debts_held_by_debtors() == self.debts_lent_by_creditors()

    def assert_accounts_settle(self) -> None:
        assert_soon(
            self.accounts_agree,
            lambda: (
                f"ledger {self.debts_in_ledger()}\ndebtors {self.debts_held_by_debtors()}\n"
                f"creditors {self.debts_lent_by_creditors()}"
            ),
        )

    def assert_spans_are_granted(self) -> None:
        """Every rBlock that some table places at a creditor is granted to that table's instance, and to no other."""
        seen: set[tuple[str, int]] = set()
        for name, instance in self.instances.items():
            for request in instance.scheduler.running:
                for span in instance.rmanager.table(request).remote_spans():
                    if span.creditor == HOST:
                        continue
                    assert self._is_granted(name, span), f"{name} holds {span} without a grant"
                    places = {(span.creditor, block_id) for block_id in span.block_ids}
                    assert len(places) == len(span.block_ids)
                    assert not places & seen
                    seen |= places

    def _is_granted(self, debtor: str, span: RemoteSpan) -> bool:
        table = self.instances[span.creditor].parts.rank.loan_table
        return table.may_write(Holder(debtor), [span.loan_id], span.block_ids) is Access.GRANTED

    def assert_nothing_is_owed(self) -> None:
        assert self.debts_in_ledger() == set()
        for instance in self.instances.values():
            status = instance.status(0)
            assert (status.free_rblocks, status.lent_rblocks, status.borrowed_rblocks) == (NUM_RBLOCKS, 0, 0)
            assert status.used_host_rblocks == 0


@pytest.fixture(autouse=True)
def all_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no gateway here that a request could go back to."""
    monkeypatch.setattr(unplaceable, "NO_PROGRESS_S", 10 * STUCK_AFTER_S)


@pytest.fixture(scope="module")
def pool(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """One pool for all seeds: a driver leaves it empty, or fails."""
    with start_pool(llama, tmp_path_factory.mktemp("pool"), "auto") as pool:
        yield pool


@pytest.fixture
def int8_pool(llama: Path, tmp_path: Path) -> Iterator[Pool]:
    with start_pool(llama, tmp_path, "int8") as pool:
        yield pool


@contextmanager
def start_pool(
    llama: Path, run_dir: Path, kv_dtype: str, open_one: Callable[[str, str], DebtLedger] = open_ledger
) -> Iterator[Pool]:
    """`open_one`: how each of the three, and the test, reaches the ledger at a URL, of a pool of this name."""

    def config(name: str, num_rblocks: int, url: str, max_batched_tokens: int) -> InstanceConfig:
        values = {
            "instance_id": name,
            "model": llama,
            "run_dir": run_dir,
            "kv_cache": {
                "num_rblocks": num_rblocks,
                "num_host_rblocks": HOST_RBLOCKS.get(name, 0),
                "rblock_size": RBLOCK_SIZE,
                "dtype": kv_dtype,
            },
            "ledger": {"url": url, "heartbeat_interval_s": 0.1, "lease_s": 1.0},
            "scheduler": {"max_batched_tokens": max_batched_tokens},
        }
        return InstanceConfig.model_validate(values)

    def start(name: str) -> Instance:
        rank = build_rank(config(name, NUM_RBLOCKS, server.url, 48), init_tensor_parallel(1))
        instance = Instance(rank, open_one(server.url, "default"))
        stack.callback(instance.close)
        return instance

    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedServer())
        ledger = open_one(server.url, "default")
        stack.callback(ledger.close)
        instances = {name: start(name) for name in ("a", "b", "c")}
        enough = stack.enter_context(LLM(config("enough", 512, "memory://", 512)))
        yield Pool(instances, server, ledger, enough)


class Driver:
    """Does random things to a pool, keeping what came out of each request, and what it did for a failure's message."""

    def __init__(self, pool: Pool, seed: int, longest: Sequence[int] = (20, 120, 330)) -> None:
        """`longest`: how long prompts are at most, in tokens, each as often."""
        self._pool = pool
        self._longest = longest
        self._seed = seed
        self._random = random.Random(seed)
        self._requests: dict[str, Request] = {}
        self._home: dict[str, str] = {}
        self._tokens: dict[str, list[int]] = {}
        self._aborted: set[str] = set()
        self.history: list[str] = []
        self.num_handed_over = 0

    # ------------------------------------------------------------------ rules

    def add(self) -> None:
        name, request_id = self._any_instance(), f"s{self._seed}-{len(self._requests)}"
        request = Request(request_id, self._prompt(), self._sampling())
        self._note(f"add {request_id} of {request.max_total_tokens} tokens to {name}")
        assert_soon(lambda: self._pool.instances[name].refuse(request) is None, lambda: "refused")
        self._requests[request_id], self._home[request_id], self._tokens[request_id] = request, name, []
        self._pool.instances[name].add(request)

    def step(self) -> None:
        name, count = self._any_instance(), self._random.randint(1, 5)
        self._note(f"step {name} {count} times")
        for _ in range(count):
            self._step(name)

    def abort(self) -> None:
        running = [request_id for request_id, request in self._requests.items() if request.finish_reason is None]
        if running:
            request_id = self._random.choice(running)
            self._note(f"abort {request_id}")
            self._aborted.add(request_id)
            self._pool.instances[self._home[request_id]].abort(request_id)

    def wait(self) -> None:
        wait_s = self._random.choice([0.01, 0.05, 0.15])
        self._note(f"wait {wait_s} s")
        time.sleep(wait_s)

    def cut_a_channel(self) -> None:
        """A real end of stream in the middle of somebody's loans."""
        name = self._any_instance()
        if break_a_connection(rank_address(self._pool.instances[name].config.run_dir, name, 0), self._random):
            self._note(f"cut a channel of {name}")

    def lose_the_ledger(self) -> None:
        """kill -9, some steps without it, and an empty one comes back."""
        self._note("lose the ledger")
        self._pool.server.kill()
        for _ in range(self._random.randint(0, 3)):
            self.step()
        self._pool.server.start()

    def leave(self) -> None:
        """One hands over what it can, others take it up, and then it stays after all."""
        busy = [name for name, instance in self._pool.instances.items() if instance.scheduler.running]
        if not busy:
            return
        name = self._random.choice(busy)
        self._note(f"leave {name}")
        instance = self._pool.instances[name]
        instance.drain(within_s=60)
        for _ in range(self._random.choice([5, 40])):
            for other in self._pool.instances:
                self._step(other)
        self._stay(instance)

    def _stay(self, instance: Instance) -> None:
        instance.stay()
        end = time.monotonic() + STUCK_AFTER_S
        while instance.parts.loans.has_transfers:
            assert time.monotonic() < end, f"loans that nobody takes over: {self._state()}"
            for name in self._pool.instances:
                self._step(name)
            time.sleep(0.02)
        instance.note_idle()

    def _follow(self, notice: HandedOver) -> None:
        """As a gateway does."""
        old, home = self._requests[notice.request_id], notice.successor or self._home[notice.request_id]
        tokens = list(self._tokens[old.request_id])
        new = Request(old.request_id, old.prompt_token_ids, old.sampling, output_token_ids=tokens)
        self._requests[old.request_id], self._home[old.request_id] = new, home
        if not self._pool.instances[home].receive(new, notice.handover_id):
            self._pool.instances[home].add(new)
        else:
            self.num_handed_over += 1

    # ------------------------------------------------------------------ the whole run

    def run(self, num_rules: int, rules: dict[Callable[[], None], int]) -> None:
        for _ in range(num_rules):
            self._random.choices(list(rules), weights=list(rules.values()))[0]()
            self._pool.assert_accounts_settle()
            self._pool.assert_spans_are_granted()
            for instance in self._pool.instances.values():
                instance.check_integrity()

    def drain(self) -> None:
        self._note("drain")
        end = time.monotonic() + STUCK_AFTER_S
        while not all(instance.is_idle for instance in self._pool.instances.values()):
            assert time.monotonic() < end, f"stuck: {self._state()}"
            for name in self._pool.instances:
                self._step(name)
        for instance in self._pool.instances.values():
            instance.note_idle()

    def assert_every_request_has_its_tokens(self) -> None:
        for request_id, request in self._requests.items():
            assert (request.finish_reason == "abort") == (request_id in self._aborted)
            assert self._tokens[request_id] == request.output_token_ids
        finished = [x for request_id, x in self._requests.items() if request_id not in self._aborted]
        expected = self._pool.enough.generate([x.prompt_token_ids for x in finished], [x.sampling for x in finished])
        for request, completion in zip(finished, expected, strict=True):
            assert request.output_token_ids == completion.token_ids, request.request_id

    # ------------------------------------------------------------------ inside

    def _step(self, name: str) -> None:
        outputs: list[TokenOutput] = self._pool.instances[name].step()
        for output in outputs:
            self._tokens[output.request_id] += output.token_ids
        for notice in self._pool.instances[name].take_final_notices():
            assert isinstance(notice, HandedOver)
            self._follow(notice)

    def _any_instance(self) -> str:
        return self._random.choice(sorted(self._pool.instances))

    def _prompt(self) -> list[int]:
        longest = self._random.choice(self._longest)
        return [self._random.randint(3, 130) for _ in range(self._random.randint(1, longest))]

    def _sampling(self) -> SamplingParams:
        is_greedy = self._random.random() < 0.5
        return SamplingParams(
            max_tokens=self._random.randint(1, 20),
            temperature=0.0 if is_greedy else 0.8,
            seed=None if is_greedy else self._random.randrange(1000),
            ignore_eos=True,
        )

    def _note(self, what: str) -> None:
        self.history.append(what)

    def _state(self) -> str:
        return "; ".join(
            f"{name}: running {[(x.request_id, x.num_computed_tokens, x.num_tokens) for x in i.scheduler.running]},"
            f" waiting {[(x.request_id, x.num_tokens) for x in i.scheduler.waiting]}, {i.status(0)}"
            for name, i in self._pool.instances.items()
        )


def drive(pool: Pool, seed: int, num_rules: int, *, cuts: int = 0, ledger_losses: int = 0, leaves: int = 0) -> Driver:
    driver = Driver(pool, seed, (20, 60, 120)) if leaves else Driver(pool, seed)
    rules = {
        driver.add: 8,
        driver.step: 20,
        driver.abort: 2,
        driver.wait: 2,
        driver.cut_a_channel: cuts,
        driver.lose_the_ledger: ledger_losses,
        driver.leave: leaves,
    }
    try:
        driver.run(num_rules, rules)
        driver.drain()
        pool.assert_accounts_settle()
        driver.assert_every_request_has_its_tokens()
        pool.assert_nothing_is_owed()
    except BaseException:
        print("\n".join(driver.history))
        raise
    return driver


@pytest.mark.parametrize("seed", range(4))
def test_whatever_comes_every_request_ends_with_its_tokens_and_nothing_is_owed(pool: Pool, seed: int) -> None:
    drive(pool, seed, 60)


def test_requests_that_are_handed_over_end_like_any(pool: Pool) -> None:
    drivers = [drive(pool, seed, 30, cuts=seed % 2, leaves=8) for seed in range(300, 303)]
    assert sum(driver.num_handed_over for driver in drivers) > 0


@pytest.mark.parametrize("seed", range(100, 102))
def test_channels_that_break_cost_nothing_but_time(pool: Pool, seed: int) -> None:
    drive(pool, seed, 60, cuts=2)


@pytest.mark.parametrize("seed", range(200, 202))
def test_a_ledger_that_dies_and_comes_back_empty_costs_nothing_but_time(pool: Pool, seed: int) -> None:
    drive(pool, seed, 60, ledger_losses=2)


def test_an_int8_cache_is_the_same_wherever_it_lies_and_however_it_was_computed(int8_pool: Pool) -> None:
    drive(int8_pool, 400, 40, cuts=2, ledger_losses=1)
    drivers = [drive(int8_pool, seed, 30, cuts=1, leaves=8) for seed in (401, 402)]
    assert sum(driver.num_handed_over for driver in drivers) > 0
