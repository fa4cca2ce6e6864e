"""What clients ask: mixed requests of the completions API, each with the answer of one instance with enough memory."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.engine.llm import LLM, Completion
from megatron_distkv.sampling_params import SamplingParams
from megatron_distkv.server.tokenizer import ByteTokenizer

# One short prompt in this many is asked for several choices at once.
MANY_ONE_IN = 3
MOST_CHOICES = 3
# By where K and V are kept: rounding alone stays far below (README: kv_cache.dtype).
LOGPROB_TOLERANCE = {"auto": 5e-5, "int8": 2e-3}


@dataclass(frozen=True)
class Question:
    """`n` choices; number i draws with seed + i, as at the gateway. Seeds make every answer reproducible."""

    prompt: list[int]
    sampling: SamplingParams
    n: int = 1
    stop: str | None = None

    def body(self) -> dict[str, Any]:
        """Arguments of `client.completions.create`."""
        sampling = self.sampling
        extra = {
            "return_token_ids": True, "ignore_eos": True, "top_k": sampling.top_k,
            "stop_token_ids": list(sampling.stop_token_ids),
        }  # fmt: skip
        body = {
            "model": "distkv", "prompt": self.prompt, "max_tokens": sampling.max_tokens, "n": self.n,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed, "extra_body": extra,
        }  # fmt: skip
        if sampling.logprobs is not None:
            body["logprobs"] = sampling.logprobs
        return body if self.stop is None else {**body, "stop": [self.stop]}


class Answer(NamedTuple):
    """One choice. `logprobs` are those of its tokens, none where they were not asked for."""

    token_ids: list[int]
    text: str
    logprobs: list[float]
    finish_reason: str | None


def questions(rng: random.Random, count: int, longest: int) -> list[Question]:
    """Half short, half up to `longest` tokens with their answer; greedy and sampled."""
    made = []
    for number in range(count):
        is_long = number % 2 == 1
        max_tokens = rng.randint(8, 40)
        prompt = [rng.randrange(32, 127) for _ in range(rng.randint(4, longest - max_tokens if is_long else 60))]
        sampling = SamplingParams(
            max_tokens=max_tokens, seed=100 * number, ignore_eos=True, logprobs=rng.choice((None, 0, 1, 5)),
            temperature=rng.choice((0.0, 0.8)), top_p=rng.choice((1.0, 0.9)), top_k=rng.choice((0, 40)),
        )  # fmt: skip
        many = not is_long and rng.randrange(MANY_ONE_IN) == 0
        made.append(Question(prompt, sampling, rng.randint(2, MOST_CHOICES) if many else 1))
    return made


def answered(
    rng: random.Random, asked: Sequence[Question], config: InstanceConfig
) -> list[tuple[Question, list[Answer]]]:
    """Each with its answers; some now end at a stop string or a stop token that is in them."""
    with LLM(config) as llm:
        whole = [_choices(llm, question) for question in tqdm(asked, "reference", unit="question")]
    return [_with_an_end(rng, question, choices) for question, choices in zip(asked, whole, strict=True)]


def reference_config(model: Path, run_dir: Path, rblock_size: int, longest: int, kv_dtype: str) -> InstanceConfig:
    cache = {"num_rblocks": 2 * MOST_CHOICES * longest // rblock_size, "rblock_size": rblock_size, "dtype": kv_dtype}
    return InstanceConfig.model_validate(
        {"instance_id": "reference", "model": model, "run_dir": run_dir, "kv_cache": cache}
    )


def _choices(llm: LLM, question: Question) -> list[Completion]:
    sampling = question.sampling
    assert sampling.seed is not None
    each = [_replaced(sampling, seed=sampling.seed + number) for number in range(question.n)]
    return llm.generate([question.prompt] * question.n, each)


def _with_an_end(rng: random.Random, question: Question, whole: Sequence[Completion]) -> tuple[Question, list[Answer]]:
    token_ids = whole[0].token_ids
    end = rng.choice(("length", "length", "stop string", "stop token"))
    if end == "stop token":
        stop_id = token_ids[rng.randrange(len(token_ids) // 3, len(token_ids))]
        ended = _replaced(question.sampling, stop_token_ids=(stop_id,))
        question = Question(question.prompt, ended, question.n)
    elif end == "stop string":
        text = _text(token_ids)
        at = rng.randrange(len(text) // 3, max(1, len(text) - 1))
        question = Question(question.prompt, question.sampling, question.n, text[at : at + 2])
    return question, [_answer(question, completion) for completion in whole]


def _answer(question: Question, completion: Completion) -> Answer:
    """What of a completion of full length is the answer, found in the plainest way: all again for each prefix."""
    stop_ids, stop = question.sampling.stop_token_ids, question.stop
    logprobs = [entry.chosen for entry in completion.logprobs]
    for size, token_id in enumerate(completion.token_ids, 1):
        so_far = completion.token_ids[:size]
        if token_id in stop_ids:
            return Answer(so_far, _text(so_far[:-1]), logprobs[:size], "stop")
        is_last = size == len(completion.token_ids)
        text = _text(so_far, is_whole=is_last)
        if stop and stop in text:
            return Answer(so_far, text[: text.index(stop)], logprobs[:size], "stop")
    return Answer(completion.token_ids, _text(completion.token_ids), logprobs, "length")


def _text(token_ids: Sequence[int], *, is_whole: bool = True) -> str:
    """Without the bytes of an unfinished character, unless it is the whole text."""
    detokenizer = ByteTokenizer().detokenizer()
    text = "".join(detokenizer.add(token_id) for token_id in token_ids)
    return text + detokenizer.flush() if is_whole else text


def _replaced(sampling: SamplingParams, **changes: Any) -> SamplingParams:
    return SamplingParams(**{**{name: getattr(sampling, name) for name in sampling.__struct_fields__}, **changes})
