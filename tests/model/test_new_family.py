"""A family that nobody has heard of, all in this file: registered, it is read, computed, split and written like any."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import RowParallelLinear
from pydantic import Field
from transformers import AutoConfig, AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM
from transformers.models.granite.modeling_granite import GraniteAttention, GraniteRMSNorm

from megatron_distkv.config.base import FrozenConfig, parse_config
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import CheckpointError, ConfigError
from megatron_distkv.model import build_gpt, find_checkpoint, init_tensor_parallel, load_weights
from megatron_distkv.model.config_json import read_shared, write_shared
from megatron_distkv.model.families import Family, Parts, TensorNames, options_of, register
from megatron_distkv.model.families.llama import NAMES as LLAMA_NAMES
from megatron_distkv.model.megatron_gpt import LocalLayer, MegatronGPT
from megatron_distkv.model.parameter import Parameter, Split
from megatron_distkv.model.weights import CheckpointFormat, open_source, write_checkpoint
from tests.model.against_hf import compare
from tests.model.tensors import assert_same_bits, safetensors
from tests.model.test_families import TOLERANCE, run_ranks

# What transformers would have of it: IBM's Granite, with a norm of its own behind attention.


class SlateConfig(GraniteConfig):  # type: ignore[misc]
    model_type = "slate"


class SlateAttention(GraniteAttention):  # type: ignore[misc]
    def __init__(self, config: SlateConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.out_norm = GraniteRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        hidden, weights = super().forward(*args, **kwargs)
        return self.out_norm(hidden), weights


class SlateForCausalLM(GraniteForCausalLM):  # type: ignore[misc]
    config_class = SlateConfig

    def __init__(self, config: SlateConfig) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.self_attn = SlateAttention(config, number)
        self.post_init()


AutoConfig.register("slate", SlateConfig)
AutoModelForCausalLM.register(SlateConfig, SlateForCausalLM)

# What a family's file holds.


class SlateOptions(FrozenConfig):
    """Config.json has the same keys."""

    embedding_multiplier: float = Field(gt=0)
    attention_multiplier: float = Field(gt=0)
    residual_multiplier: float = Field(gt=0)
    logits_scaling: float = Field(gt=0)


def read(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    options = {key: values[key] for key in SlateOptions.model_fields if key in values}
    return {**read_shared(values, path), "family_options": parse_config(SlateOptions, options, str(path)).model_dump()}


def write(model: ModelConfig) -> dict[str, Any]:
    return {**write_shared(model), **model.family_options}


NAMES: TensorNames = {
    **LLAMA_NAMES,
    "decoder.layers.*.self_attention.linear_proj.out_norm": ("model.layers.*.self_attn.out_norm",),
}


class Scaled(RowParallelLinear):  # type: ignore[misc]
    multiplier: float

    @classmethod
    def by(cls, multiplier: float) -> type:
        """Megatron's layer specs take classes."""
        return type(cls.__name__, (cls,), {"multiplier": multiplier})

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, Any]:
        output, bias = super().forward(input_)
        return self.normed(output) * self.multiplier, bias

    def normed(self, output: torch.Tensor) -> torch.Tensor:
        return output


class NormedScaled(Scaled):
    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.out_norm = torch.nn.RMSNorm(output_size, config.layernorm_epsilon)

    def normed(self, output: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.out_norm(output)
        return normed


def change_layer(layer: LocalLayer, model: ModelConfig, number: int) -> None:
    multiplier = options_of(model, SlateOptions).residual_multiplier
    layer.attention.linear_proj = NormedScaled.by(multiplier)
    layer.mlp.linear_fc2 = Scaled.by(multiplier)


def change_model(gpt: MegatronGPT, model: ModelConfig, dtype: torch.dtype) -> None:
    options = options_of(model, SlateOptions)
    gpt.embedding.register_forward_hook(lambda _, __, hidden: hidden * options.embedding_multiplier)
    gpt.output_layer.register_forward_hook(lambda _, __, out: (out[0] / options.logits_scaling, out[1]))


def parameters(model: ModelConfig, layer: list[Parameter]) -> list[Parameter]:
    [projection] = [x.name for x in layer if x.name.endswith("linear_proj.weight")]
    name = projection.removesuffix("weight") + "out_norm.weight"
    return [*layer, Parameter(name, (model.hidden_size,), Split.WHOLE)]


register(
    Family(
        name="slate",
        architecture="SlateForCausalLM",
        read=read,
        write=write,
        tensor_names=NAMES,
        options=SlateOptions,
        parts=Parts(
            settings=lambda model: {"softmax_scale": options_of(model, SlateOptions).attention_multiplier},
            change_layer=change_layer,
            change_model=change_model,
            parameters=parameters,
        ),
    )
)

# And its tests. `main` is what fork_ranks.py runs, once this file is imported and the family known.


def main() -> None:
    from tests.model import run_families

    run_families.main()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "rms_norm_eps": 1e-5,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "tie_word_embeddings": False,
    }  # fmt: skip
    options = {
        "embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.7, "logits_scaling": 0.5
    }  # fmt: skip
    model = SlateForCausalLM(SlateConfig(**sizes, **options))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if "norm" in path else noise * 0.15)
    directory = tmp_path_factory.mktemp("references") / "slate"
    model.save_pretrained(directory)
    return directory


def test_one_rank_gives_the_logits_of_transformers(reference: Path) -> None:
    checkpoint = find_checkpoint(reference)
    parallel = init_tensor_parallel(1)
    module = build_gpt(checkpoint.model, parallel)
    load_weights(module, checkpoint, checkpoint.model)
    errors = compare(module, checkpoint.model, parallel, reference)
    assert errors.largest_logit > 1
    assert max(errors.dense, errors.packed) < TOLERANCE


def test_two_ranks_give_the_logits_of_transformers(reference: Path, tmp_path: Path) -> None:
    found = run_ranks(reference.parent, reference.parent, 2, tmp_path / "out", script=Path(__file__))
    assert max(found["slate"].dense, found["slate"].packed) < TOLERANCE


def test_through_torch_dist_of_two_and_legacy_of_four_and_back_changes_no_bit(reference: Path, tmp_path: Path) -> None:
    # When it goes through both of Megatron's formats, and back
    path = reference
    for to, tp in (("torch_dist", 2), ("legacy", 4), ("hf", 1)):
        checkpoint = find_checkpoint(path)
        source = open_source(checkpoint, checkpoint.model)
        write_checkpoint(source, checkpoint.model, CheckpointFormat(to), tmp_path / to, tensor_parallel=tp)
        path = tmp_path / to
        # Then each says what it is
        assert "(slate" in str(find_checkpoint(path))
        assert find_checkpoint(path).model == find_checkpoint(reference).model
    # And tensors and logits are what they were
    assert_same_bits(safetensors(reference), safetensors(path))
    ids = torch.arange(60)[None] % 131
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(x).eval()(ids).logits for x in (reference, path))
    assert torch.equal(before, after)
    assert type(AutoModelForCausalLM.from_pretrained(path)) is SlateForCausalLM


def test_a_mistake_in_its_options_is_one_sentence(reference: Path) -> None:
    model = find_checkpoint(reference).model
    options = {**model.family_options, "logit_scaling": 1.0}
    with pytest.raises(ConfigError, match=r"^model.family_options: unknown key 'logit_scaling'; known keys here: "):
        build_gpt(model.model_copy(update={"family_options": options}), init_tensor_parallel(1))


def test_what_its_config_cannot_say_is_not_written(reference: Path, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(reference)
    model = checkpoint.model.model_copy(update={"sliding_window": 16})
    with pytest.raises(CheckpointError, match=r"^a slate config.json has no place for this model's sliding windows$"):
        write_checkpoint(open_source(checkpoint, model), model, CheckpointFormat.HF, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="slate"):
        register(Family("slate", "OtherForCausalLM", read_shared, write_shared, LLAMA_NAMES))
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        register(Family("other", "LlamaForCausalLM", read_shared, write_shared, LLAMA_NAMES))
