"""Clients of a pool under faults: mixed requests over HTTP, streamed, each compared with its reference."""

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import openai
from megatron_distkv.launch.evaluate import openai_client
from tqdm import tqdm

from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.engine.llm import LLM
from megatron_distkv.sampling_params import SamplingParams

# One request in this many is left by its client in the middle.
LEAVES_ONE_IN = 12


class Question(NamedTuple):
    """A prompt and how its answer is drawn; seeds make every answer reproducible."""

    prompt: list[int]
    sampling: SamplingParams


def questions(rng: random.Random, count: int, longest: int) -> list[Question]:
    """Half short, half up to `longest` tokens with their answer; greedy and sampled."""
    made = []
    for number in range(count):
        max_tokens = rng.randint(8, 40)
        most = longest - max_tokens if number % 2 else 60
        prompt = [rng.randrange(32, 127) for _ in range(rng.randint(4, most))]
        temperature = rng.choice((0.0, 0.8))
        made.append(
            Question(
                prompt, SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=number, ignore_eos=True)
            )
        )
    return made


def reference_answers(asked: list[Question], config: InstanceConfig) -> list[list[int]]:
    """What one instance with enough memory answers."""
    with LLM(config) as llm:
        return [
            llm.generate([question.prompt], question.sampling)[0].token_ids
            for question in tqdm(asked, "reference", unit="answer")
        ]


@dataclass
class Tally:
    """What all clients saw. `lost`: errors that are no refusals."""

    requests: int = 0
    mismatches: int = 0
    tokens: int = 0
    left: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    refusals: list[str] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    longest_pause_s: float = 0.0
    recomputed_tokens: int = 0
    full_recompute_tokens: int = 0


class Traffic:
    """`num_clients` threads that ask at random, until the end of the `with` block."""

    def __init__(
        self, base_url: str, asked: list[Question], answers: list[list[int]], num_clients: int, seed: int
    ) -> None:
        self.tally = Tally()
        self._client = openai_client(base_url)
        self._asked = list(zip(asked, answers, strict=True))
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(seed * 1000 + number),))
            for number in range(num_clients)
        ]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._client.close()

    def _run(self, rng: random.Random) -> None:
        while not self._stop.is_set():
            question, answer = rng.choice(self._asked)
            start_s = time.monotonic()
            leaves_after = rng.randint(1, 5) if rng.randrange(LEAVES_ONE_IN) == 0 else None
            try:
                self._ask(question, answer, leaves_after)
            except openai.APIError as error:
                self._note_error(error, time.monotonic() - start_s)
                time.sleep(0.2)

    def _ask(self, question: Question, answer: list[int], leaves_after: int | None) -> None:
        sampling = question.sampling
        stream = self._client.completions.create(
            model="distkv", prompt=question.prompt, max_tokens=sampling.max_tokens, temperature=sampling.temperature,
            seed=sampling.seed, stream=True, stream_options={"include_usage": True},
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
        got: list[int] = []
        kv: dict[str, Any] = {}
        longest_pause_s, last_s = 0.0, None
        for number, chunk in enumerate(stream):
            now_s = time.monotonic()
            longest_pause_s, last_s = max(longest_pause_s, now_s - (last_s or now_s)), now_s
            for choice in chunk.choices:
                got += choice.model_extra["token_ids"]
            if chunk.usage is not None:
                kv = chunk.usage.model_extra["kv"][0]
            if number == leaves_after:
                stream.close()
                break
        self._note_answer(got, answer, kv, longest_pause_s, has_left=not kv)

    def _note_answer(
        self, got: list[int], answer: list[int], kv: dict[str, Any], longest_pause_s: float, *, has_left: bool
    ) -> None:
        with self._lock:
            tally = self.tally
            tally.requests += 1
            tally.tokens += len(got)
            tally.left += has_left
            tally.mismatches += got != (answer[: len(got)] if has_left else answer)
            tally.longest_pause_s = max(tally.longest_pause_s, longest_pause_s)
            tally.recomputed_tokens += kv.get("num_recomputed_tokens", 0)
            tally.full_recompute_tokens += kv.get("num_tokens_at_losses", 0)

    def _note_error(self, error: openai.APIError, after_s: float) -> None:
        code = str(error.code or type(error).__name__)
        with self._lock:
            self.tally.requests += 1
            is_refusal = code in ("queue_full", "queue_timeout", "context_length_exceeded", "no_instance")
            (self.tally.refused if is_refusal else self.tally.lost)[code if is_refusal else f"{code}: {error}"] += 1
            if is_refusal:
                self.tally.refusals.append(f"after {after_s:.1f} s: {error}")


def reference_config(model: Path, run_dir: Path, rblock_size: int, longest: int) -> InstanceConfig:
    cache = {"num_rblocks": 2 * longest // rblock_size, "rblock_size": rblock_size}
    return InstanceConfig.model_validate(
        {"instance_id": "reference", "model": model, "run_dir": run_dir, "kv_cache": cache}
    )
