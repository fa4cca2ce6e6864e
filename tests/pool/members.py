"""What members of pools that tests make say of themselves."""

from typing import Any

from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.pool import MemberInfo, write_info

SHAPE = RBlockShape(2, 4, 2, 16, 8, "fp32")


def info(**facts: Any) -> dict[str, str]:
    """As the ledger keeps it; without facts that of an instance."""
    return write_info(MemberInfo(**{"shape": SHAPE, **facts}))
