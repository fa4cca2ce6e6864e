"""Recall over a context group's shards is that over whole prompts."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_distkv.context_parallel import ContextShard, ZigzagLayout
from megatron_distkv.model import init_tensor_parallel
from megatron_distkv.training.passkey import VOCAB_SIZE, Prompt, load_prose, prompt
from megatron_distkv.training.recall import num_inputs, recall, wrong_digits

HELD_OUT = load_prose(None).held_out
LENGTH = 64


def that_knows(*prompts: Prompt) -> Any:
    """A language model of pairs: it likes the token that follows in the prompts' answers, and token 0 elsewhere."""
    table = torch.zeros(VOCAB_SIZE, VOCAB_SIZE)
    for asked in prompts:
        answer = [asked.token_ids[-1], *asked.digits]
        table[answer[:-1], answer[1:]] = 1.0
    return lambda ids_BT, positions, mask: table[ids_BT]


@pytest.fixture(autouse=True)
def one_rank() -> None:
    init_tensor_parallel(1)


@pytest.mark.parametrize("size", [2, 4, 16])
def test_shards_find_the_same_wrong_digits(size: int) -> None:
    # Given a model that knows one prompt's answer, and a length at which digits lie on two ranks of sixteen
    asked, other = (prompt(np.random.default_rng(seed), HELD_OUT, LENGTH, 0.5) for seed in (0, 1))
    shards = [ContextShard(ZigzagLayout(num_inputs(LENGTH), size), rank) for rank in range(size)]
    for number, expected in ((asked, 0), (other, int(wrong_digits(that_knows(asked), other, None)))):
        found = [int(wrong_digits(that_knows(asked), number, shard)) for shard in shards]
        assert sum(found) == expected
    # Then what is wrong is wrong, on more than one rank where the digits are
    assert sum(found) >= 4
    assert size < 16 or sum(count > 0 for count in found) == 2


def test_recall_is_the_share_of_prompts_with_all_digits() -> None:
    rng = np.random.default_rng(5)
    prompts = [prompt(rng, HELD_OUT, LENGTH, float(depth)) for depth in np.linspace(0.05, 0.95, 4)]
    for known in range(2):
        assert recall(that_knows(*prompts[:known]), HELD_OUT, LENGTH, 4, seed=5) == known / 4
