"""AdamW's states, parameter by parameter and whole (but for tensor parallelism), however ZeRO has cut them.

DeepSpeed has flat pieces of many parameters and, on each, torch's states; its `safe_get_full...` and its links between
parameters and pieces lead there. ZeRO-0 has the parameters themselves.
"""

from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

# Megatron's names: those of torch's states, and of the fp32 weights behind bf16 ones.
MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32_param"


def get_state(engine: Any, parameter: Any, kind: str) -> torch.Tensor:
    """A collective of the data-parallel ranks, after `link_states`; the same tensor on all of them, fp32."""
    if engine.zero_optimization_stage() == 0:
        return engine.optimizer.state[parameter][kind]
    if kind == MASTER:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


def set_state(engine: Any, parameter: Any, kind: str, whole: torch.Tensor) -> None:
    """Keep this rank's piece of `whole`; after `make_room`."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        engine.optimizer.state[parameter][kind].copy_(whole)
    elif stage == 3:
        engine.optimizer.set_local_hp_param(_piece(engine, parameter, whole), parameter, _key(kind))
    else:
        parameter.set_full_hp_param(whole, _key(kind))


def make_room(engine: Any, step: int) -> None:
    """States as torch makes them in its first step, as if after `step` steps."""
    inner = engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer
    for flat in _flat_parameters(engine):
        inner.state[flat] = {
            "step": torch.tensor(float(step)),
            **{kind: torch.zeros_like(flat, memory_format=torch.preserve_format) for kind in MOMENTS},
        }
    link_states(engine)


def link_states(engine: Any) -> None:
    """DeepSpeed does this once, after the first of several groups of parameters: for the others too early."""
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _key(kind: str) -> str | None:
    return None if kind == MASTER else kind


def _piece(engine: Any, parameter: Any, whole: torch.Tensor) -> torch.Tensor:
    """ZeRO-3 cuts each parameter into equal pieces, the last one padded."""
    group = engine.optimizer._get_param_partition_group(parameter)
    count = parameter.ds_tensor.numel()
    padded = torch.nn.functional.pad(whole.flatten(), (0, count * group.size() - whole.numel()))
    return padded[count * group.rank() :][:count]


def _flat_parameters(engine: Any) -> list[torch.Tensor]:
    """What torch's AdamW has states for."""
    optimizer = engine.optimizer
    match engine.zero_optimization_stage():
        case 0:
            return list(engine.module.parameters())
        case 3:
            return list(optimizer.fp32_partitioned_groups_flat)
    # Stage 1 with bf16 weights and fp32 sums of gradients has another class than the rest.
    names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    return list(next(getattr(optimizer, name) for name in names if hasattr(optimizer, name)))
