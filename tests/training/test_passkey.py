"""Passkeys in prose: what the rows and prompts hold, whatever the length, density, depth and seed."""

import hashlib
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_distkv.config.train import PasskeyDataConfig
from megatron_distkv.training.data import PasskeyData
from megatron_distkv.training.passkey import (
    BOS,
    NUM_DIGITS,
    STATEMENT_LENGTH,
    VOCAB_SIZE,
    load_prose,
    new_key,
    prompt,
    prompts,
    training_row,
)

PROSE = load_prose(None)
STATEMENT = re.compile(rb"<<([A-Z]{3})=(\d{5})>>")
SEEDS = st.integers(0, 2**32)
CONFIG = PasskeyDataConfig.model_validate(
    {
        "tokens_per_step": 1024,
        "stages": [{"first_step": 0, "sequence_length": 64}, {"first_step": 5, "sequence_length": 256}],
    }
)


def text_of(token_ids: list[int]) -> bytes:
    assert token_ids[0] == BOS
    return bytes(token_ids[1:])  # raises for anything that is no byte


def test_prose_has_no_digits_and_no_markers_and_its_parts_are_apart() -> None:
    for part in (PROSE.training, PROSE.held_out):
        assert not set(part.tobytes()) & set(b"0123456789<>=")
    assert len(PROSE.held_out) == pytest.approx(0.1 * (len(PROSE.training) + len(PROSE.held_out)), abs=1)
    assert PROSE.held_out[:200].tobytes() not in PROSE.training.tobytes()


def test_text_and_batches_of_a_seed_are_the_same_on_every_python_and_numpy() -> None:
    """What a run that goes on elsewhere takes for granted."""
    assert PROSE.fingerprint == "a1aa4844fda052eed0dda3fb2ca85f78a3d82f0f565de4d53272cb36e00133a4"
    batch = PasskeyData(CONFIG, PROSE.training, seed=7).batch(6, 1, 2)
    digest = hashlib.sha256(batch.inputs_BT.numpy().tobytes() + batch.is_answer_BT.numpy().tobytes())
    assert digest.hexdigest()[:16] == "76bc47898b90e022"


def test_prose_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"a1<=>b" * 50)
    prose = load_prose(tmp_path / "text")
    assert prose.training.tobytes() + prose.held_out.tobytes() == b"ab" * 50


@given(SEEDS)
def test_a_key_has_three_letters_and_five_distinct_digits(seed: int) -> None:
    key = new_key(np.random.default_rng(seed))
    assert STATEMENT.fullmatch(key.statement)
    assert len(key.statement) == STATEMENT_LENGTH
    assert len(set(key.digits)) == NUM_DIGITS
    assert key.statement.startswith(key.question.strip() + key.digits)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(32, 600), st.floats(0.0, 0.95))
def test_a_row_states_one_key_and_marks_every_recall(seed: int, length: int, max_density: float) -> None:
    row = training_row(np.random.default_rng(seed), PROSE.training, length, max_density)
    # Then the row is full: a token more than its length, for the labels
    assert row.token_ids.shape == row.is_answer.shape == (length + 1,)
    text = text_of(row.token_ids.tolist())
    # Then it states one key, twice or more, and nothing else has digits or markers
    found = list(STATEMENT.finditer(text))
    assert len(found) >= 2
    assert len({match[0] for match in found}) == 1
    assert not set(STATEMENT.sub(b"", text)) & set(b"0123456789<>=")
    # Then the answers are the digits of all statements but the first, whose digits nobody can know
    expected = np.zeros(length + 1)
    for match in found[1:]:
        expected[match.start(2) + 1 : match.end(2) + 1] = 1
    assert np.array_equal(row.is_answer, expected)


def test_statements_take_at_most_the_largest_share_and_two_are_as_common_as_many() -> None:
    length, max_density = 512, 0.6
    rng = np.random.default_rng(0)
    rows = [training_row(rng, PROSE.training, length, max_density) for _ in range(400)]
    counts = [len(STATEMENT.findall(text_of(row.token_ids.tolist()))) for row in rows]
    most = int(length * max_density / STATEMENT_LENGTH)
    assert (min(counts), max(counts)) == (2, most)
    # log-uniform over 2..most: half of the rows have fewer than the geometric mean
    assert np.mean(np.array(counts) < (2 * (most + 1)) ** 0.5) == pytest.approx(0.5, abs=0.1)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(21, 3000), st.floats(0.0, 1.0))
def test_a_prompt_has_its_length_one_statement_at_its_depth_and_the_question_last(
    seed: int, length: int, depth: float
) -> None:
    asked = prompt(np.random.default_rng(seed), PROSE.held_out, length, depth)
    assert len(asked.token_ids) == length
    text = text_of(asked.token_ids)
    (match,) = STATEMENT.finditer(text)
    assert match[2] == asked.digits
    assert text.endswith(b" <<" + match[1] + b"=")
    num_prose = length - 1 - STATEMENT_LENGTH - len(b" <<ABC=")
    assert match.start() == int(num_prose * depth)
    rest = STATEMENT.sub(b"", text)[:num_prose]
    assert not set(rest) & set(b"0123456789<>=")


def test_a_prompt_longer_than_the_text_repeats_it() -> None:
    short = np.frombuffer(b"abcdefgh", np.uint8)
    text = text_of(prompt(np.random.default_rng(0), short, 200, 0.5).token_ids)
    assert b"abcdefghabcdefgh" in text


def test_the_shortest_prompt_and_one_token_less() -> None:
    rng = np.random.default_rng(0)
    shortest = 1 + STATEMENT_LENGTH + len(b" <<ABC=")
    assert len(prompt(rng, PROSE.held_out, shortest, 0.5).token_ids) == shortest
    with pytest.raises(ValueError, match=f"at least {shortest} tokens, got {shortest - 1}"):
        prompt(rng, PROSE.held_out, shortest - 1, 0.5)


def test_prompts_are_a_function_of_the_seed() -> None:
    grid = prompts(3, PROSE.held_out, [64, 100], [0.0, 0.5, 1.0])
    assert [(length, depth) for length, depth, _ in grid] == [(n, d) for n in (64, 100) for d in (0.0, 0.5, 1.0)]
    assert grid == prompts(3, PROSE.held_out, [64, 100], [0.0, 0.5, 1.0])
    assert grid != prompts(4, PROSE.held_out, [64, 100], [0.0, 0.5, 1.0])


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, step=st.integers(0, 10), dp_size=st.sampled_from([1, 2, 4]))
def test_the_ranks_rows_are_the_global_batch(seed: int, step: int, dp_size: int) -> None:
    data = PasskeyData(CONFIG, PROSE.training, seed)
    whole = data.batch(step, 0, 1)
    parts = [data.batch(step, rank, dp_size) for rank in range(dp_size)]
    assert whole.inputs_BT.numel() == CONFIG.tokens_per_step
    for rank, part in enumerate(parts):
        assert part.temperature == whole.temperature
        for mine, all_rows in zip(part[:3], whole[:3], strict=True):
            assert mine.equal(all_rows[rank::dp_size])


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    # Given a run that saw all steps, and one that resumes at step 4
    first, resumed = (PasskeyData(CONFIG, PROSE.training, seed=1) for _ in range(2))
    seen = [first.batch(step, 0, 1) for step in range(7)]
    again = [resumed.batch(step, 0, 1) for step in range(4, 7)]
    # Then they see the same, and no two steps or seeds are alike
    for one, other in zip(seen[4:], again, strict=True):
        assert one.inputs_BT.equal(other.inputs_BT)
        assert one.is_answer_BT.equal(other.is_answer_BT)
    assert not any(a.inputs_BT.equal(b.inputs_BT) for a, b in pairwise(seen))
    assert not PasskeyData(CONFIG, PROSE.training, seed=2).batch(0, 0, 1).inputs_BT.equal(seen[0].inputs_BT)


def test_labels_are_the_next_tokens_and_answers_are_marked_at_the_labels() -> None:
    batch = PasskeyData(CONFIG, PROSE.training, seed=0).batch(6, 0, 1)
    assert batch.inputs_BT.shape == batch.labels_BT.shape == batch.is_answer_BT.shape == (4, 256)
    assert batch.inputs_BT[:, 1:].equal(batch.labels_BT[:, :-1])
    assert int(batch.inputs_BT.max()) < VOCAB_SIZE
    marked = batch.labels_BT[batch.is_answer_BT == 1]
    assert len(marked) % NUM_DIGITS == 0
    assert len(marked) > 0
    assert all(chr(token).isdigit() for token in marked.tolist())


@pytest.mark.parametrize("dp_size", [1, 2])
def test_accumulated_parts_are_the_whole_batch(dp_size: int) -> None:
    # Given a rank's share of a step in one part, and in three that do not divide its rows
    whole, parts = (
        PasskeyData(CONFIG.model_copy(update={"gradient_accumulation_steps": steps}), PROSE.training, seed=1)
        for steps in (1, 3)
    )
    assert (whole.num_micro_batches(dp_size), parts.num_micro_batches(dp_size)) == (1, 3)
    for rank in range(dp_size):
        (one,), three = whole.micro_batches(0, rank, dp_size), parts.micro_batches(0, rank, dp_size)
        # Then the parts are the same rows, and their weights count the same
        assert len(one.inputs_BT) % 3
        for mine, theirs in zip(zip(*three, strict=True), one[:3], strict=False):
            assert torch.cat(mine).equal(theirs)  # type: ignore[arg-type]
