"""A pool as `distkv up` starts it: it has a secret of its own, and its books are in order."""

from pathlib import Path

import pytest
from megatron_distkv.launch.local_cluster import LocalCluster
from openai import OpenAI

from megatron_distkv.cli.main import main
from megatron_distkv.errors import PeerLost
from megatron_distkv.transport import connect, read_secret
from tests.e2e.conftest import cluster_config
from tests.transport.raw_peer import hello


def test_a_pool_makes_its_own_secret_and_keeps_its_books(
    byte_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISTKV_SECRET", raising=False)
    with LocalCluster(cluster_config(byte_llama, instances=2)) as cluster:
        # Given a pool of real processes, and an answer for which one had to borrow of the other
        secret_file = cluster.run_dir / "secret"
        assert secret_file.stat().st_mode & 0o777 == 0o600
        with OpenAI(base_url=cluster.base_url, api_key="none", max_retries=0, timeout=120) as client:
            client.completions.create(model="distkv", prompt=[5 + i % 90 for i in range(180)], max_tokens=4)
        assert any(event["event"] == "loan" for event in cluster.ledger.events(100))

        # Then who does not know its secret gets no channel, and who does gets one
        address = f"unix:{cluster.run_dir}/instance-0.0.sock"
        with pytest.raises(PeerLost, match="does not know this pool's secret"):
            connect(address, hello(pool="default"), peer="instance-0", timeout_s=5)
        connect(address, hello(pool="default"), peer="instance-0", timeout_s=5, secret=read_secret(secret_file)).close()

        # And no password or secret is on a command line, and the books are in order
        for name in ("gmanager", "gateway", *cluster.instance_ids):
            command = Path(f"/proc/{cluster.child(name).process.pid}/cmdline").read_text()
            assert cluster.ledger_url not in command
            assert secret_file.read_text().strip() not in command
        assert main(["ledger", "--ledger", cluster.ledger_url, "--check"]) == 0
        assert capsys.readouterr().out.endswith("the books are in order\n")
