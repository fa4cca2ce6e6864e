"""Memory of rBlock pools: on huge pages where the system gives them, since decode reads all of it in random order.

A page of 2 MiB costs one address translation where 512 pages of 4 KiB cost 512. Linux gives such pages, as a pool is
written, to private memory that asks for them, if `/sys/kernel/mm/transparent_hugepage/enabled` says `madvise` or
`always` and it finds them; what it has really given is in its own account of this process, `/proc/self/smaps`.
"""

import mmap
from pathlib import Path

import torch

# A smaller pool stays as it is: its first token would take a whole huge page, and it has few pages anyway.
SMALLEST_ON_HUGE_PAGES_BYTES = 16 << 20
_MIB = 1 << 20


def zeroed_pool(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """A tensor of zeros; its memory goes back to the system with the last tensor that looks at it."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if (device is None or device.type == "cpu") and num_bytes >= SMALLEST_ON_HUGE_PAGES_BYTES:
        memory = _on_huge_pages(num_bytes)
        if memory is not None:
            return memory.view(dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)


def describe_pages(pool: torch.Tensor) -> str:
    """`2 MiB pages` or `4 KiB pages`: by what the kernel has given, so far, to the mapping that holds `pool`."""
    share = huge_share(pool)
    small, huge = f"{mmap.PAGESIZE >> 10} KiB pages", f"{huge_page_bytes() // _MIB} MiB pages"
    if share < 0.05:
        return small
    return huge if share > 0.95 else f"{huge} for {share:.0%} of it, {small} for the rest"


def huge_share(pool: torch.Tensor, smaps: Path = Path("/proc/self/smaps")) -> float:
    """How much of the memory in use around `pool` (its mapping's) lies on huge pages: 0 to 1; 0 where nobody knows."""
    try:
        fields = _mapping_at(pool.data_ptr(), smaps)
    except OSError:
        return 0.0
    return fields.get("AnonHugePages:", 0) / max(1, fields.get("Rss:", 0))


def huge_page_bytes() -> int:
    try:
        return int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 2 * _MIB


def _on_huge_pages(num_bytes: int) -> torch.Tensor | None:
    """Bytes at a huge page's border, the first page already there; None where the system has no such pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    page_bytes = huge_page_bytes()
    try:
        mapping = mmap.mmap(-1, num_bytes + page_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return None
    whole = torch.frombuffer(mapping, dtype=torch.uint8)  # keeps the mapping; nobody else does
    memory = whole[-whole.data_ptr() % page_bytes :][:num_bytes]
    memory[0] = 0  # so that describe_pages has something to go by
    return memory


def _mapping_at(address: int, smaps: Path) -> dict[str, int]:
    """The KiB that the kernel accounts for the mapping with `address`."""
    fields: dict[str, int] = {}
    is_inside = False
    with smaps.open() as lines:
        for line in lines:
            words = line.split()
            if not words[0].endswith(":"):  # a mapping's first line: its addresses
                if is_inside:
                    break
                start, end = (int(border, 16) for border in words[0].split("-"))
                is_inside = start <= address < end
            elif is_inside and len(words) == 3 and words[2] == "kB":
                fields[words[0]] = int(words[1])
    return fields
