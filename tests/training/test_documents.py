"""Training on packed documents: sharded, accumulated, recomputed, in bf16; against transformers, one by one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_distkv.config.train import TrainConfig
from megatron_distkv.model import find_checkpoint, init_tensor_parallel
from megatron_distkv.training.corpus import Corpus, prepare_corpus
from megatron_distkv.training.packing import PackedDocuments
from megatron_distkv.training.passkey import load_prose
from tests.training.jobs import Job, Layout, launch
from tests.training.plain_llama import PlainRun, document_steps, whole_weights

STEPS, RESUMED_AT = 12, 6
# (layout, ZeRO stage, what else)
RUNS: dict[str, tuple[Layout, int, dict[str, Any]]] = {
    "context": (Layout(context=2), 2, {"recompute": "layers"}),
    "data": (Layout(data=2), 3, {"recompute": "layers"}),
    "tensor": (Layout(tensor=2), 3, {}),
    "bf16-context": (Layout(context=2), 1, {"recompute": "layers"}),
    "bf16-data": (Layout(data=2), 2, {}),
}
# bf16 goes on with its fp32 weights: at the same layout exactly, and through another stage and layout
RESUMED = {"bf16-same": ("bf16-context", "bf16-context"), "bf16-other": ("bf16-context", "bf16-data")}
MODEL = {
    "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_kv_heads": 2,
    "head_dim": 8, "vocab_size": 272,
}  # fmt: skip


def values(name: str, text: Path) -> dict[str, Any]:
    return {
        "model": {**MODEL, "dtype": "bf16" if name.startswith("bf16") else "fp32"},
        # 45 tokens are no multiple of what a context group cuts a sequence into
        "corpus": {"files": [str(text)], "sequence_length": 45, "sequences_per_step": 4, "held_out_share": 0.1,
                   "evaluation_sequences": 3},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 5, "gradient_clipping": 2.0},
        "init_std": 0.1, "steps": STEPS, "save_every": RESUMED_AT, "evaluate_every": RESUMED_AT, "peak_tflops": 1.0,
        **RUNS[name][2],
    }  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents shorter and longer than a sequence."""
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    prose, at = load_prose(None).training.tobytes().decode(), 0
    with path.open("w") as file:
        for number in range(120):
            length = 3 + 37 * number % 100
            file.write(json.dumps({"text": prose[at : at + length]}) + "\n")
            at += length
    return path


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    directory = tmp_path_factory.mktemp("runs")
    jobs = {name: Job(layout, stage, directory / name, values(name, text)) for name, (layout, stage, _) in RUNS.items()}
    for name, (first, then) in RESUMED.items():
        source = directory / first / f"iter_{RESUMED_AT:07d}"
        jobs[name] = Job(*RUNS[then][:2], directory / name, values(then, text), source)
    launch(list(jobs.values()), directory)
    return jobs


@pytest.fixture(scope="module")
def plain(trained: dict[str, Job], text: Path, tmp_path_factory: pytest.TempPathFactory) -> PlainRun:
    config = TrainConfig.model_validate(values("context", text))
    return PlainRun(whole_weights(trained["context"].output, 1), config, document_steps(config, packed(config)[0]))


def packed(config: TrainConfig) -> tuple[PackedDocuments, PackedDocuments]:
    """(to train on, held out)"""
    assert config.corpus is not None
    folder = config.corpus.files[0].with_name("tokens")
    corpus = Corpus(prepare_corpus(config.corpus, config.model.vocab_size, folder).prefixes)
    training, held_out = (
        PackedDocuments(corpus, spans, config.corpus, config.seed)
        for spans in corpus.split(config.corpus.held_out_share)
    )
    return training, held_out


@pytest.mark.parametrize("name", ["context", "data", "tensor"])
def test_losses_are_those_of_documents_one_by_one(name: str, trained: dict[str, Job], plain: PlainRun) -> None:
    assert plain.losses[-1] < plain.losses[0] - 0.5
    assert trained[name].seen()["losses"] == pytest.approx(plain.losses, abs=1e-4)
    norms = [line["gradient_norm"] for line in trained[name].log()]
    assert norms == pytest.approx(plain.gradient_norms, rel=1e-3)


def test_the_held_out_loss_is_the_trained_models(trained: dict[str, Job], plain: PlainRun, text: Path) -> None:
    # Given what plain torch has trained, and held-out documents
    config = TrainConfig.model_validate(values("context", text))
    held_out = packed(config)[1]
    assert held_out.num_whole_sequences > 3
    batches = [held_out.sequence(number, 1) for number in range(3)]

    class OnlyThese:
        def micro_batches(self, *_: int) -> Any:
            return batches

    with torch.no_grad():
        expected = float(document_steps(config, OnlyThese())(plain.llama, 0))  # type: ignore[arg-type]
    # Then each run measured it at the end, and half-way
    for name in ("context", "data", "tensor"):
        log = {line["step"]: line for line in trained[name].log()}
        assert log[STEPS]["held_out_loss"] == pytest.approx(expected, abs=1e-4)
        assert [step for step, line in log.items() if "held_out_loss" in line] == [RESUMED_AT, STEPS]


@pytest.mark.parametrize("name", ["bf16-context", "bf16-data"])
def test_bf16_learns_the_same(name: str, trained: dict[str, Job], plain: PlainRun) -> None:
    assert trained[name].seen()["losses"] == pytest.approx(plain.losses, rel=1e-2)


def test_bf16_weights_have_fp32_ones_behind_them(trained: dict[str, Job]) -> None:
    output = trained["bf16-context"].output
    init_tensor_parallel(1)
    state = dist_checkpointing.load_plain_tensors(str(find_checkpoint(output).directory))
    masters = {key.removeprefix("optimizer.state.fp32_param."): x for key, x in state.items() if "fp32_param" in key}
    assert masters
    for key, master in masters.items():
        # Then what is served is what was trained, rounded
        assert (master.dtype, state[key].dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(master.bfloat16(), state[key])
    assert any(not torch.equal(master, state[key].float()) for key, master in masters.items())


def test_bf16_goes_on_from_its_fp32_weights(trained: dict[str, Job]) -> None:
    whole = trained["bf16-context"].seen()["losses"][RESUMED_AT:]
    same, other = trained["bf16-same"].seen(), trained["bf16-other"].seen()
    assert (same["first_step"], same["losses"]) == (RESUMED_AT, whole)
    assert other["losses"] == pytest.approx(whole, rel=1e-2)
