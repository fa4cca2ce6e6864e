"""Text into Megatron's indexed datasets: every corpus is read in one way."""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path
from tokenizers import Tokenizer
from tqdm import tqdm

from megatron_distkv.config.train import CorpusConfig
from megatron_distkv.errors import UserError
from megatron_distkv.training.passkey import BOS, EOS

_BATCH_DOCUMENTS = 256
# Texts to token ids, one list each
Encode = Callable[[list[str]], list[list[int]]]


def tokenize_file(path: Path, config: CorpusConfig, vocab_size: int, folder: Path) -> Path:
    """The prefix of an indexed dataset of the file's documents in `folder`; what is there already is used again.

    Raises UserError for a file that cannot be read, and tokens beyond the vocabulary.
    """
    prefix = folder / _fingerprint(path, config, vocab_size)
    if Path(get_idx_path(str(prefix))).exists():
        return prefix
    encode = _encoder(config, vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{prefix.name}.unfinished"
    builder = IndexedDatasetBuilder(get_bin_path(str(unfinished)), DType.optimal_dtype(vocab_size))
    with builder.data_file:
        num_tokens = sum(_add(builder, ids) for ids in _checked(path, config, encode, vocab_size))
    if num_tokens == 0:
        raise UserError(f"{path} holds no tokens")
    builder.finalize(get_idx_path(str(unfinished)))
    for of in (get_bin_path, get_idx_path):  # the index last: with it the dataset is there
        os.replace(of(str(unfinished)), of(str(prefix)))
    return prefix


def _add(builder: IndexedDatasetBuilder, ids: list[int]) -> int:
    builder.add_document(torch.tensor(ids), [len(ids)])
    return len(ids)


def _checked(path: Path, config: CorpusConfig, encode: Encode, vocab_size: int) -> Iterator[list[int]]:
    for number, ids in enumerate(_encoded(path, config, encode), start=1):
        if max(ids, default=0) >= vocab_size:
            raise UserError(f"{path}: document {number} has token {max(ids)}, beyond the vocabulary of {vocab_size}")
        if ids:
            yield ids


def _fingerprint(path: Path, config: CorpusConfig, vocab_size: int) -> str:
    """Another one when the text, the tokenizer or how documents are cut has changed."""
    seen = [_identity(path), _identity(config.tokenizer), config.end_token, config.text_key, config.separator]
    digest = hashlib.sha256(json.dumps([*seen, vocab_size]).encode()).hexdigest()
    return f"{path.stem}-{digest[:16]}"


def _identity(path: Path | None) -> list[str | int] | None:
    if path is None:
        return None
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def _encoder(config: CorpusConfig, vocab_size: int) -> Encode:
    if config.tokenizer is None:
        if vocab_size <= EOS:
            raise UserError(f"bytes need a vocabulary of {EOS + 1}, the model has {vocab_size}: name a tokenizer")
        return lambda texts: [[BOS, *text.encode(), EOS] for text in texts]
    try:
        tokenizer = Tokenizer.from_file(str(config.tokenizer))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{config.tokenizer} is no tokenizer.json: {str(error).splitlines()[0]}") from None
    end = None if config.end_token is None else tokenizer.token_to_id(config.end_token)
    if config.end_token is not None and end is None:
        raise UserError(f"{config.tokenizer} has no token {config.end_token!r}")
    ending = [] if end is None else [end]
    return lambda texts: [_ended(encoding.ids, ending) for encoding in tokenizer.encode_batch(texts)]


def _ended(ids: list[int], ending: list[int]) -> list[int]:
    return ids if not ids or ids[-1:] == ending else [*ids, *ending]


def _encoded(path: Path, config: CorpusConfig, encode: Encode) -> Iterator[list[int]]:
    documents = tqdm(_documents(path, config), f"tokens of {path.name}", unit=" documents", leave=False, disable=None)
    while batch := list(itertools.islice(documents, _BATCH_DOCUMENTS)):
        yield from encode(batch)


def _documents(path: Path, config: CorpusConfig) -> Iterable[str]:
    try:
        if path.suffix == ".jsonl":
            yield from _json_documents(path, config.text_key)
        else:
            text = path.read_text(encoding="utf-8")
            parts = text.split(config.separator) if config.separator else [text]
            yield from (part for part in parts if part.strip())
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _json_documents(path: Path, key: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number} is not JSON: {error.msg}") from None
            if not isinstance(values, dict) or not isinstance(values.get(key), str):
                raise UserError(f"{path}: line {number} has no text under {key!r}")
            yield values[key]
