"""Round trips between two processes of this host, by what carries them: python -m tools.bench.channels [unix tcp ...].

A question of so many bytes, an answer of as many: the median and the 99th percentile, microseconds.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from megatron_distkv.transport import PROTOCOL_VERSION, Answer, ChannelRequest, Hello, Listener, Tls, connect, load_tls
from megatron_distkv.transport.nixl_link import nixl_package
from tests.ledger.tls_server import make_authority, make_certificate

SIZES = (0, 8 << 10, 64 << 10, 512 << 10, 4 << 20)
CARRIERS = ("unix", "tcp", "tls", "nixl")
ROUNDS = 300
PORT = 17391


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("carriers", nargs="*", default=list(CARRIERS))
    parser.add_argument("--listen", metavar="CARRIER", help="be the other process")
    parser.add_argument("--directory", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.listen:
        listen(args.listen, args.directory)
        return
    print(f"{'way':<6}" + "".join(f"{f'{size >> 10} KiB':>18}" for size in SIZES))
    for carrier in args.carriers:
        if carrier == "nixl" and nixl_package() is None:
            print("nixl   not installed")
            continue
        with tempfile.TemporaryDirectory() as directory:
            print(f"{carrier:<6}" + "".join(f"{cell:>18}" for cell in measure(carrier, Path(directory))), flush=True)


def measure(carrier: str, directory: Path) -> list[str]:
    make_certificate(directory, make_authority(directory, "authority"), "member")
    command = [sys.executable, "-m", "tools.bench.channels", "--listen", carrier, "--directory", str(directory)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    other.stdout.readline()
    hello = Hello(PROTOCOL_VERSION, "bench", "me", 0, 0, 8 << 20, 8 << 20)
    address = f"unix:{directory}/bench.sock" if carrier == "unix" else f"{carrier}://localhost:{PORT}"
    channel = connect(address, hello, peer="other", timeout_s=10, tls=tls_of(carrier, directory))
    try:
        cells = []
        for size in SIZES:
            data, took_s = [torch.zeros(size, dtype=torch.uint8)], []
            for _ in range(ROUNDS):
                began_s = time.perf_counter()
                channel.call(1, b"", data, deadline_s=10)
                took_s.append(time.perf_counter() - began_s)
            cells.append(f"{statistics.median(took_s) * 1e6:.0f} / {sorted(took_s)[int(ROUNDS * 0.99)] * 1e6:.0f}")
        return cells
    finally:
        channel.close()
        other.kill()
        other.wait()


def listen(carrier: str, directory: Path) -> None:
    address = f"unix:{directory}/bench.sock" if carrier == "unix" else f"tcp://127.0.0.1:{PORT}"
    address = address.replace("tcp:", "nixl:") if carrier == "nixl" else address
    listener = Listener(address, "bench", echo, tls=tls_of(carrier, directory))
    print("ready", flush=True)
    time.sleep(600)
    listener.close()


def echo(_: Hello, request: ChannelRequest) -> Answer:
    return Answer(b"", [torch.frombuffer(request.payload, dtype=torch.uint8)] if len(request.payload) else [])


def tls_of(carrier: str, directory: Path) -> Tls | None:
    member = directory / "member.pem"
    return load_tls(member, member.with_suffix(".key"), directory / "authority.pem") if carrier == "tls" else None


if __name__ == "__main__":
    main()
