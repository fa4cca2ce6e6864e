"""Who is preempted, and who is admitted first: lower numbers are more important, as in vLLM."""

import msgspec
import pytest

from megatron_distkv.clock import SystemClock
from megatron_distkv.engine.instance import Instance
from megatron_distkv.engine.llm import LLM
from megatron_distkv.request import Request, RequestStatus
from megatron_distkv.sampling_params import SamplingParams
from tests.conftest import MakeConfig

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)


class HastyClock(SystemClock):
    """Every look at it takes a tenth of a second."""

    now_s = 0.0

    def monotonic_s(self) -> float:
        self.now_s += 0.1
        return self.now_s


def request(name: str, priority: int, length: int = 40) -> Request:
    sampling = msgspec.structs.replace(GREEDY, priority=priority)
    return Request(name, [5 + len(name)] * length, sampling)


def run(instance: Instance, requests: list[Request]) -> list[str]:
    """Names in the order in which the requests end."""
    ended: list[str] = []
    while len(ended) < len(requests):
        instance.step()
        ended += [x.request_id for x in requests if x.finish_reason is not None and x.request_id not in ended]
    return ended


@pytest.mark.parametrize(
    ("priorities", "preempted"), [((0, 0, 0), "third"), ((0, 1, 0), "second"), ((2, 1, 0), "first")]
)
def test_the_least_important_is_preempted_and_of_equals_the_latest(
    make_config: MakeConfig, priorities: tuple[int, int, int], preempted: str
) -> None:
    # Given three requests that fit now, and not with all of their output
    names = ("first", "second", "third")
    requests = [request(names[i], priority) for i, priority in enumerate(priorities)]
    with LLM(make_config(num_rblocks=24), HastyClock()) as llm:
        for one in requests:
            llm.instance.add(one)
        run(llm.instance, requests)
    assert {x.request_id for x in requests if x.num_preemptions > 0} == {preempted}


@pytest.mark.parametrize("limit", ["memory", "places"])
def test_an_important_request_does_not_wait_for_a_less_important_one(make_config: MakeConfig, limit: str) -> None:
    # Given an instance that is full, of memory or of requests
    places = {"scheduler": {"max_running_requests": 1}} if limit == "places" else {}
    with LLM(make_config(num_rblocks=12 if limit == "memory" else 64, **places), HastyClock()) as llm:
        low, equal, high = request("low", 5), request("equal", 5), request("high", 0)
        llm.instance.add(low)
        llm.instance.step()
        # When one that is as important comes, and then a more important one
        llm.instance.add(equal)
        llm.instance.add(high)
        ended = run(llm.instance, [low, equal, high])
    # Then the important one takes the other's place, and the rest go on in their order
    assert ended == ["high", "low", "equal"]
    assert (low.num_preemptions, equal.num_preemptions, high.num_preemptions) == (1, 0, 0)
    assert low.status is RequestStatus.FINISHED
