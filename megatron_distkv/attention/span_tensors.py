"""Physical ids of local rBlocks as tensors, kept from step to step: a decode changes only a request's last span."""

from typing import NamedTuple

import torch

from megatron_distkv.rblock import LocalSpan


class SpanTensors(NamedTuple):
    """int64 `[rBlocks of the span]`: physical ids, and positions of their first tokens."""

    block_ids: torch.Tensor
    block_starts: torch.Tensor


class KeptSpans:
    """`begin_step`, then `of` for each span. What a step does not use, the next one makes anew."""

    def __init__(self, rblock_size: int, device: torch.device | None = None) -> None:
        self._rblock_size = rblock_size
        self._device = device
        # By first rBlock and the identity of its ids, which are kept beside, so that no other tuple can get it.
        self._before: dict[tuple[int, int], tuple[tuple[int, ...], SpanTensors]] = {}
        self._now: dict[tuple[int, int], tuple[tuple[int, ...], SpanTensors]] = {}

    def begin_step(self) -> None:
        self._before, self._now = self._now, {}

    def of(self, span: LocalSpan) -> SpanTensors:
        key = span.first, id(span.block_ids)
        kept = self._now.get(key) or self._before.get(key) or (span.block_ids, self._make(span))
        self._now[key] = kept
        return kept[1]

    def _make(self, span: LocalSpan) -> SpanTensors:
        size, end = self._rblock_size, span.first + len(span.block_ids)
        return SpanTensors(
            torch.tensor(span.block_ids, dtype=torch.int64, device=self._device),
            torch.arange(span.first * size, end * size, size, device=self._device),
        )
