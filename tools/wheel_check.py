"""`make wheel`: build the wheel, install it outside the tree, and go the way of a user: doctor, train, serve, ask.

Built from a copy of what the checkout holds, so that no leftover of an earlier build slips in. Nothing of the tree is
on the path of what is then run. Exit status 0 only if one completion comes back as it should.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The Makefile's: first, so that the wheel's requirements pull no other build.
TORCH = "torch==2.13.0"
ANSWER_TOKENS = 8
STARTED_WITHIN_S = 240
ENDED_WITHIN_S = 60
# Two steps: a checkpoint to serve, of a byte-level model that needs no tokenizer.
TRAINING = {
    "model": {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 32, "num_attention_heads": 2, "num_kv_heads": 1,
              "head_dim": 16, "vocab_size": 272},
    "data": {"tokens_per_step": 64, "stages": [{"first_step": 0, "sequence_length": 64}]},
    "steps": 2, "evaluate_every": 2, "evaluation_length": 64, "peak_tflops": 1.0,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, help="an environment to install into and to keep, rather than a new one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="distkv-wheel-") as folder:
        scratch = Path(folder)
        with timed("build"):
            wheel = build(scratch)
        with timed("install"):
            binaries = install(wheel, args.venv or scratch / "venv")
        with timed("doctor"):
            run([binaries / "distkv", "doctor"], scratch)
        with timed("train"):
            (scratch / "train.json").write_text(json.dumps(TRAINING))
            command = [binaries / "distkv", "train", "--config", "train.json", "--output", "run", "--ranks", "1"]
            run(command, scratch)
        with timed("serve and ask"):
            serve_and_ask(binaries, scratch)
    print(f"{wheel.name}: a user can train and serve with it")
    return 0


@contextmanager
def timed(what: str) -> Iterator[None]:
    start_s = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - start_s:.0f} s", flush=True)


def build(scratch: Path) -> Path:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (scratch / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, scratch / "source" / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", "./source"]
    run(pip, scratch)
    [wheel] = (scratch / "dist").glob("*.whl")
    return wheel


def install(wheel: Path, venv: Path) -> Path:
    """Returns the folder of its commands."""
    if not venv.exists():
        run([sys.executable, "-m", "venv", venv], wheel.parent)
    pip = [venv / "bin" / "python", "-m", "pip", "install", "--quiet"]
    run([*pip, TORCH], wheel.parent)
    run([*pip, "--force-reinstall", "--no-deps", wheel], wheel.parent)
    run([*pip, wheel], wheel.parent)
    return venv / "bin"


def run(command: list[Path | str], folder: Path) -> None:
    """Output is shown when it fails; raises SystemExit then."""
    done = subprocess.run(command, cwd=folder, env=bare_environment(), check=False, text=True, capture_output=True)
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}{done.stderr}\n{' '.join(map(str, command))}: status {done.returncode}")


def bare_environment() -> dict[str, str]:
    """Without what leads Python back to the tree."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}


def serve_and_ask(binaries: Path, scratch: Path) -> None:
    command = [binaries / "distkv", "up", "--model", "run", "--instances", "2", "--num-rblocks", "8", "--port", "0"]
    log = scratch / "up.log"
    with log.open("w") as file:
        pool = subprocess.Popen(command, cwd=scratch, env=bare_environment(), stdout=file, stderr=subprocess.STDOUT)
    try:
        ask(address(pool, log))
        pool.send_signal(signal.SIGTERM)
        status = pool.wait(ENDED_WITHIN_S)
    finally:
        if pool.poll() is None:  # its parts end with it
            pool.terminate()
            pool.wait(ENDED_WITHIN_S)
    if status != 0:
        raise SystemExit(f"{log.read_text()}\ndistkv up: status {status}")


def address(pool: subprocess.Popen[bytes], log: Path) -> str:
    """As the pool prints it once it takes requests."""
    until_s = time.monotonic() + STARTED_WITHIN_S
    while pool.poll() is None and time.monotonic() < until_s:
        found = [word for line in log.read_text().splitlines() if " serve " in line for word in line.split()]
        if urls := [word for word in found if word.startswith("http://")]:
            return urls[0]
        time.sleep(0.2)
    raise SystemExit(f"{log.read_text()}\ndistkv up took no requests")


def ask(base_url: str) -> None:
    body = {"model": "distkv", "prompt": "The key is", "max_tokens": ANSWER_TOKENS, "ignore_eos": True}
    url = base_url.removesuffix("/").removesuffix("/v1") + "/v1/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        completion = json.load(answer)
    if completion["usage"]["completion_tokens"] != ANSWER_TOKENS:
        raise SystemExit(f"{ANSWER_TOKENS} tokens were asked for: {completion}")


if __name__ == "__main__":
    sys.exit(main())
