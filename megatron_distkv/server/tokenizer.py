"""Text to tokens and back, one token after the other."""

import codecs
import json
from pathlib import Path
from typing import Any, Protocol

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as HFBackend

from megatron_distkv.errors import UserError
from megatron_distkv.server.errors import bad_request

Messages = list[dict[str, Any]]
REPLACEMENT = "\ufffd"
# The last tokens that may still become one character: UTF-8 has at most four bytes, and a token at least one.
MOST_PER_CHARACTER = 3
# Tokens without text of their own that wait at most.
MOST_WAITING = 16


class Detokenizer(Protocol):
    def add(self, token_id: int) -> str:
        """The text that is certain now; the bytes of an unfinished character wait."""

    def flush(self) -> str:
        """What still waits, at the end."""


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def render_chat(self, messages: Messages) -> list[int]: ...
    def detokenizer(self) -> Detokenizer: ...
    def token_text(self, token_id: int) -> str: ...


def load_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    """`tokenizer.json` in the checkpoint's directory, else bytes for a model with at least 258 tokens."""
    if (directory / "tokenizer.json").exists():
        return HFTokenizer(directory)
    if vocab_size >= ByteTokenizer.EOS + 1:
        return ByteTokenizer()
    raise UserError(f"no tokenizer.json in {directory}, and a vocabulary of {vocab_size} is too small for bytes (258)")


class ByteTokenizer:
    """Token = byte; 256 begins a text, 257 ends one."""

    BOS = 256
    EOS = 257

    def encode(self, text: str) -> list[int]:
        return [self.BOS, *text.encode()]

    def render_chat(self, messages: Messages) -> list[int]:
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return self.encode("".join(lines) + "assistant: ")

    def detokenizer(self) -> "ByteDetokenizer":
        return ByteDetokenizer()

    def token_text(self, token_id: int) -> str:
        return bytes([token_id]).decode(errors="replace") if token_id < self.BOS else ""


class ByteDetokenizer:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id])) if token_id < ByteTokenizer.BOS else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class HFTokenizer:
    """A `tokenizer.json`, with the chat template of `tokenizer_config.json` or `chat_template.jinja`."""

    def __init__(self, directory: Path) -> None:
        self._backend = HFBackend.from_file(str(directory / "tokenizer.json"))
        config_path = directory / "tokenizer_config.json"
        self._config = json.loads(config_path.read_text()) if config_path.exists() else {}
        template_path = directory / "chat_template.jinja"
        source = template_path.read_text() if template_path.exists() else self._config.get("chat_template")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_template_error
        self._template = environment.from_string(source) if isinstance(source, str) else None

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text).ids)

    def render_chat(self, messages: Messages) -> list[int]:
        if self._template is None:
            raise bad_request("this model has no chat template; use /v1/completions")
        special = {key: _text_of(self._config.get(key)) for key in ("bos_token", "eos_token")}
        try:
            text = self._template.render(messages=messages, add_generation_prompt=True, **special)
        except jinja2.TemplateError as error:
            raise bad_request(f"the model's chat template refuses these messages: {error}", "messages") from None
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def detokenizer(self) -> "HFDetokenizer":
        return HFDetokenizer(self._backend)

    def token_text(self, token_id: int) -> str:
        return str(self._backend.decode([token_id], skip_special_tokens=False))


class HFDetokenizer:
    """Decodes a sliding window: a token's text may depend on the one before (spaces), and a character on several."""

    def __init__(self, backend: HFBackend) -> None:
        self._backend = backend
        self._before: list[int] = []  # tokens that were sent last, kept for the spaces of the next ones
        self._waiting: list[int] = []

    def add(self, token_id: int) -> str:
        self._waiting.append(token_id)
        before, now = self._decode(self._before), self._decode(self._before + self._waiting)
        if len(now) > len(before) and not now.endswith(REPLACEMENT):
            return self._send(len(self._waiting), now[len(before) :])
        if len(self._waiting) > MOST_WAITING:  # these make no character any more, or no text at all
            sure = len(self._waiting) - MOST_PER_CHARACTER
            return self._send(sure, self._decode(self._before + self._waiting[:sure])[len(before) :])
        return ""

    def flush(self) -> str:
        before, now = self._decode(self._before), self._decode(self._before + self._waiting)
        return self._send(len(self._waiting), now[len(before) :])

    def _send(self, count: int, text: str) -> str:
        self._before, self._waiting = self._waiting[:count], self._waiting[count:]
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._backend.decode(token_ids))


def _text_of(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token or ""


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)
