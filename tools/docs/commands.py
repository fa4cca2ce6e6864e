"""Every `distkv` command's --help text, as a terminal of 100 columns shows it."""

import contextlib
import io
import os
from functools import cache
from unittest import mock

from megatron_distkv.cli.main import COMMANDS, main

# Of argparse and of ours: no colours, one width, and no default that is only this machine's.
_ENVIRONMENT = {"COLUMNS": "100", "NO_COLOR": "1"}


def render_commands() -> str:
    parts = []
    for name, meaning in COMMANDS.items():
        parts.append(f"## `distkv {name}`\n\n{meaning[0].upper()}{meaning[1:]}.\n\n```text\n{help_text(name)}```")
    return "\n\n".join(parts)


@cache
def help_text(*command: str) -> str:
    """What `distkv COMMAND --help` prints."""
    said = io.StringIO()
    kept = {key: value for key, value in os.environ.items() if not key.startswith("DISTKV_")}
    with (
        mock.patch.dict(os.environ, {**kept, **_ENVIRONMENT}, clear=True),
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
    ):
        main([*command, "--help"])
    return said.getvalue()
