"""A request's receipt: where its rBlocks lay, and what that cost (messages.RequestKV)."""

import msgspec

from megatron_distkv.messages import RequestKV
from megatron_distkv.request import Request


def receipt(request: Request) -> RequestKV:
    return RequestKV(**{name: getattr(request, name) for name in RequestKV.__struct_fields__})


def continue_receipt(request: Request, kv: RequestKV) -> None:
    """Another instance has computed this request so far."""
    for name, value in msgspec.structs.asdict(kv).items():
        setattr(request, name, value)
