"""Megatron-LM layouts made by hand, from Hugging Face tensors and the layout's definition alone."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.weights import find_checkpoint
from tests.model.families import save_family
from tests.model.tensors import assert_same_bits, safetensors, whole_tensors

HEADS, KV_HEADS, DIM, FFN, LAYERS = 4, 2, 16, 96, 2
ARGS: dict[str, Any] = {
    "num_layers": LAYERS, "hidden_size": 64, "ffn_hidden_size": FFN, "num_attention_heads": HEADS,
    "group_query_attention": True, "num_query_groups": KV_HEADS, "kv_channels": DIM, "padded_vocab_size": 256,
    "vocab_size": 131, "position_embedding_type": "rope", "rotary_base": 500, "rotary_percent": 1.0,
    "norm_epsilon": 1e-5, "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "add_qkv_bias": True,
    "untie_embeddings_and_output_weights": True, "max_position_embeddings": 2048, "bf16": False,
    "eos_token_ids": [2],
}  # fmt: skip


def qkv_rows(hf: dict[str, torch.Tensor], layer: int, kind: str, kv_heads: range) -> torch.Tensor:
    """Row by row, as Megatron's documentation of `linear_qkv` says: per group its queries, its key, its value."""
    rows = []
    for group in kv_heads:
        for head in range(group * 2, group * 2 + 2):
            rows += [hf[f"model.layers.{layer}.self_attn.q_proj.{kind}"][head * DIM + i] for i in range(DIM)]
        for name in ("k", "v"):
            rows += [hf[f"model.layers.{layer}.self_attn.{name}_proj.{kind}"][group * DIM + i] for i in range(DIM)]
    return torch.stack(rows)


def layer_state(hf: dict[str, torch.Tensor], layer: int, rank: int, tp: int, names: str) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{layer}."
    groups = range(rank * KV_HEADS // tp, (rank + 1) * KV_HEADS // tp)
    ffn = slice(rank * FFN // tp, (rank + 1) * FFN // tp)
    columns = slice(rank * HEADS * DIM // tp, (rank + 1) * HEADS * DIM // tp)
    gate, up = (hf[f"{prefix}mlp.{name}_proj.weight"][ffn] for name in ("gate", "up"))
    qkv, proj, fc1, fc2, norm1, norm2 = NAMES[names]
    return {
        norm1: hf[prefix + "input_layernorm.weight"],
        f"{qkv}.weight": qkv_rows(hf, layer, "weight", groups),
        f"{qkv}.bias": qkv_rows(hf, layer, "bias", groups),
        proj: hf[prefix + "self_attn.o_proj.weight"][:, columns].clone(),
        norm2: hf[prefix + "post_attention_layernorm.weight"],
        fc1: torch.cat([gate, up]),
        fc2: hf[prefix + "mlp.down_proj.weight"][:, ffn].clone(),
    }


NAMES = {
    "te": ("self_attention.linear_qkv", "self_attention.linear_proj.weight", "mlp.linear_fc1.weight",
           "mlp.linear_fc2.weight", "self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"),
    "classic": ("self_attention.query_key_value", "self_attention.dense.weight", "mlp.dense_h_to_4h.weight",
                "mlp.dense_4h_to_h.weight", "input_norm.weight", "post_attention_norm.weight"),
}  # fmt: skip


def padded_rows(tensor: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    """Megatron-LM pads the vocabulary to a multiple of 128 per rank, with anything."""
    padded = torch.cat([tensor, torch.full((256 - len(tensor), 64), 7.0)])
    return padded.chunk(tp)[rank].clone()


def save_by_hand(folder: Path, hf: dict[str, torch.Tensor], *, tp: int, pp: int, names: str, **args: Any) -> Path:
    (folder / "iter_0000040").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("40")
    for rank in range(tp):
        for stage in range(pp):
            layers: dict[str, torch.Tensor] = {}
            for local, layer in enumerate(range(stage * LAYERS // pp, (stage + 1) * LAYERS // pp)):
                layers.update({f"layers.{local}.{k}": v for k, v in layer_state(hf, layer, rank, tp, names).items()})
            is_first, is_last = stage == 0, stage == pp - 1
            model = (classic if names == "classic" else core)(hf, layers, rank, tp, is_first, is_last)
            namespace = argparse.Namespace(
                **{**ARGS, "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, **args}
            )
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
            (folder / "iter_0000040" / name).mkdir()
            state = {"args": namespace, "checkpoint_version": 3.0, "iteration": 40, "model": model,
                     "optimizer": {"step": 40}, "rng_state": [{"np_rng_state": (1, 2)}]}  # fmt: skip
            torch.save(state, folder / "iter_0000040" / name / "model_optim_rng.pt")
    return folder


def core(hf: dict[str, torch.Tensor], layers: Any, rank: int, tp: int, is_first: bool, is_last: bool) -> dict[str, Any]:
    state: dict[str, Any] = {f"decoder.{name}": tensor for name, tensor in layers.items()}
    state["decoder.layers.0.self_attention.linear_proj._extra_state"] = None  # a key that Megatron writes
    if is_first:
        state["embedding.word_embeddings.weight"] = padded_rows(hf["model.embed_tokens.weight"], rank, tp)
    if is_last:
        state["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        state["output_layer.weight"] = padded_rows(hf["lm_head.weight"], rank, tp)
    return state


def classic(
    hf: dict[str, torch.Tensor], layers: Any, rank: int, tp: int, is_first: bool, is_last: bool
) -> dict[str, Any]:
    model: dict[str, Any] = {"encoder": dict(layers)}
    if is_first:
        model["embedding"] = {"word_embeddings": {"weight": padded_rows(hf["model.embed_tokens.weight"], rank, tp)}}
    if is_last:
        model["encoder"]["final_norm.weight"] = hf["model.norm.weight"]
        model["output_layer"] = {"weight": padded_rows(hf["lm_head.weight"], rank, tp)}
    return {"language_model": model}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("qwen2", tmp_path_factory.mktemp("legacy") / "hf")


@pytest.mark.parametrize("names", ["te", "classic"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_megatron_lm_layout_is_read_whole(names: str, tp: int, pp: int, hf: Path, tmp_path: Path) -> None:
    folder = save_by_hand(tmp_path / "megatron", safetensors(hf), tp=tp, pp=pp, names=names)
    found = find_checkpoint(folder)
    assert str(found).endswith(f"iter_0000040 (qwen2, TP {tp}, PP {pp}, step 40)")
    assert found.model == find_checkpoint(hf).model
    assert_same_bits(whole_tensors(hf), whole_tensors(folder))


@pytest.mark.parametrize(
    ("frequency", "windows"), [(None, [13, 13]), (2, [13, None]), ([0, 1], [None, 13]), ([0, 0], [None, None])]
)
def test_megatrons_sliding_windows_are_those_of_its_layers(
    frequency: Any, windows: list[int | None], hf: Path, tmp_path: Path
) -> None:
    """window_size counts the tokens before the own one; window_attn_skip_freq says which layers have it."""
    args = {"window_size": (12, 0), "window_attn_skip_freq": frequency}
    folder = save_by_hand(tmp_path / "a", safetensors(hf), tp=1, pp=1, names="te", **args)
    model = find_checkpoint(folder).model
    assert [model.window_of(layer) for layer in range(LAYERS)] == windows


def test_missing_ranks_stages_and_what_we_lack_are_one_sentence(hf: Path, tmp_path: Path) -> None:
    tensors = safetensors(hf)
    folder = save_by_hand(tmp_path / "a", tensors, tp=2, pp=2, names="te")
    (folder / "iter_0000040" / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointError, match="mp_rank_01_001 is missing"):
        find_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"mp_rank_00/.*moe_layer_freq=2; only 1 is supported"):
        find_checkpoint(save_by_hand(tmp_path / "b", tensors, tp=1, pp=1, names="te", moe_layer_freq=2))
    with pytest.raises(CheckpointError, match="position_embedding_type 'learned_absolute'"):
        find_checkpoint(
            save_by_hand(tmp_path / "c", tensors, tp=1, pp=1, names="te", position_embedding_type="learned_absolute")
        )


def test_a_tensor_of_another_shape_is_named_with_its_file(hf: Path, tmp_path: Path) -> None:
    folder = save_by_hand(tmp_path / "a", safetensors(hf), tp=2, pp=1, names="te", ffn_hidden_size=48)
    with pytest.raises(
        CheckpointError, match=r"mp_rank_00/model_optim_rng.pt: the tensor decoder.layers.0.mlp.linear_fc1.weight has"
    ):
        whole_tensors(folder)
