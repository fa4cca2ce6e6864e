"""Pools on huge pages, by the kernel's own account of this process. Where the system has none, they say so."""

import mmap
from pathlib import Path

import pytest
import torch

from megatron_distkv.kvcache import pool_memory
from megatron_distkv.kvcache.pool_memory import describe_pages, huge_page_bytes, huge_share, zeroed_pool
from megatron_distkv.kvcache.rblock_pool import RBlockPool

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
POOL_BYTES = 64 << 20


def huge_kib_of_process() -> int:
    rollup = Path("/proc/self/smaps_rollup")
    lines = rollup.read_text().splitlines() if rollup.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:"))


def system_gives_huge_pages() -> bool:
    """Asked without the code under test: a container may promise them and keep no account."""
    before = huge_kib_of_process()
    with mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            return False
        memory.write(bytes(16 << 20))
        return huge_kib_of_process() - before > 8 << 10


needs_huge_pages = pytest.mark.skipif(not system_gives_huge_pages(), reason="this system gives no huge pages")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@needs_huge_pages
def test_a_large_pool_is_zero_and_lies_on_huge_pages() -> None:
    pool = zeroed_pool((POOL_BYTES // 2 // 128, 128), torch.bfloat16)
    assert pool.shape == (POOL_BYTES // 2 // 128, 128)
    assert pool.dtype == torch.bfloat16
    assert pool.is_contiguous()
    assert pool.data_ptr() % huge_page_bytes() == 0
    assert not pool.any()
    # When it is written, the kernel accounts for huge pages
    pool.fill_(1.5)
    assert torch.equal(pool, torch.full_like(pool, 1.5))
    assert huge_share(pool) > 0.9
    assert describe_pages(pool) == f"{huge_page_bytes() >> 20} MiB pages"


@needs_huge_pages
def test_a_pool_says_on_which_pages_it_lies_before_it_is_used() -> None:
    pool = RBlockPool(64, 2, 8, 64, 128, torch.bfloat16)
    assert pool.describe() == f"64 rBlocks of 512 KiB on {huge_page_bytes() >> 20} MiB pages"
    assert pool.tensor_BLK2ND.data_ptr() % huge_page_bytes() == 0


def test_memory_is_taken_as_it_is_used_and_given_back_with_the_last_view() -> None:
    before = resident_bytes()
    pool = zeroed_pool((POOL_BYTES,), torch.uint8)
    assert resident_bytes() - before < POOL_BYTES // 4
    pool.fill_(1)
    view = pool[-1:].view(torch.int8)
    del pool
    assert resident_bytes() - before > POOL_BYTES * 3 // 4
    assert view.item() == 1
    del view
    assert resident_bytes() - before < POOL_BYTES // 4


def test_a_small_pool_does_not_take_a_huge_page(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int, num_bytes: int, **__: int) -> None:
        raise AssertionError(f"a mapping of its own for {num_bytes} bytes")

    monkeypatch.setattr(mmap, "mmap", refuse)
    pool = RBlockPool(4, 2, 2, 16, 8, torch.float32)
    assert not pool.tensor_BLK2ND.any()


def test_without_huge_pages_a_pool_is_plain_memory_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        """Of a kernel without huge pages."""

        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    pool = zeroed_pool((POOL_BYTES,), torch.uint8)
    assert not pool.any()
    if not SWITCH.exists() or "[always]" not in SWITCH.read_text():
        assert describe_pages(pool.fill_(1)) == f"{mmap.PAGESIZE >> 10} KiB pages"


@pytest.mark.parametrize(
    ("huge_kib", "words"),
    [
        (0, "4 KiB pages"),
        (3072, "2 MiB pages for 75% of it, 4 KiB pages for the rest"),
        (4096, "2 MiB pages"),
    ],
)
def test_the_account_of_the_mapping_with_the_pool_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, huge_kib: int, words: str
) -> None:
    # Given an account of three neighbouring mappings, of which the pool lies in the second
    pool = torch.zeros(8)
    address = pool.data_ptr()
    smaps = tmp_path / "smaps"
    smaps.write_text(
        "".join(
            f"{start:x}-{end:x} rw-p 00000000 00:00 0  [heap]\n"
            f"Rss:   4096 kB\nAnonHugePages:   {kib} kB\nVmFlags: rd wr\n"
            for start, end, kib in (
                (0, address, 2048),
                (address, address + 64, huge_kib),
                (address + 64, address + 128, 2048),
            )
        )
    )
    share = huge_share(pool, smaps)
    assert share == huge_kib / 4096
    # Then the words follow it, and nothing is claimed where there is no account
    monkeypatch.setattr(pool_memory, "huge_share", lambda _: share)
    monkeypatch.setattr(pool_memory, "huge_page_bytes", lambda: 2 << 20)
    monkeypatch.setattr(mmap, "PAGESIZE", 4096)
    assert describe_pages(pool) == words
    assert huge_share(pool, tmp_path / "absent") == 0
