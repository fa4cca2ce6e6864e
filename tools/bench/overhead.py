"""What lending costs while nothing is borrowed: tokens per second with lending on, against the same build with it off.

In one process, over a real ledger: instance `on` may lend to and borrow from a third one and has no need to; `off` has
lending switched off. Pairs of runs of one batch, the first of each pair in turn. Checked before anything is reported:
both give the same tokens, in every run, and nothing was borrowed.

`--of deterministic`: the price of `deterministic` instead; `on` has it, and neither lends. In bf16 the two may choose
other tokens where logits are nearly equal, so there each must only agree with itself.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.engine.llm import LLM
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.sampling_params import SamplingParams
from tests.model.llamas import save_llama
from tools.bench.machine import describe_machine

RBLOCK_SIZE, NUM_RBLOCKS = 16, 512
MODEL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}


class Batch(NamedTuple):
    prompts: list[list[int]]
    sampling: SamplingParams

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return sum(len(prompt) + self.sampling.max_tokens for prompt in self.prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", choices=("lending", "deterministic"), default="lending", help="what is on, and off")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {
        "machine": describe_machine(),
        "config": {
            name: getattr(args, name)
            for name in ("of", "dtype", "requests", "prompt_tokens", "output_tokens", "pairs", "seed")
        }
        | MODEL
        | {"rblock_size": RBLOCK_SIZE},
        **_measure(_batch(args), args.of, args.dtype, args.pairs),
    }
    print(report["machine"])
    print(", ".join(f"{name} {value}" for name, value in report["config"].items()))
    print(f"tokens per second, medians: on {report['on']:.0f}, off {report['off']:.0f}")
    low, high = report["quartiles"]
    print(f"on / off, {args.pairs} pairs: median {report['ratio']:.3f}, half of them in [{low:.3f}, {high:.3f}]")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1))


def _batch(args: argparse.Namespace) -> Batch:
    generator = torch.Generator().manual_seed(args.seed)
    prompts = torch.randint(3, 131, (args.requests, args.prompt_tokens), generator=generator).tolist()
    return Batch(prompts, SamplingParams(max_tokens=args.output_tokens, temperature=0.0, ignore_eos=True))


def _measure(batch: Batch, of: str, dtype: str, num_pairs: int) -> dict[str, Any]:
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        server = stack.enter_context(EmbeddedServer())
        model = save_llama(Path(scratch) / "model", max_position_embeddings=8192, **MODEL)
        on, off, _ = (
            stack.enter_context(LLM(_config(scratch, name, model, server.url, of, dtype)))
            for name in ("on", "off", "third")
        )
        expected = {llm: _run(llm, batch)[1] for llm in (on, off)}
        _require(expected[on] == expected[off] or (of, dtype) == ("deterministic", "bf16"))
        pairs = []
        for number in tqdm(range(num_pairs), "pairs of runs", unit="pair"):
            speeds = {}
            for llm in (on, off) if number % 2 == 0 else (off, on):
                speeds[llm], tokens = _run(llm, batch)
                _require(tokens == expected[llm])
            pairs.append((speeds[on], speeds[off]))
    ratios = sorted(with_it / without for with_it, without in pairs)
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "on": statistics.median(pair[0] for pair in pairs),
        "off": statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(ratios),
        "quartiles": [quartiles[0], quartiles[2]],
        "ratios": ratios,
    }


def _run(llm: LLM, batch: Batch) -> tuple[float, list[list[int]]]:
    """Tokens per second, and the tokens."""
    start_s = time.perf_counter()
    completions = llm.generate(batch.prompts, batch.sampling)
    elapsed_s = time.perf_counter() - start_s
    if llm.instance.status(0).borrowed_rblocks:
        raise SystemExit("something was borrowed: nothing to report")
    return batch.num_tokens / elapsed_s, [completion.token_ids for completion in completions]


def _require(is_same: bool) -> None:
    if not is_same:
        raise SystemExit("the tokens differ: nothing to report")


def _config(scratch: str, name: str, model: Path, url: str, of: str, dtype: str) -> InstanceConfig:
    values: dict[str, Any] = {
        "instance_id": name, "model": model, "run_dir": scratch,
        "kv_cache": {"num_rblocks": NUM_RBLOCKS, "rblock_size": RBLOCK_SIZE},
        "dtype": dtype,
        "deterministic": of == "deterministic" and name == "on",
        "lending": {"enabled": of == "lending" and name != "off"},
        "ledger": {"url": url},
    }  # fmt: skip
    return InstanceConfig.model_validate(values)


if __name__ == "__main__":
    main()
