"""Tokenizers, stop strings and request bodies: the parts of the gateway that need no pool."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_distkv.errors import UserError
from megatron_distkv.server.errors import ApiError
from megatron_distkv.server.protocol import ChatRequest, CompletionRequest, parse_body
from megatron_distkv.server.stop_strings import StopStrings
from megatron_distkv.server.tokenizer import MOST_WAITING, ByteTokenizer, HFDetokenizer, HFTokenizer, load_tokenizer

TEXT = "Grüße, 世界 — it's 3 o'clock. 👩‍🚀 ok"


@pytest.fixture(scope="module")
def hf_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real byte-level BPE tokenizer.json with a chat template."""
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT, "the cat sat on the mat"], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    (directory / "chat_template.jinja").write_text(template)
    (directory / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}}')
    return directory


def streamed(tokenizer: ByteTokenizer | HFTokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.add(token_id) for token_id in token_ids), detokenizer.flush()]


def test_text_streams_whole_characters_only(hf_directory: Path) -> None:
    for tokenizer in (ByteTokenizer(), HFTokenizer(hf_directory)):
        pieces = streamed(tokenizer, tokenizer.encode(TEXT))
        assert "".join(pieces) == TEXT
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["continuation bytes", "special tokens"])
def test_what_makes_no_character_is_sent_on_the_way_and_costs_no_more_and_more(hf_directory: Path, kind: str) -> None:
    tokenizer = HFTokenizer(hf_directory)
    bad = tokenizer.encode("é")[-1] if kind == "continuation bytes" else 0
    # Given a detokenizer that tells how many tokens it decodes
    decoded: list[int] = []

    class Counting:
        def decode(self, ids: list[int]) -> str:
            decoded.append(len(ids))
            return str(Tokenizer.from_file(str(hf_directory / "tokenizer.json")).decode(ids))

    detokenizer = HFDetokenizer(Counting())  # type: ignore[arg-type]
    pieces = [detokenizer.add(bad) for _ in range(100)]
    # Then each look is at a few tokens, and nothing waits for the end
    assert max(decoded) <= 2 * MOST_WAITING + 2
    text = "".join(pieces) + detokenizer.flush()
    assert text == ("\ufffd" * 100 if kind == "continuation bytes" else "")
    assert not text or len("".join(pieces)) >= 100 - MOST_WAITING
    # And a character that begins after them is whole
    assert "".join(detokenizer.add(token_id) for token_id in tokenizer.encode("世界")) == "世界"


def test_a_broken_character_is_shown_as_such_at_the_end() -> None:
    assert "".join(streamed(ByteTokenizer(), [*b"a", 0xE4, 0xB8])) == "a\ufffd"


def test_the_chat_template_is_used(hf_directory: Path) -> None:
    tokenizer = HFTokenizer(hf_directory)
    ids = tokenizer.render_chat([{"role": "user", "content": "the cat"}])
    assert "".join(map(tokenizer.token_text, ids)) == "<s>[user]the cat[assistant]"


def test_without_a_tokenizer_a_small_vocabulary_is_refused(tmp_path: Path) -> None:
    assert isinstance(load_tokenizer(tmp_path, 272), ByteTokenizer)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path, 131)


@given(st.text("ab.", max_size=30), st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_cut_a_stream_where_they_cut_the_whole(text: str, stops: list[str], data: st.DataObject) -> None:
    # Given the definition: the text before the earliest occurrence that a reader of the stream can see
    cuts, at, expected = StopStrings(stops), 0, ""
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if ends:
        first_end = min(ends)
        expected = text[: min(text.find(stop) for stop in stops if stop in text[:first_end])]
    else:
        expected = text
    # When streamed one character at a time, then the same comes out, and nothing is taken back
    out = ""
    while at < len(text):
        out += cuts.add(text[at])
        assert expected.startswith(out)
        at += 1
    out += cuts.flush()
    assert out == expected
    assert cuts.has_stopped == bool(ends)


@pytest.mark.parametrize(
    ("body", "param", "sentence"),
    [
        (b"{", None, "not JSON"),
        (b'{"prompt": "x", "tools": []}', "tools", "not supported"),
        (b'{"prompt": "x", "max_tokens": 0}', "max_tokens", "greater than or equal to 1"),
        (b"{}", "prompt", "required"),
        (b'{"prompt": "x", "presence_penalty": 1}', "presence_penalty", "less than or equal to 0"),
    ],
)
def test_a_bad_body_is_one_sentence_with_its_key(body: bytes, param: str | None, sentence: str) -> None:
    with pytest.raises(ApiError, match=sentence) as caught:
        parse_body(CompletionRequest, body)
    assert caught.value.status == 400
    assert caught.value.param == param


def test_bad_sampling_values_name_their_key() -> None:
    body = parse_body(ChatRequest, b'{"messages": [{"role": "user", "content": "x"}], "temperature": -1}')
    with pytest.raises(ApiError, match="temperature must be in") as caught:
        body.sampling(5, None, 0)
    assert caught.value.param == "temperature"


def test_each_choice_has_its_own_seed() -> None:
    body = parse_body(CompletionRequest, b'{"prompt": "x", "seed": 7, "n": 2}')
    assert [body.sampling(5, None, choice).seed for choice in range(2)] == [7, 8]
