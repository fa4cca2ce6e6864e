"""DeepSpeed's ZeRO-3 files by hand, from the layout's definition: for models that are not trained in a test."""

from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_distkv.model import find_checkpoint
from tests.model.tensors import whole_tensors


def save_zero3(folder: Path, source: Path, num_ranks: int = 2) -> Path:
    """Each parameter cut into equal pieces, the last one padded; a data rank's pieces lie end to end."""
    checkpoint, tensors = find_checkpoint(source), whole_tensors(source)
    (folder / "global_step1").mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    state = {"model": checkpoint.model.model_dump(mode="json"), "mp_world_size": 1, "dp_world_size": num_ranks,
             "param_shapes": [{name: x.shape for name, x in tensors.items()}]}  # fmt: skip
    for rank in range(num_ranks):
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        flat = torch.cat([_piece(tensor, rank, num_ranks) for tensor in tensors.values()])
        optimizer = {"optimizer_state_dict": {"fp32_flat_groups": [flat]}}
        torch.save(optimizer, folder / "global_step1" / f"{name}_optim_states.pt")
        torch.save(state, folder / "global_step1" / f"{name}_model_states.pt")
    return folder


def _piece(tensor: torch.Tensor, rank: int, num_ranks: int) -> torch.Tensor:
    each = -(-tensor.numel() // num_ranks)
    return F.pad(tensor.flatten(), (0, each * num_ranks - tensor.numel()))[rank * each : (rank + 1) * each]
