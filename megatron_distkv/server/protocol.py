"""Request bodies of the OpenAI API. An unknown key is an error, never silently dropped."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_distkv.sampling_params import MAX_LOGPROBS, SamplingParams
from megatron_distkv.server.errors import ApiError, bad_request

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
DEFAULT_CHAT_TOKENS = 256
MAX_CHOICES = 128


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(BaseModel):
    """What completions and chat share. Extensions as in vLLM: top_k, min_p, ignore_eos, stop_token_ids,
    priority."""

    model_config = ConfigDict(extra="forbid")
    model: str = ""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    priority: int = 0  # lower is more important
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    presence_penalty: float = Field(0.0, ge=0.0, le=0.0)
    frequency_penalty: float = Field(0.0, ge=0.0, le=0.0)
    return_token_ids: bool = False  # as vLLM's: choices carry `token_ids`
    instance: str | None = None  # ours: the instance that must take the request

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int, logprobs: int | None, choice: int) -> SamplingParams:
        """Parameters of choice number `choice`; each choice has a seed of its own. Raises ApiError."""
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                temperature=self.temperature,
                top_k=max(0, self.top_k),
                top_p=self.top_p,
                min_p=self.min_p,
                seed=None if self.seed is None else self.seed + choice,
                stop_token_ids=tuple(self.stop_token_ids),
                ignore_eos=self.ignore_eos,
                priority=self.priority,
                logprobs=logprobs,
            )
        except ValueError as error:
            raise bad_request(str(error), str(error).split()[0]) from None


class CompletionRequest(GenerationRequest):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(DEFAULT_COMPLETION_TOKENS, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None

    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt; raises ApiError where there is none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and all(isinstance(part, int) for part in self.prompt):
            return [list(self.prompt)]  # type: ignore[arg-type]
        if not self.prompt:
            raise bad_request("the prompt is empty: it needs at least one token", "prompt")
        return list(self.prompt)  # type: ignore[arg-type]


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[dict[str, Any]] | None = None

    def as_template_input(self) -> dict[str, Any]:
        """Parts of type text become one string; other parts are an error."""
        if isinstance(self.content, list):
            other = [part.get("type") for part in self.content if part.get("type") != "text"]
            if other:
                raise bad_request(f"content of type {other[0]!r} is not supported: text only", "messages")
            return {**self.model_dump(), "content": "".join(part["text"] for part in self.content)}
        return {**self.model_dump(), "content": self.content or ""}


class ChatRequest(GenerationRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def token_limit(self) -> int:
        return self.max_completion_tokens or self.max_tokens or DEFAULT_CHAT_TOKENS


def parse_body(kind: type[BaseModel], body: bytes) -> Any:
    """The body as `kind`; raises ApiError, one sentence that names the key."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is not JSON: {first['msg']}") from None
        if first["type"] == "extra_forbidden":
            raise bad_request(f"the key {key!r} is not supported", key) from None
        raise bad_request(f"{key}: {first['msg']}" if key else str(first["msg"]), key or None) from None
