"""How Triton's attention is launched on an H100, from shapes alone: the tensors here have no values to read."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton_kernels = pytest.importorskip("megatron_distkv.kernels.triton", reason="Triton is not installed")

MULTIPROCESSORS, KV_HEADS, GROUP, HEAD_DIM, SIZE = 132, 8, 4, 128, 64


class Recorder:
    """In the place of a kernel: keeps what it is launched with."""

    def __init__(self, launches: list[tuple[str, tuple[int, ...], dict[str, Any]]], name: str) -> None:
        self.launches, self.name = launches, name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *_, **options: self.launches.append((self.name, grid, options))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[tuple[str, tuple[int, ...], dict[str, Any]]]:
    if not backend.startswith("triton"):
        pytest.skip("Triton's own")
    found: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []
    for name in ("attention", "merge"):
        monkeypatch.setattr(triton_kernels, f"{name}_kernel", Recorder(found, name))
    h100 = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h100)
    monkeypatch.setattr(triton_kernels, "IS_INTERPRETED", False)
    return found


def attend(batch: int, context: int, num_queries: int = 1, group: int = GROUP, is_int8: bool = False) -> None:
    """Of tensors without values: any look at one, which on a GPU would wait for it, raises."""
    count = batch * context // SIZE
    indices = [torch.empty(n, dtype=torch.int64, device="meta") for n in (count, count, batch + 1, batch + 1)]
    positions = torch.empty(batch * num_queries, dtype=torch.int64, device="meta")
    dtype = torch.int8 if is_int8 else torch.bfloat16
    pool = torch.empty(count, 1, KV_HEADS, 2, SIZE, HEAD_DIM, dtype=dtype, device="meta")
    q = torch.empty(batch * num_queries, KV_HEADS * group, HEAD_DIM, dtype=torch.bfloat16, device="meta")
    out, lse = (torch.empty(shape, dtype=torch.float32, device="meta") for shape in (q.shape, q.shape[:2]))
    scales = [torch.empty(count, 1, KV_HEADS, n, device="meta") for n in (HEAD_DIM, SIZE)] if is_int8 else None
    triton_kernels.micro_attention(q, pool, 0, *indices, positions, 0.1, True, out=(out, lse), scales=scales)


@pytest.mark.parametrize("is_int8", [False, True])
def test_decode_fills_the_gpu_and_merges_in_one_launch(launches: list, is_int8: bool) -> None:
    for context in (32768, 131072):
        for batch in (1, 2, 3, 8, 16, 20, 33, 64):
            # When some sequences decode
            launches.clear()
            attend(batch, context, is_int8=is_int8)

            # Then one program reads a KV head's keys for all query heads of its group, in a tile of 16 rows
            _, (tiles, kv_heads, splits), options = launches[0]
            assert kv_heads == KV_HEADS
            assert options["BLOCK_M"] == 16 >= GROUP
            assert tiles - batch * GROUP // 16 == batch  # those beyond find no rows and end
            # And the last round of programs leaves few places idle, none without 4 rBlocks
            programs, places = batch * kv_heads * splits, MULTIPROCESSORS * (2 if is_int8 else 3)
            assert programs / (-(-programs // places) * places) > 0.8
            assert context // SIZE / splits >= 4
            # And the splits are merged by one launch more
            assert [name for name, *_ in launches] == ["attention"] + ["merge"] * (splits > 1)
            if splits > 1:
                assert launches[1][2]["P_PADDED"] >= splits


@pytest.mark.parametrize("group", [1, 8, 16, 71, 130])
def test_a_tile_holds_a_whole_group_where_it_can(launches: list, group: int) -> None:
    attend(4, 4096, group=group)
    rows = launches[0][2]["BLOCK_M"]
    assert rows == min(128, max(16, 1 << (group - 1).bit_length()))


def test_prefill_is_split_only_where_it_leaves_the_gpu_idle(launches: list) -> None:
    attend(1, 8192, num_queries=8192)
    attend(1, 32768, num_queries=256)
    (_, (_, _, many_tiles), options), (_, (_, _, few_tiles), _), *merges = launches
    assert (many_tiles, few_tiles) == (1, 2)  # 256 x 8 tiles for 132 places; 8 x 8
    assert options["BLOCK_M"] == 128
    assert [name for name, *_ in merges] == ["merge"]


def test_a_scale_that_is_not_positive_is_refused(backend: str) -> None:
    if not backend.startswith("triton"):
        pytest.skip("Triton's own")
    q, pool, index = torch.zeros(1, 1, 16), torch.zeros(1, 1, 1, 2, 16, 16), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="must be > 0"):
        triton_kernels.micro_attention(q, pool, 0, index, index, index, index, index, -1.0, True)
