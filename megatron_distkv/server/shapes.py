"""Layouts of the two endpoints' answers."""

from collections.abc import Sequence
from typing import Any

from megatron_distkv.messages import TokenLogprobs
from megatron_distkv.server.answer import Choice
from megatron_distkv.server.generation import Piece
from megatron_distkv.server.tokenizer import Tokenizer


class CompletionShape:
    object_name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl"

    def choice(self, choice: Choice, tokenizer: Tokenizer) -> dict[str, Any]:
        logprobs = _completion_logprobs(choice.token_ids, choice.logprobs, 0, tokenizer)
        return _completion(choice.index, choice.text, logprobs, choice.finish_reason)

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        return None

    def chunk(self, piece: Piece, text_so_far: str, tokenizer: Tokenizer) -> dict[str, Any]:
        logprobs = _completion_logprobs(piece.token_ids, piece.logprobs, len(text_so_far), tokenizer)
        return _completion(piece.choice, piece.text, logprobs, piece.finish_reason)


def _completion(index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _completion_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], offset: int, tokenizer: Tokenizer
) -> dict[str, Any] | None:
    if not logprobs:
        return None
    texts = [tokenizer.token_text(token_id) for token_id in token_ids]
    offsets = [offset + sum(map(len, texts[:place])) for place in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [entry.chosen for entry in logprobs],
        "top_logprobs": [{tokenizer.token_text(i): value for i, value in entry.top} for entry in logprobs],
        "text_offset": offsets,
    }


class ChatShape:
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def choice(self, choice: Choice, tokenizer: Tokenizer) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": _chat_logprobs(choice.token_ids, choice.logprobs, tokenizer),
            "finish_reason": choice.finish_reason,
        }

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, piece: Piece, text_so_far: str, tokenizer: Tokenizer) -> dict[str, Any]:
        return {
            "index": piece.choice,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": _chat_logprobs(piece.token_ids, piece.logprobs, tokenizer),
            "finish_reason": piece.finish_reason,
        }


def _chat_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer
) -> dict[str, Any] | None:
    if not logprobs:
        return None
    entries = []
    for token_id, entry in zip(token_ids, logprobs, strict=True):
        top = [_chat_logprob(other, value, tokenizer) for other, value in entry.top]
        entries.append({**_chat_logprob(token_id, entry.chosen, tokenizer), "top_logprobs": top})
    return {"content": entries, "refusal": None}


def _chat_logprob(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    text = tokenizer.token_text(token_id)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
