"""DeepSpeed around a Megatron model: the process groups it may use, and the engine."""

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_distkv.config.train import OptimizerConfig


class ModelParallelUnit:
    """Megatron's parallel_state under the names that DeepSpeed's `mpu` argument still asks for.

    To DeepSpeed the ranks of a context group are data parallel: they hold the same weights, and gradients that add up.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)

    def get_model_parallel_rank(self) -> int:
        return int(parallel_state.get_tensor_model_parallel_rank())

    def get_model_parallel_world_size(self) -> int:
        return int(parallel_state.get_tensor_model_parallel_world_size())

    def get_data_parallel_rank(self) -> int:
        return int(parallel_state.get_data_parallel_rank(with_context_parallel=True))

    def get_data_parallel_world_size(self) -> int:
        return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))

    def get_data_parallel_group(self) -> Any:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(dist.get_process_group_ranks(self.get_data_parallel_group()))


def init_distributed() -> None:
    """Join the launcher's processes, without DeepSpeed's shared-memory collectives: those compile for 100 s."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


def build_engine(
    model: torch.nn.Module, config: OptimizerConfig, zero_stage: int, *, bf16: bool, num_micro_batches: int = 1
) -> Any:
    """A DeepSpeedEngine with torch's AdamW: DeepSpeed's own CPU Adam compiles for minutes.

    With bf16, weights, moments and sums of gradients are kept in fp32 as well.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
    )
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # rows vary with the curriculum; the loss is a mean over them
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": config.gradient_clipping,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=ModelParallelUnit())
    return engine


def whole_parameters(engine: Any) -> Any:
    """A context in which every parameter is whole on every rank (ZeRO-3 keeps pieces)."""
    is_sharded = engine.zero_optimization_stage() == 3
    return deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=is_sharded)
