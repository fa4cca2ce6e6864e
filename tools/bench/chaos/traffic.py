"""Clients of a pool under faults: mixed requests over HTTP, streamed or not, each compared with its reference."""

import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx
import openai

from tools.bench.chaos.gateways import Gateways
from tools.bench.chaos.questions import Answer, Question
from tools.bench.chaos.tally import Got, Tally

# One streamed request in this many is left by its client in the middle.
LEAVES_ONE_IN = 10
# One request in this many is answered as a whole.
WHOLE_ONE_IN = 4
# Silence for longer than a gateway holds a request (admission.max_queue_wait_s: 60 s) is a loss.
SILENCE_S = 90.0
# Connections are given up before the server does (uvicorn: 5 s), or a request meets one that is just being closed.
KEEPALIVE_S = 2.0
# A request whose gateway died is asked again, at the other one. Both may be away for some seconds.
MOST_ATTEMPTS, BETWEEN_ATTEMPTS_S = 12, 1.0


class Traffic:
    """`num_clients` threads that ask at random, until the end of the `with` block."""

    def __init__(
        self, gateways: Gateways, asked: Sequence[tuple[Question, list[Answer]]], num_clients: int, seed: int,
        logprob_tolerance: float,
    ) -> None:  # fmt: skip
        self.tally = Tally(logprob_tolerance)
        self._gateways = gateways
        self._clients = {name: _client(url) for name, url in gateways.base_urls.items()}
        self._asked = asked
        self._stop = threading.Event()
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
        for client in self._clients.values():
            client.close()

    def _run(self, rng: random.Random) -> None:
        while not self._stop.is_set():
            question, expected = rng.choice(self._asked)
            is_streamed = rng.randrange(WHOLE_ONE_IN) != 0
            leaves_after = rng.randint(1, 5) if is_streamed and rng.randrange(LEAVES_ONE_IN) == 0 else None
            start_s = time.monotonic()
            try:
                got = self._ask_until_answered(rng, question, is_streamed, leaves_after)
            except (openai.APIError, httpx.HTTPError) as error:
                code = str(getattr(error, "code", None) or type(error).__name__)
                self.tally.note_error(code, str(error), time.monotonic() - start_s)
                time.sleep(0.2)
            else:
                self.tally.note_answer(got, expected, is_streamed=is_streamed)

    def _ask_until_answered(
        self, rng: random.Random, question: Question, is_streamed: bool, leaves_after: int | None
    ) -> Got:
        gateway = self._gateways.pick(rng)
        for attempt in range(1, MOST_ATTEMPTS + 1):
            start_s = time.monotonic()
            self.tally.note_asked(gateway, question.n)
            try:
                client = self._clients[gateway]
                return _streamed(client, question, leaves_after) if is_streamed else _whole(client, question)
            except openai.APITimeoutError:
                raise
            except (openai.APIConnectionError, httpx.TransportError):
                if attempt == MOST_ATTEMPTS or not self._gateways.was_away(gateway, start_s):
                    raise
            self.tally.note_retried()
            time.sleep(BETWEEN_ATTEMPTS_S)
            gateway = self._gateways.pick(rng, other_than=gateway)
        raise AssertionError("the last attempt returns or raises")


def _client(base_url: str) -> openai.OpenAI:
    limits = httpx.Limits(keepalive_expiry=KEEPALIVE_S)
    http_client = openai.DefaultHttpxClient(limits=limits, timeout=SILENCE_S)
    return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=SILENCE_S, http_client=http_client)


def _whole(client: openai.OpenAI, question: Question) -> Got:
    start_s = time.monotonic()
    answer = client.completions.create(**question.body())
    choices = [_Choice() for _ in range(question.n)]
    for choice in answer.choices:
        choices[choice.index].add(choice)
    receipts = (answer.usage.model_extra or {})["kv"] if answer.usage else []
    return Got([choice.as_answer() for choice in choices], receipts, time.monotonic() - start_s)


def _streamed(client: openai.OpenAI, question: Question, leaves_after: int | None) -> Got:
    """Raises httpx.RemoteProtocolError also where the stream ends without its last event."""
    stream = client.completions.create(**question.body(), stream=True, stream_options={"include_usage": True})
    choices = [_Choice() for _ in range(question.n)]
    receipts: list[dict[str, Any]] = []
    longest_pause_s, last_s = 0.0, None
    for number, chunk in enumerate(stream):
        now_s = time.monotonic()
        longest_pause_s, last_s = max(longest_pause_s, now_s - (last_s or now_s)), now_s
        for choice in chunk.choices:
            choices[choice.index].add(choice)
        if chunk.usage is not None:
            receipts = (chunk.usage.model_extra or {})["kv"]
        if number == leaves_after:
            stream.close()
            break
    else:
        if not receipts:
            raise httpx.RemoteProtocolError("the stream ended without its last event")
    return Got([choice.as_answer() for choice in choices], receipts, longest_pause_s)


class _Choice:
    """One choice, from its pieces."""

    def __init__(self) -> None:
        self._answer = Answer([], "", [], None)

    def add(self, piece: Any) -> None:
        token_ids, text, logprobs, _ = self._answer
        more = piece.logprobs.token_logprobs if piece.logprobs is not None else []
        self._answer = Answer(
            token_ids + piece.model_extra["token_ids"], text + piece.text, logprobs + more, piece.finish_reason
        )

    def as_answer(self) -> Answer:
        return self._answer
