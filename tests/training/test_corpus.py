"""Documents of text, JSONL and Megatron's indexed datasets; bad ones are refused in one sentence."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_distkv.config.train import CorpusConfig
from megatron_distkv.errors import ConfigError, UserError
from megatron_distkv.training.corpus import Corpus, Spans, prepare_corpus
from megatron_distkv.training.packing import PackedDocuments
from megatron_distkv.training.passkey import BOS, EOS

VOCAB = 272


def indexed(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> Path:
    """As megatron-core writes them."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return prefix.with_name(prefix.name + ".bin")


def config(*files: Path, **rest: object) -> CorpusConfig:
    values = {"files": files, "sequence_length": 8, "held_out_share": 0.0, **rest}
    return CorpusConfig.model_validate(values)


def documents(files: CorpusConfig, folder: Path, vocab_size: int = VOCAB) -> list[list[int]]:
    corpus = Corpus(prepare_corpus(files, vocab_size, folder).prefixes)
    return [corpus.read(number, 0, int(count)).tolist() for number, count in enumerate(corpus.lengths)]


def test_text_jsonl_and_indexed_datasets_are_documents(tmp_path: Path) -> None:
    # Given one file of each kind, with documents of one and of several sequences, and an empty one
    (tmp_path / "a.txt").write_text("one--two")
    (tmp_path / "b.jsonl").write_text('{"body": "drei\\u00df"}\n\n{"body": "four", "id": 7}\n')
    builder = IndexedDatasetBuilder(str(tmp_path / "c.bin"), np.uint16)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(torch.tensor([], dtype=torch.int64), [0])
    builder.add_document(torch.tensor([6, 7]), [2])
    builder.finalize(str(tmp_path / "c.idx"))
    files = config(tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.idx", text_key="body", separator="--")
    text = [[BOS, *word.encode(), EOS] for word in ("one", "two", "dreiß", "four")]
    assert documents(files, tmp_path / "tokens") == [*text, [1, 2, 3, 4, 5], [6, 7]]
    # When a text changes, its tokens are made again; else they are used again
    before = sorted((tmp_path / "tokens").iterdir())
    assert documents(files, tmp_path / "tokens")[0] == text[0]
    assert sorted((tmp_path / "tokens").iterdir()) == before
    (tmp_path / "a.txt").write_text("other--two")
    assert documents(files, tmp_path / "tokens")[0] == [BOS, *b"other", EOS]


def test_a_fingerprint_is_of_tokens_and_documents_wherever_they_lie(tmp_path: Path) -> None:
    def fingerprint(name: str, *written: list[int]) -> str:
        files = config(indexed(tmp_path / name, list(written)))
        return prepare_corpus(files, VOCAB, tmp_path / "tokens").fingerprint

    one = fingerprint("a", [1, 2, 3], [4, 5])
    assert fingerprint("b", [1, 2, 3], [4, 5]) == one
    assert fingerprint("c", [1, 2, 3], [4, 6]) != one
    assert fingerprint("d", [1, 2], [3, 4, 5]) != one


def test_a_tokenizer_json_makes_the_tokens(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"the": 0, "cat": 1, "</s>": 2, "[UNK]": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("the cat sat")
    files = config(tmp_path / "a.txt", tokenizer=tmp_path / "tokenizer.json", end_token="</s>")
    assert documents(files, tmp_path, vocab_size=4) == [[0, 1, 3, 2]]
    with pytest.raises(UserError, match=r"a\.txt: document 1 has token 3, beyond the vocabulary of 3"):
        documents(files, tmp_path, vocab_size=3)
    with pytest.raises(UserError, match=r"tokenizer\.json has no token '<eos>'"):
        documents(files.model_copy(update={"end_token": "<eos>"}), tmp_path)


Spoil = Callable[[Path], CorpusConfig]
BAD: dict[str, tuple[Spoil, str]] = {
    "missing": (lambda at: config(at / "no.txt"), r"no\.txt is not there"),
    "a folder": (lambda at: config(at), r"is no file"),
    "no index": (lambda at: _without(indexed(at / "x", [[1]]), ".idx"), r"x\.idx is not there"),
    "no tokenizer": (lambda at: config(_written(at, "a.txt", b"a"), tokenizer=at / "t.json"), r"t\.json is not there"),
    "bad tokenizer": (
        lambda at: config(_written(at, "a.txt", b"a"), tokenizer=_written(at, "t.json", b"{}")),
        r"t\.json is no tokenizer\.json",
    ),
    "empty text": (lambda at: config(_written(at, "a.txt", b" \n")), r"a\.txt holds no tokens"),
    "empty dataset": (lambda at: config(indexed(at / "x", [])), r"x\.bin holds no tokens"),
    "beyond": (lambda at: config(indexed(at / "x", [[1, 2], [400]])), r"x\.bin has token 400, beyond .* of 272"),
    "below": (lambda at: config(indexed(at / "x", [[-1, 2]], np.int32)), r"x\.bin has token -1"),
    "cut off": (lambda at: config(_cut(indexed(at / "x", [[1, 2, 3, 4]]), 2)), r"2 bytes, but its index names 8"),
    "no dataset": (lambda at: config(_garbled(indexed(at / "x", [[1, 2]]))), r"x\.idx is no index"),
    "not UTF-8": (lambda at: config(_written(at, "a.txt", b"abc\xff")), r"a\.txt is not UTF-8 at byte 3"),
    "not JSON": (lambda at: config(_written(at, "a.jsonl", b'{"text": "a"}\n{')), r"line 2 is not JSON"),
    "other key": (lambda at: config(_written(at, "a.jsonl", b'{"body": "a"}')), r"line 1 has no text under 'text'"),
    "too little": (
        lambda at: config(_written(at, "a.txt", b"ab"), held_out_share=0.01),
        r"4 tokens to train on and 0 held out are too few",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name: str, tmp_path: Path) -> None:
    spoil, sentence = BAD[name]
    with pytest.raises(UserError, match=sentence) as refused:
        prepare_corpus(spoil(tmp_path), VOCAB, tmp_path / "tokens")
    assert "\n" not in str(refused.value)


def test_bytes_need_their_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bytes need a vocabulary of 258, the model has 200"):
        prepare_corpus(config(_written(tmp_path, "a.txt", b"abc")), 200, tmp_path)


def _written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def _without(path: Path, suffix: str) -> CorpusConfig:
    path.with_suffix(suffix).unlink()
    return config(path)


def _cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def _garbled(path: Path) -> Path:
    path.with_suffix(".idx").write_bytes(b"something else altogether, and longer than a header")
    return path


# Packing


class Numbered(Corpus):
    """Document d's tokens are 1000 d, 1000 d + 1, ...: every token tells where it is from."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, np.int64)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self.lengths[document]
        return np.arange(start, stop, dtype=np.int64) + 1000 * document


def packed(lengths: list[int], length: int, per_step: int = 1, seed: int = 0) -> PackedDocuments:
    corpus = Numbered(lengths)
    files = config(Path("x"), sequence_length=length, sequences_per_step=per_step)
    return PackedDocuments(corpus, corpus.split(0.0)[0], files, seed)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(2, 40), st.integers(0, 3))
def test_a_pass_has_every_token_once_and_labels_stay_in_their_document(
    lengths: list[int], length: int, seed: int
) -> None:
    data, total = packed(lengths, length, seed=seed), sum(lengths)
    sequences = [data.sequence(number, 1) for number in range(-(-2 * total // length))]
    stream = torch.cat([sequence.inputs_BT[0] for sequence in sequences]).tolist()
    # Then the first pass has every token once, the second too
    wanted = sorted(1000 * d + i for d, count in enumerate(lengths) for i in range(count))
    assert sorted(stream[:total]) == wanted
    assert sorted(stream[total : 2 * total]) == wanted
    for number, (inputs, labels, weights, starts, _) in enumerate(sequences):
        ids, counted = inputs[0].tolist(), weights[0].tolist()
        # And a label counts if it is its token's next one; documents begin where none goes on
        follows = [label == token + 1 for token, label in zip(ids, labels[0].tolist(), strict=True)]
        assert [weight == 1.0 for weight in counted] == follows
        assert list(starts) == [0, *(at for at in range(1, length) if ids[at] != ids[at - 1] + 1)]
        assert data.num_targets(number) == sum(follows)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_a_step_is_the_same_on_every_layout(dp_size: int) -> None:
    lengths = [5, 17, 9, 30, 2]
    one = packed(lengths, 8, per_step=4).micro_batches(7, 0, 1)
    data = packed(lengths, 8, per_step=4)
    assert data.num_micro_batches(dp_size) == 4 // dp_size
    shares = [data.micro_batches(7, rank, dp_size) for rank in range(dp_size)]
    for number, batch in enumerate(one):
        other = shares[number % dp_size][number // dp_size]
        assert all(torch.equal(x, y) for x, y in zip(batch[:3], other[:3], strict=True))
        assert batch.document_starts == other.document_starts
    assert float(sum(batch.weights_BT.sum() for batch in one)) == pytest.approx(1.0)
    assert not packed(lengths, 8, per_step=4, seed=1).micro_batches(7, 0, 1)[0].inputs_BT.equal(one[0].inputs_BT)


def test_ranks_that_do_not_divide_a_step_are_refused() -> None:
    with pytest.raises(ConfigError, match="sequences_per_step 4 is no multiple of 3 data ranks"):
        packed([9], 8, per_step=4).num_micro_batches(3)


def test_what_is_held_out_is_not_trained_on() -> None:
    corpus = Numbered([10, 10, 10])
    training, held_out = corpus.split(0.4)

    def tokens(spans: Spans) -> list[int]:
        rows = zip(*spans, strict=True)
        return [int(token) for d, start, count in rows for token in corpus.read(d, start, start + count)]

    # Then the document on the border is cut
    assert training.counts.tolist() == [10, 8]
    assert held_out.starts.tolist() == [8, 0]
    assert sorted(tokens(training) + tokens(held_out)) == sorted(tokens(corpus.split(0.0)[0]))
