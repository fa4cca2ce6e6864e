"""Documents packed into sequences of one length: a stream in an order of its own for each pass, cut every T tokens.

| document 7 ...... | document 2 ............. | document 9 ... |
| sequence 0: T tokens   | sequence 1: T tokens   | ...           a document that is cut goes on as one of its own
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from megatron_distkv.config.train import CorpusConfig
from megatron_distkv.errors import ConfigError
from megatron_distkv.training.batch import MicroBatch
from megatron_distkv.training.corpus import Corpus, Numbers, Spans


class _Piece(NamedTuple):
    """Tokens `start .. stop` of a document, at `at` .. of their sequence."""

    document: int
    start: int
    stop: int
    at: int


class PackedDocuments:
    """Sequence n is the n-th T tokens of the endless stream: a function of seed and n alone.

    A token's label is the next token of its document; the last one of each has none.
    """

    def __init__(self, corpus: Corpus, spans: Spans, config: CorpusConfig, seed: int) -> None:
        self._corpus = corpus
        self._spans = spans
        self._length = config.sequence_length
        self._per_step = config.sequences_per_step
        self._seed = seed
        self._num_tokens = spans.num_tokens
        self._passes = lru_cache(maxsize=2)(self._pass)

    @property
    def num_whole_sequences(self) -> int:
        """Of one pass, at least one."""
        return max(1, self._num_tokens // self._length)

    def num_micro_batches(self, dp_size: int) -> int:
        if self._per_step % dp_size:
            raise ConfigError(f"corpus.sequences_per_step {self._per_step} is no multiple of {dp_size} data ranks")
        return self._per_step // dp_size

    def micro_batches(self, step: int, dp_rank: int, dp_size: int) -> list[MicroBatch]:
        numbers = range(step * self._per_step, (step + 1) * self._per_step)
        num_targets = sum(self.num_targets(number) for number in numbers)
        return [self.sequence(number, num_targets) for number in numbers[dp_rank::dp_size]]

    def num_targets(self, number: int) -> int:
        """Labels of a sequence: known without reading a token."""
        return int(sum(piece.stop - piece.start - 1 for piece in self._pieces(number)))

    def sequence(self, number: int, num_targets: int) -> MicroBatch:
        """One row; each of its labels counts 1 / `num_targets`."""
        pieces = list(self._pieces(number))
        ids = np.concatenate([self._corpus.read(*piece[:3]) for piece in pieces])
        weights = np.full(self._length, 1 / max(1, num_targets), np.float32)
        starts = [piece.at for piece in pieces if piece.at < self._length]
        weights[[piece.at - 1 for piece in pieces[1:]]] = 0.0
        inputs, labels, counted = (torch.from_numpy(x)[None] for x in (ids[:-1], ids[1:], weights))
        return MicroBatch(inputs, labels, counted, tuple(starts))

    def _pieces(self, number: int) -> Iterator[_Piece]:
        """Of T + 1 tokens: the last is only a label."""
        at = 0
        while at <= self._length:
            turn, offset = divmod(number * self._length + at, self._num_tokens)
            order, ends = self._passes(turn)
            place = int(np.searchsorted(ends, offset, side="right"))
            span = int(order[place])
            count = int(min(ends[place] - offset, self._length + 1 - at))
            stop_of_span = int(self._spans.starts[span] + self._spans.counts[span])
            start = stop_of_span - int(ends[place] - offset)
            yield _Piece(int(self._spans.documents[span]), start, start + count, at)
            at += count

    def _pass(self, turn: int) -> tuple[Numbers, Numbers]:
        """The order of the spans in a pass over all of them, and where each ends."""
        order = np.random.default_rng((self._seed, turn)).permutation(len(self._spans.counts))
        return order, self._spans.counts[order].cumsum()
