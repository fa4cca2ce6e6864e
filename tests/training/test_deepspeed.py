"""Training through the real deepspeed launcher: no layout and no ZeRO stage changes a loss, a resumed run none either.

One launch trains everything, one after the other: starting is what costs time.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_distkv.launch.commands import free_port

from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.config.train import TrainConfig
from megatron_distkv.engine.llm import LLM
from megatron_distkv.model import find_checkpoint
from megatron_distkv.sampling_params import SamplingParams
from tests.training.jobs import Job, Layout, board_of, launch
from tests.training.plain_attention import by_transformers, found_by_ranks
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
    Layout(tensor=2, data=2): (3,),
    Layout(tensor=2, context=2, data=2): (1,),
}
LAYOUTS = list(TRAINED)
assert set(LAYOUTS) == {Layout(*sizes) for sizes in itertools.product((1, 2), repeat=3)}
# Two dimensions at once, and three, are left to the night: on two cores four ranks take as long as all others together.
LATE = {layout for layout in LAYOUTS if math.prod(layout) >= 4}
EACH_LAYOUT = [pytest.param(x, id=str(x), marks=pytest.mark.nightly if x in LATE else ()) for x in LAYOUTS]
TOLERANCES = {"fp32": 1e-5, "bf16": 1e-2}  # relative, of one attention layer
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


CURVE_STEPS = 50
Trained = Callable[[Layout], list[Job]]
Run = tuple[Layout, int]
pytestmark = pytest.mark.timeout(600)  # the first test waits for all that is launched


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def layouts(request: pytest.FixtureRequest) -> list[Layout]:
    """Those of this run."""
    return [layout for layout in LAYOUTS if layout not in LATE or request.config.getoption("nightly")]


@pytest.fixture(scope="module")
def trained(directory: Path, layouts: list[Layout]) -> Trained:
    """Every ZeRO stage of a layout; the runs that others went on with, and attention layers, lie beside."""

    def jobs_of(layout: Layout) -> list[Job]:
        return [Job(layout, stage, directory / f"{layout}-zero{stage}", VALUES) for stage in TRAINED[layout]]

    jobs = [job for layout in layouts for job in jobs_of(layout)]
    jobs += [resumed_job(directory, *pair) for pair in RESUMED]
    jobs.append(curve_job(directory))
    jobs += [attention_job(directory, layout, dtype) for layout in layouts for dtype in TOLERANCES]
    launch(jobs, directory, deepspeed_ranks=2)
    return jobs_of


def curve_job(directory: Path) -> Job:
    values = {**VALUES, "steps": CURVE_STEPS, "save_every": 0, "evaluate_every": CURVE_STEPS}
    return Job(Layout(context=2), 2, directory / "curve", values)


def attention_job(directory: Path, layout: Layout, dtype: str) -> Job:
    values = {**VALUES, "model": {**VALUES["model"], "dtype": dtype}}
    return Job(layout, 1, directory / f"{layout}-{dtype}-layer", values, is_attention=True)


def resumed_job(directory: Path, first: Run, then: Run) -> Job:
    """What goes on from the middle checkpoint, as if the first run had been killed after it."""
    (old, old_stage), (new, new_stage) = first, then
    source = directory / f"{old}-zero{old_stage}" / f"iter_{RESUMED_AT:07d}"
    output = directory / f"{old}-zero{old_stage}-to-{new}-zero{new_stage}"
    return Job(new, new_stage, output, VALUES, source)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("layout", EACH_LAYOUT)
def test_attention_over_ranks_is_a_single_processs(
    layout: Layout, dtype: str, trained: Trained, directory: Path
) -> None:
    # Given an attention layer over packed documents, its rows, tokens and heads shared by the ranks
    trained(layout)
    job = attention_job(directory, layout, dtype)
    model = TrainConfig.model_validate(job.as_json()["config"]).model
    # Then what comes out, and every gradient, is that of transformers' layer in float64
    found = found_by_ranks(job.output, model, math.prod(layout), layout.tensor)
    for name, exact in by_transformers(job.output, model, layout.tensor).items():
        assert float((found[name] - exact).norm() / exact.norm()) <= TOLERANCES[dtype], name


@pytest.mark.parametrize("layout", EACH_LAYOUT)
def test_losses_are_plain_torchs(layout: Layout, trained: Trained) -> None:
    # Given runs of every ZeRO stage, and plain torch from the same weights with the same batches
    jobs = trained(layout)
    weights = whole_weights(jobs[0].output, layout.tensor)
    plain = PlainRun(weights, REFERENCE, passkey_steps(REFERENCE))
    # Then the reference clips some steps and not all, and every run has its losses
    assert min(plain.gradient_norms) < REFERENCE.optimizer.gradient_clipping < max(plain.gradient_norms)
    assert plain.losses[-1] < plain.losses[0] - 1
    for job in jobs:
        assert job.seen()["losses"] == pytest.approx(plain.losses, rel=1e-5), f"ZeRO-{job.zero_stage}"
        # And its gradients' norms (ZeRO-0 tells none)
        if job.zero_stage:
            assert [line["gradient_norm"] for line in job.log()] == pytest.approx(plain.gradient_norms, rel=1e-5)


def test_a_loss_curve_of_many_steps_is_plain_torchs(trained: Trained, directory: Path) -> None:
    trained(Layout(context=2))
    job = curve_job(directory)
    config = TrainConfig.model_validate(job.values)
    plain = PlainRun(whole_weights(job.output, 1), config, passkey_steps(config))
    assert len(plain.losses) == CURVE_STEPS
    assert job.seen()["losses"] == pytest.approx(plain.losses, abs=1e-4)


def test_one_seed_draws_the_same_weights_on_every_layout(trained: Trained, layouts: list[Layout]) -> None:
    one = whole_weights(trained(Layout())[0].output, 1)
    for layout in layouts:
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
        # And TensorBoard shows what it says
        for name, points in board_of(job.output).items():
            assert points == [(line["step"], pytest.approx(line[name])) for line in job.log() if name in line]
        assert {"loss", "recall", "mfu"} <= board_of(job.output).keys()


@pytest.mark.parametrize("layout", EACH_LAYOUT)
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
    script = Path(sys.modules[free_port.__module__].__file__ or "").with_name("train.py")
    # Given what the launcher tells the only rank of a job
    env = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [sys.executable, str(script), "--config", str(config), "--output", str(tmp_path / "out"), "--resume"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2
    assert "distkv train: nothing to resume from" in done.stderr
