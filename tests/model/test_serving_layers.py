"""Serving walks Megatron's layers without its forward: the same bits in bf16, where a rounding too many would show."""

from pathlib import Path

import pytest

from megatron_distkv.model import GPT, build_gpt, find_checkpoint, init_tensor_parallel, load_weights
from tests.model.against_hf import largest_difference, packed_logits, random_texts
from tests.model.families import FAMILIES, save_family


@pytest.mark.parametrize("name", list(FAMILIES))
def test_layers_walked_and_by_megatrons_forward_give_the_same_bits(name: str, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(save_family(name, tmp_path / name))
    model = checkpoint.model.model_copy(update={"dtype": "bf16"})
    parallel = init_tensor_parallel(1)
    module = build_gpt(model, parallel)
    load_weights(module, checkpoint, model)
    texts = random_texts(model)
    direct, megatrons = (
        packed_logits(GPT(module, model, kind), model, parallel, texts) for kind in ("direct", "megatron")
    )
    assert max(float(logits.abs().max()) for logits in megatrons) > 1
    assert largest_difference(direct, megatrons) == 0


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
