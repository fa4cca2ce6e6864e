"""A member of the pool: what it says of itself when it joins, typed, and what the ledger counts of it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import msgspec

from megatron_distkv.address import is_elsewhere
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger import InstanceRecord, MemberCounts
from megatron_distkv.messages import Counted
from megatron_distkv.pool.links import LinkCost
from megatron_distkv.rblock import InstanceId

# Of `MemberInfo`. A member that speaks another one is left alone: neither asked for memory nor given requests.
FORMAT = 1
# The one fact of a registration: a MemberInfo as JSON.
_FACT = "member"
_Positive = Annotated[float, msgspec.Meta(gt=0)]
_Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclass
class Identity:
    """Who this process is in the pool. Mutable on purpose: shared by its parts, renewed when the epoch changes."""

    instance: InstanceId
    epoch: int = 0
    generation: str = ""


class Peer(msgspec.Struct, frozen=True):
    """One life of another member, and where it is reached."""

    instance: str
    epoch: int
    address: str


class MemberUnreadable(ValueError):
    """A registration that is not what this version writes; the sentence says why."""


class MemberInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a member says of itself. `requests`: the unix socket where gateways of its host reach it.

    `query_us`, `host_query_us`: what a query over one rBlock in its pool, and in its host memory, takes there
    (microseconds, measured when it started). `host_rblocks` of its own host memory are never lent. `links`: what its
    links to a few others cost (measured by it).
    """

    shape: RBlockShape
    role: Literal["instance", "lender"] = "instance"
    requests: str = ""
    query_us: _Positive | None = None
    host_query_us: _Positive | None = None
    host_rblocks: _Count = 0
    model: str = ""
    checkpoint: str = ""  # fingerprint of its weights: equal ones serve the same model
    vocab_size: _Count = 0
    max_context_tokens: _Count | None = None
    eos_token_ids: tuple[int, ...] = ()
    links: dict[str, LinkCost] = {}


class _Registration(msgspec.Struct, frozen=True):
    format: int
    info: msgspec.Raw


def write_info(info: MemberInfo) -> dict[str, str]:
    """As the ledger keeps it."""
    registration = _Registration(FORMAT, msgspec.Raw(msgspec.json.encode(info)))
    return {_FACT: msgspec.json.encode(registration).decode()}


def read_info(facts: Mapping[str, str]) -> MemberInfo:
    """Another process wrote it; raises MemberUnreadable."""
    try:
        registration = msgspec.json.decode(facts.get(_FACT, ""), type=_Registration)
        if registration.format != FORMAT:
            raise MemberUnreadable(f"it registered in format {registration.format}, and this version reads {FORMAT}")
        return msgspec.json.decode(registration.info, type=MemberInfo)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise MemberUnreadable(f"its registration cannot be read: {error}") from None


@dataclass(frozen=True)
class Member(MemberCounts):
    """One life of a member, as the ledger knew it when the picture was taken."""

    info: MemberInfo
    counted: tuple[Counted, ...] = ()

    @property
    def peer(self) -> Peer:
        return Peer(self.instance, self.epoch, self.address)

    @property
    def takes_requests(self) -> bool:
        """False: a memory-only lender."""
        return self.info.role == "instance"

    @property
    def takes_requests_here(self) -> bool:
        """Gateways speak to instances through their unix sockets: those of other hosts only lend to this one's."""
        return self.takes_requests and not is_elsewhere(self.address)

    @property
    def rblock_size(self) -> int:
        """Tokens of one rBlock."""
        return self.info.shape.rblock_size

    @property
    def host_rblocks(self) -> int:
        return self.info.host_rblocks


def read_member(record: InstanceRecord) -> Member:
    """Raises MemberUnreadable."""
    counts = {field.name: getattr(record, field.name) for field in fields(MemberCounts)}
    return Member(**counts, info=read_info(record.info), counted=record.counted)
