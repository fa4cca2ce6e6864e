"""What chaos takes for a wrong answer, and whom it counts a request for."""

from typing import Any

import pytest

from tools.bench.chaos.questions import Answer
from tools.bench.chaos.tally import Got, Tally

TOLERANCE = 1e-4
RIGHT = {"token_ids": [10, 11, 12], "text": "abc", "logprobs": [-1.0, -2.0, -3.0], "finish_reason": "length"}
EXPECTED = Answer(**RIGHT)  # type: ignore[arg-type]
RECEIPT = {"instances": ["instance-0"], "num_recomputed_tokens": 0, "num_tokens_at_losses": 0}


@pytest.fixture
def tally() -> Tally:
    made = Tally(TOLERANCE)
    made.expect(["gateway", "gateway-1"], ["instance-0", "instance-1"])
    return made


def note(tally: Tally, got: Answer, *, has_left: bool = False) -> None:
    tally.note_answer(Got([got], [] if has_left else [RECEIPT]), [EXPECTED], is_streamed=True)


@pytest.mark.parametrize(
    ("differs", "wrong"),
    [
        ({}, {}),
        ({"logprobs": [-1.0, -2.00005, -3.0]}, {}),
        ({"logprobs": [-1.0, -2.0002, -3.0]}, {"logprobs": 1}),
        ({"logprobs": []}, {"logprobs": 1}),
        ({"token_ids": [10, 99, 12], "logprobs": [-1.0, -9.0, -9.0]}, {"tokens": 1}),
        ({"text": "abd"}, {"text": 1}),
        ({"finish_reason": "stop"}, {"finish_reason": 1}),
    ],
)
def test_an_answer_is_compared_in_all_its_parts(tally: Tally, differs: dict[str, Any], wrong: dict[str, int]) -> None:
    note(tally, Answer(**{**RIGHT, **differs}))
    assert dict(tally.differences) == wrong
    assert tally.mismatches == len(wrong)


def test_what_a_client_has_that_left_must_begin_the_answer(tally: Tally) -> None:
    note(tally, Answer([10, 11], "a", [-1.0, -2.0], None), has_left=True)
    assert (tally.left, tally.mismatches) == (1, 0)
    note(tally, Answer([10, 12], "a", [-1.0, -2.0], None), has_left=True)
    assert dict(tally.differences) == {"tokens": 1}


def test_requests_are_counted_for_who_had_them(tally: Tally) -> None:
    assert tally.num_requests_of("instance-1") == tally.num_requests_of("gateway-1") == 0
    tally.note_asked("gateway", 2)
    note(tally, EXPECTED)
    assert [tally.num_requests_of(x) for x in ("instance-0", "instance-1")] == [1, 0]
    assert [tally.num_requests_of(x) for x in ("gateway", "gateway-1", "gmanager", "ledger")] == [2, 0, 2, 2]


def test_an_instance_had_its_share_of_those_whose_clients_left(tally: Tally) -> None:
    note(tally, EXPECTED)
    note(tally, Answer([10], "a", [-1.0], None), has_left=True)
    assert tally.num_requests_of("instance-0") == 2


def test_refusals_are_no_losses(tally: Tally) -> None:
    tally.note_error("queue_full", "too many", 1.0)
    tally.note_error("internal_error", "something else", 1.0)
    assert (tally.refused.total(), tally.lost.total()) == (1, 1)
