"""The peer's process: what happens where there is no vLLM. Where there is, each run of the bench checks its answers."""

import sys
from pathlib import Path

import pytest
import torch

from tools.bench.vllm_peer import VllmPeer


def test_a_python_without_vllm_is_one_sentence() -> None:
    q, kv = torch.zeros(1, 4, 32), torch.zeros(8, 2, 32)
    with VllmPeer(Path(sys.executable), 1) as peer, pytest.raises(SystemExit, match="has ended: no vLLM for"):
        peer.prepare(q, kv, kv)
