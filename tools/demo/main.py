"""`make demo`: train, serve on instances that lend each other memory, evaluate over HTTP, prove it.

Exit status 0 only if every answer's tokens equal those of one instance with enough memory, the longest prompts are
recalled, and nothing is owed at the end. Writes report.json, recall.png, the checkpoint and all logs into the output.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

from megatron_distkv.launch.commands import train_command
from megatron_distkv.launch.evaluate import recall_by_length

from megatron_distkv.config.base import load_config
from megatron_distkv.config.cluster import ClusterConfig
from megatron_distkv.errors import UserError
from megatron_distkv.pool import picture_of, render_debts
from tools.demo.plot import plot_recall
from tools.demo.proof import Proof, reference_tokens
from tools.demo.serving import Observation, capacity_tokens, context_lengths, refusal_alone, serve_and_ask

ROOT = Path(__file__).parents[2]
SHARED_TEXT = ROOT / ".." / "shared" / "data" / "shakespeare.txt"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="directory for everything it writes")
    parser.add_argument("--instances", type=int, default=3, help="serving instances")
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel ranks of the training")
    parser.add_argument("--skip-training", action="store_true", help="use the checkpoint that is in the output already")
    args = parser.parse_args()
    start_s = time.monotonic()
    text = SHARED_TEXT if SHARED_TEXT.exists() else None
    checkpoint = args.output / "checkpoint"
    try:
        if not args.skip_training:
            train(checkpoint, text, args.ranks, args.output)
        config = load_config(ClusterConfig, ROOT / "configs" / "cluster" / "demo.yaml")
        config = config.model_copy(update={"model": checkpoint, "instances": args.instances})
        seen = serve_and_ask(config, text, args.output)
        proof = Proof(config, seen, reference_tokens(config, seen), refusal_alone(config, seen.asked))
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    show(config, seen, proof)
    report = {**proof.report(), "wall_seconds": round(time.monotonic() - start_s, 1), **environment(config)}
    (args.output / "report.json").write_text(json.dumps(report, indent=1))
    plot_recall(recall_by_length(seen.results), capacity_tokens(config).own, args.output / "recall.png")
    print(f"\nreport: {args.output / 'report.json'}, plot: {args.output / 'recall.png'}")
    for failure in proof.failures():
        print(f"FAILED: {failure}")
    return 1 if proof.failures() else 0


def train(checkpoint: Path, text: Path | None, num_ranks: int, output: Path) -> None:
    print("1. training a byte-level GPT on passkeys in prose (Megatron-core layers, DistAttention, DeepSpeed ZeRO)")
    output.mkdir(parents=True, exist_ok=True)
    command = train_command(ROOT / "configs" / "train" / "passkey.yaml", checkpoint, num_ranks, text=text)
    with (output / "train.log").open("w") as log:
        status = subprocess.run(command, stdout=log, check=False).returncode
    if status != 0:
        raise UserError(f"the training ended with status {status}; see {output / 'train.log'}")


def show(config: ClusterConfig, seen: Observation, proof: Proof) -> None:
    print("\n4. where each request's rBlocks lay (most at one time), and what it recalled")
    print(f"{'context':>8} {'depth':>6} {'served by':>11} {'local':>6}  {'borrowed':<32} {'answer':<7} tokens")
    for result, is_identical in zip(seen.results, proof.identical, strict=True):
        borrowed = ", ".join(f"{name}: {n}" for name, n in sorted(result.kv["max_borrowed_rblocks"].items())) or "-"
        print(
            f"{result.context_tokens:>8} {result.depth:>6.2f} {result.kv['instance']:>11}"
            f" {result.kv['max_local_rblocks']:>6}  {borrowed:<32}"
            f" {'right' if result.is_right else 'WRONG':<7} {'identical' if is_identical else 'DIFFERENT'}"
        )
    print("\nthe debt ledger at its fullest:")
    print(render_debts(picture_of(seen.fullest)))
    print("\nand at the end:")
    print(render_debts(picture_of(seen.at_end)))
    own = capacity_tokens(config).own
    longest = max(context_lengths(config))
    print(
        f"\nlongest context {longest} tokens; one instance alone holds {own}: {longest / own:.1f} times"
        f"\nshort requests served meanwhile: {seen.num_short} ({seen.num_short_wrong} with other tokens than alone)"
    )
    pairs = zip(seen.results, proof.identical, strict=True)
    is_same = all(is_identical for result, is_identical in pairs if result.context_tokens == longest)
    print(
        f"\n5. a prompt that the model could take, but no single server's KV cache: {longest} tokens"
        f"\none instance alone: {'400, ' + proof.refusal if proof.refusal else 'answers it'}"
        f"\n{config.instances} instances: the answers above, {'identical' if is_same else 'DIFFERENT'}"
    )


def environment(config: ClusterConfig) -> dict[str, object]:
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "cluster": json.loads(config.model_dump_json()),
    }


if __name__ == "__main__":
    sys.exit(main())
