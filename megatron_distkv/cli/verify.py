"""`distkv verify`: do two checkpoints, of any formats and parallelism, compute the same logits?

Both are computed in one dtype in this process; a Hugging Face checkpoint given first is computed by transformers.
"""

import argparse
import gc
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", module="megatron.*")
warnings.filterwarnings("ignore", module="torch.distributed.*")

import torch  # noqa: E402

from megatron_distkv.errors import UserError  # noqa: E402
from megatron_distkv.model import Checkpoint, find_checkpoint, init_tensor_parallel  # noqa: E402
from megatron_distkv.model.agreement import Agreement, compare_logits, our_logits, transformers_logits  # noqa: E402
from megatron_distkv.model.parallel import leave_tensor_parallel  # noqa: E402
from megatron_distkv.model.weights import CheckpointFormat  # noqa: E402
from megatron_distkv.server.tokenizer import load_tokenizer  # noqa: E402

# Relative errors between two right implementations stay far below these, and those of wrong weights far above.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}
NUM_RANDOM_PROMPTS = 4
RANDOM_PROMPT_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", type=Path, metavar="A", help="any checkpoint; Hugging Face's runs by transformers")
    parser.add_argument("other", type=Path, metavar="B", nargs="?", help="any checkpoint, run by us; None: A again")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given many times")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens that stand in for prompts")
    parser.add_argument("--dtype", choices=sorted(TOLERANCES), default="fp32", help="in which both are computed")
    parser.add_argument("--tolerance", type=float, help=f"largest relative error per token; None: {TOLERANCES}")
    parser.add_argument("--ours", action="store_true", help="compute A by us, too")
    parser.add_argument("--per-token", action="store_true", help="a line for every token")


def run(args: argparse.Namespace) -> int:
    """0: all tokens within the tolerance; 1: not."""
    reference = find_checkpoint(args.reference)
    other = find_checkpoint(args.other or args.reference)
    by_transformers = reference.format is CheckpointFormat.HF and not args.ours
    if args.other is None and not by_transformers:
        raise UserError(f"a {reference.format.value} checkpoint by us needs another to be compared with: give B")
    prompts = _prompts(args, reference, other)
    tolerance = TOLERANCES[args.dtype] if args.tolerance is None else args.tolerance
    print(f"A: {reference}, computed by {'transformers' if by_transformers else 'us'}")
    print(f"B: {other}, computed by us")
    parallel = init_tensor_parallel(1)
    try:
        if by_transformers:
            expected = transformers_logits(reference, args.dtype, prompts)
        else:
            expected = our_logits(reference, args.dtype, prompts, parallel)
        gc.collect()  # A's weights go before B's come
        found = our_logits(other, args.dtype, prompts, parallel)
    finally:
        leave_tensor_parallel()
    agreements = [compare_logits(a, b) for a, b in zip(expected, found, strict=True)]
    return _report(agreements, tolerance, args.dtype, per_token=args.per_token)


def _prompts(args: argparse.Namespace, reference: Checkpoint, other: Checkpoint) -> list[list[int]]:
    """Token ids; raises UserError when they do not suit both models."""
    vocab_size = reference.model.vocab_size
    if other.model.vocab_size != vocab_size:
        raise UserError(f"A knows {vocab_size} tokens and B {other.model.vocab_size}: they cannot compute the same")
    texts = [*args.prompt, *_lines(args.prompts)]
    longest = min(x.model.max_context_tokens or 1 << 62 for x in (reference, other))
    if not texts:
        generator = torch.Generator().manual_seed(args.seed)
        shape = (NUM_RANDOM_PROMPTS, min(RANDOM_PROMPT_TOKENS, longest))
        return [list(map(int, row)) for row in torch.randint(0, vocab_size, shape, generator=generator)]
    directory = next((x for x in reference.text_directories() if (x / "tokenizer.json").exists()), reference.directory)
    tokenizer = load_tokenizer(directory, vocab_size)
    prompts = [tokenizer.encode(text) for text in texts]
    for text, prompt in zip(texts, prompts, strict=True):
        if not prompt:
            raise UserError(f"the prompt {text!r} has no tokens")
        if len(prompt) > longest:
            raise UserError(f"the prompt {text[:40]!r} has {len(prompt)} tokens; the models take {longest}")
        if max(prompt) >= vocab_size:
            raise UserError(f"{directory}: the tokenizer gives token {max(prompt)}, the models know {vocab_size}")
    return prompts


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {path}: {error}") from None
    if not lines:
        raise UserError(f"{path} holds no prompts")
    return lines


def _report(agreements: list[Agreement], tolerance: float, dtype: str, *, per_token: bool) -> int:
    print(f"{'prompt':>6} {'tokens':>6} {'max error':>10} {'relative':>10} {'same top-1':>10}  first beyond tolerance")
    for number, found in enumerate(agreements, 1):
        first = found.first_beyond(tolerance)
        where = "-" if first is None else f"token {first} (relative {float(found.relative_error_T[first]):.2e})"
        top1 = f"{found.num_same_top1}/{found.num_tokens}"
        print(
            f"{number:6} {found.num_tokens:6} {found.max_error:10.2e} {found.relative_error:10.2e} {top1:>10}  {where}"
        )
        for token in range(found.num_tokens) if per_token else ():
            errors = f"{float(found.max_error_T[token]):10.2e} {float(found.relative_error_T[token]):10.2e}"
            print(f"{'':6} {token:6} {errors} {'same' if found.same_top1_T[token] else 'differs':>10}")
    num_tokens, same = sum(x.num_tokens for x in agreements), sum(x.num_same_top1 for x in agreements)
    agree = all(found.first_beyond(tolerance) is None for found in agreements)
    verdict = "the same within" if agree else "NOT the same within"
    print(f"{verdict} {tolerance:g} (relative, {dtype}); top-1 agrees on {same} of {num_tokens} tokens")
    return 0 if agree else 1
