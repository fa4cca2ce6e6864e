"""The OpenAI API, by the openai package, over a real pool."""

import json
import random
import threading
import time
from typing import Any

import httpx
import pytest
from megatron_distkv.launch.local_cluster import LocalCluster
from openai import APIStatusError, BadRequestError, NotFoundError, OpenAI

from tests.e2e.conftest import OWN_TOKENS, Reference

GREEDY: dict[str, Any] = {"model": "distkv", "temperature": 0, "extra_body": {"ignore_eos": True}}


def random_prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(32, 127) for _ in range(length)]


def as_text(token_ids: list[int]) -> str:
    return bytes(token for token in token_ids if token < 256).decode(errors="replace")


def wait_for_no_debts(cluster: LocalCluster) -> None:
    end = time.monotonic() + 10
    while cluster.ledger.snapshot().loans:
        assert time.monotonic() < end, cluster.ledger.snapshot().loans
        time.sleep(0.05)


@pytest.mark.parametrize("length", [10, OWN_TOKENS // 2, 2 * OWN_TOKENS, int(2.5 * OWN_TOKENS)])
def test_text_is_the_references_whatever_the_length(
    length: int, client: OpenAI, reference: Reference, cluster: LocalCluster
) -> None:
    prompt = random_prompt(length, seed=length)
    answer = client.completions.create(prompt=prompt, max_tokens=16, **GREEDY)
    assert answer.choices[0].text == as_text(reference(prompt, 16))
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (length, 16)
    (kv,) = answer.usage.kv  # type: ignore[attr-defined]
    assert bool(kv["max_borrowed_rblocks"]) == (length > OWN_TOKENS)
    wait_for_no_debts(cluster)


def test_a_stream_is_the_whole_answer_in_pieces(client: OpenAI, reference: Reference) -> None:
    prompt = random_prompt(300, seed=5)
    stream = client.completions.create(
        prompt=prompt, max_tokens=16, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == as_text(reference(prompt, 16))
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 16


def test_chat_with_logprobs_and_many_choices(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="distkv", messages=[{"role": "user", "content": "hello"}], max_tokens=5, n=3, temperature=1.0, seed=4,
        logprobs=True, top_logprobs=2, extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 5
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in content)
    again = client.chat.completions.create(
        model="distkv", messages=[{"role": "user", "content": "hello"}], max_tokens=5, n=3, temperature=1.0, seed=4,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]


def test_a_stop_string_ends_the_text_before_it(client: OpenAI, reference: Reference) -> None:
    prompt = random_prompt(40, seed=8)
    text = as_text(reference(prompt, 24))
    stop = text[6:8]
    answer = client.completions.create(prompt=prompt, max_tokens=24, stop=[stop], **GREEDY)
    assert answer.choices[0].text == text[: text.find(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_short_requests_keep_coming_while_long_ones_run(
    client: OpenAI, reference: Reference, cluster: LocalCluster
) -> None:
    # Given short requests on every instance, all the time
    wrong: list[str] = []
    is_over = threading.Event()
    short = {name: random_prompt(20, seed=i) for i, name in enumerate(cluster.instance_ids)}
    expected = {name: as_text(reference(prompt, 12)) for name, prompt in short.items()}
    num_done = dict.fromkeys(short, 0)

    def keep_asking(name: str) -> None:
        extra = {"ignore_eos": True, "instance": name}
        while not is_over.is_set():
            answer = client.completions.create(
                model="distkv", prompt=short[name], max_tokens=12, temperature=0, extra_body=extra
            )
            num_done[name] += 1
            if answer.choices[0].text != expected[name]:
                wrong.append(answer.choices[0].text)

    threads = [threading.Thread(target=keep_asking, args=(name,)) for name in short]
    long_prompts = [random_prompt(length, seed=length) for length in (260, 300)]
    long_expected = [as_text(reference(prompt, 12)) for prompt in long_prompts]
    for thread in threads:
        thread.start()
    try:
        # When long prompts come
        answers = [client.completions.create(prompt=p, max_tokens=12, **GREEDY).choices[0].text for p in long_prompts]
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    # Then everything is right, and everybody was served
    assert answers == long_expected
    assert wrong == []
    assert all(count > 0 for count in num_done.values())
    wait_for_no_debts(cluster)


def test_leaving_a_stream_frees_the_memory(client: OpenAI, cluster: LocalCluster) -> None:
    stream = client.completions.create(prompt=random_prompt(280), max_tokens=60, stream=True, **GREEDY)
    next(iter(stream))
    assert cluster.ledger.snapshot().loans
    stream.close()
    wait_for_no_debts(cluster)


def test_errors_have_openais_shape(client: OpenAI, cluster: LocalCluster) -> None:
    with pytest.raises(BadRequestError, match="the longest that the pool's memory holds now is") as too_long:
        client.completions.create(prompt=random_prompt(1000), max_tokens=10, **GREEDY)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(BadRequestError, match="the longest that the pool's memory holds now is"):
        client.chat.completions.create(
            model="distkv", messages=[{"role": "user", "content": "x" * 1000}], stream=True
        )  # fmt: skip
    with pytest.raises(NotFoundError, match="serves 'distkv'"):
        client.completions.create(model="gpt-5", prompt="x")
    with pytest.raises(BadRequestError, match="no live instance is called 'nobody'"):
        client.completions.create(model="distkv", prompt="x", extra_body={"instance": "nobody"})
    with pytest.raises(APIStatusError) as bad:
        client.completions.create(model="distkv", prompt="x", extra_body={"tools": []})
    assert bad.value.status_code == 400
    missing = httpx.get(cluster.base_url + "/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")


def test_models_health_metrics_and_debts(client: OpenAI, cluster: LocalCluster) -> None:
    root = cluster.base_url.removesuffix("/v1")
    client.completions.create(model="distkv", prompt="x", max_tokens=2)
    assert [model.id for model in client.models.list()] == ["distkv"]
    assert sorted(httpx.get(root + "/health").json()["instances"]) == cluster.instance_ids
    text = httpx.get(root + "/metrics").text
    assert "distkv_output_tokens_total" in text
    assert 'distkv_rblocks{instance="instance-0",state="free"}' in text
    assert "instance-0" in httpx.get(root + "/debts").text
    assert json.loads(httpx.get(cluster.base_url + "/models").text)["object"] == "list"
