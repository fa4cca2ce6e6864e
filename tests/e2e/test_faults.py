"""Real processes, really killed: the client sees a pause and the same tokens, and nothing stays behind."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from megatron_distkv.launch.local_cluster import LocalCluster

from megatron_distkv.errors import UserError
from tests.e2e.conftest import Reference, cluster_config, openai_client
from tests.e2e.test_api import GREEDY, as_text, random_prompt


@pytest.fixture(scope="module")
def small(byte_llama: Path) -> Iterator[LocalCluster]:
    with LocalCluster(cluster_config(byte_llama)) as running:
        yield running


@pytest.fixture(scope="module")
def large(byte_llama: Path) -> Iterator[LocalCluster]:
    with LocalCluster(cluster_config(byte_llama, kv_cache={"num_rblocks": 128, "rblock_size": 8})) as running:
        yield running


@pytest.fixture
def fragile(small: LocalCluster) -> LocalCluster:
    return whole_again(small)


@pytest.fixture
def roomy(large: LocalCluster) -> LocalCluster:
    """Enough for answers that take a while."""
    return whole_again(large)


def whole_again(cluster: LocalCluster) -> LocalCluster:
    """What the test before has killed is back, and its debts are void."""
    dead = cluster.dead_parts()
    for name in dead:
        cluster.restart(name)
    cluster.wait_for(cluster.instance_ids)
    end = time.monotonic() + 30
    while cluster.ledger.snapshot().loans or len(cluster.ledger.snapshot().live) != len(cluster.instance_ids):
        assert time.monotonic() < end, cluster.ledger.snapshot()
        time.sleep(0.05)
    return cluster


def creditor_and_debtor(cluster: LocalCluster) -> tuple[str, str]:
    loan = cluster.ledger.snapshot().loans[0]
    return loan.creditor, loan.debtor


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_creditor_costs_a_pause_not_a_token(how: int, fragile: LocalCluster, reference: Reference) -> None:
    # Given a stream that borrows, and enough room in two of the three instances for all of it
    prompt = random_prompt(140, seed=3)
    expected = as_text(reference(prompt, 100))
    client = openai_client(fragile)
    stream = iter(client.completions.create(prompt=prompt, max_tokens=100, stream=True, **GREEDY))
    text = next(stream).choices[0].text
    creditor, debtor = creditor_and_debtor(fragile)
    log = fragile.run_dir / f"{debtor}.log"
    told_before = len(log.read_text())

    # When the creditor dies, or hangs, in the middle of it
    os.killpg(fragile.child(creditor).process.pid, how)

    # Then the client gets the same text, computed by those that live
    text += "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    assert text == expected
    assert f"lost creditor {creditor}" in log.read_text()[told_before:]
    client.close()
    os.killpg(fragile.child(creditor).process.pid, signal.SIGKILL)

    # And its debts are void once its lease has ended
    end = time.monotonic() + 15
    while fragile.ledger.snapshot().loans or len(fragile.ledger.snapshot().instances) != 2:
        assert time.monotonic() < end, fragile.ledger.snapshot()
        time.sleep(0.1)


def num_resumed(cluster: LocalCluster) -> float:
    metrics = httpx.get(cluster.base_url.removesuffix("/v1") + "/metrics").text
    (found,) = re.findall(r"^distkv_resumed_requests_total (\S+)", metrics, re.MULTILINE)
    return float(found)


SAMPLED = {"model": "distkv", "seed": 5, "temperature": 0.9, "logprobs": 1, "extra_body": {"ignore_eos": True}}


def late_words(text: str) -> str:
    """Three characters that come in the second half of a text first."""
    found = (text[place : place + 3] for place in range(len(text) - 3, len(text) // 2, -1))
    return next(words for words in found if words.isprintable() and text.index(words) > len(text) // 2)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_instance_is_made_up_for_by_another(how: int, roomy: LocalCluster) -> None:
    # Given what three choices are when nothing is lost
    prompt = random_prompt(10, seed=4)
    client = openai_client(roomy)
    calm = client.completions.create(prompt=prompt, max_tokens=450, n=3, **SAMPLED)
    # And a string late in one of them, before which that one is to end
    stop = late_words(calm.choices[0].text)
    expected = [choice.text.partition(stop)[0] for choice in calm.choices]
    resumed_before = num_resumed(roomy)
    # And the same request again, streamed, one choice in each instance
    stream = client.completions.create(prompt=prompt, max_tokens=450, n=3, stop=[stop], stream=True, **SAMPLED)
    texts: list[str] = ["", "", ""]
    logprobs: list[list[float]] = [[], [], []]
    for place, chunk in enumerate(stream):
        # When two of the three die, or hang, in the middle of it
        if place == 10:
            for name in roomy.instance_ids[:2]:
                os.killpg(roomy.child(name).process.pid, how)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            logprobs[choice.index] += choice.logprobs.token_logprobs
    # Then the client has what it would have had
    assert texts == expected
    for got, choice in zip(logprobs, calm.choices, strict=True):
        assert len(got) > 225
        assert got == pytest.approx(choice.logprobs.token_logprobs[: len(got)], abs=1e-4)
    assert num_resumed(roomy) > resumed_before
    client.close()
    for name in roomy.instance_ids[:2]:
        os.killpg(roomy.child(name).process.pid, signal.SIGKILL)


def test_an_instance_that_dies_before_it_spoke_is_replaced(fragile: LocalCluster, reference: Reference) -> None:
    # Given an instance that is dead, while the gateway does not know yet
    client = openai_client(fragile)
    prompt = random_prompt(30)
    fragile.kill("instance-0")
    # When requests come, then each is served by another
    for _ in range(4):
        answer = client.completions.create(prompt=prompt, max_tokens=8, **GREEDY)
        assert answer.choices[0].text == as_text(reference(prompt, 8))
    client.close()


MARK = "DISTKV_TEST_RUN"


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """Sockets lie in it, and their paths have a limit."""
    with tempfile.TemporaryDirectory(prefix="dkv-") as directory:
        yield Path(directory)


@pytest.fixture
def descendants(monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[int]]:
    """Processes that this test started, however deep: they inherit a mark in their environment."""
    mark = f"{MARK}={uuid.uuid4().hex}"
    monkeypatch.setenv(*mark.split("="))
    return lambda: {int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if _holds(path, mark)}


def _holds(environ: Path, mark: str) -> bool:
    try:
        return mark.encode() in environ.read_bytes().split(b"\0")
    except OSError:
        return False  # it has just ended, or is somebody else's


def test_ctrl_c_leaves_no_process_and_no_file(
    byte_llama: Path, tmp_path: Path, short_tmp: Path, descendants: Callable[[], set[int]]
) -> None:
    config = tmp_path / "pool.json"
    config.write_text(cluster_config(byte_llama, instances=2).model_dump_json())
    env = {**os.environ, "TMPDIR": str(short_tmp)}
    up = subprocess.Popen(
        [sys.executable, "-m", "megatron_distkv.cli.main", "up", "--config", str(config)],
        stdout=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip
    assert up.stdout is not None
    assert up.stdout.readline().startswith(f"logs: {short_tmp}/")
    assert f"2 instances serve hf checkpoint {byte_llama} (llama) at http://" in up.stdout.readline()
    assert len(descendants()) >= 5  # itself, ledger server, gManager, gateway, instances
    up.send_signal(signal.SIGINT)
    assert up.wait(30) == 0
    up.stdout.close()
    assert descendants() == set()
    assert list(short_tmp.iterdir()) == []


def test_a_directory_too_long_for_sockets_is_one_sentence(
    byte_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("long" * 20)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(UserError, match="too long a path for sockets"), LocalCluster(cluster_config(byte_llama)):
        pass
    assert list(long.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": Path("/nowhere")}, "no checkpoint at /nowhere"),
        ({"ledger": {"url": "redis://127.0.0.1:9/0"}}, "no ledger server answers at redis://127.0.0.1:9/0"),
    ],
)
def test_what_cannot_start_says_why_in_one_sentence(
    changes: dict[str, object], sentence: str, byte_llama: Path, descendants: Callable[[], set[int]]
) -> None:
    with pytest.raises(UserError, match=sentence), LocalCluster(cluster_config(byte_llama, **changes)):
        pass
    assert descendants() == set()
