"""Makes a member speak the next version of the protocol, as the first one of a rolling upgrade does (`seam`)."""

from types import ModuleType


def _raise_version(hello: ModuleType) -> None:
    hello.PROTOCOL_VERSION += 1  # type: ignore[attr-defined]


PATCHES = {"megatron_distkv.transport.hello": _raise_version}
