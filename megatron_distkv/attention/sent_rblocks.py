"""What a debtor remembers of the rBlocks that it has sent away, to know them again when they come back."""

import hashlib
from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

import torch

DIGEST_BYTES = 16


class _Sent(NamedTuple):
    loan_id: str
    digest: bytes


class SentRBlocks:
    """By creditor and physical id there; what is sent to the same place later replaces it."""

    def __init__(self) -> None:
        self._sent: dict[str, dict[int, _Sent]] = {}

    def note(self, creditor: str, loan_id: str, block_ids: Sequence[int], data_MLK2ND: torch.Tensor) -> None:
        there = self._sent.setdefault(creditor, {})
        for block_id, rblock in zip(block_ids, data_MLK2ND, strict=True):
            there[block_id] = _Sent(loan_id, _digest(rblock))

    def knows(self, creditor: str, block_ids: Iterable[int]) -> bool:
        """Whether all of these were sent from here: a request that was handed over has others, too."""
        return self._sent.get(creditor, {}).keys() >= set(block_ids)

    def changed(self, creditor: str, block_ids: Sequence[int], data_MLK2ND: torch.Tensor) -> list[int]:
        """Which of these, as `creditor` gives them now, have other bytes than those that it was sent."""
        there, pairs = self._sent.get(creditor, {}), zip(block_ids, data_MLK2ND, strict=True)
        return [x for x, rblock in pairs if x in there and _digest(rblock) != there[x].digest]

    def by_loan(self, creditor: str, block_ids: Iterable[int]) -> dict[str, list[int]]:
        """Under which loan each of them lies; all must be known."""
        found: dict[str, list[int]] = {}
        for block_id in block_ids:
            found.setdefault(self._sent[creditor][block_id].loan_id, []).append(block_id)
        return found

    def forget_all_but(self, creditors: Container[str]) -> None:
        for creditor in [creditor for creditor in self._sent if creditor not in creditors]:
            del self._sent[creditor]


def _digest(rblock: torch.Tensor) -> bytes:
    """Not to be matched by chance, nor on purpose: a creditor knows the bytes too."""
    flat = rblock.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().data, digest_size=DIGEST_BYTES).digest()
