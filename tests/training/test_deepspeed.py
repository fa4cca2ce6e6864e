"""Training through the real deepspeed launcher: no layout and no ZeRO stage changes a loss, a resumed run none either.

One job of the launcher trains all ZeRO stages of one layout, one after the other: starting is what costs time.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from megatron_distkv.launch.commands import deepspeed
from megatron_distkv.launch.processes import Child

from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.config.train import TrainConfig
from megatron_distkv.engine.llm import LLM
from megatron_distkv.model import find_checkpoint
from megatron_distkv.sampling_params import SamplingParams
from tests.training.plain_llama import PlainRun, whole_weights

SCRIPT = Path(__file__).with_name("run_training.py")
STEPS, RESUMED_AT = 20, 10


class Layout(NamedTuple):
    tensor: int = 1
    context: int = 1
    data: int = 1

    def __str__(self) -> str:
        return f"tp{self.tensor}-cp{self.context}-dp{self.data}"


# Not all ZeRO stages of all layouts: each costs seconds.
ZERO_STAGES = {
    Layout(): (0, 3),
    Layout(data=2): (1, 2, 3),
    Layout(tensor=2): (0, 2),
    Layout(context=2): (0, 3),
    Layout(context=2, data=2): (1,),
    Layout(tensor=2, context=2): (2,),
}
LAYOUTS = list(ZERO_STAGES)
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
}  # fmt: skip
REFERENCE = TrainConfig.model_validate(VALUES)


@dataclass(frozen=True)
class Job:
    layout: Layout
    zero_stage: int
    output: Path
    resume: bool = False

    def config(self) -> dict[str, Any]:
        degrees = {"tensor_parallel": self.layout.tensor, "context_parallel": self.layout.context}
        return {**VALUES, **degrees, "zero_stage": self.zero_stage}

    def seen(self) -> dict[str, Any]:
        seen: dict[str, Any] = json.loads((self.output / "seen.json").read_text())
        return seen


def launch(jobs: list[Job], directory: Path) -> None:
    num_ranks = math.prod(jobs[0].layout)
    file = directory / "jobs.json"
    file.write_text(json.dumps([{"config": j.config(), "output": str(j.output), "resume": j.resume} for j in jobs]))
    child = Child(
        "training", [*deepspeed(num_ranks), str(SCRIPT), str(file)], directory / "log", {"OMP_NUM_THREADS": "1"}
    )
    try:
        assert child.process.wait(timeout=200) == 0, (directory / "log").read_text(errors="replace")[-4000:]
    finally:
        child.end()


Trained = Callable[[Layout], list[Job]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Every ZeRO stage of a layout, trained once."""

    @cache
    def train(layout: Layout) -> list[Job]:
        directory = tmp_path_factory.mktemp(str(layout))
        jobs = [Job(layout, stage, directory / f"zero{stage}") for stage in ZERO_STAGES[layout]]
        launch(jobs, directory)
        return jobs

    return train


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_losses_are_plain_torchs(layout: Layout, trained: Trained) -> None:
    # Given runs of every ZeRO stage, and plain torch from the same weights with the same batches
    jobs = trained(layout)
    weights = whole_weights(jobs[0].output, layout.tensor)
    plain = PlainRun(weights, REFERENCE)
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


@pytest.mark.parametrize("layout", [Layout(data=2), Layout(tensor=2), Layout(context=2)], ids=str)
def test_a_resumed_run_repeats_the_losses(layout: Layout, trained: Trained) -> None:
    # Given runs whose newest checkpoint is that of an earlier step, as if they had been killed after it
    first = trained(layout)
    expected = [job.seen()["losses"][RESUMED_AT:] for job in first]
    jobs = [Job(layout, job.zero_stage, job.output, resume=True) for job in first]
    for job in jobs:
        (job.output / "deepspeed" / "latest").write_text(f"global_step{RESUMED_AT}")
    # When new processes go on from there
    launch(jobs, jobs[0].output.parent)
    # Then they see the same losses, to the last bit
    for job, losses in zip(jobs, expected, strict=True):
        assert job.seen()["first_step"] == RESUMED_AT
        assert job.seen()["losses"] == losses, f"ZeRO-{job.zero_stage}"


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


def test_a_deepspeed_checkpoint_alone_tells_the_models_shape(trained: Trained, tmp_path: Path) -> None:
    for job in trained(Layout(context=2)):
        # Given what DeepSpeed saved, without the torch_dist checkpoint beside it
        alone = tmp_path / f"zero{job.zero_stage}" / "deepspeed"
        shutil.copytree(job.output / "deepspeed", alone)
        # Then it is a checkpoint of the model that was trained
        checkpoint = find_checkpoint(alone)
        assert (checkpoint.step, checkpoint.model) == (STEPS, REFERENCE.model)


def test_resuming_from_nothing_is_one_sentence(tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(json.dumps(VALUES))
    script = Path(sys.modules[deepspeed.__module__].__file__ or "").with_name("train.py")
    command = [*deepspeed(1), str(script), "--config", str(config), "--output", str(tmp_path / "out"), "--resume"]
    child = Child("training", command, tmp_path / "log", {"OMP_NUM_THREADS": "1"})
    assert child.process.wait(timeout=200) != 0
    assert "distkv train: nothing to resume from" in (tmp_path / "log").read_text()
