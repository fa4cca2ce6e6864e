"""The training loop: `deepspeed launch/train.py` runs it on every rank."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tqdm import tqdm

from megatron_distkv.attention import ContextShard, DistAttention, ShardOrder
from megatron_distkv.config.train import TrainConfig
from megatron_distkv.errors import CheckpointError
from megatron_distkv.model import build_gpt, init_tensor_parallel
from megatron_distkv.model.weights import torch_dist
from megatron_distkv.training.data import Batch, PasskeyData
from megatron_distkv.training.deepspeed_engine import build_engine, init_distributed, whole_parameters
from megatron_distkv.training.loss import token_weights
from megatron_distkv.training.passkey import load_prose
from megatron_distkv.training.recall import num_inputs, recall
from megatron_distkv.training.schedule import learning_rate

NUM_EVALUATION_PROMPTS = 16
EVALUATION_SEED = 20_000


class Trainer:
    """One rank. `output` gets `log.jsonl`, `deepspeed/` (to resume from) and the torch_dist checkpoint (to serve)."""

    def __init__(self, config: TrainConfig, output: Path) -> None:
        torch.set_num_threads(config.threads)
        init_distributed()
        self.config = config
        self._output = output
        parallel = init_tensor_parallel(config.tensor_parallel, config.context_parallel)
        self._dp_rank = parallel_state.get_data_parallel_rank()
        self._dp_size = parallel_state.get_data_parallel_world_size()
        self._is_first = dist.get_rank() == 0
        torch.manual_seed(config.seed)
        gpt = build_gpt(config.model, parallel, init_std=config.init_std)
        self._attentions = [module for module in gpt.modules() if isinstance(module, DistAttention)]
        self._scale = self._attentions[0].scale
        self.engine = build_engine(gpt, config.optimizer, config.zero_stage, bf16=config.model.dtype == "bf16")
        prose = load_prose(config.data.text)
        self._held_out = prose.held_out
        self._data = PasskeyData(config.data, prose.training, config.seed)
        self.step = 0
        if self._is_first:
            output.mkdir(parents=True, exist_ok=True)

    def resume(self) -> None:
        """Go on from the latest DeepSpeed checkpoint below the output; raises CheckpointError when there is none."""
        path, state = self.engine.load_checkpoint(str(self._output / "deepspeed"))
        if path is None:
            raise CheckpointError(f"nothing to resume from: no DeepSpeed checkpoint in {self._output / 'deepspeed'}")
        self.step = int(state["step"])

    def run(self) -> list[float]:
        """Train to the last step, save; returns this run's losses (mean over ranks), one per step."""
        losses = []
        for step in self._progress():
            losses.append(self._train_step(step))
            self.step = step + 1
            if self.step % self.config.evaluate_every == 0 or self.step == self.config.steps:
                self._log(step=self.step, loss=losses[-1], recall=self._recall())
            if self.config.save_every and self.step % self.config.save_every == 0:
                self.save()
        self.save()
        return losses

    def save(self) -> None:
        state = {"step": self.step, "model": self.config.model.model_dump(mode="json")}
        self.engine.save_checkpoint(str(self._output / "deepspeed"), client_state=state)
        with whole_parameters(self.engine):
            torch_dist.save(self.engine.module, self.config.model, self._output, self.step)

    def _train_step(self, step: int) -> float:
        batch = self._data.batch(step, self._dp_rank, self._dp_size)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config.steps, self.config.optimizer)
        loss = self._loss(batch)
        self.engine.backward(loss)
        self.engine.step()
        total = loss.detach().float().clone()
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(total, group=group)
        return float(total) / group.size()

    def _loss(self, batch: Batch) -> torch.Tensor:
        """This rank's tokens' share of the loss; the mean over data and context ranks is the whole batch's loss."""
        shard = self._shard(batch.inputs_BT.shape[1])
        self._set_attention(batch.temperature, shard)
        weights_BT = token_weights(batch.is_answer_BT, self.config.data.prose_weight)
        inputs, labels = batch.inputs_BT, batch.labels_BT
        if shard is not None:
            tokens = shard.order.tokens(shard.rank)
            inputs, labels, weights_BT = (x[:, tokens] for x in (inputs, labels, weights_BT))
        nll_BT = self.engine(inputs, None, None, labels=labels)
        return (nll_BT * weights_BT).sum() * self.config.context_parallel

    def _shard(self, num_tokens: int) -> ContextShard | None:
        if self.config.context_parallel == 1:
            return None
        return ContextShard(
            ShardOrder(num_tokens, self.config.context_parallel),
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_context_parallel_group(),
        )

    def _set_attention(self, temperature: float, shard: ContextShard | None) -> None:
        for attention in self._attentions:
            attention.scale = self._scale * temperature
            attention.shard = shard

    def _recall(self) -> float:
        """Every rank takes part: with ZeRO-3 and tensor parallelism a forward pass has collectives."""
        length = self.config.evaluation_length
        shard = self._shard(num_inputs(length))
        self._set_attention(1.0, shard)
        try:
            return recall(self.engine, self._held_out, length, NUM_EVALUATION_PROMPTS, EVALUATION_SEED, shard)
        finally:
            self._set_attention(1.0, None)

    def _progress(self) -> Iterator[int]:
        steps = range(self.step, self.config.steps)
        self._bar: Any = tqdm(steps, "training", disable=not self._is_first, unit="step", mininterval=1.0)
        return iter(self._bar)

    def _log(self, **values: float) -> None:
        if self._is_first:
            self._bar.set_postfix(loss=f"{values['loss']:.3f}", recall=f"{values['recall']:.2f}")
            with (self._output / "log.jsonl").open("a") as file:
                file.write(json.dumps(values) + "\n")
