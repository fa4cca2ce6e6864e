"""What the loss of a creditor costs: tokens and time, against the share of the request that lay there.

In one process, over real channels: instance a serves one long request of which a share is moved to b; b's channels then
break for good. Checked before anything is reported: the tokens are those of an undisturbed run.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.engine.llm import LLM
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams
from tests.model.llamas import save_llama
from tools.bench.machine import describe_machine

RBLOCK_SIZE, PROMPT_TOKENS = 16, 4096
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
SAMPLING = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
MOVED_PER_STEP = 512


class Loss(NamedTuple):
    """Seconds of the whole prefill, seconds from the loss to the next token, and tokens computed again."""

    prefill_s: float
    recovery_s: float
    recomputed_tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each share; medians are reported")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prompt = torch.randint(3, 131, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    with tempfile.TemporaryDirectory() as scratch, EmbeddedServer() as server:
        model = save_llama(Path(scratch) / "model", max_position_embeddings=2 * PROMPT_TOKENS)
        with LLM(_config(scratch, "calm", model, "memory://")) as calm:
            expected = calm.generate([prompt], SAMPLING)[0].token_ids
        work = [share for _ in range(args.repeats) for share in SHARES]
        losses: dict[float, list[Loss]] = {share: [] for share in SHARES}
        for share in tqdm(work, "losses", unit="run"):
            losses[share].append(_lose(scratch, model, server.url, prompt, share, expected))
    rows = [_row(share, losses[share]) for share in SHARES]
    report = {"machine": describe_machine(), "prompt_tokens": PROMPT_TOKENS, "repeats": args.repeats, "rows": rows}
    print(f"{report['machine']}; prompt of {PROMPT_TOKENS} tokens, medians of {args.repeats} runs, seed 0")
    print("| at the lost creditor | tokens computed again | time to go on, of the whole prefill's | spread |")
    print("|---|---|---|---|")
    for row in rows:
        again, of_prefill, spread = row["recomputed_share"], row["time_share"], row["time_spread"]
        print(f"| {row['share']:.0%} | {again:.1%} | {of_prefill:.1%} | {spread[0]:.1%} to {spread[1]:.1%} |")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1))


def _config(scratch: str, name: str, model: Path, url: str) -> InstanceConfig:
    num_rblocks = 2 * PROMPT_TOKENS // RBLOCK_SIZE
    values: dict[str, Any] = {
        "instance_id": name, "model": model, "run_dir": scratch,
        "kv_cache": {"num_rblocks": num_rblocks, "rblock_size": RBLOCK_SIZE},
        "lending": {"max_moved_rblocks_per_step": MOVED_PER_STEP, "low_watermark": 0.0},
        "ledger": {"url": url, "heartbeat_interval_s": 0.1},
    }  # fmt: skip
    return InstanceConfig.model_validate(values)


def _lose(scratch: str, model: Path, url: str, prompt: list[int], share: float, expected: list[int]) -> Loss:
    with LLM(_config(scratch, "a", model, url)) as a, LLM(_config(scratch, "b", model, url)) as b:
        instance, request = a.instance, Request("r", prompt, SAMPLING)
        start_s = time.perf_counter()
        instance.add(request)
        _until_tokens(instance, request, 1)
        prefill_s = time.perf_counter() - start_s
        instance.rmanager.begin_step()
        instance.rmanager.move_to("r", int(share * PROMPT_TOKENS / RBLOCK_SIZE), "b")
        _until_tokens(instance, request, 2)
        b.instance.parts.listeners.close()
        start_s = time.perf_counter()
        _until_tokens(instance, request, 3)
        recovery_s = time.perf_counter() - start_s
        _until_tokens(instance, request, len(expected))
        if request.output_token_ids != expected:
            raise SystemExit("the tokens are not those of an undisturbed run: nothing to report")
        return Loss(prefill_s, recovery_s, request.num_recomputed_tokens)


def _until_tokens(instance: Any, request: Request, count: int) -> None:
    while len(request.output_token_ids) < count:
        instance.step()


def _row(share: float, losses: list[Loss]) -> dict[str, Any]:
    times = sorted(loss.recovery_s / loss.prefill_s for loss in losses)
    return {
        "share": share,
        "recomputed_share": losses[0].recomputed_tokens / PROMPT_TOKENS,
        "time_share": statistics.median(times),
        "time_spread": [times[0], times[-1]],
    }


if __name__ == "__main__":
    main()
