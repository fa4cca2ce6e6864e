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
    """Prose around the passkeys; None: the text that comes with this package."""
    tokens_per_step: int = Field(4096, ge=64)
    """Tokens of one optimizer step, over all data-parallel ranks."""
    prose_weight: float = Field(0.1, ge=0.0)
    """Weight of the language-modelling loss beside that of the passkeys' digits."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Parts of a rank's share of a step that are computed one after the other: less memory, the same gradients."""
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


class CorpusConfig(FrozenConfig):
    """Documents of any length, packed into sequences of one length; no document sees another."""

    files: tuple[Path, ...] = Field(min_length=1)
    """Plain text, JSONL (*.jsonl), or Megatron indexed datasets (PREFIX.bin and PREFIX.idx: name either)."""
    tokenizer: Path | None = None
    """A tokenizer.json for text; None: bytes, with 256 before a document and 257 after it."""
    end_token: str | None = None
    """The tokenizer's token that ends a document, such as </s>; None: the tokenizer's own special tokens only."""
    text_key: str = "text"
    """Where a line of JSONL has its document."""
    separator: str | None = Field(None, min_length=1)
    """What stands between documents of plain text; None: each file is one document."""
    sequence_length: int = Field(ge=2)
    """Tokens of a packed sequence, shared by a context group. A rank computes one sequence at a time."""
    sequences_per_step: int = Field(1, ge=1)
    """Sequences of an optimizer step over all data-parallel ranks: each accumulates the gradients of its share."""
    held_out_share: float = Field(0.02, ge=0.0, lt=1.0)
    """The last share of the tokens, never trained on; 0: no evaluation."""
    evaluation_sequences: int = Field(8, ge=1)
    """Held-out sequences of an evaluation, at most."""


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
    data: PasskeyDataConfig | None = None
    """Train to recall passkeys set in prose: the demo's task."""
    corpus: CorpusConfig | None = None
    """Train on documents: language modelling."""
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
    recompute: Literal["none", "layers"] = "none"
    """layers: keep only each layer's input, and compute the layer again in the backward pass."""
    evaluate_every: int = Field(100, ge=1)
    """Steps between two measurements on held-out text: recall of passkeys, or loss."""
    evaluation_length: int = Field(2048, ge=64)
    """Context of the measurement of recall."""
    save_every: int = Field(0, ge=0)
    """Steps between two checkpoints; 0 saves only at the end."""
    keep_checkpoints: int = Field(2, ge=1)
    """The newest checkpoints that stay; older ones of the same output are removed."""
    peak_tflops: float | None = Field(None, gt=0)
    """What one rank's device computes at best, for MFU; None: measured with a matrix product when training starts."""

    @model_validator(mode="after")
    def _one_kind_of_data(self) -> Any:
        if (self.data is None) == (self.corpus is None):
            raise ValueError("name one of 'data' (passkeys) and 'corpus' (documents)")
        return self

    @model_validator(mode="after")
    def _every_rank_has_tokens(self) -> Any:
        if self.corpus is not None:
            lengths = [self.corpus.sequence_length]
        else:
            stages = self.data.stages if self.data is not None else []
            lengths = [self.evaluation_length, *(stage.sequence_length for stage in stages)]
        if min(lengths) < 2 * self.context_parallel:
            raise ValueError(
                f"context_parallel {self.context_parallel} cuts sequences in {2 * self.context_parallel}, "
                f"but there are some of {min(lengths)} tokens"
            )
        return self

    @model_validator(mode="after")
    def _masters_are_kept(self) -> Any:
        if self.model.dtype == "bf16" and self.zero_stage == 0:
            raise ValueError("zero_stage 0 keeps no fp32 weights beside bf16 ones: use 1, 2 or 3")
        return self

    def with_text(self, path: Path) -> "TrainConfig":
        """The same run on another text."""
        if self.corpus is not None:
            return self.model_copy(update={"corpus": self.corpus.model_copy(update={"files": (path,)})})
        assert self.data is not None
        return self.model_copy(update={"data": self.data.model_copy(update={"text": path})})
