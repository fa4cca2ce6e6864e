"""The reference of an attention layer: transformers' in float64 on one process; and what the ranks have written."""

import itertools
from pathlib import Path

import torch

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.model.gpt import TORCH_DTYPES
from tests.training.attention_layer import NUM_ROWS, NUM_TOKENS, STARTS, given
from tests.training.plain_llama import Weights, llama_layer, plain_llama, whole_weights


def found_by_ranks(output: Path, model: ModelConfig, num_ranks: int, tensor_parallel: int) -> Weights:
    """What all ranks have written, put together: out, d_x, and the gradients of transformers' weights."""
    shape = (NUM_TOKENS, NUM_ROWS, model.hidden_size)
    found = {name: torch.full(shape, float("nan"), dtype=torch.float64) for name in ("out", "d_x")}
    for rank in range(num_ranks):
        part = torch.load(output / f"out-{rank}.pt")
        for name, whole in found.items():
            whole[part["tokens"][:, None], part["rows"]] = part[name].double()
    return found | _of_layer(whole_weights(output, tensor_parallel, "gradients"), model)


def by_transformers(output: Path, model: ModelConfig, tensor_parallel: int) -> Weights:
    """The same in float64 from the same weights, every document by itself."""
    llama = plain_llama(whole_weights(output, tensor_parallel), model).double()
    layer = llama.model.layers[0].self_attn
    x, d_out = (each.double() for each in given(model.hidden_size, TORCH_DTYPES[model.dtype]))
    x.requires_grad_()
    outs = []
    for start, stop in itertools.pairwise((*STARTS, NUM_TOKENS)):
        document = x[start:stop].transpose(0, 1)
        positions = torch.arange(stop - start)[None]
        out, _weights = layer(document, llama.model.rotary_emb(document, positions), attention_mask=None)
        outs.append(out.transpose(0, 1))
    whole = torch.cat(outs)
    whole.backward(d_out)
    assert x.grad is not None
    gradients = {f"self_attn.{name}": p.grad for name, p in layer.named_parameters()}
    return {"out": whole.detach(), "d_x": x.grad, **gradients}


def _of_layer(gradients: Weights, model: ModelConfig) -> Weights:
    prefix = "decoder.layers.0."
    mine = {name.removeprefix(prefix): x.double() for name, x in gradients.items() if name.startswith(prefix)}
    return {name: x for name, x in llama_layer(mine, model).items() if name.startswith("self_attn.")}
