"""Measures a link to another member: round trips without a load and with one."""

import torch

from megatron_distkv.attention import CreditorChannel
from megatron_distkv.clock import Clock
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.messages import MessageKind
from megatron_distkv.peers.peers import MailboxSizes, Peers
from megatron_distkv.pool import CreditorOffer, LinkCost, Peer, link_cost

# The best of so many: what the link costs, not what else the other side did.
ROUND_TRIPS, LOADS = 20, 4
LOAD_BYTES = 1 << 20
# A slow link is known well enough after this long.
ENOUGH_S = 0.5
_SIZES = MailboxSizes(LOAD_BYTES + 4096, 4096)


class LinkProbe:
    """On a channel of its own. Any thread may call it; raises DistkvError."""

    def __init__(self, peers: Peers, shape: RBlockShape, deadline_s: float, clock: Clock) -> None:
        self._peers = peers
        self._shape = shape
        self._deadline_s = deadline_s
        self._clock = clock

    def __call__(self, creditor: CreditorOffer) -> LinkCost:
        line = self._peers.dial(Peer(creditor.instance, creditor.epoch, creditor.address), _SIZES)
        try:
            return measure_link(line, self._shape, self._deadline_s, self._clock)
        finally:
            line.close()


def measure_link(line: CreditorChannel, shape: RBlockShape, deadline_s: float, clock: Clock) -> LinkCost:
    """What follows for one rank of `shape`; raises DistkvError."""
    nothing, load = torch.empty(0), torch.zeros(LOAD_BYTES, dtype=torch.uint8)
    return link_cost(
        _best_s(line, nothing, ROUND_TRIPS, deadline_s, clock),
        _best_s(line, load, LOADS, deadline_s, clock),
        LOAD_BYTES,
        shape,
    )


def _best_s(line: CreditorChannel, payload: torch.Tensor, times: int, deadline_s: float, clock: Clock) -> float:
    began_s, best_s = clock.monotonic_s(), float("inf")
    for _ in range(times):
        asked_s = clock.monotonic_s()
        line.call(MessageKind.PROBE, b"", [payload], deadline_s=deadline_s)
        best_s = min(best_s, clock.monotonic_s() - asked_s)
        if clock.monotonic_s() - began_s > ENOUGH_S:
            break
    return best_s
