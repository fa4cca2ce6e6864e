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
