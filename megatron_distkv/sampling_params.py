"""How the next token is chosen, per request. Names and meanings as in vLLM and the OpenAI API."""

import msgspec

MAX_LOGPROBS = 20


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling of one request. Raises ValueError (one sentence, naming the field) on values that make no sense."""

    max_tokens: int = 16
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set whose probability reaches p
    min_p: float = 0.0  # drop tokens less likely than min_p times the likeliest
    seed: int | None = None  # the same seed and prompt give the same tokens, wherever the rBlocks lie
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    priority: int = 0  # who gets memory first, and is preempted last: lower is more important, as in vLLM
    logprobs: int | None = None  # also report this many top log-probabilities per output token (0: the chosen one only)

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}")
        _require(0.0 <= self.temperature <= 100.0, f"temperature must be in [0, 100], got {self.temperature}")
        _require(self.top_k >= 0, f"top_k must be 0 (off) or positive, got {self.top_k}")
        _require(0.0 < self.top_p <= 1.0, f"top_p must be in (0, 1], got {self.top_p}")
        _require(0.0 <= self.min_p <= 1.0, f"min_p must be in [0, 1], got {self.min_p}")
        _require(abs(self.priority) < 1 << 31, f"priority must have at most 31 bits, got {self.priority}")
        _require(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            f"logprobs must be between 0 and {MAX_LOGPROBS}, got {self.logprobs}",
        )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)
