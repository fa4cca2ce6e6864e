"""The ring steps of a context group: the buffers of the next step are under way while this one's are computed."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
import torch.distributed as dist

from megatron_distkv.context_parallel.ring_steps import RingBlock, RingStep

Buffers: TypeAlias = list[torch.Tensor]


class RingPass(Protocol):
    """The forward or the backward pass. Both ranks of a block know the shapes of what is sent and of its results."""

    def send_buffers(self, block: RingBlock) -> Buffers: ...
    def recv_buffers(self, block: RingBlock) -> Buffers:
        """Empty ones, of the shapes of the peer's `send_buffers`."""
        ...

    def compute(self, block: RingBlock, buffers: Buffers) -> Buffers:
        """At the computing rank: returns what goes back to the sender, in contiguous tensors."""
        ...

    def result_buffers(self, block: RingBlock) -> Buffers:
        """Empty ones, at the sender, of the shapes of what `compute` returns."""
        ...

    def accumulate(self, block: RingBlock, results: Buffers) -> None:
        """At the sender."""
        ...


class _Message(NamedTuple):
    block: RingBlock
    buffers: Buffers
    peer: int


class _InFlight(NamedTuple):
    """Tensors are held here until they were sent or have come."""

    requests: list[dist.Work]
    sends: Sequence[_Message]
    receives: Sequence[_Message]

    def wait(self) -> Iterator[tuple[RingBlock, Buffers]]:
        """What was received."""
        for request in self.requests:
            request.wait()
        return ((message.block, message.buffers) for message in self.receives)


class RingComm(NamedTuple):
    """Rank `cp_rank` of `cp_group`, None for a rank alone."""

    cp_rank: int
    cp_group: dist.ProcessGroup | None

    def run(self, ring_pass: RingPass, steps: list[RingStep]) -> None:
        """A collective of the group."""
        local, *remote = steps
        in_flight = self._send(ring_pass, remote[0]) if remote else None
        for block in local:
            ring_pass.compute(block, ring_pass.send_buffers(block))
        for number, step in enumerate(remote, start=1):
            assert in_flight is not None
            received = in_flight.wait()
            in_flight = self._send(ring_pass, remote[number]) if number < len(remote) else None
            results = [_Message(block, ring_pass.compute(block, sent), block.send_rank) for block, sent in received]
            self._send_results(ring_pass, step, results)

    def _send(self, ring_pass: RingPass, step: RingStep) -> _InFlight:
        mine = [block for block in step if block.send_rank == self.cp_rank]
        theirs = [block for block in step if block.compute_rank == self.cp_rank]
        return self._isend_irecv(
            [_Message(block, ring_pass.send_buffers(block), block.compute_rank) for block in mine],
            [_Message(block, ring_pass.recv_buffers(block), block.send_rank) for block in theirs],
        )

    def _send_results(self, ring_pass: RingPass, step: RingStep, results: list[_Message]) -> None:
        mine = [block for block in step if block.send_rank == self.cp_rank]
        expected = [_Message(block, ring_pass.result_buffers(block), block.compute_rank) for block in mine]
        for block, buffers in self._isend_irecv(results, expected).wait():
            ring_pass.accumulate(block, buffers)

    def _isend_irecv(self, sends: list[_Message], receives: list[_Message]) -> _InFlight:
        operations = [
            dist.P2POp(operation, tensor, group=self.cp_group, group_peer=message.peer)
            for operation, messages in ((dist.isend, sends), (dist.irecv, receives))
            for message in messages
            for tensor in message.buffers
        ]
        requests = dist.batch_isend_irecv(operations) if operations else []
        return _InFlight(requests, sends, receives)
