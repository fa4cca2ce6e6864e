"""Two "hosts" on one: network namespaces with a cable between them, where this process may make them."""

import shutil
import subprocess
import uuid
from typing import Any

_ADDRESSES = ("10.213.77.1", "10.213.77.2")


class NotHere(Exception):
    """Why this machine has no such thing, in one sentence."""


class TwoHosts:
    """`within(0)` and `within(1)` are commands that run another on one of the two. Raises NotHere."""

    def __init__(self) -> None:
        self._tag = uuid.uuid4().hex[:6]
        self.names = [f"distkv-{self._tag}-{number}" for number in (0, 1)]
        self.addresses = _ADDRESSES
        if shutil.which("ip") is None:
            raise NotHere("there is no `ip` (iproute2)")
        try:
            self._build()
        except NotHere:
            self.close()
            raise

    def __enter__(self) -> "TwoHosts":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def within(self, number: int) -> list[str]:
        return ["ip", "netns", "exec", self.names[number]]

    def degrade(self, delay_ms: int, loss_percent: float) -> None:
        """Both ways; raises NotHere where the kernel has no netem."""
        if shutil.which("tc") is None:
            raise NotHere("there is no `tc` (iproute2)")
        for number in (0, 1):
            how = ["netem", "delay", f"{delay_ms}ms", "loss", f"{loss_percent}%"]
            _run(*self.within(number), "tc", "qdisc", "replace", "dev", self._cable(number), "root", *how)

    def cut(self) -> None:
        """What is sent from now on never arrives, and neither side is told."""
        for number in (0, 1):
            _run(*self.within(number), "ip", "neigh", "flush", "dev", self._cable(number))
            gone = ["to", self.addresses[1 - number], "lladdr", "02:00:00:00:00:01", "dev", self._cable(number)]
            _run(*self.within(number), "ip", "neigh", "replace", *gone, "nud", "permanent")

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def _cable(self, number: int) -> str:
        return f"dk{self._tag}{number}"

    def _build(self) -> None:
        for name in self.names:
            _run("ip", "netns", "add", name)
        near, far = self._cable(0), self._cable(1)
        _run("ip", "link", "add", near, "netns", self.names[0], "type", "veth", "peer", far, "netns", self.names[1])
        for number, address in enumerate(self.addresses):
            _run(*self.within(number), "ip", "address", "add", f"{address}/24", "dev", self._cable(number))
            for device in ("lo", self._cable(number)):
                _run(*self.within(number), "ip", "link", "set", device, "up")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotHere(f"`{' '.join(command)}` says {done.stderr.strip()!r}")
