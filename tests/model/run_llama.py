"""Run by fork_ranks.py from test_gpt.py: this rank's GPT against a Hugging Face Llama, dense and packed; writes errors.

usage: run_llama.py CHECKPOINT TP OUT [save=DIR]
"""

import json
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
import torch  # noqa: E402

from megatron_distkv.model import build_gpt, find_checkpoint, init_tensor_parallel, load_weights  # noqa: E402
from megatron_distkv.model.weights import torch_dist  # noqa: E402
from tests.model.against_hf import compare  # noqa: E402


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
    errors = compare(module, config, parallel, reference_path)
    if parallel.is_leader:
        out.write_text(json.dumps(errors))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
