"""Training through the real deepspeed launcher: no layout and no ZeRO stage changes a loss, a resumed run none either.

One launch trains everything that has so many ranks, one after the other: starting is what costs time.
"""

import json
import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_distkv.launch.commands import deepspeed
from megatron_distkv.launch.processes import Child

from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.config.train import TrainConfig
from megatron_distkv.engine.llm import LLM
from megatron_distkv.model import find_checkpoint
from megatron_distkv.sampling_params import SamplingParams
from tests.training.jobs import Job, Layout, launch
from tests.training.plain_llama import PlainRun, passkey_steps, whole_weights

STEPS, RESUMED_AT = 20, 10
# Not all ZeRO stages of all layouts: each costs seconds.
TRAINED = {
    Layout(): (0, 3),
    Layout(data=2): (1, 2, 3),
    Layout(tensor=2): (0, 2),
    Layout(context=2): (0, 3),
    Layout(context=2, data=2): (1,),
    Layout(tensor=2, context=2): (2,),
}
LAYOUTS = list(TRAINED)
# (of which run, how it goes on): the same layout first, then others, and every ZeRO stage from and to another
RESUMED = [
    ((Layout(data=2), 1), (Layout(data=2), 1)),
    ((Layout(tensor=2), 2), (Layout(tensor=2), 2)),
    ((Layout(context=2), 3), (Layout(context=2), 3)),
    ((Layout(data=2), 3), (Layout(tensor=2), 0)),
    ((Layout(tensor=2), 0), (Layout(context=2), 2)),
    ((Layout(context=2), 0), (Layout(data=2), 3)),
    ((Layout(tensor=2), 2), (Layout(data=2), 1)),
]
VALUES: dict[str, Any] = {
    "model": {
        "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_kv_heads": 2,
        "head_dim": 8, "vocab_size": 272,
    },
    "data": {
        "tokens_per_step": 256, "prose_weight": 0.5,
        # 125 tokens are no multiple of what a context group cuts a sequence into
        "stages": [{"first_step": 0, "sequence_length": 64}, {"first_step": 12, "sequence_length": 125}],
    },
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 5, "weight_decay": 0.1, "gradient_clipping": 2.0},
    "init_std": 0.1, "steps": STEPS, "save_every": RESUMED_AT, "evaluate_every": 15, "evaluation_length": 64,
    "peak_tflops": 1.0,
}  # fmt: skip
REFERENCE = TrainConfig.model_validate(VALUES)


Trained = Callable[[Layout], list[Job]]
Run = tuple[Layout, int]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(directory: Path) -> Trained:
    """Every ZeRO stage of a layout, trained once; with two ranks also the runs that others went on with."""

    @cache
    def launched(num_ranks: int) -> None:
        jobs = [job for layout in LAYOUTS if math.prod(layout) == num_ranks for job in jobs_of(layout)]
        if num_ranks == 2:
            jobs += [resumed_job(directory, *pair) for pair in RESUMED]
        launch(jobs, directory)

    def jobs_of(layout: Layout) -> list[Job]:
        return [Job(layout, stage, directory / f"{layout}-zero{stage}", VALUES) for stage in TRAINED[layout]]

    def train(layout: Layout) -> list[Job]:
        launched(math.prod(layout))
        return jobs_of(layout)

    return train


def resumed_job(directory: Path, first: Run, then: Run) -> Job:
    """What goes on from the middle checkpoint, as if the first run had been killed after it."""
    (old, old_stage), (new, new_stage) = first, then
    source = directory / f"{old}-zero{old_stage}" / f"iter_{RESUMED_AT:07d}"
    output = directory / f"{old}-zero{old_stage}-to-{new}-zero{new_stage}"
    return Job(new, new_stage, output, VALUES, source)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_losses_are_plain_torchs(layout: Layout, trained: Trained) -> None:
    # Given runs of every ZeRO stage, and plain torch from the same weights with the same batches
    jobs = trained(layout)
    weights = whole_weights(jobs[0].output, layout.tensor)
    plain = PlainRun(weights, REFERENCE, passkey_steps(REFERENCE))
    # Then the reference clips some steps and not all, and every run has its losses
    assert min(plain.gradient_norms) < REFERENCE.optimizer.gradient_clipping < max(plain.gradient_norms)
    assert plain.losses[-1] < plain.losses[0] - 1
    for job in jobs:
        assert job.seen()["losses"] == pytest.approx(plain.losses, abs=1e-4), f"ZeRO-{job.zero_stage}"


def test_one_seed_draws_the_same_weights_on_every_layout(trained: Trained) -> None:
    one = whole_weights(trained(Layout())[0].output, 1)
    for layout in LAYOUTS:
        for job in trained(layout):
            other = whole_weights(job.output, layout.tensor)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("pair", RESUMED, ids=lambda pair: "-to-".join(f"{layout}-zero{n}" for layout, n in pair))
def test_a_resumed_run_repeats_the_next_losses(pair: tuple[Run, Run], trained: Trained, directory: Path) -> None:
    # Given a run, and what goes on from its middle checkpoint
    first, then = pair
    trained(first[0])
    whole = Job(*first, directory / f"{first[0]}-zero{first[1]}", VALUES).seen()["losses"]
    resumed = resumed_job(directory, first, then).seen()
    # Then it sees the same losses: to the last bit, unless another layout adds up in another order
    assert resumed["first_step"] == RESUMED_AT
    assert resumed["losses"] == pytest.approx(whole[RESUMED_AT:], abs=0 if first == then else 2e-5, rel=0)


def test_the_log_has_every_step_once(trained: Trained, directory: Path) -> None:
    jobs = [*trained(Layout(data=2)), resumed_job(directory, *RESUMED[0])]
    for job in jobs:
        steps = [line["step"] for line in job.log()]
        assert steps == list(range(job.seen()["first_step"] + 1, STEPS + 1))
        for line, loss in zip(job.log(), job.seen()["losses"], strict=True):
            assert line["loss"] == loss
            assert {"learning_rate", "gradient_norm", "tokens", "tokens_per_s", "mfu"} <= line.keys()
            assert ("recall" in line) == (line["step"] in (15, STEPS))
        assert (job.output / "loss.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_was_trained_is_what_is_served(layout: Layout, trained: Trained, tmp_path: Path) -> None:
    for job in trained(layout):
        # Given the torch_dist checkpoint of a run
        checkpoint = find_checkpoint(job.output)
        assert (checkpoint.step, checkpoint.model) == (STEPS, REFERENCE.model)
        # When an instance on one rank reads it
        values = {"instance_id": "a", "model": job.output, "run_dir": tmp_path}
        config = InstanceConfig.model_validate({**values, "kv_cache": {"num_rblocks": 32, "rblock_size": 8}})
        greedy = SamplingParams(max_tokens=1, temperature=0.0, logprobs=3)
        with LLM(config) as llm:
            completions = llm.generate([list(range(65, 65 + n)) for n in (1, 9, 40)], greedy)
        # Then it likes the same next tokens as much as the model that was trained
        for completion, trained_logprobs in zip(completions, job.seen()["logprobs"], strict=True):
            best = torch.tensor(trained_logprobs).topk(3)
            assert completion.token_ids == [int(best.indices[0])]
            assert completion.logprobs[0].top == [
                (token, pytest.approx(logprob, abs=1e-4))
                for token, logprob in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]


def test_resuming_from_nothing_is_one_sentence(tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(json.dumps(VALUES))
    script = Path(sys.modules[deepspeed.__module__].__file__ or "").with_name("train.py")
    command = [*deepspeed(1), str(script), "--config", str(config), "--output", str(tmp_path / "out"), "--resume"]
    child = Child("training", command, tmp_path / "log", {"OMP_NUM_THREADS": "1"})
    assert child.process.wait(timeout=200) != 0
    assert "distkv train: nothing to resume from" in (tmp_path / "log").read_text()
