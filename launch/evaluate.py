"""Passkey recall over HTTP: asks any OpenAI-compatible server, streaming, and keeps what came back."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_distkv.errors import UserError
from megatron_distkv.training.passkey import NUM_DIGITS, Prompt

# The digits, the closing marker, and some prose: enough to compare tokens with a reference.
ANSWER_TOKENS = 24


@dataclass
class PasskeyResult:
    """One prompt's answer. `kv` is the receipt of our own server: where the request's rBlocks lay."""

    context_tokens: int
    depth: float
    expected: str
    answer: str
    token_ids: list[int] = field(default_factory=list)
    kv: dict[str, Any] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        return self.answer[:NUM_DIGITS] == self.expected

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "is_right": self.is_right}


def openai_client(base_url: str) -> Any:
    """Raises UserError when the openai package is missing."""
    try:
        from openai import OpenAI
    except ImportError:
        raise UserError("evaluation needs the openai package: `pip install 'megatron-distkv[eval]'`") from None
    return OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=600)


def ask(client: Any, model: str, length: int, depth: float, prompt: Prompt, **extra: Any) -> PasskeyResult:
    """Stream one greedy completion; `extra` are further keys of the body."""
    result = PasskeyResult(length, depth, prompt.digits.decode(), "")
    stream = client.completions.create(
        model=model,
        prompt=prompt.token_ids,
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True, "ignore_eos": True, **extra},
    )
    for chunk in stream:
        for choice in chunk.choices:
            result.answer += choice.text
            result.token_ids += choice.model_extra.get("token_ids") or []
        if chunk.usage is not None:
            receipts = (chunk.usage.model_extra or {}).get("kv") or [{}]
            result.kv = receipts[0]
    return result


def recall_by_length(results: Sequence[PasskeyResult]) -> dict[int, float]:
    """Share of right answers at each context length."""
    lengths = sorted({result.context_tokens for result in results})
    by_length = {n: [result.is_right for result in results if result.context_tokens == n] for n in lengths}
    return {length: sum(right) / len(right) for length, right in by_length.items()}
