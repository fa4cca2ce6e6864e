"""Meters what each running request holds, and how long it waits for creditors: the figures of its receipt."""

from collections.abc import Iterable
from typing import NamedTuple

from megatron_distkv.clock import Clock
from megatron_distkv.kvcache.block_table import BlockTable
from megatron_distkv.rblock import HOST
from megatron_distkv.request import Request


class _Held(NamedTuple):
    """rBlocks of one request since a time: a count holds until the next one is taken."""

    since_s: float
    num_local: int
    num_host: int
    borrowed: dict[str, int]  # by lender


class KVMeter:
    """rBlock-seconds: the sum over time of the rBlocks that hold a request's KV, counted at each step's beginning.

    rBlocks of a loan that nothing lies in yet are not counted: they are this instance's reserve, no request's use.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._held: dict[str, _Held] = {}

    def note(self, request: Request, table: BlockTable) -> None:
        """From now on the request holds what its table says."""
        self.settle(request)
        borrowed = {str(lender): count for lender, count in table.remote_by_creditor().items()}
        num_host = borrowed.pop(HOST, 0)
        held = _Held(self._clock.monotonic_s(), table.num_local, num_host, borrowed)
        self._held[request.request_id] = held
        request.max_local_rblocks = max(request.max_local_rblocks, held.num_local)
        request.max_host_rblocks = max(request.max_host_rblocks, held.num_host)
        for lender, count in borrowed.items():
            request.max_borrowed_rblocks[lender] = max(request.max_borrowed_rblocks.get(lender, 0), count)

    def settle(self, request: Request) -> None:
        """Count what it has held until now; from now on it holds nothing."""
        held = self._held.pop(request.request_id, None)
        if held is None:
            return
        elapsed_s = self._clock.monotonic_s() - held.since_s
        request.local_rblock_s += held.num_local * elapsed_s
        request.host_rblock_s += held.num_host * elapsed_s
        for lender, count in held.borrowed.items():
            request.borrowed_rblock_s[lender] = request.borrowed_rblock_s.get(lender, 0.0) + count * elapsed_s

    def charge_wait(self, computed: Iterable[tuple[Request, int]], waited_s: float) -> None:
        """Divide what a step waited for creditors among the requests that asked them.

        Each pays in proportion to its work there, its tokens in this step times its borrowed rBlocks, so that the
        charges of all requests add up to what all steps waited.
        """
        work = {request: num_tokens * self._num_borrowed(request) for request, num_tokens in computed}
        total = sum(work.values())
        for request, its_work in work.items():
            request.remote_attention_s += waited_s * its_work / total if total else 0.0

    def _num_borrowed(self, request: Request) -> int:
        held = self._held.get(request.request_id)
        return sum(held.borrowed.values()) if held is not None else 0
