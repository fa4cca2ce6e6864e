"""The `distkv` command: one subcommand per module of this room, imported only when it is asked for."""

import argparse
import importlib
import os
import sys

from megatron_distkv.errors import SupersededError, UserError

COMMANDS = {
    "up": "start a whole pool on this host: ledger, gManager, instances, gateway",
    "serve": "start one serving instance",
    "lend": "lend host memory to a pool: no model, no GPU",
    "gateway": "start the OpenAI-compatible gateway of a pool",
    "gmanager": "start the planner of a pool (any number may run; one leads)",
    "train": "train a model through the deepspeed launcher",
    "eval": "passkey recall over HTTP, by context length and depth",
    "convert": "convert a checkpoint to Hugging Face, Megatron torch_dist or Megatron legacy",
    "verify": "compare the logits of two checkpoints, or of transformers and us on one",
    "drain": "let an instance hand over what it has, and end",
    "ledger": "print who owes how much to whom",
    "doctor": "say what this machine has, and what follows from it",
}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """With defaults, but for options that have none of their own: "(default: None)" tells nobody anything."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="distkv", description="Megatron models whose KV cache is spread over many instances."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    argv = sys.argv[1:] if argv is None else argv
    for name, help_text in COMMANDS.items():
        subparser = commands.add_parser(name, help=help_text, description=help_text, formatter_class=_Help)
        if name in argv[:1]:
            module = importlib.import_module(f"megatron_distkv.cli.{name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except (UserError, SupersededError) as error:
        print(f"distkv {args.command}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `distkv ledger | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
