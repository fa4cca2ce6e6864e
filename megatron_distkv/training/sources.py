"""From the configuration to what is trained on and what is measured."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_distkv.config.train import CorpusConfig, TrainConfig
from megatron_distkv.errors import UserError
from megatron_distkv.training.batch import BatchSource
from megatron_distkv.training.corpus import Corpus, PreparedCorpus, prepare_corpus
from megatron_distkv.training.data import PasskeyData
from megatron_distkv.training.held_out import Measure, measure_loss, measure_recall
from megatron_distkv.training.packing import PackedDocuments
from megatron_distkv.training.passkey import load_prose


class Sources(NamedTuple):
    """`fingerprint`: of all tokens or bytes that the batches are cut from, held-out ones as well."""

    training: BatchSource
    measure: Measure | None
    fingerprint: str


def open_sources(config: TrainConfig, output: Path) -> Sources:
    """A collective of all ranks; raises UserError on all of them for input that cannot be used."""
    if config.corpus is not None:
        return _corpus(config.corpus, config, output)
    assert config.data is not None
    prose = load_prose(config.data.text)
    data = PasskeyData(config.data, prose.training, config.seed)
    return Sources(data, measure_recall(prose.held_out, config.evaluation_length), prose.fingerprint)


def _corpus(corpus_config: CorpusConfig, config: TrainConfig, output: Path) -> Sources:
    prefixes, fingerprint = _prepared(corpus_config, config.model.vocab_size, output)
    corpus = Corpus(prefixes)
    training, held_out = (
        PackedDocuments(corpus, spans, corpus_config, config.seed) if spans.num_tokens else None
        for spans in corpus.split(corpus_config.held_out_share)
    )
    assert training is not None
    measure = None if held_out is None else measure_loss(held_out, corpus_config.evaluation_sequences)
    return Sources(training, measure, fingerprint)


def keep_tokenizer(config: TrainConfig, output: Path) -> None:
    """Beside the checkpoint, where serving looks for it."""
    if config.corpus is not None and config.corpus.tokenizer is not None and dist.get_rank() == 0:
        shutil.copyfile(config.corpus.tokenizer, output / "tokenizer.json")


def _prepared(config: CorpusConfig, vocab_size: int, output: Path) -> PreparedCorpus:
    """The first rank tokenises and checks; the others hear of the outcome."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [prepare_corpus(config, vocab_size, output / "tokens")]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return PreparedCorpus(*outcome[0])
