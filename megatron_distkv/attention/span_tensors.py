"""Physical ids of local rBlocks as tensors, kept from step to step: a decode changes only a request's last span."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch

from megatron_distkv.rblock import LocalSpan


class SpanTensors(NamedTuple):
    """int64, one for each rBlock: physical ids, and positions of their first tokens."""

    block_ids: torch.Tensor
    block_starts: torch.Tensor


# By identity: to compare ids one by one would cost as much as to make the tensors. The span is kept beside what was
# made of it, so that no other one can have its identity.
_Key: TypeAlias = tuple[int, int]


class KeptSpans:
    """`begin_step`, then `of` for each span, or `joined` for all. What a step does not use, the next one makes anew."""

    def __init__(self, rblock_size: int, device: torch.device | None = None) -> None:
        self._rblock_size = rblock_size
        self._device = device
        self._before: dict[_Key, tuple[LocalSpan, SpanTensors]] = {}
        self._now: dict[_Key, tuple[LocalSpan, SpanTensors]] = {}
        self._joined_keys: list[_Key] = []  # of the last step
        self._joined: SpanTensors | None = None

    def begin_step(self) -> None:
        self._before, self._now = self._now, {}

    def of(self, span: LocalSpan) -> SpanTensors:
        key = _key(span)
        kept = self._now.get(key) or self._before.get(key) or (span, self._make(span))
        self._now[key] = kept
        return kept[1]

    def joined(self, spans: Sequence[LocalSpan]) -> SpanTensors:
        """Of all of them, one after the other; not to be written to."""
        tensors = [self.of(span) for span in spans]
        keys = [_key(span) for span in spans]
        if self._joined is None or keys != self._joined_keys:
            none = torch.empty(0, dtype=torch.int64, device=self._device)
            block_ids = torch.cat([none, *(x.block_ids for x in tensors)])
            self._joined = SpanTensors(block_ids, torch.cat([none, *(x.block_starts for x in tensors)]))
        self._joined_keys = keys
        return self._joined

    def _make(self, span: LocalSpan) -> SpanTensors:
        size, end = self._rblock_size, span.first + len(span.block_ids)
        return SpanTensors(
            torch.tensor(span.block_ids, dtype=torch.int64, device=self._device),
            torch.arange(span.first * size, end * size, size, device=self._device),
        )


def _key(span: LocalSpan) -> _Key:
    return span.first, id(span.block_ids)
