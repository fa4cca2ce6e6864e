"""A request whose logits are NaN ends by itself: nobody beside it, and nobody after it, feels anything."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron_distkv.launch.local_cluster import LocalCluster
from openai import APIError, InternalServerError
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import cluster_config, openai_client
from tests.model.llamas import save_llama

POISON = 7  # the token whose embedding is NaN
HEALTHY = [40 + i % 90 for i in range(60)]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two instances of a checkpoint with one bad row."""
    folder = save_llama(tmp_path_factory.mktemp("poisoned"), vocab_size=272)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(weights, file, {"format": "pt"})
    with LocalCluster(cluster_config(Path(folder), instances=2)) as running:
        yield running


def complete(cluster: LocalCluster, prompt: list[int], max_tokens: int, **settings: object) -> str:
    with openai_client(cluster) as api:
        answer = api.completions.create(
            model="distkv",
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0.0,
            extra_body={"ignore_eos": True, **settings},
        )
        return answer.choices[0].text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_that_request_fails_and_says_why(poisoned: LocalCluster, temperature: float) -> None:
    # Given what a healthy request answers, and one that runs
    expected = complete(poisoned, HEALTHY, 40)
    beside: list[str] = []
    runs = threading.Thread(target=lambda: beside.append(complete(poisoned, HEALTHY, 40)))
    runs.start()

    # When many come whose numbers go to NaN, with KV of theirs all over the pool
    for length in (1, 90, 90, 90, 90, 90):
        with openai_client(poisoned) as api, pytest.raises(InternalServerError) as refused:
            api.completions.create(
                model="distkv", prompt=[POISON] * length, max_tokens=3, temperature=temperature, seed=1
            )
        assert refused.value.code == "bad_logits"
        assert f"logits after {length} tokens of this request are not finite" in str(refused.value)

    # Then who ran beside them, and who gets their rBlocks next, has the same answer, from the same processes
    runs.join(60)
    assert beside == [expected]
    assert [complete(poisoned, HEALTHY, 40) for _ in range(4)] == [expected] * 4
    assert all(child.is_running for child in (poisoned.child("instance-0"), poisoned.child("instance-1")))


def test_a_stream_ends_with_the_same_sentence(poisoned: LocalCluster) -> None:
    with openai_client(poisoned) as api, pytest.raises(APIError, match="are not finite"):
        for _ in api.completions.create(model="distkv", prompt=[5, POISON], max_tokens=3, stream=True):
            pass
