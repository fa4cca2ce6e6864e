"""Run by fork_ranks.py from test_families.py: every checkpoint below a folder, against transformers; writes the errors.

usage: run_families.py FOLDER REFERENCES TP OUT
"""

import json
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
import torch  # noqa: E402

from megatron_distkv.model import build_gpt, find_checkpoint, init_tensor_parallel, load_weights  # noqa: E402
from tests.model.against_hf import compare  # noqa: E402


def main() -> None:
    torch.set_num_threads(1)
    folder, references, tp, out = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    parallel = init_tensor_parallel(tp)
    errors = {}
    for path in sorted(folder.iterdir()):
        checkpoint = find_checkpoint(path)
        module = build_gpt(checkpoint.model, parallel)
        load_weights(module, checkpoint, checkpoint.model)
        errors[path.name] = compare(module, checkpoint.model, parallel, references / path.name)
    if parallel.is_leader:
        out.write_text(json.dumps(errors))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
