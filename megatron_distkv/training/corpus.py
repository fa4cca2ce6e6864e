"""The documents of a training run: Megatron indexed datasets, checked before anything trains."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, IndexedDataset, get_bin_path, get_idx_path

from megatron_distkv.config.train import CorpusConfig
from megatron_distkv.errors import UserError
from megatron_distkv.training.tokenization import tokenize_file

_INDEXED = (".bin", ".idx")
# Tokens whose ids are compared with the vocabulary at a time
_CHECKED_AT_A_TIME = 1 << 24

Numbers = npt.NDArray[np.int64]


class Spans(NamedTuple):
    """Consecutive tokens of documents: `counts` tokens from `starts` on."""

    documents: Numbers
    starts: Numbers
    counts: Numbers

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())


class Corpus:
    """Documents of several datasets, numbered through; empty ones do not count."""

    def __init__(self, prefixes: list[Path]) -> None:
        self._datasets = [_open(prefix) for prefix in prefixes]
        places = [_places(number, dataset) for number, dataset in enumerate(self._datasets)]
        self._places: Numbers = np.concatenate(places)
        self.lengths: Numbers = self._places[:, 2]

    def read(self, document: int, start: int, stop: int) -> Numbers:
        dataset, sequence, _ = self._places[document]
        # A document's sequences lie one after the other, so its first one's pointer serves for all of them.
        return self._datasets[dataset].get(int(sequence), start, stop - start).astype(np.int64)

    def split(self, held_out_share: float) -> tuple[Spans, Spans]:
        """(to train on, held out): the last share of the tokens; the document that lies on the border is cut."""
        ends = self.lengths.cumsum()
        total = int(ends[-1]) if len(ends) else 0
        border = total - int(total * held_out_share)
        before = np.clip(border - (ends - self.lengths), 0, self.lengths)
        return self._spans(np.zeros_like(before), before), self._spans(before, self.lengths - before)

    def _spans(self, starts: Numbers, counts: Numbers) -> Spans:
        kept = np.flatnonzero(counts)
        return Spans(kept, starts[kept], counts[kept])


class PreparedCorpus(NamedTuple):
    """Prefixes of indexed datasets, and what tells their tokens and documents from any others, wherever they lie."""

    prefixes: list[Path]
    fingerprint: str


def prepare_corpus(config: CorpusConfig, vocab_size: int, folder: Path) -> PreparedCorpus:
    """Datasets of all files, text tokenised into `folder`; reads all tokens; raises UserError for bad input."""
    for path in (*config.files, *([config.tokenizer] if config.tokenizer is not None else [])):
        _require(path)
    prefixes = [
        path.with_suffix("") if path.suffix in _INDEXED else tokenize_file(path, config, vocab_size, folder)
        for path in config.files
    ]
    digest = hashlib.sha256()
    for prefix, path in zip(prefixes, config.files, strict=True):
        _check_ids(prefix, vocab_size, digest)
        if not Corpus([prefix]).lengths.sum():
            raise UserError(f"{path} holds no tokens")
    training, held_out = Corpus(prefixes).split(config.held_out_share)
    if training.num_tokens < 2 or (config.held_out_share and held_out.num_tokens < 2):
        share = f" and {held_out.num_tokens} held out" if config.held_out_share else ""
        raise UserError(f"{config.files[0]}: {training.num_tokens} tokens to train on{share} are too few")
    return PreparedCorpus(prefixes, digest.hexdigest())


def _require(path: Path) -> None:
    wanted = [path.with_suffix(suffix) for suffix in _INDEXED] if path.suffix in _INDEXED else [path]
    for file in wanted:
        if not file.is_file():
            raise UserError(f"{file} is not there" if not file.exists() else f"{file} is no file")


def _open(prefix: Path) -> IndexedDataset:
    """Looked at first: Megatron asserts that files are what they should be, or lets numpy fail."""
    index, tokens = Path(get_idx_path(str(prefix))), Path(get_bin_path(str(prefix)))
    with index.open("rb") as file:
        if file.read(len(_INDEX_HEADER)) != _INDEX_HEADER:
            raise UserError(f"{index} is no index of a Megatron dataset")
    size = tokens.stat().st_size
    if size == 0:  # cannot be mapped into memory
        raise UserError(f"{tokens} holds no tokens")
    try:
        dataset = IndexedDataset(str(prefix))
    except (AssertionError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{index} is a damaged index of a Megatron dataset: {reason}") from None
    needed = int(dataset.sequence_lengths.sum(dtype=np.int64)) * np.dtype(dataset.index.dtype).itemsize
    if size < needed:
        raise UserError(f"{tokens} has {size} bytes, but its index names {needed}: it is cut off")
    return dataset


def _places(number: int, dataset: IndexedDataset) -> Numbers:
    """(dataset, first sequence, tokens) of each document that has any."""
    ends = np.concatenate([[0], dataset.sequence_lengths.cumsum(dtype=np.int64)])
    firsts = dataset.document_indices[:-1].astype(np.int64)
    tokens = ends[dataset.document_indices[1:]] - ends[firsts]
    rows = np.stack([np.full_like(firsts, number), firsts, tokens], axis=1)
    return rows[tokens > 0]


def _check_ids(prefix: Path, vocab_size: int, digest: "hashlib._Hash") -> None:
    """All tokens, and where documents begin and end, go into `digest`."""
    dataset = _open(prefix)
    path, dtype = get_bin_path(str(prefix)), dataset.index.dtype
    digest.update(np.ascontiguousarray(_places(0, dataset)).data)
    ids = np.memmap(path, dtype=dtype, mode="r")
    for start in range(0, len(ids), _CHECKED_AT_A_TIME):
        part = ids[start : start + _CHECKED_AT_A_TIME]
        digest.update(part.data)
        for wrong in (int(part.max()), int(part.min())):
            if not 0 <= wrong < vocab_size:
                raise UserError(f"{path} has token {wrong}, beyond the model's vocabulary of {vocab_size}")
