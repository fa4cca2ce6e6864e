"""Instances leave and come back while requests go on."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from megatron_distkv.launch.local_cluster import LocalCluster

from megatron_distkv.cli.main import main
from tests.e2e.conftest import Reference, cluster_config, openai_client
from tests.e2e.test_api import GREEDY, as_text, random_prompt

LENGTHS = (20, 60, 150)


class Load:
    """Clients that ask the same prompts again and again, and keep what differs from the reference."""

    def __init__(self, cluster: LocalCluster, expected: dict[int, str]) -> None:
        self.num_right: dict[int, int] = dict.fromkeys(expected, 0)
        self.wrong: list[str] = []
        self._cluster = cluster
        self._expected = expected
        self._stop = threading.Event()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._run, args=(length,)) for length in self._expected]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _run(self, length: int) -> None:
        with openai_client(self._cluster) as client:
            while not self._stop.is_set():
                try:
                    answer = client.completions.create(
                        prompt=random_prompt(length, seed=length), max_tokens=40, **GREEDY
                    )
                except Exception as error:
                    self.wrong.append(repr(error))
                    return
                if answer.choices[0].text == self._expected[length]:
                    self.num_right[length] += 1
                else:
                    self.wrong.append(f"{length}: {answer.choices[0].text!r}")


@pytest.fixture(scope="module")
def cluster(byte_llama: Path) -> Iterator[LocalCluster]:
    with LocalCluster(cluster_config(byte_llama)) as running:
        yield running


def test_draining_whom_nobody_knows_is_one_sentence(cluster: LocalCluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drain", "nobody", "--ledger", cluster.ledger_url]) == 2
    assert "no live instance is called 'nobody'; live are: instance-0" in capsys.readouterr().err


def test_a_rolling_restart_under_load_loses_nothing(cluster: LocalCluster, reference: Reference) -> None:
    # Given clients that never stop asking, one of them for more than an instance holds
    expected = {n: as_text(reference(random_prompt(n, seed=n), 40)) for n in LENGTHS}
    load = Load(cluster, expected)
    with load.running():
        # When every instance leaves in turn, and a new one takes its place
        for name in cluster.instance_ids:
            arguments = ["drain", name, "--ledger", cluster.ledger_url, "--pool", cluster.config.ledger.pool]
            assert main([*arguments, "--within", "20"]) == 0
            assert cluster.child(name).process.wait(20) == 0
            cluster.restart(name)
            cluster.wait_for([name])
    # Then every answer was right, and the new ones serve
    assert load.wrong == []
    assert all(load.num_right.values()), load.num_right
    with openai_client(cluster) as client:
        for name in cluster.instance_ids:
            body = {**GREEDY, "extra_body": {"ignore_eos": True, "instance": name}}
            answer = client.completions.create(prompt=random_prompt(20, seed=20), max_tokens=40, **body)
            assert answer.choices[0].text == expected[20]
