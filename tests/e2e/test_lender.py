"""A memory-only lender as a process of its own: what only fits thanks to it, and what its death costs."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from megatron_distkv.launch.local_cluster import LocalCluster

from megatron_distkv.cli.main import main
from megatron_distkv.pool import picture_of, render_debts
from tests.e2e.conftest import (
    NUM_RBLOCKS,
    OWN_TOKENS,
    RBLOCK_SIZE,
    Reference,
    cluster_config,
    openai_client,
    start_reference,
)
from tests.e2e.test_api import GREEDY, as_text, random_prompt, wait_for_no_debts

LENDER_RBLOCKS = 64


def with_lender(checkpoint: Path, **changes: Any) -> LocalCluster:
    return LocalCluster(cluster_config(checkpoint, lenders=1, lender_rblocks=LENDER_RBLOCKS, **changes))


@pytest.fixture(scope="module")
def lent_to(byte_llama: Path) -> Iterator[LocalCluster]:
    """Three instances and a lender that only lends; the last test that has it kills the lender."""
    with with_lender(byte_llama, instances=3) as cluster:
        yield cluster


def test_a_prompt_longer_than_all_instances_together(lent_to: LocalCluster, reference: Reference) -> None:
    cluster = lent_to
    with openai_client(cluster) as client:
        log = (cluster.run_dir / "lender-0.log").read_text()
        assert f"lender-0 lends {LENDER_RBLOCKS} rBlocks of {RBLOCK_SIZE} tokens" in log
        # When a prompt comes that all instances' pools together could not hold
        prompt = random_prompt(4 * OWN_TOKENS, seed=1)
        answer = client.completions.create(prompt=prompt, max_tokens=12, **GREEDY)
        # Then it is computed, with most of it at the lender
        assert answer.choices[0].text == as_text(reference(prompt, 12))
        (kv,) = answer.usage.kv  # type: ignore[union-attr]
        assert kv["max_borrowed_rblocks"]["lender-0"] >= 2 * NUM_RBLOCKS
        wait_for_no_debts(cluster)
        # And nobody takes the lender for an instance
        assert httpx.get(cluster.base_url.removesuffix("/v1") + "/health").json()["instances"] == cluster.instance_ids
        assert render_debts(picture_of(cluster.ledger.snapshot())).count("memory only") == 1


def test_a_lender_killed_in_mid_request_costs_what_it_held(lent_to: LocalCluster, reference: Reference) -> None:
    # Given a stream with rBlocks at the lender, and enough room for them in the other instances
    cluster = lent_to
    with openai_client(cluster) as client:
        prompt = random_prompt(140, seed=3)
        expected = as_text(reference(prompt, 100))
        stream = iter(
            client.completions.create(
                prompt=prompt, max_tokens=100, stream=True, stream_options={"include_usage": True}, **GREEDY
            )
        )
        text = next(stream).choices[0].text
        assert {loan.creditor for loan in cluster.ledger.snapshot().loans} == {"lender-0"}
        # When the lender is killed
        os.killpg(cluster.child("lender-0").process.pid, signal.SIGKILL)
        chunks = list(stream)
        # Then the client sees the same tokens, and only what lay there was computed again
        assert text + "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected
        (kv,) = chunks[-1].usage.kv
        held = kv["max_borrowed_rblocks"]["lender-0"] * RBLOCK_SIZE
        assert 0 < kv["num_recomputed_tokens"] <= held < len(prompt)
        assert kv["num_preemptions"] == 0


def test_tensor_parallel_ranks_use_host_memory_and_then_a_lender_in_int8(byte_llama: Path, tmp_path: Path) -> None:
    # Given an int8 cache everywhere
    cache = {"num_rblocks": NUM_RBLOCKS, "num_host_rblocks": 8, "rblock_size": RBLOCK_SIZE, "dtype": "int8"}
    config: dict[str, Any] = {"instances": 1, "tensor_parallel": 2, "launcher": "deepspeed", "kv_cache": cache}
    with with_lender(byte_llama, **config) as cluster, openai_client(cluster) as client:
        assert "KV cache: 16 rBlocks of 8 tokens in int8" in (cluster.run_dir / "instance-0.log").read_text()
        # When a prompt needs the pool, host memory and the lender
        prompt = random_prompt(2 * OWN_TOKENS, seed=2)
        answer = client.completions.create(prompt=prompt, max_tokens=12, **GREEDY)
        # Then its tokens are those of one instance with enough memory
        with start_reference(byte_llama, tmp_path, "int8") as int8_reference:
            assert answer.choices[0].text == as_text(int8_reference(prompt, 12))
        (kv,) = answer.usage.kv  # type: ignore[union-attr]
        assert kv["kv_dtype"] == "int8"
        assert kv["max_host_rblocks"] == 8
        assert kv["max_borrowed_rblocks"]["lender-0"] > 0
        wait_for_no_debts(cluster)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--memory", "64 apples"], "memory: an amount of memory looks like 64GiB, 500MB or 4096 (got '64 apples')"),
        ([], "say how much to lend"),
        (["--memory", "1MB", "--lender-id", "no spaces"], "lender_id"),
    ],
)
def test_what_is_no_lender_says_why_in_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lend", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("distkv lend: ")
    assert sentence in error.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--memory", "1"], "1 bytes of memory are less than one rBlock of 4096 bytes"),
        (["--memory", "4000TiB"], "free on this machine"),
        (["--memory", "1MB", "--model", "MODEL", "--rblock-size", "16"], "rblock_size 16, not 8 as those of instance-"),
    ],
)
def test_what_cannot_lend_says_why_in_one_sentence(
    arguments: list[str], sentence: str, cluster: LocalCluster, byte_llama: Path, tmp_path: Path
) -> None:
    arguments = [str(byte_llama) if word == "MODEL" else word for word in arguments]
    lend = [sys.executable, "-m", "megatron_distkv.cli.main", "lend", "--ledger", cluster.ledger_url]
    ended = subprocess.run(
        [*lend, "--run-dir", str(tmp_path), *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.returncode == 2
    *_, last = ended.stderr.splitlines()  # before it there may be what was logged
    assert last.startswith("distkv lend: ")
    assert sentence in last
    assert len(cluster.ledger.snapshot().instances) == len(cluster.instance_ids)
