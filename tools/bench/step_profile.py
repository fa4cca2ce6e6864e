"""Where the time of a decode step goes: scheduler, metadata, attention, the model's other layers, sampler, the rest.

One instance in this process with random weights, a batch of requests with contexts of one length. Steps are measured
twice: bare, and with a stopwatch around each part, so that what the stopwatches themselves cost is seen. Checked before
anything is reported: the tokens of both runs are the same.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_distkv.attention import DistAttention
from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.engine import instance, model_runner
from megatron_distkv.engine.llm import LLM
from megatron_distkv.engine.scheduler import Scheduler
from megatron_distkv.model import GPT
from megatron_distkv.request import Request
from megatron_distkv.rmanager import RManager
from megatron_distkv.sampling_params import SamplingParams
from tests.model.llamas import save_llama
from tools.bench.machine import describe_machine

# Where a stopwatch goes: (what, whose attribute). A part within another one is taken from that.
PARTS: list[tuple[str, Any, str]] = [
    ("scheduler", Scheduler, "schedule"),
    ("scheduler", Scheduler, "update"),
    ("tables", RManager, "spans_before"),
    ("metadata", model_runner, "build_metadata"),
    ("other layers", GPT, "__call__"),
    ("attention", DistAttention, "_paged"),
    ("sampler", instance, "sample"),
]
SHAPES = {
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4},
    "31m": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
            "intermediate_size": 1536},
}  # fmt: skip
WARM_UP_STEPS = 3
PREFILL_TOKENS = 512  # of a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--layers", choices=("direct", "megatron"), default="direct")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--rblock-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = _measure(args)
    print(report["machine"])
    print(", ".join(f"{name} {value}" for name, value in report["config"].items()))
    print(f"a step, median of {args.steps}: {report['bare_ms']:.3f} ms; with stopwatches {report['watched_ms']:.3f} ms")
    for name, part_ms in report["parts_ms"].items():
        print(f"  {name:14s} {part_ms:9.3f} ms  {part_ms / report['watched_ms']:6.1%}")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1))


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        model = save_llama(Path(scratch) / "model", max_position_embeddings=1 << 20, **SHAPES[args.shape])
        with LLM(_config(args, scratch, model)) as llm:
            bare, tokens = _decode(llm, args, "bare")
            each_step: list[dict[str, float]] = []
            with _stopwatches() as seconds:
                watched, same_tokens = _decode(
                    llm, args, "watched", seconds.clear, lambda: each_step.append(_taken(seconds))
                )
    if tokens != same_tokens:
        raise SystemExit("the tokens differ: nothing to report")
    parts_ms = {name: 1e3 * statistics.median(step[name] for step in each_step) for name in each_step[0]}
    watched_ms = 1e3 * statistics.median(watched)
    names = ("shape", "dtype", "layers", "batch", "context", "rblock_size", "steps", "seed")
    return {
        "machine": describe_machine(),
        "config": {name: getattr(args, name) for name in names},
        "bare_ms": 1e3 * statistics.median(bare),
        "watched_ms": watched_ms,
        "parts_ms": {**parts_ms, "the rest": watched_ms - sum(parts_ms.values())},
    }


def _decode(
    llm: LLM,
    args: argparse.Namespace,
    what: str,
    when_warm: Callable[[], None] = lambda: None,
    after_step: Callable[[], None] = lambda: None,
) -> tuple[list[float], list[list[int]]]:
    """Seconds of each step in which all requests decode, and their tokens."""
    generator = torch.Generator().manual_seed(args.seed)
    prompts = torch.randint(3, 131, (args.batch, args.context), generator=generator).tolist()
    sampling = SamplingParams(max_tokens=_most_tokens(args), ignore_eos=True, seed=1)
    requests = [Request(f"{what}-{number}", prompt, sampling) for number, prompt in enumerate(prompts)]
    for request in requests:
        llm.instance.add(request)
    while not all(request.output_token_ids for request in requests):
        llm.instance.step()
    for _ in range(WARM_UP_STEPS):
        llm.instance.step()
    when_warm()
    seconds: list[float] = []
    for _ in tqdm(range(args.steps), what, unit="step"):
        start_s = time.perf_counter()
        llm.instance.step()
        seconds.append(time.perf_counter() - start_s)
        after_step()
    tokens = [request.output_token_ids[:] for request in requests]
    for request in requests:
        llm.instance.abort(request.request_id)
    return seconds, tokens


def _most_tokens(args: argparse.Namespace) -> int:
    """Of one request: those that come first decode while the others' prompts are computed."""
    num_prefill_steps = args.batch * (args.context // PREFILL_TOKENS + 1)
    return WARM_UP_STEPS + args.steps + num_prefill_steps


def _taken(seconds: dict[str, float]) -> dict[str, float]:
    """Of the step that has ended; the next one begins at 0."""
    taken = {name: seconds[name] for name, _, _ in PARTS}
    seconds.clear()
    return taken


@contextmanager
def _stopwatches() -> Iterator[dict[str, float]]:
    """Seconds of each part, without those of parts within it."""
    seconds: dict[str, float] = defaultdict(float)
    running: list[str] = []
    with ExitStack() as stack:
        for name, owner, attribute in PARTS:
            original = getattr(owner, attribute)
            setattr(owner, attribute, _watched(original, name, seconds, running))
            stack.callback(setattr, owner, attribute, original)
        yield seconds


def _watched(
    original: Callable[..., Any], name: str, seconds: dict[str, float], running: list[str]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start_s = time.perf_counter()
        running.append(name)
        try:
            return original(*args, **kwargs)
        finally:
            running.pop()
            elapsed_s = time.perf_counter() - start_s
            seconds[name] += elapsed_s
            if running:
                seconds[running[-1]] -= elapsed_s

    return call


def _config(args: argparse.Namespace, scratch: str, model: Path) -> InstanceConfig:
    longest = args.context + _most_tokens(args)
    values: dict[str, Any] = {
        "instance_id": "profiled", "model": model, "run_dir": scratch, "dtype": args.dtype, "layers": args.layers,
        "kv_cache": {
            "num_rblocks": args.batch * (longest // args.rblock_size + 2), "rblock_size": args.rblock_size,
        },
        "scheduler": {"max_running_requests": args.batch, "max_batched_tokens": PREFILL_TOKENS + args.batch},
    }  # fmt: skip
    return InstanceConfig.model_validate(values)


if __name__ == "__main__":
    main()
