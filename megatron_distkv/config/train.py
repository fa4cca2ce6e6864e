"""Configuration of a training run."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_distkv.config.base import FrozenConfig
from megatron_distkv.config.model import ModelConfig


class CurriculumStage(FrozenConfig):
    first_step: int = Field(ge=0)
    """The stage begins with this step (the first stage with 0)."""
    sequence_length: int = Field(ge=32)
    """Tokens per sequence; the batch shrinks so that a step's tokens stay the same."""
    max_density: float = Field(0.6, gt=0.0, lt=1.0)
    """Largest share of a sequence that passkey statements take (there are always two): the rest is prose."""
    min_temperature: float = Field(1.0, gt=0.0, le=1.0)
    """Each step's attention scores are multiplied by a number drawn between this and 1: softer attention in training
    leaves the margin that a longer context needs."""


class PasskeyDataConfig(FrozenConfig):
    text: Path | None = None
    """Prose around the passkeys; None: text that ships with Python."""
    tokens_per_step: int = Field(4096, ge=64)
    """Tokens of one optimizer step, over all data-parallel ranks."""
    prose_weight: float = Field(0.1, ge=0.0)
    """Weight of the language-modelling loss beside that of the passkeys' digits."""
    stages: list[CurriculumStage] = Field(min_length=1)
    """The curriculum."""

    @model_validator(mode="after")
    def _in_order(self) -> Any:
        first_steps = [stage.first_step for stage in self.stages]
        if first_steps[0] != 0 or sorted(set(first_steps)) != first_steps:
            raise ValueError(f"stages must begin with first_step 0 and rise, got {first_steps}")
        return self

    def stage(self, step: int) -> CurriculumStage:
        return [stage for stage in self.stages if stage.first_step <= step][-1]


class OptimizerConfig(FrozenConfig):
    learning_rate: float = Field(3e-3, gt=0)
    """Peak, after the warm-up."""
    min_learning_rate_share: float = Field(0.1, ge=0.0, le=1.0)
    """The cosine ends at this share of the peak."""
    warmup_steps: int = Field(30, ge=0)
    """Linear warm-up."""
    beta2: float = Field(0.98, gt=0, lt=1)
    """AdamW's second moment."""
    weight_decay: float = Field(0.01, ge=0)
    """Of matrices; norms have none."""
    gradient_clipping: float = Field(1.0, gt=0)
    """Largest global gradient norm."""


class TrainConfig(FrozenConfig):
    model: ModelConfig
    data: PasskeyDataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = Field(ge=1)
    """Optimizer steps."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of initial weights."""
    seed: int = 0
    """Of weights and data."""
    tensor_parallel: int = Field(1, ge=1)
    """Ranks that share each layer; the launcher's other ranks are context or data parallel."""
    context_parallel: int = Field(1, ge=1)
    """Ranks that share each sequence: memory for long contexts. The launcher's other ranks are data parallel."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO."""
    threads: int = Field(1, ge=1)
    """CPU threads per rank."""
    evaluate_every: int = Field(100, ge=1)
    """Steps between two measurements of recall on held-out prose."""
    evaluation_length: int = Field(2048, ge=64)
    """Context of that measurement."""
    save_every: int = Field(0, ge=0)
    """Steps between two DeepSpeed checkpoints to resume from; 0 saves only at the end."""

    @model_validator(mode="after")
    def _every_rank_has_tokens(self) -> Any:
        shortest = min(self.evaluation_length, *(stage.sequence_length for stage in self.data.stages))
        if shortest < 2 * self.context_parallel:
            raise ValueError(
                f"context_parallel {self.context_parallel} cuts sequences in {2 * self.context_parallel}, "
                f"but there are some of {shortest} tokens"
            )
        return self
