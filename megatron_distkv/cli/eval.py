"""`distkv eval`: passkey recall of a running server, by context length and depth."""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from megatron_distkv.errors import UserError
from megatron_distkv.launch.evaluate import PasskeyResult, ask, openai_client, recall_by_length
from megatron_distkv.training.passkey import load_prose, prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="of the server")
    parser.add_argument("--model", default="distkv", help="the model's name there")
    parser.add_argument("--lengths", default="512,2048", help="context lengths in tokens (bytes)")
    parser.add_argument("--depths", default="0.1,0.5,0.9", help="where the passkey stands: 0 is the start")
    parser.add_argument("--text", type=Path, help="prose around the passkeys; default: the package's own text")
    parser.add_argument("--seed", type=int, default=0, help="of keys and excerpts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every answer there")


def run(args: argparse.Namespace) -> int:
    lengths, depths = _numbers(args.lengths, int, "--lengths"), _numbers(args.depths, float, "--depths")
    asked = prompts(args.seed, load_prose(args.text).held_out, [int(n) for n in lengths], depths)
    client = openai_client(args.base_url)
    import openai

    results: list[PasskeyResult] = []
    for length, depth, prompt in tqdm(asked, "asking", unit="prompt"):
        try:
            results.append(ask(client, args.model, length, depth, prompt))
        except openai.APIError as error:
            raise UserError(f"a prompt of {length} tokens failed at {args.base_url}: {error}") from None
    for length, recall in recall_by_length(results).items():
        print(f"{length:>8} tokens  recall {recall:.2f}")
    if args.json is not None:
        args.json.write_text(json.dumps([result.as_json() for result in results], indent=1))
    return 0


def _numbers(text: str, kind: type[int] | type[float], option: str) -> list[float]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} must be numbers with commas between them, got {text!r}") from None
