"""Every family, with random weights, gives the logits of transformers on one rank and on two."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megatron_distkv.errors import CheckpointError, ConfigError
from megatron_distkv.model import build_gpt, find_checkpoint, init_tensor_parallel, load_weights
from megatron_distkv.model.families import family_of, options_of
from megatron_distkv.model.families.gemma2 import GemmaOptions
from megatron_distkv.model.weights import CheckpointFormat, open_source, write_checkpoint
from megatron_distkv.model.weights.megatron_args import read_args, write_args
from tests.model.against_hf import Errors, compare
from tests.model.families import FAMILIES, save_family

SCRIPT, FORK_RANKS = (Path(__file__).with_name(name) for name in ("run_families.py", "fork_ranks.py"))
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        save_family(name, folder / name, shard="60KB")
    return folder


def run_ranks(folder: Path, references: Path, tp: int, out: Path, *, script: Path = SCRIPT) -> dict[str, Errors]:
    command = [sys.executable, str(FORK_RANKS), str(tp), str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": os.getcwd()}
    arguments = [str(folder), str(references), str(tp), str(out)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: Errors(*errors) for name, errors in json.loads(out.read_text()).items()}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_one_rank_gives_the_logits_of_transformers(name: str, references: Path) -> None:
    checkpoint = find_checkpoint(references / name)
    parallel = init_tensor_parallel(1)
    module = build_gpt(checkpoint.model, parallel)
    load_weights(module, checkpoint, checkpoint.model)
    errors = compare(module, checkpoint.model, parallel, references / name)
    assert errors.largest_logit > 1
    assert max(errors.dense, errors.packed) < TOLERANCE
    assert errors.direct == 0


def test_two_ranks_give_the_logits_of_transformers(references: Path, tmp_path: Path) -> None:
    found = run_ranks(references, references, 2, tmp_path / "out")
    assert found.keys() == FAMILIES.keys()
    for name, errors in found.items():
        assert max(errors.dense, errors.packed) < TOLERANCE, name
        assert errors.direct == 0, name


def test_what_each_family_is_read_as(references: Path) -> None:
    models = {name: find_checkpoint(references / name).model for name in FAMILIES}
    assert {name: family_of(model).name for name, model in models.items()} == {
        "llama": "llama", "llama3": "llama", "llama3-tied": "llama", "llama-linear": "llama", "llama-yarn": "llama",
        "mistral": "llama", "mistral-window": "mistral", "qwen2": "qwen2", "qwen2-tied": "qwen2",
        "qwen2-yarn": "qwen2", "qwen2-window": "qwen2", "qwen3": "qwen3", "qwen3-yarn": "qwen3",
        "gemma2": "gemma2", "gemma3": "gemma3_text", "mixtral": "mixtral", "qwen3-moe": "qwen3_moe",
        "qwen3-moe-shares": "qwen3_moe",
    }  # fmt: skip
    # YaRN makes contexts longer than max_position_embeddings says.
    assert models["qwen2-yarn"].max_context_tokens == 128
    # Windows are those of the config's layers.
    assert [models["mistral-window"].window_of(layer) for layer in range(2)] == [11, 11]
    assert [models["qwen2-window"].window_of(layer) for layer in range(2)] == [None, 9]
    assert [models["gemma2"].window_of(layer) for layer in range(2)] == [10, None]
    assert [models["gemma3"].window_of(layer) for layer in range(3)] == [10, None, 10]
    assert models["mistral"].max_context_tokens == models["mistral-window"].max_context_tokens == 2048


def test_a_gemma_3_as_google_published_it_is_read(references: Path, tmp_path: Path) -> None:
    """With keys that transformers 5 no longer writes, and without those whose defaults it means."""
    config = json.loads((references / "gemma3" / "config.json").read_text())
    for key in ("layer_types", "rope_parameters", "tie_word_embeddings", "query_pre_attn_scalar"):
        config.pop(key, None)
    old = {"num_hidden_layers": 7, "sliding_window": 512, "sliding_window_pattern": 6, "rope_theta": 1e6,
           "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({**config, **old}))
    model = find_checkpoint(tmp_path).model
    assert [model.window_of(layer) for layer in range(7)] == [512] * 5 + [None, 512]
    assert (model.rotary_base, model.rope_scaling and model.rope_scaling.factor) == (1e6, 8.0)
    assert options_of(model, GemmaOptions) == GemmaOptions(score_scale_dims=256, window_rotary_base=1e4)
    assert model.tie_embeddings


def changed(references: Path, name: str, target: Path, **changes: Any) -> Path:
    target.mkdir()
    config = json.loads((references / name / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "is not supported yet: it needs an image encoder"),
        ({"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu"}, "hidden_activation 'gelu' is not"),
        ({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}, "tokens see the past alone"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "it needs shared experts beside"),
        ({"architectures": None}, r"architecture \(none\) is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "RoPE scaling 'longrope'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope_scaling.factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types has 'chunked_attention'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised by 'fp8' are not read"),
        (
            {"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 2},
            "dense layers among mixture-of-experts layers",
        ),
        (
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 2, "num_experts_per_tok": 3},
            "experts_per_token",
        ),
    ],
)
def test_what_we_lack_is_one_sentence(references: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=sentence) as caught:
        find_checkpoint(changed(references, "llama", tmp_path / "changed", **changes))
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_told_the_known_ones(references: Path, tmp_path: Path) -> None:
    changes = {"architectures": ["NobodysForCausalLM"]}
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(changed(references, "llama", tmp_path / "changed", **changes))
    sentence = str(caught.value)
    assert "architecture NobodysForCausalLM is not supported yet; known: Gemma2ForCausalLM, Gemma3For" in sentence
    for config in FAMILIES.values():
        assert config.architectures is None or config.architectures[0] in sentence
    assert "\n" not in sentence


def test_an_unknown_family_is_told_the_known_ones(references: Path) -> None:
    # In a configuration to train, and in what a newer version wrote
    model = find_checkpoint(references / "llama").model
    sentence = "the family 'nobody' is not known; known: gemma2, gemma3_text, llama, mistral, mixtral, qwen2, "
    with pytest.raises(ConfigError, match=f"^model.family: {sentence}"):
        family_of(model.model_copy(update={"family": "nobody"}))
    with pytest.raises(ConfigError, match=f"^there: {sentence}"):
        read_args({**vars(write_args(model)), "distkv_family": "nobody"}, "there")


def test_layers_that_are_megatrons_tell_exactly_one_family(references: Path) -> None:
    """As they always did: experts before norms on queries and keys, these before biases, these before windows."""
    llama, mixtral = (find_checkpoint(references / name).model for name in ("llama", "mixtral"))
    for mixture, norms, biases, window in product((None, mixtral.mixture), (False, True), (False, True), (None, 7)):
        fields = {"mixture": mixture, "qk_layernorm": norms, "qkv_bias": biases, "sliding_window": window}
        if mixture is not None:
            name = "qwen3_moe" if norms else "mixtral"
        else:
            name = "qwen3" if norms else "qwen2" if biases else "llama" if window is None else "mistral"
        assert family_of(llama.model_copy(update=fields)).name == name, fields


def test_a_name_beside_layers_of_another_family_is_refused(references: Path) -> None:
    model = find_checkpoint(references / "llama").model.model_copy(update={"family": "qwen2"})
    sentence = r"model\.family is 'qwen2', but the model's other keys are those of 'llama'"
    with pytest.raises(ConfigError, match=sentence):
        family_of(model)
    assert family_of(model.model_copy(update={"qkv_bias": True})).name == "qwen2"


def test_options_without_a_family_that_has_them_are_refused(references: Path) -> None:
    model = find_checkpoint(references / "llama").model
    with pytest.raises(ConfigError, match=r"^model.family_options: unknown key 'score_soft_cap'"):
        family_of(model.model_copy(update={"family_options": {"score_soft_cap": 1.0}}))


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_gemmas_from_before_families_were_named_are_read(name: str, references: Path) -> None:
    model = find_checkpoint(references / name).model
    args = vars(write_args(model))
    args["distkv_gemma"] = args.pop("distkv_family_options")
    del args["distkv_family"]
    assert read_args(args, "there") == model


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("qwen3", {"qkv_bias": True}, "a qwen3 config.json has no place for this model's qkv_bias"),
        ("mixtral", {"qkv_bias": True}, "a mixtral config.json has no place for this model's qkv_bias"),
        ("mixtral", {"windowed_layers": (True, False)}, "a mixtral .* sliding windows"),
        ("mistral-window", {"windowed_layers": (True, False)}, "a mistral .* sliding windows"),
        ("llama", {"rotary_percent": 0.5}, "a llama .* rotary_percent"),
        ("gemma2", {"family_options": {"score_scale_dims": 24, "window_rotary_base": 2.0}}, "a gemma2 .* family_opt"),
    ],
)
def test_what_a_config_json_cannot_say_is_refused_before_anything_is_written(
    name: str, changes: dict[str, Any], sentence: str, references: Path, tmp_path: Path
) -> None:
    checkpoint = find_checkpoint(references / name)
    model = checkpoint.model.model_copy(update=changes)
    with pytest.raises(CheckpointError, match=sentence):
        write_checkpoint(open_source(checkpoint, checkpoint.model), model, CheckpointFormat.HF, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_weights_that_do_not_sum_to_one_are_no_mixtrals(references: Path, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(references / "mixtral")
    assert checkpoint.model.mixture is not None
    mixture = checkpoint.model.mixture.model_copy(update={"normalize_weights": False})
    model = checkpoint.model.model_copy(update={"mixture": mixture})
    with pytest.raises(CheckpointError, match=r"a mixtral config.json has no place for this model's mixture"):
        write_checkpoint(open_source(checkpoint, model), model, CheckpointFormat.HF, tmp_path / "hf")
