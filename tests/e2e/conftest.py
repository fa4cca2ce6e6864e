"""A whole pool of real processes, and the reference: one instance with enough memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from megatron_distkv.launch.local_cluster import LocalCluster
from openai import OpenAI

from megatron_distkv.config.cluster import ClusterConfig
from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.engine.llm import LLM
from megatron_distkv.sampling_params import SamplingParams

NUM_RBLOCKS, RBLOCK_SIZE = 16, 8
OWN_TOKENS = NUM_RBLOCKS * RBLOCK_SIZE

Reference = Callable[[list[int], int], list[int]]


def cluster_config(checkpoint: Path, **changes: Any) -> ClusterConfig:
    values: dict[str, Any] = {
        "model": checkpoint,
        "instances": 3,
        "launcher": "python",
        "port": 0,
        "kv_cache": {"num_rblocks": NUM_RBLOCKS, "rblock_size": RBLOCK_SIZE},
        "scheduler": {"max_batched_tokens": 48},
        "ledger": {"url": "embedded://", "heartbeat_interval_s": 0.1, "lease_s": 2.0},
        "lending": {"deadline_s": 2.0},
        **changes,
    }
    return ClusterConfig.model_validate(values)


@pytest.fixture(scope="session")
def cluster(byte_llama: Path) -> Iterator[LocalCluster]:
    """Shared by the tests that break nothing."""
    with LocalCluster(cluster_config(byte_llama)) as running:
        yield running


def openai_client(cluster: LocalCluster) -> OpenAI:
    return OpenAI(base_url=cluster.base_url, api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def client(cluster: LocalCluster) -> Iterator[OpenAI]:
    with openai_client(cluster) as api:
        yield api


@pytest.fixture(scope="session")
def reference(byte_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    with start_reference(byte_llama, tmp_path_factory.mktemp("ref"), "auto") as greedy:
        yield greedy


@contextmanager
def start_reference(byte_llama: Path, run_dir: Path, kv_dtype: str) -> Iterator[Reference]:
    config = InstanceConfig.model_validate(
        {
            "instance_id": "reference",
            "model": byte_llama,
            "run_dir": run_dir,
            "kv_cache": {"num_rblocks": 512, "rblock_size": RBLOCK_SIZE, "dtype": kv_dtype},
        }
    )
    with LLM(config) as llm:

        def greedy(prompt: list[int], max_tokens: int) -> list[int]:
            params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
            return llm.generate([prompt], params)[0].token_ids

        yield greedy
