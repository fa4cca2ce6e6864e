"""Run by torchrun from test_gpt.py: this rank's GPT against a Hugging Face Llama, dense and packed; writes errors.

usage: run_llama.py CHECKPOINT TP OUT [save=DIR]
"""

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

warnings.filterwarnings("ignore")
import torch  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

from megatron_distkv.attention import ForwardContext, build_metadata, forward_context  # noqa: E402
from megatron_distkv.kvcache.rblock_pool import RBlockPool  # noqa: E402
from megatron_distkv.model import GPT, build_gpt, find_checkpoint, init_tensor_parallel, load_weights  # noqa: E402
from megatron_distkv.model.gpt import TORCH_DTYPES  # noqa: E402
from megatron_distkv.model.parallel import gather_vocabulary  # noqa: E402
from megatron_distkv.model.weights import torch_dist  # noqa: E402
from megatron_distkv.rblock import LocalSpan, Span  # noqa: E402

N = 8
# Requests as (tokens, scattered rBlocks); steps as (request, start, end): chunked prefill and decodes mixed.
LENGTHS = [37, 14, 50]
BLOCKS = [(9, 3, 14, 0, 7), (2, 11), (5, 1, 13, 4, 8, 6, 12)]
STEPS = [
    [(0, 0, 20), (1, 0, 12)],
    [(0, 20, 36), (1, 12, 13), (2, 0, 30)],
    [(0, 36, 37), (1, 13, 14), (2, 30, 48)],
    [(2, 48, 49)],
    [(2, 49, 50)],
]


@dataclass
class Slice:
    start: int
    end: int
    spans: list[Span]


def main() -> None:
    torch.set_num_threads(1)
    reference_path, tp, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    options = dict(x.split("=") for x in sys.argv[4:])
    checkpoint = find_checkpoint(Path(options.get("load", reference_path)))
    config = checkpoint.model
    parallel = init_tensor_parallel(tp)
    module = build_gpt(config, parallel)
    load_weights(module, checkpoint, config)
    if "save" in options:
        torch_dist.save(module, config, Path(options["save"]), iteration=7)
    dtype = TORCH_DTYPES[config.dtype]
    hf = LlamaForCausalLM.from_pretrained(reference_path, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, config.vocab_size, (n,), generator=generator) for n in LENGTHS]
    with torch.no_grad():
        expected = [hf(text[None]).logits[0].float() for text in texts]
        ids = torch.stack([text[:14] for text in texts])
        dense = gather_vocabulary(module(ids, None, None))[..., : config.vocab_size].float()
    dense_error = max(float((dense[i] - expected[i][:14]).abs().max()) for i in range(3))
    pool = RBlockPool(16, config.num_layers, config.num_kv_heads // tp, N, config.head_dim, dtype).tensor_BLK2ND
    gpt, packed_error = GPT(module, config), 0.0
    for step in STEPS:
        metadata = build_metadata([Slice(s, e, [LocalSpan(0, BLOCKS[r][: -(-e // N)])]) for r, s, e in step], N)
        tokens = torch.cat([texts[r][s:e] for r, s, e in step])
        with forward_context(ForwardContext(metadata, pool)):
            logits = gpt(tokens, torch.arange(len(tokens))).float()
        wanted = torch.cat([expected[r][s:e] for r, s, e in step])
        packed_error = max(packed_error, float((logits - wanted).abs().max()))
    if parallel.is_leader:
        largest = max(float(x.abs().max()) for x in expected)
        out.write_text(json.dumps({"dense": dense_error, "packed": packed_error, "largest_logit": largest}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


main()
