"""What the processes of a member have counted, on its way to a gateway's /metrics."""

from typing import Annotated

import msgspec

from megatron_distkv.metrics import instance_counts

# Of Prometheus: a label of another name would spoil the whole answer.
_LabelName = Annotated[str, msgspec.Meta(pattern="^[a-z_]+$")]


class Counted(msgspec.Struct, frozen=True, array_like=True):
    """One series of a counter of one rank, as in /metrics but for its member; it begins at 0 with its process."""

    name: str
    labels: dict[_LabelName, str]
    value: float
    rank: int = 0


class Counts(msgspec.Struct, frozen=True):
    """A follower's answer to COUNTS."""

    counted: list[Counted]


def counted_here(rank: int = 0) -> tuple[Counted, ...]:
    """All that this process counts."""
    return tuple(Counted(x.name, dict(x.labels), x.value, rank) for x in instance_counts())


def happened_here(rank: int = 0) -> tuple[Counted, ...]:
    """What this process has counted at all: for members, and ranks, to which most of it never happens."""
    return tuple(count for count in counted_here(rank) if count.value)
