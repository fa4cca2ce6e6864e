"""What the scheduler does with requests that get no room."""

from random import Random

from megatron_distkv.engine import scheduler
from megatron_distkv.engine.llm import LLM
from megatron_distkv.rblock import LoanId
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig

GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


class Draws(Random):
    """The first draw is the largest, all others are the smallest."""

    num_draws = 0

    def random(self) -> float:
        self.num_draws += 1
        return 1.0 if self.num_draws == 1 else 0.0


class StillClock:
    random, now_s = Draws(), 0.0

    def monotonic_s(self) -> float:
        return self.now_s

    def unix_ms(self) -> int:
        return 1_700_000_000_000 + int(self.now_s * 1000)

    def sleep(self, seconds: float) -> None:
        pass


def test_a_request_keeps_the_patience_that_it_drew(make_config: MakeConfig) -> None:
    # Given a running request whose instance has lent the rest of its memory, and a long patience drawn first
    clock = StillClock()
    with LLM(make_config(num_rblocks=16, scheduler={"max_batched_tokens": 8}), clock) as llm:
        request = Request("one", [5] * 100, GREEDY)
        llm.instance.add(request)
        llm.instance.step()
        assert llm.instance.parts.allocator.lend(LoanId("all"), 14) is not None

        # When no room comes
        while request.num_preemptions == 0:
            clock.now_s += 0.1
            llm.instance.step()

        # Then it has given up after the long patience, not after the shortest of all draws
        assert clock.now_s > 2 * scheduler.GIVE_UP_AFTER_S


def steps_until_first_tokens(llm: LLM, requests: list[Request]) -> dict[str, int]:
    first: dict[str, int] = {}
    step = 0
    while not all(request.request_id in first for request in requests):
        step += 1
        for output in llm.instance.step():
            if output.token_ids:
                first.setdefault(output.request_id, step)
    return first


def test_who_comes_behind_a_long_prompt_does_not_wait_for_all_of_it(make_config: MakeConfig) -> None:
    # Given a prompt of 50 steps that runs
    alone, long = Request("alone", [5] * 1600, GREEDY), Request("long", [5] * 1600, GREEDY)
    with LLM(make_config(num_rblocks=512, scheduler={"max_batched_tokens": 32})) as llm:
        llm.instance.add(alone)
        steps_alone = steps_until_first_tokens(llm, [alone])["alone"]
        llm.instance.add(long)
        llm.instance.step()

        # When eight short ones and a second long one come
        short = [Request(f"short-{number}", [7 + number] * 20, GREEDY) for number in range(8)]
        second = Request("second", [6] * 1600, GREEDY)
        for request in (second, *short):
            llm.instance.add(request)
        first = steps_until_first_tokens(llm, [long, second, *short])

        # Then short ones are soon done, in spite of both, and the long ones lose no more than what those took
        assert max(first[request.request_id] for request in short) <= 16
        assert first["long"] <= steps_alone * 4 / 3 + 10  # the second has its share
        assert first["second"] <= 2 * steps_alone + 15


def test_a_step_is_full_while_anybody_has_tokens_to_compute(make_config: MakeConfig) -> None:
    with LLM(make_config(num_rblocks=512, scheduler={"max_batched_tokens": 48})) as llm:
        for number, length in enumerate((500, 30, 400, 9, 200, 700)):
            llm.instance.add(Request(str(number), [5] * length, GREEDY))
        left = 500 + 30 + 400 + 9 + 200 + 700
        while left > 48:
            before = llm.instance.status(0).num_computed_tokens
            llm.instance.step()
            computed = llm.instance.status(0).num_computed_tokens - before
            assert computed >= 48 or not llm.instance.scheduler.waiting
            left -= computed


def test_no_step_has_more_tokens_than_it_may(make_config: MakeConfig) -> None:
    # Given prompts that come into it side by side, and decode together: more of them than a step takes tokens
    many = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)
    with LLM(make_config(num_rblocks=512, scheduler={"max_batched_tokens": 8})) as llm:
        for number in range(20):
            llm.instance.add(Request(str(number), [5] * 40, many))
        most = 0
        while not llm.instance.scheduler.is_idle:
            before = llm.instance.status(0).num_computed_tokens
            llm.instance.step()
            most = max(most, llm.instance.status(0).num_computed_tokens - before)
    assert most == 8
