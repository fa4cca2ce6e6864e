"""The training loop: `deepspeed launch/train.py` runs it on every rank."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_distkv.attention import DenseAttention, DistAttention
from megatron_distkv.config.train import TrainConfig
from megatron_distkv.context_parallel import ContextShard, RingAttention, ZigzagLayout
from megatron_distkv.model import build_gpt, find_checkpoint, init_tensor_parallel, load_weights
from megatron_distkv.model.families import family_of
from megatron_distkv.training.batch import MicroBatch
from megatron_distkv.training.checkpoint import find_run, load_states, save_run
from megatron_distkv.training.deepspeed_engine import build_engine, init_distributed
from megatron_distkv.training.recompute import recompute_layers
from megatron_distkv.training.run_log import RunLog
from megatron_distkv.training.schedule import learning_rate
from megatron_distkv.training.sources import keep_tokenizer, open_sources
from megatron_distkv.training.throughput import keys_seen, measure_peak_flops, train_flops


class Trainer:
    """One rank. `output` gets checkpoints (to serve, and to resume from), `log.jsonl` and `loss.png`."""

    def __init__(self, config: TrainConfig, output: Path, *, resume: bool = False) -> None:
        """With `resume` from the latest checkpoint in the output; raises CheckpointError when there is none, and
        ConfigError for a model of no known family, both before anything is written."""
        family_of(config.model)
        torch.set_num_threads(config.threads)
        init_distributed()
        self.config = config
        self._output = output
        parallel = init_tensor_parallel(config.tensor_parallel, config.context_parallel)
        self._dp_rank = parallel_state.get_data_parallel_rank()
        self._dp_size = parallel_state.get_data_parallel_world_size()
        saved = find_run(output, config) if resume else None
        output.mkdir(parents=True, exist_ok=True)
        self._data, self._measure, self._text = open_sources(config, output)
        if saved is not None:
            saved.require_text(self._text)
        keep_tokenizer(config, output)
        self._num_micro_batches = self._data.num_micro_batches(self._dp_size)
        torch.manual_seed(config.seed)
        gpt = build_gpt(config.model, parallel, init_std=config.init_std)
        if saved is not None:
            load_weights(gpt, find_checkpoint(saved.directory), config.model)
        self._attentions = [module for module in gpt.modules() if isinstance(module, DistAttention)]
        self._scale = self._attentions[0].scale
        if config.recompute == "layers":
            recompute_layers(gpt)
        is_bf16 = config.model.dtype == "bf16"
        self.engine = build_engine(
            gpt, config.optimizer, config.zero_stage, bf16=is_bf16, num_micro_batches=self._num_micro_batches
        )
        if saved is not None:
            load_states(self.engine, config, saved)
        self.step = 0 if saved is None else saved.step
        self._saved_step = self.step if saved is not None else None

    def run(self) -> list[float]:
        """Train to the last step, save; returns this run's losses, one per step."""
        peak_flops = self._peak_flops()
        log = RunLog(self._output, self.step, self.config.steps, is_first=dist.get_rank() == 0)
        losses = []
        for step in log.steps():
            start_s = time.perf_counter()
            figures = self._train_step(step)
            seconds = time.perf_counter() - start_s
            losses.append(figures["loss"])
            self.step = step + 1
            figures["tokens_per_s"] = figures["tokens"] / seconds
            figures["mfu"] = figures.pop("flops") / seconds / peak_flops
            if self._measure is not None and self._is_due(self.config.evaluate_every):
                figures |= self._evaluate()
            log.write(self.step, **figures)
            if self.config.save_every and self.step % self.config.save_every == 0:
                self.save()
        self.save()
        log.close()
        return losses

    def save(self) -> None:
        if self._saved_step != self.step:
            save_run(self.engine, self.config, self._output, self.step, self._text)
            self._saved_step = self.step

    def weighted_loss(self, batch: MicroBatch) -> torch.Tensor:
        """This rank's tokens' share of the step's loss: all ranks' sum, over all micro-batches, is the loss."""
        num_tokens = batch.inputs_BT.shape[1]
        shard = self.set_attention(num_tokens, batch.document_starts, batch.temperature)
        tokens = slice(None) if shard.layout.cp_size == 1 else shard.tokens
        inputs, labels, weights = (x[:, tokens] for x in (batch.inputs_BT, batch.labels_BT, batch.weights_BT))
        nll_BT = self.engine(inputs, None, None, labels=labels)
        return (nll_BT.float() * weights).sum()

    def set_attention(self, num_tokens: int, document_starts: tuple[int, ...], temperature: float) -> ContextShard:
        """How the next forward pass, and its backward pass, attend; returns this rank's share of the sequence."""
        layout = ZigzagLayout(num_tokens, self.config.context_parallel, document_starts)
        shard = ContextShard(layout)
        if layout.cp_size > 1:
            rank, group = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_group()
            shard = ContextShard(layout, rank, group)
        is_plain = layout.cp_size == 1 and len(document_starts) == 1
        for attention in self._attentions:
            attention.scale = self._scale * temperature
            attention.sequence_attention = DenseAttention() if is_plain else RingAttention(shard)
        return shard

    def _train_step(self, step: int) -> dict[str, float]:
        """Figures of the whole step, over all ranks."""
        rate = learning_rate(step, self.config.steps, self.config.optimizer)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        sums = torch.zeros(3, dtype=torch.float64)  # loss, tokens, keys seen
        for batch in self._data.micro_batches(step, self._dp_rank, self._dp_size):
            loss = self.weighted_loss(batch)
            # DeepSpeed takes means over micro-batches and over ranks where we have sums.
            self.engine.backward(loss * (group.size() * self._num_micro_batches))
            self.engine.step()
            num_rows, num_tokens = batch.inputs_BT.shape
            shared = num_rows / self.config.context_parallel
            seen = keys_seen(num_tokens, batch.document_starts)
            sums += torch.tensor([float(loss.detach()), num_tokens * shared, seen * shared], dtype=torch.float64)
        dist.all_reduce(sums, group=group)
        loss_sum, tokens, seen = sums.tolist()
        figures = {"loss": loss_sum, "learning_rate": rate, "tokens": tokens}
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            figures["gradient_norm"] = float(norm)
        return {**figures, "flops": train_flops(self.config.model, int(tokens), int(seen))}

    def _peak_flops(self) -> float:
        """Of all ranks' devices together."""
        if self.config.peak_tflops is not None:
            return self.config.peak_tflops * 1e12 * dist.get_world_size()
        total = torch.tensor(measure_peak_flops(self.config.model.dtype), dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)

    def _is_due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.config.steps

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        assert self._measure is not None
        try:
            return self._measure(self)
        finally:
            self.set_attention(1, (0,), 1.0)
            for attention in self._attentions:
                attention.sequence_attention = DenseAttention()
