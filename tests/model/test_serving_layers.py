"""Serving walks Megatron's layers without its forward: the same numbers, rounded at the same places."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_distkv.config.instance import Layers
from megatron_distkv.config.model import ModelConfig
from megatron_distkv.model import GPT, build_gpt, find_checkpoint, init_tensor_parallel, load_weights
from megatron_distkv.ops import use_backend
from tests.model.against_hf import largest_difference, packed_logits, random_texts
from tests.model.families import FAMILIES, save_family


@pytest.fixture
def torchs_products() -> Iterator[None]:
    use_backend("reference")
    yield
    use_backend("auto")


class Model:
    """A family's random weights, in a dtype."""

    def __init__(self, folder: Path, dtype: str) -> None:
        checkpoint = find_checkpoint(folder)
        self.config: ModelConfig = checkpoint.model.model_copy(update={"dtype": dtype})
        self._parallel = init_tensor_parallel(1)
        self._module = build_gpt(self.config, self._parallel)
        load_weights(self._module, checkpoint, self.config)

    def logits(self, layers: Layers) -> list[torch.Tensor]:
        gpt = GPT(self._module, self.config, layers)
        return packed_logits(gpt, self.config, self._parallel, random_texts(self.config))


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.usefixtures("torchs_products")
def test_layers_walked_and_by_megatrons_forward_give_the_same_bits(name: str, tmp_path: Path) -> None:
    """In bf16, where a rounding too many would show; with products of our own they could differ in the last one."""
    model = Model(save_family(name, tmp_path / name), "bf16")
    direct, megatrons = model.logits("direct"), model.logits("megatron")
    assert max(float(logits.abs().max()) for logits in megatrons) > 1
    assert largest_difference(direct, megatrons) == 0


@pytest.mark.parametrize("name", list(FAMILIES))
def test_own_products_are_as_near_to_fp32_as_torchs(name: str, tmp_path: Path) -> None:
    folder = save_family(name, tmp_path / name)
    model, exact = Model(folder, "bf16"), Model(folder, "fp32").logits("megatron")
    direct, megatrons = model.logits("direct"), model.logits("megatron")
    assert 0 < largest_difference(direct, exact) < 1.5 * largest_difference(megatrons, exact)


def test_layers_with_hooks_are_left_to_megatron(tmp_path: Path) -> None:
    # Given a model in whose layers somebody listens
    checkpoint = find_checkpoint(save_family("llama", tmp_path / "llama"))
    parallel = init_tensor_parallel(1)
    module = build_gpt(checkpoint.model, parallel)
    load_weights(module, checkpoint, checkpoint.model)
    heard: list[int] = []
    module.decoder.layers[1].mlp.register_forward_hook(lambda *_: heard.append(1))
    # When it serves, then what listens hears
    texts = random_texts(checkpoint.model)
    direct = packed_logits(GPT(module, checkpoint.model), checkpoint.model, parallel, texts)
    assert heard
    megatrons = packed_logits(GPT(module, checkpoint.model, "megatron"), checkpoint.model, parallel, texts)
    assert largest_difference(direct, megatrons) == 0
