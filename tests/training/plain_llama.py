"""The reference: transformers' Llama with torch's AdamW on one process, from weights that Megatron drew."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.config.train import TrainConfig
from megatron_distkv.training.data import PasskeyData
from megatron_distkv.training.packing import PackedDocuments
from megatron_distkv.training.passkey import load_prose
from megatron_distkv.training.schedule import learning_rate

Weights = dict[str, torch.Tensor]
# Dimension along which tensor-parallel ranks hold parts; what is not named here is whole on every rank.
SPLIT_DIM = {"linear_qkv": 0, "linear_proj": 1, "linear_fc1": 0, "linear_fc2": 1, "word_embeddings": 0, "output": 0}


def whole_weights(output: Path, tensor_parallel: int, kind: str = "initial") -> Weights:
    """Megatron's names, tensors of all ranks together; linear_fc1 as [all gates; all ups]."""
    parts = [torch.load(output / f"{kind}-{rank}.pt") for rank in range(tensor_parallel)]
    return {name: _join(name, [part[name] for part in parts]) for name in parts[0]}


def _join(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    split = [dim for key, dim in SPLIT_DIM.items() if key in name]
    if not split:
        assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between ranks"
        return parts[0]
    if "linear_fc1" in name:
        return torch.cat([half for i in (0, 1) for half in [part.chunk(2)[i] for part in parts]])
    return torch.cat(parts, dim=split[0])


def plain_llama(weights: Weights, model: ModelConfig) -> LlamaForCausalLM:
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size, hidden_size=model.hidden_size, intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers, num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_kv_heads, head_dim=model.head_dim, rms_norm_eps=model.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base},
            tie_word_embeddings=model.tie_embeddings,
        )
    )  # fmt: skip
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": weights["output_layer.weight"],
    }
    for layer in range(model.num_layers):
        mine = {k.removeprefix(f"decoder.layers.{layer}."): v for k, v in weights.items() if f".layers.{layer}." in k}
        state.update({f"model.layers.{layer}.{k}": v for k, v in llama_layer(mine, model).items()})
    llama.load_state_dict(state)
    return llama


def llama_layer(mine: Weights, model: ModelConfig) -> Weights:
    group = model.num_attention_heads // model.num_kv_heads
    qkv = mine["self_attention.linear_qkv.weight"].view(model.num_kv_heads, group + 2, model.head_dim, -1)
    q, k, v = (part.reshape(-1, model.hidden_size) for part in qkv.split([group, 1, 1], dim=1))
    gate, up = mine["mlp.linear_fc1.weight"].chunk(2)
    return {
        "self_attn.q_proj.weight": q, "self_attn.k_proj.weight": k, "self_attn.v_proj.weight": v,
        "self_attn.o_proj.weight": mine["self_attention.linear_proj.weight"],
        "mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up, "mlp.down_proj.weight": mine["mlp.linear_fc2.weight"],
        "input_layernorm.weight": mine["input_layernorm.weight"],
        "post_attention_layernorm.weight": mine["pre_mlp_layernorm.weight"],
    }  # fmt: skip


def passkey_loss(nll_BT: torch.Tensor, is_answer_BT: torch.Tensor, prose_weight: float) -> torch.Tensor:
    """Mean over rows of (mean over answer digits + `prose_weight` * mean over the rest), row by row."""
    losses = []
    for nll, is_answer in zip(nll_BT, is_answer_BT == 1, strict=True):
        losses.append(nll[is_answer].mean() + prose_weight * nll[~is_answer].mean())
    return torch.stack(losses).mean()


# A step's loss with its graph, of the model and the step's number
StepLoss = Callable[[LlamaForCausalLM, int], torch.Tensor]


def passkey_steps(config: TrainConfig) -> StepLoss:
    assert config.data is not None
    prose_weight = config.data.prose_weight
    data = PasskeyData(config.data, load_prose(config.data.text).training, config.seed)

    def loss(llama: LlamaForCausalLM, step: int) -> torch.Tensor:
        batch = data.batch(step, 0, 1)
        assert batch.temperature == 1.0, "plain attention knows no temperature"
        return passkey_loss(_nll(llama, batch.inputs_BT, batch.labels_BT), batch.is_answer_BT, prose_weight)

    return loss


def document_steps(config: TrainConfig, data: PackedDocuments) -> StepLoss:
    """Every document, or part of one, by itself: the mean over all labels of the step."""

    def loss(llama: LlamaForCausalLM, step: int) -> torch.Tensor:
        nlls = []
        for inputs, labels, weights, starts, _ in data.micro_batches(step, 0, 1):
            lengths = [stop - start for start, stop in itertools.pairwise([*starts, inputs.shape[1]])]
            for ids, wanted, counts in zip(*(x.split(lengths, 1) for x in (inputs, labels, weights)), strict=True):
                nlls.append(_nll(llama, ids, wanted)[counts > 0])
        return torch.cat(nlls).mean()

    return loss


def _nll(llama: LlamaForCausalLM, inputs_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    logits = llama(inputs_BT).logits
    return torch.nn.functional.cross_entropy(logits.mT, labels_BT, reduction="none")


class PlainRun:
    """`losses`, and the gradient norms before clipping, step by step."""

    def __init__(self, weights: Weights, config: TrainConfig, step_loss: StepLoss) -> None:
        self.losses: list[float] = []
        self.gradient_norms: list[float] = []
        self.llama = plain_llama(weights, config.model)
        optimizer = _adamw(self.llama, config)
        for step in range(config.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.steps, config.optimizer)
            loss = step_loss(self.llama, step)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.llama.parameters(), config.optimizer.gradient_clipping)
            optimizer.step()
            self.losses.append(loss.item())
            self.gradient_norms.append(norm.item())
        assert all(math.isfinite(loss) for loss in self.losses)


def _adamw(llama: LlamaForCausalLM, config: TrainConfig) -> torch.optim.AdamW:
    decay = {"decayed": config.optimizer.weight_decay, "not": 0.0}
    groups: dict[str, list[torch.Tensor]] = {"decayed": [], "not": []}
    for name, parameter in llama.named_parameters():
        groups["not" if "norm" in name else "decayed"].append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[kind], "weight_decay": decay[kind]} for kind in groups],
        betas=(0.9, config.optimizer.beta2),
    )
